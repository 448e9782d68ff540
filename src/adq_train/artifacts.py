"""What the stages hand to each other: frozen values, written as JSON and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adq_train.errors import UserError


@dataclass(frozen=True)
class LayerInfo:
    """One quantizable layer of the float model.

    Attributes:
        name: The module's qualified name.
        num_weights: Elements of its weight tensor.
        macs: Multiply-accumulates for one image.
        num_inputs: Elements of its input for one image.
    """

    name: str
    num_weights: int
    macs: int
    num_inputs: int


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer costs, by bit-width; higher is worse.

    Attributes:
        name: The module's qualified name.
        num_weights: Elements of its weight tensor.
        macs: Multiply-accumulates for one image.
        sensitivity: Of the layer as the metric quantizes it; of its weights alone where
            ``activation_sensitivity`` is there.
        activation_sensitivity: Of the layer's input alone; None where a metric does not tell the
            two apart.
        num_inputs: Elements of its input for one image, or None where that is not known.
    """

    name: str
    num_weights: int
    macs: int
    sensitivity: dict[int, float]
    activation_sensitivity: dict[int, float] | None = None
    num_inputs: int | None = None

    def by_tensors(self) -> Iterator[tuple[str, dict[int, float]]]:
        """The sensitivities with what they are of, for messages."""
        yield "layer", self.sensitivity
        if self.activation_sensitivity is not None:
            yield "the input of layer", self.activation_sensitivity


