"""The conformance kit: what every pass owes to the programs that it is applied to, as checks that can fail.

numerics     outputs at insertion keep what the pass declares, on the example, fresh inputs and another shape
untouched    sites refused or not targeted keep their op and inputs; the pass inserts nothing else
inserted     no inserted node is dead, or lacks meta or provenance; every declared tensor is used
effect       with random parameters the outputs move
tied         tied weights stay tied and as they were, and merge without changing their other uses
second       the same label is refused; another works on top, within the declared numerics, and undoes, or is
             refused everywhere because of the first, by name
merge        merged against unmerged, with random parameters, at two shapes, also stacked
restored     after merging: the original names, nodes and wiring, and the base's graph as it was
weights      left out is exact; half is half, merged too, or refused where the pass is not weightable
undo         undo gives back the program bit for bit, undo_all the base
reload       saved, and loaded in another process with another seed and thread count: the same bits
reexport     torch.export takes it again; the result runs at another batch size
unflatten    torch.export.unflatten of that gives the same outputs
gradients    gradients reach exactly what should train, in eval and train mode, and are right
held         steps of AdamW move what should train, when it should, and not a bit of anything else
onnx         parity in onnxruntime; every inserted tensor is in the file, under its name, with provenance
input        the program that was given, and its model, are bit for bit as before
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from surgery.common.errors import SurgeryError, nearest
from surgery.engine.contract.base import Pass
from surgery.engine.program import Program
from surgery.testing import graph, holding, merging, shipping, training, values
from surgery.testing.case import Case, ConformanceError, Skip
from surgery.testing.report import ConformanceReport, Outcome

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
    """Hold a pass to its contract on one program; the report lists what was checked, and what was not and why.

    checks: names from CHECKS (all by default). scale: how far trained parameters are moved at random, against
    what keeps activations at their size. raises: False puts failures into the report and goes on.
    Raises ConformanceError at the first failure, naming pass, check and site; PassError or TargetError where
    the pass cannot be applied to the program at all.
    """
    for name in checks or ():
        if name not in CHECKS:
            raise ValueError(f"there is no check {name!r}{nearest(name, CHECKS)}")
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="surgery-conformance-") as folder:
        case = Case(pass_, program, seed, scale, Path(folder))
        _refuse(case)
        for name in checks or CHECKS:
            begun = perf_counter()
            try:
                status, detail = "passed", CHECKS[name](case)
            except Skip as skip:
                status, detail = "skipped", str(skip)
            except ConformanceError as error:
                if raises:
                    raise
                status, detail = "failed", str(error)
            except Exception as error:
                failure = _unexpected(pass_, name, error)
                if raises:
                    raise failure from error
                status, detail = "failed", str(failure)
            outcomes.append(Outcome(name, status, detail, perf_counter() - begun))
    return ConformanceReport(pass_.entry_id, tuple(outcomes))


def _refuse(case: Case) -> None:
    """Raise what the pass says where it cannot be applied at all; other errors are for the checks to report."""
    try:
        _ = case.adapted
    except SurgeryError:
        raise
    except Exception:
        return


def _unexpected(pass_: Pass, check: str, error: Exception) -> ConformanceError:
    text = str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
    return ConformanceError(pass_.entry_id, check, " ".join(text.split())[:500])


__all__ = ["CHECKS", "Case", "ConformanceError", "ConformanceReport", "Outcome", "Skip", "check_pass"]
