"""Which sensitivity metric is right? Predictions of random allocations against measured losses.

    python scripts/compare_metrics.py --metrics perturbation perturbation:criterion=loss \
        --output outputs/metrics-digits -- data=digits model=resnet8

A metric is a file of configs/sensitivity, with settings after colons. What follows ``--`` are
settings of adq-train; seed, data, model, quantizers, candidates and optimizer are taken from them.
The float model is trained once. Then random allocations (each layer's bits drawn apart, at an
average that is drawn, too) are prepared, calibrated and measured; some of them are also trained for
a few epochs. Everything is kept as it comes, and the same command again goes on where it stopped.

Writes into the output folder: tables/<metric>.json, measured.jsonl, study.csv (one row for each
allocation), study.json (rank correlations with 95 % bootstrap intervals), study.png. Losses are
mean cross-entropies on the validation split. "average bits" is the
metric of no information: minus the average bits of the weights.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from scipy.stats import spearmanr

from adq_train.allocation.allocator import objective
from adq_train.allocation.budget import Bits, Budget, Problem, figures
from adq_train.artifacts import BitAllocation, LayerBits, SensitivityTable, require_finite
from adq_train.data.base import derived_seed
from adq_train.errors import UserError
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session, composed
from adq_train.run.stages.calibrate import calibrate
from adq_train.run.stages.float_model import pretrain, train_teacher
from adq_train.run.stages.hooks import training_hooks
from adq_train.run.stages.profile import conditions
from adq_train.storage.files import write_text, written_whole
from adq_train.training.evaluate import evaluate
from adq_train.training.trainer import Trainer

RESAMPLES = 2000
MOST_DRAWS = 100_000
LEAST_PAIRS = 5  # fewer have no interval worth the name


def measure_tables(
    options: argparse.Namespace, session: Session, folder: Path
) -> dict[str, SensitivityTable]:
    """One table per metric, kept in ``tables/``."""
    folder = folder / "tables"
    folder.mkdir(exist_ok=True)
    given = conditions(session)
    tables = {}
    for metric in options.metrics:
        file = folder / f"{metric.replace(':', ',')}.json"
        if not file.exists():
            name, *knobs = metric.split(":")
            overrides = [f"sensitivity={name}", *(f"sensitivity.{knob}" for knob in knobs)]
            _, parts = composed([*options.settings, *overrides])
            print(f"table: {metric}", file=sys.stderr)
            model = copy.deepcopy(session.model)
            rows = parts.sensitivity.measure(model, session.problem.layers, given)
            widths = session.problem.candidates
            table = SensitivityTable(parts.sensitivity.name, widths, tuple(rows))
            require_finite(table)
            write_text(file, table.to_json())
        tables[metric] = SensitivityTable.from_json(file.read_text(encoding="utf-8"))
    return tables


def random_bits(
    problem: Problem, seed: int, count: int, between: tuple[float, float]
) -> list[dict[str, Bits]]:
    """Different allocations; a share of each width is drawn first, so that averages differ.

    Args:
        problem: Layers and candidates.
        seed: Of the draw.
        count: How many.
        between: Smallest and largest average bits of the weights.

    Raises:
        UserError: There are not so many.
    """
    if len(problem.candidates) ** len(problem.mixed) < 2 * count:
        raise UserError(f"--allocations: {count} are too many for so few layers and candidates")
    random = np.random.default_rng(derived_seed(seed, "allocations"))
    found: list[dict[str, Bits]] = []
    for _ in range(MOST_DRAWS):
        if len(found) == count:
            break
        shares = random.dirichlet(np.ones(len(problem.candidates)))
        drawn = random.choice(problem.candidates, len(problem.mixed), p=shares)
        mixed = {x.name: Bits(int(b), int(b)) for x, b in zip(problem.mixed, drawn, strict=True)}
        bits = {**mixed, **problem.pinned_bits()}
        average = figures(problem.layers, bits, problem.pinned).average_weight_bits
        if between[0] <= average <= between[1] and bits not in found:
            found.append(bits)
    if len(found) < count:
        raise UserError(
            f"--between: {MOST_DRAWS:,} draws hold only {len(found)} allocations of averages in "
            f"{between[0]} … {between[1]}; widen it, or lower --allocations"
        )
    return found


def measure(session: Session, bits: dict[str, Bits], epochs: int) -> dict[str, float]:
    """Loss and accuracy of one allocation after calibration and, with epochs, after short QAT."""
    problem = session.problem
    costs = figures(problem.layers, bits, problem.pinned)
    layers = tuple(LayerBits(x.name, *bits[x.name]) for x in problem.layers)
    allocation = BitAllocation(
        allocator="random", budget={}, layers=layers, **vars(costs), objective=None, optimal=False
    )
    quantized = calibrate(session, allocation)
    trainer = Trainer(
        quantized,
        session.optimizers(quantized),
        session.data,
        training_hooks(session, quantized, "qat"),
        settings=replace(session.config.trainer, epochs=epochs),
        seed=session.config.seed,
    )
    reports = [trainer.train_epoch() for _ in range(epochs)]
    if reports:
        last = reports[-1]
        return {"loss": last.validation_loss, "top1_percent": last.validation_top1_percent}
    found = evaluate(quantized, session.data.validation)
    return {"loss": found.loss, "top1_percent": found.top1_percent}


def measure_all(
    options: argparse.Namespace, session: Session, folder: Path
) -> dict[str, dict[int, dict[str, float]]]:
    """Every allocation after calibration, and the first few after QAT; skips what is there."""
    seed, between = session.config.seed, tuple(options.between)
    bits = random_bits(session.problem, seed, options.allocations, between)
    file = folder / "measured.jsonl"
    records = []
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    found = {(x["stage"], x["epochs"], x["index"]): x for x in records}
    plan = [("ptq", 0, i) for i in range(options.allocations)]
    plan += [("qat", options.qat_epochs, i) for i in range(options.qat_allocations)]
    for done, (stage, epochs, index) in enumerate(plan):
        if (stage, epochs, index) in found:
            continue
        values = measure(session, bits[index], epochs)
        record = {"stage": stage, "epochs": epochs, "index": index, **values}
        found[stage, epochs, index] = record
        write_text(file, "".join(json.dumps(x) + "\n" for x in found.values()))
        print(f"{done + 1}/{len(plan)} {stage} {index}: {values}", file=sys.stderr)
    return {
        stage: {i: found[stage, epochs, i] for s, epochs, i in plan if s == stage}
        for stage in ("ptq", "qat")
    }


def rank_correlation(x: Any, y: Any, seed: int) -> dict[str, float | int | None]:
    """Spearman's rho with a 95 % percentile interval over resampled pairs."""
    x, y = np.asarray(x), np.asarray(y)
    if len(x) < LEAST_PAIRS or not np.ptp(x) or not np.ptp(y):
        return {"rho": None, "low": None, "high": None, "n": len(x)}
    random = np.random.default_rng(seed)
    resampled = []
    for _ in range(RESAMPLES):
        chosen = random.integers(len(x), size=len(x))
        if np.ptp(x[chosen]) and np.ptp(y[chosen]):
            resampled.append(spearmanr(x[chosen], y[chosen]).statistic)
    low, high = np.percentile(resampled, [2.5, 97.5])
    rho = float(spearmanr(x, y).statistic)
    return {"rho": rho, "low": float(low), "high": float(high), "n": len(x)}


