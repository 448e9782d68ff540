from dataclasses import replace

import pytest

from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.from_file import FromFile

LAYERS = (LayerInfo("a", 10, 100, 5), LayerInfo("b", 20, 200, 5))
ROWS = (
    LayerSensitivity("b", 20, 999, {2: 0.5, 3: 0.25, 4: 0.125}),
    LayerSensitivity("other", 1, 1, {2: 9.0}),
    LayerSensitivity("a", 10, 100, {2: 1.5, 3: 1.25, 4: 1.0}, {2: 0.1, 3: 0.2, 4: 0.3}),
)


@pytest.fixture
def read(tmp_path):
    def read(rows=ROWS, layers=LAYERS, bit_widths=(2, 4), text=None):
        path = tmp_path / "sensitivity.json"
        path.write_text(text or SensitivityTable("mse", (2, 3, 4), tuple(rows)).to_json())
        metric = FromFile(str(path))
        conditions = Conditions(bit_widths, [], AdqWeightQuantizer, LsqActivationQuantizer)
        rows = metric.measure(None, layers, conditions)
        return metric.name, list(rows)

    return read


def test_rows_come_in_the_models_order_with_the_candidates_alone(read):
    assert read() == (
        "mse",
        [
            LayerSensitivity("a", 10, 100, {2: 1.5, 4: 1.0}, {2: 0.1, 4: 0.3}),
            LayerSensitivity("b", 20, 200, {2: 0.5, 4: 0.125}),
        ],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ROWS[1:]}, "it has no layer b;"),
        ({"bit_widths": (2, 5, 6)}, "layer a has no value at 5, 6 bits; layer b has no value"),
        (
            {"rows": (ROWS[0], replace(ROWS[2], activation_sensitivity={2: 0.5}))},
            "the input of layer a has no value at 4 bits",
        ),
        (
            {"rows": (ROWS[0], replace(ROWS[2], num_weights=11))},
            "layer a has 11 weights there, 10 here",
        ),
        (
            {"layers": [LayerInfo(f"new{i}", 1, 1, 1) for i in range(5)]},
            "no layer new0; it has no layer new1; it has no layer new2; and 2 more; measure it",
        ),
    ],
    ids=["layer", "bits", "input", "weights", "many"],
)
def test_what_is_missing_is_named(read, change, message):
    with pytest.raises(UserError, match=r"sensitivity.path: .*does not cover this model") as error:
        read(**change)
    assert message in str(error.value)
    assert "bits.candidates=[" in str(error.value)


def test_another_file_is_refused(read):
    with pytest.raises(UserError, match=r"sensitivity.json is not a sensitivity table"):
        read(text="{}")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "sensitivity.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"sensitivity.path: cannot read"):
        FromFile(str(path)).table()


def test_a_missing_file_is_told_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"path: there is no file .*nowhere.json; give a run's"):
        FromFile(str(tmp_path / "nowhere.json"))
