import pytest

from adq_train.allocation.budget import Budget, Problem
from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable


@pytest.fixture(scope="session")
def make_table():
    def make(layers, rows, candidates=(2, 3, 4), activations=None):
        """A table of one row of sensitivities per layer, and maybe one for its input."""
        return SensitivityTable(
            "made up",
            tuple(candidates),
            tuple(
                LayerSensitivity(
                    x.name,
                    x.num_weights,
                    x.macs,
                    dict(zip(candidates, row, strict=True)),
                    dict(zip(candidates, inputs, strict=True)) if inputs else None,
                )
                for x, row, inputs in zip(
                    layers, rows, activations or [None] * len(rows), strict=True
                )
            ),
        )

    return make


@pytest.fixture(scope="session")
def make_problem():
    """Three small layers; the first one is pinned to 8 bits unless told otherwise."""

    def make(pinned=None, candidates_by_layer=None, tied=True, **budget):
        layers = (
            LayerInfo("stem", 27, 1000, 48),
            LayerInfo("body", 100, 3000, 64),
            LayerInfo("head", 51, 51, 17),
        )
        pinned = {"stem": 8} if pinned is None else pinned
        return Problem(layers, pinned, (2, 3, 4), Budget(**budget), candidates_by_layer or {}, tied)

    return make
