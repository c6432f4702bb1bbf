"""Python blocks of the pages that are run with models of the tests, and a check that every block is run somewhere."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import surgery
from surgery.api import RewritePass
from surgery.api.patterns import OpIndex, find
from surgery.api.programs import make_plugin_manager
from surgery.testing import check_pass
from tests.docs.blocks import blocks, pages, python_block
from tests.docs.test_pages import RUN
from tests.shared import models, stacks
from tests.shared.example_plugins import example_plugin


def test_the_whole_plugin(monkeypatch):
    source = python_block("docs/plugins.md", "def surgery_passes")
    written: dict[str, object] = {"__name__": "gate_plugin"}
    exec(compile(source, "page", "exec"), written)
    (gate,) = written["surgery_passes"]()  # type: ignore[operator]

    module, inputs = models.attention()
    manager = make_plugin_manager(entry_points=False, plugins=(SimpleNamespace(**written),))
    program = surgery.capture(module, inputs, dynamic={"x": {0: "batch"}}, plugins=manager)
    report = check_pass(gate(target="attn.*"), program, checks=("numerics", "merge", "weights", "gradients"))
    assert [outcome.status for outcome in report.outcomes] == ["passed"] * 4


def test_a_schedule(minilm):
    """The block under "Techniques", for two steps."""
    source = python_block("docs/tutorial.md", "module.advance")
    steps = source.replace("range(1000)", "(0, 100)").replace(
        "    ...", "    SEEN.append(module.advance(step))"
    )
    place: dict[str, object] = {"surgery": surgery, "torch": torch, "program": minilm, "SEEN": []}
    exec(compile(steps, "page", "exec"), place)
    first, later = place["SEEN"]  # type: ignore[misc]
    assert first
    assert set(first) < set(later)


def test_in_place(tmp_path):
    """The block under "In place", on a small llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = python_block("docs/live.md", "surgery.apply_")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 99, (2, 5))
    before, seen = model(ids).logits, []
    steps = source.replace('"adapted"', repr(str(tmp_path / "adapted")))
    steps = re.sub(r"^( *)\.\.\..*$", r"\1SEEN.append(model(IDS).logits)", steps, flags=re.M)
    steps = steps.replace("SEEN.append", "RANDOMISE(program); SEEN.append", 1)

    def randomise(program):
        with torch.no_grad():
            for tensor in program.tensors.values():
                tensor.normal_()

    place = {"surgery": surgery, "model": model, "IDS": ids, "SEEN": seen, "RANDOMISE": randomise}
    exec(compile(steps, "page", "exec"), place)
    both, film, mixed = seen
    assert torch.equal(both, film)
    assert not torch.allclose(film, before, atol=1e-3)
    torch.testing.assert_close(mixed[0], film[0])
    torch.testing.assert_close(mixed[1], before[1])
    assert torch.equal(model(ids).logits, before)
    assert (tmp_path / "adapted" / "surgery.json").is_file()


def test_from_python(tmp_path, minilm):
    """The block under "From Python", with MiniLM instead of the path."""
    source = python_block("docs/tutorial.md", "import surgery\n\nprogram = surgery.load")
    steps = source.replace("...  # any training loop", "STEP()")
    steps = re.sub(r"program = surgery\.load\(.*\)\n", "program = MINILM\n", steps, count=1)
    steps = steps.replace('"adapted"', repr(str(tmp_path / "adapted")))
    steps = steps.replace('"model.onnx"', repr(str(tmp_path / "model.onnx")))
    place: dict[str, object] = {"torch": torch, "MINILM": minilm}

    def step():
        module, optimizer = place["module"], place["optimizer"]
        ids = torch.randint(5, 1000, (2, 12))
        logits = module(ids, torch.ones_like(ids), torch.zeros_like(ids))["logits"]  # type: ignore[operator]
        logits.logsumexp(-1).sum().backward()
        optimizer.step()  # type: ignore[attr-defined]
        module.eval()  # type: ignore[attr-defined]

    place["STEP"] = step
    exec(compile(steps, "page", "exec"), place)
    assert surgery.load(str(tmp_path / "adapted")).journal.find("lora")
    assert (tmp_path / "model.onnx").is_file()


