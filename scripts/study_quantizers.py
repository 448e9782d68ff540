"""Which quantizer, with which settings? Training loss and accuracy of a network that is too narrow.

    python scripts/study_quantizers.py --bits 2 --weights adq adq:level_set=no_zero lsq \
        --activations float --seeds 0 1 2 --rates 0.01 0.02 0.05 --output outputs/study

A quantizer is a file of configs/weight_quantizer or configs/activation_quantizer, with settings
after colons; ``--activations float`` leaves the inputs alone. The network is a ResNet-8 of 6, 12
and 24 channels on 20,000 images of Fashion-MNIST, without augmentation: capacity binds, so
quantizers differ, in the training loss sooner than in the accuracy. The first and the last layer
have 8 bits. One float model per seed is trained and kept; each variant continues from it with SGD.

Every run is one line of ``runs.jsonl`` in the output folder; the same command again goes on where
it stopped. The table gives each variant its best learning rate, by the mean loss over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_model, save_model
from torch import nn

from adq_train.artifacts import LayerBits
from adq_train.data.base import ImageData, Loading
from adq_train.data.fashion_mnist import FashionMnist
from adq_train.files import write_text, written_whole
from adq_train.models import CifarResNet
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.prepare import collect_inputs, quantize_layer, replaced
from adq_train.schema import register
from adq_train.training.evaluate import evaluate
from adq_train.training.loop import parameter_groups, train_epoch
from adq_train.training.schedule import Cosine
from adq_train.validate import validate

FLOAT_EPOCHS, FLOAT_LR = 12, 0.1
FIRST_LAST_BITS = 8


def load(seed: int) -> ImageData:
    source = FashionMnist(
        root=None,
        train_images=21_500,
        validation_images=500,
        calibration_images=1000,
        crop_padding=0,
        flip=False,
    )
    return source.load(Loading(200, 500, seed, torch.device("cpu")))


def train(model: nn.Module, data: ImageData, lr: float, epochs: int, factor: float) -> float:
    """Mean training loss of the last epoch."""
    groups = parameter_groups(model, lr, 5e-4, factor)
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    schedule, steps = Cosine(warmup_fraction=0.1), epochs * len(data.train)
    loss = float("nan")
    for epoch in range(epochs):
        loss = train_epoch(model, data.train, epoch, optimizer, lambda step: schedule(step / steps))
    return loss


def float_model(folder: Path, seed: int, data: ImageData) -> nn.Module:
    torch.manual_seed(seed)
    model = CifarResNet(8, 6, data.num_classes, 1)
    file = folder / f"float-{seed}.safetensors"
    if not file.exists():
        train(model, data, FLOAT_LR, FLOAT_EPOCHS, 1.0)
        with written_whole(file) as temporary:
            save_model(model, str(temporary))
    load_model(model, str(file))
    return model


def quantizers(weights: str, activations: str) -> tuple[Any, Any]:
    """Factories from names with settings."""
    overrides = []
    for group, text in (("weight_quantizer", weights), ("activation_quantizer", activations)):
        name, *knobs = text.split(":")
        overrides += [f"{group}={name}", *(f"{group}.{knob}" for knob in knobs)]
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        _, parts = validate(compose("config", overrides))
    return parts.make_weight_quantizer, parts.make_activation_quantizer


def run_one(
    model: nn.Module, data: ImageData, plan: dict[str, Any], epochs: int, factor: float
) -> dict[str, Any]:
    """Quantizes a copy of the float model and trains it."""
    began = time.perf_counter()
    model = copy.deepcopy(model)
    images = [images for images, _ in data.calibration.epoch(0)]
    names = [x.name for x in describe_layers(model, images[0][:1])]
    if plan["weights"] != "float":
        leave_inputs = plan["activations"] == "float"
        makers = quantizers(plan["weights"], "n2uq" if leave_inputs else plan["activations"])
        inputs = collect_inputs(model, names, images, plan["seed"])
        layers: dict[str, nn.Module] = {}
        for name in names:
            bits = FIRST_LAST_BITS if name in (names[0], names[-1]) else plan["bits"]
            row = LayerBits(name, bits, bits)
            for key, layer in quantize_layer(model, row, *makers, inputs, plan["seed"]).items():
                if leave_inputs:
                    layer.input_quantizer = nn.Identity()  # type: ignore[assignment]
                layers[key] = layer
        with replaced(model, layers):
            loss = train(model, data, plan["lr"], epochs, factor)
            found = evaluate(model, data.test)
    else:
        loss = train(model, data, plan["lr"], epochs, factor)
        found = evaluate(model, data.test)
    seconds = time.perf_counter() - began
    return {**plan, "train_loss": loss, "top1_percent": found.top1_percent, "seconds": seconds}


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown: each variant at its best rate, best first."""
    rows = []
    variants = {(x["bits"], x["weights"], x["activations"]) for x in records}
    for bits, weights, activations in variants:
        mine = [
            x
            for x in records
            if (x["bits"], x["weights"], x["activations"]) == (bits, weights, activations)
        ]
        rates = {x["lr"] for x in mine}
        most = max(len([x for x in mine if x["lr"] == lr]) for lr in rates)
        by_rate = {lr: [x for x in mine if x["lr"] == lr] for lr in rates}
        full = {lr: xs for lr, xs in by_rate.items() if len(xs) == most}
        lr = min(full, key=lambda lr: statistics.mean(x["train_loss"] for x in full[lr]))
        losses = [x["train_loss"] for x in full[lr]]
        tops = [x["top1_percent"] for x in full[lr]]
        spread = [statistics.stdev(v) if len(v) > 1 else float("nan") for v in (losses, tops)]
        rows.append(
            (
                bits,
                statistics.mean(losses),
                f"| {bits} | {weights} | {activations} | {lr:g} | {most} | "
                f"{statistics.mean(losses):.4f} ± {spread[0]:.4f} | "
                f"{statistics.mean(tops):.2f} ± {spread[1]:.2f} |",
            )
        )
    head = "| bits | weights | activations | rate | n | training loss | test top-1 % |"
    return [head, "|" + "---|" * 7, *(text for *_, text in sorted(rows))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--weights", nargs="+", default=["adq"])
    parser.add_argument("--activations", nargs="+", default=["float"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--quantizer-lr-factor", type=float, default=0.1)
    parser.add_argument("--output", type=Path, default=Path("outputs/study"))
    options = parser.parse_args()
    register()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "runs.jsonl"
    records = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []

    for seed in options.seeds:
        data = load(seed)
        model = float_model(options.output, seed, data)
        for bits in options.bits:
            for weights in options.weights:
                for activations in options.activations:
                    for lr in options.rates:
                        plan = {
                            "seed": seed,
                            "bits": bits,
                            "weights": weights,
                            "activations": activations,
                            "lr": lr,
                            "epochs": options.epochs,
                            "quantizer_lr_factor": options.quantizer_lr_factor,
                        }
                        if any(plan.items() <= x.items() for x in records):
                            continue
                        record = run_one(
                            model, data, plan, options.epochs, options.quantizer_lr_factor
                        )
                        records.append(record)
                        write_text(file, "".join(json.dumps(x) + "\n" for x in records))
                        print(json.dumps(record), file=sys.stderr)
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
