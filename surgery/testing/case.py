"""One pass on one program, as the checks see it: applied, with random parameters, with inputs to try."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
from surgery.engine.journal import Entry, Journal
from surgery.engine.program import Program
from surgery.engine.restore import reverted
from surgery.export.program import parity_inputs, reaching_inputs
from surgery.graph.sites import Site

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class ConformanceError(AssertionError):
    """A pass breaks its contract. pass_name, check, site: where; site is empty where it is not about one."""

    def __init__(self, pass_name: str, check: str, message: str, site: str = "") -> None:
        self.pass_name, self.check, self.site = pass_name, check, site
        super().__init__(f"{pass_name}: {check}{f' at {site}' if site else ''}: {message}")


class Skip(Exception):
    """A check does not apply; the message says why."""


def exactly(sites: Iterable[Site]) -> str:
    """A target of just these sites."""
    return ",".join(f"re:^{re.escape(site.path)}$" for site in sites)


@dataclass
class Case:
    """See check_pass. folder: for files."""

    pass_: Pass
    program: Program
    seed: int
    scale: float
    folder: Path

    def __post_init__(self) -> None:
        self.before = {name: fingerprint(t) for name, t in self.program.state().items()}
        self.base_before = {name: fingerprint(t) for name, t in self.program.base.tensors.items()}
        self.base_hash = self.program.base.graph_hash
        self.graph_hash = hash_graph(self.program.graph)
        self.reference = self.program.run()

    def error(self, check: str, message: str, site: str = "") -> ConformanceError:
        return ConformanceError(self.pass_.entry_id, check, message, site)

    @property
    def rewrite(self) -> RewritePass:
        """The pass; skips the check for a selection."""
        if not isinstance(self.pass_, RewritePass):
            raise Skip("a selection changes no graph")
        return self.pass_

    @property
    def declared(self) -> Numerics:
        """The pass's contract for the dtype of this program."""
        return self.pass_.contract.on(self.program.precision)

    # -- programs

    @cached_property
    def adapted(self) -> Program:
        """The pass applied, as at insertion."""
        return self.apply(self.program, self.pass_)

    @cached_property
    def random(self) -> Program:
        """The pass applied, its trainable tensors moved at random; see `to_train`."""
        return self.fresh()

    def fresh(self, pass_: Pass | None = None, program: Program | None = None, **options: Any) -> Program:
        """A program of its own with the pass applied and its trainable tensors moved at random."""
        applied = self.apply(program or self.program, pass_ or self.pass_, **options)
        self.randomise(applied, applied.journal.entries[-1])
        return applied

    def apply(self, program: Program, pass_: Pass, **options: Any) -> Program:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return program.apply(pass_, verify=False, **options)

    def once_only(self, again: Pass) -> str:
        """Why a second application is refused at every site of the first: because of that one, by its name; or ""."""
        here = {planned.site.key for planned in self.accepted}
        planned = self.random.plan(again, freeze_base=False).passes[-1]
        reasons = [str(p.refusal) for p in planned.refused if p.site.key in here]
        if planned.accepted or not all(repr(self.entry.id) in reason for reason in reasons):
            return ""
        return f"a second is refused at each of {len(reasons)} sites: {reasons[0]}" if reasons else ""

    def randomise(self, program: Program, entry: Entry) -> None:
        """Noise of `scale` over the root of the fan-in: what is inserted then weighs about as much as the base.

        What the pass alone lets train of the base moves too, by a tenth of its own size.
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
        """The program over storage of its own, so that training it moves nothing else."""
        tensors, changed = program.copies()
        return Program(program.base, program.journal, tensors, changed)

    # -- what it did

    @property
    def entry(self) -> Entry:
        return self.adapted.journal.entries[-1]

    @property
    def plan(self) -> PassPlan:
        return self.adapted.reports[-1].plan

    @property
    def accepted(self) -> list[SitePlan]:
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
        """The example, fresh inputs of its shape, and at another size of every dynamic dimension."""
        args, kwargs = self.program.example_inputs
        return [(args, kwargs), *((a, dict(k)) for a, k in parity_inputs(self.program, self.seed))]

    @cached_property
    def other(self) -> Inputs | None:
        """Inputs at another size of every dynamic dimension; None where all are fixed."""
        captured = self.random.captured
        try:
            sizes = other_sizes(captured)
        except CaptureError:
            return None
        return fresh_inputs(captured, sizes, self.seed) if sizes else None

    @cached_property
    def reaching(self) -> list[Inputs]:
        """Inputs in which what the pass inserted takes part, where those above do not make it."""
        return [(a, dict(k)) for a, k in reaching_inputs(self.random, self.inputs)]

    @property
    def exercised(self) -> Inputs:
        """One set of inputs in which what the pass inserted takes part."""
        return (self.reaching or self.inputs)[0]

    def compare(
        self, a: Program, b: Program, inputs: list[Inputs] | None = None, more: bool = False
    ) -> Observed:
        """The worst over all inputs. more: b may return more than a, where the pass extends outputs."""
        sets = self.inputs if inputs is None else inputs
        more = more and self.pass_.extends
        seen = [observe(a.run(*args, **kwargs), b.run(*args, **kwargs), more) for args, kwargs in sets]
        return Observed(all(s.equal for s in seen), max(s.difference for s in seen))

    @cached_property
    def moved(self) -> float:
        """How far random parameters move the outputs, over their scale: those of before, or else the new ones."""
        moved = self.compare(self.program, self.random, more=True).difference
        if 0 < moved < math.inf:
            return moved
        return self.compare(self.adapted, self.random, self.inputs + self.reaching).difference

    @cached_property
    def merge_tolerance(self) -> float:
        """What the engine allows a merge; in single precision also at most a fiftieth of what there is to merge."""
        dtypes = {t.dtype for t in self.program.base.tensors.values() if t.is_floating_point()}
        allowed = self.program.merge_tolerance
        return min(allowed, self.moved / 50) if dtypes <= {torch.float32, torch.float64} else allowed

    def on_one_site(self, site: Site) -> Pass:
        """The same pass on one site alone, to find the one that is at fault."""
        return self.pass_.model_copy(update={"target": exactly([site])})


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Equal where dtype, shape and bits are."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), data


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
