"""A weight of any kind, permuted to (experts, outputs, kernel positions, inputs)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery.graph.sites import Site


@dataclass(frozen=True)
class Layout:
    """Axes of a weight in the order (experts, outputs, kernel positions, inputs).

    The outputs of an embedding table are its rows, as in a head that is tied to it. The inputs of a grouped convolution
    are those of one group.

    Attributes:
        order: Axes of the stored weight in that order.
        sizes: Number of experts, outputs, kernel positions and inputs; 1 where a kind of axis does not exist.
    """

    order: tuple[int, ...]
    sizes: tuple[int, int, int, int]

    @staticmethod
    def of(site: Site) -> Layout:
        """Return the layout of a site's weight."""

        def axis(letters: str) -> list[int]:
            return [site.layout.index(letter) for letter in letters if letter in site.layout]

        experts, outputs, inputs = axis("e"), axis("ov"), axis("id")
        places = [n for n in range(len(site.shape)) if n not in (*experts, *outputs, *inputs)]
        sizes = [math.prod(site.shape[n] for n in part) for part in (experts, outputs, places, inputs)]
        return Layout((*experts, *outputs, *places, *inputs), (sizes[0], sizes[1], sizes[2], sizes[3]))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Layout:
        """Read a layout from the journal."""
        order, (experts, outputs, places, inputs) = data["order"], data["sizes"]
        return Layout(tuple(order), (experts, outputs, places, inputs))

    def to_json(self) -> dict[str, Any]:
        """Write the layout for the journal."""
        return {"order": list(self.order), "sizes": list(self.sizes)}

    def laid(self, weight: Tensor) -> Tensor:
        """Permute and reshape a stored weight to `sizes`; differentiable."""
        return weight.permute(self.order).reshape(self.sizes)

    def stored(self, laid: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Permute and reshape a tensor of `sizes` back to the stored layout.

        Args:
            laid: Tensor of the shape `sizes`.
            shape: Shape of the stored weight.
        """
        turned = laid.reshape([shape[axis] for axis in self.order])
        return turned.permute([self.order.index(axis) for axis in range(len(self.order))])
