"""Makes an exported graph flat: regions are inlined, and each use of a tied weight gets its own name."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.common.errors import CaptureError

_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast

# They restate the dtype and device seen while tracing: never wrong in the graph as captured, and in the way of
# every pass that changes a dtype.
_HARMLESS = (torch.ops.aten._assert_tensor_metadata.default,)


def flatten_regions(gm: fx.GraphModule, *, _in_no_grad: bool = False) -> None:
    """Inline the sub-graphs of `no_grad` and disabled `autocast` regions, in place, innermost first.

    What leaves a `no_grad` region is detached, so that nothing trains through it that did not in eager.
    Nodes from an autocast-off region carry `meta["autocast"] = False`: autocast around the flat graph would
    reach them, which it did not in eager.
    Raises CaptureError for a region that a flat graph cannot say: an enabled autocast, or `enable_grad`
    within `no_grad`, or a write inside `no_grad` to a tensor that needs a gradient.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _GRAD_REGION:
            enabled, body, *operands = node.args
            if enabled and _in_no_grad:
                raise CaptureError(
                    f"enable_grad inside no_grad{where(node)} cannot be kept in a flat graph: move it outside"
                )
            _inline(gm, node, body, operands, detach=not enabled, in_no_grad=_in_no_grad or not enabled)
        elif node.target is _AUTOCAST_REGION:
            _device, _dtype, enabled, _cache, body, *operands = node.args
            if enabled:
                raise CaptureError(
                    f"a region of forward turns autocast on{where(node)}: take it out and run the captured "
                    "program under autocast instead"
                )
            _inline(gm, node, body, operands, detach=False, in_no_grad=_in_no_grad, autocast=False)
        elif node.target in _HARMLESS and not node.users:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


def _inline(
    gm: fx.GraphModule,
    node: fx.Node,
    body_ref: fx.Node,
    operands: list[Any],
    *,
    detach: bool,
    in_no_grad: bool,
    autocast: bool | None = None,
) -> None:
    """Replace the region `node` by a copy of its body."""
    attribute = str(body_ref.target)
    body = getattr(gm, attribute)
    flatten_regions(body, _in_no_grad=in_no_grad)
    mapping: dict[fx.Node, Any] = {}
    outputs: list[Any] = []
    remaining = iter(operands)
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(remaining)
            elif inner.op == "get_attr":
                mapping[inner] = _move_attribute(gm, body, inner)
            elif inner.op == "output":
                results = inner.args[0] if isinstance(inner.args[0], (tuple, list)) else (inner.args[0],)
                for result in results:
                    value = mapping[result] if isinstance(result, fx.Node) else result
                    # What only passes through the region keeps its gradient, as in eager.
                    made_inside = isinstance(result, fx.Node) and result.op != "placeholder"
                    outputs.append(_detached(gm, value) if detach and made_inside else value)
            else:
                if detach:
                    _refuse_leaks(inner)
                mapping[inner] = gm.graph.node_copy(inner, lambda n: mapping[n])
                if autocast is not None:
                    mapping[inner].meta["autocast"] = autocast
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"node '{user.name}' uses the result of a region as a whole")
        user.replace_all_uses_with(outputs[cast(int, user.args[1])])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not body_ref.users:
        gm.graph.erase_node(body_ref)
    if not any(other.op == "get_attr" and other.target == attribute for other in gm.graph.nodes):
        delattr(gm, attribute)


def _move_attribute(gm: fx.GraphModule, body: fx.GraphModule, node: fx.Node) -> fx.Node:
    value = getattr(body, str(node.target))
    name = str(node.target)
    while hasattr(gm, name):
        name += "_"
    if isinstance(value, nn.Module):
        gm.add_submodule(name, value)
    else:
        gm.register_buffer(name, value, persistent=False)
    moved = gm.graph.get_attr(name)
    moved.meta = dict(node.meta)
    return moved


def _detached(gm: fx.GraphModule, value: Any) -> Any:
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(fake, torch.Tensor) or not (fake.dtype.is_floating_point or fake.dtype.is_complex):
        return value
    detached = gm.graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    detached.meta["val"] = fake.detach()
    return detached


def _refuse_leaks(node: fx.Node) -> None:
    """A write inside `no_grad` to a value from outside leaves no output to detach."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for argument, value in zip(schema.arguments, node.args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if not written or not isinstance(value, fx.Node) or value.op != "placeholder":
            continue
        fake = value.meta.get("val")
        if isinstance(fake, torch.Tensor) and fake.requires_grad:
            raise CaptureError(
                f"op {node.target} writes inside no_grad to a tensor that needs a gradient{where(node)}: "
                "a flat graph cannot keep that; write a new tensor instead"
            )


def where(node: fx.Node) -> str:
    """` (File "model.py", line 3, in forward)`, or nothing where the node has no source."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return f" ({lines[-1]})" if lines else ""


def share_tied(gm: fx.GraphModule, module: nn.Module) -> None:
    """Make every parameter and buffer of `gm` the module's own object, and name each use by its own module.

    torch.export gives all uses of a tied weight one of its names; here a use under module `decoder` reads
    `decoder.weight`, even where `embeddings.weight` is the same object.
    """
    names: dict[int, list[str]] = {}
    own: dict[str, torch.Tensor] = {}
    for kind in (module.named_parameters, module.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            own[name] = tensor
            names.setdefault(id(tensor), []).append(name)
    for name, tensor in own.items():
        path, _, leaf = name.rpartition(".")
        owner = _owner(gm, path)
        table = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
        if table.get(leaf) is not tensor:
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(leaf, tensor)
            else:
                owner.register_buffer(leaf, tensor, persistent=_is_persistent(module, path, leaf))
    nodes = {str(n.target): n for n in gm.graph.nodes if n.op == "get_attr"}
    for name, node in list(nodes.items()):
        tied = names.get(id(own[name]), []) if name in own else []
        if len(tied) < 2:
            continue
        for user in list(node.users):
            wanted = _own_name(user, tied)
            if wanted is None or wanted == name:
                continue
            if wanted not in nodes:
                with gm.graph.inserting_before(node):
                    nodes[wanted] = gm.graph.get_attr(wanted)
                    nodes[wanted].meta = dict(node.meta)
            user.replace_input_with(node, nodes[wanted])
    gm.graph.lint()
    gm.recompile()


def _own_name(user: fx.Node, tied: list[str]) -> str | None:
    stack = user.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    for path in reversed(paths):
        found = [name for name in tied if name.rpartition(".")[0] == path]
        if found:
            return found[0]
    return None


def _owner(gm: nn.Module, path: str) -> nn.Module:
    owner = gm
    for part in path.split(".") if path else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    return owner


def _is_persistent(module: nn.Module, path: str, leaf: str) -> bool:
    return leaf not in module.get_submodule(path)._non_persistent_buffers_set
