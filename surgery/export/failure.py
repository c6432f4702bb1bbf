"""One sentence from an exporter's chain of exceptions: which op, at which node, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NO_FORM = re.compile(
    r"No ONNX function found for (?:<OpOverload\(op='([^']+)', overload='([^']+)'\)>|(\S+))"
)
_AT_NODE = re.compile(r"Error when translating node %?([A-Za-z0-9_.]+)")


def explain(error: BaseException, origins: Mapping[str, str] | None = None) -> str:
    """Name the op and the node of a failed translation with the remedy; otherwise the first cause's words.

    origins: the program's own name of each traced node.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    where = ""
    for part in chain:
        if match := _AT_NODE.search(str(part)):
            name = match.group(1).rstrip(".")
            where = f" at node '{(origins or {}).get(name, name)}'"
            break
    for part in chain:
        if match := _NO_FORM.search(str(part)):
            op = f"{match.group(1)}.{match.group(2)}" if match.group(1) else match.group(3).rstrip(".,")
            return (
                f"op '{op.replace('::', '.')}'{where} has no ONNX form: give it a lowering "
                "(hook surgery_onnx_lowerings) or remove the pass that inserted it"
            )
    return f"the ONNX translation failed{where}: {first_line(chain[-1]).rstrip('.')}"


def first_line(error: BaseException) -> str:
    """The first words that an exception has, its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
