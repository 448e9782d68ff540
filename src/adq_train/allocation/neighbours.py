"""Why a layer has its bits: what the next smaller and the next larger choice would change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adq_train.allocation.allocator import objective
from adq_train.allocation.budget import Bits, Problem, figures
from adq_train.artifacts import BitAllocation, SensitivityTable


@dataclass(frozen=True)
class Step:
    """A change of one layer's bits, the others as they are.

    Attributes:
        layer: Its name.
        now: Its bits.
        then: Its bits after the change.
        loss: By how much the summed Ω rises; None where the table does not say.
        size_bytes: By how much the packed weights grow.
        bops: By how much the bit operations of one image grow.
        within_budget: Whether the budget admits the change.
    """

    layer: str
    now: Bits
    then: Bits
    loss: float | None
    size_bytes: int
    bops: int
    within_budget: bool


def steps(problem: Problem, table: SensitivityTable, allocation: BitAllocation) -> Iterator[Step]:
    """The changes of every mixed layer to the neighbouring widths among its candidates.

    Tied bits change together; separate ones each for itself.

    Args:
        problem: What was chosen from.
        table: Sensitivities of at least the mixed layers.
        allocation: What was chosen.
    """
    chosen = {x.name: Bits(x.weight_bits, x.activation_bits) for x in allocation.layers}
    before = objective(problem, table, chosen)
    for layer in problem.mixed:
        now = chosen[layer.name]
        for then in neighbours(now, problem.widths(layer), problem.tied):
            changed = {**chosen, layer.name: then}
            after = objective(problem, table, changed)
            new = figures(problem.layers, changed, problem.pinned)
            yield Step(
                layer.name,
                now,
                then,
                None if before is None or after is None else after - before,
                new.model_size_bytes - allocation.model_size_bytes,
                new.bops - allocation.bops,
                not problem.broken(changed),
            )


def neighbours(now: Bits, widths: tuple[int, ...], tied: bool) -> list[Bits]:
    """The next smaller and the next larger bits, weights before inputs."""

    def around(bits: int) -> list[int]:
        return [*[b for b in widths if b < bits][-1:], *[b for b in widths if b > bits][:1]]

    if tied and now.weights == now.activations:
        return [Bits(b, b) for b in around(now.weights)]
    return [
        *(Bits(b, now.activations) for b in around(now.weights)),
        *(Bits(now.weights, b) for b in around(now.activations)),
    ]
