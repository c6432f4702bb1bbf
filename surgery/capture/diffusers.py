"""Loader of `diffusers:DIR` and `diffusers:ORG/NAME[@REVISION]`: one part of a pipeline of diffusers."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from surgery.capture import hf
from surgery.capture.budget import limited
from surgery.capture.devices import device_of, on_device
from surgery.capture.diffusers_inputs import diffusers_inputs
from surgery.capture.hf_config import one_sentence, parse_dtype, silenced
from surgery.capture.hf_files import CONFIG, choose
from surgery.capture.hub import Snapshot, fetch, split_revision
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, MissingExtraError, SurgeryError, nearest
from surgery.common.readers import read_json

PREFIX = "diffusers:"
INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model"
# Parts of a part: the halves of a VAE, by the names that diffusers' ONNX pipelines have for them.
HALVES = {"vae_encoder": "vae", "vae_decoder": "vae"}
_MAY_FIX = frozenset({"height", "width", "frames"})
_LIBRARIES = ("diffusers", "transformers")


def load(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load one part of a pipeline; return None for any other reference.

    `--part NAME` (`model_kwargs["part"]`) names the part, such as unet, transformer, vae or text_encoder. A directory
    of one part needs none.

    Raises:
        LoadError: the pipeline or the part cannot be fetched or read, or no part is named.
        MissingExtraError: diffusers is not installed.
    """
    if not ref.startswith(PREFIX):
        return None
    library = require_diffusers()
    name = ref.removeprefix(PREFIX)
    keywords = dict(options.model_kwargs)
    part = str(keywords.pop("part", None) or "")
    if options.task:
        raise LoadError(f"{ref}: --task is for hf: models; name a part of the pipeline with --part")
    fetched = _fetched(ref, name, part, keywords, options)
    folder = Path(name) if fetched is None else fetched.folder
    folder, part = _part_of(ref, folder, part)
    own = replace(options, model_kwargs=keywords, commit=None)
    facts = {"loader": "diffusers", "source": name, "part": part}
    if _library_of(folder) == "transformers":
        loaded = hf.load(f"{hf.PREFIX}{folder}", own)
        assert loaded is not None
        tokenizer = folder.parent / part.replace("text_encoder", "tokenizer")
        facts["tokenizer"] = str(tokenizer if tokenizer.is_dir() else folder)
        loaded = replace(loaded, metadata={**loaded.metadata, **facts})
    else:
        loaded = _loaded(library, ref, folder, part, own, facts)
    if fetched is None:
        return loaded
    notes = (*loaded.notes, fetched.note) if fetched.note else loaded.notes
    return replace(loaded, repo=fetched.repo, commit=fetched.commit, notes=notes)


def require_diffusers() -> Any:
    """The module diffusers. Raises MissingExtraError if it is not installed."""
    import transformers

    try:
        # It reports optional libraries that do not load.
        with silenced(transformers):
            import diffusers
    except ModuleNotFoundError as error:
        if error.name == "diffusers":
            raise MissingExtraError("diffusers", "diffusers") from None
        raise LoadError(f"diffusers is installed but cannot be imported: {error}") from error
    return diffusers


def parts_of(folder: Path) -> list[str]:
    """Names of the models in the directory of a pipeline, in its order."""
    index = read_json(folder / INDEX, LoadError)
    if not isinstance(index, dict):
        raise LoadError(f"{folder / INDEX} is no JSON object; restore it")
    return [
        name
        for name, entry in index.items()
        # A name from the file becomes a path.
        if name.isidentifier()
        and isinstance(entry, list)
        and entry
        and entry[0] in _LIBRARIES
        and (folder / name / CONFIG).is_file()
    ]


def is_diffusers(model: object) -> bool:
    """True for a model of diffusers. The library is not imported for it."""
    return any(
        cls.__module__.startswith("diffusers.") and cls.__name__ == "ModelMixin"
        for cls in type(model).__mro__
    )


