"""LoRA files of image models: written and read in three formats, judged by diffusers' own load_lora_weights."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.common.errors import ExportError, LoadError, SurgeryError
from surgery.store.lora_files import parts_in
from surgery.store.lora_files.keys import Key, parse
from surgery.store.lora_files.names import kohya_names
from tests.shared import diffusion
from tests.shared.commands import call

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'torch-surgery[diffusers]'")
FORMATS = ("peft", "diffusers", "kohya")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return cache(lambda kind: diffusion.write(kind, root / kind))


@pytest.fixture(scope="module")
def base(folder):
    return cache(lambda kind, part: surgery.load(f"diffusers:{folder(kind)}", part=part))


def filled(program, seed=5):
    """Factors that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in program.tensors.values():
        tensor.data = 0.1 * torch.randn(tensor.shape, generator=generator)
    return program


def adapted(base, kind):
    """The programs of a pipeline's models: different ranks and alphas, and LoCon on the convolutions of a UNet."""
    if kind in ("sd", "xl"):
        unet = base(kind, "unet").apply(
            surgery.Lora(target="attn.*,mlp.*,linear", rank=3, alpha=6)
            if kind == "xl"
            else surgery.Lora(target="attn.*,mlp.*", rank=3, alpha=6),
            surgery.Lora(target="conv", rank=2, alpha=5, **{"as": "conv"}),
        )
        parts = ["text_encoder", *(["text_encoder_2"] if kind == "xl" else [])]
        texts = [
            base(kind, part).apply(surgery.Lora(target="attn.*,mlp.*", rank=2, alpha=3)) for part in parts
        ]
        return {
            "unet": filled(unet), **{part: filled(text, 6) for part, text in zip(parts, texts, strict=True)}
        }  # fmt: skip
    target = "attn.*,mlp.*" if kind == "wan" else "attn.*,mlp.*,linear"
    program = base(kind, "transformer").apply(surgery.Lora(target=target, rank=3, alpha=6))
    return {"transformer": filled(program)}


def merged_image(folder, programs):
    """The image of a pipeline with the merged weights, and that of the pipeline as it is."""
    pipe = diffusion.read(folder)
    plain = diffusion.image(pipe)
    for part, program in programs.items():
        model = getattr(pipe, part)
        state = {n: t for n, t in program.merge().state().items() if n in model.state_dict()}
        model.load_state_dict(state)
    return diffusion.image(pipe), plain


@pytest.mark.parametrize(
    "kind",
    ["sd", "flux", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("xl", "sd3", "wan"))],
)
def test_diffusers_reads_every_format_with_the_same_image(kind, folder, base, tmp_path):
    programs = adapted(base, kind)
    expected, plain = merged_image(folder(kind), programs)
    effect = float((expected - plain).abs().max())
    assert effect > 0.02
    for number, format in enumerate(FORMATS):
        if format == "kohya" and kind in ("sd3", "wan", "flux"):
            continue
        file = tmp_path / f"{format}.safetensors"
        if number == 2:  # a directory gets diffusers' name
            surgery.export_lora(list(programs.values()), tmp_path / format, format=format)
            file = tmp_path / format / "pytorch_lora_weights.safetensors"
        else:
            surgery.export_lora(list(programs.values()), file, format=format)
        pipe = diffusion.read(folder(kind))
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        # Pixels from 0 to 1: the branch beside the weights against their sum, through some steps in float32.
        error = float((diffusion.image(pipe) - expected).abs().max())
        assert error < 1e-4 * max(effect, 0.1) * 10, (format, error, effect)
        for part, program in programs.items():
            again = surgery.import_lora(file, base(kind, part))
            _, inputs = program.example_inputs
            ours, theirs = (next(iter(p.run(**inputs).values())) for p in (program, again))
            # The scale is multiplied into B, or kept as alpha.
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


