"""A live module of a program: the base's own class and forward, with the program's passes in its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.capture.hf import configs
from surgery.errors import PassError
from surgery.in_place.leaf import Layers
from surgery.in_place.mirror import mirror, watch
from surgery.in_place.state import ATTRIBUTE, State
from surgery.program import Program
from surgery.replay import live_entries, pass_of


def live(program: Program) -> nn.Module:
    """The module that the program was made of, in eval mode, with its passes in place: for generate, Trainer, serving.

    It shares the program's tensors: training one trains the other, and `surgery.using`, `save_`, `merge_` and the
    like work on it. A transformers model has the configuration that it came with (its cache, its experts).
    Raises PassError for passes that single layers cannot hold.
    """
    base = program.base
    if not base.in_memory:
        raise PassError("the weights are not in memory, so there is no module to run")
    model = mirror(base.loaded.module)
    if base.loaded.config is not None:
        _configured(model, base.loaded.config)
    state = State(Program(base), watch(base.loaded), Layers(base.plugins.weight_ops))
    state.refuse(pass_of(entry, base.plugins) for entry in live_entries(program.journal))
    program.own()
    state.adopt(model, program)
    model.__dict__[ATTRIBUTE] = state
    return model.eval()


def _configured(model: Any, config: Any) -> None:
    """Take back what made the model traceable."""
    before = {type(c): c for c in configs(config)}
    seen: set[int] = set()
    for holder in model.modules():
        for own in configs(getattr(holder, "config", None)):
            if id(own) in seen:
                continue
            seen.add(id(own))
            there = before.get(type(own), config)
            for key in ("use_cache", "pad_token_id"):
                if hasattr(own, key) and hasattr(there, key):
                    setattr(own, key, getattr(there, key))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(config._experts_implementation)
