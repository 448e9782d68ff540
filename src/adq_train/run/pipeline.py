"""One run from a configuration to a result: the straight line, stage by stage."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path

import torch
from omegaconf import DictConfig

from adq_train.artifacts import RunResult
from adq_train.errors import UserError
from adq_train.reporting import report
from adq_train.run.folder import RunFolder, check_same_run, is_done
from adq_train.run.init_from import pinned
from adq_train.run.session import Session, smaller
from adq_train.run.stages.allocate import allocate_bits
from adq_train.run.stages.calibrate import calibrate
from adq_train.run.stages.figures import evaluate_models, keep_levels, keep_result
from adq_train.run.stages.float_model import pretrain, train_teacher
from adq_train.run.stages.profile import profile
from adq_train.run.stages.qat import train_quantized
from adq_train.run.stages.setup import facts
from adq_train.settings.schema import NOTHING, ROUNDING, Config, identity, settings_where
from adq_train.settings.validate import validate
from adq_train.storage.stamps import digest
from adq_train.training.distributed import ALONE, Ranks

log = logging.getLogger(__name__)


def execute(session: Session, path: Path, command: list[str]) -> RunResult:
    """Runs the stages that are not done yet, in the folder ``path``."""
    with RunFolder(path, session.config, session.ranks) as folder:
        log.info("run folder %s, on %s", path, session.parts.device)
        folder.write_manifest(facts(session, command))
        with folder.stage("pretrain"):
            pretrain(session, folder)
        if session.teacher and session.teacher.epochs:
            with folder.stage("teacher"):
                train_teacher(session, folder)
        with folder.stage("profile"):
            table = profile(session, folder)
        with folder.stage("allocate"):
            allocation = allocate_bits(session, folder, table)
        with folder.stage("prepare"):
            calibrated = calibrate(session, allocation)
        with folder.stage("qat"):
            quantized = train_quantized(session, folder, calibrated, allocation)
        with folder.stage("evaluate"):
            figures = evaluate_models(session, calibrated, quantized)
            keep_levels(session, folder, quantized, allocation)
        result = keep_result(folder, allocation, figures)
        if session.ranks.is_main and not session.config.dry_run:
            trackers = session.config.logger
            report.write(folder, table, allocation, result, quantized, trackers)
    return result


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
    require_room(ranks, config, parts.device)
    if config.dry_run:
        with tempfile.TemporaryDirectory(prefix="adq-train-") as scratch:
            config, parts = validate(smaller(cfg, scratch))
            session = Session.open(pinned(config), parts, ranks)
            result = execute(session, Path(scratch, "run"), command)
        if ranks.is_main:
            stages = ", ".join(f"{name} {x:.1f} s" for name, x in result.seconds.items())
            print(f"dry run passed: every stage ran on two batches ({stages}); nothing was kept")
        return
    config = pinned(config)
    path = run_dir(config, experiment, overrides)
    if ranks.is_main:
        check_same_run(path, config.plain())
    done = ranks.broadcast(lambda: is_done(path))
    if not done:
        execute(Session.open(config, parts, ranks), path, command)
    if ranks.is_main:
        report.show(path)
    if done:
        log.info("all stages of %s are done; delete it to run it anew", path)


def require_room(ranks: Ranks, config: Config, device: torch.device) -> None:
    """Refuses what cannot be done by several processes.

    Raises:
        UserError: A batch has fewer images than there are processes, or they share a GPU.
    """
    if ranks.world_size == 1:
        return
    if config.trainer.batch_size < ranks.world_size:
        raise UserError(
            f"trainer.batch_size: {config.trainer.batch_size} images cannot be shared by "
            f"{ranks.world_size} processes; it counts the images of all of them together"
        )
    if device.type == "cuda" and (device.index is not None or not ranks.has_own_gpu):
        raise UserError(
            f"trainer.device: {device} is not one GPU for each process; this machine has "
            f"{torch.cuda.device_count()}: start at most so many processes on it with "
            "trainer.device=cuda, or set trainer.device=cpu"
        )


def run_dir(config: Config, experiment: str | None, overrides: list[str]) -> Path:
    """The run's folder: as given, or ``<output_root>/<experiment>/<overrides>-<hash>``."""
    if config.run_dir:
        return Path(config.run_dir)
    hidden = ("experiment", *settings_where(lambda x: x.affects in (NOTHING, ROUNDING)))
    readable = ",".join(
        text.lstrip("+") for text in overrides if text.lstrip("+").split("=")[0] not in hidden
    )
    # 255 bytes is the longest name that file systems take.
    safe = re.sub(r"[^\w.=,+-]+", "_", readable, flags=re.ASCII)[:200] or "default"
    name = f"{safe}-{digest(identity(config.plain()))[:8]}"
    return Path(config.output_root, experiment or "custom", name)
