"""What the stages hand to each other: frozen values, written as JSON and read back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from adq_train.errors import UserError
from adq_train.storage.decoding import Within, decode, strict_json
from adq_train.storage.stamps import content_problem

Count = Annotated[int, Within(0)]
AtLeastOne = Annotated[int, Within(1)]
BitWidth = Annotated[int, Within(2, 8)]
Percent = Annotated[float, Within(0, 100)]
NotNegative = Annotated[float, Within(0)]


# A layer's values by bit-width in sensitivity.json.
VALUES = (
    "sensitivity",
    "activation_sensitivity",
    "standard_error",
    "activation_standard_error",
    "measured",
    "activation_measured",
)

# The metric whose values are -log of learned shares.
LEARNED = "learned"


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
        standard_error: Of the values of ``sensitivity``, by bit-width, as a sample of images or of
            random vectors leaves it; None where a metric has none, or it is not known.
        activation_standard_error: Of the values of ``activation_sensitivity``.
        measured: The values before they were made to fall with more bits within their standard
            error (:func:`adq_train.sensitivity.noise.settle`); None where that changed none.
        activation_measured: The same of the layer's input.
    """

    name: str
    num_weights: Count
    macs: Count
    sensitivity: dict[int, float]
    activation_sensitivity: dict[int, float] | None = None
    num_inputs: AtLeastOne | None = None
    standard_error: dict[int, float] | None = None
    activation_standard_error: dict[int, float] | None = None
    measured: dict[int, float] | None = None
    activation_measured: dict[int, float] | None = None

    def by_tensors(self) -> Iterator[tuple[str, dict[int, float]]]:
        """The sensitivities with what they are of, for messages."""
        yield "layer", self.sensitivity
        if self.activation_sensitivity is not None:
            yield "the input of layer", self.activation_sensitivity


class Artifact:
    """A value that a stage hands over, with a JSON form; its kinds are dataclasses.

    Attributes:
        what: It in words, for messages.
    """

    what: ClassVar[str]

    def to_json(self) -> str:
        """The content of its file."""
        return _dump(asdict(self))  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[A], text: str) -> A:
        """Reads what :meth:`to_json` wrote.

        Raises:
            UserError: The text is something else, or was edited; the field is named.
        """
        value: A = _read(cls, text, cls.what)
        return value


A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class SensitivityTable(Artifact):
    """The sensitivity of every quantizable layer at every candidate bit-width.

    Attributes:
        metric: The metric's name.
        bit_widths: The candidates.
        layers: In the order of execution.
        caveat: Why the values mean little, such as a float model at chance; None where no reason
            is known.
    """

    what = "a sensitivity table"

    metric: str
    bit_widths: tuple[BitWidth, ...]
    layers: tuple[LayerSensitivity, ...]
    caveat: str | None = None

    @property
    def may_rise(self) -> bool:
        """Whether more bits may have a larger value: that of a preference, not of a loss."""
        return self.metric == LEARNED

    def to_json(self) -> str:
        """The content of ``sensitivity.json``; what is not known is left out."""
        layers = [_known(asdict(x)) for x in self.layers]
        return _dump({**_known(asdict(self)), "layers": layers})

    @classmethod
    def from_json(cls, text: str, by_hand: bool = False) -> SensitivityTable:
        """Reads what :meth:`to_json` wrote.

        Args:
            text: The content of a file.
            by_hand: Whether the layers' names and values are enough. Then the metric is called
                ``from_file`` and counts are 0 where the text does not say them, and a stamp that
                the content does not fit is no fault.

        Raises:
            UserError: The text is something else, or was edited; the field is named.
        """
        table: SensitivityTable = _read(cls, text, cls.what, by_hand)
        return table


@dataclass(frozen=True)
class LayerBits:
    """The bits of one layer's weights and of its input."""

    name: str
    weight_bits: BitWidth
    activation_bits: BitWidth


@dataclass(frozen=True)
class _Layers:
    """The part of a bit allocation that a person may write."""

    layers: tuple[LayerBits, ...]


@dataclass(frozen=True)
class BitAllocation(Artifact):
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
        caveat: Why a smaller objective may mean little, to follow "these Ω"; None where no reason
            is known, or the bits were not chosen by Ω.
    """

    what = "a bit allocation"

    allocator: str
    budget: dict[str, NotNegative]
    layers: tuple[LayerBits, ...]
    average_weight_bits: NotNegative
    average_weight_bits_all_layers: NotNegative
    average_activation_bits: NotNegative
    model_size_bytes: Count
    bops: Count
    objective: float | None
    optimal: bool
    caveat: str | None = None

    def to_json(self) -> str:
        """The content of ``allocation.json``; a caveat that is not known is left out."""
        content = asdict(self)
        return _dump({k: v for k, v in content.items() if (k, v) != ("caveat", None)})

    def bits(self) -> dict[str, LayerBits]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}


def layer_bits(text: str) -> tuple[LayerBits, ...]:
    """The layers of an ``allocation.json``, whatever else it holds.

    Raises:
        UserError: The text is something else; the field is named.
    """
    found: _Layers = _read(_Layers, text, BitAllocation.what, by_hand=True)
    return found.layers


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
    weight_levels: Count
    weight_levels_used: Count
    activation_levels: Count
    activation_levels_used: Count


@dataclass(frozen=True)
class LevelCounts(Artifact):
    """The levels of every quantized layer."""

    what = "a count of levels"

    layers: tuple[LayerLevels, ...]


@dataclass(frozen=True)
class RunResult(Artifact):
    """The figures of a run, on the test split.

    Attributes:
        fp_top1_percent: The float model.
        ptq_top1_percent: Prepared and calibrated, before any QAT step.
        qat_top1_percent: After QAT.
        qat_top5_percent: After QAT, target among the five largest logits.
        num_test_images: How many images the figures rest on.
        seconds: Time of each stage, summed over interruptions.
    """

    what = "a run result"

    fp_top1_percent: Percent
    ptq_top1_percent: Percent
    qat_top1_percent: Percent
    qat_top5_percent: Percent
    num_test_images: AtLeastOne
    seconds: dict[str, NotNegative]


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _known(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if value is not None}


def _by_hand(content: dict[str, Any]) -> dict[str, Any]:
    """A table with what a person need not write."""
    layers = content.get("layers")
    if isinstance(layers, list):
        counts = {"num_weights": 0, "macs": 0}
        layers = [{**counts, **x} if isinstance(x, dict) else x for x in layers]
        content = {**content, "layers": layers}
    return {"metric": "from_file", "bit_widths": [], **content}


def _read(kind: Any, text: str, what: str, by_hand: bool = False) -> Any:
    """An artifact from its JSON, with every layer once.

    Raises:
        UserError: Names the field that is wrong.
    """
    content = _parse(text, what)
    if by_hand and kind is SensitivityTable:
        content = _by_hand(content)
    try:
        value = decode(kind, content)
    except ValueError as error:
        raise UserError(f"not {what}: {error}") from error
    names = [x.name for x in getattr(value, "layers", ())]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"not {what}: layers has more than one entry for {twice}; keep one")
    problem = None if by_hand else content_problem(content)
    if problem:
        raise UserError(f"not {what} that can be relied on: {problem}")
    return value


def _parse(text: str, what: str) -> dict[str, Any]:
    """A JSON object; see :func:`~.decoding.strict_json`."""
    try:
        content = strict_json(text)
    except (ValueError, RecursionError) as error:
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
