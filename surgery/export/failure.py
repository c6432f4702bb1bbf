"""One-sentence explanations of exporter failures: the op, the node and the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NO_FORM = re.compile(
    r"No ONNX function found for (?:<OpOverload\(op='([^']+)', overload='([^']+)'\)>|(\S+))"
)
_AT_NODE = re.compile(r"Error when translating node %?([A-Za-z0-9_.]+)")


def explain(
    error: BaseException,
    origins: Mapping[str, str] | None = None,
    entries: Mapping[str, str | None] | None = None,
) -> str:
    """Explain a failed ONNX translation in one sentence.

    The message names the op and the node if the exporter reports them, and otherwise quotes the root cause.

    Args:
        error: the exception that the exporter raised.
        origins: name of the program's node for each traced node.
        entries: journal entry of the pass that inserted each of the program's nodes, or None.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    where, entry = "", None
    for part in chain:
        if match := _AT_NODE.search(str(part)):
            name = match.group(1).rstrip(".")
            name = (origins or {}).get(name, name)
            where, entry = f" at node '{name}'", (entries or {}).get(name)
            break
    for part in chain:
        if match := _NO_FORM.search(str(part)):
            op = f"{match.group(1)}.{match.group(2)}" if match.group(1) else match.group(3).rstrip(".,")
            remove = f", or undo {entry}, which inserted it" if entry else ", or write it with other ops"
            return (
                f"op '{op.replace('::', '.')}'{where} has no ONNX form; register a lowering "
                f"(hook surgery_onnx_lowerings){remove}"
            )
    return f"the ONNX translation failed{where}: {first_line(chain[-1]).rstrip('.')}"


def first_line(error: BaseException) -> str:
    """First non-empty line of an exception's message, or the name of its type."""
    return next(
        (line.strip()[:400] for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
