"""Whether a written file does what the network does, up to the rounding of another runtime."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.deploy import packed_form
from adq_train.deploy.apart import FileHere
from adq_train.deploy.formats import Format, Source, Written
from adq_train.errors import UserError, first_line
from adq_train.nested import few, mapped

# Images on which the effect of rounding is measured, where there is a difference to judge.
ROUNDING_IMAGES = 512
# Of the largest value, where values are compared and not classes.
VALUES_ROUND = 1e-5
# Of the root mean square of all outputs: more is no rounding of a network worth to be exported.
MOST_ROUNDING = 0.5


@dataclass(frozen=True)
class Agreement:
    """How two networks agree on a set of images.

    Attributes:
        num_images: How many images there were.
        different: On how many the two have different top-1 classes, near ties aside; or of outputs
            with one column, other values.
        largest_difference: Largest absolute difference of two logits.
        near_ties: On how many more the classes differ, but lie so close together in the first
            network that rounding can swap them.
        rounding: How far rounding moves a logit of the first network; measured where classes
            differ, else 0.
        moved: On how many the first network has another top-1 class than the trained one, where
            it rounds more than that does; else None.
    """

    num_images: int
    different: int
    largest_difference: float
    near_ties: int = 0
    rounding: float = 0.0
    moved: int | None = None


def write_checked(
    path: Path, kind: Format, source: Source, batches: Iterable[Tensor], tolerance: float = 0.0
) -> tuple[Written, Agreement]:
    """Writes a file and runs it beside the network that it is made from.

    Args:
        path: The file.
        kind: Its format.
        source: What it is made from.
        batches: Images (N, C, H, W) to compare on.
        tolerance: Share of them that may have another top-1 class, where the format does not
            promise every bit.

    Raises:
        UserError: It cannot be written, or does not do what the network does.
    """
    written = kind.writer()(source)
    path.write_bytes(written.content)
    trained = source.network if kind.integer else None
    first = written.reference
    second = packed_form.run(path, source) if kind.exact else FileHere(path, kind.runtime)
    try:
        if not kind.exact:
            require_trained(first, source, kind.as_trained and not source.tables.folded)
        agreement = compare(first, second, batches, written.resolution, trained)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise UserError(
            f"the file cannot be run beside the network ({first_line(error)}); no file was "
            "written; does forward() use a layer's weight itself?"
        ) from error
    if not kind.exact:
        require_same_classes(agreement, tolerance, kind.runtime)
    elif source.float_type is torch.float32 and not source.tables.folded:
        require_equal(agreement)
    return written, agreement


@torch.no_grad()
def compare(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Any],
    resolution: float = 0.0,
    trained: nn.Module | None = None,
) -> Agreement:
    """Runs two networks on the same images (N, C, H, W), or what else they take.

    Args:
        first: The one to compare with.
        second: The other.
        batches: Images.
        resolution: How far rounding moves a logit of the second, at least.
        trained: The network that the first one was made from, where its classes count too.

    Raises:
        UserError: Their logits have different shapes, or are not finite.
    """
    count, largest, moved = 0, 0.0, 0
    margins: list[float] = []
    samples: list[Any] = []
    for images in batches:
        a, b = first(images), second(images)
        if a.shape != b.shape:
            raise UserError(f"logits of shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError("logits are not finite on some images; there is nothing to compare")
        if count < ROUNDING_IMAGES:
            samples.append(few(images, ROUNDING_IMAGES - count))
        count += len(a)
        largest = max(largest, float((a - b).abs().max()))
        margins += _margins(a, b)
        if trained is not None:
            moved += len(_margins(trained(images), a))
    rounding = max(rounding_of(first, samples), resolution) if margins else 0.0
    # Two logits can move towards each other, each by so much.
    near = sum(margin <= 2 * rounding for margin in margins)
    different = len(margins) - near
    return Agreement(count, different, largest, near, rounding, None if trained is None else moved)


def _margins(a: Tensor, b: Tensor) -> list[float]:
    """What rounding must bridge for each difference of two outputs to be none.

    Args:
        a: (N, C, …) of the first network; the classes are compared.
        b: Of the second; with C = 1, or (N,), values that differ by more than float32 rounds.
    """
    if a.dim() < 2 or a.shape[1] == 1:
        moved = (a - b).abs()
        return moved[moved > VALUES_ROUND * a.abs().max()].tolist()
    swapped = a.argmax(1) != b.argmax(1)
    rival = a.gather(1, b.argmax(1, keepdim=True)).squeeze(1)
    return (a.amax(1) - rival)[swapped].tolist()


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@torch.no_grad()
def rounding_of(network: nn.Module, batches: Iterable[Any]) -> float:
    """How far rounding moves a logit: the largest distance to the same network in float64.

    That is more than the rounding of the last sum: where it carries a layer's input over a
    threshold, a code changes by one, and what follows with it.

    Args:
        network: In float32.
        batches: Images (N, C, H, W).

    Returns:
        0 for a network that cannot be run in float64; then no tie is near.
    """
    exact = copy.deepcopy(network).double()
    try:
        distances = [
            (network(x).double() - exact(mapped(_doubled, x))).abs().max() for x in batches
        ]
    except RuntimeError:  # a forward() with float32 of its own
        return 0.0
    return max(map(float, distances), default=0.0)


@torch.no_grad()
def require_trained(reference: nn.Module, source: Source, exactly: bool) -> None:
    """Refuses what a file is compared with if that is not the trained network, on the example.

    Args:
        reference: A network in the form of the file.
        source: The trained one.
        exactly: Bit for bit; else up to rounding, which moves outputs by less than their size.

    Raises:
        UserError: States the difference.
    """
    trained, found = source.network(source.example), reference(source.example)
    difference = (trained - found).double()
    share = float(difference.square().mean().sqrt() / trained.double().square().mean().sqrt())
    if share > (0.0 if exactly else MOST_ROUNDING):
        raise UserError(
            "the network of the file is not the trained one (its outputs are off by "
            f"{share:.2%} of their size); no file was written; is there a forward hook, or a value "
            "outside of the model's parameters and buffers, that changes what layers compute?"
        )


def require_same_classes(agreement: Agreement, tolerance: float, runtime: str) -> None:
    """Refuses a file that classifies otherwise.

    Args:
        agreement: On the test images.
        tolerance: Share of them that may have another top-1 class.
        runtime: What ran the file.

    Raises:
        UserError: States on how many images.
    """
    if not agreement.num_images:
        raise UserError("there are no images to verify the file on; no file was written")
    if agreement.different > tolerance * agreement.num_images:
        share = agreement.different / agreement.num_images
        raise UserError(
            f"{runtime} gives another top-1 class, or value where there is one, on "
            f"{agreement.different} of {agreement.num_images} images ({share:.2%}), more than "
            f"tolerance={tolerance:g} "
            f"allows, and {agreement.near_ties} near ties besides (largest difference of two "
            f"logits: {agreement.largest_difference:.3g}, of which rounding explains "
            f"{agreement.rounding:.3g}); no file was written"
        )


def require_equal(agreement: Agreement) -> None:
    """Refuses a packed file that is not the trained network, bit for bit.

    Raises:
        UserError: States the difference.
    """
    if agreement.largest_difference != 0:
        raise UserError(
            "the packed file's logits are not the trained network's (largest difference: "
            f"{agreement.largest_difference:.3g}); no file was written; is a value that forward() "
            "needs kept outside of the model's parameters and buffers?"
        )


def words(agreement: Agreement) -> str:
    """How well the classes agree, for a terminal."""
    if not agreement.different + agreement.near_ties:
        return "the same top-1 on every one"
    return (
        f"another top-1 on {agreement.different}, and on {agreement.near_ties} near ties (rounding "
        f"moves logits by up to {agreement.rounding:.3g})"
    )
