import json
import os

import pytest
from made_up import make_run

from adq_train.errors import UserError
from adq_train.reporting.gather import gather


def states(folder):
    return {run.path.name: (run.state, run.note) for run in gather([folder])}


def test_a_finished_run_with_its_final_loss(tmp_path):
    (run,) = gather([make_run(tmp_path / "run", 91.5, seed=4, losses=(2.0, 0.75))])
    assert (run.state, run.note, run.seed) == ("done", "", 4)
    assert run.result.qat_top1_percent == 91.5
    assert run.final_train_loss == 0.75
    assert run.allocation.average_weight_bits == 3
    assert run.sensitivity.bit_widths == (2, 3, 4)


def test_runs_below_several_folders_are_found_once(tmp_path):
    make_run(tmp_path / "x" / "a")
    make_run(tmp_path / "x" / "deeper" / "b")
    make_run(tmp_path / "y" / "c")
    found = gather([tmp_path / "x", tmp_path / "y", tmp_path / "x" / "a"])
    assert [run.path.name for run in found] == ["a", "b", "c"]


def test_linked_runs_are_runs_and_no_circle_is_walked(tmp_path):
    make_run(tmp_path / "elsewhere" / "moved")
    make_run(tmp_path / "sweep" / "a")
    (tmp_path / "sweep" / "b").symlink_to(tmp_path / "elsewhere" / "moved")
    (tmp_path / "sweep" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "sweep" / "circle").symlink_to(tmp_path / "sweep")
    found = states(tmp_path / "sweep")
    assert found["a"] == found["b"] == ("done", "")
    assert found["gone"] == ("damaged", f"a link to {tmp_path}/nowhere, which is not there")
    (tmp_path / "all").mkdir()
    for name in ("a", "b"):
        (tmp_path / "all" / name).symlink_to(tmp_path / "sweep" / name)
    assert set(states(tmp_path / "all").values()) == {("done", "")}


@pytest.mark.parametrize(
    "name", ["config.yaml", "status.json", "manifest.json", "metrics.jsonl", "sensitivity.json",
             "allocation.json", "result.json"],
)  # fmt: skip
def test_what_is_no_small_regular_file_of_json_is_damage(tmp_path, name, monkeypatch):
    def pipe(path):
        os.mkfifo(path)

    def nested(path):
        path.write_text("[" * 9_000)

    def link(path):
        path.symlink_to("/dev/zero")

    def latin(path):
        path.write_bytes(b'{"caf\xe9": 1}')

    def large(path):
        path.write_bytes(b" " * 10_001)

    monkeypatch.setattr("adq_train.reporting.gather.MOST_BYTES", 10_000)
    make_run(tmp_path / "fine")
    for make in (pipe, nested, link, latin, large):
        path = make_run(tmp_path / make.__name__) / name
        path.unlink()
        make(path)
    found = states(tmp_path)
    assert found.pop("fine") == ("done", "")
    for kind, (_, note) in found.items():
        assert note.startswith((name, "status.json is missing or damaged")), (kind, note)


def test_float_models_and_reports_are_no_runs(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "shared" / "pretrain-1").mkdir(parents=True)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("")
    assert list(states(tmp_path)) == ["a"]


def test_unfinished_failed_and_damaged_runs_say_why(tmp_path):
    make_run(tmp_path / "fine")
    make_run(tmp_path / "stopped", state="running", stage="qat", losses=(2.0,))
    make_run(tmp_path / "failed", state="failed", stage="profile", error="no\nluck")
    (make_run(tmp_path / "no-result") / "result.json").unlink()
    (make_run(tmp_path / "half") / "allocation.json").write_text('{"allocator": ')
    (make_run(tmp_path / "no-status") / "status.json").unlink()
    (make_run(tmp_path / "no-config") / "config.yaml").write_text("[1, 2]")
    (tmp_path / "empty").mkdir()
    found = states(tmp_path)
    assert found.pop("fine") == ("done", "")
    assert found.pop("stopped") == (
        "unfinished",
        "stopped or still running in stage qat, 1 of 3 epochs done",
    )
    assert found.pop("failed") == ("failed", "in stage profile: no luck")
    assert found.pop("no-result") == ("damaged", "result.json is missing")
    assert found.pop("no-status") == ("damaged", "status.json is missing or damaged")
    assert found.pop("empty") == ("damaged", "config.yaml is missing")
    assert found.pop("half")[1].startswith("allocation.json is not a bit allocation")
    assert found.pop("no-config")[1].startswith("config.yaml is not the configuration of a run")
    assert found == {}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("result.json", "qat_top1_percent", "<script>"),
        ("result.json", "num_test_images", None),
        ("result.json", "seconds", {"qat": "long"}),
        ("allocation.json", "model_size_bytes", [1]),
        ("allocation.json", "average_weight_bits", True),
        ("allocation.json", "layers", []),
    ],
)
def test_a_figure_that_is_no_number_is_damage(tmp_path, name, field, value):
    path = make_run(tmp_path / "run") / name
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    (run,) = gather([tmp_path])
    assert run.state == "damaged"
    assert name in run.note
    assert field in run.note
    assert (run.result, run.allocation) == (None, None)


def test_what_a_finished_run_can_do_without_is_noted(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "sensitivity.json").unlink()
    (folder / "manifest.json").write_text("[]")
    (folder / "metrics.jsonl").write_text(
        '{"stage": "qat", "epoch": 1, "train_loss": 0.5}\n7\n{"st'
    )
    (run,) = gather([folder])
    assert run.state == "done"
    assert run.note == "manifest.json is missing or damaged; sensitivity.json is missing"
    assert run.final_train_loss == 0.5


def test_a_sensitivity_with_a_hole_is_left_out(tmp_path):
    path = make_run(tmp_path / "run") / "sensitivity.json"
    path.write_text(path.read_text().replace('"3": ', '"5": '))
    (run,) = gather([tmp_path])
    assert (run.state, run.sensitivity) == ("done", None)
    assert run.note == "sensitivity.json is damaged: a layer or a bit-width is missing"


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        gather([tmp_path])
    with pytest.raises(UserError, match="nowhere is not a folder"):
        gather([tmp_path / "nowhere"])
