import pytest
import torch

from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.mse import Mse


def measure(model, layers):
    conditions = Conditions((2, 4), [], AdqWeightQuantizer, LsqActivationQuantizer)
    return {row.name: row for row in Mse().measure(model, layers, conditions)}


def test_it_is_the_squared_error_over_the_squares(small, layers):
    rows = measure(small, layers)
    assert [(x.name, x.num_weights, x.macs) for x in rows.values()] == [
        (x.name, x.num_weights, x.macs) for x in layers
    ]
    for name, row in rows.items():
        weight = small.get_submodule(name).weight.detach()
        for bits in (2, 4):
            quantizer = AdqWeightQuantizer(bits)
            quantizer.calibrate(weight)
            # Element by element, in Python's own numbers.
            pairs = zip(
                weight.flatten().tolist(), quantizer(weight).flatten().tolist(), strict=True
            )
            errors, squares = zip(*(((q - w) ** 2, w**2) for w, q in pairs), strict=True)
            assert row.sensitivity[bits] == pytest.approx(sum(errors) / sum(squares), rel=1e-6)
        assert row.sensitivity[2] > row.sensitivity[4] > 0


def test_the_scale_of_the_weights_does_not_matter(small, layers):
    before = measure(small, layers)["fc"].sensitivity
    with torch.no_grad():
        small.fc.weight *= 1024
    assert measure(small, layers)["fc"].sensitivity == pytest.approx(before)


def test_weights_that_are_all_zero_cost_nothing(small, layers):
    torch.nn.init.zeros_(small.fc.weight)
    assert measure(small, layers)["fc"].sensitivity == {2: 0.0, 4: 0.0}


def test_the_name_is_the_one_in_the_table():
    assert Mse().name == "mse"
