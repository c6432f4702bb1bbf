"""The graph of a prompt: more tokens where ids enter a model, or in the stream of a model that reads no ids."""

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
    """The input that a value is, through views and casts and what passes put round it; None where it is computed."""
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
    return call.kind == EMBEDDING and call.weight is not None and input_of(call.x) is not None


def embedding_of_ids(view: View) -> Site | None:
    """The first embedding of tokens that reads an input as it is: the encoder's, where there is a decoder too."""
    for call in view.calls:
        if _reads_ids(call) and view.site_of(call.node).role == "embed.token":
            return view.site_of(call.node)
    return None


def stream(view: View) -> tuple[Block, Block]:
    """The first and the last of the longest row of blocks. PassError where there is none."""
    row = max(view.blocks, key=len, default=())
    if not row:
        raise PassError("prompt: the model has no row of blocks over a sequence; use lora or adapter")
    return row[0], row[-1]


def first_of_stream(view: View) -> Site | None:
    rows = view.blocks
    return view.site_of(max(rows, key=len)[0].calls[0].node) if rows else None


def refuse_stream(view: View) -> str | None:
    """Why the stream takes no more tokens, or None."""
    first, last = stream(view)
    for node in (first.input, last.output):
        if node.meta["val"].dim() != 3:
            sizes = "×".join(map(str, node.meta["val"].shape))
            return f"its stream is {sizes}, no sequence of vectors; use adapter, or expand --side conv"
    return None


def room(program: State, site: Site, tokens: int) -> dict[str, Any]:
    """What is decided for ids: the new bound of their length, and an id to pad with that is no padding.

    Raises PassError where a table of positions has no room for the prompt and the example.
    """
    ids = input_of(_call_on_input(site).x)
    assert ids is not None
    padding = getattr(getattr(program.base.loaded.module, "config", None), "pad_token_id", None)
    found: dict[str, Any] = {"filler": 1 if padding == 0 else 0}
    for axis in list_axes(program.captured):
        if axis.input == ids.target and axis.axis == 1 and axis.high < _UNBOUNDED:
            length = int(program.example_inputs[1].get(axis.input, torch.empty(0, 0)).shape[1])
            if axis.high - tokens <= max(length, axis.low):
                raise PassError(
                    f"prompt at {site.path}: {tokens} tokens leave {axis.high - tokens} of {axis.high} positions, and "
                    f"the example has {length}; use fewer --tokens"
                )
            found["limits"] = {axis.root: axis.high - tokens}
    return found


def read(program: State, text: str, tokens: int) -> list[int]:
    """The ids of a text by the model's own tokenizer, repeated or cut to a number of tokens. Raises PassError."""
    where = program.base.loaded.metadata.get("tokenizer")
    if not where or not any(Path(where).glob("*token*")):
        raise PassError(
            "prompt: --text needs the model's tokenizer, which lies beside an hf: model; use --init vocabulary"
        )
    try:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(where)(text, add_special_tokens=False)["input_ids"]
    except Exception as error:
        first = (str(error).splitlines() or ["no message"])[0]
        raise PassError(f"prompt: the tokenizer of {where} cannot read --text: {first}") from None
    if not ids:
        raise PassError("prompt: --text has no token in it")
    return [int(ids[i % len(ids)]) for i in range(tokens)]


def _call_on_input(site: Site) -> Call:
    return next(call for call in site.calls if _reads_ids(call))


def stand_before_ids(site: Site, g: Rewriter, prompt: fx.Node, tokens: int) -> None:
    """Pad the ids and what goes with them, put the prompt in the first rows, and cut it off the outputs."""
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

    output = g.graph.output_node()
    returned = {n: _sizes(n) for n in output.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    g.propagate_sizes(moved)

    def put(value: fx.Node) -> fx.Node:
        parts = [g.call(aten.slice.Tensor, value, 1, 0, earlier)] if earlier else []
        rest = g.call(aten.slice.Tensor, value, 1, earlier + tokens, _END)
        return g.call(aten.cat.default, [*parts, _rows(g, value, prompt), rest], 1)

    g.wrap(call.node, put, grown=True)
    _cut(g, output, returned, tokens)


def append_to_stream(g: Rewriter, prompt: fx.Node, tokens: int) -> None:
    """More vectors at the end of the sequence from the first block to the last."""
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
    """The prompt for every row of the batch."""
    batch = g.call(aten.sym_size.int, like, 0)
    return g.call(aten.expand.default, g.call(aten.unsqueeze.default, prompt, 0), [batch, -1, -1])


def _padded_by(ids: fx.Node) -> int:
    """How many tokens earlier prompts put before these ids."""
    total, node = 0, output_with_adapters(ids)
    while node is not ids:
        if node.target is aten.constant_pad_nd.default:
            total += int(node.args[1][0])  # type: ignore[index, arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return total


def _companions(view: View, ids: fx.Node) -> list[fx.Node]:
    """The ids, and every other input of their shape."""
    shape = _sizes(ids)
    inputs = [n for n in view.graph.nodes if n.op == "placeholder" and "val" in n.meta]
    return [n for n in inputs if isinstance(n.meta["val"], torch.Tensor) and _sizes(n) == shape]


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _is_index(view: View, node: fx.Node) -> bool:
    """Whether an input chooses rows of an embedding (types, positions); else it is a mask."""
    return any(call.kind == EMBEDDING and input_of(call.x) is node for call in view.calls)


def _cut(g: Rewriter, output: fx.Node, before: dict[fx.Node, list[str]], tokens: int) -> None:
    """Let the graph return real positions only, along every axis that has grown."""
    for node, sizes in before.items():
        value = node
        for dim in [dim for dim, size in enumerate(_sizes(node)) if size != sizes[dim]]:
            value = g.replace_argument(output, value, partial(_without_front, g, dim, tokens))


def _without_front(g: Rewriter, dim: int, tokens: int, value: fx.Node) -> fx.Node:
    return g.call(aten.slice.Tensor, value, dim, tokens, _END)


__all__ = ["append_to_stream", "embedding_of_ids", "input_of", "stand_before_ids", "stream"]
