"""What an objective has to know of a program to make batches for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.capture.shapes import input_names, list_axes
from surgery.common.errors import TrainingError
from surgery.graph.outputs import named_outputs
from surgery.train.images import Images

if TYPE_CHECKING:
    from surgery.engine.program import Program

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """inputs: the program's inputs by name, as in its example. widths: the last axis of each of its outputs.

    longest: the most tokens of an example. fixed: the one length that the program takes, or None. tokenizer: None
    where there is none. images: how the program takes images, where these are its one input. columns: option -> column
    of the data. decided: what the objective decided of the data. counts: sentences about rows -> of how many they are
    true.
    """

    inputs: Mapping[str, Tensor]
    widths: Mapping[str, int]
    longest: int
    fixed: int | None = None
    tokenizer: Any = None
    images: Images | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    decided: Mapping[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def of(program: Program, tokenizer: Any = None, longest: int = 512) -> Setting:
        """The setting of a program, which may lower `longest`."""
        captured = program.captured
        fixed: int | None = None
        ids = captured.kwargs.get("input_ids")
        if ids is not None:
            axis = next((a for a in list_axes(captured) if (a.input, a.axis) == ("input_ids", 1)), None)
            if axis is None:
                longest = fixed = int(ids.shape[1])
            else:
                longest = min(longest, axis.high * axis.scale + axis.offset)
        if tokenizer is not None:
            longest = min(longest, tokenizer.model_max_length)
        widths = {
            name: int(node.meta["val"].shape[-1])
            for name, node in named_outputs(program.graph).items()
            if getattr(node.meta.get("val"), "ndim", 0) and isinstance(node.meta["val"].shape[-1], int)
        }
        inputs = dict(zip(input_names(captured), [*captured.args, *captured.kwargs.values()], strict=True))
        images = None
        if len(inputs) == 1:
            ((name, only),) = inputs.items()
            if isinstance(only, Tensor) and only.dim() == 4 and only.is_floating_point():
                images = Images.of(program, name, only)
        return Setting(inputs, widths, longest, fixed, tokenizer, images)

    def count(self, sentence: str) -> None:
        """Remember that something is true of one more row."""
        self.counts[sentence] += 1

    def need_reader(self, objective: str) -> None:
        """Raises TrainingError where the program reads neither images, nor tokens that there is a tokenizer for."""
        if self.images is None:
            self.need_tokenizer(objective)

    def need_tokenizer(self, objective: str) -> Any:
        """The tokenizer. Raises TrainingError where there is none, or the program reads no tokens."""
        if "input_ids" not in self.inputs:
            raise TrainingError(
                f"objective {objective!r} is of text, and the model takes {', '.join(self.inputs) or 'no named input'}"
            )
        if self.tokenizer is None:
            raise TrainingError("no tokenizer was found with the model; name its directory with --tokenizer")
        return self.tokenizer

    def width(self, output: str, objective: str) -> int:
        """How many values an output has at its last axis. An objective's own `logits` are the one output of a program
        that has but one, whatever it is called."""
        if output in self.widths:
            return self.widths[output]
        if len(self.widths) == 1 and output == "logits":
            return next(iter(self.widths.values()))
        raise TrainingError(
            f"objective {objective!r}: the model has no output {output!r}; it gives {', '.join(self.widths)}; put one "
            f"on with --pass head, or load it with a --task"
        )

    def pad(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        """The program's inputs of examples: tokens, padded on the right to the longest, or images (`pixels`)."""
        if self.images is not None:
            return self.images.inputs(self.images.pixels([example["pixels"] for example in examples]))
        length = self.fixed or max(len(example["input_ids"]) for example in examples)
        made = {}
        for name in self.inputs:
            if name == "attention_mask":
                rows = [[1] * len(example["input_ids"]) for example in examples]
            elif name == "token_type_ids":
                rows = [example.get(name) or [0] * len(example["input_ids"]) for example in examples]
            elif name == "input_ids":
                rows = [example[name] for example in examples]
            else:
                raise TrainingError(f"the model takes {name!r}, which this objective does not give")
            made[name] = padded(rows, self.padding if name == "input_ids" else 0, length)
        return made

    @property
    def padding(self) -> int:
        """The token that fills up short rows, which the attention mask hides."""
        known = self.tokenizer.pad_token_id
        return int(known if known is not None else self.tokenizer.eos_token_id or 0)


def padded(rows: Sequence[Sequence[int]], value: int, length: int) -> Tensor:
    """Rows of whole numbers as one tensor, filled up on the right."""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
