"""Builds the parts of a run: for each group of the configuration a class of the group's base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch.optim import Optimizer

from adq_train.allocation.allocator import Allocator
from adq_train.data.base import ImageData, Loading
from adq_train.models import ModelSource
from adq_train.quantization.base import ActivationQuantizer, WeightQuantizer
from adq_train.quantization.target import Target
from adq_train.sensitivity.base import SensitivityMetric
from adq_train.settings.targets import TRUSTED_PREFIXES, construct
from adq_train.training.distillation import Distillation
from adq_train.training.schedule import Schedule


class DataSource(Protocol):
    """A data set's knobs."""

    def load(self, loading: Loading) -> ImageData:
        """Reads the data set."""
        ...


# The base of each group's classes, or the methods of those that need no common base.
BASES: dict[str, type] = {
    "data": DataSource,
    "model": ModelSource,
    "weight_quantizer": WeightQuantizer,
    "activation_quantizer": ActivationQuantizer,
    "sensitivity": SensitivityMetric,
    "allocator": Allocator,
    "optimizer": Optimizer,
    "quantizer_optimizer": Optimizer,
    "scheduler": Schedule,
    "distillation": Distillation,
    "target": Target,
}
# Groups whose classes are completed at run time: with bits, or with parameters.
PARTIAL = ("weight_quantizer", "activation_quantizer", "optimizer", "quantizer_optimizer")


def build(
    node: Any,
    path: str,
    trial: Callable[[Any], Any],
    trusted: tuple[str, ...] = TRUSTED_PREFIXES,
) -> Any:
    """Builds what the node of a group describes, as :func:`~.targets.construct` does.

    Args:
        node: ``_target_``, ``_partial_`` and arguments, which may be such nodes themselves.
        path: The group; decides on the base of the class.
        trial: Called with the result, for errors that only its use would show.
        trusted: Where the target may be defined: starts of module names.

    Raises:
        ConfigError: It cannot be built.
    """
    return construct(node, path, trial, trusted, BASES.get(path), path in PARTIAL)
