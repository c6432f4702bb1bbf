"""The training loop: runs accelerate on a program's module, follows its schedule, and writes checkpoints.

A run resumed from a checkpoint continues bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from surgery.common.errors import InterruptedTrainingError, SurgeryError, TrainingError
from surgery.engine.program import Program
from surgery.live.places import is_shard
from surgery.train.accelerated import (
    accelerator,
    alone,
    check_on_policy,
    check_shards,
    let_go,
    training_device,
)
from surgery.train.adapters import training_only
from surgery.train.batch_order import Order
from surgery.train.best import Best, Result
from surgery.train.checkpoint import LOG, Checkpoints, State, Weights
from surgery.train.data import Rows, make_examples, quiet, together
from surgery.train.data_context import Setting
from surgery.train.default_rate import default_rate
from surgery.train.evaluation import HELD_OUT, joined
from surgery.train.examples import Examples
from surgery.train.interrupt import Interrupt
from surgery.train.learned import train_learned
from surgery.train.nonfinite import first_bad
from surgery.train.objective import Batch, Objective, OnPolicy
from surgery.train.options import Settings
from surgery.train.regularize import Regularizer
from surgery.train.runner import Body
from surgery.train.summary import counted, rates, tokens_of, unfinished
from surgery.train.watchers import LogFile, Watcher, Watchers

# Consecutive fp16 steps with overflow before training fails. Each one halves the loss scale, so a scale that is merely
# too large recovers much earlier.
MOST_SKIPPED = 30


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
    device: torch.device | None = None,
) -> Result:
    """Train a program in place.

    The program ends with the weights of the best evaluation, or the last weights without held-out data. The weights
    from before training are kept if no later ones are as good.

    Args:
        program: program to train, with at least one trainable parameter.
        objective: objective to train with.
        rows: training and held-out rows, see `read_rows` and `split`.
        settings: options of the loop.
        folder: directory for checkpoints and the log.
        tokenizer: tokenizer of the program, if the objective reads text.
        resume: continue from the last checkpoint in `folder`. Program, data and options must be unchanged.
        watchers: receivers of progress.
        device: device to train on; by default the program's, or a GPU if the program is on the CPU and there is one.
            The program is on this device afterwards.

    Raises:
        TrainingError: data, options or program do not fit, or a loss or gradient is not finite.
        PassError: nothing is trainable.
    """
    made = Loop(program, objective, rows, settings or Settings(), Path(folder), tokenizer, watchers, device)
    return made.run(resume)


class Loop:
    """One training run."""

    def __init__(
        self,
        program: Program,
        objective: Objective,
        rows: Rows,
        settings: Settings,
        folder: Path,
        tokenizer: Any,
        watchers: Sequence[Watcher],
        device: torch.device | None = None,
    ) -> None:
        """Prepare data, module and optimizer. The arguments are those of `train`."""
        self.accelerator = accelerator(settings, training_device(program, device))
        try:
            self._set_up(program, objective, rows, settings, folder, tokenizer, watchers)
        except BaseException:
            let_go(self.accelerator)
            raise

    def _set_up(
        self,
        program: Program,
        objective: Objective,
        rows: Rows,
        settings: Settings,
        folder: Path,
        tokenizer: Any,
        watchers: Sequence[Watcher],
    ) -> None:
        """Prepare everything but the Accelerator. The arguments are those of `train`."""
        self.whole = program
        # Shards are moved one by one, when the whole model may not fit on a device.
        if not self.accelerator.is_fsdp2 and program.device != self.accelerator.device:
            program.module().to(self.accelerator.device)
        # The tensors of `program` train, under a journal that freezes the adapters that are not trained.
        self.program, self.notes = training_only(program, settings.only)
        program = self.program
        self.lr = settings.lr or default_rate(program, objective)
        self.objective, self.settings = objective, settings.model_copy(update={"lr": self.lr})
        settings = self.settings
        if isinstance(objective, OnPolicy):
            check_on_policy(objective, settings)
        groups = program.parameter_groups(self.lr, weight_decay=settings.weight_decay)
        self.penalties = [Regularizer.of(program, text) for text in settings.regularize]
        setting = Setting.of(program, tokenizer, settings.max_length)
        with quiet():
            self.setting = objective.prepared(together(rows), setting)
        self.data = make_examples(rows.train, objective, self.setting)
        self.notes += [*objective.notes(self.setting), *counted(self.setting, "")]
        self.held_out: Examples | None = None
        if rows.held_out is not None:
            # Count skipped and cut rows separately for the held-out data.
            held = replace(self.setting, counts=type(self.setting.counts)())
            self.held_out = make_examples(rows.held_out, objective, held)
            self.notes += counted(held, "held-out ")
        self.checkpoints = Checkpoints(folder)
        self.best = Best(objective)
        self.body = Body(program, settings.form, settings.checkpointing)
        self.module = self.body.module
        self.notes += [self.body.note] if self.body.note else []
        self.notes += rates(groups) + [note for each in self.penalties for note in each.notes()]
        self.watch = Watchers([LogFile(folder / LOG), *watchers] if self.accelerator.is_main_process else [])
        self.training: set[str] | None = None
        self.skipped = 0
        self.kept: dict[str, float] = {}
        self._prepare(groups)

    def _prepare(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Wrap module and optimizer with accelerate, and create everything that depends on them."""
        settings, objective = self.settings, self.objective
        if isinstance(objective, OnPolicy) and self.accelerator.num_processes > 1:
            raise alone(objective, "more than one process")
        if self.accelerator.is_fsdp2:
            self.body.unflatten(self.accelerator.device)
        optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=self.lr)
        self.model, self.optimizer = self.accelerator.prepare(self.body.model, optimizer)
        check_shards(self.body, self.program, self.penalties)
        self.order = Order(
            settings.seed,
            lambda draw: objective.epoch(self.data, settings.batch, draw),
            settings.accumulate,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        # Companions may have random initial values. They must be the same in a resumed run.
        with torch.random.fork_rng():
            torch.manual_seed(self.order.number("companions"))
            self.companions = objective.companions(self.program)
        for companion in self.companions.values():
            companion.to(self.accelerator.device)
        learned = train_learned(self.companions, self.accelerator, self.optimizer, self.lr)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.weights = Weights(self.program, self.body, learned)
        self.steps = settings.steps or max(1, round(settings.epochs * self.order.steps))
        self.notes += unfinished(self.module.__dict__["_paced"], self.steps, self.order.steps)

    # -- the run

    def run(self, resume: bool) -> Result:
        """Train to the end, and leave the best weights in the program.

        Args:
            resume: continue from the last checkpoint.
        """
        try:
            return self._run(resume)
        finally:
            self.body.model.eval()
            self.module.eval()
            if not self.body.sharded:
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            let_go(self.accelerator)

    def _run(self, resume: bool) -> Result:
        identity = self._identity()
        if type(self.objective).check is not Objective.check:  # making a batch may be expensive
            self.model.eval()
            first = self._batch(self.data, self.order.epoch(0)[0], self.order.draw("batch", 0, 0))
            self.objective.check(self.model, first, self.body.form)
        before = self.evaluate()
        if resume:
            self.checkpoints.check_same(identity)
            state = self.checkpoints.read(self.weights, self.optimizer.optimizer)
            self.notes += [] if state.step else ["no checkpoint was found; training starts at step 0"]
            if not state.step:
                state = self._begin(before)
            if state.scaler and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state.scaler)
        else:
            if self.accelerator.is_main_process:
                self.checkpoints.begin(identity)
            state = self._begin(before)
        self.watch.begun(state.step, self.steps)
        for note in self.notes if not state.step else ():
            self.watch.noted(0, note)
        try:
            result = self._train_from(state, before)
            # Only now: a run that fails leaves the program as it was.
            self.whole.labels.update(self.objective.labels(self.setting))
            return result
        finally:
            self.watch.ended()

    def _begin(self, before: Mapping[str, float]) -> State:
        """Return the state of a run that begins. If its start is the best so far, it is written as a checkpoint."""
        # A penalty or a gradual pass makes the model sparser or coarser on purpose, at some cost to the metric.
        if self.penalties or self.module.__dict__["_paced"]:
            return State()
        state = self.best.start(before)
        if state.best is not None:
            self._write_checkpoint(state)
        return state

    def _train_from(self, state: State, before: Mapping[str, float]) -> Result:
        """Train from a state to the last step, then restore the best weights."""
        metrics = self.evaluate() if state.step else before
        every = self.settings.evaluate or self.order.steps
        self.kept = state.kept
        if state.step:
            self._advance(state.step - 1, logged=True)
        self.model.train(not isinstance(self.objective, OnPolicy))
        stopped = False
        # Several processes would each see the signal at another step, and write different checkpoints.
        with Interrupt() if self.accelerator.num_processes == 1 else nullcontext(Interrupt()) as interrupt:
            while state.step < self.steps and not stopped:
                loss, tokens = self._step(state.step)
                state.step += 1
                rate = max(group["lr"] for group in self.optimizer.param_groups)
                self.watch.stepped(state.step, loss, rate, tokens)
                last = state.step == self.steps
                if interrupt.asked and not last:
                    self._write_checkpoint(state)
                    raise InterruptedTrainingError(
                        f"interrupted after step {state.step} of {self.steps}; {self._last_checkpoint()}, and --resume "
                        f"continues from it"
                    )
                if self.held_out is not None and (state.step % every == 0 or last):
                    metrics = self.evaluate()
                    stopped = self._record_evaluation(state, metrics) and not last
                elif not last and state.step % (self.settings.checkpoint or every):
                    continue
                self._write_checkpoint(state)
        best = state.step
        if state.best is not None and state.best != state.step:
            best = state.best
            self.weights.put(self.checkpoints.weights_of(best), self.checkpoints.path(best))
            metrics = self.evaluate()
        else:
            self.body.pull(self.weights.names)
        return Result(state.step, best, metrics, before, stopped, {} if best else self.best.tried)

    def _record_evaluation(self, state: State, metrics: Mapping[str, float]) -> bool:
        """Record an evaluation. Return True if training should stop for lack of improvement."""
        score = metrics[self.objective.metric]
        if math.isnan(score):
            raise TrainingError(
                f"{self.objective.metric} of the held-out data is NaN after step {state.step}; "
                f"{self._last_checkpoint()}"
            )
        better = self.best.record(state, metrics)
        self.watch.evaluated(state.step, metrics, better)
        return self.settings.patience is not None and state.stale >= self.settings.patience

    def _write_checkpoint(self, state: State) -> None:
        """Write a checkpoint of a state, and log the state of the penalties."""
        for each in self.penalties:
            self.watch.noted(state.step, each.said())
        scaler = self.accelerator.scaler
        state.scaler = scaler.state_dict() if scaler is not None else None
        main = self.accelerator.is_main_process
        self.checkpoints.write(state, self.weights, self.optimizer.optimizer, main)
        self.accelerator.wait_for_everyone()

    def _identity(self) -> dict[str, Any]:
        """Describe the run. A resumed run must have the same description."""
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
        """Do one optimizer step. Return the loss and the number of tokens read."""
        self._advance(step)
        rate = self.settings.rate(step, self.steps)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * rate
        chosen = self.order.batches(step)
        batches = [
            self._batch(self.data, rows, self.order.draw("batch", step, place)) for place, rows, _ in chosen
        ]
        # A process that has run out of batches repeats one that does not count: all processes gather shards together.
        counted = [counts for _, _, counts in chosen]
        if isinstance(self.objective, OnPolicy):
            return self._improve_policy(step, chosen[0][1], batches[0])
        terms = [
            self.objective.terms(batch) if real else 0 for batch, real in zip(batches, counted, strict=True)
        ]
        total = int(self._sum_over_processes(torch.tensor(float(sum(terms)))))
        torch.manual_seed(self.order.number("dropout", step, self.accelerator.process_index))
        loss = torch.zeros((), device=self.accelerator.device)
        for i, (batch, count) in enumerate(zip(batches, terms, strict=True)):
            value = self.objective.loss(self.model, batch)
            if not value.isfinite():
                raise self._failure(f"the loss is {float(value.detach()):g}", step, chosen[i][1], batch)
            if not value.requires_grad:
                raise TrainingError(
                    f"no trainable parameter affects the loss of {self.objective.name}; unfreeze a layer it depends "
                    f"on, or choose another output with --output"
                )
            share = value * (count / total)
            loss += share.detach()
            # Gradients are averaged over processes, but `share` is already this process's part of the sum.
            share = share * self.accelerator.num_processes
            if i + 1 == len(batches):
                for term in (term for each in self.penalties for term in each.terms()):
                    share = share + term
                self.accelerator.backward(share)
            else:
                with self.accelerator.no_sync(self.model):
                    self.accelerator.backward(share)
        norm = self._clip()
        # With a gradient scaler overflow is normal: the scaler skips the step and lowers its scale.
        if self.accelerator.scaler is None and not math.isfinite(norm):
            problem = f"the norm of the gradient is {norm:g}"
            raise self._failure(problem, step, chosen[-1][1], batches[-1])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._regularize(step, rate)
        if self.accelerator.scaler is not None:
            self.skipped = self.skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
            if self.skipped == MOST_SKIPPED:
                problem = f"the gradient was not finite in {self.skipped} consecutive steps"
                raise self._failure(problem, step, chosen[-1][1], batches[-1])
        tokens = sum(tokens_of(batch) for batch, real in zip(batches, counted, strict=True) if real)
        return float(self._sum_over_processes(loss)), int(
            self._sum_over_processes(torch.tensor(float(tokens)))
        )

    def _regularize(self, step: int, rate: float) -> None:
        """Apply the penalties' proximal steps, and log the size of the penalties."""
        if not self.penalties:
            return
        for each in self.penalties:
            each.step(self.lr * rate)
        with torch.no_grad():
            size = sum(float(each.penalty()) for each in self.penalties)
        self.watch.measured(step + 1, {"penalty": size})

    def _clip(self) -> float:
        """Clip the gradients. Return their norm before clipping."""
        self.accelerator.unscale_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm: Any = nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf)
        return float(norm.full_tensor() if is_shard(norm) else norm)

    def _improve_policy(self, step: int, chosen: Sequence[int], batch: Batch) -> tuple[float, int]:
        """Do one step of an on-policy objective. Return its loss and the number of tokens read."""
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

    def _advance(self, step: int, logged: bool = False) -> None:
        """Apply the program's schedule for a step, and log what it changes.

        Args:
            step: number of finished steps. Log entries count from 1, so they name the step that follows.
            logged: True if the changes of this step are in the log already, because the run is resumed.

        Raises:
            TrainingError: the schedule leaves nothing to train.
        """
        epoch_wise = self.program.schedule.unit == "epoch"
        paced = self.module.__dict__["_paced"]
        done = [each.done for each in paced]
        now = set(self.module.advance(step // self.order.steps if epoch_wise else step))
        if not now:
            raise TrainingError(f"the program's schedule trains nothing at step {step}; give another --every")
        if self.training is not None and now != self.training:
            more, less = sorted(now - self.training), sorted(self.training - now)
            moved = [f"{len(more)} more parameters are trained ({more[0]}, …)"] if more else []
            moved += [f"{len(less)} parameters are frozen ({less[0]}, …)"] if less else []
            self.watch.noted(step + 1, "; ".join(moved))
        self.training = now
        for each, before in zip(paced, done, strict=True):
            if each.done != before and before is not None and not logged:
                self.watch.noted(step + 1, f"{each.entry} changed its tensors to {each.done:.3g}")

    def _batch(self, data: Examples, chosen: Sequence[int], draw: Generator) -> Batch:
        """Make a batch on the device, completed by the objective's companions."""
        batch = self.objective.collate(data[chosen], self.setting, draw)
        device = self.accelerator.device
        batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        with torch.no_grad():
            return self.objective.complete(batch, self.companions)

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        """Sum a value over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum")

    def _failure(self, problem: str, step: int, chosen: Sequence[int], batch: Batch) -> TrainingError:
        """Build the error for a non-finite value, with its place in the graph and the rows of the batch."""
        if self.body.sharded:
            where = "sharded parameters are not searched for the cause"
        else:
            self.module.train().to(self.accelerator.device)
            with self.accelerator.autocast():
                where = first_bad(self.module, self.objective.unpacked(batch))
        rows = ", ".join(str(example["row"]) for example in self.data[chosen])
        return TrainingError(f"{problem} at step {step + 1}, rows {rows}; {where}; {self._last_checkpoint()}")

    def _last_checkpoint(self) -> str:
        kept = self.checkpoints.steps()
        if not kept:
            return "no checkpoint was written before that"
        return f"the checkpoint of step {kept[-1]} is in {self.checkpoints.folder}"

    # -- held-out data

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compute the objective's metrics on the held-out data, or return {} without held-out data."""
        if self.held_out is None:
            return {}
        self.model.eval()
        seen: list[dict[str, Tensor]] = []
        index, processes = self.order.index, self.order.processes
        order = self.objective.epoch(self.held_out, self.settings.batch, None)
        for start in range(0, len(order), processes):
            # A process without a batch repeats the last one: all processes must run to gather shards together.
            number = min(start + index, len(order) - 1)
            batch = self._batch(self.held_out, order[number], self.order.draw(HELD_OUT, number))
            observed = self.objective.observe(self.model, batch)
            if number == start + index:
                seen.append({name: tensor.cpu() for name, tensor in observed.items()})
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            seen = gather_object(seen)
        self.model.train(not isinstance(self.objective, OnPolicy))
        return self.objective.metrics(joined(seen))


__all__ = ["Loop", "Result", "train"]
