"""Stage profile: what quantizing each layer costs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable
from adq_train.progress import Progress
from adq_train.run.artifact_files import require_layers
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session
from adq_train.sensitivity.base import Conditions, Training
from adq_train.sensitivity.noise import evened_out, oddities, settle
from adq_train.sensitivity.outputs import caveat, float_outputs
from adq_train.sensitivity.partial import PartialTable
from adq_train.sensitivity.split import measure_split
from adq_train.states import weights_digest
from adq_train.storage.stamps import digest

log = logging.getLogger(__name__)


def profile(session: Session, folder: RunFolder) -> SensitivityTable:
    """Measures the sensitivities, or takes them where an earlier start has measured them.

    Raises:
        UserError: A sensitivity or an output of the float model is not finite, or the kept table
            is of another model.
    """
    table = folder.load("sensitivity.json", SensitivityTable)
    if table is None:
        table = measure(session, folder)
        folder.save("sensitivity.json", table)
    if session.ranks.is_main:
        (folder.path / "sensitivity.partial.json").unlink(missing_ok=True)
    names = [x.name for x in table.layers]
    require_layers(folder.path / "sensitivity.json", names, session.problem.layers)
    return table


def measure(session: Session, folder: RunFolder) -> SensitivityTable:
    """Measures layer after layer; those that are done already are not repeated.

    Raises:
        UserError: A sensitivity or an output of the float model is not finite.
    """
    model, layers = session.model, session.problem.layers
    metric, ranks = session.parts.sensitivity, session.ranks
    given = conditions(session)
    doubt = caveat(float_outputs(model, given.batches), [targets for _, targets in given.batches])
    if doubt and not session.config.dry_run:  # whose model has seen two batches
        log.warning("profile: %s; sensitivities of such a model mean little", doubt)
    path = folder.path / "sensitivity.partial.json"
    key = digest([folder.origin, weights_digest(model)])
    partial = PartialTable(path, key, metric.name, tuple(given.bit_widths), ranks)
    done = {row.name for row in partial.table.layers}
    log.info("profile: %d layers at %s bits", len(layers), given.bit_widths)
    if done:
        log.info("profile: continuing after %d layers", len(done))

    def rows(some: Sequence[LayerInfo]) -> Iterator[LayerSensitivity]:
        return metric.measure(model, some, given)

    num_inputs = {x.name: x.num_inputs for x in layers}
    todo = [x for x in layers if x.name not in done]
    with Progress("profile", len(layers), len(done)) as progress:
        for row in measure_split(rows, metric.name, given.bit_widths, todo, ranks):
            partial.append(settle(replace(row, num_inputs=num_inputs[row.name])))
            progress.advance(row.name)
    table = replace(partial.table, caveat=doubt)
    if evened := evened_out(table):
        log.info("profile: Ω of %d of the layers was smoothed within its standard error", evened)
    if odd := oddities(table):
        log.warning(odd)
    return table


def conditions(session: Session) -> Conditions:
    """Under what a session's layers are measured."""
    config, parts = session.config, session.parts
    return Conditions(
        config.bits.candidates,
        session.calibration,
        parts.make_weight_quantizer,
        parts.make_activation_quantizer,
        config.seed,
        Training(session.data.train, session.optimizers, session.problem),
    )
