"""Merging: folds adapters into the base's weights, as a journal entry or in the base's own storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, get_args

from torch import Tensor

from surgery.common.errors import PassError
from surgery.common.files import core_version
from surgery.common.progress import stage
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.folds import How, Merged
from surgery.engine.contract.numerics import rounded
from surgery.engine.contract.observe import observe
from surgery.engine.fold import fold, foldable, simplifiable, simplify
from surgery.engine.journal import Entry, Journal
from surgery.engine.probe import InputSet
from surgery.engine.replay import live_entries, pass_of
from surgery.engine.state import State

S = TypeVar("S", bound=State)


def merge(
    program: S, in_place: bool, verify: bool, quantized: How, budget: float, data: Sequence[InputSet]
) -> S:
    """Merge the adapters of a program; see Program.merge.

    Args:
        program: The program.
        in_place: Fold into the base's own storage.
        verify: Compare the outputs on the example inputs with those before.
        quantized: Treatment of adapters on quantized weights.
        budget: Largest part of the adapters' contribution to an op's outputs that quantization may lose.
        data: Inputs to measure that on, a sequence of (args, kwargs).

    Raises:
        PassError: Nothing can be folded, an argument is invalid, or the outputs differ by more than the tolerance.
        JournalError: An adapter cannot be folded in place.
    """

    base, journal = program.base, program.journal
    count = sum(e.kind == "merge" for e in journal)
    ident = f"merge{count or ''}"
    into = _into_codes(program, quantized, budget, ident, data)
    folded, kept = foldable(base, journal, program.sites, program.tensors)
    done = {name for e in journal if e.kind == "merge" for name in e.options.get("folded", ())}
    folded = [name for name in folded if name not in done]
    plain = [e for e in simplifiable(base, journal) if e not in folded]
    kept = {name: why for name, why in kept.items() if name not in plain}
    kept = _left(journal, kept, into)
    if not folded and not plain and not into.records:
        reasons = "; ".join(f"{name}: {why}" for name, why in kept.items())
        raise PassError(f"merge: nothing can be folded ({reasons or 'the program has no adapter'})")
    wanted = [e for e in journal if e.id in plain]
    records, made = simplify(base, wanted, program.tensors, program.sites)
    entry = Entry(
        id=ident,
        pass_name="merge",
        kind="merge",
        distribution_version=core_version(),
        options={"folded": folded, "kept": kept, "simplified": plain},
        sites=records,
        trains=dict.fromkeys(made, False),
    )
    tensors = {**program.tensors, **made}
    if in_place:
        if into.records:
            raise PassError("merge: quantized codes cannot be changed in place; leave out in_place")
        return _in_place(program, entry, folded, tensors)
    merged = program.derive(journal.add(entry), tensors, dict(program.changed), clock=program.clock)
    verify = verify and base.in_memory
    if verify and (folded or plain):
        with stage("checking the merge"):
            seen = observe(_in_floats(program).run(), _in_floats(merged).run())
        allowed = rounded(program.merge_tolerance, "weights are rounded once more")
        if not seen.within(allowed):
            raise PassError(
                f"merge: the outputs moved by {seen.difference:.1e} of their scale, more than {allowed}; "
                f"keep the adapters, or merge with verify=False"
            )
        numerics = {"declared": f"rounded {program.merge_tolerance:g}", "observed": str(seen)}
        entry = replace(entry, numerics=numerics)
    if into.choices:
        options = {**entry.options, "quantized": quantized, "budget": budget, "into_codes": into.gone}
        options["choices"] = {choice.path: choice.to_json() for choice in into.choices}
        entry = replace(entry, options=options, sites=(*records, *into.records))
        merged = program.derive(
            journal.add(entry), {**tensors, **into.tensors}, dict(program.changed), clock=program.clock
        )
        if verify:
            seen = observe(program.run(), merged.run())
            entry = replace(
                entry, numerics={"declared": "changes (codes are recomputed)", "observed": str(seen)}
            )
    merged.journal = journal.add(entry)
    return merged


def _into_codes(
    program: State, quantized: How, budget: float, ident: str, data: Sequence[InputSet]
) -> Merged:
    """Merge adapters into quantized codes, by the `absorber` of each quantizing pass."""
    if quantized == "keep":
        return Merged()
    if quantized not in get_args(How):
        raise PassError(f"merge: quantized is {quantized!r}; give one of {', '.join(get_args(How))}")
    if not budget >= 0:
        raise PassError(
            f"merge: the budget is {budget!r}; give a fraction of what the adapters add, such as 0.1"
        )
    if not program.base.in_memory:
        raise PassError(
            "merge: the weights are not in memory, so no error can be measured; load the weights first"
        )
    passes = [pass_of(entry, program.base.plugins) for entry in live_entries(program.journal)]
    absorbers = dict.fromkeys(p.absorber for p in passes if isinstance(p, RewritePass) and p.absorber)
    found = [absorb(program, quantized, budget, ident, data) for absorb in absorbers]
    return Merged(
        tuple(choice for each in found for choice in each.choices),
        tuple(record for each in found for record in each.records),
        {name: tensor for each in found for name, tensor in each.tensors.items()},
    )


def _left(journal: Journal, kept: Mapping[str, str], into: Merged) -> dict[str, str]:
    """Reasons why adapters stay, without those that were merged into quantized codes."""
    gone, left = into.gone, dict(kept)
    # The quantizing passes themselves are listed as kept, but they are not adapters that were left over.
    for name in {choice.codes for choice in into.choices}:
        left.pop(name, None)
    for entry in journal:
        if entry.id not in left or not any(entry.id in choice.adapters for choice in into.choices):
            continue
        rest = len(entry.sites) - gone.get(entry.id, 0)
        stays = [c for c in into.choices if entry.id in c.adapters and c.how == "keep"]
        if not rest:
            del left[entry.id]
        elif stays:
            left[entry.id] = (
                f"its branch stays at {rest} of {len(entry.sites)} sites; {stays[0].path}: {stays[0].why}"
            )
        else:
            left[entry.id] = (
                f"its branch stays at {rest} of {len(entry.sites)} sites, which are not quantized"
            )
    return left


def _in_floats(program: State) -> State:
    """The program without passes that quantize activations.

    Their rounding turns the tiny differences that folding makes into differences of a whole quantization step.
    """
    names = [
        e.id
        for e in live_entries(program.journal)
        if isinstance(pass_ := pass_of(e, program.base.plugins), RewritePass) and pass_.effect.rounding
    ]
    return program.without(*names) if names and not program.base.released else program


def _in_place(program: S, entry: Entry, folded: list[str], tensors: Mapping[str, Tensor]) -> S:
    """Fold entries into the base's own storage; the new journal has only the entries that remain."""
    base = program.base
    entries = [e for e in program.journal if e.id in folded]
    tied = {r.key.owner for e in entries for r in e.sites if len(base.names.get(r.key.owner, ())) > 1}
    if tied:
        raise PassError(
            f"merge in place: {sorted(tied)[0]} is tied, and folding would change its other uses; "
            f"merge without in_place"
        )
    values = {**base.tensors, **program.changed}
    fold(base, entries, program.tensors, values, program.sites, in_place=True)
    base.consumed = True
    merged = program.journal.add(entry)
    journal = Journal(tuple(merged.standing(e) for e in program.journal if e.id not in folded))
    left = {n for e in journal if e.kind == "rewrite" for n in e.tensor_names}
    return program.derive(journal, {n: t for n, t in tensors.items() if n in left})
