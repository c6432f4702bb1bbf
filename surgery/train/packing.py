"""Packs the examples of a batch into one row without padding.

Examples must not attend to each other. This is tested on the model itself before training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting, padded
from surgery.train.objective import Batch, output, run
from surgery.train.tokens import IGNORED, TokenObjective

# Allowed change of the logits, relative to the largest. Packing changes the order of sums in attention; attention
# between examples changes the logits far more than that.
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class PackingObjective(TokenObjective):
    """Base of token objectives that can pack a batch into one row.

    With `packing`, whole examples follow each other in one row, and `position_ids` restart at 0 for each. There is no
    attention mask: transformers derives a block-diagonal mask from the positions.
    """

    packing: bool = Field(
        default=False,
        description="pack the examples of a batch into one row without padding or attention between them (live "
        "transformers models; useful if lengths differ much)",
    )

    def labelled(self, examples: Sequence[Row], setting: Setting) -> Batch:
        if not self.packing:
            return super().labelled(examples, setting)
        rows = [(e["input_ids"], e["labels"]) for e in examples]
        inputs = {
            "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
            "position_ids": torch.tensor([[place for ids, _ in rows for place in range(len(ids))]]),
        }
        labels = torch.tensor([[label for _, row in rows for label in row]])
        return {"inputs": inputs, "labels": labels, "padding": setting.padding}

    def unpacked(self, batch: Batch) -> Batch:
        return in_rows(batch) if self.packing else batch

    @torch.no_grad()
    def check(self, module: nn.Module, batch: Batch, form: str) -> None:
        """Check that the model keeps packed examples apart.

        Raises:
            TrainingError: the model does not, or the program trains as its graph.
        """
        if not self.packing:
            return
        if form != "live":
            raise TrainingError(
                f"{self.name} --packing needs the live transformers model, but this program trains as its graph; "
                f"leave it out"
            )
        apart = in_rows(batch)
        try:
            packed = output(run(module, batch), "logits")[0]
        except TypeError as error:
            raise _refused(self.name, f"the model does not accept position_ids ({error})") from None
        # Without leaks the packed row has the same logits as the examples in separate padded rows.
        expected = output(run(module, apart), "logits")[apart["inputs"]["attention_mask"].bool()]
        moved = float((packed - expected).abs().max() / expected.abs().max())
        if not moved <= SAME.get(packed.dtype, 5e-2):
            raise _refused(
                self.name,
                f"packed examples attend to each other (logits change by {moved:.1e} of their scale)",
            )


def _refused(name: str, why: str) -> TrainingError:
    return TrainingError(f"{name} --packing: {why}; leave it out")


def in_rows(batch: Batch) -> Batch:
    """Split a packed batch into padded rows with an attention mask."""
    inputs = batch["inputs"]
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    sizes = [
        end - start for start, end in zip(starts, [*starts[1:], inputs["position_ids"].shape[1]], strict=True)
    ]

    def rows(tensor: Tensor, value: int) -> Tensor:
        return padded([part.tolist() for part in tensor[0].split(sizes)], value, max(sizes)).to(tensor.device)

    mask = rows(torch.ones_like(inputs["input_ids"]), 0)
    made = {"input_ids": rows(inputs["input_ids"], batch["padding"]), "attention_mask": mask}
    return {"inputs": made, "labels": rows(batch["labels"], IGNORED)}
