"""`export --sentence-transformers`: the library loads the directory with backend="onnx"; its embeddings are equal."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

import surgery
from surgery.common.errors import ExportError
from tests.conftest import minilm_path
from tests.shared import optimum_stand_in, sentence
from tests.shared.commands import call

pytest.importorskip("sentence_transformers", reason="the sentence-transformers library judges these")
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

# onnxruntime fuses ops and sums in another order than torch: 1e-6 of values near 1 in the embeddings of two layers.
TOLERANCE = 5e-6
# onnxruntime rounds activations beside weights of few bits. That moves an embedding by much less than the codes do.
ROUNDED = 0.25
FAMILIES = {
    "bert": lambda: [Pooling(32, ("mean", "max")), Dense(64, 24), Normalize()],
    "t5": lambda: [Pooling(32, "mean_sqrt_len_tokens"), Normalize()],
    "qwen3": lambda: [Pooling(32, "lasttoken"), Normalize()],
}
SCRIPT = """
import json, sys, torch
from sentence_transformers import SentenceTransformer
cpu = {"provider": "CPUExecutionProvider"}
model = SentenceTransformer(sys.argv[1], backend="onnx", device="cpu", model_kwargs=cpu)
made = [model.encode(texts).tolist() for texts in json.loads(sys.argv[2])]
print("RESULT" + json.dumps([type(model[0].auto_model).__module__, made]))
"""
BATCHES = [sentence.TEXTS, sentence.TEXTS[1:2], sentence.TEXTS[:3] * 2]


@pytest.fixture(params=["stand-in", "optimum"])
def encode(request, monkeypatch):
    """A function of a directory that gives the embeddings of BATCHES, through the library's onnx backend."""
    if request.param == "stand-in":
        optimum_stand_in.install(monkeypatch)
        return lambda folder: [
            torch.from_numpy(sentence.opened(folder, backend="onnx").encode(texts)) for texts in BATCHES
        ]
    python = os.environ.get("OPTIMUM_PYTHON")
    if not python:
        pytest.skip(
            "OPTIMUM_PYTHON names no interpreter with sentence-transformers[onnx] (transformers before 4.58)"
        )

    def run(folder):
        bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [python, "-c", SCRIPT, str(folder), json.dumps(BATCHES)], capture_output=True, text=True, env=bare
        )
        assert done.returncode == 0, done.stderr
        module, made = json.loads(done.stdout.split("RESULT")[1])
        assert module.startswith("optimum.")
        return [torch.tensor(each) for each in made]

    return run


def right(folder) -> list[torch.Tensor]:
    """The library's embeddings, in torch."""
    return [torch.from_numpy(sentence.opened(folder).encode(texts)) for texts in BATCHES]


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("t5", "qwen3"))]
)
def test_the_onnx_backend_gives_the_embeddings_of_torch(family, encode, randomise, tmp_path):
    folder = sentence.write(tmp_path / "st", family, FAMILIES[family]())
    target = "attn.*,path:dense_2.linear" if family == "bert" else "attn.*"
    program = randomise(sentence.load(folder).apply(surgery.Lora(target=target, rank=2)), scale=0.3).merge()
    report = program.write(tmp_path / "out", "onnx-sentence-transformers")
    assert list(report.outputs) == ["last_hidden_state"]
    assert report.path == tmp_path / "out/onnx/model.onnx"
    assert report.path.is_file()
    for one, other in zip(encode(tmp_path / "out"), right(tmp_path / "out"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    # The weights are those of the merge, in the module that the library runs itself, too.
    assert (right(tmp_path / "out")[0] - right(folder)[0]).abs().max() > 0.05


@pytest.mark.parametrize(
    "made",
    [
        surgery.Lora(target="attn.*", rank=2),
        surgery.Quantize(target="mlp.*,attn.*", format="int8-dynamic"),
        pytest.param(
            surgery.Quantize(target="mlp.*,attn.*", format="int4", group=32), marks=pytest.mark.slow
        ),
    ],
    ids=["lora", "int8", "int4"],
)
def test_adapters_and_codes_are_in_the_file_alone(made, encode, randomise, tmp_path):
    folder = sentence.write(tmp_path / "st", "bert", FAMILIES["bert"]())
    plain, model = sentence.load(folder), sentence.opened(folder)
    program = plain.apply(made)
    if made.name == "lora":
        randomise(program, scale=0.3)
    program.write(tmp_path / "out", "onnx-sentence-transformers")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    for texts, found in zip(BATCHES, encode(tmp_path / "out"), strict=True):
        inputs = sentence.features(model, texts)
        wanted = sentence.embed(program, inputs)
        moved = float((wanted - sentence.embed(plain, inputs)).abs().max())
        assert moved > 1e-3
        error = float((found - wanted).abs().max())
        assert error < (TOLERANCE if made.name == "lora" else ROUNDED * moved)


@pytest.mark.slow
def test_minilm_by_the_command(encode, tmp_path):
    model = (f"hf:{minilm_path()}", "--task", "sentence-similarity")
    code, text = call("export", *model, "--sentence-transformers", "-o", tmp_path / "out")
    assert code == 0, text
    assert "→ last_hidden_state" in text
    for one, other in zip(encode(tmp_path / "out"), right(minilm_path()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def test_the_plain_format_gives_the_embedding(tmp_path):
    import onnxruntime

    folder = sentence.write(tmp_path / "st", "bert", FAMILIES["bert"]())
    program, model = sentence.load(folder), sentence.opened(folder)
    report = program.export(tmp_path / "m.onnx")
    assert list(report.outputs) == ["sentence_embedding"]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for texts in BATCHES:
        for side in ("left", "right"):
            inputs = sentence.features(model, texts, side)
            inputs = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), **inputs}
            (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
            torch.testing.assert_close(
                torch.from_numpy(found), sentence.wanted(model, inputs), rtol=0, atol=TOLERANCE
            )


def test_what_the_library_runs_itself_cannot_have_an_adapter(randomise, tmp_path):
    folder = sentence.write(tmp_path / "st", "bert", FAMILIES["bert"]())
    program = sentence.load(folder).apply(surgery.Lora(target="path:dense_2.linear", rank=2))
    with pytest.raises(
        ExportError, match=r"lora changes dense_2\.linear, which the library runs from its own weights"
    ):
        program.write(tmp_path / "out", "onnx-sentence-transformers")
    assert not (tmp_path / "out").exists()


def test_another_model_and_options_that_do_not_go_together(tmp_path):
    folder = sentence.transformer("bert", tmp_path / "bert")
    code, text = call("export", f"hf:{folder}", "--sentence-transformers", "-o", tmp_path / "out")
    assert code == 2
    assert "load it with --task sentence-similarity" in text
    assert "Traceback" not in text
    code, text = call(
        "export", f"hf:{folder}", "--sentence-transformers", "--generate", "-o", tmp_path / "out"
    )
    assert code == 2
    assert "remove --generate" in text
    assert not (tmp_path / "out").exists()
