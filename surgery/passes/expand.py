"""expand: a program becomes deeper, wider, or gets trained branches beside its ops, computing what it did."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor, fx

from surgery.errors import PassError
from surgery.expanding import depth
from surgery.pass_base import EXACT, GraphPass, Numerics, TensorSpec
from surgery.rewriter import Rewriter
from surgery.sites import Site, SiteKey
from surgery.target import select_sites
from surgery.view import View


class Expand(GraphPass):
    """Expand
    """

    name: ClassVar[str] = "expand"
    before: ClassVar[tuple[str, ...]] = ("lora", "ia3", "adapter", "prefix", "sparse-tune", "bitfit", "prompt")

    deeper: int | None = Field(None, gt=0, description="how many copies of blocks to add, spread evenly over the row")
    after: str | None = Field(None, description="the blocks to copy, by their numbers in the row: 3,7")
    row: int | None = Field(None, ge=0, description="which row of blocks")

    @property
    def adds_weights(self) -> bool:
        return True

    @property
    def can_weigh(self) -> bool:
        return True

    def _request(self) -> depth.Request:
        after = tuple(int(n) for n in self.after.split(",")) if self.after is not None else None
        return depth.Request(self.deeper, after, self.row, self.target)

    def candidates(self, view: View) -> list[Site]:
        return [place.site for place in depth.places(self._request(), view)]

    def find(self, view: View) -> list[Site]:
        return self.candidates(view)

    def _place(self, site: Site) -> depth.Place:
        view = site.probe.program.view
        places = site.probe.once((self, "places"), lambda: depth.places(self._request(), view))
        return next(p for p in places if p.site.key == site.key)

    def check(self, site: Site) -> str | None:
        return depth.check(self._place(site), site.probe.program.view)

    def decide(self, site: Site) -> dict[str, Any]:
        return depth.decide(self._place(site), site.probe.program.view, site.probe)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return depth.tensors(site)

    def tensor_names(self, site: Site) -> dict[str, str]:
        return depth.tensor_names(site, self.attribute)

    def rewrite(self, site: Site, g: Rewriter) -> None:
        depth.rewrite(site, g, self.attribute)
