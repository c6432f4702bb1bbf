"""Coupling in products and sums, by dimension: letters as in einsum name the dimensions of operands and result."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from surgery.passes.prune.coupling import Coupling
from surgery.passes.prune.labels import Labels, covered, first_of, sizes_of


@dataclass(frozen=True)
class Term:
    """An operand: its labels, its sizes, and a letter for each dimension."""

    labels: Labels
    sizes: Sequence[int]
    letters: str


def split_letters(count: int) -> str:
    """Return letters for dimensions that a product keeps; they differ from the letters that rules use themselves."""
    return "".join(c for c in string.ascii_lowercase if c not in "bdeikostxy")[:count]


def product(run: Coupling, terms: Sequence[Term], output: str, what: str) -> Labels:
    """Apply a product that sums over the letters missing from the output.

    If a label is summed over in only some of its dimensions, its units lie along the others: heads are removed whole.

    Args:
        run: the analysis.
        terms: operands of the product.
        output: letters of the result.
        what: the op, for refusals.

    Returns:
        Labels of the result.
    """
    summed = {c for term in terms for c in term.letters} - set(output)
    whole: set[str] = set()
    inner: list[tuple[Term, Tensor]] = []
    outer: list[tuple[Labels, list[int]]] = []
    sizes = {
        c: max(s for t in terms for a, s in zip(t.letters, t.sizes, strict=True) if a == c) for c in output
    }
    for term in terms:
        kept: Labels = []
        for label in term.labels:
            gone = {d for d in covered(label) if term.letters[d] in summed}
            if not gone:
                kept.append(label)
            elif covered(label) - gone:
                # Part of a head dimension is summed over: the whole head must then be kept or removed.
                left = first_of(label, gone)
                run.couple(label, left)
                whole |= {term.letters[d] for d in gone}
                kept.append(left)
            else:
                inner.append((term, label))
        outer.append(([_placed(one, term.letters, output) for one in kept], _sizes(term, output)))
    for term, label in inner:
        _contract(run, term, label, inner, terms, whole, what)
    return merge(run, outer, [sizes[c] for c in output], what)


def _contract(
    run: Coupling,
    term: Term,
    label: Tensor,
    inner: Sequence[tuple[Term, Tensor]],
    terms: Sequence[Term],
    whole: set[str],
    what: str,
) -> None:
    """Couple indices that are summed over together; if one operand cannot shrink, freeze the other."""
    letters = {term.letters[d] for d in covered(label)}
    order = "".join(sorted(letters))
    own = _placed(label, term.letters, order)
    for other in terms:
        if other is term or not letters & set(other.letters):
            continue
            # A dimension of size 1 broadcasts: it is summed with every index, and does not have to shrink.
        wide = {c for c, size in zip(other.letters, other.sizes, strict=True) if size > 1}
        if not letters & wide:
            continue
        # The other operand must have a label over the same summed dimensions, else it cannot shrink along them.
        match = next(
            (one for t, one in inner if t is other and {other.letters[d] for d in covered(one)} == letters),
            None,
        )
        if match is None or letters & whole:
            run.freeze(label, f"{what} sums over it with what cannot shrink")
        else:
            run.couple(own, _placed(match, other.letters, order))


def _placed(label: Tensor, letters: str, output: str) -> Tensor:
    """Reorder a label to other letters; missing letters get size 1, and dropped ones must have size 1."""
    kept = [d for d, c in enumerate(letters) if c in output]
    shape = [label.shape[d] for d in kept]
    rest = label.reshape(shape).permute(
        sorted(range(len(kept)), key=lambda i: output.index(letters[kept[i]]))
    )
    present = set(letters)
    sizes = iter(rest.shape)
    return rest.reshape([next(sizes) if c in present else 1 for c in output])


def _sizes(term: Term, output: str) -> list[int]:
    known = dict(zip(term.letters, term.sizes, strict=True))
    return [known.get(c, 1) for c in output]


def merge(
    run: Coupling,
    operands: Sequence[tuple[Labels, list[int]]],
    sizes: Sequence[int],
    what: str,
    *,
    defer: bool = False,
    apart: bool = False,
) -> Labels:
    """Return the labels of a value in which operands are combined with broadcasting.

    If an operand has a dimension that none of its labels depends on, the other operands cannot shrink along it. If a
    label depends on fewer dimensions than another, both are coupled.

    Args:
        run: the analysis.
        operands: labels and sizes of each operand, in the dimensions of the result.
        sizes: sizes of the result.
        what: the op, for refusals.
        defer: couple a label of fewer dimensions only if the units turn out to lie along these.
        apart: the labels belong to one value, and are not coupled.
    """
    # Labels of most dimensions come first: each of the others is compared with these.
    every = sorted((one for labels, _ in operands for one in labels), key=lambda one: -len(covered(one)))
    if not apart:
        for labels, own in operands:
            fixed = {d for d, size in enumerate(own) if size > 1 and size == sizes[d]}
            fixed -= {d for label in labels for d in covered(label)}
            for label in every:
                run.keep_whole(label, fixed, f"{what} combines it with values that cannot shrink")
    kept: Labels = []
    for label in every:
        # Labels of a value must not share dimensions, since later rules treat each dimension by one label.
        meets = [one for one in kept if covered(one) & covered(label)]
        if not meets:
            kept.append(label)
        elif apart or any(not covered(label) <= covered(one) for one in meets):
            for one in (label, *meets):
                run.freeze(one, f"{what} mixes its dimensions with others")
        elif defer and covered(label) < covered(meets[0]):
            run.defer(meets[0], label, f"{what} uses it for all units")
        else:
            run.couple(meets[0], label)
    return kept


def aligned(
    run: Coupling, node: fx.Node, operand: fx.Node, at: int | None = None
) -> tuple[Labels, list[int]]:
    """Return the labels and sizes of an operand in the dimensions of the node.

    Args:
        run: the analysis.
        node: op that reads the operand.
        operand: the operand.
        at: dimension of the node that a vector operand lies along; the last by default.
    """
    rank, sizes = len(sizes_of(node)), sizes_of(operand)
    after = 0 if at is None else rank - 1 - at
    lead = rank - len(sizes) - after
    return (
        [
            label.reshape([1] * lead + list(label.shape) + [1] * after)
            for label in run.labels.get(operand, ())
        ],
        [1] * lead + sizes + [1] * after,
    )
