import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import QUICK
from PIL import Image

import adq_train
from adq_train.artifacts import BitAllocation, RunResult
from adq_train.cli.export import export_main
from adq_train.cli.program import PROGRAMS
from adq_train.data.base import InputFormat, Pixels
from adq_train.deploy.evaluable import Evaluable
from adq_train.deploy.trained import open_run, trained_network
from adq_train.errors import UserError
from adq_train.reporting.summary import Counts, total_bytes


@pytest.fixture(scope="module")
def exported(finished_run):
    """Files of a run, written by the command."""
    for arguments in ([], ["format=onnx"], ["format=qonnx"]):
        before = sys.argv
        sys.argv = ["adq-export", str(finished_run), *arguments]
        try:
            export_main()
        finally:
            sys.argv = before
    names = ("model.safetensors", "model.onnx", "model.qonnx.onnx")
    return finished_run, *(finished_run / "export" / name for name in names)


def test_the_trained_network_comes_back(finished_run):
    run = open_run(finished_run)
    result = RunResult.from_json((finished_run / "result.json").read_text())
    data = run.load_data()
    network = trained_network(run)
    hits = [(network(x).argmax(1) == y).float() for x, y in data.test.epoch(0)]
    assert 100 * torch.cat(hits).mean().item() == pytest.approx(result.qat_top1_percent)


def test_the_packed_file_is_the_trained_network(exported):
    run, packed, *_ = exported
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        expected = trained_network(open_run(run))(images)
        assert torch.equal(adq_train.load_packed(packed)(images), expected)


def test_the_report_states_sizes(finished_run, program, tmp_path):
    output = tmp_path / "new" / "x.safetensors"
    code, out, _ = program("adq-export", finished_run, f"output={output}", "json=true")
    assert code == 0
    report = json.loads(out)
    promised = BitAllocation.from_json((finished_run / "allocation.json").read_text())
    sizes = report["sizes"]
    assert sizes["codes"] == promised.model_size_bytes
    assert report["promised_bytes"] == sizes["codes"] + sizes["tables"] + sizes["floats"]
    counts = json.loads((finished_run / "manifest.json").read_text())["model"]
    assert report["promised_bytes"] == total_bytes(promised, Counts(**counts))
    assert report["file_bytes"] == output.stat().st_size
    assert report["compression"] == report["float32_bytes"] / report["file_bytes"]
    state = trained_network(open_run(finished_run)).state_dict()
    plain = [v for k, v in state.items() if v.is_floating_point() and "quantizer" not in k]
    assert report["float32_bytes"] == 4 * sum(x.numel() for x in plain)
    code, out, _ = program("adq-export", finished_run, f"output={output}", "fold_batch_norm=true")
    assert code == 0
    assert "folded    7 batch norms" in out
    assert f"size      {report['file_bytes']:,}" not in out


def test_every_form_has_the_accuracy_of_the_run(exported, program):
    result = RunResult.from_json((exported[0] / "result.json").read_text())
    for path, form in zip(exported, ("run", "packed", "onnx"), strict=False):
        code, out, err = program("adq-eval", path, "json=true")
        assert (code, err) == (0, "")
        (line,) = out.splitlines()
        row = json.loads(line)
        assert list(row) == ["form", "top1_percent", "top5_percent", "num_images"]
        assert (row["form"], row["num_images"]) == (form, 64)
        assert row["top1_percent"] == pytest.approx(result.qat_top1_percent)
        assert row["top5_percent"] == pytest.approx(result.qat_top5_percent)


def test_all_forms_stand_side_by_side(exported, program):
    result = RunResult.from_json((exported[0] / "result.json").read_text())
    code, out, err = program("adq-eval", exported[0], "all_forms=true", "json=true")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [x["form"] for x in rows] == ["run", "packed", "onnx", "qonnx"]
    assert [x["path"] for x in rows] == list(map(str, exported))
    assert [x.get("bytes") for x in rows] == [None, *(x.stat().st_size for x in exported[1:])]
    assert {x["num_images"] for x in rows} == {64}
    assert [x["different"] for x in rows[:3]] == [0, 0, 0]
    assert rows[0]["top1_percent"] == pytest.approx(result.qat_top1_percent)
    assert all(x["milliseconds"] > 0 for x in rows)


