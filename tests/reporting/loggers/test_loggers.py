"""Trackers: each is told every epoch once, in one timeline, also after an interruption."""

import csv
import json
import sys

import pytest
from PIL import Image

from adq_train.errors import UserError
from adq_train.reporting.loggers import LOGGERS, TAGS, Outcome, plain, scalars, started

FLOAT, QAT = "pretrain", "qat"


def record(stage, epoch, loss=None):
    names = dict.fromkeys(TAGS, 1.0) | {"train_loss": epoch if loss is None else loss}
    movement = {"fc": {"levels": 0.5}} if stage == QAT else {}
    return {
        "stage": stage,
        "epoch": epoch,
        "step": 9,
        "seconds": 2.0,
        "movement": movement,
        **names,
    }


def tell(names, folder, stage, records, epochs, done=0, loss=None):
    """What a recorder does: starts trackers, reports epochs, closes."""
    for logger in started(names, folder, stage, records, done):
        for epoch in epochs:
            logger.epoch(record(stage, epoch, loss))
        logger.close()


def told(names, folder):
    """Two float epochs, three of QAT, and again from the second checkpoint of QAT on."""
    floats = [record(FLOAT, 1), record(FLOAT, 2)]
    tell(names, folder, FLOAT, [], [1, 2])
    tell(names, folder, QAT, floats, [1, 2, 3])
    tell(names, folder, QAT, [*floats, record(QAT, 1), record(QAT, 2)], [3, 4], done=2, loss=7.0)


def came_out(name, folder):
    """The end of a run, told as after its last epoch, twice: a run may be told so again."""
    picture = folder / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    settings = {"seed": 3, "bits": {"candidates": [2, 3]}, "logger": [name], "run_dir": "x"}
    for _ in range(2):
        (logger,) = started([name], folder, QAT, [], 4)
        logger.outcome(Outcome(settings, {"result/qat_top1_percent": 91.5}, {"p": picture}))
        logger.close()


def test_what_makes_a_run_is_told_and_not_where_it_lies():
    settings = {"seed": 3, "bits": {"candidates": [2, 3]}, "run_dir": "x", "logger": ["csv"]}
    settings |= {"output_root": "o", "init_from": None}
    expected = {"seed": 3, "bits.candidates[0]": 2, "bits.candidates[1]": 3}
    assert plain(Outcome(settings, {}, {})) == expected


def test_figures_have_sections_in_order():
    tags = list(scalars(record(QAT, 3)))
    sections = [tag.partition("/")[0] for tag in tags]
    assert sections == sorted(sections)
    assert tags[0] == "1_loss/train"
    assert tags[-1] == "5_movement_levels/fc"


def test_csv_has_one_line_for_each_epoch(tmp_path):
    told(["csv"], tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [(x["stage"], int(x["epoch"]), float(x["train_loss"])) for x in csv.DictReader(file)]
    assert rows == [
        *((FLOAT, epoch, epoch) for epoch in (1, 2)),
        *((QAT, epoch, loss) for epoch, loss in ((1, 1), (2, 2), (3, 7), (4, 7))),
    ]


def test_a_new_tracker_is_told_what_others_trained(tmp_path):
    records = [record(FLOAT, 1), record(FLOAT, 2)]
    for names in (["csv"], ["csv"]):  # the second start repeats nothing
        for logger in started(names, tmp_path, FLOAT, records, 2):
            logger.close()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_no_tracker_is_imported_before_it_is_chosen(tmp_path):
    assert started([], tmp_path, QAT, [], 0) == []
    assert not {"mlflow", "wandb"} & set(sys.modules)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_told(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=f"logger: {name} is not installed .*pip install 'adq-train.{name}.'"
    ):
        started([name], tmp_path, QAT, [], 0)


def test_mlflow_has_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'kept.db'}")
    monkeypatch.chdir(tmp_path)  # where it keeps artifacts then
    (tmp_path / "run").mkdir()
    told(["mlflow"], tmp_path / "run")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'kept.db'}")
    experiment = client.get_experiment_by_name("adq-train")
    (run,) = client.search_runs([experiment.experiment_id])
    curve = client.get_metric_history(run.info.run_id, "1_loss/train")
    assert {x.step: x.value for x in curve} == {1: 1, 2: 2, 3: 1, 4: 2, 5: 7, 6: 7}
    assert run.info.status == "FINISHED"
    came_out("mlflow", tmp_path / "run")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"seed": "3", "bits.candidates.0": "2", "bits.candidates.1": "3"}
    assert run.data.metrics["result/qat_top1_percent"] == 91.5
    assert [x.path for x in client.list_artifacts(run.info.run_id)] == ["picture.png"]


def test_wandb_works_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    told(["wandb"], tmp_path)
    came_out("wandb", tmp_path)
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 5  # one for each start, of one run
    last = max(files, key=lambda x: x.stat().st_mtime_ns).read_bytes()
    assert b"bits.candidates[0]" in last
    assert b"result/qat_top1_percent" in last
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/p_*.png"))
    assert {x.name for x in files} == {f"run-{known}.wandb"}


def test_every_tracker_has_a_module_and_is_a_choice():
    from adq_train.settings.schema import Config, about

    assert set(about(Config)["logger"].choices) == set(LOGGERS)
