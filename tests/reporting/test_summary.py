"""The figures of the summary against a calculation by hand."""

import io
from pathlib import Path

import pytest
from helpers import ALLOCATION, RESULT, TABLE
from rich.console import Console

from adq_train.reporting.summary import kilobytes, render, total_bytes


def text_of(**changes):
    file = io.StringIO()
    arguments = {"table": TABLE, "allocation": ALLOCATION, "result": RESULT} | changes
    content = render(**arguments, num_float_values=50, folder=Path("a/run"))
    Console(file=file, width=120).print(content)
    return file.getvalue()


def test_everything_that_inference_needs_is_counted():
    tables = (256 + 256) + (4 + 4)
    assert total_bytes(ALLOCATION, 50) == 351 + 4 * (tables + 50)


def test_accuracy_comes_with_its_standard_error():
    text = text_of()
    assert "88.00 %" in text
    assert "-2.00 points to float" in text
    assert "±1.62 on 400 test images" in text  # 100 sqrt(0.88 × 0.12 / 400)


def test_sizes_are_compared_with_float32():
    text = text_of()
    assert f"{4 * 1101 / 351:.1f} times smaller than the 4.4 kB of float32" in text
    assert "2.00 weights, 2.00 activations (2.54 over all weights" in text


def test_negative_sensitivities_are_shown_as_they_are():
    assert "-1.00e-03" in text_of()


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
        render(TABLE, ALLOCATION, RESULT, num_float_values=50, folder=folder)
    )
    assert f"tensorboard --logdir {folder}" in file.getvalue()
