"""The model card of an upload, written from the journal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from surgery.engine.journal import Entry, Journal
from surgery.export.publish.artifact import Artifact

# A card with this line was written here, and the next upload may replace it.
MARK = "<!-- This card was written by `surgery push`. Remove this line to keep your changes. -->"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")
_LONGEST = 200  # characters of an option
_QUANTIZING = ("quantize", "fake-quant", "int8-static")


def write_card(artifact: Artifact, repo: str, license_: str | None = None) -> str:
    """The card as Markdown with its metadata.

    Args:
        artifact: What is uploaded.
        repo: Name of the repository that it is uploaded to.
        license_: Identifier of the license, None if it is not known.
    """
    title = escaped(repo.partition("/")[2])
    parts = [
        f"---\n{_metadata(artifact, license_)}\n---",
        MARK,
        f"# {title}",
        _made(artifact),
        "## What was done",
        _steps(artifact.journal),
    ]
    if artifact.parity:
        parts += ["## Agreement with the program", _parity(artifact.parity)]
    parts += ["## How to load it", _usage(artifact, repo)]
    return "\n\n".join(parts) + "\n"


def escaped(text: object) -> str:
    """A text on one line without any meaning in Markdown or HTML."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:_LONGEST]
    return _SPECIAL.sub(r"\\\1", plain).replace("://", ":/\u200b/")


def _metadata(artifact: Artifact, license_: str | None) -> str:
    """The YAML at the beginning of the card."""
    from huggingface_hub import ModelCardData

    base, applied = artifact.base, [e for e in artifact.journal if e.kind != "merge" and not e.auto]
    names = list(dict.fromkeys(e.pass_name for e in applied))
    relation = (
        "adapter"
        if artifact.format == "peft"
        else "quantized"
        if any(name in _QUANTIZING for name in names)
        else "finetune"
    )
    libraries = {"hf": "transformers", "peft": "peft"}
    facts: dict[str, Any] = {
        "library_name": libraries.get(artifact.format),
        "license": license_,
        "base_model": base.repo or None,
        "base_model_relation": relation if base.repo else None,
        "pipeline_tag": base.task,
        "tags": ["torch-surgery", *(["onnx"] if artifact.format == "onnx" else []), *names],
    }
    return ModelCardData(**{key: value for key, value in facts.items() if value}).to_yaml().strip()


def _made(artifact: Artifact) -> str:
    """The sentence on what this is and what it was made from."""
    what = {
        "hf": "a transformers model",
        "peft": "a PEFT adapter",
        "onnx": "an ONNX model",
    }[artifact.format]
    base = artifact.base
    if base.repo:
        origin = f"[{escaped(base.repo)}](https://huggingface.co/{base.repo}) at commit `{base.commit}`"
    else:
        origin = f"the local model {escaped(base.ref)}" if base.ref else "a model given in Python"
    return f"This is {what}. It was made with torch-surgery from {origin}."


def _steps(journal: Journal) -> str:
    """A numbered list of what each entry of the journal did."""
    if not journal.entries:
        return "Nothing: the model is the base."
    return "\n".join(f"{at}. {_step(entry)}" for at, entry in enumerate(journal.entries, 1))


def _step(entry: Entry) -> str:
    name = escaped(entry.id)
    if entry.kind == "merge":
        folded = ", ".join(escaped(one) for one in entry.options.get("folded", ())) or "nothing"
        text = f"**{name}** folded into the weights: {folded}."
    elif entry.kind == "select":
        trained = sum(entry.trains.values())
        text = f"**{name}** chose the parameters that train: {trained} of {len(entry.trains)} that it names."
    else:
        owner = "" if entry.distribution == "torch-surgery" else f" (of {escaped(entry.distribution)})"
        sites = f"{len(entry.sites)} site{'' if len(entry.sites) == 1 else 's'}"
        text = f"**{name}** applied the pass {escaped(entry.pass_name)}{owner} at {sites}{_options(entry.options)}."
        if entry.weight != 1:
            text += f" Its weight is {entry.weight:g}."
    declared, observed = entry.numerics.get("declared"), entry.numerics.get("observed")
    if observed:
        text += f" Change of the outputs: {escaped(observed)} (declared: {escaped(declared)})."
    return text


def _options(options: Mapping[str, Any]) -> str:
    """The options that are set, as a clause."""
    shown = [
        f"{escaped(name)} {escaped(value if isinstance(value, str) else json.dumps(value))}"
        for name, value in options.items()
        if value not in (None, "", False, [], {})
    ]
    return f", with {', '.join(shown)}" if shown else ""


def _parity(parity: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the errors in onnxruntime."""
    rows = [
        f"| {escaped(name)} | {errors['error']:.1e} | {errors['optimised']:.1e} |"
        for name, errors in parity.items()
    ]
    return "\n".join(
        [
            "Largest difference between onnxruntime and the PyTorch program, as a fraction of the output's scale:",
            "",
            "| output | as written | optimized by onnxruntime |",
            "|---|---|---|",
            *rows,
        ]
    )


def _usage(artifact: Artifact, repo: str) -> str:
    """A block of Python that loads the model."""
    if artifact.format == "peft":
        base = artifact.base.repo or "BASE"
        pinned = f", revision={artifact.base.commit!r}" if artifact.base.commit else ""
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModel  # or the Auto class of your task",
            "",
            f"model = PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}{pinned}), {repo!r})",
        ]
    elif artifact.format == "onnx":
        graph = next(name for name in artifact.files if name.endswith(".onnx"))
        data = [name for name in artifact.files if name.endswith(".onnx.data")]
        lines = ["import onnxruntime", "from huggingface_hub import hf_hub_download", ""]
        lines += [f"hf_hub_download({repo!r}, {name!r})" for name in data]
        lines += [f"session = onnxruntime.InferenceSession(hf_hub_download({repo!r}, {graph!r}))"]
    else:
        name = artifact.class_name if artifact.class_name.isidentifier() else "AutoModel"
        lines = [f"from transformers import {name}", "", f"model = {name}.from_pretrained({repo!r})"]
    return "```python\n" + "\n".join(lines) + "\n```"
