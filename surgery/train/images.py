"""Converts images in rows to model inputs, and draws random augmented views of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from surgery.capture.normalization import Statistics
from surgery.common.errors import MissingExtraError, TrainingError

IMAGE = ("image", "img", "picture", "pixels", "file")
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Images:
    """Image format of a model. The model input is (pixels − mean) / std for pixels from 0 to 1.

    Attributes:
        input: name of the input (batch × channels × height × width).
        channels: number of channels.
        height: height in pixels.
        width: width in pixels.
        mean: mean per channel, on the scale 0 to 1.
        std: standard deviation per channel, on the scale 0 to 1.
    """

    input: str
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(found: Statistics, name: str, example: Tensor) -> Images:
        """Make the image format of a model.

        Args:
            found: mean and standard deviation of the pixels; 0 and 1 if there are none, or not one for each channel.
            name: name of the image input.
            example: example of the input.
        """
        channels, height, width = (int(size) for size in example.shape[1:])
        mean, std = (tuple(found.get(key) or ())[:channels] for key in ("mean", "std"))
        whole = len(mean) == len(std) == channels
        return Images(
            name,
            channels,
            height,
            width,
            mean if whole else (0.0,) * channels,
            std if whole else (1.0,) * channels,
        )

    def read(self, value: Any, column: str) -> bytes:
        """Convert one image of a row to bytes.

        Args:
            value: a PIL image, a path, or numbers (height × width, with channels first or last; integers up to 255,
                or fractions up to 1).
            column: name of the column, for errors.

        Returns:
            Pixels from 0 to 255 (channels × height × width), resized to the model's size.

        Raises:
            TrainingError: the value is none of these.
            MissingExtraError: pillow is not installed.
        """
        try:
            from PIL import Image
        except ModuleNotFoundError:
            raise MissingExtraError("pillow", "train") from None
        if self.channels not in _MODES:
            raise TrainingError(
                f"the model takes {self.channels} channels, but images have 1 or 3; use another model"
            )
        if isinstance(value, str):
            try:
                value = Image.open(value)
            except OSError as error:
                raise TrainingError(
                    f"column {column!r}: {value} cannot be read as an image: {error}"
                ) from None
        if not isinstance(value, Image.Image):
            value = Image.fromarray(_array(value, column))
        value = value.convert(_MODES[self.channels])
        if value.size != (self.width, self.height):
            value = value.resize((self.width, self.height), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
        return (
            pixels.view(self.height, self.width, self.channels)
            .permute(2, 0, 1)
            .contiguous()
            .numpy()
            .tobytes()
        )

    def pixels(self, images: Sequence[bytes]) -> Tensor:
        """Convert stored bytes to a tensor (rows × channels × height × width, fp32 from 0 to 1)."""
        flat = torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8)
        return flat.view(-1, self.channels, self.height, self.width).float() / 255

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """Normalize pixels from 0 to 1 to the model's input."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return {self.input: (pixels - mean) / std}


def views(pixels: Tensor, draw: Generator, crop: float = 0.35, mirror: bool = True) -> Tensor:
    """Draw a random view of each image: crop, mirror, brightness and contrast.

    A view shows a part of the image with an aspect ratio from 3/4 to 4/3, resized to the full size. Brightness and
    contrast change by up to 0.3.

    Args:
        pixels: N × channels × height × width, from 0 to 1.
        draw: random generator.
        crop: smallest area of a view, as a share of the image.
        mirror: mirror half of the views.
    """
    count = len(pixels)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw)

    area, ratio = between(crop, 1.0), between(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = between(-1, 1) * (1 - width), between(-1, 1) * (1 - height)
    mirrored = torch.where((torch.rand(count, generator=draw) < 0.5) & mirror, -1.0, 1.0)
    zero = torch.zeros(count)
    # Row i of an affine matrix maps an output coordinate in [-1, 1] to an input coordinate. A negative width
    # mirrors.
    where = torch.stack([width * mirrored, zero, left, zero, height, top], 1).view(count, 2, 3)
    grid = F.affine_grid(where, list(pixels.shape), align_corners=False)
    seen = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    contrast, light = between(0.7, 1.3).view(-1, 1, 1, 1), between(-0.3, 0.3).view(-1, 1, 1, 1)
    middle = seen.mean((1, 2, 3), keepdim=True)
    return ((seen - middle) * contrast + middle + light).clamp(0, 1)


def _array(value: Any, column: str) -> Any:
    """Convert numbers to a uint8 array of height × width (× 3), as PIL expects it."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TrainingError(
            f"column {column!r} contains {str(value)[:60]!r}, which is not an image"
        ) from None
    if found.dim() == 3 and found.shape[0] in _MODES and found.shape[-1] not in _MODES:
        found = found.permute(1, 2, 0)
    if found.dim() == 3 and found.shape[-1] == 1:
        found = found[..., 0]
    if found.dim() not in (2, 3) or (found.dim() == 3 and found.shape[-1] != 3):
        raise TrainingError(
            f"column {column!r} contains numbers of shape {list(found.shape)}, which is not an image"
        )
    low, high = float(found.min()), float(found.max())
    if not (low >= 0 and high <= (1 if found.is_floating_point() else 255)):
        raise TrainingError(
            f"column {column!r} has pixels from {low:g} to {high:g}; give integers from 0 to 255, "
            f"or fractions from 0 to 1"
        )
    return (
        ((found * 255).round() if found.is_floating_point() else found).to(torch.uint8).contiguous().numpy()
    )
