"""quantize: stores weights in 8, 4, 2 or 1 bits and decodes them when their op runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.base import default_names
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import output_with_adapters
from surgery.graph.ops import LINEAR
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Measurements, Site, SiteKey
from surgery.passes.quantize.checks import hindrance
from surgery.passes.quantize.codes import Codes
from surgery.passes.quantize.codes_pass import CodesPass
from surgery.passes.quantize.format_pass import DYNAMIC, FormatPass
from surgery.passes.quantize.matrix import Layout
from surgery.passes.quantize.smoothing import Map, moved_by_rounding, smoothing


class Quantize(FormatPass, CodesPass):
    """Quantized weights: W becomes scale × (code − zero) in 8, 4, 2 or 1 bits; int8-dynamic rounds activations too.

    The formats, set by `--format`:

    - `int8`: symmetric, one scale for each output (row).
    - `int8-dynamic`: as `int8`, and the input of the op is rounded to 256 levels of its range at run time.
    - `int4`: 16 levels, one scale for each group of 32 inputs, symmetric or with zero points (`--asymmetric`).
    - `nf4`: the 16 quantiles of a normal distribution, times the largest magnitude of each group of 64 (QLoRA, Dettmers
      et al. 2023, arXiv:2305.14314).
    - `ternary`: −1, 0 and 1, times the mean magnitude of the weight (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).
    - `binary`: signs, times the mean magnitude of each row (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279).

    `--group` sets the number of values that share a scale; 0 is a whole row. Values are rounded to the nearest code.
    With `--method gptq`, the columns of a linear layer are rounded one by one, and the error of each is compensated in
    the columns that follow, for the inputs of the layer on the data (Frantar et al. 2023, arXiv:2210.17323).

    Four options of `int8-dynamic` keep the error small if a few features or tokens are much larger than the rest:

    - `--per-token` rounds each row of the input to 255 levels of its own symmetric range, so that no row depends on the
      rest of the batch (ZeroQuant, Yao et al. 2022, arXiv:2206.01861).
    - `--smooth α` divides each input feature by s before rounding and encodes W s (SmoothQuant, Xiao et al. 2023,
      arXiv:2211.10438), with s = max|x|^α / max|w|^(1−α) on the data. All targeted layers of one input share s, so the
      input is rounded once.
    - `--twice` also rounds the rounding error, to 255 levels of half a step, for a second product of integers (Ozaki's
      slicing; Ootomo et al. 2023, arXiv:2306.11975). This gives about 16 bits, and suits an output layer, for example,
      where no later layer averages errors out.
    - `--activation-budget` measures how much the rounding of the input changes the outputs of each layer. If it is more
      than the budget, the input of that layer is not rounded, and only its weight is int8.

    Processors with AVX2 but without VNNI add two neighbouring products of `int8-dynamic` in 16 bits and saturate. By
    default (`--cpu any`), codes are chosen so that no two neighbours of one sign add up to more than 128 in magnitude,
    which is correct on every processor: the scale of a row is widened by up to 2, whichever factor gives the least
        squared
    error, and pairs that still exceed the limit are moved to the nearest codes. The plan shows the error beside that of
    all 8 bits. `--cpu vnni` keeps all 8 bits; the file says so in its metadata, and the export fails on a machine whose
    products saturate.

    Codes are computed once and stored. The op itself stays, and reads the decoded weight. Adapters attach to it as in
    the base, and only they get gradients (QLoRA). `merge --quantized` merges an adapter into the codes if a budget
    allows it; the codes themselves have no merged form. If other ops read W too, it stays in memory, and nothing is
    saved. Zeros of `sparse` stay zero in every format except `binary`. The outputs change by design; the plan shows the
    error of each weight. Undo restores W bit for bit.

    In ONNX, int8 and int4 weights become DequantizeLinear; onnxruntime keeps the codes and fuses the decoding with the
    product (MatMulNBits). `int8-dynamic` becomes DynamicQuantizeLinear and MatMulInteger. With `--per-token`, rows are
    divided by their largest magnitude and rounded by QuantizeLinear, and the product is multiplied by that magnitude.
    An embedding gathers codes, and decodes only the rows that it needs.
    """

    name: ClassVar[str] = "quantize"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass quantize --target all-linear --format "
        "int4 -o int4/"
    )
    numerics: ClassVar[Numerics] = changes("weights are rounded to few bits")

    method: Literal["nearest", "gptq"] = Field(
        default="nearest",
        description="round to nearest, or compensate rounding errors on the data (linear layers; int8 and int4)",
    )

    smooth: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="int8-dynamic: SmoothQuant's α, how much of the input's scale moves into the weights (0: none)",
    )
    activation_budget: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="int8-dynamic: do not round the input where that changes outputs by more than this (0.05: 5%)",
    )

    @model_validator(mode="after")
    def _together(self) -> Quantize:
        self.for_dynamic(
            {"--smooth": bool(self.smooth), "--activation-budget": self.activation_budget is not None}
        )
        if self.method == "gptq" and self.format not in ("int8", DYNAMIC, "int4"):
            raise PassError(f"pass 'quantize': --method gptq is for int8 and int4, and this is {self.format}")
        return self

    def check(self, site: Site) -> str | None:
        if self.method == "gptq" and site.kind != LINEAR:
            return f"--method gptq is for linear layers, and this is a {site.kind} weight; quantize it in another pass"
        measuring = self._measuring
        if measuring and not site.probe.in_memory:
            return f"its weight is not in memory, and {measuring[0]} has to read it; load the weights first"
        why = self._hindrance(site)
        if why is None and measuring and not self._reached(site):
            return (
                "its input is zero on all of the data, so no error can be measured; give data that reaches it"
            )
        return why

    @property
    def _measuring(self) -> list[str]:
        """Names of the given options that need data."""
        given = {
            "gptq": self.method == "gptq",
            "--smooth": bool(self.smooth),
            "--activation-budget": self.activation_budget is not None,
        }
        return [name for name, there in given.items() if there]

    def _hindrance(self, site: Site) -> str | None:
        return hindrance(site, self.layout(site), self.dynamic, self.method == "gptq")

    def _reached(self, site: Site) -> bool:
        """True if the input of the op is not zero on all of the data."""
        found = site.probe.products(site) if self.method == "gptq" else site.probe.largest(site)
        return bool(found.any())

    def layout(self, site: Site) -> Layout:
        plain, rounds = super().layout(site), self._rounds(site)
        return replace(plain, smoothed=bool(self.smooth) and rounds, paired=plain.paired and rounds)

    def _rounds(self, site: Site) -> bool:
        """True if the input of the site is rounded."""
        return self.dynamic and not site.decided.get("kept", False)

    def decide(self, site: Site) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if self.activation_budget is not None:
            moved = self._moved(site.probe)[site.key]
            own = {"moved": moved, "kept": moved > self.activation_budget}
        if self.smooth and not own.get("kept"):
            own["smooth"] = self._names(site.probe)[site.key]
        return {**super().decide(site.deciding(own)), **own}

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        found = super().names(site, tensors)
        if "smooth" in found and "smooth" in site.decided:
            found["smooth"] = site.decided["smooth"]
        return found

    def outcome(self, site: Site) -> Outcome:
        plain = super().outcome(site)
        said = plain.note
        if "moved" in site.decided:
            said += f"; rounding the input changes the outputs by {site.decided['moved']:.1%}"
            said += ", over the budget: only the weight is int8" if site.decided["kept"] else ""
        if self._measuring and not site.probe.given:
            said += "; calibrated on the model's example inputs (give --data)"
        return replace(plain, note=said)

    def encode(self, site: Site, weight: Tensor) -> Codes:
        smooth = self._smoothing(site.probe)[site.key] if self.layout(site).smoothed else None
        return self._coded(site, weight, smooth)

    def recode(self, site: Site, weight: Tensor, held: Codes) -> Codes:
        return self._coded(site, weight, held.smooth)

    def _coded(self, site: Site, weight: Tensor, smooth: Tensor | None) -> Codes:
        products = site.probe.products(site) if self.method == "gptq" else None
        return self.layout(site).encode(weight, products, smooth)

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        if self._rounds(site):
            self.round_input(g, g["smooth"] if self.layout(site).smoothed else None)
        return super().rewrite(site, g)

    # -- measured at all sites together

    def _maps(self, probe: Measurements) -> list[Map]:
        """Return the targeted sites that are not refused."""

        def make() -> list[Map]:
            # Earlier passes may have left ops behind that no output depends on; data never reach these.
            live = live_nodes(probe.program.graph)
            found = [replace(s, measured=probe) for s in self.find(probe.view) if not s.selected_parts]
            fit = [
                s for s in found if not live.isdisjoint(output_with_adapters(call.node) for call in s.calls)
            ]
            own = [s for s in fit if self._hindrance(s) is None]
            return [Map(s, self.layout(s), per_token=self.per_token, twice=self.twice) for s in own]

        return probe.once((self, "maps"), make)

    def _smoothing(self, probe: Measurements) -> Mapping[SiteKey, Tensor]:
        """Return SmoothQuant's factors by site."""
        return probe.once((self, "smooth"), lambda: smoothing(probe, self._maps(probe), self.smooth))

    def _moved(self, probe: Measurements) -> Mapping[SiteKey, float]:
        """Return the relative change of the outputs by rounding the input, by site."""

        def make() -> dict[SiteKey, float]:
            factors = self._smoothing(probe) if self.smooth else {}
            maps = [replace(each, smooth=factors.get(each.site.key)) for each in self._maps(probe)]
            return {key: round(moved, 6) for key, moved in moved_by_rounding(probe, maps).items()}

        return probe.once((self, "moved"), make)

    def _names(self, probe: Measurements) -> Mapping[SiteKey, str]:
        """Return the names of smoothing factors by site; layers of one input use the name of the first of them."""

        def make() -> dict[SiteKey, str]:
            limit, found = self.activation_budget, {}
            moved = {} if limit is None else self._moved(probe)
            first: dict[tuple[str, ...], str] = {}
            for each in self._maps(probe):
                key = each.site.key
                if limit is None or moved[key] <= limit:
                    found[key] = first.setdefault(
                        each.inputs, default_names(self, each.site, ["smooth"])["smooth"]
                    )
            return found

        return probe.once((self, "names"), make)
