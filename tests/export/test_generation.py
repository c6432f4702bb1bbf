"""Language models for generation, and LoRA as inputs: onnxruntime's tokens and outputs against the model's."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5ForConditionalGeneration

import surgery
from surgery.cli import main
from surgery.common.errors import ExportError, PassError
from surgery.export.generation import check_tokens
from surgery.export.generator import open_generator
from surgery.export.readback import journal_of, provenance_of
from tests.conftest import minilm_path
from tests.docs.blocks import python_block
from tests.shared import tiny

NEW = 32
TOLERANCE = 1e-4  # of the logits' scale: what surgery.export.parity argues for fp32


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with two random LoRAs of different rank and scale, and its program."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(folder / "base")
    program = surgery.load(f"hf:{folder / 'base'}").apply(
        surgery.Lora(target="attn.*", rank=2, label="film"),
        surgery.Lora(target="attn.q,mlp.*", rank=3, alpha=7, label="news"),
    )
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.3)
    program.save(folder / "adapted")
    return folder, program


@pytest.fixture(scope="module")
def exported(two):
    folder, _ = two
    with pytest.raises(SystemExit) as raised:
        main(["export", str(folder / "adapted"), "-o", str(folder / "onnx"), "--generate"])
    assert raised.value.code == 0
    return folder / "onnx"


@pytest.fixture(scope="module")
def adaptable(two):
    folder, _ = two
    line = [
        "export",
        str(folder / "adapted"),
        "-o",
        str(folder / "slots"),
        "--generate",
        "--adapters-as-inputs",
    ]
    with pytest.raises(SystemExit) as raised:
        main(line)
    assert raised.value.code == 0
    return folder / "slots"


def session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options)


def greedy(folder, ids, mask, options=None):
    """Greedy decoding with the two graphs, written without transformers or surgery."""
    prefill, decode = session(folder / "prefill.onnx"), session(folder / "decode.onnx")
    cached = [value.name for value in decode.get_inputs() if "past_key_values" in value.name]
    tokens, given = [ids], ids
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    feed = {"input_ids": given, "attention_mask": mask, "position_ids": positions}
    outputs = prefill.run(None, feed, options)
    for step in range(NEW):
        given = outputs[0][:, -1].argmax(-1)[:, None]
        tokens.append(given)
        if step == NEW - 1:
            return np.concatenate(tokens, 1)
        mask = np.concatenate([mask, np.ones_like(given)], 1)
        feed = {"input_ids": given, "attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -1:] - 1}
        feed.update(zip(cached, outputs[1:], strict=True))
        outputs = decode.run(None, feed, options)
    raise AssertionError


def prompts():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 100, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def expected(model, ids, mask):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
    ).numpy()


def test_greedy_tokens_of_two_plain_sessions(two, exported):
    _, program = two
    ids, mask = prompts()
    # min_new_tokens in the model forbids the end token, which a plain argmax may choose: none does here.
    wanted = expected(program.live(), ids, mask)
    assert np.array_equal(greedy(exported, ids.numpy(), mask.numpy()), wanted)
    base = expected(AutoModelForCausalLM.from_pretrained(two[0] / "base"), ids, mask)
    assert not np.array_equal(base, wanted)


@pytest.mark.parametrize(
    "how", [{"do_sample": True, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}, {"do_sample": False}]
)
def test_generate_of_transformers(two, exported, how):
    ids, mask = prompts()
    found = []
    for model in (two[1].live(), open_generator(exported)):
        torch.manual_seed(7)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **how))
    assert torch.equal(*found)


def test_without_a_cache_and_without_generate(two, exported):
    ids, mask = prompts()
    live, model = two[1].live(), open_generator(exported)
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(live.generate(ids, **given), model.generate(ids, use_cache=False, **given))
    with torch.no_grad():
        expected, found = live(ids).logits, model(input_ids=ids.int()).logits
    assert float((expected - found).abs().max()) <= TOLERANCE * float(expected.abs().max())
    with pytest.raises(ExportError, match="pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ExportError, match="no weights to save"):
        model.save_pretrained("somewhere")


def test_names_and_provenance_survive(two, exported):
    for part in ("prefill", "decode"):
        told = provenance_of(exported / f"{part}.onnx")
        own = {name: held for name, held in told.items() if held.pass_name == "lora"}
        assert set(own) == set(two[1].tensors)
        assert {held.instance for held in own.values()} == {"film", "news"}
        assert [entry["id"] for entry in journal_of(exported / f"{part}.onnx")][1:] == [
            "lora:film",
            "lora:news",
        ]
        axes = [value.shape for value in session(exported / f"{part}.onnx").get_inputs()]
        assert axes[:2] == [["batch", "sequence"], ["batch", "total_sequence"]]


def test_weights_lie_there_once(two, exported):
    """Both graphs read one file, about as large as the weights."""
    weights = sum(t.numel() for t in {id(t): t for t in two[1].state().values()}.values()) * 4
    assert (exported / "decode.onnx.data").stat().st_size <= 1.05 * weights
    assert (exported / "prefill.onnx.data").stat().st_size == 0
    assert (exported / "generation_config.json").exists()


def test_adapters_switched_in_one_session(two, adaptable):
    ids, mask = prompts()
    for name in ("film", "news", None, "film"):
        alone = two[1].only(name) if name else two[1].only()
        options = ort.RunOptions()
        adapter = ort.LoraAdapter()
        if name:
            adapter.Load(str(adaptable / f"{name}.onnx_adapter"))
            options.add_active_adapter(adapter)
        assert np.array_equal(
            greedy(adaptable, ids.numpy(), mask.numpy(), options), expected(alone.live(), ids, mask)
        )


def test_adapters_of_the_generator(two, adaptable):
    ids, mask = prompts()
    model = open_generator(adaptable)
    for name in ("film", "news"):
        with model.adapter(name):
            found = model.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        live = two[1].only(name).live()
        assert torch.equal(
            found, live.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        )
    (adaptable / "bad.onnx_adapter").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot be read as an adapter"), model.adapter("bad"):
        pass
    (adaptable / "bad.onnx_adapter").unlink()
    with pytest.raises(ExportError, match=r"two of them set .*combine them"), model.adapter("film", "news"):
        pass
    with pytest.raises(ExportError, match=r"no adapter 'flim'.*film"), model.adapter("flim"):
        pass


def test_as_the_page_has_it(two, adaptable):
    source = python_block("docs/language_models.md", "open_generator")
    ids, _ = prompts()
    place = {"tokenizer": lambda *_, **__: {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])}}
    exec(compile(source.replace('"onnx"', repr(str(adaptable))), "page", "exec"), place)
    live = two[1].only("film").live()
    assert torch.equal(place["tokens"], live.generate(ids[:1], max_new_tokens=32))


def test_one_graph_and_its_adapters(randomise, tmp_path):
    """An encoder's graph with two adapters, the second at half weight, and outputs that neither changes."""
    torch.manual_seed(0)
    program = surgery.load(
        f"hf:{minilm_path()}",
        task="text-classification",
        model_kwargs={"num_labels": 2, "num_hidden_layers": 2},
    )
    program = program.apply(
        surgery.Lora(target="attn.q,attn.v", rank=4, label="film"),
        surgery.Lora(target="mlp.*", rank=2, label="news"),
    )
    program = randomise(program).weighted({"news": 0.5})
    report = program.export_adaptable(tmp_path / "out")
    _, inputs = program.example_inputs
    feed = {name: value.numpy() for name, value in inputs.items()}
    model = session(tmp_path / "out" / "model.onnx")
    seen = []
    for name in ("film", "news", None):
        options, adapter = ort.RunOptions(), ort.LoraAdapter()
        if name:
            adapter.Load(str(report.adapters[name]))
            options.add_active_adapter(adapter)
        (got,) = model.run(None, feed, options)
        others = {"film", "news"} - {name}
        wanted = program.without(*others).run()["logits"].numpy()
        assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()
        seen.append(got)
    assert np.abs(seen[0] - seen[2]).max() > 100 * TOLERANCE * np.abs(seen[2]).max()
    assert np.abs(seen[1] - seen[2]).max() > 100 * TOLERANCE * np.abs(seen[2]).max()
    told = json.loads((tmp_path / "out" / "adapters.json").read_text())
    assert told["adapters"] == {"film": "film.onnx_adapter", "news": "news.onnx_adapter"}
    names = {value.name for value in model.get_overridable_initializers()}
    assert set(told["inputs"]) == names
    file = ort.AdapterFormat.read_adapter(str(report.adapters["film"]))
    assert set(file.get_parameters()) < names


