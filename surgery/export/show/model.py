"""A program as data for display: its ops, weights and modules, with named dimensions. Nothing in it is a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from surgery.capture.dimensions import Dimensions
from surgery.engine.program import Program
from surgery.engine.registry import find_pass
from surgery.export.show.errors import weight_errors
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import mark_of
from surgery.graph.ops import module_path

# torch.export gives this path to ops that it adds itself.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer that the graph reads.

    Attributes:
        name: Its name.
        shape: Its shape, such as "576×192".
        dtype: Its dtype, such as "float32".
        size: Number of values.
        bytes: Size in memory.
        kind: "parameter" or "buffer".
        trains: True if it trains.
        tied: Other names of the same tensor.
        by: Id of the journal entry that inserted it, or "".
        error: ‖new − old‖ / ‖old‖ of what its ops compute with (for example after quantization), or None.
        change: In a difference "+" (new), "-" (removed), "~" (other values) or "".
        was: In a difference its earlier shape and dtype, if they changed.
    """

    name: str
    shape: str
    dtype: str
    size: int
    bytes: int
    kind: str
    trains: bool
    tied: tuple[str, ...] = ()
    by: str = ""
    error: float | None = None
    change: str = ""
    was: str = ""


@dataclass(frozen=True)
class Op:
    """An op of the graph that runs.

    Attributes:
        id: Name of its node; a removed op of a difference has "old " before it.
        op: Name of the op, such as "linear".
        target: Full name of the op, such as "aten.linear.default".
        module: Path of the module whose forward runs it.
        shape: Shape of its value, such as "batch×seq×576".
        dtype: Dtype of its value.
        role: Role of its weight, such as "attn.q", or "".
        by: Id of the journal entry that inserted it, or "".
        site: Path of the site that it was inserted at, or "".
        inputs: Ids of the ops whose values it reads.
        weights: Names of the weights that it reads.
        change: In a difference "+" (added), "-" (removed), "s" (swapped), "~" (other inputs) or "".
        was: What a swapped op replaces, or the inputs before.
        moved: Largest difference of its value on the inputs, relative to the value's scale; None if not compared.
        lost: In a difference, ids of the removed ops whose values it read before.
    """

    id: str
    op: str
    target: str
    module: str
    shape: str
    dtype: str
    role: str
    by: str
    site: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    change: str = ""
    was: str = ""
    moved: float | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelData:
    """A program for display.

    Attributes:
        title: Its title.
        classes: Path of a module -> name of its class; "" is the model itself.
        ops: Its ops in the order of the graph.
        weights: Its weights by name.
        parameters: Number of parameters by name, a tied one once.
        trainable: Number of trainable parameters, after gradient masks.
        facts: Lines about the whole: inputs, applied passes, notes.
        kind: "view" or "diff".
    """

    title: str
    classes: Mapping[str, str]
    ops: tuple[Op, ...]
    weights: Mapping[str, Weight]
    parameters: Mapping[str, int]
    trainable: int
    facts: tuple[tuple[str, str], ...] = field(default=())
    kind: str = "view"

    @property
    def quantizing(self) -> list[str]:
        """Ids of the journal entries that store weights in few bits."""
        found = (
            w.by for w in self.weights.values() if w.by and w.dtype.startswith(("int", "uint", "float8"))
        )
        return list(dict.fromkeys(found))


def model_data(program: Program, title: str, *, errors: bool = True) -> ModelData:
    """The ops, weights and modules of a program.

    Args:
        program: The program.
        title: Title of the page.
        errors: Compare weights that passes replaced with those of the base.
    """
    sizes = Dimensions(program.captured)
    live = live_nodes(program.graph)
    nodes = [node for node in program.graph.nodes if node in live]
    roles = {call.node: site.role for site in program.sites for call in site.calls}
    shown = {node for node in nodes if node.op == "output" or _has_tensor(node)}
    ops = tuple(_op(node, sizes, roles, shown) for node in nodes if node in shown and node.op != "get_attr")
    found = weight_errors(program) if errors else {}
    weights = {
        str(node.target): _weight(node, program, sizes, found)
        for node in nodes
        if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)
    }
    classes = _classes(program, nodes)
    parameters, (_, trainable) = program.parameter_sizes(), program.count_parameters()
    return ModelData(title, classes, ops, weights, parameters, trainable, tuple(_facts(program, sizes)))


