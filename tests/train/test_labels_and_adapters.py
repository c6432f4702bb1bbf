"""Labels of the data go into every form of a program; one adapter trains; the start is kept if nothing beats it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import onnx
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.api.programs import TrainingError
from surgery.cli import cli
from surgery.train.data import read_rows, split
from surgery.train.loop import train
from surgery.train.objectives import Classification, Distill
from surgery.train.options import Settings
from surgery.train.tokenizers import find_tokenizer
from surgery.train.watchers import read_log
from tests.train.conftest import save_tokenizer


def write_csv(path, names, rows=32, header=("text", "label")):
    """Sentences of which the first word decides the label."""
    words = ("cat", "dog", "tree")
    with path.open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(header)
        for n in range(rows):
            out.writerow([f"the {words[n % len(names)]} sees a red tree", names[n % len(names)]])
    return path


@pytest.fixture(scope="module")
def head(bert_folder):
    torch.manual_seed(0)
    return surgery.load(f"hf:{bert_folder}", task="text-classification", model_kwargs={"num_labels": 3})


def fit(program, data, folder, objective=None, held_out=0.25, **options):
    settings = Settings.parse({"batch": 8, "steps": 3, "max_length": 16, **options})
    rows = split(read_rows([data]), held_out, 0)
    return train(
        program,
        objective or Classification(),
        rows,
        settings,
        folder=folder,
        tokenizer=find_tokenizer(program),
    )


def notes(folder):
    return [row["note"] for row in read_log(folder / "log.jsonl") if "note" in row]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_field_of_an_example_has_its_own_type(head, tmp_path, suffix):
    """The column of the data and the field of the example are both called label; one is text, the other a number."""
    data = write_csv(tmp_path / "d.csv", ["no", "yes"])
    if suffix == "jsonl":
        rows = list(csv.DictReader(data.open()))
        data = tmp_path / "d.jsonl"
        data.write_text("".join(json.dumps({**row, "input_ids": "own"}) + "\n" for row in rows))
    program = head.apply(surgery.Lora(target="attn.*"))
    assert fit(program, data, tmp_path / "run").steps == 3
    assert program.labels == {"logits": ("no", "yes", "LABEL_2")}
    said = " ".join(notes(tmp_path / "run"))
    assert "the text from column 'text' and the label from column 'label'" in said
    assert "0 = no, 1 = yes" in said


def test_names_are_in_every_form_and_keep_their_numbers(head, tmp_path):
    program = head.apply(surgery.Lora(target="attn.*"))
    fit(program, write_csv(tmp_path / "d.csv", ["c", "a", "b"]), tmp_path / "run")
    program.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"))
    assert again.labels == program.labels == {"logits": ("a", "b", "c")}
    merged = again.merge()
    merged.export(tmp_path / "m.onnx")
    stored = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(stored["surgery.labels"]) == {"logits": ["a", "b", "c"]}
    # A merged program that goes on has a new base.
    assert merged.apply(surgery.Quantize(target="mlp.*")).labels == program.labels
    from surgery.store.hf import write_hf

    write_hf(merged, tmp_path / "hf")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert surgery.load(f"hf:{tmp_path / 'hf'}").labels == {"logits": ("a", "b", "c")}
    # The data have two of the three names. Sorted again, "c" would be 1.
    fit(again, write_csv(tmp_path / "e.csv", ["c", "a"]), tmp_path / "more")
    assert again.labels == {"logits": ("a", "b", "c")}
    with pytest.raises(TrainingError, match="has the label 'd', and the model's classes are a, b, c"):
        fit(again, write_csv(tmp_path / "f.csv", ["a", "d"]), tmp_path / "wrong")
    # A teacher's numbers are the student's.
    student = head.apply(surgery.Lora(target="attn.*"))
    taught = Distill(teacher="given", of="classification").taught_by(again)
    fit(student, write_csv(tmp_path / "g.csv", ["c", "b"]), tmp_path / "taught", taught)
    assert student.labels == {"logits": ("a", "b", "c")}
    # A new head has no names.
    assert again.undo("lora").apply(surgery.Head(labels=3)).labels == {}


def test_one_adapter_trains(head, tmp_path):
    """The README's film and tweets: two labels in one call. Then another call, and --only."""
    data = write_csv(tmp_path / "d.csv", ["no", "yes"])
    both = head.apply(
        surgery.Lora(target="attn.*", label="film"), surgery.Lora(target="mlp.*", label="tweets")
    )

    def moved(program, **options):
        before = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
        fit(program, data, tmp_path / "run", lr=1e-2, held_out=0, **options)
        changed = {name for name, tensor in program.tensors.items() if not torch.equal(tensor, before[name])}
        return {entry.id for entry in program.journal if changed & set(entry.tensor_names)}

    assert moved(both) == {"lora:tweets"}
    assert any("trains lora:tweets; lora:film keeps its values" in note for note in notes(tmp_path / "run"))
    assert moved(both, only=("film",)) == {"lora:film"}
    assert moved(both, only=("film", "tweets")) == {"lora:film", "lora:tweets"}
    stacked = both.apply(surgery.Lora(target="attn.q"), surgery.Adapter())
    assert moved(stacked) == {"lora", "adapter"}  # of one call
    assert [entry.id for entry in stacked.journal if entry.auto] == ["freeze"]
    with pytest.raises(
        TrainingError, match="no adapter of this name that could train; did you mean 'lora:film'"
    ):
        moved(both, only=("fim",))


