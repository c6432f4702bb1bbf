"""Cross-attention: found by dataflow, selected by cross.*, and shown in plans."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import TargetError
from surgery.graph.targets import check_roles


class Attention(nn.Module):
    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, 8), nn.Linear(text, 8), nn.Linear(text, 8)
        self.to_out = nn.Linear(8, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_q(x), self.to_k(text), self.to_v(text)
        return self.to_out(
            nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        )


class Block(nn.Module):
    """A block of a diffusion model: self-attention, and cross-attention to a text."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.cross = Attention(6, 6), Attention(6, 5), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x, x)
        x = x + self.second(x, text)
        return x + self.cross(x).relu()


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return surgery.capture(Block().eval(), (torch.randn(2, 4, 6), torch.randn(2, 3, 5)))


def paths(program, target):
    plan = program.plan(surgery.Lora(target=target, rank=2))
    return [site.site.path for site in plan.passes[-1].sites]


def test_cross_selects_cross_attention_alone(program):
    assert paths(program, "attn.q") == ["first.to_q", "second.to_q"]
    assert paths(program, "cross.q") == ["second.to_q"]
    assert paths(program, "cross.*") == [f"second.to_{each}" for each in ("q", "k", "v", "out")]
    assert paths(program, "role:cross.out") == ["second.to_out"]
    assert paths(program, "attn.*,!cross.*") == [f"first.to_{each}" for each in ("q", "k", "v", "out")]
    # A module of that name has no role of attention.
    assert paths(program, "path:cross") == ["cross"]
    check_roles("cross.q,attn.*")


def test_selections_of_parameters(program):
    chosen = program.apply(surgery.Full(target="cross.k"), freeze_base=True)
    assert {n for n in program.parameter_names() if chosen.trains(n)} == {
        "second.to_k.weight",
        "second.to_k.bias",
    }


def test_plans_show_it(program):
    plan = program.plan(surgery.Lora(target="attn.*", rank=2))
    assert "attn.q (cross)" in str(plan._summary())
    assert [site.site.cross for site in plan.passes[-1].sites] == [False] * 4 + [True] * 4


def test_a_model_without_cross_attention():
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Attention(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.first(x, x)

    alone = surgery.capture(Alone().eval(), torch.randn(2, 4, 6))
    with pytest.raises(
        TargetError, match=r"target 'cross.q' matches no site; the model has no cross-attention"
    ):
        paths(alone, "cross.q")
    with pytest.raises(TargetError, match=r"matches no site"):
        paths(alone, "cross.x")


def test_reloading_keeps_it(program, tmp_path):
    program.apply(surgery.Lora(target="cross.*", rank=2)).save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"), base=program)
    assert [site.path for site in again.sites if site.cross] == [
        f"second.to_{e}" for e in ("q", "k", "v", "out")
    ]
