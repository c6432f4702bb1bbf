"""The command group, which imports a command only when it is called."""

from __future__ import annotations

from importlib import import_module

import click
from click.shell_completion import CompletionItem

from surgery.cli.plugins import (
    PLUGIN_FILES,
    command_entry_points,
    load_command,
    plugins_of,
    take_plugin_files,
)
from surgery.cli.progress import add_quiet
from surgery.common.errors import nearest

# Command -> module of surgery.cli, attribute, and the line that `surgery --help` shows without importing it.
BUILT_IN: dict[str, tuple[str, str, str]] = {
    "apply": ("change", "apply", "Apply passes and save the result."),
    "benchmark": ("infer", "benchmark", "Compare size, latency, tokens/s and quality of models."),
    "combine": ("change", "combine", "Combine several adapters into one."),
    "evaluate": ("infer", "evaluate", "Compute held-out figures of a model, with a confusion matrix."),
    "diff": ("see", "diff", "List the nodes and weights that differ between two models."),
    "export": ("ship", "export", "Write an ONNX file and check it in onnxruntime."),
    "export-lora": (
        "lora",
        "export",
        "Write LoRAs of an image model as one file.",
    ),
    "export-peft": ("peft", "export", "Write adapters as a PEFT checkpoint."),
    "generate": ("infer", "generate", "Generate text with a language model, or chat with it."),
    "import-lora": ("lora", "import_", "Load a LoRA file onto a part of a pipeline."),
    "import-peft": ("peft", "import_", "Load a PEFT checkpoint onto its base model."),
    "inspect": ("see", "inspect", "Print a model as a tree of sites."),
    "merge": ("change", "merge", "Merge adapters into the base weights."),
    "new-plugin": ("author", "new_plugin", "Write a plugin package with tests and CI."),
    "objectives": ("see", "objectives", "List training objectives, or the options of one."),
    "passes": ("see", "passes", "List passes, or the options of one."),
    "predict": ("infer", "predict", "Predict classes, numbers or embeddings of texts or images."),
    "plan": ("see", "plan", "Show what apply would do, without changing anything."),
    "plugins": ("see", "plugins", "List the installed plugins, and what is broken."),
    "push": ("push", "push", "Upload a model to the hub with a model card."),
    "run": ("run", "run", "Run a recipe: passes, training, merge, ONNX export."),
    "train": ("train", "train", "Train a program with an objective and save it."),
    "undo": ("change", "undo", "Remove a pass and its tensors."),
    "verify": ("ship", "verify", "Compare the outputs of two models."),
    "view": ("see", "view", "Write a model as one HTML page: module tree, graph, weights."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is called. `--help` and completion read only names and short texts.

    Commands of plugins (see surgery.cli.plugins) follow the built-in ones. A built-in command keeps its name.
    """

    BUILT_IN = tuple(BUILT_IN)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest, files = take_plugin_files(args)
        ctx.meta[PLUGIN_FILES] = files
        return super().parse_args(ctx, rest)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._short_texts())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in BUILT_IN:
            module, attribute, _ = BUILT_IN[cmd_name]
            command: click.Command = getattr(import_module(f"surgery.cli.{module}"), attribute)
            return add_quiet(command)
        if cmd_name in command_entry_points():
            return load_command(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        # Shell completion parses resiliently: it must not load plugins, and it skips unknown commands.
        if name not in BUILT_IN and not name.startswith("-") and not ctx.resilient_parsing:
            # The command comes from a plugin, perhaps from its hook. Such commands find the plugins in ctx.obj.
            plugins_of(ctx)
            if self.get_command(ctx, name) is None:
                hint = nearest(name, self.list_commands(ctx)) or "; see surgery --help"
                raise click.UsageError(f"there is no command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(self._short_texts().items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=text)
            for name, text in sorted(self._short_texts().items())
            if name.startswith(incomplete)
        ]
        # Group.shell_complete would import every command for its help text.
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def _short_texts(self) -> dict[str, str]:
        """Command name -> one line of help, for the built-in commands and those of plugins."""
        found = {name: command.get_short_help_str(60) for name, command in self.commands.items()}
        for name, points in command_entry_points().items():
            found[name] = f"From the plugin {points[0].dist.name if points[0].dist else points[0].value}."
        found.update((name, text) for name, (_, _, text) in BUILT_IN.items())
        return found
