"""Measuring layers in several processes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable, require_finite
from adq_train.training.distributed import Ranks


def measure_split(
    measure: Callable[[Sequence[LayerInfo]], Iterator[LayerSensitivity]],
    metric: str,
    bit_widths: Sequence[int],
    layers: Sequence[LayerInfo],
    ranks: Ranks,
) -> Iterator[LayerSensitivity]:
    """Lets each process measure every so many-th layer, and hands all rows to all of them.

    Since the value of a layer does not depend on which others are measured, the rows are those
    of a single process, in the same order.

    Args:
        measure: Measures some layers, one after the other.
        metric: Its name.
        bit_widths: The candidates.
        layers: All layers to measure.
        ranks: The processes.

    Raises:
        UserError: A value is not finite.
    """
    own = layers[ranks.own]
    rows = measure(own) if own else iter(())
    for _ in range(0, len(layers), ranks.world_size):
        row = next(rows, None)
        text = None
        if row is not None:
            table = SensitivityTable(metric, tuple(bit_widths), (row,))
            require_finite(table)
            text = table.to_json()
        for found in ranks.all_gather(text):
            if found is not None:
                yield from SensitivityTable.from_json(found).layers
