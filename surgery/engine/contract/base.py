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
        version: Version of what the journal stores for the pass: its options and tensors. A pass that raises it can
            define `migrate(options, tensors, version)`, a class or static method; see surgery.store.migrate.
        requires: Names of passes; one of them must be applied already or be in the same pipeline.
        before: Names of passes that must come later. Within a pipeline they are moved behind this one. A site where
            one of them is applied already is refused.
        target: Sites to act on; see `surgery.graph.targets`.
        label: User-defined name of this application, "" for none.
    """

    # A subclass may assign these without an annotation: `numerics = EXACT`.
    model_config = ConfigDict(ignored_types=(Numerics, Effect, Expectations))

    _kind: ClassVar[str] = "pass"
    _failure: ClassVar[type[SurgeryError]] = PassError
    version: ClassVar[int] = 1
    requires: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()

    target: str | None = Field(
        default=None, description="which sites: roles, paths, names; comma-separated, ! excludes"
    )
    label: str = Field(
        default="",
        # Not `alias`: type checkers would then ask for an argument `as`, which Python does not allow.
        validation_alias="as",
        serialization_alias="as",
        pattern=r"^[A-Za-z0-9_-]*$",
        max_length=100,
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
        """Largest change of the outputs that inserting the pass with these options may cause."""
        return EXACT

    @property
    def expectations(self) -> Expectations:
        """Deliberate differences that verification, export and the conformance kit must not report as errors."""
        return Expectations()


class RewritePass(Pass):
    """A pass that acts at sites, one at a time, and depends only on its site.

    A subclass defines `name`, its options, and `rewrite`; most define `tensors` too. Everything else has a default.

    Attributes:
        on: Kinds of weight that the pass accepts.
        default_target: Target used when none is given; None: a target is required.
        combiner: Function that combines several applications into one (`Program.combine`); None: not supported.
        absorber: Function that merges adapters into the pass's quantized codes; None: the pass has no codes.
    """

    on: ClassVar[tuple[str, ...]] = ("linear",)
    default_target: ClassVar[str | None] = None
    combiner: ClassVar[Combiner | None] = None
    absorber: ClassVar[Absorber | None] = None

    @property
    def effect(self) -> Effect:
        """Effect of the pass with these options on a program, which determines its order, freezing and merging."""
        return ADAPTER

    # -- where

    def find(self, view: View) -> list[Site]:
        """Sites that the target names.

        Raises:
            TargetError: The target, or a term of it, matches no site.
            PassError: No target is given and the pass has no default.
        """
        asked = self.target or self.default_target
        if asked is None:
            raise PassError(f"pass {self.name!r} needs a target, such as --target 'attn.*'")
        return select_sites(view.sites.sites, asked)

    def check(self, site: Site) -> str | None:
        """Reason why this site is refused, as a clause with a remedy; None if it is accepted."""
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        """All data-dependent choices at a site, JSON-able.

        The journal stores them, and a replay provides them as `site.decided`. Use `site.probe` to read tensors,
        activations and gradients of the program here.
        """
        return {}

    # -- what is added

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Tensors that the pass adds at a site, by their names in the pass.

        Shapes may depend only on options and `site.decided`, since a replay measures nothing.
        """
        return {}

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Full name in the program of each tensor; see `default_names` and `shared_names`.

        A pass may give a tensor that is declared `shared` any name that is the same at every site that shares it.

        Args:
            site: The site, with `site.decided`.
            tensors: The tensors that `tensors(site)` returned.
        """
        return default_names(self, site, tensors) | shared_names(self, site, tensors)

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        """Rewrite one call of a site.

        It runs again whenever a graph is built, so it must depend only on options, `site.decided` and `g`.

        Args:
            site: The site, with `site.decided`.
            g: Editor of the graph; `g["A"]` is the graph value of the pass's tensor "A".

        Returns:
            The value that replaces the output of the call; None to keep the output.
        """
        raise NotImplementedError

    def outcome(self, site: Site) -> Outcome:
        """Other consequences at an accepted site, derived from `site.decided`; the plan shows them."""
        return Outcome()

    @property
    def gradual(self) -> Gradual | None:
        """The schedule on which the pass changes its own tensors during training, or None."""
        return None

    # -- merging

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        """Changes of the base's weight and bias: {"weight": fold, "bias": fold}.

        A pass is mergeable if its class defines this method.

        Args:
            site: The site, with `site.decided`.
            tensors: Tensors of the pass at the site, by their names in the pass.
            weight: Scale of this application; 1 as trained.
        """
        raise NotImplementedError

    def why_not_merged(self, site: Site) -> str | None:
        """Reason why this site cannot be merged although the pass defines `merge`; None if it can be merged."""
        return None

    @property
    def simplify(self) -> Simplify | None:
        """Function that computes a simpler form when a program is merged, or None if there is none.

        Its argument is a list of (site, tensors as trained); it returns the tensors of the simpler form at each site.
        `rewrite` then gets these tensors, with `site.decided["simplified"]` true. A tensor with the name of an existing
        one is not replaced.
        """
        return None


def merges(pass_: Pass | type[Pass]) -> bool:
    """True if the pass can be merged into base weights, that is, if its class defines `merge`."""
    cls = pass_ if isinstance(pass_, type) else type(pass_)
    return issubclass(cls, RewritePass) and cls.merge is not RewritePass.merge


def with_defaults(cls: type[RewritePass]) -> RewritePass:
    """An instance with default options, without validation, to read properties that depend on options."""
    return cls.model_construct()


def attribute_of(pass_: Pass) -> str:
    """Component of tensor names that stands for an application of a pass: "lora", or "lora_film" with a label."""
    return f"{pass_.name}_{pass_.label}" if pass_.label else pass_.name


def default_names(pass_: Pass, site: Site, tensors: Iterable[str], suffix: str = "") -> dict[str, str]:
    """Full names of tensors at a site: encoder.query.weight gets encoder.query.lora.A.

    Args:
        pass_: The pass that adds them.
        site: The site. If its parameter is not called "weight", the parameter's name comes first:
            `in_proj_weight_lora`.
        tensors: Names in the pass.
        suffix: Text after the pass's component, for tensors that a merge adds.
    """
    owner, _, leaf = site.key.owner.rpartition(".")
    stem = attribute_of(pass_) if leaf == "weight" else f"{leaf}_{attribute_of(pass_)}"
    if site.key.ordinal:
        stem += f"_use{site.key.ordinal + 1}"
    prefix = f"{owner}.{stem}{suffix}" if owner else f"{stem}{suffix}"
    return {name: f"{prefix}.{name}" for name in tensors}


def shared_names(pass_: Pass, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Full names of the tensors that several sites share, by their names in the pass: vera.A_8x64 for a shared A.

    Sites share by shape and dtype, so the name has the shape, and the dtype if it is not float32. What a site has then
    does not depend on which other sites are targeted.

    Args:
        pass_: The pass that adds them.
        site: The site.
        tensors: All tensors of the pass at the site.
    """
    found = {}
    for name, spec in tensors.items():
        if spec.shared:
            dtype = str(spec.dtype or site.float_dtype).removeprefix("torch.")
            shape = "x".join(str(int(size)) for size in spec.shape)
            parts = (name, shape, "" if dtype == "float32" else dtype)
            found[name] = f"{attribute_of(pass_)}.{'_'.join(part for part in parts if part)}"
    return found


