"""One optimizer step: loss, gradients, and the upkeep of the quantizers around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from adq_train.quantization.prepare import Upkeep


class TrainingStep:
    """What happens to a model with every batch; codebooks adapt after each optimizer step.

    Args:
        model: Float or prepared, from images (N, …) to logits (N, num_classes).
        optimizer: Over the model's parameters.
        label_smoothing: Share of the target's probability spread over all classes.
        gradient_clip_norm: Largest L2 norm of the gradients, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        label_smoothing: float = 0.0,
        gradient_clip_norm: float | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.gradient_clip_norm = gradient_clip_norm
        self._upkeep = Upkeep(model)

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """Trains on one batch.

        Args:
            images: (N, C, H, W).
            targets: (N,) int64.
            step: Finished optimizer steps.

        Returns:
            The mean loss (), detached, on the device.
        """
        loss = F.cross_entropy(self.model(images), targets, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._upkeep.before_step()
        if self.gradient_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip_norm)
        self.optimizer.step()
        self._upkeep.after_step(step + 1)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides model and optimizer; tensors and plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, after the model has its weights."""
