"""A finished model that can be run: a program, a transformers directory or an ONNX file, as one kind of object.

runner = open_runner("model.onnx", loader.program, loader.module)
batch = runner.setting.pad(examples)
logits = runner(batch)["logits"]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture.devices import HOME, device_of, on_device
from surgery.capture.hf_files import weight_files
from surgery.capture.normalization import PREPROCESSOR, read_normalization
from surgery.capture.sentence.layout import is_sentence_directory
from surgery.capture.shapes import input_names
from surgery.capture.types import LoadedModel
from surgery.cli.inference.modules import OnnxModule, PrefillModule, onnx_size
from surgery.cli.inference.references import Kind, kind_of
from surgery.common.errors import ExportError, LoadError, SurgeryError
from surgery.common.readers import read_json
from surgery.engine.labels import labels_in
from surgery.engine.program import Program
from surgery.export import metadata_keys
from surgery.export.generator import open_generator
from surgery.export.runtime import OnnxModel, session_threads
from surgery.graph.graphs import live_nodes
from surgery.graph.outputs import ONLY, named_outputs
from surgery.train.data_context import Setting, padding_of, prompt_of, token_limits
from surgery.train.images import Images
from surgery.train.runner import Body
from surgery.train.tokenizers import find_tokenizer, read_tokenizer

LONGEST = 512  # tokens of an example, as in training


@dataclass(frozen=True)
class Runner:
    """A finished model.

    Attributes:
        ref: reference that it was opened with.
        kind: form of the model.
        module: module that runs; `module(**inputs)`.
        setting: its data context.
        ranks: number of axes of each output.
        size: bytes of its files, of a program the bytes of the tensors that it reads; None if it has none.
        config: configuration of a transformers model, or None.
        program: the program, for that form.
        loaded: the model, for the form of a transformers directory.
        adapters: names of the active adapters.
        notes: sentences for the user.
    """

    ref: str
    kind: Kind
    module: nn.Module
    setting: Setting
    ranks: Mapping[str, int]
    size: int | None
    config: Any = None
    program: Program | None = None
    loaded: LoadedModel | None = None
    adapters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Device of the module; onnxruntime's is the CPU."""
        return device_of(self.module)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model and return its outputs by name, on the CPU.

        Raises:
            SurgeryError: the model does not accept the inputs.
        """
        try:
            with torch.no_grad():
                outputs = outputs_of(self.module.eval()(**on_device(dict(inputs), self.device)))
            return on_device(outputs, HOME)
        except SurgeryError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise LoadError(f"{self.ref} does not accept {shapes}: {reason}") from error

    def labelled(self, names: Sequence[str]) -> Runner:
        """The runner with other class names.

        Raises:
            LoadError: the number of names is not that of the classes.
        """
        output = self.setting.output_of("logits", "classification")
        width = self.setting.widths[output]
        if len(names) != width:
            raise LoadError(f"--labels names {len(names)} classes, but {output!r} of {self.ref} has {width}")
        return replace(
            self, setting=replace(self.setting, labels={**self.setting.labels, output: tuple(names)})
        )


def outputs_of(value: Any) -> dict[str, Tensor]:
    """The tensors in the outputs of a module, by the names that they have in a program and in ONNX."""
    if isinstance(value, Tensor):
        return {ONLY: value}
    if isinstance(value, Mapping):
        # A model output of transformers is a mapping, in which pytree finds the same names.
        value = dict(value)
    paths, _ = pytree.tree_flatten_with_path(value)
    return {
        ".".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path): leaf
        for path, leaf in paths
        if isinstance(leaf, Tensor)
    }


def open_runner(
    ref: str,
    program: Callable[[str], Program],
    module: Callable[[str], LoadedModel],
    *,
    tokenizer: str | None = None,
    adapters: Sequence[str] = (),
    longest: int = LONGEST,
    threads: int | None = None,
) -> Runner:
    """Open a finished model.

    Args:
        ref: a directory that surgery saved, a transformers directory (with or without `hf:`), an ONNX file, a directory
            with one, or another reference of a model.
        program: function that loads a program.
        module: function that loads a transformers model.
        tokenizer: directory of the tokenizer and of preprocessor_config.json, instead of the model's own.
        adapters: adapters to use, without the others; empty for all as saved.
        longest: maximum number of tokens of an example.
        threads: threads of onnxruntime; None lets it choose.

    Raises:
        SurgeryError: the model cannot be opened.
    """
    kind = kind_of(ref)
    if kind == "program":
        return _of_program(ref, program(ref), tokenizer, adapters, longest)
    if kind == "transformers":
        if adapters:
            raise LoadError(f"{ref} has no adapters to choose from; leave out --adapter")
        _refuse_onnx_layout(ref)
        loaded = module(ref if ref.startswith("hf:") else f"hf:{ref}")
        return _of_loaded(ref, loaded, tokenizer, longest)
    if kind == "onnx-generate":
        return _of_generator(ref, tokenizer, adapters, longest, threads)
    path = Path(ref)
    return _of_onnx(
        ref, path / "model.onnx" if path.is_dir() else path, tokenizer, adapters, longest, threads
    )


def _refuse_onnx_layout(ref: str) -> None:
    """Raise LoadError for a sentence-transformers directory whose weights are in an ONNX file alone."""
    folder = Path(ref.removeprefix("hf:"))
    if not is_sentence_directory(folder) or weight_files(folder, {})[:-1]:
        return
    for file in sorted(folder.glob("**/onnx/model.onnx")):
        raise LoadError(
            f"{ref} has its weights in {file.relative_to(folder)} alone, without the pooling; run it with "
            f'SentenceTransformer({ref!r}, backend="onnx"), or write the whole model with surgery export -o FILE.onnx'
        )


def _of_program(
    ref: str, program: Program, tokenizer: str | None, adapters: Sequence[str], longest: int
) -> Runner:
    if adapters:
        program = program.only(*adapters)
    base = program.base
    setting = Setting.of(program, find_tokenizer(program, tokenizer), longest)
    ranks = {
        name: node.meta["val"].dim()
        for name, node in named_outputs(program.graph).items()
        if isinstance(node.meta.get("val"), Tensor)
    }
    body = Body(program)
    # Its directory may hold little beside the files of its base, of which it may read only a part.
    state, graph = program.state(), program.graph
    names = {str(node.target) for node in live_nodes(graph) if node.op == "get_attr"}
    read = {id(state[name]): state[name] for name in names if name in state}
    return Runner(
        ref,
        "program",
        body.model.eval(),
        _with_pixels(setting, tokenizer),
        ranks,
        sum(tensor.nbytes for tensor in read.values()) or None,
        base.loaded.config,
        program,
        adapters=tuple(adapters),
    )


def _of_loaded(ref: str, loaded: LoadedModel, tokenizer: str | None, longest: int) -> Runner:
    read = read_tokenizer(
        loaded.metadata.get("tokenizer"), tokenizer, sentence=loaded.metadata.get("sentence")
    )
    longest, fixed = token_limits(loaded, read, longest)
    with torch.no_grad():
        outputs = outputs_of(loaded.module(*loaded.args, **loaded.kwargs))
    inputs = dict(zip(input_names(loaded), [*loaded.args, *loaded.kwargs.values()], strict=True))
    folder = Path(str(loaded.metadata.get("tokenizer") or ""))
    setting = Setting(
        inputs,
        {name: int(value.shape[-1]) for name, value in outputs.items() if value.dim()},
        longest,
        fixed,
        read,
        _images(inputs, read_normalization(folder)),
        pads=padding_of(loaded.config),
        labels=labels_in(loaded.config),
        prompt=prompt_of(loaded),
    )
    fresh = sorted(loaded.unsourced & {name for name, _ in loaded.module.named_parameters()})
    notes = []
    if fresh:
        more = f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
        notes.append(f"{fresh[0]}{more}: not in the checkpoint, so random")
    return Runner(
        ref,
        "transformers",
        loaded.module,
        _with_pixels(setting, tokenizer),
        {name: value.dim() for name, value in outputs.items()},
        sum(file.stat().st_size for file in loaded.files) or None,
        loaded.config,
        loaded=loaded,
        notes=(*loaded.notes, *notes),
    )


def _of_onnx(
    ref: str, path: Path, tokenizer: str | None, adapters: Sequence[str], longest: int, threads: int | None
) -> Runner:
    file = OnnxModel(path, threads=threads)
    config = _config_beside(path.parent)
    inputs = {
        name: torch.zeros([size if isinstance(size, int) and size > 0 else 1 for size in shape])
        if "float" in kind or "double" in kind
        else torch.zeros([size if isinstance(size, int) and size > 0 else 1 for size in shape]).long()
        for name, (kind, shape) in file.signature.items()
    }
    read = read_tokenizer(str(path.parent), tokenizer) if "input_ids" in inputs else None
    fixed = None
    if "input_ids" in inputs:
        shape = file.signature["input_ids"][1]
        if len(shape) > 1 and isinstance(shape[1], int) and shape[1] > 0:
            longest = fixed = shape[1]
        # The file does not say how many positions it has; a configuration beside it may.
        positions = getattr(config, "max_position_embeddings", None)
        limits = (positions, read.model_max_length if read is not None else None)
        longest = min([longest, *(int(limit) for limit in limits if isinstance(limit, int))])
    pixels, notes = _pixels_of(file, path.parent, tokenizer)
    images = _images(inputs, pixels)
    shapes = file.output_shapes
    setting = Setting(
        inputs,
        {name: shape[-1] for name, shape in shapes.items() if shape and isinstance(shape[-1], int)},
        longest,
        fixed,
        read,
        images,
        pads=padding_of(config),
        labels=_labels_of(file) or labels_in(config),
    )
    return Runner(
        ref,
        "onnx",
        OnnxModule(file, adapters),
        _with_pixels(setting, tokenizer),
        {name: len(shape) for name, shape in shapes.items()},
        file.size,
        config,
        adapters=tuple(adapters),
        notes=notes if images else (),
    )


def _of_generator(
    ref: str, tokenizer: str | None, adapters: Sequence[str], longest: int, threads: int | None
) -> Runner:
    generator = open_generator(ref, **session_threads(threads))
    config = generator.config
    read = read_tokenizer(ref, tokenizer)
    limits = [longest, getattr(config, "max_position_embeddings", None) or longest]
    if read is not None:
        limits.append(read.model_max_length)
    one = torch.zeros(1, 1).long()
    setting = Setting(
        {"input_ids": one, "attention_mask": one},
        {"logits": int(config.get_text_config().vocab_size)},
        min(limits),
        None,
        read,
        pads=padding_of(config),
    )
    module = PrefillModule(generator, adapters)
    with generator.adapter(*adapters):
        pass  # an adapter that is absent is reported before anything runs
    return Runner(
        ref,
        "onnx-generate",
        module,
        setting,
        {"logits": 3},
        onnx_size(Path(ref)),
        config,
        adapters=tuple(adapters),
    )


def _config_beside(folder: Path) -> Any:
    """The configuration of a transformers model beside an ONNX file, as far as it is read here, or None."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    found = read_json(file, LoadError)
    if not isinstance(found, dict):
        raise LoadError(f"{file} is no configuration; restore it")
    named = found.get("id2label")
    if isinstance(named, dict) and all(str(number).isdecimal() for number in named):
        found["id2label"] = {int(number): name for number, name in named.items()}
    return SimpleNamespace(**{str(key): value for key, value in found.items()})


