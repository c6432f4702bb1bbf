"""Reads a LoRA file onto the program of one model of a pipeline."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from surgery.common.errors import LoadError, SurgeryError, nearest
from surgery.common.readers import first_line, read_tensors
from surgery.engine.program import Program
from surgery.graph.sites import Site
from surgery.store.lora_files import flux
from surgery.store.lora_files.keys import PARTS, Key, parse, part_of, same_part
from surgery.store.lora_files.names import read_names
from surgery.store.peft.checkpoint_data import Checkpoint
from surgery.store.peft.files import CONFIG, by_pattern
from surgery.store.peft.read_lora import read_lora
from surgery.store.peft.schema import check_config

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name of the file in a directory
METADATA = "lora_adapter_metadata"  # diffusers' key of the options in the header of a file
_AGAIN = "fetch or write the file again"
# Decompositions other than LoRA, by a part of their keys.
_OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a core tensor",
    "oft_": "OFT",
    ".diff": "full weights",
}


def import_lora(path: Any, base: Program, *, label: str = "") -> Program:
    """Apply the factors that a LoRA file has for one model of a pipeline.

    The file may have the keys of diffusers (also the old ones with `processor`), of PEFT, or of kohya's scripts, with
    `alpha` or without, with the magnitudes of DoRA, on linear layers and convolutions (LoCon). Fused projections of
    Flux are taken apart.

    Args:
        path: The file, or a directory with a pytorch_lora_weights.safetensors.
        base: Program of the model: a part of `diffusers:DIR`, or a capture of `pipe.unet`.
        label: Label of the passes. If ranks or alphas differ, there is a pass for each, with the labels label_1,
            label_2, …

    Returns:
        The program with the passes applied.

    Raises:
        LoadError: The file cannot be read, has nothing for this model, was made for another one, or has factors that
            are no LoRA.
    """
    file = _file(Path(path))
    raw = read_tensors(file, LoadError, _AGAIN)
    part = part_of(base)
    keys = _parsed(file, raw)
    own = {name: key for name, key in keys.items() if same_part(key, part)}
    if not own:
        raise LoadError(
            f"{file} has nothing for {part or 'this model'}, but for {', '.join(_named(keys.values()))}; load that "
            "part with --part"
        )
    try:
        factors = _by_path(file, raw, own, base)
        config = _config(file, factors, _metadata(file), own, part)
        tensors = {
            f"{path}.lora_{_PEFT[which]}": tensor.clone()
            for path, each in factors.items()
            for which, tensor in each.items()
            if which != "alpha"
        }
        return read_lora(Checkpoint(str(file), config, tensors, label, raw), base)
    except SurgeryError:
        raise
    except Exception as error:
        # The file is not trusted, and can have contents that raise any exception.
        raise LoadError(
            f"{file} cannot be read ({type(error).__name__}: {first_line(error)}); {_AGAIN}"
        ) from error


_PEFT = {"A": "A.weight", "B": "B.weight", "m": "magnitude_vector"}


def parts_in(path: Any) -> list[str]:
    """Names of the models of a pipeline that a file has factors for; "main" for kohya's UNet or transformer."""
    file = _file(Path(path))
    return _named(_parsed(file, read_tensors(file, LoadError, _AGAIN)).values())


def _named(keys: Iterable[Key]) -> list[str]:
    return sorted({key.part for key in keys if key.part}, key=("main", *PARTS).index)


def _file(path: Path) -> Path:
    """The file of a path."""
    if path.is_dir():
        if (path / CONFIG).is_file():
            raise LoadError(f"{path} is a PEFT checkpoint; read it with import-peft")
        if not (path / WEIGHTS).is_file():
            raise LoadError(f"{path} has no {WEIGHTS}; name the file")
        return path / WEIGHTS
    if not path.is_file():
        raise LoadError(f"there is no file {path}; check the path")
    if path.suffix != ".safetensors":
        raise LoadError(f"{path} is no .safetensors file; pickles can run code and are not read, convert it")
    return path


def _parsed(file: Path, raw: Mapping[str, Tensor]) -> dict[str, Key]:
    """The keys of a file. Raises LoadError for a key that is none of a LoRA."""
    found = {}
    for name in raw:
        key = parse(name)
        if key is None:
            other = next((kind for mark, kind in _OTHERS.items() if mark in name), "")
            raise LoadError(
                f"{file} has the key {name[:200]!r}, which is {other or 'unknown'}; only LoRA and LoCon are read"
            )
        found[name] = key
    return found


