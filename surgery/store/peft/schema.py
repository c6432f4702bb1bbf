"""Checks of PEFT checkpoints: types and ranges of the configuration, and tensor names, before any of them is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from surgery.common.errors import LoadError
from surgery.common.names import check_plain, components
from surgery.common.patterns import matcher
from surgery.engine.program import Program
from surgery.engine.schema import Natural, Text, check_depth

# Upper bound of a rank and of a number of tokens; real checkpoints have up to a few thousand.
_MOST = 2**20


def _known_form(pattern: str) -> str:
    matcher(pattern)  # raises ValueError
    return pattern


Size = Annotated[StrictInt, Field(gt=0, le=_MOST)]
Scale = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1e9)]
Pattern = Annotated[StrictStr, AfterValidator(_known_form)]


class _Config(BaseModel):
    """Fields that surgery reads. PEFT writes more fields, of which only the nesting is checked."""

    model_config = ConfigDict(extra="ignore")

    peft_type: Annotated[StrictStr, Field(pattern=r"^[A-Z0-9_]{1,64}$")]
    task_type: Text | None = None
    base_model_name_or_path: Text | None = None
    modules_to_save: list[Text] | Text | None = None


class _Lora(_Config):
    r: Size | None = None
    lora_alpha: Scale
    rank_pattern: dict[Pattern, Size] | None = Field(default=None, max_length=100_000)
    alpha_pattern: dict[Pattern, Scale] | None = Field(default=None, max_length=100_000)
    lora_dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] | None = None
    use_rslora: StrictBool | None = None
    use_dora: StrictBool | None = None
    init_lora_weights: StrictBool | Text | None = True
    lora_bias: StrictBool | None = None
    target_parameters: list[Text] | None = None
    trainable_token_indices: list[Natural] | dict[Text, list[Natural]] | None = None


class _IA3(_Config):
    feedforward_modules: list[Text] | Pattern | None = None


class _Tokens(_Config):
    num_virtual_tokens: Size


_KINDS: Mapping[str, type[_Config]] = {
    "LORA": _Lora,
    "IA3": _IA3,
    "PREFIX_TUNING": _Tokens,
    "PROMPT_TUNING": _Tokens,
    "P_TUNING": _Tokens,
}


def check_config(config: Any, path: Path) -> dict[str, Any]:
    """Check the types and ranges of the fields that surgery reads, and return the configuration.

    Args:
        config: The parsed JSON.
        path: Its file, for messages.

    Raises:
        LoadError: A field is missing, or has another type or value; the message names it.
    """
    if not isinstance(config, dict) or "peft_type" not in config:
        raise LoadError(
            f"{path} has no peft_type, so PEFT did not write it; give the directory of a PEFT checkpoint"
        )
    kind = config["peft_type"]
    model = _KINDS.get(kind, _Config) if isinstance(kind, str) else _Config
    try:
        check_depth(config)
        model.model_validate(config)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = "".join(c if c.isprintable() else "?" for c in ".".join(map(str, problem["loc"]))[:200])
        said = problem["msg"].removeprefix("Value error, ")
        raise LoadError(
            f"{path} cannot be read: {where}: {said}; save the checkpoint with PEFT again"
        ) from None
    except ValueError as error:
        raise LoadError(
            f"{path} cannot be read: a value {error}; save the checkpoint with PEFT again"
        ) from None
    except RecursionError:
        raise LoadError(f"{path} is nested too deeply; save the checkpoint with PEFT again") from None
    return config


def check_names(names: Iterable[str], path: Path, base: Program) -> None:
    """Check that the tensor names of a checkpoint are plain, or consist of components that the base's names have.

    Args:
        names: Names of the tensors.
        path: Their file, for messages.
        base: Program of the base.

    Raises:
        LoadError: A name has other characters.
    """
    known = components(base.base.tensors)
    for name in names:
        check_plain(name, f"a tensor of {path}", LoadError, known)
