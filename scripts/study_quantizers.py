"""Which quantizer, with which settings? Training loss and accuracy where capacity binds.

    python scripts/study_quantizers.py --weights adq adq:level_set=no_zero lsq --bits 2 3 \
        --seeds 0 1 2 --rates 0.01 0.02 0.05 --output outputs/study -- \
        data=digits model=resnet8 model.width=4 trainer.epochs=20

A quantizer is a file of configs/weight_quantizer or configs/activation_quantizer, with settings
after colons; ``float`` leaves weights or inputs alone. What follows ``--`` are settings of
adq-train: data, model, float training, schedule. All layers but the first and the last get the same
bits. A narrow network tells quantizers apart, and its training loss sooner than its accuracy.

Every run is one line of ``runs.jsonl`` in the output folder; the same command again goes on where
it stopped. The table is that of the command's own runs, and gives each variant its best learning
rate, by its mean loss over the seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from adq_train.artifacts import LayerBits
from adq_train.errors import UserError
from adq_train.quantization.prepare import collect_inputs, quantize_layer, replaced
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session
from adq_train.run.stages.float_model import pretrain, train_teacher
from adq_train.run.stages.hooks import training_hooks
from adq_train.settings.schema import identity
from adq_train.storage.files import write_text
from adq_train.storage.stamps import digest
from adq_train.training.evaluate import evaluate
from adq_train.training.trainer import Trainer

PLAN = ("weights", "activations", "bits", "rate", "seed")


def choice(group: str, text: str) -> list[str]:
    """Overrides from a name with settings; ``float`` keeps the group's default, unused."""
    name, *knobs = text.split(":")
    return [] if name == "float" else [f"{group}={name}", *(f"{group}.{knob}" for knob in knobs)]


def opened(options: argparse.Namespace, overrides: list[str]) -> Session:
    """A run's data, and the trained float model that runs of one seed share."""
    everything = [*options.settings, *overrides, f"output_root={options.output}"]
    session = Session.compose(everything)
    if session.start:
        raise UserError("init_from: a study begins with a float model; give pretrain.checkpoint")
    name = digest(identity(session.config.plain()))[:8]
    with RunFolder(options.output / "runs" / name, session.config) as folder:
        pretrain(session, folder)
        train_teacher(session, folder)
    return session


def train(session: Session, model: nn.Module) -> dict[str, float]:
    """QAT as the configuration says; the last epoch's mean training loss and the test accuracy."""
    trainer = Trainer(
        model,
        session.optimizers(model),
        session.data,
        training_hooks(session, model, "qat"),
        settings=session.config.trainer,
        seed=session.config.seed,
    )
    reports = [trainer.train_epoch() for _ in range(session.config.trainer.epochs)]
    top1 = evaluate(model, session.data.test).top1_percent
    loss = reports[-1].train_loss if reports else math.nan
    return {"train_loss": loss, "top1_percent": top1}


def run_one(options: argparse.Namespace, plan: dict[str, Any]) -> dict[str, float]:
    """Quantizes the float model and trains it."""
    session = opened(
        options,
        [
            *choice("weight_quantizer", plan["weights"]),
            *choice("activation_quantizer", plan["activations"]),
            f"optimizer.lr={plan['rate']}",
            f"seed={plan['seed']}",
        ],
    )
    model, config, parts = session.model, session.config, session.parts
    images = [images for images, _ in session.calibration]
    names = [x.name for x in session.problem.layers]
    inputs = collect_inputs(model, names, images, config.seed)
    makers = parts.make_weight_quantizer, parts.make_activation_quantizer
    layers: dict[str, nn.Module] = {}
    for name in names:
        ends = config.bits.first_last if name in (names[0], names[-1]) else None
        bits = ends or plan["bits"]
        forms = quantize_layer(model, LayerBits(name, bits, bits), *makers, inputs, config.seed)
        for layer in forms.values():
            if plan["weights"] == "float":
                layer.weight_quantizer = Nothing()  # type: ignore[assignment]
            if plan["activations"] == "float":
                layer.input_quantizer = Nothing()  # type: ignore[assignment]
        layers |= forms
    with replaced(model, layers):
        return train(session, model)


class Nothing(nn.Identity):
    """What stands for a quantizer where there is none."""

    def adapt(self, *_: object) -> None:
        """Nothing to adapt."""

    def regularize(self, *_: object) -> None:
        """Nothing to regularize."""


def mean_and_deviation(values: list[float], digits: int) -> str:
    deviation = f"{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "?"
    return f"{statistics.mean(values):.{digits}f} ± {deviation}"


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown: each variant at its best rate, the best variant first."""
    rows = []
    for bits, weights, activations in sorted(
        {(x["bits"], x["weights"], x["activations"]) for x in records}
    ):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for x in records:
            if (x["bits"], x["weights"], x["activations"]) == (bits, weights, activations):
                by_rate.setdefault(x["rate"], []).append(x)
        most = max(map(len, by_rate.values()))  # rates that some seeds have not seen yet wait
        losses = {
            rate: [x["train_loss"] for x in xs] for rate, xs in by_rate.items() if len(xs) == most
        }
        rate = min(losses, key=lambda rate: statistics.mean(losses[rate]))
        tops = [x["top1_percent"] for x in by_rate[rate]]
        cells = (
            f"{bits} | {weights} | {activations} | {rate:g} | {most} | "
            f"{mean_and_deviation(losses[rate], 4)} | {mean_and_deviation(tops, 2)}"
        )
        rows.append((bits, statistics.mean(losses[rate]), f"| {cells} |"))
    head = "| bits | weights | activations | rate | n | training loss | test top-1 % |"
    return [head, "|" + "---|" * 7, *(text for *_, text in sorted(rows))]


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--weights", nargs="+", required=True, metavar="NAME[:KNOB=VALUE]")
    words.add_argument("--activations", nargs="+", default=["n2uq"], metavar="NAME[:KNOB=VALUE]")
    words.add_argument("--bits", type=int, nargs="+", default=[2])
    words.add_argument("--rates", type=float, nargs="+", default=[0.02])
    words.add_argument("--seeds", type=int, nargs="+", default=[0])
    words.add_argument("--output", type=Path, required=True)
    words.add_argument("settings", nargs="*", help="settings of adq-train, after --")
    options = words.parse_args()
    logging.getLogger("adq_train").setLevel(logging.WARNING)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "runs.jsonl"
    records = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    plans = product(
        options.seeds, options.bits, options.weights, options.activations, options.rates
    )
    wanted = []
    for seed, bits, weights, activations, rate in plans:
        plan = dict(zip(PLAN, (weights, activations, bits, rate, seed), strict=True))
        plan["settings"] = options.settings
        wanted.append(plan)
        if any(plan.items() <= x.items() for x in records):
            continue
        began = time.perf_counter()
        try:
            found = run_one(options, plan)
        except UserError as error:
            sys.exit(f"error: {error}")
        records.append({**plan, **found, "seconds": time.perf_counter() - began})
        write_text(file, "".join(json.dumps(x) + "\n" for x in records))
        print(json.dumps(records[-1]), file=sys.stderr)
    print(
        "\n".join(table([x for x in records if any(plan.items() <= x.items() for plan in wanted)]))
    )


if __name__ == "__main__":
    main()
