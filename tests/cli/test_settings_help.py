"""What `adq-train --settings` says is what is declared."""

import pytest

from adq_train.cli.settings_help import settings_text
from adq_train.errors import ConfigError
from adq_train.settings.schema import GROUPS, SECTIONS, declared


def test_every_setting_is_told_once_with_its_help():
    text = settings_text()
    flat = " ".join(text.split())
    for name, what in declared():
        if name.split(".")[0] in GROUPS or name in SECTIONS:
            continue
        assert text.count(f"\n  {name}=") == 1, name
        assert " ".join(what.help.split()) in flat, name
    assert max(map(len, text.splitlines())) <= 80


def test_a_section_with_ranges_choices_and_effects():
    text = settings_text("trainer")
    assert "\n  trainer.batch_size=128\n" in text
    assert "at least 0 and less than 1" in text
    assert "one of none, quantizers, model; changes speed and rounding" in " ".join(text.split())
    assert "budget." not in text
    assert "\n  bits.candidates=[2,3,4]\n" in settings_text("bits")
    general = settings_text("general")
    assert "\n  debug=false\n" in general
    assert "\n  logger=[tensorboard]\n" in general
    assert "at most 2147483647" in " ".join(general.split())


def test_defaults_are_those_of_the_configuration(cli):
    assert "\n  budget.average_weight_bits=3.0\n" in settings_text("budget")


def test_a_group_is_no_section():
    with pytest.raises(ConfigError, match=r"data; it is a group, .* --cfg job data=CHOICE shows"):
        settings_text("data")


def test_a_section_that_is_not_there():
    with pytest.raises(ConfigError, match=r"no section trainr.*trainer"):
        settings_text("trainr")


def test_the_command_line(cli):
    outcome = cli("--settings", "bits")
    assert outcome.code == 0
    assert outcome.out.startswith("bits: Which bit-widths a layer may get.")
    outcome = cli("--settings", "nothing")
    assert (outcome.code, outcome.out) == (2, "")
    assert "there is no section nothing; choose from general, budget" in outcome.err
