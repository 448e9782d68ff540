"""The figures of the summary against a calculation by hand."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ALLOCATION, LEVELS, RESULT, TABLE
from rich.console import Console

from adq_train.artifacts import (
    LayerBits,
    LayerLevels,
    LayerSensitivity,
    LevelCounts,
    SensitivityTable,
)
from adq_train.reporting.summary import (
    Counts,
    kilobytes,
    render,
    total_bytes,
    typed,
    unused_levels,
)


def text_of(columns=120, **changes):
    file = io.StringIO()
    arguments = {
        "table": TABLE, "allocation": ALLOCATION, "levels": LEVELS, "result": RESULT,
        "counts": Counts(50), "folder": Path("a/run"),
    } | changes  # fmt: skip
    Console(file=file, width=columns, soft_wrap=True).print(render(**arguments))
    return file.getvalue()


def test_everything_that_inference_needs_is_counted():
    tables = (256 + 256 + 255) + (4 + 4 + 3)
    assert total_bytes(ALLOCATION, Counts(50)) == 351 + 4 * (tables + 50)
    assert total_bytes(ALLOCATION, Counts(50, 3)) == 351 + 4 * (tables + 53)


def test_accuracy_comes_with_its_standard_error():
    text = text_of()
    assert re.search(r"90.00 % +50.00 % +88.00 % +-2.00 points\n", text)
    assert "on 400 test images (standard error ±1.62)" in text  # 100 sqrt(0.88 × 0.12 / 400)


def test_no_errors_are_no_certainty():
    all_right = replace(RESULT, qat_top1_percent=100.0)
    # Wilson's interval at z = 1.96 ends z² / (n + z²) below 1.
    assert f"95 % interval: {100 * 3.8416 / 403.8416:.2f} points" in text_of(result=all_right)


def test_the_next_command_trusts_what_the_run_trusts():
    assert "adq-export a/run\n" in text_of()
    assert "adq-export a/run 'trusted_packages=[mine,yours]'\n" in text_of(
        trusted=("mine", "yours")
    )


def test_sizes_are_compared_with_float32():
    text = text_of()
    assert f"{4 * 1101 / 351:.1f} times smaller than float32 (4.4 kB)" in text
    assert "2.00 weights, 2.00 activations (2.54 over all weights)" in text


def test_a_network_for_integers_says_so():
    assert "target" not in text_of()
    text = text_of(counts=Counts(50, 3, "int8"))
    assert "int8, with 3 values besides the inputs of layers at 8 bits" in text


def test_negative_sensitivities_are_shown_as_they_are():
    assert "-1.0e-03" in text_of()


def test_a_layer_without_its_levels_is_named():
    assert "first uses 99 of 100 weight levels and 17 of 256 activation levels" in text_of()
    assert "second uses" not in text_of()


def test_many_layers_without_their_levels_are_counted():
    layers = tuple(LayerLevels(f"layer{i}", 4, 3, 4, 4) for i in range(9))
    lines = unused_levels(LevelCounts(layers), most=4)
    assert lines[0] == "layer0 uses 3 of 4 weight levels"
    assert lines[4:] == ["… and 5 more layers (levels.json)"]
    assert len(unused_levels(LevelCounts(layers[:4]), most=4)) == 4


@pytest.mark.parametrize(
    ("optimal", "expected"), [(True, "by ilp, proven optimal\n"), (False, "by ilp\n")]
)
def test_optimality_is_claimed_only_where_it_is_proven(optimal, expected):
    assert expected in text_of(allocation=replace(ALLOCATION, optimal=optimal))


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0.0 kB"), (1500, "1.5 kB"), (2_340_000, "2.34 MB")]
)
def test_sizes_in_powers_of_ten(count, expected):
    assert kilobytes(count) == expected


def test_long_paths_are_not_cut_and_can_be_typed():
    folder = Path("x" * 200, "a b")
    text = text_of(folder=folder, columns=80)
    assert f"written to  {folder}\n" in text
    assert f"adq-export '{folder}'" in text


def test_eighty_columns_are_enough():
    layers = [f"layer3.{i}.conv1" for i in range(9)]
    table = SensitivityTable(
        "perturbation-kl-both",
        (2, 3, 4),
        tuple(LayerSensitivity(x, 36864, 9, {2: 0.5, 3: 0.4, 4: 0.3}) for x in layers),
    )
    allocation = replace(
        ALLOCATION,
        layers=tuple(LayerBits(x, 8, 8) for x in layers),
        model_size_bytes=36864 * 9,
        bops=65_300_000_000,
    )
    text = text_of(table=table, allocation=allocation, columns=80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("  ■■■■■■■■  36.9 kB") == 9


def test_the_next_commands_can_be_typed_where_no_environment_is_active(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "adq-export").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", "")
    assert typed("adq-pareto") == "adq-pareto"  # not beside the interpreter either
    assert typed("adq-export") == str(tmp_path / "bin" / "adq-export")
    monkeypatch.chdir(tmp_path)
    assert typed("adq-export") == "bin/adq-export"
    (tmp_path / "bin" / "adq-export").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert typed("adq-export") == "adq-export"
