"""The examples of docs/tasks.md: each runs, shorter than there, and gets somewhere."""

import importlib
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "settings", "chance"),
    [
        ("regression", {"epochs": 10}, 0.0),
        ("binary", {"epochs": 3}, 63.0),
        ("segmentation", {"epochs": 5, "images": 96}, 5.0),
        ("text", {"epochs": 2, "images": 2000}, 25.0),
        ("detection", {"epochs": 8, "images": 160}, 1.0),
    ],
)
def test_an_example_runs_and_keeps_what_was_learned(name, settings, chance):
    found = importlib.import_module(name).main(**settings)
    assert found["float"] > chance
    assert found["qat"] > 0.9 * found["float"]
    if "packed_bytes" in found:
        assert found["packed_bytes"] < found["float_bytes"] / 10


def test_what_the_page_shows_is_what_runs():
    page = (ROOT / "docs/tasks.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 5
    scripts = [textwrap.dedent(x.read_text()) for x in (ROOT / "examples").glob("*.py")]
    lines = {line.strip() for script in scripts for line in script.splitlines()}
    for block in blocks:
        odd = [x for x in block.splitlines() if x.strip() and x.strip() not in lines]
        assert not odd, odd


def test_five_minutes_end_with_pictures_and_a_file_that_agrees(tmp_path):
    found = importlib.import_module("five_minutes").main(epochs=2)
    assert found["packed"] == found["qat"] > 0.8 * found["float"] > 40
    assert found["packed_bytes"] < found["float_bytes"] / 6
    for name in ("sensitivity.png", "pareto.png"):
        assert (tmp_path / "five_minutes" / name).read_bytes().startswith(b"\x89PNG")
