"""Expectations: deliberate differences in a program with a pass, for verification, export and the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from surgery.graph.sites import Site


@dataclass(frozen=True)
class Expectations:
    """Deliberate differences that a check must not report as faults.

    Attributes:
        adds_outputs: The program returns additional outputs, or additional columns of one. `numerics` then applies to
            the outputs it returned before; see `observe.shared`.
        detached: Reason why the gradient deliberately differs from the true one (a detached norm, for example), or "".
        redirected: Reason why gradients of the base change although the outputs do not, or "".
        no_onnx: Ops added by the pass that have no ONNX form -> the reason and what to do.
        reach: Function (site, inputs by placeholder name) -> changed inputs with which the inserted part affects the
            outputs (ids of new tokens, for example); None if the example inputs suffice.
    """

    adds_outputs: bool = False
    detached: str = ""
    redirected: str = ""
    no_onnx: Mapping[Any, str] = field(default_factory=dict)
    reach: Callable[[Site, Mapping[str, Tensor]], dict[str, Tensor]] | None = None
