"""Objectives alone: their examples from rows, and their losses."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

import surgery
from surgery.api.programs import TrainingError
from surgery.api.training import Setting
from surgery.cli import main
from surgery.train.data import read_rows, split
from surgery.train.loop import train
from surgery.train.objectives import CausalLm, Classification, MaskedLm, Regression, Sft
from surgery.train.options import Settings
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tokens import IGNORED
from tests.conftest import minilm_path
from tests.train.conftest import write


@pytest.fixture(scope="module")
def llama(llama_folder):
    return surgery.load(f"hf:{llama_folder}")


@pytest.fixture(scope="module")
def small():
    """MiniLM of two layers with a new head."""
    torch.manual_seed(0)
    options = {"num_labels": 2, "num_hidden_layers": 2}
    return surgery.load(f"hf:{minilm_path()}", task="text-classification", model_kwargs=options)


def batch_of(program, objective, path, longest=32):
    rows = read_rows([path]).train
    setting = objective.prepared(rows, Setting.of(program, find_tokenizer(program), longest))
    examples = [example for row in rows for example in objective.examples(row, setting)]
    return objective.collate(examples, setting, torch.Generator().manual_seed(0)), setting


def test_sft_counts_answers_alone(llama, tmp_path):
    dialogue = [
        {"role": "user", "content": "what is it"},
        {"role": "assistant", "content": "a red cat"},
        {"role": "user", "content": "is it"},
        {"role": "assistant", "content": "yes"},
    ]
    path = write(tmp_path / "d.jsonl", [{"messages": dialogue}, {"messages": dialogue[:2]}])
    batch, setting = batch_of(llama, Sft(), path)
    read = setting.tokenizer
    learned = [read.decode([t for t in row.tolist() if t != IGNORED]).split() for row in batch["labels"]]
    assert learned[0] == ["a", "red", "cat", "</s>", "yes", "</s>"]
    assert learned[1] == ["a", "red", "cat", "</s>"]
    ids, labels = batch["inputs"]["input_ids"], batch["labels"]
    at = labels[:, :-1] != IGNORED
    assert torch.equal(ids[:, 1:][at], labels[:, :-1][at])  # each is the token that comes next
    module = llama.module()
    logits = module(**batch["inputs"])["logits"]
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(Sft().loss(module, batch), wanted)


def test_sft_of_prompt_and_response_is_that_of_the_dialogue(llama, tmp_path):
    row = {"instruction": "what is", "input": "it", "output": "a cat"}
    pair, _ = batch_of(llama, Sft(), write(tmp_path / "a.jsonl", [row]))
    messages = [{"role": "user", "content": "what is\n\nit"}, {"role": "assistant", "content": "a cat"}]
    whole, _ = batch_of(llama, Sft(), write(tmp_path / "b.jsonl", [{"messages": messages}]))
    assert torch.equal(pair["labels"], whole["labels"])


def test_causal_lm_cuts_texts_and_mixes_none(llama, tmp_path):
    texts = ["the cat sees a red tree and says yes", "no"]
    batch, setting = batch_of(llama, CausalLm(), write(tmp_path / "t.jsonl", [{"text": t} for t in texts]), 4)
    rows = [row[row != 0].tolist() for row in batch["inputs"]["input_ids"]]
    assert [len(row) for row in rows] == [4, 4, 2, 2]
    assert setting.tokenizer.decode(rows[3]).startswith("no")


def test_masked_lm_hides_tokens_but_no_special_ones(small, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "A gripping and beautifully made film. " * 3}] * 40)
    batch, setting = batch_of(small, MaskedLm(share=0.3), path, 64)
    labels, ids = batch["labels"], batch["inputs"]["input_ids"]
    chosen = labels != IGNORED
    special = torch.isin(labels, torch.tensor(setting.tokenizer.all_special_ids))
    assert not (special & chosen).any()
    count = int(chosen.sum())
    hidden = float((ids[chosen] == setting.tokenizer.mask_token_id).double().mean())
    # Of several hundred draws the share is within four standard deviations.
    assert count > 200
    assert abs(hidden - 0.8) < 4 * (0.16 / count) ** 0.5


def test_regression_has_the_error_and_the_correlation():
    said, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [3.0], [5.0]])
    found = Regression().metrics({"said": said, "labels": labels})
    assert found["loss"] == pytest.approx(2 / 3)
    assert found["pearson"] == pytest.approx(float(torch.corrcoef(torch.cat([said, labels], 1).T)[0, 1]))


@pytest.mark.slow
def test_classification_of_film_sentences(small, tmp_path):
    """Two layers of MiniLM, 720 sentences: better than chance on 180 others."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
    from data import sentiment

    found = sentiment("film").train[:900]
    names = ("bad", "good")
    path = write(tmp_path / "film.jsonl", [{"sentence": s.text, "label": names[s.label]} for s in found])
    program = small.apply(surgery.Full())
    settings = Settings(batch=16, lr=2e-4, epochs=3, max_length=48)
    rows = split(read_rows([path]), 0.2, 0)
    result = train(
        program, Classification(), rows, settings, folder=tmp_path / "run", tokenizer=find_tokenizer(program)
    )
    # Chance is 0.5 with a standard deviation of 0.037 on 180 sentences.
    assert result.metrics["accuracy"] > 0.61
    assert result.metrics["loss"] < result.before["loss"]


