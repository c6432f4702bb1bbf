"""Size, latency, speed of generation and quality of several finished models, measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Generator as Draw
from torch import Tensor

from surgery.cli.inference.evaluate import Evaluation
from surgery.cli.inference.generate import Generator, Sampling
from surgery.cli.inference.runner import Runner
from surgery.common.errors import LoadError, SurgeryError
from surgery.common.progress import track
from surgery.train.data import make_examples, quiet
from surgery.train.objective import Objective

BATCHES = (1, 16)
_WARMUP = 2  # runs that are not counted: the first ones allocate memory
_GENERATIONS = 5  # rounds of generation, which takes many times longer than a forward pass
_PROMPT = 16  # tokens of a random prompt


@dataclass(frozen=True)
class Figures:
    """Figures of one model.

    Attributes:
        ref: its reference.
        kind: its form.
        size: bytes of its files, of a program the bytes of the tensors that it reads; or None.
        latency: median seconds of a forward pass, by batch size.
        tokens: median of the generated tokens per second; None if it does not generate.
        quality: value of the metric; None without data.
        metrics: all figures on the data.
    """

    ref: str
    kind: str
    size: int | None
    latency: Mapping[int, float]
    tokens: float | None = None
    quality: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON-compatible values."""
        return {
            "model": self.ref,
            "form": self.kind,
            "bytes": self.size,
            "latency": {str(batch): seconds for batch, seconds in self.latency.items()},
            "tokens_per_second": self.tokens,
            "quality": self.quality,
            "metrics": dict(self.metrics),
        }


