"""Repeated torch.export of an edited graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx


def export_again(
    graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """Run torch.export on a program's graph, with its dynamic dimensions.

    torch cannot always prove a relation between sizes for the whole range. For example, a prompt before the sequence
    leads to 8·(s + 3) against 16·(s + 3). Instead of failing, such a relation becomes an assertion at run time.

    Args:
        graph_module: the edited graph.
        args: positional example inputs.
        kwargs: example inputs by name.
        dynamic_shapes: dynamic dimensions as `torch.export.export` takes them.
    """

    def export(deferred: bool) -> torch.export.ExportedProgram:
        return torch.export.export(
            graph_module,
            tuple(args),
            dict(kwargs),
            dynamic_shapes=dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )

    # Try with guards first: deferred assertions add nodes to the graph.
    try:
        return export(False)
    except Exception as error:
        if "Constraints violated" not in str(error):
            raise
        return export(True)