def test_fused_projections_of_flux(folder, base, tmp_path):
    """kohya's format has qkv (and in single blocks the MLP) as one module, as Black Forest Labs' code has."""
    program = filled(
        base("flux", "transformer").apply(surgery.Lora(target="path:transformer_blocks", rank=3, alpha=6))
    )
    keys = surgery.export_lora(program, tmp_path / "a.safetensors", format="kohya")
    raw = load_file(tmp_path / "a.safetensors")
    assert raw["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (96, 9)
    assert "lora_unet_double_blocks_0_txt_mod_lin.alpha" in keys
    expected, plain = merged_image(folder("flux"), {"transformer": program})
    pipe = diffusion.read(folder("flux"))
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    assert float((expected - plain).abs().max()) > 0.01
    assert float((diffusion.image(pipe) - expected).abs().max()) < 1e-4
    # diffusers has the sizes of Flux itself in its code for single blocks, so these are judged by our own reader.
    program = filled(
        base("flux", "transformer").apply(
            surgery.Lora(target="attn.q,attn.v,path:single_transformer_blocks,path:norm_out", rank=2, alpha=8)
        )
    )
    surgery.export_lora(program, tmp_path / "b.safetensors", format="kohya")
    raw = load_file(tmp_path / "b.safetensors")
    assert raw["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape[0] == 3 * 32 + 128
    again = surgery.import_lora(tmp_path / "b.safetensors", base("flux", "transformer"))
    _, inputs = program.example_inputs
    ours, theirs = (p.run(**inputs)["sample"] for p in (program, again))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    # A file that was fused keeps its A, with the rank that it had.
    surgery.export_lora(again, tmp_path / "c.safetensors", format="kohya")
    assert {n: t.shape for n, t in load_file(tmp_path / "c.safetensors").items()} == {
        n: t.shape for n, t in raw.items()
    }


@pytest.mark.slow
def test_single_blocks_of_flux_at_its_own_size(tmp_path):
    """diffusers splits the fused projection of a single block of Flux: 3072 features, and 12288 of the MLP."""
    import diffusers
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=0, num_single_layers=1, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    from surgery.capture.diffusers import from_model
    from surgery.capture.trace import trace
    from surgery.common.plugins import make_plugin_manager
    from surgery.engine.base import Base
    from surgery.engine.program import Program

    loaded = from_model(model)
    program = Program(Base(loaded, trace(loaded, check=False), make_plugin_manager()))
    program = filled(
        program.apply(surgery.Lora(target="path:single_transformer_blocks", rank=2, alpha=6), verify=False)
    )
    surgery.export_lora(program, tmp_path / "a.safetensors", format="kohya")
    theirs = _convert_kohya_flux_lora_to_diffusers(load_file(tmp_path / "a.safetensors"))
    surgery.export_lora(program, tmp_path / "b.safetensors", format="peft")
    ours = load_file(tmp_path / "b.safetensors")
    paths = {name.removesuffix(".lora_A.weight") for name in ours if name.endswith(".lora_A.weight")}
    assert len(paths) == 6
    for path in paths:
        update = [each[f"{path}.lora_B.weight"] @ each[f"{path}.lora_A.weight"] for each in (theirs, ours)]
        # Products of 2 or 8 numbers of about 0.1.
        torch.testing.assert_close(*update, rtol=0, atol=1e-6)


def test_names_of_stable_diffusion_xl_are_those_that_diffusers_reads(base):
    from diffusers.loaders.lora_conversion_utils import (
        _convert_unet_lora_key,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    program = base("xl", "unet")
    paths = [site.path for site in program.base.sites if site.kind in ("linear", "conv")]
    names = kohya_names(program, paths)
    assert len(names) == len(paths)
    for name, (path,) in names.items():
        key = f"lora_unet_{name}.lora_down.weight"
        config = program.base.loaded.module.config
        (mapped,) = _maybe_map_sgm_blocks_to_diffusers({key: 0}, config)
        own = _convert_unet_lora_key(mapped).replace(".processor", "")
        own = own.replace("to_out_lora", "to_out.0.lora").replace("_lora.down", ".lora.down")
        assert own == f"{path}.lora.down.weight"


def test_dora_in_every_format(folder, base, tmp_path):
    program = base("sd", "unet").apply(surgery.Lora(target="attn.*", rank=2, alpha=4, dora=True))
    generator = torch.Generator().manual_seed(3)
    for name, tensor in program.tensors.items():
        noise = 0.1 * torch.randn(tensor.shape, generator=generator)
        tensor.data = tensor.data * (1 + noise) if name.endswith("m") else noise
    _, inputs = program.example_inputs
    expected = program.run(**inputs)["sample"]
    for format in FORMATS:
        surgery.export_lora(program, tmp_path / f"{format}.safetensors", format=format)
        again = surgery.import_lora(tmp_path / f"{format}.safetensors", base("sd", "unet"))
        found = again.run(**inputs)["sample"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("unet.a.to_q.lora_A.weight", Key("unet", "a.to_q", "A")),
        ("unet.a.to_q.lora_B.default.weight", Key("unet", "a.to_q", "B")),
        ("unet.a.attn1.processor.to_out_lora.up.weight", Key("unet", "a.attn1.to_out.0", "B")),
        ("transformer.x.lora.down.weight", Key("transformer", "x", "A")),
        (
            "text_encoder.l.0.self_attn.to_q_lora.down.weight",
            Key("text_encoder", "l.0.self_attn.q_proj", "A"),
        ),
        ("text_encoder_2.m.fc1.lora_linear_layer.up.weight", Key("text_encoder_2", "m.fc1", "B")),
        ("lora_unet_a_to_q.alpha", Key("main", "a_to_q", "alpha", True)),
        ("lora_te1_x.dora_scale", Key("text_encoder", "x", "m", True)),
        ("base_model.model.a.lora_magnitude_vector", Key("", "a", "m")),
        ("a.hada_w1_a", None),
        ("unet.a.weight", None),
    ],
)
def test_keys(text, key):
    assert parse(text) == key


def test_wrong_files_are_refused(folder, base, tmp_path):
    unet, file = base("sd", "unet"), tmp_path / "a.safetensors"
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"

    def factors(rows=64, columns=64, rank=2, start="unet."):
        return {
            f"{start}{path}.lora_A.weight": torch.ones(rank, columns),
            f"{start}{path}.lora_B.weight": torch.ones(rows, rank),
        }

    cases = [
        ({"unet.a.hada_w1_a": torch.ones(2)}, "which is LoHa; only LoRA and LoCon are read"),
        ({"unet.a.weight": torch.ones(2)}, "which is unknown; only LoRA"),
        (
            {"text_encoder.a.lora_A.weight": torch.ones(2)},
            "has nothing for unet, but for text_encoder; load that part",
        ),
        (
            {k.replace("to_q", "to_x"): t for k, t in factors().items()},
            "is for another model: this one has no",
        ),
        (dict(list(factors().items())[:1]), r"it has \['A'\], but needs A and B"),
        (factors(rows=48), "is for another base: at"),
        ({**factors(), f"unet.{path}.alpha": torch.tensor(float("nan"))}, "alpha of .* is no finite number"),
        ({**factors(), **factors(start="")}, "has two tensors A of"),
    ]
    for tensors, said in cases:
        save_file(tensors, file)
        with pytest.raises(LoadError, match=said):
            surgery.import_lora(file, unet)
    save_file(factors(), file, metadata={"lora_adapter_metadata": "[1"})
    with pytest.raises(LoadError, match="no JSON object"):
        surgery.import_lora(file, unet)
    save_file(factors(), file, metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "x"})})
    with pytest.raises(LoadError, match="lora_alpha"):
        surgery.import_lora(file, unet)
    save_file(factors(), file, metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})})
    assert surgery.import_lora(file, unet).journal.entries[-1].options["alpha"] == 8
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match="pickles can run code"):
        surgery.import_lora(tmp_path / "a.bin", unet)
    with pytest.raises(LoadError, match="there is no file"):
        surgery.import_lora(tmp_path / "none.safetensors", unet)


