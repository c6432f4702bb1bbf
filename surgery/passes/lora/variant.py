"""The steps of LoRA that a variant can change. Plain LoRA changes none; DoRA and PiSSA override some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.folds import Fold
from surgery.engine.contract.numerics import EXACT, Numerics
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import EMBEDDING
from surgery.graph.rewrite.current import replaced_at
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import packed
from surgery.passes.lora.options import LoraOptions
from surgery.passes.lora.parts import Branch, Pair

# Fills an empty tensor in place.
Fill = Callable[[Tensor], Any]


@dataclass(frozen=True, eq=False)
class Variant:
    """Plain LoRA at one site. It changes no step of lora.py; a variant overrides the methods in which it differs.

    Attributes:
        numerics: How far insertion may move the outputs.
        reads_weight: The variant computes with the values of the weight.
        lora: Options of the pass.
        site: The site; `site.decided` is not needed.
        pairs: One pair for the whole weight, or one for each chosen part of a fused projection.
    """

    numerics: ClassVar[Numerics] = EXACT
    reads_weight: ClassVar[bool] = False

    lora: LoraOptions
    site: Site
    pairs: Sequence[Pair]

    @classmethod
    def expectations(cls, lora: LoraOptions) -> Expectations:
        """Deliberate differences that checks must not report as faults."""
        return Expectations()

    def refusal(self) -> str | None:
        """None, or the reason why the variant cannot act at this site."""
        return None

    def start(self, pair: Pair) -> tuple[Fill, Fill]:
        """Functions that fill A and B of a pair. Those of plain LoRA make B A zero."""
        if self.site.kind == EMBEDDING:
            return nn.init.zeros_, nn.init.normal_
        if self.lora.init == "gaussian":
            return partial(nn.init.normal_, std=1 / self.lora.rank), nn.init.zeros_
        return partial(nn.init.kaiming_uniform_, a=math.sqrt(5)), nn.init.zeros_

    def pair_tensors(self, pair: Pair, factors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Further tensors of one pair, by their names without the part; `factors` has its A and B."""
        return {}

    def site_tensors(self) -> dict[str, TensorSpec]:
        """Further tensors of the site, which all pairs share."""
        return {}

    def branches(self, g: Rewriter, dropped: fx.Node | None) -> tuple[list[Branch], fx.Node | None]:
        """The branch of each pair, and the value to add them to; None is the site's output.

        Args:
            g: The rewriter at a call of the site.
            dropped: Input of the branches after dropout; None is `g.x`.
        """
        return [Branch(pair, g[pair.named("A")], g[pair.named("B")]) for pair in self.pairs], None

    def site_folds(self, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        """Further folds of the site's weight, before those of the pairs."""
        return {}

    def pair_fold(self, pair: Pair, tensors: Mapping[str, Tensor], weight: float) -> Fold | None:
        """The fold of one pair, or None for that of plain LoRA.

        Args:
            pair: The pair.
            tensors: Tensors of the site by their names in the pass.
            weight: Scale of this application; 1 as trained.
        """
        return None


def unreadable_weight(site: Site, option: str) -> str | None:
    """The refusal of a weight whose values a variant cannot read, or None.

    Args:
        site: The site.
        option: The option that needs the values, such as "--dora".
    """
    if site.packed and (reason := packed.refusal(site)):
        return f"{reason}; leave {option} out"
    entry = replaced_at(site)
    if entry:
        return f"{entry} has put another op in its place; leave {option} out, or undo {entry!r}"
    return None
