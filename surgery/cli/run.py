"""The command of a whole recipe: run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from surgery.cli.change import tell_applied, tell_merged
from surgery.cli.options import json_option, loading_options, output_option
from surgery.cli.recipe import Recipe, Shipping, read_recipe
from surgery.cli.render import console, note_unfrozen, trainable_line
from surgery.cli.see import refuse_code
from surgery.cli.ship import tell_adaptable, tell_exported, tell_generation
from surgery.cli.train import begin, teach
from surgery.common.errors import SurgeryError
from surgery.common.files import write_text
from surgery.common.plugins import Plugins
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.store.hf import write_hf
from surgery.store.load import load
from surgery.train.checkpoint import Checkpoints

RECIPE = "recipe.yaml"


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@output_option
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped: what it finished is kept.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run at the output path.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's event files beside the log.")
@json_option
@loading_options
def run(
    recipe: Path,
    model: str | None,
    output: Path,
    resume: bool,
    overwrite: bool,
    tensorboard: bool,
    as_json: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Carry out a recipe: base, passes, training, merge, ONNX. DIR gets a directory of each stage, and the model.

    MODEL is used in place of the recipe's. Paths are read as on any command line, from where it is run.
    """
    wanted = read_recipe(recipe, plugins)
    reference = model or wanted.model
    if reference is None:
        raise click.UsageError(f"no MODEL was given, and {recipe} names none")
    refuse_code(model, reference, recipe)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SurgeryError(
            "surgery run is for one process; start its training with `torchrun -m surgery train`"
        )
    text = recipe.read_text()
    _make_room(output, text, resume, overwrite)
    is_trained = resume and (output / "trained").exists()
    rows = wanted.train.rows() if wanted.train and not is_trained else None
    stages = _Stages(output, reference, wanted, plugins, loader, resume, as_json, console())
    write_text(output / RECIPE, text)
    try:
        program = stages.make("adapted", stages.applied)
        figures: dict[str, Any] = {}
        if wanted.train:
            program, figures["trained"] = stages.trained(program, rows, tensorboard)
        if wanted.merge:
            # Passes stand on a base: that of later ones is the merged model, as a transformers directory.
            save = write_hf if wanted.finish else Program.save
            program = stages.make("merged", lambda: stages.merged(program), save)
        if wanted.finish:
            program = stages.make("finished", lambda: stages.finished(program))
        if wanted.export:
            figures["onnx"] = stages.exported(program, wanted.export)
    except SurgeryError as error:
        done = ", ".join(stages.done) or "nothing yet"
        raise type(error)(f"{error} (finished in {output}: {done}; --resume goes on)") from error
    if as_json:
        click.echo(json.dumps({"path": str(output), "stages": stages.done, **figures}))


@dataclass
class _Stages:
    """Directories of a run, one for each stage; what an earlier run finished is loaded where it goes on."""

    folder: Path
    reference: str
    wanted: Recipe
    plugins: Plugins
    loader: Callable[..., Program]
    resume: bool
    quietly: bool
    out: Console
    done: list[str] = field(default_factory=list)

    def make(
        self, name: str, work: Callable[[], Program], save: Callable[[Program, Path], None] = Program.save
    ) -> Program:
        """The program of a stage: saved, or there from before."""
        path = self.folder / name
        there = self.resume and path.exists()
        if not there:
            self._title(name)
            program = work()
            save(program, path)
        self.done.append(name)
        trains = f"{trainable_line(program)}; " if name == "adapted" and not there else ""
        self._say(f"{path} is there" if there else f"{trains}wrote {path}")
        if save is write_hf:
            return self.loader(f"hf:{path}", self.wanted)
        return self._load(path) if there else program

    def applied(self) -> Program:
        base = self.loader(self.reference, self.wanted)
        program = base.apply(*self.wanted.passes, freeze_base=self.wanted.freeze_base)
        if not self.quietly:
            tell_applied(self.out, base, program)
            note_unfrozen(self.out, self.wanted.passes, self.wanted.freeze_base)
        return program

    def trained(
        self, program: Program, rows: Any, tensorboard: bool
    ) -> tuple[Program, dict[str, Any] | None]:
        """The trained program, and figures of the training where it was done now."""
        path, lesson = self.folder / "trained", self.wanted.train
        assert lesson is not None
        if self.resume and path.exists():
            self.done.append("trained")
            self._say(f"{path} is there")
            return self._load(path), None
        self._title("trained")
        run = begin(path, self.resume, False)
        going_on = self.resume and bool(Checkpoints(run).steps())
        result = teach(program, lesson, rows, path, going_on, False, tensorboard, self.quietly)
        self.done.append("trained")
        return program, vars(result)

    def merged(self, program: Program) -> Program:
        wanted = self.wanted.merge
        assert wanted is not None
        entry = None
        if live_entries(program.journal):  # else only weights of the base were trained
            program = program.merge(quantized=wanted.quantized, budget=wanted.budget)
            entry = next(e for e in reversed(program.journal.entries) if e.kind == "merge")
        if not self.quietly:
            tell_merged(self.out, program, entry)
        return program

    def finished(self, program: Program) -> Program:
        result = program.apply(*self.wanted.finish, freeze_base=False)
        if not self.quietly:
            tell_applied(self.out, program, result)
        return result

    def exported(self, program: Program, wanted: Shipping) -> dict[str, Any]:
        """Write ONNX, checked in onnxruntime; its path and how far it is off."""
        path = self.folder / wanted.file
        options: dict[str, Any] = {"opset": wanted.opset, "seed": wanted.seed}
        self._title("exported")
        if wanted.generate:
            also = wanted.adapters_as_inputs
            made = program.export_generation(path, adapters_as_inputs=also, overwrite=self.resume, **options)
            if not self.quietly:
                tell_generation(made, False)
            return {"path": str(path), "parity": made.error, "tokens": made.tokens}
        options["external_data"] = wanted.external_data
        if wanted.adapters_as_inputs:
            adaptable = program.export_adaptable(path, overwrite=self.resume, **options)
            if not self.quietly:
                tell_adaptable(adaptable, False)
            return {"path": str(path), "parity": max(adaptable.errors.values(), default=0.0)}
        report = program.export(path, **options)
        if not self.quietly:
            tell_exported(report, path, False)
        parity = report.parity.error if report.parity else None
        return {"path": str(path), "bytes": report.size, "parity": parity}

    def _load(self, path: Path) -> Program:
        # A base that is code was named by whoever started this.
        base = self.reference if self.reference.startswith("py:") else None
        return load(str(path), base=base, plugins=self.plugins)

    def _title(self, name: str) -> None:
        if not self.quietly:
            self.out.rule(name, align="left", style="dim")

    def _say(self, line: str) -> None:
        if not self.quietly:
            self.out.print(line)


def _make_room(output: Path, text: str, resume: bool, overwrite: bool) -> None:
    """Raise SurgeryError where `output` holds something that this run neither goes on with nor may replace."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    kept = output / RECIPE
    if not kept.is_file():
        raise SurgeryError(f"{output} exists and is no earlier run; choose another -o")
    if resume:
        if kept.read_text() != text:
            raise SurgeryError(f"{output} was begun with another recipe, {kept}; run that, or --overwrite")
    elif overwrite:
        shutil.rmtree(output)
    else:
        raise SurgeryError(f"{output} holds a run; --resume goes on, --overwrite begins anew")


COMMANDS = [run]
