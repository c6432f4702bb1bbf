"""Merging adapters into quantized weights.

At each weight the result is new codes, codes with a low-rank correction, or the adapters as they were. The choice
depends on the error of the op's outputs on the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from surgery.engine.contract.base import RewritePass, default_names, merges
from surgery.engine.contract.folds import Choice, Fold, How, Merged, Stage, apply_folds
from surgery.engine.journal import Entry, SiteRecord
from surgery.engine.probe import InputSet, Probe
from surgery.engine.replay import find_sites, live_entries, pass_of
from surgery.engine.state import State
from surgery.graph.marks import mark_of
from surgery.graph.ops import CONV
from surgery.graph.sites import Measurements, Site
from surgery.passes.algebra.factor import stacked
from surgery.passes.algebra.low_rank import factor_shapes
from surgery.passes.measure.output_error import InputMeasurements, InputStatistics, before
from surgery.passes.quantize.codes import Codes
from surgery.passes.quantize.matrix import Layout


class Recodes(Protocol):
    """A pass that can encode a weight again with adapters merged into it; see CodesPass."""

    @property
    def requires(self) -> tuple[str, ...]: ...

    @property
    def rounding(self) -> tuple[Any, ...]: ...

    def layout(self, site: Site) -> Layout: ...

    def keeps_out(self, site: Site) -> str: ...

    def recode(self, site: Site, weight: Tensor, held: Codes) -> Codes: ...


def into_codes(program: State, how: How, budget: float, ident: str, data: Sequence[InputSet]) -> Merged:
    """Merge adapters into the codes of quantized weights, without changing the program.

    The error is measured relative to what the adapters add to an op's outputs on the data. An error that is small
    relative to the outputs can still erase everything that an adapter has learned.

    Args:
        program: The program.
        how: "requantize" for new codes; "residual" for codes with a low-rank correction; "auto" for the first of these
            that is within the budget; "keep" to leave adapters as they are.
        budget: Largest error allowed for "auto", and for the rank of "residual". With "auto", values of the weight that
            no input on the data uses must stay within the budget too; otherwise an adapter could be lost at a rare
            token unnoticed.
        ident: Id of the merge, which names its tensors.
        data: Inputs to measure on.
    """
    places = _places(program, Probe(program, data))
    choices: list[Choice] = []
    records: list[SiteRecord] = []
    tensors: dict[str, Tensor] = {}
    for place in places:
        choice, made = place.choose(how, budget)
        choices.append(choice)
        if choice.how == "keep":
            continue
        site, path = place.site, place.record.path
        names = default_names(cast(RewritePass, place.pass_), site, made, f"_{ident}")
        tensors.update({names[name]: tensor for name, tensor in made.items()})
        decided = {"entry": choice.codes, "correction": choice.rank, "merged": choice.to_json()}
        records.append(SiteRecord(site.key, path, decided, {**place.record.tensors, **names}))
        for name in choice.adapters:
            records.append(SiteRecord(site.key, path, {"entry": name, "gone": True}, {}))
    return Merged(tuple(choices), tuple(records), tensors)


def _places(program: State, probe: Measurements) -> list[_Place]:
    """Return the quantized weights that have adapters."""
    live = live_entries(program.journal)
    found: list[_Place] = []
    for entry in live:
        pass_ = pass_of(entry, program.base.plugins)
        if not isinstance(pass_, RewritePass) or pass_.absorber is not into_codes:
            continue
        coding = cast(Recodes, pass_)
        for site, record in zip(find_sites(entry, program.sites.by_key), entry.sites, strict=True):
            over = [e for e in live if e is not entry and any(r.key == record.key for r in e.sites)]
            place = _Place(program, entry, coding, replace(site, measured=probe), record, over)
            if place.over:
                found.append(place)
    # All places share one set of measurements, so that the data run through the program as few times as possible.
    inputs = InputMeasurements(probe, [(place.site, place.pass_.rounding) for place in found])
    for place in found:
        place.inputs = inputs
    return found


class _Place:
    """A quantized weight and its adapters.

    Attributes:
        entry: Journal entry of the quantization.
        pass_: Its pass.
        site: The site of the weight.
        record: Record of the site in `entry`.
        layout: Number format and matrix form of the codes.
        over: Entries of the adapters, in journal order.
        passes: Pass of each entry at the site, by id.
        zeros: Ids of entries that set values of the weight to zero.
        inputs: Measurements shared by all places.
    """

    inputs: InputMeasurements

    def __init__(
        self,
        program: State,
        entry: Entry,
        pass_: Recodes,
        site: Site,
        record: SiteRecord,
        over: list[Entry],
    ) -> None:
        self.entry, self.pass_, self.site, self.record = entry, pass_, site, record
        self.layout = pass_.layout(site)
        plugins = program.base.plugins
        self.tensors = program.tensors
        self.passes = {e.id: cast(RewritePass, pass_of(e, plugins)) for e in over}
        self.zeros = [e.id for e in over if self.passes[e.id].effect.makes_zeros]
        # `fake-quant` and `sparse` are not adapters: the codes were computed from the weights that they changed.
        self.over = [e for e in over if e.pass_name not in pass_.requires and e.id not in self.zeros]

    def choose(self, how: How, budget: float) -> tuple[Choice, dict[str, Tensor]]:
        """Decide how adapters are merged here; return the choice and the new tensors (none if adapters are kept)."""
        kept = Choice(self.record.path, self.entry.id, tuple(e.id for e in self.over), "keep")
        why = "the merge was asked to keep it" if how == "keep" else self._hindrance()
        if why:
            return replace(kept, why=why), {}
        wanted, given = self._wanted()
        codes = self._encoded(wanted, given)
        fresh = wanted - self.layout.decode(codes)
        whole, added = (stacked(self.site, weight) for weight in (wanted, wanted - given))
        goal = _Goal(self._entering, whole, added, budget)
        error = goal.error(stacked(self.site, fresh), goal.added)
        kept = replace(kept, errors={"requantize": error.outputs})
        if how == "requantize" or (how == "auto" and error.within):
            chosen = replace(kept, how="requantize", lost=error.lost, unseen=error.unseen)
            return chosen, self._made(codes)
        lost = f"new codes lose {error.said}"
        if self.site.kind == CONV and self.site.layout == "io":
            return replace(kept, why=f"{lost}, and a transposed convolution has no low-rank branch"), {}
        return self._corrected(kept, codes, stacked(self.site, fresh), goal, how, lost)

    def _corrected(
        self, kept: Choice, codes: Codes, fresh: Tensor, goal: _Goal, how: How, lost: str
    ) -> tuple[Choice, dict[str, Tensor]]:
        """Choose codes with a low-rank correction.

        The codes are either new ones, and the correction restores what they round away, or the current ones, and the
        correction approximates the adapters. The one with the smaller error is taken.
        """
        moved = [(codes, fresh), (self._codes, goal.added)]
        found = [self._entering.decomposed(self._entering.joined(rest, goal.added)) for _, rest in moved]
        shapes = factor_shapes(self.site, 1)
        most = self._values_of_adapters() // sum(torch.Size(shape).numel() for shape in shapes)
        rank = min(each.rank_within(goal.room) for each in found)
        if how == "residual":
            rank = min(rank, max(most, 1), min(fresh.shape[1:]))
        elif rank >= most:
            least = f"needs rank {rank}, which is not smaller than the adapters"
            if rank > min(fresh.shape[1:]):
                least = "is impossible, because its input is rounded"
            return replace(kept, why=f"{lost}, and a correction that loses {goal.budget:.1%} {least}"), {}
        best = min(range(len(found)), key=lambda index: found[index].tail(rank))
        (held, rest), scale = moved[best], self._codes.scale
        made = {name: tensor.clone() for name, tensor in self._made(held).items()}
        up, down = (factor.to(scale) for factor in found[best].factors(rank))
        added = up.double() @ down.double()
        error = goal.error(rest - added, goal.added - added)
        if how == "auto" and not error.within:
            return replace(kept, why=f"{lost}, and a correction of rank {rank} loses {error.said}"), {}
        for name, factor, shape in zip(
            ("right", "left"), (down, up), factor_shapes(self.site, rank), strict=True
        ):
            made[name] = factor.reshape(shape).contiguous()
        errors = {**kept.errors, "residual": error.outputs}
        return replace(
            kept, how="residual", rank=rank, errors=errors, lost=error.lost, unseen=error.unseen
        ), made

    def _hindrance(self) -> str:
        """Return the reason why the adapters cannot be merged into codes, or ""."""
        if self.record.decided.get("correction"):
            return "an earlier merge added a low-rank correction; undo that first"
        why = self.pass_.keeps_out(self.site)
        if why:
            return why
        for entry in self.over:
            pass_ = self.passes[entry.id]
            if not merges(pass_):
                return f"{entry.id} has no merged form"
            stays = pass_.why_not_merged(self._site_of(entry))
            if stays:
                return f"{entry.id}: {stays}"
            folds = self._folds(entry)
            if self.zeros and not all(fold.keeps_zeros for fold in folds.values()):
                return f"it would fill the zeros of {self.zeros[0]}"
            if any(fold.stage is Stage.SIZE for fold in folds.values()):
                return f"{entry.id} makes the weight longer"
            if any(slot.partition(":")[0] != "weight" for slot in folds):
                return f"{entry.id} changes the bias too, which is not quantized"
        between = [node for call in self.site.calls for node in before(call)]
        others = [e for n in between if (e := mark_of(n).entry) != self.entry.id]
        if others and any(node.target in self.pass_.rounding for node in between):
            return f"{others[0]} changes the input before it is rounded, which codes of the weight cannot express"
        if self._entering.nothing:
            return "its input is zero on all of the data, so no error can be measured"
        return ""

    def _site_of(self, entry: Entry) -> Site:
        """Return the site with the decisions of an adapter."""
        record = next(r for r in entry.sites if r.key == self.record.key)
        return self.site.deciding(record.decided)

    def _folds(self, entry: Entry) -> Mapping[str, Fold]:
        pass_ = self.passes[entry.id]
        record = next(r for r in entry.sites if r.key == self.record.key)
        own = {name: self.tensors[full].detach() for name, full in record.tensors.items()}
        return pass_.merge(self._site_of(entry), own, entry.weight)

    @property
    def _codes(self) -> Codes:
        """The current codes."""
        return Codes(**{name: self.tensors[self.record.tensors[name]] for name in self.layout.names})

    def _made(self, codes: Codes) -> dict[str, Tensor]:
        """Return the tensors of codes that a merge replaces: all but the smoothing factors."""
        return {name: getattr(codes, name) for name in self.layout.names if name != "smooth"}

    @cached_property
    def _entering(self) -> InputStatistics:
        return self.inputs.at(self.site, self._codes.scale.device)

    def _wanted(self) -> tuple[Tensor, Tensor]:
        """Return the weight with the adapters merged, and the weight that the current codes decode to, in fp32."""
        given = self.layout.decode(self._codes).float()
        folds = [fold for entry in self.over for fold in self._folds(entry).values()]
        wanted = apply_folds(given.clone(), folds, given)
        return wanted, given

    def _encoded(self, wanted: Tensor, given: Tensor) -> Codes:
        """Encode the merged weight.

        Args:
            wanted: The weight with the adapters merged.
            given: The weight that the current codes decode to.
        """
        codes = self._codes
        # Encoding a decoded row again may give other codes, so rows that no adapter has changed keep theirs.
        moved = (self.layout.matrix(wanted) != self.layout.matrix(given)).any(1, keepdim=True)
        if not bool(moved.any()):
            return codes
        fresh = self.pass_.recode(self.site, wanted, codes)
        fresh = replace(fresh, scale=fresh.scale.to(codes.scale))
        if bool(moved.all()):
            return fresh
        zero = (
            None if fresh.zero is None or codes.zero is None else torch.where(moved, fresh.zero, codes.zero)
        )
        held = torch.where(moved, fresh.codes, codes.codes)
        return replace(fresh, codes=held, scale=torch.where(moved, fresh.scale, codes.scale), zero=zero)

    def _values_of_adapters(self) -> int:
        """Return the number of values in the adapters' tensors at the site."""
        records = [r for e in self.over for r in e.sites if r.key == self.record.key]
        return sum(self.tensors[full].numel() for r in records for full in r.tensors.values())