def from_model(
    model: nn.Module,
    *,
    unsourced: frozenset[str] | None = None,
    files: tuple[Path, ...] = (),
    metadata: Mapping[str, Any] | None = None,
    example: Mapping[str, int] | None = None,
) -> LoadedModel:
    """Build a LoadedModel from an existing model of diffusers. It is used itself, not copied.

    Args:
        model: the model: a UNet, a diffusion transformer or a VAE.
        unsourced: names of weights that `files` do not contain; None means all weights.
        files: files that the weights and the configuration were read from.
        metadata: additional facts about the model.
        example: sizes of the example inputs by dimension name.

    Raises:
        LoadError: no example inputs are known for the model.
    """
    built = diffusers_inputs(model, example)
    facts = {"loader": "diffusers", "class": type(model).__name__, **(metadata or {})}
    return LoadedModel(
        module=model.eval(),
        kwargs=on_device(built.inputs, device_of(model)),
        dynamic_shapes=built.shapes,
        files=files,
        unsourced=frozenset(model.state_dict(keep_vars=True)) if unsourced is None else unsourced,
        metadata=facts,
        may_fix=_MAY_FIX,
    )


def weight_files(folder: Path, variant: Any = None) -> tuple[Path, ...]:
    """Weights and configuration in the directory of a part, as diffusers names them."""
    middle = f".{variant}" if variant else ""
    found = sorted(folder.glob(f"{WEIGHTS}{middle}.safetensors")) or [
        *sorted(folder.glob(f"{WEIGHTS}{middle}-*.safetensors")),
        *sorted(folder.glob(f"{WEIGHTS}.safetensors.index{middle}.json")),
    ]
    return (*found, folder / CONFIG)


def _loaded(
    library: Any, ref: str, folder: Path, part: str, options: LoadOptions, facts: Mapping[str, Any]
) -> LoadedModel:
    """The model of diffusers in a directory."""
    import transformers

    keywords = dict(options.model_kwargs)
    dtype = parse_dtype(keywords.pop("dtype", keywords.pop("torch_dtype", "auto")))
    variant = keywords.pop("variant", None)
    if keywords:
        known = ("part", "dtype", "variant")
        raise LoadError(
            f"{ref}: unknown argument --model-kwarg {next(iter(keywords))}{nearest(next(iter(keywords)), known)}; a "
            f"part of a pipeline takes {', '.join(known)}"
        )
    cls = _class_of(library, ref, folder)
    files = weight_files(folder, variant)
    if not options.random and len(files) == 1:
        raise LoadError(
            f"{ref}: {folder} has no {WEIGHTS}{f'.{variant}' if variant else ''}.safetensors; give --random for random "
            "weights, or convert its pickles"
        )
    if dtype == "auto":
        dtype = torch.float32 if options.random else _stored_dtype(files)
    try:
        with silenced(transformers):
            if options.random:
                model, missing = cls.from_config(cls.load_config(str(folder))).to(dtype), None
            else:
                with limited(sum(file.stat().st_size for file in files), ref):
                    model, info = cls.from_pretrained(
                        str(folder),
                        torch_dtype=dtype,
                        variant=variant,
                        use_safetensors=True,
                        output_loading_info=True,
                    )
                missing = frozenset(info["missing_keys"])
    except SurgeryError:
        raise
    except Exception as error:
        raise LoadError(f"{ref}: {one_sentence(error)}") from error
    _halve(model, part)
    return from_model(
        model,
        unsourced=missing,
        files=() if options.random else files,
        metadata=facts,
        example=options.example,
    )


