"""Chooses the variant of LoRA that the options of the pass name."""

from __future__ import annotations

from surgery.common.errors import PassError
from surgery.passes.lora.dora import Dora
from surgery.passes.lora.options import LoraOptions
from surgery.passes.lora.pissa import PackedPissa, Pissa
from surgery.passes.lora.variant import Variant


def choose_variant(lora: LoraOptions, packed: bool = False) -> type[Variant]:
    """The variant with these options.

    Args:
        lora: Options of the pass.
        packed: The op at the site keeps its weight packed.

    Raises:
        PassError: Options of several variants are given, or an option without its variant.
    """
    pissa = lora.init == "pissa"
    if lora.full_gradient and not lora.dora:
        raise PassError("pass 'lora': --full-gradient is about the norm of DoRA; add --dora, or leave it out")
    if lora.svd_iterations and not pissa:
        raise PassError("pass 'lora': --svd-iterations is for --init pissa; add that, or leave it out")
    if lora.dora and pissa:
        raise PassError("pass 'lora': --dora and --init pissa both change the weight; choose one of them")
    for option, given in (("--bias", lora.bias), ("--across", lora.across)):
        if given and (lora.dora or pissa):
            raise PassError(f"pass 'lora': {option} is for a plain update; leave out --dora and --init pissa")
    if pissa:
        return PackedPissa if packed else Pissa
    return Dora if lora.dora else Variant
