"""The command line as a user meets it: help, errors by their text, sweeps, traces left."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml
from helpers import QUICK

from adq_train.cli.jobs import Outcome
from adq_train.messages import configure_logging


def config_of(cli, *arguments):
    outcome = cli("--cfg", "job", *arguments)
    assert outcome.code == 0, outcome.err
    return yaml.safe_load(outcome.out)


def test_flags_may_stand_between_settings(cli):
    outcome = cli("experiment=quickstart", "--cfg", "job", "seed=7", "+ablation=no_adaptation")
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load(outcome.out)
    assert (config["seed"], config["weight_quantizer"]["adaptation"]) == (7, "none")


def test_help_is_written_for_a_person(cli):
    outcome = cli("--help")
    assert outcome.code == 0
    assert re.search(r"data: .*cifar10, cifar100, digits.*, synthetic", outcome.out)
    assert "experiment: quickstart, resnet18_imagenet" in outcome.out
    examples = outcome.out.split("Examples")[1].split("Usage")[0].strip().splitlines()
    assert len(examples) == 5


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--cfg", "job"], ["-sc", "query=bash"], ["trainer.epoch=3"]],
    ids=["help", "cfg", "completion", "typo"],
)
def test_torch_is_not_imported_to_answer(arguments, tmp_path):
    program = (
        "import sys\n"
        f"sys.argv = ['adq-train', *{arguments!r}]\n"
        "from adq_train.cli.program import act\n"
        "act('adq-train')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"COMP_LINE": "adq-train dat", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr


def test_completion_offers_the_groups(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "adq_train", "-sc", "query=bash"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"COMP_LINE": "adq-train weight_q", "PATH": "/usr/bin:/bin"},
    )
    assert "weight_quantizer=" in done.stdout


def test_tab_completes_in_bash(tmp_path):
    """What pressing the key does, in a bash that has read what ``-sc install=bash`` prints."""
    (tmp_path / "adq-train").write_text(
        f"#!{sys.executable}\nfrom adq_train.cli.program import train\ntrain()\n"
    )
    (tmp_path / "adq-train").chmod(0o755)
    script = """
        eval "$(adq-train -sc install=bash)"
        COMP_LINE="adq-train model=resnet2"; COMP_POINT=${#COMP_LINE}
        COMP_WORDS=($COMP_LINE); COMP_CWORD=1
        $(complete -p adq-train | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert done.stdout.split() == ["model=resnet20", "model=resnet20_preact"], done.stderr


def test_plus_experiment_is_experiment(cli):
    chosen = config_of(cli, "experiment=resnet18_imagenet")
    assert config_of(cli, "+experiment=resnet18_imagenet") == chosen
    assert chosen["budget"]["average_weight_bits"] == 2.81
    assert chosen["model"] == {
        "_target_": "adq_train.models.TorchvisionModel",
        "name": "resnet18",
        "weights": "IMAGENET1K_V1",
    }


def test_an_ablation_wins_over_the_experiment(cli):
    assert (
        config_of(cli, "+experiment=quickstart", "+ablation=no_adaptation")["weight_quantizer"][
            "adaptation"
        ]
        == "none"
    )


def test_an_ablation_wins_over_the_comparison(cli):
    arguments = ["+experiment=quickstart", "+comparison=adq_mixed", "+ablation=uniform_bits"]
    for order in (arguments, arguments[::-1]):
        config = config_of(cli, *order)
        assert config["allocator"]["_target_"].endswith("UniformAllocator")
        assert config["budget"]["average_weight_bits"] == 2.81


def test_the_command_line_wins_over_both(cli):
    config = config_of(
        cli,
        "experiment=quickstart",
        "ablation=no_adaptation",
        "weight_quantizer.adaptation=quantile",
    )
    assert config["weight_quantizer"]["adaptation"] == "quantile"


ERRORS = {
    "a typo in a key": (
        ["trainer.epoch=3"],
        "trainer.epoch: there is no such setting (did you mean 'trainer.epochs'?)",
    ),
    "a typo in a group": (
        ["modle=resnet8"],
        "modle: there is no such setting (did you mean 'model'?)",
    ),
    "a typo in a choice": (
        ["data=cifr10"],
        "data=cifr10: there is no such choice (did you mean 'cifar10'?); choose from ",
    ),
    "a typo in a knob": (
        ["weight_quantizer.dekay=0.9"],
        "weight_quantizer.dekay: there is no such setting (did you mean 'weight_quantizer.decay'?)",
    ),
    "no choice": (["ablation=null"], "ablation=None: there is no such choice"),
    "no override at all": (
        ["trainer.epochs"],
        "'trainer.epochs' is not of the form key=value; write trainer.epochs=VALUE",
    ),
    "a choice alone": (
        ["quickstart"],
        "'quickstart' is not of the form key=value; write experiment=",
    ),
    "spaces around =": (["trainer.epochs", "=", "3"], "'=': write setting=value, without spaces"),
    "an open bracket": (
        ["bits.pinned={fc:4"],
        "bits.pinned: cannot read '{fc:4'; a bracket { is not",
    ),
    "no list": (["bits.candidates=3"], "bits.candidates: must be a list, such as [2,3], got 3"),
    "a flag": (
        ["--epochs=3"],
        "--epochs=3: there is no such flag; a setting is written epochs=VALUE",
    ),
    "an added key": (["+foo=1"], "foo: there is no such setting"),
    "an added key in a section": (["+budget.bits=1"], "budget.bits: there is no such setting"),
    "an added knob": (["+optimizer.lrr=1"], "optimizer.lrr: optimizer has no such setting"),
    "a wrong type in a section": (
        ["trainer.epochs=many"],
        "trainer.epochs: must be a whole number, got 'many'",
    ),
    "a wrong type of a knob": (
        ["weight_quantizer.decay=high"],
        "weight_quantizer.decay: must be a number, got 'high'",
    ),
    "a value out of range": (["trainer.epochs=-1"], "trainer.epochs: must be at least 0, got -1"),
    "a knob out of range": (
        ["weight_quantizer.decay=1.5"],
        "weight_quantizer.decay must be at least 0 and less than 1, got 1.5",
    ),
    "an unknown word": (
        ["trainer.select=first"],
        "trainer.select: must be one of last, best, got 'first'",
    ),
    "nan": (["optimizer.lr=nan"], "optimizer.lr: must be a finite number, got nan"),
    "nan in a section": (["budget.average_weight_bits=nan"], "budget.average_weight_bits: must be"),
    "a missing value": (["data=imagenet"], "data.root: a value is required; give data.root=…"),
    "no budget": (["budget.average_weight_bits=null"], "budget: at least one limit is required"),
    "candidates out of order": (["bits.candidates=[4,2]"], "bits.candidates: must be ascending"),
    "a candidate out of range": (
        ["bits.candidates=[2,16]"],
        "bits.candidates: must be at least 2 and",
    ),
    "a device that is not there": (
        ["trainer.device=cuda:99"],
        "trainer.device: 'cuda:99' cannot be",
    ),
    "a foreign target": (
        ["weight_quantizer._target_=os.system"],
        "weight_quantizer._target_: os.system is not from a trusted package",
    ),
    "a target that does not exist": (
        ["allocator._target_=adq_train.allocation.nothing.Nothing"],
        "allocator._target_: cannot import adq_train.allocation.nothing.Nothing",
    ),
    "a budget below the candidates": (
        ["budget.average_weight_bits=1.5"],
        "budget.average_weight_bits: 1.5 cannot be reached; with bits.candidates=[2, 3, 4] the "
        "least is 2 and the most 4",
    ),
    "a size below the candidates": (
        ["budget.model_size_bytes=100"],
        "budget.model_size_bytes: 100 cannot be reached",
    ),
    "an unknown layer": (
        ["bits.pinned={layer1.0.conv3: 4}"],
        "bits.pinned: no layer is called 'layer1.0.conv3' (did you mean 'layer1.0.conv",
    ),
    "bits out of range": (["bits.pinned={fc: 9}"], "bits.pinned: must be at least 2 and at most 8"),
    "a missing data set": (
        ["data=fashion_mnist", "data.root=."],
        "data.root: . does not hold Fashion",
    ),
    "missing image folders": (
        ["data=imagenet", "data.root=nowhere"],
        "data.root: nowhere/train is not a folder of classes",
    ),
    "a missing checkpoint": (
        ["pretrain.checkpoint=float.pt"],
        "pretrain.checkpoint: there is no file float.pt",
    ),
    "a precision that does not exist": (
        ["trainer.precision=fp8"],
        "trainer.precision: must be one of float32, tf32, bf16, fp16, got 'fp8'",
    ),
    "an average that forgets nothing": (
        ["trainer.weight_average_decay=1"],
        "trainer.weight_average_decay: must be at least 0 and less than 1, got 1.0",
    ),
    "a teacher with no say": (
        ["distillation=logits", "distillation.weight=0"],
        "distillation.weight must be more than 0 and at most 1, got 0",
    ),
    "a missing teacher": (
        ["distillation=logits", "distillation.checkpoint=teacher.pt"],
        "distillation.checkpoint: there is no file teacher.pt",
    ),
    "too much held out": (
        ["data.validation_images=1800"],
        "leave none of the 1347 training images",
    ),
    "an unwritable folder": (
        ["output_root=/proc/adq"],
        "cannot write to /proc/adq",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_is_one_message_and_leaves_nothing(cli, tmp_path, arguments, message):
    outcome = cli("pretrain.epochs=1", "trainer.epochs=1", *arguments)
    assert outcome.code != 0
    assert message in outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    assert outcome.out == ""
    assert len([line for line in outcome.err.splitlines() if "error" in line]) == 1
    assert list(tmp_path.iterdir()) == []


def test_all_errors_of_the_command_line_at_once(cli):
    outcome = cli("trainer.epoch=3", "data=cifr10", "seed=one")
    assert outcome.err.startswith("3 errors:")


def test_all_errors_of_the_values_at_once(cli):
    outcome = cli(
        "trainer.epochs=-1", "weight_quantizer.decay=2", "model.depth=9", "+foo=1", "data=imagenet"
    )
    assert outcome.err.startswith("5 errors:")
    for name in ("trainer.epochs", "weight_quantizer.decay", "model.depth", "foo", "data.root"):
        assert name in outcome.err


def test_a_checkpoint_of_another_model(cli, tmp_path):
    import torch

    from adq_train.models import CifarResNet

    torch.save(CifarResNet(8, 8, 10, 1).state_dict(), tmp_path / "narrow.pt")
    outcome = cli("experiment=quickstart", "pretrain.checkpoint=narrow.pt")
    assert outcome.code != 0
    assert "narrow.pt does not fit the model: conv1.weight has shape (8, 1, 3, 3)" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["narrow.pt"]


def test_debug_shows_the_traceback(cli):
    assert "Traceback" in cli("trainer.epochs=-1", "debug=true").err


def test_dry_run_leaves_no_trace(cli, tmp_path):
    outcome = cli("experiment=quickstart", "dry_run=true")
    assert outcome.code == 0, outcome.err
    assert "dry run passed: every stage ran" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
def test_a_sweep_goes_on_after_a_failure_and_says_which(cli, tmp_path):
    outcome = cli("-m", *QUICK, "budget.average_weight_bits=1.5,2.5")
    assert outcome.code == 1
    assert "1 of 2 runs are done" in outcome.err
    lines = outcome.err.splitlines()
    (failed,) = [i for i, line in enumerate(lines) if line.startswith("failed: ")]
    assert "budget.average_weight_bits=1.5" in lines[failed]
    assert "budget.average_weight_bits: 1.5 cannot be reached" in lines[failed + 1]
    assert lines[failed + 2] == "the same command does only these again"
    assert outcome.out.count("Top-1 accuracy") == 1
    runs = list((tmp_path / "outputs" / "quickstart").iterdir())
    assert len(runs) == 1
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    assert config["budget"]["average_weight_bits"] == 2.5
    manifest = json.loads((runs[0] / "manifest.json").read_text())
    assert manifest["command"] == ["adq-train", *QUICK, "budget.average_weight_bits=2.5"]


@pytest.mark.usefixtures("no_pictures")
def test_a_sweep_again_does_only_what_is_unfinished(cli):
    sweep = ("-m", *QUICK, "ablation=no_adaptation,uniform_bits")
    assert "qat:" in cli(*sweep).err
    again = cli(*sweep)
    assert again.code == 0
    assert again.err.count("are done; delete it to run it anew") == 2
    assert "qat:" not in again.err


def test_the_grid_sweeps_without_a_flag(cli, monkeypatch):
    seen = []

    def run_jobs(jobs):
        seen.extend(jobs)
        return [Outcome(job.name, 0) for job in jobs]

    monkeypatch.setattr("adq_train.cli.train.run_jobs", run_jobs)
    outcome = cli(*QUICK, "ablation=grid")
    assert outcome.code == 0, outcome.err
    assert "32 of 32 runs are done" in outcome.err
    assert len({job.overrides for job in seen}) == 32
    for job, initialization, lsq in ((seen[0], "kmeans", False), (seen[-1], "random", True)):
        cfg = job.configuration()
        assert cfg.weight_quantizer.initialization == initialization
        assert ("Lsq" in cfg.activation_quantizer._target_) is lsq
        assert cfg.model.width == 4


def test_a_user_s_own_experiments(cli, tmp_path, monkeypatch):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text("# @package _global_\ntrainer:\n  epochs: 7\n")
    assert config_of(cli, "--config-dir", "mine", "experiment=tiny")["trainer"]["epochs"] == 7
    assert "did you mean 'tiny'" in cli("--config-dir", "mine", "experiment=tinny").err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_of(cli, "--config-dir=~/mine", "experiment=tiny")["trainer"]["epochs"] == 7


def test_the_flag_of_a_sweep_may_come_last(cli, monkeypatch):
    monkeypatch.setattr("adq_train.run.pipeline.run", lambda *_: None)
    assert "2 of 2 runs are done" in cli("seed=0,1", "-m").err


def test_a_mistake_of_the_program_does_not_stop_a_sweep(cli, monkeypatch):
    def fail_once(cfg, *_):
        if cfg.seed == 0:
            raise RuntimeError("a shape\nof the past")

    monkeypatch.setattr("adq_train.run.pipeline.run", fail_once)
    outcome = cli("-m", "seed=0,1")
    assert outcome.code == 1
    assert "failed: seed=0\n        RuntimeError: a shape …\n" in outcome.err


def test_a_full_disk_is_told_as_one(cli, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("adq_train.run.pipeline.run", write)
    outcome = cli("seed=0")
    assert outcome.code == 1
    assert "error: the disk is full" in outcome.err
    assert "free some space, and the same command continues" in outcome.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_its_code_and_the_command_that_continues(cli, monkeypatch, number):
    monkeypatch.setattr("adq_train.run.pipeline.run", lambda *_: os.kill(os.getpid(), number))
    outcome = cli("-m", "seed=0,1", "trainer.epochs=3")
    assert outcome.code == 128 + number
    assert f"stopped by {number.name}; what is done is kept, continue with\n" in outcome.err
    assert "  adq-train -m seed=0,1 trainer.epochs=3\n" in outcome.err
    assert "run 2" not in outcome.err


def test_a_quiet_process_is_quiet_whoever_spoke_before(capsys):
    configure_logging()
    logging.getLogger("adq_train").info("said once")
    configure_logging(quiet=True)
    logging.getLogger("adq_train").info("never said")
    assert capsys.readouterr().err == "said once\n"
