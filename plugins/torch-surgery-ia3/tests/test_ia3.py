"""IA³ does what PEFT's does, on every form of weight that it accepts, and keeps a pass's contract."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn
from torch_surgery_ia3 import IA3

import surgery
from surgery.api import PassError
from surgery.api.programs import Program
from surgery.testing import check_pass

IN_PROCESS = ("numerics", "untouched", "inserted", "effect", "tied", "second", "merge", "restored", "weights",
              "undo", "gradients", "input")  # fmt: skip


def randomised(program: Program, spread: float = 0.4) -> Program:
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if tensor.is_floating_point():
                tensor.copy_(1 + spread * torch.randn_like(tensor))
    return program


# -- PEFT


def tiny(kind: str):
    """A tiny random model with PEFT's targets and feed-forward modules for it."""
    import transformers as tf

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "bert":
        config = tf.BertConfig(vocab_size=99, max_position_embeddings=64, **small)
        down = r".*layer\.\d+\.output\.dense"
        return tf.BertModel(config), r".*\.(key|value)|" + down, down
    if kind == "llama":
        config = tf.LlamaConfig(vocab_size=99, max_position_embeddings=64, num_key_value_heads=2, **small)
        return tf.LlamaForCausalLM(config), ["k_proj", "v_proj", "down_proj"], ["down_proj"]
    config = tf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config), ["k", "v", "wo"], ["wo"]


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_pefts_vectors_give_pefts_logits(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, targets, feedforward = tiny(kind)
    model.eval().save_pretrained(tmp_path)
    program = surgery.load(f"hf:{tmp_path}").apply(IA3())
    _, inputs = program.example_inputs

    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(5)
    vectors = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.4 * torch.randn_like(parameter))
                path = name.removeprefix("base_model.model.").partition(".ia3_l")[0]
                vectors[f"{path}.ia3.scale"] = parameter.detach().flatten()
        expected = adapted(**inputs)[0]
        before = program.run()
        assert set(program.tensors) == set(vectors)
        for name, value in vectors.items():
            program.tensors[name].copy_(value)
    got = next(iter(program.run().values()))
    assert float((next(iter(before.values())) - expected).abs().max()) > 1e-2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    merged = program.merge()
    torch.testing.assert_close(next(iter(merged.run().values())), expected, atol=1e-4, rtol=0)
    assert len(merged.graph.nodes) == len(surgery.load(f"hf:{tmp_path}").graph.nodes)


# -- the contract


