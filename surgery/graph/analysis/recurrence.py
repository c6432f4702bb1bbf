"""Finds the linear recurrences of a graph and the weight ops that produce their operands and read their result.

The core is one op, `surgery::linear_attention`. In a state-space model (Mamba) the step size enters both the decay and
the values; in linear attention (gated delta rule, lightning attention) the decay is made by itself, or is constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from surgery.graph.analysis.attention import makers, readers
from surgery.graph.analysis.dataflow import Dataflow, op_name
from surgery.graph.ops import arguments

OPERANDS = ("q", "k", "v", "decay", "beta")


@dataclass(frozen=True)
class Recurrence:
    """One recurrence and the weight ops around it.

    Attributes:
        core: the op.
        operands: nodes of the operands as the op reads them, by name in `OPERANDS`.
        made_by: weight ops that produce each operand, by the operand's name in `OPERANDS`.
        out: weight ops that read the result.
        gate: weight ops that gate the result.
    """

    core: tuple[fx.Node, ...]
    operands: dict[str, fx.Node]
    made_by: dict[str, tuple[fx.Node, ...]] = field(default_factory=dict)
    out: tuple[fx.Node, ...] = ()
    gate: tuple[fx.Node, ...] = ()

    @property
    def is_state_space(self) -> bool:
        """True if the weight ops of the decay, the step size, produce the values too."""
        step = self.made_by["decay"]
        return bool(step) and set(step) <= set(self.made_by["v"])

    def letters(self) -> dict[fx.Node, set[str]]:
        """Map each weight op to the operands that it produces; "gate" counts as one."""
        found: dict[fx.Node, set[str]] = {}
        for letter, nodes in (*self.made_by.items(), ("gate", self.gate)):
            for node in nodes:
                found.setdefault(node, set()).add(letter)
        return found


def find_recurrences(flow: Dataflow) -> list[Recurrence]:
    """Find all recurrences, in graph order."""
    cores = [node for node in flow.products if op_name(node.target) == "linear_attention"]
    return [_recurrence(flow, core, set(cores)) for core in cores]


def _recurrence(flow: Dataflow, core: fx.Node, cores: set[fx.Node]) -> Recurrence:
    given = arguments(core)
    operands = {name: node for name in OPERANDS if isinstance(node := given.get(name), fx.Node)}
    made_by = {name: makers(flow, operands.get(name)) for name in OPERANDS}
    own = {node for nodes in made_by.values() for node in nodes}
    out, gate = readers(flow, core, own, cores)
    return Recurrence((core,), operands, made_by, out, gate)
