"""Kills runs at random moments and compares what they end with to runs that nobody killed.

    python scripts/kill_test.py --kills 50 --output /tmp/kill_test

A run is started, one of its processes gets SIGKILL (or, now and then, all of them SIGTERM), and the
same command is started again, until the run is done; then the next run begins. Half of the kills
wait for a stage that has been hit least; the others come at any moment. At the end every run must
have the bits of one without an interruption: weights, codebooks, thresholds, optimizer, metrics and
figures, all but times.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SETTINGS = (
    "experiment=quickstart",
    "data=synthetic",
    "data.like=digits",
    "data.train_images=464",
    "data.test_images=64",
    "data.validation_images=32",
    "data.calibration_images=32",
    "model.width=4",
    "pretrain.epochs=3",
    "trainer.epochs=3",
    "trainer.batch_size=33",
    "trainer.eval_batch_size=10",
    "trainer.checkpoint_every_steps=2",
    "trainer.check_ranks=true",
    "output_root=outputs",
    "run_dir=run",
)
STAGES = ("setup", "pretrain", "profile", "allocate", "prepare", "qat", "evaluate")
TIMES = ("seconds", "images_per_second", "data_wait_percent", "peak_memory_bytes")


@dataclass
class Report:
    """What was done and seen.

    Attributes:
        kills: Number of kills by stage.
        signals: Number of kills by what was sent to whom.
        runs: Runs that were done.
        wrong: What did not go as promised.
    """

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    signals: collections.Counter[str] = field(default_factory=collections.Counter)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


def command(processes: int) -> list[str]:
    """The command of a run."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    return [sys.executable, "-m", *(launcher if processes > 1 else []), "adq_train", *SETTINGS]


def start(folder: Path, processes: int) -> subprocess.Popen[str]:
    """Starts the run."""
    folder.mkdir(exist_ok=True, parents=True)
    return subprocess.Popen(
        command(processes),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr.txt").open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def members(folder: Path) -> list[int]:
    """The processes that run in a folder (Linux); torchrun gives each a session of its own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").readlink() == folder.resolve():
                    found.append(int(entry.name))
            except OSError:  # it is gone, a zombie, or somebody else's
                continue
    return sorted(found)


def stage_of(folder: Path, since: float = 0.0) -> str:
    """The stage that the run's folder tells; ``start`` before it was written ``since`` a time."""
    path = folder / "run" / "status.json"
    try:
        if path.stat().st_mtime < since:
            return "start"
        status = json.loads(path.read_text())
    except (OSError, ValueError):
        return "start"
    return "report" if status["stage"] is None else str(status["stage"])


def digest(folder: Path) -> str:
    """SHA-256 of all that a run ends with, but for times."""
    found = hashlib.sha256()
    shared = sorted((folder / "outputs" / "shared").glob("*/"))
    for checkpoints in (folder / "run" / "checkpoints", *(x / "checkpoints" for x in shared)):
        for name in ("last", "best"):
            state = torch.load(checkpoints / f"{name}.pt", weights_only=True)
            for key in ("epoch", "best_top1_percent", "model", "optimizer", "step"):
                _update(found, state[key])
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        _update(found, {k: v for k, v in json.loads(line).items() if k not in TIMES})
    for name in ("sensitivity.json", "allocation.json", "levels.json", "result.json"):
        content = json.loads((folder / "run" / name).read_text())
        _update(found, {k: v for k, v in content.items() if k not in (*TIMES, "stamp")})
    return found.hexdigest()


def _update(found: Any, value: Any) -> None:
    """Takes in nested dictionaries, lists, tensors and plain values."""
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            found.update(f"{key}:".encode())
            _update(found, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _update(found, item)
    else:
        found.update(repr(value).encode())


def strike(
    folder: Path, processes: int, target: str | None, delay: float, choose: random.Random
) -> tuple[str, str] | None:
    """Starts the run and kills it.

    Args:
        folder: Where it runs.
        processes: Of the run.
        target: The stage to wait for; None: any.
        delay: Seconds after that, or after the run has begun.
        choose: Chooses the process and the signal.

    Returns:
        The stage and what was sent; None where the run was done before.

    Raises:
        RuntimeError: The run failed by itself, or processes were left over.
    """
    since = time.time()
    run = start(folder, processes)
    while target and run.poll() is None and stage_of(folder, since) != target:
        time.sleep(0.002)
    while not target and run.poll() is None and stage_of(folder, since) == "start":
        time.sleep(0.002)
    end = time.monotonic() + delay
    while run.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    if run.poll() is not None:
        if run.returncode:
            raise RuntimeError((folder / "stderr.txt").read_text()[-2000:])
        return None
    stage = stage_of(folder, since)
    if choose.random() < 0.15:
        how = "SIGTERM to the run"
        os.kill(run.pid, signal.SIGTERM)
    else:
        victim = choose.choice(members(folder) or [run.pid])
        how = "SIGKILL to " + ("the run" if victim == run.pid else "one of its processes")
        if processes > 1 and victim == run.pid:
            how = "SIGKILL to torchrun"
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            how = "nothing: it was gone"
    run.wait()
    waiting = time.monotonic() + 90
    while left := members(folder):
        if time.monotonic() > waiting:
            raise RuntimeError(f"{how} in {stage} left processes over: {left}")
        time.sleep(0.02)
    return stage, how


def kill_runs(folder: Path, processes: int, kills: int, seed: int = 0) -> Report:
    """Kills runs until there were so many kills, and finishes the last one.

    Args:
        folder: An empty folder.
        processes: Of each run.
        kills: How many.
        seed: Of moments, processes and signals.
    """
    choose, report = random.Random(seed), Report()
    began = time.monotonic()
    whole = start(folder / "whole", processes)
    if whole.wait():
        raise RuntimeError((folder / "whole" / "stderr.txt").read_text()[-2000:])
    duration, expected = time.monotonic() - began, digest(folder / "whole")
    print(f"{processes} processes: {duration:.1f} s without interruption, {expected[:16]}")
    while sum(report.kills.values()) < kills:
        broken = folder / f"broken-{report.runs}"
        while True:
            enough = sum(report.kills.values()) >= kills
            target = None
            passed = stage_of(broken)
            later = STAGES[STAGES.index(passed) if passed in STAGES else 0 :]
            if choose.random() < 0.5:
                target = min(later, key=lambda stage: report.kills[stage])
            most = 1e9 if enough else 0.3 if target else duration / 3
            try:
                hit = strike(broken, processes, target, choose.uniform(0, most), choose)
            except RuntimeError as error:
                report.wrong.append(f"run {report.runs}: {error}")
                return report
            if hit is None:
                break
            report.kills[hit[0]] += 1
            report.signals[hit[1]] += 1
        report.runs += 1
        if digest(broken) != expected:
            report.wrong.append(f"{broken} differs from {folder / 'whole'}")
        else:
            shutil.rmtree(broken)
        print(f"  {sum(report.kills.values())} kills, {report.runs} runs done", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="over all numbers of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    wrong = []
    for processes in options.processes:
        folder = options.output / f"{processes}-processes"
        kills = -(-options.kills // len(options.processes))
        report = kill_runs(folder, processes, kills, options.seed)
        print(f"  by stage: {dict(report.kills)}")
        print(f"  by signal: {dict(report.signals)}")
        wrong += report.wrong
    print("\n".join(wrong) or "every run ended with the bits of the uninterrupted one")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
