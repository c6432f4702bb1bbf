"""Commands that use finished models: predict, evaluate, generate, benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.inference.references import kind_of
from surgery.cli.options import DEVICE, json_option, model_options
from surgery.cli.pass_groups import ObjectiveCommand
from surgery.common.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.cli.loading import Loader
    from surgery.common.plugins import Plugins

FORMS = (
    "MODEL is a directory that surgery or transformers wrote, an ONNX file, or another reference of a model."
)


def check_model(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Callback of an argument: a model that does not exist is reported before torch is imported."""
    for ref in value if isinstance(value, tuple) else (value,):
        kind_of(ref)
    return value


def check_files(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Callback of --data: a file that does not exist is reported before torch is imported."""
    for text in value:
        name, equals, path = text.partition("=")
        if not Path(text).exists() and not (equals and name and Path(path).exists()):
            raise SurgeryError(f"--data {text}: there is no such file; check the path")
    return value


def check_labels(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Callback of --labels: the names, separated by commas."""
    names = tuple(name.strip() for name in (value or "").split(",") if name.strip())
    if len(set(names)) < len(names):
        raise SurgeryError(f"--labels {value}: a name occurs twice; give each class another name")
    return names


def column_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the columns of the data; the command gets those that were named as `columns`."""

    @click.option("--text", metavar="COLUMN", help="Column of the text or image in the data.")
    @click.option("--label", metavar="COLUMN", help="Column of the label in the data.")
    @functools.wraps(function)
    def wrapped(*args: Any, text: str | None, label: str | None, **kwargs: Any) -> Any:
        named = {"text": text, "label": label}
        return function(
            *args, columns={key: name for key, name in named.items() if name is not None}, **kwargs
        )

    return wrapped


def running_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the options of commands that run models.

    The command gets `open_model(ref)` instead, which opens a model as a Runner and prints its notes.
    """

    @click.option(
        "--tokenizer", metavar="DIR", help="Directory of the tokenizer, or of preprocessor_config.json."
    )
    @click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME",
        help="Use only this adapter of a program, or of an ONNX directory; may be repeated.",
    )
    @model_options
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        tokenizer: str | None,
        adapters: tuple[str, ...],
        loader: Loader,
        **kwargs: Any,
    ) -> Any:
        def open_model(ref: str, **more: Any) -> Any:
            from surgery.cli.inference.runner import open_runner

            device = click.get_current_context().meta.get(DEVICE)
            if device is not None and device.type != "cpu" and kind_of(ref).startswith("onnx"):
                raise SurgeryError(f"--device {device}: {ref} runs in onnxruntime on the CPU; leave it out")
            runner = open_runner(
                ref,
                loader.program,
                loader.module,
                tokenizer=tokenizer,
                adapters=adapters,
                **more,
            )
            for note in runner.notes:
                click.echo(f"note: {note}", err=True)
            return runner

        return function(*args, open_model=open_model, **kwargs)

    return wrapped


batch_option = click.option(
    "--batch", type=click.IntRange(1), default=16, show_default=True, help="Rows of a batch."
)
length_option = click.option(
    "--max-length",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Maximum tokens of a text; longer ones are cut.",
)
labels_option = click.option(
    "--labels",
    callback=check_labels,
    metavar="NAME,…",
    help="Names of the classes in their order, if the model has none.",
)


@click.command()
@click.argument("model", callback=check_model)
@click.argument("items", nargs=-1, required=True, metavar="TEXT|FILE…")
@click.option(
    "--top", type=click.IntRange(1), default=1, show_default=True, help="Number of classes to print."
)
@click.option(
    "--as",
    "form",
    type=click.Choice(["classes", "values", "embedding"]),
    help="What to read of the output (default: by its shape and name).",
)
@click.option("--output-name", metavar="NAME", help="Output of the model to read.")
@click.option("--text", "column", metavar="COLUMN", help="Column of the text or image in files of rows.")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "cls"]),
    default="mean",
    show_default=True,
    help="How the vectors of tokens become one embedding.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write: .npy or .safetensors (numbers), .jsonl or .csv.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@labels_option
