"""Examples laid in one row: no padding, and none sees another, which is tried on the model itself before it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting, padded
from surgery.train.objective import Batch, output, run
from surgery.train.tokens import IGNORED, TokenObjective

# Of the logits' scale. Attention over one row in the place of several sums in another order; what leaks is far above.
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class PackingObjective(TokenObjective):
    """With `packing` a batch is one row: the examples one behind the other, whole, with positions that begin anew at
    each. There is no attention mask, so transformers' own masks keep examples apart by these positions."""

    packing: bool = Field(
        False,
        description="lay the examples of a batch in one row without padding, none seeing another (live transformers "
        "models; worth it where lengths differ much)",
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
        """Raises TrainingError for a module that does not keep packed examples apart."""
        if not self.packing:
            return
        if form != "live":
            raise TrainingError(
                f"{self.name} --packing needs the live transformers model, and this trains as its graph; leave it out"
            )
        apart = in_rows(batch)
        try:
            packed = output(run(module, batch), "logits")[0]
        except TypeError as error:
            raise _refused(self.name, f"the model does not take positions ({error})") from None
        expected = output(run(module, apart), "logits")[apart["inputs"]["attention_mask"].bool()]
        moved = float((packed - expected).abs().max() / expected.abs().max())
        if not moved <= SAME.get(packed.dtype, 5e-2):
            raise _refused(
                self.name, f"packed examples see one another (logits move by {moved:.1e} of their scale)"
            )


def _refused(name: str, why: str) -> TrainingError:
    return TrainingError(f"{name} --packing: {why}; leave it out")


def in_rows(batch: Batch) -> Batch:
    """The examples of a packed batch as rows with an attention mask, padded on the right."""
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
