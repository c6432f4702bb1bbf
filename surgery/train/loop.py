"""The loop: `accelerate` over a program's module, obeying its schedule, with checkpoints that continue bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from surgery.common.errors import SurgeryError, TrainingError
from surgery.engine.program import Program
from surgery.live.state import is_shard
from surgery.train.accelerated import accelerator, alone, check_on_policy, check_shards, let_go
from surgery.train.batch_order import Order
from surgery.train.checkpoint import LOG, Checkpoints, State, Weights
from surgery.train.data import Rows, make_examples, quiet, together
from surgery.train.data_context import Setting
from surgery.train.examples import Examples
from surgery.train.learned import train_learned
from surgery.train.nonfinite import first_bad
from surgery.train.objective import Batch, Objective, OnPolicy
from surgery.train.options import Settings
from surgery.train.regularize import Regularizer
from surgery.train.runner import Body
from surgery.train.summary import counted, rates, tokens_of, unfinished
from surgery.train.watchers import LogFile, Watcher, Watchers

MOST_SKIPPED = 30  # steps of fp16 whose gradient overflows: its scale has been halved so often by then


@dataclass(frozen=True)
class Result:
    """steps: how many were done. best: of which step the program has the weights. metrics: of it on held-out data,
    empty where there is none; before: the same at the start. stopped: whether for lack of patience."""

    steps: int
    best: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    stopped: bool = False


def train(
    program: Program,
    objective: Objective,
    rows: Rows,
    settings: Settings | None = None,
    *,
    folder: Path,
    tokenizer: Any = None,
    resume: bool = False,
    watchers: Sequence[Watcher] = (),
) -> Result:
    """Train a program, in place: it has the weights of the best evaluation afterwards, or the last ones.

    rows: see `read_rows` and `split`. folder: where checkpoints and the log go. resume: go on from the last checkpoint
    there; program, data and options have to be the same. Raises TrainingError, PassError where nothing trains.
    """
    made = Loop(program, objective, rows, settings or Settings(), Path(folder), tokenizer, watchers)
    return made.run(resume)


class Loop:
    """One training."""

    def __init__(
        self,
        program: Program,
        objective: Objective,
        rows: Rows,
        settings: Settings,
        folder: Path,
        tokenizer: Any,
        watchers: Sequence[Watcher],
    ) -> None:
        self.program, self.objective, self.settings = program, objective, settings
        if isinstance(objective, OnPolicy):
            check_on_policy(objective, settings)
        groups = program.parameter_groups(settings.lr, weight_decay=settings.weight_decay)
        self.penalties = [Regularizer.of(program, text) for text in settings.regularize]
        setting = Setting.of(program, tokenizer, settings.max_length)
        with quiet():
            self.setting = objective.prepared(together(rows), setting)
        self.data = make_examples(rows.train, objective, self.setting)
        self.notes = counted(self.setting, "")
        self.held_out: Examples | None = None
        if rows.held_out is not None:
            held = replace(self.setting, counts=type(self.setting.counts)())
            self.held_out = make_examples(rows.held_out, objective, held)
            self.notes += counted(held, "held-out ")
        self.checkpoints = Checkpoints(folder)
        self.body = Body(program, settings.form, settings.checkpointing)
        self.module = self.body.module
        self.notes += [self.body.note] if self.body.note else []
        self.notes += rates(groups) + [note for each in self.penalties for note in each.notes()]
        self.accelerator = accelerator(settings)
        self.watch = Watchers([LogFile(folder / LOG), *watchers] if self.accelerator.is_main_process else [])
        self.training: set[str] | None = None
        self.skipped = 0
        self.kept: dict[str, float] = {}
        try:
            self._prepare(groups)
        except BaseException:
            let_go(self.accelerator)
            raise

    def _prepare(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Hand what trains to accelerate, and make what goes with it."""
        settings, objective = self.settings, self.objective
        if isinstance(objective, OnPolicy) and self.accelerator.num_processes > 1:
            raise alone(objective, "more than one process")
        if self.accelerator.is_fsdp2:
            self.body.unflatten()
        optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=settings.lr)
        self.model, self.optimizer = self.accelerator.prepare(self.body.model, optimizer)
        check_shards(self.body, self.program, self.penalties)
        self.order = Order(
            settings.seed,
            lambda draw: objective.epoch(self.data, settings.batch, draw),
            settings.accumulate,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.order.number("companions"))
            self.companions = objective.companions(self.program)
        for companion in self.companions.values():
            companion.to(self.accelerator.device)
        learned = train_learned(self.companions, self.accelerator, self.optimizer, settings.lr)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.weights = Weights(self.program, self.body, learned)
        self.steps = settings.steps or max(1, round(settings.epochs * self.order.steps))
        self.notes += unfinished(self.module.__dict__["_paced"], self.steps, self.order.steps)

    # -- the whole

    def run(self, resume: bool) -> Result:
        """Train to the end, and leave the best weights in the program."""
        try:
            return self._run(resume)
        finally:
            self.body.model.eval()
            self.module.eval()
            if not self.body.sharded:
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            let_go(self.accelerator)

    def _run(self, resume: bool) -> Result:
        what = self._identity()
        if type(self.objective).check is not Objective.check:  # else nobody looks at the batch
            self.model.eval()
            first = self._batch(self.data, self.order.epoch(0)[0], self.order.draw("batch", 0, 0))
            self.objective.check(self.model, first, self.body.form)
        before = self.evaluate()
        if resume:
            self.checkpoints.check_same(what)
            state = self.checkpoints.read(self.weights, self.optimizer.optimizer)
            self.notes += [] if state.step else ["no checkpoint had been written: it starts at step 0"]
            if state.scaler and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state.scaler)
        else:
            if self.accelerator.is_main_process:
                self.checkpoints.begin(what)
            state = State()
        self.watch.begun(state.step, self.steps)
        for note in self.notes if not state.step else ():
            self.watch.noted(0, note)
        try:
            return self._go_on(state, before)
        finally:
            self.watch.ended()

    def _go_on(self, state: State, before: Mapping[str, float]) -> Result:
        metrics = self.evaluate() if state.step else before
        every = self.settings.evaluate or self.order.steps
        self.kept = state.kept
        if state.step:
            self._advance(state.step - 1, said=True)
        self.model.train(not isinstance(self.objective, OnPolicy))
        stopped = False
        while state.step < self.steps and not stopped:
            loss, tokens = self._step(state.step)
            state.step += 1
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            self.watch.stepped(state.step, loss, rate, tokens)
            last = state.step == self.steps
            if self.held_out is not None and (state.step % every == 0 or last):
                metrics = self.evaluate()
                stopped = self._judge(state, metrics) and not last
            elif not last and state.step % (self.settings.checkpoint or every):
                continue
            self._keep(state)
        best = state.step
        if state.best is not None and state.best != state.step:
            best = state.best
            self.weights.put(self.checkpoints.weights_of(best))
            metrics = self.evaluate()
        else:
            self.body.pull(self.weights.names)
        return Result(state.step, best, metrics, before, stopped)

    def _judge(self, state: State, metrics: Mapping[str, float]) -> bool:
        """Note an evaluation; whether it is time to stop."""
        score = metrics[self.objective.metric]
        if math.isnan(score):
            raise TrainingError(
                f"{self.objective.metric} of the held-out data is nan after step {state.step}; {self._kept_so_far()}"
            )
        sign = 1 if self.objective.larger else -1
        better = state.score is None or sign * score > sign * state.score
        if better:
            state.best, state.score, state.stale = state.step, score, 0
        else:
            state.stale += 1
        self.watch.evaluated(state.step, metrics, better)
        return self.settings.patience is not None and state.stale >= self.settings.patience

    def _keep(self, state: State) -> None:
        for each in self.penalties:
            self.watch.noted(state.step, each.said())
        scaler = self.accelerator.scaler
        state.scaler = scaler.state_dict() if scaler is not None else None
        main = self.accelerator.is_main_process
        self.checkpoints.write(state, self.weights, self.optimizer.optimizer, main)
        self.accelerator.wait_for_everyone()

    def _identity(self) -> dict[str, Any]:
        """What a resumed run has to have in common with the one that it goes on with."""
        program = json.dumps([self.program.base.graph_hash, self.program.journal.to_json()], sort_keys=True)
        return {
            "objective": {"name": self.objective.name, **self.objective.options()},
            "option": {
                **self.settings.options(),
                "processes": self.accelerator.num_processes,
                "runs": self.body.form,
            },
            "program": hashlib.sha256(program.encode()).hexdigest(),
            "data": [part.digest() for part in (self.data, self.held_out) if part is not None],
            "decided": dict(self.setting.decided),
        }

    # -- one step

    def _step(self, step: int) -> tuple[float, int]:
        """One update of the weights; the loss, and how many tokens it read."""
        self._advance(step)
        rate = self.settings.rate(step, self.steps)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * rate
        chosen = self.order.batches(step)
        batches = [
            self._batch(self.data, rows, self.order.draw("batch", step, place)) for place, rows, _ in chosen
        ]
        # A process without a batch of its own runs another's, which does not count: shards are gathered by all.
        counted = [counts for _, _, counts in chosen]
        if isinstance(self.objective, OnPolicy):
            return self._improve(step, chosen[0][1], batches[0])
        terms = [
            self.objective.terms(batch) if real else 0 for batch, real in zip(batches, counted, strict=True)
        ]
        total = int(self._summed(torch.tensor(float(sum(terms)))))
        torch.manual_seed(self.order.number("dropout", step, self.accelerator.process_index))
        loss = torch.zeros((), device=self.accelerator.device)
        for i, (batch, count) in enumerate(zip(batches, terms, strict=True)):
            value = self.objective.loss(self.model, batch)
            if not value.isfinite():
                raise self._failure(f"the loss is {float(value.detach()):g}", step, chosen[i][1], batch)
            if not value.requires_grad:
                raise TrainingError(
                    f"nothing that trains reaches the loss of {self.objective.name}; let something train that it "
                    f"reads, or give the output that it is to read"
                )
            share = value * (count / total)
            loss += share.detach()
            # What processes have is averaged, and each has its share of the sum.
            share = share * self.accelerator.num_processes
            if i + 1 == len(batches):
                for term in (term for each in self.penalties for term in each.terms()):
                    share = share + term
                self.accelerator.backward(share)
            else:
                with self.accelerator.no_sync(self.model):
                    self.accelerator.backward(share)
        norm = self._clip()
        if self.accelerator.scaler is None and not math.isfinite(norm):
            said = f"the norm of the gradient is {norm:g}"
            raise self._failure(said, step, chosen[-1][1], batches[-1])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._regularize(step, rate)
        if self.accelerator.scaler is not None:
            self.skipped = self.skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
            if self.skipped == MOST_SKIPPED:
                said = f"the gradient was not finite in {self.skipped} steps running"
                raise self._failure(said, step, chosen[-1][1], batches[-1])
        tokens = sum(tokens_of(batch) for batch, real in zip(batches, counted, strict=True) if real)
        return float(self._summed(loss)), int(self._summed(torch.tensor(float(tokens))))

    def _regularize(self, step: int, rate: float) -> None:
        """Let the penalties act, and say how large they are."""
        if not self.penalties:
            return
        for each in self.penalties:
            each.step(self.settings.lr * rate)
        with torch.no_grad():
            size = sum(float(each.penalty()) for each in self.penalties)
        self.watch.measured(step + 1, {"penalty": size})

    def _clip(self) -> float:
        """Scale the gradients down to the largest norm that is allowed; the norm that they had."""
        self.accelerator.unscale_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm: Any = nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf)
        return float(norm.full_tensor() if is_shard(norm) else norm)

    def _improve(self, step: int, chosen: Sequence[int], batch: Batch) -> tuple[float, int]:
        """One step of an objective that learns from what the program has just done."""
        assert isinstance(self.objective, OnPolicy)
        clip = self.settings.clip or math.inf
        try:
            figures = self.objective.improve(self.model, batch, self.optimizer, clip, self.kept)
        except SurgeryError as error:
            raise self._failure(str(error), step, chosen, batch) from None
        self.optimizer.zero_grad()
        loss = figures.pop("loss")
        self.watch.measured(step + 1, figures)
        return loss, tokens_of(batch)

    def _advance(self, step: int, said: bool = False) -> None:
        """Let the schedule act, and say so when it does, with the number of the step that is to come.

        said: whether it was said already, before the training was stopped.
        """
        epoch_wise = self.program.schedule.unit == "epoch"
        paced = self.module.__dict__["_paced"]
        done = [each.done for each in paced]
        now = set(self.module.advance(step // self.order.steps if epoch_wise else step))
        if not now:
            raise TrainingError(
                f"nothing trains at step {step} of the program's schedule; give another --every"
            )
        if self.training is not None and now != self.training:
            more, less = sorted(now - self.training), sorted(self.training - now)
            moved = [f"{len(more)} more parameters train ({more[0]}, …)"] if more else []
            moved += [f"{len(less)} stop ({less[0]}, …)"] if less else []
            self.watch.noted(step + 1, "; ".join(moved))
        self.training = now
        for each, before in zip(paced, done, strict=True):
            if each.done != before and before is not None and not said:
                self.watch.noted(step + 1, f"{each.pass_.name} changed its tensors, to {each.done:.3g}")

    def _batch(self, data: Examples, chosen: Sequence[int], draw: Generator) -> Batch:
        batch = self.objective.collate(data[chosen], self.setting, draw)
        device = self.accelerator.device
        batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        with torch.no_grad():
            return self.objective.complete(batch, self.companions)

    def _summed(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum")

    def _failure(self, what: str, step: int, chosen: Sequence[int], batch: Batch) -> TrainingError:
        if self.body.sharded:
            where = "in which of its parameters' shards is not looked for"
        else:
            self.module.train().to(self.accelerator.device)
            with self.accelerator.autocast():
                where = first_bad(self.module, self.objective.unpacked(batch))
        rows = ", ".join(str(example["row"]) for example in self.data[chosen])
        return TrainingError(f"{what} at step {step + 1}, of rows {rows}; {where}; {self._kept_so_far()}")

    def _kept_so_far(self) -> str:
        kept = self.checkpoints.steps()
        if not kept:
            return "no checkpoint was written before it"
        return f"the checkpoint of step {kept[-1]} is kept in {self.checkpoints.folder}"

    # -- held-out data

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective's figures of the held-out data, or nothing where there is none."""
        if self.held_out is None:
            return {}
        self.model.eval()
        seen: list[dict[str, Tensor]] = []
        index, processes = self.order.index, self.order.processes
        order = self.objective.epoch(self.held_out, self.settings.batch, None)
        for start in range(0, len(order), processes):
            number = min(start + index, len(order) - 1)  # shards are gathered by all
            batch = self._batch(self.held_out, order[number], self.order.draw("held out", number))
            observed = self.objective.observe(self.model, batch)
            if number == start + index:
                seen.append({name: tensor.cpu() for name, tensor in observed.items()})
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            seen = gather_object(seen)
        self.model.train(not isinstance(self.objective, OnPolicy))
        names = dict.fromkeys(name for each in seen for name in each)
        return self.objective.metrics(
            {name: torch.cat([each[name] for each in seen if name in each]) for name in names}
        )


__all__ = ["Loop", "Result", "train"]
