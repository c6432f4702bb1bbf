"""Several passes in one program: ten compositions through the kit, and refused ones with their messages."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import surgery
from surgery.api import RewritePass, hookimpl
from surgery.api.programs import make_plugin_manager
from surgery.common.errors import JournalError, PassError
from surgery.testing import CHECKS, check_pass
from tests.techniques.catalogue import of
from tests.techniques.models import program

CHEAP = [name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx", "gradients")]
ATTENTION = "attn.q,attn.v"

# What is there already (trained, that is: at random), and the pass that the kit tries on top.
COMPOSITIONS = {
    "adapter, then lora": ("vit", [("adapter", {"size": 4})], ("lora", {"target": ATTENTION, "rank": 2})),
    "lora, then adapter": ("t5", [("lora", {"target": ATTENTION, "rank": 2})], ("adapter", {"size": 4})),
    "prefix, adapter, then lora": (
        "vit",
        [("prefix", {"tokens": 2}), ("adapter", {"size": 4, "placement": "pfeiffer"})],
        ("lora", {"target": "mlp.*", "rank": 2}),
    ),
    "lora, then prefix": ("mixtral", [("lora", {"target": ATTENTION, "rank": 2})], ("prefix", {"tokens": 2})),
    "lora, then dora": (
        "vit",
        [("lora", {"target": ATTENTION, "rank": 2})],
        ("lora", {"target": ATTENTION, "rank": 2, "dora": True, "as": "dora"}),
    ),
    "low-rank, then lora": (
        "vit",
        [("low-rank", {"target": "mlp.*", "rank": 4})],
        ("lora", {"target": "mlp.*", "rank": 2}),
    ),
    "sparse-tune, then lora": (
        "t5",
        [("sparse-tune", {"target": ATTENTION, "density": 0.1})],
        ("lora", {"target": ATTENTION, "rank": 2}),
    ),
    "share, then lora": ("vit", [("share", {"target": "mlp.*"})], ("lora", {"target": "mlp.*", "rank": 2})),
    "expand, then lora on the copies": (
        "vit",
        [("expand", {"deeper": 1})],
        ("lora", {"target": "attn.*", "rank": 2}),
    ),
    "lora, prompt, then bitfit": (
        "vit",
        [("lora", {"target": ATTENTION, "rank": 2}), ("prompt", {"tokens": 2})],
        ("bitfit", {}),
    ),
    "vocab, then lora on the embeddings": (
        "t5",
        [("vocab", {"tokens": 3})],
        ("lora", {"target": "embed.token", "rank": 2}),
    ),
    "head, adapter, then layerwise": (
        "vit",
        [("head", {"mode": "add", "labels": 3, "head_name": "other"}), ("adapter", {"size": 4})],
        ("layerwise", {"top": 1}),
    ),
}


def composed(name):
    model, before, last = COMPOSITIONS[name]
    torch.manual_seed(0)
    base = program(model).apply(*(of(n, **options) for n, options in before))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in base.tensors.values():
            if isinstance(tensor, torch.nn.Parameter):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return of(last[0], **last[1]), base


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition(name):
    assert check_pass(*composed(name), checks=CHEAP).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition_through_the_whole_kit(name):
    assert check_pass(*composed(name)).ok


def test_mixed_adapters_are_switched_weighted_and_removed_alone(tmp_path, randomise):
    """LoRA here, bottlenecks there, prefixes everywhere: one program, one saved directory."""
    base = program("vit")
    mixed = base.apply(
        surgery.Lora(target=ATTENTION, rank=2), surgery.Adapter(size=4), surgery.Prefix(tokens=2)
    )
    randomise(mixed, scale=0.3)
    mixed.save(tmp_path / "mixed")
    again = surgery.load(str(tmp_path / "mixed"))
    assert torch.equal(again.run()["logits"], mixed.run()["logits"])
    bare = base.run()["logits"]
    assert torch.equal(mixed.without("lora", "adapter", "prefix").run()["logits"], bare)
    alone = {name: mixed.only(name).run()["logits"] for name in ("lora", "adapter", "prefix")}
    for name, logits in alone.items():
        assert not torch.equal(logits, bare), name
        left = mixed
        for other in alone:
            left = left.undo(other) if other != name else left
        assert torch.equal(left.run()["logits"], logits), name
    assert not torch.equal(mixed.weighted({"adapter": 0.5}).run()["logits"], mixed.run()["logits"])
    without = mixed.without("lora")
    assert all(without.tensors[name] is tensor for name, tensor in mixed.tensors.items())


REFUSED = {
    "the same name twice": (
        [("lora", {"target": ATTENTION})],
        [("lora", {"target": "mlp.*"})],
        PassError,
        "'lora' is applied already; give this one a name with --as",
    ),
    "low-rank under an adapter": (
        [("lora", {"target": "mlp.*"})],
        [("low-rank", {"target": "mlp.*", "rank": 4})],
        PassError,
        "low-rank at vit.layers.0.mlp.fc1: refused, it carries 'lora', trained for the whole weight; factor first",
    ),
    "a copy of an adapted block": (
        [("lora", {"target": ATTENTION})],
        [("expand", {"deeper": 1})],
        PassError,
        "it carries 'lora', which a copy would lose; apply expand first",
    ),
    "text for a model without ids": (
        [("prefix", {"tokens": 2})],
        [("prompt", {"init": "text", "text": "hello"})],
        PassError,
        "prompt at .*: refused, it reads no token ids, so --init text has no embeddings to copy",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    before, then, error, message = REFUSED[name]
    base = program("vit").apply(*(of(n, **options) for n, options in before))
    with pytest.raises(error, match=message):
        base.apply(*(of(n, **options) for n, options in then))


def test_undo_under_a_copy_is_refused():
    deeper = program("vit").apply(of("expand", deeper=1), of("lora", target="attn.q", rank=2))
    with pytest.raises(JournalError, match=r"'lora' depends on .*, which 'expand' added; undo 'lora' first"):
        deeper.undo("expand")


def test_a_pipeline_orders_its_passes():
    """low-rank must come before passes on its factors, in any given order."""
    ordered = program("vit").apply(of("lora", target="mlp.*", rank=2), of("low-rank", target="mlp.*", rank=4))
    assert [e.pass_name for e in ordered.journal if not e.auto] == ["low-rank", "lora"]


@pytest.mark.parametrize(
    ("given", "order"),
    [
        ([("prefix", {"tokens": 2}), ("prompt", {"tokens": 2})], ["freeze", "prompt", "prefix"]),
        ([("lora", {"target": ATTENTION}), ("expand", {"deeper": 1})], ["freeze", "expand", "lora"]),
        ([("lora", {"target": "head"}), ("head", {"labels": 3})], ["freeze", "head", "lora"]),
    ],
)
def test_what_makes_targets_comes_before_what_adapts_them(given, order):
    adapted = program("vit").apply(*(of(name, **options) for name, options in given))
    assert [entry.id for entry in adapted.journal] == order


def test_one_after_the_other_is_refused_where_it_cannot_be():
    there = program("vit").apply(of("prefix", tokens=2))
    with pytest.raises(
        PassError,
        match=r"'prefix' has already added keys to its attention; undo that, or apply prompt before it",
    ):
        there.apply(of("prompt", tokens=2))


def test_a_selection_says_what_it_stops():
    both = program("vit").apply(of("bitfit"), of("layerwise", top=1))
    (note,) = both.reports[-1].plan.notes
    stopped = sum(not both.trains(name) for name in both.journal.find("bitfit")[0].trains)
    assert stopped
    assert note.startswith(
        f"stops {stopped} of the {len(both.journal.find('bitfit')[0].trains)} parameters that 'bitfit' trains"
    )
    assert not program("vit").apply(of("layerwise", top=1), of("bitfit")).reports[-1].plan.notes


class Needing(RewritePass):
    """Adds nothing; requires LoRA."""

    name: ClassVar[str] = "needing"
    requires: ClassVar[tuple[str, ...]] = ("lora",)

    def rewrite(self, site, g):
        return g.call(torch.ops.aten.clone.default, g.output)


class Hating(Needing):
    """Adds nothing; conflicts with LoRA."""

    name: ClassVar[str] = "hating"
    requires: ClassVar[tuple[str, ...]] = ()

    def check(self, site):
        return "LoRA would have the last word too" if site.probe.journal.by_pass("lora") else None


class Former(Needing):
    """Adds nothing, before Latter."""

    name: ClassVar[str] = "former"
    requires: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ("latter",)


class Latter(Former):
    """Adds nothing, before Former."""

    name: ClassVar[str] = "latter"
    before: ClassVar[tuple[str, ...]] = ("former",)


class Relations:
    @hookimpl
    def surgery_passes(self):
        return [Needing, Hating, Former, Latter]


def test_what_passes_say_of_each_other():
    manager = make_plugin_manager(plugins=(Relations(),))
    base = surgery.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),), plugins=manager)
    lora = surgery.Lora(target="all", rank=2)
    with pytest.raises(PassError, match="needing needs lora in the program; add it to the same pipeline"):
        base.apply(Needing(target="all"))
    ordered = base.apply(Needing(target="all"), lora)
    assert [e.id for e in ordered.journal] == ["freeze", "lora", "needing"]
    assert [e.id for e in base.apply(lora).apply(Needing(target="all")).journal] == [
        "freeze",
        "lora",
        "needing",
    ]
    with pytest.raises(PassError, match="refused, LoRA would have the last word too"):
        base.apply(lora).apply(Hating(target="all"))
    with pytest.raises(
        PassError, match="former and latter each have to come before the other; apply one of them"
    ):
        base.apply(Former(target="all"), Latter(target="all"))


@pytest.mark.parametrize("under", ["lora", "ia3"])
def test_nothing_is_folded_under_what_computes_with_the_weight(under, randomise):
    """DoRA stays because a side branch is below it; if LoRA were folded, DoRA would use the norm of another weight."""
    program = program_of_three(under)
    randomise(program, 0.3)
    with pytest.raises(PassError, match="lora:dora computes with the unmerged weight, and is not folded"):
        program.merge()
    left = program.undo("dora")
    merged = left.merge()
    assert merged.journal.entries[-1].options["folded"] == [under]
    assert float((merged.run()["logits"] - left.run()["logits"]).abs().max()) <= 1e-5


def program_of_three(under):
    return program("vit").apply(
        of(under, target="attn.q"),
        of("expand", side="dense", size=2, target="attn.q"),
        of("lora", target="attn.q", rank=2, dora=True, **{"as": "dora"}),
    )
