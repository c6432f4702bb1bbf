"""Exporting an edited graph again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx


def export_again(
    graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """torch.export of a program's graph, with its dynamic dimensions.

    Where torch cannot prove that a size holds over a whole range (of a sequence with a prompt before it, 8·(s + 3)
    against 16·(s + 3)), what it would refuse becomes an assertion that is checked when the program runs.
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

    try:
        return export(False)
    except Exception as error:
        if "Constraints violated" not in str(error):
            raise
        return export(True)
