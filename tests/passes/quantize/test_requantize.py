"""Adapters merged into quantized weights: choices for each budget, their error, and undo."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.api import PassError
from surgery.cli import main
from surgery.engine.contract.observe import observe
from surgery.engine.probe import Probe
from surgery.engine.registry import find_pass
from surgery.passes.quantize.matrix import Layout
from tests.conftest import minilm_path
from tests.passes.quantize.test_quantize import every, randomise


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    given = {"num_labels": 2, "num_hidden_layers": 2}
    return surgery.load(f"hf:{minilm_path()}", task="text-classification", model_kwargs=given)


def adapted(encoder, format, **options):
    program = encoder.apply(surgery.Quantize(target="attn.*,mlp.*", format=format, **options))
    return randomise(program.apply(surgery.Lora(target="attn.*", rank=4)))


def merge_of(program):
    return program.journal.entries[-1]


def test_new_codes_are_those_of_the_weight_with_the_adapter():
    base = every()
    program = base.apply(surgery.Quantize(target="all", format="int8"))
    program = randomise(program.apply(surgery.Lora(target="all", rank=2)))
    merged = program.merge(quantized="requantize")
    assert merge_of(merged).options["into_codes"] == {"lora": len(program.journal.find("lora")[0].sites)}
    assert merge_of(merged).options["kept"] == {}
    own = program.tensors
    site = next(s for s in program.sites if s.path == "linear")
    wanted = Probe(program).stored(site) + 8 * own["linear.lora.B"].detach() @ own["linear.lora.A"].detach()
    layout = Layout.of(site, "int8")
    given = Probe(merged).stored(next(s for s in merged.sites if s.path == "linear"))
    torch.testing.assert_close(given, layout.decode(layout.encode(wanted)))
    assert not any("lora" in str(node.target) for node in merged.graph.nodes if node.op == "get_attr")
    # int8 of weights of this width: 0.4% of each, through four ops.
    assert observe(program.run(), merged.run()).difference <= 2e-2


@pytest.mark.parametrize(
    ("format", "options", "budget", "how"),
    [
        ("int8", {}, 0.1, "requantize"),
        ("int4", {}, 0.02, "keep"),
        ("int4", {}, 0.6, "requantize"),
        ("int4", {"method": "gptq"}, 0.6, "requantize"),
    ],
)
def test_chosen_by_the_error_of_outputs(format, options, budget, how, encoder):
    program = adapted(encoder, format, **options)
    if how == "keep":
        with pytest.raises(PassError, match=r"stays at 8 of 8 sites; .*new codes lose \d"):
            program.merge(quantized="auto", budget=budget)
        return
    merged = program.merge(quantized="auto", budget=budget)
    choices = merge_of(merged).options["choices"]
    assert {choice["how"] for choice in choices.values()} == {how}
    probe = Probe(program)
    for path, choice in choices.items():
        before, after = (next(s for s in p.sites if s.path == path) for p in (program, merged))
        x = torch.cat([v.reshape(-1, v.shape[-1]) for v in probe.inputs(before)])
        name = next(n for n in program.tensors if n.startswith(f"{path}.lora.")).rpartition(".")[0]
        update = program.tensors[f"{name}.B"].detach() @ program.tensors[f"{name}.A"].detach() * (16 / 4)
        wanted = x @ (probe.stored(before) + update).T
        given = x @ Probe(merged).stored(after).T
        assert choice["errors"]["requantize"] == pytest.approx(
            float((wanted - given).norm() / wanted.norm()), rel=1e-2
        )
        added = float((x @ update.T).norm())
        assert choice["lost"] == pytest.approx(float((wanted - given).norm()) / added, rel=1e-2)
        assert choice["lost"] <= budget


def test_a_correction_takes_less_room_or_the_branch_stays(encoder):
    """Wide adapters: a correction of smaller rank is within the budget where new codes alone are not."""
    program = encoder.apply(surgery.Quantize(target="attn.*", format="int4"))
    program = randomise(program.apply(surgery.Lora(target="attn.*", rank=64)))
    plain = program.merge(quantized="requantize")
    assert min(c["lost"] for c in merge_of(plain).options["choices"].values()) > 0.5
    merged = program.merge(quantized="auto", budget=0.5)
    for choice in merge_of(merged).options["choices"].values():
        assert choice["how"] == "residual"
        assert 1 <= choice["rank"] < 64
        assert choice["lost"] <= 0.5
    nearer, further = (observe(program.run(), p.run()).difference for p in (merged, plain))
    assert nearer < further


def test_nothing_learned_is_nothing_lost(encoder):
    """A new adapter adds nothing: it is removed, and codes stay bit for bit, also in formats that would round again."""
    program = encoder.apply(surgery.Quantize(target="attn.*", format="ternary"))
    merged = program.apply(surgery.Lora(target="attn.*", rank=2)).merge(quantized="auto")
    assert merge_of(merged).options["into_codes"] == {"lora": 8}
    assert observe(program.run(), merged.run()).equal


@pytest.mark.parametrize("how", [pytest.param("requantize", marks=pytest.mark.slow), "residual"])
def test_saved_loaded_exported_and_undone(how, encoder, tmp_path):
    program = adapted(encoder, "int4")
    merged = program.merge(quantized=how)
    merged.save(tmp_path / "merged")
    assert observe(surgery.load(str(tmp_path / "merged")).run(), merged.run()).equal
    assert observe(merged.undo("merge").run(), program.run()).equal
    report = merged.export(tmp_path / "model.onnx")
    assert report.parity.error <= 1e-5
    assert not any(
        "lora" in name or name.endswith(".quantize.codes") for name in report.stored if "attn" in name
    )
    assert any(name.endswith(".quantize_merge.codes") for name in report.stored)
    module = merged.module().train()
    assert module(**encoder.example_inputs[1])["logits"].shape == (2, 2)


def test_what_cannot_go_into_codes_stays_and_says_why(encoder):
    ia3 = find_pass(encoder.base.plugins, "ia3").cls
    program = encoder.apply(surgery.Quantize(target="attn.*", format="int8")).apply(
        surgery.Lora(target="attn.*,mlp.up", rank=2), ia3(target="attn.v")
    )
    merged = randomise(program).merge(quantized="requantize")
    kept = merge_of(merged).options["kept"]
    assert "changes the bias too" in kept["ia3"]
    assert "its branch stays at 4 of 10 sites" in kept["lora"]
    assert observe(program.run(), merged.run()).difference <= 2e-2
    with pytest.raises(PassError, match="quantized is 'best'; give one of keep, requantize, residual, auto"):
        program.merge(quantized="best")
    with pytest.raises(PassError, match="the budget is -1"):
        program.merge(quantized="auto", budget=-1)


def test_data_that_does_not_fit(encoder):
    pass_ = surgery.Quantize(target="attn.*", format="int4", method="gptq")
    _, inputs = encoder.example_inputs
    narrow = {name: value[0] for name, value in inputs.items()}
    with pytest.raises(
        PassError, match=r"data set 1: the input .* has shape .*, and the model takes \[any, any\]"
    ):
        encoder.apply(pass_, data=[((), narrow)])
    module = surgery.capture(nn.Sequential(nn.Linear(64, 8)).eval(), (torch.randn(2, 64),))
    with pytest.raises(PassError, match=r"data set 2: .* contains inf or NaN; clean the data"):
        module.apply(
            surgery.Quantize(target="all", method="gptq"),
            data=[((torch.randn(3, 64),), {}), ((torch.full((3, 64), torch.nan),), {})],
        )
    with pytest.raises(PassError, match=r"has shape \[3, 32\], and the model takes \[any, 64\]"):
        module.apply(surgery.Quantize(target="all", method="gptq"), data=[((torch.randn(3, 32),), {})])


def test_command_line(tmp_path, capsys):
    model, out = f"hf:{minilm_path()}", tmp_path / "adapted"
    given = ["apply", model, "--pass", "quantize", "--target", "attn.*", "--format", "int4"]
    merged = tmp_path / "merged"
    for command in (
        [*given, "--pass", "lora", "--target", "attn.q", "-o", str(out)],
        ["merge", str(out), "--quantized", "auto", "--budget", "0.2", "-o", str(merged)],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "put lora into codes" in said
    assert said.count("requantize") == 6
