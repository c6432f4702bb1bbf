"""The plugins of examples/plugins: the conformance kit, and PEFT's own layers with the same random values."""

from __future__ import annotations

import re

import pytest
import torch
from peft import HRAConfig, VeraConfig, get_peft_model
from torch import nn

import surgery
from surgery.testing import check_pass
from tests.shared.example_plugins import FOLDER, example_plugin

# fp32: the same products in another order, over two layers.
ROUNDING = 2e-6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(x + self.down(torch.tanh(self.up(x))))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
LAYERS = ("up", "down")


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def program() -> surgery.Program:
    return surgery.capture(net(), (X,), dynamic={"x": {0: "batch"}})


def peft_layers(config) -> tuple[nn.Module, dict[str, nn.Module]]:
    """PEFT's model with random trained values, and its adapted layers."""
    model = get_peft_model(net(), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, {name: model.base_model.model.get_submodule(name) for name in LAYERS}


def assert_same(adapted: surgery.Program, theirs: nn.Module) -> None:
    """The outputs, merged or not, and the merged weights are those of PEFT."""
    with torch.no_grad():
        want = theirs(X)
        bare = net()(X)
    allowed = ROUNDING * float(want.abs().max())
    assert float((bare - want).abs().max()) > 1000 * allowed
    assert float((adapted.run(X) - want).abs().max()) <= allowed
    merged = adapted.merge()
    assert float((merged.run(X) - want).abs().max()) <= 5 * allowed  # the sum W + ΔW is rounded once more
    module = theirs.merge_and_unload()
    for name in LAYERS:
        weight = merged.state()[f"{name}.weight"]
        assert torch.allclose(
            weight, module.get_submodule(name).weight, atol=ROUNDING * float(weight.abs().max())
        )


@pytest.mark.parametrize(
    ("name", "options"), [("vera", {"rank": 4}), ("hra", {"rank": 4}), ("int8_matmul", {})]
)
def test_the_kit(name, options):
    (cls,) = example_plugin(name).surgery_passes()
    print(check_pass(cls(target="all", **options), program()))


def test_the_guide_lists_every_file_with_its_lines():
    guide = (FOLDER.parents[1] / "docs" / "plugins.md").read_text()
    listed = re.findall(r"^\| `examples/plugins/(\w+)\.py` \|.*\| (\d+) \|$", guide, re.M)
    lines = {
        file.stem: sum(1 for line in file.read_text().splitlines() if line.strip() and line.strip()[0] != "#")
        for file in FOLDER.glob("*.py")
    }
    assert {name: int(count) for name, count in listed} == lines


def test_vera_as_peft():
    """PEFT slices one matrix for all layers; here each shape gets the slice that its layers read."""
    theirs, layers = peft_layers(VeraConfig(r=4, target_modules=list(LAYERS)))
    adapted = program().apply(example_plugin("vera").Vera(target="up,down", rank=4))
    with torch.no_grad():
        for name, layer in layers.items():
            out, width = layer.get_base_layer().weight.shape
            adapted.tensors[f"vera.A_4x{width}"].copy_(layer.vera_A["default"][:, :width])
            adapted.tensors[f"vera.B_{out}x4"].copy_(layer.vera_B["default"][:out])
            adapted.tensors[f"{name}.vera.d"].copy_(layer.vera_lambda_d["default"])
            adapted.tensors[f"{name}.vera.b"].copy_(layer.vera_lambda_b["default"])
    assert_same(adapted, theirs)


def test_hra_as_peft():
    theirs, layers = peft_layers(HRAConfig(r=4, target_modules=list(LAYERS)))
    adapted = program().apply(example_plugin("hra").Hra(target="up,down", rank=4))
    with torch.no_grad():
        for name, layer in layers.items():
            adapted.tensors[f"{name}.hra.u"].copy_(layer.hra_u["default"])
    assert_same(adapted, theirs)


def test_vera_from_the_command_line(tmp_path, capsys):
    """The file with --plugin; a saved directory says that it needs the file."""
    from surgery.cli import main

    file = str(example_plugin("vera").__file__)
    model = ["py:tests.shared.modules:Mlp", "--input", "x=float32[batch=2,4]"]
    with pytest.raises(SystemExit) as raised:
        main(["apply", *model, "--plugin", file, "--pass", "vera", "--target", "all", "--rank", "2",
              "-o", str(tmp_path / "adapted")])  # fmt: skip
    assert raised.value.code == 0, capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        main(["inspect", str(tmp_path / "adapted")])
    assert raised.value.code == 2
    assert "vera" in capsys.readouterr().err
