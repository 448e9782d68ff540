"""Which optimizer moves which parameter: weights by one, quantizers by one of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from adq_train.quantization.base import Quantizer

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], Optimizer]


class Optimizers:
    """Several optimizers that step as one, each over parameters of its own.

    Args:
        parts: The optimizers, at least one, each with its base rates.
        schedule: Maps progress in [0, 1) to a factor on all base rates; by default 1.
    """

    def __init__(
        self, *parts: Optimizer, schedule: Callable[[float], float] = lambda progress: 1.0
    ) -> None:
        self.parts = parts
        self.schedule = schedule
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    def at(self, progress: float) -> None:
        """Sets the rates for the step after a share of all steps in [0, 1)."""
        factor = self.schedule(progress)
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, those of the first part first."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def skip_unless(self, finite: Tensor) -> None:
        """Makes the next step one that leaves weights as they are where ``finite`` () is false.

        The flag is not read. Fused optimizers look at it themselves; for others gradients become
        zero.
        """
        for part in self.parts:
            if all(group.get("fused") for group in part.param_groups):
                part.found_inf = (~finite).float()  # type: ignore[attr-defined]
                continue
            for parameter in (p for group in part.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(~finite, 0)

    def step(self) -> None:
        """One step of each part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each part."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a network's quantizers: steps, thresholds, clips."""
    found = {
        id(p): p
        for module in model.modules()
        if isinstance(module, Quantizer)
        for p in module.parameters()
        if p.requires_grad
    }
    return list(found.values())


def _other_groups(
    model: nn.Module, of_quantizers: list[nn.Parameter], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The groups of what is no quantizer's: weights, then norms and biases, without empty ones."""
    known = {id(p) for p in of_quantizers}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, quantizer_lr: float | None = None
) -> list[dict[str, Any]]:
    """Three optimizer groups: weights, norms and biases, quantizer parameters.

    Only weights decay: the others set scales and offsets, which zero would not regularise.

    Args:
        model: Its parameters that require gradients are grouped.
        lr: Learning rate of the first two groups.
        weight_decay: Of the first group.
        quantizer_lr: Learning rate of the third group; ``lr`` where none is given.
    """
    of_quantizers = quantizer_parameters(model)
    groups = _other_groups(model, of_quantizers, lr, weight_decay)
    if of_quantizers:
        rate = lr if quantizer_lr is None else quantizer_lr
        groups.append({"params": of_quantizers, "lr": rate, "weight_decay": 0.0})
    return groups


def make_optimizers(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    make_optimizer: MakeOptimizer,
    make_quantizer_optimizer: MakeOptimizer,
    schedule: Callable[[float], float] = lambda progress: 1.0,
) -> Optimizers:
    """One optimizer for a float model; for a prepared one, a second for its quantizers.

    Args:
        model: Float or prepared.
        lr: Learning rate of weights, norms and biases.
        weight_decay: Of the weights.
        make_optimizer: Makes the first optimizer from groups.
        make_quantizer_optimizer: Makes the second, which brings its own learning rate.
        schedule: Maps progress in [0, 1) to a factor on all rates.
    """
    of_quantizers = quantizer_parameters(model)
    parts = [make_optimizer(_other_groups(model, of_quantizers, lr, weight_decay))]
    if of_quantizers:
        parts.append(make_quantizer_optimizer([{"params": of_quantizers, "weight_decay": 0.0}]))
    return Optimizers(*parts, schedule=schedule)
