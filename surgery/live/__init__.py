"""Surgery in place: rewrites single layers of a live module, which keeps its own forward. See `apply_`."""

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
