"""What is to be measured on a GPU runs dry on a CPU, every row of it."""

import importlib.util
import json
from pathlib import Path

PATH = Path(__file__).parents[2] / "scripts/gpu_day.py"


def script():
    spec = importlib.util.spec_from_file_location("gpu_day", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_day_has_every_row_and_no_error(tmp_path, capsys):
    day, output = script(), tmp_path / "day.json"
    dry = ["--device", "cpu", "--dry", "--bits", "2", "8", "--output", str(output)]
    day.main([*dry, "--alone"])
    rows = json.loads(output.read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert not [row for row in rows if "error" in row]
    found = [(row["what"], row.get("bits")) for row in rows]
    assert found == [
        ("machine", None), ("copy", None), ("kernels", 2), ("kernels", 8),
        ("step", None), ("step", 2), ("step", 8), ("deterministic", None),
    ]  # fmt: skip
    by_name = {row["what"]: row for row in rows}
    assert by_name["deterministic"]["two_runs"]
    assert by_name["deterministic"]["interrupted"]
    assert by_name["kernels"]["repeats"]
    assert max(by_name["kernels"]["largest_relative_difference"]) < 1e-2
    day.main([*dry, "--rank"])  # what each of two processes does, by one
    assert json.loads(capsys.readouterr().out)["same"]


def test_a_row_that_fails_says_why_and_the_day_goes_on(tmp_path, monkeypatch):
    day, output = script(), tmp_path / "day.json"

    def broken(*_):
        raise RuntimeError("no such kernel")

    for name in ("copy_roof", "same_bits", "step_row"):
        monkeypatch.setattr(day, name, broken)
    day.main(["--device", "cpu", "--dry", "--alone", "--bits", "--output", str(output)])
    rows = json.loads(output.read_text())
    assert rows[1]["error"] == "RuntimeError: no such kernel"
    assert rows[-1]["what"] == "deterministic"
