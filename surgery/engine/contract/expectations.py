"""Expectations: what differs, by design, in a program that has the pass. Read by verification, export and the kit."""

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
        adds_outputs: The program returns further outputs, or further columns of one. `numerics` then holds for
            what it returned before; see `observe.shared`.
        detached: Why the gradient deliberately differs from that of the outputs (a detached norm, for example), or "".
        redirected: Why gradients of the base change although the outputs do not, or "".
        no_onnx: Ops added by the pass that have no ONNX form -> the reason and what to do.
        reach: Function (site, inputs by placeholder name) -> inputs changed so that the inserted part affects the
            outputs (ids of new tokens, for example); None where the example inputs reach it already.
    """

    adds_outputs: bool = False
    detached: str = ""
    redirected: str = ""
    no_onnx: Mapping[Any, str] = field(default_factory=dict)
    reach: Callable[[Site, Mapping[str, Tensor]], dict[str, Tensor]] | None = None
