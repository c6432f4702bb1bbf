"""Lowering of `aten::rnn_tanh` and `aten::rnn_relu` to the RNN op of ONNX.

torch.onnx translates LSTM and GRU to ONNX's ops, but unrolls these two, which fixes the number of time steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.export.optional import require


def translation(activation: str) -> Any:
    """Create the onnxscript function for torch.onnx's translation table.

    Args:
        activation: name of ONNX's activation, "Tanh" or "Relu".
    """
    op = require("onnxscript").opset18

    def recurrent(
        x: Any,
        hidden: Any,
        params: Sequence[Any],
        has_biases: bool = True,
        num_layers: int = 1,
        dropout: float = 0.0,
        train: bool = False,
        bidirectional: bool = False,
        batch_first: bool = False,
    ) -> Any:
        ways, each = 2 if bidirectional else 1, 4 if has_biases else 2

        def ints(*values: int) -> Any:
            return op.Constant(value_ints=list(values))

        def joined(values: list[Any]) -> Any:
            """The values of all directions along a new first axis."""
            wide = [op.Unsqueeze(value, ints(0)) for value in values]
            return wide[0] if len(wide) == 1 else op.Concat(*wide, axis=0)

        value = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        last = []
        for layer in range(num_layers):
            own = [
                params[(layer * ways + way) * each : (layer * ways + way + 1) * each] for way in range(ways)
            ]
            biases = joined([op.Concat(p[2], p[3], axis=0) for p in own]) if has_biases else None
            start = op.Slice(hidden, ints(layer * ways), ints((layer + 1) * ways), ints(0))
            outputs, final = op.RNN(
                value,
                joined([p[0] for p in own]),
                joined([p[1] for p in own]),
                biases,
                None,
                start,
                hidden_size=own[0][1].shape[1],
                activations=[activation] * ways,
                direction="bidirectional" if bidirectional else "forward",
            )
            # (time, directions, batch, features) to (time, batch, directions * features)
            turned = op.Transpose(outputs, perm=[0, 2, 1, 3])
            value = op.Reshape(turned, ints(0, 0, -1))
            last.append(final)
        if batch_first:
            value = op.Transpose(value, perm=[1, 0, 2])
        return value, last[0] if num_layers == 1 else op.Concat(*last, axis=0)

    return recurrent