class Forms(nn.Module):
    """linear, addmm and matmul with either layout, convolutions with groups and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.depthwise = nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.linear = nn.Linear(4, 8)
        self.addmm_weight = nn.Parameter(torch.randn(8, 6) / 2)
        self.addmm_bias = nn.Parameter(torch.randn(6))
        self.matmul_weight = nn.Parameter(torch.randn(6, 5) / 2)
        self.swapped = nn.Parameter(torch.randn(7, 5) / 2)
        self.embed = nn.Embedding(3, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.transposed(torch.tanh(self.conv(image))).flatten(2)
        x = self.linear(self.depthwise(x).mean(2))
        x = torch.addmm(self.addmm_bias, x, self.addmm_weight)
        x = torch.matmul(torch.tanh(x), self.matmul_weight)
        return torch.matmul(x, self.swapped.t()) + self.embed.weight.sum(0)


class Attention(nn.Module):
    """A fused qkv, with q, k and v one after the other or side by side in each head."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (2, 3, 4) if self.interleaved else (3, 2, 4)
        parts = self.qkv(x).unflatten(-1, shape).unbind(3 if self.interleaved else 2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


def forms() -> Program:
    torch.manual_seed(0)
    return surgery.capture(Forms(), torch.randn(3, 4, 6, 6))


def attention(interleaved: bool = False) -> Program:
    torch.manual_seed(0)
    return surgery.capture(Attention(interleaved), torch.randn(3, 5, 8))


@pytest.mark.parametrize("scale", ["input", "output"])
def test_every_form_of_weight(scale):
    report = check_pass(IA3(target="all", scale=scale), forms())
    print(report)
    assert set(report.skipped) == {"tied"}


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_papers_places_on_a_fused_projection(interleaved):
    program = attention(interleaved)
    report = check_pass(IA3(), program, checks=[*IN_PROCESS, "onnx"])
    print(report)
    assert set(report.skipped) == {"tied"}
    adapted = program.apply(IA3())
    shapes = {name: tuple(t.shape) for name, t in adapted.tensors.items() if t.is_floating_point()}
    assert shapes == {"qkv.ia3.scale_k": (8,), "qkv.ia3.scale_v": (8,), "down.ia3.scale": (12,)}


def test_parts_scale_their_rows_and_no_others():
    program = attention(interleaved=True)
    adapted = randomised(program.apply(IA3(target="attn.k")))
    merged, was = adapted.merge().state(), program.state()
    rows = program.sites.sites[0].parts["k"]
    factor = torch.ones(24)
    factor[list(rows)] = adapted.tensors["qkv.ia3.scale_k"].detach()
    assert torch.equal(merged["qkv.weight"], was["qkv.weight"] * factor[:, None])
    assert torch.equal(merged["qkv.bias"], was["qkv.bias"] * factor)


def test_a_weight_scales_the_distance_from_one():
    program = attention()
    adapted = randomised(program.apply(IA3(target="out")))
    vector = adapted.tensors["out.ia3.scale"].detach()
    half = adapted.weighted({"ia3": 0.25}).merge().state()["out.weight"]
    torch.testing.assert_close(half, program.state()["out.weight"] * (1 + 0.25 * (vector - 1))[:, None])


@pytest.mark.parametrize("scale", ["input", "output"])
def test_among_other_adapters_folding_follows_the_journal(scale):
    """An input vector acts on the adapters before it and not on those after it, merged and unmerged."""
    for program, target in ((forms(), "path:linear,path:conv"), (attention(), "out,down,qkv")):
        first, last = (surgery.Lora(target=target, rank=2, label=label) for label in ("first", "last"))
        both = program.apply(first, IA3(target=target, scale=scale), last, IA3(target=target, label="two"))
        randomised(both, 0.3)
        merged = both.merge()
        torch.testing.assert_close(merged.run(), both.run(), atol=1e-3, rtol=1e-4)
        # The graph that was built pass by pass is the one that the journal gives.
        replayed = Program(both.base, both.journal, both.tensors, both.changed)
        assert torch.equal(replayed.run(), both.run())
        left = both.undo("ia3:two").undo("lora:last")
        alone = program.apply(first, IA3(target=target, scale=scale))
        with torch.no_grad():
            for name, tensor in alone.tensors.items():
                tensor.copy_(both.tensors[name])
        assert torch.equal(left.run(), alone.run())


def test_train_and_save(tmp_path):
    program = attention()
    adapted = program.apply(IA3())
    module = adapted.module()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"qkv.ia3.scale_k", "qkv.ia3.scale_v", "down.ia3.scale"}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = module(*adapted.example_inputs[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"), base=program)
    assert torch.equal(again.run(), adapted.run())
    assert again.journal.entries[-1].distribution == "torch-surgery-ia3"


def test_half_precision_is_exact_too():
    torch.manual_seed(0)
    program = surgery.capture(Attention(False).bfloat16(), torch.randn(3, 5, 8).bfloat16())
    assert torch.equal(program.apply(IA3()).run(), program.run())


# -- refusals


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.linear = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return nn.functional.linear(x, self.linear.weight, self.shift * 2)


def test_refusals_say_why():
    program = surgery.capture(Odd(), torch.randint(0, 9, (3, 2)))
    with pytest.raises(PassError, match="works on linear, conv, and this is an embedding"):
        program.apply(IA3(target="embed"))
    with pytest.raises(PassError, match="bias is computed"):
        program.apply(IA3(target="path:linear", scale="output"))
    report = check_pass(IA3(target="path:linear", scale="input"), program, checks=IN_PROCESS)
    assert "merge" in report.passed
    with pytest.raises(PassError, match="share one input"):
        attention().apply(IA3(target="attn.k", scale="input"))
    with pytest.raises(PassError, match="--scale is 'inward'"):
        IA3.parse({"scale": "inward"})
