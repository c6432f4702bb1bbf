"""What a selection chooses from: the program's parameters with their roles and depths, and what the target names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from surgery import target
from surgery.probe import Probe
from surgery.sites import Site

if TYPE_CHECKING:
    from surgery.program import Program


@dataclass(frozen=True)
class Candidates:
    """program: as it is before the selection. targeted: parameter names that the target selected."""

    program: Program
    targeted: tuple[str, ...]
    probe: Probe

    @cached_property
    def roles(self) -> dict[str, str]:
        """Role of the site that a parameter belongs to, its bias included; absent for what is at no site."""
        return roles_of(self.program)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Site by the name of its weight."""
        return {site.weight: site for site in self.program.sites if site.weight is not None}

    @property
    def biases(self) -> set[str]:
        """Parameters that a site adds as its bias, norms' included."""
        return {site.bias for site in self.program.sites if site.bias is not None}

    @property
    def everything(self) -> tuple[str, ...]:
        """Every parameter of the base (and of structural passes), adapters left out."""
        return tuple(n for n in self.program.parameter_names() if n in self.program.names)

    @property
    def depth(self) -> dict[str, int]:
        """Depth by parameter name: 0 before the first block, then the blocks, then what follows them."""
        return self.program.view.depth

    def named(self, pattern: str) -> tuple[str, ...]:
        """Parameter names that another target names. Raises TargetError where it misses."""
        return select(self.program, pattern)


def roles_of(program: Program) -> dict[str, str]:
    return {n: site.role for site in program.sites for n in (site.weight, site.bias) if n is not None}


def select(program: Program, pattern: str) -> tuple[str, ...]:
    """Names of the program's parameters that a target names."""
    names = tuple(program.parameter_names())
    aliases = program.names
    return target.select_parameters(names, roles_of(program), pattern, lambda n: aliases.get(n, (n,)))
