"""Base class of passes that round weights to a number format: their options, and the rounding of inputs."""

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
    """A pass that rounds weights to a number format; with `int8-dynamic` it rounds the inputs of their ops too."""

    format: Literal["int8", "int8-dynamic", "int4", "nf4", "ternary", "binary"] = Field(
        default="int8",
        description="number format of the weights; int8-dynamic also rounds the input of the op",
    )
    group: int | None = Field(
        default=None,
        ge=0,
        description="number of values of a row that share a scale; 0: the whole row (default: int4 32, nf4 64, else 0)",
    )
    asymmetric: bool = Field(default=False, description="int4: store a zero point for each group")

    per_token: bool = Field(
        default=False,
        description="int8-dynamic: one scale for each row of the input, instead of one for the whole input",
    )
    twice: bool = Field(
        default=False,
        description="int8-dynamic: also quantize the rounding error of the input (about 16 bits, two products)",
    )
    cpu: Literal["any", "vnni"] = Field(
        default="any",
        description="int8-dynamic: any keeps products in range on every processor; vnni uses all 8 bits and needs VNNI",
    )

    @model_validator(mode="after")
    def _fit(self) -> FormatPass:
        if self.asymmetric and self.format != "int4":
            raise PassError(
                f"pass {self.name!r}: --asymmetric is for int4, and {self.format} has no zero point; leave it out"
            )
        self.for_dynamic({"--per-token": self.per_token, "--twice": self.twice, "--cpu": self.cpu != "any"})
        if self.format in ("ternary", DYNAMIC) and self.group:
            one = "one scale for the whole weight" if self.format == "ternary" else "one scale for each row"
            raise PassError(f"pass {self.name!r}: {self.format} has {one}; leave out --group")
        return self

    def for_dynamic(self, given: Mapping[str, bool]) -> None:
        """Refuse options that need `int8-dynamic` with any other format.

        Args:
            given: Flag -> True if it is given.

        Raises:
            PassError: The format is not `int8-dynamic`, and an option is given.
        """
        if not self.dynamic and (option := next((name for name, there in given.items() if there), None)):
            raise PassError(
                f"pass {self.name!r}: {option} is for int8-dynamic, which rounds inputs, and this is "
                f"{self.format}; leave it out"
            )

    @property
    def dynamic(self) -> bool:
        """True if the input of the op is rounded too."""
        return self.format == DYNAMIC

    @property
    def rounding(self) -> tuple[Any, ...]:
        return (round_activation._opoverload,) if self.dynamic else ()

    def layout(self, site: Site) -> Layout:
        """Number format and matrix form of the site's codes."""
        if not self.dynamic:
            return Layout.of(site, self.format, self.group, self.asymmetric)
        return Layout.of(site, "int8", self.group, paired=self.cpu == "any")

    def round_input(self, g: Rewriter, smooth: fx.Node | None = None) -> None:
        """Round the input of the op if the format is `int8-dynamic`.

        Args:
            g: The rewriter, at the op.
            smooth: Factors (features,) by which the input is divided before rounding, or None.
        """
        if self.dynamic:
            how = smooth, self.per_token, self.twice
            g.replace_input(lambda x: g.call(round_activation._opoverload, x, *how))
