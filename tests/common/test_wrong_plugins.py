"""Plugins with a mistake, installed by pip or as pip would do it: named, left out, and the rest works."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from torch import nn

import surgery
from surgery.api import LINEAR, PassError, WeightOp, hookimpl
from surgery.api.programs import JournalError, LoadError, PluginError, make_plugin_manager
from surgery.engine.registry import passes
from surgery.testing import check_pass
from tests.common.test_plugins import cli
from tests.shared.installed import COMMAND, PASS, install

HEAD = """
from typing import ClassVar
import torch
from surgery.api import LINEAR, RewritePass, WeightOp, hookimpl

"""

# Source of a plugin -> what is said about it.
WRONG = {
    "returns None": (
        "@hookimpl\ndef surgery_passes():\n    pass\n",
        "returns None from surgery_passes; return a list",
    ),
    "returns a class": (
        "@hookimpl\ndef surgery_passes():\n    return RewritePass\n",
        "return a list of classes, such as [MyPass]",
    ),
    "registers an instance": (
        "@hookimpl\ndef surgery_passes():\n    return [3]\n",
        "registers 3, which is not a pass class",
    ),
    "without the mark": (
        "def surgery_passes():\n    return []\n",
        "surgery_passes is not marked; put @hookimpl",
    ),
    "without a hook": ("value = 3\n", "has no hook of surgery; name a module"),
    "misspelt": ("@hookimpl\ndef surgery_pases():\n    return []\n", "surgery_pases"),
    "raises": (
        "@hookimpl\ndef surgery_passes():\n    return [1 / 0]\n",
        "fails in surgery_passes: ZeroDivisionError",
    ),
    "an old member": (
        "class Old(RewritePass):\n    name = 'old'\n    mergeable: ClassVar = True\n\n"
        "@hookimpl\ndef surgery_passes():\n    return [Old]\n",
        "defines 'mergeable', which passes no longer have",
    ),
    "an objective that is none": (
        "@hookimpl\ndef surgery_objectives():\n    return [RewritePass]\n",
        "which is not a objective class",
    ),
    "an unknown kind": (
        "@hookimpl\ndef surgery_weight_ops():\n"
        "    return {torch.ops.aten.relu.default: WeightOp('dense', 'self', ('self',), None)}\n",
        "has the kind 'dense'; use one of linear, conv",
    ),
    "an unknown argument": (
        "@hookimpl\ndef surgery_weight_ops():\n"
        "    return {torch.ops.aten.bilinear.default: WeightOp(LINEAR, 'input1', ('weights',))}\n",
        "has no argument 'weights'; did you mean 'weight'",
    ),
    "an op without overload": (
        "@hookimpl\ndef surgery_weight_ops():\n"
        "    return {torch.ops.aten.bilinear: WeightOp(LINEAR, 'input1')}\n",
        "is no overload of an op",
    ),
    "another layout": (
        "@hookimpl\ndef surgery_weight_ops():\n"
        "    return {torch.ops.aten.bilinear.default: WeightOp(LINEAR, 'input1', layout='vd')}\n",
        "has the layout 'vd'",
    ),
    "schemes": (
        "@hookimpl\ndef surgery_load_schemes():\n    return 'hub'\n",
        "returns 'hub' from surgery_load_schemes",
    ),
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs a plugin where this process finds it."""

    def add(distribution: str, source: str, version: str = "1.2"):
        module = distribution.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        for folder in (tmp_path / f"{module}-{version}.dist-info", tmp_path / "__pycache__"):
            shutil.rmtree(folder, ignore_errors=True)
        install(tmp_path, distribution, source, version)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    return add


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plugin_is_named_and_left_out(name, installed):
    source, says = WRONG[name]
    slug = "wrong-" + name.replace(" ", "-").replace("'", "")
    installed(slug, HEAD + source)
    installed("good-beside", PASS.format(cls="Good", name="good"))
    plugins = make_plugin_manager()
    module = slug.replace("-", "_")
    assert list(plugins.broken) == [f"{slug} ({module})"]
    assert says in plugins.broken[f"{slug} ({module})"], plugins.broken
    assert {"good", "lora"} <= passes(plugins).keys()
    program = surgery.capture(nn.Linear(4, 3), (torch.randn(2, 4),), plugins=plugins)
    assert torch.equal(program.apply(surgery.Lora(target="all")).run(), program.run())


