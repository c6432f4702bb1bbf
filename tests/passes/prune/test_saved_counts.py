"""A saved pruning is read again, whatever number of operations it reports."""

from __future__ import annotations

import torch
from torch import nn

import surgery


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval(), (torch.randn(512, 64),)


def test_more_multiply_adds_than_numbers(tmp_path):
    """512 rows: the 8.4 million multiply-adds that go are more than any tensor of the program may hold."""
    program = surgery.load(f"py:{__name__}:wide")
    small = program.apply(surgery.PruneFilters(target="0", ratio=0.5))
    (record,) = [s for e in small.journal for s in e.sites if "saved" in s.decided]
    assert record.decided["saved"]["macs"] > 2**20 + sum(t.numel() for t in small.tensors.values())
    small.save(tmp_path / "small")
    again = surgery.load(str(tmp_path / "small"), base=program)
    x = wide()[1][0]
    assert torch.equal(again.module()(x), small.module()(x))
