"""expand --side: branches at zero beside ops, that keep positions and causality, learn, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import PassError
from tests.models import convnet
from tests.techniques.models import program


@pytest.mark.parametrize(("name", "causal"), [("vit", False), ("mixtral", True)])
def test_causal_as_the_attention(name, causal):
    adapted = program(name).apply(surgery.Expand(side="conv", size=4, target="attn.q"))
    assert {r.decided["causal"] for r in adapted.journal.entries[-1].sites} == {causal}


def test_refusals():
    net, inputs = convnet()
    base = surgery.capture(net, inputs)
    assert torch.equal(
        base.apply(surgery.Expand(side="conv", size=4, kernel=5, target="0")).run(), base.run()
    )
    with pytest.raises(PassError, match="give a --kernel of its parity"):
        base.apply(surgery.Expand(side="conv", kernel=2, target="0"))
    with pytest.raises(PassError, match="--side needs a target"):
        base.apply(surgery.Expand(side="dense"))
    with pytest.raises(PassError, match="--kernel belongs to --side conv"):
        surgery.Expand(side="dense", kernel=3)
    linear = surgery.capture(nn.Linear(4, 4), (torch.randn(3, 4),))
    with pytest.raises(PassError, match="use --side dense"):
        linear.apply(surgery.Expand(side="conv", target="all"))