def test_an_entry_point_to_something_else(installed, tmp_path):
    installed("points-elsewhere", HEAD + "value = 3\n")
    info = tmp_path / "points_elsewhere-1.2.dist-info" / "entry_points.txt"
    info.write_text("[surgery]\na = points_elsewhere:value\nb = points_elsewhere:missing\n")
    broken = make_plugin_manager().broken
    assert "has no hook of surgery" in broken["points-elsewhere (points_elsewhere:value)"]
    assert "AttributeError" in broken["points-elsewhere (points_elsewhere:missing)"]


def test_what_would_replace_a_built_in_part_is_left_out(installed, tmp_path):
    installed(
        "replaces-things",
        HEAD
        + "@hookimpl\ndef surgery_weight_ops():\n"
        + "    return {torch.ops.aten.linear.default: WeightOp(LINEAR, 'weight', ('input',), None),\n"
        + "            torch.ops.aten.bilinear.default: WeightOp(LINEAR, 'input1')}\n"
        + "@hookimpl\ndef surgery_writers():\n    return {'onnx': print, 'own': print}\n"
        + "@hookimpl\ndef surgery_load_schemes():\n    return ['hf', 'own']\n"
        + "@hookimpl\ndef surgery_load_model(ref, options):\n    raise ValueError('asked for ' + ref)\n"
        + "@hookimpl\ndef surgery_commands(cli):\n    import click\n"
        + "    cli.add_command(click.Command('apply'))\n    cli.add_command(click.Command('other'))\n",
    )
    plugins = make_plugin_manager()
    assert plugins.weight_ops[torch.ops.aten.linear.default].x == "input"
    assert torch.ops.aten.bilinear.default in plugins.weight_ops
    assert plugins.writers["onnx"] is not print
    assert "own" in plugins.writers
    done = cli(tmp_path, "passes")
    for said in (
        "aten.linear.default of 'torch-surgery'",
        "onnx of 'torch-surgery'",
        "hf: references",
        "'apply'",
    ):
        assert any(said in line and "replaces-things" in line for line in done.stderr.splitlines()), said
    assert "Options:" in cli(tmp_path, "apply", "--help").stdout
    assert cli(tmp_path, "other").returncode == 0


# -- loaders


LOADER = """
@hookimpl
def surgery_load_schemes():
    return ["toy"]

@hookimpl
def surgery_load_model(ref, options):
    if not ref.startswith("toy:"):
        raise ValueError(f"asked for {ref}")
    from surgery.api.programs import LoadedModel
    torch.manual_seed(0)
    module = torch.nn.Linear(int(ref[4:]), 3).eval()
    return LoadedModel(module, (torch.randn(2, int(ref[4:])),), unsourced=frozenset(module.state_dict()))
"""


def test_a_loader_is_asked_only_for_its_scheme(installed, tmp_path, monkeypatch):
    installed("toy-hub", HEAD + LOADER, "3.1")
    program = surgery.load("toy:5")
    assert program.run().shape == (2, 3)
    assert surgery.load("py:tests.shared.models:attention")
    with pytest.raises(LoadError, match="is not a model reference"):
        surgery.load("nothing:here")
    with pytest.raises(LoadError, match="did you mean 'toy:'"):
        surgery.load("toyy:5")
    program.apply(surgery.Lora(target="all", rank=2)).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "surgery.json").read_text())
    assert saved["base"]["loader"] == {"distribution": "toy-hub", "version": "3.1"}
    assert surgery.load(str(tmp_path / "saved")).journal.entries[-1].id == "lora"
    # Not installed any more.
    without = make_plugin_manager(entry_points=False)
    with pytest.raises(LoadError, match="toy:5, is loaded by the plugin 'toy-hub'; pip install toy-hub"):
        surgery.load(str(tmp_path / "saved"), plugins=without)
    installed(
        "toy-hub", HEAD + LOADER.replace("torch.nn.Linear(int(ref[4:]), 3)", "torch.nn.Missing()"), "3.1"
    )
    with pytest.raises(PluginError, match="plugin 'toy-hub' fails in surgery_load_model: AttributeError"):
        surgery.load("toy:5")
    wrong = LOADER.replace("    return LoadedModel(", "    return str(LoadedModel(").replace(
        "state_dict()))", "state_dict())))"
    )
    installed("toy-hub", HEAD + wrong, "3.1")
    with pytest.raises(PluginError, match="plugin 'toy-hub' returns str for 'toy:5'; return a LoadedModel"):
        surgery.load("toy:5")


