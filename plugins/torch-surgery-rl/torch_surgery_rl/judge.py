"""Reward sources by name: a program, or a function of texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.api import SurgeryError
from surgery.api.programs import Program, TrainingError, imported, load
from surgery.api.training import Setting, find_tokenizer
from torch_surgery_rl.language import Rollout
from torch_surgery_rl.reward import of_program, on_texts, score

FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
LOADERS = ("hf:", "timm:", "py:")


class Judge(nn.Module):
    """Computes the rewards of a rollout.

    A function reads texts. A program reads tokens if it has the policy's tokenizer, else texts.
    """

    def __init__(self, source: Any, label: int | None = None, reads: str = "whole") -> None:
        """Make a judge. Use `of` to load one by name.

        Args:
            source: a program, or a function of lists of prompts and responses.
            label: class whose log-probability is the reward, or None for a single score.
            reads: "whole" to judge the response with its prompt, "response" to judge it alone.

        Raises:
            TrainingError: the program has no suitable output.
        """
        super().__init__()
        self.source, self.label, self.reads = source, label, reads
        self.reader: Any = None
        self.output = ""
        if isinstance(source, Program):
            self.reader, self.output = find_tokenizer(source), _output(source, label)

    @staticmethod
    def of(name: str, label: int | None = None, reads: str = "whole") -> Judge:
        """Load a judge: a saved directory, a reference for `surgery.load`, or MODULE:FUNCTION.

        Args:
            name: name of the judge.
            label: class whose log-probability is the reward, or None for a single score.
            reads: "whole" to judge the response with its prompt, "response" to judge it alone.

        Raises:
            TrainingError: the name is invalid.
            LoadError: the program or function cannot be loaded.
        """
        found = FUNCTION.fullmatch(name)
        if (name and Path(name).is_dir()) or name.startswith(LOADERS):
            return Judge(load(name), label, reads)
        if not found:
            raise TrainingError(
                f"--reward {name!r} is unknown; give the directory of a reward program, or MODULE:FUNCTION"
            )
        if label is not None:
            raise TrainingError(
                f"--reward-class needs a program, but --reward {name} is a function; leave it out"
            )
        function = imported(name, *found.groups())
        if not callable(function):
            raise TrainingError(f"--reward {name} is of type {type(function).__name__}; give a function")
        return Judge(function)

    def forward(self, rollout: Rollout, tokenizer: Any) -> Tensor:
        """Return one reward per response. `tokenizer` is that of the policy."""
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
            raise TrainingError(
                f"the reward function raised {type(error).__name__}: {said}; fix it"
            ) from error


def _output(program: Program, label: int | None) -> str:
    """Return the output to judge by: the only one with a single value, or the one with the classes."""
    widths = Setting.of(program).widths
    if label is not None:
        return "logits" if "logits" in widths else next(iter(widths), "logits")
    single = [name for name, width in widths.items() if width == 1]
    if len(single) != 1:
        there = ", ".join(f"{name} ({width})" for name, width in widths.items())
        raise TrainingError(
            f"the reward program needs one output with a single value, but has {there}; for the log-probability of a "
            f"class give --reward-class N"
        )
    return single[0]
