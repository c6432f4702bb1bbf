"""prune-filters against Torch-Pruning: `python -m benchmarks prune` (not part of `make bench`).

Both remove half of the units of every group, ranked by L1, from the same random weights: ResNet-18, a ConvNeXt, a ViT
(timm) and a small Llama with grouped queries. Both prune everything except the classifier's outputs, including residual
streams and whole heads. Ours is also run with its default, which prunes within blocks. Multiply-adds are torch's own
count of a forward pass. Seconds are those of finding groups and removing units, once. Ours runs on a captured program;
the time of the capture is given separately. Torch-Pruning runs on the eager model; its time includes the update of the
model's attributes. Exported means that torch.onnx.export (dynamo) writes a file whose outputs in onnxruntime agree with
the model's within 1e-4 of their scale.

Coverage is the number of timm models of `make sweep` that each prunes to a model that runs. Ours must also compute what
the whole model computes with the removed units at zero (see tests/passes/prune/test_prune_filters.py); the peer is not
held to that. The peer gets the attention heads, and then the attribute that its own example sets is updated. A model
whose forward reads other sizes from attributes does not run then. A model whose groups are not found in 120 s counts as
not pruned.
"""

from __future__ import annotations

import contextlib
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import surgery
from benchmarks.models import MissingPeer, require
from benchmarks.timing import Row
from surgery.api.programs import make_plugin_manager
from surgery.capture import LoadedModel, trace
from surgery.common.errors import SurgeryError
from surgery.engine.base import Base
from surgery.passes import PruneFilters

RATIO = 0.5
SAME = 1e-4
LIMIT = (
    120  # Wall-clock seconds for the peer on one model: on some models its search for groups does not end.
)


@dataclass(frozen=True)
class Case:
    """A model to prune.

    Attributes:
        name: Name in the table.
        load: Function that returns a new model with inputs.
        heads: Attention heads by module, for Torch-Pruning.
        after: Function that updates the model's attributes after Torch-Pruning.
    """

    name: str
    load: Callable[[], LoadedModel]
    heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda model: {}
    after: Callable[[nn.Module], None] = lambda model: None


def run(quick: bool) -> Iterator[Row]:
    require("timm", "the benchmark of pruning")
    require("torch_pruning", "the comparison with Torch-Pruning")
    for case in _cases(quick):
        yield from _compare(case)
    yield _coverage(quick)


# -- models


def _cases(quick: bool) -> list[Case]:
    small = {"img_size": 64, "num_classes": 10, "depth": 2 if quick else 6}
    return [
        Case("ResNet-18", lambda: _timm("resnet18", {"num_classes": 10})),
        Case("ConvNeXt (atto)", lambda: _timm("convnext_atto", {"num_classes": 10})),
        Case("ViT (small)", lambda: _timm("vit_small_patch16_224", small), _vit_heads, _vit_after),
        Case("Llama, 8 heads on 4", lambda: _llama(2 if quick else 4), _llama_heads, _llama_after),
    ]


def _timm(name: str, settings: dict[str, Any]) -> LoadedModel:
    from surgery.capture import timm as loader
    from surgery.capture.types import LoadOptions

    torch.manual_seed(0)
    loaded = loader.load(f"timm:{name}", LoadOptions(model_kwargs=settings, random=True))
    assert loaded is not None
    return loaded


def _llama(layers: int) -> LoadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    from surgery.capture import hf as loader

    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return loader.from_model(LlamaForCausalLM(config).eval(), "text-generation")


def _vit_heads(model: nn.Module) -> dict[nn.Module, int]:
    return {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}  # type: ignore[misc]


def _vit_after(model: nn.Module) -> None:
    """Update attributes and forward as Torch-Pruning's own example does: the forward must not assume the width."""
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.num_heads = module.qkv.out_features // 3 // module.head_dim
            type(module).forward = _vit_attention