# Where the ```python blocks of pages that are not run as a whole are run: a text of the block -> the test.
ELSEWHERE = {
    "def surgery_capture_patches": "test_a_model_of_your_own",
    "def surgery_passes": "test_the_whole_plugin",
    "module.advance": "test_a_schedule",
    "surgery.apply_": "test_in_place",
    "import surgery\n\nprogram = surgery.load": "test_from_python",
    "def silu": "test_a_pattern",
    "from my_package import Gate": "test_the_test_of_the_plugin",
    "class Shift(Fold)": "test_a_fold",
    "class AfterBlock": "test_blocks",
    "class Int8Matmul": "test_another_op",
    "def migrate": "test_a_migration",
    "open_generator": "tests/export/test_generation.py",
}


def test_every_block_is_run():
    others = [b for page in pages() if page not in RUN for b in blocks(page) if b.language == "python"]
    missing = [b for b in others if not any(marker in b.text for marker in ELSEWHERE)]
    assert not missing, f"no test runs these blocks: {missing}"
    assert all(any(marker in b.text for b in others) for marker in ELSEWHERE)


def gate_plugin(monkeypatch):
    """The plugin of docs/plugins.md, as the module my_package."""
    written = ModuleType("my_package")
    exec(python_block("docs/plugins.md", "def surgery_passes"), written.__dict__)
    monkeypatch.setitem(sys.modules, "my_package", written)
    return written


def test_the_test_of_the_plugin(monkeypatch, capsys):
    gate_plugin(monkeypatch)
    place: dict[str, object] = {}
    exec(python_block("docs/plugins.md", "from my_package import Gate"), place)
    place["test_gate"]()  # type: ignore[operator]
    assert "merge" in capsys.readouterr().out


def test_a_fold(monkeypatch):
    monkeypatch.setitem(sys.modules, "shift_page", page := ModuleType("shift_page"))
    exec(python_block("docs/plugins.md", "class Shift(Fold)"), page.__dict__)
    shift = page.Shift(torch.tensor([1.0, 2.0]))
    assert shift.apply(torch.zeros(2), None).tolist() == [1, 2]


def test_blocks():
    """The kit, and one MLP for each of the two blocks of a small encoder."""
    place: dict[str, object] = {"__name__": "block_page"}
    exec(python_block("docs/plugins.md", "class AfterBlock"), place)
    module, inputs = stacks.stack()
    program = surgery.capture(module, inputs)
    cls: Any = place["AfterBlock"]
    count = sum(len(row) for row in program.view.blocks)
    assert count > 1
    assert len(program.plan(cls()).passes[-1].accepted) == count
    checks = ("numerics", "inserted", "effect", "weights", "undo", "gradients", "foreign")
    print(check_pass(cls(), program, checks=checks))


def test_another_op():
    """The class with the op of the example plugin gives what the example plugin gives."""
    plugin = example_plugin("int8_matmul")
    place: dict[str, object] = {"__name__": "op_page", "to_onnx": plugin._onnx}
    exec(python_block("docs/plugins.md", "class Int8Matmul"), place)
    module, inputs = models.attention()
    program = surgery.capture(module, inputs)
    page, ours = (cls(target="attn.*") for cls in (place["Int8Matmul"], plugin.Int8Matmul))  # type: ignore[operator]
    (found, want) = (surgery.capture(module, inputs).apply(pass_).run()[0] for pass_ in (page, ours))
    assert torch.equal(found, want)
    assert not torch.equal(found, program.run()[0])


def test_a_migration(monkeypatch):
    """A directory of version 1 held the gate itself; version 2 holds its logarithm."""
    place = {"RewritePass": RewritePass, "__name__": "gate_page"}
    exec(python_block("docs/plugins.md", "def migrate"), place)
    options, tensors = place["Gate"].migrate({}, {"gate": torch.ones(3)}, 1)  # type: ignore[attr-defined]
    assert options == {}
    assert tensors["g"].tolist() == [0, 0, 0]


def test_a_pattern():
    """silu in both forms is found in a captured module."""
    place: dict[str, object] = {"__name__": "silu_page"}
    exec(python_block("docs/quantization.md", "def silu"), place)

    class Both(torch.nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x) + x * torch.reciprocal(torch.exp(-x) + 1)

    program = surgery.capture(Both(), (torch.randn(2, 3),))
    assert len(find(OpIndex(program.graph), place["silu"]).matches) == 2  # type: ignore[arg-type]


def test_a_model_of_your_own(capsys):
    """The block under "Your own model": its loop is replaced while it is captured."""
    source = python_block("docs/recurrences.md", "surgery_capture_patches")
    exec(compile(source, "page", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == "True\n"
