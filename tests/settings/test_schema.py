"""One list of declarations, and all that is derived from it."""

import copy

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from adq_train.run import shared_model as shared
from adq_train.run.shared_model import float_inputs
from adq_train.settings.schema import (
    FLOAT_MODEL,
    GROUPS,
    NOTHING,
    ROUNDING,
    SECTIONS,
    Config,
    declared,
    float_settings,
    identity,
    register,
    settings_where,
)
from adq_train.storage.stamps import digest

SETTINGS = settings_where(lambda of: True)


@pytest.fixture(scope="module")
def plain():
    """A configuration as it is kept, with every declared setting."""
    GlobalHydra.instance().clear()
    register()
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        composed = compose("config", ["distillation=logits", "target=int8"])
    config = OmegaConf.to_container(composed)
    config = Config.of(config).plain()
    for name in SETTINGS:
        section, _, key = name.partition(".")
        if key:
            config[section].setdefault(key, None)
    return config


def changed(plain, name):
    """The configuration with another value of one setting; a group's is a new setting in it."""
    config = copy.deepcopy(plain)
    section, _, key = name.partition(".")
    if key:
        config[section][key] = "another"
    elif section in GROUPS:
        config[section] = {**config[section], "a_setting_of_tomorrow": 1}
    else:
        config[section] = "another"
    return config


def test_every_declaration_has_a_text_and_a_name_of_its_own():
    texts = dict(declared())
    assert [name for name, of in texts.items() if not of.help.endswith(".")] == []
    assert len(texts) == len(list(declared()))
    assert set(SETTINGS) == texts.keys() - SECTIONS.keys()
    assert all(name in texts for name in (*GROUPS, *SECTIONS))


def test_identity_drops_what_is_declared_as_no_part_of_a_run(plain):
    dropped = settings_where(lambda of: of.affects in (NOTHING, ROUNDING))
    first = identity(plain)
    for name in SETTINGS:
        same = identity(changed(plain, name)) == first
        assert same is (name in dropped), name
        section, _, key = name.partition(".")
        kept = key in first[section] if key else section in first
        chosen = name not in GROUPS or plain[name] != {}  # else it is no part of a run
        assert kept is (name not in dropped and chosen), name


def test_a_float_model_is_known_by_all_that_changes_its_bits(plain, monkeypatch):
    """Its key changes with these settings and no others; that of the file is of its content."""
    here = {"hardware": "cpu", "cpu_threads": 4, "versions": {"torch": "2"}}
    monkeypatch.setattr(shared, "environment", lambda device: here)

    def key(config):
        return digest(float_inputs(Config.of(config), "ab", "cpu", 1))

    decisive = settings_where(lambda of: of.affects in (FLOAT_MODEL, ROUNDING))
    keys = {name: key(changed(plain, name)) for name in SETTINGS}
    known = {name for name, found in keys.items() if found != key(plain)}
    assert known == {*decisive} - {"pretrain.checkpoint"}
    assert len({keys[name] for name in known}) == len(known)


def test_float_settings_are_those_of_the_key(plain):
    found = float_settings(plain)
    kept = settings_where(lambda of: of.affects in (FLOAT_MODEL, ROUNDING))
    for name in SETTINGS:
        section, _, key = name.partition(".")
        there = key in found.get(section, {}) if key else section in found
        assert there is (name in kept), name


def test_a_run_of_another_version_keeps_what_this_one_does_not_know(plain):
    config = {**plain, "new": 1, "trainer": {**plain["trainer"], "newer": 2}}
    found = identity(config)
    assert (found["new"], found["trainer"]["newer"]) == (1, 2)
    old = {name: value for name, value in plain.items() if name != "distillation"}
    old["trainer"] = {"epochs": 5}
    assert identity(old)["trainer"] == {"epochs": 5}
    assert "distillation" not in identity(old)


def test_a_configuration_comes_back_from_its_plain_form(plain):
    config = Config.of(plain)
    assert config.plain() == plain
    assert Config.of({}).trainer.epochs == Config.of({"trainer": {}}).trainer.epochs == 60
    assert Config.of({"trainer": {"epochs": 5, "newer": 2}}).trainer.epochs == 5
    assert config.rates.lr == plain["optimizer"]["lr"]
    assert Config.of({"optimizer": {"lr": 0.5}}).rates.lr == 0.5
