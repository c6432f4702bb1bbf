"""reward: a number for an answer, from pairs of which people preferred one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.common.errors import TrainingError
from surgery.train.data_context import Setting
from surgery.train.objective import Batch, output, run
from surgery.train.pairs import PairObjective, pair_accuracy


class Reward(PairObjective):
    """A reward model (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, section 3.5): the score r of the
    answer that was preferred is to be above the other's,

        L = −mean log σ(r(x, y_chosen) − r(x, y_rejected))

    r is an output of one value: for each row, as `--pass head --mode add --labels 1 --head-name reward --pool last`
    gives it, or for each token (`--pool none`, or a head in the place of a language model's), of which the last one
    counts. Rows are prompt, chosen and rejected, texts or messages; of messages alone, what both begin with is the
    prompt. A dialogue ends with the token that ends its answer, as one that a policy samples does, and is cut at
    --max-length; a pair of which nothing that differs is left is left out, and the number of these is said. The
    figures are the loss, how often the better answer has the higher score (accuracy; a tie is half of one), and by how
    much (margin).
    """

    name: ClassVar[str] = "reward"
    metric: ClassVar[str] = "accuracy"
    larger: ClassVar[bool] = True

    score: str | None = Field(None, description="the output that is the score (default: that of one value)")

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        decided = super().decide(rows, setting)
        single = [name for name, width in setting.widths.items() if width == 1]
        name = self.score or (single[0] if len(single) == 1 else None)
        if name is None and single:
            raise TrainingError(
                f"objective 'reward': the outputs {', '.join(single)} have one value; name one with --score"
            )
        if name is None or setting.widths.get(name) != 1:
            there = ", ".join(f"{n} ({width})" for n, width in setting.widths.items())
            what = f"{name!r} is no output of one value" if name else "the model has no output of one value"
            raise TrainingError(
                f"objective 'reward': {what}, only {there}; put one on with --pass head --mode add --labels 1 "
                f"--head-name reward --pool last"
            )
        return {**decided, "output": name}

    def collate(self, examples: Any, setting: Setting, draw: Any) -> Batch:
        return {**super().collate(examples, setting, draw), "output": setting.decided["output"]}

    def scores(self, module: nn.Module, batch: Batch) -> Tensor:
        """The score of each row."""
        found = output(run(module, batch), batch["output"]).squeeze(-1).float()
        rows = torch.arange(len(found), device=found.device)
        return found[rows, batch["last"]] if found.dim() == 2 else found

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        chosen, rejected = self.scores(module, batch).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        chosen, rejected = self.scores(module, batch).chunk(2)
        return {"margin": chosen - rejected}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        margin = observed["margin"].double()
        return {
            "loss": float(-F.logsigmoid(margin).mean()),
            "accuracy": pair_accuracy(margin),
            "margin": float(margin.mean()),
        }