def _labels_of(file: OnnxModel) -> dict[str, tuple[str, ...]]:
    """The class names in the metadata of an ONNX file."""
    found = _stored(file, metadata_keys.LABELS, str)
    return {output: tuple(names) for output, names in found.items()}


def _pixels_of(
    file: OnnxModel, folder: Path, tokenizer: str | None
) -> tuple[Mapping[str, tuple[float, ...]], tuple[str, ...]]:
    """Mean and standard deviation of the pixels, and a note if nothing gives them."""
    stored = {
        key: tuple(map(float, values))
        for key, values in _stored(file, metadata_keys.PIXELS, int, float).items()
    }
    found = stored or read_normalization(folder)
    if found or tokenizer is not None:
        return found, ()
    return {}, (
        f"neither the file nor a {PREPROCESSOR} beside it gives the mean of the pixels, so they are used from 0 to 1; "
        "--tokenizer DIR names the directory of that file",
    )


def _stored(file: OnnxModel, key: str, *kinds: type) -> dict[str, list[Any]]:
    """A JSON object of lists in the metadata of a file; empty if it has none."""
    text = file.metadata.get(key)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(values, list) and all(isinstance(value, kinds) for value in values)
        for values in found.values()
    ):
        raise ExportError(f"'{file.path}' has damaged metadata in {key}; export it again")
    return found


def _images(inputs: Mapping[str, Tensor], found: Mapping[str, tuple[float, ...]]) -> Images | None:
    """The image format, if images are the only input."""
    if len(inputs) != 1:
        return None
    ((name, only),) = inputs.items()
    if only.dim() != 4 or not only.is_floating_point():
        return None
    return Images.of(found, name, only)


def _with_pixels(setting: Setting, tokenizer: str | None) -> Setting:
    """The setting with the statistics of the pixels in a directory that the user names."""
    found = read_normalization(Path(tokenizer)) if tokenizer is not None else {}
    if not found or setting.images is None:
        return setting
    name = setting.images.input
    return replace(setting, images=Images.of(found, name, setting.inputs[name]))
