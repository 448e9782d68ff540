"""A search goes on where it stopped, with accuracy against bytes."""

import csv
import importlib.util
from pathlib import Path

import pytest

from adq_train.errors import UserError

PATH = Path(__file__).parents[2] / "scripts/search.py"
spec = importlib.util.spec_from_file_location("search", PATH)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

OVER = (
    "optimizer.lr=log(0.01, 0.1)",
    "bits.first_last=int(2, 8)",
    "weight_quantizer=choice(adq, lsq)",
)


def settings_of(overrides):
    return dict(text.split("=") for text in overrides)


def figures(folder, overrides):
    """More bits are better and larger; the rest is a matter of taste."""
    given = settings_of(overrides)
    assert given["seed"] == "1"
    assert 0.01 <= float(given["optimizer.lr"]) <= 0.1
    bits = int(given["bits.first_last"])
    return 50.0 + bits - 5 * (given["weight_quantizer"] == "lsq"), 100 * bits


def test_what_is_no_range_is_told():
    assert script.space_of(["a.b=choice(x, 1)"]) == {"a.b": ("choice", ["x", "1"])}
    for text in ("a", "a=log(1)", "a=normal(1, 2)", "a=int(1, 2, 3)"):
        with pytest.raises(UserError, match="is not setting=log"):
            script.space_of([text])


def test_a_study_is_resumed_and_its_front_is_that_of_all_trials(tmp_path):
    optuna = pytest.importorskip("optuna", reason="optuna is not installed")
    space, folders = script.space_of(OVER), []

    def killed(folder, overrides):
        folders.append(folder)
        if len(folders) == 3:
            raise KeyboardInterrupt
        return figures(folder, overrides)

    with pytest.raises(KeyboardInterrupt):
        script.search(tmp_path, 6, space, ["seed=1"], killed)
    again = []

    def goes_on(folder, overrides):
        again.append(folder)
        return figures(folder, overrides)

    study = script.search(tmp_path, 6, space, ["seed=1"], goes_on)
    assert again[0] == folders[2]  # the run that was interrupted, first of all
    assert len(again) == 4
    done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    found = {tuple(x.values) for x in done}
    best = {
        (a, b)
        for a, b in found
        if not any((c >= a and d <= b) and (c, d) != (a, b) for c, d in found)
    }
    with (tmp_path / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(float(x["validation_top1_percent"]), float(x["bytes"])) for x in rows} == best
    assert script.search(tmp_path, 6, space, ["seed=1"], None).trials == study.trials


def test_failures_are_told_and_end_a_search(tmp_path, capsys):
    pytest.importorskip("optuna", reason="optuna is not installed")

    def fails(folder, overrides):
        raise UserError("exit code 1")

    with pytest.raises(UserError, match="3 trials in a row failed"):
        script.search(tmp_path, 2, script.space_of(OVER), [], fails)
    assert capsys.readouterr().err.count("failed (exit code 1)") == 3


def test_a_trial_is_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["model.width=4", "pretrain.epochs=1", "trainer.epochs=1", "data.train_images=400"]
    accuracy, size = script.run_trial(tmp_path / "run", overrides)
    assert 0 <= accuracy <= 100
    assert 1000 < size < 10_000
    assert script.run_trial(tmp_path / "run", overrides) == (accuracy, size)
    with pytest.raises(UserError, match="exit code"):
        script.run_trial(tmp_path / "bad", ["no.such=1"])
