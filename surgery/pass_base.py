"""What a pass is: a frozen pydantic model whose fields are its options, and a few short methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, fx

from surgery.errors import PassError, nearest
from surgery.rewriter import Rewriter
from surgery.sites import Site
from surgery.target import select_sites

if TYPE_CHECKING:
    from surgery.selecting import Candidates
    from surgery.view import View


@dataclass(frozen=True)
class Numerics:
    """What inserting a pass may do to the outputs: nothing (tolerance 0), or a stated deviation with a reason.

    tolerance: largest absolute difference over the largest absolute output; infinite where the pass changes
    what the model computes, by design.
    """

    tolerance: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if math.isinf(self.tolerance):
            return f"changes({self.reason})"
        return "exact" if not self.tolerance else f"rounded({self.tolerance:g}: {self.reason})"


EXACT = Numerics()


def rounded(tolerance: float, reason: str) -> Numerics:
    """A pass that changes outputs by at most `tolerance` of their scale, and why it must."""
    return Numerics(tolerance, reason)


def changes(reason: str) -> Numerics:
    """A pass that changes the outputs by design (it approximates, ties, or attends to something new), and how."""
    return Numerics(math.inf, reason)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a pass adds at a site.

    shape: its size. init: fills an empty tensor in place; called when the pass is applied, never when it is
    replayed, so it may ask `site.probe`. value: the tensor itself, in place of init.
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
    """How one pass changes a base tensor for good, in place, on a tensor of at least fp32.

    Where it needs the base's own value too, which earlier merges may have moved on from, it has
    `apply_from(weight, original)` in place of `apply_`.
    """

    def apply_(self, weight: Tensor) -> None: ...


class Pass(BaseModel):
    """Base of all passes. Unknown options are refused; instances are immutable and hashable.

    requires: names of passes, one of which has to be applied already. conflicts: name of a pass -> why the two
    cannot stand in one program. before: names of passes that this one has to precede; in one pipeline it is put
    before them, and where one is applied already it is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: ClassVar[str] = ""
    numerics: ClassVar[Numerics] = EXACT
    version: ClassVar[int] = 1
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[Mapping[str, str]] = {}
    before: ClassVar[tuple[str, ...]] = ()

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

    @property
    def contract(self) -> Numerics:
        """What these options may do to the outputs at insertion."""
        return self.numerics

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
    mergeable: `merge` gives what the base weights become. freezes: the pipeline freezes the base before it,
    unless the user selects what trains. structural: the tensors it adds are weights of ops like the base's own,
    which later passes target.
    """

    on: ClassVar[tuple[str, ...]] = ("linear",)
    default_target: ClassVar[str | None] = None
    partial: ClassVar[bool] = False
    weightable: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    structural: ClassVar[bool] = False

    @property
    def can_weigh(self) -> bool:
        """Whether what these options add can be scaled."""
        return self.weightable

    @property
    def detaches(self) -> str:
        """Why the gradient is not that of the outputs (something is held constant by design), or empty."""
        return ""

    def find(self, view: View) -> list[Site]:
        """The sites that the target names. Raises TargetError, PassError without a target."""
        asked = self.target or self.default_target
        if asked is None:
            raise PassError(f"pass {self.name!r} needs a target, such as --target 'attn.*'")
        return [site for site in select_sites(view.sites.sites, asked) if not self.skips(site)]

    def skips(self, site: Site) -> bool:
        """Whether a targeted site is none of this pass's business, so that it is no refusal either."""
        return False

    def check(self, site: Site) -> str | None:
        """None, or the reason why this site is refused."""
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        """Everything data-dependent, JSON-able: written to the journal and replayed as `site.decided`.

        `site.probe` has the program's tensors, activations and gradients here.
        """
        return {}

    def selects(self, site: Site) -> dict[str, bool]:
        """Parameters of the base that this pass makes train (or stop), by name."""
        return {}

    def limits(self, site: Site) -> dict[str, int]:
        """New upper bounds of dynamic dimensions, by name: a prompt leaves fewer positions."""
        return {}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """The tensors this pass adds at a site; shapes depend on options and `site.decided` alone."""
        return {}

    def tensor_names(self, site: Site) -> dict[str, str]:
        """Names of tensors in the program, for those that the engine's own naming does not suit."""
        return {}

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        """The value that replaces the output at one call of the site."""
        raise NotImplementedError

    def keeps(self, site: Site) -> str | None:
        """None, or why this site cannot be folded although the pass is mergeable."""
        return None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, MergeOp]:
        """What the base's weight (and bias) become: {"weight": op, "bias": op}."""
        raise NotImplementedError


class GraphPass(RewritePass):
    """A pass that acts on places of the whole program: residual branches, attentions, blocks, ends.

    A place is keyed to the weight site that it is found by. `rewrite` is called once for each, returns nothing,
    and may look at all of `g.view`; it inserts with `g.call` and puts values in place with `g.wrap`.
    """

    on: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts", "norm")

    def candidates(self, view: View) -> list[Site]:
        """Every place that this pass could act on, by dataflow, as the site that it is keyed to."""
        raise NotImplementedError

    def find(self, view: View) -> list[Site]:
        """The candidates, or those of them that the target names."""
        found = self.candidates(view)
        asked = self.target or self.default_target
        return select_sites(found, asked) if asked is not None and found else found


@dataclass(frozen=True)
class Selection:
    """What a selection decides, by parameter name.

    trains: whether it trains. rates: its learning rate over that of the optimiser. windows: from which step on,
    and up to which (exclusive, None: for good), it trains. unit: what a step is, "step" or "epoch". masks: which
    of its values train (bool, of its shape); the gradient of the others is zero.
    """

    trains: Mapping[str, bool] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    unit: str = "step"
    masks: Mapping[str, Tensor] = field(default_factory=dict)


class SelectPass(Pass):
    """A pass that says which parameters train, when, and how fast. It changes no graph."""

    default_target: ClassVar[str | None] = None

    def select(self, parameters: tuple[str, ...]) -> dict[str, bool]:
        """parameters: names that the target selected. Returns name -> whether it trains."""
        raise NotImplementedError

    def selection(self, candidates: Candidates) -> Selection:
        """The whole decision, for a pass that needs more than names; see surgery.selecting.Candidates."""
        return Selection(self.select(candidates.targeted))
