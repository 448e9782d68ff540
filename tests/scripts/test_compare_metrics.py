"""The study of metrics measures the float model that it is given."""

import json
import runpy
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


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the script with some settings; gives what it says where it ends early."""

    def run(*settings):
        words = ("--metrics", "perturbation", "--output", tmp_path / "study",
                 "--allocations", "6", "--qat-allocations", "0")  # fmt: skip
        settings = ("--", *SMALL, f"output_root={tmp_path}", *settings)
        monkeypatch.setattr(sys, "argv", [str(x) for x in (SCRIPT, *words, *settings)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    return run


def test_the_given_checkpoint_is_the_float_model(study, tmp_path):
    model = CifarResNetModel(depth=8, width=2).build(10, 1)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(10.0))
    torch.save(model.state_dict(), tmp_path / "float.pt")
    assert study(f"pretrain.checkpoint={tmp_path}/float.pt") is None
    # Its outputs do not depend on the images, so that no layer before the last one matters.
    table = (tmp_path / "study/tables/perturbation.json").read_text()
    assert '"layer1.0.conv1"' in table
    assert study_values(table)["layer1.0.conv1"] == pytest.approx(0, abs=1e-9)


def study_values(table):
    return {x["name"]: x["sensitivity"]["2"] for x in json.loads(table)["layers"]}


def test_a_finished_run_is_no_start(study, tmp_path):
    assert study(f"init_from={tmp_path}").startswith("error: init_from")
