"""Combining adapters: PEFT's add_weighted_adapter on the same factors, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

import surgery
from surgery.cli import main
from surgery.common.errors import PassError
from surgery.engine.contract.combination import METHODS
from surgery.engine.contract.observe import observe
from surgery.engine.registry import find_pass
from tests.shared import tiny
from tests.zoo import zoo

# fp32: the same values multiplied and summed in another order, and an SVD of another form of the same matrix.
TOLERANCE = 2e-5
FEW = ("linear", "cat", "ties_svd")  # of GPT-2's; the others are slow tests
WEIGHTS = {"film": 0.7, "news": -0.4}


def checkpoints(folder, kind, second_rank=4):
    """A base and two PEFT checkpoints for it, random, whose targets overlap."""
    torch.manual_seed(0)
    model, names = {
        "llama": (lambda: LlamaForCausalLM(tiny.llama()), (["q_proj", "v_proj"], ["q_proj", "down_proj"])),
        # Transposed weights, a fused projection, and a table.
        "gpt2": (lambda: GPT2LMHeadModel(tiny.gpt2()), (["c_attn", "wte"], ["c_attn", "c_fc"])),
    }[kind]
    model().save_pretrained(folder / "base")
    for name, targets, rank in zip(WEIGHTS, names, (4, second_rank), strict=True):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(r=rank, lora_alpha=6, target_modules=targets, fan_in_fan_out=kind == "gpt2")
        adapted = get_peft_model(base, config)
        with torch.no_grad():
            for key, value in adapted.named_parameters():
                if "lora_" in key:
                    value.normal_(std=0.2)
        adapted.save_pretrained(folder / name)


def ours(folder):
    program = surgery.load(f"hf:{folder / 'base'}")
    for name in WEIGHTS:
        program = surgery.import_peft(folder / name, program, label=name)
    return program


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=[pytest.mark.slow] if kind == "gpt2" and method not in FEW else [])
        for kind in ("llama", "gpt2")
        for method in METHODS
        if "dare" not in method
    ],
)
def test_as_peft_combines(kind, method, tmp_path):
    """dare drops values at random; test_dare checks their distribution."""
    checkpoints(tmp_path, kind)
    density = None if method in ("linear", "cat", "svd") else 0.6
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "film", adapter_name="film")
    theirs.load_adapter(tmp_path / "news", "news")
    theirs.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "both", combination_type=method, density=density
    )
    theirs.set_adapter("both")
    combined = ours(tmp_path).combine(WEIGHTS, method, label="both", density=density)
    assert [e.id for e in combined.journal if e.kind == "rewrite"] == ["lora:both"]
    _, inputs = combined.example_inputs
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits
        bare = combined.undo_all().run()["logits"]
    got = combined.run()["logits"]
    assert float((bare - expected).abs().max()) > 0.01 * float(expected.abs().max())
    assert float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def test_dare(tmp_path):
    checkpoints(tmp_path, "llama")
    program = ours(tmp_path)
    first, again, other = (
        program.combine(WEIGHTS, "dare_linear", label="both", density=0.5, seed=seed) for seed in (1, 1, 2)
    )
    # At the only source of a place: half are zero, and the others twice what they were, times the root of its weight.
    (name,) = (n for n in first.tensors if n.endswith("layers.0.self_attn.v_proj.lora_both.A"))
    own = program.tensors[name.replace("both", "film")]
    kept = first.tensors[name] != 0
    assert 0.35 < kept.float().mean() < 0.65  # 4 × 32 draws: within 3.4 deviations
    torch.testing.assert_close(first.tensors[name][kept], (own * 2 * (0.7 * 6 / 4) ** 0.5)[kept])
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
    assert not torch.equal(first.tensors[name], other.tensors[name])


def test_a_smaller_rank_is_the_nearest(tmp_path):
    """Eckart–Young: no update of that rank is nearer than the next singular value."""
    checkpoints(tmp_path, "llama")
    program = ours(tmp_path)
    small = program.combine(WEIGHTS, "svd", label="both", rank=3)
    exact = program.combine(WEIGHTS, "cat", label="both")
    path = "model.layers.0.self_attn.q_proj.lora_both"
    wanted, got = (p.tensors[f"{path}.B"] @ p.tensors[f"{path}.A"] for p in (exact, small))
    values = torch.linalg.svdvals(wanted)
    error = torch.linalg.matrix_norm(wanted - got, 2)
    torch.testing.assert_close(error, values[3], rtol=1e-4, atol=0)
    assert [p.tensors[f"{path}.A"].shape[0] for p in (small, exact)] == [3, 8]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_convolutions_and_experts(method):
    """Groups and experts have one pair each; exact methods give the weighted sum (svd at the summed rank)."""
    for made in (_experts(), _convolutions()):
        torch.manual_seed(3)
        program = surgery.capture(*made)
        for label in ("a", "b"):
            program = program.apply(surgery.Lora(target="all", rank=2, label=label), freeze_base=True)
        with torch.no_grad():
            for tensor in program.tensors.values():
                tensor.normal_(std=0.2)
        rank = 4 if method == "svd" else None
        combined = program.combine({"a": 0.5, "b": 2.0}, method, label="both", rank=rank)
        summed = program.weighted({"a": 0.5, "b": 2.0})
        assert observe(summed.run(), combined.run()).difference <= TOLERANCE
        assert not observe(program.run(), combined.run()).difference <= 1e-2


def _experts():
    model = zoo.module("mixtral").eval()
    model.config.use_cache = False
    return model, {"input_ids": torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(4))}


def _convolutions():
    torch.manual_seed(4)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.GELU(), torch.nn.Conv2d(8, 4, 1)
    )
    return module.eval(), (torch.randn(2, 4, 6, 6),)


def test_the_order_of_what_came_between(tmp_path):
    """An IA³ after the first LoRA scales that LoRA's branch, but not a later one's."""
    checkpoints(tmp_path, "llama")
    program = surgery.load(f"hf:{tmp_path / 'base'}")
    ia3 = find_pass(program.base.plugins, "ia3").cls
    program = program.apply(surgery.Lora(target="mlp.up", label="a"), ia3(target="mlp.up", scale="output"))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.5)
    combined = program.combine({"a": 0.5}, "cat", label="half")
    assert observe(program.weighted({"a": 0.5}).run(), combined.run()).difference <= TOLERANCE
    late = program.apply(surgery.Lora(target="mlp.up", label="b"))
    with torch.no_grad():
        for name, tensor in late.tensors.items():
            if "lora_b" in name:
                tensor.normal_(std=0.5)
    with pytest.raises(PassError, match="from those of the weighted adapters"):
        late.combine({"a": 1, "b": 1}, "cat", label="both")


def test_ia3(tmp_path):
    checkpoints(tmp_path, "llama")
    program = surgery.load(f"hf:{tmp_path / 'base'}")
    ia3 = find_pass(program.base.plugins, "ia3").cls
    program = program.apply(ia3(label="a"), ia3(target="attn.v", label="b"))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(1, 0.3)
    combined = program.combine({"a": 0.25, "b": 0.75}, "linear", label="both")
    for name, tensor in combined.tensors.items():
        a, b = (program.tensors.get(name.replace("both", n)) for n in "ab")
        mean = 1 + 0.25 * (a - 1) + (0 if b is None else 0.75 * (b - 1))
        torch.testing.assert_close(tensor, mean)
    with pytest.raises(PassError, match="ia3 has no ranks"):
        program.combine({"a": 1, "b": 1}, "svd", label="both")


def test_on_a_live_model(tmp_path):
    checkpoints(tmp_path, "llama")
    program = ours(tmp_path)
    program.save(tmp_path / "two")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    surgery.load_(model, tmp_path / "two")
    surgery.combine_(model, WEIGHTS, "ties", label="both", density=0.5, keep=True)
    combined = program.combine(WEIGHTS, "ties", label="both", density=0.5)
    ids = combined.example_inputs[1]["input_ids"]
    with torch.no_grad():
        mask = torch.ones_like(ids)
        assert torch.equal(model(ids).logits, combined.run(input_ids=ids, attention_mask=mask)["logits"])
        with surgery.using(model, "film"):
            film = model(ids).logits
        surgery.remove_(model, "both")
        surgery.weight_(model, {"film": 1})
        assert torch.equal(model(ids).logits, film)
        surgery.remove_(model)
        assert torch.equal(
            model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
        )


def test_from_the_command_line(tmp_path, capsys):
    checkpoints(tmp_path, "llama", second_rank=2)
    base, both = f"hf:{tmp_path / 'base'}", str(tmp_path / "both")

    def run(*line):
        with pytest.raises(SystemExit) as raised:
            main([str(part) for part in line])
        said = capsys.readouterr()
        return raised.value.code, said.out + said.err

    assert (
        run("import-peft", tmp_path / "film", "--base", base, "--as", "film", "-o", tmp_path / "one")[0] == 0
    )
    assert (
        run("import-peft", tmp_path / "news", "--base", tmp_path / "one", "--as", "news", "-o", both)[0] == 0
    )
    two = surgery.load(both)
    assert {n for n in two.tensors if two.trains(n)} == set(
        two.tensors
    )  # the second has not frozen the first
    weights = ("--weight", "film=0.7", "--weight", "news=-0.4", "--as", "mix")
    code, said = run("combine", both, *weights, "--rank", 3, "-o", tmp_path / "mixed")
    assert code == 0, said
    assert "lora:mix: rank 3, 6 sites; " in said
    assert "from the weighted sum" in said
    journal = json.loads((tmp_path / "mixed" / "surgery.json").read_text())["journal"]
    assert [e["id"] for e in journal if e["kind"] == "rewrite"] == ["lora:mix"]
    expected = ours(tmp_path).combine(WEIGHTS, "svd", label="mix", rank=3).run()["logits"]
    assert torch.equal(surgery.load(str(tmp_path / "mixed")).run()["logits"], expected)
    for options, message in (
        (("--method", "linear"), "ranks 2 and 4 differ, and linear adds the factors themselves"),
        (("--method", "ties_svd"), "ties_svd needs a density"),
        (("--method", "cat", "--rank", "4"), "the sources determine the rank of cat"),
        (("--density", "0.5"), "svd keeps every value"),
        (("--method", "ties_svd", "--density", "2"), "--density is 2.0; give a fraction"),
        (("--weight", "film=1"), "named twice"),
        (("--majority", "frequency"), "svd does not elect signs"),
        (("--as", "a b/c"), "--as 'a b/c' is not a valid name; use letters"),
        (("--weight", "lora:news=1"), "named twice"),
        (("--weight", "nws=1"), "no pass 'nws'"),
    ):
        code, said = run("combine", both, *weights, *options, "-o", tmp_path / "bad")
        assert (code, message in said, len(said.strip().splitlines())) == (2, True, 1), said
        assert not (tmp_path / "bad").exists()
    code, said = run("combine", both, "--weight", "film=0", "--as", "none", "-o", tmp_path / "bad")
    assert (code, "every weight is zero" in said) == (2, True)
    code, said = run("combine", both, "--weight", "film=1", "--as", "news", "-o", tmp_path / "bad")
    assert code == 2
    assert "'lora:news' is applied already" in said


def test_what_is_no_plain_update():
    module, args = _convolutions()
    program = surgery.capture(module, args)
    for lora, why in (
        (surgery.Lora(target="conv", rank=1, dora=True, label="a"), "has --dora, .* merge it"),
        (surgery.Lora(target="conv", rank=1, init="pissa", label="a"), "has --init pissa, .* import-peft"),
    ):
        with pytest.raises(PassError, match=why):
            program.apply(lora).combine({"a": 1}, "cat", label="one")