def _by_path(
    file: Path, raw: Mapping[str, Tensor], keys: Mapping[str, Key], base: Program
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by path of the module and what they are."""
    sites = {site.path: site for site in base.sites}
    table = read_names(base, sites)
    modules: dict[tuple[str, bool], dict[str, Tensor]] = defaultdict(dict)
    for name, key in keys.items():
        if key.tensor in modules[key.name, key.kohya]:
            raise LoadError(f"{file} has two tensors {key.tensor} of {key.name[:200]}; {_AGAIN}")
        modules[key.name, key.kohya][key.tensor] = raw[name]
    found: dict[str, dict[str, Tensor]] = {}
    for (name, kohya), own in modules.items():
        paths = table.get(name) if kohya else _dotted(name, sites)
        if paths is None or any(path not in sites for path in paths):
            hint = nearest(name, table if kohya else sites)
            raise LoadError(f"{file} is for another model: this one has no {name[:200]}{hint}")
        if not {"A", "B"} <= own.keys():
            raise LoadError(f"{file}: at {name[:200]} it has {sorted(own)}, but needs A and B; {_AGAIN}")
        if kohya and paths[0] in flux.SWAPPED:
            own = {**own, "B": own["B"].roll(own["B"].shape[0] // 2, 0)}
        if len(paths) == 1:
            found[paths[0]] = own
        else:
            found.update(_apart(file, name, own, [sites[path] for path in paths]))
    return found


def _dotted(name: str, sites: Mapping[str, Any]) -> tuple[str, ...]:
    """Path of a name with dots: CLIP text encoders have a `text_model` in files, and in transformers before 5."""
    options = (name, name.removeprefix("text_model."), f"text_model.{name}")
    return (next((option for option in options if option in sites), name),)


def _apart(
    file: Path, name: str, own: Mapping[str, Tensor], sites: list[Site]
) -> dict[str, dict[str, Tensor]]:
    """The factors of each part of a fused projection: all of A, and the rows of B."""
    if "m" in own:
        raise LoadError(f"{file}: {name} is a DoRA of a fused projection, whose parts have none of their own")
    rows = [site.out_features for site in sites]
    if own["B"].shape[0] != sum(rows):
        raise LoadError(
            f"{file} is for another model: at {name} it has {own['B'].shape[0]} rows instead of {sum(rows)}"
        )
    parts = own["B"].split(rows)
    # Several LoRAs side by side: a part reads those of its own.
    found = {}
    for site, b in zip(sites, parts, strict=True):
        used = (b.flatten(1) != 0).any(0)
        if not bool(used.any()):
            continue
        scale = float(own["alpha"]) / own["A"].shape[0] if "alpha" in own else 1.0
        a, b = own["A"][used], b[:, used]
        found[site.path] = {"A": a, "B": b, "alpha": torch.tensor(scale * a.shape[0])}
    return found


def _config(
    file: Path,
    factors: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Any],
    keys: Mapping[str, Key],
    part: str,
) -> dict[str, Any]:
    """A configuration in PEFT's form, with the rank and the alpha of each module."""
    prefixes = {key.part for key in keys.values()} & {part, ""}
    start = f"{part}." if part in prefixes else ""
    given = {
        name.removeprefix(start): value
        for name, value in metadata.items()
        if name.startswith(start)
        and name.removeprefix(start) in ("lora_alpha", "alpha_pattern", "use_rslora")
    }
    options = check_config({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **given}, file)
    alphas = {}
    for path, own in factors.items():
        rank = own["A"].shape[0]
        alpha = float(rank)
        if "alpha" in own:
            if own["alpha"].numel() != 1 or not bool(torch.isfinite(own["alpha"].float()).all()):
                raise LoadError(f"{file}: alpha of {path} is no finite number; {_AGAIN}")
            alpha = float(own["alpha"].float())
        elif "lora_alpha" in given:
            alpha = float(by_pattern(options.get("alpha_pattern") or {}, path, options["lora_alpha"]))
        alphas[path] = alpha
    common = Counter(alphas.values()).most_common(1)[0][0]
    magnitudes = {"m" in own for own in factors.values()}
    if len(magnitudes) > 1:
        raise LoadError(f"{file} has magnitudes of DoRA at some of its modules only; {_AGAIN}")
    return {
        **options,
        "r": None,
        "lora_alpha": common,
        "rank_pattern": {},
        "alpha_pattern": {
            f"^{path.replace('.', chr(92) + '.')}": a for path, a in alphas.items() if a != common
        },
        "use_dora": magnitudes == {True},
    }


def _metadata(file: Path) -> dict[str, Any]:
    """diffusers' options in the header of a file."""
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(METADATA)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise LoadError(f"{file}: the options in its header are no JSON object; {_AGAIN}")
    return found
