"""What a pass is: a frozen pydantic model whose fields are its options, and a few short methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, fx

from surgery.errors import PassError, nearest
from surgery.rewriter import Rewriter
from surgery.sites import Site


@dataclass(frozen=True)
class Numerics:
    """What inserting a pass may do to the outputs: nothing (tolerance 0), or a stated deviation with a reason.

    tolerance: largest absolute difference over the largest absolute output.
    """

    tolerance: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        return "exact" if not self.tolerance else f"rounded({self.tolerance:g}: {self.reason})"


EXACT = Numerics()


def rounded(tolerance: float, reason: str) -> Numerics:
    """A pass that changes outputs by at most `tolerance` of their scale, and why it must."""
    return Numerics(tolerance, reason)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a pass adds at a site.

    shape: its size. init: fills an empty tensor in place. value: the tensor itself, in place of init.
    trainable: whether it is a parameter that trains. dtype: the site's own where None.
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], Any] = torch.nn.init.zeros_
    trainable: bool = True
    dtype: torch.dtype | None = None
    value: Tensor | None = None

    def make(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor at insertion; drawn in fp32 and rounded, so that a half-precision base draws the same."""
        if self.value is not None:
            made = self.value.to(device)
        else:
            work = torch.float32 if (self.dtype or dtype).is_floating_point else (self.dtype or dtype)
            made = torch.empty(self.shape, dtype=work, device=device)
            self.init(made)
            made = made.to(self.dtype or dtype)
        return torch.nn.Parameter(made) if self.trainable else made

    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


class MergeOp(Protocol):
    """How one pass changes a base tensor for good, in place, on a tensor of at least fp32."""

    def apply_(self, weight: Tensor) -> None: ...


class Pass(BaseModel):
    """Base of all passes. Unknown options are refused; instances are immutable and hashable."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: ClassVar[str] = ""
    numerics: ClassVar[Numerics] = EXACT
    version: ClassVar[int] = 1

    target: str | None = Field(
        None, description="which sites: roles, paths, names; comma-separated, ! excludes"
    )
    label: str = Field(
        "",
        alias="as",
        pattern=r"^[A-Za-z0-9_-]*$",
        description="a name of your own for this application of the pass: letters, digits, - and _",
    )

    @property
    def entry_id(self) -> str:
        return f"{self.name}:{self.label}" if self.label else self.name

    @property
    def attribute(self) -> str:
        """The last-but-one component of the names of the tensors it adds."""
        return f"{self.name}_{self.label}" if self.label else self.name

    def options(self) -> dict[str, Any]:
        """Every option, JSON-able: the journal must not depend on what a later version has for a default."""
        return self.model_dump(mode="json", by_alias=True)

    def given_options(self) -> dict[str, Any]:
        """Options that differ from their defaults, JSON-able: what a person writes in a recipe."""
        return self.model_dump(mode="json", exclude_defaults=True, by_alias=True)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Pass:
        """An instance from untrusted options; PassError in one sentence for an unknown or wrong one."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in problem["loc"]) or cls.name
            flag = "--" + field.replace("_", "-")
            if problem["type"] == "extra_forbidden":
                known = [f.alias or n for n, f in cls.model_fields.items()]
                hint = nearest(field, known) or f"; it has {', '.join(sorted(known))}"
                raise PassError(f"pass {cls.name!r} has no option {flag}{hint}") from None
            shown = problem.get("input")
            raise PassError(f"pass {cls.name!r}: {flag} is {shown!r}: {problem['msg'].lower()}") from None


class RewritePass(Pass):
    """A pass that acts at sites, one at a time, and never looks further than its site.

    on: kinds of weight it accepts. default_target: used when no target is given (None: one is required).
    partial: it can act on parts of a fused projection. weightable: what it adds can be scaled (`g.weight`).
    mergeable: `merge` gives what the base weights become.
    """

    on: ClassVar[tuple[str, ...]] = ("linear",)
    default_target: ClassVar[str | None] = None
    partial: ClassVar[bool] = False
    weightable: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    def check(self, site: Site) -> str | None:
        """None, or the reason why this site is refused."""
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        """Everything data-dependent, JSON-able: written to the journal and replayed as `site.decided`."""
        return {}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """The tensors this pass adds at a site."""
        return {}

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node:
        """The value that replaces the output at one call of the site."""
        raise NotImplementedError

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, MergeOp]:
        """What the base's weight (and bias) become: {"weight": op, "bias": op}."""
        raise NotImplementedError


class SelectPass(Pass):
    """A pass that says which parameters train. It changes no graph."""

    default_target: ClassVar[str | None] = None

    def select(self, parameters: tuple[str, ...]) -> dict[str, bool]:
        """parameters: names that the target selected. Returns name -> whether it trains."""
        raise NotImplementedError
