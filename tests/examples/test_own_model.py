"""The example folder of a network and a data set of one's own, from training to evaluation."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import adq_train
from adq_train.deploy.packed import packed_bytes, read_packed
from adq_train.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"
TRUST = "trusted_packages=[own_model]"
QUICK = (
    "data.train_images=200", "data.test_images=40", "data.validation_images=20",
    "data.calibration_images=20", "model.width=4", "trainer.epochs=1", "pretrain.epochs=1",
)  # fmt: skip


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The package can be imported, and is forgotten afterwards."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE))
    yield EXAMPLE
    for name in [x for x in sys.modules if x.split(".")[0] == "own_model"]:
        del sys.modules[name]


@pytest.fixture
def train(example, cli, no_pictures):
    """``adq-train`` as the README gives it, made short."""

    def run(*arguments):
        return cli(
            f"--config-dir={example / 'conf'}", "model=own_net", "data=shapes", *QUICK, *arguments
        )

    return run


def test_training_export_and_evaluation_with_trust_of_their_own(train, program):
    pytest.importorskip("onnxruntime")
    assert "add trusted_packages=[own_model]" in train("run_dir=run").err
    outcome = train(TRUST, "run_dir=run")
    assert outcome.code == 0, outcome.err
    files = {"packed": "run/export/model.safetensors", "onnx": "run/export/model.onnx"}
    for form, file in files.items():
        code, _, err = program("adq-export", "run", f"format={form}")
        assert (code, "add trusted_packages=[own_model]" in err) == (1, True)
        assert not Path(file).exists()
        code, out, err = program("adq-export", "run", f"format={form}", TRUST)
        assert (code, err) == (0, ""), err
    result = json.loads(Path("run/result.json").read_text())
    for place in ("run", *files.values()):
        code, _, err = program("adq-eval", place)
        assert (code, "add trusted_packages=[own_model]" in err) == (1, True), err
        code, out, err = program("adq-eval", place, TRUST, "json=true")
        assert (code, err) == (0, "")
        assert json.loads(out)["top1_percent"] == pytest.approx(result["qat_top1_percent"])
        assert "top5_percent" not in json.loads(out)  # of four classes it is always 100
    # Whoever has the network need not trust what the file names.
    from own_model.network import Net

    images = torch.randn(3, 1, 12, 12)
    network = Net(4, 1, width=4)
    expected = adq_train.load_packed(files["packed"], trusted_packages=["own_model"])(images)
    assert torch.equal(adq_train.load_packed(files["packed"], network=network)(images), expected)
    with pytest.raises(UserError, match=r"may name .*add trusted_packages=\[own_model\]"):
        adq_train.load_packed(files["packed"])
    # Trust in a package is none in what else a file may name as a part of its network.
    tables = read_packed(Path(files["packed"]))
    tables.model["width"] = {"_target_": "subprocess.Popen", "args": ["touch", "marker"]}
    Path(files["packed"]).write_bytes(packed_bytes(tables)[0])
    err = program("adq-eval", files["packed"], TRUST)[2]
    assert "a file may not name 'subprocess.Popen'; nothing was imported" in err
    assert not Path("marker").exists()


WRONG = {
    "settings that it has not": (
        ["+model.layers=8", "+model.widht=8"],
        r"(?s)model\.layers: Net has no such setting; it takes width; ~model.layers leaves it out"
        r".*model\.widht: .*did you mean 'width'",
    ),
    "a setting that no file has": (
        ["model.widht=8"],
        r"model\.widht: there is no such setting .*width'.*; where own_model\.network\.Net takes "
        r"it, write \+model\.w",
    ),
    "other classes": (["+model.num_classes=9"], r"model\.num_classes: is 9, but the data has 4; l"),
    "another class": (["model._target_=own_model.network.Nett"], "has no Nett .did you mean 'Net'"),
    "a constructor that fails": (["model.width=-1"], r"model: Net cannot be built \(RuntimeError"),
    "no network": (["model._target_=own_model.data.Shapes"], "neither a subclass of nn.Module of"),
    "a package that is missing": (
        ["model._target_=own_modell.Net", "trusted_packages=[own_model,own_modell]"],
        "install own_modell, or put the folder that holds it in PYTHONPATH",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_with_its_remedy(train, kind):
    arguments, message = WRONG[kind]
    trust = [] if any("trusted" in x for x in arguments) else [TRUST]
    outcome = train(*trust, *arguments)
    assert outcome.code != 0
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.err


def test_outputs_that_are_not_one_for_each_class(train, tmp_path, monkeypatch):
    """A network that takes nothing of the data."""
    (tmp_path / "fixed_net.py").write_text(
        "from torch import nn\n"
        "class Fixed(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 7))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trust = "trusted_packages=[own_model,fixed_net]"
    fixed = ("model._target_=fixed_net.Fixed", "~model.width", trust)
    outcome = train(*fixed)
    assert "its output for 1 input(s) has shape (1, 7), but the data has 4 classes" in outcome.err


def test_choices_of_ones_own_need_a_folder(cli):
    outcome = cli("model=own_net")
    assert "or give --config-dir=<folder> with model/<choice>.yaml in it" in outcome.err


def test_the_readme_gives_the_commands_that_are_tested():
    text = (EXAMPLE / "README.md").read_text()
    for command in (
        f"adq-train --config-dir=conf model=own_net data=shapes '{TRUST}' run_dir=run",
        f"adq-export run '{TRUST}'",
        f"adq-eval run/export/model.safetensors '{TRUST}'",
    ):
        assert f"\n{command}\n" in text
