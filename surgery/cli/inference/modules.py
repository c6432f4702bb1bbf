"""ONNX files as modules: `module(**inputs)` returns the outputs by name, so that objectives can judge them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.common.errors import ExportError, nearest
from surgery.export.runtime import ADAPTER, OnnxModel, adapter_file

_DTYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(bool)": torch.bool,
    "tensor(uint8)": torch.uint8, "tensor(int8)": torch.int8,
}  # fmt: skip


class OnnxModule(nn.Module):
    """An ONNX file that is called like a module.

    Attributes:
        file: the open file.
        adapters: files of the active adapters.
    """

    def __init__(self, file: OnnxModel, adapters: Sequence[str] = ()) -> None:
        """Make the module.

        Args:
            file: the open file.
            adapters: names of adapters beside the file to activate.

        Raises:
            ExportError: there is no such adapter.
        """
        super().__init__()
        self.file = file
        folder = file.path.parent
        known = sorted(path.name.removesuffix(ADAPTER) for path in folder.glob(f"*{ADAPTER}"))
        for name in adapters:
            if name not in known:
                hint = nearest(name, known) or (f"; it has {', '.join(known)}" if known else "")
                raise ExportError(f"{folder} has no adapter {name!r}{hint}")
        self.adapters = [adapter_file(folder, name) for name in adapters]
        self._dtypes = {name: _DTYPES.get(kind) for name, (kind, _) in file.signature.items()}

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name. Inputs are converted to the dtypes of the file."""
        given = {name: value.to(self._dtypes.get(name) or value.dtype) for name, value in inputs.items()}
        return self.file.run(given, self.adapters)


class PrefillModule(nn.Module):
    """The prompt graph of a directory for generation, called like a module: logits of whole texts, without a cache."""

    def __init__(self, generator: Any, adapters: Sequence[str] = ()) -> None:
        """Make the module.

        Args:
            generator: the open directory, from `open_generator`.
            adapters: names of its adapters to activate.
        """
        super().__init__()
        # Not a submodule: the generator is a model without weights.
        self.__dict__["generator"] = generator
        self.adapters = tuple(adapters)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The logits."""
        generator = self.__dict__["generator"]
        with generator.adapter(*self.adapters):
            return {"logits": generator(**inputs, use_cache=False)["logits"]}


def onnx_size(folder: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
