"""Pairs of factors at a site: one for the whole weight, or one for each chosen part of a fused projection.

A fused projection computes several outputs (q, k and v) with one weight; a part is the set of output features that
belongs to one of them. A part whose features are contiguous is placed by padding its branch with zeros. Interleaved
features (q, k and v of one head after the other) are placed by an index, which is a frozen tensor of the pass:
`rows_N`, where N is the first feature of the part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import CONV
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import low_rank

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """One A and B, with the output features that they cover.

    Attributes:
        part: Name of the part, or "" for the whole weight.
        rows: Output features of the part, or None for all.
    """

    part: str = ""
    rows: tuple[int, ...] | None = None

    @property
    def features(self) -> int | None:
        """Number of output features covered; None for all."""
        return None if self.rows is None else len(self.rows)

    @property
    def interleaved(self) -> bool:
        """True if the output features have gaps."""
        return self.rows is not None and not low_rank.is_run(self.rows)

    def named(self, name: str) -> str:
        """Name in the pass of a tensor of this pair: "A" of part q is "A_q"."""
        return f"{name}_{self.part}" if self.part else name

    def indices(self, site: Site, of_weight: bool) -> dict[str, TensorSpec]:
        """Index tensors that interleaved features need; none for others.

        Args:
            site: The fused projection.
            of_weight: Include the index that selects the part's rows of the weight.
        """
        if self.rows is None or not self.interleaved:
            return {}
        found = {f"rows_{self.rows[0]}": index_spec(low_rank.gather_index(self.rows, site.out_features))}
        if of_weight:
            found[self.named("index")] = index_spec(torch.tensor(self.rows))
        return found


@dataclass(frozen=True)
class Branch:
    """B(A x) of one pair in a graph, less B₀(A₀ x) where `start` is given.

    Attributes:
        pair: The pair.
        a: Graph value of A.
        b: Graph value of B.
        start: Graph values of A₀ and B₀, the factors as they started, or None.
    """

    pair: Pair
    a: fx.Node
    b: fx.Node
    start: tuple[fx.Node, fx.Node] | None = None

    def value(self, site: Site, g: Rewriter, dropped: fx.Node | None) -> fx.Node:
        """Insert the branch, before it is scaled.

        Args:
            site: The site.
            g: The rewriter at a call of the site.
            dropped: Input of the branch after dropout; None is `g.x`.
        """
        trained = low_rank.branch(site, g, self.a, self.b, x=dropped)
        if self.start is None:
            return trained
        # B₀ A₀ is a part of the weight of the op, whose input is not dropped.
        return g.call(aten.sub.Tensor, trained, low_rank.branch(site, g, *self.start))


def add_branches(
    site: Site,
    g: Rewriter,
    branches: Sequence[Branch],
    scale: float,
    dropped: fx.Node | None,
    out: fx.Node | None,
) -> fx.Node:
    """Insert out + scale · (the branch of each pair, at its output features).

    Args:
        site: The site.
        g: The rewriter at a call of the site.
        branches: One for the whole weight, or one for each part.
        scale: Factor of every branch.
        dropped: Input of the branches after dropout; None is `g.x`.
        out: The value to add to; None is `g.output`.
    """
    first = branches[0]
    if first.pair.rows is not None:
        placed = [(branch.value(site, g, dropped), branch.pair.rows or ()) for branch in branches]
        return low_rank.add_rows(site, g, placed, scale, out)
    if first.start is None:
        return low_rank.add_branch(site, g, first.a, first.b, scale, dropped, out)
    out = out or g.output
    return g.call(aten.add.Tensor, out, first.value(site, g, dropped), alpha=scale)


def parts_refusal(site: Site, option: str | None) -> str | None:
    """The reason why the chosen parts of a site cannot have pairs of their own, or None.

    Args:
        site: The site, with the parts that the target selects.
        option: The value of `--parts`.
    """
    if option is not None and not site.parts:
        return "it is no fused projection, so parts cannot be chosen; leave out --parts"
    chosen = _chosen(site, option)
    unknown = [part for part in chosen if part not in site.parts]
    if unknown:
        return f"it has no part {unknown[0]!r}; its parts are {', '.join(site.parts)}"
    if chosen and site.kind == CONV and site.groups > 1:
        return "a part of a grouped convolution has no branch of its own; target all of it"
    return None


def chosen_rows(site: Site, option: str | None) -> dict[str, list[int]]:
    """Output features of each chosen part, by its name; empty for the whole weight. Arguments as in `parts_refusal`."""
    return {part: list(site.parts[part]) for part in _chosen(site, option)}


def _chosen(site: Site, option: str | None) -> tuple[str, ...]:
    asked = tuple(part.strip() for part in option.split(",")) if option is not None else ()
    if site.selected_parts:
        # Parts that the target and the option both name. Without such a part, the option decides.
        return tuple(part for part in site.selected_parts if not asked or part in asked) or asked
    return asked


def pairs_of(rows: Mapping[str, Sequence[int]] | None) -> tuple[Pair, ...]:
    """The pairs for the output features of each part; no parts mean one pair for the whole weight."""
    return tuple(Pair(part, tuple(own)) for part, own in (rows or {}).items()) or (Pair(),)


def index_spec(value: Tensor) -> TensorSpec:
    """A frozen int64 tensor of the pass."""
    return TensorSpec(tuple(value.shape), trainable=False, dtype=torch.int64, value=value)
