"""Example inputs and named dynamic dimensions of a transformers model, derived from its config and signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from surgery.common.errors import LoadError

# Default sizes. Dimensions that occur together differ in size, so that confusing two of them causes a shape error.
_SIZES = {"batch": 2, "seq": 11, "src_seq": 11, "tgt_seq": 7, "image_batch": 3, "frames": 64, "samples": 6000}
_UNBOUNDED_TABLES = ("relative", "rel_pos", "distance")


@dataclass
class Example:
    """Example inputs of a model.

    Attributes:
        inputs: input tensors by name.
        shapes: dynamic dimensions by input name and axis; None for a static input.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, dict[int, Any] | None] = field(default_factory=dict)


def hf_inputs(model: nn.Module, sizes: Mapping[str, int] | None = None, seed: int = 0) -> Example:
    """Build example inputs for a transformers model.

    The dynamic dimensions are `batch` and `seq` for text, `src_seq` and `tgt_seq` for encoder-decoders, and `samples`
    for raw audio. Models that encode texts and images separately, such as CLIP, also have `image_batch`. Images and
    spectrograms have a fixed size. The upper bound of a text dimension is the smallest position table.

    Args:
        model: the model; its config and the signature of its forward determine the inputs.
        sizes: example sizes by dimension name, and `image_size` for models without one in the config.
        seed: seed of the random inputs.

    Raises:
        LoadError: no example inputs are known for the model.
    """
    return _Builder(model, {**_SIZES, **(sizes or {})}, sizes or {}, seed).build()


