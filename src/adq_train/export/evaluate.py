"""``adq-eval``: a run, a packed file or an ONNX file, on its data set or on images of one's own."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from adq_train.data.base import ImageData, InputFormat, Pixels
from adq_train.data.listing import images_below
from adq_train.data.pictures import UnreadableError, read_picture, shown
from adq_train.errors import UserError, did_you_mean
from adq_train.export.datasets import check_data_source, load_data
from adq_train.export.onnx import OnnxModel
from adq_train.export.packed import open_packed
from adq_train.export.trained import open_run, trained_network
from adq_train.validate import TRUSTED_PREFIXES, trusted_prefixes

TOP = 5


@dataclass(frozen=True)
class Evaluable:
    """A network in one of its forms, and what it says about itself.

    Attributes:
        form: ``run``, ``packed`` or ``onnx``.
        network: Maps normalised images (N, C, H, W) to logits.
        expects: What it expects of an image; None for an ONNX file of another program.
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


def open_path(path: Path) -> Evaluable:
    """Opens a run folder, a packed file or an ONNX file.

    Raises:
        UserError: It is none of them, or damaged.
    """
    if path.is_dir():
        run = open_run(path)
        recorded = (run.manifest.get("data") or {}).get("fingerprint")
        data, trusted = run.config["data"], trusted_prefixes(run.config)
        network = trained_network(run)
        return Evaluable("run", network, run.input_format(), data, recorded, trusted)
    if path.suffix == ".onnx":
        onnx = OnnxModel(path)
        facts = onnx.facts()
        expects = InputFormat.from_dict(facts["input"]) if "input" in facts else None
        return Evaluable("onnx", onnx, expects, facts.get("data"), _fingerprint(facts))
    if not path.exists():
        raise UserError(f"there is no {path}; give a run folder, a packed file or an .onnx file")
    model, network = open_packed(path)
    run_facts = {"run": model.run}
    return Evaluable("packed", network, model.expects, model.data, _fingerprint(run_facts))


def _fingerprint(facts: Mapping[str, Any]) -> str | None:
    """The recorded data fingerprint, where a file has one."""
    node: Any = facts
    for key in ("run", "data", "fingerprint"):
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, str) else None


def data_section(section: Any, choice: str | None, changes: Mapping[str, str]) -> dict[str, Any]:
    """The ``data`` section to evaluate on.

    Args:
        section: What the file or the run says, or None.
        choice: The name of another data set, or None.
        changes: Settings to change, by name, in YAML.

    Raises:
        UserError: There is no such data set, or none at all.
    """
    if choice is not None:
        folder = importlib.resources.files("adq_train.configs") / "data"
        known = [Path(x.name).stem for x in folder.iterdir() if x.name.endswith(".yaml")]
        if choice not in known:
            raise UserError(
                f"data: there is no data set {choice!r}{did_you_mean(choice, known)}; choose from "
                f"{', '.join(sorted(known))}"
            )
        text = (folder / f"{choice}.yaml").read_text("utf-8")
        section = OmegaConf.to_container(OmegaConf.create(text))
    if not isinstance(section, dict):
        raise UserError("data: the file does not say what it was trained on; give data=<name>")
    try:
        settings = OmegaConf.from_dotlist([f"{key}={value}" for key, value in changes.items()])
        changed: Any = OmegaConf.to_container(settings)
    except Exception as error:  # YAML and OmegaConf have errors of their own
        raise UserError(f"data: a value cannot be read ({error})") from error
    if "_target_" in changed:
        raise UserError("data._target_: cannot be changed; choose a data set with data=<name>")
    return {key: v for key, v in {**section, **changed}.items() if v != "???"}


def open_data(opened: Evaluable, section: dict[str, Any], batch_size: int) -> ImageData:
    """Loads the data set to evaluate on, and checks that the network fits it.

    Raises:
        UserError: It has other images or classes than the network expects.
    """
    if opened.form != "run":
        check_data_source(section)
    data = load_data(section, batch_size, opened.trusted)
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
