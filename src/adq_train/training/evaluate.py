"""Evaluation: exact counts over every image once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from adq_train.data.base import Batches
from adq_train.errors import UserError
from adq_train.quantization.layer_weights import evaluating
from adq_train.training.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats and accuracies in percent, over ``num_images`` images."""

    loss: float
    top1_percent: float
    top5_percent: float
    num_images: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, ranks: Ranks = ALONE) -> Evaluation:
    """Evaluates a model in evaluation mode and leaves it in the mode that it was in.

    Args:
        model: Maps images (N, C, H, W) to logits (N, num_classes).
        batches: What to evaluate on.
        ranks: The processes that share the work: each takes every so many-th batch whole, so
            that no image counts twice and none is lost.

    Raises:
        UserError: There are no images.
    """
    # Sums stay on the device until the end: reading them would stall a GPU at every batch.
    totals = torch.zeros(4, dtype=torch.float64)
    with evaluating(model):
        for images, targets in batches.epoch(0, ranks.own):
            if not len(targets):
                continue
            logits = model(images)
            loss = F.cross_entropy(logits, targets, reduction="sum").double()
            ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            top1, top5 = ranked[:, 0].sum().double(), ranked.sum().double()
            counts = top1, top5, loss.new_tensor(len(targets))
            totals = totals.to(loss.device) + torch.stack([loss, *counts])
    total_loss, top1, top5, count = ranks.all_reduce_sum(totals.cpu()).tolist()
    if not count:
        raise UserError("data: there are no images to evaluate on; hold out at least one")
    return Evaluation(total_loss / count, 100 * top1 / count, 100 * top5 / count, int(count))
