"""Every error of a configuration at once, before any data is touched.

Values are checked in two steps that share one list of problems: the fixed sections against their
schema, and each group's ``_target_`` by binding its arguments to the signature and building it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from adq_train.allocation.allocator import Allocator
from adq_train.errors import ConfigError, first_line
from adq_train.models import ModelSource
from adq_train.quantization.base import (
    MakeActivationQuantizer,
    MakeWeightQuantizer,
)
from adq_train.quantization.target import FLOAT, Target
from adq_train.sensitivity.base import SensitivityMetric
from adq_train.settings.building import DataSource, build
from adq_train.settings.ranges import leaves
from adq_train.settings.schema import (
    GROUPS,
    SECTIONS,
    Config,
    OptimizerSettings,
    about,
    is_path,
)
from adq_train.settings.sections import section_problems
from adq_train.settings.targets import trust_problems, trusted_prefixes
from adq_train.storage.files import with_home
from adq_train.training.compiling import compiler_problem
from adq_train.training.distillation import Distillation
from adq_train.training.optimizers import MakeOptimizer
from adq_train.training.schedule import Schedule


@dataclass(frozen=True)
class Parts:
    """The configured pieces of a run, one per config group."""

    data: DataSource
    model: ModelSource
    make_weight_quantizer: MakeWeightQuantizer
    make_activation_quantizer: MakeActivationQuantizer
    sensitivity: SensitivityMetric
    allocator: Allocator
    make_optimizer: MakeOptimizer
    make_quantizer_optimizer: MakeOptimizer
    scheduler: Schedule
    distillation: Distillation
    target: Target
    device: torch.device


def validate(cfg: DictConfig) -> tuple[Config, Parts]:
    """Checks a composed configuration and builds its parts.

    Args:
        cfg: The composed configuration.

    Returns:
        The configuration, typed and resolved, and its parts.

    Raises:
        ConfigError: Lists every problem that was found.
    """
    try:
        config: Any = with_homes(without_missing(OmegaConf.to_container(cfg, resolve=True)))
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key}: {first_line(error)}"]) from error
    except RecursionError as error:
        raise ConfigError(
            ["an interpolation (${name}) leads back to itself; write the value"]
        ) from error
    lacking = [
        f"{section}.{name}".strip(".")
        for section, of in {"": Config, **SECTIONS}.items()
        for name in about(of)
        if name not in (*GROUPS, *(config[section] if section else config))
    ]
    if lacking:
        raise ConfigError(f"{name}: a value is required; give {name}=…" for name in lacking)
    # Numbers are floats from here on, so that 3 and 3.0 mean the same run.
    config["budget"] = {
        name: float(value) if type(value) is int else value
        for name, value in config["budget"].items()
    }
    problems = [*_section_problems(config), *trust_problems(config)]
    trusted = trusted_prefixes(config["trusted_packages"])
    device = _device(config["trainer"]["device"], problems)
    if config["trainer"]["compile"] != "none" and (missing := compiler_problem(device)):
        problems.append(f"trainer.compile: {missing}, or set trainer.compile=none")
    built = {}
    if not any("_target_" in problem for problem in problems):
        for group in (x for x in GROUPS if config[x] or x != "target"):
            try:
                built[group] = build(config[group], group, _trial(group, config), trusted)
            except ConfigError as error:
                problems += error.problems
    target: Target = built.get("target", FLOAT)
    make: Any = built.get("weight_quantizer"), built.get("activation_quantizer")
    if all(make):
        try:
            make = target.makers(make)
        except ValueError as error:
            problems.append(f"activation_quantizer: {error}")
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    parts = Parts(
        data=built["data"],
        model=built["model"],
        make_weight_quantizer=make[0],
        make_activation_quantizer=make[1],
        sensitivity=built["sensitivity"],
        allocator=built["allocator"],
        make_optimizer=built["optimizer"],
        make_quantizer_optimizer=built["quantizer_optimizer"],
        scheduler=built["scheduler"],
        distillation=built["distillation"],
        target=target,
        device=device,
    )
    return Config.of(config), parts


def _section_problems(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the fixed sections, and with numbers anywhere."""
    for section in ("", *SECTIONS):
        yield from section_problems(section, config[section] if section else config)
    for key, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}: must be a finite number, got {value}"
        if value == "" and is_path(key):
            yield f"{key}: is empty; give a path, or null for none"
    for name in about(OptimizerSettings):
        if name not in config.get("optimizer", {}):
            yield f"optimizer.{name}: a value is required; give optimizer.{name}=…"
    pretrain = config["pretrain"]
    for name, default in (("head", "keep"), ("checkpoint_key", None)):
        if pretrain[name] != default and not pretrain["checkpoint"]:
            yield f"pretrain.{name}: {pretrain[name]} is about pretrain.checkpoint; give that too"
    if pretrain["head"] == "new" and config["init_from"]:
        yield "pretrain.head: new needs float training, and init_from does none; leave one out"
    if not any(value is not None for value in config["budget"].values()):
        names = ", ".join(f"budget.{name}" for name in config["budget"])
        yield f"budget: at least one limit is required, of {names}"


def without_missing(node: Any) -> Any:
    """Leaves out the values that still are ``???``; each part says then which it requires."""
    if not isinstance(node, dict):
        return node
    return {key: without_missing(value) for key, value in node.items() if value != MISSING}


def with_homes(node: Any, name: str = "") -> Any:
    """Writes out ``~`` in the settings that name a file or a folder, as a shell would."""
    if isinstance(node, dict):
        return {key: with_homes(value, str(key)) for key, value in node.items()}
    return with_home(node) if isinstance(node, str) and is_path(name) else node


def _device(name: str, problems: list[str]) -> torch.device:
    """The device that ``trainer.device`` names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "mps":
            raise ValueError("it has no float64, in which figures are summed up")
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = first_line(error)
        if name.startswith("cuda") and not torch.cuda.is_available():
            reason = "PyTorch finds no GPU on this machine"
        problems.append(f"trainer.device: {name!r} cannot be used here ({reason}); try auto or cpu")
        return torch.device("cpu")
    return device


def _trial(group: str, config: dict[str, Any]) -> Callable[[Any], Any]:
    """How to try a part that is completed at run time, so that its errors show now."""
    if group in ("weight_quantizer", "activation_quantizer"):
        return lambda make: [
            make(bits) for bits in config["bits"]["candidates"] if bits in range(2, 9)
        ]
    if group in ("optimizer", "quantizer_optimizer"):
        return lambda make: make([{"params": [nn.Parameter(torch.zeros(1))]}])
    return lambda part: part
