"""The zoo as a loader plugin: `zoo:NAME`, through the hook for third-party schemes."""

from __future__ import annotations

from surgery.api import hookimpl
from surgery.api.programs import LoadedModel, LoadOptions
from tests.zoo import zoo


@hookimpl
def surgery_load_model(ref: str, options: LoadOptions) -> LoadedModel | None:
    return zoo.build(ref.removeprefix("zoo:")) if ref.startswith("zoo:") else None
