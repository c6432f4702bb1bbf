"""A program on another device: what it holds, writes and reads there, its training, and live models."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from transformers import LlamaForCausalLM

import surgery
from surgery.capture.devices import placed
from surgery.cli import main
from surgery.common.errors import LoadError
from surgery.engine import module as modules
from surgery.graph.graphs import copy_graph
from tests.shared import tiny
from tests.shared.device import DEVICE, MixedDevices
from tests.train.conftest import save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(path)
    save_tokenizer(path)
    return path


def adapted(ref: str, device: str) -> surgery.Program:
    torch.manual_seed(0)
    return surgery.load(ref, device=device).apply(surgery.Lora(target="attn.*", rank=2))


# -- where the device is


def planted(ref: str) -> list[str]:
    """Errors with a graph whose factory ops stay on the CPU, and with a constant on the CPU."""
    program = surgery.load(ref, device=DEVICE)
    program.run()
    kept, modules.placed, said = modules.placed, lambda graph, device: graph, []
    try:
        surgery.load(ref, device=DEVICE).graph_module(*program.example_inputs[0], **program.example_inputs[1])
    except MixedDevices as error:
        said.append(str(error))
    finally:
        modules.placed = kept
    try:
        program.graph_module(**{name: value.cpu() for name, value in program.example_inputs[1].items()})
    except MixedDevices as error:
        said.append(str(error))
    return said


def test_the_device_refuses_a_tensor_of_the_cpu(apart, folder):
    first, second = apart(planted, f"hf:{folder}")
    # The mask and the rotary positions are made by factory ops, the ids are an input.
    assert f"got tensors on {DEVICE} and on cpu" in first
    assert "embedding" in second
    assert f"got tensors on {DEVICE} and on cpu" in second


def test_a_graph_runs_on_fake_cuda_when_it_is_placed(folder):
    program = adapted(f"hf:{folder}", "cpu")
    module = program.module().graph_module()
    with FakeTensorMode():

        def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        inputs = {name: on_cuda(tensor) for name, tensor in program.example_inputs[1].items()}

        class Fake(fx.Interpreter):
            def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
                return on_cuda(super().get_attr(target, args, kwargs))

            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                # Fakes of torch without CUDA lack these two; a tensor that is there already needs no move.
                leaves = pytree.tree_leaves((args, kwargs))
                if target in (torch.ops.aten.to.device, torch.ops.aten.to.dtype_layout) and all(
                    torch.device(leaf).type == args[0].device.type
                    for leaf in leaves
                    if isinstance(leaf, torch.device)
                ):
                    return args[0].to(next(leaf for leaf in leaves if isinstance(leaf, torch.dtype)))
                return super().call_function(target, args, kwargs)

        def run(graph: fx.Graph) -> str:
            held = fx.GraphModule(module, graph)
            out = Fake(held).run(*inputs.values(), enable_io_processing=False)
            return pytree.tree_leaves(out)[0].device.type

        with torch.no_grad():
            assert run(placed(copy_graph(module.graph), torch.device("cuda"))) == "cuda"
            with pytest.raises(RuntimeError, match="device"):
                run(copy_graph(module.graph))


def test_graphs_and_journals_name_no_device(folder):
    program = adapted(f"hf:{folder}", "cpu")
    written = json.dumps(program.journal.to_json())
    assert "cpu" not in written
    assert "device" not in written
    # Every device in a graph is the one that stands for the program's.
    for node in program.graph.nodes:
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        assert all(leaf.type == "cpu" for leaf in leaves if isinstance(leaf, torch.device))


def captured_hashes(ref: str) -> list[str]:
    """Hash of a graph captured on the CPU, moved to the device, and captured on the device."""
    program = surgery.load(ref)
    module = LlamaForCausalLM.from_pretrained(ref.removeprefix("hf:"))
    surgery.apply_(module.to(DEVICE), surgery.Lora(target="attn.*", rank=2))
    live = surgery.program_of(module)
    return [each.base.graph_hash for each in (program, program.to(DEVICE), live)]


def test_the_hash_does_not_depend_on_the_device(apart, folder):
    assert len(set(apart(captured_hashes, f"hf:{folder}"))) == 1


# -- files


def saved(ref: str, path: str) -> str:
    """Save on both devices, load on both, and export: the journal and the tensors have the same bytes."""
    own, there = adapted(ref, "cpu"), adapted(ref, DEVICE)
    folder = Path(path)
    own.save(folder / "own")
    there.save(folder / "there")
    for file in sorted((folder / "own").iterdir()):
        assert file.read_bytes() == (folder / "there" / file.name).read_bytes(), file.name
    again = surgery.load(str(folder / "there"), device=DEVICE)
    assert again.device.type == DEVICE
    assert surgery.load(str(folder / "there")).device.type == "cpu"
    assert torch.equal(again.run()["logits"].cpu(), there.run()["logits"].cpu())
    there.merge().write(folder / "hf", "hf")
    there.write(folder / "peft", "peft")
    assert there.export(folder / "model.onnx").parity.error < 1e-4
    return there.device.type


def test_files_are_the_same_to_the_byte(apart, folder, tmp_path):
    assert apart(saved, f"hf:{folder}", str(tmp_path)) == DEVICE


# -- moving


def moves(ref: str) -> None:
    own = adapted(ref, "cpu")
    with torch.no_grad():
        for tensor in own.tensors.values():
            tensor.add_(0.01)
    before = own.run()["logits"]
    there = own.to(DEVICE)
    assert there.to(DEVICE) is there
    assert own.device.type == "cpu"
    # A copy: training one leaves the other.
    for name, tensor in there.tensors.items():
        tensor.data.add_(1)
        assert not torch.equal(tensor.cpu(), own.tensors[name])
    there = own.to(DEVICE)
    close = {"atol": 1e-4 * float(before.abs().max()), "rtol": 0}  # another order of the sums
    for program in (there, there.to("cpu"), there.without("lora").weighted({"lora": 1.0})):
        torch.testing.assert_close(program.run()["logits"].cpu(), before, **close)
    # Its module takes the program along, to the device and back.
    module = own.module().to(DEVICE)
    assert own.device.type == DEVICE
    assert {t.device.type for t in own.tensors.values()} == {DEVICE}
    torch.testing.assert_close(module(**own.example_inputs[1])["logits"].cpu(), before, **close)
    # Frozen weights are there once: module and base share their memory.
    weight = "model.layers.0.mlp.up_proj.weight"
    assert module.get_parameter(weight).data_ptr() == own.base.tensors[weight].data_ptr()
    own.merge().run()
    module.to("cpu")
    assert own.device.type == "cpu"
    assert torch.equal(own.run()["logits"], before)
    own.undo("lora").run()


def test_a_program_and_its_module_move(apart, folder):
    apart(moves, f"hf:{folder}")


def lives(ref: str) -> None:
    """A live model on the device, and one that moves there after passes were applied."""
    inputs = surgery.load(ref, device=DEVICE).example_inputs[1]
    model = LlamaForCausalLM.from_pretrained(ref.removeprefix("hf:")).to(DEVICE)
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=2))
    assert model(**inputs).logits.device.type == DEVICE
    model = LlamaForCausalLM.from_pretrained(ref.removeprefix("hf:"))
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=2))
    model.to(DEVICE)
    assert model(**inputs).logits.device.type == DEVICE
    surgery.apply_(model, surgery.Lora(target="mlp.*", rank=2, label="more"))
    assert model(**inputs).logits.device.type == DEVICE
    surgery.remove_(model, "more")
    model.to("cpu")(**{name: value.cpu() for name, value in inputs.items()})


def test_live_models(apart, folder):
    apart(lives, f"hf:{folder}")


# -- the command line


def command(arguments: list[str]) -> tuple[Any, str]:
    """Exit code and output of a command."""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text), pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code, text.getvalue()


def commands(folder: str, path: str) -> list[str]:
    """apply with data, train, merge, verify and run on the device."""
    out, said = Path(path), []
    (out / "texts.jsonl").write_text("".join('{"text": "the cat sees a red dog"}\n' for _ in range(12)))
    (out / "recipe.yaml").write_text(
        f"model: hf:{folder}\npasses:\n  - pass: lora\n    target: attn.*\n    rank: 2\n"
        f"train:\n  objective: causal-lm\n  data: {out / 'texts.jsonl'}\n  batch: 4\n  steps: 2\nmerge: true\n"
    )
    data = ["--data", str(out / "texts.jsonl")]
    for line in (
        ["apply", f"hf:{folder}", *data, "-o", str(out / "gptq"), "--pass", "quantize", "--format", "int8",
         "--method", "gptq", "--target", "mlp.*", "--group", "0", "--pass", "lora", "--target", "attn.*"],
        ["train", str(out / "gptq"), *data, "--objective", "causal-lm", "-o", str(out / "trained"), "--steps", "2"],
        ["merge", str(out / "trained"), "-o", str(out / "merged")],
        ["verify", str(out / "merged"), str(out / "merged")],
        ["run", str(out / "recipe.yaml"), "-o", str(out / "whole")],
    ):  # fmt: skip
        code, text = command([line[0], "--device", DEVICE, *line[1:]])
        said += [f"{line[0]}: {text[-500:]}"] if code else []
    return said


def test_commands_compute_on_the_device(apart, folder, tmp_path):
    assert apart(commands, str(folder), str(tmp_path)) == []


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda", "no CUDA device here; give --device cpu"),
        ("mps", "no MPS device here"),
        ("gpu", "'gpu' is unknown"),
    ],
)
def test_an_absent_device_is_one_line(device, said, folder, tmp_path):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one here")
    with pytest.raises(LoadError, match=said):
        surgery.load(f"hf:{folder}", device=device)
    code, text = command(["merge", f"hf:{folder}", "--device", device, "-o", str(tmp_path / "out")])
    assert code == 2
    assert said in text
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()
