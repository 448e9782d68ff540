"""scripts/reproduce.sh, with programs in place of ours that write down how they were called."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers import problems_of

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce.sh"
RECORD = '#!/bin/sh\nfor x in "$(basename "$0")" "$@"; do printf "%s\\t" "$x"; done >>"$CALLS"\n'


@pytest.fixture
def reproduce(tmp_path):
    """Runs the script; gives its exit code and the calls that it made."""

    def run(*arguments, train_fails=False):
        for name in ("adq-train", "adq-report"):
            program = tmp_path / name
            ending = "exit 1\n" if train_fails and name == "adq-train" else ""
            program.write_text(f'{RECORD}echo >>"$CALLS"\n{ending}')
            program.chmod(0o755)
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {**os.environ, "BIN": str(tmp_path), "CALLS": str(calls)}
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
        )
        return done.returncode, [line.split("\t")[:-1] for line in calls.read_text().splitlines()]

    return run


def choices(group):
    return {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}


def test_an_ablation_is_one_sweep_of_every_single_toggle(reproduce):
    code, (train, report) = reproduce("ablation", "quickstart", "0,1", "output_root=/o/x")
    assert code == 0
    assert train[:2] == ["adq-train", "-m"]
    assert train[3:] == ["experiment=quickstart", "seed=0,1", "output_root=/o/x"]
    group, names = train[2].split("=")
    assert (group, set(names.split(","))) == ("ablation", choices("ablation") - {"grid"})
    assert problems_of(train[2:], sweep=True) == []
    assert report == [
        "adq-report",
        "/o/x/quickstart/ablation=*",
        "output=/o/x/reports/ablation-quickstart",
    ]


def test_a_comparison_sweeps_the_bits_of_all_but_the_mixed_ones(reproduce):
    code, (uniform, mixed, report) = reproduce("comparison", "resnet20_cifar10")
    assert code == 0
    several = {x for x in choices("comparison") if x.startswith("adq_mixed")}
    swept = [set(x[2].removeprefix("comparison=").split(",")) for x in (uniform, mixed)]
    assert swept == [choices("comparison") - several, several]
    shared = ["experiment=resnet20_cifar10", "seed=0,1,2"]
    assert uniform[3:] == ["budget.average_weight_bits=2,3,4", *shared]
    assert mixed[3:] == ["budget.average_activation_bits=3,4", *shared]
    assert problems_of(uniform[2:], sweep=True) == problems_of(mixed[2:], sweep=True) == []
    assert report[1].startswith("outputs/resnet20_cifar10/comparison=")


def test_a_taught_table_adds_its_rows_to_those_of_the_comparison(reproduce):
    code, (uniform, mixed, report) = reproduce("taught", "quickstart", "0", "distillation.weight=1")
    assert code == 0
    for train in (uniform, mixed):
        assert "distillation=teacher" in train
        assert train[-1] == "distillation.weight=1"
        assert problems_of(train[2:], sweep=True) == []
    assert report == [
        "adq-report",
        "outputs/quickstart/comparison=*",
        "outputs/quickstart/distillation=*",
        "output=outputs/reports/taught-quickstart",
    ]


def test_allocations_of_one_size(reproduce):
    code, (*sweeps, report) = reproduce("allocation", "quickstart", "0")
    assert code == 0
    size = ["budget.average_weight_bits=3", "budget.average_activation_bits=3"]
    metrics = choices("sensitivity") - {"from_file", "learned"}
    assert set(sweeps[0][2].removeprefix("sensitivity=").split(",")) == metrics
    assert [x[3:] for x in sweeps] == [
        ["allocator=ilp", *size, "experiment=quickstart", "seed=0"],
        [*size, "experiment=quickstart", "seed=0"],
        ["allocator.seed=0,1,2,3,4", *size, "experiment=quickstart", "seed=0"],
    ]
    assert all(problems_of(x[2:], sweep=True) == [] for x in sweeps)
    folders = [f"outputs/quickstart/{x}=*" for x in ("sensitivity", "allocator")]
    assert report == ["adq-report", *folders, "output=outputs/reports/allocation-quickstart"]


def test_a_failure_is_reported_and_returned(reproduce):
    code, calls = reproduce("comparison", "quickstart", train_fails=True)
    assert code == 1
    assert [call[0] for call in calls] == ["adq-train", "adq-train", "adq-report"]


@pytest.mark.parametrize("arguments", [(), ("ablation",), ("tables", "quickstart")])
def test_wrong_words_show_the_usage(reproduce, arguments):
    assert reproduce(*arguments) == (2, [])
