"""sft: train on the answers of dialogues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Generator

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting
from surgery.train.dialogues import Message, answered, chat_template, messages_of
from surgery.train.objective import Batch
from surgery.train.packing import PackingObjective
from surgery.train.tokens import IGNORED, next_tokens


class Sft(PackingObjective):
    """Supervised fine-tuning on instructions (Ouyang et al. 2022, arXiv:2203.02155): the mean cross-entropy of the
    answers' tokens, each given all tokens before it.

    Rows are dialogues (a column of lists of {role, content}), or a prompt and a response. A row may also have a
    --context, which follows the prompt. The tokenizer's chat template, or one from a file, converts them to tokens.
    The text that the template inserts before an answer does not count; the token that ends the answer does. Each
    dialogue is one example, cut at --max-length. A dialogue without an answer within that length is skipped, and the
    log reports how many were.
    """

    name: ClassVar[str] = "sft"
    example: ClassVar[str] = (
        "surgery train hf:HuggingFaceTB/SmolLM2-135M-Instruct --objective sft --data answers.jsonl -o tuned/"
    )
    aliases: ClassVar[tuple[str, ...]] = ("instruction",)
    heads: ClassVar[tuple[str, ...]] = ("text-generation",)
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "messages": ("messages", "conversation", "conversations", "dialogue"),
        "prompt": ("prompt", "instruction", "question"),
        "context": ("context", "input"),
        "response": ("response", "output", "answer", "completion", "chosen"),
    }

    messages: str | None = Field(default=None, description="column of dialogues")
    prompt: str | None = Field(default=None, description="column of the instruction")
    context: str | None = Field(default=None, description="column of the input or context of the instruction")
    response: str | None = Field(default=None, description="column of the answer")
    template: str | None = Field(
        default=None, description="file with a chat template (Jinja), instead of the tokenizer's"
    )

    def columns(self, available: Sequence[str]) -> dict[str, str]:
        found = self.named_columns(available)
        if "messages" in found and self.prompt is None:
            return {"messages": found["messages"]}
        if not {"prompt", "response"} <= found.keys():
            raise TrainingError(
                f"objective 'sft': no columns look like dialogues, or like a prompt and a response; the data has "
                f"{', '.join(available)}; name them with --messages, or --prompt and --response"
            )
        return {name: column for name, column in found.items() if name != "messages"}

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        return {"template": chat_template(self.name, self.template, setting)}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        ids, labels = answered(self._dialogue(row, setting), setting, self.name)
        ids, labels = ids[: setting.longest], next_tokens(labels[: setting.longest])
        if all(label == IGNORED for label in labels):
            setting.count(f"has no answer within {setting.longest} tokens and was skipped")
        else:
            yield self.examples_of(ids, labels)

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        return self.labelled(examples, setting)

    def _dialogue(self, row: Row, setting: Setting) -> list[Message]:
        columns = setting.columns
        if "messages" in columns:
            return messages_of(row[columns["messages"]], columns["messages"])
        texts = {name: row[column] for name, column in columns.items()}
        for name, text in texts.items():
            if not isinstance(text, str) and not (name == "context" and text is None):
                raise TrainingError(
                    f"column {columns[name]!r} contains {text!r}, which is not a text; fix the data"
                )
        question = f"{texts['prompt']}\n\n{texts.get('context') or ''}".strip()
        return [{"role": "user", "content": question}, {"role": "assistant", "content": texts["response"]}]
