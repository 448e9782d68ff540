from dataclasses import fields

import pytest
import torch
from torch import nn

import adq_train
from adq_train import options
from adq_train.api import Recipe
from adq_train.errors import UserError
from adq_train.settings.schema import BitsConfig


def test_every_setting_of_bits_has_its_argument():
    assert set(options.ARGUMENTS) == {f"bits.{x.name}" for x in fields(BitsConfig)}
    assert set(options.ARGUMENTS.values()) <= {x.name for x in fields(Recipe)}


def test_only_whole_names_become_arguments_and_values_are_those_of_python():
    text = "bits.candidates_per_layer, bits.candidates=[2], bits.first_last=null, habits.tied=true"
    expected = "candidates, bit_widths=[2], first_last_bits=None, habits.tied=true"
    assert options.in_python(text, {}) == expected
    assert options.in_python("allocator.bits: no", {"allocator.bits": "bits"}) == "bits: no"
    assert options.in_python("allocator.bits: no", {}) == "allocator.bits: no"


@pytest.mark.parametrize(
    ("asked", "begins"),
    [
        ({"average_bits": 1.5}, "average_bits: 1.5 cannot be reached; with bit_widths=[2, 3, 4]"),
        ({"budget": {"average_weight_bits": 1.5}}, "budget.average_weight_bits: 1.5 cannot"),
        ({"budget": {"bops": 1}}, "budget.bops: 1 cannot be reached; with bit_widths=[2, 3, 4]"),
        ({"pinned": {"9": 4}}, "pinned: no layer is called '9'"),
        ({"candidates": {"9": [4]}}, "candidates: no layer is called '9'"),
        ({"bits": {"9": 4}}, "bits: no layer is called '9'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_messages_name_what_was_given(asked, begins):
    convolutions = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(UserError) as error:
        adq_train.quantize(model, [torch.rand(4, 1, 8, 8)], **asked)
    assert str(error.value).startswith(begins)
