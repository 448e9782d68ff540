"""Networks of any task: how a batch goes in, and what of the result counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.errors import UserError
from adq_train.nested import Path, followed, length, tensors
from adq_train.quantization.copies import below
from adq_train.quantization.describe import require_replaceable
from adq_train.quantization.layer_weights import evaluating

Forward = Callable[[nn.Module, Any], Any]
Output = Callable[[Any], Any]
Loss = Callable[[Any, Any], Tensor]
Pair = tuple[Any, Any]  # what goes in, and targets

# Methods and marks of a network that is called with whole batches.
RUN, WITHIN = "adq_run", "adq_within"
NOTHING = torch.empty(0, dtype=torch.long)  # targets where there are none


@dataclass(frozen=True)
class Task:
    """What a network is for, as far as quantization has to know.

    Attributes:
        forward: Maps the network and a batch to a result. None: what goes in is a tensor, a list or
            tuple of arguments, or a mapping of named ones.
        output: Maps a result to the tensor or tensors that count; None: all of them.
        loss: Maps that and the targets to a loss () or (N, …); None: outputs are compared.
    """

    forward: Forward | None = None
    output: Output | None = None
    loss: Loss | None = None

    def picked(self, result: Any) -> Any:
        """What counts of a result."""
        return self.output(result) if self.output else result


@dataclass(frozen=True)
class Prepared:
    """A network that takes one thing and gives one tensor, with what to give it.

    Attributes:
        batches: What goes in, and targets (N, …), which are empty where none are of use.
        sample: What goes in to count operations.
        count: Examples in it; None where it is a tensor of one example.
        kind: The network's own class, to be given back to what is made from it.
        one_tensor: Whether the outputs are a tensor of the network's own, not several in one.
    """

    batches: list[tuple[Any, Tensor]]
    sample: Any
    count: int | None
    kind: type[nn.Module]
    one_tensor: bool = True


@torch.no_grad()
def prepare_task(model: nn.Module, given: Iterable[object], task: Task) -> Prepared:
    """Lets a network take batches as they are and give one tensor, in place.

    It keeps its modules and their names. Of several tensors that count, each is flattened and
    divided by the root of its mean squared length, so that all weigh the same.

    Args:
        model: On the batches' device.
        given: The batches.
        task: How they go in, and what comes out.

    Raises:
        UserError: A batch is of another form, or the network or a function of the task fails on it.
    """
    require_replaceable(model)
    pairs, kind = pairs_of(given, task), type(model)
    sample, targets = pairs[0]
    forward = task.forward or passing(sample)
    result = _tried("forward" if task.forward else "model", forward, model, sample)
    picked = _tried("output", lambda _, x: task.picked(x), model, result)
    plain = not (task.forward or task.output or task.loss)
    if plain and isinstance(picked, Tensor) and all(isinstance(x, Tensor) for x, _ in pairs):
        batches = [(x, _one_each(number, x, y)) for number, (x, y) in enumerate(pairs)]
        return Prepared(batches, sample[:1], None, kind)
    if task.loss:
        rows = _rows(task.loss, model, picked, targets)
        _install(model, lambda net, pair: rows(task.picked(forward(net, pair[0])), pair[1]))
        return Prepared([(x, NOTHING) for x in pairs], pairs[0], length(sample), kind)
    found = _that_count(picked)

    def parts(net: nn.Module, x: Any) -> list[Tensor]:
        whole = task.picked(forward(net, x))
        return [followed(path, whole) for path, _ in found]

    if len(found) == 1:
        _install(model, lambda net, x: parts(net, x)[0])
    else:
        with evaluating(model):
            scales = _scales([parts(model, x) for x, _ in pairs])
        _install(model, lambda net, x: _joined(parts(net, x), scales))
    batches = [
        (x, y if isinstance(y, Tensor) and y.dim() and y is not x else NOTHING) for x, y in pairs
    ]
    return Prepared(batches, sample, len(found[0][1]), kind, len(found) == 1)


def pairs_of(given: Iterable[object], task: Task) -> list[Pair]:
    """What goes in and the targets of every batch; empty batches are left out.

    Raises:
        UserError: Names the first batch that is of another form.
    """
    if isinstance(given, Tensor | Mapping) or not isinstance(given, Iterable):
        raise UserError(
            f"calibration_batches: it is one {type(given).__name__}; give a list of batches, "
            "[inputs]"
        )
    pairs = [_pair(number, batch, task) for number, batch in enumerate(given)]
    if len(kinds := list(dict.fromkeys(_form(x) for x, _ in pairs))) > 1 and not task.forward:
        raise UserError(
            f"calibration_batches: some are {kinds[0]} and some {kinds[1]}; all must go in alike"
        )
    pairs = [pair for pair in pairs if length(pair[0])]
    if not pairs:
        raise UserError("calibration_batches: there are none; give at least one batch of inputs")
    return pairs


def _form(inputs: Any) -> str:
    """What decides how something goes in, in words."""
    if isinstance(inputs, Mapping):
        return f"mappings of {', '.join(map(str, inputs))}"
    if isinstance(inputs, tuple | list):
        return f"{len(inputs)} arguments"
    return type(inputs).__name__


def _pair(number: int, batch: object, task: Task) -> Pair:
    """A batch as what goes in and its targets, which without any are what goes in."""
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    if task.forward:
        return batch, parts[1] if len(parts) == 2 else batch
    if len(parts) > 2:
        raise UserError(
            f"calibration_batches: batch {number} is {[type(x).__name__ for x in parts]}; a batch "
            "is what goes in, or a pair of that and targets; forward=lambda model, batch: … says "
            "how another one goes in"
        )
    inputs = parts[0] if parts else None
    if not any(x.dim() for _, x in tensors(inputs)):
        raise UserError(
            f"calibration_batches: batch {number} is {type(inputs).__name__}; a batch is a tensor "
            "of inputs (N, …), a tuple or dict of such, or a pair of inputs and targets"
        )
    return inputs, parts[1] if len(parts) == 2 else inputs


def _one_each(number: int, inputs: Tensor, targets: Any) -> Tensor:
    """The targets of a batch; empty where there are none.

    Raises:
        UserError: Their number is not that of the inputs.
    """
    if targets is inputs or not isinstance(targets, Tensor):
        return NOTHING.to(inputs.device)
    if not targets.dim() or len(targets) != len(inputs):
        raise UserError(
            f"calibration_batches: the targets of batch {number} are not a tensor with one entry "
            f"for each of its {len(inputs)} inputs"
        )
    return targets


def passing(inputs: Any) -> Forward:
    """How inputs of this form go in: a mapping by name, a tuple or list one by one."""
    if isinstance(inputs, Mapping):
        names = list(inputs)
        return lambda model, x: model(**{name: x[name] for name in names})
    if isinstance(inputs, tuple | list):
        places = range(len(inputs))
        return lambda model, x: model(*(x[place] for place in places))
    return lambda model, x: model(x)


def _that_count(picked: Any) -> list[tuple[Path, Tensor]]:
    """The tensors of a result that can be compared, all with the same first axis.

    Raises:
        UserError: There are none, or their first axes differ.
    """
    found = [(path, x) for path, x in tensors(picked) if x.is_floating_point() and x.dim()]
    cure = "output=lambda result: … picks the tensor or tensors (N, …) that count"
    if not found:
        raise UserError(
            f"output: there is no tensor (N, …) of floating-point numbers in a "
            f"{type(picked).__name__}; {cure}, or loss=… measures by a loss"
        )
    if len({len(x) for _, x in found}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for _, x in found[:4])
        raise UserError(f"output: tensors of shapes {shapes} have different first axes; {cure}")
    return found


def _rows(loss: Loss, model: nn.Module, picked: Any, targets: Any) -> Callable[[Any, Any], Tensor]:
    """A loss as (N, 1), or (1, 1) where it is one number for a batch.

    Raises:
        UserError: It fails, or gives no tensor of floating-point numbers.
    """
    value = _tried("loss", lambda _, x: loss(x, targets), model, picked)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"loss: it gives {value!r:.60}, not a tensor of floating-point numbers")
    axes = value.dim()

    def rows(picked: Any, targets: Any) -> Tensor:
        found = loss(picked, targets)
        return found.reshape(-1, 1) if axes < 2 else found.flatten(1).mean(1, keepdim=True)

    return rows


def _scales(parts: Sequence[Sequence[Tensor]]) -> list[float]:
    """1 / √(numbers for an example · mean square) of each tensor, over all batches."""
    found = []
    for some in zip(*parts, strict=True):
        power = sum(float(x.double().square().sum()) for x in some)
        examples = sum(map(len, some))
        found.append(1 / math.sqrt(power / examples) if power else 1.0)
    return found


def _joined(parts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    # (N,) are columns too; reshape() would not know how wide a batch of no examples is.
    flat = [x.unsqueeze(-1).flatten(1).float() * s for x, s in zip(parts, scales, strict=True)]
    return torch.cat(flat, 1)


def _tried(what: str, run: Callable[[nn.Module, Any], Any], model: nn.Module, x: Any) -> Any:
    """What a function of the user's gives, in evaluation mode.

    Raises:
        UserError: It fails; says on what.
    """
    try:
        with evaluating(model):
            return run(model, x)
    except UserError:
        raise
    except Exception as error:  # the user's code may fail in any way
        cures = {
            "model": "forward=lambda model, batch: … says how a batch goes in",
            "forward": "it gets the network and a batch as it was given",
            "output": "it gets what the network gives",
            "loss": "it gets what output gives, and the second of a pair or else the whole batch",
        }
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for _, t in tensors(x))
        raise UserError(
            f"{what}: it fails on {shapes or type(x).__name__} ({type(error).__name__}: {error}); "
            f"{cures[what]}"
        ) from error


def _install(model: nn.Module, run: Callable[[nn.Module, Any], Tensor]) -> None:
    """Makes ``model(batch)`` mean ``run(model, batch)``, within which it means what it did."""

    def call(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        if vars(self).get(WITHIN):
            return made.__mro__[1].__call__(self, *inputs, **named)
        return getattr(self, RUN)(*inputs, **named)

    def whole(self: nn.Module, inputs: Any) -> Any:
        vars(self)[WITHIN] = True
        try:
            return run(self, inputs)
        finally:
            del vars(self)[WITHIN]

    # Of this module, not of torch's, whose networks fx would not look into.
    methods = {"__call__": call, RUN: whole, "__module__": __name__}
    made = below(type(model), methods)
    model.__class__ = made
