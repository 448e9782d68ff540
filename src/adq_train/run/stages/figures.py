"""Stage evaluate: the test split, read once, and the figures of the run."""

from __future__ import annotations

from torch import nn

from adq_train.artifacts import BitAllocation, LevelCounts, RunResult
from adq_train.quantization.levels import count_levels
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session
from adq_train.training.evaluate import Evaluation, evaluate


def evaluate_models(
    session: Session, calibrated: nn.Module, quantized: nn.Module
) -> tuple[Evaluation, Evaluation, Evaluation]:
    """Reads the test split, once for each of the three models.

    Args:
        session: Holds the float model.
        calibrated: Prepared and calibrated, before any QAT step.
        quantized: After QAT.
    """
    test, ranks = session.data.test, session.ranks
    return (
        evaluate(session.model, test, ranks),
        evaluate(calibrated, test, ranks),
        evaluate(quantized, test, ranks),
    )


def keep_levels(
    session: Session, folder: RunFolder, quantized: nn.Module, allocation: BitAllocation
) -> None:
    """Counts the levels that the trained network uses, on the calibration images."""
    images = (images for images, _ in session.calibration)
    folder.save("levels.json", LevelCounts(count_levels(quantized, images)), of=allocation)


def keep_result(
    folder: RunFolder,
    allocation: BitAllocation,
    figures: tuple[Evaluation, Evaluation, Evaluation],
) -> RunResult:
    """Writes the figures of the run, once the time of every stage is known."""
    before, calibrated, after = figures
    result = RunResult(
        fp_top1_percent=before.top1_percent,
        ptq_top1_percent=calibrated.top1_percent,
        qat_top1_percent=after.top1_percent,
        qat_top5_percent=after.top5_percent,
        num_test_images=after.num_images,
        seconds=dict(folder.seconds),
    )
    folder.save("result.json", result, of=allocation)
    return result
