"""Builds a class that a node of a configuration names, where its package is trusted.

Imports torch and nothing else that takes time: packed files are loaded through this.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.optim import Optimizer

from adq_train.errors import ConfigError, UserError, did_you_mean
from adq_train.settings.ranges import Range

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


def trusted_prefixes(config: dict[str, Any]) -> tuple[str, ...]:
    """What the name of a target may start with."""
    return (*TRUSTED_PREFIXES, *(f"{name}." for name in config["trusted_packages"]))


def trust_problems(config: dict[str, Any]) -> Iterator[str]:
    """Targets outside the trusted packages: importing one would run its code."""
    trusted = trusted_prefixes(config)
    for key, value in leaves(config):
        if key.endswith("_target_") and not str(value).startswith(trusted):
            package = str(value).split(".")[0]
            yield (
                f"{key}: {value} is not from a trusted package ({', '.join(TRUSTED_PREFIXES)}); "
                f"if you trust it, add trusted_packages=[{package}]"
            )


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries and lists, with their dotted names."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}".strip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, node


def base_problem(target: type, base: Any) -> str | None:
    """Why a class cannot be what a group or an argument asks for; None where it can."""
    if not inspect.isclass(base) or base is object:
        return "has no place here: this setting takes plain values"
    if not getattr(base, "_is_protocol", False):
        return None if issubclass(target, base) else f"is not a {base.__name__}"
    wanted = sorted(k for k, v in vars(base).items() if k[0] != "_" and callable(v))
    lacking = [name for name in wanted if not hasattr(target, name)]
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
        base: What the target must be a class of; None: of any.
        completed_later: Whether the node must say ``_partial_``, and a partial is built.

    Raises:
        ConfigError: The target is not a class of a trusted package, which is not imported then;
            or it cannot be imported, is not of the base, or does not take these arguments.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError([f"{path}: needs a _target_; choose one of the group's files"])
    foreign = (
        f"{path}._target_: {node['_target_']} is not a class that a trusted package defines; "
        "choose one of the group's files"
    )
    if not str(node["_target_"]).startswith(trusted):  # to import it would run its code
        raise ConfigError([foreign])
    try:
        target = pkgutil.resolve_name(node["_target_"])
    except Exception as error:  # an import may fail in any way
        raise ConfigError(
            [f"{path}._target_: cannot import {node['_target_']} ({error})"]
        ) from error
    # A trusted module's name may lead to what that module has imported, such as subprocess.run.
    home = f"{getattr(target, '__module__', None)}."
    if not inspect.isclass(target) or not home.startswith(trusted):
        raise ConfigError([foreign])
    if base is not None and (wrong := base_problem(target, base)):
        raise ConfigError([f"{path}._target_: {node['_target_']} {wrong}"])
    is_partial = node.get("_partial_", False)
    if is_partial is not completed_later:
        needed = "true: it is completed at run time" if completed_later else "left out"
        raise ConfigError([f"{path}._partial_: must be {needed}, got {is_partial!r}"])
    hints = typing.get_type_hints(target.__init__)
    arguments = {
        key: construct(value, f"{path}.{key}", lambda part: part, trusted, hints.get(key, object))
        if isinstance(value, dict) and "_target_" in value
        else value
        for key, value in node.items()
        if key not in ("_target_", "_partial_")
    }
    try:
        problems = list(_argument_problems(target, arguments, path, is_partial))
    except ValueError as error:  # some built-in types have no signature
        raise ConfigError([f"{path}._target_: {node['_target_']} cannot be configured"]) from error
    if problems:
        raise ConfigError(problems)
    try:
        part = partial(target, **arguments) if is_partial else target(**arguments)
        trial(part)
    except (ValueError, TypeError, UserError) as error:
        about = re.split(r"\W", str(error))[0]  # our own errors begin with the argument
        dot = "." if about in inspect.signature(target).parameters else ": "
        raise ConfigError([f"{path}{dot}{error}"]) from error
    return part


def _argument_problems(
    target: Callable[..., Any], arguments: dict[str, Any], path: str, is_partial: bool
) -> Iterator[str]:
    """Unknown, missing and wrongly typed arguments of a call."""
    parameters = inspect.signature(target).parameters
    source = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(source)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not takes_any:
            hint = did_you_mean(name, parameters) or f"; it takes {', '.join(parameters)}"
            yield f"{path}.{name}: {path} has no such setting{hint}"
        elif name in hints and not fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            yield f"{path}.{name}: must be {wanted}, got {value!r}"
        elif inspect.isclass(target) and issubclass(target, Optimizer) and name in OPTIMIZER_RANGES:
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
        if name not in arguments and not optional and not is_partial:
            yield f"{path}.{name}: a value is required; give {path}.{name}=…"


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