def _has_tensor(node: fx.Node) -> bool:
    """True if the value is a tensor or contains one. Sizes and checks of sizes are not shown."""
    value = node.meta.get("val")
    return any(isinstance(v, torch.Tensor) for v in (value if isinstance(value, (tuple, list)) else [value]))


def _op(node: fx.Node, sizes: Dimensions, roles: Mapping[fx.Node, str], shown: set[fx.Node]) -> Op:
    value, mark = node.meta.get("val"), mark_of(node)
    tensors = [
        v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)
    ]
    inputs = [n for n in node.all_input_nodes if n in shown]
    return Op(
        id=node.name,
        op=op_text(node),
        target=str(node.target),
        module=path_of(node),
        shape=", ".join(sizes.shape(v.shape) for v in tensors),
        dtype=", ".join(dict.fromkeys(dtype_text(v.dtype) for v in tensors)),
        role=roles.get(node) or mark.role or "",
        by=mark.entry,
        site=mark.site,
        inputs=tuple(n.name for n in inputs if n.op != "get_attr"),
        weights=tuple(str(n.target) for n in inputs if n.op == "get_attr"),
    )


def op_text(node: fx.Node) -> str:
    """Short name of an op: "linear", "input", "output"."""
    if node.op == "placeholder":
        return f"input {node.target}"
    if node.op == "output":
        return "output"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return str(getattr(node.target, "__name__", node.target))


def path_of(node: fx.Node) -> str:
    """Path of the module whose forward runs an op; "" for the model itself."""
    path = module_path(node)
    return "" if path == _NO_MODULE else path


def dtype_text(dtype: torch.dtype) -> str:
    """A dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def _weight(node: fx.Node, program: Program, sizes: Dimensions, errors: Mapping[str, float]) -> Weight:
    value, name = node.meta["val"], str(node.target)
    tensor = program.tensors.get(name, program.base.tensors.get(name))
    numel = int(value.numel())
    return Weight(
        name=name,
        shape=sizes.shape(value.shape),
        dtype=dtype_text(value.dtype),
        size=numel,
        bytes=numel * value.element_size(),
        kind="parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer",
        trains=isinstance(tensor, torch.nn.Parameter) and program.trains(name),
        tied=tuple(n for n in program.names.get(name, ()) if n != name),
        by=mark_of(node).entry,
        error=errors.get(name),
    )


def _classes(program: Program, nodes: Sequence[fx.Node]) -> dict[str, str]:
    """Class of every module: those that the graph has called, and those that only contain others."""
    model = program.base.loaded.module
    found = {path: type(module).__name__ for path, module in model.named_modules()}
    for node in nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if path != _NO_MODULE:
                name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
                found[path] = name.rpartition(".")[2]
    return found


def _facts(program: Program, sizes: Dimensions) -> Iterable[tuple[str, str]]:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            yield f"input {node.target}", f"{sizes.shape(value.shape)} {dtype_text(value.dtype)}"
    for output, names in program.labels.items():
        yield f"classes of {output}", ", ".join(names)
    for entry in program.journal:
        scale = "" if entry.weight == 1 else f", at weight {entry.weight:g}"
        fields = (
            find_pass(program.base.plugins, entry.pass_name).cls.model_fields if entry.kind != "merge" else {}
        )
        chosen = {k: v for k, v in entry.options.items() if k not in fields or v != fields[k].default}
        options = ", ".join(f"{k}={v}" for k, v in chosen.items() if v not in (None, "", [], {}))
        where = f"on {len(entry.sites)} sites" if entry.sites else entry.kind
        yield f"pass {entry.id}", f"{where}{scale}" + (f" ({options})" if options else "")
    for note in program.captured.notes:
        yield "note", str(note)
