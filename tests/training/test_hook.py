"""What a trainer owes its hooks: their order, their word, and their state after a resume."""

import copy
import inspect
import io
import math
import pkgutil
from importlib import import_module

import pytest
import torch
from training_helpers import IMAGES, Drawn, dense, network, same, take, trainer_of

import adq_train
from adq_train.quantization.movement import MovementMeter
from adq_train.reporting.recorder import Recorder
from adq_train.run.folder import read_metrics
from adq_train.training.agreement import RanksAgree
from adq_train.training.average import WeightAverage
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.checkpointing import Checkpoints
from adq_train.training.damping import Damping
from adq_train.training.distillation import Teacher
from adq_train.training.health import FiniteWatch
from adq_train.training.hook import Hook
from adq_train.training.mixing import Mixing
from adq_train.training.progress_bar import ProgressBar
from adq_train.training.reestimation import ReestimateBatchNorm

METHODS = [name for name, _ in inspect.getmembers(Hook, inspect.isfunction) if name[0] != "_"]


def spy(name, calls):
    """A hook that writes down what is called."""
    made = Hook()
    for method in METHODS:

        def call(*arguments, method=method):
            calls.append((method, name))
            return getattr(Hook, method)(made, *arguments)

        setattr(made, method, call)
    return made


def test_hooks_are_called_in_their_order_at_their_time():
    calls = []
    trainer_of(dense(), spy("a", calls), spy("b", calls), batches=Drawn(4, 4), epochs=1).fit()
    calls = [x for x in calls if x[0] != "evaluated"]
    batch = ["on_batch", "loss", "on_gradients", "after_update", "after_batch"]
    expected = [
        "restore", "on_start", "context", *batch, *batch, "flush", "before_evaluation",
        "after_epoch", "on_end",
    ]  # fmt: skip
    assert [method for method, _ in calls[::2]] == expected
    # The first hook's loss is inside the second's, which may leave it out.
    order = {method: "ba" if method == "loss" else "ab" for method in METHODS}
    assert calls == [(method, name) for method in expected for name in order[method]]
    trainer = trainer_of(dense(), spy("a", calls), spy("b", calls))
    calls.clear()
    trainer.load_state_dict(trainer.state_dict())
    assert calls == [(x, name) for x in ("state_dict", "load_state_dict") for name in "ab"]


def test_a_hook_sees_the_batch_and_the_loss_of_those_before_it():
    class Twice(Hook):
        def on_batch(self, trainer, images, targets):
            return 2 * images, targets

        def loss(self, logits, images, loss):
            return 2 * loss()

    class Plus(Hook):
        def on_batch(self, trainer, images, targets):
            return images + 1, targets

        def loss(self, logits, images, loss):
            assert torch.equal(images, 2 * IMAGES + 1)
            return loss() + 1

    plain = trainer_of(network())
    (expected,) = take(plain, 2 * IMAGES + 1)
    (found,) = take(trainer_of(network(), Twice(), Plus()))
    assert found == pytest.approx(2 * expected + 1)


def test_the_contexts_of_hooks_are_left_in_any_case():
    left = []

    class Around(Hook):
        def context(self, trainer):
            context = io.StringIO()
            context.close = lambda: left.append(self)
            return context

        def after_epoch(self, trainer, report):
            raise KeyboardInterrupt

    hooks = Around(), Around()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(dense(), *hooks, epochs=2).fit()
    assert left == [*reversed(hooks)]