def flat(problem: Problem, table: SensitivityTable) -> list[float]:
    """What a layer costs at each width, weights and input at the same one."""
    values = []
    for layer in problem.mixed:
        for width in problem.widths(layer):
            one = replace(problem, layers=(layer,), pinned={})
            values.append(objective(one, table, {layer.name: Bits(width, width)}) or 0.0)
    return values


def report(
    problem: Problem,
    tables: dict[str, SensitivityTable],
    measured: dict[str, dict[int, dict[str, float]]],
    float_loss: float,
    options: argparse.Namespace,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Writes the study's files from what was measured."""
    bits = random_bits(problem, seed, options.allocations, tuple(options.between))
    averages = [figures(problem.layers, x, problem.pinned).average_weight_bits for x in bits]
    predicted: dict[str, list[float]] = {
        metric: [objective(problem, table, x) or 0.0 for x in bits]
        for metric, table in tables.items()
    }
    predicted["average bits"] = [-x for x in averages]
    rises = {
        stage: {i: x["loss"] - float_loss for i, x in values.items()}
        for stage, values in measured.items()
    }
    between = {
        f"{a} ~ {b}": rank_correlation(flat(problem, tables[a]), flat(problem, tables[b]), seed)
        for n, a in enumerate(tables)
        for b in list(tables)[n + 1 :]
    }
    against = {
        metric: {
            stage: rank_correlation([values[i] for i in rise], list(rise.values()), seed)
            for stage, rise in rises.items()
        }
        for metric, values in predicted.items()
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{stage}_{what}" for stage in measured for what in ("loss", "top1_percent")]
    writer.writerow(["index", "bits", "average_weight_bits", *columns, *predicted])
    for i, chosen in enumerate(bits):
        cells = [
            measured[stage].get(i, {}).get(what, "")
            for stage in measured
            for what in ("loss", "top1_percent")
        ]
        widths = " ".join(str(chosen[x.name].weights) for x in problem.layers)
        writer.writerow([i, widths, averages[i], *cells, *(v[i] for v in predicted.values())])
    write_text(folder / "study.csv", text.getvalue())
    study = {
        "command": ["python", *sys.argv],
        "seed": seed,
        "float_loss": float_loss,
        "qat_epochs": options.qat_epochs,
        "torch": torch.__version__,
        "tables": between,
        "predicted_against_measured": against,
    }
    write_text(folder / "study.json", json.dumps(study, indent=2) + "\n")
    with written_whole(folder / "study.png") as temporary:
        draw(predicted, rises, against).savefig(temporary, format="png", dpi=110)
    return study


def draw(predicted: Any, rises: Any, against: Any) -> Figure:
    """A panel for each metric and stage: predicted against measured."""
    figure = Figure(figsize=(2.6 * len(predicted) + 0.6, 5), layout="constrained")
    panels = figure.subplots(2, len(predicted), squeeze=False)
    for row, (stage, rise) in enumerate(rises.items()):
        for column, (metric, values) in enumerate(predicted.items()):
            axes = panels[row][column]
            axes.plot([values[i] for i in rise], list(rise.values()), "o", markersize=3)
            rho = against[metric][stage]["rho"]
            shown = "too few" if rho is None else f"ρ = {rho:.2f}"
            name = metric.replace(":", "\n", 1)
            axes.set_title(f"{name}\n{shown}, n = {len(rise)}", fontsize=8)
            if min(values) > 0:
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelsize=6)
            axes.spines[["top", "right"]].set_visible(False)
        panels[row][0].set_ylabel(
            "rise of the loss, " + ("no training" if stage == "ptq" else "after short QAT"),
            fontsize=8,
        )
    figure.supxlabel("predicted: summed Ω (average bits: with a minus)", fontsize=8)
    return figure


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--metrics", nargs="+", required=True, metavar="NAME[:KNOB=VALUE]")
    words.add_argument("--output", type=Path, required=True)
    words.add_argument("--allocations", type=int, default=40, help="after calibration alone")
    words.add_argument(
        "--between", type=float, nargs=2, default=(0, 32), metavar=("LOW", "HIGH"),
        help="average bits of the weights; a narrow range compares at equal bits",
    )  # fmt: skip
    words.add_argument("--qat-allocations", type=int, default=10, help="also after short QAT")
    words.add_argument("--qat-epochs", type=int, default=3)
    words.add_argument("settings", nargs="*", help="settings of adq-train, after --")
    options = words.parse_args()
    if options.qat_allocations > options.allocations:
        words.error("--qat-allocations must not be more than --allocations")
    logging.getLogger("adq_train").setLevel(logging.WARNING)
    try:
        study(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def study(options: argparse.Namespace) -> None:
    """The whole study."""
    session = Session.compose(options.settings)
    if session.start:
        raise UserError("init_from: a study begins with a float model; give pretrain.checkpoint")
    problem = session.problem
    # Allocations of any cost are drawn, from the candidates of all layers.
    free = replace(session, problem=replace(problem, budget=Budget(), candidates_by_layer={}))
    with RunFolder(options.output, session.config) as folder:
        with folder.stage("pretrain"):
            pretrain(session, folder)
            train_teacher(session, folder)
        with folder.stage("tables"):
            tables = measure_tables(options, session, folder.path)
        with folder.stage("measure"):
            measured = measure_all(options, free, folder.path)
        float_loss = evaluate(session.model, session.data.validation).loss
        seed = session.config.seed
        found = report(free.problem, tables, measured, float_loss, options, seed, folder.path)
    print(f"{'':34}  rank correlation with the measured rise of the loss")
    for metric, stages in found["predicted_against_measured"].items():
        cells = [
            f"{stage} {x['rho']:.3f} [{x['low']:.3f}, {x['high']:.3f}], n = {x['n']}"
            for stage, x in stages.items()
            if x["rho"] is not None
        ]
        print(f"{metric:34}  {'   '.join(cells)}")
    for names, x in found["tables"].items():
        print(f"tables: {names}  {x['rho']}")
    print(f"written to  {options.output}/study.csv, study.json, study.png")


if __name__ == "__main__":
    main()
