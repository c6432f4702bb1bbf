"""Programs of the zoo with attention in elementary ops; another process can load them after a test saves them."""

from __future__ import annotations

from functools import cache

import surgery
from surgery.capture import hf, trace
from surgery.common.plugins import make_plugin_manager
from surgery.engine.base import Base
from tests.zoo import zoo
from tests.zoo.architectures import ARCHITECTURES


@cache
def program(name: str) -> surgery.Program:
    """A tiny random model of the zoo; of transformers, with eager attention."""
    if name.startswith("timm:"):
        loaded = zoo.build(name)
    else:
        model = zoo.module(name)
        model.set_attn_implementation("eager")
        loaded = hf.from_model(model, ARCHITECTURES[name].task, example=ARCHITECTURES[name].example)
    return surgery.Program(Base(loaded, trace(loaded), make_plugin_manager(entry_points=False)))
