"""Batch norm statistics, estimated anew for a network whose weights or inputs have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adq_train.data.base import Batches
from adq_train.errors import UserError
from adq_train.quantization.layer_weights import evaluating
from adq_train.quantization.watch import run_with_hooks


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def batch_norms_after(model: nn.Module, layer: str, images: Tensor) -> list[_BatchNorm]:
    """The batch norms whose first call comes after that of a layer.

    Args:
        model: The network; left as it was.
        layer: The layer's name.
        images: (N, C, H, W), to see the order of the calls.
    """
    called: dict[str, None] = {}
    norms = batch_norms(model)

    def record(name: str) -> None:
        called.setdefault(name)

    run_with_hooks(
        model, images, {name: lambda *_, name=name: record(name) for name in [layer, *norms]}
    )
    order = list(called)
    return [norms[name] for name in order[order.index(layer) + 1 :]]


@contextmanager
def averaged_statistics(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Inside the block some batch norms use each batch's statistics, and average them.

    Afterwards their running mean and variance are the averages over the batches, each of which
    counts the same, and their modes are as before.

    Raises:
        UserError: A batch has one value per channel, which has no variance.
    """
    before = [(norm, norm.training, norm.momentum) for norm in norms]
    for norm, _, _ in before:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None
    try:
        yield
    except ValueError as error:
        raise UserError(
            "batch norm cannot be estimated: a single image gives it one value per channel; use "
            "larger batches (trainer.batch_size, trainer.eval_batch_size, data.calibration_images: "
            "at least 2)"
        ) from error
    finally:
        for norm, training, momentum in before:
            norm.training, norm.momentum = training, momentum


@contextmanager
def kept_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Gives some batch norms their statistics back after the block."""
    before = [{name: x.clone() for name, x in norm.named_buffers()} for norm in norms]
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)


def first_images(
    batches: Batches, epoch: int, num_images: int, together: int = 1
) -> Iterator[Tensor]:
    """The first batches of an epoch, without targets, until they hold ``num_images``.

    Args:
        batches: The training images.
        epoch: From 0.
        num_images: How many, at least.
        together: So many images or more, if there are, make one of the batches that are handed
            out, all of about the same size.
    """
    enough = num_images / max(1, num_images // together)
    found, parts = 0, []
    for images, _ in batches.epoch(epoch):
        if not len(images):  # none of them could be decoded
            continue
        parts.append(images)
        found += len(images)
        if sum(map(len, parts)) >= enough:
            yield torch.cat(parts)
            parts = []
        if found >= num_images:
            break
    if parts:
        yield torch.cat(parts)


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets every batch norm's running statistics to the averages over some batches.

    A batch norm sees what the ones before it make of the same batch. All else runs in evaluation
    mode; modes are restored.

    Args:
        model: Its batch norms are changed in place.
        batches: Images (N, C, H, W) each, at least one batch.

    Raises:
        UserError: A batch has one value per channel, which has no variance.
    """
    with evaluating(model), averaged_statistics(batch_norms(model).values()):
        for images in batches:
            model(images)
