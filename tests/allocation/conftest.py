import pytest

from adq_train.allocation.budget import Budget, Problem
from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable


@pytest.fixture(scope="session")
def make_table():
    def make(layers, rows, candidates=(2, 3, 4)):
        """A table of one row of sensitivities per layer."""
        return SensitivityTable(
            "made up",
            tuple(candidates),
            tuple(
                LayerSensitivity(
                    x.name, x.num_weights, x.macs, dict(zip(candidates, row, strict=True))
                )
                for x, row in zip(layers, rows, strict=True)
            ),
        )

    return make


@pytest.fixture(scope="session")
def make_problem():
    """Three small layers; the first one is pinned to 8 bits unless told otherwise."""

    def make(pinned=None, **budget):
        layers = (
            LayerInfo("stem", 27, 1000, 48),
            LayerInfo("body", 100, 3000, 64),
            LayerInfo("head", 51, 51, 17),
        )
        pinned = {"stem": 8} if pinned is None else pinned
        return Problem(layers, pinned, (2, 3, 4), Budget(**budget))

    return make
