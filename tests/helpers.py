"""Plain values that several test modules share; fixtures live in conftest.py."""

from adq_train.artifacts import (
    BitAllocation,
    LayerBits,
    LayerLevels,
    LayerSensitivity,
    LevelCounts,
    RunResult,
    SensitivityTable,
)
from adq_train.cli.overrides import examine

# A run of a few seconds that takes every stage.
QUICK = (
    "experiment=quickstart",
    "data=synthetic",
    "data.like=digits",
    "data.train_images=320",
    "data.test_images=64",
    "data.validation_images=32",
    "data.calibration_images=32",
    "model.width=4",
    "pretrain.epochs=1",
    "trainer.epochs=1",
)

# What the stages of a made-up run handed over.
TABLE = SensitivityTable(
    "perturbation-kl-both",
    (2, 4),
    (
        LayerSensitivity("first", 100, 1000, {2: 0.5, 4: 0.25}),
        LayerSensitivity("second", 1001, 9000, {2: 0.125, 4: -0.001}),
    ),
)
ALLOCATION = BitAllocation(
    allocator="ilp",
    budget={"average_weight_bits": 2.0},
    layers=(LayerBits("first", 8, 8), LayerBits("second", 2, 2)),
    average_weight_bits=2.0,
    average_weight_bits_all_layers=2802 / 1101,
    average_activation_bits=2.0,
    model_size_bytes=100 + 251,
    bops=100_000,
    objective=0.125,
    optimal=True,
)
LEVELS = LevelCounts((LayerLevels("first", 100, 99, 256, 17), LayerLevels("second", 3, 3, 4, 4)))
RESULT = RunResult(90.0, 50.0, 88.0, 99.0, 400, {"qat": 1.5})


def problems_of(overrides, search_path=None, sweep=False):
    """What is wrong with a command line."""
    return list(examine(overrides, search_path, sweep).problems)
