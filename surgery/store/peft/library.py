"""The PEFT library, where it is installed: its model of a checkpoint, made under limits and without code from a file.

A checkpoint is not trusted. PEFT's own loading would take modules to import (`megatron_core`), paths of other files
(`adapters` of X-LoRA) and regular expressions from the configuration. So the configuration that PEFT gets here
has known fields only, its patterns are resolved with our own matcher, and what PEFT allocates is bounded.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.capture.budget import FACTOR, MARGIN, limited
from surgery.common.errors import LoadError
from surgery.common.patterns import matcher
from surgery.common.readers import first_line
from surgery.engine.base import Base

ADAPTER = "default"  # PEFT's name of the only adapter
# Fields that say where something came from or how it was trained. PEFT gets its defaults instead.
_UNUSED = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
        "task_type", "corda_config", "eva_config", "lora_ga_config", "loftq_config",
    }
)  # fmt: skip
# Fields that PEFT must not get -> the values that mean "not used", and the reason.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "megatron_config": ((None,), "lets PEFT import modules"),
    "megatron_core": ((None, "megatron.core"), "names a module to import"),
    "arrow_config": ((None,), "chooses among several adapters for each token"),
    "layer_replication": ((None,), "repeats layers of the base, which this base does not"),
}
# Types that PEFT loads from other checkpoints, and not from their own files alone.
_ELSEWHERE = frozenset({"XLORA", "SHADOW"})
# Texts that PEFT reads as regular expressions are limited to what `re` matches without backtracking.
_PLAIN_PATTERN = re.compile(r"[\w\-.^$\\]*")
_SEEDS = re.compile(r"seed|key")
# Ops whose integer arguments are sizes; those of other ops are in lists.
_COUNTS = frozenset({"arange", "eye", "linspace", "randperm", "tril_indices", "triu_indices"})


class MissingPeftError(LoadError):
    """PEFT is not installed, and the checkpoint cannot be read without it."""


def tuner_of(kind: str, where: str) -> tuple[Any, Any, str]:
    """PEFT's classes for a type of adapter that changes layers: configuration, tuner, and prefix of its tensors.

    Args:
        kind: The type, such as "LOHA".
        where: The checkpoint, for messages.

    Raises:
        MissingPeftError: PEFT is not installed.
        LoadError: PEFT has no such type, or one that is no change of weights.
    """
    try:
        from peft import mapping
        from peft.tuners.tuners_utils import BaseTuner
        from peft.utils import PeftType
    except ImportError:
        raise MissingPeftError(
            f"{where}: surgery has no pass for PEFT's {kind} and reads the weights that PEFT merges, but peft is not "
            f"installed; pip install peft"
        ) from None
    known = {member.value: member for member in PeftType}
    if kind not in known or known[kind] not in mapping.PEFT_TYPE_TO_TUNER_MAPPING:
        raise LoadError(f"{where}: the installed peft has no type {kind}; pip install -U peft")
    member = known[kind]
    tuner = mapping.PEFT_TYPE_TO_TUNER_MAPPING[member]
    if not issubclass(tuner, BaseTuner):
        raise LoadError(f"{where}: PEFT's {kind} adds inputs and changes no weights, so PEFT cannot merge it")
    if kind in _ELSEWHERE:
        raise LoadError(
            f"{where}: PEFT's {kind} loads other models that its configuration names; PEFT cannot merge it"
        )
    return mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member], tuner, mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member]


def model_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, where: str) -> nn.Module:
    """PEFT's model of a checkpoint on a copy of the base, in eval mode.

    Args:
        config: The configuration, whose types have been checked.
        tensors: The tensors by their names in the checkpoint.
        base: The base; it is not changed.
        where: The checkpoint, for messages.

    Raises:
        LoadError: PEFT does not make the model, or the tensors are not those that it needs.
    """
    kind = str(config["peft_type"])
    cls, _, prefix = tuner_of(kind, where)
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict

    module = copy.deepcopy(base.loaded.module).eval()
    most = max([2**16, *(t.numel() for t in tensors.values()), *(t.numel() for t in base.tensors.values())])
    try:
        made = cls(**_fields(config, cls, module, most, where))
        model = get_peft_model(module, made, adapter_name=ADAPTER).eval()
        _untie(model)
        result: Any = set_peft_model_state_dict(model, dict(tensors), adapter_name=ADAPTER)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"{where}: PEFT cannot load it on this base ({type(error).__name__}: {first_line(error)}); load the base "
            f"that it was made for"
        ) from error
    missing = [name for name in result.missing_keys if prefix in name and ADAPTER in name]
    # PEFT makes buffers again from seeds of the configuration, and stores tensors that layers share once.
    made = {name for name, _ in model.named_buffers()} | _loaded_elsewhere(model, result.missing_keys)
    odd = [*(name for name in missing if name not in made), *result.unexpected_keys]
    if odd:
        what = "lacks" if odd[0] in missing else "has, and PEFT does not read,"
        raise LoadError(f"{where} {what} the tensor {odd[0]}; save the checkpoint with PEFT again")
    return model


def _loaded_elsewhere(model: nn.Module, missing: Sequence[str]) -> set[str]:
    """Names of parameters that were loaded under another name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in named.items() if name not in missing}
    return {name for name, parameter in named.items() if id(parameter) in loaded}


