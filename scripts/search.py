"""A search beyond a list: Optuna looks for accurate and small networks at once.

    python scripts/search.py --output outputs/search --trials 30 \
        --over "optimizer.lr=log(0.002, 0.2)" "budget.average_weight_bits=uniform(2, 4)" \
        "weight_quantizer=choice(adq, lsq)" -- experiment=quickstart

What follows ``--`` are settings of adq-train that all trials share. A trial is a run in a folder of
its own. Its objectives are the top-1 accuracy on the validation split after the last epoch, to be
large, and the bytes of the packed weights, to be small; the test split has no say. The study is
kept in ``study.db`` (SQLite): the same command again goes on, a run that was interrupted is
continued, and --trials counts those that are done. One command at a time works on a study.

Writes front.csv, the trials that none beats in both. Needs pip install 'adq-train[search]'.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adq_train.artifacts import BitAllocation
from adq_train.errors import UserError
from adq_train.run.folder import is_done, read_metrics
from adq_train.storage.files import typed_path, write_text
from adq_train.storage.locks import FolderLock

NAME = "adq-train"
RANGE = re.compile(r"([\w.]+)=(log|uniform|int|choice)\((.+)\)")

Space = dict[str, tuple[str, list[str]]]  # by setting: how to draw, and from what
Figures = tuple[float, int]  # validation top-1 in per cent, bytes


def space_of(texts: Sequence[str]) -> Space:
    """What to draw, from ``setting=log(a, b)``, ``uniform``, ``int`` or ``choice(a, b, …)``.

    Raises:
        UserError: A text is something else.
    """
    found: Space = {}
    for text in texts:
        match = RANGE.fullmatch(text.strip())
        words = [x.strip() for x in match[3].split(",")] if match else []
        if not match or (match[2] != "choice" and len(words) != 2):
            raise UserError(
                f"--over: {text!r} is not setting=log(a, b), uniform(a, b), int(a, b) or "
                "choice(a, b, …)"
            )
        found[match[1]] = (match[2], words)
    return found


def drawn(trial: Any, space: Space) -> dict[str, Any]:
    """The settings of a trial."""
    values: dict[str, Any] = {}
    for name, (how, words) in space.items():
        if how == "choice":
            values[name] = trial.suggest_categorical(name, words)
        elif how == "int":
            values[name] = trial.suggest_int(name, int(words[0]), int(words[1]))
        else:
            low, high = map(float, words)
            values[name] = trial.suggest_float(name, low, high, log=how == "log")
    return values


def run_trial(folder: Path, overrides: Sequence[str]) -> Figures:
    """Trains in a folder, or takes what is there, and reads the two figures.

    Raises:
        UserError: The run failed; its own words are on standard error.
    """
    if not (folder / "config.yaml").exists() or not is_done(folder):
        command = [sys.executable, "-m", "adq_train", *overrides, f"run_dir={folder}"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"exit code {done.returncode}")
    epochs = [x for x in read_metrics(folder / "metrics.jsonl") if x["stage"] == "qat"]
    if not epochs:
        raise UserError("no epoch of QAT, so no validation accuracy; trainer.epochs is at least 1")
    text = (folder / "allocation.json").read_text(encoding="utf-8")
    return epochs[-1]["validation_top1_percent"], BitAllocation.from_json(text).model_size_bytes


def search(
    output: Path,
    trials: int,
    space: Space,
    shared: Sequence[str],
    run: Callable[[Path, Sequence[str]], Figures] = run_trial,
    seed: int = 0,
) -> Any:
    """Makes trials until so many are done; gives the study.

    Args:
        output: The folder of the study and of its runs.
        trials: How many in all, those of earlier commands included; failed ones do not count, but
            as many failures in a row end the search.
        space: What to draw.
        shared: Settings that all trials share.
        run: Gives the figures of a trial.
        seed: Of the draws; a study that goes on draws others than one that was not interrupted.

    Raises:
        UserError: Optuna is missing, or trials keep failing.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            f"optuna is not installed ({error}); pip install 'adq-train[search]'"
        ) from error
    output.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(output)
    try:
        lock.take()
    except BlockingIOError as error:
        raise UserError(f"--output: another search is at work in {output}") from error
    try:
        return _search(optuna, output, trials, space, shared, run, seed)
    finally:
        lock.release()


def _search(
    optuna: Any,
    output: Path,
    trials: int,
    space: Space,
    shared: Sequence[str],
    run: Callable[[Path, Sequence[str]], Figures],
    seed: int,
) -> Any:
    """The search itself, by the one who holds the folder."""
    states = optuna.trial.TrialState
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{output.resolve() / 'study.db'}",
        study_name=NAME,
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=seed + len(_trials(output, optuna))),
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(states.RUNNING,)):
        # Its process may be gone: the same settings once more find and continue its run.
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params)
    failures = 0
    while len(study.get_trials(states=(states.COMPLETE,))) < trials:
        trial = study.ask()
        values = drawn(trial, space)
        overrides = [*shared, *(f"{name}={value}" for name, value in values.items())]
        key = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:12]
        try:
            accuracy, size = run(output / f"run-{key}", overrides)
        except UserError as error:
            study.tell(trial, state=states.FAIL)
            failures += 1
            print(f"trial {trial.number} failed ({error}): {' '.join(overrides)}", file=sys.stderr)
            if failures >= max(3, trials):
                raise UserError(f"{failures} trials in a row failed; see their words") from error
            continue
        failures = 0
        study.tell(trial, [accuracy, size])
        print(f"trial {trial.number}: {accuracy:.2f} %, {size:,} bytes; {' '.join(overrides)}")
    write_text(output / "front.csv", front(study, space))
    return study


def _trials(output: Path, optuna: Any) -> list[Any]:
    """The trials of earlier commands."""
    if not (output / "study.db").exists():
        return []
    storage = f"sqlite:///{output.resolve() / 'study.db'}"
    names = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=NAME, storage=storage).trials if NAME in names else []


def front(study: Any, space: Space) -> str:
    """The trials that none beats in both objectives, smallest first, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["bytes", "validation_top1_percent", *space, "trial"])
    for trial in sorted(study.best_trials, key=lambda x: (x.values[1], -x.values[0])):
        accuracy, size = trial.values
        drawn_values = [trial.params[name] for name in space]
        writer.writerow([int(size), accuracy, *drawn_values, trial.number])
    return text.getvalue()


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--output", type=typed_path, required=True, help="folder of the study")
    words.add_argument("--trials", type=int, required=True, help="how many in all")
    words.add_argument("--over", nargs="+", required=True, metavar="SETTING=RANGE")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("overrides", nargs="*", help="after --: settings that all trials share")
    options = words.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        search(
            options.output,
            options.trials,
            space_of(options.over),
            options.overrides,
            seed=options.seed,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print((options.output / "front.csv").read_text(), end="")


if __name__ == "__main__":
    main()
