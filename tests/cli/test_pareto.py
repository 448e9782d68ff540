"""The trade-off's command: what it writes, what it refuses."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from adq_train.artifacts import LayerSensitivity, SensitivityTable
from adq_train.cli.pareto import main

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
def run(tmp_path, capsys):
    def go(*arguments, table=BOTH, config=None):
        """Rows of the file, and what was printed."""
        (tmp_path / "sensitivity.json").write_text(table.to_json())
        if config is not None:
            (tmp_path / "config.yaml").write_text(config)
        main([str(tmp_path), *arguments])
        with (tmp_path / "pareto.csv").open() as file:
            return list(csv.DictReader(file)), capsys.readouterr().out

    return go


def test_it_writes_the_front_and_the_uniform_allocations(run, tmp_path):
    rows, out = run("--points", "9")
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
    given = ("--candidates=2,3", "--first-last=6", "--pin", "*.a=5")
    rows, _ = run(*given, config=config)
    assert [x["bits"] for x in rows if x["allocator"] == "uniform"] == [
        "6/6 5/5 2/2 6/6", "6/6 5/5 3/3 6/6"
    ]  # fmt: skip
    rows, _ = run("--first-last=null", config="bits: {candidates_per_layer: {fc: [2, 3]}}")
    assert {x["bits"][-3:] for x in rows} <= {"2/2", "3/3"}


def test_separate_bits_over_operations_within_another_limit(run):
    rows, _ = run("--separate", "--over=bops", "--limit=model_size_bytes=0.09x", table=SEPARATE)
    best = [x for x in rows if x["allocator"] == "ilp"]
    assert any(x.split("/")[0] != x.split("/")[1] for row in best for x in row["bits"].split())
    assert all(int(x["model_size_bytes"]) <= 0.09 * 4 * 221 for x in rows)


def test_a_table_without_the_numbers_of_inputs(run, tmp_path):
    bare = replace(BOTH, layers=tuple(replace(x, num_inputs=None) for x in BOTH.layers))
    assert "num_inputs" not in bare.to_json()
    rows, _ = run(table=bare)
    assert {x["average_activation_bits"] for x in rows} == {"nan"}
    file = tmp_path / "sensitivity.json"
    other = tmp_path / "other"
    other.mkdir()
    main([str(file), f"--output={other}", "--limit", "bops=1e6", "--allocator=greedy"])
    assert (other / "pareto.csv").exists()
    with pytest.raises(SystemExit, match="1"):
        main([str(file), "--over=average_activation_bits"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--points=1"], "--points: must be at least 2, got 1"),
        (["--limit=bops"], "--limit: 'bops' is not of the form bops=0.01x"),
        (["--limit=flops=3"], "--limit: 'flops' is not one of average_weight_bits"),
        (["--limit=bops=nan"], "--limit: 'nan' is neither a positive number nor a share"),
        (["--limit=bops=much"], "--limit: 'much' is neither a positive number nor a share"),
        (["--limit=bops=2x"], "--limit: must be a number, or a share"),
        (["--limit=bops=1"], "budget.bops: 1 cannot be reached"),
        (["--candidates=2,9"], "bit-width: must be 2 … 8, got '9'"),
        (["--candidates=2,5"], "was not measured at 5 bits"),
        (["--pin=fc"], "--pin: 'fc' is not of the form fc=8"),
        (["--pin=gc=4"], "bits.pinned: no layer is called 'gc'"),
        (["--separate"], "sensitivity.tensors=separate"),
        (["--output=nowhere"], "--output: nowhere is no folder"),
    ],
)
def test_what_it_refuses(run, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match="1"):
        run(*arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "pareto.csv").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"metric": "m", "bit_widths": [], "layers": []}'])
def test_another_file(tmp_path, capsys, text):
    (tmp_path / "sensitivity.json").write_text(text)
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path)])
    assert "sensitivity.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "nowhere.json")])
    assert "nowhere.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["bits: 3", "a: b", "[", "- 1"])
def test_a_configuration_of_something_else(run, capsys, config):
    with pytest.raises(SystemExit, match="1"):
        run(config=config)
    assert "config.yaml is not the configuration of a run" in capsys.readouterr().err


def test_it_answers_without_torch(tmp_path):
    (tmp_path / "sensitivity.json").write_text(BOTH.to_json())
    program = (
        "import sys; from adq_train.cli.pareto import main; main(sys.argv[1:]); "
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
    out = run("--allocator=greedy", table=chance)[1]
    assert "\nBits by greedy, by these Ω, but the float model is at chance\n" in out


def test_paths_may_begin_at_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sensitivity.json").write_text(BOTH.to_json())
    with pytest.raises(SystemExit, match="1"):
        main(["~/run", "--output=~/nowhere"])
    assert f"--output: {tmp_path}/nowhere is no folder" in capsys.readouterr().err
