"""What of a network stays in full precision, and whether it may."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from adq_train.allocation.patterns import listed
from adq_train.errors import UserError
from adq_train.quantization.layer_weights import weight_identity
from adq_train.quantization.layers import QuantLayer
from adq_train.quantization.watch import is_matrix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Strictness:
    """What may stay in full precision.

    Attributes:
        strict: Whether nothing may that is not listed.
        listed: Names of layers and of parameters, or shell patterns; of these nothing is said.
    """

    strict: bool = False
    listed: Sequence[str] = ()


WARNED = Strictness()


def in_full_precision(
    trial: nn.Module, name_of: Mapping[object, str], refused: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Every matrix of weights that is not the weight of a quantized layer, and why.

    Args:
        trial: After surgery.
        name_of: The layer of each quantized weight.
        refused: Why layers cannot be quantized, by name.

    Yields:
        The name of a layer, or of another module's parameter, and the reason.
    """
    made_from = tuple(f"{name}.parametrizations." for name in name_of.values())
    for name, module in trial.named_modules():
        is_layer = isinstance(module, QuantLayer)
        if (is_layer and weight_identity(module) in name_of) or name.startswith(made_from):
            continue
        left = [
            parameter
            for parameter, x in module.named_parameters(recurse=False)
            if is_matrix(x) and x not in name_of
        ]
        if not left:
            continue
        if is_layer:
            yield name, refused.get(name, "forward() is never called")
            continue
        why = f"weights of a {type(module).__name__} are not quantized"
        if "forward" in vars(module):
            why = "forward() is not that of the class"
        yield from ((f"{name}.{parameter}".strip("."), why) for parameter in left)


def used_elsewhere(trial: nn.Module, weights: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Quantized weights that are also used without calling their layers.

    Args:
        trial: After surgery.
        weights: By layer.

    Yields:
        What uses one, and a phrase that says so.
    """
    for name, weight in weights.items():
        holders = [
            other
            for other, module in trial.named_modules()
            if not isinstance(module, QuantLayer)
            and any(x is weight for x in module.parameters(recurse=False))
        ]
        for holder in holders or ["an operation of the model"]:
            yield holder, f"it uses the weight of {name} without calling that layer"


def tell(left: Iterable[tuple[str, str]], strictness: Strictness) -> None:
    """Names what stays in full precision, a line for each reason.

    Args:
        left: Names and reasons.
        strictness: What may stay so.

    Raises:
        UserError: Something may not.
    """
    by_reason: dict[str, list[str]] = {}
    for name, why in left:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in strictness.listed):
            by_reason.setdefault(why, []).append(name)
    lines = [
        f"{listed(names)} {'stays' if len(names) == 1 else 'stay'} in full precision: {why}"
        for why, names in by_reason.items()
    ]
    if lines and strictness.strict:
        raise UserError(
            f"strict: {'; '.join(lines)}; list what may stay so in bits.full_precision, or leave "
            "strict out"
        )
    for line in lines:
        log.warning("%s", line)
