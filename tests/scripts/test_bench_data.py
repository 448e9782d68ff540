import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_data.py"


def test_it_measures_both_sides(monkeypatch, capsys):
    sizes = ["--images", "6", "--height", "40", "--width", "48", "--repetitions", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--json", *sizes])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["torchvision", "adq-train"]
    for row in result["rows"]:
        assert 0 < row["lowest"] <= row["images_per_second"] <= row["highest"]
    assert result["rows"][0]["ratio_to_torchvision"] == 1
