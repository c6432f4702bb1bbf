"""The zoo as a loader plugin: `zoo:NAME`, through the same hook as any third party's scheme."""

from __future__ import annotations

from surgery.api import LoadedModel, LoadOptions, hookimpl
from tests.zoo import zoo


@hookimpl
def surgery_load_model(ref: str, options: LoadOptions) -> LoadedModel | None:
    return zoo.build(ref.removeprefix("zoo:")) if ref.startswith("zoo:") else None