@dataclass(frozen=True)
class SensitivityTable:
    """The sensitivity of every quantizable layer at every candidate bit-width (method.md 3)."""

    metric: str
    bit_widths: tuple[int, ...]
    layers: tuple[LayerSensitivity, ...]

    def to_json(self) -> str:
        """The content of ``sensitivity.json``; what a layer does not have is left out."""
        layers = [{k: v for k, v in asdict(x).items() if v is not None} for x in self.layers]
        return _dump({**asdict(self), "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> SensitivityTable:
        """Reads what :meth:`to_json` wrote.

        Raises:
            UserError: The text is something else.
        """
        content = _parse(text, "a sensitivity table")
        try:
            return cls(
                metric=str(content["metric"]),
                bit_widths=tuple(int(b) for b in content["bit_widths"]),
                layers=tuple(
                    LayerSensitivity(
                        str(layer["name"]),
                        int(layer["num_weights"]),
                        int(layer["macs"]),
                        _by_bits(layer["sensitivity"]),
                        _by_bits(layer["activation_sensitivity"])
                        if "activation_sensitivity" in layer
                        else None,
                        int(layer["num_inputs"]) if "num_inputs" in layer else None,
                    )
                    for layer in content["layers"]
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"not a sensitivity table: {error!r}") from error


@dataclass(frozen=True)
class LayerBits:
    """The bits of one layer's weights and of its input."""

    name: str
    weight_bits: int
    activation_bits: int


@dataclass(frozen=True)
class BitAllocation:
    """Bits for every quantized layer, and what they cost.

    Attributes:
        allocator: Which allocator chose them.
        budget: The limits that it was given, by name.
        layers: In the order of execution.
        average_weight_bits: Mean over the weights of the layers whose bits were chosen.
        average_weight_bits_all_layers: Mean over the weights of all quantized layers.
        average_activation_bits: Mean over the input elements of the layers whose bits were chosen.
        model_size_bytes: Packed weights of all quantized layers, each rounded up to a byte.
        bops: Sum of MACs × weight bits × activation bits for one image.
        objective: Summed sensitivity of the chosen bits, over the layers whose bits were chosen;
            None where the table does not hold these bits.
        optimal: Whether no other allocation within the budget has a smaller objective (proven).
    """

    allocator: str
    budget: dict[str, float]
    layers: tuple[LayerBits, ...]
    average_weight_bits: float
    average_weight_bits_all_layers: float
    average_activation_bits: float
    model_size_bytes: int
    bops: int
    objective: float | None
    optimal: bool

    def to_json(self) -> str:
        """The content of ``allocation.json``."""
        return _dump(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BitAllocation:
        """Reads what :meth:`to_json` wrote.

        Raises:
            UserError: The text is something else.
        """
        content = _parse(text, "a bit allocation")
        layers = layer_bits(text)
        try:
            return cls(**{**content, "layers": layers})
        except TypeError as error:
            raise UserError(f"not a bit allocation: {error!r}") from error

    def bits(self) -> dict[str, LayerBits]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}


def layer_bits(text: str) -> tuple[LayerBits, ...]:
    """The layers of an ``allocation.json``, whatever else it holds.

    Raises:
        UserError: The text is something else.
    """
    content = _parse(text, "a bit allocation")
    try:
        layers = tuple(
            LayerBits(str(x["name"]), x["weight_bits"], x["activation_bits"])
            for x in content["layers"]
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"not a bit allocation: {error!r}") from error
    for x in layers:
        for bits in (x.weight_bits, x.activation_bits):
            if type(bits) is not int:
                raise UserError(f"not a bit allocation: {x.name} has {bits!r} bits")
    return layers


@dataclass(frozen=True)
class LayerLevels:
    """How many levels one layer has, and how many occur after QAT.

    Attributes:
        name: The layer's name.
        weight_levels: Levels of the codebook, or the number of weights if that is smaller.
        weight_levels_used: Distinct levels among the quantized weights.
        activation_levels: Levels of the input.
        activation_levels_used: Distinct levels of the input on the calibration images.
    """

    name: str
    weight_levels: int
    weight_levels_used: int
    activation_levels: int
    activation_levels_used: int


@dataclass(frozen=True)
class LevelCounts:
    """The levels of every quantized layer."""

    layers: tuple[LayerLevels, ...]

    def to_json(self) -> str:
        """The content of ``levels.json``."""
        return _dump(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LevelCounts:
        """Reads what :meth:`to_json` wrote.

        Raises:
            UserError: The text is something else.
        """
        content = _parse(text, "a count of levels")
        try:
            return cls(tuple(LayerLevels(**x) for x in content["layers"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"not a count of levels: {error!r}") from error


@dataclass(frozen=True)
class RunResult:
    """The figures of a run, on the test split.

    Attributes:
        fp_top1_percent: The float model.
        ptq_top1_percent: Prepared and calibrated, before any QAT step.
        qat_top1_percent: After QAT.
        qat_top5_percent: After QAT, target among the five largest logits.
        num_test_images: How many images the figures rest on.
        seconds: Time of each stage, summed over interruptions.
    """

    fp_top1_percent: float
    ptq_top1_percent: float
    qat_top1_percent: float
    qat_top5_percent: float
    num_test_images: int
    seconds: dict[str, float]

    def to_json(self) -> str:
        """The content of ``result.json``."""
        return _dump(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunResult:
        """Reads what :meth:`to_json` wrote.

        Raises:
            UserError: The text is something else.
        """
        try:
            return cls(**_parse(text, "a run result"))
        except TypeError as error:
            raise UserError(f"not a run result: {error}") from error


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _by_bits(values: Mapping[str, Any]) -> dict[int, float]:
    return {int(bits): float(value) for bits, value in values.items()}


def _parse(text: str, what: str) -> dict[str, Any]:
    """A JSON object without NaN or infinity, which strict JSON does not have."""

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number} is not a finite number")
        return float(number)

    try:
        content = json.loads(text, parse_float=finite, parse_constant=finite)
    except ValueError as error:
        raise UserError(f"not {what}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"not {what}: expected a JSON object")
    return content


def require_finite(table: SensitivityTable) -> None:
    """Refuses a table with a sensitivity that is not a number; nothing could be chosen by it.

    Raises:
        UserError: Names the layer and the bit-width.
    """
    for layer in table.layers:
        for what, values in layer.by_tensors():
            for bits, value in values.items():
                if not math.isfinite(value):
                    raise UserError(
                        f"sensitivity: {table.metric} of {what} {layer.name} at {bits} bits is "
                        f"{value}; check the float model, or choose another metric or more "
                        "calibration images"
                    )