def test_a_start_that_nothing_beats_is_kept(head, tmp_path):
    data = write_csv(tmp_path / "d.csv", ["no", "yes", "maybe"], rows=48)
    program = head.apply(surgery.Lora(target="attn.*"))
    first = fit(program, data, tmp_path / "run", lr=2e-2, epochs=8, steps=None)
    assert first.best > 0
    assert first.metrics["accuracy"] > first.before["accuracy"]
    before = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    worse = fit(program, data, tmp_path / "worse", lr=50.0, steps=2)
    assert worse.best == 0
    assert worse.tried["accuracy"] < worse.before["accuracy"] == first.metrics["accuracy"]
    assert worse.metrics == worse.before
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.tensors.items())


def test_the_head_follows_from_the_objective_and_the_data(bert_folder, tmp_path):
    data = write_csv(tmp_path / "d.csv", ["no", "yes", "maybe"], rows=48)
    made = CliRunner().invoke(
        cli,
        ["train", f"hf:{bert_folder}", "--objective", "classification", "--data", str(data), "--steps", "2",
         "--max-length", "16", "-o", str(tmp_path / "out")],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "gets a new text-classification head with 3 outputs" in made.output
    assert "learning rate 5e-05" in made.output
    assert "nan" not in made.output.split("held out")[0]
    assert surgery.load(str(tmp_path / "out")).labels == {"logits": ("maybe", "no", "yes")}


def test_a_decoder_without_padding_token(tmp_path):
    """Its head reads the last token that is not padding: batches have to end where the sentences end."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=101, pad_token_id=None, eos_token_id=None, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    data = tmp_path / "d.csv"
    data.write_text("text,label\n" + "the cat sees,no\nthe dog sees a red green tree and says,yes\n" * 16)
    made = CliRunner().invoke(
        cli,
        ["train", f"hf:{tmp_path / 'base'}", "--objective", "classification", "--data", str(data), "--steps", "40",
         "--batch", "8", "--lr", "1e-2", "--max-length", "16", "-o", str(tmp_path / "out")],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    program = surgery.load(str(tmp_path / "out"))
    from surgery.store.hf import write_hf

    write_hf(program.merge() if program.journal.entries else program, tmp_path / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    tokenizer = find_tokenizer(program)
    texts = ["the cat sees", "the dog sees a red green tree and says"]
    read = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    # Padding moves the logits by rounding only.
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)
    assert together.argmax(-1).tolist() == [0, 1]


def test_ctrl_c_writes_a_checkpoint(llama_folder, texts, tmp_path):
    out = tmp_path / "out"
    code = "from surgery.cli import main; main()"
    arguments = [
        "train",
        f"hf:{llama_folder}",
        "--objective",
        "causal-lm",
        "--data",
        str(texts),
        "-o",
        str(out),
    ]
    arguments += ["--steps", "100000", "--batch", "4", "--max-length", "32", "--held-out", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        # Background jobs of a shell ignore the signal, and their children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    log = tmp_path / "out.run" / "log.jsonl"
    limit = time.monotonic() + 120
    try:
        while not (log.exists() and '"loss"' in log.read_text()):
            assert time.monotonic() < limit
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    steps = [path.name for path in (tmp_path / "out.run").glob("step-*")]
    assert len(steps) == 1
    assert f"after step {int(steps[0][5:])} of 100000" in said
    assert "--resume" in said
    assert "Traceback" not in said
