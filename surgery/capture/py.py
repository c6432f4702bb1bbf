"""Loader of `py:package.module:callable`, a factory function written by the user."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from torch import nn

from surgery.capture.input_text import check_names, describe, suggestion
from surgery.capture.module import from_module
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, SurgeryError, nearest

PREFIX = "py:"


def load(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Call the factory or the class; return None for any other reference.

    The factory receives the `--model-kwarg` options as keyword arguments. It returns (module, example_inputs) or
    (module, example_inputs, dynamic), the arguments of `from_module`, a LoadedModel, or a module alone: `--input` then
    gives the example inputs and the dynamic dimensions, instead of those that a factory returns. Modules in the
    current directory can be imported, as with `python -m`.

    Raises:
        LoadError: the factory cannot be found, fails, or returns something else.
    """
    if not ref.startswith(PREFIX):
        return None
    module_name, colon, attribute = ref.removeprefix(PREFIX).partition(":")
    if not colon or not module_name or not attribute:
        raise LoadError(f"{ref}: write py:package.module:callable")
    factory = imported(ref, module_name, attribute)
    if not callable(factory):
        raise LoadError(f"{ref}: {attribute} is a {type(factory).__name__}, not a callable")
    try:
        made = factory(**options.model_kwargs)
    except SurgeryError:
        raise
    except SystemExit as error:
        raise LoadError(f"{ref}: the factory called sys.exit({error.code})") from None
    except Exception as error:
        raise LoadError(f"{ref}: the factory raised {type(error).__name__}: {_first(error)}") from error
    facts = {"loader": "py", "source": ref.removeprefix(PREFIX)}
    module = made[0] if isinstance(made, tuple) and made else made
    if options.input and isinstance(module, nn.Module):
        described = describe(options.input)
        check_names(module, described.inputs)
        return from_module(module, described.inputs, described.dynamic, copy_module=False, metadata=facts)
    if isinstance(made, LoadedModel):
        if options.input:
            raise LoadError(
                f"{ref}: the factory returns a LoadedModel, which has its inputs; leave out --input"
            )
        return made
    if isinstance(made, nn.Module):
        raise LoadError(
            f"{ref}: {attribute} returns a {type(made).__name__} without example inputs; describe them, with a name "
            f"for each dynamic dimension: {suggestion(made)}"
        )
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise LoadError(
            f"{ref}: the factory returned {_describe(made)}; return a module, (module, example_inputs), "
            "(module, example_inputs, dynamic) or a LoadedModel"
        )
    return from_module(*made, copy_module=False, metadata=facts)


def imported(ref: str, module_name: str, attribute: str) -> Any:
    """Import an attribute of a module on sys.path or in the current directory.

    Args:
        ref: the reference, for error messages.
        module_name: dotted name of the module.
        attribute: dotted name of the attribute inside the module.

    Raises:
        LoadError: the module cannot be imported, or has no such attribute.
    """
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            # The missing module may also be one that the user's module imports; that case is reported below.
            raise LoadError(f"{ref}: there is no module '{error.name}' in {here} or on sys.path") from error
        raise LoadError(
            f"{ref}: {module_name} imports the module '{error.name}', which is not installed; install it"
        ) from error
    except Exception as error:
        raise LoadError(
            f"{ref}: importing {module_name} raised {type(error).__name__}: {_first(error)}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")]
            raise LoadError(f"{ref}: {module_name} has no '{part}'{nearest(part, names)}")
        found = getattr(found, part)
    return found


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(type(item).__name__ for item in value)})"
    return f"a {type(value).__name__}"


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
