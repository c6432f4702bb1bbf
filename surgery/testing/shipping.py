"""Checks of saved and exported programs: reload, torch.export, unflatten and ONNX."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from surgery.common.plugins import make_plugin_manager
from surgery.engine.contract.base import Pass
from surgery.engine.contract.observe import observe
from surgery.engine.journal import Journal
from surgery.engine.program import Program
from surgery.engine.registry import passes
from surgery.engine.replay import live_entries
from surgery.export import provenance_of
from surgery.export.reexport import export_again
from surgery.graph.graphs import live_nodes
from surgery.store.load import load
from surgery.store.saved import INSERTED, read_manifest
from surgery.testing.case import Case, Inputs, Skip, fingerprint, tensors_of
from surgery.testing.graph import live_parameters

_TIMEOUT = 600


def reload(case: Case) -> str:
    """Saved and loaded in another process with another seed and thread count, the program has the same bits."""
    path = case.folder / "saved"
    case.random.save(path, overwrite=True)
    _as_written(case, path)
    base = case.program.base
    if not base.ref:
        _same_here(case, load(str(path), base=case.program))
        return (
            "saved and loaded in this process; skipped the other process: a captured module has no reference"
        )
    if not _installed(case.pass_):
        confirmed = base.ref if base.ref.startswith("py:") else None
        again = load(str(path), base=confirmed, trust=base.options.trust, plugins=base.plugins)
        _same_here(case, again)
        return "saved and loaded in this process; skipped the other process: no installed plugin has the pass"
    return _other_process(case, path)


def _as_written(case: Case, path: Path) -> None:
    """Check the journal, and the tensors that no graph reads (masks), which `state` does not contain."""
    written = Journal.from_json(read_manifest(path)["journal"]).to_json()
    if json.dumps(written) != json.dumps(case.random.journal.to_json()):
        raise case.error("reload", "the journal that was saved is not the program's")
    stored = load_file(path / INSERTED) if case.random.tensors else {}
    for name, tensor in case.random.tensors.items():
        if name not in stored or fingerprint(stored[name]) != fingerprint(tensor):
            raise case.error("reload", f"{name} in {INSERTED} is missing, or differs from the program's")


def _installed(pass_: Pass) -> bool:
    """True if another process finds the class of the pass by its name."""
    info = passes(make_plugin_manager()).get(pass_.name)
    return info is not None and info.cls is type(pass_)


def _same_here(case: Case, program: Program) -> None:
    """Compare the state and outputs of a loaded program with those that were saved."""
    for name, tensor in case.random.state().items():
        other = program.state().get(name)
        if other is None or fingerprint(tensor) != fingerprint(other):
            raise case.error("reload", f"{name} differs after loading")
    if not observe(case.random.run(), program.run(*case.inputs[0][0], **case.inputs[0][1])).equal:
        raise case.error("reload", "outputs differ after loading")


def _other_process(case: Case, path: Path) -> str:
    """Load the directory in another process and compare its state and outputs bit for bit."""
    threads = torch.get_num_threads()
    other = 1 if threads > 1 else 2
    args, kwargs = case.inputs[0]
    given, result = case.folder / "inputs.pt", case.folder / "outputs.safetensors"
    torch.save((args, kwargs), given)
    command = [sys.executable, "-m", "surgery.testing.loader", str(path), str(given), str(result)]
    command += ["--seed", str(case.seed + 17), "--load-threads", str(other), "--run-threads", str(threads)]
    if case.program.base.ref.startswith("py:"):
        command += ["--base", case.program.base.ref]
    if case.program.base.options.trust:
        command += ["--trust"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise case.error("reload", f"another process cannot load it: {last}")
    found = load_file(result)
    for name, tensor in case.random.state().items():
        if f"state/{name}" not in found or fingerprint(found[f"state/{name}"]) != fingerprint(tensor):
            raise case.error("reload", f"{name} has other bits in another process")
    for index, tensor in enumerate(tensors_of(case.random.run())):
        if fingerprint(found[f"output/{index}"]) != fingerprint(tensor):
            raise case.error("reload", f"output {index} has other bits in another process")
    return f"another process, seed {case.seed + 17}, {other} threads: same bits"


def _exported(case: Case) -> Any:
    """The rewritten graph, exported again with torch.export; cached in the case."""
    if "exported" not in case.__dict__:
        captured = case.random.captured
        args, kwargs = case.program.example_inputs
        case.__dict__["exported"] = export_again(
            case.random.graph_module, args, kwargs, captured.dynamic_shapes
        )
    return case.__dict__["exported"]


def _sets(case: Case) -> list[Inputs]:
    """Inputs to compare on: the example, another size, and inputs that reach the inserted part."""
    return [case.inputs[0], *([case.other] if case.other is not None else []), *case.reaching]


def _agrees(case: Case, check: str, module: Any) -> str:
    """Compare the outputs of a module with those of the program."""
    worst = 0.0
    for args, kwargs in _sets(case):
        with torch.no_grad():
            seen = observe(case.random.run(*args, **kwargs), module(*args, **kwargs))
        worst = max(worst, seen.difference)
        if not seen.difference <= 1e-5:
            raise case.error(check, f"outputs differ by {seen.difference:.1e} of their scale")
    sizes = "at another batch size too" if case.other is not None else "the program has no dynamic dimension"
    return f"within {worst:.1e}; {sizes}"


def reexport(case: Case) -> str:
    """torch.export accepts the rewritten graph, and the result runs at another batch size."""
    try:
        program = _exported(case)
    except Exception as error:
        raise case.error(
            "reexport", f"torch.export fails on the graph: {' '.join(str(error).split())[:300]}"
        ) from error
    return _agrees(case, "reexport", program.module(check_guards=False))


def unflatten(case: Case) -> str:
    """torch.export.unflatten of the exported program has the same outputs."""
    try:
        module = torch.export.unflatten(_exported(case))
    except Exception as error:
        raise case.error(
            "unflatten", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    return _agrees(case, "unflatten", module)


def onnx(case: Case) -> str:
    """onnxruntime agrees with the program; every inserted tensor is in the file under its name, with provenance."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise Skip("onnx, onnxscript or onnxruntime is not installed (torch-surgery[onnx])")
    for op, why in case.pass_.expectations.no_onnx.items():
        if any(node.target is op for node in live_nodes(case.random.graph)):
            raise Skip(why)
    path = case.folder / "model.onnx"
    report = case.random.export(path)
    stored = provenance_of(path)
    read = live_parameters(case.random.graph)
    for entry in live_entries(case.random.journal):
        for record in entry.sites:
            for name, full in record.tensors.items():
                # The tensor of an earlier pass is not exported if this pass has replaced the ops that read it.
                if entry.id != case.entry.id and full not in read:
                    continue
                tensor = stored.get(full)
                if tensor is None:
                    raise case.error(
                        "onnx", f"tensor {name!r} is not in the file under its name", record.path
                    )
                sharing = {r.path for r in entry.sites if full in r.tensors.values()}
                if tensor.pass_name != entry.pass_name or tensor.site not in sharing:
                    raise case.error("onnx", f"tensor {name!r} has lost its provenance", record.path)
                if not tensor.nodes:
                    raise case.error("onnx", f"tensor {name!r} is read by no node of the pass", record.path)
    assert report.parity is not None
    return f"within {report.parity.error:.1e}; {len(case.entry.tensor_names)} tensors by name"
