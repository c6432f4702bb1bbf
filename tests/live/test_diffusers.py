"""Passes on the live models of a pipeline of diffusers: applied, trained, merged, saved, and read by diffusers."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import surgery
from surgery.common.errors import ExportError
from surgery.store.diffusers import write_diffusers
from tests.shared import diffusion
from tests.shared.commands import call

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'torch-surgery[diffusers]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return cache(lambda kind: diffusion.write(kind, root / kind))


LORA = {"target": "attn.*", "rank": 2, "alpha": 4}
LOCON = {"target": "conv", "rank": 2, "as": "conv"}


def train(model, inputs, steps=8):
    """Fit noise on the example inputs, as a diffusion model is trained; the loss at each step."""
    target = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        out = model(**inputs)
        found = out["sample"] if isinstance(out, dict) else out.sample
        loss = (found - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_a_live_unet_is_trained_merged_and_saved(folder, tmp_path):
    source = folder("sd")
    pipe = diffusion.read(source)
    plain = diffusion.image(pipe)
    program = surgery.apply_(pipe.unet, surgery.Lora(**LORA), surgery.Lora(**LOCON))
    assert torch.equal(diffusion.image(pipe), plain)  # B is zero
    assert [len(e.sites) for e in program.journal if e.kind == "rewrite"] == [32, 33]
    _, inputs = program.example_inputs
    start = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    losses = train(pipe.unet, inputs)
    assert losses[-1] < 0.99 * losses[0]
    adapted = diffusion.image(pipe)
    effect = float((adapted - plain).abs().max())
    assert effect > 0.005
    # The captured program trains alike: the same factors, on the graph.
    other = surgery.load(f"diffusers:{source}", part="unet").apply(
        surgery.Lora(**LORA), surgery.Lora(**LOCON)
    )
    for name, tensor in other.tensors.items():  # the start is random
        tensor.data = start[name].clone()
    # Gradients are sums of thousands of products in another order, and eight steps.
    assert train(other.module(), inputs) == pytest.approx(losses, rel=1e-4)
    # diffusers reads the LoRA file, and the merged pipeline, with the image of the live model.
    program = surgery.program_of(pipe.unet)
    surgery.export_lora(program, tmp_path / "lora.safetensors")
    fresh = diffusion.read(source)
    fresh.load_lora_weights(tmp_path / "lora.safetensors")
    assert float((diffusion.image(fresh) - adapted).abs().max()) < 1e-4
    surgery.save_(pipe.unet, tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"))
    assert again.base.ref.startswith("diffusers:")
    surgery.save_(pipe.unet, tmp_path / "part", format="diffusers")
    merged = surgery.merge_(pipe.unet)
    assert float((diffusion.image(pipe) - adapted).abs().max()) < 1e-4
    assert merged.journal.entries[-1].kind == "merge"
    write_diffusers(again.merge(), tmp_path / "pipeline")
    fresh = diffusion.read(tmp_path / "pipeline")
    # Pixels from 0 to 1: a weight is rounded once more than the branch.
    assert float((diffusion.image(fresh) - adapted).abs().max()) < 1e-4
    part = type(pipe.unet).from_pretrained(tmp_path / "part")
    fresh = diffusion.read(source)
    fresh.unet = part
    assert float((diffusion.image(fresh) - adapted).abs().max()) < 1e-4


def test_a_pipeline_is_written_from_the_command_line(folder, tmp_path):
    source = folder("flux")
    ref = f"diffusers:{source}"
    program = surgery.load(ref, part="transformer").apply(surgery.Lora(**LORA))
    for number, tensor in enumerate(program.tensors.values()):
        tensor.data = 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    program.save(tmp_path / "adapted")
    code, said = call("merge", tmp_path / "adapted", "--format", "diffusers", "-o", tmp_path / "pipeline")
    assert code == 0, said
    assert "(a pipeline of diffusers)" in said
    assert not list((tmp_path / "pipeline" / "vae").glob("*.bin"))
    program.save(tmp_path / "whole", standalone=True)
    pipe = diffusion.read(source)
    plain = diffusion.image(pipe)
    pipe.transformer = program.live()
    expected = diffusion.image(pipe)
    assert float((expected - plain).abs().max()) > 0.005
    merged = diffusion.image(diffusion.read(tmp_path / "pipeline"))
    assert float((merged - expected).abs().max()) < 1e-4
    # Alone, without the directory of the pipeline.
    alone = surgery.load(str(tmp_path / "whole"))
    assert alone.base.ref.startswith("diffusers:")
    _, inputs = program.example_inputs
    assert torch.equal(alone.run(**inputs)["sample"], program.run(**inputs)["sample"])
    code, said = call("merge", tmp_path / "adapted", "--format", "hf", "-o", tmp_path / "x")
    assert code == 2
    assert "use --format diffusers" in said
    with pytest.raises(ExportError, match="merge first, or write a LoRA file"):
        write_diffusers(program, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_text_encoder_of_a_pipeline(folder, tmp_path):
    source = folder("sd")
    program = surgery.load(f"diffusers:{source}", part="text_encoder").apply(surgery.Lora(**LORA))
    for number, tensor in enumerate(program.tensors.values()):
        tensor.data = 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    write_diffusers(program.merge(), tmp_path / "pipeline")
    pipe = diffusion.read(source)
    plain = diffusion.image(pipe)
    pipe.text_encoder = program.live()
    expected = diffusion.image(pipe)
    assert float((expected - plain).abs().max()) > 1e-3
    merged = diffusion.image(diffusion.read(tmp_path / "pipeline"))
    assert float((merged - expected).abs().max()) < 1e-4
