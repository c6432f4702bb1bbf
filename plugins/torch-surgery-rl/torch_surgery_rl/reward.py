"""Rewards of rollouts: any function of their texts or tokens, or a program that judges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.api import Program, SurgeryError
from torch_surgery_rl.language import Rollout

Reward = Callable[[Rollout], Any]


def score(reward: Reward, rollout: Rollout) -> Tensor:
    """The reward of each row, N. Raises SurgeryError where it is not one finite number for each."""
    device = rollout.actions.device
    scores = torch.as_tensor(reward(rollout), dtype=torch.float32, device=device).detach()
    if scores.shape != (len(rollout.actions),):
        raise SurgeryError(
            f"the reward has shape {tuple(scores.shape)} for {len(rollout.actions)} responses; it is one number each"
        )
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise SurgeryError(f"the reward of response {wrong[0]} is {scores[wrong[0]].item()}")
    return scores


def on_tokens(function: Callable[[list[list[int]], list[list[int]]], Any]) -> Reward:
    """The reward function(prompts, responses) of tokens."""
    return lambda rollout: function(rollout.prompts, rollout.responses)


def on_texts(function: Callable[[list[str], list[str]], Any], tokenizer: Any) -> Reward:
    """The reward function(prompts, responses) of texts, special tokens left out."""

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
    """The reward that a program gives to prompt and response: its one score, or the log-probability of a label.

    Of a program with a score, or labels, for each token, that of the last one counts.

    With the policy's own tokens, or, where `reader` (the program's tokenizer) is given, with the text that `tokenizer`
    (the policy's) makes of them; whole: or of the response alone. rows: how many at a time.
    """
    if reader is not None and tokenizer is None:
        raise SurgeryError(
            "a reward program with a tokenizer of its own needs the policy's too, to make texts"
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
                    f"the reward program reads {most} tokens, and a prompt with its response has "
                    f"{read['input_ids'].shape[1]}; lower --max-length, or let it read responses alone"
                )
            inputs = {name: tensor.to(rollout.actions.device) for name, tensor in read.items()}
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        missing = [name for name in needed if name not in inputs]
        if missing:
            raise SurgeryError(f"the reward program takes {missing[0]!r} too, which a rollout does not have")
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
            f"the reward program gives {tuple(logits.shape)}; it has to give rows × 1, or rows × labels and a label"
        )
    if label is None:
        return logits[:, 0]
    if not 0 <= label < logits.shape[1]:
        raise SurgeryError(
            f"the reward program has no label {label}: there are {logits.shape[1]}, counted from 0"
        )
    return logits.log_softmax(-1)[:, label]


def _texts(rows: Sequence[list[int]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
