"""Flattening of an exported graph: inlines regions and restores the names of tied weights."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.common.errors import CaptureError

_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast

# These ops assert the dtype and device seen while tracing. They always hold in the captured graph, but would fail after
# a pass that changes a dtype, so they are removed.
_REMOVABLE = (torch.ops.aten._assert_tensor_metadata.default,)


def flatten_regions(gm: fx.GraphModule, *, _in_no_grad: bool = False) -> None:
    """Inline the subgraphs of `no_grad` and disabled `autocast` regions in place, innermost first.

    Outputs of a `no_grad` region are detached, so that no gradient flows through it, as in eager mode. Nodes of a
    disabled autocast region carry `meta["autocast"] = False`, because an autocast context around the flat graph
    would otherwise apply to them.

    Raises:
        CaptureError: a flat graph cannot express the region: autocast is enabled, `enable_grad` is nested in
            `no_grad`, or `no_grad` contains an in-place write to a tensor that needs a gradient.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _GRAD_REGION:
            enabled, body, *operands = node.args
            if enabled and _in_no_grad:
                raise CaptureError(
                    f"enable_grad inside no_grad{where(node)} cannot be kept in a flat graph; move it outside"
                )
            _inline(gm, node, body, operands, detach=not enabled, in_no_grad=_in_no_grad or not enabled)
        elif node.target is _AUTOCAST_REGION:
            _device, _dtype, enabled, _cache, body, *operands = node.args
            if enabled:
                raise CaptureError(
                    f"forward enables autocast{where(node)}; remove it and run the captured program under "
                    "autocast instead"
                )
            _inline(gm, node, body, operands, detach=False, in_no_grad=_in_no_grad, autocast=False)
        elif node.target in _REMOVABLE and not node.users:
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
    """Replace the region `node` with a copy of its body.

    Args:
        gm: the graph module that contains `node` and holds the body as an attribute.
        node: the call of the region.
        body_ref: get_attr node of the body.
        operands: inputs of the region, one for each placeholder of the body.
        detach: detach the outputs (a `no_grad` region).
        in_no_grad: the body runs under `no_grad`, here or in an enclosing region.
        autocast: value of `meta["autocast"]` for the copied nodes; None leaves it unset.
    """
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
                    # An input that the region returns unchanged keeps its gradient, as in eager mode.
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
            raise CaptureError(
                f"node '{user.name}' uses the output tuple of a region as a whole; return single tensors from it"
            )
        user.replace_all_uses_with(outputs[cast(int, user.args[1])])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not body_ref.users:
        gm.graph.erase_node(body_ref)
    # Another region may refer to the same body.
    if not any(other.op == "get_attr" and other.target == attribute for other in gm.graph.nodes):
        delattr(gm, attribute)


def _move_attribute(gm: fx.GraphModule, body: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Copy a submodule or tensor of the body to `gm` under an unused name, and return its get_attr node."""
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
    """Insert a detach after `value`. Values that cannot have a gradient are returned unchanged."""
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(fake, torch.Tensor) or not (fake.dtype.is_floating_point or fake.dtype.is_complex):
        return value
    detached = gm.graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    detached.meta["val"] = fake.detach()
    return detached


def _refuse_leaks(node: fx.Node) -> None:
    """Raise CaptureError if the node writes, inside `no_grad`, to an input of the region that needs a gradient.

    Such a write is not an output of the region, so there is nothing to detach.
    """
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
                f"op {node.target} writes inside no_grad to a tensor that needs a gradient{where(node)}, which a "
                "flat graph cannot keep; write to a new tensor instead"
            )


def where(node: fx.Node) -> str:
    """Source location of a node as ` (File "model.py", line 3, in forward)`, or "" if it is unknown."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return f" ({lines[-1]})" if lines else ""


def share_tied(gm: fx.GraphModule, module: nn.Module) -> None:
    """Share the module's parameters and buffers with `gm`, and give each use of a tied weight the name of its module.

    torch.export refers to a tied weight by one name everywhere. After this function, an op of the module `decoder`
    reads `decoder.weight` even if `embeddings.weight` is the same tensor.
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
    # A tied weight has one get_attr node. Split it by the module that each user was traced in.
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
    """The tied name that belongs to the innermost module around `user`; None if no such module owns one."""
    stack = user.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    for path in reversed(paths):
        found = [name for name in tied if name.rpartition(".")[0] == path]
        if found:
            return found[0]
    return None


def _owner(gm: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`; missing levels are created."""
    owner = gm
    for part in path.split(".") if path else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    return owner


def _is_persistent(module: nn.Module, path: str, leaf: str) -> bool:
    return leaf not in module.get_submodule(path)._non_persistent_buffers_set
