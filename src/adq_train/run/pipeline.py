"""One run from a configuration to a result: the straight line, stage by stage."""

from __future__ import annotations

import copy
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from adq_train.allocation.achieved import achieved, require_achieved
from adq_train.allocation.budget import Problem, budget_from
from adq_train.allocation.patterns import by_layer, pinned_bits
from adq_train.artifacts import RunResult
from adq_train.data.base import Loading
from adq_train.errors import UserError
from adq_train.quantization.copies import unfuse
from adq_train.quantization.describe import describe_layers
from adq_train.reporting import report
from adq_train.run.folder import (
    NOT_PART_OF_A_RUN,
    RunFolder,
    check_same_run,
    identity,
    input_files,
    is_done,
)
from adq_train.run.init_from import open_start, pin, prepare_from
from adq_train.run.stages import (
    Context,
    allocate_bits,
    evaluate_models,
    keep_float,
    keep_levels,
    keep_result,
    prepare_and_calibrate,
    pretrain,
    profile,
    train_quantized,
    train_teacher,
)
from adq_train.sensitivity.base import ReadsAhead
from adq_train.settings.validate import Parts, validate
from adq_train.states import load_checkpoint, load_state
from adq_train.storage.files import sha256
from adq_train.storage.stamps import digest
from adq_train.training.device import use
from adq_train.training.distributed import ALONE, Ranks

log = logging.getLogger(__name__)

# A dry run tells whether everything runs, not whether two steps from untrained weights converge:
# at the full rate they diverge where a whole run does not. Thresholds of an untrained deep network
# have gradients of any size, so in QAT all is computed and no weight moves.
DRY_RUN_RATES = {"pretrain": 1e-3, "optimizer": 0.0}


def run(
    cfg: DictConfig,
    experiment: str | None,
    overrides: list[str],
    command: list[str],
    ranks: Ranks = ALONE,
) -> None:
    """Runs a composed configuration, or continues it, or says that it is done.

    Args:
        cfg: The composed configuration.
        experiment: Name of the experiment, for the run's folder.
        overrides: The command line's overrides, for the run's folder.
        command: What repeats this run, for its manifest.
        ranks: The processes of the run.

    Raises:
        UserError: Something outside the program is wrong; nothing is left half-written.
    """
    config, parts = validate(cfg)
    check_ranks(ranks, config, parts.device)
    pin(config)
    if config["dry_run"]:
        with tempfile.TemporaryDirectory(prefix="adq-train-") as scratch:
            config["output_root"] = scratch
            config["pretrain"]["epochs"] = min(1, config["pretrain"]["epochs"])
            config["trainer"]["epochs"] = min(1, config["trainer"]["epochs"])
            for section, factor in DRY_RUN_RATES.items():
                config[section]["lr"] *= factor
            result = execute(config, parts, Path(scratch, "run"), command, ranks)
        if not ranks.is_main:
            return
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
        print(f"dry run passed: every stage ran on two batches ({stages}); nothing was kept")
        return
    path = run_dir(config, experiment, overrides)
    if ranks.is_main:
        check_same_run(path, config)
    done = ranks.share(lambda: is_done(path))
    if not done:
        execute(config, parts, path, command, ranks)
    if ranks.is_main:
        report.show(path)
    if done:
        log.info("all stages of %s are done; delete it to run it anew", path)


