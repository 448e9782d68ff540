"""Names in a legend: as short as they can be, and no two alike."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_train.reporting.names import model_name, told_apart

ROWS = st.sets(
    st.tuples(*(st.sampled_from([f"{key}=1", f"{key}=2", f"{key}=3"]) for key in "abc")),
    min_size=1,
)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["s=1 c=x", "s=1 c=y", "s=2 c=z"], ["c=x", "c=y", "c=z"]),
        (["a=1 b=1", "a=1 b=2", "a=2 b=1"], ["a=1 b=1", "a=1 b=2", "a=2 b=1"]),
        (["", "a=1"], ["budgets", "a=1"]),
        (["c=x o.lr=1", "c=y o.lr=2"], ["c=x", "c=y"]),
        (["o.lr=1 c=x", "o.lr=2 c=y"], ["c=x", "c=y"]),
        (["comparison=x s=1", "comparison=y s=2"], ["comparison=x", "comparison=y"]),
        (["as configured"], ["as configured"]),
        (["a=1"], ["a=1"]),
    ],
)
def test_a_setting_that_tells_nothing_more_is_left_out(rows, expected):
    assert told_apart([tuple(row.split()) for row in rows]) == expected


@given(ROWS)
def test_names_stay_apart_and_none_is_empty(rows):
    names = told_apart(rows)
    assert len(set(names)) == len(rows)
    for name, row in zip(names, rows, strict=True):
        assert set(name.split()) <= set(row)
        assert name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"_target_": "adq_train.models.CifarResNetModel", "depth": 20, "width": 16}, "resnet20"),
        ({"_target_": "adq_train.models.TorchvisionModel", "name": "resnet18"}, "resnet18"),
        ({"_target_": "mine.networks.TwoBranch"}, "TwoBranch"),
    ],
)
def test_models_are_named_as_their_users_know_them(model, name):
    assert model_name(SimpleNamespace(config={"model": model})) == name
