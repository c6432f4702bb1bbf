"""Facts about a program that an objective needs to make batches for it: inputs, output widths, lengths, tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.capture.normalization import normalization_of
from surgery.capture.shapes import input_names, list_axes
from surgery.capture.types import Captured, LoadedModel
from surgery.common.errors import TrainingError
from surgery.graph.outputs import named_outputs
from surgery.train.images import Images

if TYPE_CHECKING:
    from surgery.engine.program import Program

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """The data context of an objective: the program's inputs and outputs, and decisions about the data.

    Attributes:
        inputs: example inputs of the program, by name.
        widths: size of the last axis of each output, by name.
        longest: maximum number of tokens of an example.
        fixed: the only sequence length the program accepts, or None.
        tokenizer: tokenizer of the program, or None.
        images: image format of the program if images are its only input, or None.
        columns: data column of each option.
        decided: result of the objective's `decide`.
        labels: class names of the program's outputs, by output.
        pads: the token id that the model's configuration calls padding, or None.
        prompt: text that the model puts before every text.
        counts: number of rows for each sentence about rows, such as "was cut".
    """

    inputs: Mapping[str, Tensor]
    widths: Mapping[str, int]
    longest: int
    fixed: int | None = None
    tokenizer: Any = None
    images: Images | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    decided: Mapping[str, Any] = field(default_factory=dict)
    pads: int | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompt: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def of(program: Program, tokenizer: Any = None, longest: int = 512) -> Setting:
        """Read the context of a program.

        Args:
            program: program to train.
            tokenizer: its tokenizer, or None.
            longest: maximum number of tokens of an example. The program and the tokenizer may lower it.
        """
        captured = program.captured
        longest, fixed = token_limits(captured, tokenizer, longest)
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
                images = Images.of(normalization_of(program.base.loaded), name, only)
        return Setting(
            inputs,
            widths,
            longest,
            fixed,
            tokenizer,
            images,
            pads=padding_of(program.base.loaded.config),
            labels=dict(program.labels),
            prompt=prompt_of(program.base.loaded),
        )

    def count(self, sentence: str) -> None:
        """Count one more row for which a sentence is true."""
        self.counts[sentence] += 1

    def need_reader(self, objective: str) -> None:
        """Check that the program's inputs can be made from rows.

        Raises:
            TrainingError: the program reads neither images nor tokens with a known tokenizer.
        """
        if self.images is None:
            self.need_tokenizer(objective)

    def need_tokenizer(self, objective: str) -> Any:
        """Return the tokenizer.

        Raises:
            TrainingError: there is no tokenizer, or the program has no `input_ids`.
        """
        if "input_ids" not in self.inputs:
            raise TrainingError(
                f"objective {objective!r} reads text, but the model takes {', '.join(self.inputs) or 'no named input'}"
            )
        if self.tokenizer is None:
            raise TrainingError(
                "no tokenizer was found beside the model; name its directory with --tokenizer"
            )
        return self.tokenizer

    def width(self, output: str, objective: str) -> int:
        """Return the size of the last axis of an output.

        The name `logits` also matches the only output of a program that has one output.

        Args:
            output: name of the output.
            objective: name of the objective, for the error.

        Raises:
            TrainingError: there is no such output.
        """
        return self.widths[self.output_of(output, objective)]

    def output_of(self, output: str, objective: str) -> str:
        """Return the name of an output of the program, see `width`.

        Raises:
            TrainingError: there is no such output.
        """
        if output in self.widths:
            return output
        if len(self.widths) == 1 and output == "logits":
            return next(iter(self.widths))
        raise TrainingError(
            f"objective {objective!r}: the model has no output {output!r}, only {', '.join(self.widths)}; add one "
            f"with --pass head, or load the model with a --task"
        )

    def pad(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        """Make the program's inputs from examples: images, or tokens padded on the right.

        Tokens are padded to the longest example, or to the fixed length of the program.

        Raises:
            TrainingError: the program has an input that examples do not contain.
        """
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
                raise TrainingError(f"the model takes {name!r}, which this objective does not provide")
            made[name] = padded(rows, self.padding if name == "input_ids" else 0, length)
        return made

    @property
    def padding(self) -> int:
        """The token id that fills up short rows: the model's, else the tokenizer's.

        The attention mask hides it, but some models also find the last token, or number positions, by it.
        """
        known = (self.pads, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return int(next((found for found in known if found is not None), 0))


def token_limits(model: LoadedModel | Captured, tokenizer: Any, longest: int) -> tuple[int, int | None]:
    """Return the maximum number of tokens of an example, and the only number that the model accepts, or None.

    Args:
        model: model with its example inputs and dynamic dimensions.
        tokenizer: its tokenizer, or None.
        longest: maximum number that the user allows.
    """
    fixed: int | None = None
    ids = model.kwargs.get("input_ids")
    if ids is not None:
        axis = next((a for a in list_axes(model) if (a.input, a.axis) == ("input_ids", 1)), None)
        # A program captured without a dynamic token axis accepts only the length of its example.
        if axis is None:
            longest = fixed = int(ids.shape[1])
        else:
            longest = min(longest, axis.high * axis.scale + axis.offset)
    if tokenizer is not None:
        longest = min(longest, tokenizer.model_max_length)
    return longest, fixed


def prompt_of(loaded: LoadedModel) -> str:
    """The text that a model of sentence-transformers puts before every text, usually none."""
    return str(loaded.metadata.get("sentence", {}).get("prompt", ""))


def padding_of(config: Any) -> int | None:
    """The padding token in the configuration of a transformers model, if the model has an embedding for it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    return found if isinstance(found, int) and found >= 0 and (size is None or found < size) else None


def padded(rows: Sequence[Sequence[int]], value: int, length: int) -> Tensor:
    """Stack rows of integers into one tensor.

    Args:
        rows: rows of at most `length` integers.
        value: padding value.
        length: length of every row afterwards, padded on the right.
    """
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
