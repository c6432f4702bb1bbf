"""Conformance of passes: checks that every pass must pass on the programs that it is applied to.

Constant parameters of the program (biases of zeros) get noise first, since they hide faults.

numerics     inserting the pass changes the outputs by no more than it declares: on the example inputs, on new inputs,
             and at another shape
untouched    sites that are refused or not targeted keep their op and inputs
inserted     inserted nodes are live and have meta and provenance; every declared tensor is used
effect       random parameters change the outputs
tied         tied weights stay tied and unchanged, and merging does not change their other uses
second       the same label is refused; another application works on top of the first, within the declared numerics, and
             can be undone; or every site refuses it and names the first application as the reason
merge        merged and unmerged outputs agree with random parameters, at two shapes, also with two applications
restored     after merging, names, nodes and wiring are the original ones, and the base's graph is unchanged
weights      weight 0 equals the program without the pass; weight 0.5 differs from 1 and can be merged, or is refused if
             the pass is not scalable
undo         undo restores the program bit for bit, undo_all the base
reload       saved, and loaded in another process with another seed and thread count, the program has the same bits
reexport     torch.export accepts the rewritten graph again; the result runs at another batch size
unflatten    torch.export.unflatten of that export has the same outputs
gradients    gradients reach exactly the parameters that should train, in eval and train mode, and are correct
held         steps of AdamW change the parameters that should train, when they should, and no bit of anything else
rows         rows of a batch do not see each other
foreign      a random LoRA beneath and above the pass still acts, and so does the pass; both merge and come apart
live         the live module has the outputs of the program, or the pass says why it has no live form
packed       the `dequantize` of an op with packed weights returns the weight that the op computes with
zoo          on small models of the kit's own (fused, transposed, shared and grouped layers, in fp64): numerics, merge,
             rows, parts of fused projections, and the gradient of every tensor by central differences
onnx         onnxruntime agrees with the program; every inserted tensor is in the file under its name, with provenance
input        the given program and its model are unchanged bit for bit
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from surgery.common.errors import SurgeryError, nearest
from surgery.engine.contract.base import Pass
from surgery.engine.program import Program
from surgery.testing import foreign, graph, holding, merging, packed, shipping, small, training, values
from surgery.testing.case import Case
from surgery.testing.report import ConformanceReport
from surgery.testing.steps import run_steps

CHECKS: dict[str, Callable[[Case], str]] = {
    "numerics": values.numerics,
    "untouched": graph.untouched,
    "inserted": graph.inserted,
    "effect": values.effect,
    "tied": merging.tied,
    "second": values.second,
    "merge": merging.merge,
    "restored": merging.restored,
    "weights": merging.weights,
    "undo": values.undo,
    "reload": shipping.reload,
    "reexport": shipping.reexport,
    "unflatten": shipping.unflatten,
    "gradients": training.gradients,
    "held": holding.held,
    "rows": foreign.rows,
    "foreign": foreign.foreign,
    "live": foreign.live,
    "packed": packed.packed,
    "zoo": small.zoo,
    "onnx": shipping.onnx,
    "input": values.unchanged,
}


def check_pass(
    pass_: Pass,
    program: Program,
    *,
    checks: Sequence[str] | None = None,
    seed: int = 0,
    scale: float = 0.5,
    raises: bool = True,
) -> ConformanceReport:
    """Run the checks of the conformance kit for a pass on one program.

    Args:
        pass_: The pass, with options.
        program: The program to apply it to; it is not changed.
        checks: Names of checks, see CHECKS; all by default.
        seed: Seed of random parameters and inputs.
        scale: Size of the random parameters, relative to a size that preserves the scale of activations.
        raises: False collects failures in the report instead of raising at the first one.

    Returns:
        A report with the result of each check, and the reason for each check that was skipped.

    Raises:
        ConformanceError: A check fails; the message names the pass, the check and the site.
        PassError: The pass cannot be applied to the program.
        TargetError: The target names no site.
        ValueError: There is no check with one of the names.
    """
    for name in checks or ():
        if name not in CHECKS:
            raise ValueError(f"there is no check {name!r}{nearest(name, CHECKS) or '; see CHECKS'}")
    with tempfile.TemporaryDirectory(prefix="surgery-conformance-") as folder:
        case = Case(pass_, program, seed, scale, Path(folder))
        _refuse(case)
        steps = {name: partial(CHECKS[name], case) for name in checks or CHECKS}
        return run_steps(pass_.entry_id, steps, raises)


def _refuse(case: Case) -> None:
    """Raise the error of a pass that cannot be applied. Errors of other kinds are reported by the checks."""
    try:
        _ = case.adapted
    except SurgeryError:
        raise
    except Exception:
        return
