import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from adq_train.training.schedule import Cosine, Linear, Step

FRACTIONS = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0, 1.0), (0.25, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4), (0.5, 0.55), (2 / 3, 0.325), (1, 0.1)],
)
def test_cosine(progress, factor):
    assert Cosine(final_factor=0.1)(progress) == pytest.approx(factor)


@pytest.mark.parametrize(("progress", "factor"), [(0, 1.0), (0.25, 0.8), (0.5, 0.6), (1, 0.2)])
def test_linear(progress, factor):
    assert Linear(final_factor=0.2)(progress) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0, 1.0), (0.299, 1.0), (0.3, 0.5), (0.59, 0.5), (0.6, 0.25), (0.8, 0.125), (0.999, 0.125)],
)
def test_step(progress, factor):
    schedule = Step(milestones=(0.3, 0.6, 0.8), gamma=0.5)
    assert schedule(progress) == pytest.approx(factor)


def test_defaults():
    assert [Cosine()(x) for x in (0, 0.5)] == pytest.approx([1.0, 0.5])
    assert [Linear()(x) for x in (0, 0.75)] == pytest.approx([1.0, 0.25])
    assert [Step()(x) for x in (0.4, 0.5, 0.75)] == pytest.approx([1.0, 0.1, 0.01])
    assert Step(milestones=())(0.9) == 1


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Cosine(final_factor=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.2)),
        (Linear(final_factor=0.1), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 20)),
        (Step(milestones=(0.5, 0.75)), lambda o: lr_scheduler.MultiStepLR(o, [10, 15])),
    ],
    ids=["cosine", "linear", "step"],
)
def test_the_same_rates_as_torchs_schedulers(schedule, make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = make(optimizer)
    for step in range(20):
        assert 2.0 * schedule(step / 20) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 0.9), FRACTIONS)
def test_warmup_rises_from_0_and_then_the_schedule_takes_the_rest(warmup, share):
    for schedule, plain in (
        (Cosine(warmup_fraction=warmup, final_factor=0.1), Cosine(final_factor=0.1)),
        (Linear(warmup_fraction=warmup), Linear()),
        (Step(warmup_fraction=warmup), Step(milestones=(0.5, 0.75))),
    ):
        assert schedule(warmup * share) == pytest.approx(share, abs=1e-9)
        # Away from the jumps of a step schedule, where the last bit decides.
        if min(abs(share - milestone) for milestone in (0.5, 0.75)) > 1e-6:
            rest = warmup + (1 - warmup) * share
            assert schedule(rest) == pytest.approx(plain(share), abs=1e-6)


def test_the_first_step_of_a_warmup_has_rate_0():
    assert Cosine(warmup_fraction=0.1)(0) == 0
    assert Cosine(warmup_fraction=0.1)(0.1) == 1


@pytest.mark.parametrize("schedule", [Cosine, Linear, Step])
@pytest.mark.parametrize("warmup", [-0.1, 1, 1.5, math.nan])
def test_warmup_must_be_a_share(schedule, warmup):
    with pytest.raises(ValueError, match=f"at least 0 and less than 1, got {warmup}"):
        schedule(warmup_fraction=warmup)
