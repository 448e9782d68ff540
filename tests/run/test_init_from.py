import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import QUICK

from adq_train.errors import UserError
from adq_train.run.init_from import checkpoint_of


def model_of(run_dir, name="last"):
    return torch.load(Path(run_dir, "checkpoints", f"{name}.pt"), weights_only=True)["model"]


def read(run_dir, name):
    return json.loads(Path(run_dir, name).read_text())


def records(run_dir):
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["stage"] == "qat"]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def more(job, finished, no_pictures):
    """Runs from the finished run ``run`` in the working directory."""
    return lambda *arguments: job(*QUICK, "init_from=run", *arguments)


def test_without_training_it_is_the_network_of_the_source(more):
    before = read("run", "result.json")
    assert before["qat_top1_percent"] != before["ptq_top1_percent"]
    outcome = more("trainer.epochs=0", "run_dir=same")
    assert outcome.code == 0, outcome.err
    assert equal(model_of("same"), model_of("run"))
    after = read("same", "result.json")
    assert after["fp_top1_percent"] == before["fp_top1_percent"]
    assert after["ptq_top1_percent"] == before["qat_top1_percent"]
    assert after["qat_top1_percent"] == before["qat_top1_percent"]
    assert read("same", "sensitivity.json")["layers"] == read("run", "sensitivity.json")["layers"]
    assert "calibrated anew" not in outcome.err
    assert "before QAT" in outcome.out
    assert "after calibration" not in outcome.out
    # It can itself be continued, from its own copy of the float model, and one of its files named.
    shutil.rmtree("run")
    shutil.rmtree("outputs")
    again = "init_from=same/checkpoints/best.pt"
    outcome = more(again, "trainer.epochs=0", "pretrain.epochs=9", "run_dir=third")
    assert outcome.code == 0, outcome.err
    assert equal(model_of("third"), model_of("same"))
    assert not Path("outputs").exists(), "no float training"


def test_training_begins_at_the_loss_of_the_source(more, job):
    """Steps of no size show where training begins."""
    still = ("optimizer.lr=1e-12", "quantizer_optimizer.lr=1e-12", "optimizer.weight_decay=0")
    assert more(*still, "run_dir=more").code == 0
    assert job(*QUICK, *still, "run_dir=anew").code == 0
    begun, anew = (records(x)[0]["train_loss"] for x in ("more", "anew"))
    source = records("run")[0]["train_loss"]
    assert begun < source < anew


def test_an_interrupted_one_ends_with_the_same_bits(more):
    for run_dir in ("whole", "resumed"):
        assert more("trainer.epochs=2", f"run_dir={run_dir}").code == 0
    for name in ("status.json", "result.json", "checkpoints/last.pt", "checkpoints/best.pt"):
        Path("resumed", name).unlink()
    outcome = more("trainer.epochs=2", "run_dir=resumed")
    assert "qat: continuing after epoch 1 of 2" in outcome.err
    assert equal(model_of("resumed"), model_of("whole"))


def test_a_run_for_integers_goes_on_from_one_for_float(more, cli):
    """Weights are taken and edges calibrated; between two such runs, edges are taken as well."""
    outcome = more("trainer.epochs=1", "target=int8", "run_dir=whole")
    assert outcome.code == 0, outcome.err
    assert "target: int8, 7 values at 8 bits besides inputs" in outcome.err
    for name in ("status.json", "result.json"):
        Path("whole", name).unlink()
    shutil.copytree("whole", "resumed")
    for name in ("checkpoints/last.pt", "checkpoints/best.pt", "metrics.jsonl"):
        Path("resumed", name).unlink()
    outcome = more("trainer.epochs=1", "target=int8", "run_dir=resumed")
    assert "qat: 1 epochs" in outcome.err
    assert more("trainer.epochs=1", "target=int8", "run_dir=whole").code == 0
    assert equal(model_of("resumed"), model_of("whole"))
    edges = {k: x for k, x in model_of("whole").items() if k.startswith("edge_quantizers")}
    assert len(edges) == 14
    outcome = cli(*QUICK, "target=int8", "init_from=whole", "trainer.epochs=0", "run_dir=same")
    assert "calibrated anew" not in outcome.err
    assert equal(model_of("same"), model_of("whole"))
    assert (
        read("same", "result.json")["qat_top1_percent"]
        == (read("whole", "result.json")["qat_top1_percent"])
    )


def test_other_bits_and_quantizers_are_calibrated_anew_on_the_same_weights(more):
    source = model_of("run")
    for run_dir, change, part in (
        ("bits", "budget.average_weight_bits=2", None),
        ("lsq", "activation_quantizer=lsq", "input_quantizer"),
        ("channel", "weight_quantizer.granularity=channel", "weight_quantizer"),
    ):
        outcome = more(change, "trainer.epochs=0", f"run_dir={run_dir}")
        assert outcome.code == 0, outcome.err
        state = model_of(run_dir)
        anew = {
            line.split("init_from: ")[1].split(" is calibrated anew")[0]
            for line in outcome.err.splitlines()
            if "calibrated anew" in line
        }
        # Another quantizer also measures other sensitivities, and so gets other bits.
        old, new = (
            {x["name"]: x["weight_bits"] for x in read(y, "allocation.json")["layers"]}
            for y in ("run", run_dir)
        )
        assert anew == {
            f"{name}.{kind}"
            for name in old
            for kind in ("weight_quantizer", "input_quantizer")
            if kind == part or old[name] != new[name]
        }
        assert 0 < len(anew) < 2 * len(old)
        for name, value in state.items():
            fresh = name.startswith(tuple(f"{x}." for x in anew))
            fresh |= name.endswith(("running_mean", "running_var", "num_batches_tracked"))
            assert fresh or torch.equal(value, source[name]), name
        # Batch norm after a layer with a new quantizer sees other values.
        assert not torch.equal(state["bn1.running_var"], source["bn1.running_var"])