class GraphPass(RewritePass):
    """A pass that acts on places of the whole program: residual branches, attentions, blocks, inputs and outputs.

    A place is identified by a weight site. `rewrite` is called once for each place and returns nothing: it may read all
    of `g.view`, inserts values with `g.call` and replaces values with `g.wrap`.
    """

    on: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts", "norm")

    @property
    def effect(self) -> Effect:
        """Effect of the pass; an adapter that changes more than one layer by default."""
        return replace(ADAPTER, one_layer=False)

    def candidates(self, view: View) -> list[Site]:
        """Every place that the pass can act on, as the site that identifies it."""
        raise NotImplementedError

    def finish(self, sites: Sequence[Site], g: Rewriter) -> None:
        """Make edits that depend on all places; called once, after `rewrite` at every place."""

    def find(self, view: View) -> list[Site]:
        """The candidates that the target names; all of them without a target."""
        found = self.candidates(view)
        asked = self.target or self.default_target
        return select_sites(found, asked) if asked is not None and found else found


@dataclass(frozen=True)
class Source:
    """One adapter at a place, as an input of a combination.

    Attributes:
        entry: Id of its journal entry.
        pass_: Its pass.
        tensors: Its tensors at the place, by their names in the pass.
        weight: Its weight in the combination.
    """

    entry: str
    pass_: RewritePass
    tensors: Mapping[str, Tensor]
    weight: float


@dataclass(frozen=True)
class Place:
    """A site and the adapters to combine there.

    Attributes:
        site: The site, with the decisions of the sources.
        sources: The adapters that act at the site.
    """

    site: Site
    sources: tuple[Source, ...]
