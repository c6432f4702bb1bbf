"""reward: score answers, learned from preference pairs."""

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
    """Reward model (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, section 3.5): the score r of the
    preferred answer should be higher than the score of the other.

        L = −mean log σ(r(x, y_chosen) − r(x, y_rejected))

    r is an output with one value. It may be given per row (`--pass head --mode add --labels 1 --head-name reward
    --pool last`) or per token (`--pool none`, or a head that replaces a language model's head). Per token, the last
    token counts.

    Rows have a prompt, a chosen and a rejected answer, as texts or messages. Without a prompt column, the common
    start of both dialogues is the prompt. A dialogue ends with the token that ends its answer, like a sampled
    response, and is cut at --max-length. A pair whose answers are then equal is skipped, and the log reports how many
    were.

    The metrics are the loss, the share of pairs in which the preferred answer has the higher score (accuracy; a tie
    counts one half), and the mean difference of the scores (margin).
    """

    name: ClassVar[str] = "reward"
    example: ClassVar[str] = (
        "surgery train hf:HuggingFaceTB/SmolLM2-135M-Instruct --task text-classification "
        "--model-kwarg num_labels=1 --objective reward --data preferences.jsonl -o judge/"
    )
    metric: ClassVar[str] = "accuracy"
    larger: ClassVar[bool] = True
    heads: ClassVar[tuple[str, ...]] = ("text-classification",)

    score: str | None = Field(
        default=None, description="output that is the score (default: the only output with one value)"
    )

    def outputs_for(self, rows: Any) -> int | None:
        return 1

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        decided = super().decide(rows, setting)
        single = [name for name, width in setting.widths.items() if width == 1]
        name = self.score or (single[0] if len(single) == 1 else None)
        if name is None and single:
            raise TrainingError(
                f"objective 'reward': several outputs have one value ({', '.join(single)}); name one with --score"
            )
        if name is None or setting.widths.get(name) != 1:
            there = ", ".join(f"{n} ({width})" for n, width in setting.widths.items())
            problem = (
                f"{name!r} is not an output with one value"
                if name
                else "the model has no output with one value"
            )
            raise TrainingError(
                f"objective 'reward': {problem}, only {there}; add one with --pass head --mode add --labels 1 "
                f"--head-name reward --pool last"
            )
        return {**decided, "output": name}

    def collate(self, examples: Any, setting: Setting, draw: Any) -> Batch:
        return {**super().collate(examples, setting, draw), "output": setting.decided["output"]}

    def scores(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the score of each row."""
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
