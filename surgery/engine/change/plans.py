"""What passes would do, and what they did."""

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
    """One targeted site: refused with a reason, or the tensors that would be added there."""

    site: Site
    refusal: str | None = None
    specs: dict[str, TensorSpec] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(spec.numel() for spec in self.specs.values() if spec.trainable)


@dataclass(frozen=True)
class PassPlan:
    """What one pass would do. selection: which parameters of the base would train, when and how fast. misses: where
    the pattern of a pass nearly is."""

    pass_: Pass
    sites: tuple[SitePlan, ...] = ()
    selection: Selection = field(default_factory=Selection)
    auto: bool = False
    notes: tuple[str, ...] = ()
    misses: tuple[NearMiss, ...] = ()

    @property
    def trains(self) -> Mapping[str, bool]:
        return self.selection.trains

    @property
    def accepted(self) -> list[SitePlan]:
        return [s for s in self.sites if s.refusal is None]

    @property
    def refused(self) -> list[SitePlan]:
        return [s for s in self.sites if s.refusal is not None]

    @property
    def parameters(self) -> int:
        """How many values it adds that train; a tensor that several sites share counts once."""
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
        """Parameters that nothing would read any more."""
        pass_ = self.pass_
        return (
            {n for s in self.accepted for n in pass_.outcome(s.site).unused}
            if isinstance(pass_, RewritePass)
            else set()
        )


@dataclass(frozen=True)
class PlanReport:
    """What a pipeline would do, pass by pass."""

    passes: tuple[PassPlan, ...]


@dataclass(frozen=True)
class PassReport:
    """What one pass did. observed: None where the outputs were not compared, with `unverified` saying why."""

    entry: Entry
    plan: PassPlan
    observed: Observed | None
    unverified: str = ""
    seconds: float = 0.0
