"""A quantizer that stands still, or runs away, is seen and said."""

import logging
from dataclasses import asdict

import pytest
import torch
from training_helpers import IMAGES, network, take, trainer_of

from adq_train.quantization.movement import MovementMeter, report_movement
from adq_train.training.optimizers import make_optimizers


def trained(rate, steps=20):
    """Movements of a small network after some steps at a rate of its quantizers."""
    model = network()
    meter = MovementMeter(model)
    optimizers = make_optimizers(
        model,
        0.05,
        0.0,
        lambda groups: torch.optim.SGD(groups),
        lambda groups: torch.optim.Adam(groups, lr=rate),
    )
    take(trainer_of(model, optimizer=optimizers), *[IMAGES] * steps)
    return meter.measure(model)


def test_shares_of_where_it_began():
    model = network()
    meter = MovementMeter(model)
    still = meter.measure(model)["0"]
    assert (still.weight_levels, still.input_levels, still.thresholds, still.update) == (0, 0, 0, 0)
    assert still.width_ratio == pytest.approx(1, abs=1e-5)
    quantizer = model[0].input_quantizer
    quantizer.log_step.data += torch.tensor(1.1).log()
    quantizer.log_widths.data[1:-1:2] += torch.tensor(2.0).log()
    moved = meter.measure(model)
    assert moved["0"].input_levels == pytest.approx(0.1, abs=1e-5)
    assert moved["0"].thresholds > 0.1
    assert moved["0"].width_ratio > 1
    assert moved["4"] == meter.measure(model)["4"]  # the other layer did not move
    assert moved["0"].update == max(moved["0"].input_levels, moved["0"].thresholds)
    again = meter.measure(model, {name: asdict(x) for name, x in moved.items()})["0"]
    assert again.input_levels == moved["0"].input_levels
    assert again.update == 0


@pytest.mark.parametrize(
    ("rate", "level", "word"),
    [(1e-6, "WARNING", "hardly learn"), (5e-3, "INFO", "moved by"), (0.5, "WARNING", "run away")],
)
def test_what_is_said_at_the_end(rate, level, word, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("adq_train"), "propagate", True)
    model = trained(rate)
    caplog.clear()
    with caplog.at_level(logging.INFO, "adq_train"):
        report_movement(model)
    (record,) = caplog.records
    assert record.levelname == level
    assert word in record.getMessage()


def test_nothing_is_said_of_quantizers_that_do_not_learn(caplog):
    model = network()
    for parameter in model[0].input_quantizer.parameters():
        parameter.requires_grad_(False)
    for parameter in model[4].input_quantizer.parameters():
        parameter.requires_grad_(False)
    report_movement(MovementMeter(model).measure(model))
    assert not caplog.records
