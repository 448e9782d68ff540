import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.artifacts import (
    BitAllocation,
    LayerBits,
    LayerLevels,
    LayerSensitivity,
    LevelCounts,
    RunResult,
    SensitivityTable,
    require_finite,
)
from adq_train.errors import UserError

TABLE = SensitivityTable(
    "perturbation-kl-both",
    (2, 4),
    (
        LayerSensitivity("conv1", 27, 21168, {2: 0.5, 4: -1e-9}),
        LayerSensitivity("fc", 640, 640, {2: 1 / 3, 4: 0.0}),
    ),
)
ALLOCATION = BitAllocation(
    allocator="ilp",
    budget={"average_weight_bits": 2.81},
    layers=(LayerBits("conv1", 8, 8), LayerBits("fc", 2, 3)),
    average_weight_bits=2.0,
    average_weight_bits_all_layers=2.24,
    average_activation_bits=3.0,
    model_size_bytes=187,
    bops=10**13,
    objective=1 / 3,
    optimal=True,
)
RESULT = RunResult(92.6, 10.0, 91.05, 99.7, 10_000, {"profile": 1.5, "qat": 60.25})
LEVELS = LevelCounts((LayerLevels("conv1", 27, 26, 256, 17), LayerLevels("fc", 3, 3, 4, 4)))
each_artifact = pytest.mark.parametrize(
    "artifact", [TABLE, ALLOCATION, LEVELS, RESULT], ids=lambda x: type(x).__name__
)


@each_artifact
def test_json_round_trip(artifact):
    assert type(artifact).from_json(artifact.to_json()) == artifact


def test_weights_and_activations_apart_survive_beside_layers_without():
    apart = LayerSensitivity("fc", 640, 640, {2: 0.5, 4: 0.25}, {2: 0.125, 4: 0.0})
    table = SensitivityTable("m", (2, 4), (TABLE.layers[0], apart))
    assert SensitivityTable.from_json(table.to_json()) == table
    first, second = json.loads(table.to_json())["layers"]
    assert "activation_sensitivity" not in first
    assert second["activation_sensitivity"] == {"2": 0.125, "4": 0.0}


def test_errors_and_caveats_survive_and_are_left_out_where_there_are_none():
    layer = replace(TABLE.layers[0], standard_error={2: 0.1, 4: 0.2}, measured={2: 0.4, 4: 0.6})
    table = replace(TABLE, layers=(layer,), caveat="noise")
    assert SensitivityTable.from_json(table.to_json()) == table
    assert set(json.loads(TABLE.to_json())) == {"metric", "bit_widths", "layers"}
    allocation = replace(ALLOCATION, caveat="noise")
    assert BitAllocation.from_json(allocation.to_json()) == allocation
    assert "caveat" not in ALLOCATION.to_json()


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=60)
@given(st.text(), st.dictionaries(st.integers(2, 8), finite))
def test_every_name_and_sensitivity_survives(name, sensitivity):
    table = SensitivityTable(name, (), (LayerSensitivity(name, 1, 1, sensitivity),))
    assert SensitivityTable.from_json(table.to_json()) == table


def test_json_has_the_fields_that_other_programs_read():
    table = json.loads(TABLE.to_json())
    assert table["layers"][0] == {
        "name": "conv1",
        "num_weights": 27,
        "macs": 21168,
        "sensitivity": {"2": 0.5, "4": -1e-9},
    }
    assert table.keys() == {"metric", "bit_widths", "layers"}
    allocation = json.loads(ALLOCATION.to_json())
    assert allocation["layers"][1] == {"name": "fc", "weight_bits": 2, "activation_bits": 3}
    assert allocation.keys() == {
        "allocator",
        "budget",
        "layers",
        "average_weight_bits",
        "average_weight_bits_all_layers",
        "average_activation_bits",
        "model_size_bytes",
        "bops",
        "objective",
        "optimal",
    }
    assert json.loads(RESULT.to_json()) == {
        "fp_top1_percent": 92.6,
        "ptq_top1_percent": 10.0,
        "qat_top1_percent": 91.05,
        "qat_top5_percent": 99.7,
        "num_test_images": 10_000,
        "seconds": {"profile": 1.5, "qat": 60.25},
    }


