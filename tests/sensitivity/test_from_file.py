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
    LayerSensitivity("b", 20, 200, {2: 0.5, 3: 0.25, 4: 0.125}, measured={3: 0.2, 4: 0.3}),
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
            LayerSensitivity("b", 20, 200, {2: 0.5, 4: 0.125}, measured={4: 0.3}),
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
            {"rows": (replace(ROWS[0], macs=999), ROWS[2])},
            "layer b has 999 multiply-accumulates (macs) there, 200 here",
        ),
        ({"rows": (ROWS[0], replace(ROWS[2], num_inputs=6))}, "layer a has 6 inputs there, 5 here"),
        (
            {"layers": [LayerInfo(f"new{i}", 1, 1, 1) for i in range(5)]},
            "no layer new0; it has no layer new1; it has no layer new2; and 2 more; measure it",
        ),
    ],
    ids=["layer", "bits", "input", "weights", "macs", "inputs", "many"],
)
def test_what_is_missing_is_named(read, change, message):
    with pytest.raises(UserError, match=r"sensitivity.path: .*does not cover this model") as error:
        read(**change)
    assert message in str(error.value)
    assert "bits.candidates=[" in str(error.value)


BY_HAND = """{"layers": [
    {"name": "b", "sensitivity": {"2": 1, "4": 0}},
    {"name": "a", "sensitivity": {"2": 0.5, "4": 0.25}, "num_weights": 10}
]}"""


def test_names_and_values_are_enough(read):
    assert read(text=BY_HAND) == (
        "from_file",
        [
            LayerSensitivity("a", 10, 100, {2: 0.5, 4: 0.25}),
            LayerSensitivity("b", 20, 200, {2: 1.0, 4: 0.0}),
        ],
    )
    with pytest.raises(UserError, match="layer a has 10 weights there, 11 here"):
        read(text=BY_HAND, layers=(LayerInfo("a", 11, 100, 5), LAYERS[1]))


def test_effects_that_must_be_apart_are_asked_for_ahead(tmp_path):
    path = tmp_path / "sensitivity.json"
    path.write_text(BY_HAND)
    FromFile(str(path)).check(LAYERS, (2, 4), apart=False)
    with pytest.raises(UserError, match=r"bits.tied: false needs .*sensitivity.json \(from_file\)"):
        FromFile(str(path)).check(LAYERS, (2, 4), apart=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a sensitivity table: layers is missing"),
        ('{"layers": [{"sensitivity": {}}]}', r"layers\[0\]\.name is missing"),
        ('{"layers": [{"name": "a"}]}', r"\(a\)\.sensitivity is missing"),
        ('{"layers": [{"name": "a", "sensitivity": [1, 2]}]}', r"\(a\)\.sensitivity is \[1, 2\]"),
        ('{"layers": [{"name": "a", "sensitivity": {"two": 1}}]}', r"\(a\)\.sensitivity .*'two'"),
        ('{"layers": [{"name": "a", "sensitivity": {"2": "1"}}]}', r"\(a\)\.sensitivity\.2 is '1'"),
        (
            '{"layers": [{"name": "a", "sensitivity": {"2": true}}]}',
            r"\(a\)\.sensit.* True",
        ),
        (
            f'{{"layers": [{{"name": "a", "sensitivity": {{"2": 1{"0" * 400}}}}}]}}',
            "too large a number",
        ),
        ('{"layers": [{"name": "a", "sensitivity": {"2": NaN}}]}', "NaN is not a finite"),
        ('{"layers": [{"name": "a", "sensitivity": {}, "macs": "9"}]}', r"\(a\)\.macs is '9'"),
        (BY_HAND.replace('"b"', '"a"'), "more than one entry for a"),
        ("\ufeff[", "is not a sensitivity table"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
    ids=range(13),
)
def test_what_is_no_table_is_told_before_anything_runs(tmp_path, text, message):
    path = tmp_path / "sensitivity.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^path: .*sensitivity.json.*{message}"):
        FromFile(str(path))


def test_a_missing_file_is_told_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"path: there is no file .*nowhere.json; give a run's"):
        FromFile(str(tmp_path / "nowhere.json"))
