"""The study of metrics measures the float model that it is given."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adq_train.models import CifarResNetModel

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_metrics.py"
SMALL = (
    "data=synthetic",
    "data.like=digits",
    "data.train_images=64",
    "data.test_images=16",
    "data.validation_images=16",
    "data.calibration_images=16",
    "model=resnet8",
    "model.width=2",
    "bits.candidates=[2,4]",
    "pretrain.epochs=0",
)


def study(folder, *settings):
    command = [sys.executable, SCRIPT, "--metrics", "perturbation", "--output", folder / "study",
               "--allocations", "6", "--qat-allocations", "0"]  # fmt: skip
    return subprocess.run(
        [*map(str, command), "--", *SMALL, f"output_root={folder}", *settings],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_given_checkpoint_is_the_float_model(tmp_path):
    model = CifarResNetModel(depth=8, width=2).build(10, 1)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(10.0))
    torch.save(model.state_dict(), tmp_path / "float.pt")
    done = study(tmp_path, f"pretrain.checkpoint={tmp_path}/float.pt")
    assert done.returncode == 0, done.stderr
    # Its outputs do not depend on the images, so that no layer before the last one matters.
    table = (tmp_path / "study/tables/perturbation.json").read_text()
    assert '"layer1.0.conv1"' in table
    assert study_values(table)["layer1.0.conv1"] == pytest.approx(0, abs=1e-9)


def study_values(table):

    return {x["name"]: x["sensitivity"]["2"] for x in json.loads(table)["layers"]}


def test_a_finished_run_is_no_start(tmp_path):
    done = study(tmp_path, f"init_from={tmp_path}")
    assert done.returncode != 0
    assert "init_from" in done.stderr
    assert "Traceback" not in done.stderr
