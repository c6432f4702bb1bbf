"""Reasons to refuse a site that several passes share: each is a clause with a remedy, or None if it does not apply."""

from __future__ import annotations

from surgery.graph.ops import arguments
from surgery.graph.sites import Site

# Values of alpha and beta with which an addmm is a plain linear map. Other ops have neither argument.
_ADDS = frozenset(("1", "1.0", "None"))


def computed_weight(site: Site) -> str | None:
    """Refusal of a weight that the model computes from other tensors, so that there is no parameter to act on."""
    if site.weight is not None:
        return None
    names = ", ".join(site.computed_from)
    return (
        f"its weight is computed from {names}, so there is no matrix to adapt; compute it once before loading "
        f"(nn.utils.parametrize.remove_parametrizations), or train {names} with --pass full"
    )


def not_floating(site: Site, remedy: str) -> str | None:
    """Refusal of a weight that is stored packed or in integers.

    Args:
        site: The site.
        remedy: An imperative clause, such as "share before quantizing".
    """
    if not site.packed and site.dtype.is_floating_point:
        return None
    return f"its weight is packed or not floating-point; {remedy}"


def scaled_op(site: Site, remedy: str) -> str | None:
    """Refusal of a site whose op multiplies its product or its bias by a factor.

    Args:
        site: The site.
        remedy: An imperative clause, such as "leave it out".
    """
    factors = {str(arguments(call.node).get(name)) for call in site.calls for name in ("alpha", "beta")}
    return None if factors <= _ADDS else f"its op scales its product or its bias; {remedy}"
