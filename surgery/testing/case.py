"""One pass on one program, as the checks use it: applied, with random parameters, and with inputs to run."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.capture import fresh_inputs, other_sizes
from surgery.common.errors import CaptureError
from surgery.engine.base import hash_graph
from surgery.engine.change.plans import PassPlan, SitePlan
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.contract.numerics import Numerics
from surgery.engine.contract.observe import Observed, observe
from surgery.engine.formats import ApplyOptions
from surgery.engine.journal import Entry, Journal
from surgery.engine.program import Program
from surgery.engine.restore import reverted
from surgery.export.program import parity_inputs, reaching_inputs
from surgery.graph.sites import Site
from surgery.testing.perturbed import perturbed

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class ConformanceError(AssertionError):
    """A pass breaks its contract.

    Attributes:
        pass_name: Name of the application.
        check: Name of the check that failed.
        site: Path of the site, or "" if the failure is not about a site.
    """

    def __init__(self, pass_name: str, check: str, message: str, site: str = "") -> None:
        self.pass_name, self.check, self.site = pass_name, check, site
        super().__init__(f"{pass_name}: {check}{f' at {site}' if site else ''}: {message}")


class Skip(Exception):
    """A check does not apply; the message is the reason."""


def exactly(sites: Iterable[Site]) -> str:
    """A target that names exactly these sites."""
    return ",".join(f"re:^{re.escape(site.path)}$" for site in sites)


@dataclass
class Case:
    """A pass and a program to check it on.

    Attributes:
        pass_: The pass.
        program: The program that it is applied to; its constant parameters (zero biases) get noise.
        seed: Seed of random parameters and inputs.
        scale: Size of random parameters, see `check_pass`.
        folder: Directory for files that checks write.
    """

    pass_: Pass
    program: Program
    seed: int
    scale: float
    folder: Path

    def __post_init__(self) -> None:
        self.program = perturbed(self.program, self.seed)
        self.before = {name: fingerprint(t) for name, t in self.program.state().items()}
        self.base_before = {name: fingerprint(t) for name, t in self.program.base.tensors.items()}
        self.base_hash = self.program.base.graph_hash
        self.graph_hash = hash_graph(self.program.graph)
        self.reference = self.program.run()

    def error(self, check: str, message: str, site: str = "") -> ConformanceError:
        """The error for a failed check of this pass.

        Args:
            check: Name of the check.
            message: Description of the failure.
            site: Path of the site, or "".
        """
        return ConformanceError(self.pass_.entry_id, check, message, site)

    @property
    def rewrite(self) -> RewritePass:
        """The pass, if it rewrites the graph; raises Skip for a selection."""
        if not isinstance(self.pass_, RewritePass):
            raise Skip("a selection changes no graph")
        return self.pass_

    @property
    def declared(self) -> Numerics:
        """Numerics that the pass declares for the dtype of this program."""
        return self.pass_.numerics.on(self.program.precision)

    # -- programs

    @cached_property
    def adapted(self) -> Program:
        """The program with the pass applied and its initial parameters."""
        return self.apply(self.program, self.pass_)

    @cached_property
    def random(self) -> Program:
        """The program with the pass applied and random trainable tensors. Do not train it; see `to_train`."""
        return self.fresh()

    def fresh(
        self, pass_: Pass | None = None, program: Program | None = None, **options: Unpack[ApplyOptions]
    ) -> Program:
        """A new program with a pass applied and its trainable tensors randomized.

        Args:
            pass_: The pass; that of the case by default.
            program: The program to apply it to; that of the case by default.
            options: Options of `Program.apply`.
        """
        applied = self.apply(program or self.program, pass_ or self.pass_, **options)
        self.randomise(applied, applied.journal.entries[-1])
        return applied

    def apply(self, program: Program, pass_: Pass, **options: Unpack[ApplyOptions]) -> Program:
        """Apply a pass with the seed of the case, without verification.

        Args:
            program: The program.
            pass_: The pass.
            options: Options of `Program.apply`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            with warnings.catch_warnings():
                # The kit's models have layers that the pass does not accept; the check `untouched` counts the user's.
                warnings.filterwarnings("ignore", message=r"\S+ leaves out \d+ of", category=UserWarning)
                return program.apply(pass_, verify=False, **options)

    def once_only(self, again: Pass) -> str:
        """Reason why every site of the first application refuses a second one, naming the first; or ""."""
        here = {planned.site.key for planned in self.accepted}
        planned = self.random.plan(again, freeze_base=False).passes[-1]
        reasons = [str(p.refusal) for p in planned.refused if p.site.key in here]
        if planned.accepted or not all(repr(self.entry.id) in reason for reason in reasons):
            return ""
        return f"a second is refused at each of {len(reasons)} sites: {reasons[0]}" if reasons else ""

    def randomise(self, program: Program, entry: Entry) -> None:
        """Add noise to the trainable tensors of an entry, in place.

        The standard deviation is `scale` / sqrt(fan-in), so that an inserted branch has about the scale of the base.
        Base parameters that only this entry lets train get noise of `scale` / 5 of their mean magnitude.

        Args:
            program: The program.
            entry: The entry.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        with torch.no_grad():
            for name in entry.tensor_names:
                tensor = program.tensors[name]
                if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
                    fan = tensor.numel() // tensor.shape[0] if tensor.dim() > 1 else 4
                    noise = torch.randn(tensor.shape, generator=generator) * (self.scale / max(fan, 1) ** 0.5)
                    tensor.add_(noise.to(tensor.dtype))
            others = Journal(tuple(e for e in program.journal if e.id != entry.id))
            for name in reverted([entry], others, program.base.names):
                tensor = program.module().get_parameter(name)
                mask = program.tensors[entry.masks[name]] if name in entry.masks else True
                spread = self.scale / 5 * tensor.abs().mean() + 1e-3
                noise = torch.randn(tensor.shape, generator=generator) * spread * mask
                tensor.add_(noise.to(tensor.dtype))

    @staticmethod
    def to_train(program: Program) -> Program:
        """A copy of the program with its own storage, so that training it changes nothing else."""
        tensors, changed = program.copies()
        return Program(program.base, program.journal, tensors, changed)

    # -- the application

    @property
    def entry(self) -> Entry:
        """Journal entry of the pass."""
        return self.adapted.journal.entries[-1]

    @property
    def plan(self) -> PassPlan:
        """Plan of the pass."""
        return self.adapted.reports[-1].plan

    @property
    def accepted(self) -> list[SitePlan]:
        """Sites that the pass accepted."""
        return self.plan.accepted

    @property
    def trainable(self) -> list[str]:
        """Names of inserted tensors that the pass declares trainable."""
        names = (
            record.tensors[name]
            for site, record in zip(self.accepted, self.entry.sites, strict=True)
            for name, spec in site.specs.items()
            if spec.trainable
        )
        return list(dict.fromkeys(names))

    # -- inputs

    @cached_property
    def inputs(self) -> list[Inputs]:
        """The example inputs, random inputs of the same shape, and inputs with other sizes of dynamic dimensions."""
        args, kwargs = self.program.example_inputs
        return [(args, kwargs), *((a, dict(k)) for a, k in parity_inputs(self.program, self.seed))]

    @cached_property
    def other(self) -> Inputs | None:
        """Inputs with other sizes of all dynamic dimensions; None if there is no dynamic dimension."""
        captured = self.random.captured
        try:
            sizes = other_sizes(captured)
        except CaptureError:
            return None
        return fresh_inputs(captured, sizes, self.seed) if sizes else None

    @cached_property
    def reaching(self) -> list[Inputs]:
        """Inputs with which the inserted part affects the outputs; empty if it does with the inputs above."""
        return [(a, dict(k)) for a, k in reaching_inputs(self.random, self.inputs)]

    @property
    def exercised(self) -> Inputs:
        """One set of inputs with which the inserted part affects the outputs."""
        return (self.reaching or self.inputs)[0]

    def compare(
        self, a: Program, b: Program, inputs: list[Inputs] | None = None, more: bool = False
    ) -> Observed:
        """Compare the outputs of two programs on several inputs.

        Args:
            a: The first program.
            b: The second program.
            inputs: Inputs to run; `self.inputs` by default.
            more: Ignore additional outputs of `b` if the pass adds outputs.

        Returns:
            The largest difference over all inputs.
        """
        sets = self.inputs if inputs is None else inputs
        more = more and self.pass_.expectations.adds_outputs
        seen = [observe(a.run(*args, **kwargs), b.run(*args, **kwargs), more) for args, kwargs in sets]
        return Observed(all(s.equal for s in seen), max(s.difference for s in seen))

    @cached_property
    def moved(self) -> float:
        """Change of the outputs by random parameters, relative to their scale."""
        moved = self.compare(self.program, self.random, more=True).difference
        if 0 < moved < math.inf:
            return moved
        # Outputs that the pass adds, or inputs that reach the inserted part, are not in that comparison.
        return self.compare(self.adapted, self.random, self.inputs + self.reaching).difference

    @cached_property
    def merge_tolerance(self) -> float:
        """Allowed difference of a merge: that of the engine; in fp32 and fp64 also at most 1/50 of `moved`."""
        dtypes = {t.dtype for t in self.program.base.tensors.values() if t.is_floating_point()}
        allowed = self.program.merge_tolerance
        return min(allowed, self.moved / 50) if dtypes <= {torch.float32, torch.float64} else allowed

    def on_one_site(self, site: Site) -> Pass:
        """The same pass on one site only, to find the site that causes a failure."""
        return self.pass_.model_copy(update={"target": exactly([site])})


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Key of a tensor that is equal if dtype, shape and bits are equal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), data


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a structure of outputs."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
