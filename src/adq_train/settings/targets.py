"""Builds a class that a node of a configuration names, where its package is trusted.

Imports torch and nothing else that takes time: packed files are loaded through this.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adq_train.errors import ConfigError, UserError, did_you_mean
from adq_train.models import OF_DATA, ModelSource, OwnModel
from adq_train.settings.ranges import Range, leaves

# What torch's optimizers take, each value or each of a list of them.
OPTIMIZER_RANGES = {
    "lr": Range(minimum=0),
    "momentum": Range(minimum=0, below=1),
    "betas": Range(minimum=0, below=1),
    "alpha": Range(minimum=0, below=1),
    "eps": Range(minimum=0),
    "weight_decay": Range(minimum=0),
}
TRUSTED_PREFIXES = ("adq_train.", "torch.optim.", "torchvision.models.")


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def trusted_prefixes(packages: Iterable[str] = ()) -> tuple[str, ...]:
    """What the name of a target may start with, with packages that a user trusts besides."""
    return (*TRUSTED_PREFIXES, *(f"{name}." for name in packages))


def added_to(trusted: tuple[str, ...]) -> tuple[str, ...]:
    """The prefixes of a user's own packages among some trusted ones."""
    return tuple(x for x in trusted if x not in TRUSTED_PREFIXES)


def trust_problems(config: dict[str, Any]) -> Iterator[str]:
    """Targets outside the trusted packages: importing one would run its code."""
    trusted = trusted_prefixes(config["trusted_packages"])
    for key, value in leaves(config):
        if key.endswith("_target_") and not str(value).startswith(trusted):
            package = str(value).split(".")[0]
            yield (
                f"{key}: {value} is not from a trusted package ({', '.join(TRUSTED_PREFIXES)}); "
                f"if you trust it, add trusted_packages=[{package}]"
            )


def base_problem(target: type, base: Any) -> str | None:
    """Why a class cannot be what a group or an argument asks for; None where it can."""
    if not inspect.isclass(base) or base is object:
        return "has no place here: this setting takes plain values"
    if not getattr(base, "_is_protocol", False):
        return None if issubclass(target, base) else f"is not a {base.__name__}"
    wanted = sorted(k for k, v in vars(base).items() if k[0] != "_" and callable(v))
    lacking = [name for name in wanted if not hasattr(target, name)]
    if lacking and base is ModelSource:
        return (
            f"is not a {base.__name__}: it is neither a subclass of nn.Module of your own nor has "
            f"it {', '.join(lacking)}"
        )
    return f"is not a {base.__name__}: it has no {', '.join(lacking)}" if lacking else None


def construct(
    node: Any,
    path: str,
    trial: Callable[[Any], Any],
    trusted: tuple[str, ...] = TRUSTED_PREFIXES,
    base: Any = None,
    completed_later: bool = False,
) -> Any:
    """Builds what a config node describes: its ``_target_`` with its arguments.

    Args:
        node: ``_target_``, ``_partial_`` and arguments, which may be such nodes themselves.
        path: The node's name, for messages.
        trial: Called with the result, for errors that only its use would show.
        trusted: Where the target may be defined: starts of module names.
        base: What the target must be a class of; None: of any. A network's class of the user's own
            packages stands for a :class:`~adq_train.models.ModelSource` that makes it.
        completed_later: Whether the node must say ``_partial_``, and a partial is built.

    Raises:
        ConfigError: The target is not a class of a trusted package, which is not imported then;
            or it cannot be imported, is not of the base, or does not take these arguments.
    """
    target = _target_of(node, path, trusted)
    own_network = base is ModelSource and _is_own_network(target, trusted)
    if base is not None and not own_network and (wrong := base_problem(target, base)):
        raise ConfigError([f"{path}._target_: {node['_target_']} {wrong}"])
    is_partial = node.get("_partial_", False)
    if is_partial is not completed_later:
        needed = "true: it is completed at run time" if completed_later else "left out"
        raise ConfigError([f"{path}._partial_: must be {needed}, got {is_partial!r}"])
    hints = _hints(target)
    arguments = {
        key: construct(value, f"{path}.{key}", lambda part: part, trusted, hints.get(key, object))
        if isinstance(value, dict) and "_target_" in value
        else value
        for key, value in node.items()
        if key not in ("_target_", "_partial_")
    }
    try:
        of_data = OF_DATA if own_network else ()
        problems = list(_argument_problems(target, arguments, path, is_partial, of_data))
    except ValueError as error:  # some built-in types have no signature
        raise ConfigError([f"{path}._target_: {node['_target_']} cannot be configured"]) from error
    if problems:
        raise ConfigError(problems)
    make = partial(OwnModel, target, arguments) if own_network else partial(target, **arguments)
    try:
        part = make if is_partial else make()
        trial(part)
    except (ValueError, TypeError, UserError) as error:
        about = re.split(r"\W", str(error))[0]  # our own errors begin with the argument
        dot = "." if about in inspect.signature(target).parameters else ": "
        raise ConfigError([f"{path}{dot}{error}"]) from error
    return part


