"""Uses of a weight outside of its layer's forward: layers that are never called, weights read elsewhere, fast paths."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture import LoadedModel
from surgery.capture.trace import as_found

_NEVER = "the model never calls this layer on the example inputs"
_ELSEWHERE = "another module reads its weight without calling it"


def raw_reads(example: LoadedModel) -> dict[str, str] | None:
    """Layers whose weight is used without calling them, with the reason.

    The model runs on the example inputs, and layers that are not called are listed. Then it runs with the weights of
    called layers set to NaN, while these layers return their recorded outputs. If the outputs of the model change,
    another module reads the weight.

    Args:
        example: The model with inputs; its weights are restored.

    Returns:
        Path of a layer -> reason; None if the model cannot be run on the inputs.
    """
    layers = {
        path: layer
        for path, layer in example.module.named_modules(remove_duplicate=False)
        if isinstance(getattr(layer, "weight", None), nn.Parameter) and not list(layer.children())
    }
    try:
        with as_found(example.module):
            example.module.eval()
            record = _Record(list(dict.fromkeys(layers.values())))
            with torch.no_grad(), record.watching():
                before = _leaves(example)
            found = {path: _NEVER for path, layer in layers.items() if not record.outputs[layer]}
            called = [layer for layer in record.outputs if record.outputs[layer]]
            for layer in _readers(example, record, called, before):
                found.update({path: _ELSEWHERE for path, each in layers.items() if each is layer})
            return found
    except Exception:
        # A model that cannot run on the example inputs cannot be checked here; its own error comes at run time.
        return None


class _Record:
    """Outputs of layers in the order of their calls, recorded once and then played back."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.outputs: dict[nn.Module, list[Any]] = {layer: [] for layer in layers}

    def watching(self) -> Any:
        """Context manager that records the outputs of the layers."""

        def look(layer: nn.Module, args: Any, output: Any) -> None:
            self.outputs[layer].append(output)

        return _hooks(self.outputs, look)

    def playing(self) -> Any:
        """Context manager in which the layers return the recorded outputs."""
        at = dict.fromkeys(self.outputs, 0)

        def play(layer: nn.Module, args: Any, output: Any) -> Any:
            at[layer] += 1
            return self.outputs[layer][at[layer] - 1]

        return _hooks(self.outputs, play)


class _hooks:
    """Context manager that registers a forward hook on several modules."""

    def __init__(self, layers: Any, hook: Any) -> None:
        self._layers, self._hook = list(layers), hook

    def __enter__(self) -> None:
        self._handles = [layer.register_forward_hook(self._hook) for layer in self._layers]

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


def _readers(
    example: LoadedModel, record: _Record, layers: list[nn.Module], before: list[Tensor]
) -> list[nn.Module]:
    """Layers whose weight another module reads, found by bisection."""
    if not layers or not _differs(example, record, layers, before):
        return []
    if len(layers) == 1:
        return layers
    half = len(layers) // 2
    return [
        *_readers(example, record, layers[:half], before),
        *_readers(example, record, layers[half:], before),
    ]


def _differs(example: LoadedModel, record: _Record, layers: list[nn.Module], before: list[Tensor]) -> bool:
    """True if NaN in the weights of these layers changes the outputs although the layers play back their own."""
    found = [cast(nn.Parameter, layer.weight) for layer in layers]
    weights = [weight for weight in found if weight.is_floating_point()]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad(), record.playing():
            for weight in weights:
                weight.fill_(torch.nan)
            after = _leaves(example)
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _leaves(example: LoadedModel) -> list[Tensor]:
    """All output tensors of the model on its inputs."""
    outputs = example.module(*example.args, **example.kwargs)
    values = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def keep_off_fast_path(model: nn.Module) -> None:
    """Make torch call the inner layers of every nn.TransformerEncoderLayer that has adapters.

    In eval mode without gradients, torch computes such a layer by one fused kernel from the raw weights, which would
    bypass adapters. A layer with a hook does not use the kernel, so an empty hook is registered, and removed with the
    adapters.
    """
    for layer in model.modules():
        if not isinstance(layer, nn.TransformerEncoderLayer):
            continue
        adapted = any(hasattr(type(inner), "surgery_base") for inner in layer.modules())
        handle = layer.__dict__.get("_surgery_hook")
        if adapted and handle is None:
            layer.__dict__["_surgery_hook"] = layer.register_forward_pre_hook(_nothing)
        elif not adapted and handle is not None:
            handle.remove()
            del layer.__dict__["_surgery_hook"]


def _nothing(module: nn.Module, args: Any) -> None:
    """An empty hook."""
