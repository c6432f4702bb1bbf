"""`surgery train` against PEFT with transformers' Trainer: `python -m benchmarks training` (not part of `make bench`).

LoRA of rank 8 on the attention of SmolLM2, on alpaca_en's answers, in fp32. Both start from the same factors and use
AdamW at a constant rate. Whole runs alternate. The time of a step is measured from the end of one to the end of the
next.

First, both train on the same batches in the same order; the benchmark stops if the losses of any step differ by more
than SAME. Then both train for an epoch on the same examples, each in its own order: ours forms batches of similar
length, which reduces padding. The benchmark stops if the held-out losses afterwards differ by more than NOISE.
(--quick: few examples.)
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

import surgery
from benchmarks.models import Model, require, smollm2
from benchmarks.timing import Row, quartiles
from surgery.train.data import Rows
from surgery.train.data_context import Setting
from surgery.train.loop import Result, train
from surgery.train.objective import Batch
from surgery.train.objectives import Sft
from surgery.train.options import Settings
from surgery.train.tokenizers import find_tokenizer
from surgery.train.watchers import Watcher

ROOT = Path(__file__).resolve().parents[1]
AIM = 1 / 1.05  # Ratio of times, that is 1.05 of the tokens per second.
# Relative. The orders of fp32 sums differ, and the first steps of Adam follow the sign of the gradient.
SAME = 1e-3
NOISE = 0.03  # Relative. The order of the examples differs, as with another seed.
RANK, ALPHA, RATE, BATCH, LONGEST = 8, 16.0, 1e-3, 4, 256


def run(quick: bool) -> Iterator[Row]:
    require("peft", "the comparison with PEFT")
    require("accelerate", "training")
    model, batch, rounds = smollm2(), 2 if quick else BATCH, 1 if quick else 3
    pair = _Pair(model)
    yield _same_batches(pair, 3 if quick else 5, rounds, batch)
    yield _own_orders(pair, 8 if quick else 48, batch)


class _Pair:
    """A program with LoRA and PEFT's model with the same factors; each run starts from these factors."""

    def __init__(self, model: Model) -> None:
        self.name = model.name
        self.program = model.program().apply(surgery.Lora(target="attn.*", rank=RANK, alpha=ALPHA))
        self.start = {name: tensor.detach().clone() for name, tensor in self.program.tensors.items()}
        self.peer: Any = model.peft(self.program, model.attention, RANK, ALPHA)
        self.tokenizer = find_tokenizer(self.program)

    @torch.no_grad()
    def ours(self, objective: Sft, rows: Rows, **settings: Any) -> _Steps:
        """A run of `surgery train`."""
        for name, tensor in self.program.tensors.items():
            tensor.copy_(self.start[name])
        seen = _Steps()
        options = Settings(lr=RATE, decay="constant", warmup=0, max_length=LONGEST, **settings)
        with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
            seen.result = train(
                self.program, objective, rows, options, folder=Path(folder), tokenizer=self.tokenizer,
                watchers=[seen],
            )  # fmt: skip
        return seen

    @torch.no_grad()
    def theirs(self, rows: Sequence[Mapping[str, Any]], batch: int, in_order: bool, collate: Any) -> _Steps:
        """A run of Trainer: one epoch over the rows."""
        for name, parameter in self.peer.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(self.start[_ours_of(name)])
        with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
            return _trainer(self.peer, rows, batch, in_order, collate, folder)


class _Recording(Sft):
    """Records its training batches."""

    def loss(self, module: Any, batch: Batch) -> Tensor:
        self.__dict__.setdefault("batches", []).append(batch)
        return super().loss(module, batch)


def _same_batches(pair: _Pair, steps: int, rounds: int, batch: int) -> Row:
    rows = Rows(_rows(steps * batch * 2))
    settings = {"steps": steps, "batch": batch, "checkpoint": steps}
    recording = _Recording()
    first = pair.ours(recording, rows, **settings)
    batches = recording.__dict__["batches"]
    given = [{**each["inputs"], "labels": _moved(each["labels"])} for each in batches]
    mine: list[float] = []
    theirs: list[float] = []
    gap = 0.0
    for number in range(rounds + 1):
        here = first if not number else pair.ours(Sft(), rows, **settings)
        there = pair.theirs(given, 1, True, lambda r: r[0])
        gap = max(gap, *(abs(a - b) / abs(b) for a, b in zip(here.losses, there.losses, strict=True)))
        if number:  # The first round is a warm-up and records the batches.
            mine += here.seconds[1:]
            theirs += there.seconds[1:]
    if not gap <= SAME:
        raise RuntimeError(
            f"the losses of ours and Trainer differ by {gap:.1e}, so the times are not comparable"
        )
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    a_step = sum(first.tokens[1:]) / len(first.tokens[1:])
    note = f"losses of {steps} steps agree within {gap:.0e}; {_speeds(a_step, median(mine), median(theirs))}"
    what = f"{pair.name}: a step of the same batches"
    return Row(
        "training", what, "PEFT and Trainer", median(mine), median(theirs), median(ratios), *quartiles(ratios),
        AIM, note=note,
    )  # fmt: skip