def test_what_a_file_cannot_hold_is_refused(base, tmp_path):
    unet, file = base("sd", "unet"), tmp_path / "a.safetensors"
    for program, format, said in (
        (unet, "peft", "the program has no LoRA; apply one"),
        (unet.apply(surgery.Quantize(target="attn.q")), "peft", "is no LoRA; leave it out"),
        (unet.apply(surgery.Lora(target="attn.q", bias=True)), "peft", "a bias of its own"),
        (
            base("sd3", "transformer").apply(surgery.Lora(target="attn.q")),
            "kohya",
            "no names known here for SD3",
        ),
        (unet.apply(surgery.Lora(target="attn.q")), "onnx", "there is no format 'onnx'"),
    ):
        with pytest.raises(ExportError, match=said):
            surgery.export_lora(program, file, format=format)
        assert not list(tmp_path.iterdir())
    program = unet.apply(surgery.Lora(target="attn.q"))
    with pytest.raises(ExportError, match="two programs are the unet"):
        surgery.export_lora([program, program], file)
    surgery.export_lora(program, file)
    with pytest.raises(SurgeryError, match="exists"):
        surgery.export_lora(program, file)


def test_commands(folder, base, tmp_path):
    programs = adapted(base, "sd")
    file = tmp_path / "style.safetensors"
    surgery.export_lora(list(programs.values()), file, format="kohya")
    assert parts_in(file) == ["main", "text_encoder"]
    ref = f"diffusers:{folder('sd')}"
    saved = []
    for part, other in (("unet", "text_encoder"), ("text_encoder", "main")):
        code, said = call("import-lora", file, "--base", ref, "--part", part, "-o", tmp_path / part)
        assert code == 0, said
        assert f"the file also has factors for {other}: import them with --part" in said
        saved.append(tmp_path / part)
    code, said = call("export-lora", *saved, "-o", tmp_path / "again", "--format", "kohya")
    assert code == 0, said
    first, again = load_file(file), load_file(tmp_path / "again" / "pytorch_lora_weights.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    code, said = call("import-lora", file, "--base", ref, "-o", tmp_path / "x")
    assert code == 2
    assert "name a part of the pipeline with --part" in said
    assert not (tmp_path / "x").exists()
