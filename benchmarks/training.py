"""`surgery train` against PEFT with transformers' Trainer: `python -m benchmarks training` (not part of `make bench`).

LoRA of rank 8 on the attention of SmolLM2 (--quick: three steps of two examples), on alpaca_en's answers, in fp32:
the same factors at the start, the same batches in the same order, AdamW at a constant
rate. Trained in turns, whole runs; a step's time is from the end of one to the end of the next, and the benchmark stops
where the losses of any step differ by more than SAME.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

import surgery
from benchmarks.models import Model, require, smollm2
from benchmarks.timing import Row, quartiles
from surgery.training.data import Rows
from surgery.training.loop import train
from surgery.training.objective import Batch
from surgery.training.objectives import Sft
from surgery.training.settings import Settings
from surgery.training.tokenizers import find_tokenizer
from surgery.training.watching import Watcher

ROOT = Path(__file__).resolve().parents[1]
AIM = 1 / 1.05  # of the time: 1.05 of the tokens a second
SAME = 1e-3  # relative: fp32 sums in two orders, through steps of Adam, whose first ones are the sign of a gradient
RANK, ALPHA, RATE, BATCH, LONGEST = 8, 16.0, 1e-3, 4, 256


def run(quick: bool) -> Iterator[Row]:
    require("peft", "the comparison with PEFT")
    require("accelerate", "training")
    yield from _compare(
        smollm2(), steps=3 if quick else 5, rounds=1 if quick else 3, batch=2 if quick else BATCH
    )


def _compare(model: Model, steps: int, rounds: int, batch: int) -> Iterator[Row]:
    rows = _rows(steps * batch * 2)
    program = model.program().apply(surgery.Lora(target="attn.*", rank=RANK, alpha=ALPHA))
    start = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    settings = Settings(
        steps=steps, batch=batch, lr=RATE, decay="constant", warmup=0, max_length=LONGEST, checkpoint=steps
    )
    batches: list[Batch] = []

    class Recording(Sft):
        def loss(self, module: Any, batch: Batch) -> Tensor:
            batches.append(batch)
            return super().loss(module, batch)

    with tempfile.TemporaryDirectory() as folder:

        def ours(objective: Sft) -> _Steps:
            with torch.no_grad():
                for name, tensor in program.tensors.items():
                    tensor.copy_(start[name])
            seen = _Steps()
            tokenizer = find_tokenizer(program)
            train(
                program, objective, rows, settings, folder=Path(folder), tokenizer=tokenizer, watchers=[seen]
            )
            return seen

        first = ours(Recording())
        peer = model.peft(program, model.attention, RANK, ALPHA)
        begin = {n: start[_ours_of(n)] for n, p in peer.named_parameters() if p.requires_grad}
        tokens = [int(b["inputs"]["attention_mask"].sum()) for b in batches]
        mine: list[float] = []
        theirs: list[float] = []
        gap = 0.0
        for number in range(rounds + 1):
            here = first if not number else ours(Sft())
            there = _trainer(peer, begin, batches, Path(folder))
            gap = max(gap, *(abs(a - b) / abs(b) for a, b in zip(here.losses, there.losses, strict=True)))
            if number:  # the first warms up, and records
                mine += here.seconds[1:]
                theirs += there.seconds[1:]
    if not gap <= SAME:
        raise RuntimeError(f"the losses of ours and of Trainer differ by {gap:.1e}; the times mean nothing")
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    ratio, (low, high) = median(ratios), quartiles(ratios)
    a_step = sum(tokens[1:]) / len(tokens[1:])
    note = (
        f"losses of {steps} steps agree within {gap:.0e}; {a_step / median(mine):,.0f} tokens/s against "
        f"{a_step / median(theirs):,.0f}"
    )
    yield Row(
        "training", f"{model.name}: step of surgery train", "PEFT and Trainer", median(mine), median(theirs), ratio,
        low, high, AIM, note=note,
    )  # fmt: skip


def _rows(count: int) -> Rows:
    """Rows of alpaca_en, shuffled the same every time."""
    import datasets

    sys.path.insert(0, str(ROOT / "examples"))
    from data import alpaca_en

    rows = alpaca_en()
    random.Random(0).shuffle(rows)
    return Rows(
        datasets.Dataset.from_list([{"prompt": r.prompt, "response": r.answer} for r in rows[:count]])
    )


def _clock() -> float:
    """CPU time with one thread, else wall time, as in the other benchmarks."""
    return process_time() if torch.get_num_threads() == 1 else perf_counter()


class _Steps(Watcher):
    """Losses, and seconds from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends = [_clock()]

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        self.losses.append(loss)
        self.ends.append(_clock())


def _ours_of(name: str) -> str:
    """The program's name of a factor of PEFT's."""
    module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
    return f"{module}.lora.{factor.split('.')[0]}"


def _trainer(model: Any, begin: Mapping[str, Tensor], batches: list[Batch], folder: Path) -> _Steps:
    """The same batches by Trainer, from the same factors."""
    import transformers
    from torch.utils.data import SequentialSampler

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in begin:
                parameter.copy_(begin[name])
    seen = _Steps()

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.ends.append(_clock())

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(range(len(batches)))

    rows = []
    for batch in batches:
        labels = torch.full_like(batch["labels"], -100)
        labels[:, 1:] = batch["labels"][:, :-1]  # transformers moves them by itself
        rows.append({**batch["inputs"], "labels": labels})
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "peer"), per_device_train_batch_size=1, max_steps=len(batches), learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, logging_steps=1, report_to="none",
        save_strategy="no", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=arguments, train_dataset=rows, data_collator=lambda r: r[0], callbacks=[Ends()]
    )
    seen.ends = [_clock()]
    trainer.train()
    seen.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seen