def _own_orders(pair: _Pair, count: int, batch: int) -> Row:
    rows = _rows(count + count // 4)
    learned, held = rows.select(range(count)), rows.select(range(count, len(rows)))
    recording = _Recording()
    here = pair.ours(recording, Rows(learned, held), epochs=1, batch=batch)
    singles = [row for each in recording.__dict__["batches"] for row in _single(each)]
    there = pair.theirs(singles, batch, False, _padded(pair.tokenizer))
    tokens = sum(len(row["input_ids"]) for row in singles)
    if sum(here.tokens) != tokens:
        raise RuntimeError(f"ours read {sum(here.tokens)} tokens, but Trainer got {tokens}")
    assert here.result is not None
    before, after = (found["loss"] for found in (here.result.before, here.result.metrics))
    losses = after, _held_out(pair, held, batch)
    if not abs(losses[0] - losses[1]) <= NOISE * losses[1]:
        raise RuntimeError(
            f"held-out losses are {losses[0]:.3f} and {losses[1]:.3f}; the times are not comparable"
        )
    mine, theirs = sum(here.seconds), sum(there.seconds)
    note = (
        f"{count} examples; held-out loss {before:.3f} -> {after:.3f} against {losses[1]:.3f}; "
        f"{_speeds(tokens, mine, theirs)}"
    )
    ratio = mine / theirs
    what = f"{pair.name}: an epoch, each in its own order"
    return Row("training", what, "PEFT and Trainer", mine, theirs, ratio, ratio, ratio, AIM, note=note)


def _speeds(tokens: float, mine: float, theirs: float) -> str:
    return f"{tokens / mine:,.0f} tokens/s against {tokens / theirs:,.0f}"


def _moved(labels: Tensor) -> Tensor:
    """Labels for transformers, which shifts them by one position itself."""
    moved = torch.full_like(labels, -100)
    moved[:, 1:] = labels[:, :-1]
    return moved


def _single(batch: Batch) -> Iterator[dict[str, list[int]]]:
    """Examples of a batch, without padding."""
    inputs = batch["inputs"]
    for ids, there, labels in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), _moved(batch["labels"]), strict=True
    ):
        yield {
            "input_ids": ids[there].tolist(),
            "attention_mask": [1] * int(there.sum()),
            "labels": labels[there].tolist(),
        }


def _padded(tokenizer: Any) -> Any:
    import transformers

    return transformers.DataCollatorForSeq2Seq(tokenizer)


@torch.no_grad()
def _held_out(pair: _Pair, rows: Any, batch: int) -> float:
    """Loss of PEFT's model on rows, computed as `surgery train` does."""
    objective = Sft()
    setting = objective.prepared(rows, Setting.of(pair.program, pair.tokenizer, LONGEST))
    examples = [example for row in rows for example in objective.examples(row, setting)]
    model, seen = pair.peer.eval(), []
    for start in range(0, len(examples), batch):
        given = objective.collate(examples[start : start + batch], setting, torch.Generator())
        seen.append(objective.observe(model, given))
    return objective.metrics({name: torch.cat([each[name] for each in seen]) for name in seen[0]})["loss"]


def _rows(count: int) -> Any:
    """Rows of alpaca_en, in a fixed random order."""
    import datasets

    sys.path.insert(0, str(ROOT / "examples"))
    from data import alpaca_en

    rows = alpaca_en()
    random.Random(0).shuffle(rows)
    return datasets.Dataset.from_list([{"prompt": r.prompt, "response": r.answer} for r in rows[:count]])


def _clock() -> float:
    """CPU time with one thread, else wall time, as in timing.py."""
    return process_time() if torch.get_num_threads() == 1 else perf_counter()


class _Steps(Watcher):
    """Records losses, and the seconds from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.result: Result | None = None
        self.ends = [_clock()]

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    def begun(self, step: int, steps: int) -> None:
        self.ends = [_clock()]

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens.append(tokens)
        self.ends.append(_clock())


def _ours_of(name: str) -> str:
    """Name in the program of a factor of PEFT."""
    module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
    return f"{module}.lora.{factor.split('.')[0]}"


def _trainer(
    model: Any, rows: Sequence[Mapping[str, Any]], batch: int, in_order: bool, collate: Any, folder: str
) -> _Steps:
    import transformers
    from torch.utils.data import SequentialSampler

    seen = _Steps()

    class Ends(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen.ends = [_clock()]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.ends.append(_clock())

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(range(len(rows)))

    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=RATE, seed=0,
        lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, logging_steps=1, report_to="none",
        save_strategy="no", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    kind = InOrder if in_order else transformers.Trainer
    trainer = kind(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Ends()])
    trainer.train()
    seen.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seen
