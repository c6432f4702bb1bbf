"""The conformance kit of loaders of models: `check_loader`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from surgery.capture import fresh_inputs, other_sizes
from surgery.common.errors import LoadError, SurgeryError
from surgery.common.plugins import CORE, Plugins, make_plugin_manager
from surgery.engine.contract.observe import observe
from surgery.engine.program import Program
from surgery.passes.lora.lora import Lora
from surgery.store.load import load
from surgery.testing.case import Case, ConformanceError, Skip
from surgery.testing.report import ConformanceReport
from surgery.testing.steps import run_steps


def check_loader(ref: str, *, plugins: Plugins | None = None, raises: bool = True) -> ConformanceReport:
    """Run the checks of a plugin's loader on one of its references.

    scheme       the plugin declares the scheme of the reference, so that it is asked for no other
    loads        the reference loads, and its capture agrees with the module at another size of every dynamic dimension
    again        loaded again with another seed, it has the same weights; what comes from no file is declared
    saved        a LoRA on it is saved, and loaded again from the reference that the directory names
    unknown      a reference that does not exist is refused with a LoadError

    Args:
        ref: A reference of the plugin's scheme, such as "myhub:name".
        plugins: Plugin manager; by default one with all installed plugins.
        raises: False collects failures in the report instead of raising at the first one.

    Raises:
        ConformanceError: A check fails.
    """
    case = _Case(ref, plugins or make_plugin_manager())
    steps = {
        "scheme": case.scheme,
        "loads": case.loads,
        "again": case.again,
        "saved": case.saved,
        "unknown": case.unknown,
    }
    return run_steps(ref, steps, raises)


class _Case:
    """A reference and the manager of the plugin that loads it."""

    def __init__(self, ref: str, plugins: Plugins) -> None:
        self.ref, self.plugins = ref, plugins
        self._program: Program | None = None

    @property
    def program(self) -> Program:
        if self._program is None:
            self._program = load(self.ref, plugins=self.plugins)
        return self._program

    def error(self, check: str, message: str) -> ConformanceError:
        return ConformanceError(self.ref, check, message)

    def scheme(self) -> str:
        name, colon, _ = self.ref.partition(":")
        if not colon:
            raise self.error("scheme", "the reference has no scheme; write SCHEME:NAME")
        if name not in self.plugins.schemes:
            raise self.error("scheme", f"no plugin declares {name!r} in surgery_load_schemes")
        owner = self.plugins.distribution_of(self.plugins.schemes[name])[0]
        if owner == CORE:
            raise self.error("scheme", f"{name!r} is a scheme of surgery itself; choose another")
        return f"{name}: of {owner}"

    def loads(self) -> str:
        program = self.program
        captured = program.captured
        sizes = other_sizes(captured)
        args, kwargs = fresh_inputs(captured, sizes)
        module = program.base.loaded.module
        with torch.no_grad():
            wanted = pytree.tree_leaves(module(*args, **kwargs))
        seen = observe(pytree.tree_leaves(program.run(*args, **kwargs)), wanted)
        if not seen.difference <= 1e-4:  # a graph may sum in another order than the module
            raise self.error("loads", f"at {sizes} the graph and the module differ: {seen}")
        return f"{len(program.base.tensors)} tensors; at {sizes}: {seen}"

    def again(self) -> str:
        torch.manual_seed(int(torch.initial_seed() % 2**31) + 1)
        other = load(self.ref, plugins=self.plugins)
        drawn = self.program.base.loaded.unsourced
        for name, tensor in self.program.state().items():
            if name not in drawn and not torch.equal(tensor, other.state()[name]):
                raise self.error(
                    "again",
                    f"{name} differs when the reference is loaded again; list it in LoadedModel.unsourced",
                )
        files = self.program.base.loaded.files
        missing = [str(file) for file in files if not Path(file).is_file()]
        if missing:
            raise self.error("again", f"LoadedModel.files names {missing[0]}, which is no file")
        if not files and not drawn:
            raise self.error(
                "again", "the weights come from no file; give LoadedModel.files, or list them in `unsourced`"
            )
        return f"{len(files)} files, {len(drawn)} tensors from no file"

    def saved(self) -> str:
        if not self.program.sites.sites:
            raise Skip("the model has no site for LoRA")
        with tempfile.TemporaryDirectory(prefix="surgery-loader-") as folder:
            adapted = Case(Lora(target="all", rank=1), self.program, 0, 0.5, Path(folder)).random
            adapted.save(Path(folder) / "saved")
            again = load(str(Path(folder) / "saved"), plugins=self.plugins)
        # A loader may draw its example inputs, so both run on those of one of them.
        args, kwargs = adapted.example_inputs
        found, wanted = (pytree.tree_leaves(each.run(*args, **kwargs)) for each in (again, adapted))
        seen = observe(found, wanted)
        if not seen.equal:
            raise self.error("saved", f"the loaded program differs: {seen}")
        return "the same bits"

    def unknown(self) -> str:
        wrong = f"{self.ref.partition(':')[0]}:there/is-no-such-model"
        try:
            load(wrong, plugins=self.plugins)
        except LoadError as error:
            return str(error)[:100]
        except SurgeryError as error:
            raise self.error(
                "unknown", f"{wrong} is refused with {type(error).__name__}: {error}; raise LoadError"
            ) from error
        raise self.error("unknown", f"{wrong} is loaded; raise LoadError for what does not exist")
