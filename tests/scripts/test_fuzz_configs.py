import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_configs.py"
FOUND_BEFORE = (
    ["allocator.time_limit_seconds=${nothing}"],
    ["~trainer.compile=true"],
    ["+activation_quantizer=apot"],
    ["trusted_packages=???"],
    ["bits.candidates=[[2],[3]]"],
    ["optimizer._target_=adq_train.errors.UserError"],
)


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_random_edits_are_refused_in_one_message_or_pass(script):
    result = script["fuzz"](12, seed=7)
    assert not result.wrong
    assert sum(result.ends.values()) == 12


def test_no_edit_passes(script):
    assert script["attempt"]([])[0] == "passes"


@pytest.mark.parametrize("overrides", FOUND_BEFORE, ids=" ".join)
def test_what_it_found_is_refused(script, overrides):
    end, text = script["attempt"](overrides)
    assert end == "refused", text
    assert "error: " in text
