"""Quantize any network from Python, without the command line or a configuration."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ParamSpec, Protocol

from torch import nn
from torch.optim import Optimizer

from adq_train import options
from adq_train.allocation.achieved import achieved, require_achieved
from adq_train.allocation.allocator import Allocator, allocate
from adq_train.allocation.budget import Problem
from adq_train.allocation.fixed import FixedAllocator
from adq_train.allocation.ilp import IlpAllocator
from adq_train.artifacts import LayerSensitivity, SensitivityTable, require_finite
from adq_train.errors import UserError, did_you_mean
from adq_train.lifecycle import carrying, require_trainable
from adq_train.options import Sensitivity
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.base import (
    MakeActivationQuantizer,
    Makers,
    MakeWeightQuantizer,
)
from adq_train.quantization.copies import below, own_copy
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.full_precision import Strictness
from adq_train.quantization.prepare import Upkeep, quantized_layers
from adq_train.quantization.target import Target, target_of
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.noise import settle
from adq_train.sensitivity.outputs import caveat, float_outputs
from adq_train.settings.schema import BitsConfig, BudgetConfig
from adq_train.task import Forward, Loss, Output, Task, prepare_task
from adq_train.training.calibration import calibrated

log = logging.getLogger(__name__)

AVERAGE_BITS = 2.81  # where no budget is given


@dataclass(frozen=True)
class Recipe:
    """How a network is to be quantized: what :func:`quantize` takes besides it and the batches.

    Attributes:
        bit_widths: Candidates, 2 … 8.
        average_bits: Largest mean bits per weight over the layers whose bits are chosen; 2.81, or
            the least of ``bit_widths``, where neither it nor ``budget`` nor ``bits`` is given.
        forward: ``forward(model, batch)`` gives the result of a batch, if not ``model(inputs)``.
        output: ``output(result)`` picks the tensor or tensors (N, …) that count; by default all of
            floating-point numbers. Logits have their classes on axis 1.
        loss: ``loss(output, targets)`` gives a number or one for each example; Ω is then by how
            much it rises, unless ``sensitivity`` says otherwise. Without targets it gets the batch.
        budget: Limits by name: ``average_weight_bits``, ``average_activation_bits``,
            ``model_size_bytes``, ``bops`` (of one example); a number, or a share of the float
            model's such as ``"0.1x"``.
        bits: Your own bits by name or shell pattern, or ``[weights, input]``: none are chosen.
        first_last_bits: Bits of the first and the last layer, outside the average, or None to
            choose theirs as well.
        pinned: Bits of other layers that are not to be chosen, by name or shell pattern.
        candidates: Fewer bit-widths for some layers, by name or shell pattern.
        tied: Whether a layer's weights and its input get the same width.
        sensitivity: Ω: a metric; ``"kl"``, ``"mse"`` or ``"loss"``; or values of your own, a table
            or a mapping from layer to bit-width to Ω. By default the rise of ``loss`` where one is
            given; else the divergence of the outputs (kl); or the squared distance, relative to
            their variance (mse), where there is one output for each example, several tensors, or
            targets that are no whole numbers.
        allocator: Who chooses the bits; by default the exact one.
        make_weight_quantizer: Maps a bit-width to a quantizer.
        make_activation_quantizer: Maps a bit-width to a quantizer; by default N2UQ's, or LSQ's
            for int8.
        strict: Refuse a model of which a matrix of weights would stay in full precision.
        full_precision: Names or shell patterns of layers and parameters that may stay so.
        seed: For the sample of inputs, and for random initialisations.
        target: What will run the network: ``float`` arithmetic; ``attention``: the same, with eight
            bits for what attention multiplies; or ``int8``, for which weight levels lie on int8
            grids, and what passes between layers gets eight bits.
    """

    bit_widths: Sequence[int] = (2, 3, 4)
    average_bits: float | None = None
    _: KW_ONLY
    forward: Forward | None = None
    output: Output | None = None
    loss: Loss | None = None
    budget: Mapping[str, float | str] | None = None
    bits: Mapping[str, int | list[int]] | None = None
    first_last_bits: int | None = 8
    pinned: Mapping[str, int] | None = None
    candidates: Mapping[str, Sequence[int]] | None = None
    tied: bool = True
    sensitivity: Sensitivity | None = None
    allocator: Allocator | None = None
    make_weight_quantizer: MakeWeightQuantizer = AdqWeightQuantizer
    make_activation_quantizer: MakeActivationQuantizer | None = None
    strict: bool = False
    full_precision: Sequence[str] = ()
    seed: int = 0
    target: str = "float"

    def __post_init__(self) -> None:
        """Refuses what is of another kind than asked for.

        Raises:
            UserError: Names the argument.
        """
        for name in ("budget", "bits", "pinned", "candidates"):
            options.require(name, getattr(self, name), Mapping, "a mapping by name")
        for name in ("tied", "strict"):
            options.require(name, getattr(self, name), bool, "True or False")
        options.require("average_bits", self.average_bits, (int, float), "a number")
        names = self.full_precision
        if isinstance(names, str):
            raise UserError(f"full_precision: must be a list of names, got {names!r}; put it in []")
        bits = {f"pinned.{name}": x for name, x in (self.pinned or {}).items()}
        if self.first_last_bits is not None:
            bits["first_last_bits"] = self.first_last_bits
        for name, width in bits.items():
            options.widths(name, [width])

    def limits(self) -> BudgetConfig:
        """The budget.

        Raises:
            UserError: A limit is none, or is given twice.
        """
        average = self.average_bits
        if average is None and self.budget is None and self.bits is None:
            average = max(AVERAGE_BITS, min(options.widths("bit_widths", self.bit_widths)))
        return options.limits(self.budget or {}, average)

    def widths(self) -> BitsConfig:
        """The bit-widths to choose from.

        Raises:
            UserError: One is none.
        """
        by_layer = (self.candidates or {}).items()
        return BitsConfig(
            options.widths("bit_widths", self.bit_widths),
            {name: options.widths(f"candidates.{name}", x) for name, x in by_layer},
            self.tied,
            self.first_last_bits,
            dict(self.pinned or {}),
        )

    def chooser(self) -> Allocator:
        """Who chooses the bits.

        Raises:
            UserError: Bits are given and are none, or besides an allocator.
        """
        if self.bits is None:
            return self.allocator or IlpAllocator()
        if self.allocator is not None:
            raise UserError(
                "bits: they leave nothing to choose to an allocator; leave one of them out"
            )
        try:
            bits = {k: x if isinstance(x, int) else list(x) for k, x in self.bits.items()}
            return FixedAllocator(bits)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"bits: {error}") from error

    def own_names(self) -> dict[str, str]:
        """More settings that are arguments, beside :data:`.options.ARGUMENTS`."""
        names = {} if self.bits is None else {"allocator.bits": "bits"}
        in_budget = "average_weight_bits" in (self.budget or {})
        return names if in_budget else {**names, "budget.average_weight_bits": "average_bits"}

    def quantizers(self, platform: Target) -> Makers:
        """The makers of quantizers of weights and of inputs, as they are asked for."""
        return self.make_weight_quantizer, self.make_activation_quantizer or platform.inputs


Settings = ParamSpec("Settings")


class Quantize(Protocol[Settings]):
    """A function of a network, batches and the settings of a recipe."""

    def __call__(
        self,
        model: nn.Module,
        calibration_batches: Iterable[object],
        *given: Settings.args,
        **named: Settings.kwargs,
    ) -> nn.Module:
        """A quantized copy of the network."""


def taking(recipe: Callable[Settings, Recipe]) -> Callable[..., Quantize[Settings]]:
    """Gives a function of a recipe the recipe's settings instead: names, types and defaults."""
    settings = inspect.signature(recipe).parameters

    def decorated(function: Callable[..., nn.Module]) -> Quantize[Settings]:
        def quantize(
            model: nn.Module,
            calibration_batches: Iterable[object],
            *given: Settings.args,
            **named: Settings.kwargs,
        ) -> nn.Module:
            for name in [x for x in named if x not in settings]:
                hint = did_you_mean(name, settings) or f"; it takes {', '.join(settings)}"
                raise TypeError(f"{function.__name__}() has no argument {name!r}{hint}")
            asked = recipe(*given, **named)
            try:
                return function(model, calibration_batches, asked)
            except UserError as error:
                error.args = (options.in_python(str(error), asked.own_names()),)
                raise

        functools.update_wrapper(quantize, function)
        signature = inspect.signature(function)
        own = [x for x in signature.parameters.values() if x.name != "recipe"]
        told = signature.replace(parameters=[*own, *settings.values()])
        quantize.__signature__ = told  # type: ignore[attr-defined]
        return quantize

    return decorated


