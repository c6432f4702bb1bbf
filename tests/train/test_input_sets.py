"""Model inputs from rows of text: batches that the program takes, and data that it cannot read."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.cli.loading import read_data
from surgery.common.errors import SurgeryError, TrainingError
from surgery.train.input_sets import input_sets
from tests.conftest import minilm_path


@pytest.fixture(scope="module")
def encoder():
    given = {"num_labels": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return surgery.load(f"hf:{minilm_path()}", task="text-classification", model_kwargs=given)


def test_rows_of_text_become_inputs(encoder, tmp_path):
    table = tmp_path / "reviews.csv"
    texts = [f"a film about {'very ' * number}long takes" for number in range(20)]
    table.write_text("label,text\n" + "".join(f"0,{text}\n" for text in texts))
    sets = read_data(encoder, (table,))
    assert [len(kwargs["input_ids"]) for _, kwargs in sets] == [16, 4]
    assert all(set(kwargs) == set(encoder.example_inputs[1]) for _, kwargs in sets)
    # Sorted by length, so that batches have little padding.
    assert sets[0][1]["input_ids"].shape[1] < sets[1][1]["input_ids"].shape[1]
    assert encoder.run(**sets[0][1])["logits"].shape == (16, 2)
    assert [len(kwargs["input_ids"]) for _, kwargs in input_sets(encoder, (table,), rows=3)] == [3]


def test_data_that_cannot_be_read(encoder, tmp_path):
    table = tmp_path / "numbers.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(TrainingError, match="has no column of texts or images, only a, b; name it 'text'"):
        read_data(encoder, (table,))
    (tmp_path / "data.bin").write_bytes(b"")
    with pytest.raises(SurgeryError, match=r"or a table of texts \(.csv, .jsonl"):
        read_data(encoder, (tmp_path / "data.bin",))
