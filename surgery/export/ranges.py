"""Sizes that the dimensions of a program and of its ONNX file may have, as JSON and in messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from surgery.capture import Captured
from surgery.capture.shapes import UNBOUNDED, Axis, list_axes, outside_of


def ranges_of(captured: Captured) -> dict[str, dict[str, int]]:
    """Ranges of the dimensions that do not take every size: `{"batch": {"max": 63}, "h": {"step": 8, "max": 512}}`."""
    found = {}
    for axis in list_axes(captured):
        values = {
            "min": axis.low if axis.low > max(2, axis.step + axis.shift) else 0,
            "max": axis.high if axis.high < UNBOUNDED - axis.step else 0,
            "step": axis.step if axis.step > 1 else 0,
            "shift": axis.shift,
        }
        if any(values.values()):
            found[axis.root] = {key: value for key, value in values.items() if value}
    return found


def allowed(text: str) -> dict[str, dict[str, int]]:
    """Ranges from the metadata of a file; empty if another program wrote something else there."""
    try:
        ranges = json.loads(text)
        return {
            str(name): {key: int(limits[key]) for key in ("min", "max", "step", "shift") if key in limits}
            for name, limits in ranges.items()
        }
    except Exception:  # another program may have written the file: its own error is the one to report
        return {}


def outside_of_file(text: str, shapes: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> str:
    """Describe the first input whose size does not fit the ranges in a file, or return "".

    Args:
        text: the ranges as JSON, from the file's metadata.
        shapes: shapes of the file's inputs, with names of dimensions.
        inputs: the inputs.
    """
    ranges = allowed(text)
    axes = [
        Axis(
            name,
            number,
            size,
            size,
            1,
            0,
            ranges[size].get("min", 0),
            ranges[size].get("max", UNBOUNDED),
            max(ranges[size].get("step", 1), 1),
            ranges[size].get("shift", 0),
        )
        for name, shape in shapes.items()
        for number, size in enumerate(shape)
        if size in ranges
    ]
    return outside_of(axes, inputs)
