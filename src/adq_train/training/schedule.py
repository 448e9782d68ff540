"""Learning rate schedules: functions of progress alone, so that a resumed run needs no state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A factor on the learning rate, from the share of all steps that are done.

    Attributes:
        warmup_fraction: Share of all steps in which the factor first rises linearly from 0.
    """

    warmup_fraction: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(
                f"warmup_fraction must be at least 0 and less than 1, got {self.warmup_fraction}"
            )

    def __call__(self, progress: float) -> float:
        """The factor at ``progress`` in [0, 1)."""
        if progress < self.warmup_fraction:
            return progress / self.warmup_fraction
        return self.after_warmup((progress - self.warmup_fraction) / (1 - self.warmup_fraction))

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The factor at a share in [0, 1) of the steps after the warm-up."""


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 to ``final_factor`` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    final_factor: float = 0.0

    def after_warmup(self, progress: float) -> float:
        """The factor at a share in [0, 1) of the steps after the warm-up."""
        falling = (1 + math.cos(math.pi * progress)) / 2
        return self.final_factor + (1 - self.final_factor) * falling


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from 1 to ``final_factor``."""

    final_factor: float = 0.0

    def after_warmup(self, progress: float) -> float:
        """The factor at a share in [0, 1) of the steps after the warm-up."""
        return 1 - (1 - self.final_factor) * progress


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Multiplies by ``gamma`` at each of the ``milestones``, shares of the steps after warm-up."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def after_warmup(self, progress: float) -> float:
        """The factor at a share in [0, 1) of the steps after the warm-up."""
        passed = sum(progress >= milestone for milestone in self.milestones)
        return float(self.gamma**passed)
