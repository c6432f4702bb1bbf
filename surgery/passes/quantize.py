"""Weights in 8, 4, 2 or 1 bits, given back to their op when it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgery.errors import PassError
from surgery.pass_base import Numerics, RewritePass, TensorSpec, changes
from surgery.quantizing import FORMATS, Codes, dequantize, encode
from surgery.quantizing.codes import packed_columns
from surgery.quantizing.gptq import gptq
from surgery.rewriter import Rewriter
from surgery.sites import Site
from surgery.standing import replaced_by, weight_reader
from surgery.weight_ops import CONV, EMBEDDING, EXPERTS, LINEAR, parameter_of

_KINDS = (LINEAR, CONV, EMBEDDING, EXPERTS)


class Quantize(RewritePass):
    """Quantized weights: W becomes scale × (code − zero), rounded to nearest; activations stay as they are.

    `--format int8`: symmetric, one scale for each output (a row). `int4`: 16 levels, one scale for each `--group` of 32
    inputs, symmetric, or with a zero point (`--asymmetric`). `nf4`: the 16 quantiles of a normal variable times the
    largest magnitude of each group of 64 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). `ternary`: −1, 0 and 1 times
    the mean magnitude (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764). `binary`: signs times the mean magnitude of a
    row (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279). `--group 0` is a scale for each row. `--method gptq` rounds
    the columns of a linear map one by one and puts the error of each into the rest, by what enters it on the data
    (Frantar et al. 2023, arXiv:2210.17323).

    The codes are stored, never computed again. The op goes on as it was, and reads the weight that they give, so every
    adapter stands on it as on the base: only the adapter has gradients (QLoRA). An adapter is not folded into codes.
    In ONNX int8 and int4 are DequantizeLinear, whose weight onnxruntime keeps in its bits and fuses (MatMulNBits); a
    table of embeddings is looked up in its codes. Undo gives W back bit for bit. Where W is read in another place too
    it stays there, and nothing is saved. Zeros of `sparse` stay zero, for every format that has one. The outputs
    change by design; the plan says by how much each weight does.
    """

    name: ClassVar[str] = "quantize"
    on: ClassVar[tuple[str, ...]] = _KINDS
    numerics: ClassVar[Numerics] = changes("weights are rounded to few bits")
    freezes: ClassVar[bool] = False
    replaces: ClassVar[bool] = True

    format: Literal["int8", "int4", "nf4", "ternary", "binary"] = Field("int8", description="what codes mean")
    group: int | None = Field(
        None,
        ge=0,
        description="values of a row that share a scale; 0: all (default: int4 32, nf4 64, else all)",
    )
    method: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="round to nearest, or make up for errors on the data (linear maps, int8 and int4)",
    )
    asymmetric: bool = Field(False, description="with int4: a zero point for each group")

    @model_validator(mode="after")
    def _together(self) -> Quantize:
        if self.asymmetric and self.format != "int4":
            raise PassError(
                f"pass 'quantize': --asymmetric is for int4, and {self.format} has no zero point; leave it out"
            )
        if self.method == "gptq" and self.format not in ("int8", "int4"):
            raise PassError(f"pass 'quantize': --method gptq is for int8 and int4, and this is {self.format}")
        if self.format == "ternary" and self.group:
            raise PassError("pass 'quantize': ternary has one scale for the whole weight; leave out --group")
        return self

    def check(self, site: Site) -> str | None:
        if site.weight is None:
            return f"its weight is computed from {', '.join(site.computed_from)}; target those"
        if site.packed or not site.dtype.is_floating_point:
            return "its weight is packed or no floating-point one already"
        gone = next((entry for entry in (replaced_by(c.node) for c in site.calls) if entry), None)
        if gone:
            return f"{gone!r} has put another op in its place; quantize before it, or leave the site out"
        _, current = weight_reader(site.calls[0])
        if current.target is dequantize._opoverload:
            return f"{current.meta['surgery']['entry']!r} has quantized it already; undo that first"
        if parameter_of(current) is not None:
            entry = str(current.meta["surgery"]["entry"])
            why = (
                self._refused_zeros(entry) if _makes_zeros(site, entry) else "quantize first, and adapt then"
            )
            if why:
                return f"{entry!r} has put another weight there; {why}"
        if site.kind == CONV and site.layout == "io" and site.groups > 1:
            return "a transposed convolution with groups has no rows of its own; target its neighbours"
        columns, block = self._columns(site), self._block(site)
        if columns % block:
            return f"its rows have {columns} values, which no groups of {block} divide; give --group 0 or a divisor"
        if self.method == "gptq" and site.kind != LINEAR:
            return f"--method gptq is for linear maps, and this is a {site.kind} weight; quantize it in another pass"
        if not site.probe.program.base.in_memory:
            return "its weight is not in memory, and gptq has to read it" if self.method == "gptq" else None
        if not bool(torch.isfinite(site.probe.stored(site)).all()):
            return "its weight holds values that are infinite or no numbers; mend the model first"
        return None

    def _refused_zeros(self, entry: str) -> str | None:
        """Why codes would not keep the zeros that an entry has put into a weight."""
        if self.format == "binary":
            return "binary codes have no zero; use another --format"
        if self.method == "gptq":
            return f"gptq would move values into the zeros of {entry!r}; use --method nearest"
        return None

    def _order(self, site: Site) -> list[int]:
        """The weight's axes with its outputs (and experts) first."""
        first = [site.layout.index(letter) for letter in "eov" if letter in site.layout]
        return [*first, *(axis for axis in range(len(site.shape)) if axis not in first)]

    def _columns(self, site: Site) -> int:
        return site.parameters // self._rows(site)

    def _rows(self, site: Site) -> int:
        return math.prod(site.shape[site.layout.index(letter)] for letter in "eov" if letter in site.layout)

    def _block(self, site: Site) -> int:
        asked = FORMATS[self.format].group if self.group is None else self.group
        return asked or self._columns(site)

    def _encoded(self, site: Site) -> Codes:
        def make() -> Codes:
            weight = site.probe.stored(site).permute(self._order(site)).reshape(self._rows(site), -1)
            if self.method == "gptq":
                return gptq(
                    weight, site.probe.products(site), self.format, self._block(site), self.asymmetric
                )
            return encode(weight, self.format, self._block(site), self.asymmetric)

        return site.probe.once((self, site.key), make)

    def decide(self, site: Site) -> dict[str, Any]:
        if not site.probe.program.base.in_memory:
            return {"order": self._order(site)}
        weight, found = site.probe.stored(site), self._encoded(site)
        given = dequantize(
            found.codes, found.scale, found.zero, self.format, list(site.shape), self._order(site)
        )
        moved = torch.linalg.vector_norm(weight.float() - given) / torch.linalg.vector_norm(
            weight.float()
        ).clamp(min=1e-30)
        return {"order": self._order(site), "error": round(float(moved), 6)}

    def note(self, site: Site) -> str:
        if "error" not in site.decided:
            return ""
        size = sum(spec.numel() * _bytes(spec, site) for spec in self.tensors(site).values())
        before = site.parameters * site.dtype.itemsize
        return f"{size / before:.3f} of its bytes; the weight moves by {site.decided['error']:.2%}"

    def frees(self, site: Site) -> set[str]:
        users = [c for c in site.calls if c.weight is not None and len(c.weight.users) > len(site.calls)]
        return set() if users or site.weight is None else {site.weight}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        rows, blocks = self._rows(site), self._columns(site) // self._block(site)
        kind = torch.int8 if self.format == "int8" else torch.uint8
        shape = (rows, packed_columns(self.format, self._columns(site)))
        specs = {
            "codes": TensorSpec(shape, self._filled(site, "codes"), trainable=False, dtype=kind),
            "scale": TensorSpec((rows, blocks), self._filled(site, "scale"), trainable=False),
        }
        if self.asymmetric:
            filled = self._filled(site, "zero")
            specs["zero"] = TensorSpec((rows, blocks), filled, trainable=False, dtype=torch.uint8)
        return specs

    def _filled(self, site: Site, name: str) -> Callable[[Tensor], Any]:
        last = "zero" if self.asymmetric else "scale"

        def fill(tensor: Tensor) -> None:
            tensor.copy_(getattr(self._encoded(site), name))
            if name == last:
                site.probe.forget((self, site.key))

        return fill

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        def read(_: fx.Node) -> fx.Node:
            zero = g["zero"] if self.asymmetric else None
            order = list(site.decided["order"])
            return g.call(
                dequantize._opoverload, g["codes"], g["scale"], zero, self.format, list(site.shape), order
            )

        g.swap_weight(read)
        return None


def _makes_zeros(site: Site, entry: str) -> bool:
    program = site.probe.program
    name = program.journal.find(entry)[0].pass_name
    return bool(getattr(program.base.plugins.find_pass(name).cls, "makes_zeros", False))


def _bytes(spec: TensorSpec, site: Site) -> int:
    return (spec.dtype or site.float_dtype).itemsize
