"""Helpers of the examples: progress messages, a training loop with a progress bar, and latency measurements."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
from data import DataError
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from surgery import SurgeryError
from surgery.export.runtime import OnnxModel

Batch = TypeVar("Batch")
INDENT = 9

console = Console(highlight=False)


def run(main: Callable[[], None]) -> None:
    """Run an example without the libraries' progress bars. An error that a user can fix is one line, exit code 2."""
    transformers_logging.disable_progress_bar()
    try:
        main()
    except (SurgeryError, DataError) as error:
        console.print(f"[bold red]error:[/] {error}")
        sys.exit(2)


def step(title: str, text: str) -> None:
    """Print the current step."""
    line = Table.grid(padding=0)
    line.add_column(width=INDENT, style="bold cyan")
    line.add_row(title, text)
    console.print(line)


def note(text: str) -> None:
    """Print a result of the current step."""
    console.print(Padding(text, (0, 0, 0, INDENT), expand=False, style="dim"))


def train(
    module: nn.Module,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    *,
    steps: int,
    lr: float,
) -> float:
    """Train with AdamW, linear warm-up and linear decay.

    Args:
        module: Module; its parameters with `requires_grad` are trained.
        batches: Batches, at least as many as steps.
        loss_of: Loss of a batch.
        steps: Optimizer steps.
        lr: Peak learning rate.

    Returns:
        Seconds of training.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    columns = (
        TextColumn(" " * (INDENT - 1) + "{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    module.train()
    begun, smooth = perf_counter(), 0.0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for step, batch in zip(range(steps), batches, strict=False):
            loss = loss_of(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
            progress.update(task, advance=1, loss=smooth)
    module.eval()
    return perf_counter() - begun


def latencies(files: Mapping[str, Path], inputs: Mapping[str, Tensor], repeats: int) -> dict[str, float]:
    """Median seconds of each file in onnxruntime. Runs are interleaved, so machine load affects all files alike."""
    models = {name: OnnxModel(path) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for (name, model), _ in zip(cycle(models.items()), range(len(models) * (repeats + 3)), strict=False):
        begun = perf_counter()
        model.run(inputs)
        times[name].append(perf_counter() - begun)
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return (
        sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        if path.is_dir()
        else path.stat().st_size
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
