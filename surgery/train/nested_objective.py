"""An objective that is part of another one, written as OBJECTIVE[,OPTION=VALUE…]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from surgery.common.errors import TrainingError
from surgery.common.options import written
from surgery.common.plugins import make_plugin_manager
from surgery.train.objective import Objective, OnPolicy
from surgery.train.registry import find_objective

Value = bool | int | float | str | None


class Nested(BaseModel):
    """Name and options of a nested objective.

    It is parsed from text, or from a mapping as in a recipe: {objective: classification, label: stars}.

    Attributes:
        objective: name of the objective.
        options: given options, as pairs of name and value.
    """

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
        """Make the objective.

        Args:
            whose: name of the outer option, for errors.
            defaults: default options. Those that the objective does not have are ignored.

        Raises:
            TrainingError: the objective or an option is unknown, or the objective cannot be nested. On-policy
                objectives, objectives with companions or several data sets, and packing cannot be nested.
        """
        cls = find_objective(make_plugin_manager(), self.objective).cls
        if issubclass(cls, OnPolicy) or cls.several or cls.companions is not Objective.companions:
            raise TrainingError(
                f"{whose}: {self.objective} cannot be part of another objective; train with it alone"
            )
        fields = {key for name, field in cls.model_fields.items() for key in (name, written(name, field))}
        options = {name.replace("-", "_"): value for name, value in self.options}
        known = {name: value for name, value in defaults.items() if name in fields}
        try:
            found: Objective = cls.parse({**known, **options})
        except TrainingError as error:
            raise TrainingError(f"{whose}: {error}") from None
        if getattr(found, "packing", False):
            raise TrainingError(
                f"{whose}: {self.objective} cannot pack as part of another objective; leave out packing"
            )
        return found


def nested_of(text: str) -> dict[str, Any]:
    """Split the text form into name and options.

    Raises:
        ValueError: the text is not OBJECTIVE[,OPTION=VALUE…].
    """
    name, *rest = (part.strip() for part in text.split(","))
    options = []
    for part in rest:
        option, equals, value = part.partition("=")
        if not equals or not option:
            raise ValueError(f"{part!r} is not an option; write OBJECTIVE,OPTION=VALUE,…")
        options.append((option, value))
    if not name or "=" in name:
        raise ValueError("the objective's name is missing; write OBJECTIVE,OPTION=VALUE,…")
    return {"objective": name, "options": tuple(options)}


def under(prefix: str, observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select observed tensors whose names start with a prefix, and remove the prefix."""
    return {key.removeprefix(prefix): value for key, value in observed.items() if key.startswith(prefix)}


def score_of(objective: Objective, figures: dict[str, float]) -> float:
    """Return the metric that selects the best checkpoint, negated if smaller is better."""
    return figures[objective.metric] if objective.larger else -figures[objective.metric]