@batch_option
@length_option
@json_option
@running_options
def predict(
    model: str,
    items: tuple[str, ...],
    top: int,
    form: Any,
    output_name: str | None,
    column: str | None,
    pooling: Any,
    output: Path | None,
    overwrite: bool,
    labels: tuple[str, ...],
    batch: int,
    max_length: int,
    as_json: bool,
    plugins: Plugins,
    open_model: Callable[..., Any],
) -> None:
    """Predict the class, the numbers or the embedding of texts, images or rows.

    TEXT|FILE is a text, an image, a file of rows (.csv, .jsonl, .parquet, .txt, …), a directory of images, a file of
    input tensors (.npz, .safetensors), or - for lines of the standard input.
    """
    from surgery.cli.predictions import check_output, tell_predictions

    check_output(output, overwrite)
    runner = open_model(model, longest=max_length)
    if labels:
        runner = runner.labelled(labels)
    tell_predictions(
        runner,
        items,
        form=form,
        output_name=output_name,
        column=column,
        pooling=pooling,
        top=top,
        batch=batch,
        output=output,
        as_json=as_json,
    )


class EvaluateCommand(ObjectiveCommand):
    """The command evaluate, whose objective is optional."""

    usage = "MODEL --data FILE… [--objective NAME [OBJECTIVE OPTIONS]] [OPTIONS]"


