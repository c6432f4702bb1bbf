"""Crafts files: safetensors with edited headers, saved directories with checksums made right, and a memory meter."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.store import saved


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, body: bytes) -> bytes:
    """The bytes of a safetensors file."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def manifest_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / saved.MANIFEST).read_text())
    del found["checksum"]
    return found


def seal(folder: Path, manifest: Any) -> None:
    """Write a manifest with the checksums of what is there: what a crafted directory would have."""
    made = copy.deepcopy(manifest)
    if isinstance(made, dict):
        if isinstance(made.get("files"), dict):
            for name in made["files"]:
                with contextlib.suppress(OSError, ValueError):
                    made["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        made["checksum"] = saved._checksum(made)
    (folder / saved.MANIFEST).write_text(json.dumps(made))


def rename(folder: Path, old: str, new: str) -> None:
    """Rename an inserted tensor in the manifest and in the file."""
    header, body = read_header(folder / saved.INSERTED)
    changed = {new if name == old else name: value for name, value in header.items()}
    (folder / saved.INSERTED).write_bytes(with_header(changed, body))
    text = json.dumps(manifest_of(folder)).replace(json.dumps(old), json.dumps(new))
    seal(folder, json.loads(text))


@contextlib.contextmanager
def memory_below(path: Path) -> Iterator[None]:
    """Fail if the peak of resident memory grows by more than 20 times the files and 200 MB."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    allowed = 20 * sum(file.stat().st_size for file in files) + 200_000_000
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _peak()
    yield
    grown = _peak() - before
    assert grown <= allowed, f"memory grew by {grown / 1e6:,.0f} MB, over {allowed / 1e6:,.0f} MB"


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
