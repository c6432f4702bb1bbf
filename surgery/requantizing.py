"""Merging adapters into quantized weights: new codes, these and a correction, or the branch kept, by output error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from surgery.errors import PassError
from surgery.journal import Entry, SiteRecord
from surgery.pass_base import RewritePass
from surgery.probe import InputSet, Probe
from surgery.quantizing.codes import Codes
from surgery.quantizing.stored import CodesPass
from surgery.replay import find_sites, live_entries, pass_of
from surgery.sites import Site
from surgery.weight_ops import LINEAR

if TYPE_CHECKING:
    from surgery.program import Program

How = Literal["keep", "requantize", "residual", "auto"]
_DAMPING = 1e-6  # of the mean of H's diagonal: inputs that the data never use


@dataclass(frozen=True)
class Choice:
    """What becomes of the adapters at one quantized weight.

    how: keep, requantize or residual. errors: of the outputs of the op, over theirs, by how (of the weight, where `of`
    says so). lost: of what the adapters add, how much is rounded away. rank: of the correction. why: they stay.
    """

    path: str
    codes: str
    adapters: tuple[str, ...]
    how: str
    errors: Mapping[str, float] = field(default_factory=dict)
    lost: float = 0.0
    rank: int = 0
    of: str = "outputs"
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        found = {"how": self.how, "errors": dict(self.errors), "lost": self.lost, "of": self.of}
        return {**found, "rank": self.rank, "why": self.why}


@dataclass(frozen=True)
class Merged:
    """choices: at each quantized weight under adapters. records, tensors: of the merge's entry in the journal."""

    choices: tuple[Choice, ...] = ()
    records: tuple[SiteRecord, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def gone(self) -> dict[str, int]:
        """Adapter -> at how many sites it is in the codes now."""
        found: dict[str, int] = {}
        for record in self.records:
            if record.decided.get("gone"):
                found[record.decided["entry"]] = found.get(record.decided["entry"], 0) + 1
        return found


def into_codes(program: Program, how: How, budget: float, ident: str, data: Sequence[InputSet]) -> Merged:
    """Put adapters into the codes that they stand on, where `how` and the budget let them.

    budget: of what the adapters add to an op's outputs on the data, the part that may be lost (error over norm), for
    `auto` and the rank of `residual`. Over the outputs themselves an error may be small and yet all that was learned.
    ident: of the merge, which names its tensors. Nothing of the program is changed. Raises PassError.
    """
    if how not in get_args(How):
        raise PassError(f"merge: quantized is {how!r}; it is one of {', '.join(get_args(How))}")
    if not budget >= 0:
        raise PassError(
            f"merge: the budget is {budget!r}; give a fraction of what the adapters add, such as 0.1"
        )
    if not program.base.in_memory:
        raise PassError("merge: the weights are not in memory, so that no error can be measured")
    live = live_entries(program.journal)
    probe = Probe(program, data)
    choices: list[Choice] = []
    records: list[SiteRecord] = []
    tensors: dict[str, Tensor] = {}
    for entry in live:
        pass_ = pass_of(entry, program.base.plugins)
        if not isinstance(pass_, CodesPass):
            continue
        for site, record in zip(find_sites(entry, program.sites.by_key), entry.sites, strict=True):
            place = _Place(
                program, entry, pass_, replace(site, measured=probe), record, _over(live, record, entry)
            )
            if not place.over:
                continue
            choice, made = place.choose(how, budget)
            choices.append(choice)
            if choice.how == "keep":
                continue
            names = {name: f"{pass_.tensor_prefix(site)}_{ident}.{name}" for name in made}
            tensors.update({names[name]: tensor for name, tensor in made.items()})
            decided = {"entry": entry.id, "correction": choice.rank, "merged": choice.to_json()}
            records.append(SiteRecord(site.key, record.path, decided, names))
            for name in choice.adapters:
                records.append(SiteRecord(site.key, record.path, {"entry": name, "gone": True}, {}))
    return Merged(tuple(choices), tuple(records), tensors)


def _over(live: Sequence[Entry], record: SiteRecord, codes: Entry) -> list[Entry]:
    """What else stands at the site of a quantized weight."""
    return [e for e in live if e is not codes and any(r.key == record.key for r in e.sites)]


class _Place:
    """One quantized weight and the adapters on it."""

    def __init__(
        self,
        program: Program,
        entry: Entry,
        pass_: CodesPass,
        site: Site,
        record: SiteRecord,
        over: list[Entry],
    ) -> None:
        self.entry, self.pass_, self.site, self.record = entry, pass_, site, record
        self.layout = pass_.layout(site)
        plugins = program.base.plugins
        self.tensors = program.tensors
        self.probe = site.probe
        self.passes = {e.id: pass_of(e, plugins) for e in over}
        self.zeros = [e.id for e in over if getattr(self.passes[e.id], "makes_zeros", False)]
        # `fake-quant` and `sparse` stand below the codes that were made of their weights.
        self.over = [e for e in over if e.pass_name not in pass_.requires and e.id not in self.zeros]

    def choose(self, how: How, budget: float) -> tuple[Choice, dict[str, Tensor]]:
        names = tuple(e.id for e in self.over)
        kept = Choice(self.record.path, self.entry.id, names, "keep")
        why = "" if how != "keep" else "it was asked to stay"
        why = why or self._hindrance()
        if why:
            return replace(kept, why=why), {}
        wanted, given = self._wanted()
        scale = self._codes.scale
        codes = self._codes
        if not torch.equal(wanted, given):
            codes = self.pass_.encode(self.site, wanted)
            codes = Codes(codes.codes, codes.scale.to(scale), codes.zero)
        rest, added = (self.layout.matrix(wanted - w) for w in (self.layout.decode(codes).float(), given))
        size, effect = (max(self._norm(m), 1e-30) for m in (self.layout.matrix(wanted), added))
        error = self._norm(rest)
        kept = replace(kept, errors={"requantize": error / size}, of=self._of)
        if how == "requantize" or (how == "auto" and error <= budget * effect):
            chosen = replace(kept, how="requantize", lost=error / effect)
            return chosen, {name: getattr(codes, name) for name in self.layout.names}
        lost = f"new codes lose {error / effect:.1%} of what it adds"
        if self.site.kind != LINEAR:
            return replace(kept, why=f"{lost}, and only linear maps have a low-rank correction"), {}
        # Beside new codes the correction is of what these round away; beside those that are there, of the adapters.
        found = [
            _Correction.of(held, self._decomposed(e)) for held, e in ((codes, rest), (self._codes, added))
        ]
        most = self._values_of_adapters() // sum(rest.shape)
        rank = min(correction.rank_within(budget * effect) for correction in found)
        if how == "residual":
            rank = min(rank, max(most, 1))
        elif rank >= most:
            why = f"{lost}, and a correction that loses {budget:.1%} takes rank {rank}, no less than the adapters"
            return replace(kept, why=why), {}
        best = min(found, key=lambda correction: correction.left(rank))
        made = {name: getattr(best.codes, name).clone() for name in self.layout.names}
        made["left"], made["right"] = (factor.to(scale).contiguous() for factor in best.factors(rank))
        errors = {**kept.errors, "residual": best.left(rank) / size}
        return replace(kept, how="residual", rank=rank, errors=errors, lost=best.left(rank) / effect), made

    def _hindrance(self) -> str:
        if self.record.decided.get("correction"):
            return "an earlier merge has put a low-rank correction there; undo that first"
        for entry in self.over:
            pass_ = self.passes[entry.id]
            assert isinstance(pass_, RewritePass)
            if not pass_.mergeable:
                return f"{entry.id} has no merged form"
            if self.zeros and not pass_.keeps_zeros:
                return f"it would fill the zeros of {self.zeros[0]}"
            why = pass_.keeps(self._site_of(entry))
            if why:
                return f"{entry.id}: {why}"
            merges = self._merges(entry)
            if any(hasattr(op, "longer") for op in merges.values()):
                return f"{entry.id} makes the weight longer"
            if any(slot.partition(":")[0] != "weight" for slot in merges):
                return f"{entry.id} changes the bias too, which is not in the codes"
        if self._products is not None and not bool(self._products.any()):
            return "nothing but zeros enters it on the data, so that no error can be measured"
        return ""

    def _site_of(self, entry: Entry) -> Site:
        record = next(r for r in entry.sites if r.key == self.record.key)
        return self.site.deciding(record.decided)

    def _merges(self, entry: Entry) -> Mapping[str, Any]:
        pass_ = self.passes[entry.id]
        assert isinstance(pass_, RewritePass)
        record = next(r for r in entry.sites if r.key == self.record.key)
        own = {name: self.tensors[full].detach() for name, full in record.tensors.items()}
        return pass_.merge(self._site_of(entry), own, entry.weight)

    @property
    def _codes(self) -> Codes:
        return Codes(*(self.tensors[self.record.tensors[name]] for name in self.layout.names))

    def _wanted(self) -> tuple[Tensor, Tensor]:
        """The weight with the adapters in it, and the one that the codes give, in fp32."""
        given = self.layout.decode(self._codes).float()
        wanted = given.clone()
        with torch.no_grad():
            for entry in self.over:
                for op in self._merges(entry).values():
                    op.apply_from(wanted, given) if hasattr(op, "apply_from") else op.apply_(wanted)
        return wanted, given

    def _values_of_adapters(self) -> int:
        records = [r for e in self.over for r in e.sites if r.key == self.record.key]
        return sum(self.tensors[full].numel() for r in records for full in r.tensors.values())

    # -- the error of outputs: |E X| by X's products, or of the weight where these are not measured

    @property
    def _of(self) -> str:
        return "outputs" if self.site.kind == LINEAR else "weight"

    @cached_property
    def _products(self) -> Tensor | None:
        return self.probe.products(self.site) if self.site.kind == LINEAR else None

    @cached_property
    def _root(self) -> Tensor:
        assert self._products is not None
        damped = self._products.clone()
        damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp(min=1e-30))
        return torch.linalg.cholesky(damped)

    def _norm(self, matrix: Tensor) -> float:
        wide = matrix.double()
        squared = wide.square().sum() if self._products is None else (wide @ self._products * wide).sum()
        return float(squared.clamp(min=0).sqrt())

    def _decomposed(self, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Singular values of E X, and factors with E = left · diag(values) · right (Zhang et al. 2024,
        arXiv:2410.06040): of every rank the correction that leaves the least error of the outputs."""
        left, values, right = torch.linalg.svd(rest.double() @ self._root, full_matrices=False)
        return left, values, torch.linalg.solve_triangular(self._root, right, upper=False, left=False)


@dataclass(frozen=True)
class _Correction:
    """Codes, and the factors of what they leave. tails: by rank, the error of the outputs that is left."""

    codes: Codes
    left_factor: Tensor
    values: Tensor
    right_factor: Tensor
    tails: list[float]

    @staticmethod
    def of(codes: Codes, decomposed: tuple[Tensor, Tensor, Tensor]) -> _Correction:
        squared = decomposed[1].square().flip(0).cumsum(0).flip(0)
        return _Correction(codes, *decomposed, [*squared.sqrt().tolist(), 0.0])

    def left(self, rank: int) -> float:
        return self.tails[min(rank, len(self.tails) - 1)]

    def rank_within(self, error: float) -> int:
        """The smallest rank, at least 1, that leaves no more."""
        return max(next(rank for rank, tail in enumerate(self.tails) if tail <= error), 1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in)."""
        return self.left_factor[:, :rank] * self.values[:rank], self.right_factor[:rank]