@taking(Recipe)
def quantize(model: nn.Module, calibration_batches: Iterable[object], recipe: Recipe) -> nn.Module:
    """A quantized copy of a network of any task, with more bits where they matter.

    Measures the sensitivity of every convolution and linear layer, chooses the bit-widths that
    make its sum smallest within the budget (an integer program), and initialises
    codebooks, thresholds and batch norm's statistics from the batches. Print the result to see
    each layer's bits; ``result.adq`` has the sensitivities, and the bits with sizes and averages.

    Args:
        model: A trained float network; left as it was.
        calibration_batches: What goes in, or pairs of that and targets, on the model's device: a
            tensor (N, …), a tuple or list of arguments, a mapping of named ones; with ``forward``
            anything. Of one thing that goes in, a list of batches is meant: ``[inputs]``.
        recipe: Given by its settings, ``quantize(model, batches, average_bits=3, tied=False)``; see
            :class:`Recipe`.

    Returns:
        The copy, in evaluation mode; call its ``train()`` before training goes on.

    Raises:
        UserError: A model that is no ``nn.Module``, whose layers cannot be replaced, or that is
            quantized; a batch, a function or an option of another form; a budget that cannot be
            reached, a layer without a sensitivity, Ω that is 0 throughout, or weights, inputs or
            outputs that are NaN or infinite. It names what is wrong and the remedy.
    """
    require_trainable()
    require_float(model)
    limits, widths = recipe.limits(), recipe.widths()
    model, platform = own_copy(model), target_of(recipe.target)
    platform.num_edges(model)  # it refuses what it cannot take before anything is measured
    asked = Task(recipe.forward, recipe.output, recipe.loss)
    task = prepare_task(model, calibration_batches, asked)
    strictness = Strictness(recipe.strict, recipe.full_precision)
    layers = describe_layers(model, task.sample, count=task.count, strictness=strictness)
    problem = options.problem(layers, widths, limits)
    chooser = recipe.chooser()
    chooser.check(problem)
    quantizers = recipe.quantizers(platform)
    try:
        make = platform.makers(quantizers)
    except ValueError as error:
        raise UserError(f"make_activation_quantizer: {error}") from error
    conditions = Conditions(
        problem.candidates, task.batches, *make, recipe.seed, gives_loss=recipe.loss is not None
    )
    if chooser.needs_table or recipe.sensitivity is not None:
        table = _measured(model, problem, conditions, recipe.sensitivity, task.one_tensor)
    else:
        table = _without_values(problem)
    allocation = allocate(chooser, problem, table)
    inputs = [x for x, _ in task.batches]
    quantized = calibrated(model, allocation, make, inputs, recipe.seed, platform)
    counted = achieved(quantized, task.sample, problem.pinned, task.count or 1)
    require_achieved(allocation, counted)
    _give_back(quantized, type(model), task.kind)
    return carrying(quantized.eval(), table, allocation, quantizers, recipe.target)


