"""An objective that another one is made of, as text: OBJECTIVE[,OPTION=VALUE…]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from surgery.common.errors import TrainingError
from surgery.common.plugins import make_plugin_manager
from surgery.train.objective import Objective, OnPolicy
from surgery.train.registry import find_objective

Value = bool | int | float | str | None


class Nested(BaseModel):
    """objective: its name. options: those given, by name. Made of text, or of a mapping as in a recipe:
    {objective: classification, label: stars}."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: str
    options: tuple[tuple[str, Value], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, str):
            return nested_of(given)
        if isinstance(given, dict) and not isinstance(given.get("options"), (tuple, list)):
            own = {key: value for key, value in given.items() if key in cls.model_fields}
            rest = {key: value for key, value in given.items() if key not in own}
            return {"objective": "", **own, "options": tuple(rest.items())}
        return given

    def made(self, whose: str, **defaults: Any) -> Objective:
        """The objective. defaults: options that it has where it knows them and they are not given.

        Raises TrainingError for an unknown one or a wrong option, and for one that no other is made of: that acts
        itself, or reads models beside the one that trains.
        """
        cls = find_objective(make_plugin_manager(), self.objective).cls
        if issubclass(cls, OnPolicy) or cls.several or cls.companions is not Objective.companions:
            raise TrainingError(
                f"{whose}: {self.objective} is no part of another objective; train with it alone"
            )
        fields = {key for name, field in cls.model_fields.items() for key in (name, field.alias) if key}
        options = {name.replace("-", "_"): value for name, value in self.options}
        known = {name: value for name, value in defaults.items() if name in fields}
        try:
            found: Objective = cls.parse({**known, **options})
        except TrainingError as error:
            raise TrainingError(f"{whose}: {error}") from None
        if getattr(found, "packing", False):
            raise TrainingError(
                f"{whose}: {self.objective} packs only where it trains alone; leave out packing"
            )
        return found


def nested_of(text: str) -> dict[str, Any]:
    """The parts of the text form. Raises ValueError."""
    name, *rest = (part.strip() for part in text.split(","))
    options = []
    for part in rest:
        option, equals, value = part.partition("=")
        if not equals or not option:
            raise ValueError(f"{part!r} is no option; write OBJECTIVE,OPTION=VALUE,…")
        options.append((option, value))
    if not name or "=" in name:
        raise ValueError("an objective's name comes first: OBJECTIVE,OPTION=VALUE,…")
    return {"objective": name, "options": tuple(options)}


def under(prefix: str, observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was observed of one of several objectives, by its own names."""
    return {key.removeprefix(prefix): value for key, value in observed.items() if key.startswith(prefix)}


def score_of(objective: Objective, figures: dict[str, float]) -> float:
    """The figure by which an objective chooses the best, so that more is better."""
    return figures[objective.metric] if objective.larger else -figures[objective.metric]
