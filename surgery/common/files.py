"""Atomic writes: files are written beside their path and renamed.

A path therefore holds either its old contents or all of its new contents, even if the process is killed.
"""

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

# Every directory of a saved model or adapter contains one of these. Only such a directory may be overwritten.
_OURS = ("surgery.json", "config.json", "adapter_config.json", "adapters.json")


@contextmanager
def staged_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A context with a new directory that replaces `path` if the block ends without an error.

    Args:
        path: directory to write.
        overwrite: replace what `path` holds.

    Yields:
        The new directory, in the same parent as `path`.

    Raises:
        SurgeryError: `path` is in use (see `refuse_taken`) or cannot be written.
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
    """Check that a directory may be written to `path`.

    Args:
        path: directory to write.
        overwrite: allow a directory that surgery, transformers or PEFT wrote.

    Raises:
        SurgeryError: `path` exists and is not empty, and `overwrite` is false or other files are there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise SurgeryError(f"{path} exists; choose another -o, or pass --overwrite")
    if not any((path / name).is_file() for name in _OURS):
        what = "a directory with other files" if path.is_dir() else "a file"
        raise SurgeryError(
            f"{path} is {what} and not a saved model, which --overwrite does not replace; choose another -o"
        )


def refuse_file(path: Path, overwrite: bool, another: str = "-o") -> None:
    """Check that a file may be written.

    Args:
        path: file to write.
        overwrite: allow to replace it.
        another: what the user is to choose instead, such as the option of the file.

    Raises:
        SurgeryError: `path` exists, and `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise SurgeryError(f"{path} exists; choose another {another}, or pass --overwrite")


def _replace(stage: Path, path: Path) -> None:
    # The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    for file in stage.rglob("*"):
        if file.is_file():
            # safetensors creates files that only their owner may read.
            file.chmod(0o666 & ~mask)
            # Contents must be on disk before the rename is, or a crash leaves empty files at `path`.
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    if not path.exists():
        stage.rename(path)
        return
    # rename() replaces no directory that has entries, so the old one is moved away first.
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    path.rename(old)
    stage.rename(path)
    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()


def _sweep(path: Path) -> None:
    """Remove the unfinished directories of processes that were killed."""
    for left in path.parent.glob(f".{path.name}.partial-*"):
        pid = left.name.rpartition("-")[2]
        alive = pid.isdigit() and Path(f"/proc/{pid}").exists()
        if not alive:
            with suppress(OSError):
                shutil.rmtree(left)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises SurgeryError if it cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically. Raises SurgeryError if it cannot be written."""
    stage = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage.write_bytes(data)
        stage.replace(path)
    except OSError as error:
        raise SurgeryError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        stage.unlink(missing_ok=True)


@cache
def core_version() -> str:
    """Version of torch-surgery, "" if it is not installed as a distribution."""
    try:
        return metadata.version("torch-surgery")
    except metadata.PackageNotFoundError:
        return ""
