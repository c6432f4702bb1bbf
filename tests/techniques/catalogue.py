"""Catalogue of techniques: the pass for each of the ten models, and the models on which it must work.

Options that a technique needs on some model are set here (a rank that saves parameters on a tiny model, biases that
must be added). A technique that a model does not support is applied too; the table shows the refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.api.programs import Pass, make_plugin_manager
from surgery.engine.registry import find_pass

TEXT = ("minilm", "smollm2", "t5", "vit")  # where no technique but a convolutional one may be missing
CONV_AND_SOUND = ("resnet18", "wav2vec2")
SPARSE_AND_STATE = ("mixtral", "mamba")
STATE = ("mamba", "mamba2")
ALL = (*TEXT, *CONV_AND_SOUND, *SPARSE_AND_STATE)


@dataclass(frozen=True)
class Technique:
    """One technique.

    name: name in the table. make: model -> pass. mandatory: models on which it must pass the kit. before: passes that
    are applied first, because the technique needs their result.
    """

    name: str
    family: str
    make: Callable[[str], Pass]
    mandatory: tuple[str, ...] = TEXT
    before: Callable[[str], tuple[Pass, ...]] = lambda model: ()


def of(name: str, **options: Any) -> Pass:
    """Pass of that name, built as the command line builds it."""
    return find_pass(make_plugin_manager(), name).cls.parse(options)


_LINEARS = {
    "resnet18": "layer2.*.conv*,head",
    "mixtral": "attn.q,attn.v,mlp.down",
    "mamba": "in_proj,out_proj",
    "mamba2": "ssm.*",
    "qwen3_5": "linear_attn.qkv,linear_attn.decay,linear_attn.out,attn.q,mlp.down",
}


def linears(model: str) -> str:
    """Target with a few weights of each kind that the model has."""
    return _LINEARS.get(model, "attn.q,attn.v,mlp.down")


def _always(name: str, **options: Any) -> Callable[[str], Pass]:
    return lambda model: of(name, **options)


def _at_linears(name: str, **options: Any) -> Callable[[str], Pass]:
    return lambda model: of(name, target=linears(model), **options)


def catalogue() -> list[Technique]:
    """Techniques in the order of the table."""
    return [*_additive(), *_selective(), *_reparameterisation(), *_patterns()]


def _additive() -> list[Technique]:
    family, both = "additive", (*TEXT, *CONV_AND_SOUND)
    no_vocabulary = tuple(m for m in TEXT if m != "vit")

    def bitfit(model: str) -> Pass:
        bare = model in ("smollm2", "t5", "mixtral", "mamba2", "qwen3_5")  # they have no bias at all
        return of("bitfit", **({"add_missing": True, "target": linears(model)} if bare else {}))

    def lora(**options: Any) -> Callable[[str], Pass]:
        return _at_linears("lora", rank=4, **options)

    def wider(model: str) -> Pass:
        target = {"resnet18": "layer2.1.conv1", "mixtral": None, "mamba": None, "mamba2": None}.get(
            model, "mlp.up"
        )
        return of("expand", wider=1.5, target=target)

    def side(kind: str) -> Callable[[str], Pass]:
        return lambda model: of("expand", side=kind, target=linears(model))

    return [
        Technique("lora", family, lora(), ALL),
        Technique("lora --rslora", family, lora(rslora=True), ALL),
        Technique("lora --dora", family, lora(dora=True), ALL),
        Technique("lora --init pissa", family, lora(init="pissa"), ALL),
        Technique("lora --dropout", family, lora(dropout=0.1), ALL),
        Technique("lora --bias", family, lora(bias=True), CONV_AND_SOUND),
        Technique("ia3 (plugin)", family, _at_linears("ia3"), TEXT),
        Technique("adapter --placement houlsby", family, _always("adapter", size=6), both),
        Technique(
            "adapter --placement pfeiffer", family, _always("adapter", size=6, placement="pfeiffer"), both
        ),
        Technique(
            "adapter --placement parallel", family, _always("adapter", size=6, placement="parallel"), both
        ),
        Technique("prefix", family, _always("prefix", tokens=3)),
        Technique("prefix --projection", family, _always("prefix", tokens=3, projection=True, hidden=8)),
        Technique("prompt", family, _always("prompt", tokens=3)),
        Technique("bitfit", family, bitfit, both),
        Technique("expand --deeper", family, _always("expand", deeper=1), both),
        Technique("expand --wider", family, wider, both),
        Technique("expand --side dense", family, side("dense"), both),
        Technique("expand --side conv", family, side("conv"), both),
        Technique("head --mode replace", family, _always("head", labels=5)),
        Technique("head --mode resize", family, _always("head", mode="resize", labels=3)),
        Technique("head --mode add", family, _always("head", mode="add", labels=3, head_name="other")),
        Technique("vocab", family, _always("vocab", tokens=4), no_vocabulary),
    ]


def _selective() -> list[Technique]:
    family = "selective"
    options: dict[str, dict[str, Any]] = {
        "full": {},
        "freeze": {"target": "all"},
        "layerwise --top": {"top": 1},
        "layerwise --fraction --decay": {"fraction": 0.5, "decay": 0.8, "embeddings": True},
        "layerwise --one-at-a-time": {"one_at_a_time": True, "steps": 2},
        "gradual-unfreeze": {"every": 2, "unit": "step"},
        "embedding": {},
        "classifier": {},
        "filter": {"fraction": 0.25},
        "filter --by weight": {"fraction": 0.1, "by": "weight"},
    }

    def make(name: str, given: dict[str, Any]) -> Callable[[str], Pass]:
        def build(model: str) -> Pass:
            stem = name == "embedding" and model in (
                "resnet18",
                "wav2vec2",
            )  # their input layers are no tables
            return of(name.split()[0], **given, **({"which": "stem"} if stem else {}))

        return build

    return [Technique(name, family, make(name, given), ALL) for name, given in options.items()]


def _reparameterisation() -> list[Technique]:
    family, both = "reparameterisation", (*TEXT, *CONV_AND_SOUND)

    def low_rank(model: str) -> Pass:
        return of(
            "low-rank", rank=4 if model in ("smollm2", "minilm", "resnet18") else 2, target=linears(model)
        )

    def share(**options: Any) -> Callable[[str], Pass]:
        return lambda model: of("share", target="conv" if model == "resnet18" else linears(model), **options)

    def half(model: str) -> Pass:
        """The small Mamba has only two units within its blocks; a second application would find one."""
        return of("prune-filters", ratio=0.5, **({"target": "all"} if model in STATE else {}))

    def taylor(model: str) -> Pass:
        """Prunes residual streams too; their first producer is named."""
        return of("prune-filters", ratio=0.25, importance="taylor", target="all")

    def untie(model: str) -> Pass:
        return of("untie", target="head" if model in ("smollm2", "t5", *STATE) else linears(model))

    def tie_first(model: str) -> tuple[Pass, ...]:
        return () if model in ("smollm2", "t5", *STATE) else (share()(model),)

    def rounded_first(model: str) -> tuple[Pass, ...]:
        return (_at_linears("fake-quant", format="int4", group=0)(model),)

    smoothed = _at_linears("quantize", format="int8-dynamic", smooth=0.65, activation_budget=0.05)
    by_row = _at_linears("quantize", format="int8-dynamic", per_token=True)
    twice = _at_linears("quantize", format="int8-dynamic", twice=True)
    return [
        *(
            Technique(f"quantize --format {kind}", family, _at_linears("quantize", format=kind, group=0), ALL)
            for kind in ("int8", "int8-dynamic", "int4", "nf4", "ternary", "binary")
        ),
        Technique("quantize --smooth", family, smoothed, ALL),
        Technique("quantize --per-token", family, by_row, ALL),
        Technique("quantize --twice", family, twice, ALL),
        Technique("fake-quant", family, _at_linears("fake-quant", format="int4", group=0), ALL),
        Technique("convert", family, lambda model: of("convert"), ALL, rounded_first),
        Technique("int8-static", family, _at_linears("int8-static"), ALL),
        *(
            Technique(f"sparse {shown}".rstrip(), family, _at_linears("sparse", **given), mandatory)
            for shown, given, mandatory in (
                ("", {}, ALL),
                ("--pattern 2:4", {"pattern": "2:4"}, ALL),
                ("--pattern 4x4", {"pattern": "4x4"}, ALL),
                ("--criterion wanda", {"criterion": "wanda"}, ALL),
                ("--schedule cubic", {"schedule": "cubic", "end": 4}, ALL),
            )
        ),
        Technique("prune-filters", family, half, ALL),
        Technique("prune-filters --importance taylor", family, taylor, ALL),
        Technique("low-rank", family, low_rank, ALL),
        Technique("share --mode first", family, share(), both),
        Technique("share --mode mean", family, share(mode="mean"), both),
        Technique("untie", family, untie, both, tie_first),
        Technique("delta", family, _at_linears("delta"), ALL),
        Technique("sparse-tune --by magnitude", family, _at_linears("sparse-tune", density=0.05), ALL),
        Technique(
            "sparse-tune --by gradient", family, _at_linears("sparse-tune", density=0.05, by="gradient"), ALL
        ),
        Technique(
            "sparse-tune --by random", family, _at_linears("sparse-tune", density=0.05, by="random"), ALL
        ),
    ]


def _patterns() -> list[Technique]:
    """Attention and GELU are single ops in these models, so fuse-attention and fuse-gelu refuse: nothing to fuse."""
    family = "patterns"

    def fuse_first(model: str) -> tuple[Pass, ...]:
        return (of("fuse-qkv"),)

    return [
        Technique("fuse-qkv", family, _always("fuse-qkv"), TEXT),
        Technique("split-qkv", family, _always("split-qkv"), TEXT, fuse_first),
        Technique("fold-batchnorm", family, _always("fold-batchnorm"), ("resnet18",)),
        Technique("fuse-rmsnorm", family, _always("fuse-rmsnorm"), ("smollm2", "t5", *SPARSE_AND_STATE)),
        Technique("fuse-gelu", family, _always("fuse-gelu"), ()),
        Technique("fuse-attention", family, _always("fuse-attention"), ()),
    ]


__all__ = ["ALL", "Technique", "catalogue", "of"]
