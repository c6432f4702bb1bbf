"""Saved directories: the journal, the tensors that are not in the base's own files, and a fingerprint of the base.

    surgery.json           schema, base reference and fingerprint, journal, sha256 of the files below
    inserted.safetensors   every tensor that a pass inserted, frozen ones too
    changed.safetensors    base tensors that training changed
    base.safetensors       base tensors that came from no content-hashed file (a new head, a random model)
    base/                  with --standalone: the base as a transformers directory

A directory is written under a temporary name and renamed. Loading runs no code from it: tensors are in safetensors, and
a base that is code (`py:`) or can contain code (`.pt2`) loads only if the user names or trusts it again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import keyword
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from surgery.capture import LoadedModel, LoadOptions, trace
from surgery.capture.budget import limited
from surgery.capture.devices import on_device
from surgery.capture.diffusers import HALVES, is_diffusers
from surgery.capture.hf_config import is_sentence_task
from surgery.capture.loaders import OF_A_LIBRARY
from surgery.capture.reference import load_model, loader_of
from surgery.capture.sentence.layout import is_sentence_directory
from surgery.capture.stored_options import check_example, check_kwargs
from surgery.common.errors import JournalError, LoadError, SurgeryError
from surgery.common.files import core_version, staged_directory
from surgery.common.names import check_plain, components
from surgery.common.plugin_files import is_file
from surgery.common.plugins import CORE, Plugins
from surgery.common.readers import first_line, read_json, read_tensors
from surgery.engine.base import Base, hash_files, sha256
from surgery.engine.data import check_present
from surgery.engine.journal import Journal
from surgery.engine.moving import converted
from surgery.engine.program import Program
from surgery.engine.replay import build_graph, pass_of
from surgery.store.diffusers import write_part
from surgery.store.hf import write_base
from surgery.store.manifest import check_manifest
from surgery.store.migrate import migrated
from surgery.store.sentence import names_of_files

SCHEMA = 2
# Schemas that can be read. Fields that are new in 2 have defaults in Entry.from_json.
READABLE = (1, 2)
MANIFEST = "surgery.json"
_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_AGAIN = "restore it or apply again"
# Attributes that every module and every compiled graph has, and words that cannot be attributes in code.
_RESERVED = frozenset({*dir(fx.GraphModule), *vars(nn.Module()), *keyword.kwlist, "_graph", "_code", "self"})
INSERTED, CHANGED, BASE = "inserted.safetensors", "changed.safetensors", "base.safetensors"


def is_saved(path: Path) -> bool:
    """True if a path is a directory that surgery saved."""
    return (path / MANIFEST).is_file()


def save(program: Program, path: Any, *, standalone: bool = False, overwrite: bool = False) -> None:
    """Write a program as a directory that `surgery.load` reads.

    Args:
        program: The program.
        path: Directory to write.
        standalone: Include the base as a transformers directory, so that loading does not need the original.
        overwrite: Replace an existing directory.

    Raises:
        SurgeryError: The path exists, writing fails, the weights are not in memory, or a standalone directory cannot
            contain this base.
        JournalError: The base was merged in place, or released from memory.
    """
    base = program.base
    if base.consumed:
        raise JournalError("the base was merged in place; write it with --format hf or to ONNX instead")
    if not base.in_memory:
        raise SurgeryError(
            "the weights are not in memory, so there is nothing to save; load the weights first"
        )
    if standalone:
        check_present(program, "--standalone")
    with staged_directory(Path(path), overwrite) as folder:
        write_saved(program, folder, standalone=standalone)


def write_saved(program: Program, folder: Path, *, standalone: bool = False) -> None:
    """Write the files of a saved directory into an existing directory.

    Args:
        program: The program; its weights are in memory.
        folder: The directory.
        standalone: Include the base as a transformers directory.
    """
    base = program.base
    ref, tensors, facts = base.ref, _unsourced(base), _facts(base)
    if standalone:
        ref, tensors, facts = _standalone(base, folder, tensors)
    files = {
        INSERTED: program.tensors,
        CHANGED: _differing(program),
        BASE: tensors,
    }
    hashes = {}
    for name, content in files.items():
        if content:
            save_file(contiguous(content), folder / name)
            hashes[name] = sha256(folder / name)
    manifest = {
        "schema": SCHEMA,
        "written_by": {"torch-surgery": core_version(), "torch": torch.__version__},
        "base": {
            "ref": ref,
            **facts,
            "example": dict(base.options.example),
            "metadata": {
                k: v for k, v in base.loaded.metadata.items() if isinstance(v, (str, int, float, bool))
            },
            # Layers were captured one by one, since the model cannot be captured.
            **({} if base.heads is None else {"layers": True}),
            "graph": base.graph_hash,
            "sites": base.site_table(),
            "loader": dict(zip(("distribution", "version"), loader_of(ref, base.plugins), strict=True)),
        },
        "journal": program.journal.to_json(),
        "labels": {output: list(names) for output, names in program.labels.items()},
        "parameters": [n for n, t in program.tensors.items() if isinstance(t, nn.Parameter)],
        "files": hashes,
    }
    manifest["checksum"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _facts(base: Base) -> dict[str, Any]:
    """How the base is loaded again by its reference, and the fingerprint of its files."""
    loaded = base.loaded
    return {
        "task": base.options.task,
        "model_kwargs": dict(base.options.model_kwargs),
        "random": base.options.random,
        **({"input": list(base.options.input)} if base.options.input else {}),
        **({"hub": {"repo": loaded.repo, "commit": loaded.commit}} if loaded.commit else {}),
        "files": base.file_hashes,
    }


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies of tensors, since safetensors refuses shared storage. Loading restores tied tensors."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _unsourced(base: Base) -> dict[str, Tensor]:
    """Tensors of the base that are in none of its files; without files, its buffers as well."""
    kept: dict[str, Tensor] = {}
    buffers = dict(base.loaded.module.named_buffers(remove_duplicate=False))
    for name, tensor in base.tensors.items():
        random_buffer = not base.loaded.files and name in buffers
        lacking = name in base.loaded.unsourced or name in base.loaded.stored
        if (lacking or random_buffer) and base.names.get(name, (name,))[0] not in kept:
            kept[name] = tensor
    return kept


def _differing(program: Program) -> dict[str, Tensor]:
    """Changed base tensors whose bits differ from the base's."""
    return {
        name: tensor
        for name, tensor in program.changed.items()
        if not _same(tensor, program.base.tensors[name])
    }


