"""Writing aside and renaming: a path holds either the whole of what was written or what it held before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from surgery.common.errors import SurgeryError

# One of these is in every directory that a model or an adapter is saved in.
_OURS = ("surgery.json", "config.json", "adapter_config.json", "adapters.json")


@contextmanager
def staged_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory beside `path` that takes its place when the block ends without an error.

    Raises SurgeryError where `path` holds something already (unless overwrite), or where it cannot be written.
    """
    path = Path(path)
    refuse_taken(path, overwrite)
    stage = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        stage.mkdir()
        yield stage
        _replace(stage, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SurgeryError(f"{path} could not be written: {reason}; nothing was left there") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise SurgeryError where `path` holds something, unless overwrite; and then where what it holds was written
    neither by surgery nor by transformers."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise SurgeryError(f"{path} exists; choose another -o, or pass --overwrite")
    if not any((path / name).is_file() for name in _OURS):
        what = "a directory with other files" if path.is_dir() else "a file"
        raise SurgeryError(
            f"{path} is {what}, which is not replaced by a model's directory; choose another -o"
        )


def _replace(stage: Path, path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for file in stage.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    if not path.exists():
        stage.rename(path)
        return
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    path.rename(old)
    stage.rename(path)
    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()


def _sweep(path: Path) -> None:
    """Remove what a killed process left behind."""
    for left in path.parent.glob(f".{path.name}.partial-*"):
        pid = left.name.rpartition("-")[2]
        alive = pid.isdigit() and Path(f"/proc/{pid}").exists()
        if not alive:
            with suppress(OSError):
                shutil.rmtree(left)


def write_text(path: Path, text: str) -> None:
    """Write a text file aside and rename it. Raises SurgeryError where it cannot be written."""
    stage = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage.write_text(text)
        stage.replace(path)
    except OSError as error:
        raise SurgeryError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        stage.unlink(missing_ok=True)


@cache
def core_version() -> str:
    try:
        return metadata.version("torch-surgery")
    except metadata.PackageNotFoundError:
        return ""
