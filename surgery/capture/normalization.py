"""Mean and standard deviation of the pixels that an image model expects, from the files or the module of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.capture.types import LoadedModel
from surgery.common.errors import LoadError
from surgery.common.readers import read_json

PREPROCESSOR = "preprocessor_config.json"

# {"mean": …, "std": …}, one number for each channel, on the scale 0 to 1; empty if unknown.
Statistics = Mapping[str, tuple[float, ...]]


def normalization_of(loaded: LoadedModel) -> Statistics:
    """The statistics of a timm model's configuration, or of the preprocessor_config.json of a transformers model.

    Raises:
        LoadError: that file is damaged.
    """
    timm: Any = getattr(loaded.module, "pretrained_cfg", None)
    if isinstance(timm, dict):
        return _checked(timm.get("mean"), timm.get("std"))
    return read_normalization(Path(str(loaded.metadata.get("tokenizer") or "")))


def read_normalization(folder: Path) -> Statistics:
    """The statistics in the preprocessor_config.json of a directory; empty without that file.

    Raises:
        LoadError: the file is damaged.
    """
    file = folder / PREPROCESSOR
    if not file.is_file():
        return {}
    config = read_json(file, LoadError)
    if not isinstance(config, dict):
        raise LoadError(f"{file} is no configuration; restore it")
    if not config.get("do_normalize", True):
        return {}
    found = _checked(config.get("image_mean"), config.get("image_std"))
    if not found:
        raise LoadError(f"{file} lacks image_mean or image_std; add them")
    return found


def _checked(mean: Any, std: Any) -> Statistics:
    if all(
        isinstance(each, (list, tuple)) and each and all(isinstance(value, (int, float)) for value in each)
        for each in (mean, std)
    ):
        return {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
    return {}
