"""Stage allocate: the bits of every layer, within the budget."""

from __future__ import annotations

import logging

from adq_train.allocation.allocator import allocate
from adq_train.artifacts import BitAllocation, SensitivityTable
from adq_train.reporting import allocation_text as why
from adq_train.run.artifact_files import require_figures, require_layers
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session
from adq_train.storage.files import write_text

log = logging.getLogger(__name__)


def allocate_bits(session: Session, folder: RunFolder, table: SensitivityTable) -> BitAllocation:
    """Chooses bits within the budget.

    Raises:
        UserError: The budget cannot be met, or the kept allocation is of another model.
    """
    problem, file = session.problem, folder.path / "allocation.json"
    allocation = folder.load(file.name, BitAllocation, of=table)
    if allocation is None:
        allocation = allocate(session.parts.allocator, problem, table)
        folder.save(file.name, allocation, of=table)
    require_layers(file, [x.name for x in allocation.layers], problem.layers)
    require_figures(file, allocation, problem)
    if session.ranks.is_main:
        write_text(folder.path / "allocation.txt", why.render(problem, table, allocation))
    log.info(
        "allocate: %s, average %.2f bits", allocation.allocator, allocation.average_weight_bits
    )
    return allocation