def require_float(model: nn.Module) -> None:
    """Refuses what is no network, or quantized, or whose own ``adq`` the result's would replace.

    Raises:
        UserError: Says which.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model: must be an nn.Module, got a {type(model).__name__}")
    if quantized_layers(model):
        raise UserError("model: it is quantized already; give the float network")
    if hasattr(model, "adq"):
        raise UserError("model: its attribute adq would be replaced by the result's; rename it")


def _give_back(quantized: nn.Module, prepared: type[nn.Module], own: type[nn.Module]) -> None:
    """Gives a network its own class back, in place; a target may have given it a forward()."""
    made = type(quantized)
    if made is prepared:
        quantized.__class__ = own
    elif prepared is not own:
        quantized.__class__ = below(own, {"forward": made.forward})


def _measured(
    model: nn.Module,
    problem: Problem,
    conditions: Conditions,
    sensitivity: Sensitivity | None,
    one_tensor: bool,
) -> SensitivityTable:
    """The sensitivities of all layers.

    Raises:
        UserError: The metric cannot serve, or an output or a value is NaN or infinite.
    """
    outputs = float_outputs(model, conditions.batches)
    targets = [y for _, y in conditions.batches]
    if not conditions.gives_loss and (doubt := caveat(outputs, targets)):
        log.warning("%s; sensitivities of such a model mean little", doubt)
    metric = options.metric(sensitivity, conditions, problem, outputs[0], one_tensor)
    rows = metric.measure(model, problem.layers, conditions)
    table = SensitivityTable(metric.name, problem.candidates, tuple(map(settle, rows)))
    require_finite(table)
    return table


def _without_values(problem: Problem) -> SensitivityTable:
    """A table of the layers alone, for bits that are chosen by nothing."""
    rows = [LayerSensitivity(x.name, x.num_weights, x.macs, {}) for x in problem.layers]
    return SensitivityTable("none", problem.candidates, tuple(rows))


def follow(model: nn.Module, optimizer: Optimizer) -> None:
    """Lets the codebooks of a quantized network follow its weights after each optimizer step.

    Terms that a quantizer adds to the loss, such as PACT's decay, are seen to as well. Works
    through the optimizer's hooks, so any training loop can stay as it is.

    Args:
        model: From :func:`quantize`.
        optimizer: Of its parameters; see :func:`adq_train.parameter_groups`.

    Raises:
        UserError: The model is not quantized, or the optimizer belongs to another one.
    """
    if not quantized_layers(model):
        raise UserError("model: it has no quantized layers; give what quantize() returned")
    trained = {id(x) for group in optimizer.param_groups for x in group["params"]}
    if not trained & {id(x) for x in model.parameters()}:
        raise UserError(
            "optimizer: it trains none of the model's parameters; make it from "
            "parameter_groups() of the quantized model"
        )
    upkeep = Upkeep(model)
    optimizer.register_step_pre_hook(lambda *_: upkeep.before_step())
    optimizer.register_step_post_hook(lambda *_: upkeep.after_step())
