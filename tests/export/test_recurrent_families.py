"""Models with linear recurrences, the whole way: any length, roles, LoRA on their mixers, merged, in onnxruntime."""

from __future__ import annotations

import functools
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

import surgery
from surgery.capture import dynamic_axes
from surgery.common.errors import ExportError
from tests.shared.recurrent_models import CONFIGS, recurrent_model

# Lengths of one token, below and above the chunks of the op (64) and of the models (16).
LENGTHS = (1, 5, 11, 64, 70, 130)
FEW = ("qwen3_5_text", "mamba2", "jamba")


def families(*quick: str) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


# Roles of the layers with a recurrence, by the last part of their names.
_SSM2 = {"in_proj": "ssm.in", "out_proj": "ssm.out", "conv1d": "conv"}
_SSM1 = {**_SSM2, "x_proj": "ssm.x", "dt_proj": "ssm.dt"}
_SEPARATE = {
    "q_proj": "linear_attn.q", "k_proj": "linear_attn.k", "v_proj": "linear_attn.v", "o_proj": "linear_attn.out",
    "b_proj": "linear_attn.beta", "conv1d": "conv",
}  # fmt: skip
_QWEN = {
    "in_proj_qkv": "linear_attn.qkv", "in_proj_z": "linear_attn.gate", "in_proj_b": "linear_attn.beta",
    "in_proj_a": "linear_attn.decay", "out_proj": "linear_attn.out", "conv1d": "conv",
}  # fmt: skip
ROLES: dict[str, dict[str, str]] = {
    "qwen3_next": {
        "in_proj_qkvz": "linear_attn.qkv", "in_proj_ba": "linear_attn.decay", "out_proj": "linear_attn.out",
        "conv1d": "conv",
    },
    "qwen3_5_text": _QWEN,
    "qwen3_5_moe_text": _QWEN,
    "olmo_hybrid": {**_SEPARATE, "a_proj": "linear_attn.decay", "g_proj": "linear_attn.gate"},
    "kimi_linear": {
        **_SEPARATE, "f_a_proj": "linear_attn.decay.a", "f_b_proj": "linear_attn.decay.b",
        "g_a_proj": "linear_attn.gate.a", "g_b_proj": "linear_attn.gate.b",
    },
    "bailing_hybrid": {**_SEPARATE, "f_proj": "linear_attn.decay", "g_proj": "linear_attn.gate"},
    **dict.fromkeys(("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), _SSM2),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), _SSM1),
    "recurrent_gemma": {
        "linear_x": "linear_attn.v", "linear_y": "linear_attn.gate", "linear_out": "linear_attn.out", "conv_1d": "conv",
    },
    "minimax": {"qkv_proj": "linear_attn.qkv", "output_gate": "linear_attn.gate", "out_proj": "linear_attn.out"},
}  # fmt: skip


@functools.cache
def model(name: str) -> torch.nn.Module:
    return recurrent_model(name)


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("recurrent")

    @functools.cache
    def load(name: str) -> surgery.Program:
        model(name).save_pretrained(folder / name)
        return surgery.load(f"hf:{folder / name}")

    return load


def batches():
    """Inputs of every length, padded on the left and on the right; the first row is whole."""
    for steps in LENGTHS:
        for left in (True, False):
            torch.manual_seed(steps)
            ids = torch.randint(3, 99, (3, steps))
            mask = torch.ones_like(ids)
            for row in (1, 2):
                pad = min(2 * row, steps - 1)
                mask[row, slice(0, pad) if left else slice(steps - pad, steps)] = 0
            yield {"input_ids": ids, "attention_mask": mask}


def worst(run, wanted) -> float:
    """The largest error of the logits at places that are not padding, over the largest logit."""
    found = 0.0
    for batch in batches():
        with torch.no_grad():
            a, b = wanted(batch), run(batch)
        shown = batch["attention_mask"][..., None]
        found = max(found, float(((a - b) * shown).abs().max() / a.abs().max()))
    return found


def logits(module) -> Any:
    def run(batch):
        out = module(**batch)
        return out["logits"] if isinstance(out, dict) else out.logits

    return run


@pytest.mark.parametrize("name", families(*FEW))
def test_the_capture_holds_for_any_length(name: str, programs) -> None:
    program = programs(name)
    assert not program.captured.notes
    assert dynamic_axes(program.captured)["input_ids"] == {0: "batch", 1: "seq"}
    assert any("linear_attention" in str(node.target) for node in program.graph.nodes)
    # float32, the same sums in chunks of another size: 8e-7 was the largest of all families.
    assert worst(logits(program.module()), logits(model(name))) < 4e-6


@pytest.mark.parametrize("name", families(*FEW))
def test_roles(name: str, programs) -> None:
    found = {
        site.path.rpartition(".")[2]: site.role
        for site in programs(name).sites
        if site.role.startswith(("linear_attn", "ssm")) or "conv" in site.path
    }
    assert found == ROLES[name]


@pytest.mark.parametrize("name", families("qwen3_5_text"))
def test_adapted_merged_and_exported(name: str, programs, tmp_path) -> None:
    target = "mixer.*,conv" if "conv" in ROLES[name].values() else "mixer.*"
    adapted = programs(name).apply(surgery.Lora(target=target, rank=2))
    assert {site.role for site in adapted.sites if site.role.startswith(("linear_attn", "ssm"))}
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in adapted.tensors.values():
            tensor.add_(torch.randn_like(tensor) * 0.02)
    wanted = logits(adapted.module())
    moved = worst(logits(model(name)), wanted)
    # The adapters do something, or the rest shows nothing.
    assert moved > 1e-3
    merged = adapted.merge()
    # float32 rounding of W + BA, which the norms of short queries and keys (their length is divided by) make larger.
    assert worst(logits(merged.module()), wanted) < 2e-5
    for program, path in ((adapted, tmp_path / "adapted.onnx"), (merged, tmp_path / "merged.onnx")):
        program.export(path)
        session = onnxruntime.InferenceSession(str(path))
        names = [given.name for given in session.get_inputs()]

        def run(batch, session=session, names=names):
            return torch.from_numpy(session.run(["logits"], {n: batch[n].numpy() for n in names})[0])

        assert worst(run, wanted) < 2e-5
        file = onnx.load(path, load_external_data=False)
        assert {o.domain: o.version for o in file.opset_import} == {"": 27}
        assert any(node.op_type == "LinearAttention" for node in file.graph.node)


@pytest.mark.parametrize("opset", [20, pytest.param(26, marks=pytest.mark.slow)])
def test_an_earlier_opset_has_microsofts_op(opset, programs, tmp_path) -> None:
    program, path = programs("mamba2"), tmp_path / "early.onnx"
    program.export(path, opset=opset)
    file = onnx.load(path)
    assert {o.domain: o.version for o in file.opset_import} == {"": opset, "com.microsoft": 1}
    session = onnxruntime.InferenceSession(str(path))

    def run(batch):
        return torch.from_numpy(session.run(["logits"], {n: x.numpy() for n, x in batch.items()})[0])

    assert worst(run, logits(program.module())) < 4e-6


def test_an_opset_that_is_too_late(programs, tmp_path) -> None:
    with pytest.raises(ExportError, match="--opset 28 is too late: files are written up to opset 27"):
        programs("mamba2").export(tmp_path / "late.onnx", opset=28)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", families("mamba2"))
def test_trains_as_the_live_model(name: str, programs) -> None:
    """A few steps of SGD on the adapters: the program's losses are those of the live model with the same adapters.

    `dt_proj` of Mamba 1 is left out: the live model reads its weight without calling it.
    """
    torch.manual_seed(2)
    ids = torch.randint(3, 99, (4, 20))
    losses = []
    target = "mixer.*,!dt_proj" if "dt_proj" in ROLES[name] else "mixer.*"
    lora = surgery.Lora(target=target, rank=2)
    live = recurrent_model(name)
    adapters = surgery.apply_(live, lora).tensors
    graph = programs(name).apply(lora).module()
    with torch.no_grad():
        own = dict(graph.named_parameters())
        for key, value in adapters.items():
            own[key].copy_(value)
    for module in (live, graph):
        module.train()
        tensors = [p for p in module.parameters() if p.requires_grad]
        assert tensors
        optimizer = torch.optim.SGD(tensors, lr=0.1)
        made = []
        for _ in range(5):
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            loss = torch.nn.functional.cross_entropy(
                logits(module)(batch)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            made.append(loss.item())
        losses.append(made)
    assert losses[0][-1] < losses[0][0] - 1e-3
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
