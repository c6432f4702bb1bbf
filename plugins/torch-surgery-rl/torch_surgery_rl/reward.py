"""Rewards of rollouts: a function of texts or tokens, or a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.api import SurgeryError
from surgery.api.programs import Program
from torch_surgery_rl.language import Rollout

Reward = Callable[[Rollout], Any]


def score(reward: Reward, rollout: Rollout) -> Tensor:
    """Compute the reward of each row.

    Returns:
        N rewards, float32.

    Raises:
        SurgeryError: the reward is not one finite number per row.
    """
    device = rollout.actions.device
    scores = torch.as_tensor(reward(rollout), dtype=torch.float32, device=device).detach()
    if scores.shape != (len(rollout.actions),):
        raise SurgeryError(
            f"the reward has shape {tuple(scores.shape)} for {len(rollout.actions)} responses; "
            f"return one number for each"
        )
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise SurgeryError(
            f"the reward of response {wrong[0]} is {scores[wrong[0]].item()}; return finite numbers"
        )
    return scores


def on_tokens(function: Callable[[list[list[int]], list[list[int]]], Any]) -> Reward:
    """Make a reward of function(prompts, responses), called with lists of tokens."""
    return lambda rollout: function(rollout.prompts, rollout.responses)


def on_texts(function: Callable[[list[str], list[str]], Any], tokenizer: Any) -> Reward:
    """Make a reward of function(prompts, responses), called with texts without special tokens."""

    def reward(rollout: Rollout) -> Any:
        return function(_texts(rollout.prompts, tokenizer), _texts(rollout.responses, tokenizer))

    return reward


def of_program(
    program: Program,
    *,
    label: int | None = None,
    tokenizer: Any = None,
    reader: Any = None,
    output: str = "logits",
    whole: bool = True,
    rows: int = 32,
) -> Reward:
    """Make a reward of a program that reads prompt and response.

    The reward is the program's only score, or the log-probability of a class. If it has these per token, the last
    token counts.

    Args:
        program: the reward program.
        label: class whose log-probability is the reward, or None for a single score.
        tokenizer: tokenizer of the policy, needed with `reader`.
        reader: tokenizer of the program, if it differs from the policy's. The program then reads texts, else the
            policy's tokens.
        output: output with the score or the classes.
        whole: with `reader`, read the prompt too; False: read the response alone.
        rows: rows per forward pass.

    Raises:
        SurgeryError: `tokenizer` is missing. The reward itself raises it if the program does not fit the rollout.
    """
    if reader is not None and tokenizer is None:
        raise SurgeryError(
            "the reward program has its own tokenizer; pass the policy's too, to decode the texts"
        )
    needed = list(program.example_inputs[1])

    def reward(rollout: Rollout) -> Tensor:
        if reader is None:
            inputs = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask}
        else:
            asked = rollout.prompts if whole else [[] for _ in rollout.prompts]
            said = [a + b for a, b in zip(asked, rollout.responses, strict=True)]
            read = reader(_texts(said, tokenizer), padding=True, return_tensors="pt")
            most = getattr(reader, "model_max_length", None)
            if most is not None and read["input_ids"].shape[1] > most:
                raise SurgeryError(
                    f"the reward program reads {most} tokens, but a prompt with its response has "
                    f"{read['input_ids'].shape[1]}; lower --max-length, or judge responses alone (--reads response)"
                )
            inputs = {name: tensor.to(rollout.actions.device) for name, tensor in read.items()}
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        missing = [name for name in needed if name not in inputs]
        if missing:
            raise SurgeryError(
                f"the reward program needs the input {missing[0]!r}, which a rollout lacks; use another program"
            )
        found = []
        for start in range(0, len(rollout.actions), rows):
            given = program.run(**{name: inputs[name][start : start + rows] for name in needed})
            logits = given[output] if isinstance(given, dict) else given
            if logits.dim() == 3:
                last = inputs["attention_mask"][start : start + rows].sum(1) - 1
                logits = logits[torch.arange(len(logits), device=logits.device), last]
            found.append(_judged(logits, label))
        return torch.cat(found)

    return reward


def _judged(logits: Tensor, label: int | None) -> Tensor:
    if logits.dim() != 2 or (label is None and logits.shape[1] != 1):
        raise SurgeryError(
            f"the reward program's output has shape {tuple(logits.shape)}; "
            f"it must be rows × 1, or rows × classes with a class"
        )
    if label is None:
        return logits[:, 0]
    if not 0 <= label < logits.shape[1]:
        raise SurgeryError(
            f"the reward program has no class {label}; choose one from 0 to {logits.shape[1] - 1}"
        )
    return logits.log_softmax(-1)[:, label]


def _texts(rows: Sequence[list[int]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
