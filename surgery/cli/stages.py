"""The stages of a recipe: adapted, trained, merged, finished, exported.

An interrupted run keeps its finished stages.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from surgery.cli.names import check_targets
from surgery.cli.options import DEVICE
from surgery.cli.recipe import Recipe, Shipping, read_recipe, refuse_code
from surgery.cli.recipe_check import check_later, check_resumed
from surgery.cli.render import console, note_unfrozen, trainable_line
from surgery.cli.reports import tell_adaptable, tell_applied, tell_exported, tell_generation, tell_merged
from surgery.cli.training import prepare_run, train_program
from surgery.common.errors import SurgeryError, TrainingError
from surgery.common.files import write_text
from surgery.common.plugins import Plugins
from surgery.engine.probe import InputSet
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.export.adaptable import export_adaptable
from surgery.export.generation import export_generation
from surgery.export.program import export_program, source_of
from surgery.export.rounded_parity import rounds, runtime_rounds
from surgery.store.hf import write_hf
from surgery.store.load import load
from surgery.train.checkpoint import Checkpoints
from surgery.train.data import Rows
from surgery.train.input_sets import input_sets

RECIPE = "recipe.yaml"


def run_recipe(
    recipe: Path,
    model: str | None,
    output: Path,
    *,
    plugins: Plugins,
    loader: Callable[..., Program],
    allowed: Sequence[str] = (),
    resume: bool,
    overwrite: bool,
    track: Sequence[str],
    as_json: bool,
) -> None:
    """Carry out a recipe, stage by stage, and print the results.

    Args:
        recipe: recipe file.
        model: model reference that replaces the recipe's, or None.
        output: directory that gets a directory for each stage.
        plugins: plugin manager of the programs.
        loader: function (ref, recipe) that loads a program.
        allowed: code that the recipe may name besides the model.
        resume: keep the stages that an interrupted run has finished.
        overwrite: replace an earlier run.
        track: names of experiment trackers that get the figures of the training.
        as_json: print one JSON object instead of reports.

    Raises:
        SurgeryError: the recipe is wrong, `output` is in use, or a stage fails. The message names the finished stages.
    """
    named = () if model is None else (model,)
    wanted = read_recipe(recipe, plugins, (*named, *allowed))
    reference = model or wanted.model
    if reference is None:
        raise click.UsageError(f"no model is given, and {recipe} names none; add MODEL")
    refuse_code(model, reference, recipe, wanted.model_kwargs)
    check_targets((*wanted.passes, *wanted.finish), reference, plugins)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SurgeryError(
            "surgery run uses one process; for several, train with `torchrun -m surgery train` instead"
        )
    text = recipe.read_text()
    _make_room(output, resume, overwrite)
    if resume and (output / RECIPE).is_file():
        check_resumed(output / RECIPE, wanted, plugins, (*named, *allowed))
    is_trained = resume and (output / "trained").exists()
    # Training data are read first, so that an error in a file is reported before any stage runs.
    rows = wanted.train.rows() if wanted.train and not is_trained else None
    stages = _Stages(output, reference, wanted, plugins, loader, resume, as_json, console(), text)
    try:
        program = stages.make("adapted", stages.applied)
        figures: dict[str, Any] = {}
        if wanted.train:
            program, figures["trained"] = stages.trained(program, rows, track)
        if wanted.merge:
            # Passes need a base. That of the finishing passes is the merged model, as a transformers directory.
            save = write_hf if wanted.finish else Program.save
            program = stages.make("merged", lambda: stages.merged(program), save)
        if wanted.finish:
            program = stages.make("finished", lambda: stages.finished(program))
        if wanted.export:
            figures["onnx"] = stages.exported(program, wanted.export)
    except SurgeryError as error:
        if not stages.done:
            raise
        done = ", ".join(stages.done)
        raise type(error)(f"{error} (finished in {output}: {done}; continue with --resume)") from error
    if as_json:
        click.echo(json.dumps({"path": str(output), "stages": stages.done, **figures}))


@dataclass
class _Stages:
    """Runs or loads the stages of one recipe.

    Attributes:
        folder: directory with a directory for each stage.
        reference: reference of the base.
        wanted: the recipe.
        plugins: plugin manager of the programs.
        loader: function (ref, recipe) that loads a program.
        resume: load a stage that an earlier run has finished.
        quiet: print nothing.
        out: console.
        text: text of the recipe, kept in the directory of the run.
        done: names of finished stages.
    """

    folder: Path
    reference: str
    wanted: Recipe
    plugins: Plugins
    loader: Callable[..., Program]
    resume: bool
    quiet: bool
    out: Console
    text: str
    done: list[str] = field(default_factory=list)

    def make(
        self, name: str, work: Callable[[], Program], save: Callable[[Program, Path], None] = Program.save
    ) -> Program:
        """The program of a stage: made by `work` and saved, or loaded from an earlier run."""
        path = self.folder / name
        exists = self.resume and path.exists()
        if not exists:
            self._title(name)
            program = work()
            write_text(self.folder / RECIPE, self.text)
            save(program, path)
        self.done.append(name)
        trains = f"{trainable_line(program)}; " if name == "adapted" and not exists else ""
        self._say(f"{path} is there" if exists else f"{trains}wrote {path}")
        if save is write_hf:
            return self.loader(f"hf:{path}", self.wanted, random=False)
        return self._load(path) if exists else program

    def applied(self) -> Program:
        base = self.loader(self.reference, self.wanted)
        program = base.apply(*self.wanted.passes, freeze_base=self.wanted.freeze_base)
        check_later(self.wanted, base, program)
        if not self.quiet:
            tell_applied(self.out, base, program)
            note_unfrozen(self.out, self.wanted.passes, self.wanted.freeze_base)
        return program

    def trained(
        self, program: Program, rows: Rows | None, track: Sequence[str]
    ) -> tuple[Program, dict[str, Any] | None]:
        """The trained program, and the figures of the training; None if an earlier run has trained it."""
        path, request = self.folder / "trained", self.wanted.train
        assert request is not None
        if rows is None:
            self.done.append("trained")
            self._say(f"{path} is there")
            return self._load(path), None
        self._title("trained")
        write_text(self.folder / RECIPE, self.text)
        run = prepare_run(path, self.resume, False)
        # --resume also covers a run that was interrupted before its first checkpoint.
        resume = self.resume and Checkpoints(run).begun
        result = train_program(
            program,
            request,
            rows,
            path,
            resume=resume,
            overwrite=False,
            track=track,
            quiet=self.quiet,
        )
        self.done.append("trained")
        return program, vars(result)

    def merged(self, program: Program) -> Program:
        wanted = self.wanted.merge
        assert wanted is not None
        entry = None
        # Without live entries only weights of the base were trained, and there is nothing to merge.
        if live_entries(program.journal):
            program = program.merge(quantized=wanted.quantized, budget=wanted.budget)
            entry = next(e for e in reversed(program.journal.entries) if e.kind == "merge")
        if not self.quiet:
            tell_merged(self.out, program, entry)
        return program

    def finished(self, program: Program) -> Program:
        result = program.apply(*self.wanted.finish, freeze_base=False)
        if not self.quiet:
            tell_applied(self.out, program, result)
        return result

    def exported(self, program: Program, wanted: Shipping) -> dict[str, Any]:
        """Write ONNX, checked in onnxruntime. Returns the path and the parity error."""
        path = self.folder / wanted.file
        options: dict[str, Any] = {
            "opset": wanted.opset,
            "seed": wanted.seed,
            "cpu": wanted.cpu,
            "tolerance": wanted.tolerance,
            "data": self._judging(program),
        }
        self._title("exported")
        if wanted.generate:
            also = wanted.adapters_as_inputs
            made = export_generation(program, path, adapters_as_inputs=also, overwrite=self.resume, **options)
            if not self.quiet:
                tell_generation(made, False)
            return {"path": str(path), "parity": made.error, "tokens": made.tokens}
        options["external_data"] = wanted.external_data
        if wanted.adapters_as_inputs:
            adaptable = export_adaptable(program, path, overwrite=self.resume, **options)
            if not self.quiet:
                tell_adaptable(adaptable, False)
            return {"path": str(path), "parity": max(adaptable.errors.values(), default=0.0)}
        report = export_program(program, path, **options)
        if not self.quiet:
            tell_exported(report, path, False)
        parity = report.parity.error if report.parity else None
        return {"path": str(path), "bytes": report.size, "parity": parity}

    def _judging(self, program: Program) -> list[InputSet]:
        """Rows of the training data on which rounded activations are judged; none if nothing is rounded."""
        source, request = source_of(program), self.wanted.train
        if request is None or "" not in request.data or not (rounds(source) or runtime_rounds(source)):
            return []
        try:
            return input_sets(program, request.data[""])
        except TrainingError as error:
            self._say(f"rounded activations are judged on random inputs: {error}")
            return []

    def _load(self, path: Path) -> Program:
        # A saved directory does not run code to load its base. The user named this code on the command line.
        base = self.reference if self.reference.startswith("py:") else None
        device = click.get_current_context().meta.get(DEVICE)
        return load(str(path), base=base, plugins=self.plugins, device=device)

    def _title(self, name: str) -> None:
        if not self.quiet:
            self.out.rule(name, align="left", style="dim")

    def _say(self, line: str) -> None:
        if not self.quiet:
            self.out.print(line)


def _make_room(output: Path, resume: bool, overwrite: bool) -> None:
    """Make `output` ready for a run.

    Args:
        output: directory of the run.
        resume: continue an earlier run.
        overwrite: delete an earlier run.

    Raises:
        SurgeryError: `output` holds something that this run can neither continue nor replace.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / RECIPE).is_file():
        raise SurgeryError(f"{output} exists and is not an earlier run; choose another -o")
    if resume:
        return
    if not overwrite:
        raise SurgeryError(
            f"{output} holds an earlier run; use --resume to continue it, or --overwrite to start again"
        )
    shutil.rmtree(output)
