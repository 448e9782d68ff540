"""Rebuilds a network from what a file says about it, from a short list of builders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adq_train import models
from adq_train.errors import ConfigError, UserError
from adq_train.quantization.copies import unfuse
from adq_train.settings.ranges import leaves
from adq_train.settings.targets import TRUSTED_PREFIXES, added_to, construct

# A file may name these, and what its reader trusts: importing a name of its choice would run code.
BUILDERS = {
    f"adq_train.models.{kind.__name__}": kind
    for kind in (models.CifarResNetModel, models.TorchvisionModel, models.TimmModel)
}


def check_builder(node: Any, trusted: tuple[str, ...] = TRUSTED_PREFIXES) -> None:
    """Refuses a model that a packed file may not name.

    Args:
        node: The file's ``model`` section.
        trusted: Starts of module names that its reader trusts.

    Raises:
        UserError: Names the target.
    """
    target = node.get("_target_") if isinstance(node, dict) else node
    if not isinstance(target, str) or not (target in BUILDERS or is_own(target, trusted)):
        raise UserError(
            f"model._target_: {target!r} is not one of the builders that a packed file may name "
            f"({', '.join(BUILDERS)}); nothing was imported{how_to_trust(target)}"
        )
    refuse_parts(node, "model", trusted)


def is_own(target: str, trusted: tuple[str, ...]) -> bool:
    """Whether a target is of a package that the user has added to the trusted ones."""
    return target.startswith(added_to(trusted))


def how_to_trust(target: object) -> str:
    """How to trust a target's package, as the end of a message."""
    package = str(target).split(".")[0]
    known = package.isidentifier() and not f"{package}.".startswith(TRUSTED_PREFIXES)
    return f"; if you trust it, add trusted_packages=[{package}]" if known else ""


def refuse_parts(node: Any, path: str, trusted: tuple[str, ...] = TRUSTED_PREFIXES) -> None:
    """Refuses targets within a section of a file: its arguments are values, not objects.

    Args:
        node: The section.
        path: Its name.
        trusted: Starts of module names that its reader trusts.

    Raises:
        UserError: Names the first one that is of no package of the reader's own.
    """
    for name, value in leaves(node):
        if name != "_target_" and name.endswith("_target_") and not is_own(str(value), trusted):
            raise UserError(f"{path}.{name}: a file may not name {value!r}; nothing was imported")


# A torchvision network has parts while it is built that adq-train takes away again.
SPARE = 4
SPARE_VALUES = 1 << 20


@contextlib.contextmanager
def limited_to(num_tensors: int, num_values: int) -> Iterator[None]:
    """Stops the building of a network that is far larger than the file that describes it.

    A parameter is registered before its values are set, so that what is too large has not taken
    memory yet, and a network that is too deep ends early.

    Args:
        num_tensors: That the file holds.
        num_values: That they have together.
    """
    tensors, values = 0, 0

    def count(_: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, values
        if parameter is None:
            return
        tensors, values = tensors + 1, values + parameter.numel()
        if tensors > SPARE * num_tensors + 100 or values > SPARE * num_values + SPARE_VALUES:
            raise UserError(
                f"the model section describes a network far larger than the {num_values:,} values "
                f"in {num_tensors:,} tensors that are there"
            )

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def build_network(
    node: dict[str, Any],
    num_classes: int,
    in_channels: int,
    trusted: tuple[str, ...] = TRUSTED_PREFIXES,
) -> nn.Module:
    """The float network in evaluation mode, with weights that are to be replaced.

    Args:
        node: The config's ``model`` section. Pretrained weights are not fetched.
        num_classes: Number of classes.
        in_channels: Channels of an image.
        trusted: Where the model may be defined, for a section that is not from a file.

    Raises:
        UserError: The section does not describe a model of this version.
    """
    fetched = node.get("weights")
    if "weights" in node and node.get("_target_") in BUILDERS:
        node = {**node, "weights": None}
    try:
        source = construct(node, "model", lambda part: part, trusted, models.ModelSource)
        # Also a subclass of somebody's.
        if isinstance(source, models.TorchvisionModel | models.TimmModel):
            source = replace(source, weights=None)
        # Initial weights are drawn, and must not move the caller's stream.
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = source.build(num_classes, in_channels)
    except ConfigError as error:
        raise UserError("; ".join(error.problems)) from error
    if fetched is not None and hasattr(network, "transform_input"):
        # What torchvision sets with pretrained weights, and adq-train unsets for other channels.
        network.transform_input = in_channels == 3  # type: ignore[assignment]
    unfuse(network)
    return network.eval()
