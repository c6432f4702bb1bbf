"""Example inputs and named dynamic dimensions of a diffusers model, derived from its config and signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from surgery.capture.inputs import Example
from surgery.common.errors import LoadError

# Sizes of the example, by dimension; those of images are counted in the smallest steps that the model takes.
_SIZES = {"batch": 2, "seq": 11, "frames": 3, "height": 4, "width": 6}
# Keys of a config that hold the number of features of the text.
_TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "text_dim", "cross_attention_dim")
_OF_THE_UNET = ("encoder_hid_dim", "cross_attention_dim")
_TIMES = 1000.0  # timesteps of a schedule


def diffusers_inputs(model: nn.Module, sizes: Mapping[str, int] | None = None, seed: int = 0) -> Example:
    """Build example inputs for a UNet, a diffusion transformer or a VAE of diffusers.

    The dynamic dimensions are `batch`, `height` and `width` of the latents (of the pixels for a VAE) in the multiples
    that the model needs, `seq` for texts, `frames` for videos, and `image_seq` for the packed latents of Flux.

    Args:
        model: the model; its config and the signature of its forward determine the inputs.
        sizes: example sizes by dimension name.
        seed: seed of the random inputs.

    Raises:
        LoadError: no example inputs are known for the model, or a size does not fit it.
    """
    return _Builder(model, sizes or {}, seed).build()


class _Builder:
    """Builder of one `Example`: has a method for each input that it knows, by the name of the input."""

    def __init__(self, model: nn.Module, given: Mapping[str, int], seed: int) -> None:
        self.model: Any = model
        self.config: Mapping[str, Any] = model.config  # type: ignore[assignment]
        self.given = given
        self.parameters = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(seed)
        self.example = Example()
        self.dims: dict[str, Any] = {}
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.dtype = parameter.dtype if parameter is not None else torch.float32
        self.packed = "img_ids" in self.parameters
        self.video = self._is_video()

    def build(self) -> Example:
        """Add every input that the model takes and that is known, in the order of the signature."""
        for name, parameter in self.parameters.items():
            make = getattr(self, f"_{name}", None)
            if make is not None:
                make(name)
            if name not in self.example.inputs and parameter.default is inspect.Parameter.empty:
                if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    continue
                raise LoadError(
                    f"no example of the input '{name}' is known for {type(self.model).__name__}; load it with a py: "
                    "factory that returns example inputs"
                )
        return self.example

    def _is_video(self) -> bool:
        patch = self.config.get("patch_size")
        name = type(self.model).__name__
        return (
            (isinstance(patch, (list, tuple)) and len(patch) == 3) or "3D" in name or name.endswith("KLWan")
        )

    def _step(self) -> int:
        """The number that heights and widths are multiples of."""
        patch = self.config.get("patch_size")
        if "hidden_states" in self.parameters:
            return int(patch[-1] if isinstance(patch, (list, tuple)) else patch or 1)
        if "latent_sample" in self.parameters:
            return 1
        blocks = self.config.get("down_block_types") or self.config.get("dim_mult") or ()
        # Every level but the last halves the size.
        return 2 ** max(len(blocks) - 1, 0)

    def _most(self) -> int | None:
        """Largest height and width, in steps: the rows of a table of positions."""
        return self.config.get("pos_embed_max_size") or self.config.get("rope_max_seq_len")

    def _dim(self, name: str, step: int = 1, high: int | None = None) -> Any:
        if name not in self.dims:
            bounds = {} if high is None else {"max": high}
            # torch has no multiples of a named dimension, only multiples of another dimension.
            dim = Dim(name, **bounds) if step == 1 else step * Dim(f"_{name}", min=1, **bounds)
            self.dims[name] = dim
        return self.dims[name]

    def _size(self, name: str, step: int = 1) -> int:
        size = self.given.get(name, _SIZES[name] * step)
        if size % step:
            raise LoadError(f"--example {name}={size}: {type(self.model).__name__} takes multiples of {step}")
        return size

    def _add(self, name: str, shape: tuple[int, ...], dims: dict[int, Any], like: Any = None) -> None:
        value = torch.randn(shape, generator=self.generator).to(self.dtype) if like is None else like
        self.example.inputs[name] = value
        self.example.shapes[name] = dims

    # The inputs, by name

    def _sample(self, name: str) -> None:
        self._image(name, int(self.config.get("in_channels") or 3))

    def _latent_sample(self, name: str) -> None:
        self._image(name, int(self.config["latent_channels"]))

    def _hidden_states(self, name: str) -> None:
        channels = int(self.config["in_channels"])
        if self.packed:
            shape = (self._size("batch"), self._tokens(), channels)
            self._add(name, shape, {0: self._dim("batch"), 1: self._dim("image_seq")})
        else:
            self._image(name, channels)

    def _image(self, name: str, channels: int) -> None:
        step, most = self._step(), self._most()
        frames = (self._size("frames"),) if self.video else ()
        sides = [self._size(side, step) for side in ("height", "width")]
        if most is not None:
            sides = [min(size, step * max(most - 1, 1)) for size in sides]
        shape = (self._size("batch"), channels, *frames, *sides)
        dims = {0: self._dim("batch"), **({2: self._dim("frames")} if self.video else {})}
        for number, side in enumerate(("height", "width"), 2 + len(frames)):
            dims[number] = self._dim(side, step, most)
        self._add(name, shape, dims)

    def _timestep(self, name: str) -> None:
        rows = self._size("batch")
        # Flux takes times from 0 to 1. A number for each row is float32 also for a half-precision model, as schedulers
        # have it: bfloat16 has no 999.
        times = torch.rand(rows, generator=self.generator) * (1.0 if self.packed else _TIMES)
        self._add(name, (), {0: self._dim("batch")}, times)

    def _encoder_hidden_states(self, name: str) -> None:
        unet = "hidden_states" not in self.parameters
        keys = _OF_THE_UNET if unet else _TEXT_WIDTHS
        width = next((self.config[key] for key in keys if self.config.get(key)), None)
        if isinstance(width, (list, tuple)):
            width = width[0] if len(set(width)) == 1 else None
        if width is None:
            return
        shape = (self._size("batch"), self._size("seq"), int(width))
        self._add(name, shape, {0: self._dim("batch"), 1: self._dim("seq")})

    def _encoder_attention_mask(self, name: str) -> None:
        # Pipelines with a UNet pass none.
        if "hidden_states" in self.parameters and "encoder_hidden_states" in self.example.inputs:
            mask = torch.ones(self._size("batch"), self._size("seq"))
            # With padding in the last row, a capture that drops the mask fails its check.
            mask[-1, -2:] = 0
            self._add(name, (), {0: self._dim("batch"), 1: self._dim("seq")}, mask.to(self.dtype))

    def _pooled_projections(self, name: str) -> None:
        shape = (self._size("batch"), int(self.config["pooled_projection_dim"]))
        self._add(name, shape, {0: self._dim("batch")})

    def _guidance(self, name: str) -> None:
        if self.config.get("guidance_embeds"):
            scale = torch.full((self._size("batch"),), 3.5)
            self._add(name, (), {0: self._dim("batch")}, scale)

    def _img_ids(self, name: str) -> None:
        width = self._size("width")
        index = torch.arange(self._tokens())
        ids = torch.zeros(self._tokens(), self._axes())
        ids[:, 1], ids[:, 2] = index // width, index % width
        self._add(name, (), {0: self._dim("image_seq")}, ids)

    def _txt_ids(self, name: str) -> None:
        self._add(name, (), {0: self._dim("seq")}, torch.zeros(self._size("seq"), self._axes()))

    def _tokens(self) -> int:
        return self.given.get("image_seq", self._size("height") * self._size("width"))

    def _axes(self) -> int:
        return len(self.config["axes_dims_rope"])

    def _class_labels(self, name: str) -> None:
        classes = self.config.get("num_class_embeds") or (
            self.config.get("num_embeds_ada_norm") if "hidden_states" in self.parameters else None
        )
        # PixArt has a table of timesteps under the same key, and its own text.
        if classes and "encoder_hidden_states" not in self.example.inputs:
            labels = torch.randint(0, int(classes), (self._size("batch"),), generator=self.generator)
            self._add(name, (), {0: self._dim("batch")}, labels)

    def _added_cond_kwargs(self, name: str) -> None:
        rows, batch = self._size("batch"), {0: self._dim("batch")}

        def drawn(width: int) -> torch.Tensor:
            return torch.randn((rows, width), generator=self.generator).to(self.dtype)

        if self.config.get("addition_embed_type") == "text_time":
            width = int(self.config["projection_class_embeddings_input_dim"])
            inputs = {
                "text_embeds": drawn(width - 6 * int(self.config["addition_time_embed_dim"])),
                "time_ids": torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]] * rows).to(self.dtype),
            }
        elif getattr(self.model, "use_additional_conditions", False):
            inputs = {"resolution": drawn(2), "aspect_ratio": drawn(1)}
        else:
            return
        nested: Any = self.example
        nested.inputs[name] = inputs
        nested.shapes[name] = {key: batch for key in inputs}  # noqa: C420 - mypy takes the keys for axes
