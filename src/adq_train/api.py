"""Quantize any network from Python, without the command line or a configuration."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Budget, Problem
from adq_train.allocation.ilp import IlpAllocator
from adq_train.allocation.patterns import pinned_bits
from adq_train.artifacts import SensitivityTable, require_finite
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.base import MakeActivationQuantizer, MakeWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.prepare import Upkeep, collect_inputs, prepare
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.noise import settle
from adq_train.sensitivity.outputs import caveat, float_outputs
from adq_train.sensitivity.perturbation import Perturbation, num_columns

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
    make_activation_quantizer: MakeActivationQuantizer = N2uqActivationQuantizer,
    sensitivity: Perturbation | None = None,
    seed: int = 0,
) -> nn.Module:
    """A quantized copy of a network, with more bits where they matter, ready for training.

    Measures the sensitivity of every convolution and linear layer, chooses the bit-widths that
    make its sum smallest within the average (an integer program, method.md 3), and initialises
    codebooks and thresholds from the batches. Print the result to see each layer's bits.

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
        make_activation_quantizer: Maps a bit-width to a quantizer.
        sensitivity: Ω; by default the divergence of the outputs, or of a model with one output
            their squared distance. With ``criterion="loss"`` the batches must hold class targets.
        seed: For the sample of inputs, and for random initialisations.

    Raises:
        UserError: No batches, an average that cannot be reached, a layer without a sensitivity,
            Ω that is 0 throughout, or weights, inputs or outputs that are NaN or infinite; names
            what is wrong and the remedy.
    """
    batches = [_pair(batch) for batch in calibration_batches]
    if not batches:
        raise UserError("calibration_batches: there are none; give at least one batch of inputs")
    layers = describe_layers(model, batches[0][0][:1])
    problem = Problem(
        layers,
        pinned_bits(layers, first_last_bits, pinned or {}),
        tuple(sorted(bit_widths)),
        Budget(average_weight_bits=average_bits),
    )
    problem.check()
    outputs = float_outputs(model, batches)
    if doubt := caveat(outputs, [targets for _, targets in batches]):
        log.warning("%s; sensitivities of such a model mean little", doubt)
    metric = sensitivity or _default_metric(outputs[0])
    quantizers = make_weight_quantizer, make_activation_quantizer
    conditions = Conditions(problem.candidates, batches, *quantizers, seed)
    rows = metric.measure(model, layers, conditions)
    table = SensitivityTable(metric.name, problem.candidates, tuple(map(settle, rows)))
    require_finite(table)
    allocation = allocate(IlpAllocator(), problem, table)
    inputs = collect_inputs(model, [x.name for x in layers], [x for x, _ in batches], seed)
    quantized = copy.deepcopy(model)
    prepare(quantized, allocation, *quantizers, inputs, seed)
    return quantized


def _default_metric(outputs: Tensor) -> Perturbation:
    """The divergence of the outputs (N, C, …), which says nothing where softmax has one class."""
    if num_columns(outputs) > 1:
        return Perturbation()
    log.info("one output for each input: Ω is the squared distance of the outputs")
    return Perturbation("mse")


def follow(model: nn.Module, optimizer: Optimizer, step: int = 0) -> None:
    """Lets the codebooks of a quantized network follow its weights after each optimizer step.

    Terms that a quantizer adds to the loss, such as ADQ's commitment, are seen to as well. Works
    through the optimizer's hooks, so any training loop can stay as it is.

    Args:
        model: From :func:`quantize`.
        optimizer: Of its parameters; see :func:`adq_train.parameter_groups`.
        step: Optimizer steps that are done already, when training continues.
    """
    upkeep = Upkeep(model)

    def after(*_: object) -> None:
        nonlocal step
        step += 1
        upkeep.after_step(step)

    optimizer.register_step_pre_hook(lambda *_: upkeep.before_step())
    optimizer.register_step_post_hook(after)


def _pair(batch: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and targets; no targets where none are given, which only the loss would need."""
    if isinstance(batch, Tensor):
        return batch, torch.empty(0, dtype=torch.long, device=batch.device)
    inputs, targets = batch
    return inputs, targets
