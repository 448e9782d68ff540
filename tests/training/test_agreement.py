"""A process that holds other bits is found, after the step in which it strayed."""

from types import SimpleNamespace

import pytest
from ranks_helpers import run_ranks
from torch import nn
from training_helpers import Drawn, dense, trainer_of

from adq_train.errors import UserError
from adq_train.training.agreement import RanksAgree
from adq_train.training.distributed import joined
from adq_train.training.hook import Hook


def test_a_process_that_differs_is_found():
    def compare():
        with joined() as ranks:
            model = nn.Linear(2, 2)
            nn.init.zeros_(model.weight)
            nn.init.zeros_(model.bias)
            RanksAgree().after_batch(SimpleNamespace(ranks=ranks, model=model, steps=3))
            if ranks.rank == 1:
                model.weight.data[0, 0] = 1e-30
            RanksAgree().after_batch(SimpleNamespace(ranks=ranks, model=model, steps=4))

    for error in run_ranks(3, compare):
        assert isinstance(error, UserError)
        assert "after step 4 the model of rank 1 differs" in str(error)


class Strays(Hook):
    """A process that changes a buffer after its second batch."""

    def after_batch(self, trainer):
        if trainer.steps == 2 and trainer.ranks.rank == 1:
            trainer.model[1].running_mean += 1


@pytest.mark.parametrize("strays", [False, True])
def test_it_is_looked_for_after_every_step(strays):
    def train():
        with joined() as ranks:
            hooks = [*([Strays()] if strays else []), RanksAgree()]
            trainer = trainer_of(dense(), *hooks, batches=Drawn(6, 6, 4), ranks=ranks, epochs=2)
            trainer.fit()
            return trainer.steps

    for found in run_ranks(2, train):
        if strays:
            assert "trainer.check_ranks: after step 2 the model of rank 1 differs" in str(found)
        else:
            assert found == 6
