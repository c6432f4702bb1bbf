"""Builds the zoo with surgery's loaders and tests its capture: `python -m tests.zoo.zoo [NAME ...]`.

For each architecture: does plain torch.export capture it with the same inputs and dimensions, does
`surgery.capture.trace` with its check, and does a train capture? The exit code is 1 below 95% of the number that plain
torch.export captures.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch
from torch import nn

from surgery.capture import LoadedModel, hf_config, trace
from surgery.capture import hf as hf_loader
from surgery.capture import timm as timm_loader
from surgery.capture.types import LoadOptions
from surgery.common.errors import SurgeryError
from tests.zoo.architectures import ARCHITECTURES, TIMM

NAMES = [*ARCHITECTURES, *(f"timm:{name}" for name in TIMM)]


def module(name: str) -> nn.Module:
    """The bare transformers model in eval mode, with fixed random weights."""
    import transformers

    arch = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(arch.model_type, **arch.config)
    config.architectures = []  # from_config walks it where a type has several classes (DeiT)
    for class_name in hf_config.auto_classes(arch.task):
        auto = getattr(transformers, class_name)
        if type(config) in auto._model_mapping:
            torch.manual_seed(0)
            return auto.from_config(config).eval()
    raise ValueError(f"{name}: no {arch.task} for {arch.model_type}")


def build(name: str) -> LoadedModel:
    """LoadedModel of an architecture of the zoo, built by surgery's own loader."""
    if name.startswith("timm:"):
        torch.manual_seed(0)
        settings = TIMM[name.removeprefix("timm:")][0]
        loaded = timm_loader.load(name, LoadOptions(model_kwargs=settings, random=True))
        assert loaded is not None
        return loaded
    arch = ARCHITECTURES[name]
    return hf_loader.from_model(module(name), arch.task, example=arch.example)


def expected(name: str) -> dict[str, int] | None:
    """Number of attention weights by role, or None if unknown."""
    return TIMM[name.removeprefix("timm:")][1] if name.startswith("timm:") else ARCHITECTURES[name].expected


def baseline(name: str) -> str | None:
    """None if plain torch.export captures it with the same inputs and dimensions, else the error.

    Only the cache is off, which is a setting of the model; there are no patches, expert implementations or checks.
    """
    loaded = build(name)
    plain = loaded.module
    if not name.startswith("timm:"):
        plain = module(name)
        for holder in plain.modules():
            for config in hf_config.configs(getattr(holder, "config", None)):
                config.use_cache = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.export(
                plain, loaded.args, dict(loaded.kwargs), dynamic_shapes=loaded.dynamic_shapes, strict=False
            )
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"
    return None


def run(name: str) -> dict[str, object]:
    """One row: results of plain export, capture and train capture (None is success), and the seconds."""
    row: dict[str, object] = {"name": name}
    try:
        row["baseline"] = baseline(name)
        loaded = build(name)
    except Exception as error:
        return row | {"baseline": "", "build": f"{type(error).__name__}: {error}"}
    for key, training in (("capture", False), ("train", True)):
        start = time.perf_counter()
        try:
            captured = trace(loaded, training=training)
            row[key] = None
            row[f"{key}_nodes"] = len(captured.graph.nodes)
        except SurgeryError as error:
            row[key] = str(error)
        except Exception as error:
            row[key] = f"RAW {type(error).__name__}: {error}"
        row[f"{key}_s"] = round(time.perf_counter() - start, 2)
    return row


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    rows = []
    for name in names or NAMES:
        row = run(name)
        rows.append(row)
        print(json.dumps(row), flush=True)
    plain = [row for row in rows if "build" not in row and row["baseline"] is None]
    both = [row for row in plain if row["capture"] is None]
    ours = [row for row in rows if "build" not in row and row["capture"] is None]
    train = [row for row in rows if "build" not in row and row["train"] is None]
    print(
        f"{len(rows)} architectures: plain torch.export {len(plain)}, captured {len(ours)} ({len(both)} of those "
        f"{len(plain)}), train {len(train)}"
    )
    return int(len(both) < 0.95 * len(plain))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