BAD = [
    ([{"words": "a", "label": 0}], [], "no column looks like the text; the data has words, label"),
    ([{"text": "a", "label": 0}], ["--label", "lable"], "no column 'lable'; did you mean 'label'"),
    ([{"text": "a", "label": 1}, {"text": "b", "label": 2}], [], "row 1: label is 2, but the model's 'logits' has the"),
    ([{"text": "a", "label": c} for c in "xyz"], [], "has 3 labels, but the model's 'logits' has 2 classes"),
    ([{"text": 3, "label": 0}] * 4, [], "row 0: column 'text' contains 3, which is not a text"),
    ([{"text": "a", "label": 0}] * 4, ["--smoothing", "2"], "--smoothing is '2'"),
    ([{"text": "a", "label": 0}] * 4, ["--lr", "fast"], "training: --lr is 'fast'"),
    ([{"text": "a", "label": 0}] * 4, ["--regularize", "l2=1@attn.*"], "write l1=1e-4@TARGET"),
    ([], [], "is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "more", "said"), BAD)
def test_bad_input_is_one_line(rows, more, said, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("surgery.cli.loading.load", lambda *args, **kwargs: small)
    refused(write(tmp_path / "data.jsonl", rows), more, said, tmp_path, capsys)


def refused(path, more, said, tmp_path, capsys):
    command = ["train", "small", "--objective", "classification", "--data", str(path)]
    with pytest.raises(SystemExit) as caught:
        main([*command, "-o", str(tmp_path / "out"), "--held-out", "0", *more])
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if not line.startswith("note: ")]
    assert caught.value.code == 2, errors
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "out").exists()


def test_nothing_trainable_and_no_tokenizer(small, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "data.jsonl", [{"text": "a", "label": 0}] * 4)
    frozen = small.apply(surgery.Freeze(target="all"))
    if frozen.count_parameters()[1]:
        frozen = small.apply(surgery.Freeze(target="**"))
    monkeypatch.setattr("surgery.cli.loading.load", lambda *args, **kwargs: frozen)
    refused(path, [], "nothing trains in this program", tmp_path, capsys)
    monkeypatch.setattr("surgery.cli.loading.load", lambda *args, **kwargs: small)
    monkeypatch.setattr("surgery.cli.training.find_tokenizer", lambda *args: None)
    refused(path, [], "no tokenizer was found beside the model", tmp_path, capsys)


def test_objectives_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["objectives", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in listed} >= {
        "classification",
        "regression",
        "causal-lm",
        "masked-lm",
        "sft",
    }
    with pytest.raises(SystemExit):
        main(["objectives", "sft"])
    assert "--response" in capsys.readouterr().out


def test_a_template_that_rewrites_what_went_before_is_refused(llama, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}")
    path = write(tmp_path / "a.jsonl", [{"prompt": "what is it", "response": "a cat"}])
    read = AutoTokenizer.from_pretrained(llama.base.loaded.metadata["tokenizer"])
    assert (
        read("1")["input_ids"] == read("2")["input_ids"]
    )  # both unknown: the prompt's length tells them apart
    template.write_text("{% if messages | length > 1 %}no {% endif %}{{ messages[0]['content'] }} a cat")
    with pytest.raises(TrainingError, match="answers cannot be located"):
        batch_of(llama, Sft(template=str(template)), path)


def test_the_command_trains_and_saves(llama_folder, tmp_path, capsys):
    """sft of all weights from the command line in bf16, and what it wrote loads as it was scored."""
    rows = [{"prompt": "what is it", "response": answer} for answer in ("a red cat", "a red dog") * 8]
    path = write(tmp_path / "data.jsonl", rows)
    surgery.load(f"hf:{llama_folder}").apply(surgery.Full()).save(tmp_path / "adapted")
    out = tmp_path / "trained"
    command = ["train", str(tmp_path / "adapted"), "--objective", "sft", "--data", str(path), "-o", str(out)]
    command += ["--precision", "bf16", "--steps", "6", "--batch", "4", "--lr", "1e-2", "--held-out", "0.25"]
    command += ["--regularize", "l1=1e-6@attn.q", "--json"]
    with pytest.raises(SystemExit) as caught:
        main(command)
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    result = json.loads(said.out)
    assert result["metrics"]["loss"] < result["before"]["loss"]
    trained = surgery.load(str(out))
    batch, _ = batch_of(trained, Sft(), path)
    with torch.no_grad():
        found = float(Sft().loss(trained.module(), batch))
    # The held-out rows are like the rest; bf16 keeps three digits.
    assert found == pytest.approx(result["metrics"]["loss"], rel=0.05)
    assert not list((tmp_path / "trained.run").glob("step-*"))
