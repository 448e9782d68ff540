"""Several processes against one: values, gradients, counts, and what happens when one is lost."""

import os
import signal
import time

import pytest
import torch
from ranks_helpers import run_ranks
from torch import nn
from training_helpers import Drawn, dense, trainer_of

from adq_train.artifacts import LayerInfo, LayerSensitivity
from adq_train.data.base import ALL
from adq_train.errors import UserError
from adq_train.interrupts import Interrupted, caught
from adq_train.sensitivity.split import measure_split
from adq_train.states import weights_digest
from adq_train.training.agreement import RanksAgree
from adq_train.training.average import WeightAverage
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.checkpointing import Checkpoints
from adq_train.training.distributed import (
    ALONE,
    RankLostError,
    Ranks,
    is_first_to_report,
    joined,
    launch_prefix,
)
from adq_train.training.evaluate import evaluate
from adq_train.training.hook import Hook
from adq_train.training.schedule import Cosine

# Uneven, the last smaller than three processes.
UNEVEN = Drawn(7, 5, 8, 2)


def network(norm=False, dropout=0.0):
    return dense(norm, dropout)


def trained(model, *hooks, batches=UNEVEN, **settings):
    """The mean loss of an epoch."""
    return trainer_of(model, *hooks, batches=batches, epochs=1, **settings).train_epoch().train_loss


def test_values_are_exchanged():
    def exchange():
        with joined() as ranks:
            tensor = torch.tensor([1.0, 2.0]) * (ranks.rank + 1)
            shared = ranks.broadcast(
                lambda: {"rank": ranks.rank, "x": tensor, "bytes": b"\x00\xff"}
            )
            weighted = [tensor.clone(), torch.full((2, 1), float(ranks.rank))]
            ranks.all_reduce_mean(weighted, weight=[1, 3, 0][ranks.rank])
            model = nn.Linear(2, 2)
            nn.init.constant_(model.weight, ranks.rank)
            ranks.broadcast_model(model)
            with ranks.local_main_first():
                began = time.monotonic()
                time.sleep(0.05)
            return {
                "shared": shared,
                "gathered": ranks.all_gather(["a", "long text"][: ranks.rank]),
                "largest": ranks.all_reduce_max(ranks.rank, 7 - ranks.rank),
                "sum": ranks.all_reduce_sum(tensor),
                "average": weighted,
                "weight": model.weight.detach(),
                "began": began,
                "first": is_first_to_report(),
                "prefix": launch_prefix(ranks),
            }

    results = run_ranks(3, exchange)
    for x in results:
        assert x["shared"]["rank"] == 0
        assert x["shared"]["bytes"] == b"\x00\xff"
        assert x["shared"]["x"].tolist() == [1, 2]
        assert x["gathered"] == [[], ["a"], ["a", "long text"]]
        assert x["largest"] == [2, 7]
        assert x["sum"].tolist() == [6, 12]
        assert x["average"][0].tolist() == [(1 + 3 * 2) / 4, (2 + 3 * 4) / 4]
        assert x["average"][1].tolist() == [[0.75], [0.75]]
        assert not x["weight"].any()
        assert x["prefix"] == ["torchrun", "--nproc-per-node=3", "-m", "adq_train"]
    assert all(x["began"] >= results[0]["began"] + 0.05 for x in results[1:])
    assert sum(x["first"] for x in results) == 1


def test_a_single_process_exchanges_nothing():
    tensor = torch.tensor([1.0])
    assert ALONE.broadcast(lambda: tensor) is tensor
    assert ALONE.all_reduce_sum(tensor) is tensor
    assert ALONE.all_gather(tensor) == [tensor]
    assert ALONE.all_reduce_max(3, 4) == [3, 4]
    ALONE.all_reduce_mean([tensor], 0)
    ALONE.broadcast_model(nn.Linear(1, 1))
    assert tensor.tolist() == [1]
    assert launch_prefix(ALONE) == ["adq-train"]
    assert is_first_to_report()


def test_the_command_of_several_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert " ".join(launch_prefix(Ranks(1, 8))) == (
        "torchrun --nnodes=2 … --nproc-per-node=4 -m adq_train"
    )


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"accumulate_batches": 2, "gradient_clip_norm": 0.3}])
def test_training_is_that_of_one_process_up_to_rounding(world_size, settings):
    """Uneven batches, one of them with fewer images than processes."""
    alone = network()
    single = trained(alone, **settings)

    def train():
        with joined() as ranks:
            model = network()
            loss = trained(model, ranks=ranks, **settings)
            return loss, model.state_dict(), weights_digest(model)

    results = run_ranks(world_size, train)
    losses, states, digests = zip(*results, strict=True)
    assert len(set(digests)) == 1
    assert len(set(losses)) == 1
    assert losses[0] == pytest.approx(single, rel=1e-5)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5)


