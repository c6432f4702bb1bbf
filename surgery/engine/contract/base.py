"""What a pass is: a frozen pydantic model whose fields are its options, and a few short methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor, fx

from surgery.common.errors import PassError, SurgeryError
from surgery.common.options import Configured
from surgery.engine.contract.folds import Absorber, MergeFrom, MergeLonger, MergeOp
from surgery.engine.contract.numerics import EXACT, Numerics
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site, SiteKey
from surgery.graph.targets import select_sites

if TYPE_CHECKING:
    from surgery.engine.contract.combination import Combination
    from surgery.graph.view import View


class Pass(Configured):
    """Base of all passes; see Configured for its options.

    requires: names of passes, one of which has to be applied already. conflicts: name of a pass -> why the two
    cannot stand in one program. before: names of passes that this one has to precede; in one pipeline it is put
    before them, and a site that one of them holds already is refused.
    """

    kind: ClassVar[str] = "pass"
    failure: ClassVar[type[SurgeryError]] = PassError
    numerics: ClassVar[Numerics] = EXACT
    version: ClassVar[int] = 1
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[Mapping[str, str]] = {}
    before: ClassVar[tuple[str, ...]] = ()

    target: str | None = Field(
        None, description="which sites: roles, paths, names; comma-separated, ! excludes"
    )
    label: str = Field(
        "",
        alias="as",
        pattern=r"^[A-Za-z0-9_-]*$",
        description="a name of your own for this application of the pass: letters, digits, - and _",
    )

    @property
    def entry_id(self) -> str:
        return f"{self.name}:{self.label}" if self.label else self.name

    @property
    def attribute(self) -> str:
        """The last-but-one component of the names of the tensors it adds."""
        return f"{self.name}_{self.label}" if self.label else self.name

    @property
    def contract(self) -> Numerics:
        """What these options may do to the outputs at insertion."""
        return self.numerics

    @property
    def extends(self) -> bool:
        """Whether the program returns more with it: further outputs, or further columns of one.

        The contract then holds for what it returned before; see surgery.engine.contract.observe.shared.
        """
        return False


class RewritePass(Pass):
    """A pass that acts at sites, one at a time, and never looks further than its site.

    on: kinds of weight it accepts. default_target: used when no target is given (None: one is required).
    partial: it can act on parts of a fused projection. weightable: what it adds can be scaled (`g.weight`).
    mergeable: `merge` gives what the base weights become. freezes: the pipeline freezes the base before it,
    unless the user selects what trains. structural: the tensors it adds are weights of ops like the base's own,
    which later passes target. replaces: at its sites the op no longer reads the base's own weight, so that nothing
    can be folded into that there, whichever came first. beside: what it adds stands beside the ops of its sites, so
    that other adapters there are folded as if it were absent. lengthens: folding it makes weights longer, so that
    everything which reads these has to be folded with it. makes_zeros: it leaves zeros in weights, which what is folded
    there later has to keep; keeps_zeros: its fold does (it scales them, makes more, or is of other values). unwritten:
    ops that it inserts which have no form in ONNX -> why, and what to do.
    """

    on: ClassVar[tuple[str, ...]] = ("linear",)
    default_target: ClassVar[str | None] = None
    partial: ClassVar[bool] = False
    weightable: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    structural: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    beside: ClassVar[bool] = False
    lengthens: ClassVar[bool] = False
    makes_zeros: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False
    regroups: ClassVar[bool] = False
    unwritten: ClassVar[Mapping[Any, str]] = {}
    absorber: ClassVar[Absorber | None] = None

    @property
    def rounding(self) -> tuple[Any, ...]:
        """Ops of what these options insert that round their first argument, an activation, to a few steps."""
        return ()

    @property
    def can_weigh(self) -> bool:
        """Whether what these options add can be scaled."""
        return self.weightable

    @property
    def adds_weights(self) -> bool:
        """Whether the tensors that these options add are weights of ops like the base's own (`structural`)."""
        return self.structural

    @property
    def reads_weight(self) -> bool:
        """Whether what these options insert computes with the weight of its op (its norms, say)."""
        return False

    @property
    def leads(self) -> bool:
        """Whether it makes anew what adapters would stand on (copies of blocks, another head): these come after it."""
        return False

    @property
    def in_place(self) -> bool:
        """Whether what these options do at a site is done in one layer, so that a live module can hold it."""
        return not self.adds_weights

    def mixes_positions(self, site: Site) -> bool:
        """Whether what is added reads other positions of the sequence than its own: with a cache of keys and values,
        a layer sees the new ones only."""
        return False

    @property
    def detaches(self) -> str:
        """Why the gradient is not that of the outputs (something is held constant by design), or empty."""
        return ""

    @property
    def redirects(self) -> str:
        """Why gradients of the base itself are others with it although the outputs are the same, or empty."""
        return ""

    def find(self, view: View) -> list[Site]:
        """The sites that the target names. Raises TargetError, PassError without a target."""
        asked = self.target or self.default_target
        if asked is None:
            raise PassError(f"pass {self.name!r} needs a target, such as --target 'attn.*'")
        return [site for site in select_sites(view.sites.sites, asked) if not self.skips(site)]

    def own_places(self, view: View) -> Mapping[SiteKey, Site] | None:
        """Where a journalled application can be replayed, by key; None: at the sites of the graph."""
        return None

    def nothing(self, view: View) -> str:
        """What is said where it finds no site at all."""
        return "it has nothing to do at what the target names; target other sites"

    def skips(self, site: Site) -> bool:
        """Whether a targeted site is none of this pass's business, so that it is no refusal either."""
        return False

    def check(self, site: Site) -> str | None:
        """None, or the reason why this site is refused."""
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        """Everything data-dependent, JSON-able: written to the journal and replayed as `site.decided`.

        `site.probe` has the program's tensors, activations and gradients here.
        """
        return {}

    def note(self, site: Site) -> str:
        """What a person should read about this site in a plan, from `site.decided`; or nothing."""
        return ""

    def selects(self, site: Site) -> dict[str, bool]:
        """Parameters of the base that this pass makes train (or stop), by name."""
        return {}

    def frees(self, site: Site) -> set[str]:
        """Parameters that nothing reads once this is applied here, by name; the plan says what is saved."""
        return set()

    def limits(self, site: Site) -> dict[str, int]:
        """New upper bounds of dynamic dimensions, by name: a prompt leaves fewer positions."""
        return {}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """The tensors this pass adds at a site; shapes depend on options and `site.decided` alone."""
        return {}

    def tensor_prefix(self, site: Site) -> str:
        """What the engine puts before the name of each tensor that this pass adds at a site."""
        owner, _, leaf = site.key.owner.rpartition(".")
        stem = self.attribute if leaf == "weight" else f"{leaf}_{self.attribute}"
        if site.key.ordinal:
            stem += f"_use{site.key.ordinal + 1}"
        return f"{owner}.{stem}" if owner else stem

    def tensor_names(self, site: Site) -> dict[str, str]:
        """Names of tensors in the program, for those that the engine's own naming does not suit."""
        return {}

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        """The value that replaces the output at one call of the site."""
        raise NotImplementedError

    @property
    def pacing(self) -> tuple[tuple[int, int | None], str] | None:
        """The steps [first, last) in which its own tensors change as training goes on (`pace`), and what a step is,
        "step" or "epoch"; None: they never do."""
        return None

    def due(self, step: int) -> float:
        """What `pace` makes of a step: while that is the same, nothing is to be done."""
        return 0.0

    def pace(
        self, step: int, places: Sequence[tuple[Mapping[str, Any], Tensor, Mapping[str, Tensor]]]
    ) -> None:
        """Change its own tensors in place for a step of the training, without gradients.

        places: what was decided at each site, its weight as it is now, and the pass's tensors by their names in it.
        May be called with any step at any time, also again from 0 in a loaded program.
        """

    def reaching(self, site: Site, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by placeholder name, as given or changed so that what was inserted takes part in the outputs.

        For a pass that the example inputs do not reach (new tokens): exports and the kit try these too.
        """
        return dict(inputs)

    @property
    def simplifies(self) -> bool:
        """Whether what these options add has a plainer form, computed once when the program is merged (`simplify`)."""
        return False

    def simplify(self, places: Sequence[tuple[Site, Mapping[str, Tensor]]]) -> list[dict[str, Tensor]]:
        """The tensors of that form at each place, from those as trained, by their names in the pass.

        `rewrite` then finds these in place of the others, and `site.decided["simplified"]` true. One that keeps its
        name stays the tensor that it is.
        """
        raise NotImplementedError

    def keeps(self, site: Site) -> str | None:
        """None, or why this site cannot be folded although the pass is mergeable."""
        return None

    def merge(
        self, site: Site, tensors: Mapping[str, Tensor], weight: float
    ) -> Mapping[str, MergeOp | MergeFrom | MergeLonger]:
        """What the base's weight (and bias) become: {"weight": op, "bias": op}."""
        raise NotImplementedError

    @classmethod
    def combine(
        cls, places: Sequence[Place], how: Combination, label: str
    ) -> tuple[RewritePass, list[dict[str, Tensor]]]:
        """One application of this pass for several, and at each place its tensors, by their names in the pass.

        See `Program.combine`. Raises PassError for what cannot be combined so.
        """
        raise PassError(f"combine: {cls.name} has no form in which several are one; switch them instead")


class GraphPass(RewritePass):
    """A pass that acts on places of the whole program: residual branches, attentions, blocks, ends.

    A place is keyed to the weight site that it is found by. `rewrite` is called once for each, returns nothing,
    and may look at all of `g.view`; it inserts with `g.call` and puts values in place with `g.wrap`.
    """

    on: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts", "norm")

    @property
    def in_place(self) -> bool:
        return False

    def candidates(self, view: View) -> list[Site]:
        """Every place that this pass could act on, by dataflow, as the site that it is keyed to."""
        raise NotImplementedError

    def finish(self, sites: Sequence[Site], g: Rewriter) -> None:
        """Called once when all places have been rewritten, for what depends on all of them."""

    def find(self, view: View) -> list[Site]:
        """The candidates, or those of them that the target names."""
        found = self.candidates(view)
        asked = self.target or self.default_target
        return select_sites(found, asked) if asked is not None and found else found


@dataclass(frozen=True)
class Source:
    """One adapter at a place: its name in the journal, its pass, its tensors by their names in the pass, its weight."""

    entry: str
    pass_: RewritePass
    tensors: Mapping[str, Tensor]
    weight: float


@dataclass(frozen=True)
class Place:
    """A site, as the sources have decided there, and those of them that act on it."""

    site: Site
    sources: tuple[Source, ...]