def _target_of(node: Any, path: str, trusted: tuple[str, ...]) -> type:
    """The class that a config node names.

    Raises:
        ConfigError: It is not a class of a trusted package, or it cannot be imported.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError([f"{path}: needs a _target_; choose one of the group's files"])
    name = str(node["_target_"])
    foreign = (
        f"{path}._target_: {name} is not a class that a trusted package defines; choose one of the "
        "group's files"
    )
    if not name.startswith(trusted):  # to import it would run its code
        raise ConfigError([foreign])
    try:
        target = _imported(name)
    except Exception as error:  # an import may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        package = name.split(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            reason += f"; install {package}, or put the folder that holds it in PYTHONPATH"
        raise ConfigError([f"{path}._target_: cannot import {name} ({reason})"]) from error
    # A trusted module's name may lead to what that module has imported, such as subprocess.run.
    if not inspect.isclass(target) or not _home(target).startswith(trusted):
        raise ConfigError([foreign])
    return target


def _imported(name: str) -> Any:
    """What a dotted name leads to, with its modules imported.

    Raises:
        ImportError: A module of its path is missing, or cannot be imported itself.
        AttributeError: A module has no such name.
    """
    path, *rest = name.split(".")
    found: Any = importlib.import_module(path)
    for part in rest:
        path += f".{part}"
        if hasattr(found, part):
            found = getattr(found, part)
        elif hasattr(found, "__path__") and find_spec(path):
            found = importlib.import_module(path)
        else:
            near = did_you_mean(part, vars(found)) if isinstance(found, types.ModuleType) else ""
            raise AttributeError(f"{path.rpartition('.')[0]} has no {part}{near}")
    return found


def _home(target: Any) -> str:
    """The module that defines a class, with a dot."""
    return f"{getattr(target, '__module__', None)}."


def _is_own_network(target: type, trusted: tuple[str, ...]) -> bool:
    """Whether a class is a network of the user's own, and nothing that builds one.

    Modules of the built-in packages do not count: some of them read files.
    """
    own = issubclass(target, nn.Module) and not hasattr(target, "build")
    return own and _home(target).startswith(added_to(trusted))


def _hints(target: type) -> dict[str, Any]:
    """The types of a constructor's arguments; none where they cannot be told."""
    try:
        return typing.get_type_hints(target.__init__)  # type: ignore[misc]
    except Exception:  # of somebody's class: names that are there for type checkers alone
        return {}


def _argument_problems(
    target: type, arguments: dict[str, Any], path: str, is_partial: bool, given: Sequence[str] = ()
) -> Iterator[str]:
    """Unknown, missing and wrongly typed arguments of a constructor.

    Args:
        target: The class.
        arguments: From the configuration.
        path: The node's name.
        is_partial: Whether arguments may be missing.
        given: Arguments that come from elsewhere.
    """
    parameters, hints = inspect.signature(target).parameters, _hints(target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not takes_any:
            own = [x for x in parameters if x not in given]
            hint = did_you_mean(name, own) or f"; it takes {', '.join(own) or 'none'}"
            remedy = f"; ~{path}.{name} leaves it out" if given else ""
            what = target.__name__ if given else path
            yield f"{path}.{name}: {what} has no such setting{hint}{remedy}"
        elif name in hints and not fits(value, hints[name]):
            kind = hints[name]
            wanted = KINDS.get(kind) or getattr(kind, "__name__", None) or str(kind)
            yield f"{path}.{name}: must be {wanted}, got {value!r}"
        elif issubclass(target, Optimizer) and name in OPTIMIZER_RANGES:
            for _, number in leaves(value):
                if isinstance(number, bool) or not isinstance(number, int | float):
                    yield f"{path}.{name}: must be a number, got {number!r}"
                elif math.isfinite(number) and (wrong := OPTIMIZER_RANGES[name].problem(number)):
                    yield f"{path}.{name}: {wrong}"
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if name not in (*arguments, *given) and not optional and not is_partial:
            key = f"{path}.{name}"
            yield f"{key}: a value is required; give {key}=… (+{key}=… where no file has it)"


def fits(value: Any, hint: Any) -> bool:
    """Whether a configuration value can stand for a type; types unknown here take anything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arm) for arm in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    return True
