"""Prompt tuning: learned tokens before what the model reads."""

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
    """Prompt tuning: P learned embeddings stand before the embedded tokens (Lester et al. 2021, arXiv:2104.08691).

    The tensor `tokens` (P × d) is all that trains. The ids are padded by P in front where they enter, the mask by
    ones and types by zeros, and the first P rows of the embeddings are the prompt: so masks, positions and causal
    attention see a sequence of P + n tokens at every length n, and a program takes P tokens fewer where it has a
    table of positions. Outputs keep the real positions: logits of a decoder are those of the n tokens given. A
    classifier that pools the first position reads the prompt's first token there, as in PEFT. Of an
    encoder-decoder the encoder gets the prompt.

    A model without token ids has it in its stream of patches or frames (visual prompt tuning, Jia et al. 2022,
    arXiv:2203.12119): P vectors are appended before the first block and cut off after the last, which gives what
    prompts anywhere in the sequence would, since positions were added before. A second prompt stands behind the
    first. It cannot be weighted, and it does not merge: no weight of the base does what another token does.

    init: `normal` draws from a normal distribution of the embeddings' own deviation (a stream's: 0.02);
    `vocabulary` copies the embeddings of P tokens drawn from the vocabulary, `text` those of --text (repeated or
    cut to P tokens), read by the model's own tokenizer.
    """

    name: ClassVar[str] = "prompt"
    before: ClassVar[tuple[str, ...]] = ("prefix",)

    tokens: int = Field(20, gt=0, description="how many learned tokens, P")
    init: Literal["normal", "vocabulary", "text"] = Field(
        "normal", description="at random, or from embeddings of drawn tokens, or of those of --text"
    )
    text: str = Field("", description="with --init text: what the prompt says at first")

    @property
    def numerics(self) -> Numerics:
        return changes(f"{self.tokens} learned tokens are attended to")

    def candidates(self, view: View) -> list[Site]:
        site = insert.embedding_of_ids(view) or insert.first_of_stream(view)
        if site is None:
            raise PassError(
                "prompt: the model embeds no token ids and has no row of blocks over a sequence; use lora or adapter"
            )
        return [site]

    def check(self, site: Site) -> str | None:
        if not site.float_dtype.is_floating_point:
            return f"its embeddings are {site.dtype}; a prompt needs floating-point ones"
        if (self.init == "text") != bool(self.text):
            return "--init text and --text TEXT go together"
        late = next((e.id for e in site.probe.journal if e.pass_name == "prefix"), None)
        by_ids = insert.embedding_of_ids(site.probe.view) is not None
        if by_ids and site.packed and (unread := packed.refusal(site)):
            return f"{unread}, from which a prompt's starting values are taken; use prefix, adapter or lora"
        if self.init != "normal" and not by_ids:
            return (
                f"it reads no token ids, so --init {self.init} has no embeddings to copy; use --init normal"
            )
        if late and not by_ids:
            return f"{late!r} has put keys before those of its sequence; undo that, or apply prompt before it"
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
