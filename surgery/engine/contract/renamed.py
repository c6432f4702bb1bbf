"""Renamed members of passes: a class that defines an old name is refused with the new name.

Otherwise the definition would be ignored silently.
"""

from __future__ import annotations

from surgery.common.errors import PluginError

_RENAMED = {
    "adds_weights": "effect (Effect.adds_weights)",
    "attribute": "names",
    "beside": "effect (Effect.independent)",
    "can_weigh": "effect (Effect.scalable)",
    "combine": "combiner",
    "conflicts": "check, which refuses site by site",
    "contract": "numerics",
    "detaches": "expectations (Expectations.detached)",
    "due": "gradual (Gradual.value)",
    "extends": "expectations (Expectations.adds_outputs)",
    "frees": "outcome (Outcome.unused)",
    "freezes": "effect (Effect.freezes_base)",
    "in_place": "effect (Effect.one_layer)",
    "keeps": "why_not_merged",
    "keeps_zeros": "the Fold that merge returns (Fold.keeps_zeros)",
    "leads": "effect (Effect.comes_first)",
    "lengthens": "the Fold that merge returns (Stage.SIZE)",
    "limits": "outcome (Outcome.limits)",
    "makes_zeros": "effect (Effect.makes_zeros)",
    "mergeable": "merge, which alone makes a pass mergeable",
    "mixes_positions": "effect (Effect.mixes_positions)",
    "note": "outcome (Outcome.note)",
    "pace": "gradual (Gradual.apply)",
    "pacing": "gradual (Gradual.window and unit)",
    "reaching": "expectations (Expectations.reach)",
    "reads_weight": "effect (Effect.reads_weight)",
    "redirects": "expectations (Expectations.redirected)",
    "replaces": "effect (Effect.replaces_weight)",
    "selects": "outcome (Outcome.trains)",
    "simplifies": "simplify, a property that is None where there is no simpler form",
    "skips": "find",
    "structural": "effect (Effect.adds_weights)",
    "tensor_names": "names",
    "tensor_prefix": "names",
    "unwritten": "expectations (Expectations.no_onnx)",
    "weightable": "effect (Effect.scalable)",
}


def refuse_renamed(cls: type) -> None:
    """Raise PluginError if a class defines, itself and not in a base class, a member that passes no longer have."""
    for old in cls.__dict__.keys() & _RENAMED.keys():
        raise PluginError(
            f"the pass {cls.__name__} defines {old!r}, which passes no longer have; define {_RENAMED[old]} "
            f"instead (see docs/plugins.md)"
        )
