"""Comparison of two models for `surgery verify A B`: their output differences and the first node that differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from surgery.common.errors import SurgeryError
from surgery.common.progress import track
from surgery.engine.contract.numerics import MERGE_TOLERANCE
from surgery.engine.contract.observe import relative_difference
from surgery.engine.program import Program
from surgery.export import metadata_keys
from surgery.export.compare import Divergence, first_divergence
from surgery.export.parity import ParityReport, without_rounding
from surgery.export.program import parity_inputs, source_of
from surgery.export.ranges import allowed
from surgery.export.rounded_parity import RoundingReport, judge, rounds, runtime_rounds
from surgery.export.runtime import OnnxModel
from surgery.export.source import InputSet
from surgery.graph.marks import mark_of
from surgery.graph.ops import module_path

Side = Program | OnnxModel
_MOST_VALUES = 2**25  # of one random input of an ONNX file


@dataclass(frozen=True)
class OutputDifference:
    """Difference of one output on one input set.

    Attributes:
        name: name of the output.
        shape: its shape.
        difference: largest absolute difference, as a fraction of the output's scale.
        equal: True if the outputs are bitwise equal.
    """

    name: str
    shape: tuple[int, ...]
    difference: float
    equal: bool


@dataclass(frozen=True)
class Verification:
    """Result of comparing two models.

    Attributes:
        outputs: differences of every output on every input set.
        tolerance: largest allowed difference, as a fraction of the output's scale.
        divergence: the first node that differs; None if the outputs agree.
        cause: the adapter directly before that node in one of the models, or "".
        rounding: result of the rule for rounded activations (surgery.export.rounded_parity), which then decides instead
            of `tolerance`; None if no activations are rounded.
        plain: comparison without the rounding of activations, which has to agree too; None if none are rounded.
    """

    outputs: tuple[OutputDifference, ...]
    tolerance: float
    divergence: Divergence | None = None
    cause: str = ""
    rounding: RoundingReport | None = None
    plain: ParityReport | None = None

    @property
    def difference(self) -> float:
        """Largest difference of any output."""
        return max((o.difference for o in self.outputs), default=0.0)

    @property
    def agree(self) -> bool:
        """True if every output is within tolerance on every input set, or keeps the rule for rounded activations."""
        if self.rounding is not None and self.plain is not None:
            return self.rounding.ok and self.plain.ok
        return bool(self.outputs) and self.difference <= self.tolerance


def verify(
    a: Side, b: Side, *, tolerance: float | None = None, seed: int = 0, data: Sequence[InputSet] = ()
) -> Verification:
    """Run two models on random inputs, at the example's shape and at another, and compare outputs by name.

    Args:
        a: a program or an ONNX file.
        b: the model to compare with.
        tolerance: largest allowed |a - b| over the largest |a|. None uses the rounding tolerance of the coarsest
            output dtype (2e-4 for float32). For a program and an ONNX file whose activations are rounded, the tolerance
            of surgery.export.rounded_parity.
        seed: seed of the inputs.
        data: inputs to compare on; by default random ones.

    Raises:
        SurgeryError: the inputs or outputs of the models do not correspond.
    """
    # Only a program has example inputs and dynamic dimensions, so the inputs come from it if there is one.
    program = next((side for side in (a, b) if isinstance(side, Program)), None)
    sets = parity_inputs(program, seed) if program is not None else [_onnx_inputs(a, seed)]
    rounding, plain = None, None
    file = next((side for side in (a, b) if isinstance(side, OnnxModel)), None)
    if (
        program is not None
        and file is not None
        and (rounds(source_of(program)) or runtime_rounds(source_of(program)))
    ):
        judged = data or [*sets, *parity_inputs(program, seed + 2)]
        rounding = judge(file.run, source_of(program), judged, given=bool(data), tolerance=tolerance)
        plain = without_rounding(file.path, source_of(program), sets)
        if not rounding.outputs:
            rounding = None
    sets = list(data) or sets
    found: list[OutputDifference] = []
    dtypes: set[torch.dtype] = set()
    worst_set, worst = sets[0], -1.0
    for args, kwargs in track(sets, "comparing outputs"):
        left, right = _run(a, program, args, kwargs), _run(b, program, args, kwargs)
        common = [name for name in left if name in right]
        if not common:
            raise SurgeryError(
                f"the models have no output in common ({', '.join(left)} and {', '.join(right)}); compare two "
                "versions of one model"
            )
        for name in common:
            if left[name].shape != right[name].shape:
                raise SurgeryError(
                    f"output {name} has shape {tuple(left[name].shape)} in one and {tuple(right[name].shape)} in "
                    f"the other; compare two versions of one model"
                )
            gap = relative_difference(left[name], right[name])
            dtypes.add(left[name].dtype)
            found.append(
                OutputDifference(name, tuple(left[name].shape), gap, torch.equal(left[name], right[name]))
            )
            if gap > worst:
                worst, worst_set = gap, (args, kwargs)
    allowed = tolerance if tolerance is not None else max(MERGE_TOLERANCE.get(d, 0.0) for d in dtypes)
    result = Verification(tuple(found), allowed, rounding=rounding, plain=plain)
    if result.agree:
        return result
    where = first_divergence(_comparable(a), _comparable(b), worst_set, tol=allowed)
    # Only nodes without a counterpart differ, for example an adapter on the last op: report the output itself.
    if where is None:
        where = _at_the_end(a, b, next(o for o in found if o.difference > allowed))
    return Verification(
        tuple(found), allowed, where, _cause(a, where.node) or _cause(b, where.other), rounding, plain
    )


def _at_the_end(a: Side, b: Side, output: OutputDifference) -> Divergence:
    """Divergence at the nodes that produce a differing output."""
    ends = [_producer(side, output.name) for side in (a, b)]
    node = next((end for end in ends if end is not None), None)
    names = [end.name if end is not None else output.name for end in ends]
    path, op = (module_path(node), str(node.target)) if node is not None else ("", "output")
    return Divergence(names[0], names[1], path, op, float("nan"), output.difference)


def _producer(side: Side, output: str) -> fx.Node | None:
    """The graph node that produces an output; None for an ONNX file or an unknown output."""
    if not isinstance(side, Program):
        return None
    source = source_of(side)
    end = next(node for node in reversed(side.graph.nodes) if node.op == "output")
    nodes = pytree.tree_leaves(end.args[0])
    names = list(source.named_outputs(side.run()))
    tensors = [node for node in nodes if isinstance(node, fx.Node)]
    return tensors[names.index(output)] if len(names) == len(tensors) and output in names else None


def _cause(side: Side, name: str) -> str:
    """The adapter, such as `lora at layer.0.query`, that produced the node or one of its inputs; "" if none did."""
    if not isinstance(side, Program):
        return ""
    node = next((n for n in side.graph.nodes if n.name == name), None)
    for near in [node, *node.all_input_nodes] if node is not None else []:
        mark = mark_of(near)
        if mark.entry:
            return f"{mark.entry} at {mark.site}"
    return ""


def _comparable(side: Side) -> Any:
    return side.graph_module if isinstance(side, Program) else side


def _run(side: Side, program: Program | None, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(side, Program):
        try:
            return source_of(side).run(args, kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise SurgeryError(
                f"the second model does not accept the inputs of the first: {reason}"
            ) from None
    named = source_of(program).named_inputs(args, kwargs) if program is not None else dict(kwargs)
    return side.run(named)


def _onnx_inputs(model: Side, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs of an ONNX file, for the comparison of two files without a program.

    Masks are ones, other integers are small and non-negative, and floats are normal. Dynamic axes get size 2 (`batch`)
    or 7 (all others), or the next size that the ranges in the file's metadata allow.
    """
    assert isinstance(model, OnnxModel)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    ranges = allowed(model.metadata.get(metadata_keys.RANGES, "{}"))
    for name, (kind, shape) in model.signature.items():
        sizes = [size if isinstance(size, int) else _size(size, ranges.get(size, {})) for size in shape]
        if any(size < 0 for size in sizes) or math.prod(sizes) > _MOST_VALUES:
            raise SurgeryError(
                f"'{model.path}': the input {name!r} has the shape {list(shape)[:8]}; random inputs have up to "
                f"{_MOST_VALUES:,} values"
            )
        if "float" in kind or "double" in kind:
            made[name] = torch.randn(sizes, generator=generator)
        elif "bool" in kind or "mask" in name:
            made[name] = torch.ones(sizes, dtype=torch.bool if "bool" in kind else torch.int64)
        else:
            made[name] = torch.randint(0, 10, sizes, generator=generator)
    return (), made


def _size(name: str, limits: Mapping[str, int]) -> int:
    """Size of a dynamic axis; see `_onnx_inputs`."""
    size, step, shift = 2 if name == "batch" else 7, max(limits.get("step", 1), 1), limits.get("shift", 0)
    size = max(size, limits.get("min", 0))
    size += (shift - size) % step
    return min(size, limits.get("max", size))


def open_side(ref: str, load: Any) -> Side:
    """Open one side of a comparison: an ONNX file by its suffix, anything else with `load(ref)`."""
    if ref.endswith(".onnx"):
        if not Path(ref).is_file():
            raise SurgeryError(f"{ref} does not exist; name an existing ONNX file")
        # A default session, because that is how users run the file.
        return OnnxModel(Path(ref))
    return load(ref)
