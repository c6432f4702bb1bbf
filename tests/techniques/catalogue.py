"""Every technique of the catalogue: its pass on each of the eight models, and where it has to work.

A technique that needs an option on some model (a rank that saves on a tiny one, biases that have to be added) gets
it here; what a pass refuses is asked of it all the same, and its own sentence is what the table shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.api import Pass, make_plugin_manager

TEXT = ("minilm", "smollm2", "t5", "vit")  # where no technique but a convolutional one may be missing
CONV_AND_SOUND = ("resnet18", "wav2vec2")
SPARSE_AND_STATE = ("mixtral", "mamba")
ALL = (*TEXT, *CONV_AND_SOUND, *SPARSE_AND_STATE)


@dataclass(frozen=True)
class Technique:
    """name: as the table shows it. make: model -> pass. mandatory: models on which it has to pass the kit.
    before: passes applied first, to have something to work on."""

    name: str
    family: str
    make: Callable[[str], Pass]
    mandatory: tuple[str, ...] = TEXT
    before: Callable[[str], tuple[Pass, ...]] = lambda model: ()


def of(name: str, **options: Any) -> Pass:
    """The pass of that name, as a command line would make it."""
    return make_plugin_manager().find_pass(name).cls.parse(options)


_LINEARS = {
    "resnet18": "layer2.*.conv*,head",
    "mixtral": "attn.q,attn.v,mlp.down",
    "mamba": "all-linear",
}


def linears(model: str) -> str:
    """A few weights of each kind that the model has."""
    return _LINEARS.get(model, "attn.q,attn.v,mlp.down")


def catalogue() -> list[Technique]:
    """In the order of the table."""
    both = (*TEXT, *CONV_AND_SOUND)
    return [*_additive(both), *_selective(), *_reparameterisation(both)]


def _additive(both: tuple[str, ...]) -> list[Technique]:
    def lora(**options: Any) -> Callable[[str], Pass]:
        return lambda model: of("lora", target=linears(model), rank=4, **options)

    return [
        Technique("lora", "additive", lora(), ALL),
        Technique("lora --rslora", "additive", lora(rslora=True), ALL),
        Technique("lora --dora", "additive", lora(dora=True)),
        Technique("lora --init pissa", "additive", lora(init="pissa")),
        Technique("lora --dropout", "additive", lora(dropout=0.1), ALL),
        Technique("ia3", "additive", lambda m: of("ia3", target=linears(m)), ()),
    ]


def _selective() -> list[Technique]:
    return []


def _reparameterisation(both: tuple[str, ...]) -> list[Technique]:
    return []


__all__ = ["ALL", "Technique", "catalogue", "of"]
