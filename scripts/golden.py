"""Records what some runs compute, to the bit, and compares a later version of the code with that.

    python scripts/golden.py record golden.json
    python scripts/golden.py compare golden.json

Made for changes that must not change a figure: record before, compare after, on one machine. The
runs are quickstart, a run of two processes, one that is stopped and continued (which must also end
like one that was not), and, with ``--cifar FOLDER``, a small one on CIFAR-10. Of each it keeps the
losses and accuracies of every epoch, Ω, the bits, the figures at the end, and digests of all
trained tensors. Tensors are told apart by their values, not by their names, so that a renamed
buffer is no difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kill_test import SETTINGS, TIMES

# The run that is killed at random moments; it has a checkpoint every other step.
SMALL = tuple(x for x in SETTINGS if not x.startswith(("output_root=", "run_dir=")))
CIFAR = (
    "experiment=resnet20_cifar10",
    "model=resnet8",
    "data.train_images=3000",
    "data.validation_images=500",
    "budget.average_weight_bits=3",
    "pretrain.epochs=2",
    "trainer.epochs=2",
    "optimizer.lr=0.05",
)
NOT_COMPARED = (*TIMES, "stamp")
MOST_SHOWN = 10


def command(folder: Path, settings: tuple[str, ...], processes: int) -> list[str]:
    """The command line of a run in ``folder``."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    places = (f"output_root={folder}", f"run_dir={folder}/run")
    start = [sys.executable, "-m", *(launcher if processes > 1 else []), "adq_train"]
    return [*start, *settings, *places]


def run(folder: Path, settings: tuple[str, ...], processes: int = 1) -> None:
    """Runs to the end, or raises."""
    subprocess.run(
        command(folder, settings, processes),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_with_a_stop(folder: Path, settings: tuple[str, ...]) -> None:
    """Kills the run once QAT has a checkpoint, and runs the same command again."""
    checkpoint = folder / "run/checkpoints/last.pt"
    with subprocess.Popen(
        command(folder, settings, 1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        sys.exit("the run that was to be stopped was done too soon; nothing was tested")
    run(folder, settings)


def trained_tensors(path: Path) -> list[str]:
    """Digests of the values of all tensors of a checkpoint's model, sorted."""
    state = torch.load(path, weights_only=True, map_location="cpu")["model"]
    return sorted(
        hashlib.sha256(str((x.dtype, x.shape)).encode() + x.contiguous().numpy().tobytes())
        .hexdigest()[:16]
        for x in state.values()
        if isinstance(x, torch.Tensor)
    )  # fmt: skip


def record(folder: Path) -> dict[str, Any]:
    """What a finished run computed."""
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    artifacts = ("sensitivity", "allocation", "levels", "result")
    found: dict[str, Any] = {"epochs": [json.loads(line) for line in lines]}
    for name in artifacts:
        found[name] = json.loads((folder / f"run/{name}.json").read_text(encoding="utf-8"))
    for name in ("float", "last"):
        found[f"tensors of {name}.pt"] = trained_tensors(folder / f"run/checkpoints/{name}.pt")
    cleaned: dict[str, Any] = without_times(found)
    return cleaned


def without_times(value: Any) -> Any:
    """The value without what no two runs have in common."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in NOT_COMPARED}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def measure(cifar: Path | None) -> dict[str, Any]:
    """Runs everything."""
    records: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        plan = {
            "quickstart": lambda folder: run(folder, ("experiment=quickstart",)),
            "small": lambda folder: run(folder, SMALL),
            "stopped": lambda folder: run_with_a_stop(folder, SMALL),
            "two processes": lambda folder: run(folder, SMALL, 2),
        }
        if cifar:
            plan["cifar"] = lambda folder: run(folder, (*CIFAR, f"data.root={cifar}"))
        for name, make in plan.items():
            print(name, file=sys.stderr)
            folder = Path(scratch, name.replace(" ", "_"))
            make(folder)
            records[name] = record(folder)
    if odd := list(differences(records["small"], records["stopped"])):
        sys.exit("a run that was stopped and continued ends differently:\n" + "\n".join(odd))
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "records": records,
    }


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Where two records differ, a line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(k for k in after if k not in before)]:
            yield from differences(before.get(key), after.get(key), f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}/{index}")
    elif before != after:
        yield f"{place}: {before} before, {after} now"


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("action", choices=("record", "compare"))
    words.add_argument("file", type=Path)
    words.add_argument("--cifar", type=Path, metavar="FOLDER", help="CIFAR-10's binary files")
    options = words.parse_args()
    if options.action == "record":
        options.file.write_text(json.dumps(measure(options.cifar), indent=1) + "\n")
        print(f"written to {options.file}")
        return
    before = json.loads(options.file.read_text(encoding="utf-8"))
    odd = list(differences(before, measure(options.cifar)))
    for line in odd[:MOST_SHOWN]:
        print(line)
    print(f"{len(odd)} differences" if odd else "equal to the bit")
    sys.exit(bool(odd))


if __name__ == "__main__":
    main()
