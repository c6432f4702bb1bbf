"""Constructor arguments and example sizes that a file names: a recipe, or the manifest of a saved directory.

A file from elsewhere may say how a model is built, and not how it is loaded: arguments that can run code, read pickles,
or reach other files and hosts are refused, and so are sizes that no model has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from surgery.common.errors import SurgeryError

DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")

# Arguments of transformers' and timm's loaders that are no property of a model.
_LOADING = frozenset(
    {
        "adapter_kwargs", "adapter_name", "allow_all_kernels", "auto_map", "cache_dir", "code_revision", "config",
        "custom_generate", "device_map", "device_mesh", "distributed_config", "force_download", "from_flax", "from_tf",
        "generation_config", "kernel_config", "key_mapping", "local_files_only", "max_memory", "mirror",
        "offload_buffers", "offload_folder", "offload_state_dict", "output_loading_info", "pretrained_cfg",
        "pretrained_cfg_overlay", "pretrained_model_name_or_path", "proxies", "quantization_config",
        "resume_download", "return_unused_kwargs", "state_dict", "token", "tp_plan", "tp_size", "tqdm_class",
        "use_auth_token", "use_kernels",
    }
)  # fmt: skip
# Allowed only with the value that is safe.
_SAFE: Mapping[str, Any] = {
    "trust_remote_code": False,
    "weights_only": True,
    "use_safetensors": True,
    "use_pretrained_backbone": False,
}
_FILES = ("gguf_file", "subfolder", "variant", "revision")
_IMAGES = ("img_size", "image_size")
_LARGEST_IMAGE = 2048
_MOST_CLASSES = 100_000  # each one is a text in the configuration
_MOST_LAYERS = 10_000
_MOST = 10**8
_MOST_VALUES = 2**20  # of the example inputs together
_DEEPEST = 8


def check_kwargs(kwargs: Mapping[str, Any], ref: str, where: str, failure: type[SurgeryError]) -> None:
    """Check constructor arguments that come from a file.

    Args:
        kwargs: The arguments.
        ref: Reference of the model. The factory of a `py:` reference is the user's own code and gets any arguments.
        where: File and field, for messages.
        failure: Error to raise.

    Raises:
        SurgeryError: `failure`, if an argument can run code, read a pickle, write a file, or is out of range.
    """
    if ref.startswith("py:"):
        return
    problem = _problem(kwargs, 0)
    if problem:
        raise failure(
            f"{where}: {problem}; if you want that, load the model yourself, with --model-kwarg NAME=VALUE"
        )


def check_example(sizes: Mapping[str, int], where: str, failure: type[SurgeryError]) -> None:
    """Check sizes of example inputs that come from a file.

    Raises:
        SurgeryError: `failure`, if a size is not positive, or the inputs would be large.
    """
    for name, size in sizes.items():
        high = _LARGEST_IMAGE if name in _IMAGES else _MOST_VALUES
        if not 0 < size <= high:
            raise failure(f"{where}: the size of {name[:60]!r} is {size}; it has to be from 1 to {high}")
    if math.prod(size for name, size in sizes.items() if name not in _IMAGES) > _MOST_VALUES:
        raise failure(f"{where}: the example inputs have over {_MOST_VALUES} values together")


def _problem(value: Any, depth: int, key: str = "") -> str:
    """The reason why an argument is refused, or ""."""
    if depth > _DEEPEST:
        return f"{key} is nested too deeply"
    if isinstance(value, Mapping):
        for name, inner in value.items():
            found = _named(str(name), inner) or _problem(inner, depth + 1, str(name)[:60])
            if found:
                return found
        return ""
    if isinstance(value, (list, tuple)):
        return next((found for inner in value if (found := _problem(inner, depth + 1, key))), "")
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} is {value}"
    if isinstance(value, int) and not isinstance(value, bool):
        high = (
            _LARGEST_IMAGE
            if key in _IMAGES
            else _MOST_CLASSES
            if key in ("num_labels", "num_classes")
            else _MOST_LAYERS
            if "layers" in key or "blocks" in key
            else _MOST
        )
        return "" if abs(value) <= high else f"{key} is {value}, over {high}"
    if isinstance(value, str) and (len(value) > 4096 or not value.isprintable()):
        return f"{key} is no line of text"
    return ""


def _named(name: str, value: Any) -> str:
    """The reason why an argument of this name is refused, or ""."""
    if name in _LOADING or name.startswith("_"):
        return f"the argument {name[:60]!r} decides how a model is loaded, which is not read from a file"
    if name in _SAFE and value is not None and value is not _SAFE[name]:
        return f"the argument {name!r} is {str(value)[:60]}, which lets a model run code"
    if name in ("dtype", "torch_dtype") and value is not None and value not in DTYPES:
        return f"the dtype is {str(value)[:60]!r}, not one of {', '.join(DTYPES)}"
    if name.endswith("attn_implementation") and "/" in str(value):
        return f"the argument {name!r} is {str(value)[:60]!r}, which downloads a kernel"
    if name in _FILES and value is not None and not _is_inside(value):
        return f"the argument {name!r} is {str(value)[:60]!r}, which is outside the model's directory"
    return ""


def _is_inside(value: Any) -> bool:
    """True for a relative path that stays below the directory that it is relative to."""
    if not isinstance(value, str) or "\\" in value or PureWindowsPath(value).drive:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts
