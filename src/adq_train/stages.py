"""The stages of a run; each takes what the stage before it made, and keeps its own value."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Problem
from adq_train.allocation.uniform import likely_bits
from adq_train.artifacts import (
    BitAllocation,
    LayerInfo,
    LayerSensitivity,
    LevelCounts,
    RunResult,
    SensitivityTable,
)
from adq_train.data.base import ImageData
from adq_train.errors import UserError
from adq_train.quantization.layers import same_weight
from adq_train.quantization.levels import count_levels
from adq_train.quantization.movement import MovementMeter, report_movement
from adq_train.quantization.prepare import collect_inputs, prepare
from adq_train.reporting import allocation_text as why
from adq_train.reporting.progress import Progress
from adq_train.reporting.recorder import Recorder
from adq_train.run.artifact_files import require_figures, require_layers
from adq_train.run.folder import RunFolder, identity, read_metrics
from adq_train.run.shared_model import SharedModel, float_inputs
from adq_train.sensitivity.base import Conditions, Training
from adq_train.sensitivity.noise import evened_out, oddities, settle
from adq_train.sensitivity.outputs import caveat, float_outputs
from adq_train.sensitivity.partial import PartialTable, weights_digest
from adq_train.sensitivity.split import measure_split
from adq_train.settings.validate import Parts
from adq_train.states import load_state
from adq_train.storage.files import sha256, write_text
from adq_train.storage.locks import exclusive
from adq_train.storage.stamps import digest
from adq_train.training.batch_norm import first_images, reestimate_batch_norm
from adq_train.training.checkpoint_folder import CheckpointFolder, Rhythm
from adq_train.training.distillation import Teacher
from adq_train.training.distributed import ALONE, Ranks
from adq_train.training.evaluate import Evaluation, evaluate
from adq_train.training.loop import fit
from adq_train.training.mixing import Mixing
from adq_train.training.optimizers import Optimizers, make_optimizers
from adq_train.training.step import TrainingStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What every stage of a run needs."""

    config: dict[str, Any]
    parts: Parts
    data: ImageData
    folder: RunFolder
    ranks: Ranks = ALONE

    @property
    def seed(self) -> int:
        """The run's seed."""
        seed: int = self.config["seed"]
        return seed


def pretrain(run: Context, model: nn.Module) -> None:
    """Trains the float model, or takes the one that a run with the same float part has trained.

    Raises:
        UserError: The kept model is damaged.
    """
    settings = run.config["pretrain"]
    given = run.config["init_from"] or (settings["checkpoint"] and settings["head"] == "keep")
    if given or not settings["epochs"]:
        log.info("pretrain: float weights as given")
        _goes_on_with(run, "pretrain", model)
        return
    shared = _train_float(
        run, model, run.config["model"], settings["epochs"], "pretrain", settings["checkpoint"]
    )
    if run.ranks.is_main:
        _copy_metrics(shared, run.folder.path)


def keep_float(run: Context, model: nn.Module) -> None:
    """Keeps the float model with the run, for the runs that begin where this one ends."""
    if run.ranks.is_main:
        state = {"key": float_key(run.config), "model": model.state_dict()}
        CheckpointFolder(run.folder.path / "checkpoints").keep("float", state)


def float_key(config: dict[str, Any]) -> str:
    """The run that a float model was kept with."""
    return digest([identity(config), "float"])


def train_teacher(run: Context, teacher: Teacher) -> None:
    """Trains the teacher of a distillation, or takes it as :func:`pretrain` takes a float model.

    Raises:
        UserError: The kept model is damaged.
    """
    epochs = 1 if run.config["dry_run"] else teacher.epochs
    _train_float(run, teacher.model, run.config["distillation"]["model"], epochs, "teacher")


def _train_float(
    run: Context,
    model: nn.Module,
    source: dict[str, Any],
    epochs: int,
    stage: str,
    checkpoint: str | None = None,
) -> Path:
    """Float training in a folder that all runs share, unless that holds the trained model already.

    Args:
        run: The run.
        model: With its first weights; it has the trained ones afterwards.
        source: The configuration of the network.
        epochs: Of training.
        stage: Its name in the log and among the run's times.
        checkpoint: The file that the weights come from, where it is one.

    Returns:
        The shared folder.

    Raises:
        UserError: The kept model is damaged.
    """
    device, processes = str(run.parts.device), run.ranks.world_size
    inputs = float_inputs(run.config, source, epochs, run.data.fingerprint, device, processes)
    if checkpoint:
        inputs["pretrain"]["checkpoint"] = sha256(Path(checkpoint))
    root = Path(run.config["output_root"], "shared")
    noted = run.folder.float_model(stage)
    # One process looks whether the model of an earlier start is still there.
    folder = run.ranks.share(lambda: str(SharedModel(root, inputs, noted).folder))
    shared = SharedModel(root, inputs, Path(folder).name)
    main = run.ranks.is_main
    with exclusive(shared.folder) if main else contextlib.nullcontext():
        if not run.ranks.share(shared.weights.exists):
            if main:
                shared.begin()
            _fit(run, model, shared.folder, shared.key, stage, epochs)
            if main:
                shared.save(model)
        else:
            log.info("%s: float model from %s", stage, shared.folder)
        if main:
            shared.load(model)
    run.ranks.equalize(model)
    watched = evaluate(model, run.data.validation, run.ranks)
    log.info("%s: validation top-1 %.2f %%", stage, watched.top1_percent)
    _goes_on_with(run, stage, model, shared.folder.name)
    return shared.folder


def _goes_on_with(run: Context, stage: str, model: nn.Module, shared: str | None = None) -> None:
    """Notes the float model, or checks that it is the one that the run began with."""
    run.folder.goes_on_with(stage, run.data.fingerprint, weights_digest(model), shared)


def _copy_metrics(source: Path, target: Path) -> None:
    """Gives a run the records of the float training that it shares."""
    own = [x for x in read_metrics(target / "metrics.jsonl") if x["stage"] != "pretrain"]
    records = [*read_metrics(source / "metrics.jsonl"), *own]
    write_text(target / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in records))


def profile(run: Context, model: nn.Module, problem: Problem) -> SensitivityTable:
    """Measures what quantizing each layer costs; layers that are done already are not repeated.

    Args:
        run: The run.
        model: The float model.
        problem: Its layers, and the budget for metrics that look at it.

    Raises:
        UserError: A sensitivity or an output of the float model is not finite, or the kept table
            is of another model.
    """
    layers = problem.layers
    table = run.folder.load("sensitivity.json", SensitivityTable)
    finished = run.folder.path / "sensitivity.partial.json"
    if table is None:
        metric, bit_widths = run.parts.sensitivity, run.config["bits"]["candidates"]
        key = digest([run.folder.origin, weights_digest(model)])
        ranks = run.ranks
        partial = PartialTable(finished, key, metric.name, tuple(bit_widths), ranks)
        done = {row.name for row in partial.table.layers}
        log.info("profile: %d layers at %s bits", len(layers), bit_widths)
        num_inputs = {x.name: x.num_inputs for x in layers}
        if done:
            log.info("profile: continuing after %d layers", len(done))
        batches = list(run.data.calibration.epoch(0))
        doubt = caveat(float_outputs(model, batches), [targets for _, targets in batches])
        if doubt and not run.config["dry_run"]:  # whose model has seen two batches
            log.warning("profile: %s; sensitivities of such a model mean little", doubt)
        conditions = Conditions(
            bit_widths,
            batches,
            run.parts.make_weight_quantizer,
            run.parts.make_activation_quantizer,
            run.seed,
            likely_bits(problem),
            training=Training(
                run.data.train,
                lambda network: _optimizers(run, "optimizer", network),
                problem,
                short=run.config["dry_run"],
            ),
        )

        def measure(some: Sequence[LayerInfo]) -> Iterator[LayerSensitivity]:
            return metric.measure(model, some, conditions)

        todo = [x for x in layers if x.name not in done]
        with Progress("profile", len(layers), len(done)) as progress:
            for row in measure_split(measure, metric.name, bit_widths, todo, ranks):
                partial.append(settle(replace(row, num_inputs=num_inputs[row.name])))
                progress.advance(row.name)
        table = replace(partial.table, caveat=doubt)
        if evened := evened_out(table):
            log.info("profile: %d layers were evened out within their standard error", evened)
        if odd := oddities(table):
            log.warning(odd)
        run.folder.save("sensitivity.json", table)
    if run.ranks.is_main:
        finished.unlink(missing_ok=True)
    names = [x.name for x in table.layers]
    require_layers(run.folder.path / "sensitivity.json", names, layers)
    return table


def allocate_bits(run: Context, problem: Problem, table: SensitivityTable) -> BitAllocation:
    """Chooses bits within the budget.

    Raises:
        UserError: The budget cannot be met, or the kept allocation is of another model.
    """
    file = run.folder.path / "allocation.json"
    allocation = run.folder.load(file.name, BitAllocation, of=table)
    if allocation is None:
        allocation = allocate(run.parts.allocator, problem, table)
        run.folder.save(file.name, allocation, of=table)
    require_layers(file, [x.name for x in allocation.layers], problem.layers)
    require_figures(file, allocation, problem)
    if run.ranks.is_main:
        write_text(run.folder.path / "allocation.txt", why.render(problem, table, allocation))
    log.info(
        "allocate: %s, average %.2f bits", allocation.allocator, allocation.average_weight_bits
    )
    return allocation


def prepare_and_calibrate(
    run: Context,
    model: nn.Module,
    allocation: BitAllocation,
    source: nn.Module | None = None,
    anew: Collection[str] = (),
) -> nn.Module:
    """A quantized copy of the float model, initialised from the calibration images.

    Batch norm's statistics are estimated anew where a quantizer is new.

    Args:
        run: The run.
        model: Its float model.
        allocation: Its bits.
        source: A trained network of the same layers, quantized, which weights and quantizers are
            taken from, and the inputs that quantizers are calibrated on; None: the float model.
        anew: The quantizers that are calibrated all the same, by name.
    """
    names = [name for x in allocation.layers for name in same_weight(model, x.name)]
    images = (images for images, _ in run.data.calibration.epoch(0))
    inputs = collect_inputs(source or model, names, images, run.seed)
    quantized = copy.deepcopy(model)
    taken = source.state_dict() if source else {}
    if source:
        load_state(quantized, {name: taken[name] for name in quantized.state_dict()})
    prepare(
        quantized,
        allocation,
        run.parts.make_weight_quantizer,
        run.parts.make_activation_quantizer,
        inputs,
        run.seed,
    )
    if source:
        own = tuple(f"{quantizer}." for quantizer in anew)
        state = quantized.state_dict()
        load_state(quantized, {k: x if k.startswith(own) else taken[k] for k, x in state.items()})
    if anew or not source:
        together = run.config["trainer"]["eval_batch_size"]
        calibration = run.data.calibration
        reestimate_batch_norm(quantized, first_images(calibration, 0, 10**9, together))
    run.ranks.equalize(quantized)
    watched = evaluate(quantized, run.data.validation, run.ranks)
    stage = "init_from" if source else "calibrate"
    log.info("%s: validation top-1 %.2f %%", stage, watched.top1_percent)
    return quantized


def qat_key(config: dict[str, Any], allocation: BitAllocation, origin: str | None) -> str:
    """What QAT depends on; its checkpoints carry it.

    Args:
        config: The resolved configuration.
        allocation: The bits.
        origin: The run's; None for one of a version that had none.
    """
    return digest([identity(config), allocation.to_json(), *([origin] if origin else [])])


def train_quantized(
    run: Context, model: nn.Module, allocation: BitAllocation, teacher: Teacher | None
) -> None:
    """Quantization-aware training, in place; ends with the model that ``trainer.select`` names.

    Args:
        run: The run.
        model: Prepared and calibrated.
        allocation: Its bits.
        teacher: For distillation.
    """
    key = qat_key(run.config, allocation, run.folder.origin)
    if not run.config["trainer"]["epochs"]:
        if run.ranks.is_main:  # for adq-export and adq-eval
            state = {"key": key, "epoch": 0, "model": model.state_dict()}
            CheckpointFolder(run.folder.path / "checkpoints").save(state, best=True)
        return
    epochs = run.config["trainer"]["epochs"]
    meter = MovementMeter(model)
    checkpoints = _fit(run, model, run.folder.path, key, "qat", epochs, teacher)
    if run.config["trainer"]["select"] == "best":
        best: dict[str, Any] | None = run.ranks.share(
            lambda: checkpoints.load(key, names=("best",))
        )
        if best is None:
            raise UserError(f"{checkpoints.folder}/best.pt is missing or damaged")
        load_state(model, best["model"])
    report_movement(meter.measure(model))
    watched = evaluate(model, run.data.validation, run.ranks)
    log.info("qat: validation top-1 %.2f %%", watched.top1_percent)


def _fit(
    run: Context,
    model: nn.Module,
    folder: Path,
    key: str,
    stage: str,
    epochs: int,
    teacher: Teacher | None = None,
) -> CheckpointFolder:
    """QAT (stage ``qat``) or float training, recorded and checkpointed in ``folder``."""
    trainer = run.config["trainer"]
    step = TrainingStep(
        model,
        _optimizers(run, "optimizer" if stage == "qat" else "pretrain", model),
        label_smoothing=trainer["label_smoothing"],
        gradient_clip_norm=trainer["gradient_clip_norm"],
        accumulate_batches=trainer["accumulate_batches"],
        precision=trainer["precision"],
        channels_last=trainer["channels_last"],
        compile=trainer["compile"],
        skip_nonfinite_steps=trainer["skip_nonfinite_steps"],
        average_decay=trainer["weight_average_decay"],
        mix=Mixing(
            run.data.num_classes,
            run.seed,
            mixup_alpha=trainer["mixup_alpha"],
            cutmix_alpha=trainer["cutmix_alpha"],
        ),
        teacher=teacher,
        ranks=run.ranks,
    )
    checkpoints = CheckpointFolder(folder / "checkpoints")
    # A float model is recorded as such: another run's teacher may be this one's model.
    recorder = Recorder(folder, "qat" if stage == "qat" else "pretrain", epochs, model)
    log.info("%s: %d epochs of %d steps", stage, epochs, len(run.data.train))

    def on_start(done: int, seconds: float) -> None:
        if run.ranks.is_main:
            recorder.start(done)
        if seconds:  # that a killed process spent on steps that need not be done again
            run.folder.seconds[stage] = seconds

    try:
        fit(
            step,
            run.data,
            run.parts.scheduler,
            epochs=epochs,
            stage=stage,
            checkpoints=checkpoints,
            key=key,
            on_start=on_start,
            on_epoch=recorder.epoch,
            batch_norm_images=trainer["batch_norm_reestimation"],
            # Averages over small batches mislead a network whose values cross thresholds. A float
            # network has none, and those that are kept already stay valid.
            batch_norm_together=trainer["eval_batch_size"] if stage == "qat" else 1,
            seed=run.seed,
            rhythm=Rhythm(trainer["checkpoint_every_steps"], trainer["checkpoint_every_minutes"]),
            check_ranks=trainer["check_ranks"],
        )
    finally:
        recorder.close()
    return checkpoints


def _optimizers(run: Context, section: str, model: nn.Module) -> Optimizers:
    """The optimizers of a model, with the rates of one section (``optimizer`` or ``pretrain``)."""
    rates, parts = run.config[section], run.parts
    return make_optimizers(
        model,
        rates["lr"],
        rates["weight_decay"],
        parts.make_optimizer,
        parts.make_quantizer_optimizer,
    )


def evaluate_models(
    run: Context, model: nn.Module, calibrated: nn.Module, quantized: nn.Module
) -> tuple[Evaluation, Evaluation, Evaluation]:
    """Reads the test split, once for each of the three models.

    Args:
        run: The run.
        model: The float model.
        calibrated: Prepared and calibrated, before any QAT step.
        quantized: After QAT.
    """
    test, ranks = run.data.test, run.ranks
    return (
        evaluate(model, test, ranks),
        evaluate(calibrated, test, ranks),
        evaluate(quantized, test, ranks),
    )


def keep_levels(run: Context, quantized: nn.Module, allocation: BitAllocation) -> LevelCounts:
    """Counts the levels that the trained network uses, on the calibration images."""
    images = (images for images, _ in run.data.calibration.epoch(0))
    levels = LevelCounts(count_levels(quantized, images))
    run.folder.save("levels.json", levels, of=allocation)
    return levels


def keep_result(
    run: Context,
    allocation: BitAllocation,
    before: Evaluation,
    calibrated: Evaluation,
    after: Evaluation,
) -> RunResult:
    """Writes the figures of the run, once the time of every stage is known."""
    result = RunResult(
        fp_top1_percent=before.top1_percent,
        ptq_top1_percent=calibrated.top1_percent,
        qat_top1_percent=after.top1_percent,
        qat_top5_percent=after.top5_percent,
        num_test_images=after.num_images,
        seconds=dict(run.folder.seconds),
    )
    run.folder.save("result.json", result, of=allocation)
    return result
