"""Rebuilds a network from what a file says about it, from a short list of builders."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adq_train import models
from adq_train.errors import ConfigError, UserError
from adq_train.validate import TRUSTED_PREFIXES, build, leaves

# A file may name these and nothing else: importing a name of its choice would run code.
BUILDERS = {
    f"adq_train.models.{kind.__name__}": kind
    for kind in (models.CifarResNetModel, models.TorchvisionModel)
}


def check_builder(node: Any) -> None:
    """Refuses a model that a packed file cannot name.

    Raises:
        UserError: Names the target.
    """
    target = node.get("_target_") if isinstance(node, dict) else node
    if not isinstance(target, str) or target not in BUILDERS:
        raise UserError(
            f"model._target_: {target!r} is not one of the builders that a packed file may name "
            f"({', '.join(BUILDERS)}); nothing was imported"
        )
    refuse_parts(node, "model")


def refuse_parts(node: Any, path: str) -> None:
    """Refuses targets within a section of a file: its arguments are values, not objects.

    Raises:
        UserError: Names the first one.
    """
    for name, value in leaves(node):
        if name != "_target_" and name.endswith("_target_"):
            raise UserError(f"{path}.{name}: a file may not name {value!r}; nothing was imported")


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
    if "weights" in node:
        node = {**node, "weights": None}
    try:
        source = build(node, "model", lambda part: part, trusted)
        # Initial weights are drawn, and must not move the caller's stream.
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = source.build(num_classes, in_channels)
    except ConfigError as error:
        raise UserError(str(error)) from error
    if fetched is not None and hasattr(network, "transform_input"):
        # What torchvision sets with pretrained weights, and adq-train unsets for other channels.
        network.transform_input = in_channels == 3  # type: ignore[assignment]
    return network.eval()
