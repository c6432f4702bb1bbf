"""Checks of an ONNX file from elsewhere, before onnxruntime or another library reads it.

A tensor in such a file may name any other file as its data, and may claim any size. Both are held against the
directory of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from surgery.common.errors import ExportError, SurgeryError
from surgery.common.readers import first_line
from surgery.export.optional import require

_MOST_VALUES = 2**40
# Bits of one value, by the name of the ONNX data type. Strings have no fixed size.
_BITS = {
    "FLOAT": 32, "UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16, "INT32": 32, "INT64": 64, "STRING": 0, "BOOL": 8,
    "FLOAT16": 16, "DOUBLE": 64, "UINT32": 32, "UINT64": 64, "COMPLEX64": 64, "COMPLEX128": 128, "BFLOAT16": 16,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "UINT4": 4, "INT4": 4,
    "FLOAT4E2M1": 4, "FLOAT8E8M0": 8, "UINT2": 2, "INT2": 2,
}  # fmt: skip
_TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def read_checked(path: Path) -> Any:
    """The ModelProto of a file, without its external data.

    Args:
        path: the ONNX file.

    Raises:
        ExportError: the file is no ONNX model; a tensor names a data file that is missing or outside the directory of
            the file; or a tensor claims more values than its data hold.
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"'{path}' cannot be read as ONNX: {first_line(error)}") from None
    types = {number: name for name, number in onnx.TensorProto.DataType.items()}
    try:
        for tensor in _tensors(model, onnx.TensorProto):
            _check_tensor(tensor, types, path)
    except SurgeryError:
        raise
    except Exception as error:  # a name that is no file name, or no text
        raise ExportError(f"'{path}' has a damaged tensor: {first_line(error)}") from None
    return model


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """Every tensor in a protobuf message: initializers, attributes, and those of subgraphs and functions."""
    if isinstance(message, kind):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        # A map field has scalars as keys; ONNX has none.
        for inner in value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else (value,):
            yield from _tensors(inner, kind)


def _check_tensor(tensor: Any, types: dict[int, str], path: Path) -> None:
    where = f"'{path}': the tensor {_shown(tensor.name)}"
    bits = _BITS.get(types.get(tensor.data_type, ""))
    if bits is None:
        raise ExportError(f"{where} has the data type {tensor.data_type}, which is unknown")
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > _MOST_VALUES:
        raise ExportError(f"{where} has the shape {list(tensor.dims)[:8]}, which no tensor has")
    count = math.prod(tensor.dims)
    if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
        held = _external_bytes(tensor, path, where)
        fits = bits > 0 and (count * bits + 7) // 8 <= held
    elif tensor.raw_data:
        fits = bits > 0 and (count * bits + 7) // 8 <= len(tensor.raw_data)
    else:
        # Types of four bits and less have several values in one entry of 32 bits.
        entries = sum(len(getattr(tensor, name)) for name in _TYPED)
        fits = count <= entries * (8 // min(bits, 8) if bits else 1)
    if not fits:
        raise ExportError(
            f"{where} has the shape {list(tensor.dims)[:8]}, and the file holds fewer values; it is damaged"
        )


def _external_bytes(tensor: Any, path: Path, where: str) -> int:
    """Bytes of a tensor's data in another file. Raises ExportError if that file may not be read."""
    given = [(entry.key, entry.value) for entry in tensor.external_data]
    named = dict(given)
    location = named.get("location", "")
    # A text that is not UTF-8 comes as bytes.
    if not location or not isinstance(location, str) or len(named) < len(given):
        raise ExportError(f"{where} names no data file, or several")
    relative = PurePosixPath(location)
    if (
        relative.is_absolute()
        or ".." in relative.parts
        or "\\" in location
        or PureWindowsPath(location).drive
        or not location.isprintable()
    ):
        raise ExportError(
            f"{where} has its data in {_shown(location)}, which is outside the directory of the file; only files in "
            "that directory are read"
        )
    folder, file = path.parent.resolve(), (path.parent / relative).resolve()
    if not file.is_relative_to(folder):
        raise ExportError(
            f"{where} has its data in {_shown(location)}, a link to another directory; copy the data beside the file"
        )
    if not file.is_file():
        raise ExportError(f"{where} has its data in {_shown(location)}, which is not there")
    size = file.stat().st_size
    offset, length = (_natural(named.get(key), key, where) for key in ("offset", "length"))
    start = offset or 0
    held = size - start if length is None else length
    if start > size or held > size - start:
        raise ExportError(f"{where} has its data in {_shown(location)}, which is too short; it is damaged")
    return held


def _natural(text: str | None, key: str, where: str) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise ExportError(
            f"{where} has the {key} {_shown(text)} of its data; it has to be a number from 0 on"
        )
    return int(text)


def _shown(text: str | bytes) -> str:
    return repr(text[:60])
