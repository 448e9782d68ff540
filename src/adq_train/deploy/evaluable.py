"""``adq-eval``: a run or an exported file, on its data set or on images of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from adq_train.data.base import ImageData, InputFormat, Pixels
from adq_train.data.listing import images_below
from adq_train.data.pictures import UnreadableError, read_picture, shown
from adq_train.deploy.apart import FileApart
from adq_train.deploy.datasets import check_data_source, load_data
from adq_train.deploy.formats import FORMATS, format_of
from adq_train.deploy.packed import open_packed
from adq_train.deploy.trained import open_run, trained_network
from adq_train.errors import UserError
from adq_train.settings.targets import TRUSTED_PREFIXES, trusted_prefixes

TOP = 5


@dataclass(frozen=True)
class Evaluable:
    """A network in one of its forms, and what it says about itself.

    Attributes:
        form: ``run``, or the name of its format.
        network: Maps normalised images (N, C, H, W) to logits.
        expects: What it expects of an image; None for another program's file.
        data: The ``data`` section of the run that it is from, or None.
        fingerprint: Of the data that it was trained on, or None.
        trusted: Where its data set may be defined.
    """

    form: str
    network: nn.Module
    expects: InputFormat | None
    data: dict[str, Any] | None
    fingerprint: str | None
    trusted: tuple[str, ...] = TRUSTED_PREFIXES


def open_path(path: Path, trusted_packages: Sequence[str] = ()) -> Evaluable:
    """Opens a run folder or a file of ``adq-export``.

    Args:
        path: Of it.
        trusted_packages: Whose classes it may name besides the built-in ones.

    Raises:
        UserError: It is none of them, or damaged.
    """
    if path.is_dir():
        run = open_run(path, trusted_packages)
        recorded = (run.manifest.get("data") or {}).get("fingerprint")
        network = trained_network(run)
        data = run.config.data
        return Evaluable("run", network, run.input_format(), data, recorded, run.trusted)
    kind = format_of(path)
    if kind is None:
        if not path.exists():
            raise UserError(f"there is no {path}; give a run folder or a file of adq-export")
        kind = FORMATS["packed"]  # it can tell whether it is one
    trusted = trusted_prefixes(trusted_packages)
    if kind.exact:  # a packed file names a class of its network
        model, network = open_packed(path, trusted=trusted)
        expects, data, recorded = model.expects, model.data, model.run
    else:
        kind.writer()  # which needs what the runtime needs, and says how to install it
        network = FileApart(path, kind.runtime)
        expects, data, recorded = network.expects, *map(network.facts.get, ("data", "run"))
    return Evaluable(kind.name, network, expects, data, _fingerprint(recorded), trusted)


def _fingerprint(run: Any) -> str | None:
    """The recorded data fingerprint, where a file has one."""
    node = run
    for key in ("data", "fingerprint"):
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, str) else None


def open_data(
    opened: Evaluable, section: dict[str, Any], batch_size: int, download: bool
) -> ImageData:
    """Loads the data set to evaluate on, and checks that the network fits it.

    Raises:
        UserError: It has other images or classes than the network expects.
    """
    if opened.form != "run":
        check_data_source(section, opened.trusted)
    data = load_data(section, batch_size, opened.trusted, download)
    expects = opened.expects
    if expects and (expects.num_classes, expects.image_shape) != (
        data.num_classes,
        data.image_shape,
    ):
        raise UserError(
            f"data: the model expects images of {expects.image_shape} in {expects.num_classes} "
            f"classes, {data.name} has {data.image_shape} in {data.num_classes}"
        )
    return data


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first, with their probabilities."""

    image: str
    classes: tuple[tuple[str, float], ...]


def read_image(path: Path, expects: InputFormat) -> Tensor:
    """One image as the network sees it, (1, C, H, W).

    Args:
        path: An image file; it is read as those of a data set are.
        expects: Shape and normalisation.

    Raises:
        UserError: It is not an image, or the network takes neither grey nor colour images.
    """
    channels, height, width = expects.image_shape
    pixels = expects.pixels
    if pixels is None or channels not in (1, 3):
        raise UserError("predict: the model does not say how images of one's own are to be read")
    try:
        image = read_picture(str(path), "L" if channels == 1 else "RGB", pixels.resize)
    except UnreadableError as error:
        raise UserError(f"predict: cannot read the image {shown(path)} ({error})") from error
    image = _resized(image, pixels, height, width)
    values = torch.from_numpy(np.array(image)).float().view(height, width, channels)
    values = values.permute(2, 0, 1) * (pixels.peak / 255)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (pixels.mean, pixels.std))
    return ((values - mean) / std).unsqueeze(0)


def _resized(image: Image.Image, pixels: Pixels, height: int, width: int) -> Image.Image:
    """To the network's size; by a centre crop where the data set takes one, as it does."""
    if pixels.resize is None:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    cropped: Image.Image = v2.functional.center_crop(
        v2.functional.resize(image, [pixels.resize], antialias=True), [height, width]
    )
    return cropped


@torch.no_grad()
def predict(opened: Evaluable, path: Path) -> list[Prediction]:
    """Classifies an image, or all images of a folder.

    Raises:
        UserError: There is no image, or one cannot be read.
    """
    if opened.expects is None:
        raise UserError("predict: the model does not say how images of one's own are to be read")
    files = [path]
    if path.is_dir():
        files = sorted(map(Path, images_below(path)))
    if not files:
        raise UserError(f"predict: there is no image in {path}")
    names = opened.expects.class_names or tuple(map(str, range(opened.expects.num_classes)))
    predictions = []
    for file in files:
        probabilities = opened.network(read_image(file, opened.expects)).softmax(1)[0]
        best = probabilities.topk(min(TOP, len(names)))
        classes = [
            (names[i], p)
            for i, p in zip(*map(Tensor.tolist, (best.indices, best.values)), strict=True)
        ]
        predictions.append(Prediction(shown(file), tuple(classes)))
    return predictions
