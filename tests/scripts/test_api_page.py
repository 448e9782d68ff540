"""docs/api.md says what the docstrings say."""

import runpy
from pathlib import Path

import adq_train

SCRIPT = Path(__file__).parents[2] / "scripts" / "api_page.py"


def test_the_page_is_up_to_date_and_names_everything():
    script = runpy.run_path(str(SCRIPT))
    text = script["PAGE"].read_text(encoding="utf-8")
    assert text == script["page"](), "run python scripts/api_page.py"
    for name in adq_train.__all__:
        assert f"## `adq_train.{name}`" in text
