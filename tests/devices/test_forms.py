"""Every form of a program gives the same on a device of its own: a dozen architectures here, all in the sweep."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import devices
from tests.zoo.sweep import load

# Architecture -> measuring or structural forms that are checked beside the adapted, trained, merged and moved program.
QUICK = {
    "llama": (
        "dora",
        "pissa",
        "nf4 and lora",
        "gptq",
        "smooth",
        "wanda",
        "fisher",
        "pruned",
        "low-rank",
        "wider",
        "fused and split",
        "resized head",
    ),
    "t5": (),
    "mixtral": ("int8",),
    "timm:resnet18": ("pruned",),
}
MORE = (
    "bert-classifier", "gpt2", "mamba", "vit", "wav2vec2", "whisper", "bloom", "timm:swin_tiny_patch4_window7_224",
)  # fmt: skip


def forms(name: str, *wanted: str) -> dict[str, str]:
    """Failures by form; the pool needs a function of this module."""
    found = devices.check(load(f"zoo:{name}"), lambda form: not wanted or form in wanted)
    return {form: why for form, why in found.items() if why and not why.startswith("n/a")}


@pytest.mark.parametrize("name", QUICK)
def test_same_on_the_device(apart, name):
    assert apart(forms, name, "lora", *QUICK[name]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *MORE])
def test_every_form_is_the_same(apart, name):
    assert apart(forms, name) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", [*QUICK, *MORE])
def test_every_form_is_the_same_on_a_gpu(name):
    # In float32: TF32 is off by default, so sums differ in their order alone.
    found = devices.check(load(f"zoo:{name}"), device="cuda")
    assert {form: why for form, why in found.items() if why and not why.startswith("n/a")} == {}
