import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from adq_train.artifacts import LayerSensitivity, SensitivityTable
from adq_train.sensitivity.noise import evened_out, falling, oddities, settle, within_noise


def row(values, errors=None, name="a", **others):
    return LayerSensitivity(name, 1, 1, values, standard_error=errors, **others)


def test_falling_is_isotonic_regression_cut_at_zero():
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 7):
        for _ in range(20):
            values = generator.normal(size=size)
            fit = IsotonicRegression(increasing=False, y_min=0.0).fit_transform(
                np.arange(size), values
            )
            assert falling(values.tolist()) == pytest.approx(fit.tolist())


def test_a_rise_within_its_standard_error_is_evened_out_and_one_beyond_is_kept():
    errors = dict.fromkeys((2, 3, 4), 0.05)
    near = settle(row({2: 0.5, 3: 0.2, 4: 0.3}, errors))
    assert near.sensitivity == {2: 0.5, 3: 0.25, 4: 0.25}
    assert near.measured == {2: 0.5, 3: 0.2, 4: 0.3}
    assert settle(near) == near
    for kept in (
        row({2: 0.5, 3: 0.1, 4: 0.4}, errors),  # would move by three standard errors
        row({2: 0.5, 3: 0.2, 4: 0.3}),  # of which no error is known
        row({2: 0.5, 3: 0.3, 4: 0.2}, errors),  # falls
    ):
        assert settle(kept) == kept


def test_negative_values_within_their_error_are_zero_and_inputs_are_treated_alike():
    errors = {2: 0.1, 4: 0.1}
    settled = settle(
        row(
            {2: 0.5, 4: -0.15},
            errors,
            activation_sensitivity={2: 0.1, 4: 0.2},
            activation_standard_error=errors,
        )
    )
    assert settled.sensitivity == {2: 0.5, 4: 0.0}
    assert settled.activation_sensitivity == pytest.approx({2: 0.15, 4: 0.15})
    assert settled.activation_measured == {2: 0.1, 4: 0.2}
    kept = row({2: 0.5, 4: -0.25}, errors)
    assert settle(kept) == kept


def test_twenty_odd_layers_are_one_sentence():
    rows = [row({2: 0.5, 3: 0.1 * i, 4: 0.0}, name=f"layer{i}") for i in range(6, 26)]
    rows[1] = row({2: 0.5, 4: -0.1}, name="low", activation_sensitivity={2: 0.0, 4: 0.5})
    table = SensitivityTable("m", (2, 3, 4), tuple(rows))
    text = oddities(table)
    assert "\n" not in text
    for part in (
        "m is negative or rises",
        "layer6 (0.5 at 2 bits, 0.6 at 3)",
        "low (-0.1 at 4 bits); the input of layer low (0 at 2 bits, 0.5 at 4) and 18 more",
    ):
        assert part in text
    assert oddities(SensitivityTable("m", (2, 4), (row({2: 0.5, 4: 0.5}),))) is None
    assert evened_out(SensitivityTable("m", (2, 4), (row({}), row({}, measured={2: 1.0})))) == 1


def test_a_gain_counts_from_two_standard_errors_of_the_sum_on():
    """Falls of 0.3 and 0.4 with errors 0.1 each: 0.7 against 2 · √4 · 0.1 = 0.4."""
    first = row({2: 0.5, 3: 0.3, 4: 0.2}, dict.fromkeys((2, 3, 4), 0.1))
    second = row({2: 0.6, 3: 0.3, 4: 0.2}, dict.fromkeys((2, 3, 4), 0.1))
    assert not within_noise([(first, (2, 3, 4)), (second, (2, 3, 4))])
    assert within_noise([(first, (3, 4)), (second, (3, 4))])  # 0.2
    assert within_noise([(first, (3, 4)), (second, (4,))])
    assert not within_noise([(row({2: 0.1, 4: 0.0}), (2, 4))])  # no error: exact
    assert within_noise([(row({2: 0.1, 4: 0.1}), (2, 4))])
    apart = row(
        {2: 0.0, 4: 0.0},
        activation_sensitivity={2: 1.0, 4: 0.1},
        activation_standard_error={2: 0.5, 4: 0.0},
    )
    assert within_noise([(apart, (2, 4))])
