"""PEFT's checkpoints in both directions: PEFT's are read here, ours by PEFT, with equal logits."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

import surgery
from surgery.cli import main
from surgery.common.errors import ExportError, LoadError
from tests.conftest import minilm_path
from tests.shared import tiny

TOLERANCE = 1e-5  # fp32, sums in another order; over the largest logit


def llama(path):
    LlamaForCausalLM(tiny.llama()).save_pretrained(path)
    return AutoModelForCausalLM


def gpt2(path):
    GPT2LMHeadModel(tiny.gpt2()).save_pretrained(path)
    return AutoModelForCausalLM


def t5(path):
    T5ForConditionalGeneration(tiny.t5()).save_pretrained(path)
    return AutoModelForSeq2SeqLM


def minilm(path):
    kwargs = {"num_labels": 2, "num_hidden_layers": 2}
    AutoModelForSequenceClassification.from_pretrained(minilm_path(), **kwargs).save_pretrained(path)
    return AutoModelForSequenceClassification


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """make -> directory, transformers class and our program, made once."""
    known = {}

    def of(make):
        if make not in known:
            folder = tmp_path_factory.mktemp(make.__name__)
            torch.manual_seed(0)
            known[make] = folder, make(folder), surgery.load(f"hf:{folder}")
        return known[make]

    return of


def inputs_of(program):
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name in program.example_inputs[1]:
        high = 2 if "type" in name else 1 if "mask" in name else 99
        found[name] = torch.randint(0, high, (3, 9), generator=generator) + ("mask" in name)
        found[name] = found[name] * 0 if "type" in name else found[name]
    return found


def peft_of(bases, make, config):
    folder, auto, program = bases(make)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(auto.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * (0.5 if "prompt" in name else 0.05))
    return model, program


def logits(model, inputs, prompt=0):
    given = {name: value for name, value in inputs.items() if not (prompt and "type" in name)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(**given).logits
    return found[:, prompt:] if prompt and found.dim() == 3 else found


def agree(got, expected):
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))


LORA = {"r": 4, "lora_alpha": 8}
CHECKPOINTS = {
    "lora on llama": (llama, LoraConfig(**LORA, target_modules=["q_proj", "down_proj", "embed_tokens"])),
    "rslora with patterns": (
        llama,
        LoraConfig(
            **LORA, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"q_proj": 2, r"^model\.layers\.0\.mlp\.down_proj": 6}, alpha_pattern={"v_proj": 3},
        ),
    ),
    "dora on gpt2": (
        gpt2,
        LoraConfig(**LORA, use_dora=True, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
    ),
    "lora and a head on minilm": (
        minilm,
        LoraConfig(**LORA, task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=0.1),
    ),
    "lora on t5": (t5, LoraConfig(**LORA, target_modules=["q", "v", "wo"])),
    "ia3 on t5": (t5, IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "ia3 on gpt2": (
        gpt2,
        IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "prefix on llama": (llama, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix with an MLP on gpt2": (
        gpt2,
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
        ),
    ),
    "prefix on minilm": (minilm, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "prompt on llama": (llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "p-tuning on llama": (
        llama, PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    ),
    "prompt and a norm on llama": (
        llama,
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["model.norm"]),
    ),
    "prefix and a norm on llama": (
        llama,
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["model.norm"]),
    ),
    "prompt on t5": (t5, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)),
}  # fmt: skip


# A prompt lengthens the outputs of a decoder.
ON_LLAMA = re.compile(r"^(prompt|p-tuning) .*llama$")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_round_trip(name, bases, tmp_path):
    make, config = CHECKPOINTS[name]
    model, base = peft_of(bases, make, config)
    model.save_pretrained(tmp_path / "theirs")
    inputs = inputs_of(base)
    expected = logits(model, inputs, 3 if ON_LLAMA.search(name) else 0)
    program = surgery.import_peft(tmp_path / "theirs", base)
    agree(program.run(**inputs)["logits"], expected)
    before = base.run(**inputs)["logits"]
    assert float((before - expected).abs().max()) > 1e-3
    # And back: PEFT's own class reads what is written here.
    surgery.export_peft(program, tmp_path / "ours")
    folder, auto, _ = bases(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # PEFT warns of keys that are missing
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        again = PeftModel.from_pretrained(auto.from_pretrained(folder), tmp_path / "ours").eval()
    agree(logits(again, inputs, 3 if ON_LLAMA.search(name) else 0), expected)
    written, theirs = (
        load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs")
    )
    theirs = {key: tensor for key, tensor in theirs.items() if "base_layer" not in key}  # as the base has it
    assert written.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if key == "prompt_embeddings":  # of an encoder-decoder PEFT keeps rows that it never reads
            tensor, written[key] = tensor[:3], written[key][:3]
        torch.testing.assert_close(written[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"rslora": True}])
def test_our_own_become_theirs(options, bases, tmp_path):
    folder, auto, base = bases(llama)
    program = base.apply(surgery.Lora(target="attn.*", rank=4, alpha=6, **options))
    torch.manual_seed(8)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    inputs = inputs_of(base)
    surgery.export_peft(program.weighted({"lora": 0.5}) if not options else program, tmp_path / "ours")
    model = PeftModel.from_pretrained(auto.from_pretrained(folder), tmp_path / "ours").eval()
    expected = (program.weighted({"lora": 0.5}) if not options else program).run(**inputs)["logits"]
    agree(logits(model, inputs), expected)


def test_parts_of_a_fused_projection_become_one_pair(bases, tmp_path, randomise):
    folder, auto, base = bases(gpt2)
    program = base.apply(surgery.Lora(target="attn.q,attn.v", rank=2))
    randomise(program)
    config = surgery.export_peft(program, tmp_path / "ours")
    assert config["r"] == 4
    model = PeftModel.from_pretrained(auto.from_pretrained(folder), tmp_path / "ours").eval()
    inputs = inputs_of(base)
    agree(logits(model, inputs), program.run(**inputs)["logits"])


def test_saved_and_merged_like_any_other(bases, tmp_path):
    make, config = CHECKPOINTS["lora and a head on minilm"]
    model, base = peft_of(bases, make, config)
    model.save_pretrained(tmp_path / "theirs")
    program = surgery.import_peft(tmp_path / "theirs", base, label="film")
    assert [e.id for e in program.journal] == ["freeze", "lora:film", "full"]
    assert {n for n in program.parameter_names() if program.trains(n)} >= {
        "classifier.weight",
        "classifier.bias",
    }
    program.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"))
    inputs = inputs_of(base)
    assert torch.equal(again.run(**inputs)["logits"], program.run(**inputs)["logits"])
    merged = again.merge().run(**inputs)["logits"]
    assert float((merged - logits(model, inputs)).abs().max()) <= 10 * TOLERANCE


def broken(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_bad_checkpoints(bases, tmp_path):
    make, config = CHECKPOINTS["lora on llama"]
    model, base = peft_of(bases, make, config)
    model.save_pretrained(tmp_path / "good")
    with pytest.raises(
        LoadError, match=r"is for another base: this one has no model\.embed_tokens, nor 4 others of its 5"
    ):
        surgery.import_peft(tmp_path / "good", bases(gpt2)[2])
    with pytest.raises(LoadError, match=r"no adapter_config.json, so it is not a PEFT checkpoint"):
        surgery.import_peft(tmp_path, base)
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    lost = next(name for name in tensors if "lora_B" in name)
    few = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(few, tmp_path / "good" / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"it has \['A'\], but needs \['A', 'B'\]"):
        surgery.import_peft(tmp_path / "good", base)
    save_file(tensors, tmp_path / "good" / "adapter_model.safetensors")
    broken(tmp_path / "good", peft_type="NEVER")
    with pytest.raises(LoadError, match="the installed peft has no type NEVER"):
        surgery.import_peft(tmp_path / "good", base)
    broken(tmp_path / "good", peft_type="LORA", lora_bias=True)
    with pytest.raises(LoadError, match=r"it has \['A', 'B'\], but needs \['A', 'B', 'b'\]"):
        surgery.import_peft(tmp_path / "good", base)
    (tmp_path / "good" / "adapter_model.safetensors").unlink()
    (tmp_path / "good" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match="a pickle, which can run code and is not read"):
        surgery.import_peft(tmp_path / "good", base)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            [surgery.Adapter(size=4)],
            "adapter: surgery cannot write adapter as a PEFT checkpoint; it can write lora, ia3",
        ),
        (
            [surgery.Lora(target="attn.*"), surgery.Prompt(tokens=2)],
            "contains one method, but the program has lora, prompt",
        ),
        ([surgery.Prefix(tokens=2)], "PEFT's prefixes shift positions, .* --positions keep"),
        (
            [surgery.Lora(target="attn.q", label="a"), surgery.Lora(target="attn.q", label="b")],
            "lora:b at .*q_proj: there is a second LoRA",
        ),
        ([surgery.Full()], "the program has no adapter"),
    ],
)
def test_what_peft_cannot_hold(passes, message, bases, tmp_path):
    program = bases(llama)[2].apply(*passes)
    with pytest.raises(ExportError, match=message):
        surgery.export_peft(program, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def surgery_(capsys):
    """The command, in this process; what it printed."""

    def run(*args, code=0):
        with pytest.raises(SystemExit) as done:
            main([str(a) for a in args])
        assert (done.value.code or 0) == code
        said = capsys.readouterr()
        return said.out + said.err

    return run


def test_the_commands(bases, tmp_path, surgery_):
    make, config = CHECKPOINTS["lora and a head on minilm"]
    model, _ = peft_of(bases, make, config)
    model.save_pretrained(tmp_path / "theirs")
    folder = bases(make)[0]
    said = surgery_("import-peft", tmp_path / "theirs", "--base", f"hf:{folder}", "-o", tmp_path / "in")
    assert "lora: 4 sites" in said
    said = surgery_("export-peft", tmp_path / "in", "-o", tmp_path / "out")
    assert "LORA at 4 modules, and classifier whole" in said
    a, b = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("out", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    said = surgery_("import-peft", tmp_path, "--base", f"hf:{folder}", "-o", tmp_path / "no", code=2)
    assert "is not a PEFT checkpoint" in said
    assert not (tmp_path / "no").exists()
