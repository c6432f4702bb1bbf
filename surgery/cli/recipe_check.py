"""Checks of a whole recipe before its first stage is written, and of an edited one before it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from surgery.cli.recipe import Recipe, read_recipe
from surgery.common.errors import SurgeryError
from surgery.common.plugins import Plugins
from surgery.engine.contract.base import RewritePass, merges
from surgery.engine.program import Program

# Directory of each stage, and the sections that it depends on.
STAGES: Mapping[str, tuple[str, ...]] = {
    "adapted": ("model", "task", "model_kwargs", "input", "random", "passes", "freeze_base"),
    "trained": ("train",),
    "merged": ("merge",),
    "finished": ("finish",),
}


def check_later(recipe: Recipe, base: Program, adapted: Program) -> None:
    """Check that the stages after the passes can work, as far as this can be known before the training.

    Args:
        recipe: the recipe.
        base: program before the passes.
        adapted: program after them.

    Raises:
        SurgeryError: a stage cannot work; the message names the section.
    """
    adapters = [p for p in recipe.passes if isinstance(p, RewritePass) and p.effect.freezes_base]
    fixed = [p for p in adapters if not merges(p)]
    if recipe.merge and adapters and len(fixed) == len(adapters):
        names = ", ".join(p.name for p in fixed)
        raise SurgeryError(
            f"'merge': {names} has no merged form, so there is nothing to merge; leave 'merge' out"
        )
    if recipe.merge and recipe.finish and fixed:
        raise SurgeryError(
            f"'finish': passes after a merge need a model without adapters, and {fixed[0].name} has no merged form; "
            f"leave 'merge' or 'finish' out"
        )
    if recipe.finish:
        # A merged model has the layers of its base.
        start = base if recipe.merge else adapted
        try:
            report = start.plan(*recipe.finish, freeze_base=False)
        except SurgeryError as error:
            raise type(error)(f"'finish': {error}") from None
        for planned in report.passes:
            if planned.sites and not any(site.refusal is None for site in planned.sites):
                first = planned.sites[0]
                raise SurgeryError(
                    f"'finish': {planned.pass_.name} at {first.site.path}: refused, {first.refusal}"
                )
    if recipe.export:
        for pass_ in (*recipe.passes, *recipe.finish):
            kept = pass_ in recipe.finish or not recipe.merge or not merges(pass_)
            unwritten = pass_.expectations.no_onnx if isinstance(pass_, RewritePass) and kept else {}
            for why in unwritten.values():
                raise SurgeryError(f"'export': {pass_.name} has no ONNX form: {why}")


def check_resumed(kept: Path, wanted: Recipe, plugins: Plugins, allowed: tuple[str, ...]) -> None:
    """Check that an edited recipe agrees with the stages that an earlier run has finished.

    Args:
        kept: recipe of the earlier run, in its directory.
        wanted: recipe of this run.
        plugins: plugin manager with the passes.
        allowed: code that the recipe may name.

    Raises:
        SurgeryError: a section of a finished stage was changed.
    """
    before, folder = read_recipe(kept, plugins, allowed), kept.parent
    finished = [stage for stage in STAGES if (folder / stage).exists()]
    for stage, sections in STAGES.items():
        if not finished:
            return
        for section in sections:
            if getattr(before, section) != getattr(wanted, section):
                raise SurgeryError(
                    f"{folder} was started with another {section!r} ({kept}), and its stage {finished[-1]!r} depends "
                    f"on it; restore that section, choose another -o, or pass --overwrite"
                )
        if stage == finished[-1]:
            return
