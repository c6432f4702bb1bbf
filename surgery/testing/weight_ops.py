"""The conformance kit of ops with weights: `check_weight_op`."""

from __future__ import annotations

from typing import Any

from surgery.engine.program import Program
from surgery.graph.sites import Site
from surgery.passes.lora.lora import Lora
from surgery.testing.case import ConformanceError, exactly
from surgery.testing.passes import CHECKS, check_pass
from surgery.testing.report import ConformanceReport
from surgery.testing.steps import run_steps


def check_weight_op(op: Any, program: Program, *, raises: bool = True) -> ConformanceReport:
    """Run the checks of an op that a plugin declares in `surgery_weight_ops`, on a program that calls it.

    declared     the program's plugins declare the op, and its arguments are those of the schema
    found        the op is a site, with the shape, kind and layout that its declaration says
    lora         LoRA on it passes the conformance kit: insertion is exact, random factors act as the formula says,
                 undo, save and load, gradients, the live form, `dequantize` and (where it has a lowering) ONNX

    Args:
        op: The op, such as torch.ops.mine.packed_linear.default.
        program: A program that calls it, captured with the plugin (`plugins=make_plugin_manager(plugins=(module,))`).
        raises: False collects failures in the report instead of raising at the first one.

    Raises:
        ConformanceError: A check fails.
    """
    case = _Case(op, program)
    return run_steps(str(op), {"declared": case.declared, "found": case.found, "lora": case.lora}, raises)


class _Case:
    """An op and a program that calls it."""

    def __init__(self, op: Any, program: Program) -> None:
        self.op, self.program = op, program

    def error(self, check: str, message: str, site: str = "") -> ConformanceError:
        return ConformanceError(str(self.op), check, message, site)

    @property
    def sites(self) -> list[Site]:
        return [s for s in self.program.sites if any(call.node.target is self.op for call in s.calls)]

    def declared(self) -> str:
        declared = self.program.base.plugins.weight_ops.get(self.op)
        if declared is None:
            raise self.error(
                "declared", "no plugin of the program declares it; return it from surgery_weight_ops"
            )
        known = {argument.name for argument in self.op._schema.arguments}
        asked = {declared.x, *declared.weights, *([declared.bias] if declared.bias else [])}
        unknown = sorted(asked - known)
        if unknown:
            raise self.error(
                "declared", f"it has no argument {unknown[0]!r}; its schema is {self.op._schema}"
            )
        return f"{declared.kind}, {'packed' if declared.dequantize else 'float'} weight {', '.join(declared.weights)}"

    def found(self) -> str:
        if not self.sites:
            raise self.error("found", "the program has no site with this op; capture a module that calls it")
        site = self.sites[0]
        if len(site.float_shape) < 1 or site.out_features < 1:
            raise self.error("found", f"its weight has the shape {tuple(site.float_shape)}", site.path)
        return f"{len(self.sites)} sites, the first {site.path}: {tuple(site.float_shape)}"

    def lora(self) -> str:
        lowered = self.op in self.program.base.plugins.lowerings
        checks = [name for name in CHECKS if lowered or name != "onnx"]
        report = check_pass(Lora(target=exactly(self.sites), rank=2), self.program, checks=checks)
        said = "" if lowered else "; onnx left out: the op has no lowering (surgery_onnx_lowerings)"
        return f"{len(report.passed)} checks passed, {len(report.skipped)} skipped{said}"
