"""Sentence-transformers directories become one program; the library is the judge."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import surgery
from surgery.capture.sentence import modules as ours
from surgery.common.errors import LoadError
from tests.conftest import minilm_path
from tests.shared import forked, hub, sentence
from tests.shared.commands import call

st = pytest.importorskip("sentence_transformers", reason="the sentence-transformers library judges these")
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
)

# Both sides run the same ops on the same tensors, so that only the order of sums in a kernel may differ: a few units in
# the last place of values near 1.
TOLERANCE = 1e-6

FAMILIES = {
    "bert": lambda: [Pooling(32, "mean"), Dense(32, 24), Normalize()],
    "mpnet": lambda: [Pooling(32, "cls"), LayerNorm(32), Dropout(0.1)],
    "modernbert": lambda: [Pooling(32, ("max", "mean_sqrt_len_tokens")), Normalize()],
    "t5": lambda: [
        Pooling(32, "weightedmean"),
        Dense(32, 16, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ],
    "qwen3": lambda: [
        Pooling(32, "lasttoken"),
        Dense(32, 24, activation_function=torch.nn.GELU(), use_residual=True),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_program_gives_the_librarys_embeddings(family, tmp_path):
    folder = sentence.write(tmp_path / "st", family, FAMILIES[family]())
    program, model = sentence.load(folder), sentence.opened(folder)
    assert list(program.run()) == ["sentence_embedding"]
    for texts in (sentence.TEXTS, sentence.TEXTS[1:3], sentence.TEXTS[:1] * 3):
        for side in ("right", "left"):
            inputs = sentence.features(model, texts, side)
            found, right = sentence.embed(program, inputs), sentence.wanted(model, inputs)
            assert found.std() > 0.01  # embeddings that are all alike would prove nothing
            torch.testing.assert_close(found, right, rtol=0, atol=TOLERANCE)


def test_minilm_as_it_is_shipped():
    program, model = sentence.load(minilm_path()), sentence.opened(minilm_path())
    inputs = sentence.features(model, ["A cat sat.", "The dog slept on the mat in the kitchen.", "No"])
    torch.testing.assert_close(
        sentence.embed(program, inputs), sentence.wanted(model, inputs), rtol=0, atol=TOLERANCE
    )
    # The same directory as a transformers model is what it was.
    assert "last_hidden_state" in surgery.load(f"hf:{minilm_path()}").run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ours.MODES)
def test_pooling_is_the_librarys_bit_for_bit(mode, dtype):
    torch.manual_seed(0)
    tokens = torch.randn(5, 7, 8).to(dtype)
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[1, 4:] = mask[2, :3] = mask[3, 1:] = mask[4] = 0  # right, left, one token, and none at all
    theirs = Pooling(8, (mode, "mean"))({"token_embeddings": tokens, "attention_mask": mask})
    assert torch.equal(ours.Pooling((mode, "mean"))(tokens, mask), theirs["sentence_embedding"])


@pytest.mark.parametrize("old", [True, False])
def test_modes_of_earlier_versions(old, tmp_path):
    folder = sentence.write(tmp_path / "st", stages=[Pooling(32, ("cls", "max"))])
    if old:
        config = {
            "word_embedding_dimension": 32,
            "pooling_mode_max_tokens": True,
            "pooling_mode_cls_token": True,
        }
        (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    model = sentence.opened(folder)
    inputs = sentence.features(model, sentence.TEXTS)
    assert torch.equal(sentence.embed(sentence.load(folder), inputs), sentence.wanted(model, inputs))


def test_a_transformers_directory_gets_the_mean_as_in_the_library(tmp_path):
    folder = sentence.transformer("bert", tmp_path / "bert")
    model = sentence.opened(folder)
    inputs = sentence.features(model, sentence.TEXTS)
    assert torch.equal(sentence.embed(sentence.load(folder), inputs), sentence.wanted(model, inputs))


def test_a_transformer_in_a_folder_and_weights_in_a_bin_file(tmp_path):
    folder = sentence.write(tmp_path / "st", stages=[Pooling(32, "mean"), Dense(32, 24)])
    right = sentence.opened(folder)
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in [
        path for path in folder.iterdir() if path.is_file() and not path.name.endswith("transformers.json")
    ]:
        if file.name != "modules.json":
            shutil.move(file, inner / file.name)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    from safetensors.torch import load_file

    torch.save(load_file(folder / "2_Dense/model.safetensors"), folder / "2_Dense/pytorch_model.bin")
    (folder / "2_Dense/model.safetensors").unlink()
    inputs = sentence.features(right, sentence.TEXTS)
    program = sentence.load(folder)
    assert torch.equal(sentence.embed(program, inputs), sentence.wanted(right, inputs))
    assert set(program.base.file_hashes) == {
        "0_Transformer/model.safetensors", "0_Transformer/config.json", "2_Dense/pytorch_model.bin"
    }  # fmt: skip


def test_both_configurations_are_in_the_fingerprint(tmp_path):
    folder = sentence.write(tmp_path / "st", stages=[Pooling(32, "mean"), Dense(32, 24)])
    program = sentence.load(folder).apply(surgery.Lora(target="attn.q", rank=2))
    program.save(tmp_path / "adapted")
    assert sorted(program.base.file_hashes) == [
        "2_Dense/model.safetensors",
        "config.json",
        "model.safetensors",
    ]
    # Another Dense is another base.
    other = sentence.write(tmp_path / "other", stages=[Pooling(32, "mean"), Dense(32, 24, bias=False)])
    shutil.copytree(other / "2_Dense", folder / "2_Dense", dirs_exist_ok=True)
    with pytest.raises(surgery.SurgeryError, match="2_Dense"):
        surgery.load(str(tmp_path / "adapted"))


def _with(change):
    def apply(folder):
        listed = json.loads((folder / "modules.json").read_text())
        change(listed, folder)
        (folder / "modules.json").write_text(json.dumps(listed))

    return apply


def _config(name, **options):
    def apply(folder):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **options}))

    return apply


WRONG = {
    "library module": (
        _with(lambda m, f: m[1].update(type="sentence_transformers.models.WordWeights")),
        "'WordWeights', which surgery does not capture; it captures Transformer, Pooling",
    ),
    "own code": (
        _with(lambda m, f: m[1].update(type="custom_st.Mine")),
        "'custom_st.Mine', which is code of its own",
    ),
    "outside": (_with(lambda m, f: m[1].update(path="../x")), "'../x', outside the directory"),
    "no list": (lambda f: (f / "modules.json").write_text("{}"), "modules.json is no list of modules"),
    "order": (_with(lambda m, f: m.reverse()), "a Transformer has to be the first"),
    "no pooling": (
        _with(lambda m, f: m.__delitem__(1)),
        "reads 'sentence_embedding', which no module before it makes",
    ),
    "mode": (_config("1_Pooling/config.json", pooling_mode="median"), "no pooling mode 'median'"),
    "activation": (
        _config("2_Dense/config.json", activation_function="os.system"),
        "the activation 'os.system' is not one of ELU",
    ),
    "shape": (
        _config("2_Dense/config.json", out_features=9),
        "linear.bias has shape [24], and Dense needs [9]",
    ),
    "kind": (
        _config("config_sentence_transformers.json", model_type="SparseEncoder"),
        "it is a SparseEncoder; surgery captures a SentenceTransformer",
    ),
    "tokens": (
        _config("sentence_bert_config.json", processing_kwargs={"text": {"add_special_tokens": False}}),
        "'add_special_tokens', which surgery does not do",
    ),
    "code in arguments": (
        _config("sentence_bert_config.json", model_kwargs={"attn_implementation": "someone/kernel"}),
        "downloads a kernel",
    ),
    "weights": (
        lambda f: (f / "2_Dense/model.safetensors").unlink(),
        "Dense has no 2_Dense/model.safetensors",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals_in_one_line(case, tmp_path_factory, tmp_path):
    folder = tmp_path / "st"
    shutil.copytree(_plain(tmp_path_factory), folder)
    change, said = WRONG[case]
    change(folder)
    code, text = call("inspect", f"hf:{folder}", "--task", "sentence-similarity")
    assert code == 2
    assert said in text
    assert len(text.strip().splitlines()) == 1


_MADE = []


def _plain(factory):
    if not _MADE:
        stages = [Pooling(32, "mean"), Dense(32, 24)]
        _MADE.append(sentence.write(factory.mktemp("plain") / "st", stages=stages))
    return _MADE[0]


def test_a_model_with_a_decoder_is_refused_by_name(tmp_path):
    import transformers

    config = transformers.BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    transformers.BartModel(config).save_pretrained(tmp_path / "bart")
    with pytest.raises(LoadError, match="BartModel reads decoder_input_ids"):
        sentence.load(tmp_path / "bart")


@pytest.mark.slow  # a process of its own
def test_from_the_hub(tmp_path):
    folder = sentence.write(tmp_path / "st", stages=[Pooling(32, "mean"), Dense(32, 24), Normalize()])
    (folder / "modeling.py").write_text("raise SystemExit")
    with hub.serve() as server:
        server.commit("someone/sentences", folder)
        with forked.commands(**hub.environment(server.url, tmp_path / "home")) as run:
            done = run("inspect", "hf:someone/sentences", "--task", "sentence-similarity")
        assert done.rc == 0, done.err
        assert "dense_2" in done.out
        assert not any("modeling.py" in path for path in server.downloads())
        assert any("2_Dense/model.safetensors" in path for path in server.downloads())
