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
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from adq_train.run.stages import Context, pretrain
from hydra import compose, initialize_config_module
from torch import nn

from adq_train.artifacts import LayerBits
from adq_train.data.base import Loading
from adq_train.errors import UserError
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.prepare import collect_inputs, quantize_layer, replaced
from adq_train.run.folder import RunFolder, identity
from adq_train.settings.schema import register
from adq_train.settings.validate import validate
from adq_train.states import load_checkpoint
from adq_train.storage.files import write_text
from adq_train.storage.stamps import digest
from adq_train.training.evaluate import evaluate
from adq_train.training.loop import train_epoch
from adq_train.training.optimizers import make_optimizers
from adq_train.training.step import TrainingStep

PLAN = ("weights", "activations", "bits", "rate", "seed")


def choice(group: str, text: str) -> list[str]:
    """Overrides from a name with settings; ``float`` keeps the group's default, unused."""
    name, *knobs = text.split(":")
    return [] if name == "float" else [f"{group}={name}", *(f"{group}.{knob}" for knob in knobs)]


def context(options: argparse.Namespace, overrides: list[str]) -> tuple[Context, nn.Module]:
    """A run's parts and data, and the float model that runs of one seed share."""
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        everything = [*options.settings, *overrides, f"output_root={options.output}"]
        config, parts = validate(compose("config", everything))
    trainer, seed = config["trainer"], config["seed"]
    loading = Loading(trainer["batch_size"], trainer["eval_batch_size"], seed, parts.device)
    data = parts.data.load(loading)
    torch.manual_seed(seed)
    model = parts.model.build(data.num_classes, data.image_shape[0])
    if config["init_from"]:
        raise UserError("init_from: a study begins with a float model; give pretrain.checkpoint")
    load_checkpoint(model, config["pretrain"])
    model.to(parts.device)
    with RunFolder(options.output / "runs" / digest(identity(config))[:8], config) as folder:
        run = Context(config, parts, data, folder)
        pretrain(run, model)
    return run, model


def train(run: Context, model: nn.Module) -> dict[str, float]:
    """QAT as the configuration says; the last epoch's mean training loss and the test accuracy."""
    trainer, settings = run.config["trainer"], run.config["optimizer"]
    makers = run.parts.make_optimizer, run.parts.make_quantizer_optimizer
    optimizer = make_optimizers(model, settings["lr"], settings["weight_decay"], *makers)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    steps = trainer["epochs"] * len(run.data.train)
    step, loss = TrainingStep(model, optimizer), float("nan")
    for epoch in range(trainer["epochs"]):
        loss = train_epoch(
            step, run.data.train, epoch, lambda done: run.parts.scheduler(done / steps)
        )
    return {"train_loss": loss, "top1_percent": evaluate(model, run.data.test).top1_percent}


def run_one(options: argparse.Namespace, plan: dict[str, Any]) -> dict[str, float]:
    """Quantizes the float model and trains it."""
    run, model = context(
        options,
        [
            *choice("weight_quantizer", plan["weights"]),
            *choice("activation_quantizer", plan["activations"]),
            f"optimizer.lr={plan['rate']}",
            f"seed={plan['seed']}",
        ],
    )
    images = [images for images, _ in run.data.calibration.epoch(0)]
    names = [x.name for x in describe_layers(model, images[0][:1])]
    inputs = collect_inputs(model, names, images, run.seed)
    makers = run.parts.make_weight_quantizer, run.parts.make_activation_quantizer
    layers: dict[str, nn.Module] = {}
    for name in names:
        ends = run.config["bits"]["first_last"] if name in (names[0], names[-1]) else None
        bits = ends or plan["bits"]
        forms = quantize_layer(model, LayerBits(name, bits, bits), *makers, inputs, run.seed)
        for layer in forms.values():
            if plan["weights"] == "float":
                layer.weight_quantizer = Nothing()  # type: ignore[assignment]
            if plan["activations"] == "float":
                layer.input_quantizer = Nothing()  # type: ignore[assignment]
        layers |= forms
    with replaced(model, layers):
        return train(run, model)


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
    register()
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
