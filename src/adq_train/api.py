"""Quantize any network from Python, without the command line or a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adq_train.allocation.achieved import achieved, require_achieved
from adq_train.allocation.allocator import allocate
from adq_train.allocation.ilp import IlpAllocator
from adq_train.allocation.problem import problem_of
from adq_train.allocation.uniform import likely_bits
from adq_train.artifacts import SensitivityTable, require_finite
from adq_train.errors import UserError
from adq_train.lifecycle import carrying
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.base import MakeActivationQuantizer, MakeWeightQuantizer
from adq_train.quantization.copies import own_copy
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.prepare import Upkeep, quantized_layers
from adq_train.quantization.target import target_of
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.gradient import Gradient
from adq_train.sensitivity.noise import settle
from adq_train.sensitivity.outputs import caveat, float_outputs, num_columns
from adq_train.sensitivity.perturbation import Perturbation
from adq_train.settings.schema import BitsConfig, BudgetConfig
from adq_train.training.calibration import calibrated

log = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    calibration_batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    bit_widths: Sequence[int] = (2, 3, 4),
    average_bits: float = 2.81,
    *,
    first_last_bits: int | None = 8,
    pinned: Mapping[str, int] | None = None,
    make_weight_quantizer: MakeWeightQuantizer = AdqWeightQuantizer,
    make_activation_quantizer: MakeActivationQuantizer | None = None,
    sensitivity: Perturbation | Gradient | None = None,
    seed: int = 0,
    target: str = "float",
) -> nn.Module:
    """A quantized copy of a network, with more bits where they matter, ready for training.

    Measures the sensitivity of every convolution and linear layer, chooses the bit-widths that
    make its sum smallest within the average (an integer program, method.md 3), and initialises
    codebooks, thresholds and batch norm's statistics from the batches. Print the result to see
    each layer's bits; ``result.adq`` has the sensitivities, and the bits with sizes and averages.

    Args:
        model: A trained float network from one tensor to logits (N, classes, …), or to one value
            for each input; left as it was.
        calibration_batches: Inputs (N, …), or pairs of inputs and targets, on the model's device.
        bit_widths: Candidates, 2 … 8; a layer's weights and its input get the same.
        average_bits: Largest mean bits per weight over the layers whose bits are chosen.
        first_last_bits: Bits of the first and the last layer, outside the average, or None to
            choose theirs as well.
        pinned: Bits of other layers that are not to be chosen, by name or shell pattern.
        make_weight_quantizer: Maps a bit-width to a quantizer.
        make_activation_quantizer: Maps a bit-width to a quantizer; by default N2UQ's, or LSQ's
            for int8.
        sensitivity: Ω; by default the divergence of the outputs, or of a model with one output
            their squared distance. With ``criterion="loss"`` the batches must hold class targets.
        seed: For the sample of inputs, and for random initialisations.
        target: What will run the network: ``float`` arithmetic, or ``int8``, for which weight
            levels lie on int8 grids, and what passes between layers gets eight bits.

    Raises:
        UserError: A model that does not map one tensor to logits, whose layers cannot be replaced,
            or that is quantized; no batches, or of another form; an average that cannot be
            reached, a layer without a sensitivity, Ω that is 0 throughout, or weights, inputs or
            outputs that are NaN or infinite. It names what is wrong and the remedy.
    """
    batches = _batches(calibration_batches)
    if quantized_layers(model):
        raise UserError("model: it is quantized already; give the float network")
    if hasattr(model, "adq"):
        raise UserError("model: its attribute adq would be replaced by the result's; rename it")
    model, chosen = own_copy(model), target_of(target)
    chosen.check(model)
    image = batches[0][0][:1]
    layers = describe_layers(model, image)
    bits = BitsConfig(sorted(bit_widths), first_last=first_last_bits, pinned=dict(pinned or {}))
    problem = problem_of(layers, bits, BudgetConfig(average_weight_bits=average_bits))
    problem.check()
    outputs = float_outputs(model, batches)
    if doubt := caveat(outputs, [targets for _, targets in batches]):
        log.warning("%s; sensitivities of such a model mean little", doubt)
    metric = sensitivity or _default_metric(outputs[0])
    quantizers = make_weight_quantizer, make_activation_quantizer or chosen.inputs
    try:
        make = chosen.makers(quantizers)
    except ValueError as error:
        raise UserError(f"make_activation_quantizer: {error}") from error
    conditions = Conditions(problem.candidates, batches, *make, seed, likely=likely_bits(problem))
    rows = metric.measure(model, layers, conditions)
    table = SensitivityTable(metric.name, problem.candidates, tuple(map(settle, rows)))
    require_finite(table)
    allocation = allocate(IlpAllocator(), problem, table)
    quantized = calibrated(model, allocation, make, [x for x, _ in batches], seed, chosen)
    require_achieved(allocation, achieved(quantized, image, problem.pinned))
    return carrying(quantized, table, allocation, quantizers, target)


def _default_metric(outputs: Tensor) -> Perturbation:
    """The divergence of the outputs (N, C, …), which says nothing where softmax has one class."""
    if num_columns(outputs) > 1:
        return Perturbation()
    log.info("one output for each input: Ω is the squared distance of the outputs")
    return Perturbation("mse")


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


def _batches(given: Iterable[object]) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets, without empty batches.

    Raises:
        UserError: Names the first batch that is neither inputs nor a pair.
    """
    if isinstance(given, Tensor | Mapping):
        raise UserError(
            f"calibration_batches: it is one {type(given).__name__}; give a list of batches, "
            "[inputs]"
        )
    pairs = (_pair(number, batch) for number, batch in enumerate(given))
    batches = [(inputs, targets) for inputs, targets in pairs if len(inputs)]
    if not batches:
        raise UserError("calibration_batches: there are none; give at least one batch of inputs")
    return batches


def _pair(number: int, batch: object) -> tuple[Tensor, Tensor]:
    """Inputs and targets; no targets where none are given, which only the loss would need."""
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    inputs, *others = parts or [None]
    if not isinstance(inputs, Tensor) or len(others) > 1 or not inputs.dim():
        what = [type(x).__name__ for x in parts] if len(parts) > 1 else type(inputs).__name__
        raise UserError(
            f"calibration_batches: batch {number} is {what}; a batch is a tensor of inputs (N, …) "
            "or a pair (inputs, targets); a model with several inputs can be wrapped in a module "
            "with one"
        )
    targets = others[0] if others else torch.empty(0, dtype=torch.long, device=inputs.device)
    if not isinstance(targets, Tensor) or (others and len(targets) != len(inputs)):
        raise UserError(
            f"calibration_batches: the targets of batch {number} are not a tensor with one entry "
            f"for each of its {len(inputs)} inputs"
        )
    return inputs, targets
