"""What rewards responses, by name: a program, or a function of texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.api import Program, Setting, SurgeryError, TrainingError, find_tokenizer, imported, load
from torch_surgery_rl.language import Rollout
from torch_surgery_rl.reward import of_program, on_texts, score

FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
LOADERS = ("hf:", "timm:", "py:")


class Judge(nn.Module):
    """Rewards rollouts, of which it sees texts, or, where a program's tokenizer is the policy's, tokens."""

    def __init__(self, source: Any, label: int | None = None, reads: str = "whole") -> None:
        super().__init__()
        self.source, self.label, self.reads = source, label, reads
        self.reader: Any = None
        self.output = ""
        if isinstance(source, Program):
            self.reader, self.output = find_tokenizer(source), _output(source, label)

    @staticmethod
    def of(name: str, label: int | None = None, reads: str = "whole") -> Judge:
        """The judge of that name: a saved directory, a reference that `surgery.load` takes, or MODULE:FUNCTION.

        Raises TrainingError where it is none of these, LoadError where it cannot be loaded.
        """
        found = FUNCTION.fullmatch(name)
        if (name and Path(name).is_dir()) or name.startswith(LOADERS):
            return Judge(load(name), label, reads)
        if not found:
            raise TrainingError(
                f"--reward {name!r}: give the directory of a program that judges, or MODULE:FUNCTION"
            )
        if label is not None:
            raise TrainingError(f"--reward-class is of a program, and --reward {name} a function")
        function = imported(name, *found.groups())
        if not callable(function):
            raise TrainingError(f"--reward {name}: that is a {type(function).__name__}, and no function")
        return Judge(function)

    def forward(self, rollout: Rollout, tokenizer: Any) -> Tensor:
        """One number for each response. tokenizer: the policy's."""
        if not isinstance(self.source, Program):
            return score(on_texts(self._called, tokenizer), rollout)
        own = self.reader is None or self.reader.get_vocab() == tokenizer.get_vocab()
        reward = of_program(
            self.source, label=self.label, tokenizer=tokenizer, reader=None if own else self.reader,
            output=self.output, whole=self.reads == "whole",
        )  # fmt: skip
        return score(reward, rollout)

    def _called(self, prompts: list[str], responses: list[str]) -> Any:
        try:
            return self.source(prompts, responses)
        except SurgeryError:
            raise
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            raise TrainingError(f"the reward function raised {type(error).__name__}: {said}") from error


def _output(program: Program, label: int | None) -> str:
    """The output that judges: the one of a single value, or that of the classes."""
    widths = Setting.of(program).widths
    if label is not None:
        return "logits" if "logits" in widths else next(iter(widths), "logits")
    single = [name for name, width in widths.items() if width == 1]
    if len(single) != 1:
        there = ", ".join(f"{name} ({width})" for name, width in widths.items())
        raise TrainingError(
            f"the reward program has no one output of a single value, but {there}; give --reward-class N for the "
            f"log-probability of a class"
        )
    return single[0]
