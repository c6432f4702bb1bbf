"""Language models as policies: sampling of responses with a KV cache, and log-probabilities of sampled tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.api import SurgeryError
from torch_surgery_rl.policy import evaluating


@dataclass(frozen=True)
class Rollout:
    """N prompts with sampled responses.

    Rows are padded on the right, so positions count from the first token for every kind of model.

    Attributes:
        input_ids: N × L, prompts followed by responses.
        attention_mask: N × L.
        prompt_lengths: N.
        actions: N × T, sampled tokens up to and including the first end token.
        mask: N × T, True for actions.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    actions: Tensor
    mask: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs of a LanguagePolicy."""
        steps = torch.arange(self.actions.shape[1], device=self.actions.device)
        # The logits at a position predict the next token, so the first action is predicted at the last token
        # of the prompt.
        positions = self.prompt_lengths.unsqueeze(1) - 1 + steps
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "positions": positions.clamp(max=self.input_ids.shape[1] - 1),
        }

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens of the prompts."""
        lengths = self.prompt_lengths.tolist()
        return [row[:n] for row, n in zip(self.input_ids.tolist(), lengths, strict=True)]

    @property
    def responses(self) -> list[list[int]]:
        """The tokens of the responses."""
        lengths = self.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(self.actions.tolist(), lengths, strict=True)]


class LanguagePolicy(nn.Module):
    """A causal language model as a policy: the state is the text so far, an action is the next token."""

    def __init__(self, module: nn.Module, *, value: str = "logits_value", temperature: float = 1.0) -> None:
        """Wrap a module.

        Args:
            module: module of a program (`program.module()`), a live transformers model, or a tail of a FrozenPart,
                which is also called with the cached values.
            value: output of a value head (surgery.Head(mode="add", labels=1, head_name="value", pool="none")). Without
                such an output the values are None.
            temperature: divisor of the logits, the same as in sampling.
        """
        super().__init__()
        self.module = module
        self.value = value
        self.temperature = temperature

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, **kept: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits and values at positions.

        Args:
            input_ids: N × L.
            attention_mask: N × L.
            positions: N × T.
            kept: cached values of a FrozenPart.

        Returns:
            Logits (N × T × vocabulary) and values (N × T, or None), in float32 at least.

        Raises:
            SurgeryError: the value output is not one value per token.
        """
        more: dict[str, Any] = {**kept, "positions": positions} if kept else {}
        if hasattr(self.module, "generate"):
            more["use_cache"] = False
        outputs = self.module(input_ids=input_ids, attention_mask=attention_mask, **more)
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)
        wide = torch.promote_types(outputs["logits"].dtype, torch.float32)
        narrowed = getattr(self.module, "narrowed", "") == "logits"
        logits = outputs["logits"] if narrowed else outputs["logits"][rows, positions]
        logits = logits.to(wide) / self.temperature
        values = outputs.get(self.value)
        if values is None:
            return logits, None
        if values.shape != (*input_ids.shape, 1):
            raise SurgeryError(
                f"{self.value!r} has the shape {tuple(values.shape)} instead of one value per token; add the head "
                f"with pool='none'"
            )
        return logits, values.squeeze(-1)[rows, positions].to(wide)


@torch.no_grad()
def roll_out(
    model: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    tokenizer: Any = None,
    temperature: float = 1.0,
    eos: int | Sequence[int] | None = None,
    pad: int | None = None,
) -> Rollout:
    """Sample a response to each prompt from a live model (`program.live()`), with its KV cache.

    Tokens are sampled from the policy's own distribution. Other options of the model's generation configuration
    (top_k, penalties) are ignored, as they would make the log-probabilities wrong. Draws come from torch's global
    generator.

    Args:
        model: live causal language model.
        prompts: texts, or lists of tokens.
        max_new_tokens: maximum tokens of a response.
        tokenizer: tokenizer, needed for texts.
        temperature: divisor of the logits.
        eos: end tokens (default: those of the generation configuration).
        pad: padding token (default: that of the generation configuration).

    Raises:
        SurgeryError: a prompt is empty or too long, or the model cannot generate.
    """
    rows = [_tokens(prompt, number, tokenizer) for number, prompt in enumerate(prompts)]
    if not rows:
        raise SurgeryError("there are no prompts; pass at least one")
    if max_new_tokens < 1:
        raise SurgeryError(
            f"max_new_tokens is {max_new_tokens}, so responses would be empty; pass at least 1"
        )
    known = getattr(model, "generation_config", None)
    if known is None or model.config.is_encoder_decoder:
        raise SurgeryError(
            f"{type(model).__name__} is not a causal language model that can generate; pass program.live() of one"
        )
    ends = known.eos_token_id if eos is None else eos
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = known.pad_token_id if pad is None else pad
    pad = (ends or [0])[0] if pad is None else pad
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise SurgeryError(
            f"a prompt of {longest} tokens plus {max_new_tokens} new ones exceeds the model's {limit} positions; cut it"
        )
    # Generation needs padding on the left. The rollout is padded on the right again below.
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    there = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    plain = type(known)(
        do_sample=True, top_k=0, top_p=1.0, temperature=temperature, max_new_tokens=max_new_tokens,
        eos_token_id=ends or None, pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    with _configured(model, plain), evaluating(model):
        actions = model.generate(padded, attention_mask=there)[:, longest:]
    ended = torch.isin(actions, torch.tensor(ends, device=device, dtype=actions.dtype))
    mask = ended.cumsum(1) - ended.long() == 0  # True up to and including the first end token
    whole = [row + got[keep].tolist() for row, got, keep in zip(rows, actions, mask, strict=True)]
    length = max(map(len, whole))
    return Rollout(
        torch.tensor([row + [pad] * (length - len(row)) for row in whole], device=device),
        torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in whole], device=device),
        torch.tensor([len(row) for row in rows], device=device),
        torch.where(mask, actions, pad),
        mask,
    )


def _tokens(prompt: Any, number: int, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise SurgeryError("the prompts are texts; pass a tokenizer")
        prompt = tokenizer(prompt)["input_ids"]
    tokens = [int(token) for token in prompt]
    if not tokens:
        raise SurgeryError(f"prompt {number} is empty; give it at least one token")
    return tokens


@contextlib.contextmanager
def _configured(model: Any, config: Any) -> Iterator[None]:
    """Replace the generation configuration of the model for a while.

    generate() fills options that a given configuration leaves open from the model's own, so passing one is not
    enough.
    """
    known, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = known
