"""What passes have in common that round weights to a format: their options, and the rounding of what enters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import fx

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.quantize.matrix import Layout
from surgery.passes.quantize.ops import round_activation

DYNAMIC = "int8-dynamic"


class FormatPass(RewritePass):
    """Weights in a format; with `int8-dynamic` what enters their ops is rounded too."""

    format: Literal["int8", "int8-dynamic", "int4", "nf4", "ternary", "binary"] = Field(
        "int8", description="what the weights are rounded to"
    )
    group: int | None = Field(
        None,
        ge=0,
        description="values of a row that share a scale; 0: all (default: int4 32, nf4 64, else all)",
    )
    asymmetric: bool = Field(False, description="with int4: a zero point for each group")

    per_token: bool = Field(
        False, description="with int8-dynamic: a scale for each row of what enters, not one for all of it"
    )
    twice: bool = Field(
        False,
        description="with int8-dynamic: what rounding leaves of what enters is rounded too (16 bits, two products)",
    )

    @model_validator(mode="after")
    def _fit(self) -> FormatPass:
        if self.asymmetric and self.format != "int4":
            raise PassError(
                f"pass {self.name!r}: --asymmetric is for int4, and {self.format} has no zero point; leave it out"
            )
        self.for_dynamic({"--per-token": self.per_token, "--twice": self.twice})
        if self.format in ("ternary", DYNAMIC) and self.group:
            one = "one scale for the whole weight" if self.format == "ternary" else "one scale for each row"
            raise PassError(f"pass {self.name!r}: {self.format} has {one}; leave out --group")
        return self

    def for_dynamic(self, given: Mapping[str, bool]) -> None:
        """Raises PassError for the first of these options that is given where nothing that enters is rounded."""
        if not self.dynamic and (option := next((name for name, there in given.items() if there), None)):
            raise PassError(
                f"pass {self.name!r}: {option} is for int8-dynamic, which rounds what enters, and this is "
                f"{self.format}; leave it out"
            )

    @property
    def dynamic(self) -> bool:
        """Whether what enters is rounded."""
        return self.format == DYNAMIC

    @property
    def rounding(self) -> tuple[Any, ...]:
        return (round_activation._opoverload,) if self.dynamic else ()

    def layout(self, site: Site) -> Layout:
        """How the site's weight is coded."""
        return Layout.of(site, "int8" if self.dynamic else self.format, self.group, self.asymmetric)

    def round_input(self, g: Rewriter, smooth: fx.Node | None = None) -> None:
        """Round what enters the op, where the format says so; divided by `smooth`, where there is one."""
        if self.dynamic:
            how = smooth, self.per_token, self.twice
            g.replace_input(lambda x: g.call(round_activation._opoverload, x, *how))
