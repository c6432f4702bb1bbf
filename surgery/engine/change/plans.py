"""Reports: the plan of a pass, and the result of applying it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.common.folding import Folding, Row, times
from surgery.common.summary import Summary
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.contract.observe import Observed
from surgery.engine.contract.selection import Selection, in_words
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

    def in_words(self) -> str:
        """Sites of the pass and the parameters that it adds, or the parameters that would train."""
        if not self.sites:
            return "no site matches" if isinstance(self.pass_, RewritePass) else in_words(self.selection, {})
        refused = f", {len(self.refused)} refused" if self.refused else ""
        return f"{len(self.accepted)} sites, {self.parameters:,} parameters added{refused}"


@dataclass(frozen=True)
class PlanReport:
    """Plan for a pipeline: `passes` has the plan for each pass, in order."""

    passes: tuple[PassPlan, ...]

    def __repr__(self) -> str:
        return self._summary().text()

    def _repr_html_(self) -> str:
        return self._summary().html()

    def _summary(self) -> Summary:
        """Each pass in words, and its sites with repeated blocks folded."""
        facts = tuple((planned.pass_.entry_id, planned.in_words()) for planned in self.passes)
        rows = []
        for planned in self.passes:
            # The shape of a value at a pattern's site has symbolic sizes.
            shapes = [
                "×".join(str(n) if isinstance(n, int) else "…" for n in s.site.shape) for s in planned.sites
            ]
            given = [
                Row(
                    site.site.path,
                    (site.site.shown_role, shape, f"{site.parameters:,}", site.refusal or ""),
                    site,
                )
                for site, shape in zip(planned.sites, shapes, strict=True)
            ]
            for path, places, item in Folding().tree(given).lines():
                rows += [(planned.pass_.entry_id, path + times(places), *row.alike) for row in item.rows]
        columns = ("pass", "site", "role", "weight", "adds", "refused")
        return Summary(f"Plan of {len(self.passes)} passes", facts, columns, tuple(rows))


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

    @property
    def outcome(self) -> str:
        """The change of the outputs by the pass, in words."""
        seen, declared = self.observed, self.plan.pass_.numerics
        if seen is None:
            return f"not verified: {self.unverified}"
        if seen.equal:
            return f"unchanged, {seen}"
        if not math.isfinite(seen.difference):
            return f"of another shape: {declared.reason}"
        if math.isinf(declared.tolerance):
            return f"changed by {seen.difference:.1e} of their scale: {declared.reason}"
        return f"unchanged within {seen.difference:.1e}, declared {self.entry.numerics['declared']}"

    def __repr__(self) -> str:
        return self._summary().text()

    def _repr_html_(self) -> str:
        return self._summary().html()

    def _summary(self) -> Summary:
        facts = [("done", self.plan.in_words())]
        if self.entry.kind == "rewrite":
            facts.append(("outputs", self.outcome))
        facts += [(f"refused {row.site.path}", str(row.refusal)) for row in self.plan.refused]
        facts += [("note", sentence) for sentence in self.plan.notes]
        return Summary(f"{self.entry.id} ({self.seconds:.2f} s)", tuple(facts))
