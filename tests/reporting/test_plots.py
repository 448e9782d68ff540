"""Pictures show the values that they are given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ALLOCATION, RESULT, TABLE
from torch import nn

from adq_train.artifacts import LayerBits, LayerSensitivity, SensitivityTable
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.prepare import quantize_layer
from adq_train.reporting import plots


@pytest.fixture
def model():
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    for index, bits in ((0, 8), (2, 3)):
        name = str(index)
        forms = quantize_layer(
            layers,
            LayerBits(name, bits, bits),
            AdqWeightQuantizer,
            N2uqActivationQuantizer,
            {name: torch.rand(100)},
            seed=0,
        )
        layers[index] = forms[name]
    return layers


def test_the_heat_map_has_a_cell_for_each_layer_and_width():
    axes = plots.sensitivity(TABLE).axes[0]
    (image,) = axes.images
    expected = np.array([[0.5, 0.125], [0.25, np.nan]])  # a negative value has no colour
    np.testing.assert_array_equal(image.get_array().filled(np.nan), expected)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]
    assert "-0.001" in [text.get_text() for text in axes.texts]


def test_a_table_without_positive_values_can_be_drawn():
    layers = (LayerSensitivity("only", 1, 1, {2: 0.0, 4: -1.0}),)
    plots.sensitivity(SensitivityTable("m", (2, 4), layers)).canvas.draw()


def test_the_bars_are_the_bits():
    axes = plots.allocation(ALLOCATION, TABLE).axes[1]
    assert [bar.get_height() for bar in axes.patches] == [8, 2]
    assert axes.lines[0].get_ydata()[0] == ALLOCATION.average_weight_bits


def test_the_shares_of_weights_and_of_macs():
    axes = plots.allocation(ALLOCATION, TABLE).axes[0]
    weights, macs = ([bar.get_height() for bar in bars] for bars in axes.containers)
    np.testing.assert_allclose(weights, [100 * 100 / 1101, 100 * 1001 / 1101])
    np.testing.assert_allclose(macs, [10, 90])


def test_other_bits_of_an_input_are_marked():
    bits = replace(ALLOCATION, layers=(LayerBits("first", 2, 4), LayerBits("second", 2, 2)))
    (dash, _average) = plots.allocation(bits, TABLE).axes[1].lines
    np.testing.assert_array_equal(dash.get_xydata(), [[0, 4]])


def test_levels_are_drawn_on_the_histogram_of_the_weights(model):
    figure = plots.weights_and_levels(model)
    for axes, index in zip(figure.axes, (0, 2), strict=False):
        (lines,) = (c for c in axes.collections if hasattr(c, "get_segments"))
        drawn = sorted(segment[0][0] for segment in lines.get_segments())
        np.testing.assert_allclose(drawn, model[index].weight_quantizer.levels(), rtol=1e-6)
        (histogram,) = axes.patches
        assert histogram.get_data().values.sum() == model[index].weight.numel()


def test_codebooks_over_time():
    records = [
        {"stage": "qat", "epoch": epoch, "codebooks": {"a": [-epoch, 0.0, epoch]}}
        for epoch in (1, 2, 3)
    ]
    axes = plots.codebooks([{"stage": "pretrain", "epoch": 1}, *records]).axes[0]
    np.testing.assert_array_equal(axes.lines[2].get_ydata(), [1, 2, 3])
    assert len(plots.codebooks([]).axes) == 4  # nothing recorded: an empty picture, no error


def test_the_accuracy_curves_follow_each_other():
    records = [
        {"stage": "pretrain", "validation_top1_percent": 10.0},
        {"stage": "pretrain", "validation_top1_percent": 20.0},
        {"stage": "qat", "validation_top1_percent": 30.0},
    ]
    axes = plots.training(records, RESULT).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2])
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [3])
    assert {line.get_ydata()[0] for line in axes.lines[2:]} == {90.0, 50.0, 88.0}


def test_the_summary_picture_can_be_drawn(model):
    plots.summary(TABLE, ALLOCATION, [], RESULT, model).canvas.draw()