class Refuses(Hook):
    """Says no to some steps, from 0."""

    def __init__(self, *steps):
        self.steps = steps

    def on_gradients(self, trainer, batch, loss):
        return trainer.steps not in self.steps


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_step_that_a_hook_refuses_leaves_weights_codebooks_and_moments(precision):
    model, asked = network(), []
    average = WeightAverage(model, 0.5)
    hooks = Refuses(1, 2), spy("after", asked), average
    trainer = trainer_of(model, *hooks, precision=precision)
    take(trainer)
    kept = dict(model.named_parameters())
    kept |= {k: x for k, x in model.named_buffers() if "quantizer" in k}
    watched = [kept, dict(average.model.state_dict()), trainer.optimizer.state_dict()[0]["state"]]
    before = copy.deepcopy(watched)
    asked.clear()
    assert all(math.isfinite(x) for x in take(trainer, IMAGES, -IMAGES))
    for found, expected in zip(watched[:2], before[:2], strict=True):
        assert all(torch.equal(found[name], x) for name, x in expected.items())
    for index, moments in before[2].items():
        assert torch.equal(watched[2][index]["momentum_buffer"], moments["momentum_buffer"])
    methods = [method for method, _ in asked]
    assert methods.count("on_gradients") == 2  # those after it are asked all the same
    assert "after_update" not in methods
    take(trainer)
    assert not any(torch.equal(model[i].weight, before[0][f"{i}.weight"]) for i in (0, 4))
    assert trainer.steps == 4


def hooks_of(model, folder):
    """One of each kind, in the order of QAT."""
    return [
        Teacher(network(quantize=False), 2.0, 0.5),
        Mixing(4, mixup_alpha=0.5, cutmix_alpha=1.0),
        Damping(model, 0.1),
        FiniteWatch(skip=2),
        WeightAverage(model, 0.8),
        ReestimateBatchNorm(7, 12),
        Recorder(folder, "qat", meter=MovementMeter(model)),
        RanksAgree(),
        Checkpoints(CheckpointFolder(folder / "checkpoints"), "k", "qat", steps=1),
        ProgressBar("qat"),
    ]


def test_no_kind_of_hook_is_left_out_here(tmp_path):
    kinds = set()
    for module in pkgutil.walk_packages(adq_train.__path__, "adq_train."):
        if module.name.split(".")[1] in ("training", "reporting", "stages", "sensitivity"):
            found = vars(import_module(module.name)).values()
            kinds |= {x for x in found if inspect.isclass(x) and issubclass(x, Hook)}
    assert {type(x) for x in hooks_of(network(), tmp_path)} == kinds - {Hook}


def test_no_two_hooks_keep_a_state_under_one_name(tmp_path):
    names = [name for hook in hooks_of(network(), tmp_path) for name in hook.state_dict()]
    assert sorted(names) == sorted({*names} - {"scaler"})


class KilledError(Exception):
    pass


class Kills(Hook):
    """After a number of batches, before their checkpoint."""

    def __init__(self, step):
        self.step = step

    def after_batch(self, trainer):
        if trainer.steps == self.step:
            raise KilledError


def with_every_hook(folder, *more):
    """Three epochs of three steps, of which the sixth is left out."""
    model = network()
    folder.mkdir(exist_ok=True)
    batches = Drawn(6, 6, 3, shape=(3, 6, 6), spoiled=(1, 2))
    return trainer_of(model, *more, *hooks_of(model, folder), batches=batches, epochs=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = with_every_hook(folder)
    trainer.fit()
    return trainer, read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("step", range(2, 10))
def test_the_state_of_every_hook_survives_a_resume(tmp_path, whole, step, no_pictures):
    whole, expected = whole
    folder = tmp_path / "broken"
    broken, again = with_every_hook(folder, Kills(step)), with_every_hook(folder)
    with pytest.raises(KilledError):
        broken.fit()
    torch.manual_seed(99)
    again.fit()
    assert same(whole.model, again.model)
    assert same(whole.evaluated, again.evaluated)
    assert any(hook.state_dict().get("skipped") == 1 for hook in again.hooks)
    for mine, other in zip(again.hooks, whole.hooks, strict=True):
        a, b = mine.state_dict(), other.state_dict()
        assert a.keys() == b.keys()
        assert all(a[name] == b[name] for name in a.keys() - {"trained"})  # compared above
        if isinstance(mine, Checkpoints):
            assert mine.best == other.best
    records = read_metrics(folder / "metrics.jsonl")
    times = {"seconds", "images_per_second", "data_wait_percent", "peak_memory_bytes"}
    assert len(records) == len(expected) == 3
    for mine, other in zip(records, expected, strict=True):
        assert {k: mine[k] for k in mine.keys() - times} == {
            k: other[k] for k in other.keys() - times
        }
