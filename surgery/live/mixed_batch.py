"""A batch whose rows use different adapters, in one forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine.program import Program
from surgery.graph.ops import operand
from surgery.graph.sites import Site
from surgery.live.layer import derived
from surgery.live.state import LiveState

Choice = str | Sequence[str] | None


@contextlib.contextmanager
def rows_of(model: nn.Module, state: LiveState, choices: Sequence[Choice]) -> Iterator[None]:
    """Let row i of every batch use the adapters of choice i while the block runs."""
    program = state.program
    _check_axes(program, len(choices))
    merged = next((e.id for e in program.journal if e.kind == "merge"), None)
    if merged:
        raise PassError(
            f"the adapters are folded into the weights, which all rows share; take that back first: "
            f"surgery.remove_(model, {merged!r})"
        )
    named = [_entries(program, choice) for choice in choices]
    groups = {key: [i for i, own in enumerate(named) if own == key] for key in dict.fromkeys(named)}
    # What no row names has to leave its layers too.
    classes: dict[str, dict[tuple[str, ...], type[nn.Module]]] = {
        p: {} for p in state.classes(model, program)
    }
    for key in groups:
        for path, cls in state.classes(model, program.only(*key)).items():
            classes.setdefault(path, {})[key] = cls
    before = {path: type(model.get_submodule(path)) for path in classes}
    for path, by_choice in classes.items():
        layer = model.get_submodule(path)
        bare = getattr(type(layer), "surgery_base", type(layer))
        parts = [(rows, by_choice.get(key, bare)) for key, rows in groups.items()]
        layer.__class__ = _by_rows(bare, parts, len(choices))
    try:
        yield
    finally:
        for path, cls in before.items():
            model.get_submodule(path).__class__ = cls


def _entries(program: Program, choice: Choice) -> tuple[str, ...]:
    names = [choice] if isinstance(choice, str) else list(choice or ())
    return tuple(sorted({e.id for name in names for e in program.journal.find(name) if e.kind == "rewrite"}))


def _by_rows(
    base: type[nn.Module], parts: Sequence[tuple[list[int], type[nn.Module]]], count: int
) -> type[nn.Module]:
    order = [row for rows, _ in parts for row in rows]
    inverse = [order.index(row) for row in range(count)]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        each, left = divmod(x.shape[0], count)
        if left or not each:
            raise PassError(f"the batch has {x.shape[0]} rows, and adapters were chosen for {count}")
        outs = []
        for rows, cls in parts:
            forward: Callable[..., Tensor] = cls.forward
            outs.append(forward(self, x.index_select(0, _rows(rows, each, x))))
        return torch.cat(outs).index_select(0, _rows(inverse, each, x))

    return derived(base, forward)


def _rows(rows: Sequence[int], each: int, like: Tensor) -> Tensor:
    """Rows of a batch in which every row of the model's input has become `each`, one after the other."""
    index = torch.tensor(rows, device=like.device)
    return (index[:, None] * each + torch.arange(each, device=like.device)).flatten()


def _check_axes(program: Program, count: int) -> None:
    """Raises PassError where an adapted layer has another axis than the batch first."""
    if count < 1:
        raise PassError("no row was given; name the adapters of each row of the batch")
    batches = {
        str(node.meta["val"].shape[0])
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim()
    }
    for entry in program.journal:
        for record in entry.sites if entry.kind == "rewrite" else ():
            site = program.base.sites.by_key.get(record.key)
            if site is not None and not _rows_first(site, batches):
                raise PassError(
                    f"{entry.id} at {record.path}: the first axis of what enters it is not the batch's, so rows "
                    f"cannot have adapters of their own there; run a batch for each adapter"
                )


def _rows_first(site: Site, batches: set[str]) -> bool:
    """Whether the first axis is the batch's, or a multiple of it."""
    for call in site.calls:
        first = operand(call).meta["val"].shape[0]
        symbols = first.node.expr.free_symbols if isinstance(first, torch.SymInt) else ()
        if batches.isdisjoint({str(first), *map(str, symbols)}):
            return False
    return True
