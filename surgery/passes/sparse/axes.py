"""A weight of any kind seen as (experts, outputs, places of a kernel, inputs), inputs last."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery.graph.sites import Site


@dataclass(frozen=True)
class Layout:
    """order: the stored axes in that order. sizes: experts, outputs, places, inputs (1 for what there is none of).

    Of a table outputs are its rows, so that they are the same of a head that is tied to it; of a convolution inputs
    are those of one group.
    """

    order: tuple[int, ...]
    sizes: tuple[int, int, int, int]

    @staticmethod
    def of(site: Site) -> Layout:
        def axis(letters: str) -> list[int]:
            return [site.layout.index(letter) for letter in letters if letter in site.layout]

        experts, outputs, inputs = axis("e"), axis("ov"), axis("id")
        places = [n for n in range(len(site.shape)) if n not in (*experts, *outputs, *inputs)]
        sizes = [math.prod(site.shape[n] for n in part) for part in (experts, outputs, places, inputs)]
        return Layout((*experts, *outputs, *places, *inputs), (sizes[0], sizes[1], sizes[2], sizes[3]))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Layout:
        order, (experts, outputs, places, inputs) = data["order"], data["sizes"]
        return Layout(tuple(order), (experts, outputs, places, inputs))

    def to_json(self) -> dict[str, Any]:
        return {"order": list(self.order), "sizes": list(self.sizes)}

    def laid(self, weight: Tensor) -> Tensor:
        """The weight so, of the shape `sizes`; differentiable."""
        return weight.permute(self.order).reshape(self.sizes)

    def stored(self, laid: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What is laid out so in the stored layout, of that shape."""
        turned = laid.reshape([shape[axis] for axis in self.order])
        return turned.permute([self.order.index(axis) for axis in range(len(self.order))])
