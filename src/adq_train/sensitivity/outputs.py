"""The float model's outputs on the calibration images: whether Ω can mean anything at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adq_train.data.base import Batch
from adq_train.errors import UserError
from adq_train.quantization.layer_weights import evaluating
from adq_train.sensitivity.noise import NOISE, Found
from adq_train.training.health import origin

# Numbers that differ by less than so many relative roundings of their type are taken for equal.
ROUNDING = 4.0


@torch.no_grad()
def float_outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """The outputs of every batch, in evaluation mode; the model is left as it was.

    Args:
        model: The float network.
        batches: Images (N, C, H, W) and targets (N,).

    Returns:
        (N, num_classes) each, all finite.

    Raises:
        UserError: An output is NaN or infinite; says how many and in which layer it begins.
    """
    with evaluating(model):
        outputs: list[Tensor] = [model(images) for images, _ in batches]
        bad = [~x.isfinite().reshape(len(x), -1).all(1) for x in outputs]
        count = sum(int(x.sum()) for x in bad)
        if count:
            images = next(x for (x, _), wrong in zip(batches, bad, strict=True) if wrong.any())
            raise UserError(
                f"model: its float outputs are NaN or infinite for {count} of "
                f"{sum(map(len, outputs))} calibration images, from "
                f"{origin(model, images, lambda: model(images))} on; check its weights, or train "
                "it with a smaller learning rate; mask a class with -1e4 instead of -inf"
            )
        return outputs


def caveat(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> str | None:
    """Why the Ω of a float model means little, or None.

    A model is at chance if it is right no more often, beyond ``NOISE`` standard errors, than one
    that always names the most frequent class.

    Args:
        outputs: (N, num_classes, …) of each batch.
        targets: (N,) of each batch; empty where none are known, then only constant outputs show.
    """
    values, labels = torch.cat(list(outputs)), torch.cat(list(targets))
    same = ROUNDING * torch.finfo(values.dtype).eps * values.abs().max()
    if len(values) > 1 and bool((values - values[:1]).abs().max() <= same):
        return "the float model's outputs are the same for every calibration image"
    if values.ndim != 2 or labels.ndim != 1 or len(labels) != len(values):
        return None
    if labels.is_floating_point() or len(torch.unique(labels)) < 2:
        return None
    predicted = values.argmax(1)
    if len(torch.unique(predicted)) == 1:
        return "the float model predicts one class for every calibration image"
    count = len(labels)
    most = float(torch.unique(labels, return_counts=True)[1].max()) / count
    right = float((predicted == labels).sum()) / count
    if right <= most + NOISE * math.sqrt(most * (1 - most) / count):
        return f"the float model is at chance on the calibration images ({100 * right:.1f} % right)"
    return None


def num_columns(outputs: Tensor) -> int:
    """The classes or values for an image, or for each place of its map: C of (N, C, …)."""
    return outputs.shape[1] if outputs.ndim > 1 else 1


def rounding(outputs: Sequence[Tensor]) -> float:
    """The error that rounding alone leaves in the outputs of an image, root mean square.

    Args:
        outputs: (N, num_classes, …) of each batch.
    """
    images = torch.cat([x.reshape(len(x), -1) for x in outputs]).double()
    size = math.sqrt(float(images.square().sum(1).mean()))
    return ROUNDING * torch.finfo(outputs[0].dtype).eps * size


def summary(values: Tensor, smallest: float = 0.0) -> Found:
    """The mean of values and its standard error, which a single value does not have.

    Args:
        values: (N,), one for each image.
        smallest: A mean of no larger magnitude counts as 0.
    """
    mean = float(values.mean())
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return (mean if abs(mean) > smallest else 0.0), error
