"""Example inputs as text, and the models that need them: classes, constructors and factories of bare modules."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import surgery
from surgery.capture import LoadOptions, dynamic_axes, py
from surgery.capture.input_text import check_names, describe, suggestion
from surgery.capture.ranges import Dimension, parse_dimension
from surgery.cli import main
from surgery.common.errors import CaptureError, LoadError
from tests.shared.modules import Mlp

MLP = "py:tests.shared.modules:Mlp"
TIED = "py:tests.shared.modules:Tied"


def test_one_grammar_for_dimensions():
    assert parse_dimension("h") == Dimension("h")
    assert parse_dimension("h=224") == Dimension("h", 224)
    assert parse_dimension("h=8..512") == Dimension("h", None, 8, 512)
    assert parse_dimension("h=..512") == Dimension("h", None, None, 512)
    assert parse_dimension("h=224:32..512/32") == Dimension("h", 224, 32, 512, 32)
    for wrong in ("h=", "h=:8..9", "h=8:", "h=8:9", "h=8..2", "2h", "h=-1", "h=8 9"):
        with pytest.raises(CaptureError, match=r"dimension|empty range"):
            parse_dimension(wrong)


def test_inputs_and_dimensions():
    made = describe(["x=float32[batch=2,3,h=64:32..512/32,w=8..]; mask = bool[batch, h]", "step=int64[]"])
    assert {name: (t.dtype, tuple(t.shape)) for name, t in made.inputs.items()} == {
        "x": (torch.float32, (2, 3, 64, 8)),
        "mask": (torch.bool, (2, 64)),
        "step": (torch.int64, ()),
    }
    assert made.dynamic == {
        "x": {0: "batch", 2: "h=32..512/32", 3: "w=8.."},
        "mask": {0: "batch", 1: "h"},
        "step": {},
    }
    assert torch.equal(made.inputs["x"], describe(["x=float32[batch=2,3,h=64,w=8]"]).inputs["x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "cannot be read; write it as 'x=float32"),
        ("x=float32[2", "cannot be read"),
        ("x=flaot32[2]", "unknown dtype 'flaot32'; did you mean 'float32'"),
        ("x=float32[batch]", "batch has no size; write batch=SIZE"),
        ("x=float32[b=2,b=3]", "b has the sizes 2 and 3"),
        ("x=float32[b=1]", "b=1 cannot be dynamic; give an example size of at least 2"),
        ("x=float32[h=33:32..64/32]", "the size 33 of h is outside its range"),
        ("x=float32[b=2];x=float32[b=2]", "given twice"),
        ("x=float32[99999,99999]", "over 268435456 values"),
        (" ; ", "names no input"),
    ],
)
def test_texts_that_cannot_be_read(text, message):
    with pytest.raises(CaptureError, match=message) as caught:
        describe([text])
    assert "\n" not in str(caught.value)


def test_a_class_is_loaded_and_its_dimensions_are_dynamic():
    program = surgery.load(MLP, input="x=float32[batch=2,seq=5,4]", model_kwargs={"width": 4})
    assert dynamic_axes(program.captured) == {"x": {0: "batch", 1: "seq"}}
    module = program.base.loaded.module
    x = torch.randn(3, 7, 4)
    torch.testing.assert_close(program.run(x=x), module(x), rtol=0, atol=1e-6)  # one fp32 product each
    # A factory that returns example inputs is asked for others.
    loaded = py.load("py:tests.shared.modules:make", LoadOptions(input=("x=float32[rows=6,4]",)))
    assert dynamic_axes(loaded) == {"x": {0: "rows"}}


def test_the_error_shows_the_option_filled_in():
    with pytest.raises(LoadError) as caught:
        surgery.load(MLP)
    assert str(caught.value).endswith("Mlp without example inputs; describe them, with a name for each dynamic "
                                      "dimension: --input 'x=float32[batch=2,4]'")  # fmt: skip
    # The line that it shows works as it is.
    text = re.search(r"--input '(.*)'", str(caught.value))[1]
    assert surgery.load(MLP, input=text).run().shape == (2, 4)
    with pytest.raises(LoadError, match=re.escape("--input 'ids=int64[batch=2,seq=8]'")):
        surgery.load(TIED)
    assert surgery.load(TIED, input="ids=int64[batch=2,seq=8]").run().shape == (2, 8, 11)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, image, scale, flag=None):
            return self.conv(image) * scale

    assert suggestion(Two()) == (
        "--input 'image=float32[batch=2,3,h=224,w=224]' --input 'scale=float32[batch=2,3,h=224,w=224]'"
    )


def test_other_references_know_their_inputs():
    with pytest.raises(LoadError, match="--input is for py: models, leave it out"):
        surgery.load("hf:acme/bert", input="x=float32[2]")
    with pytest.raises(CaptureError, match=r"--input y: Mlp\.forward has no such parameter; it takes x"):
        surgery.load(MLP, input="y=float32[batch=2,4]")
    with pytest.raises(
        CaptureError, match=r"forward needs the input 'x'; describe it too: --input 'x=float32"
    ):
        check_names(Mlp(), [])


def run(*args, code=0):
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert (stopped.value.code or 0) == code


def test_from_the_command_line_and_again(tmp_path, capsys):
    torch.manual_seed(0)
    text = "x=float32[batch=2,4]"
    lora = ("--pass", "lora", "--target", "*", "--rank", "2")
    recipe = tmp_path / "r.yaml"
    run("apply", MLP, "--input", text, *lora, "--save-recipe", recipe, "-o", tmp_path / "a")
    assert f"input:\n- {text}\n" in recipe.read_text()
    run("apply", MLP, "--recipe", recipe, "-o", tmp_path / "b")
    stored = json.loads((tmp_path / "a" / "surgery.json").read_text())["base"]
    assert stored["input"] == [text]
    # The directory has the inputs, so that only the code is named again.
    again = surgery.load(str(tmp_path / "a"), base=MLP)
    assert dynamic_axes(again.captured) == {"x": {0: "batch"}}
    run("export", tmp_path / "a", "--base", MLP, "-o", tmp_path / "m.onnx")
    capsys.readouterr()
    run("inspect", MLP, code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--input 'x=float32[batch=2,4]'" in said
