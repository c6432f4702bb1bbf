"""Fallback for models that cannot be captured: captures each layer separately. Sites then have paths but no roles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture import Captured, LoadedModel, trace
from surgery.capture.trace import as_found
from surgery.live.capture import Seen, mirror
from surgery.live.layer import LayerError, input_name


class Apart(nn.Module):
    """The layers of a model, each called with its own input; modules keep their names."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self.__dict__["_paths"] = paths

    def forward(self, inputs: list[Tensor]) -> list[Any]:
        """Outputs of the layers, one for each input."""
        return [self.get_submodule(path)(x) for path, x in zip(self.__dict__["_paths"], inputs, strict=True)]


def pretend(model: nn.Module) -> tuple[LoadedModel, Captured, dict[str, Seen]]:
    """Capture the layers of a model that can be rewritten; the capture cannot be run as a model.

    Returns:
        The layers with their inputs, their capture, and the input shapes of each layer by path.
    """
    copied = mirror(model).eval()
    inputs: dict[str, Tensor] = {}
    for path, layer in copied.named_modules():
        example = _input(layer)
        if example is not None and path:
            try:
                input_name(layer)
            except LayerError:
                continue
            inputs[path] = example
    apart = Apart(copied, [*inputs])
    loaded = LoadedModel(
        apart, args=([*inputs.values()],), unsourced=frozenset(apart.state_dict()), whole=copied
    )
    captured = trace(loaded, check=False)
    seen = {path: Seen({x.dim(): tuple(x.shape)}, dtype=x.dtype) for path, x in inputs.items()}
    return loaded, captured, seen


def heads(model: nn.Module, example: LoadedModel | None) -> frozenset[str]:
    """Names of the weights of output layers: those that compute an output of the model, or lie outside of its body.

    Args:
        model: The live module.
        example: The model with inputs; None if its inputs are unknown.
    """
    found: set[nn.Module] = set()
    table = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(table, nn.Module):
        found.add(table)
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if isinstance(body, nn.Module):
        inner = set(body.modules())
        found.update(m for m in model.modules() if isinstance(m, nn.Linear) and m not in inner)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    if example is not None:
        found.update(linears[path] for path in _last(example) if path in linears)
    return frozenset(f"{path}.weight" for path, module in model.named_modules() if module in found)


def _last(example: LoadedModel) -> list[str]:
    """Paths of the layers whose outputs are outputs of the model."""
    made: dict[str, Any] = {}
    try:
        with as_found(example.module), torch.no_grad():
            for path, module in example.module.named_modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(lambda m, args, out, path=path: made.update({path: out}))
            outputs = example.module(*example.args, **example.kwargs)
    except Exception:
        # The model cannot run on the example inputs; its own error comes at run time.
        return []
    values = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    ends = {t.data_ptr() for t in pytree.tree_leaves(values) if isinstance(t, Tensor)}
    return [path for path, out in made.items() if isinstance(out, Tensor) and out.data_ptr() in ends]


def _input(layer: nn.Module) -> Tensor | None:
    """An input for a layer of a known class; None for any other module."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or any(True for _ in layer.children()):
        return None

    def made(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=weight.dtype, device=weight.device)

    if isinstance(layer, nn.Linear):
        return made(2, 3, layer.in_features)
    # The Conv1D of transformers is a linear layer with a transposed weight.
    if type(layer).__name__ == "Conv1D" and weight.dim() == 2:
        return made(2, 3, weight.shape[0])
    if isinstance(layer, nn.Embedding):
        return torch.zeros(2, 3, dtype=torch.int64, device=weight.device)
    if isinstance(layer, nn.LayerNorm):
        return made(2, 3, *layer.normalized_shape)
    if isinstance(layer, nn.modules.conv._ConvNd):
        reach = [
            d * (k - 1) + s + 1
            for k, d, s in zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        ]
        return made(2, layer.in_channels, *reach)
    return None
