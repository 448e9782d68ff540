"""A check that all processes of a run hold the same bits."""

from __future__ import annotations

from adq_train.errors import UserError
from adq_train.states import weights_digest
from adq_train.training.hook import Hook
from adq_train.training.trainer import Trainer


class RanksAgree(Hook):
    """Compares the models of all processes after every step."""

    def after_batch(self, trainer: Trainer) -> None:
        """Compares them.

        Raises:
            UserError: A process differs from rank 0.
        """
        digests = trainer.ranks.all_gather(weights_digest(trainer.model))
        odd = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise UserError(
                f"trainer.check_ranks: after step {trainer.steps} the model of rank "
                f"{', '.join(odd)} differs from that of rank 0; the last checkpoint is from "
                "before; please report this"
            )