@click.command(cls=EvaluateCommand)
@click.argument("model", callback=check_model)
@click.option(
    "--data",
    multiple=True,
    required=True,
    callback=check_files,
    metavar="[NAME=]FILE",
    help="JSONL, CSV, Parquet or text files of one format, or a directory, of which a held-out split counts; may be "
    "repeated. NAME: the task, for an objective with several tasks.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="JSON file of the report to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--seed", type=int, default=0, help="Seed of what the objective draws, as in training.")
@column_options
@labels_option
@batch_option
@length_option
@json_option
@running_options
@click.pass_context
def evaluate(
    ctx: click.Context,
    model: str,
    data: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    seed: int,
    labels: tuple[str, ...],
    batch: int,
    max_length: int,
    as_json: bool,
    columns: dict[str, str],
    plugins: Plugins,
    open_model: Callable[..., Any],
) -> None:
    """Compute held-out figures of a model: those that `surgery train` prints, and more about classes and numbers.

    Without --objective, the outputs and the data decide between classification, regression, causal-lm and masked-lm.
    Options after --objective NAME belong to it.
    """
    from surgery.cli.evaluations import asked_objective, guessed_objective, read_rows_of, tell_evaluation
    from surgery.cli.inference.evaluate import evaluate as judge
    from surgery.common.files import refuse_file, write_text

    objective = asked_objective(ctx.meta["groups"], plugins, columns)
    if output is not None:
        refuse_file(output, overwrite)
    rows = read_rows_of(data, objective)
    runner = open_model(model, longest=max_length)
    if labels:
        runner = runner.labelled(labels)
    objective = objective or guessed_objective(runner, rows, plugins, columns)
    found = judge(runner, objective, rows, batch=batch, seed=seed)
    report = tell_evaluation(found, model, as_json)
    if output is not None:
        write_text(output, report)


@click.command()
@click.argument("model", callback=check_model)
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Hold a dialogue: read lines and answer them, until Ctrl-D.")
@click.option("--system", metavar="TEXT", help="System message of the dialogue.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Largest number of new tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    help="Sample at this temperature; 0 takes the most probable token (default: 0, or 1 with --top-p).",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most probable tokens that together have this probability.",
)
@click.option("--seed", type=int, default=0, help="Seed of the sampling.")
@json_option
@running_options
def generate(
    model: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    as_json: bool,
    plugins: Plugins,
    open_model: Callable[..., Any],
) -> None:
    """Continue PROMPT (- for the standard input), or answer it with --chat. The text appears as it is generated."""
    from surgery.cli.generations import hold_dialogue, tell_generated
    from surgery.cli.inference.generate import UNLIMITED, Generator, Sampling

    if not chat and prompt is None:
        raise SurgeryError("give a PROMPT, - to read it from the standard input, or --chat")
    if system is not None and not chat:
        raise SurgeryError("--system is a message of a dialogue; add --chat")
    if chat and as_json:
        raise SurgeryError("--chat prints a dialogue; leave out --json")
    if temperature is None:
        temperature = 1.0 if top_p is not None else 0.0
    how = Sampling(max_new_tokens, temperature=temperature, top_p=1.0 if top_p is None else top_p)
    generator = Generator(open_model(model, longest=UNLIMITED))
    if generator.note:
        click.echo(f"note: generates without a cache, which takes longer: {generator.note}", err=True)
    if chat:
        hold_dialogue(generator, prompt, system, how, seed)
    else:
        tell_generated(generator, prompt or "", how, seed, as_json)


class BenchmarkCommand(ObjectiveCommand):
    """The command benchmark, whose objective is optional."""

    usage = "MODEL… [--data FILE…] [--objective NAME [OBJECTIVE OPTIONS]] [OPTIONS]"


@click.command(cls=BenchmarkCommand)
@click.argument("models", nargs=-1, required=True, callback=check_model)
@click.option(
    "--data",
    multiple=True,
    callback=check_files,
    metavar="[NAME=]FILE",
    help="Data for the quality, and for the inputs of the latency (default: random inputs, and no quality).",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=20, show_default=True, help="Measurements of each latency."
)
@click.option(
    "--threads", type=click.IntRange(1), help="Threads of torch and onnxruntime (default: torch's)."
)
@click.option(
    "--new-tokens",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Tokens to generate, in language models; 0: none.",
)
@click.option(
    "--length", type=click.IntRange(1), default=128, show_default=True, help="Tokens of random texts."
)
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE.html", help="Write a page with a plot."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--seed", type=int, default=0, help="Seed of what the objective draws, as in training.")
@column_options
@labels_option
@length_option
@json_option
@running_options
@click.pass_context
def benchmark(
    ctx: click.Context,
    models: tuple[str, ...],
    data: tuple[str, ...],
    rounds: int,
    threads: int | None,
    new_tokens: int,
    length: int,
    html: Path | None,
    overwrite: bool,
    seed: int,
    labels: tuple[str, ...],
    max_length: int,
    as_json: bool,
    columns: dict[str, str],
    plugins: Plugins,
    open_model: Callable[..., Any],
) -> None:
    """Compare models: size, latency at batch 1 and 16, tokens per second, quality on data. They run in turns."""
    import json

    import torch

    from surgery.cli.benchmark_page import benchmark_page
    from surgery.cli.benchmarks import tell_benchmark
    from surgery.cli.evaluations import asked_objective, guessed_objective, read_rows_of
    from surgery.cli.inference.benchmark import benchmark as measure
    from surgery.cli.inference.evaluate import evaluate as judge
    from surgery.common.files import refuse_file, write_text

    objective = asked_objective(ctx.meta["groups"], plugins, columns)
    if objective is not None and not data:
        raise SurgeryError("--objective judges data; add --data FILE")
    if html is not None:
        refuse_file(html, overwrite, "--html")
    if threads is not None:
        torch.set_num_threads(threads)
    rows = read_rows_of(data, objective) if data else None
    runners = [open_model(ref, longest=max_length, threads=torch.get_num_threads()) for ref in models]
    if labels:
        runners = [runner.labelled(labels) for runner in runners]
    if rows is not None:
        objective = objective or guessed_objective(runners[0], rows, plugins, columns)
    judged = [judge(r, objective, rows, seed=seed) for r in runners] if objective is not None else []
    found = measure(
        runners,
        objective=objective,
        rows=rows,
        judged=judged,
        rounds=rounds,
        new_tokens=new_tokens,
        length=length,
    )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        tell_benchmark(found)
    if html is not None:
        write_text(html, benchmark_page(found))
        click.echo(f"wrote {html}", err=True)
