"""`python -m tests.zoo.generation [NAME …] [--write FILE]`: ONNX generation with every language model of the zoo.

Each model gets a random LoRA on the attention. `export_generation` then compares greedy and sampled tokens of
onnxruntime with the live model's. About 9 minutes.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

import surgery
from tests.zoo import zoo

NAMES = tuple(name for name, arch in zoo.ARCHITECTURES.items() if arch.task == "text-generation")


def run(name: str, folder: Path) -> str:
    """Export one model; returns the result in words."""
    model = zoo.module(name)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = 0
    model.save_pretrained(folder / "base")
    base = surgery.load(f"hf:{folder / 'base'}", task="text-generation")
    attends = any(site.role.startswith("attn") for site in base.sites)
    program = base.apply(surgery.Lora(target="attn.*" if attends else "linear,!dt_proj", rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    made = program.export_generation(folder / "onnx")
    return f"{made.tokens} greedy and {made.sampled} sampled tokens equal, {made.ties} ties, logits {made.error:.0e}"


_ABOUT = """\
# Language models to ONNX for generation

`python -m tests.zoo.generation --write docs/generation.md` writes this page. Each tiny random model gets a random LoRA.
`export_generation` then compares greedy and sampled generation of three rows, one of them padded, between onnxruntime
and transformers. A tie is a row whose tokens differ from a step at which the logits are equal within rounding.
"""


def page(said: dict[str, str]) -> str:
    """The results as a page."""
    lines = [
        _ABOUT,
        "| model | outcome |",
        "|---|---|",
        *(f"| {name} | {what.replace('|', '/')} |" for name, what in said.items()),
    ]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    write = Path(names.pop()) if "--write" in names else None
    names = [name for name in names if name != "--write"]
    outcomes: dict[str, str] = {}
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    passed, wanted = 0, names or NAMES
    for name in wanted:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = run(name, Path(folder))
                passed += 1
            except Exception as error:
                said = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
        outcomes[name] = said
        print(f"{name:<16} {time.perf_counter() - begun:5.1f} s  {said}", flush=True)
    print(f"{len(wanted)} architectures; {passed} generate in onnxruntime as in torch")
    if write:
        write.write_text(page(outcomes))
    return 0 if passed >= 0.95 * len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
