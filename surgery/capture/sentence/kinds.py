"""Kinds of modules after the transformers model: checks of their configurations, and the modules that they describe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from surgery.capture.sentence.modules import (
    ACTIVATIONS,
    EMBEDDING,
    MODES,
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
)
from surgery.common.errors import LoadError

_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATION = re.compile(r"torch\.nn\.modules\.(?:activation|linear)\.(\w+)")
_LARGEST = 1 << 17  # features of an embedding


def check_part(kind: str, config: Mapping[str, Any], where: str) -> None:
    """Check the configuration of a module.

    Args:
        kind: name of its class.
        config: the configuration.
        where: file, for messages.

    Raises:
        LoadError: an option is not supported, or damaged.
    """
    _CHECKED[kind](config, where)


def build_part(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A module of a checked configuration, with random weights."""
    return _BUILT[kind](config)


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Pooling modes, in the order in which the library joins them."""
    named = config.get("pooling_mode")
    if named is None:
        return tuple(mode for key, mode in _OLD_MODES.items() if config.get(key)) or ("mean",)
    return (named,) if isinstance(named, str) else tuple(named)


def _check_pooling(config: Mapping[str, Any], where: str) -> None:
    named = config.get("pooling_mode", "mean")
    for mode in named if isinstance(named, (list, tuple)) else (named,):
        if mode not in MODES:
            raise LoadError(
                f"{where}: there is no pooling mode {str(mode)[:60]!r}; known: {', '.join(MODES)}"
            )
    other = next((key for key in config if key.startswith("pooling_mode_") and key not in _OLD_MODES), None)
    if other is not None:
        raise LoadError(f"{where}: there is no pooling mode {other[:60]!r}; known: {', '.join(MODES)}")


def _check_dense(config: Mapping[str, Any], where: str) -> None:
    _check_sizes(config, where, "in_features", "out_features")
    known = (
        "in_features", "out_features", "bias", "activation_function", "module_input_name", "module_output_name",
        "use_residual",
    )  # fmt: skip
    other = next((key for key in config if key not in known), None)
    if other is not None:
        raise LoadError(f"{where}: surgery does not know the option {other[:60]!r}")
    named = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    match = _ACTIVATION.fullmatch(named)
    if match is None or match[1] not in ACTIVATIONS:
        raise LoadError(f"{where}: the activation {named[:80]!r} is not one of {', '.join(ACTIVATIONS)}")
    _check_names(config, where)


def _check_names(config: Mapping[str, Any], where: str) -> None:
    for key in ("module_input_name", "module_output_name"):
        if not isinstance(config.get(key, ""), (str, type(None))):
            raise LoadError(f"{where}: {key} is no name; restore it")


def _check_sizes(config: Mapping[str, Any], where: str, *keys: str) -> None:
    for key in keys:
        size = config.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= _LARGEST:
            raise LoadError(f"{where}: {key} is {str(size)[:60]}; it has to be from 1 to {_LARGEST}")


def _check_dropout(config: Mapping[str, Any], where: str) -> None:
    rate = config.get("dropout", 0.2)
    if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise LoadError(f"{where}: dropout is {str(rate)[:60]}; it has to be from 0 to 1")


_CHECKED = {
    "Pooling": _check_pooling,
    "Dense": _check_dense,
    "LayerNorm": lambda config, where: _check_sizes(config, where, "dimension"),
    "Dropout": _check_dropout,
    "Normalize": _check_names,
}


def _dense(config: Mapping[str, Any]) -> nn.Module:
    return Dense(
        config["in_features"],
        config["out_features"],
        bias=bool(config.get("bias", True)),
        activation=str(config.get("activation_function", "Tanh")).rpartition(".")[2],
        residual=bool(config.get("use_residual", False)),
        source=config.get("module_input_name", EMBEDDING),
        target=config.get("module_output_name"),
    )


_BUILT = {
    "Pooling": lambda config: Pooling(_modes(config)),
    "Dense": _dense,
    "LayerNorm": lambda config: LayerNorm(config["dimension"]),
    "Dropout": lambda config: Dropout(config.get("dropout", 0.2)),
    "Normalize": lambda config: Normalize(
        config.get("module_input_name", EMBEDDING), config.get("module_output_name")
    ),
}
