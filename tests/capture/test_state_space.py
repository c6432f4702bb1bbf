"""State-space models: their projections, including W @ x, are sites; and a loop that fixes the length is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM

import surgery
from surgery.capture import dynamic_axes
from surgery.cli import main
from surgery.common.errors import CaptureError
from surgery.testing import check_pass
from tests.techniques.models import program


@pytest.fixture(scope="module")
def mamba() -> surgery.Program:
    return program("mamba")


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory) -> str:
    """A model whose loop over the sequence is not replaced by an op."""
    folder = tmp_path_factory.mktemp("rwkv")
    config = RwkvConfig(
        vocab_size=99, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, rescale_every=0
    )
    RwkvForCausalLM(config).save_pretrained(folder)
    return f"hf:{folder}"


def test_the_length_is_fixed_and_said(rwkv, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = surgery.load(rwkv)
    assert [str(w.message) for w in caught if "seq is fixed at 11" in str(w.message)]
    (note,) = loaded.captured.notes
    assert note.startswith("seq is fixed at 11, because the model's code fixes it")
    assert "--example seq=N" in note
    assert all("seq" not in axes.values() for axes in dynamic_axes(loaded.captured).values())
    with pytest.raises(SystemExit):
        main(["inspect", rwkv, "--example", "seq=5", "--json"])
    said = capsys.readouterr()
    assert "note: seq is fixed at 5" in said.err
    assert '"seq is fixed at 5' in said.out


def test_a_module_of_yours_is_not_fixed_in_silence():
    class Scan(nn.Module):
        def forward(self, x):
            state, out = x[:, 0] * 0, []
            for step in range(x.shape[1]):
                state = state * 0.5 + x[:, step]
                out.append(state)
            return torch.stack(out, 1)

    with pytest.raises(CaptureError, match="model's code fixes dimension 'seq' to the constant 4"):
        surgery.capture(Scan(), torch.randn(3, 4, 2), {"x": {0: "batch", 1: "seq"}})


def test_every_projection_is_a_site(mamba):
    mixer = {s.path.rpartition("mixer.")[2]: s for s in mamba.sites if "layers.0.mixer" in s.path}
    assert {name: (s.kind, s.layout, s.role) for name, s in mixer.items()} == {
        "in_proj": ("linear", "oi", "ssm.in"),  # the input of a scan is no MLP's
        "conv1d": ("conv", "oi", "conv"),
        "x_proj": ("linear", "oi", "ssm.x"),
        "dt_proj": ("linear", "oi", "ssm.dt"),
        "out_proj": ("linear", "oi", "ssm.out"),
    }
    assert mixer["dt_proj"].calls[0].x_axis == "column"
    assert mixer["conv1d"].weight == "backbone.layers.0.mixer.conv1d.weight"


@pytest.mark.slow
def test_lora_on_all_of_them(mamba):
    report = check_pass(surgery.Lora(target="in_proj,x_proj,dt_proj,out_proj,conv1d", rank=2), mamba)
    assert report.ok


class Left(nn.Module):
    """W @ x, features next to last, at two shapes of x; and a depthwise kernel that is squeezed on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 4) / 2)
        self.second = nn.Parameter(torch.randn(6, 8) / 3)
        self.kernel = nn.Parameter(torch.randn(6, 1, 3))

    def forward(self, x):
        hidden = (self.first @ x).relu()
        out = self.second @ hidden
        return nn.functional.conv1d(out, self.kernel.squeeze(1).unsqueeze(1), padding=1, groups=6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pass_",
    [
        surgery.Lora(target="first,second,kernel", rank=2),
        surgery.Lora(target="first,second", rank=2, dora=True),
        surgery.Lora(target="first,second", rank=2, init="pissa"),
        surgery.LowRank(target="first,second", rank=2),
        surgery.SparseTune(target="first,second,kernel", density=0.2),
    ],
    ids=["lora", "dora", "pissa", "low-rank", "sparse-tune"],
)
def test_from_the_left(pass_):
    torch.manual_seed(0)
    check_pass(pass_, surgery.capture(Left(), torch.randn(3, 4, 5)))


def test_merged_as_eager():
    """The folded weights, put into the eager module, give the program's outputs."""
    torch.manual_seed(0)
    module, x = Left(), torch.randn(3, 4, 5)
    adapted = surgery.capture(module, x).apply(surgery.Lora(target="first,second,kernel", rank=2))
    with torch.no_grad():
        for tensor in adapted.tensors.values():
            tensor.normal_()
    module.load_state_dict(adapted.merge().state())
    expected = module(x)
    # A handful of fp32 products in another order.
    assert torch.allclose(adapted.run(), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
