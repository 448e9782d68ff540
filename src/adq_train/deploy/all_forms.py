"""A run and all of its exported files, side by side on the whole test set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.data.base import ImageData
from adq_train.deploy.datasets import data_section
from adq_train.deploy.evaluable import open_data, open_path
from adq_train.deploy.formats import FORMATS, MissingPackageError
from adq_train.errors import UserError

# Rounds of the timing, each of one image through every form; and when a slow form leaves it.
ROUNDS, FEWEST_ROUNDS = 30, 3
SECONDS_PER_FORM = 10.0
UNSEEN = -1  # the class of an image that a slow form does not look at


@dataclass(frozen=True)
class FormRow:
    """One form of a network on the test set.

    Attributes:
        form: ``run``, or the name of its format.
        path: The folder or the file.
        top1_percent: Top-1 accuracy; None where the form was not evaluated.
        different: Images that get another class than from the run's checkpoint.
        num_images: That it looked at.
        bytes: Of the file; None for a run.
        milliseconds: The median time for one image, on one thread of the CPU.
        missing: What is not installed, and how to install it.
        problem: Why it cannot be evaluated otherwise.
    """

    form: str
    path: str
    top1_percent: float | None = None
    different: int | None = None
    num_images: int | None = None
    bytes: int | None = None
    milliseconds: float | None = None
    missing: str = ""
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not there is left out."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "")}


def evaluate_forms(
    folder: Path,
    choice: str | None = None,
    changes: Mapping[str, str] | None = None,
    batch_size: int = 500,
    trusted_packages: Sequence[str] = (),
) -> list[FormRow]:
    """Evaluates the checkpoint of a run and each file that is in its ``export/`` folder.

    Args:
        folder: Of the run.
        choice: The name of another data set, or None.
        changes: Settings of the data set to change, by name, in YAML.
        batch_size: Images of a batch.
        trusted_packages: Whose classes the run and its files may name.

    Returns:
        The run, then its files in the order of the table of formats.

    Raises:
        UserError: The run or its data set cannot be read, or it has no exported file.
    """
    if not folder.is_dir():
        raise UserError(f"all_forms: {folder} is no folder; give that of a run")
    run = open_path(folder, trusted_packages)
    section, download = data_section(run.data, choice, changes or {})
    data = open_data(run, section, batch_size, download)
    files = {x.name: folder / x.file for x in FORMATS.values() if (folder / x.file).is_file()}
    if not files:
        raise UserError(f"all_forms: {folder / 'export'} has no file of adq-export; export first")
    rows = {"run": FormRow("run", str(folder))}
    opened = {"run": run.network}
    for form, path in files.items():
        row = FormRow(form, str(path), bytes=path.stat().st_size)
        try:
            opened[form] = open_path(path, trusted_packages).network
        except MissingPackageError as error:
            row = replace(row, missing=str(error))
        except UserError as error:
            row = replace(row, problem=str(error))
        rows[form] = row
    every = {x.name: x.every(data.test) for x in FORMATS.values()}
    classes, problems = classes_of(opened, data, every)
    times = milliseconds(_on_one_thread(folder, files, classes, trusted_packages), _image(data))
    targets = classes.pop("targets")
    for form, found in classes.items():
        seen = found != UNSEEN
        rows[form] = replace(
            rows[form],
            top1_percent=100 * float((found == targets)[seen].float().mean()),
            different=int((found != classes["run"])[seen].sum()),
            num_images=int(seen.sum()),
            milliseconds=times.get(form),
        )
    return [replace(row, problem=problems.get(form, row.problem)) for form, row in rows.items()]


@torch.no_grad()
def classes_of(
    networks: Mapping[str, nn.Module], data: ImageData, every: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The top-1 classes (N,) of the test images in each network, and as ``targets`` the true ones.

    Args:
        networks: By form; the first one must not fail.
        data: Its test images are gone through once.
        every: k by form, where every k-th image of each batch is looked at; the others are
            :data:`UNSEEN`. By default all are.

    Returns:
        Classes by form, and for those that failed why.
    """
    found: dict[str, list[Tensor]] = {form: [] for form in (*networks, "targets")}
    problems: dict[str, str] = {}
    for images, targets in data.test.epoch(0):
        found["targets"].append(targets)
        for form in networks.keys() - problems.keys():
            try:
                some = slice(None, None, (every or {}).get(form, 1))
                answers = torch.full_like(targets, UNSEEN)
                answers[some] = networks[form](images[some]).argmax(1)
                found[form].append(answers)
            except UserError as error:
                if form == next(iter(networks)):
                    raise
                problems[form] = str(error)
    return {k: torch.cat(x) for k, x in found.items() if k not in problems}, problems


def _on_one_thread(
    folder: Path, files: Mapping[str, Path], forms: Collection[str], trusted: Sequence[str]
) -> dict[str, nn.Module]:
    """Those forms again, each with one thread, as its process is told when it is started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            form: open_path(path, trusted).network
            for form, path in {"run": folder, **files}.items()
            if form in forms
        }
    finally:
        torch.set_num_threads(before)


def _image(data: ImageData) -> Tensor:
    """The first test image (1, C, H, W)."""
    images, _ = next(iter(data.test.epoch(0)))
    return images[:1]


@torch.no_grad()
def milliseconds(networks: Mapping[str, nn.Module], image: Tensor) -> dict[str, float]:
    """The median time of each network for one image, on one thread.

    The rounds of all networks are interleaved, so that a slow moment of the machine meets each. One
    that runs in a process of its own says itself how long it took.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {form: [] for form in networks}
    try:
        for number in range(-1, ROUNDS):
            for form, network in networks.items():
                taken = times[form]
                if number >= FEWEST_ROUNDS and sum(taken) > SECONDS_PER_FORM:
                    continue
                start = time.perf_counter()
                network(image)
                seconds = time.perf_counter() - start
                if number >= 0:  # the first one warms up
                    taken.append(float(getattr(network, "seconds", seconds)))
    finally:
        torch.set_num_threads(before)
    return {form: 1000 * statistics.median(taken) for form, taken in times.items()}


def text(rows: Sequence[FormRow]) -> str:
    """The table for a terminal, and below it what could not be evaluated."""
    counted = max((x.num_images for x in rows if x.num_images), default=0)
    lines = [("form", "top-1", "other class", "bytes", "ms per image")]
    for row in rows:
        lines.append(
            (
                row.form,
                "" if row.top1_percent is None else f"{row.top1_percent:.2f} %",
                _different(row, counted),
                "" if row.bytes is None else f"{row.bytes:,}",
                "" if row.milliseconds is None else f"{row.milliseconds:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
        for cells in lines
    ]
    shown += [f"{x.form}: {x.missing or x.problem}" for x in rows if x.missing or x.problem]
    shown.append(
        f"{counted:,} test images; other class: than from the run's checkpoint; ms: the median for "
        "one image on one thread"
    )
    return "\n".join(shown)


def _different(row: FormRow, counted: int) -> str:
    """On how many images a form has another class, and of how many where that is not all."""
    if row.different is None or row.form == "run":
        return ""
    return f"{row.different:,}" + (f" of {row.num_images:,}" if row.num_images != counted else "")
