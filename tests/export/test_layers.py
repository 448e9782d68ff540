import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adq_train.export.layers import Steps, compare_all, look_up
from adq_train.export.tables import Staircase


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=255).map(sorted))
def test_comparing_with_each_threshold_counts_them(thresholds):
    thresholds = torch.tensor(thresholds, dtype=torch.float32)
    x = torch.arange(-22, 22, 0.5)
    expected = [sum(t < value for t in thresholds.tolist()) for value in x.tolist()]
    assert compare_all(x, thresholds).tolist() == expected


def test_lookup_takes_any_shape():
    table = torch.randn(5)
    indices = torch.randint(5, (2, 3, 4), dtype=torch.int32)
    assert torch.equal(look_up(table, indices), table[indices.long()])


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("uniform", [True, False])
def test_steps_are_the_staircase(bits, uniform):
    levels = torch.arange(2.0**bits) - 1 if uniform else torch.randn(2**bits).sort().values
    thresholds = torch.randn(2**bits - 1).sort().values
    x = torch.randn(2, 3, 4, 5)
    expected = levels[torch.bucketize(x, thresholds)]
    assert torch.equal(Steps(Staircase(bits, thresholds, levels, False))(x), expected)


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("uniform", [True, False])
def test_steps_keep_the_layout_where_training_did(bits, uniform):
    levels = torch.arange(2.0**bits) if uniform else torch.randn(2**bits).sort().values
    thresholds = torch.randn(2**bits - 1).sort().values
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for keeps in (True, False):
        y = Steps(Staircase(bits, thresholds, levels, keeps))(x)
        assert y.is_contiguous(memory_format=torch.channels_last) is keeps
        assert y.is_contiguous() is not keeps
