"""The figures of the summary against a calculation by hand."""

import io
from pathlib import Path

import pytest
from helpers import ALLOCATION, LEVELS, RESULT, TABLE
from rich.console import Console

from adq_train.artifacts import LayerLevels, LevelCounts
from adq_train.reporting.summary import Counts, kilobytes, render, total_bytes, unused_levels


def text_of(**changes):
    file = io.StringIO()
    arguments = {
        "table": TABLE, "allocation": ALLOCATION, "levels": LEVELS, "result": RESULT,
    } | changes  # fmt: skip
    content = render(**{"counts": Counts(50), **arguments}, folder=Path("a/run"))
    Console(file=file, width=120).print(content)
    return file.getvalue()


def test_everything_that_inference_needs_is_counted():
    tables = (256 + 256) + (4 + 4)
    assert total_bytes(ALLOCATION, Counts(50)) == 351 + 4 * (tables + 50)
    assert total_bytes(ALLOCATION, Counts(50, 3)) == 351 + 4 * (tables + 53)


def test_accuracy_comes_with_its_standard_error():
    text = text_of()
    assert "88.00 %" in text
    assert "-2.00 points to float" in text
    assert "±1.62 on 400 test images" in text  # 100 sqrt(0.88 × 0.12 / 400)


def test_sizes_are_compared_with_float32():
    text = text_of()
    assert f"{4 * 1101 / 351:.1f} times smaller than the 4.4 kB of float32" in text
    assert "2.00 weights, 2.00 activations (2.54 over all weights" in text


def test_a_network_for_integers_says_so():
    assert "target" not in text_of()
    assert "int8: weight levels on int8 grids, 3 values between layers at 8 bits" in text_of(
        counts=Counts(50, 3)
    )


def test_negative_sensitivities_are_shown_as_they_are():
    assert "-1.00e-03" in text_of()


def test_a_layer_without_its_levels_is_named():
    assert "first uses 99 of 100 weight levels and 17 of 256 activation levels" in text_of()
    assert "second uses" not in text_of()


def test_many_layers_without_their_levels_are_counted():
    layers = tuple(LayerLevels(f"layer{i}", 4, 3, 4, 4) for i in range(9))
    lines = unused_levels(LevelCounts(layers), most=4)
    assert lines[0] == "layer0 uses 3 of 4 weight levels"
    assert lines[4:] == ["… and 5 more layers (levels.json)"]
    assert len(unused_levels(LevelCounts(layers[:4]), most=4)) == 4


@pytest.mark.parametrize(("optimal", "expected"), [(True, "ilp, proven optimal"), (False, "ilp)")])
def test_optimality_is_claimed_only_where_it_is_proven(optimal, expected):
    from dataclasses import replace

    assert expected in text_of(allocation=replace(ALLOCATION, optimal=optimal))


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0.0 kB"), (1500, "1.5 kB"), (2_340_000, "2.34 MB")]
)
def test_sizes_in_powers_of_ten(count, expected):
    assert kilobytes(count) == expected


def test_long_paths_are_not_cut(tmp_path):
    file = io.StringIO()
    folder = Path("x" * 200)
    Console(file=file, width=80, soft_wrap=True).print(
        render(TABLE, ALLOCATION, LEVELS, RESULT, Counts(50), folder=folder)
    )
    assert f"tensorboard --logdir {folder}" in file.getvalue()
