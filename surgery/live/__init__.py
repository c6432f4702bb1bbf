"""Surgery in place: live modules keep their own forward, and single layers are rewritten. See `apply_`."""

from surgery.live.verbs import (
    apply_,
    combine_,
    load_,
    merge_,
    mixed_batch,
    plan_,
    program_of,
    remove_,
    save_,
    using,
    weight_,
)

__all__ = [
    "apply_",
    "combine_",
    "load_",
    "merge_",
    "mixed_batch",
    "plan_",
    "program_of",
    "remove_",
    "save_",
    "using",
    "weight_",
]