def test_all_processes_hold_the_same_bits_with_batch_norm_and_dropout():
    def train():
        with joined() as ranks:
            model = network(norm=True, dropout=0.2)
            average, digests = WeightAverage(model, 0.9), []

            class Digests(Hook):
                def after_batch(self, trainer):
                    digests.append(weights_digest(model) + weights_digest(average.model))

            trained(model, average, Digests(), batches=Drawn(9, 8, 7, 6), ranks=ranks)
            return digests, model[1].running_mean, int(model[1].num_batches_tracked)

    results = run_ranks(3, train)
    assert len(results[0][0]) == len(set(results[0][0])) == 4
    for digests, mean, batches in results:
        assert digests == results[0][0]
        assert torch.equal(mean, results[0][1])
        assert batches == 4


def test_dropout_differs_between_processes():
    seen = []
    for rank in (0, 1):
        model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2))
        model[1].register_forward_hook(lambda *call: seen.append(call[2] == 0))
        trained(model, batches=Drawn(6), ranks=Alone(rank))
    assert not torch.equal(seen[0], seen[2])  # the others are of evaluations


class Alone(Ranks):
    """A rank that exchanges nothing and sees whole batches."""

    def __init__(self, rank):
        super().__init__(rank)

    own = ALL


def test_running_statistics_are_the_mean_over_images():
    """Momentum 1: the statistics of the step alone, of 5 and of 4 images."""

    def train():
        with joined() as ranks:
            model = nn.Sequential(nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 2))
            trained(model, batches=Drawn(9), ranks=ranks)
            return model[0].running_mean, model[0].running_var

    images, _ = next(Drawn(9).epoch(0))
    parts = images[0::2], images[1::2]
    for mean, variance in run_ranks(2, train):
        torch.testing.assert_close(mean, images.mean(0))
        expected = (5 * parts[0].var(0) + 4 * parts[1].var(0)) / 9
        torch.testing.assert_close(variance, expected)


def test_evaluation_counts_every_image_once():
    batches = Drawn(7, 5, 8, 2, 1, 9, 4)
    model = network(norm=True)
    alone = evaluate(model, batches)

    def share():
        with joined() as ranks:
            own = sum(len(y) for _, y in batches.epoch(0, ranks.own))
            return evaluate(model, batches, ranks), own

    for world_size in (2, 3):
        results = run_ranks(world_size, share)
        assert sum(own for _, own in results) == 36
        for found, _ in results:
            assert found.num_images == 36
            assert found.top1_percent == alone.top1_percent
            assert found.top5_percent == alone.top5_percent
            assert found.loss == pytest.approx(alone.loss, rel=1e-12)


def test_layers_are_measured_by_several_and_come_in_order():
    layers = [LayerInfo(f"layer{i}", 10, 10, 10) for i in range(5)]

    def measured():
        with joined() as ranks:
            asked = []

            def measure(some):
                for x in some:
                    asked.append(x.name)
                    yield LayerSensitivity(x.name, 10, 10, {2: float(x.name[-1]) / 3})

            return list(measure_split(measure, "made-up", (2,), layers, ranks)), asked

    (rows, first), (others, second) = run_ranks(2, measured)
    assert rows == others
    assert [x.name for x in rows] == [x.name for x in layers]
    assert [x.sensitivity[2] for x in rows] == [i / 3 for i in range(5)]
    assert (first, second) == (["layer0", "layer2", "layer4"], ["layer1", "layer3"])


def test_the_loss_of_a_process_ends_the_others():
    def train():
        with joined() as ranks:
            ranks.all_reduce_max(0)
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.all_reduce_max(0)

    survivor, killed = run_ranks(2, train)
    assert killed is None
    assert isinstance(survivor, RankLostError)
    assert "another process of this run has stopped" in str(survivor)


def test_the_others_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="cannot reach one another"), joined():
        pass


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_saves_and_the_rest_continues_bit_for_bit(tmp_path, told):
    def train(folder, stop_after=None):
        with joined() as ranks, caught():
            model = network(norm=True, dropout=0.2)
            calls = []

            def forward(*_):
                calls.append(1)
                if len(calls) == stop_after and ranks.rank == told:
                    os.kill(os.getpid(), signal.SIGTERM)

            model.register_forward_pre_hook(forward)
            checkpoints = Checkpoints(CheckpointFolder(folder), "k", steps=2)
            trainer_of(
                model,
                RanksAgree(),
                checkpoints,
                batches=Drawn(8, 6, 8, 5),
                schedule=Cosine(),
                ranks=ranks,
                epochs=3,
            ).fit()
            return weights_digest(model)

    def stopped():
        try:
            return train(tmp_path / "broken", stop_after=9)
        except Interrupted as stop:
            return stop.number

    whole = run_ranks(2, lambda: train(tmp_path / "whole"))
    assert run_ranks(2, stopped) == [signal.SIGTERM, signal.SIGTERM]
    kept = CheckpointFolder(tmp_path / "broken").load("k")
    # Four steps and two batches of validation in the first epoch, then the third step.
    assert (kept["epoch"], kept["sums"]["batches"]) == (1, 3)
    assert run_ranks(2, lambda: train(tmp_path / "broken")) == whole
