"""Sentence-transformers directories that surgery writes; the library loads them and is the judge."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.common.errors import ExportError
from tests.conftest import minilm_path
from tests.shared import sentence

pytest.importorskip("sentence_transformers", reason="the sentence-transformers library judges these")
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
)

# Library and merged program run the same ops on the same weights: some units in the last place of values of a few.
SAME = 2e-6
# Against the adapter beside its weight: a merge rounds W + s B A once, over two layers with large adapters.
MERGED = 3e-5
PROMPTS = {"prompts": {"query": "what is ", "document": ""}, "default_prompt_name": "query"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    stages = [Pooling(32, ("mean", "cls")), Dense(64, 24), LayerNorm(24), Normalize()]
    made = tmp_path_factory.mktemp("sentence") / "st"
    return sentence.write(made, "bert", stages, similarity_fn_name="dot", **PROMPTS)


def adapted(folder, randomise, target="attn.*,path:dense_2.linear", scale=0.3):
    return randomise(sentence.load(folder).apply(surgery.Lora(target=target, rank=2)), scale=scale)


def test_merged_weights_of_the_transformer_and_of_dense(folder, randomise, tmp_path):
    program = adapted(folder, randomise)
    merged = program.merge()
    merged.write(tmp_path / "merged", "hf")
    before, after = sentence.opened(folder), sentence.opened(tmp_path / "merged")
    inputs = sentence.features(after, sentence.TEXTS)
    found, right = sentence.embed(program, inputs), sentence.wanted(after, inputs)
    torch.testing.assert_close(found, right, rtol=0, atol=MERGED)
    torch.testing.assert_close(sentence.embed(merged, inputs), right, rtol=0, atol=SAME)
    assert (sentence.wanted(before, inputs) - right).abs().max() > 0.1  # the adapters do something
    for name in ("2_Dense", "3_LayerNorm"):
        old, new = (load_file(root / name / "model.safetensors") for root in (folder, tmp_path / "merged"))
        assert old.keys() == new.keys()
        changed = {key for key in old if not torch.equal(old[key], new[key])}
        assert changed == ({"linear.weight"} if name == "2_Dense" else set())
    again = sentence.load(tmp_path / "merged")
    torch.testing.assert_close(sentence.embed(again, inputs), right, rtol=0, atol=SAME)


def test_everything_around_the_model_is_kept(folder, randomise, tmp_path):
    adapted(folder, randomise).merge().write(tmp_path / "merged", "hf")
    before, after = sentence.opened(folder), sentence.opened(tmp_path / "merged")
    for name in ("prompts", "default_prompt_name", "similarity_fn_name", "max_seq_length"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.max_seq_length == 64
    assert [repr(module) for module in after] == [repr(module) for module in before]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    made = {
        path.relative_to(tmp_path / "merged").as_posix()
        for path in (tmp_path / "merged").rglob("*")
        if path.is_file()
    }
    assert made == names | {"surgery_provenance.json"}
    # All of it can be pushed to the hub.
    from surgery.export.publish.artifact import read_artifact

    assert set(read_artifact(tmp_path / "merged").files) == made
    # The text before every text is the program's, too.
    from surgery.train.data_context import Setting

    assert Setting.of(sentence.load(tmp_path / "merged")).prompt == "what is "


@pytest.mark.parametrize("family", ["t5", "qwen3"])
def test_encoders_and_decoders(family, randomise, tmp_path):
    stages = [Pooling(32, "lasttoken" if family == "qwen3" else "mean"), Dense(32, 24, bias=False)]
    source = sentence.write(tmp_path / "st", family, stages)
    program = adapted(source, randomise).merge()
    program.write(tmp_path / "merged", "hf")
    after = sentence.opened(tmp_path / "merged")
    assert type(after[0].auto_model) is type(sentence.opened(source)[0].auto_model)
    for side in ("left", "right"):
        inputs = sentence.features(after, sentence.TEXTS, side)
        torch.testing.assert_close(
            sentence.embed(program, inputs), sentence.wanted(after, inputs), rtol=0, atol=SAME
        )


def test_a_transformers_directory_becomes_one(randomise, tmp_path):
    program = randomise(
        sentence.load(sentence.transformer("bert", tmp_path / "bert")).apply(
            surgery.Lora(target="attn.q", rank=2)
        )
    )
    program.merge().write(tmp_path / "merged", "hf")
    after = sentence.opened(tmp_path / "merged")
    inputs = sentence.features(after, sentence.TEXTS)
    torch.testing.assert_close(
        sentence.embed(program, inputs), sentence.wanted(after, inputs), rtol=0, atol=SAME
    )
    assert after.max_seq_length == 64


def test_a_standalone_directory_needs_no_original(folder, randomise, tmp_path):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    program = adapted(moved, randomise)
    program.save(tmp_path / "saved", standalone=True)
    shutil.rmtree(moved)
    again = surgery.load(str(tmp_path / "saved"))
    for name, value in program.run().items():
        assert torch.equal(value, again.run()[name])
    # It is what the library opens, too.
    inputs = sentence.features(sentence.opened(folder), sentence.TEXTS)
    base = sentence.wanted(sentence.opened(tmp_path / "saved/base"), inputs)
    assert torch.equal(base, sentence.wanted(sentence.opened(folder), inputs))


def test_adapters_that_are_not_merged_are_refused(folder, randomise, tmp_path):
    with pytest.raises(ExportError, match="merge first"):
        adapted(folder, randomise).write(tmp_path / "x", "hf")
    # PEFT would not find layers below `transformer.` in a transformers model, and load nothing.
    with pytest.raises(ExportError, match="merge it with --format hf"):
        adapted(folder, randomise).write(tmp_path / "x", "peft")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_minilm(randomise, tmp_path):
    program = adapted(minilm_path(), randomise, "attn.*", scale=0.05).merge()
    program.write(tmp_path / "merged", "hf")
    after = sentence.opened(tmp_path / "merged")
    inputs = sentence.features(after, ["A cat sat.", "The dog slept on the mat in the kitchen.", "No"])
    torch.testing.assert_close(
        sentence.embed(program, inputs), sentence.wanted(after, inputs), rtol=0, atol=SAME
    )
    assert (
        after.max_seq_length
        == json.loads((tmp_path / "merged/sentence_bert_config.json").read_text())["max_seq_length"]
    )
