"""Errors that stop a training with one line, and the accepted forms of data.

Errors: wrong data, an unreadable tokenizer, a full disk.
"""

from __future__ import annotations

import json
import resource

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.api.programs import TrainingError
from surgery.cli import main
from surgery.common.errors import SurgeryError
from surgery.train.data import read_rows
from surgery.train.objectives import CausalLm, Classification, Regression
from surgery.train.request import TrainingRequest
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tracking import Tracked
from surgery.train.watchers import Watcher, read_log
from tests.train.conftest import save_tokenizer, write
from tests.train.test_loop import fit


@pytest.fixture(scope="module")
def base(llama_folder):
    return surgery.load(f"hf:{llama_folder}").apply(surgery.Lora(target="attn.q", rank=2))


@pytest.fixture(scope="module")
def labelled(bert_folder):
    """Two classes."""
    options = {"num_labels": 2}
    return surgery.load(f"hf:{bert_folder}", task="text-classification", model_kwargs=options).apply(
        surgery.Full()
    )


LABELS = [
    ([{"text": "the cat", "label": 1.0}, {"text": "a dog", "label": float("nan")}], "row 1 has no 'label'"),
    ([{"text": "the cat", "label": 1}, {"text": "a dog", "label": None}], "row 1 has no 'label'"),
    ([{"text": "the cat", "label": [0, 1]}] * 2, r"row 0: label is \[0, 1\], which is not a label"),
    (
        [{"text": "the cat", "label": 0.5}] * 2,
        "row 0: label is 0.5, but the model's 'logits' has the classes 0 to 1",
    ),
    ([{"text": "the cat", "label": -1}] * 2, "row 0: label is -1, but the model's"),
]


@pytest.mark.parametrize(("rows", "said"), LABELS)
def test_labels_that_are_none(rows, said, labelled, tmp_path):
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(TrainingError, match=said):
        fit(labelled, Classification(), path, tmp_path / "run", held_out=0.0, steps=1)


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_separators_of_spreadsheets(mark, tmp_path):
    """A comma inside a quoted value or a single column is no separator."""
    path = tmp_path / "data.csv"
    path.write_text(f'id{mark}"text, in short"{mark}label\n0{mark}"the cat, red"{mark}x\n')
    assert list(read_rows([path]).train) == [{"id": 0, "text, in short": "the cat, red", "label": "x"}]
    path.write_text("text\na cat; a dog\n")
    assert list(read_rows([path]).train) == [{"text": "a cat; a dog"}]


def test_ragged_rows(labelled, tmp_path):
    long = tmp_path / "long.csv"
    long.write_text("text,label\nthe cat,1\na dog,0,3\n")
    with pytest.raises(TrainingError, match=r"long.csv cannot be read: .*Expected 2 fields in line 3, saw 3"):
        read_rows([long])
    short = tmp_path / "short.csv"
    short.write_text("text,label\nthe cat,1\na dog\n")
    with pytest.raises(TrainingError, match="row 1 has no 'label'"):
        fit(labelled, Classification(), short, tmp_path / "run", held_out=0.0, steps=1)
    missing = write(tmp_path / "missing.jsonl", [{"text": "the cat", "label": 1}, {"text": "a dog"}])
    with pytest.raises(TrainingError, match="row 1 has no 'label'"):
        fit(labelled, Classification(), missing, tmp_path / "run", held_out=0.0, steps=1)
    uneven = write(
        tmp_path / "uneven.jsonl", [{"text": "a", "label": [1.0, 2.0]}, {"text": "a", "label": [1.0]}]
    )
    with pytest.raises(TrainingError, match="row 1: label has 1 numbers, but the model's 'logits' has 2"):
        fit(labelled, Regression(), uneven, tmp_path / "run", held_out=0.0, steps=1)


def test_an_output_that_is_not_there(labelled, tmp_path):
    """A program with one output too: an objective's default finds it under any name, what is asked for by none."""
    path = write(tmp_path / "data.jsonl", [{"text": "the cat", "label": 1}] * 2)
    with pytest.raises(TrainingError, match="the model has no output 'logit', only logits"):
        fit(labelled, Classification(output="logit"), path, tmp_path / "run", held_out=0.0, steps=1)


def test_a_tokenizer_that_cannot_be_read_is_not_none(bert_folder, tmp_path):
    import shutil

    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    program = surgery.load(f"hf:{folder}")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TrainingError, match=r"the tokenizer in .*bert cannot be read"):
        find_tokenizer(program)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    assert find_tokenizer(program) is None


def test_a_log_on_a_full_disk(base, texts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        TrainingError, match=r"log.jsonl could not be written: No space left on device; fix that"
    ):
        fit(base, CausalLm(), texts, tmp_path / "run", steps=2)


