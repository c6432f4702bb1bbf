"""Graph edits of prompt tuning: tokens before the input ids, or in the stream of a model that reads no ids."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from surgery.capture.shapes import list_axes
from surgery.common.errors import PassError
from surgery.graph.marks import is_aux, output_with_adapters
from surgery.graph.ops import EMBEDDING, Call
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site

if TYPE_CHECKING:
    from surgery.engine.state import State
    from surgery.graph.analysis.blocks import Block
    from surgery.graph.view import View

aten = torch.ops.aten

_END = (1 << 63) - 1
_UNBOUNDED = 1 << 30


def input_of(node: fx.Node) -> fx.Node | None:
    """Return the input that a value equals up to views, casts and adapters; None if the value is computed."""
    for _ in range(64):
        if node.op == "placeholder":
            return node
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        if not is_aux(node) and node.target not in _VIEWS:
            return None
        node = node.args[0]
    return None


_VIEWS = {
    aten.view.default, aten.reshape.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default,
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
}  # fmt: skip


def _reads_ids(call: Call) -> bool:
    """True for an embedding that is indexed by an input of the model."""
    return call.kind == EMBEDDING and call.weight is not None and input_of(call.x) is not None


def embedding_of_ids(view: View) -> Site | None:
    """Return the first token embedding that is indexed by an input, or None; in an encoder-decoder, the encoder's."""
    for call in view.calls:
        if _reads_ids(call) and view.site_of(call.node).role == "embed.token":
            return view.site_of(call.node)
    return None


def stream(view: View) -> tuple[Block, Block]:
    """Return the first and the last block of the longest row of repeated blocks.

    Raises:
        PassError: The model has no repeated blocks.
    """
    row = max(view.blocks, key=len, default=())
    if not row:
        raise PassError(
            "prompt: the model has no row of repeated blocks over a sequence; use lora or adapter"
        )
    return row[0], row[-1]


def first_of_stream(view: View) -> Site | None:
    """Return the site that identifies a prompt in the stream: the first one of the first block, or None."""
    rows = view.blocks
    return view.site_of(max(rows, key=len)[0].calls[0].node) if rows else None


def refuse_stream(view: View) -> str | None:
    """Return the reason why no tokens can be added to the stream, or None."""
    first, last = stream(view)
    for node in (first.input, last.output):
        if node.meta["val"].dim() != 3:
            sizes = "×".join(map(str, node.meta["val"].shape))
            return f"its stream is {sizes}, not a sequence of vectors; use adapter, or expand --side conv"
    return None


def room(program: State, site: Site, tokens: int) -> dict[str, Any]:
    """Decide how input ids are extended.

    Args:
        program: The program before the pass.
        site: The token embedding.
        tokens: Number of prompt tokens.

    Returns:
        `filler`, an id to pad with that is not the model's padding id; and `limits`, the new upper bound of the
        sequence length, if there is one.

    Raises:
        PassError: A table of positions has no room for the prompt and the example input.
    """
    ids = input_of(_call_on_input(site).x)
    assert ids is not None
    padding = getattr(getattr(program.base.loaded.module, "config", None), "pad_token_id", None)
    # The model may derive its attention mask from the padding id, which would then hide the prompt.
    found: dict[str, Any] = {"filler": 1 if padding == 0 else 0}
    for axis in list_axes(program.captured):
        if axis.input == ids.target and axis.axis == 1 and axis.high < _UNBOUNDED:
            length = int(program.example_inputs[1].get(axis.input, torch.empty(0, 0)).shape[1])
            if axis.high - tokens <= max(length, axis.low):
                raise PassError(
                    f"prompt at {site.path}: {tokens} tokens leave {axis.high - tokens} of {axis.high} positions, but "
                    f"the example input has {length}; use fewer --tokens"
                )
            found["limits"] = {axis.root: axis.high - tokens}
    return found


def read(program: State, text: str, tokens: int) -> list[int]:
    """Tokenize a text with the model's own tokenizer.

    Args:
        program: A program whose model was loaded with its tokenizer.
        text: The text.
        tokens: Number of ids to return; the text is repeated or cut to it.

    Raises:
        PassError: There is no tokenizer, or it finds no tokens in the text.
    """
    where = program.base.loaded.metadata.get("tokenizer")
    if not where or not any(Path(where).glob("*token*")):
        raise PassError(
            "prompt: --text needs the model's tokenizer; load the model from an hf: directory that has one, or use "
            "--init vocabulary"
        )
    try:
        from transformers import AutoTokenizer

        # Without the argument transformers asks on the terminal whether to run a tokenizer's code.
        ids = AutoTokenizer.from_pretrained(where, trust_remote_code=False)(text, add_special_tokens=False)[
            "input_ids"
        ]
    except Exception as error:
        first = (str(error).splitlines() or ["no message"])[0]
        raise PassError(
            f"prompt: the tokenizer of {where} cannot read --text ({first}); use --init vocabulary"
        ) from None
    if not ids:
        raise PassError("prompt: --text contains no tokens; write a longer text")
    return [int(ids[i % len(ids)]) for i in range(tokens)]


