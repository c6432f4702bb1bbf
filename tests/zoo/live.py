"""`python -m tests.zoo.live [NAME …] [--write FILE]`: surgery in place on every transformers model of the zoo.

LoRA on every layer of the live model that accepts one. `apply_` checks that outputs at insertion are equal bit for bit.
Then, with random adapters, the live model is compared with its program, and after `remove_` with its original outputs.
About 5 minutes.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import surgery
from surgery.capture.trace import to_plain
from surgery.engine.contract.observe import observe
from surgery.live.state import state_of
from tests.zoo import zoo


@dataclass
class Outcome:
    """Result for one architecture.

    sites, refused: number of sites and refusals. program: difference of the live model from its program. captured: True
    if roles are known. failed: error message, or empty.
    """

    name: str
    sites: int = 0
    refused: int = 0
    captured: bool = True
    program: float = 0.0
    failed: str = ""
    reasons: set[str] = field(default_factory=set)
    seconds: float = 0.0


def tensors(outputs: object) -> list[Tensor]:
    plain = to_plain(outputs)
    if isinstance(plain, dict):
        plain.pop("past_key_values", None)
    return [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]


def run(name: str) -> Outcome:
    """Run the chain on one architecture."""
    outcome, begun = Outcome(name), time.perf_counter()
    try:
        model = zoo.module(name).eval()
        loaded = zoo.build(name)
        if getattr(model.config, "pad_token_id", 0) is None:
            model.config.pad_token_id = 0
        with torch.no_grad():
            for tensor in model.parameters():  # heads that start at zero would show nothing
                if not tensor.any():
                    tensor.normal_(std=0.05).abs_()

        def outputs() -> list[Tensor]:
            torch.manual_seed(0)  # some models draw numbers even in eval mode
            with torch.no_grad():
                return tensors(model(*loaded.args, **loaded.kwargs))

        example = zoo.ARCHITECTURES[name].example
        before = outputs()
        program = surgery.apply_(model, surgery.Lora(target="all", rank=2), example=example)
        outcome.captured = not state_of(model).uncaptured
        planned = program.reports[-1].plan
        outcome.sites, outcome.refused = len(planned.accepted), len(planned.refused)
        outcome.reasons = {row.refusal for row in planned.refused}
        generator = torch.Generator().manual_seed(7)
        for tensor in program.tensors.values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
        adapted = outputs()
        if observe(before, adapted).equal:
            raise AssertionError("random adapters move no output")
        if outcome.captured:
            outcome.program = observe(tensors(program.run(*loaded.args, **loaded.kwargs)), adapted).difference
            if (
                outcome.program > 1e-4
            ):  # experts are batched there, and dispatched here: sums in another order
                raise AssertionError(f"the live model differs from its program by {outcome.program:.1e}")
        surgery.remove_(model)
        if not observe(before, outputs()).equal:
            raise AssertionError("removal is not bit for bit")
        if any("lora" in key for key in model.state_dict()):
            raise AssertionError("removal leaves tensors behind")
    except Exception as error:
        outcome.failed = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    outcome.seconds = time.perf_counter() - begun
    return outcome


_ABOUT = """\
# Surgery in place on transformers models

`surgery.apply_` rewrites single layers of a live `nn.Module`, which keeps its own forward.

## What belongs to the model, and what to the passes

- **Tensors.** The base keeps its own parameters and buffers. Parameters that train, and all buffers, are copies
  while passes are applied. `remove_` puts the originals back.
- **Buffers that move in training**, such as the running statistics of a BatchNorm, belong to the passes.
  `program_of`, `save_`, `merge_` and `format="hf"` have the moved ones. With all passes off (`using(model)`,
  `weight_` 0, `without`) or gone (`remove_`, `undo`), the base's own are in force; what moves then is dropped when
  a pass is switched on again.
- **Copies.** `copy.deepcopy`, `pickle` and `torch.save(model)` take the passes along. Where the model is loaded,
  the passes have to be installed; the graph is captured again at the first change. Load only pickles that you
  wrote.
- **Conversions.** After `half()`, `to(dtype)`, `to(device)`, `resize_token_embeddings` or another module in the
  place of one without passes, the program follows at the next call of surgery. A program's own module is converted
  only if its graph names no dtype; most transformers models' graphs do, so convert the model first. Inside a
  `using` block, the model is not converted.
- **Threads.** `using` and `mixed_batch` hold for the running thread or asyncio task. While a block is open, no
  thread can change the model. A block that needs other values (merged weights, trained parameters of the base,
  moved statistics) refuses other threads; use a copy of the model for each.
- **Checkpoints.** `model.save_pretrained`, which transformers' Trainer calls, writes a directory for
  `surgery.load`, `load_` and the Trainer's resume while passes act in layers. `from_pretrained` refuses it. Without
  such passes (`Full`, after `merge_`), it writes a transformers directory as ever.
- **A model that cannot be captured** is changed layer by layer: targets are paths, `all-linear` and `head`. `save_`
  writes what `load_` reads; `surgery.load` needs a graph and refuses it.

## The zoo

`python -m tests.zoo.live --write docs/in_place.md` writes this page. `surgery.apply_` adds a LoRA to every layer of a
live, tiny, random model that accepts one. The columns are:

- layers and refused: layers with LoRA, and layers that refuse it (mostly norms)
- at insertion: whether the outputs are equal bit for bit
- from its graph: difference between the live model and its graph with random adapters, over the outputs' scale
- removed: whether the outputs after `surgery.remove_` equal those of the base bit for bit
"""


def page(outcomes: list[Outcome]) -> str:
    """The results as a page."""
    lines = [
        _ABOUT,
        f"{len(outcomes)} architectures, {sum(not o.failed for o in outcomes)} pass.",
        "",
        "| model | layers | refused | at insertion | from its graph | removed |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        if o.failed:
            lines.append(f"| {o.name} | fails: {o.failed.replace('|', '/')} | | | | |")
            continue
        away = f"{o.program:.0e}" if o.program else "equal" if o.captured else "not captured: paths only"
        lines.append(f"| {o.name} | {o.sites} | {o.refused} | equal | {away} | equal |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    write = Path(names.pop()) if "--write" in names else None
    names = [name for name in names if name != "--write"]
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    outcomes = []
    for name in names or [n for n in zoo.NAMES if not n.startswith("timm")]:
        outcomes.append(o := run(name))
        what = (
            f"FAILED: {o.failed}"
            if o.failed
            else f"{o.sites} sites, {o.refused} refused, program {o.program:.0e}"
        )
        print(f"{name:<28} {o.seconds:5.1f} s  {what}{'' if o.captured else ' (not captured)'}", flush=True)
    passed = [o for o in outcomes if not o.failed]
    bare = sum(not o.captured for o in passed)
    print(
        f"{len(outcomes)} architectures; {len(passed)} pass in place, {bare} of them only with paths, because they "
        f"cannot be captured"
    )
    if write:
        write.write_text(page(outcomes))
    return 0 if len(passed) >= 0.95 * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
