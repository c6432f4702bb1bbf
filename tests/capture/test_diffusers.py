"""Parts of pipelines of diffusers: loaded by name, with a dynamic batch, height and width, and exported."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

import surgery
from surgery.capture import dynamic_axes, fresh_inputs, named_sizes
from surgery.capture.diffusers import _choose
from surgery.capture.shapes import list_axes
from surgery.common.errors import LoadError
from surgery.export.program import source_of
from surgery.export.runtime import OnnxModel
from tests.shared import diffusion
from tests.shared.commands import call

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'torch-surgery[diffusers]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return cache(lambda kind: diffusion.write(kind, root / kind))


def load(folder, part, **options):
    """The program and its notes."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        program = surgery.load(f"diffusers:{folder}", part=part, **options)
    return program, [
        str(w.message) for w in found if "limited" in str(w.message) or "fixed" in str(w.message)
    ]


def ranges(program):
    return {axis.name: axis.range for axis in list_axes(program.captured)}


# Part, ranges, and sizes that differ from the example in every dimension, also in the ratio of the sides.
SIZE = {"batch": 1, "height": 12, "width": 6, "seq": 5}
CASES = [
    ("sd", "unet", {"batch": "at most 63", "height": "multiples of 2", "width": "multiples of 2", "seq": "any"}, SIZE),
    pytest.param(
        "xl", "unet", {"batch": "at most 63", "height": "multiples of 2", "width": "multiples of 2", "seq": "any"},
        SIZE, marks=pytest.mark.slow,
    ),
    (
        "sd3", "transformer",
        {"batch": "any", "height": "multiples of 2 up to 48", "width": "multiples of 2 up to 48", "seq": "any"}, SIZE,
    ),
    (
        "flux", "transformer", {"batch": "any", "image_seq": "any", "seq": "any"},
        {"batch": 3, "image_seq": 35, "seq": 4},
    ),
    pytest.param(
        "wan", "transformer",
        {
            "batch": "any", "frames": "at most 32", "height": "multiples of 2 up to 64",
            "width": "multiples of 2 up to 64", "seq": "any",
        },
        {**SIZE, "frames": 2}, marks=pytest.mark.slow,
    ),
    (
        "pixart", "transformer",
        {"batch": "any", "height": "multiples of 2", "width": "multiples of 2", "seq": "any"}, SIZE,
    ),
    pytest.param(
        "sd", "vae", {"batch": "at most 63", "height": "multiples of 2", "width": "multiples of 2"},
        {"batch": 3, "height": 14, "width": 10}, marks=pytest.mark.slow,
    ),
    (
        "sd", "vae_decoder", {"batch": "at most 63", "height": "any", "width": "any"},
        {"batch": 1, "height": 7, "width": 9},
    ),
    pytest.param(
        "sd", "vae_encoder", {"batch": "any", "height": "multiples of 2", "width": "multiples of 2"},
        {"batch": 1, "height": 14, "width": 10}, marks=pytest.mark.slow,
    ),
    pytest.param(
        "wan", "vae",
        {"batch": "any", "frames": "at most 4", "height": "multiples of 8", "width": "multiples of 8"},
        {"batch": 1, "frames": 4, "height": 24, "width": 16}, marks=pytest.mark.slow,
    ),
    pytest.param(
        "sd", "text_encoder", {"batch": "any", "seq": "at most 16"}, {"batch": 3, "seq": 9}, marks=pytest.mark.slow
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "part", "expected", "sizes"), CASES)
def test_a_part_is_captured_and_exported(kind, part, expected, sizes, folder, tmp_path):
    program, _ = load(folder(kind), part)
    assert ranges(program) == expected
    program.export(tmp_path / "model.onnx")
    model = OnnxModel(tmp_path / "model.onnx")
    args, kwargs = fresh_inputs(program.captured, sizes, seed=3)
    assert sizes.keys() == expected.keys()
    assert sizes != named_sizes(program.captured)
    own = program.base.loaded.module
    source = source_of(program)
    with torch.no_grad():
        eager = own(*args, **kwargs)
    eager = source.named_outputs(dict(eager) if not isinstance(eager, tuple) else eager)
    found = model.run(source.named_inputs(args, kwargs))
    assert found.keys() == eager.keys()
    for name, value in eager.items():
        # Some hundred float32 sums and products in another order; timesteps of 1000 lose 1e-4 in their sines.
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4 * scale)


