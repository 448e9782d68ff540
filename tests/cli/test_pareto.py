"""The trade-off's command: what it writes, what it refuses."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from adq_train.artifacts import LayerSensitivity, SensitivityTable

BOTH = SensitivityTable(
    "made-up",
    (2, 3, 4),
    tuple(
        LayerSensitivity(
            name, size, 10 * size, {2: 4.0 / size, 3: 1.0 / size, 4: 0.1 / size}, num_inputs=size
        )
        for name, size in (("conv1", 9), ("layer1.a", 64), ("layer1.b", 128), ("fc", 20))
    ),
)
SEPARATE = replace(
    BOTH,
    layers=tuple(replace(x, activation_sensitivity=dict(x.sensitivity)) for x in BOTH.layers),
)


@pytest.fixture
def run(tmp_path, program):
    def go(*arguments, table=BOTH, config=None):
        """Rows of the file, and what was printed."""
        (tmp_path / "sensitivity.json").write_text(table.to_json())
        if config is not None:
            (tmp_path / "config.yaml").write_text(config)
        code, out, err = program("adq-pareto", tmp_path, *arguments)
        if code:
            return code, err
        with (tmp_path / "pareto.csv").open() as file:
            return list(csv.DictReader(file)), out

    return go


def test_it_writes_the_front_and_the_uniform_allocations(run, tmp_path):
    rows, out = run("points=9")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    best = [x for x in rows if x["allocator"] == "ilp"]
    same = [x for x in rows if x["allocator"] == "uniform"]
    assert [x["bits"] for x in same] == [f"8/8 {b}/{b} {b}/{b} 8/8" for b in (2, 3, 4)]
    assert best[0]["bits"] == same[0]["bits"]
    assert best[-1]["bits"] == same[-1]["bits"]
    losses = [float(x["objective"]) for x in best]
    assert losses == sorted(losses, reverse=True)
    assert all(x["optimal"] == "True" for x in best)
    assert "9 budgets solved in" in out
    assert best[0]["model_size_bytes"] == str(9 + 16 + 32 + 20)


def test_the_settings_are_those_of_the_run_unless_given(run):
    config = "bits: {candidates: [2, 4], first_last: null, pinned: {fc: 3}, tied: true}"
    rows, _ = run(config=config)
    assert [x["bits"] for x in rows if x["allocator"] == "uniform"] == [
        "2/2 2/2 2/2 3/3", "4/4 4/4 4/4 3/3"
    ]  # fmt: skip
    given = ("bits.candidates=[2,3]", "bits.first_last=6", "bits.pinned={'*.a': 5}")
    rows, _ = run(*given, config=config)
    assert [x["bits"] for x in rows if x["allocator"] == "uniform"] == [
        "6/6 5/5 2/2 6/6", "6/6 5/5 3/3 6/6"
    ]  # fmt: skip
    rows, _ = run("bits.first_last=null", config="bits: {candidates_per_layer: {fc: [2, 3]}}")
    assert {x["bits"][-3:] for x in rows} <= {"2/2", "3/3"}


def test_separate_bits_over_operations_within_another_limit(run):
    given = ("bits.tied=false", "over=bops", "budget.model_size_bytes=0.09x")
    rows, _ = run(*given, table=SEPARATE)
    best = [x for x in rows if x["allocator"] == "ilp"]
    assert any(x.split("/")[0] != x.split("/")[1] for row in best for x in row["bits"].split())
    assert all(int(x["model_size_bytes"]) <= 0.09 * 4 * 221 for x in rows)


def test_a_table_without_the_numbers_of_inputs(run, program, tmp_path):
    bare = replace(BOTH, layers=tuple(replace(x, num_inputs=None) for x in BOTH.layers))
    assert "num_inputs" not in bare.to_json()
    rows, _ = run(table=bare)
    assert {x["average_activation_bits"] for x in rows} == {"nan"}
    file = tmp_path / "sensitivity.json"
    other = tmp_path / "other"
    other.mkdir()
    given = (f"output={other}", "budget.bops=1e6", "allocator=greedy")
    assert program("adq-pareto", file, *given).code == 0
    assert (other / "pareto.csv").exists()
    refused = program("adq-pareto", file, "over=average_activation_bits")
    assert "does not hold num_inputs" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["points=1"], "points: must be a whole number, at least 2, got '1'"),
        (["budget.bop=3"], "budget.bop: there is no such setting (did you mean 'bops'?)"),
        (["budget.bops=nan"], "budget.bops: must be a number, or a share"),
        (["budget.bops=-1"], "budget.bops: must be more than 0, got -1"),
        (["budget.bops=much"], "budget.bops: must be a number, or a share"),
        (["budget.bops=2x"], "budget.bops: must be a number, or a share"),
        (["budget.bops=1"], "budget.bops: 1 cannot be reached"),
        (["bits.candidates=[2,9]"], "bits.candidates: must be at least 2 and at most 8, got 9"),
        (["bits.candidates=[2,5]"], "was not measured at 5 bits"),
        (["bits.pinned=fc"], "bits.pinned: must map layer names to bits"),
        (["bits.pinned={gc: 4}"], "bits.pinned: no layer is called 'gc'"),
        (["bits.pinned={"], "pinned: '{' cannot be read"),
        (["bits.tied=no way"], "bits.tied: must be true or false, got 'no way'"),
        (["bits.tied=false"], "sensitivity.tensors=separate"),
        (["output=nowhere"], "output: nowhere is no folder"),
    ],
)
def test_what_it_refuses(run, tmp_path, arguments, message):
    code, err = run(*arguments)
    assert code in (1, 2)
    assert message in err
    assert not (tmp_path / "pareto.csv").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"metric": "m", "bit_widths": [], "layers": []}'])
def test_another_file(tmp_path, program, text):
    (tmp_path / "sensitivity.json").write_text(text)
    code, _, err = program("adq-pareto", tmp_path)
    assert (code, "sensitivity.json" in err) == (1, True)
    assert "nowhere.json cannot be read" in program("adq-pareto", tmp_path / "nowhere.json").err


@pytest.mark.parametrize("config", ["bits: 3", "a: b", "[", "- 1"])
def test_a_configuration_of_something_else(run, config):
    assert "config.yaml is not the configuration of a run" in run(config=config)[1]


def test_it_answers_without_torch(tmp_path):
    (tmp_path / "sensitivity.json").write_text(BOTH.to_json())
    program = (
        "import sys; from adq_train.cli.program import act; assert act('adq-pareto') == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)
    assert json.loads((tmp_path / "sensitivity.json").read_text())["layers"][0]["num_inputs"] == 9


def test_bits_that_mean_little_are_called_so(run):
    assert "Bits by" not in run()[1]
    noisy = replace(
        BOTH, layers=tuple(replace(x, standard_error=dict(x.sensitivity)) for x in BOTH.layers)
    )
    assert "\nBits by ilp, optimal for these Ω, which are within noise\n" in run(table=noisy)[1]
    chance = replace(BOTH, caveat="the float model is at chance")
    out = run("allocator=greedy", table=chance)[1]
    assert "\nBits by greedy, by these Ω, but the float model is at chance\n" in out


def test_paths_may_begin_at_home(tmp_path, monkeypatch, program):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sensitivity.json").write_text(BOTH.to_json())
    told = program("adq-pareto", "~/run", "output=~/nowhere").err
    assert f"output: {tmp_path}/nowhere is no folder" in told
