"""Weights that no op of a site reads are listed, and targets that name them say so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import surgery
from surgery.api.programs import TargetError
from surgery.graph.unread import unread_weights


class Mixed(nn.Module):
    """Weights of an LSTM, of a bilinear layer and of an einsum, beside an embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.time = nn.LSTM(16, 16, batch_first=True)
        self.pair = nn.Bilinear(16, 16, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, ids):
        last = self.time(self.token(ids))[0][:, -1]
        return self.out(torch.einsum("bi,ij->bj", self.pair(last, last), self.mix))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return surgery.capture(Mixed(), torch.randint(0, 50, (2, 7)))


def test_they_are_listed_with_the_op_that_reads_them(program):
    found = unread_weights(program.view)
    assert found["time.weight_ih_l0"] == found["time.weight_hh_l0"] == "lstm"
    assert found["pair.weight"] == "bilinear"
    assert found["mix"] == "einsum"
    assert not {"token.weight", "out.weight", "out.bias"} & found.keys()


def test_a_target_that_names_them_says_so(program):
    with pytest.raises(
        TargetError, match=r"it names time.weight_ih_l0 \(lstm\).* --pass full --target 'time'"
    ):
        program.apply(surgery.Lora(target="time"))
    with pytest.warns(UserWarning, match=r"the target also names mix \(einsum\)"):
        program.apply(surgery.Lora(target="re:mix|out"))
    assert program.apply(surgery.Full(target="time")).trains("time.weight_ih_l0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program.apply(surgery.Lora(target="out"))


def test_refused_sites_are_said_from_python(program):
    with pytest.warns(UserWarning, match="leaves out 1 of 2 sites: token: "):
        program.apply(surgery.Quantize(target="out,token", format="int8-dynamic"))
