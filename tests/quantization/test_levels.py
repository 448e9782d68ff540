import torch
from torch import nn

from adq_train.artifacts import LayerLevels
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.levels import count_levels
from adq_train.quantization.lsq import LsqActivationQuantizer


def prepared(weight, inputs, bits=2):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    weight_quantizer, input_quantizer = AdqWeightQuantizer(bits), LsqActivationQuantizer(bits)
    weight_quantizer.calibrate(layer.weight.detach())
    input_quantizer.calibrate(inputs)
    return nn.Sequential(quantized(layer, weight_quantizer, input_quantizer))


def test_a_layer_that_uses_all_of_its_levels():
    torch.manual_seed(0)
    x = torch.randn(200, 4).abs()
    model = prepared(torch.randn(4, 4), x)
    assert count_levels(model, [x]) == (LayerLevels("0", 4, 4, 4, 4),)


def test_levels_that_nothing_takes_are_missing():
    torch.manual_seed(0)
    x = torch.rand(200, 4)
    model = prepared(torch.randn(4, 4), x)
    with torch.no_grad():
        model[0].weight.abs_().add_(10)  # all at the topmost level
    assert count_levels(model, [0 * x]) == (LayerLevels("0", 4, 1, 4, 1),)


def test_inputs_of_all_batches_and_calls_count():
    x = torch.linspace(0, 1, 8).view(2, 4)
    model = prepared(torch.randn(4, 4), x)
    step = model[0].input_quantizer.step.item()
    batches = [torch.full((1, 4), code * step) for code in (0, 2)]
    (counts,) = count_levels(model, batches)
    assert counts.activation_levels_used == 2


def test_levels_that_coincide_count_once():
    model = prepared(torch.tensor([[-1.0, 1.0, 1.0, 1.0]]), torch.rand(9, 4), bits=3)
    levels = model[0].weight_quantizer.levels()
    assert len(levels) == 8
    (counts,) = count_levels(model, [torch.rand(9, 4)])
    assert counts.weight_levels == 4  # no more than there are weights
    assert counts.weight_levels_used == 2


def test_no_more_levels_are_expected_than_there_are_weights():
    model = prepared(torch.randn(1, 5), torch.rand(9, 5), bits=4)
    (counts,) = count_levels(model, [torch.rand(9, 5)])
    assert counts.weight_levels == 5