def test_a_model_that_differs_is_found(two, exported):
    folder, program = two
    with torch.no_grad():
        other = surgery.load(str(folder / "adapted")).live()
        next(p for n, p in other.named_parameters() if n.endswith("lora_film.B")).mul_(1.01)
    with pytest.raises(ExportError, match="in step 1 the logits"):
        check_tokens(other, exported, 0)
    assert check_tokens(program.live(), exported, 0).error <= TOLERANCE


def test_what_is_refused(two, tmp_path, capsys):
    folder, program = two
    LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path / "llama")
    T5ForConditionalGeneration(tiny.t5()).save_pretrained(tmp_path / "t5")
    base = str(folder / "base")

    def run(*line):
        with pytest.raises(SystemExit) as raised:
            main([str(part) for part in line])
        said = capsys.readouterr().err.strip()
        assert raised.value.code == 2
        assert len([row for row in said.splitlines() if row.startswith("error:")]) == 1
        assert not (tmp_path / "out").exists()
        assert not [*tmp_path.glob(".out*")]
        return said

    out = ("-o", tmp_path / "out")
    assert "has other parts" in run("export", f"hf:{tmp_path / 't5'}", "--generate", *out)
    assert "does not generate" in run("export", f"hf:{minilm_path()}", "--generate", *out)
    assert "has no active, unmerged LoRA" in run("export", f"hf:{base}", "--adapters-as-inputs", *out)
    assert "remove --external-data" in run("export", f"hf:{base}", "--generate", "--external-data", *out)
    assert "exists" in run("export", f"hf:{base}", "--generate", "-o", base)
    with pytest.raises(ExportError, match="was not written by `surgery export --generate`"):
        open_generator(base)
    prefixed = program.undo_all().apply(surgery.Prefix(tokens=2))
    with pytest.raises(ExportError, match=r"--generate: prefix changes more .*--without prefix"):
        prefixed.export_generation(tmp_path / "out")
    with pytest.raises(ExportError, match=r"enable a disabled adapter \(--weight lora:film=1\)"):
        program.without("film", "news").export_adaptable(tmp_path / "out")
    with pytest.raises(ExportError, match="is a directory"):
        program.export(tmp_path)
    dora = program.undo_all().apply(surgery.Lora(target="attn.*", dora=True))
    with pytest.raises(PassError, match=r"--adapters-as-inputs at .*has --dora"):
        dora.export_adaptable(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantized(two, tmp_path):
    """4-bit weights with an adapter: the same tokens as in torch when onnxruntime runs the file unoptimized."""
    program = surgery.load(f"hf:{two[0] / 'base'}").apply(
        surgery.Quantize(target="attn.*,mlp.*", format="int4"), surgery.Lora(target="attn.*", rank=2)
    )
    made = program.export_generation(tmp_path / "out")
    assert (made.tokens, made.opset) == (96, 21)
    told = provenance_of(tmp_path / "out" / "decode.onnx")
    codes = [held for held in told.values() if held.pass_name == "quantize" and held.name.endswith("codes")]
    assert len(codes) == 14
    assert {held.dtype for held in codes} == {"int4"}
