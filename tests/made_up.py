"""Folders as runs leave them, written from plain values: real formats, made-up figures."""

import json
from pathlib import Path

import yaml

CONFIG = {
    "seed": 0,
    "run_dir": None,
    "output_root": "outputs",
    "dry_run": False,
    "debug": False,
    "trusted_packages": [],
    "budget": {
        "average_weight_bits": 3.0,
        "average_activation_bits": None,
        "model_size_bytes": None,
        "bops": None,
    },
    "bits": {"candidates": [2, 3, 4], "first_last": 8, "pinned": None},
    "pretrain": {"checkpoint": None, "epochs": 5, "lr": 0.1, "weight_decay": 0.0005},
    "trainer": {"epochs": 3, "batch_size": 64, "device": "auto"},
    "model": {"_target_": "adq_train.models.CifarResNetModel", "depth": 20, "width": 16},
    "data": {"_target_": "adq_train.data.cifar.Cifar", "name": "cifar10", "root": None},
    "weight_quantizer": {
        "_target_": "adq_train.quantization.adq.AdqWeightQuantizer",
        "adaptation": "centroid",
    },
    "activation_quantizer": {
        "_target_": "adq_train.quantization.n2uq.N2uqActivationQuantizer",
        "initialization": "mse",
    },
    "allocator": {"_target_": "adq_train.allocation.ilp.IlpAllocator"},
}
LSQ = {
    "weight_quantizer": {"_target_": "adq_train.quantization.lsq.LsqWeightQuantizer"},
    "activation_quantizer": {"_target_": "adq_train.quantization.lsq.LsqActivationQuantizer"},
}
LAYERS = ("conv1", "layer1.0.conv1", "layer2.0.conv1", "fc")


def merged(base, changes):
    """Nested dictionaries, the second over the first; a part with another target replaces it."""
    result = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        nested = isinstance(value, dict) and isinstance(old, dict)
        result[key] = merged(old, value) if nested and "_target_" not in value else value
    return result


def write_json(path, content):
    path.write_text(json.dumps(content))


def make_run(
    folder: Path,
    top1=90.0,
    *,
    seed=0,
    overrides=(),
    changes=None,
    float_top1=92.0,
    losses=(2.0, 1.0, 0.5),
    bits=3,
    state="done",
    stage=None,
    error=None,
    manifest=None,
    layers=LAYERS,
):
    """Writes one run; with another state than ``done`` the files of its last stages are missing."""
    folder.mkdir(parents=True)
    config = merged({**CONFIG, "seed": seed}, changes or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(
        folder / "manifest.json",
        {
            "command": ["adq-train", *overrides, f"seed={seed}"],
            "git": {"commit": "0" * 40, "dirty": False},
            "versions": {"torch": "2.6.0"},
            "device": "cpu",
            "seed": seed,
            "data": {"name": config["data"].get("name", "digits"), "fingerprint": "ab" * 32},
            "checkpoint_sha256": None,
            **(manifest or {}),
        },
    )
    write_json(
        folder / "status.json", {"state": state, "stage": stage, "error": error, "seconds": {}}
    )
    records = [
        {
            "stage": "qat",
            "epoch": epoch,
            "train_loss": loss,
            "validation_top1_percent": 90 - loss,
            "codebooks": {layers[1]: [-0.3 - 0.01 * epoch, 0.0, 0.3 + 0.01 * epoch]},
        }
        for epoch, loss in enumerate(losses, 1)
    ]
    pretrain = [{"stage": "pretrain", "epoch": 1, "train_loss": 9.0}]
    lines = "".join(json.dumps(x) + "\n" for x in pretrain + records)
    (folder / "metrics.jsonl").write_text(lines)
    if state != "done":
        return folder
    table = [
        {"name": x, "num_weights": 100 * (i + 1), "macs": 1000, "sensitivity": {"2": 1 / (i + 1),
         "3": 0.1 / (i + 1), "4": 0.01 / (i + 1)}}
        for i, x in enumerate(layers)
    ]  # fmt: skip
    write_json(
        folder / "sensitivity.json",
        {"metric": "perturbation-kl-both", "bit_widths": [2, 3, 4], "layers": table},
    )
    inner = [{"name": x, "weight_bits": int(bits), "activation_bits": int(bits)} for x in layers]
    write_json(
        folder / "allocation.json",
        {
            "allocator": "ilp",
            "budget": {"average_weight_bits": bits},
            "layers": inner,
            "average_weight_bits": bits,
            "average_weight_bits_all_layers": bits + 0.25,
            "average_activation_bits": bits,
            "model_size_bytes": int(125 * bits),
            "bops": 1000,
            "objective": 0.5,
            "optimal": True,
        },
    )
    write_json(
        folder / "result.json",
        {
            "fp_top1_percent": float_top1,
            "ptq_top1_percent": 20.0,
            "qat_top1_percent": top1,
            "qat_top5_percent": 99.0,
            "num_test_images": 10000,
            "seconds": {"qat": 10.0, "evaluate": 0.5},
        },
    )
    return folder


def make_sweep(folder: Path, rows, seeds=(0, 1, 2)):
    """Runs of an experiment: ``rows`` maps an override to one accuracy for each seed."""
    for name, values in rows.items():
        for seed, value in zip(seeds, values, strict=True):
            adaptation = {"weight_quantizer": dict(CONFIG["weight_quantizer"], adaptation=name)}
            make_run(
                folder / f"{name},seed={seed}",
                value,
                seed=seed,
                overrides=("experiment=x", name),
                changes={} if name == "ablation=none" else adaptation,
            )
    return folder
