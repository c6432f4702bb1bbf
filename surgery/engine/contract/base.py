"""The base classes of passes: frozen pydantic models whose fields are their options, with a few short methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field
from torch import Tensor, fx

from surgery.common.errors import PassError, SurgeryError
from surgery.common.options import Configured
from surgery.engine.contract.effect import ADAPTER, Effect
from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.folds import Absorber, Combiner, Fold
from surgery.engine.contract.gradual import Gradual
from surgery.engine.contract.numerics import EXACT, Numerics
from surgery.engine.contract.renamed import refuse_renamed
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.targets import select_sites

if TYPE_CHECKING:
    from surgery.graph.view import View

# (site, its tensors as trained) for every site -> the tensors of a simpler form at each, by their names in the pass.
Simplify = Callable[[Sequence[tuple[Site, Mapping[str, Tensor]]]], list[dict[str, Tensor]]]


class Pass(Configured):
    """Base of all passes; see Configured for the options.

    Attributes:
        name: Name on the command line and in journals.
        version: Version of what the journal stores for the pass.
        requires: Names of passes; one of them must be applied already, or in the same pipeline.
        before: Names of passes that must come later. Within a pipeline they are moved behind this one; a site where
            one of them is applied already is refused.
    """

    # A subclass may assign these without an annotation: `numerics = EXACT`.
    model_config = ConfigDict(ignored_types=(Numerics, Effect, Expectations))

    _kind: ClassVar[str] = "pass"
    _failure: ClassVar[type[SurgeryError]] = PassError
    version: ClassVar[int] = 1
    requires: ClassVar[tuple[str, ...]] = ()
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

    @classmethod
    def __pydantic_init_subclass__(cls, **given: Any) -> None:
        super().__pydantic_init_subclass__(**given)
        refuse_renamed(cls)

    @property
    def entry_id(self) -> str:
        """Name of this application in the journal, such as "lora:film"."""
        return f"{self.name}:{self.label}" if self.label else self.name

    @property
    def numerics(self) -> Numerics:
        """How far inserting the pass with these options may move the outputs."""
        return EXACT

    @property
    def expectations(self) -> Expectations:
        """Deliberate differences, which verification, export and the conformance kit must know."""
        return Expectations()


class RewritePass(Pass):
    """A pass that acts at sites, one at a time, and looks no further than its site.

    A subclass defines `name`, its options, and `rewrite`; most define `tensors` too. Everything else has a default.

    Attributes:
        on: Kinds of weight that the pass accepts.
        default_target: Target used when none is given; None: a target is required.
        combiner: Makes one application from several (`Program.combine`); None: they can only be switched.
        absorber: Puts adapters into the pass's own quantized codes when a program is merged; None: it has no codes.
    """

    on: ClassVar[tuple[str, ...]] = ("linear",)
    default_target: ClassVar[str | None] = None
    combiner: ClassVar[Combiner | None] = None
    absorber: ClassVar[Absorber | None] = None

    @property
    def effect(self) -> Effect:
        """What the pass with these options does to a program."""
        return ADAPTER

    # -- where

    def find(self, view: View) -> list[Site]:
        """Sites that the target names.

        Raises:
            TargetError: The target names nothing, wholly or in part.
            PassError: No target is given and the pass has no default.
        """
        asked = self.target or self.default_target
        if asked is None:
            raise PassError(f"pass {self.name!r} needs a target, such as --target 'attn.*'")
        return select_sites(view.sites.sites, asked)

    def check(self, site: Site) -> str | None:
        """None, or the reason why this site is refused, as a clause with a remedy."""
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        """Every data-dependent choice at a site, JSON-able; the journal stores it and replays it as `site.decided`.

        `site.probe` gives the program's tensors, activations and gradients here.
        """
        return {}

    # -- what is added

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Tensors that the pass adds at a site, by their names in the pass.

        Shapes may depend only on options and `site.decided`, since a replay measures nothing.
        """
        return {}

    def names(self, site: Site, tensors: Iterable[str]) -> dict[str, str]:
        """Full name in the program of each tensor; see `default_names`."""
        return default_names(self, site, tensors)

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        """The value that replaces the site's output at one call; None where nothing replaces it."""
        raise NotImplementedError

    def outcome(self, site: Site) -> Outcome:
        """What else the pass does at an accepted site, from `site.decided`; the plan shows it."""
        return Outcome()

    @property
    def gradual(self) -> Gradual | None:
        """The schedule on which the pass changes its own tensors during training, or None."""
        return None

    # -- merging

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        """Changes of the base's weight and bias: {"weight": fold, "bias": fold}. Defining it makes a pass mergeable.

        Args:
            site: The site, with `site.decided`.
            tensors: The pass's tensors there, by their names in the pass.
            weight: Scale of this application; 1 as trained.
        """
        raise NotImplementedError

    def why_not_merged(self, site: Site) -> str | None:
        """None, or the reason why this site cannot be merged although the pass defines `merge`."""
        return None

    @property
    def simplify(self) -> Simplify | None:
        """Function that computes a simpler form when a program is merged, or None where there is none.

        It gets (site, tensors as trained) for every site and returns the tensors of the simpler form at each. `rewrite`
        then finds these, and `site.decided["simplified"]` is true. A tensor that keeps its name stays as it is.
        """
        return None


