"""kill -9 at any stage, and the same command ends as if nothing had happened."""

import json
import signal
import subprocess
import sys
import time

import torch

COMMAND = (
    "experiment=quickstart",
    "model.width=4",
    "pretrain.epochs=6",
    "trainer.epochs=6",
    "output_root=outputs",
    "run_dir=run",
)


def start(folder):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "adq_train", *COMMAND],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder):
    process = start(folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def kill_when(folder, reached):
    """Starts the run and kills it as soon as ``reached()`` holds."""
    process = start(folder)
    while process.poll() is None and not reached():
        time.sleep(0.005)
    assert process.poll() is None, "the run was over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def epochs_done(folder, stage):
    path = next(folder.glob("outputs/shared/*/metrics.jsonl"), None)
    path = folder / "run" / "metrics.jsonl" if stage == "qat" else path
    if path is None or not path.exists():
        return 0
    return sum(f'"stage": "{stage}"' in line for line in path.read_text().splitlines())


def outcome(folder):
    state = torch.load(folder / "run" / "checkpoints" / "last.pt", weights_only=True)
    result = json.loads((folder / "run" / "result.json").read_text())
    records = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name in ("seconds", "images_per_second", "data_wait_percent", "peak_memory_bytes"):
            del record[name]
    del result["seconds"], result["stamp"]  # which stands for the times too
    optimizers = [x["state"] for x in state["optimizer"]]  # of the weights, of the quantizers
    assert len(optimizers) == 2
    return state["model"], optimizers, result, records


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_killed_in_every_stage_and_continued(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(whole)

    kill_when(broken, lambda: epochs_done(broken, "pretrain") >= 3)
    kill_when(broken, lambda: (broken / "run" / "allocation.json").exists())
    kill_when(broken, lambda: epochs_done(broken, "qat") >= 3)
    messages = finish(broken)

    assert "qat: continuing after epoch" in messages
    for first, second in zip(outcome(whole), outcome(broken), strict=True):
        assert equal(first, second)
