"""Reports: the plan of a pass, and the result of applying it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.contract.observe import Observed
from surgery.engine.contract.selection import Selection
from surgery.engine.contract.specs import TensorSpec
from surgery.engine.journal import Entry
from surgery.graph.patterns import NearMiss
from surgery.graph.sites import Site


@dataclass(frozen=True)
class SitePlan:
    """Plan for one targeted site.

    Attributes:
        site: The site, with the decisions of the pass.
        refusal: Reason why the pass refuses the site; None if it is accepted.
        specs: Tensors that would be added, by their names in the pass.
    """

    site: Site
    refusal: str | None = None
    specs: dict[str, TensorSpec] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of trainable values that would be added."""
        return sum(spec.numel() for spec in self.specs.values() if spec.trainable)


@dataclass(frozen=True)
class PassPlan:
    """Plan for one pass.

    Attributes:
        pass_: The pass.
        sites: Plan for each targeted site.
        selection: Parameters of the base that would start or stop training.
        auto: True if the pipeline added the pass, not the user.
        notes: Remarks for the reader.
        misses: Places that nearly match the pattern of the pass.
    """

    pass_: Pass
    sites: tuple[SitePlan, ...] = ()
    selection: Selection = field(default_factory=Selection)
    auto: bool = False
    notes: tuple[str, ...] = ()
    misses: tuple[NearMiss, ...] = ()

    @property
    def trains(self) -> Mapping[str, bool]:
        """Parameter name -> True if it would start training, False if it would stop."""
        return self.selection.trains

    @property
    def accepted(self) -> list[SitePlan]:
        """Sites that the pass accepts."""
        return [s for s in self.sites if s.refusal is None]

    @property
    def refused(self) -> list[SitePlan]:
        """Sites that the pass refuses."""
        return [s for s in self.sites if s.refusal is not None]

    @property
    def parameters(self) -> int:
        """Number of trainable values that would be added. A tensor that several sites share counts once."""
        found: dict[str, int] = {}
        for planned in self.accepted:
            assert isinstance(self.pass_, RewritePass)
            names = self.pass_.names(planned.site, planned.specs)
            for name, spec in planned.specs.items():
                if spec.trainable:
                    found[names[name]] = spec.numel()
        return sum(found.values())

    @property
    def freed(self) -> set[str]:
        """Names of parameters that no op would read any more."""
        pass_ = self.pass_
        return (
            {n for s in self.accepted for n in pass_.outcome(s.site).unused}
            if isinstance(pass_, RewritePass)
            else set()
        )


@dataclass(frozen=True)
class PlanReport:
    """Plan for a pipeline: `passes` has the plan for each pass, in order."""

    passes: tuple[PassPlan, ...]


@dataclass(frozen=True)
class PassReport:
    """Result of one applied pass.

    Attributes:
        entry: Its journal entry.
        plan: Its plan.
        observed: Comparison of the outputs before and after; None if they were not compared.
        unverified: Reason why they were not compared, or "".
        seconds: Wall-clock time in seconds.
    """

    entry: Entry
    plan: PassPlan
    observed: Observed | None
    unverified: str = ""
    seconds: float = 0.0
