"""Compressed models: size, quality and latency of every format: `python -m benchmarks.compress` (about half an hour).

Each subject is exported to ONNX in each format and evaluated in onnxruntime, on data that was not used for calibration.
For comparison there are onnxruntime's own quantizers on the fp32 file, and torchao exported by torch.onnx. Latency is
the median of interleaved rounds at 1 and 16 rows, as a ratio to fp32's (CPU time of one thread; --threads for wall
time). Models that generate are also timed on one row of one token, a generation step. "covered" is the size on disk of
the weights that a format acts on, over their size in fp32. Nothing is trained after compression.

    --quick   digits only             --only NAME…   subjects: digits, lee, film, smollm2
                                      --formats NAME…   formats; fp32 is always included
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.table import Table

import surgery
from benchmarks import quantizers
from benchmarks.models import MissingPeer
from benchmarks.subjects import ROOT, Subject, subjects
from benchmarks.timing import Times, Variant, measure
from surgery.common.errors import SurgeryError
from surgery.engine.registry import passes
from surgery.export.runtime import OnnxModel

ROWS = (1, 16)
KEPT = ROOT / "benchmarks" / "compress.json"


@dataclass(frozen=True)
class Format:
    """A compressed format.

    Attributes:
        name: Name in the table.
        make: Function (subject, path, path of the fp32 file) that writes the file and returns its "covered" ratio; or
            the name of another format whose file is used.
        peer: True if the format is another library's.
        config: Session options of onnxruntime.
    """

    name: str
    make: Callable[[Subject, Path, Path], float | None] | str
    peer: bool = False
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    subject: str
    format: str
    peer: bool
    size: int = 0
    covered: float | None = None
    quality: float = 0.0
    loss: float = 0.0
    ratios: tuple[float, ...] = ()
    failed: str = ""


def _ours(
    name: str = "", head: Mapping[str, Any] | None = None, **options: Any
) -> Callable[[Subject, Path, Path], float | None]:
    """Function that applies a pass to the subject's target and exports the result.

    Formats for linear layers leave other weights; these become int8, as other quantizers do.

    Args:
        name: Pass, or "" for fp32.
        head: Options of a separate pass on the output layer.
        options: Options of the pass.
    """

    def make(subject: Subject, path: Path, _: Path) -> float | None:
        program = subject.program
        known = passes(program.base.plugins)
        if name and name not in known:
            raise MissingPeer(f"there is no pass {name!r} here")
        targets = [subject.target if name == "quantize" else subject.products or subject.target]
        rest = (
            [subject.rest] if name == "quantize" or (name == "int8-static" and not subject.products) else []
        )
        if head and not subject.head:
            raise MissingPeer("there is no output layer by role here")
        if rest and not head:
            rounds = name == "int8-static" or options.get("format") == "int8-dynamic"
            (targets if rounds else rest).append(subject.head)
        wanted = [(name, {"target": _joined(targets), **options})] if name else []
        if head:
            wanted.append((name, {"target": subject.head, **head, "as": "head"}))
        if _joined(rest):
            wanted.append(("quantize", {"format": "int8", "target": _joined(rest), "as": "rest"}))
        for own, given in wanted:
            program = program.apply(known[own].cls.parse(given), data=subject.data, freeze_base=False)
        added = program.journal.entries[len(program.journal.entries) - len(wanted) :]
        if name == "sparse":
            program = program.merge()
        program.export(path)
        # A pruned group has more weights than its site, so the ratio is not defined.
        return None if name == "prune-filters" else _covered(program, added[:1], path)

    return make


def _joined(targets: Sequence[str]) -> str:
    return ",".join(filter(None, targets))


def _theirs(write: Callable[[Subject, Path, Path], None]) -> Callable[[Subject, Path, Path], float | None]:
    def make(subject: Subject, path: Path, plain: Path) -> float | None:
        write(subject, path, plain)
        return None

    return make


def _covered(program: surgery.Program, added: Sequence[Any], path: Path) -> float | None:
    """Bytes in the file of the tensors that a format added, over the bytes of the weights at its sites."""
    names = {full for entry in added for record in entry.sites for full in record.tensors.values()}
    held = {t.name: t for t in onnx.load(str(path), load_external_data=False).graph.initializer}
    sizes = [_bytes(held[name]) for name in names if name in held]
    owners = {record.key.owner for entry in added for record in entry.sites}
    before = sum(t.numel() * t.itemsize for n, t in program.base.tensors.items() if n in owners)
    return sum(sizes) / before if sizes else None


_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}


def _bytes(tensor: Any) -> float:
    count = 1
    for size in tensor.dims:
        count *= size
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return count * _BITS.get(tensor.data_type, 8 * kind.itemsize) / 8


# onnxruntime's own quantizer writes this setting into the file; for a fused DequantizeLinear it is a session option.
FP32_SUMS = {"session.qdq_matmulnbits_accuracy_level": "1"}

FORMATS = [
    Format("fp32", _ours()),
    Format("int8", _ours("quantize", format="int8")),
    Format("int8, groups of 64", _ours("quantize", format="int8", group=64)),
    Format("int8-dynamic", _ours("quantize", format="int8-dynamic")),
    Format(
        "int8-dynamic, smoothed",
        _ours("quantize", format="int8-dynamic", smooth=0.65, activation_budget=0.05),
    ),
    Format(
        "int8-dynamic, per token, smoothed",
        _ours("quantize", format="int8-dynamic", per_token=True, smooth=0.65),
    ),
    Format(
        "the same, output layer twice",
        _ours(
            "quantize",
            head={"format": "int8-dynamic", "twice": True},
            format="int8-dynamic",
            per_token=True,
            smooth=0.65,
        ),
    ),
    Format("int8-static", _ours("int8-static")),
    Format("int4", _ours("quantize", format="int4")),
    Format("int4, fp32 sums", "int4", config=FP32_SUMS),
    Format("int4, gptq", _ours("quantize", format="int4", method="gptq")),
    Format("int4, gptq, fp32 sums", "int4, gptq", config=FP32_SUMS),
    Format("ternary", _ours("quantize", format="ternary")),
    Format("2:4", _ours("sparse", pattern="2:4")),
    Format("2:4, wanda", _ours("sparse", pattern="2:4", criterion="wanda")),
    Format("filters pruned by 1/3", _ours("prune-filters", ratio=1 / 3)),
    Format("onnxruntime quantize_dynamic", _theirs(quantizers.dynamic), peer=True),
    Format("onnxruntime quantize_static", _theirs(quantizers.static), peer=True),
    Format("onnxruntime quantize_static, products", _theirs(quantizers.static_products), peer=True),
    Format("onnxruntime MatMulNBits", _theirs(quantizers.nbits), peer=True),
    Format("torchao int8, torch.onnx", _theirs(quantizers.torchao), peer=True),
]


NAMES = [format.name for format in FORMATS]


def evaluate(subject: Subject, formats: Sequence[Format] = FORMATS) -> Iterator[Result]:
    """Results of a subject's formats, fp32 first. An error in a format of ours is raised; a peer's is a result."""
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Result] = {}
        models: dict[str, OnnxModel] = {}
        paths = {format.name: Path(folder, f"{number}.onnx") for number, format in enumerate(formats)}
        for format in formats:
            path = paths[format.name]
            try:
                if isinstance(format.make, str):
                    if format.make not in made:
                        raise MissingPeer(f"there is no file of {format.make!r}")
                    path, covered = paths[format.make], made[format.make].covered
                else:
                    covered = format.make(subject, path, paths["fp32"])
                model = OnnxModel(path, threads=torch.get_num_threads(), config=format.config)
                quality = subject.quality(model)
            except (SurgeryError, MissingPeer) as error:
                yield Result(subject.name, format.name, format.peer, failed=str(error))
            except Exception as error:
                if not format.peer:
                    raise
                said = " ".join(str(error).split())[:160]
                yield Result(subject.name, format.name, True, failed=f"{type(error).__name__}: {said}")
            else:
                models[format.name] = model
                size = sum(f.stat().st_size for f in Path(folder).glob(f"{path.name}*"))
                loss = subject.loss(quality, made["fp32"].quality) if made else 0.0
                found = Result(subject.name, format.name, format.peer, size, covered, quality, loss)
                made[format.name] = found
            print(f"  {subject.name}: {format.name}", file=sys.stderr, flush=True)
        inputs = [*(subject.inputs(rows) for rows in ROWS), *filter(None, [subject.token])]
        times = [_times(models, given, subject.rounds) for given in inputs]
        for name, result in made.items():
            ratios = tuple(taken.median(name) / taken.median("fp32") for taken in times)
            yield replace(result, ratios=ratios)


def _times(models: Mapping[str, OnnxModel], inputs: dict[str, torch.Tensor], rounds: int) -> Times:
    return measure({n: Variant(lambda _, model=m: model.run(inputs)) for n, m in models.items()}, rounds)


def table(results: list[Result], measures: Mapping[str, str]) -> Table:
    shown = Table("", "file", "covered", "quality", "lost", *(f"{rows} row" for rows in ROWS), "1 token")
    subject = ""
    for row in results:
        if row.subject != subject:
            shown.add_section()
            shown.add_row(f"[bold]{row.subject}[/bold] ({measures[row.subject]})")
            subject = row.subject
        name = f"  {row.format}" + (" (peer)" if row.peer else "")
        if row.failed:
            shown.add_row(name, f"[yellow]{row.failed}[/yellow]")
            continue
        share = "" if row.covered is None else f"{row.covered:.3f}"
        ratios = [f"{ratio:.2f}" for ratio in row.ratios]
        shown.add_row(
            name, f"{row.size / 1e6:.2f} MB", share, f"{row.quality:.4g}", f"{row.loss:+.1%}", *ratios
        )
    return shown


def markdown(results: list[Result], measures: Mapping[str, str], threads: int) -> str:
    lines = ["# Formats: size, quality, latency", "", "`python -m benchmarks.compress` writes this page.", ""]
    lines += [
        f"Latency is relative to fp32's in onnxruntime, {threads} thread(s), at 1 and 16 rows, measured in one run; "
        'the rows of a table may come from several runs. "lost" is the relative loss of quality.',
        "",
    ]
    for name, measured in measures.items():
        rows = [row for row in results if row.subject == name]
        columns = ["", "file, MB", "covered", "quality", "lost", "1 row", "16 rows", "1 token"]
        columns = columns[: 5 + max(len(row.ratios) for row in rows)]
        lines += [f"## {name} ({measured})", "", f"| {' | '.join(columns)} |"]
        lines.append("|---" * len(columns) + "|")
        for row in rows:
            title = f"{row.format}{' *(peer)*' if row.peer else ''}"
            if row.failed:
                lines.append(f"| {title} | {row.failed.replace('|', '/')} {'| ' * (len(columns) - 2)}|")
                continue
            share = "" if row.covered is None else f"{row.covered:.3f}"
            cells = [f"{row.size / 1e6:.2f}", share, f"{row.quality:.4g}", f"{row.loss:+.1%}"]
            lines.append(f"| {title} | {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in row.ratios)])} |")
        lines.append("")
    return "\n".join(lines)


def _write(results: list[Result], measures: Mapping[str, str], threads: int) -> None:
    """Write the page; results of other subjects and formats stay."""
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {"results": [], "measures": {}}
    all_measures = {**kept["measures"], **measures}
    made = {(row.subject, row.format) for row in results}
    others = [Result(**row) for row in kept["results"] if (row["subject"], row["format"]) not in made]
    titles = list(all_measures)
    every = sorted(
        (row for row in (*others, *results) if row.format in NAMES),
        key=lambda row: (titles.index(row.subject), NAMES.index(row.format)),
    )
    KEPT.write_text(
        json.dumps({"measures": all_measures, "results": [asdict(row) for row in every]}, indent=1)
    )
    (ROOT / "benchmarks" / "compress.md").write_text(markdown(every, all_measures, threads))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compress", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--quick", action="store_true", help="digits only, few rounds")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help="subjects: digits, lee, film, smollm2"
    )
    parser.add_argument(
        "--formats", nargs="*", default=[], metavar="NAME", help="formats, with their names on the page"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of onnxruntime (1: measures CPU time)"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write benchmarks/compress.md; results that were not requested stay",
    )
    asked = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(asked.threads)
    known = subjects(asked.quick)
    unknown = [name for name in asked.only if name not in known]
    if unknown:
        parser.error(f"no subject {unknown[0]!r}; there are {', '.join(known)}")
    if unknown := [name for name in asked.formats if name not in NAMES]:
        parser.error(f"no format {unknown[0]!r}; there are {'; '.join(NAMES)}")
    formats = [f for f in FORMATS if not asked.formats or f.name in ("fp32", *asked.formats)]
    results: list[Result] = []
    measures: dict[str, str] = {}
    missing = []
    for name in asked.only or known:
        try:
            made = known[name]()
        except MissingPeer as error:
            missing.append(str(error))
            continue
        measures[made.name] = "; ".join([made.measure, *made.notes])
        found = list(evaluate(made, formats))
        results += sorted(found, key=lambda row: NAMES.index(row.format))
        if asked.write:
            _write(results, measures, asked.threads)
    Console(width=None if sys.stdout.isatty() else 150).print(table(results, measures))
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
