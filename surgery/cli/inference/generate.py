"""Text from a finished language model: greedy or sampled, token by token, and dialogues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.capture.hf_config import require_transformers
from surgery.cli.inference.runner import Runner
from surgery.common.errors import LoadError, SurgeryError
from surgery.common.readers import first_line
from surgery.live.model import live, restore_settings
from surgery.train.objective import output

Write = Callable[[str], None]
UNLIMITED = 1 << 30  # tokens of a prompt: the model alone limits them


@dataclass(frozen=True)
class Sampling:
    """Options of choosing tokens.

    Attributes:
        new_tokens: largest number of new tokens.
        min_tokens: smallest number of new tokens; an end token before is not chosen.
        temperature: divisor of the logits; 0 takes the most probable token.
        top_p: sample from the most probable tokens that together have this probability.
    """

    new_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`. All are given, so that none comes from a file of defaults."""
        shared = {
            "max_new_tokens": self.new_tokens,
            "num_beams": 1,
            "min_new_tokens": self.min_tokens or None,
        }
        if not self.temperature:
            return {**shared, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            **shared,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


class Generator:
    """A language model that generates text.

    Attributes:
        runner: the model.
        tokenizer: its tokenizer.
        note: why it generates without a cache, or "".
    """

    def __init__(self, runner: Runner) -> None:
        """Prepare a model.

        Raises:
            LoadError: the model does not generate text.
            TrainingError: it has no tokenizer.
        """
        self.runner, self.note = runner, ""
        self._model: Any = None
        if runner.kind == "program":
            assert runner.program is not None
            if runner.program.base.loaded.config is None:
                self.note = "the program is no transformers model"
            else:
                try:
                    self._model = live(runner.program)
                except SurgeryError as error:
                    self.note = str(error)
        elif runner.kind == "transformers":
            assert runner.loaded is not None
            self._model = runner.loaded.module
            restore_settings(self._model, runner.loaded)
        elif runner.kind == "onnx-generate":
            self._model = runner.module.__dict__["generator"]
        else:
            self.note = "it is one graph; export it with --generate"
        can = getattr(self._model, "can_generate", None)
        if self._model is not None and (can is None or not can()):
            raise LoadError(
                f"{runner.ref} ({type(self._model).__name__}) generates no text; load a language model "
                "(--task text-generation)"
            )
        if self._model is None and not any(rank == 3 for rank in runner.ranks.values()):
            raise LoadError(
                f"{runner.ref} generates no text: none of its outputs ({', '.join(runner.ranks)}) has a row of logits "
                "for each token"
            )
        self.tokenizer = runner.setting.need_tokenizer("generate")

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text."""
        model = self._model
        if model is None and self.runner.program is not None:
            model = self.runner.program.base.loaded.module
        configs = (getattr(model, "generation_config", None), self.runner.config, self.tokenizer)
        for config in configs:
            found = getattr(config, "eos_token_id", None)
            if found is not None:
                return [int(found)] if isinstance(found, int) else [int(token) for token in found]
        return []

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text. Raises LoadError if it has none."""
        ids = list(self.tokenizer(text)["input_ids"])
        if not ids:
            raise LoadError("the prompt has no token; give a text")
        return ids

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a dialogue, up to the start of the next answer.

        Raises:
            LoadError: the tokenizer has no chat template, or it refuses the dialogue.
        """
        if not self.tokenizer.chat_template:
            raise LoadError(
                f"the tokenizer of {self.runner.ref} has no chat template; give a prompt without --chat, or another "
                "--tokenizer"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise LoadError(f"the chat template refuses the dialogue: {first_line(error)}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def generate(self, ids: Sequence[int], how: Sampling, write: Write | None = None) -> list[int]:
        """Generate the tokens that follow a prompt.

        Args:
            ids: tokens of the prompt.
            how: how tokens are chosen.
            write: function that gets the text, piece by piece.

        Returns:
            The new tokens.

        Raises:
            LoadError: the model fails on the prompt.
        """
        transformers = require_transformers()
        streamer = _Streamer(transformers, self.tokenizer, write)
        cached = self._model is not None and self.runner.kind != "onnx-generate"
        prompt = torch.tensor([list(ids)], device=self.runner.device if cached else None)
        try:
            with torch.no_grad():
                if self._model is None:
                    self._uncached(transformers, prompt, how, streamer)
                else:
                    self._cached(prompt, how, streamer)
        except SurgeryError:
            raise
        except Exception as error:
            raise LoadError(
                f"{self.runner.ref} cannot generate after {len(ids)} tokens: {first_line(error)}"
            ) from error
        return streamer.tokens

    def _cached(self, prompt: Tensor, how: Sampling, streamer: _Streamer) -> None:
        pad = self.tokenizer.pad_token_id
        with self._adapters():
            self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=streamer,
                eos_token_id=self.ends or None,
                pad_token_id=pad if pad is not None else next(iter(self.ends), 0),
                **how.arguments,
            )

    def _adapters(self) -> contextlib.AbstractContextManager[Any]:
        if self.runner.kind != "onnx-generate":
            return contextlib.nullcontext()
        return self._model.adapter(*self.runner.adapters)

    def _uncached(self, transformers: Any, prompt: Tensor, how: Sampling, streamer: _Streamer) -> None:
        """Run the whole text again for each token, for a graph without a cache."""
        setting = self.runner.setting
        if setting.fixed is not None:
            raise LoadError(
                f"{self.runner.ref} accepts only {setting.fixed} tokens, so it cannot generate; capture or export it "
                "with a dynamic length"
            )
        processors = transformers.LogitsProcessorList()
        if how.temperature:
            processors.append(transformers.TemperatureLogitsWarper(how.temperature))
            if how.top_p < 1:
                processors.append(transformers.TopPLogitsWarper(how.top_p))
        ends, ids = self.ends, prompt
        streamer.put(prompt[0])
        for number in range(how.new_tokens):
            if ids.shape[1] >= setting.longest:
                break
            inputs = {
                name: torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)
                for name in setting.inputs
                if name != "input_ids"
            }
            logits = output(self.runner({"input_ids": ids, **inputs}), "logits")[:, -1].float()
            if number < how.min_tokens:
                logits[:, ends] = -torch.inf
            logits = processors(ids, logits)
            token = torch.multinomial(logits.softmax(-1), 1) if how.temperature else logits.argmax(-1, True)
            ids = torch.cat([ids, token], 1)
            streamer.put(token[0])
            if int(token) in ends:
                break
        streamer.end()


class _Streamer:
    """Receiver of tokens, which transformers calls: keeps the new ones, and writes their text when it is known."""

    def __init__(self, transformers: Any, tokenizer: Any, write: Write | None) -> None:
        self.tokens: list[int] = []
        self._started = False
        self._text = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
        # TextStreamer prints; only its division of tokens into texts is used.
        self._text.on_finalized_text = lambda text, stream_end=False: (
            write(text) if write is not None else None
        )

    def put(self, value: Tensor) -> None:
        """Take the prompt (the first call) or new tokens."""
        if not self._started:
            self._started = True
            return
        self.tokens += value.flatten().tolist()
        self._text.put(value.flatten())

    def end(self) -> None:
        """Write what is left."""
        self._text.end()


def dialogue(
    generator: Generator, lines: Iterator[str], how: Sampling, write: Write, system: str | None = None
) -> None:
    """Answer lines, each with the whole dialogue before it.

    Args:
        generator: the model.
        lines: what the user says.
        how: how tokens are chosen.
        write: function that gets the text of the answers, piece by piece.
        system: message that begins the dialogue, or None.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    for line in lines:
        messages.append({"role": "user", "content": line})
        said: list[str] = []

        def both(text: str, said: list[str] = said) -> None:
            said.append(text)
            write(text)

        generator.generate(generator.chat(messages), how, both)
        write("\n")
        messages.append({"role": "assistant", "content": "".join(said).strip()})
