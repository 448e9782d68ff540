import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_profile.py"


def test_it_prints_one_json_object_in_the_common_form(monkeypatch, capsys):
    sizes = ["--images", "2", "--batch-size", "2", "--repetitions", "1", "--bits", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--json", *sizes])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    assert {"device", "model", "batch_size"} <= set(result)
    assert [row["name"] for row in result["rows"]] == ["float", "whole", "reuse"]
    for row in result["rows"]:
        assert {"bits", "median_ms", "ratio_to_float", "peak_memory_bytes"} <= set(row)
        assert row["median_ms"] > 0
    assert result["rows"][1]["ratio_to_whole"] == 1
