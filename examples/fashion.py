"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), and a network that encodes its images as vectors.

apt-get downloads the images as Debian's package `dataset-fashion-mnist` (MIT licence). The file is checked by sha256
and kept in the cache of data.py; nothing is installed.
"""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch
from data import DataError, cache_folder, sha256
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE, VERSION = "dataset-fashion-mnist", "0.0~git20200523.55506a9-1"
SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
FILES = {True: "train", False: "t10k"}


class Encoder(nn.Module):
    """Encodes images (batch × 1 × 28 × 28) as vectors (batch × features)."""

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.norm1, self.norm2, self.norm3 = nn.GroupNorm(4, 32), nn.GroupNorm(8, 64), nn.GroupNorm(8, 128)
        self.vector = nn.Linear(128, features)

    def forward(self, image: Tensor) -> Tensor:
        image = F.relu(self.norm1(self.conv1(image)))
        image = F.relu(self.norm2(self.conv2(image)))
        image = F.relu(self.norm3(self.conv3(image)))
        return F.relu(self.vector(image.mean((2, 3))))


def encoder() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]:
    """Factory for `py:fashion:encoder`: an untrained network, example inputs and the dynamic axis."""
    torch.manual_seed(0)
    return Encoder(), (torch.rand(2, 1, 28, 28),), {"image": {0: "batch"}}


def fashion(train: bool = True) -> tuple[Tensor, Tensor]:
    """Images (60,000, or 10,000 for testing, × 28 × 28, uint8) and their classes.

    Raises:
        DataError: the package cannot be downloaded, or is not the pinned one.
    """
    with tarfile.open(fileobj=io.BytesIO(_data(_package())), mode="r:*") as tar:
        images, labels = (
            _numbers(tar, f"{FILES[train]}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
        )
    return images.view(-1, 28, 28), labels.long()


def _numbers(tar: tarfile.TarFile, name: str) -> Tensor:
    """Data of a file in IDX format, without the header."""
    member = next((m for m in tar.getmembers() if m.name.endswith(name)), None)
    stream = member and tar.extractfile(member)
    if not stream:
        raise DataError(f"{PACKAGE} does not contain {name}")
    raw = gzip.decompress(stream.read())
    return torch.frombuffer(bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8)


def _data(package: Path) -> bytes:
    """Data archive of a Debian package, which is an ar archive."""
    raw = package.read_bytes()
    place = 8
    while place < len(raw):
        name, size = raw[place : place + 16].decode().strip(" /"), int(raw[place + 48 : place + 58])
        if name.startswith("data.tar"):
            return raw[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise DataError(f"{package.name} does not contain data.tar")


def _package() -> Path:
    path = cache_folder() / f"{PACKAGE}_{VERSION}_all.deb"
    if path.is_file() and sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.which("apt-get") is None:
        raise DataError(
            f"apt-get, which downloads Fashion-MNIST, is not installed; put {path.name} into {path.parent} yourself"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run(
            ["apt-get", "download", "-q", f"{PACKAGE}={VERSION}"], cwd=folder, capture_output=True, text=True
        )
        found = next(Path(folder).glob("*.deb"), None)
        if done.returncode or found is None:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["apt-get gave no reason"]
            raise DataError(f"apt-get could not download {PACKAGE}={VERSION}: {said[-1].strip()}")
        if sha256(found) != SHA256:
            raise DataError(f"{found.name} is not the pinned file: its sha256 is {sha256(found)}")
        found.rename(path)
    return path
