"""Options of the module Transformer of a sentence-transformers directory: what happens to a text before the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.capture.sentence.modules import HIDDEN
from surgery.capture.stored_options import check_kwargs
from surgery.common.errors import LoadError


@dataclass(frozen=True)
class TextOptions:
    """The configuration of the module Transformer.

    Attributes:
        config: its options.
        where: the file, for messages.
    """

    config: Mapping[str, Any]
    where: str

    def part(self, *names: str) -> dict[str, Any]:
        """A mapping in it, by its present or an earlier name."""
        found: Any = next((self.config[name] for name in names if self.config.get(name)), {})
        if not isinstance(found, dict):
            raise LoadError(f"{self.where}: {names[0]!r} is no mapping; restore it")
        return found

    def longest(self) -> int | None:
        """Maximum number of tokens, or None. Raises LoadError if it is no positive number."""
        found: Any = self.part("processor_kwargs", "tokenizer_args").get("model_max_length")
        found = self.config.get("max_seq_length") if found is None else found
        if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 1):
            raise LoadError(f"{self.where}: max_seq_length is {str(found)[:60]}; it has to be positive")
        return found

    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of the transformers model's constructor. Raises LoadError if one can run code."""
        given = {**self.part("config_kwargs", "config_args"), **self.part("model_kwargs", "model_args")}
        # The library takes these from its own arguments.
        given = {
            name: value for name, value in given.items() if name not in ("trust_remote_code", "use_cache")
        }
        check_kwargs(given, "hf:", self.where, LoadError)
        return given

    def check(self) -> None:
        """Raise LoadError for an option that changes embeddings in a way that is not supported."""
        known = (
            "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name",
            "processing_kwargs", "unpad_inputs", "query_length", "document_length", "query_expansion", "model_kwargs",
            "model_args", "processor_kwargs", "tokenizer_args", "config_kwargs", "config_args",
            "tokenizer_name_or_path",
        )  # fmt: skip
        unknown = next((name for name in self.config if name not in known), None)
        if unknown is not None:
            raise LoadError(f"{self.where}: there is no option {unknown[:60]!r}; remove it")
        task = self.config.get("transformer_task", "feature-extraction")
        if task != "feature-extraction":
            raise LoadError(
                f"{self.where}: transformer_task is {str(task)[:60]!r}; surgery captures feature-extraction"
            )
        if self.config.get("query_expansion"):
            raise LoadError(f"{self.where}: query_expansion is not supported; remove it")
        text = self.part("modality_config").get("text", {"method": "forward"})
        if not isinstance(text, dict) or text.get("method") != "forward":
            raise LoadError(
                f"{self.where}: texts do not go through the model's forward, which surgery does not capture"
            )
        if not isinstance(text.get("method_output_name", HIDDEN), str):
            raise LoadError(
                f"{self.where}: method_output_name is no name of one output, which surgery does not capture"
            )
        allowed = {
            "model_max_length",
            "padding_side",
            "use_fast",
            "padding",
            "truncation",
            "pad_to_multiple_of",
        }
        ways = self.part("processing_kwargs")
        for given in (
            self.part("processor_kwargs", "tokenizer_args"),
            ways.get("text", {}),
            ways.get("common", {}),
        ):
            other = next((name for name in given if name not in allowed), None)
            if other is not None:
                raise LoadError(
                    f"{self.where}: texts are split with {str(other)[:60]!r}, which surgery does not do"
                )
