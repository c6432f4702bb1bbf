"""Passes and objectives without a package: classes given to `apply` and files given with --plugin."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch import nn

import surgery
from surgery.api import Field, PassError, PluginError, RewritePass, TensorSpec
from surgery.api.programs import make_plugin_manager
from surgery.testing import check_pass
from tests.shared import commands

FILE = '''
from __future__ import annotations
from typing import ClassVar
import torch
from surgery.api import Field, RewritePass, Site, TensorSpec


class Shift(RewritePass):
    """Shift: y = W x becomes W x + s·v, with a trained vector v that starts at zero."""

    name: ClassVar[str] = "shift"
    strength: float = Field(1.0, description="factor s")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"v": TensorSpec((site.out_features,))}

    def rewrite(self, site, g):
        return g.call(torch.ops.aten.add.Tensor, g.output, g["v"], alpha=self.strength)
'''


class OwnShift(RewritePass):
    """Shift: y = W x becomes W x + s·v, with a trained vector v that starts at zero."""

    name: ClassVar[str] = "own-shift"
    strength: float = Field(default=1.0, description="factor s")

    def tensors(self, site):
        return {"v": TensorSpec((site.out_features,))}

    def rewrite(self, site, g):
        return g.call(torch.ops.aten.add.Tensor, g.output, g["v"], alpha=self.strength * g.weight)


@pytest.fixture
def base():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    return surgery.capture(net.eval(), (torch.randn(3, 6),))


def call(*args) -> tuple[int, str]:
    """Exit code and output of a command line, on one line."""
    code, said = commands.call(*args)
    return code, " ".join(said.split())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "shift.py"
    path.write_text(FILE)
    return path


def test_an_unregistered_class_is_applied_saved_and_checked(base, tmp_path):
    program = base.apply(OwnShift(target="2"))
    with torch.no_grad():
        program.tensors["2.own-shift.v"].fill_(0.5)
    assert torch.allclose(program.run(), base.run() + 0.5, atol=1e-6)  # one addition in fp32
    program.save(tmp_path / "saved")
    assert torch.equal(surgery.load(str(tmp_path / "saved"), base=base).run(), program.run())
    check_pass(OwnShift(target="2"), base, checks=("numerics", "effect", "undo", "reload", "gradients"))


def test_another_manager_asks_for_the_file(base, tmp_path):
    base.apply(OwnShift(target="2")).save(tmp_path / "saved")
    plain = surgery.capture(base.base.loaded.module, base.example_inputs[0])
    with pytest.raises(
        PassError, match=r"'own-shift' comes from test_plugin_files.py, .* --plugin test_plugin_files"
    ):
        surgery.load(str(tmp_path / "saved"), base=plain)
    again = surgery.load(
        str(tmp_path / "saved"), base=plain, plugins=make_plugin_manager(plugins=(OwnShift,))
    )
    assert torch.equal(again.run(), base.run())


def test_a_second_class_of_one_name_is_refused(base):
    other = type("Other", (OwnShift,), {"__module__": "elsewhere"})
    program = base.apply(OwnShift(target="2"))
    with pytest.raises(PassError, match="two passes are named 'own-shift'"):
        program.apply(other(target="0", label="b"))
    nameless = type("Nameless", (OwnShift,), {"name": "", "__module__": __name__})
    with pytest.raises(PassError, match="has no name"):
        base.apply(nameless(target="0"))


def test_a_file_on_the_command_line(file, tmp_path):
    """The option may stand anywhere; the saved program needs the file again, and its error names it."""
    ref = "py:tests.shared.models:attention"
    where = ("--pass", "shift", "--target", "attn.out", "--strength", "2")
    code, said = call("apply", ref, "--plugin", file, *where, "-o", tmp_path / "a")
    assert code == 0, said
    code, said = call(f"--plugin={file}", "passes", "shift")
    assert code == 0
    assert "factor s" in said
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "inspect", str(tmp_path / "a"), "--base", ref],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "give the file with --plugin shift.py" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    code, said = call("inspect", tmp_path / "a", "--base", ref, "--plugin", file)
    assert code == 0
    assert "applied: shift" in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such Python file"),
        ("x = 1\n", "defines no pass or objective"),
        ("import nowhere_at_all\n", "cannot be run: ModuleNotFoundError"),
        ("def surgery_passes():\n    return []\n", "is not marked"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, reason):
    path = tmp_path / "wrong.py"
    if text is not None:
        path.write_text(text)
    code, said = call("passes", "--plugin", path)
    assert code == 2
    assert reason in said
    with pytest.raises(PluginError, match=reason):
        make_plugin_manager(plugins=(path,))


def test_the_option_needs_a_value():
    code, said = call("passes", "--plugin")
    assert code == 2
    assert "needs the path" in said
