"""Weights at no site: no op that passes know reads them (an LSTM's, or the operand of an einsum).

Selections such as `full` and `freeze` reach them, rewrites do not. Targets that name them say so.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from surgery.graph.analysis.dataflow import op_name
from surgery.graph.targets import parse
from surgery.graph.view import View

# Ops that hand a weight on: the op of interest is the one behind them.
_PASSING = (
    "view",
    "reshape",
    "expand",
    "transpose",
    "t",
    "permute",
    "unsqueeze",
    "squeeze",
    "to",
    "_to_copy",
    "alias",
)
_SHOWN = 4


def unread_weights(view: View) -> dict[str, str]:
    """First name of each parameter that the graph reads at no site -> name of the op that reads it."""
    known: set[str] = set()
    for site in view.sites:
        known.update(n for n in (site.weight, site.bias, *site.computed_from, *site.tied) if n is not None)
    for biases in view.biases.values():
        known.update(biases)
    found: dict[str, str] = {}
    for node in view.graph.nodes:
        if node.op != "get_attr" or node.target not in view.names or not node.users:
            continue
        names = view.names[str(node.target)]
        if known.isdisjoint(names):
            found.setdefault(names[0], _reader(node))
    return found


def _reader(node: fx.Node) -> str:
    """Name of the op that reads a value, behind views and casts."""
    for _ in range(len(_PASSING)):
        user = next(iter(node.users))
        name = op_name(user.target)
        if name not in _PASSING or not user.users:
            return name
        node = user
    return op_name(node.target)


def targeted(view: View, target: str) -> dict[str, str]:
    """The weights at no site that a target names by their path, with the ops that read them.

    `all` and roles name sites only.
    """
    # Most targets name roles: they need no analysis of the graph.
    terms = [term for term in parse(target) if term.reading in ("path", "re")]
    unread = view.once("unread", lambda: unread_weights(view)) if terms else {}
    chosen: dict[str, str] = {}
    for term in terms:
        for name, op in unread.items():
            if term.matches_path(*view.names[name]):
                if term.exclude:
                    chosen.pop(name, None)
                else:
                    chosen[name] = op
    return chosen


def in_words(unread: Mapping[str, str]) -> str:
    """The weights with their ops: `lstm.weight_ih_l0 (lstm), …`."""
    listed = [f"{name} ({op})" for name, op in unread.items()]
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")
