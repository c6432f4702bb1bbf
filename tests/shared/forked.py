"""Commands of surgery in real processes that start fast: one process imports the libraries, and each command forks it.

`python -m tests.shared.forked` reads a JSON line with argv, env and cwd for each command, and answers with its exit
code and what it printed. `load MODEL` prints the commit and a hash of the weights, without a capture. HF_ENDPOINT and
HF_HOME are those of the process; HF_TOKEN and HF_HUB_OFFLINE may differ from command to command.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """The end of a command: its exit code and what it printed."""

    rc: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The JSON that was printed."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error, after notes and warnings of other libraries."""
        assert self.rc == 2, self
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0]


class Commands:
    """Starts commands."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(
        self,
        *argv: object,
        rc: int | None = 0,
        offline: bool = False,
        token: str = "",
        cwd: Path = ROOT,
    ) -> Done:
        """Run a command; `rc` is the exit code that it must have, None for any."""
        env = {"HF_HUB_OFFLINE": "1" if offline else "", "HF_TOKEN": token}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"argv": [str(arg) for arg in argv], "env": env, "cwd": str(cwd)}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        done = Done(**json.loads(self.process.stdout.readline()))
        assert rc is None or done.rc == rc, done
        return done


@contextmanager
def commands(**env: str) -> Iterator[Commands]:
    """A process for commands, with more variables in its environment."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.shared.forked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**own, **env},
    ) as process:
        try:
            yield Commands(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


def _run(argv: list[str], env: dict[str, str], cwd: str) -> dict[str, object]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            os.chdir(cwd)
            try:
                code = _command(argv, env)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return {"rc": os.waitstatus_to_exitcode(status), "out": out.read(), "err": err.read()}


def _command(argv: list[str], env: dict[str, str]) -> int:
    from huggingface_hub import constants

    from surgery.cli import main

    os.environ.update({key: value for key, value in env.items() if value})
    # huggingface_hub reads this variable when it is imported.
    constants.HF_HUB_OFFLINE = bool(env.get("HF_HUB_OFFLINE"))
    if argv[0] == "load":
        return _load(*argv[1:])
    try:
        main(argv)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def _load(ref: str) -> int:
    """Load a model as `surgery.load` does, and print its commit, a hash of its weights and the notes."""
    from surgery.capture import LoadOptions
    from surgery.capture.reference import load_model
    from surgery.common.errors import SurgeryError
    from surgery.common.plugins import make_plugin_manager

    try:
        loaded = load_model(ref, LoadOptions(), make_plugin_manager())
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = {"commit": loaded.commit, "weights": weights_hash(loaded.module), "notes": loaded.notes}
    print(json.dumps(facts))
    return 0


def _warm() -> None:
    """Capture and rewrite a small model, so that its imports are done once."""
    import torch

    import surgery

    program = surgery.capture(torch.nn.Linear(4, 4), torch.ones(2, 4))
    program.apply(surgery.Lora(target="*", rank=2)).save(Path(tempfile.mkdtemp()) / "warm")


def weights_hash(module: Any) -> str:
    """Hash of the state of a module."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.detach().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    for library in (
        "timm",
        "transformers.models.bert.modeling_bert",
        "surgery.cli.loading",
        "surgery.cli.views",
    ):
        import_module(library)
    _warm()
    gc.freeze()  # children then share the memory
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)
