"""Progress: loops and stages report to a receiver, and to nobody without one."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.common.progress import be_quiet, is_quiet, reporting, stage, track
from tests.shared import models


class Recorder:
    """Receiver that keeps what it is told."""

    def __init__(self):
        self.begun, self.steps, self.ended = [], {}, set()

    def begin(self, title, total):
        self.begun.append((title, total))
        return len(self.begun) - 1

    def advance(self, work):
        self.steps[work] = self.steps.get(work, 0) + 1

    def end(self, work):
        self.ended.add(work)

    def counted(self, title):
        """(number of steps, finished steps) of the first work with this title."""
        number = next(i for i, (own, _) in enumerate(self.begun) if own == title)
        return self.begun[number][1], self.steps.get(number, 0)


def test_loops_and_stages():
    seen = Recorder()
    with reporting(seen):
        assert list(track([1, 2, 3], "three")) == [1, 2, 3]
        assert list(track(iter("ab"), "two", 2)) == ["a", "b"]
        assert list(track(iter("ab"), "unknown")) == ["a", "b"]
        with pytest.raises(ValueError, match="stop"), stage("fails"):
            raise ValueError("stop")
    assert seen.begun == [("three", 3), ("two", 2), ("unknown", None), ("fails", None)]
    assert seen.steps == {0: 3, 1: 2, 2: 2}
    assert seen.ended == {0, 1, 2, 3}


def test_without_a_receiver_and_in_silence():
    assert list(track([1], "one")) == [1]
    seen = Recorder()
    with reporting(seen):
        be_quiet()
        assert is_quiet()
        assert list(track([1], "one")) == [1]
    assert seen.begun == []
    assert not is_quiet()


def test_what_is_countable_is_counted(tmp_path):
    """Capture, plan by site, weights of a pass, merge by weight, stages of an export."""
    seen = Recorder()
    with reporting(seen):
        module, inputs = models.attention()
        program = surgery.capture(module, inputs, {"x": {0: "batch"}})
        adapted = program.apply(surgery.Lora(target="attn.*", rank=2))
        with torch.no_grad():
            for tensor in adapted.tensors.values():
                tensor.normal_()
        merged = adapted.merge()
        merged.state()
        quantized = program.apply(surgery.Quantize(target="attn.*"))
        merged.export(tmp_path / "m.onnx")
    titles = [title for title, _ in seen.begun]
    assert "capturing Attention" in titles
    assert seen.counted("planning lora") == (2, 2)
    assert seen.counted("applying lora") == (2, 2)
    assert seen.counted("merging") == (2, 2)
    assert seen.counted("applying quantize") == (len(quantized.journal.find("quantize")[0].sites),) * 2
    stages = [title for title in titles if title.startswith("export: ")]
    assert [title.partition(": ")[2] for title in stages] == [
        "tracing the graph",
        "translating to ONNX",
        "simplifying and naming",
        "writing the file",
        "comparing onnxruntime with the program",
    ]
    assert seen.ended == set(range(len(titles)))
