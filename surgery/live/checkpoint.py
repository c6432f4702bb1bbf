"""`save_pretrained` of a live model, which a Trainer calls for each checkpoint.

`from_pretrained` ignores tensors of adapters, so a transformers directory of a live model would load as the base. A
live model with passes in its layers therefore writes a saved directory (see surgery.store.saved): the passes and what
was trained. model.safetensors holds the same under the model's names, for a Trainer to resume from. The configuration
names a file of weights that does not exist, so that `from_pretrained` refuses the directory; without a configuration,
it would create a model of the class's default size.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine.module import get
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.live.follow import follow
from surgery.live.places import is_shard
from surgery.live.reference import sourced
from surgery.live.state import LiveState, state_of
from surgery.store.saved import contiguous, is_saved, write_saved

METHOD = "save_pretrained"
WEIGHTS = "model.safetensors"
# transformers shows it in the error, since it is the name of no file of weights.
_REMEDY = (
    "this directory holds passes of torch-surgery, not the weights of the model; load it with "
    "surgery.load_(model, DIR), or write a transformers directory with `surgery merge DIR --format hf -o OUT`"
)
_README = """\
# A checkpoint of a model with surgery's passes

It holds the passes and what was trained, not the base model. Load it with torch-surgery:

    import surgery
    surgery.load_(model, "DIR")      # into a live model of the base
    program = surgery.load("DIR")    # as a program

`surgery merge DIR --format hf -o OUT` writes a directory that `from_pretrained` loads. transformers' Trainer resumes
from this directory with a model that has the same passes.
"""


class Checkpoint:
    """`save_pretrained` of a live transformers model; an attribute of the model.

    Args:
        model: The live module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> Checkpoint:
        return Checkpoint(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> Any:
        return Checkpoint, (self.model,)

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the passes and what was trained; a plain transformers directory if no pass acts in a layer.

        Args:
            save_directory: Directory to write.
            is_main_process: False writes nothing.
            state_dict: Values of the tensors, if they are not those of the model.
            push_to_hub: Must be False if a pass acts in a layer.
            options: Further options of transformers' method.

        Raises:
            PassError: The directory holds a transformers model, or is to be pushed to the hub.
        """
        state = state_of(self.model)
        if state is not None:
            follow(state, self.model)
        if state is None or not live_entries(state.program.journal):
            whole: Any = type(self.model)
            if push_to_hub:
                options["push_to_hub"] = True
            whole.save_pretrained(
                self.model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options
            )
            return
        path = Path(save_directory)
        if push_to_hub:
            raise PassError(
                "a model with passes is not pushed to the hub; write it with surgery.save_(model, path, format='hf')"
            )
        if (path / "config.json").exists() and not is_saved(path):
            raise PassError(
                f"{path} holds a transformers model, which would be mixed with the passes of this one; name another "
                f"directory, or write it with surgery.save_(model, path)"
            )
        if state_dict is None:
            state.gather(self.model)
        if is_main_process:
            _write(state, self.model, path, state_dict or {})


def _write(state: LiveState, model: nn.Module, path: Path, values: Mapping[str, Tensor]) -> None:
    """Write the files of a checkpoint beside those that are there, each at once."""
    program = _with_values(state, values)
    own = _trained(state, model, values)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".partial-") as stage:
        folder = Path(stage)
        adapted, standalone = sourced(program, None, None, None)
        write_saved(adapted, folder, standalone=standalone)
        save_file(contiguous(own), folder / WEIGHTS, metadata={"format": "pt"})
        held: Any = model.config
        held.save_pretrained(folder)
        # Written into the file, since the configuration drops this field when it is saved.
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": [type(model).__name__], "transformers_weights": _REMEDY}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        (folder / "README.md").write_text(_README)
        # The manifest comes last: it names the others with their checksums.
        for file in sorted(folder.iterdir(), key=lambda f: f.name == "surgery.json"):
            os.replace(file, path / file.name)


def _with_values(state: LiveState, values: Mapping[str, Tensor]) -> Program:
    """The program with other values of its tensors, by the names that the model has for them."""
    program = state.program
    if not values:
        return program

    def with_value(tensor: Tensor, name: str) -> Tensor:
        value = values.get(name, tensor)
        if value is tensor or is_shard(value):
            return tensor
        return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value

    at = {full: place for place, full in state.at.items()}
    tensors = {full: with_value(tensor, at.get(full, full)) for full, tensor in program.tensors.items()}
    changed = {name: with_value(tensor, name) for name, tensor in program.changed.items()}
    return Program(program.base, program.journal, tensors, changed)


def _trained(state: LiveState, model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that passes inserted or training changed, by their names in the model."""
    program = state.program
    kept = set(model.state_dict(keep_vars=True))
    names = [*state.at]
    for name, tensor in program.changed.items():
        if name in kept and not torch.equal(tensor, program.base.tensors[name].to(tensor.device)):
            names.append(name)
    return {name: values.get(name, get(model, name)) for name in names}


def offer(model: nn.Module, state: LiveState) -> None:
    """Let `save_pretrained` of a live transformers model write a checkpoint while passes are applied to it."""
    if not hasattr(type(model), METHOD):
        return
    if state.program.journal.entries:
        model.__dict__.setdefault(METHOD, Checkpoint(model))
    else:
        model.__dict__.pop(METHOD, None)