def merges(pass_: Pass | type[Pass]) -> bool:
    """True if the pass can be merged into base weights, that is, if its class defines `merge`."""
    cls = pass_ if isinstance(pass_, type) else type(pass_)
    return issubclass(cls, RewritePass) and cls.merge is not RewritePass.merge


def with_defaults(cls: type[RewritePass]) -> RewritePass:
    """An instance with default options that is not validated: for facts about a pass that its options can change."""
    return cls.model_construct()


def attribute_of(pass_: Pass) -> str:
    """Component of tensor names that stands for an application of a pass: "lora", or "lora_film" with a label."""
    return f"{pass_.name}_{pass_.label}" if pass_.label else pass_.name


def default_names(pass_: Pass, site: Site, tensors: Iterable[str], suffix: str = "") -> dict[str, str]:
    """Full names of tensors at a site: encoder.query.weight gets encoder.query.lora.A.

    Args:
        pass_: The pass that adds them.
        site: A site that is no weight called "weight" has its own name in front: `in_proj_weight_lora`.
        tensors: Names in the pass.
        suffix: Text behind the pass's component, for tensors that a merge adds.
    """
    owner, _, leaf = site.key.owner.rpartition(".")
    stem = attribute_of(pass_) if leaf == "weight" else f"{leaf}_{attribute_of(pass_)}"
    if site.key.ordinal:
        stem += f"_use{site.key.ordinal + 1}"
    prefix = f"{owner}.{stem}{suffix}" if owner else f"{stem}{suffix}"
    return {name: f"{prefix}.{name}" for name in tensors}


class GraphPass(RewritePass):
    """A pass that acts on places of the whole program: residual branches, attentions, blocks, inputs and outputs.

    Each place is identified by the weight site that it is found by. `rewrite` is called once for each place and returns
    nothing; it may read all of `g.view`, inserts with `g.call` and puts values in place with `g.wrap`.
    """

    on: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts", "norm")

    @property
    def effect(self) -> Effect:
        return replace(ADAPTER, one_layer=False)

    def candidates(self, view: View) -> list[Site]:
        """Every place that this pass can act on, as the site that identifies it."""
        raise NotImplementedError

    def finish(self, sites: Sequence[Site], g: Rewriter) -> None:
        """Edits that depend on all places; called once, after each has been rewritten."""

    def find(self, view: View) -> list[Site]:
        """The candidates, or those of them that the target names."""
        found = self.candidates(view)
        asked = self.target or self.default_target
        return select_sites(found, asked) if asked is not None and found else found


@dataclass(frozen=True)
class Source:
    """One adapter at a place.

    Attributes:
        entry: Its id in the journal.
        pass_: Its pass.
        tensors: Its tensors there, by their names in the pass.
        weight: Its weight in the combination.
    """

    entry: str
    pass_: RewritePass
    tensors: Mapping[str, Tensor]
    weight: float


@dataclass(frozen=True)
class Place:
    """A site as its sources have decided it, and the sources that act there."""

    site: Site
    sources: tuple[Source, ...]