# -- versions


class Versions:
    """Plugins with versions of one pass."""

    @staticmethod
    def first():
        class Gate(surgery.api.RewritePass):
            """Version 1: the tensor is called gate, the option strength."""

            name = "versioned"
            strength: float = 1.0

            def tensors(self, site):
                return {"gate": surgery.api.TensorSpec((site.out_features,), nn.init.ones_)}

            def rewrite(self, site, g):
                return g.call(torch.ops.aten.mul.Tensor, g.output, g["gate"])

        return Gate

    @staticmethod
    def second(how="moved"):
        class Gate(surgery.api.RewritePass):
            """Version 2: the tensor is called g and is the logarithm; the option is called power."""

            name = "versioned"
            version = 2
            power: float = 1.0

            def tensors(self, site):
                return {"g": surgery.api.TensorSpec((site.out_features,), nn.init.zeros_)}

            def rewrite(self, site, g):
                return g.call(torch.ops.aten.mul.Tensor, g.output, g.call(torch.ops.aten.exp.default, g["g"]))

        if how == "moved":

            def migrate(cls, options, tensors, version):
                assert version == 1
                return (
                    {**{k: v for k, v in options.items() if k != "strength"}, "power": options["strength"]},
                    {"g": tensors["gate"].log()},
                )

            Gate.migrate = classmethod(migrate)
        elif how == "fails":
            Gate.migrate = staticmethod(lambda options, tensors, version: options["nothing"])
        return Gate


def manager(cls):
    class Gates:
        @staticmethod
        @hookimpl
        def surgery_passes():
            return [cls]

    return make_plugin_manager(plugins=(Gates,))


def test_an_older_directory_is_migrated_or_refused_with_both_versions(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), (torch.randn(2, 4),)
    old, new = manager(Versions.first()), manager(Versions.second())
    base = surgery.capture(net, x, plugins=old)
    program = base.apply(passes(old)["versioned"].cls(target="all", strength=2.0))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.uniform_(0.5, 2)
    program.save(tmp_path / "old")
    now = surgery.capture(net, x, plugins=new)
    loaded = surgery.load(str(tmp_path / "old"), base=now, plugins=new)
    torch.testing.assert_close(loaded.run(), program.run())
    entry = loaded.journal.entries[-1]
    assert (entry.version, entry.options["power"]) == (2, 2.0)
    assert set(loaded.tensors) == {"0.versioned.g", "1.versioned.g"}
    assert all(loaded.trains(name) and isinstance(t, nn.Parameter) for name, t in loaded.tensors.items())
    loaded.save(tmp_path / "new")
    assert torch.equal(surgery.load(str(tmp_path / "new"), base=now, plugins=new).run(), loaded.run())
    # Newer than what is installed; older without a migrate; a migrate that fails.
    with pytest.raises(
        JournalError, match=r"by version 2 of the pass 'versioned' \(Gates\), and version 1 \(Gates\)"
    ):
        surgery.load(str(tmp_path / "new"), base=base, plugins=old)
    bare = manager(Versions.second("none"))
    with pytest.raises(
        JournalError, match=r"version 1 .*; version 2 \(Gates\) is installed and defines no migrate"
    ):
        surgery.load(str(tmp_path / "old"), base=now, plugins=bare)
    wrong = manager(Versions.second("fails"))
    with pytest.raises(PluginError, match="pass 'versioned' of 'Gates' fails in migrate at 0: KeyError"):
        surgery.load(str(tmp_path / "old"), base=now, plugins=wrong)


# -- exceptions in a plugin's code


def _fails(*_, **__):
    raise RuntimeError("boom")


HOOKS = [
    "find",
    "check",
    "decide",
    "tensors",
    "names",
    "rewrite",
    "outcome",
    "why_not_merged",
    "merge",
    "numerics",
]