def _vit_attention(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.proj(mixed.transpose(1, 2).reshape(batch, length, -1))


def _llama_heads(model: nn.Module) -> dict[nn.Module, int]:
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        if hasattr(module, "q_proj"):
            found |= {
                layer: layer.out_features // module.head_dim
                for layer in (module.q_proj, module.k_proj, module.v_proj)
            }
    return found


def _llama_after(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.num_key_value_groups = module.q_proj.out_features // module.k_proj.out_features
    model.config.hidden_size = model.lm_head.in_features  # type: ignore[union-attr]


# -- one model


@dataclass(frozen=True)
class Pruned:
    """Result of pruning one model.

    Attributes:
        parameters: Fraction of parameters left.
        macs: Fraction of multiply-adds left.
        seconds: CPU seconds of pruning.
        exported: "yes" with the error, or the reason of the failure.
    """

    parameters: float
    macs: float
    seconds: float
    exported: str


def _compare(case: Case) -> Iterator[Row]:
    theirs = _peer(case)
    whole, capture = _ours(case, "all")
    inner, _ = _ours(case, None)
    note = f"exported: ours {whole.exported}, theirs {theirs.exported}"
    yield _row(f"{case.name}: parameters left", whole.parameters, theirs.parameters, note)
    yield _row(f"{case.name}: multiply-adds left", whole.macs, theirs.macs)
    yield Row(
        "prune", f"{case.name}: within blocks", ours=inner.parameters, unit="of parameters",
        note=f"{inner.macs:.3f} of multiply-adds left; exported: {inner.exported}",
    )  # fmt: skip
    seconds = whole.seconds, theirs.seconds
    yield Row(
        "prune", f"{case.name}: seconds", "Torch-Pruning", *seconds, seconds[0] / seconds[1],
        note=f"the capture takes {capture:.2f} s more",
    )  # fmt: skip


def _row(what: str, ours: float, theirs: float, note: str = "") -> Row:
    ratio = None if math.isnan(theirs) else ours / theirs
    return Row("prune", what, "Torch-Pruning", ours, theirs, ratio, unit="of it", note=note)


def _ours(case: Case, target: str | None) -> tuple[Pruned, float]:
    begun = time.process_time()
    loaded = case.load()
    base = surgery.Program(Base(loaded, trace(loaded), make_plugin_manager()))
    capture = time.process_time() - begun
    begun = time.process_time()
    pruned = base.apply(PruneFilters(ratio=RATIO, target=target), verify=False)
    seconds = time.process_time() - begun
    with tempfile.TemporaryDirectory() as folder:
        try:
            error = pruned.export(Path(folder) / "model.onnx").parity.error
            exported = f"yes ({error:.0e})" if error <= SAME else f"off by {error:.0e}"
        except SurgeryError as problem:
            exported = f"no ({str(problem)[:60]})"
    left = pruned.count_parameters()[0] / base.count_parameters()[0]
    return Pruned(left, _macs(pruned.run) / _macs(base.run), seconds, exported), capture


def _peer(case: Case) -> Pruned:
    loaded = case.load()
    model, args, kwargs = loaded.module.eval(), loaded.args, dict(loaded.kwargs)

    def forward() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    before = sum(p.numel() for p in model.parameters()), _macs(forward)
    begun = time.process_time()
    try:
        with _limited():
            _prune(model, args, kwargs, case.heads(model))
    except TimeoutError as problem:
        return Pruned(math.nan, math.nan, time.process_time() - begun, str(problem))
    case.after(model)
    seconds = time.process_time() - begun
    left = sum(p.numel() for p in model.parameters()) / before[0]
    try:
        macs = _macs(forward) / before[1]
    except Exception as problem:
        return Pruned(left, math.nan, seconds, f"it does not run ({str(problem)[:60]})")
    return Pruned(left, macs, seconds, _exported(model, args, kwargs, forward()))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise TimeoutError if the block takes longer than LIMIT."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it has not ended after {LIMIT} s")

    kept = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, kept)


def _prune(model: nn.Module, args: Any, kwargs: Any, heads: dict[nn.Module, int]) -> None:
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    pruner = tp.pruner.BasePruner(
        model, kwargs or args, tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=RATIO,
        ignored_layers=[last], num_heads=heads, prune_num_heads=bool(heads), prune_head_dims=not heads,
        head_pruning_ratio=RATIO if heads else 0.0, output_transform=_summed,
    )  # fmt: skip
    pruner.step()


def _summed(outputs: Any) -> Tensor:
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack([t.sum() for t in tensors or [outputs.logits]]).sum()


def _exported(model: nn.Module, args: Any, kwargs: Any, expected: Any) -> str:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        try:
            torch.onnx.export(model, tuple(args), path, kwargs=kwargs, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as problem:
            return f"no ({str(problem).splitlines()[0][:60]})"
        given = [*args, *kwargs.values()]
        feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=False)}
        got = torch.from_numpy(session.run(None, feeds)[0])
    wanted = expected if isinstance(expected, Tensor) else next(iter(expected.values()))
    error = float((got - wanted).abs().max() / wanted.abs().max())
    return f"yes ({error:.0e})" if error <= SAME else f"off by {error:.0e}"


def _macs(forward: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() // 2


# -- coverage


def _coverage(quick: bool) -> Row:
    """Number of sweep models that each prunes to a model that runs, with the failures."""
    try:
        from tests.zoo import zoo
    except ImportError:
        raise MissingPeer("the coverage of pruning needs the tests of this repository beside it") from None
    names = [name for name in zoo.NAMES if name.startswith("timm:")][: 3 if quick else None]
    ours, theirs = {}, {}
    for name in names:
        ours[name], theirs[name] = _runs(name, zoo.build, _prunes), _runs(name, zoo.build, _peer_prunes)
    done = [sum(not why for why in found.values()) for found in (ours, theirs)]
    missed = "; ".join(f"{name[5:]}: {why}" for name, why in ours.items() if why)
    lost = ", ".join(name[5:] for name, why in theirs.items() if why)
    note = f"of {len(names)}; ours not: {missed or 'none'}; theirs not: {lost or 'none'}"
    return Row("prune", "timm models pruned", "Torch-Pruning", done[0], done[1], unit="models", note=note)


def _runs(name: str, build: Callable[[str], LoadedModel], prunes: Callable[[LoadedModel], None]) -> str:
    """Reason why a model cannot be pruned to one that runs, or ""."""
    try:
        prunes(build(name))
    except Exception as problem:
        return (str(problem).splitlines() or [type(problem).__name__])[0][:80]
    return ""


def _prunes(loaded: LoadedModel) -> None:
    base = surgery.Program(Base(loaded, trace(loaded), make_plugin_manager()))
    pruned = base.apply(PruneFilters(ratio=RATIO, target="all"), verify=False)
    pruned.run()
    if pruned.count_parameters()[0] >= base.count_parameters()[0]:
        raise SurgeryError("nothing was removed")


def _peer_prunes(loaded: LoadedModel) -> None:
    model = loaded.module.eval()
    count = sum(p.numel() for p in model.parameters())
    with _limited():
        _prune(model, loaded.args, dict(loaded.kwargs), _vit_heads(model))
    for module in model.modules():
        if hasattr(module, "qkv") and hasattr(module, "head_dim"):
            module.num_heads = module.qkv.out_features // 3 // module.head_dim
    with torch.no_grad():
        model(*loaded.args, **loaded.kwargs)
    if sum(p.numel() for p in model.parameters()) >= count:
        raise RuntimeError("nothing was removed")
