"""prompt: learned tokens before the input of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine.contract.base import GraphPass
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import packed
from surgery.passes.prompt import insert

if TYPE_CHECKING:
    from surgery.graph.view import View


class Prompt(GraphPass):
    """Prompt tuning: P learned embeddings precede the embedded tokens (Lester et al. 2021, arXiv:2104.08691).

    Only the tensor `tokens` (P × d) trains. The input ids are padded by P at the front, and so are the other inputs of
    their shape: the attention mask by ones, token types by zeros. The prompt replaces the first P embeddings. Masks,
    positions and causal attention therefore see P + n tokens at every length n. If the model has a table of positions,
    the longest input becomes P tokens shorter. Outputs keep only the real positions, so the logits of a decoder are
    those of the n given tokens. A classifier that pools the first position reads the first prompt token there, as in
    PEFT. In an encoder-decoder, the encoder gets the prompt.

    In a model without token ids, the prompt is added to the sequence of patches or frames (visual prompt tuning, Jia et
    al. 2022, arXiv:2203.12119): P vectors are appended before the first block and removed after the last. Their place
    in the sequence does not matter, because the positions have already been added.

    The initial prompt is set by --init. `normal` draws from a normal distribution with the standard deviation of the
    embeddings (0.02 in a model without token ids). `vocabulary` copies the embeddings of P random tokens. `text` copies
    those of --text, read by the model's own tokenizer and repeated or cut to P tokens.

    A second prompt follows the first. The outputs change by design, also before training. A prompt cannot be scaled by
    a weight, and there is no merged form, because no weight of the base acts like an added token.
    """

    name: ClassVar[str] = "prompt"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass prompt --tokens 16 -o adapted/"
    )
    before: ClassVar[tuple[str, ...]] = ("prefix",)

    tokens: int = Field(default=20, gt=0, le=2**20, description="number of learned tokens, P")
    init: Literal["normal", "vocabulary", "text"] = Field(
        default="normal",
        description="initial prompt: random normal, embeddings of random tokens, or embeddings of --text",
    )
    text: str = Field(default="", description="with --init text: the text of the initial prompt")

    @property
    def numerics(self) -> Numerics:
        return changes(f"attention sees {self.tokens} more tokens")

    def candidates(self, view: View) -> list[Site]:
        site = insert.embedding_of_ids(view) or insert.first_of_stream(view)
        if site is None:
            raise PassError(
                "prompt: the model embeds no token ids and has no row of repeated blocks over a sequence; use lora or "
                "adapter"
            )
        return [site]

    def check(self, site: Site) -> str | None:
        if not site.float_dtype.is_floating_point:
            return f"its embeddings are {site.dtype}; load the model with floating-point ones"
        if (self.init == "text") != bool(self.text):
            return "give --init text and --text TEXT together"
        late = next((e.id for e in site.probe.journal if e.pass_name == "prefix"), None)
        by_ids = insert.embedding_of_ids(site.probe.view) is not None
        # The initial prompt needs the decoded table, even if only its standard deviation.
        if by_ids and site.packed and (unread := packed.refusal(site)):
            return f"{unread}, and the initial prompt is computed from it; use prefix, adapter or lora"
        if self.init != "normal" and not by_ids:
            return (
                f"it reads no token ids, so --init {self.init} has no embeddings to copy; use --init normal"
            )
        if late and not by_ids:
            return f"{late!r} has already added keys to its attention; undo that, or apply prompt before it"
        return None if by_ids else insert.refuse_stream(site.probe.view)

    def decide(self, site: Site) -> dict[str, Any]:
        program = site.probe.program
        if insert.embedding_of_ids(program.view) is None:
            block = insert.stream(program.view)[0]
            return {"at": "stream", "width": int(block.input.meta["val"].shape[-1])}
        found: dict[str, Any] = {
            "at": "ids",
            "width": site.size("d"),
            **insert.room(program, site, self.tokens),
        }
        if self.init == "text":
            found["ids"] = insert.read(program, self.text, self.tokens)
        return found

    def outcome(self, site: Site) -> Outcome:
        return Outcome(limits=dict(site.decided.get("limits", {})))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        shape = (self.tokens, site.decided["width"])
        return {"tokens": TensorSpec(shape, lambda tensor: self._start(site, tensor))}

    def _start(self, site: Site, tensor: Tensor) -> None:
        if site.decided["at"] == "stream":
            nn.init.normal_(tensor, std=0.02)
            return
        table = site.probe.dequantized(site).float()
        if self.init == "normal":
            nn.init.normal_(tensor, std=float(table.std()))
        else:
            given = site.decided.get("ids")
            ids = torch.tensor(given) if given else torch.randint(table.shape[0], (self.tokens,))
            tensor.copy_(table[ids.to(table.device)])

    def rewrite(self, site: Site, g: Rewriter) -> None:
        if site.decided["at"] == "stream":
            insert.append_to_stream(g, g["tokens"], self.tokens)
        else:
            insert.stand_before_ids(site, g, g["tokens"], self.tokens)