def _halve(model: Any, part: str) -> None:
    """Give a VAE the forward of one of its halves."""
    if part == "vae_decoder":

        def decode(self: Any, latent_sample: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sample": self.decode(latent_sample, return_dict=False)[0]}

        model.forward = types.MethodType(decode, model)
    if part == "vae_encoder":

        def encode(self: Any, sample: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"latent_parameters": self.encode(sample, return_dict=False)[0].parameters}

        model.forward = types.MethodType(encode, model)


def _class_of(library: Any, ref: str, folder: Path) -> Any:
    """The class that a configuration names. Raises LoadError if it is no model of diffusers."""
    config = read_json(folder / CONFIG, LoadError)
    named = str(config.get("_class_name", "")) if isinstance(config, dict) else ""
    # Only a public name of the library: what it imports from elsewhere must not be reached.
    found = getattr(library, named, None) if named.isidentifier() and not named.startswith("_") else None
    if not isinstance(found, type) or not issubclass(found, library.ModelMixin):
        raise LoadError(
            f"{ref}: {folder / CONFIG} names {named[:80]!r}, which is no model of diffusers; upgrade diffusers, or "
            "write a py: factory"
        )
    return found


def _library_of(folder: Path) -> str:
    """The library of a part: configurations of diffusers name a class, those of transformers a model type."""
    config = read_json(folder / CONFIG, LoadError)
    return "transformers" if isinstance(config, dict) and "_class_name" not in config else "diffusers"


def _stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """Dtype of the weights in files: that of the first tensor of the first one."""
    first = next(file for file in files if file.suffix == ".safetensors")
    with safe_open(first, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 - it is no mapping
            if (found := opened.get_tensor(key).dtype).is_floating_point:
                return found
    return torch.float32


def _part_of(ref: str, folder: Path, part: str) -> tuple[Path, str]:
    """Directory and name of the part. Raises LoadError if there is none of this name; the message lists them."""
    if not (folder / INDEX).is_file():
        if not (folder / CONFIG).is_file():
            raise LoadError(f"{ref}: {folder} has no {INDEX}; name the directory of a pipeline of diffusers")
        if part and part not in (folder.name, *HALVES):
            raise LoadError(f"{ref} is one part of a pipeline, {folder.name}; leave out --part {part}")
        return folder, part or folder.name
    parts = parts_of(folder)
    halves = [half for half, whole in HALVES.items() if whole in parts]
    whole = HALVES.get(part, part)
    if whole not in parts:
        raise LoadError(_unknown(ref, part, [*parts, *halves]))
    return folder / whole, part


def _unknown(ref: str, part: str, parts: list[str]) -> str:
    listed = ", ".join(parts)
    if not part:
        return f"{ref}: name a part of the pipeline with --part; it has {listed}"
    return f"{ref} has no part {part[:80]!r}{nearest(part, parts) or f'; it has {listed}'}"


def _fetched(
    ref: str, name: str, part: str, keywords: dict[str, Any], options: LoadOptions
) -> Snapshot | None:
    """The files of a part in the cache of the hub, or None if the reference names a directory."""
    if options.commit is None and Path(name).is_dir():
        return None
    if options.commit is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise LoadError(f"{ref}: there is no directory {name}")
    for key in hf.OF_THE_HUB:
        if key in keywords:
            raise LoadError(f"{ref}: --model-kwarg {key} is not used; {hf.OF_THE_HUB[key]}")
    repo, revision = split_revision(ref, name)
    wanted = partial(_choose, ref, part, keywords.get("variant"), options.random)
    return fetch(ref, repo, options.commit or revision, wanted)


def _choose(ref: str, part: str, variant: Any, random: bool, names: Iterable[str]) -> list[str]:
    """Names of the files of a part in a repository. Raises LoadError if it has no such part."""
    there = set(names)
    if INDEX not in there:
        raise LoadError(f"{ref} has no {INDEX}, so it is no pipeline of diffusers; name another")
    folders = (name.partition("/") for name in there)
    parts = sorted(top for top, _, rest in folders if rest == CONFIG)
    whole = HALVES.get(part, part)
    if whole not in parts:
        raise LoadError(_unknown(ref, part, [*parts, *(half for half, of in HALVES.items() if of in parts)]))
    middle = f".{variant}" if variant else ""
    own = {name.removeprefix(f"{whole}/") for name in there if name.startswith(f"{whole}/")}
    weights = sorted(
        name
        for name in own
        if name == f"{WEIGHTS}{middle}.safetensors"
        or (name.startswith(f"{WEIGHTS}{middle}-") and name.endswith(".safetensors"))
        or name == f"{WEIGHTS}.safetensors.index{middle}.json"
    )
    if weights or random:
        found = [CONFIG, *([] if random else weights)]
        return [INDEX, *(f"{whole}/{name}" for name in found)]
    keywords = {"subfolder": whole, **({"variant": variant} if variant else {})}
    return [INDEX, *choose(ref, ref.removeprefix(PREFIX), there, keywords=keywords, random=random)]
