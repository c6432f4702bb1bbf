"""Compiles graphs to modules. Every graph of surgery passes through here, so that no name in it can be code.

torch.fx writes `getattr(self, "NAME")` into the code that it generates, without escaping NAME. Names from files are
checked where they enter; this is the second wall.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from surgery.common.errors import SurgeryError

# Word characters, and a few that keys of a ModuleDict have; no quote, bracket, backslash or line break.
_COMPONENT = re.compile(r"[\w][\w\-+:/@=, ]*")


def check_targets(graph: fx.Graph) -> None:
    """Refuse a graph that refers to an attribute whose name could be code.

    Raises:
        SurgeryError: The target of a get_attr, call_module or call_method node, or the name of an input, has a quote, a
            backslash, a bracket or a control character in it.
    """
    for node in graph.nodes:
        if node.op == "call_function" or node.op == "output":
            continue
        target = str(node.target)
        if not all(_COMPONENT.fullmatch(part) for part in target.split(".")):
            shown = repr(target) if len(target) <= 60 else repr(target[:57]) + "…"
            raise SurgeryError(
                f"the graph has a {node.op} node of {shown}, which cannot be written into code safely; rename the "
                "module or tensor, or do not trust the file that it came from"
            )


def compiled(root: Any, graph: fx.Graph, name: str = "GraphModule") -> fx.GraphModule:
    """A GraphModule over a module's tensors.

    Args:
        root: The module, or a mapping of attributes, that holds what the graph reads.
        graph: The graph; it is checked first.
        name: Class name of the result.

    Raises:
        SurgeryError: See `check_targets`.
    """
    check_targets(graph)
    return fx.GraphModule(root, graph, class_name=name if name.isidentifier() else "GraphModule")