def test_notes_and_names(folder):
    program, said = load(folder("sd"), "unet")
    assert [line.partition(": ")[2] for line in said][-1].endswith(
        "batch is limited to at most 63, as the model's code requires"
    )
    axes = {0: "batch", 2: "height", 3: "width"}
    assert dynamic_axes(program.captured)["sample"] == axes
    assert program.base.loaded.metadata["part"] == "unet"
    crossing = {site.path for site in program.sites if site.cross}
    assert crossing == {site.path for site in program.sites if ".attn2." in site.path}
    joint, _ = load(folder("sd3"), "transformer")
    assert not [site.path for site in joint.sites if site.cross]
    _, said = load(folder("sd"), "unet", random=True)
    assert len(said) == 1


def test_a_part_has_to_be_named(folder):
    ref = f"diffusers:{folder('sd')}"
    for options, said in (
        (
            [],
            "name a part of the pipeline with --part; it has text_encoder, unet, vae, vae_encoder, vae_decoder",
        ),
        (["--part", "unett"], "has no part 'unett'; did you mean 'unet'?"),
        (["--part", "tokenizer"], "has no part 'tokenizer'; it has text_encoder, unet"),
        (
            ["--part", "unet", "--task", "x"],
            "--task is for hf: models; name a part of the pipeline with --part",
        ),
        (["--part", "unet", "--model-kwarg", "foo=1"], "unknown argument --model-kwarg foo"),
        (["--part", "unet", "--example", "height=5"], "UNet2DConditionModel takes multiples of 2"),
    ):
        code, printed = call("inspect", ref, *options)
        assert code == 2
        assert said in printed
        assert printed.count("\n") == 1
    assert "there is no directory" in call("inspect", "diffusers:/nowhere/at/all")[1]


def test_a_directory_is_untrusted(folder, tmp_path):
    """No class of another library, no pickle, no path outside the directory."""
    write = tmp_path / "unet"
    write.mkdir()
    for named in ("DiffusionPipeline", "os", "utils.import_utils", "_LazyModule", 7, ""):
        (write / "config.json").write_text(json.dumps({"_class_name": named}))
        with pytest.raises(LoadError, match="which is no model of diffusers"):
            surgery.load(f"diffusers:{write}", random=True)
    config = (folder("sd") / "unet" / "config.json").read_text()
    (write / "config.json").write_text(config)
    (write / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"has no diffusion_pytorch_model\.safetensors; give --random"):
        surgery.load(f"diffusers:{write}")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"../x": ["diffusers", "A"], "unet": ["diffusers", "A"]})
    )
    with pytest.raises(LoadError, match="it has unet"):
        surgery.load(f"diffusers:{tmp_path}")


def test_files_of_a_repository():
    names = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "vae/config.json",
        "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
    ]  # fmt: skip
    choose = lambda part, variant=None, random=False: _choose("diffusers:a/b", part, variant, random, names)  # noqa: E731
    start = ["model_index.json", "unet/config.json"]
    assert choose("unet") == [*start, "unet/diffusion_pytorch_model.safetensors"]
    assert choose("unet", "fp16") == [*start, "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert choose("unet", random=True) == start
    assert choose("text_encoder") == [
        "model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    ]  # fmt: skip
    with pytest.raises(LoadError, match="it has text_encoder, unet, vae, vae_encoder, vae_decoder"):
        choose("")


def test_a_saved_part_is_loaded_again(folder, tmp_path):
    program, _ = load(folder("sd"), "unet")
    program = program.apply(surgery.Lora(target="attn.q", rank=2))
    for name, tensor in program.tensors.items():
        tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    program.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"))
    _, inputs = program.example_inputs
    assert torch.equal(again.run(**inputs)["sample"], program.run(**inputs)["sample"])
    assert not torch.equal(again.run(**inputs)["sample"], program.base.loaded.module(**inputs).sample)
    assert not list(Path(tmp_path / "saved").glob("base*"))