def _fields(config: Mapping[str, Any], cls: Any, module: nn.Module, most: int, where: str) -> dict[str, Any]:
    """Arguments of PEFT's configuration class."""
    known = inspect.signature(cls.__init__).parameters
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name in _UNUSED or name == "peft_type":
            continue
        if name in _REFUSED:
            unused, why = _REFUSED[name]
            if value not in unused:
                raise LoadError(f"{where}: its option {name} {why}; {_again()}")
            continue
        if name not in known:
            if value in (None, False, [], {}):
                continue
            raise LoadError(f"{where}: the installed peft has no option {name}; pip install -U peft")
        if value != defaults.get(name):
            _check(name, value, most, where)
            found[name] = value
    names = [name for name, _ in module.named_modules()]
    for name in (
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "modules_to_save",
        "target_parameters",
    ):
        pattern = found.get(name)
        if isinstance(pattern, str) and pattern != "all-linear":
            found[name] = _matched(name, pattern, names, where)
    return found


def _again() -> str:
    return "load the checkpoint with PEFT, and merge it there"


def _matched(name: str, pattern: str, names: Sequence[str], where: str) -> list[str]:
    """Modules that a regular expression matches as a whole, as PEFT reads a text."""
    try:
        found = matcher(pattern)
    except ValueError as error:
        raise LoadError(
            f"{where}: its option {name} is no pattern that surgery reads: {error}; {_again()}"
        ) from None
    return [own for own in names if own and found.fullmatch(own)]


def _check(name: str, value: Any, most: int, where: str) -> None:
    """Raise LoadError for a number that is no size of this base, or a pattern that could take long to match."""
    if isinstance(value, bool):
        return
    if isinstance(value, int) and abs(value) > (2**63 if _SEEDS.search(name) else most):
        raise LoadError(
            f"{where}: its option {name} is {str(value)[:20]}, larger than any tensor; {_again()}"
        )
    if name in ("layers_pattern",) or name.endswith("_pattern"):
        texts = (
            [value] if isinstance(value, str) else list(value) if isinstance(value, (list, Mapping)) else []
        )
        for text in texts:
            if not isinstance(text, str) or not _PLAIN_PATTERN.fullmatch(text) or len(text) > 512:
                raise LoadError(
                    f"{where}: its option {name} has the pattern {str(text)[:60]!r}, which is not read; {_again()}"
                )
    inner = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    for item in inner:
        _check(name, item, most, where)


def _untie(model: nn.Module) -> None:
    """Give each adapted layer its own weights: merging must not change the other uses of a tied one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for module in list(model.modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        for layer in module.get_base_layer().modules():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if uses.get(id(parameter), 0) > 1:
                    layer.register_parameter(
                        name, nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    )


def unwrap_saved(model: nn.Module) -> None:
    """Replace the wrappers of modules_to_save by their copies, since some types of PEFT leave them in a merge."""
    from peft.utils import ModulesToSaveWrapper

    wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for name, module in wrappers:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.modules_to_save[ADAPTER])


@contextmanager
def within_limits(base: Base, tensors: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """Limits for what PEFT does in the block: its memory, random numbers and warnings.

    Args:
        base: The base.
        tensors: Tensors of the checkpoint.
        where: The checkpoint, for messages.

    Raises:
        LoadError: PEFT asks for more than 20 times the base and the checkpoint, and 200 MB.
    """
    held = {id(t): t for t in [*base.tensors.values(), *tensors.values()]}.values()
    size = sum(t.numel() * t.element_size() for t in held)
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        warnings.catch_warnings(),
        limited(size, where),
        _Bounded(FACTOR * size + MARGIN, where),
    ):
        warnings.simplefilter("ignore")
        yield


class _Bounded(TorchDispatchMode):
    """Refuses a single tensor with more than so many bytes, before its memory is allocated."""

    def __init__(self, most: int, where: str) -> None:
        super().__init__()
        self._most, self._where = most, where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = func.overloadpacket.__name__ in _COUNTS
        for value in args[:3]:
            numbers = value if isinstance(value, (list, tuple)) else [value] if counts else []
            # Four bytes each, as of fp32.
            if (
                numbers
                and all(type(n) is int for n in numbers)
                and 4 * math.prod(map(abs, numbers)) > self._most
            ):
                raise LoadError(
                    f"{self._where} asks PEFT for a tensor of {'×'.join(map(str, numbers))} values, and the base and "
                    f"the checkpoint together are {self._most // FACTOR / 1e6:,.1f} MB; check the sizes in its "
                    f"configuration"
                )
        return func(*args, **(kwargs or {}))
