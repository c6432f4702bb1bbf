"""Each hook with its own plugin; broken, clashing and absent plugins, installed as pip would do it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.api import LINEAR, RewritePass, SurgeryError, WeightOp, hookimpl
from surgery.api.programs import LoadedModel, Pass, PluginError, make_plugin_manager
from surgery.engine.registry import passes
from tests.api.test_api import MODULES
from tests.shared.installed import COMMAND, PASS, install

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


@torch.library.custom_op("surgery_tests::quantized_linear", mutates_args=())
def quantized_linear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return torch.nn.functional.linear(x, packed.to(x.dtype) * scales[:, None], bias)


@quantized_linear.register_fake
def _(x, packed, scales, bias):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _backward(ctx, grad):
    packed, scales = ctx.saved_tensors
    return grad @ (packed.to(grad.dtype) * scales[:, None]), None, None, None


quantized_linear.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:3])
)
QUANTIZED = torch.ops.surgery_tests.quantized_linear.default


@torch.library.custom_op("surgery_tests::own_linear", mutates_args=())
def own_linear(weight: torch.Tensor, data: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return torch.addmm(offset, data, weight)


@own_linear.register_fake
def _(weight, data, offset):
    return data.new_empty((data.shape[0], weight.shape[1]))


OWN = torch.ops.surgery_tests.own_linear.default


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        packed = torch.randint(-127, 128, (5, 8), dtype=torch.int8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(torch.rand(5) / 100, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return quantized_linear(torch.relu(self.first(x)), self.packed, self.scales, self.bias)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.offset = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return own_linear(self.weight, x, self.offset)


class WeightOps:
    @hookimpl
    def surgery_weight_ops(self):
        return {
            QUANTIZED: WeightOp(
                LINEAR, "x", ("packed", "scales"), dequantize=lambda t: t["packed"] * t["scales"][:, None]
            ),
            OWN: WeightOp(LINEAR, "data", ("weight",), "offset", "io"),
        }


class Lowerings:
    @hookimpl
    def surgery_onnx_lowerings(self):
        from onnxscript import opset18 as op

        def lowered(x, packed, scales, bias):
            weight = op.Mul(op.CastLike(packed, x), op.Unsqueeze(scales, [1]))
            return op.Add(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), bias)

        return {QUANTIZED: lowered}


class Negate(RewritePass):
    """Twice the negative of the negative."""

    name = "negate"

    def rewrite(self, site, g):
        return g.call(aten.neg.default, g.call(aten.neg.default, g.output))


class Passes:
    @hookimpl
    def surgery_passes(self):
        return [Negate]


def capture(module, *plugins):
    torch.manual_seed(0)
    manager = make_plugin_manager(plugins=plugins)
    return surgery.capture(module, (torch.randn(3, 6),), plugins=manager)


def test_surgery_passes():
    program = capture(nn.Linear(6, 4), Passes())
    adapted = program.apply(Negate(target="all"))
    assert torch.equal(adapted.run(), program.run())
    assert adapted.journal.entries[-1].distribution == "Passes"
    assert passes(make_plugin_manager()).keys() >= {"lora", "freeze"}
    assert "negate" not in passes(make_plugin_manager())  # no global state


def test_surgery_weight_ops_lets_lora_land_on_an_op_of_ones_own(randomise):
    program = capture(Own(), WeightOps())
    assert [(s.weight, s.layout, s.bias) for s in program.sites] == [("weight", "io", "offset")]
    adapted = randomise(program.apply(surgery.Lora(target="all", rank=2)), 0.5)
    assert not torch.equal(adapted.run(), program.run())
    torch.testing.assert_close(adapted.merge().run(), adapted.run())
    assert not list(capture(Own()).sites)  # without the plugin nobody knows it


def test_lora_lands_on_a_packed_op_and_is_not_folded_into_it(randomise, tmp_path):
    program = capture(Quantized(), WeightOps(), Lowerings())
    adapted = randomise(program.apply(surgery.Lora(target="packed", rank=2)), 0.5)
    assert {t.dtype for t in adapted.tensors.values()} == {torch.float32}
    assert not torch.equal(adapted.run(), program.run())
    with pytest.raises(SurgeryError, match=r"packed for surgery_tests\.quantized_linear"):
        adapted.merge()
    adapted.module()(*adapted.example_inputs[0]).sum().backward()
    assert all(t.grad is not None for t in adapted.tensors.values())
    # On its own the float layer before it does merge; LoRA on the packed one stays.
    both = randomise(adapted.apply(surgery.Lora(target="first", rank=2, label="float")), 0.5)
    merged = both.merge()
    assert merged.journal.entries[-1].options["folded"] == ["lora:float"]
    torch.testing.assert_close(merged.run(), both.run())


def test_surgery_onnx_lowerings(randomise, tmp_path):
    pytest.importorskip("onnxruntime")
    adapted = randomise(
        capture(Quantized(), WeightOps(), Lowerings()).apply(surgery.Lora(target="packed", rank=2)), 0.5
    )
    report = adapted.export(tmp_path / "model.onnx")
    assert report.parity.error < 1e-5
    assert {"packed", *adapted.tensors} <= set(report.stored)
    plain = capture(Quantized(), WeightOps())
    with pytest.raises(SurgeryError, match="quantized_linear"):
        plain.export(tmp_path / "plain.onnx")
    assert not (tmp_path / "plain.onnx").exists()


def test_surgery_load_model(tmp_path):
    class Loader:
        @hookimpl
        def surgery_load_model(self, ref, options):
            if not ref.startswith("toy:"):
                return None
            torch.manual_seed(0)
            width = options.model_kwargs.get("width", 4)
            module = nn.Linear(int(ref[4:]), width).eval()
            return LoadedModel(
                module, (torch.randn(2, int(ref[4:])),), unsourced=frozenset(module.state_dict())
            )

    plugins = make_plugin_manager(plugins=(Loader(),))
    program = surgery.load("toy:6", model_kwargs={"width": 3}, plugins=plugins)
    assert program.run().shape == (2, 3)
    adapted = program.apply(surgery.Lora(target="all"))
    adapted.save(tmp_path / "saved")
    torch.manual_seed(9)
    again = surgery.load(str(tmp_path / "saved"), plugins=plugins)
    assert torch.equal(again.run(), adapted.run())
    with pytest.raises(SurgeryError, match="is not a model reference"):
        surgery.load("toy:6")


def test_surgery_commands():
    import click

    class Commands:
        @hookimpl
        def surgery_commands(self, cli):
            cli.add_command(click.Command("hello"))

    group = click.Group()
    plugins = make_plugin_manager(plugins=(Commands(),))
    for impl in plugins.implementations("surgery_commands"):
        plugins.call(impl, cli=group)
    assert "hello" in group.commands


def test_surgery_after_pass():
    seen = []

    class Watch:
        @hookimpl
        def surgery_after_pass(self, program, result):
            seen.append((result.entry.id, len(program.graph.nodes)))
            if len(result.entry.sites) > 1:
                raise SurgeryError("too large a graph for the board")

    program = capture(nn.Linear(6, 4), Watch())
    adapted = program.apply(surgery.Lora(target="all"))
    assert seen == [("freeze", len(program.graph.nodes)), ("lora", len(adapted.graph.nodes))]
    two = capture(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), Watch())
    with pytest.raises(SurgeryError, match="too large a graph"):
        two.apply(surgery.Lora(target="all"))


@pytest.mark.parametrize(
    "hook", ["surgery_passes", "surgery_weight_ops", "surgery_onnx_lowerings", "surgery_after_pass"]
)
def test_a_hook_that_raises_is_named(hook, tmp_path):
    def fail(self):
        raise KeyError("nothing here")

    def use():
        program = capture(nn.Linear(6, 4), type("Faulty", (), {hook: hookimpl(fail)})())
        program.apply(surgery.Lora(target="all")).export(tmp_path / "x.onnx")

    fail.__name__ = hook
    with pytest.raises(PluginError, match=f"'Faulty' fails in {hook}: KeyError"):
        use()


def test_what_is_no_pass_is_refused():
    class Odd:
        @hookimpl
        def surgery_passes(self):
            return [Pass, int]

    with pytest.raises(PluginError, match="'Odd': it registers"):
        passes(make_plugin_manager(plugins=(Odd(),)))


# -- installed


def cli(folder, *args, code=0):
    path = os.pathsep.join([str(folder), str(ROOT)]) if folder else str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", "from surgery.cli import main; main()", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_broken_plugin_is_named_and_the_rest_work(tmp_path):
    install(tmp_path, "surgery-good", PASS.format(cls="Good", name="good") + COMMAND)
    install(tmp_path, "surgery-broken", "import a_library_that_is_not_there\n")
    raises = (
        "from surgery.api import hookimpl\n@hookimpl\ndef surgery_commands(cli):\n    raise OSError('no')\n"
    )
    install(tmp_path, "surgery-raises", raises)
    misspelt = "from surgery.api import hookimpl\n@hookimpl\ndef surgery_pases():\n    return []\n"
    install(tmp_path, "surgery-misspelt", misspelt)

    done = cli(tmp_path, "passes")
    assert "good" in done.stdout
    assert "surgery-good" in done.stdout
    assert "lora" in done.stdout
    warnings = done.stderr.strip().splitlines()
    assert len(warnings) == 3
    assert "surgery-broken" in done.stderr
    assert "a_library_that_is_not_there" in done.stderr
    assert "surgery_pases" in done.stderr
    assert "'surgery-raises' fails in surgery_commands: OSError" in done.stderr
    assert cli(tmp_path, "hello").stdout == "hello from a plugin\n"


def test_two_passes_of_one_name(tmp_path):
    install(tmp_path, "surgery-one", PASS.format(cls="One", name="twin"))
    install(tmp_path, "surgery-two", PASS.format(cls="Two", name="twin"))
    last = cli(tmp_path, "passes", code=2).stderr.strip()
    assert last.startswith("error: two passes are named 'twin'")
    assert "surgery-one" in last
    assert "surgery-two" in last


def test_a_journal_that_needs_an_absent_plugin_names_its_distribution(tmp_path):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    install(plugins, "surgery-good", PASS.format(cls="Good", name="good"))
    ref, saved = "py:tests.shared.models:attention", tmp_path / "saved"
    cli(plugins, "apply", ref, "--pass", "good", "--target", "all-linear", "-o", saved)
    line = cli(None, "inspect", saved, "--base", ref, code=2).stderr.strip()
    assert line == "error: pass 'good' comes from the plugin 'surgery-good'; pip install surgery-good"
    (plugins / "surgery_good.py").write_text("import a_library_that_is_not_there\n")
    line = cli(plugins, "inspect", saved, "--base", ref, code=2).stderr.strip().splitlines()[-1]
    assert "surgery-good (surgery_good), which does not load" in line


def test_plugins_import_nothing_but_the_api():
    """surgery.api in the code of a plugin, and surgery and surgery.testing besides in its tests."""
    checked = 0
    for plugin in (ROOT / "plugins").glob("torch-surgery-*"):
        for file in plugin.rglob("*.py"):
            if "build" in file.relative_to(plugin).parts:
                continue
            allowed = {"surgery.api", *(f"surgery.api.{name}" for name in MODULES)}
            if "tests" in file.relative_to(plugin).parts:
                allowed |= {"surgery", "surgery.testing"}
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                wrong = [n for n in names if n.split(".")[0] == "surgery" and n not in allowed]
                assert not wrong, f"{file} imports {wrong[0]}"
            checked += 1
    assert checked >= 2
