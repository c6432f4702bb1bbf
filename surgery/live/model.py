"""Live module of a program: the base's own class and forward, with the program's passes in its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.capture import LoadedModel
from surgery.capture.hf_config import configs
from surgery.common.errors import PassError
from surgery.common.hooks import hookimpl
from surgery.engine.base import Base
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.live.capture import mirror, watch
from surgery.live.checkpoint import offer
from surgery.live.layer import Layers
from surgery.live.state import ATTRIBUTE, LiveState


def live(program: Program) -> nn.Module:
    """A live module of a program, in eval mode: for `generate`, a Trainer, or serving.

    The module has the class and forward of the base, and the program's passes in its layers. It shares the program's
    tensors, so that training one trains the other. `surgery.using`, `save_`, `merge_` and the other live functions work
    on it. A transformers model gets its original configuration back (its cache and its implementation of experts).

    Args:
        program: The program.

    Raises:
        PassError: A pass does not act within single layers, or the weights are not in memory.
    """
    base = program.base
    if not base.in_memory:
        raise PassError("the weights are not in memory, so there is no module to run; load the weights first")
    model = mirror(base.loaded.module)
    if base.loaded.config is not None:
        restore_settings(model, base.loaded)
    # What a live model refuses must not be refused to the program, so the live model has a base object of its own.
    own = object.__new__(Base)
    own.__dict__.update(base.__dict__)
    state = LiveState(Program(own), watch(base.loaded), Layers(base.plugins.weight_ops))
    state.refuse(pass_of(entry, base.plugins) for entry in live_entries(program.journal))
    program.own()
    state.adopt(model, program)
    model.__dict__[ATTRIBUTE] = state
    offer(model, state)
    return model.eval()


def restore_settings(model: Any, loaded: LoadedModel) -> None:
    """Restore the settings of a transformers model that were changed to make it traceable.

    Args:
        model: the model, or a copy of it.
        loaded: the model as it was loaded, with its original configuration.
    """
    for path, number in loaded.cached:
        [*configs(model.get_submodule(path).config)][number].use_cache = True
    for own, before in zip(configs(model.config), configs(loaded.config), strict=True):
        if hasattr(before, "pad_token_id"):
            own.pad_token_id = before.pad_token_id
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(loaded.config._experts_implementation)


@hookimpl
def surgery_live(program: Program) -> nn.Module:
    """A live module of the program; see `live`."""
    return live(program)
