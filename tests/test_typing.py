"""What mypy says of a user's file: nothing of correct calls, and a line for each wrong option and type.

mypy runs as for a user: surgery is a package with py.typed, and the plugin of pydantic is not installed in the
configuration.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import surgery

RIGHT = """
from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import surgery
from surgery.api import ADAPTER, LINEAR, Field, RewritePass, rounded
from surgery.api.training import Classification, Settings
from surgery.testing import check_pass


class Gate(RewritePass):
    name: ClassVar[str] = "gate"
    on = (LINEAR,)
    effect = replace(ADAPTER, scalable=True)
    numerics = rounded(1e-3, "a gate of one is rounded")

    power: int = Field(default=1, gt=0, description="power of the gate")


program = surgery.load("hf:x", task="text-classification")
adapted = program.apply(surgery.Lora(target="attn.*", label="film"), Gate(target="all", power=2), freeze_base=True)
program.plan(surgery.Quantize(target="all", format="nf4"), surgery.Full())
report = adapted.export("model.onnx", opset=18)
size: int = report.size
adapted.export_generation("dir", overwrite=True)
adapted.combine({"a": 1.0}, label="b", rank=4)
check_pass(Gate(target="all"), program, checks=("merge",))
Settings(steps=3, lr=1e-3)
Classification(text="review")
"""

# Line of a user -> what mypy says of it.
WRONG = {
    'surgery.Lora(target="all", rnk=8)': 'Unexpected keyword argument "rnk" for "Lora"; did you mean "rank"?',
    'surgery.Lora(target="all", rank="8")': 'Argument "rank" to "Lora" has incompatible type "str"; expected "int"',
    'surgery.Quantize(target="all", format="int9")': 'Argument "format" to "Quantize" has incompatible type',
    'Gate(target="all", powr=2)': 'Unexpected keyword argument "powr" for "Gate"; did you mean "power"?',
    'Gate(target="all", power="2")': 'Argument "power" to "Gate" has incompatible type "str"; expected "int"',
    'program.apply("lora")': 'Argument 1 to "apply" of "Program" has incompatible type "str"; expected "Pass"',
    "program.apply(Gate())": "",
    "program.apply(Gate(), freeze=True)": 'Unexpected keyword argument "freeze" for "apply" of "Program"',
    "program.plan(Gate(), datas=())": 'Unexpected keyword argument "datas" for "plan" of "Program"',
    'program.export("m.onnx", tolerence=1)': 'Unexpected keyword argument "tolerence" for "export" of "Program"',
    'program.export("m.onnx", opset="18")': 'Argument "opset" to "export" of "Program" has incompatible type "str"',
    'program.export_generation("d", seed="1")': 'Argument "seed" to "export_generation" of "Program" has incompatible',
    'program.export_adaptable("d", overwrit=True)': 'Unexpected keyword argument "overwrit" for "export_adaptable"',
    'surgery.combine_(program.module(), {}, label="b", rnk=2)': 'Unexpected keyword argument "rnk" for "combine_"',
    'surgery.load("hf:x", tsk="y")': 'Unexpected keyword argument "tsk" for "load"; did you mean "task"?',
    'check_pass(Gate(), program, check=("merge",))': 'Unexpected keyword argument "check" for "check_pass"',
    "Settings(stps=3)": 'Unexpected keyword argument "stps" for "Settings"; did you mean "steps"?',
    "report.sise": '"OnnxResult" has no attribute "sise"',
}


def test_mypy_on_a_users_file(tmp_path):
    lines = RIGHT.splitlines()
    (tmp_path / "user.py").write_text("\n".join([*lines, *WRONG]) + "\n")
    # torch's own types are left out, which takes most of the time and says nothing of ours.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*,transformers.*,sympy.*]\nfollow_imports = skip\n"
    )
    root = str(Path(surgery.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--hide-error-context", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": root, "PYTHONPATH": root, "MYPY_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    said: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if found := re.match(r"user\.py:(\d+): error: (.*)", line):
            assert int(found[1]) not in said, line
            said[int(found[1])] = found[2]
    assert not [line for line in done.stdout.splitlines() if ": error:" in line and "user.py" not in line]
    expected = {len(lines) + n: text for n, text in enumerate(WRONG.values(), 1) if text}
    assert said.keys() == expected.keys(), done.stdout
    for number, text in expected.items():
        assert text in said[number]


def test_defaults_are_given_by_keyword():
    """Type checkers without pydantic's plugin take an option for a required one if its default is positional."""
    root = Path(surgery.__file__).parents[1]
    checked = 0
    for folder in ("surgery", "plugins", "examples"):
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
                    assert not node.args, f"{file}:{node.lineno}: write Field(default=…)"
                    checked += 1
    assert checked > 100