@pytest.mark.parametrize("hook", [*HOOKS, "effect", "expectations", "init", "fold", "key", "value"])
def test_an_exception_of_a_pass_names_pass_site_hook_and_distribution(hook):
    from surgery.api import Fold, RewritePass, TensorSpec

    class Broken(Fold):
        def apply(self, weight, original):
            _fails()

    def merge(self, site, tensors, weight):
        return {"key": {"wieght": Broken()}, "value": {"weight": tensors["s"]}}.get(
            hook, {"weight": Broken()}
        )

    members = {
        "__module__": "my_plugin",
        "name": "failing",
        "__doc__": "Test.",
        "tensors": lambda self, site: {
            "s": TensorSpec((site.out_features,), _fails if hook == "init" else nn.init.ones_)
        },
        "rewrite": lambda self, site, g: g.call(torch.ops.aten.mul.Tensor, g.output, g["s"]),
        "merge": merge,
    }
    if hook in ("numerics", "effect", "expectations"):
        members[hook] = property(_fails)
    elif hook in HOOKS:
        members[hook] = lambda self, *args: _fails()
    plugins = manager(type(RewritePass)("Failing", (RewritePass,), members))

    def use():
        program = surgery.capture(nn.Linear(4, 3), (torch.randn(2, 4),), plugins=plugins)
        program.apply(passes(plugins)["failing"].cls(target="all"), verify=False).merge()

    with pytest.raises(surgery.SurgeryError) as error:
        use()
    text = str(error.value)
    assert "failing" in text
    if hook not in ("key", "value"):
        assert "Gates" in text
        assert "RuntimeError: boom" in text
    named = {"init": "tensors", "fold": "merge", "key": "wieght", "value": "return a Fold"}.get(hook, hook)
    assert named in text
    if hook not in ("find", "numerics", "effect", "expectations"):
        assert "weight" in text  # the path of the site of a bare layer


# -- ops and docstrings


def test_a_weight_in_a_buffer_is_said():
    """A packed weight has to be a parameter, or no pass finds it."""
    op = torch.ops.surgery_tests.quantized_linear.default

    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.randint(-9, 9, (5, 8), dtype=torch.int8))
            self.register_buffer("scales", torch.rand(5))
            self.bias = nn.Parameter(torch.randn(5))

        def forward(self, x):
            return op(x, self.packed, self.scales, self.bias)

    class Ops:
        @staticmethod
        @hookimpl
        def surgery_weight_ops():
            return {op: WeightOp(LINEAR, "x", ("packed", "scales"))}

    plugins = make_plugin_manager(plugins=(Ops,))
    net = nn.Sequential(Buffered(), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match=r"0\.packed, the weight of .*, is a buffer.*requires_grad=False"):
        program = surgery.capture(net, (torch.randn(2, 8),), plugins=plugins)
    assert [site.path for site in program.sites] == ["1"]


def test_brackets_in_docstrings_survive(tmp_path):
    source = PASS.format(cls="Good", name="good").replace(
        '"""Changes nothing."""', '"""W[i] becomes [bold]W[j][/bold]."""\n    sizes: list[int] = [3]'
    )
    install(tmp_path, "brackets-here", source)
    for command in (("passes",), ("passes", "good")):
        assert "W[i] becomes [bold]W[j][/bold]." in cli(tmp_path, *command).stdout


# -- really installed


def test_pip_installs_a_plugin_and_the_kit_passes_it(tmp_path, monkeypatch):
    """A distribution that pip builds and installs; its pass is found by name, in this process and in another."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[project]\nname = "really-installed"\nversion = "0.3"\n'
        '[project.entry-points.surgery]\nown = "really_installed"\n'
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[tool.setuptools]\npy-modules = ["really_installed"]\n'
    )
    (source / "really_installed.py").write_text(PASS.format(cls="Own", name="own"))
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("setuptools is not installed, so pip cannot build")
    assert not done.returncode, done.stderr
    monkeypatch.syspath_prepend(str(target))
    assert metadata.version("really-installed") == "0.3"
    own = passes(make_plugin_manager())["own"]
    assert (own.distribution, own.version) == ("really-installed", "0.3")
    program = surgery.load("py:tests.shared.models:attention")
    report = check_pass(own.cls(target="all-linear"), program, checks=["numerics", "reload", "undo"])
    assert "another process" in report.passed["reload"]
    with pytest.raises(PassError, match="has no option --rnak"):
        own.cls.parse({"rnak": 3})


def test_a_command_of_a_plugin_still_works(tmp_path):
    install(tmp_path, "surgery-good", PASS.format(cls="Good", name="good") + COMMAND)
    assert cli(tmp_path, "hello").stdout == "hello from a plugin\n"
