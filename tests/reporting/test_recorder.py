"""What is recorded agrees with the checkpoints, also after an interruption."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.movement import MovementMeter
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.reporting.recorder import Recorder
from adq_train.run.folder import read_metrics
from adq_train.settings.schema import TrainerConfig
from adq_train.training.distributed import ALONE, Ranks
from adq_train.training.hook import EpochReport


def report(epoch, loss=1.0):
    return EpochReport(
        epoch, 10 * epoch, loss, 2.0, 50.0 + epoch, 0.1, 3.0 * epoch, 80.0, 5.0, 10**6
    )


def network(bits=(2, 8)):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in bits))
    for index, bit_width in enumerate(bits):
        weights, inputs = AdqWeightQuantizer(bit_width), N2uqActivationQuantizer(bit_width)
        weights.calibrate(model[index].weight)
        inputs.calibrate(torch.rand(50))
        model[index] = quantized(model[index], weights, inputs)
    return model


def trainer_of(model, done=0, total=8, ranks=ALONE):
    """What a recorder sees of a trainer."""
    settings = TrainerConfig(epochs=total)
    return SimpleNamespace(model=model, evaluated=model, epoch=done, settings=settings, ranks=ranks)


@contextmanager
def recording(folder, trainer, stage="qat"):
    """A recorder that a trainer has started."""
    recorder = Recorder(folder, stage, meter=MovementMeter(trainer.model))
    recorder.on_start(trainer)
    with recorder.context(trainer):
        yield recorder


def record(folder, epochs, model, *, done=0, total=8, stage="qat", loss=1.0):
    trainer = trainer_of(model, done, total)
    with recording(folder, trainer, stage) as recorder:
        for epoch in epochs:
            recorder.after_epoch(trainer, report(epoch, loss))


def events(folder, stage="qat"):
    found = EventAccumulator(
        str(folder / "tensorboard" / stage), {"histograms": 0, "images": 0, "scalars": 0}
    )
    found.Reload()
    return found


def test_an_epoch_is_recorded_in_both_places(tmp_path):
    model = network()
    record(tmp_path, [1, 2], model)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    movement = first.pop("movement")
    assert movement.keys() == {"0", "1"}
    assert movement["0"]["thresholds"] == 0
    assert first == {
        "stage": "qat",
        "epoch": 1,
        "step": 10,
        "train_loss": 1.0,
        "validation_loss": 2.0,
        "validation_top1_percent": 51.0,
        "lr": 0.1,
        "seconds": 3.0,
        "images_per_second": 80.0,
        "data_wait_percent": 5.0,
        "peak_memory_bytes": 10**6,
        # Few enough levels to follow; not those of the 8-bit layer.
        "codebooks": {"0": model[0].weight_quantizer.levels().tolist()},
    }
    assert second["epoch"] == 2
    found = events(tmp_path)
    assert [x.value for x in found.Scalars("5_movement_thresholds/0")] == [0, 0]
    curve = found.Scalars("2_accuracy/validation_top1_percent")
    assert [(x.step, x.value) for x in curve] == [(1, 51), (2, 52)]
    assert [x.value for x in found.Scalars("4_speed/images_per_second")] == [80, 80]
    assert [x.value for x in found.Scalars("4_speed/data_wait_percent")] == [5, 5]
    levels = [found.Scalars(f"6_codebook/0/{i}")[0].value for i in range(4)]
    assert levels == pytest.approx(model[0].weight_quantizer.levels().tolist())
    assert not [tag for tag in found.Tags()["scalars"] if tag.startswith("6_codebook/1/")]


def test_pictures_come_four_times_and_at_the_end(tmp_path):
    record(tmp_path, range(1, 8), network(), total=7)
    found = events(tmp_path)
    assert [x.step for x in found.Images("weights_and_levels")] == [2, 4, 6, 7]
    assert [x.step for x in found.Histograms("7_weights/0")] == [2, 4, 6, 7]


def test_a_float_model_has_no_levels(tmp_path):
    record(tmp_path, [1], nn.Linear(3, 2), total=1, stage="pretrain")
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert "codebooks" not in line
    assert events(tmp_path, "pretrain").Tags()["images"] == []


def test_what_came_after_the_checkpoint_is_dropped_and_done_again(tmp_path):
    record(tmp_path, [1, 2, 3], nn.Linear(3, 2), stage="pretrain")
    record(tmp_path, [1, 2, 3], network())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "qat", "epo')  # a kill cut this line off
    record(tmp_path, [3, 4], network(), done=2, loss=7.0)
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [(x["stage"], x["epoch"], x["train_loss"]) for x in map(json.loads, texts)]
    assert lines == [
        *(("pretrain", epoch, 1.0) for epoch in (1, 2, 3)),
        *(("qat", epoch, loss) for epoch, loss in ((1, 1.0), (2, 1.0), (3, 7.0), (4, 7.0))),
    ]
    curve = [(x.step, x.value) for x in events(tmp_path).Scalars("1_loss/train")]
    assert curve == [(4, 1.0), (5, 1.0), (6, 7.0), (7, 7.0)]  # after the float epochs


def test_how_far_the_quantizers_moved_is_recorded_from_calibration_on(tmp_path):
    model = network()
    trainer = trainer_of(model, total=3)
    with recording(tmp_path, trainer) as recorder:
        for epoch in (1, 2, 3):
            model[0].input_quantizer.log_step.data += 0.1
            recorder.after_epoch(trainer, report(epoch))
    found = [x["movement"]["0"] for x in read_metrics(tmp_path / "metrics.jsonl")]
    moved = [x["input_levels"] for x in found]
    assert moved == pytest.approx([0.1052, 0.2214, 0.3499], abs=1e-4)
    assert [x["update"] for x in found] == pytest.approx(np.diff(moved, prepend=0))

    # Killed within the third epoch, it goes on from a state between two records.
    again = network()
    trainer = trainer_of(again, total=3)
    recorder = Recorder(tmp_path, "qat", meter=MovementMeter(again))
    again[0].input_quantizer.log_step.data += 0.25
    trainer.epoch = 2
    recorder.on_start(trainer)
    again[0].input_quantizer.log_step.data += 0.05
    with recorder.context(trainer):
        recorder.after_epoch(trainer, report(3))
    resumed = [x["movement"]["0"] for x in read_metrics(tmp_path / "metrics.jsonl")]
    assert resumed[2]["update"] == pytest.approx(found[2]["update"], rel=1e-4)


def test_no_records_are_no_error(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    trainer = trainer_of(network())
    with Recorder(tmp_path, "qat").context(trainer):  # one that was never started
        pass


def test_the_first_process_alone_writes(tmp_path):
    trainer = trainer_of(network(), ranks=Ranks(1, 2))
    with recording(tmp_path, trainer) as recorder:
        recorder.after_epoch(trainer, report(1))
    assert list(tmp_path.iterdir()) == []