@dataclass(frozen=True)
class _Error:
    """Error of a merge at one weight.

    Attributes:
        outputs: Error of the op's outputs, relative to these.
        lost: Error relative to what the adapters add to the outputs; see Choice.
        unseen: Error in values that no input on the data uses, relative to the adapters; see Choice.
        within: Both `lost` and `unseen` are within the budget.
    """

    outputs: float
    lost: float
    unseen: float
    within: bool

    @property
    def said(self) -> str:
        """The error in words."""
        said = f"{self.lost:.1%} of the adapters' effect"
        return (
            f"{said}, and {self.unseen:.1%} of it on inputs that the data never use" if self.unseen else said
        )


@dataclass(frozen=True)
class _Goal:
    """The target of a merge at one weight.

    Attributes:
        entering: Measurements of the op's inputs on the data.
        whole: The weight with the adapters merged (stack × out × in).
        added: What the adapters add to the weight (stack × out × in).
        budget: Largest error allowed, relative to the effect of `added`.
    """

    entering: InputStatistics
    whole: Tensor
    added: Tensor
    budget: float

    @cached_property
    def _size(self) -> float:
        """Norm of the op's outputs on the data."""
        return max(self.entering.norm(self.entering.joined(self.whole, self.added)), 1e-30)

    @cached_property
    def _effect(self) -> float:
        """Norm of what the adapters add to the outputs on the data."""
        return max(self.entering.norm(self.entering.joined(self.added, self.added)), 1e-30)

    @property
    def room(self) -> float:
        """Largest error of the outputs within the budget."""
        return self.budget * self._effect

    def error(self, by_op: Tensor, by_rest: Tensor) -> _Error:
        """Measure the error of a merge.

        Args:
            by_op: Error of the weight, which acts on the input that the op reads.
            by_rest: Error of the adapters, which acts on the part of the input that rounding removes.
        """
        error = self.entering.norm(self.entering.joined(by_op, by_rest))
        gone = self.entering.unseen_norm(by_op)
        # If the adapters add nothing in unused places, the error there is compared with all that they add, since a new
        # scale changes a whole row.
        there = self.entering.unseen_norm(self.added) or float(self.added.double().norm())
        unseen = gone / max(there, 1e-30)
        return _Error(
            error / self._size, error / self._effect, unseen, error <= self.room and unseen <= self.budget
        )