NORMED = """
from torch.nn.utils import parametrizations, weight_norm
from adq_train.models import CifarResNetModel

class Normed(CifarResNetModel):
    def build(self, num_classes, in_channels):
        network = super().build(num_classes, in_channels)
        parametrizations.weight_norm(network.layer1[0].conv1)
        parametrizations.spectral_norm(network.layer2[0].conv1)
        return network
"""


def test_weights_that_are_made_anew_go_on_as_they_were(job, no_pictures, monkeypatch, tmp_path):
    """Under their own names, so that they train as before."""
    Path("normed_model.py").write_text(NORMED)
    monkeypatch.syspath_prepend(tmp_path)
    own = (*QUICK, "model._target_=normed_model.Normed", "trusted_packages=[normed_model]")
    outcome = job(*own, "run_dir=first")
    assert outcome.code == 0, outcome.err
    outcome = job(*own, "init_from=first", "trainer.epochs=0", "run_dir=same")
    assert outcome.code == 0, outcome.err
    assert "layer1.0.conv1.parametrizations.weight.original0" in model_of("first")
    assert equal(model_of("same"), model_of("first"))
    before, after = (read(x, "result.json")["qat_top1_percent"] for x in ("first", "same"))
    assert after == before
    outcome = job(*own, "init_from=first", "trainer.epochs=1", "run_dir=more")
    assert outcome.code == 0, outcome.err
    assert model_of("more").keys() == model_of("first").keys()


def test_it_is_known_by_what_the_checkpoint_holds(more):
    assert more("trainer.epochs=0", "run_dir=more").code == 0
    shutil.move("run", "moved")
    outcome = more("init_from=moved", "trainer.epochs=0", "run_dir=more")
    assert outcome.code == 0, outcome.err
    assert "all stages of more are done" in outcome.err
    digest = read("more", "manifest.json")["files"]["init_from"]
    outcome = more("init_from=moved", "trainer.epochs=0", f"init_from_sha256={digest}")
    assert outcome.code == 0, outcome.err
    outcome = more("init_from=moved", f"init_from_sha256={'0' * 64}")
    assert f"has {digest}, not 0000" in outcome.err
    assert more("init_from=more", "trainer.epochs=0", "run_dir=other").code == 0
    outcome = more("init_from=other", "trainer.epochs=0", "run_dir=more")
    assert "run_dir: more holds a run with other settings (init_from_sha256" in outcome.err


def test_what_cannot_be_continued_is_said_before_anything_is_trained(more, finished):
    run = finished[1]
    shutil.copytree("run", "unfinished")
    status = Path("unfinished/status.json")
    status.write_text(status.read_text().replace('"done"', '"failed"'))
    shutil.copytree("run", "no_float")
    Path("no_float/checkpoints/float.pt").unlink()
    shutil.copytree("run", "damaged")
    Path("damaged/checkpoints/last.pt").write_bytes(b"x")
    shutil.copytree("run", "empty")
    shutil.rmtree("empty/checkpoints")
    Path("foreign").mkdir()
    shutil.copy(run / "checkpoints" / "last.pt", "alone.pt")
    shutil.rmtree("outputs")
    for arguments, message in (
        (["init_from=none"], "init_from: there is no none;"),
        (["init_from=unfinished"], "init_from: the run in unfinished is not finished"),
        (["init_from=foreign"], "init_from: foreign is not the folder of a run"),
        (["init_from=alone.pt"], "init_from: alone.pt is not in the checkpoints of a run"),
        (["init_from=empty"], "init_from: there is no empty/checkpoints/last.pt"),
        (["init_from=damaged"], "init_from: damaged/checkpoints/last.pt is missing, damaged"),
        (["init_from=no_float"], "float.pt, its float model, is missing or damaged"),
        (["model.width=5"], "has another network (model.width: 4 → 5)"),
        (["data.like=cifar10"], "has another network (data.channels: 1 → 3)"),
        (["init_from=null", "init_from_sha256=ab"], "init_from_sha256: it belongs to"),
    ):
        outcome = more(*arguments, "run_dir=out")
        assert outcome.code != 0
        errors = [x for x in outcome.err.splitlines() if x.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0], errors
        assert "Traceback" not in outcome.err
        assert not Path("out").exists()
        assert not Path("outputs").exists()


def test_an_older_run_needs_its_float_model_as_a_file(more, finished):
    torch.save(torch.load("run/checkpoints/float.pt", weights_only=True)["model"], "float.pt")
    Path("run/checkpoints/float.pt").unlink()
    before = read("run", "result.json")
    outcome = more("pretrain.checkpoint=float.pt", "trainer.epochs=0", "run_dir=more")
    assert outcome.code == 0, outcome.err
    assert read("more", "result.json")["fp_top1_percent"] == before["fp_top1_percent"]
    assert equal(model_of("more"), model_of("run"))


def test_the_checkpoint_that_a_run_names(finished):
    run = finished[1]
    assert checkpoint_of(str(run))[1] == run / "checkpoints" / "last.pt"
    best = run / "checkpoints" / "best.pt"
    assert checkpoint_of(str(best))[1] == best
    with pytest.raises(UserError, match="SHA256SUMS is not in the checkpoints of a run"):
        checkpoint_of(str(run / "checkpoints" / "SHA256SUMS"))
