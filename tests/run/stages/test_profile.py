"""The stage that measures sensitivities: it continues, checks, and tells how far it is."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from helpers import QUICK
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from adq_train.allocation.budget import Budget, Problem
from adq_train.errors import UserError
from adq_train.progress import Progress
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session
from adq_train.run.stages.profile import profile
from adq_train.sensitivity.mse import Mse
from adq_train.sensitivity.outputs import float_outputs
from adq_train.settings.schema import register
from adq_train.settings.validate import validate


@pytest.fixture
def run_profile(tmp_path):
    """Runs the stage in a folder, on a float model that has the given seed."""

    def run(name, *overrides, seed=0):
        GlobalHydra.instance().clear()
        register()
        settings = ["trainer.eval_batch_size=16", "trainer.device=cpu", f"run_dir={name}"]
        with initialize_config_module("adq_train.configs", version_base="1.3"):
            config, parts = validate(compose("config", [*QUICK, *settings, *overrides]))
        session = Session.open(config, parts)
        torch.manual_seed(seed)
        data = session.data
        model = parts.model.build(data.num_classes, data.image_shape[0])
        layers = session.problem.layers
        problem = Problem(layers, {}, tuple(config.bits.candidates), Budget(3))
        with RunFolder(tmp_path / name, config) as folder:
            return profile(replace(session, model=model, problem=problem), folder)

    return run


METRICS = {
    "perturbation": ["sensitivity.tensors=separate"],
    "hessian": ["sensitivity.max_probes=3"],
    "fisher": [],
    "learned": ["sensitivity.epochs=1"],
    "gradient": ["sensitivity.tensors=separate"],
}


@pytest.mark.parametrize("metric", METRICS)
def test_an_interrupted_measurement_ends_with_the_identical_table(
    run_profile, tmp_path, caplog, monkeypatch, metric
):
    overrides = [f"sensitivity={metric}", *METRICS[metric]]
    whole = run_profile("whole", *overrides)

    advance, broken = Progress.advance, tmp_path / "broken"

    def stop_after_three(self, text):
        advance(self, text)
        if self.what == "profile" and self.done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run_profile("broken", *overrides)
    rows = json.loads((broken / "sensitivity.partial.json").read_text())["layers"]
    assert [row["name"] for row in rows] == [row.name for row in whole.layers[:3]]
    assert not (broken / "sensitivity.json").exists()

    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="adq_train"):
        assert run_profile("broken", *overrides) == whole
    lines = [x.getMessage().strip() for x in caplog.records]
    assert "profile: continuing after 3 layers" in lines
    assert [x for x in lines if x.startswith("profile ")] == [
        f"profile {i}/8: {row.name}" for i, row in enumerate(whole.layers[3:], 4)
    ]
    names = {x.name for x in broken.iterdir()}
    assert "sensitivity.json" in names
    assert "sensitivity.partial.json" not in names


def test_rows_of_another_float_model_are_measured_anew(run_profile, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", fail)
        with pytest.raises(KeyboardInterrupt):
            run_profile("run", "sensitivity=mse", seed=1)
    assert run_profile("run", "sensitivity=mse") == run_profile("other", "sensitivity=mse")
    assert "belongs to another model" in caplog.text


def test_leftovers_of_a_finished_table_are_cleared(run_profile, tmp_path):
    """A kill between the table and the removal of its parts leaves both."""
    table = run_profile("run", "sensitivity=mse")
    leftover = tmp_path / "run" / "sensitivity.partial.json"
    leftover.write_text("{}")
    assert run_profile("run", "sensitivity=mse") == table
    assert not leftover.exists()


def test_a_table_of_another_run_is_used_as_it_is(run_profile, tmp_path):
    table = run_profile("first", "sensitivity=perturbation")
    path = tmp_path / "first" / "sensitivity.json"
    second = run_profile("second", "sensitivity=from_file", f"sensitivity.path={path}")
    assert second == table
    assert second.metric == "perturbation-kl-both"
    with pytest.raises(UserError, match=r"layer conv1 has no value at 5 bits"):
        run_profile(
            "third",
            "sensitivity=from_file",
            f"sensitivity.path={path}",
            "bits.candidates=[2,5]",
        )
    assert not (tmp_path / "third" / "sensitivity.json").exists()


def test_negative_values_are_told_and_others_refused(run_profile, monkeypatch, caplog, tmp_path):
    def measured_as(value):
        measure = Mse.measure

        def changed(self, *arguments):
            for row in measure(self, *arguments):
                if row.name == "fc":
                    row.sensitivity[3] = value
                yield row

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(Mse, "measure", measured_as(-0.5))
        table = run_profile("negative", "sensitivity=mse")
    assert table.layers[-1].sensitivity[3] == -0.5
    assert "mse is negative or rises with more bits" in caplog.text
    assert "kept as it is, for fc (-0.5 at 3 bits)" in caplog.text

    with monkeypatch.context() as patch:
        patch.setattr(Mse, "measure", measured_as(float("nan")))
        with pytest.raises(UserError, match="mse of layer fc at 3 bits is nan"):
            run_profile("nan", "sensitivity=mse")
    rows = json.loads((tmp_path / "nan" / "sensitivity.partial.json").read_text())["layers"]
    assert len(rows) == 7


def test_a_float_model_at_chance_is_told_and_noted_and_one_of_nan_refused(
    run_profile, tmp_path, monkeypatch, caplog
):
    table = run_profile("chance", "sensitivity=mse")  # with its first weights
    assert table.caveat is not None
    assert f"profile: {table.caveat}; sensitivities of such a model mean little" in caplog.text

    def damaged(model, batches):
        model.fc.bias.data[0] = torch.nan
        return float_outputs(model, batches)

    monkeypatch.setattr("adq_train.run.stages.profile.float_outputs", damaged)
    with pytest.raises(UserError, match=r"32 of 32 calibration images, .* of fc \(Linear\)"):
        run_profile("nan", "sensitivity=mse")
    assert not (tmp_path / "nan" / "sensitivity.json").exists()
