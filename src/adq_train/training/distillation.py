"""Knowledge distillation: a float teacher's logits guide the quantized network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.errors import UserError
from adq_train.models import ModelSource, TorchvisionModel
from adq_train.quantization.functional import at_least_float32
from adq_train.states import load_weights


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(z_teacher / T) ‖ softmax(z / T)), the mean over the batch.

    Hinton et al. 2015 (arXiv 1503.02531, section 2); T² keeps the size of the gradients.

    Args:
        logits: (N, K).
        teacher_logits: (N, K), without gradient.
        temperature: T > 0.

    Returns:
        () nats, at least 0 up to rounding.
    """
    student = F.log_softmax(at_least_float32(logits) / temperature, 1)
    teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, 1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return kl * temperature**2


class Teacher:
    """A float network and how much it has to say.

    Args:
        model: Images (N, C, H, W) to logits (N, K); runs in evaluation mode.
        temperature: See :func:`divergence`.
        weight: Share w of the divergence in the loss, in (0, 1].
        epochs: Of float training that the network needs before it can teach.
    """

    def __init__(
        self, model: nn.Module, temperature: float, weight: float, epochs: int = 0
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.weight = weight
        self.epochs = epochs

    def loss(self, logits: Tensor, images: Tensor, label_loss: Callable[[], Tensor]) -> Tensor:
        """The loss w T² KL + (1 - w) · label loss, (); with w = 1 the labels are not looked at.

        Args:
            logits: (N, K) of the student.
            images: (N, C, H, W) that it saw.
            label_loss: Computes the loss against the labels.
        """
        if self.model.training:
            self.model.eval()
        with torch.no_grad():
            teacher_logits = self.model(images)
        loss = self.weight * divergence(logits, teacher_logits, self.temperature)
        return loss if self.weight == 1 else loss + (1 - self.weight) * label_loss()


class Distillation(Protocol):
    """Where the teacher of QAT comes from."""

    def teacher(self, float_model: nn.Module, num_classes: int, in_channels: int) -> Teacher | None:
        """The teacher, on the device of the run's float model, or None."""
        ...


@dataclass(frozen=True)
class NoDistillation:
    """The labels alone."""

    def teacher(self, float_model: nn.Module, num_classes: int, in_channels: int) -> Teacher | None:
        """No teacher."""
        return None


@dataclass(frozen=True, kw_only=True)
class LogitDistillation:
    """A teacher's logits beside the labels, or in their place.

    Attributes:
        name: A torchvision classifier; None: the network of the run itself.
        weights: The torchvision weights of that classifier (DEFAULT …).
        checkpoint: A state dict of the teacher. With neither this nor ``name`` the teacher is
            the run's own float model.
        temperature: T; see :func:`divergence`.
        weight: Share of the divergence in the loss; 1 replaces the label loss.
    """

    name: str | None = None
    weights: str | None = None
    checkpoint: str | None = None
    temperature: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_shares(self.temperature, self.weight)
        if self.name is None and self.weights is not None:
            raise ValueError("weights: they belong to a torchvision teacher; give its name too")
        if self.name is not None:
            TorchvisionModel(name=self.name, weights=self.weights)
            if (self.weights is None) == (self.checkpoint is None):
                raise ValueError(
                    f"weights: the teacher {self.name} needs either weights (say, DEFAULT) or a "
                    f"checkpoint, got {self.weights} and {self.checkpoint}"
                )

    def teacher(self, float_model: nn.Module, num_classes: int, in_channels: int) -> Teacher | None:
        """The teacher, on the device of the run's float model.

        Args:
            float_model: The run's own.
            num_classes: K of the data.
            in_channels: C of the data.

        Raises:
            UserError: The checkpoint does not fit, or the weights know other classes.
        """
        model = float_model
        if self.name is not None:
            if self.weights is not None:
                entry = torchvision.models.get_model_weights(self.name)[self.weights]
                known = len(entry.meta["categories"])
                if known != num_classes:
                    raise UserError(
                        f"distillation.weights: those of {self.name} know {known} classes, the "
                        f"data has {num_classes}; give a checkpoint of a teacher for this data"
                    )
            model = TorchvisionModel(name=self.name, weights=self.weights).build(
                num_classes, in_channels
            )
        elif self.checkpoint is not None:
            model = copy.deepcopy(float_model)
        if self.checkpoint is not None:
            load_weights(model, Path(self.checkpoint), "distillation.checkpoint")
        device = next(float_model.parameters()).device
        return Teacher(model.to(device), self.temperature, self.weight)


@dataclass(frozen=True, kw_only=True)
class TrainedTeacher:
    """A float network of its own, trained by the run as it trains its own float model.

    Attributes:
        model: The teacher's network, usually a larger one.
        epochs: Of its training, at ``pretrain.lr`` and ``pretrain.weight_decay``.
        temperature: T; see :func:`divergence`.
        weight: Share of the divergence in the loss; 1 replaces the label loss.
    """

    model: ModelSource
    epochs: int
    temperature: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_shares(self.temperature, self.weight)
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not callable(getattr(self.model, "build", None)):
            raise ValueError(f"model: must be one of configs/model, got {self.model!r}")

    def teacher(self, float_model: nn.Module, num_classes: int, in_channels: int) -> Teacher | None:
        """The teacher before its training, on the device of the run's float model.

        Args:
            float_model: The run's own.
            num_classes: K of the data.
            in_channels: C of the data.
        """
        device = next(float_model.parameters()).device
        model = self.model.build(num_classes, in_channels).to(device)
        return Teacher(model, self.temperature, self.weight, self.epochs)


def _check_shares(temperature: float, weight: float) -> None:
    """Refuses a temperature or a share of the loss out of its range.

    Raises:
        ValueError: Names the setting, what it got and what is allowed.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be more than 0, got {temperature}")
    if not 0 < weight <= 1:
        raise ValueError(f"weight must be more than 0 and at most 1, got {weight}")