@each_artifact
def test_another_text_is_refused(artifact):
    for text in ("", "[]", "null", '"text"', "{}", '{"layers": 3}'):
        with pytest.raises(UserError, match="not a"):
            type(artifact).from_json(text)


@each_artifact
def test_a_truncated_file_is_refused(artifact):
    text = artifact.to_json()
    for length in range(0, len(text) - 2, 7):
        with pytest.raises(UserError, match="not a"):
            type(artifact).from_json(text[:length])


@each_artifact
def test_a_missing_field_is_refused(artifact):
    content = json.loads(artifact.to_json())
    for name in content:
        rest = {key: value for key, value in content.items() if key != name}
        with pytest.raises(UserError, match=name):
            type(artifact).from_json(json.dumps(rest))


@pytest.mark.parametrize(
    ("artifact", "name"), [(TABLE, "num_weights"), (TABLE, "sensitivity"), (ALLOCATION, "name")]
)
def test_a_missing_field_of_a_layer_is_refused(artifact, name):
    content = json.loads(artifact.to_json())
    del content["layers"][1][name]
    with pytest.raises(UserError, match=name):
        type(artifact).from_json(json.dumps(content))


@pytest.mark.parametrize("artifact", [TABLE, ALLOCATION], ids=["table", "allocation"])
def test_layers_of_another_shape_are_refused(artifact):
    for layers in ("conv1", [1, 2], {"conv1": 2}, None):
        content = {**json.loads(artifact.to_json()), "layers": layers}
        with pytest.raises(UserError, match="not a"):
            type(artifact).from_json(json.dumps(content))


def test_sensitivities_of_another_shape_are_refused():
    for sensitivity in ([0.5], {"two": 0.5}, {"2": "much"}, {"2": None}):
        content = json.loads(TABLE.to_json())
        content["layers"][0]["sensitivity"] = sensitivity
        with pytest.raises(UserError, match="not a sensitivity table"):
            SensitivityTable.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("artifact", "old"), [(TABLE, "0.5"), (ALLOCATION, "2.24"), (RESULT, "91.05")]
)
def test_numbers_that_are_not_finite_are_refused(artifact, old):
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = artifact.to_json()
        assert old in text
        with pytest.raises(UserError, match=f"{number} is not a finite number"):
            type(artifact).from_json(text.replace(old, number))


def test_numbers_that_are_not_finite_are_not_written():
    table = SensitivityTable("m", (2,), (LayerSensitivity("a", 1, 1, {2: float("nan")}),))
    with pytest.raises(ValueError, match="JSON"):
        table.to_json()


def test_bits_by_name():
    assert ALLOCATION.bits() == {"conv1": LayerBits("conv1", 8, 8), "fc": LayerBits("fc", 2, 3)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sensitivity_that_is_not_finite_is_named(value):
    require_finite(TABLE)
    table = SensitivityTable("hessian", (2, 4), (LayerSensitivity("fc", 1, 1, {2: 0.0, 4: value}),))
    with pytest.raises(UserError, match="hessian of layer fc at 4 bits"):
        require_finite(table)
    table = SensitivityTable("m", (2,), (LayerSensitivity("fc", 1, 1, {2: 0.0}, {2: value}),))
    with pytest.raises(UserError, match="m of the input of layer fc at 2 bits"):
        require_finite(table)


def test_what_a_layer_does_not_have_is_left_out_of_the_table():
    layers = (
        LayerSensitivity("a", 1, 2, {2: 0.5}),
        LayerSensitivity("b", 1, 2, {2: 0.5}, {2: 0.25}, 7),
    )
    table = SensitivityTable("m", (2,), layers)
    first, second = json.loads(table.to_json())["layers"]
    assert set(first) == {"name", "num_weights", "macs", "sensitivity"}
    assert (second["activation_sensitivity"], second["num_inputs"]) == ({"2": 0.25}, 7)
    assert SensitivityTable.from_json(table.to_json()) == table