def execute(
    config: dict[str, Any], parts: Parts, path: Path, command: list[str], ranks: Ranks = ALONE
) -> RunResult:
    """Runs the stages that are not done yet, in the folder ``path``."""
    use(
        parts.device,
        deterministic=config["trainer"]["deterministic"],
        precision=config["trainer"]["precision"],
    )
    torch.manual_seed(config["seed"])
    loading = Loading(
        config["trainer"]["batch_size"] * config["trainer"]["accumulate_batches"],
        config["trainer"]["eval_batch_size"],
        config["seed"],
        parts.device,
        ranks.world_size,
    )
    with ranks.one_first():
        data = parts.data.load(loading)
        model = parts.model.build(data.num_classes, data.image_shape[0])
    start = open_start(config, data)
    data = data.for_dry_run() if config["dry_run"] else data
    checkpoint = config["pretrain"]["checkpoint"]
    load_checkpoint(model, config["pretrain"])
    if start and start.float_state and not checkpoint:
        load_state(model, start.float_state)
    unfuse(model)
    model.to(parts.device)
    ranks.equalize(model)
    torch.manual_seed(config["seed"])  # a trained teacher begins like a float model of its own run
    teacher = parts.distillation.teacher(model, data.num_classes, data.image_shape[0])
    if config["trainer"]["channels_last"]:  # in all stages: a resumed run has the same bits then
        for network in (model, teacher.model) if teacher else (model,):
            network.to(memory_format=torch.channels_last)

    images, _ = next(data.calibration.epoch(0))
    layers = describe_layers(model, images[:1])
    bits = config["bits"]
    own = by_layer("bits.candidates_per_layer", bits["candidates_per_layer"] or {}, layers)
    problem = Problem(
        layers,
        pinned_bits(layers, bits["first_last"], bits["pinned"] or {}),
        tuple(bits["candidates"]),
        budget_from(config["budget"], layers),
        {name: tuple(widths) for name, widths in own.items()},
        bits["tied"],
    )
    parts.allocator.check(problem)
    if isinstance(parts.sensitivity, ReadsAhead):
        apart = not problem.tied and parts.allocator.needs_table
        parts.sensitivity.check(layers, problem.candidates, apart)

    with RunFolder(path, config, ranks) as folder:
        folder.write_manifest(
            {
                "command": command,
                "seed": config["seed"],
                "device": str(parts.device),
                "processes": ranks.world_size,
                "compile": config["trainer"]["compile"],
                "channels_last": config["trainer"]["channels_last"],
                "data": {"name": data.name, "fingerprint": data.fingerprint},
                "checkpoint_sha256": sha256(Path(checkpoint)) if checkpoint else None,
                "files": {name: sha256(path) for name, path in input_files(config).items()}
                | ({"init_from": config["init_from_sha256"]} if start else {}),
                "input": data.input_format.to_dict(),
                "model": {"num_float_values": report.num_float_values(model, layers)},
            }
        )
        run = Context(config, parts, data, folder, ranks)
        log.info("run folder %s, on %s", path, parts.device)
        with folder.stage("pretrain"):
            pretrain(run, model)
            keep_float(run, model)
        if teacher and teacher.epochs:
            with folder.stage("teacher"):
                train_teacher(run, teacher)
        with folder.stage("profile"):
            table = profile(run, model, problem)
        with folder.stage("allocate"):
            allocation = allocate_bits(run, problem, table)
        with folder.stage("prepare"):
            if start:
                calibrated = prepare_from(run, start, model, allocation)
            else:
                calibrated = prepare_and_calibrate(run, model, allocation)
            require_achieved(allocation, achieved(calibrated, images[:1], problem.pinned))
            quantized = copy.deepcopy(calibrated)
        with folder.stage("qat"):
            train_quantized(run, quantized, allocation, teacher)
        with folder.stage("evaluate"):
            figures = evaluate_models(run, model, calibrated, quantized)
            keep_levels(run, quantized, allocation)
        result = keep_result(run, allocation, *figures)
        if not config["dry_run"] and ranks.is_main:
            report.write(folder, table, allocation, result, quantized)
    return result


def check_ranks(ranks: Ranks, config: dict[str, Any], device: torch.device) -> None:
    """Refuses what cannot be done by several processes.

    Raises:
        UserError: A batch has fewer images than there are processes, or they share a GPU.
    """
    if ranks.world_size == 1:
        return
    if config["trainer"]["batch_size"] < ranks.world_size:
        raise UserError(
            f"trainer.batch_size: {config['trainer']['batch_size']} images cannot be shared by "
            f"{ranks.world_size} processes; it counts the images of all of them together"
        )
    if device.type == "cuda" and (device.index is not None or not ranks.has_own_gpu):
        raise UserError(
            f"trainer.device: {device} is not one GPU for each process; this machine has "
            f"{torch.cuda.device_count()}: start at most so many processes on it with "
            "trainer.device=cuda, or set trainer.device=cpu"
        )


def run_dir(config: dict[str, Any], experiment: str | None, overrides: list[str]) -> Path:
    """The run's folder: as given, or ``<output_root>/<experiment>/<overrides>-<hash>``."""
    if config["run_dir"]:
        return Path(config["run_dir"])
    hidden = ("experiment", *NOT_PART_OF_A_RUN)
    readable = ",".join(
        text.lstrip("+") for text in overrides if text.lstrip("+").split("=")[0] not in hidden
    )
    # 255 bytes is the longest name that file systems take.
    safe = re.sub(r"[^\w.=,+-]+", "_", readable, flags=re.ASCII)[:200] or "default"
    name = f"{safe}-{digest(identity(config))[:8]}"
    return Path(config["output_root"], experiment or "custom", name)
