"""One-sentence explanations of the errors that torch.export raises."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)

# (text in the message or in the name of the exception type, meaning, remedy)
_KNOWN = (
    (
        "GuardOnDataDependent",
        "control flow depends on the values of a tensor",
        "rewrite it with torch.where or torch.cond",
    ),
    (
        "Could not guard on data-dependent",
        "control flow depends on the values of a tensor",
        "rewrite it with torch.where or torch.cond",
    ),
    (
        "Could not extract specialized integer",
        "a size depends on the values of a tensor",
        "make that size an input or a constant",
    ),
    ("DataDependentOutputException", "a Python number is read from a tensor", "keep it a tensor"),
    (
        "DynamicOutputShapeException",
        "the size of an output depends on the values of a tensor",
        "use torch.where",
    ),
    (
        "Unsupported FakeTensor",
        "the example inputs contain values that cannot be traced",
        "pass plain tensors",
    ),
    (
        "UnsupportedOperatorException",
        "an op has no shape rule (fake implementation)",
        "register one with torch.library.register_fake",
    ),
)


def explain(error: BaseException) -> str:
    """Explain an error raised by torch.export in one sentence.

    The form is "cause at file:line in function: `code`; remedy". The place is left out if the error does not come
    from the model's code, and the remedy if the error is unknown.
    """
    text = f"{type(error).__name__}: {error}"
    constraint = _constraint(text)
    if constraint is not None:
        return constraint
    place = _place(error)
    for mark, meaning, remedy in _KNOWN:
        if mark in text:
            return f"{meaning}{place}; {remedy}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].rstrip(".") if lines else ""
    return f"{type(error).__name__}{': ' + first[:300] if first else ''}{place}"


def _constraint(text: str) -> str | None:
    """Explain a violated constraint on a dynamic dimension, with the range torch suggests; None for other errors."""
    static = re.search(
        r"marked (.+?) as dynamic but your code specialized it to be a constant \((\d+)\)", text
    )
    if static:
        dimension = _readable(static[1])
        return (
            f"the model's code fixes dimension {dimension} to the constant {static[2]}, so it cannot be dynamic; "
            "leave it out of the dynamic dimensions"
        )
    suggested = re.search(r"Suggested fixes:\s*\n(.+?)(?:\n\s*\n|\Z)", text, re.DOTALL)
    ranges = [line.strip() for line in suggested[1].splitlines() if line.strip()] if suggested else []
    values = re.search(r"Not all values of (.+?) (?:in the specified range|satisfy)(.*)", text)
    if values or "onstraints violated" in text:
        name = _readable(values[1]) if values else "a dynamic dimension"
        fix = f"; torch suggests {', '.join(ranges[:3])}" if ranges else "; narrow its range"
        return f"the model does not support the whole range of {name}{fix}"
    return None


def _readable(name: str) -> str:
    """Translate torch's name of a dimension: `L['x'].size()[1]` becomes `axis 1 of input 'x'`."""
    name = name.split(" = ")[0]
    found = re.match(r"L\['(\w+)'\](?:\[\d+\])*\.size\(\)\[(\d+)\]", name)
    return f"axis {found[2]} of input '{found[1]}'" if found else f"'{name}'"


def _place(error: BaseException) -> str:
    """Location of the innermost frame in the model's code, outside torch and surgery; "" if there is none."""
    frames = [frame for e in _chain(error) for frame in traceback.extract_tb(e.__traceback__)]
    outside = [
        frame
        for frame in frames
        if not frame.filename.startswith((_TORCH, _HERE, "<"))
        and "importlib" not in frame.filename
        and not frame.filename.endswith(("contextlib.py", "threading.py", "functools.py"))
    ]
    models = [f for f in outside if f.name != "<module>"]
    # Only frames below the patched `forward` in capture/trace.py belong to the model. Frames above it are the caller's.
    inside_forward = [i for i, f in enumerate(frames) if f.filename.startswith(_HERE) and f.name == "forward"]
    if not inside_forward or not models or frames.index(models[-1]) < inside_forward[0]:
        return ""
    frame = models[-1]
    code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    parts = Path(frame.filename).parts[-2:]
    return f" at {'/'.join(parts)}:{frame.lineno} in {frame.name}{': `' + code[:90] + '`' if code else ''}"


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error followed by its causes."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain
