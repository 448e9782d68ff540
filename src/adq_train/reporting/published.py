"""Figures that others have published, beside our own and never mixed with them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from adq_train.reporting.groups import Row, Section
from adq_train.reporting.names import short

# The image folder whose test part has as many images as ImageNet's validation part is taken for it.
IMAGENET_TEST_IMAGES = 50_000
# A mixed allocation rarely uses its budget to the last bit.
NEAR = 0.02


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        data: ``imagenet``, ``cifar10``.
        model: Name of the network.
        method: Name of the method, as it is cited.
        weights: Our name of its weight quantizer, or None.
        activations: Our name of its activation quantizer, or None.
        bits: Bits of weights and activations, or the average of the weights.
        is_mixed: Whether ``bits`` is an average.
        top1_percent: The figure.
        source: Where it was read, and what to know about it.
    """

    data: str
    model: str
    method: str
    weights: str | None
    activations: str | None
    bits: str
    is_mixed: bool
    top1_percent: float
    source: str

    def __str__(self) -> str:
        return f"{self.top1_percent:g} % ({self.method} at {self.bits} bits)"


def load() -> list[Published]:
    """All figures of ``published.yaml``."""
    text = files("adq_train.reporting").joinpath("published.yaml").read_text(encoding="utf-8")
    entries: Any = OmegaConf.to_container(OmegaConf.create(text))
    return [
        Published(
            entry["data"],
            entry["model"],
            entry["method"],
            entry["weights"],
            entry["activations"],
            str(bits),
            bool(entry.get("mixed")),
            float(value),
            " ".join(entry["source"].split()),
        )
        for entry in entries
        for bits, value in entry["top1_percent"].items()
    ]


def for_section(section: Section, known: list[Published]) -> list[Published]:
    """The figures for a section's data set and model, whatever their method and bits."""
    data = section.data
    runs = [run for row in section.rows for run in row.runs]
    if data == "image_folder" and all(
        run.result is not None and run.result.num_test_images == IMAGENET_TEST_IMAGES
        for run in runs
    ):
        data = "imagenet"
    if any(run.config["data"].get("train_images") for run in runs):
        return []  # a part of the data set is another data set
    return [x for x in known if (x.data, x.model) == (data, section.model)]


def for_row(row: Row, known: list[Published]) -> list[Published]:
    """Those of the figures whose method and bits are the row's.

    Args:
        row: Its first run tells method and bits.
        known: The figures for its data set and model.
    """
    if not row.runs or row.runs[0].allocation is None:
        return []
    allocation, config = row.runs[0].allocation, row.runs[0].config
    weights, activations = (
        short(config[name]["_target_"]) for name in ("weight_quantizer", "activation_quantizer")
    )

    def fits(figure: Published) -> bool:
        if (figure.weights, figure.activations) != (weights, activations):
            return False
        averages: list[Any] = [allocation.average_weight_bits]
        if not figure.is_mixed:
            averages.append(allocation.average_activation_bits)
        return all(abs(x - float(figure.bits)) <= NEAR for x in averages)

    return [figure for figure in known if fits(figure)]