def _same(a: Tensor, b: Tensor) -> bool:
    """True if two tensors have the same bits; compared as bytes, so that NaN equals NaN."""
    return (
        torch.equal(
            a.detach().cpu().view(-1).view(torch.uint8),
            b.detach().cpu().contiguous().view(-1).view(torch.uint8),
        )
        if a.numel() and a.is_contiguous()
        else torch.equal(a.cpu(), b.cpu())
    )


def _standalone(
    base: Base, folder: Path, tensors: dict[str, Tensor]
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Write the base into the directory.

    Args:
        base: The base.
        folder: The directory.
        tensors: Tensors of the base that are in none of its files.

    Returns:
        The reference to load it by, the tensors to store beside it, and the facts to load it with.

    Raises:
        SurgeryError: The base is code.
    """
    scheme = base.ref.partition(":")[0]
    if scheme == "hf":
        write_base(base, folder / "base")
        # The directory has the class of the model, but a sentence-transformers one is a transformers one, too.
        task = base.options.task if is_sentence_task(base.options.task) else None
        facts = {"task": task, "model_kwargs": {}, "random": False, "files": _hash_tree(folder / "base")}
        # The transformers directory has the base's own values of these.
        return "hf:./base", {n: t for n, t in tensors.items() if n not in base.loaded.stored}, facts
    if scheme == "diffusers":
        write_part(base, folder / "base")
        half = {"part": base.loaded.metadata["part"]} if base.loaded.metadata.get("part") in HALVES else {}
        facts = {"task": None, "model_kwargs": half, "random": False, "files": _hash_tree(folder / "base")}
        own = {n: t for n, t in tensors.items() if n not in base.loaded.stored}
        return ("diffusers:./base" if is_diffusers(base.loaded.model) else "hf:./base"), own, facts
    if scheme == "timm":
        # timm creates the model from its name, and every weight is stored.
        every = replace(base.loaded, files=(), unsourced=frozenset(base.loaded.module.state_dict()))
        kwargs = {
            name: value
            for name, value in base.options.model_kwargs.items()
            if name not in ("checkpoint_path", "pretrained")
        }
        facts = {"task": None, "model_kwargs": kwargs, "random": True, "files": {}}
        return base.ref, _unsourced(replace(base, loaded=every)), facts
    raise SurgeryError(
        f"--standalone cannot include the code of {base.ref or 'a module given from Python'}; leave it out"
    )


def _hash_tree(folder: Path) -> dict[str, str]:
    """sha256 of the files that the loader reads in a transformers directory, by file name."""
    if is_sentence_directory(folder):
        return hash_files(names_of_files(folder))
    names = [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), folder / "config.json"]
    return hash_files(sorted(names))


def _checksum(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Read surgery.json, and check it and all files against their checksums.

    Raises:
        JournalError: A file is missing, damaged or was edited, or a newer version wrote it.
    """
    manifest = read_json(path / MANIFEST, JournalError, _AGAIN)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int:
        raise JournalError(f"{path / MANIFEST} cannot be read: it names no schema; {_AGAIN}")
    if schema not in READABLE:
        raise JournalError(
            f"{path} has schema {str(schema)[:20]}, but this version reads up to {SCHEMA}; upgrade torch-surgery"
        )
    if manifest.get("checksum") != _checksum(manifest):
        raise JournalError(
            f"{path / MANIFEST} was edited or damaged after it was saved; restore it or apply again"
        )
    checked = check_manifest(manifest, path / MANIFEST)
    for name, expected in checked["files"].items():
        if not (path / name).is_file():
            raise JournalError(f"{path / name} is missing; restore it or apply again")
        if sha256(path / name) != expected:
            raise JournalError(f"{path / name} was changed after it was saved; restore it or apply again")
    return checked


def load_saved(
    path: Path, *, base: Any, trust: bool, plugins: Plugins, into: bool = True, dtype: str | None = None
) -> Program:
    """Load a saved directory: capture its base again and replay its journal.

    Args:
        path: The directory.
        base: Reference of the base, if it has moved, or a Program of the base; None for the recorded reference.
        trust: Allow a base that can run code, such as a `.pt2` file.
        plugins: The plugin manager.
        into: With a Program as `base`: fill the stored tensors into its own module. False: into a copy, if they differ.
        dtype: Dtype to load the base and the adapters in; None for the dtype that they were saved in.

    Raises:
        JournalError: The directory is damaged or does not fit its base.
        LoadError: The base cannot be loaded, or is code that the caller has not named.
        PassError: A pass in the journal is not installed.
    """
    with _boundary(path):
        return _load(path, base, trust, plugins, into, dtype)


@contextmanager
def _boundary(path: Path) -> Iterator[None]:
    """Report any other error than a SurgeryError as a damaged directory: an edited file can cause every kind."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise JournalError(
            f"{path}: its journal cannot be replayed on this model ({type(error).__name__}: {first_line(error)}); "
            f"{_AGAIN}"
        ) from error


@contextmanager
def _untouched(base: Any, stored: Mapping[str, Tensor]) -> Iterator[None]:
    """Restore the values of a base that the caller passed, if loading fails after the stored ones were filled in."""
    if not isinstance(base, Program):
        yield
        return
    module = base.base.loaded.module
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    held = [(tensors[name], tensors[name].detach().clone()) for name in stored if name in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in held:
                tensor.copy_(value)
        raise


def _load(path: Path, base: Any, trust: bool, plugins: Plugins, into: bool, dtype: str | None) -> Program:
    manifest = read_manifest(path)
    if dtype is not None:
        _check_dtype(path, dtype, base, manifest["base"]["ref"])
    journal = Journal.from_json(manifest["journal"])
    stored = {name: _read(path / name) for name in manifest["files"]}
    # A missing plugin, or another version of a pass, is reported before a model is loaded, which can take long.
    journal, held, origins = migrated(journal, stored.get(INSERTED, {}), plugins, str(path))
    for entry in journal:
        if entry.kind == "rewrite":
            pass_of(entry, plugins)
    if isinstance(base, Program):
        apart = _untied(base.base.loaded.module, stored.get(BASE, {}))
        if apart and into:
            raise JournalError(
                f"{path} has a {apart[0]} of its own, which is tied in this model; load it with surgery.load"
            )
        base = base if into else _apart(base, stored.get(BASE, {}))
    if dtype is not None:
        stored = {name: _converted(tensors, manifest["base"], dtype) for name, tensors in stored.items()}
        held = _converted(held, manifest["base"], dtype)
    with _untouched(base, stored.get(BASE, {})):
        root = _base(path, manifest["base"], base, trust, plugins, stored.get(BASE, {}), dtype)
        _check_base(path, manifest["base"], root, dtype)
        changed = _changed(path, root, stored.get(CHANGED, {}))
        _check_names(path, journal, held, root)
        listed = manifest["parameters"]
        # Schema 1 has no list.
        trainable = _trainable(journal, plugins, root) if listed is None else set(listed)
        trainable |= {name for name, old in origins.items() if old in trainable}
        held = on_device(held, root.device)
        inserted = {n: nn.Parameter(t) if n in trainable else t for n, t in held.items()}
        graph = build_graph(root, journal, inserted, root.captured, stored=True)
    program = Program(root, journal, inserted, changed, graph)
    if manifest["labels"] is not None:
        program.labels = {output: tuple(names) for output, names in manifest["labels"].items()}
    return program


def _apart(program: Program, stored: Mapping[str, Tensor]) -> Program:
    """The program's base as a program; on a copy of its module if the stored tensors have other values."""
    base = program.base
    if all(n in base.tensors and _same(value, base.tensors[n]) for n, value in stored.items()):
        return Program(base)
    loaded = replace(base.loaded, module=copy.deepcopy(base.loaded.module))
    return Program(Base(loaded, base.captured, base.plugins, base.ref, base.options, heads=base.heads))


def _check_dtype(path: Path, dtype: str, base: Any, ref: str) -> None:
    """Raise LoadError if the base of a directory cannot be loaded in another dtype."""
    given = base if isinstance(base, str) else ref
    if isinstance(base, Program) or not given.startswith(OF_A_LIBRARY):
        raise LoadError(
            f"{path} cannot be loaded in {dtype}: its base is no hf:, timm: or diffusers: model; convert the module "
            "and apply again"
        )


def _converted(tensors: Mapping[str, Tensor], saved: Mapping[str, Any], dtype: str) -> dict[str, Tensor]:
    """Stored tensors with those of the base's floating-point dtypes in another dtype. Codes stay as they are."""
    own = {row[3] for row in saved["sites"]}
    target = getattr(torch, dtype)
    return {
        name: value.to(target) if value.is_floating_point() and str(value.dtype) in own else value
        for name, value in tensors.items()
    }


def _changed(path: Path, base: Base, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained values of base tensors. Raises JournalError if one does not fit the base."""
    changed = {}
    for name, value in stored.items():
        own = base.tensors.get(name)
        if own is None or own.shape != value.shape or own.dtype != value.dtype:
            has = "no such tensor" if own is None else f"{own.dtype} {list(own.shape)}"
            raise JournalError(
                f"{path / CHANGED} contains {name[:200]} {value.dtype} {list(value.shape)}, but the base has {has}; "
                f"restore the directory, or pass the original base with --base"
            )
        changed[name] = _as_in(own, value.to(own.device))
    return changed


def _check_names(path: Path, journal: Journal, held: Mapping[str, Tensor], base: Base) -> None:
    """Check that names are safe as attributes in generated code, and that journal and file name the same tensors.

    Raises:
        JournalError: A name is not plain, belongs to the base, or is missing on one side.
    """
    known = components(base.tensors)
    named = {name for entry in journal for name in entry.tensor_names}
    for name in sorted({*named, *held}, key=str):
        check_plain(name, f"a tensor of {path / INSERTED}", JournalError, known)
        if name in base.tensors:
            raise JournalError(
                f"{path / INSERTED} contains {name}, which is a tensor of the base; restore it or apply again"
            )
    _check_free(path, named, set(base.tensors), known)
    missing = named - set(held)
    if missing:
        raise JournalError(f"{path} lacks the tensor {min(missing)}; restore it or apply again")
    unknown = set(held) - named
    if unknown:
        raise JournalError(
            f"{path / INSERTED} contains {min(unknown)}, which the journal does not name; restore it or apply again"
        )


def _check_free(path: Path, named: Set[str], there: Set[str], known: Set[str]) -> None:
    """Check that no name is an attribute of every module, or a part of another name.

    Args:
        path: The directory, for messages.
        named: Names of the inserted tensors.
        there: Names of the tensors of the base.
        known: Components of the names of the base.

    Raises:
        JournalError: A name cannot be registered in a module.
    """
    owners = {name[:at] for name in named | there for at, c in enumerate(name) if c == "."}
    for name in sorted(named):
        taken = [part for part in name.split(".") if part not in known and part in _RESERVED]
        inside = any(name[:at] in there for at, c in enumerate(name) if c == ".")
        if taken or inside or name in owners:
            raise JournalError(
                f"{path / INSERTED} contains {name}, a name that is taken in a module; restore it or apply again"
            )


def _as_in(original: Tensor, value: Tensor) -> Tensor:
    """The value as a parameter if the original is one."""
    return nn.Parameter(value) if isinstance(original, nn.Parameter) else value


def _trainable(journal: Journal, plugins: Plugins, base: Base) -> set[str]:
    """Names of the inserted tensors that their passes declare trainable."""
    names = set()
    for entry in journal:
        if entry.kind != "rewrite":
            continue
        pass_ = pass_of(entry, plugins)
        for record in entry.sites:
            site = base.sites.by_key.get(record.key)
            if site is None:
                raise JournalError(
                    f"{entry.id} cannot be replayed: the base has no site {record.path}; pass the original base with "
                    f"--base"
                )
            specs = pass_.tensors(site.deciding(record.decided))  # type: ignore[attr-defined]
            names |= {record.tensors[name] for name, spec in specs.items() if spec.trainable}
    return names


def _read(path: Path) -> dict[str, Tensor]:
    # Cloned for alignment: the address of a tensor can change the order of summation in small matrix products, and with
    # it the last bits of the outputs.
    return {name: tensor.clone() for name, tensor in read_tensors(path, LoadError).items()}


def _base(
    path: Path,
    saved: Mapping[str, Any],
    base: Any,
    trust: bool,
    plugins: Plugins,
    stored: Mapping[str, Tensor],
    dtype: str | None = None,
) -> Base:
    """Load the base of a saved directory, fill in its stored tensors, and capture it."""
    if isinstance(base, Program):
        loaded, ref, options = base.base.loaded, base.base.ref, base.base.options
        loaded = _fill(loaded, stored, path)
        return Base(loaded, base.base.captured, plugins, ref, options, heads=base.base.heads)
    ref = saved["ref"]
    if saved.get("layers"):
        raise LoadError(
            f"{path} was saved from a live model that cannot be captured as a whole; load it into such a model with "
            f"surgery.load_(model, {str(path)!r})"
        )
    if not ref and base is None:
        raise LoadError(
            f"{path} was saved from a module given in Python; load it with "
            f"surgery.load({str(path)!r}, base=surgery.capture(module, inputs))"
        )
    if ref.startswith("py:") and base != ref:
        raise LoadError(
            f"the base of {path} is code, {ref}; to run that code, name it again with --base {ref}"
        )
    if base is not None:
        ref = str(base)
    if ref in ("hf:./base", "diffusers:./base"):
        ref = f"{ref.partition(':')[0]}:{path / 'base'}"
    check_kwargs(saved["model_kwargs"], ref, f"{path / MANIFEST}, model_kwargs", LoadError)
    check_example(saved["example"], f"{path / MANIFEST}, example", LoadError)
    kwargs = {**saved["model_kwargs"], **({"dtype": dtype} if dtype is not None else {})}
    if dtype is not None:
        kwargs.pop("torch_dtype", None)
    options = LoadOptions(
        saved["task"],
        kwargs,
        trust,
        saved["example"],
        random=_is_random(saved),
        # A branch may have moved since, so the commit is loaded that the directory was saved with.
        commit=saved["hub"]["commit"] if base is None and saved.get("hub") else None,
        input=tuple(saved.get("input", ())) if ref.startswith("py:") else (),
    )
    _check_loader(path, saved, ref, plugins)
    with _room(path, ref, options):
        loaded = load_model(ref, options, plugins)
    target = _other_dtype(saved, loaded) if dtype is None else None
    if target is not None:
        loaded = converted(Base(loaded, trace(loaded), plugins, ref, options), target).loaded
    loaded = _fill(loaded, stored, path)
    return Base(loaded, trace(loaded), plugins, ref, options)


def _other_dtype(saved: Mapping[str, Any], loaded: LoadedModel) -> torch.dtype | None:
    """The dtype of a program that `Program.to` converted, if the model as it was loaded has another.

    For a reference whose loader takes a dtype, the arguments of the model have it already.
    """
    rows = {str(row[3]) for row in saved["sites"]}
    own = {tensor.dtype for tensor in loaded.module.parameters() if tensor.is_floating_point()}
    if len(rows) != 1 or len(own) != 1:
        return None
    wanted = _DTYPES.get(next(iter(rows)))
    return wanted if wanted is not None and own != {wanted} else None


def _check_loader(path: Path, saved: Mapping[str, Any], ref: str, plugins: Plugins) -> None:
    """Raise LoadError if the plugin that loaded the base is not installed; the message names its distribution."""
    scheme, colon, _ = ref.partition(":")
    wanted = saved.get("loader", {}).get("distribution")
    if not colon or not wanted or wanted == CORE or scheme in plugins.schemes or ref != saved["ref"]:
        return
    for title, why in plugins.broken.items():
        if title.partition(" ")[0] == wanted:
            raise LoadError(
                f"the base of {path}, {ref}, is loaded by the plugin {title}, which does not load: {why}"
            )
    remedy = f"give it with --plugin {wanted}" if is_file(wanted) else f"pip install {wanted}"
    raise LoadError(f"the base of {path}, {ref}, is loaded by the plugin {wanted!r}; {remedy}")


def _is_random(saved: Mapping[str, Any]) -> bool:
    """True if all weights of the base are in the directory, so that a model of any weights is filled with them."""
    if saved.get("random") is not None:
        return bool(saved["random"])
    # Before pretrained weights could be fetched, the weights of a timm model were random or in a local file.
    return saved["ref"].startswith("timm:") and not saved["model_kwargs"].get("checkpoint_path")


def _room(path: Path, ref: str, options: LoadOptions) -> AbstractContextManager[None]:
    """A limit on the size of a model whose weights are in the directory; loaders limit those of files themselves."""
    checkpoint = options.model_kwargs.get("checkpoint_path")
    given = options.model_kwargs.get("pretrained") is False
    if not ref.startswith(OF_A_LIBRARY) or not (options.random or checkpoint or given):
        return nullcontext()
    files = [*path.iterdir(), Path(str(checkpoint or path / MANIFEST))]
    return limited(sum(file.stat().st_size for file in files if file.is_file()), str(path))


def _fill(loaded: LoadedModel, stored: Mapping[str, Tensor], path: Path) -> LoadedModel:
    """Copy stored tensors into the module. Raises JournalError if one does not fit.

    Returns:
        The loaded model, which names the tensors that its files have with other values.
    """
    module = loaded.module
    for name in _untied(module, stored):
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        holder._parameters[leaf] = nn.Parameter(holder.get_parameter(leaf).detach().clone())
    there: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    there.update(module.named_buffers(remove_duplicate=False))
    kept = set(module.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, value in stored.items():
            tensor = there.get(name)
            if tensor is not None and tensor.shape == value.shape:
                tensor.copy_(value)
            # A non-persistent buffer of another shape is skipped: the module recomputes it in its first forward.
            elif tensor is None or name in kept:
                has = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise JournalError(
                    f"{path} stores {name} {tuple(value.shape)}, but the base has {has}; pass the original base with "
                    f"--base"
                )
    own = (stored.keys() & kept) - loaded.unsourced if loaded.files else frozenset()
    return replace(loaded, stored=loaded.stored | frozenset(own))


def _untied(module: nn.Module, stored: Mapping[str, Tensor]) -> list[str]:
    """Tied names that are stored with a value of their own, since a merge has untied them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in stored:
            groups.setdefault(id(parameter), []).append(name)
    return [
        name
        for first, *others in groups.values()
        for name in others
        if not _same(stored[name], stored[first])
    ]


def _check_base(path: Path, saved: Mapping[str, Any], base: Base, dtype: str | None = None) -> None:
    """Raise JournalError if the base has other files or another graph than the saved one.

    In another dtype, only the files and the sites are compared: the graph has other casts.
    """
    if saved["files"] and base.loaded.files:
        for name, expected in saved["files"].items():
            remedy = _remedy(saved, base)
            if name not in base.file_hashes:
                raise JournalError(f"the base of {path} has changed: it has no {name} now{remedy}")
            if base.file_hashes[name] != expected:
                raise JournalError(
                    f"the base of {path} has changed: {name} differs from the file that it was saved with{remedy}"
                )
    if base.graph_hash == saved["graph"]:
        return
    now, then = (
        {json.dumps(row if dtype is None else [*row[:3], dtype, *row[4:]]) for row in table}
        for table in (base.site_table(), saved["sites"])
    )
    if dtype is not None and now == then:
        return
    differing = sorted({json.loads(row)[0] for row in now ^ then})
    what = (
        f"these sites differ: {', '.join(differing[:5])}"
        if differing
        else "its sites are the same, but other ops differ"
    )
    raise JournalError(
        f"the graph of the base of {path} differs from the saved one: {what}; use the library versions that it was "
        f"saved with, or apply the passes again"
    )


def _remedy(saved: Mapping[str, Any], base: Base) -> str:
    """Clause on how to get the base that a directory was saved with; of a base on the hub, both commits."""
    hub = saved.get("hub")
    if not hub:
        return "; restore it, or pass the original base with --base"
    here = f" and this is {base.loaded.repo} at {base.loaded.commit}" if base.loaded.commit else ""
    scheme = f"{saved['ref'].partition(':')[0]}:"
    name = saved["ref"].removeprefix(scheme).partition("@")[0]
    return (
        f": it was {hub['repo']} at {hub['commit']}{here}; leave out --base, or pass --base "
        f"{scheme}{name}@{hub['commit']}"
    )