class Fills(Watcher):
    """From a step on no file may grow over a size, which the system refuses as it does a full disk."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def stepped(self, step, loss, rate, tokens):
        if step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard writes in one
@pytest.mark.parametrize("board", [False, True], ids=["checkpoint", "tensorboard"])
def test_a_disk_that_fills_up(board, base, texts, tmp_path):
    """The checkpoint before it stays whole, and the training goes on from there."""
    run, given = tmp_path / "run", {"held_out": 0.0, "steps": 6, "checkpoint": 2}
    # A checkpoint has 4 KB, the log less: after four steps 350 bytes, and the event file 470 after three.
    watchers = [
        *([Tracked("tensorboard", tmp_path / "events")] if board else []),
        Fills(3, 400 if board else 3000),
    ]
    said = (
        "events could not be written"
        if board
        else "step-00000004 could not be written: .*nothing was left there"
    )
    try:
        with pytest.raises(SurgeryError, match=said):
            fit(base, CausalLm(), texts, run, watchers=watchers, **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert {path.name for path in run.glob("step-*")} == {"step-00000002"}
    assert not list(run.glob(".step-*"))
    assert load_file(run / "step-00000002" / "weights.safetensors")
    assert fit(base, CausalLm(), texts, run, resume=True, **given).steps == 6
    steps = [row["step"] for row in read_log(run / "log.jsonl") if "lr" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_forms_of_data(tmp_path):
    """The same rows in each."""
    import datasets

    rows = [{"text": "the cat", "label": 1}, {"text": "a dog", "label": 0}]
    table = datasets.Dataset.from_list(rows)
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("text,label\nthe cat,1\na dog,0\n")
    (tmp_path / "a.tsv").write_text("text\tlabel\nthe cat\t1\na dog\t0\n")
    table.to_parquet(tmp_path / "a.parquet")
    for end in ("jsonl", "json", "csv", "tsv", "parquet"):
        assert read_rows([tmp_path / f"a.{end}"]).train.to_list() == rows, end
    assert len(read_rows([tmp_path / "a.csv"] * 2).train) == 4
    (tmp_path / "a.txt").write_text("the cat\na dog\n")
    assert read_rows([tmp_path / "a.txt"]).train["text"][:] == ["the cat", "a dog"]
    own = tmp_path / "splits"
    own.mkdir()
    write(own / "train.jsonl", rows * 3)
    write(own / "test.jsonl", rows)
    found = TrainingRequest(CausalLm(), {"": (own,)}).rows()
    assert (len(found.train), len(found.held_out)) == (6, 2)  # its own, in place of a share
    found = TrainingRequest(CausalLm(), {"": (tmp_path / "a.csv",)}, held_out=tmp_path / "a.jsonl").rows()
    assert found.held_out.to_list() == rows
    with pytest.raises(TrainingError, match="the files have several formats"):
        read_rows([tmp_path / "a.csv", tmp_path / "a.jsonl"])


def test_the_command_with_files_of_its_own(llama_folder, tmp_path, capsys):
    """A CSV, held-out data of another, a tokenizer that does not lie with the model, TensorBoard; what is printed."""
    import shutil

    bare = shutil.copytree(llama_folder, tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    save_tokenizer(tmp_path / "reads")
    (tmp_path / "a.csv").write_text("text\n" + "the cat sees a red tree\n" * 8)
    (tmp_path / "b.csv").write_text("text\nthe dog sees a red tree\n")
    surgery.load(f"hf:{bare}").apply(surgery.Full()).save(tmp_path / "start")
    line = ["train", tmp_path / "start", "--objective", "causal-lm", "--data", tmp_path / "a.csv"]
    line += ["--held-out", tmp_path / "b.csv", "--steps", "3", "--batch", "4", "-o", tmp_path / "out"]
    with pytest.raises(SystemExit) as raised:
        main([*map(str, line)])
    assert raised.value.code == 2
    assert (
        "no tokenizer was found beside the model; name its directory with --tokenizer"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as raised:
        main([*map(str, line), "--tokenizer", str(tmp_path / "reads"), "--tensorboard"])
    said = capsys.readouterr()
    assert raised.value.code == 0, said.err
    assert list((tmp_path / "out.run" / "tensorboard").glob("events.*"))
    # A bar is drawn in a terminal only.
    assert "3/3" not in said.out + said.err
    assert "held out: loss" in said.out


def test_the_loss_of_masked_words_falls(tmp_path):
    """Two layers of MiniLM read one sentence again and again."""
    from surgery.train.objectives import MaskedLm
    from tests.conftest import minilm_path

    torch.manual_seed(0)
    options = {"num_hidden_layers": 2}
    program = surgery.load(f"hf:{minilm_path()}", task="fill-mask", model_kwargs=options).apply(
        surgery.Full()
    )
    path = write(tmp_path / "t.jsonl", [{"text": "A gripping and beautifully made film."}] * 24)
    more = {"batch": 8, "steps": 6, "lr": 1e-3, "warmup": 0}
    result = fit(program, MaskedLm(share=0.3), path, tmp_path / "run", **more)
    assert result.metrics["loss"] < 0.7 * result.before["loss"]