def test_a_form_that_cannot_be_evaluated_gets_a_line(exported, program, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(exported[0], run)
    (run / "export" / "model.qonnx.onnx").unlink()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, out, err = program("adq-eval", run, "all_forms=true")
    assert (code, err) == (0, "")
    assert re.search(r"^onnx: .*package onnxscript; pip install 'adq-train\[export\]'$", out, re.M)
    assert re.search(r"^packed +\S+ % +0 +[\d,]+ +[\d.]+$", out, re.M)
    packed = run / "export" / "model.safetensors"
    packed.write_bytes(packed.read_bytes()[:-1])
    code, out, err = program("adq-eval", run, "all_forms=true")
    assert code == 1
    assert re.search(r"^packed: .*model\.safetensors is damaged", out, re.M)
    assert "could not evaluate packed" in err


def test_another_data_set_is_noted(exported, program):
    code, out, err = program("adq-eval", exported[1], "data=digits", "data.test_images=50")
    assert code == 0
    assert "digits" in out
    assert "not the data that the model was trained on" in err
    code, _, err = program("adq-eval", exported[1], "data=synthetic", "data.like=cifar10")
    assert code == 1
    assert "expects images of (1, 8, 8)" in err


def test_a_file_of_another_program_ends_with_one_line(program, tmp_path):
    pytest.importorskip("onnxruntime")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    path = tmp_path / "other.onnx"
    torch.onnx.export(network.eval(), (torch.zeros(1, 1, 8, 8),), path, dynamo=False)
    for data in (["data=digits"], ["data=synthetic", "data.like=cifar10"]):
        code, _, err = program("adq-eval", path, "batch_size=1", *data)
        assert code == 1
        (line,) = err.splitlines()
        assert re.match("error: data: the model expects images of .1, 8, 8. in 5 classes", line)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_images_of_ones_own_are_classified(exported, program, tmp_path, monkeypatch, index):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b.png", "a.png"):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 20), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    code, out, _ = program("adq-eval", exported[index], f"predict={tmp_path}", "json=true")
    assert code == 0
    rows = json.loads(out)["predictions"]
    assert [row["image"] for row in rows] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert len(rows[0]["classes"]) == 5
    assert rows[0]["classes"] == sorted(rows[0]["classes"], key=lambda x: -x[1])
    assert sum(p for _, p in rows[0]["classes"]) <= 1 + 1e-6
    _, out, _ = program("adq-eval", exported[index], "predict=~/a.png")
    label, probability = rows[0]["classes"][0]
    assert out.startswith(f"{tmp_path / 'a.png'}  {label} {100 * probability:.1f} %")


def test_names_in_a_file_steer_no_terminal(program, monkeypatch, tmp_path):
    image = tmp_path / "a\x1b[2J\n.png"
    Image.new("L", (8, 8)).save(image)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    pixels = Pixels((100.0,), (50.0,))
    expects = InputFormat(2, (1, 8, 8), ("\x1b]0;title\x07", "cat\nfake  dog 99.0 %"), pixels)
    opened = Evaluable("packed", network.eval(), expects, None, None)
    monkeypatch.setattr("adq_train.deploy.evaluable.open_path", lambda *_: opened)
    _, out, err = program("adq-eval", "x", f"predict={tmp_path}")
    (line,) = out.splitlines()
    assert err == ""
    assert r"a\x1b[2J\n.png  " in line
    assert r"\x1b]0;title\x07 " in line
    assert r"cat\nfake  dog 99.0 % " in line
    assert "\x1b" not in program("adq-eval", tmp_path / "\x1b[2J")[2]


def test_paths_may_begin_at_home(finished_run, program, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(finished_run)
    code, out, _ = program("adq-export", "~/run", "output=~/x.safetensors")
    assert code == 0
    assert str(tmp_path / "x.safetensors") in out
    assert (tmp_path / "x.safetensors").is_file()
    root = program("adq-eval", "~/x.safetensors", "data=imagenet", "data.root=~/nowhere")[2]
    assert f"{tmp_path}/nowhere" in root


def test_integers_from_a_run_to_its_classes(finished_run, cli, program, tmp_path):
    pytest.importorskip("ai_edge_litert")
    code, _, err = program("adq-export", finished_run, "format=tflite")
    assert code == 1
    assert "not one of target=int8" in err
    assert not (finished_run / "export" / "model.tflite").exists()
    made = cli(*QUICK, f"init_from={finished_run}", "target=int8", "trainer.epochs=0", "run_dir=r")
    assert made.code == 0
    run = tmp_path / "r"
    code, out, _ = program("adq-export", run, "format=tflite", "tolerance=0.1")
    assert code == 0
    assert re.search(r"verified  in LiteRT on 64 test images: (the same|another top-1 on)", out)
    figures = []
    for path in (run, run / "export" / "model.tflite"):
        code, out, _ = program("adq-eval", path, "json=true")
        figures.append(json.loads(out))
    assert [x["form"] for x in figures] == ["run", "tflite"]
    assert figures[0]["top1_percent"] == pytest.approx(figures[1]["top1_percent"], abs=5)
    assert figures[1]["num_images"] == 64


class Other(torch.nn.Module):
    """A file that answers with something else."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images):
        return self.change(len(images))


def test_a_file_with_other_classes_is_not_kept(finished_run, program, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    other = Other(lambda count: torch.eye(10)[torch.arange(count) % 10])
    monkeypatch.setattr("adq_train.deploy.verify.FileHere", lambda path, runtime: other)
    monkeypatch.setattr("adq_train.deploy.onnx.onnx_bytes", lambda *_: b"x")
    output = tmp_path / "model.onnx"
    code, _, err = program("adq-export", finished_run, "format=onnx", f"output={output}")
    assert code == 1
    assert re.search(
        r"onnxruntime gives another top-1 class, or value where there is one, on \d\d of 64 "
        r".*tolerance=0\.001 allows",
        err,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_packed_file_that_differs_is_not_kept(finished_run, program, tmp_path, monkeypatch):
    other = Other(lambda count: torch.zeros(count, 10))
    monkeypatch.setattr("adq_train.deploy.packed_form.run", lambda path, source: other)
    code, _, err = program("adq-export", finished_run, f"output={tmp_path / 'x'}")
    assert code == 1
    assert "are not the trained network's" in err
    assert list(tmp_path.iterdir()) == []


def test_unfinished_and_other_folders_are_refused(finished_run, tmp_path):
    with pytest.raises(UserError, match="not the folder of a run"):
        open_run(tmp_path)
    for name in ("config.yaml", "sensitivity.json", "allocation.json", "manifest.json"):
        (tmp_path / name).write_bytes((finished_run / name).read_bytes())
    with pytest.raises(UserError, match="not finished"):
        open_run(tmp_path)
    (tmp_path / "status.json").write_text('{"state": "done"}')
    with pytest.raises(UserError, match=r"last\.pt is missing, damaged"):
        trained_network(open_run(tmp_path))
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("adq_train.models.", "os."))
    with pytest.raises(UserError, match="not from a trusted package"):
        open_run(tmp_path)
    (tmp_path / "config.yaml").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_run(tmp_path)


def test_the_command_line_is_checked_at_once(program):
    code, _, err = program("adq-export", "run", "formt=onnx", "float_type=int8", "json=maybe", "x")
    assert code == 2
    for part in ("4 errors", "did you mean 'format'", "float32, float16", "true or false", "'x'"):
        assert part in err
    code, _, err = program("adq-eval", "batch_size=0")
    assert code == 2
    assert "batch_size: must be a whole number, at least 1, got '0'" in err
    assert "give the path first" in err


def test_help(program):
    for name in PROGRAMS:
        code, out, _ = program(name, "--help")
        assert code == 0
        assert out.startswith(f"{name}")
        assert program(name).code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere"),
        (["{packed}", "data=cifr10"], "did you mean 'cifar10'"),
        (["{packed}", "data._target_=os.system"], "cannot be changed"),
        (["{packed}", "data.test_images=0"], "test_images must"),
        (["{packed}", "predict={packed}"], "cannot read the image"),
        (["{packed}", "all_forms=true"], "is no folder; give that of a run"),
        (["{run}", "all_forms=true", "predict=x"], "leave predict out"),
        (["{packed}", "predict={empty}"], "there is no image in"),
    ],
)
def test_errors_of_evaluation(exported, program, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"run": exported[0], "packed": exported[1], "empty": tmp_path / "empty"}
    code, _, err = program("adq-eval", *(x.format(**places) for x in arguments))
    assert code == 1
    assert message in err
