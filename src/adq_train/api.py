"""Quantize any network from Python, without the command line or a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from adq_train import options
from adq_train.allocation.achieved import achieved, require_achieved
from adq_train.allocation.allocator import Allocator, allocate
from adq_train.allocation.budget import Problem
from adq_train.allocation.fixed import FixedAllocator
from adq_train.allocation.ilp import IlpAllocator
from adq_train.artifacts import LayerSensitivity, SensitivityTable, require_finite
from adq_train.errors import UserError
from adq_train.lifecycle import carrying
from adq_train.options import Sensitivity
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.base import MakeActivationQuantizer, MakeWeightQuantizer
from adq_train.quantization.copies import below, own_copy
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.full_precision import Strictness
from adq_train.quantization.prepare import Upkeep, quantized_layers
from adq_train.quantization.target import target_of
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.noise import settle
from adq_train.sensitivity.outputs import caveat, float_outputs
from adq_train.settings.schema import BitsConfig
from adq_train.task import Forward, Loss, Output, Task, prepare_task
from adq_train.training.calibration import calibrated

log = logging.getLogger(__name__)

AVERAGE_BITS = 2.81  # where no budget is given


def quantize(
    model: nn.Module,
    calibration_batches: Iterable[object],
    bit_widths: Sequence[int] = (2, 3, 4),
    average_bits: float | None = None,
    *,
    forward: Forward | None = None,
    output: Output | None = None,
    loss: Loss | None = None,
    budget: Mapping[str, float | str] | None = None,
    bits: Mapping[str, int | list[int]] | None = None,
    first_last_bits: int | None = 8,
    pinned: Mapping[str, int] | None = None,
    candidates: Mapping[str, Sequence[int]] | None = None,
    tied: bool = True,
    sensitivity: Sensitivity | None = None,
    allocator: Allocator | None = None,
    make_weight_quantizer: MakeWeightQuantizer = AdqWeightQuantizer,
    make_activation_quantizer: MakeActivationQuantizer | None = None,
    strict: bool = False,
    full_precision: Sequence[str] = (),
    seed: int = 0,
    target: str = "float",
) -> nn.Module:
    """A quantized copy of a network of any task, with more bits where they matter.

    Measures the sensitivity of every convolution and linear layer, chooses the bit-widths that
    make its sum smallest within the budget (an integer program, method.md 3), and initialises
    codebooks, thresholds and batch norm's statistics from the batches. Print the result to see
    each layer's bits; ``result.adq`` has the sensitivities, and the bits with sizes and averages.

    Args:
        model: A trained float network; left as it was.
        calibration_batches: What goes in, or pairs of that and targets, on the model's device: a
            tensor (N, …), a tuple or list of arguments, a mapping of named ones; with ``forward``
            anything. Of one thing that goes in, a list of batches is meant: ``[inputs]``.
        bit_widths: Candidates, 2 … 8.
        average_bits: Largest mean bits per weight over the layers whose bits are chosen; 2.81 where
            neither it nor ``budget`` nor ``bits`` is given.
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

    Raises:
        UserError: A model whose layers cannot be replaced, or that is quantized; a batch, a
            function or an option of another form; a budget that cannot be reached, a layer without
            a sensitivity, Ω that is 0 throughout, or weights, inputs or outputs that are NaN or
            infinite. It names what is wrong and the remedy.
    """
    if quantized_layers(model):
        raise UserError("model: it is quantized already; give the float network")
    if hasattr(model, "adq"):
        raise UserError("model: its attribute adq would be replaced by the result's; rename it")
    if average_bits is None and budget is None and bits is None:
        average_bits = AVERAGE_BITS
    limits = options.limits(budget or {}, average_bits)
    widths = BitsConfig(
        options.widths("bit_widths", bit_widths),
        {name: options.widths(f"candidates.{name}", x) for name, x in (candidates or {}).items()},
        tied,
        first_last_bits,
        dict(pinned or {}),
    )
    model, platform = own_copy(model), target_of(target)
    platform.num_edges(model)  # it refuses what it cannot take before anything is measured
    task = prepare_task(model, calibration_batches, Task(forward, output, loss))
    strictness = Strictness(strict, full_precision)
    layers = describe_layers(model, task.sample, count=task.count, strictness=strictness)
    problem = options.problem(layers, widths, limits)
    chooser = _chooser(bits, allocator)
    chooser.check(problem)
    quantizers = make_weight_quantizer, make_activation_quantizer or platform.inputs
    try:
        make = platform.makers(quantizers)
    except ValueError as error:
        raise UserError(f"make_activation_quantizer: {error}") from error
    conditions = Conditions(
        problem.candidates, task.batches, *make, seed, gives_loss=loss is not None
    )
    if chooser.needs_table or sensitivity is not None:
        table = _measured(model, problem, conditions, sensitivity, task.one_tensor)
    else:
        table = _without_values(problem)
    allocation = allocate(chooser, problem, table)
    quantized = calibrated(model, allocation, make, [x for x, _ in task.batches], seed, platform)
    counted = achieved(quantized, task.sample, problem.pinned, task.count or 1)
    require_achieved(allocation, counted)
    _give_back(quantized, type(model), task.kind)
    return carrying(quantized, table, allocation, quantizers, target)


def _give_back(quantized: nn.Module, prepared: type[nn.Module], own: type[nn.Module]) -> None:
    """Gives a network its own class back, in place; a target may have given it a forward()."""
    made = type(quantized)
    if made is prepared:
        quantized.__class__ = own
    elif prepared is not own:
        quantized.__class__ = below(own, {"forward": made.forward})


def _chooser(bits: Mapping[str, int | list[int]] | None, allocator: Allocator | None) -> Allocator:
    """Who chooses the bits.

    Raises:
        UserError: Bits are given and are none, or besides an allocator.
    """
    if bits is None:
        return allocator or IlpAllocator()
    if allocator is not None:
        raise UserError("bits: they leave nothing to choose to an allocator; leave one of them out")
    try:
        return FixedAllocator({k: x if isinstance(x, int) else list(x) for k, x in bits.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"bits: {error}") from error


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
