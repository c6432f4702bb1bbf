"""Weights in 8, 4, 2 or 1 bits, given back to their op when it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.base import default_names
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.specs import Outcome
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
    """Quantized weights: W becomes scale × (code − zero), rounded to nearest; activations stay as they are.

    `--format int8`: symmetric, one scale for each output (a row). `int8-dynamic`: the same, and what enters the op is
    rounded to 256 levels of its range at run time. `int4`: 16 levels, one scale for each `--group` of 32
    inputs, symmetric, or with a zero point (`--asymmetric`). `nf4`: the 16 quantiles of a normal variable times the
    largest magnitude of each group of 64 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). `ternary`: −1, 0 and 1 times
    the mean magnitude (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764). `binary`: signs times the mean magnitude of a
    row (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279). `--group 0` is a scale for each row. `--method gptq` rounds
    the columns of a linear map one by one and puts the error of each into the rest, by what enters it on the data
    (Frantar et al. 2023, arXiv:2210.17323).

    Of `int8-dynamic` four options keep outputs where a few features or tokens are far larger than the rest.
    `--per-token` rounds each row of what enters in 255 levels of its own range about zero, so that none depends on what
    else is in a batch (ZeroQuant, Yao et al. 2022, arXiv:2206.01861). `--smooth` divides each feature by s before it is
    rounded, and codes W s (SmoothQuant, Xiao et al. 2023, arXiv:2211.10438): s is max|x|^α / max|w|^(1−α) on the data,
    the same for all targeted maps of one input, which is rounded once. `--twice` rounds what is left as well, in 255
    levels of half a step, for a second product of integers (slices of a float, as in Ozaki's scheme; Ootomo et al.
    2023, arXiv:2306.11975): 16 bits, for an output layer, say, whose errors nothing evens out. `--activation-budget`
    measures by how much the rounding of what enters moves each map's outputs, and keeps what enters as it is where that
    is more: the weight alone is int8 there.

    The codes are stored, never computed again. The op goes on as it was, and reads the weight that they give, so every
    adapter stands on it as on the base: only the adapter has gradients (QLoRA). An adapter is folded into codes by
    `merge --quantized`, where a budget allows it. In ONNX int8 and int4 are DequantizeLinear, whose weight onnxruntime
    keeps in its bits and fuses (MatMulNBits), and int8-dynamic is DynamicQuantizeLinear and MatMulInteger (rows
    of their own: divided by their largest magnitude, QuantizeLinear, and the product multiplied with it); a
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

    smooth: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="with int8-dynamic: SmoothQuant's α, how much of what enters goes into the weights (0: nothing)",
    )
    activation_budget: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="with int8-dynamic: where rounding what enters moves outputs by more (0.05: 5%), it stays",
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
            return f"--method gptq is for linear maps, and this is a {site.kind} weight; quantize it in another pass"
        measuring = self._measuring
        if measuring and not site.probe.in_memory:
            return f"its weight is not in memory, and {measuring[0]} has to read it"
        why = self._hindrance(site)
        if why is None and measuring and not self._reached(site):
            return "nothing but zeros enters it on the data, which says nothing of errors; give data that reaches it"
        return why

    @property
    def _measuring(self) -> list[str]:
        """What of the options looks at the data."""
        given = {
            "gptq": self.method == "gptq",
            "--smooth": bool(self.smooth),
            "--activation-budget": self.activation_budget is not None,
        }
        return [name for name, there in given.items() if there]

    def _hindrance(self, site: Site) -> str | None:
        return hindrance(site, self.layout(site), self.dynamic, self.method == "gptq")

    def _reached(self, site: Site) -> bool:
        found = site.probe.products(site) if self.method == "gptq" else site.probe.largest(site)
        return bool(found.any())

    def layout(self, site: Site) -> Layout:
        return replace(super().layout(site), smoothed=bool(self.smooth) and self._rounds(site))

    def _rounds(self, site: Site) -> bool:
        """Whether what enters the site is rounded."""
        return self.dynamic and not site.decided.get("kept", False)

    def decide(self, site: Site) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if self.activation_budget is not None:
            moved = self._moved(site.probe)[site.key]
            own = {"moved": moved, "kept": moved > self.activation_budget}
        if self.smooth and not own.get("kept"):
            own["smooth"] = self._names(site.probe)[site.key]
        return {**super().decide(site.deciding(own)), **own}

    def names(self, site: Site, tensors: Iterable[str]) -> dict[str, str]:
        found = super().names(site, tensors)
        if "smooth" in found and "smooth" in site.decided:
            found["smooth"] = site.decided["smooth"]
        return found

    def outcome(self, site: Site) -> Outcome:
        plain = super().outcome(site)
        said = plain.note
        if "moved" in site.decided:
            said += f"; rounding what enters moves the outputs by {site.decided['moved']:.1%}"
            said += ", over the budget: the weight alone is int8" if site.decided["kept"] else ""
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

    # -- what is measured of all sites at once

    def _maps(self, probe: Measurements) -> list[Map]:
        """The targeted sites at which nothing stands against it."""

        def make() -> list[Map]:
            live = live_nodes(probe.program.graph)
            found = [replace(s, measured=probe) for s in self.find(probe.view) if not s.selected_parts]
            fit = [
                s for s in found if not live.isdisjoint(output_with_adapters(call.node) for call in s.calls)
            ]
            own = [s for s in fit if self._hindrance(s) is None]
            return [Map(s, self.layout(s), per_token=self.per_token, twice=self.twice) for s in own]

        return probe.once((self, "maps"), make)

    def _smoothing(self, probe: Measurements) -> Mapping[SiteKey, Tensor]:
        return probe.once((self, "smooth"), lambda: smoothing(probe, self._maps(probe), self.smooth))

    def _moved(self, probe: Measurements) -> Mapping[SiteKey, float]:
        def make() -> dict[SiteKey, float]:
            factors = self._smoothing(probe) if self.smooth else {}
            maps = [replace(each, smooth=factors.get(each.site.key)) for each in self._maps(probe)]
            return {key: round(moved, 6) for key, moved in moved_by_rounding(probe, maps).items()}

        return probe.once((self, "moved"), make)

    def _names(self, probe: Measurements) -> Mapping[SiteKey, str]:
        """What the factors of each map that has them are called: those of one input go by its first map."""

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
