"""Code blocks of the README run as written."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch

import surgery
from surgery.api.programs import make_plugin_manager
from surgery.testing import check_pass
from tests.shared import models

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_whole_plugin(monkeypatch):
    (source,) = (block for block in BLOCKS if "def surgery_passes" in block)
    written: dict[str, object] = {"__name__": "gate_plugin"}
    exec(compile(source, "README.md", "exec"), written)
    (gate,) = written["surgery_passes"]()  # type: ignore[operator]

    module, inputs = models.attention()
    manager = make_plugin_manager(entry_points=False, plugins=(SimpleNamespace(**written),))
    program = surgery.capture(module, inputs, dynamic={"x": {0: "batch"}}, plugins=manager)
    report = check_pass(gate(target="attn.*"), program, checks=("numerics", "merge", "weights", "gradients"))
    assert [outcome.status for outcome in report.outcomes] == ["passed"] * 4


def test_a_schedule(minilm):
    """The block under "Techniques", for two steps."""
    (source,) = (block for block in BLOCKS if "module.advance" in block)
    steps = source.replace("range(1000)", "(0, 100)").replace(
        "    ...", "    SEEN.append(module.advance(step))"
    )
    place: dict[str, object] = {"surgery": surgery, "torch": torch, "program": minilm, "SEEN": []}
    exec(compile(steps, "README.md", "exec"), place)
    first, later = place["SEEN"]  # type: ignore[misc]
    assert first
    assert set(first) < set(later)


def test_in_place(tmp_path):
    """The block under "In place", on a small llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    (source,) = (block for block in BLOCKS if "surgery.apply_" in block)
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
    exec(compile(steps, "README.md", "exec"), place)
    both, film, mixed = seen
    assert torch.equal(both, film)
    assert not torch.allclose(film, before, atol=1e-3)
    torch.testing.assert_close(mixed[0], film[0])
    torch.testing.assert_close(mixed[1], before[1])
    assert torch.equal(model(ids).logits, before)
    assert (tmp_path / "adapted" / "surgery.json").is_file()


def test_from_python(tmp_path, minilm):
    """The block under "From Python", with MiniLM instead of the path."""
    (source,) = (block for block in BLOCKS if "import surgery\n\nprogram = surgery.load" in block)
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
    exec(compile(steps, "README.md", "exec"), place)
    assert surgery.load(str(tmp_path / "adapted")).journal.find("lora")
    assert (tmp_path / "model.onnx").is_file()