class _Builder:
    """Builder of one `Example`: chooses the modality from the accepted inputs and adds one input after another."""

    def __init__(self, model: nn.Module, sizes: dict[str, int], given: Mapping[str, int], seed: int) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.sizes = sizes
        self.given = given
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.generator = torch.Generator().manual_seed(seed)
        self.example = Example()
        self.dims: dict[str, Any] = {}
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.dtype = parameter.dtype if parameter is not None else torch.float32

    def build(self) -> Example:
        """Add all inputs. Audio takes precedence over images, and images over text."""
        vision, audio = self._vision_input(), self._audio_input()
        text = "input_ids" in self.accepted
        decoder = "decoder_input_ids" in self.accepted
        if audio is not None:
            audio()
        elif vision is not None:
            if self.model.config.model_type in _ONE_BATCH:
                self._text("batch", "seq")
                vision("batch")
            elif text and "pixel_values" in self.accepted:
                self._text("batch", "seq")
                vision("image_batch")
            else:
                vision("batch")
        elif text and decoder and self._needs_decoder_ids():
            self._text("batch", "src_seq")
        elif text and type(self.model).__name__.endswith("MultipleChoice"):
            self._text("batch", "seq", choices=2)
        elif text:
            self._text("batch", "seq")
        else:
            known = ", ".join(sorted(self.accepted)[:6])
            raise LoadError(
                f"no example inputs are known for {type(self.model).__name__} (it takes {known}); "
                "load it with a py: factory that returns example inputs"
            )
        if decoder and self._needs_decoder_ids():
            self._ids("decoder_input_ids", "batch", "tgt_seq", self._limit("decoder"))
        return self.example

    def _needs_decoder_ids(self) -> bool:
        """False for heads that derive the decoder input from the encoder input."""
        name = type(self.model).__name__
        return not name.endswith(("ForSequenceClassification", "ForQuestionAnswering"))

    def _dim(self, name: str, high: int | None = None, low: int | None = None) -> Any:
        """The Dim of a name. The first call sets its bounds; torch.export needs one object for equal dimensions."""
        if name not in self.dims:
            bounds = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
            self.dims[name] = Dim(name, **bounds)
        return self.dims[name]

    def _size(self, name: str, high: int | None = None) -> int:
        # At most one below the limit, so that the capture can also be checked at a larger size.
        return self.sizes[name] if high is None else max(2, min(self.sizes[name], high - 1))

    def _add(self, name: str, value: torch.Tensor, shape: dict[int, Any] | None) -> None:
        self.example.inputs[name] = value
        self.example.shapes[name] = shape

    # Text

    def _text(self, batch: str, seq: str, choices: int = 0) -> None:
        limit = self._limit("encoder" if "decoder_input_ids" in self.accepted else None)
        self._ids("input_ids", batch, seq, limit, choices)
        shape = self.example.inputs["input_ids"].shape
        dynamic = self.example.shapes["input_ids"]
        if "attention_mask" in self.accepted:
            mask = torch.ones(shape, dtype=torch.long)
            if not choices:
                # With padding in the last row, a capture that drops the mask fails its check.
                mask[-1, -2:] = 0
            self._add("attention_mask", mask, dynamic)
        text = _text_config(self.config)
        if "token_type_ids" in self.accepted and (getattr(text, "type_vocab_size", 0) or 0) > 1:
            self._add("token_type_ids", torch.zeros(shape, dtype=torch.long), dynamic)

    def _ids(self, name: str, batch: str, seq: str, limit: int | None, choices: int = 0) -> None:
        text = _text_config(self.config, name.startswith("decoder"))
        vocabulary = _vocabulary(self.model, text)
        rows, length = self._size(batch), self._size(seq, limit)
        special = _special_ids(self.config) | _special_ids(text)
        # Draw ordinary tokens only. Special tokens lie at either end of the vocabulary, so `low` and `high` exclude
        # those of the lower and of the upper half.
        low = max([i for i in special if i < vocabulary // 2], default=-1) + 1
        high = min([i for i in special if i >= vocabulary // 2] + [vocabulary])
        shape = (rows, choices, length) if choices else (rows, length)
        ids = torch.randint(low, max(low + 1, high), shape, generator=self.generator)
        end = getattr(text, "eos_token_id", None)
        end = end[0] if isinstance(end, list) and end else end
        if isinstance(end, int) and end < vocabulary and self._reads_end_token():
            ids[..., -1] = end
        self._add(name, ids, {0: self._dim(batch), len(shape) - 1: self._dim(seq, limit)})

    def _reads_end_token(self) -> bool:
        """True for models that pool at the end token: BART and T5 classification, and CLIP text encoders."""
        name = type(self.model).__name__
        pools = "decoder_input_ids" in self.accepted and name.endswith("ForSequenceClassification")
        return pools or "clip" in self.config.model_type

    def _limit(self, part: str | None) -> int | None:
        """Longest sequence that the position tables allow.

        Args:
            part: "encoder" or "decoder" considers the tables of that part only; None considers all.
        """
        limits = []
        for name, module in self.model.named_modules():
            leaf = name.rpartition(".")[2]
            other = {"encoder": "decoder", "decoder": "encoder"}.get(part or "")
            if other and other in name.split("."):
                continue
            if any(part in name.lower() for part in ("vision", "image", "visual", *_UNBOUNDED_TABLES)):
                continue
            weight = getattr(module, "weight", None)
            positional = "pos" in leaf or leaf == "wpe"
            if positional and isinstance(weight, torch.Tensor) and weight.ndim == 2 and _is_table(module):
                # OPT and BART reserve the first `offset` rows. RoBERTa starts at padding_idx + 1 instead.
                offset = getattr(module, "offset", 0) or 0
                padding = getattr(module, "padding_idx", None)
                taken = padding + 1 if isinstance(padding, int) and not offset else 0
                limits.append(weight.shape[0] - max(int(offset), taken))
        text = _text_config(self.config)
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"):
            value = getattr(text, key, None)
            if isinstance(value, int) and value > 1 and (key != "max_target_positions" or part == "decoder"):
                limits.append(value)
        return min(limits, default=None)

    # Images

    def _vision_input(self) -> Callable[[str], None] | None:
        """Function that adds the image or video input, given the name of the batch dimension; None without one."""
        if "pixel_values_videos" in self.accepted and "input_ids" not in self.accepted:
            return lambda batch: self._pixels("pixel_values_videos", batch, video=True)
        if "pixel_values" not in self.accepted:
            return None
        video = getattr(self.config, "num_frames", None) is not None and "text_config" not in self.config
        return lambda batch: self._pixels("pixel_values", batch, video=video)

    def _pixels(self, name: str, batch: str, video: bool) -> None:
        config = _vision_config(self.config)
        size = getattr(config, "image_size", None) or getattr(config, "input_size", None)
        size = self.given.get("image_size", size or 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = int(getattr(config, "num_channels", None) or 3)
        frames = (int(config.num_frames),) if video else ()
        shape = (self._size(batch), *frames, channels, int(height), int(width))
        pixels = torch.randn(shape, generator=self.generator).to(self.dtype)
        self._add(name, pixels, {0: self._dim(batch)})
        if "pixel_mask" in self.accepted and self.config.model_type in _ONE_BATCH:
            mask = torch.ones((shape[0], shape[-2], shape[-1]), dtype=torch.long)
            self._add("pixel_mask", mask, {0: self._dim(batch)})

    # Audio

    def _audio_input(self) -> Callable[[], None] | None:
        """Function that adds the audio input; None if the model takes no audio."""
        if "input_features" in self.accepted:
            return self._features
        if "input_values" in self.accepted:
            return self._spectrogram if hasattr(self.config, "num_mel_bins") else self._waveform
        return None

    def _waveform(self) -> None:
        rows, length = self._size("batch"), self.sizes["samples"]
        wave = torch.randn((rows, length), generator=self.generator).to(self.dtype)
        # For a shorter waveform the stack of convolutions outputs no frame at all.
        low = max(2 * _reach(self.config), 400)
        self._add(
            "input_values", wave, {0: self._dim("batch"), 1: self._dim("samples", low=low, high=1 << 20)}
        )

    def _spectrogram(self) -> None:
        length = int(getattr(self.config, "max_length", None) or self.sizes["frames"])
        shape = (self._size("batch"), length, int(self.config.num_mel_bins))
        values = torch.randn(shape, generator=self.generator).to(self.dtype)
        self._add("input_values", values, {0: self._dim("batch")})

    def _features(self) -> None:
        config: Any = getattr(self.config, "audio_config", None) or self.config
        rows = self._size("batch")
        bins = int(
            getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80) or 80
        )
        positions = getattr(config, "max_source_positions", None)
        shape: tuple[int, ...]
        if config.model_type in ("whisper", "moonshine_streaming") and positions:
            shape = (rows, bins, 2 * int(positions))
        elif config.model_type == "clap_audio_model":
            shape = (rows, 1, int(config.spec_size) * 4, bins)
        else:
            bins = int(getattr(config, "feature_projection_input_dim", bins) or bins)
            shape = (rows, self.sizes["frames"], bins)
        values = torch.randn(shape, generator=self.generator).to(self.dtype)
        if "input_ids" in self.accepted:
            self._text("batch", "seq")
        self._add("input_features", values, {0: self._dim("batch")})
        if config.model_type == "clap_audio_model":
            self._add("is_longer", torch.zeros((rows, 1), dtype=torch.bool), {0: self._dim("batch")})


# Model types in which texts and images attend to each other: both inputs share one batch dimension.
_ONE_BATCH = ("vilt", "flava", "bridgetower", "git", "blip", "pix2struct", "vision-text-dual-encoder")


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__


def _text_config(config: Any, decoder: bool = False) -> Any:
    """Configuration of the text model. CLIP's `get_text_config` returns the whole config, hence the fallback."""
    found = config.get_text_config(decoder=True) if decoder else config.get_text_config()
    if found is None or not hasattr(found, "vocab_size"):
        found = getattr(config, "text_config", None) or config
    return found


def _vision_config(config: Any) -> Any:
    return getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config


def _vocabulary(model: nn.Module, config: Any) -> int:
    """Vocabulary size: from the config, else the number of rows of the input embedding."""
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int):
        return size
    try:
        return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        raise LoadError(
            f"{type(model).__name__} has no vocab_size in its configuration; set it, or write a py: factory"
        ) from None


def _special_ids(config: Any) -> set[int]:
    """Ids of padding, start, end and image tokens. Models treat them specially, so examples avoid them."""
    keys = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "image_token_id")
    values = [getattr(config, key, None) for key in keys]
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    return {value for value in flat if isinstance(value, int) and value >= 0}


def _reach(config: Any) -> int:
    """Receptive field, in samples, of one output frame of the feature encoder (400 if the config has no sizes)."""
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not isinstance(kernels, (list, tuple)) or not isinstance(strides, (list, tuple)):
        return 400
    reach, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=False):
        reach += (kernel - 1) * step
        step *= stride
    return reach