@dataclass(frozen=True)
class Benchmark:
    """Figures of several models.

    Attributes:
        models: figures of each, in the order in which they were given.
        rounds: measurements of each latency.
        threads: threads of torch and of onnxruntime.
        inputs: description of the inputs.
        devices: devices that the models run on.
        metric: name of the metric of quality, or "".
        larger: True if a larger quality is better.
    """

    models: tuple[Figures, ...]
    rounds: int
    threads: int
    inputs: str
    devices: tuple[str, ...] = ("cpu",)
    metric: str = ""
    larger: bool = True

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-compatible values."""
        return {
            "rounds": self.rounds,
            "threads": self.threads,
            "inputs": self.inputs,
            "devices": list(self.devices),
            "metric": self.metric or None,
            "larger_is_better": self.larger if self.metric else None,
            "models": [each.to_json() for each in self.models],
        }


def benchmark(
    runners: Sequence[Runner],
    *,
    objective: Objective | None = None,
    rows: Any = None,
    judged: Sequence[Evaluation] = (),
    rounds: int = 20,
    new_tokens: int = 32,
    length: int = 128,
) -> Benchmark:
    """Measure models in turns: every round runs each of them once, beginning with another one.

    Args:
        runners: the models.
        objective: objective that makes the inputs of rows.
        rows: rows whose first ones are the inputs; random inputs without them.
        judged: evaluation of each model, or none.
        rounds: measurements of each latency.
        new_tokens: tokens to generate, in models that generate; 0: none.
        length: tokens of random texts.

    Raises:
        SurgeryError: a model does not accept the inputs.
    """
    # All models get texts of one length, so that their times can be compared.
    length = min(
        [length, *(runner.setting.longest for runner in runners if "input_ids" in runner.setting.inputs)]
    )
    batches = {
        count: [_inputs(runner, count, objective, rows, length) for runner in runners] for count in BATCHES
    }
    latency: list[dict[int, float]] = [{} for _ in runners]
    for count, inputs in batches.items():
        timed = _in_turns(
            [partial(_run, r, given, rows is None) for r, given in zip(runners, inputs, strict=True)],
            rounds,
            _WARMUP,
            f"latency at batch {count}",
        )
        for number, seconds in enumerate(timed):
            latency[number][count] = statistics.median(seconds)
    speeds: list[float | None] = [None] * len(runners)
    writers = [_generator(runner, objective) if new_tokens else None for runner in runners]
    able = [number for number, writer in enumerate(writers) if writer is not None]
    if able:
        how = Sampling(new_tokens, min_tokens=new_tokens)
        prompts = [_prompt(batches[1][number]) for number in able]
        made: dict[int, int] = {}

        def one(number: int, prompt: list[int]) -> None:
            writer = writers[number]
            assert writer is not None
            made[number] = len(writer.generate(prompt, how))

        timed = _in_turns(
            [partial(one, n, p) for n, p in zip(able, prompts, strict=True)],
            min(rounds, _GENERATIONS),
            1,
            "generation",
        )
        for number, seconds in zip(able, timed, strict=True):
            speeds[number] = made[number] / statistics.median(seconds)
    first = judged[0] if judged else None
    return Benchmark(
        tuple(
            Figures(
                runner.ref,
                runner.kind,
                runner.size,
                latency[number],
                speeds[number],
                judged[number].quality if judged else None,
                dict(judged[number].metrics) if judged else {},
            )
            for number, runner in enumerate(runners)
        ),
        rounds,
        torch.get_num_threads(),
        "first rows of the data" if rows is not None else f"random, texts of {length} tokens at most",
        tuple(dict.fromkeys(str(runner.device) for runner in runners)),
        first.metric if first else "",
        first.larger if first else True,
    )


def _in_turns(calls: Sequence[Callable[[], Any]], rounds: int, warmup: int, title: str) -> list[list[float]]:
    """Seconds of each call in each round. The first one of a round changes, as it runs with the colder cache."""
    for call in calls:
        for _ in range(warmup):
            call()
    found: list[list[float]] = [[] for _ in calls]
    for turn in track(range(rounds), title):
        for place in range(len(calls)):
            number = (turn + place) % len(calls)
            start = perf_counter()
            calls[number]()
            found[number].append(perf_counter() - start)
    return found


def _run(runner: Runner, inputs: Mapping[str, Tensor], random: bool) -> None:
    """Run a model once."""
    try:
        runner(inputs)
    except SurgeryError as error:
        if not random or "input_ids" not in inputs:
            raise
        raise LoadError(
            f"{error}; give a smaller --length than {inputs['input_ids'].shape[1]}, or --data"
        ) from None


def _inputs(
    runner: Runner, count: int, objective: Objective | None, rows: Any, length: int
) -> dict[str, Tensor]:
    """Inputs of a batch: of the first rows, or random ones."""
    setting = runner.setting
    if rows is not None and objective is not None:
        some = rows.select(range(min(len(rows), max(BATCHES))))
        with quiet():
            prepared = objective.prepared(rows, setting)
        data = make_examples(some, objective, prepared)
        chosen = [number % len(data) for number in range(count)]
        batch = objective.collate(data[chosen], prepared, Draw().manual_seed(0))
        inputs = objective.unpacked(batch)["inputs"]
        return {name: value[:count] for name, value in inputs.items()}
    draw = Draw().manual_seed(0)
    if "input_ids" in setting.inputs:
        size = setting.fixed or length
        vocabulary = _vocabulary(runner)
        made = {
            name: torch.zeros(count, size).long()
            if name != "attention_mask"
            else torch.ones(count, size).long()
            for name in setting.inputs
        }
        return {
            **made,
            "input_ids": torch.randint(min(4, vocabulary - 1), vocabulary, (count, size), generator=draw),
        }
    if not all(isinstance(value, Tensor) and value.dim() for value in setting.inputs.values()):
        raise LoadError(f"{runner.ref} takes inputs that cannot be made at random; give --data")
    return {
        name: torch.randn((count, *value.shape[1:]), generator=draw).to(value.dtype)
        if value.is_floating_point()
        else value[:1].expand(count, *value.shape[1:]).clone()
        for name, value in setting.inputs.items()
    }


def _vocabulary(runner: Runner) -> int:
    """Number of tokens that the model knows."""
    config = runner.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = (getattr(text, "vocab_size", None), len(runner.setting.tokenizer or ()) or None)
    return next((int(size) for size in known if isinstance(size, int)), 100)


def _generator(runner: Runner, objective: Objective | None) -> Generator | None:
    """The model as a generator of text, or None if it is none."""
    if objective is not None and "text-generation" not in objective.heads:
        return None
    try:
        return Generator(runner)
    except SurgeryError:
        return None


def _prompt(inputs: Mapping[str, Tensor]) -> list[int]:
    """Tokens of the first row."""
    ids, mask = inputs["input_ids"][0], inputs.get("attention_mask")
    length = int(mask[0].sum()) if mask is not None else len(ids)
    return ids[: min(length, _PROMPT)].tolist()
