"""Weights in 8, 4, 2 or 1 bits, given back to their op when it runs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, fx

from surgery.errors import PassError
from surgery.pass_base import Numerics, changes
from surgery.quantizing.checks import hindrance
from surgery.quantizing.codes import Codes
from surgery.quantizing.formats import DYNAMIC, FormatPass
from surgery.quantizing.stored import CodesPass
from surgery.rewriter import Rewriter
from surgery.sites import Site
from surgery.weight_ops import LINEAR


class Quantize(FormatPass, CodesPass):
    """Quantized weights: W becomes scale × (code − zero), rounded to nearest; activations stay as they are.

    `--format int8`: symmetric, one scale for each output (a row). `int8-dynamic`: the same, and what enters the op is
    rounded to 256 levels of its range at run time. `int4`: 16 levels, one scale for each `--group` of 32
    inputs, symmetric, or with a zero point (`--asymmetric`). `nf4`: the 16 quantiles of a normal variable times the
    largest magnitude of each group of 64 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). `ternary`: −1, 0 and 1 times
    the mean magnitude (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764). `binary`: signs times the mean magnitude of a
    row (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279). `--group 0` is a scale for each row. `--method gptq` rounds
    the columns of a linear map one by one and puts the error of each into the rest, by what enters it on the data
    (Frantar et al. 2023, arXiv:2210.17323).

    The codes are stored, never computed again. The op goes on as it was, and reads the weight that they give, so every
    adapter stands on it as on the base: only the adapter has gradients (QLoRA). An adapter is folded into codes by
    `merge --quantized`, where a budget allows it. In ONNX int8 and int4 are DequantizeLinear, whose weight onnxruntime
    keeps in its bits and fuses (MatMulNBits), and int8-dynamic is DynamicQuantizeLinear and MatMulInteger; a
    table of embeddings is looked up in its codes. Undo gives W back bit for bit. Where W is read in another place too
    it stays there, and nothing is saved. Zeros of `sparse` stay zero, for every format that has one. The outputs
    change by design; the plan says by how much each weight does.
    """

    name: ClassVar[str] = "quantize"
    numerics: ClassVar[Numerics] = changes("weights are rounded to few bits")

    method: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="round to nearest, or make up for errors on the data (linear maps, int8 and int4)",
    )

    @model_validator(mode="after")
    def _together(self) -> Quantize:
        if self.method == "gptq" and self.format not in ("int8", DYNAMIC, "int4"):
            raise PassError(f"pass 'quantize': --method gptq is for int8 and int4, and this is {self.format}")
        return self

    def check(self, site: Site) -> str | None:
        if self.method == "gptq" and site.kind != LINEAR:
            return f"--method gptq is for linear maps, and this is a {site.kind} weight; quantize it in another pass"
        if self.method == "gptq" and not site.probe.program.base.in_memory:
            return "its weight is not in memory, and gptq has to read it"
        why = hindrance(site, self.layout(site), self.dynamic, self.method == "gptq")
        if why is None and self.method == "gptq" and not bool(site.probe.products(site).any()):
            return "nothing but zeros enters it on the data, which says nothing of errors; give data that reaches it"
        return why

    def note(self, site: Site) -> str:
        said = super().note(site)
        if self.method == "gptq" and not site.probe.given:
            said += "; calibrated on the model's example inputs (give --data)"
        return said

    def encode(self, site: Site, weight: Tensor) -> Codes:
        products = site.probe.products(site) if self.method == "gptq" else None
        return self.layout(site).encode(weight, products)

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        self.round_input(g)
        return super().rewrite(site, g)