def _call_on_input(site: Site) -> Call:
    return next(call for call in site.calls if _reads_ids(call))


def stand_before_ids(site: Site, g: Rewriter, prompt: fx.Node, tokens: int) -> None:
    """Pad the ids and the inputs that go with them, write the prompt over the first embeddings, and trim the outputs.

    The model computes masks and positions from the padded inputs, so they cover the prompt without further edits.

    Args:
        site: The token embedding.
        g: The rewriter.
        prompt: Prompt embeddings (tokens × d).
        tokens: Number of prompt tokens.
    """
    call = _call_on_input(site)
    ids = input_of(call.x)
    assert ids is not None
    earlier = _padded_by(ids)
    moved: dict[fx.Node, fx.Node] = {}
    for node in _companions(g.view, ids):
        fill = site.decided["filler"] if node is ids else 0 if _is_index(g.view, node) else 1
        before = output_with_adapters(node)
        value = g.wrap(node, partial(_pad, g, tokens, fill))
        moved[value] = before

    # Sizes of the outputs before they grow, to find the axes that must be trimmed afterwards.
    output = g.graph.output_node()
    returned = {n: _sizes(n) for n in output.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    g.propagate_sizes(moved)

    def put(value: fx.Node) -> fx.Node:
        # Earlier prompts occupy the first positions; this one follows them.
        parts = [g.call(aten.slice.Tensor, value, 1, 0, earlier)] if earlier else []
        rest = g.call(aten.slice.Tensor, value, 1, earlier + tokens, _END)
        return g.call(aten.cat.default, [*parts, _rows(g, value, prompt), rest], 1)

    g.wrap(call.node, put, grown=True)
    _cut(g, output, returned, tokens)


def append_to_stream(g: Rewriter, prompt: fx.Node, tokens: int) -> None:
    """Append the prompt to the sequence before the first block, and remove it after the last.

    Args:
        g: The rewriter.
        prompt: Prompt vectors (tokens × d).
        tokens: Number of prompt tokens.
    """
    first, last = stream(g.view)
    moved: dict[fx.Node, fx.Node] = {}
    before = output_with_adapters(first.input, whole=True)
    longer = g.wrap(first.input, lambda v: g.call(aten.cat.default, [v, _rows(g, v, prompt)], 1), grown=True)
    moved[longer] = before
    before = output_with_adapters(last.output, whole=True)
    shorter = g.wrap(last.output, lambda v: g.call(aten.slice.Tensor, v, 1, 0, -tokens), grown=True)
    moved[shorter] = before
    g.propagate_sizes(moved)


def _pad(g: Rewriter, tokens: int, fill: int, value: fx.Node) -> fx.Node:
    return g.call(aten.constant_pad_nd.default, value, [tokens, 0], fill)


def _rows(g: Rewriter, like: fx.Node, prompt: fx.Node) -> fx.Node:
    """Expand the prompt to the batch size of another value."""
    batch = g.call(aten.sym_size.int, like, 0)
    return g.call(aten.expand.default, g.call(aten.unsqueeze.default, prompt, 0), [batch, -1, -1])


def _padded_by(ids: fx.Node) -> int:
    """Return the number of tokens that earlier prompts put before the ids."""
    total, node = 0, output_with_adapters(ids)
    while node is not ids:
        if node.target is aten.constant_pad_nd.default:
            total += int(node.args[1][0])  # type: ignore[index, arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return total


def _companions(view: View, ids: fx.Node) -> list[fx.Node]:
    """Return the ids and every other input of the same shape, such as masks and token types."""
    shape = _sizes(ids)
    inputs = [n for n in view.graph.nodes if n.op == "placeholder" and "val" in n.meta]
    return [n for n in inputs if isinstance(n.meta["val"], torch.Tensor) and _sizes(n) == shape]


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _is_index(view: View, node: fx.Node) -> bool:
    """True if an input indexes an embedding (types, positions); otherwise it is a mask."""
    return any(call.kind == EMBEDDING and input_of(call.x) is node for call in view.calls)


def _cut(g: Rewriter, output: fx.Node, before: dict[fx.Node, list[str]], tokens: int) -> None:
    """Remove the prompt's positions from the outputs, along every axis that has grown."""
    for node, sizes in before.items():
        value = node
        for dim in [dim for dim, size in enumerate(_sizes(node)) if size != sizes[dim]]:
            value = g.replace_argument(output, value, partial(_without_front, g, dim, tokens))


def _without_front(g: Rewriter, dim: int, tokens: int, value: fx.Node) -> fx.Node:
    return g.call(aten.slice.Tensor, value, dim, tokens, _END)


__all__ = ["append_to_stream", "embedding_of_ids", "input_of", "stand_before_ids", "stream"]
