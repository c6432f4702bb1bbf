"""Names of the classes of an output, such as `negative` and `positive` of `logits`.

They come from the configuration of a transformers model or from training data, and go into every form of a program: the
saved directory, the configuration of a transformers directory, and the metadata of an ONNX file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Labels = Mapping[str, tuple[str, ...]]

# Output of the classifiers of transformers, whose configuration has one list of names.
LOGITS = "logits"
_DEFAULT = re.compile(r"LABEL_\d+")


def labels_in(config: Any) -> dict[str, tuple[str, ...]]:
    """Class names in the configuration of a transformers model; empty if they are those that every model gets."""
    named = getattr(config, "id2label", None)
    if not isinstance(named, Mapping) or sorted(named) != list(range(len(named))):
        return {}
    found = tuple(str(named[number]) for number in range(len(named)))
    return {} if all(_DEFAULT.fullmatch(name) for name in found) else {LOGITS: found}


def write_labels(config: Any, labels: Labels) -> None:
    """Write class names into the configuration of a transformers model.

    Names of an output that the model class does not have stay out; so do names whose number is not that of the classes.
    """
    names = labels.get(LOGITS)
    if names is not None and len(names) == getattr(config, "num_labels", None):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
