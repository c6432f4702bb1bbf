"""Targets: readings, wildcards, exclusions, parts, and that nothing misses silently."""

from __future__ import annotations

import pytest

import surgery
from surgery.common.errors import TargetError
from surgery.graph import targets
from tests.shared import models


@pytest.fixture(scope="module")
def fused():
    return surgery.capture(*models.attention())


def paths(program, text):
    return [site.path.removeprefix("bert.") for site in targets.select_sites(program.sites.sites, text)]


def test_roles_and_paths_of_bert(minilm):
    layer = "encoder.layer.0.attention"
    of_attention = [
        f"{layer}.self.query",
        f"{layer}.self.key",
        f"{layer}.self.value",
        f"{layer}.output.dense",
    ]
    assert paths(minilm, "attn.*")[:4] == of_attention
    assert len(paths(minilm, "attn.*")) == 24
    assert len(paths(minilm, "query,value")) == 12
    assert paths(minilm, "layer.0.attention") == [*of_attention, f"{layer}.output.LayerNorm"]
    assert len(paths(minilm, "layer.?.attention.self.*")) == 18
    assert len(paths(minilm, "encoder.**.dense")) == 18
    assert len(paths(minilm, "re:layer\\.[0-2]\\..*query")) == 3
    assert len(paths(minilm, "op:aten.layer_norm")) == 13
    pooler_is_head = _role(minilm, "pooler.dense").startswith("head")
    assert len(paths(minilm, "all-linear")) == 36 + (not pooler_is_head)
    assert paths(minilm, "attn.*,!layer.*.attention.output,!key,!value") == [
        f"encoder.layer.{i}.attention.self.query" for i in range(6)
    ]
    assert paths(minilm, "mlp.up") == [f"encoder.layer.{i}.intermediate.dense" for i in range(6)]


def _role(program, tail):
    return next(site.role for site in program.sites if site.path.endswith(tail))


def test_a_role_is_never_a_path(minilm):
    """`attn` is no module of BERT, `attention` is no role: each is read one way only."""
    assert len(paths(minilm, "role:attn.q")) == 6
    with pytest.raises(TargetError, match="'path:attn' matches no site"):
        paths(minilm, "path:attn")
    with pytest.raises(TargetError, match="'role:attention' is a role and matches no site"):
        paths(minilm, "role:attention")


def test_parts_of_a_fused_projection(fused):
    (whole,) = targets.select_sites(fused.sites.sites, "attn.qkv")
    assert whole.selected_parts == ()
    (some,) = targets.select_sites(fused.sites.sites, "attn.q,attn.v")
    assert some.selected_parts == ("q", "v")
    (rest,) = targets.select_sites(fused.sites.sites, "attn.qkv,!attn.k")
    assert rest.selected_parts == ("q", "v")
    assert [s.role for s in targets.select_sites(fused.sites.sites, "attn.*")] == ["attn.qkv", "attn.out"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("qurey", "'qurey' matches no site; did you mean 'query'"),
        ("attn.*,valeu", "'valeu' matches no site; did you mean 'value'"),
        ("attn.*,!valeu", "'valeu' matches no site"),
        ("attn.qq", "'attn.qq' is a role and matches no site; did you mean 'attn.q'"),
        ("attn.*,,head", "has an empty part"),
        ("", "has an empty part"),
        ("re:(", "is not a valid regular expression"),
        ("rôle:x", "unknown prefix 'rôle'; use role:"),
        ("attn.*,!attn.*", "excludes everything"),
    ],
)
def test_nothing_misses_silently(minilm, text, says):
    with pytest.raises(TargetError, match=says.replace("(", r"\(")):
        paths(minilm, text)


def test_where_the_readings_differ_is_said():
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = models.Attention()
            self.attn.extra = nn.Linear(8, 8)
            self.other = models.Attention()

        def forward(self, x):
            return self.attn.extra(self.other(self.attn(x)))

    program = surgery.capture(Net(), (torch.randn(3, 5, 8),))
    (note,) = program.plan(surgery.Lora(target="attn.*", rank=2)).passes[-1].notes
    assert "read as a role (4 sites); as a path it would select 3 (path:attn.*)" in note
