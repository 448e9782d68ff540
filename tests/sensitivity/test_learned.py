import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Bits, Budget, Problem
from adq_train.allocation.ilp import IlpAllocator
from adq_train.artifacts import LayerInfo, SensitivityTable
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.sensitivity.base import Conditions, Training, plain_copy
from adq_train.sensitivity.learned import (
    Learned,
    distinct,
    excess,
    expected_costs,
    mix,
    open_choices,
)
from adq_train.sensitivity.noise import oddities
from adq_train.training.optimizers import make_optimizers

CPU = torch.device("cpu")


class Images:
    """The same batches in every epoch."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def size(self, index):
        return len(self.batches[index][0])

    def epoch(self, epoch, batches=slice(None), images=slice(None)):
        for x, y in self.batches[batches]:
            yield x[images], y[images]


def optimizers(model):
    sgd, adam = partial(torch.optim.SGD, lr=0.01), partial(torch.optim.Adam, lr=1e-3)
    return make_optimizers(model, 0.01, 0.0, sgd, adam)


def conditions(problem, batches, seed=0):
    return Conditions(
        problem.candidates,
        batches,
        AdqWeightQuantizer,
        LsqActivationQuantizer,
        seed,
        training=Training(Images(batches), optimizers, problem),
    )


def measure(model, problem, batches, *, layers=None, seed=0, **options):
    rows = Learned(**options).measure(
        model, layers or problem.layers, conditions(problem, batches, seed)
    )
    return SensitivityTable("learned", problem.candidates, tuple(rows))


@pytest.fixture
def make_problem(layers):
    def make(pinned=None, candidates_by_layer=None, tied=True, **budget):
        pinned = {"fc": 8} if pinned is None else pinned
        return Problem(layers, pinned, (2, 3, 4), Budget(**budget), candidates_by_layer or {}, tied)

    return make


@pytest.mark.parametrize("tied", [True, False])
def test_the_expected_cost_is_the_mean_over_all_allocations(make_problem, tied):
    """Brute force: every joint choice of options with the product of its shares."""
    problem = make_problem(
        tied=tied,
        candidates_by_layer={"stem": (2, 4)},
        average_weight_bits=3.0,
        average_activation_bits=2.5,
        model_size_bytes=150,
        bops=90_000,
    )
    choices = open_choices(problem, CPU)
    torch.manual_seed(0)
    for choice in distinct(choices):
        choice.logits.data.normal_()
    assert len(distinct(choices)) == (2 if tied else 4)
    options = [problem.options(x) for x in problem.mixed]
    shares = [choices[x.name].option_shares().tolist() for x in problem.mixed]
    total = 0.0
    for cost, limit in zip(expected_costs(problem, CPU), problem.limits(), strict=True):
        mean = 0.0
        for joint in itertools.product(*(range(len(x)) for x in options)):
            bits = {
                x.name: some[i] for x, some, i in zip(problem.mixed, options, joint, strict=True)
            }
            share = math.prod(some[i] for some, i in zip(shares, joint, strict=True))
            mean += share * limit.total(problem.layers, {**bits, **problem.pinned_bits()})
        assert cost.name == limit.name
        assert float(cost(choices).detach()) == pytest.approx(mean / limit.bound, rel=1e-5)
        total += max(0.0, mean / limit.bound - 1)
    assert total > 0
    found = excess(expected_costs(problem, CPU), choices)
    assert float(found.detach()) == pytest.approx(total, rel=1e-4)


def test_within_the_budget_there_is_no_penalty(make_problem):
    problem = make_problem(average_weight_bits=3.5)
    choices = open_choices(problem, CPU)
    found = excess(expected_costs(problem, CPU), choices)
    assert float(found.detach()) == 0
    found.backward()
    assert all(not x.logits.grad.any() for x in distinct(choices))


@pytest.mark.parametrize(
    "budget", [{"average_weight_bits": 2.3}, {"bops": 55_000}, {"average_activation_bits": 2.5}]
)
def test_a_large_penalty_brings_the_expected_cost_to_the_budget(
    small, batches, make_problem, budget
):
    problem = make_problem(**budget)
    (cost,) = expected_costs(problem, CPU)
    before = float(cost(open_choices(problem, CPU)).detach())
    given = conditions(problem, batches)
    choices = Learned(epochs=30, lr=0.05, penalty=100.0).search(small, given, given.training)
    after = float(cost(choices).detach())
    assert before > 1.05
    assert after == pytest.approx(1, abs=0.04)


class Branches(nn.Module):
    """Two layers side by side of which the output depends on one."""

    def __init__(self, used):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.factors = (1.0, 0.0) if used == "first" else (0.0, 1.0)

    def forward(self, x):
        return self.factors[0] * self.first(x) + self.factors[1] * self.second(x)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("used", ["first", "second"])
def test_the_layer_that_matters_gets_the_bits(used, tied):
    torch.manual_seed(0)
    net = Branches(used)
    for layer in (net.first, net.second):
        layer.weight.data = 4 * torch.randn(8, 8)
    x = torch.randn(256, 8)
    batches = [(x[:128], net(x[:128]).argmax(1)), (x[128:], net(x[128:]).argmax(1))]
    layers = (LayerInfo("first", 64, 64, 8), LayerInfo("second", 64, 64, 8))
    budget = Budget(average_weight_bits=3.0, average_activation_bits=3.0)
    problem = Problem(layers, {}, (2, 4), budget, tied=tied)
    table = measure(net, problem, batches, epochs=15)
    allocation = allocate(IlpAllocator(), problem, table)
    other = "second" if used == "first" else "first"
    assert allocation.bits()[used].weight_bits == allocation.bits()[used].activation_bits == 4
    assert allocation.bits()[other].weight_bits == allocation.bits()[other].activation_bits == 2
    # Neither noise nor an oddity: a preference may rise with the bits.
    assert (allocation.optimal, allocation.caveat, oddities(table)) == (True, None, None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "budget",
    [
        {"average_weight_bits": 2.0},
        {"average_weight_bits": 2.81, "average_activation_bits": 2.4},
        {"model_size_bytes": 120},
        {"bops": 70_000, "average_weight_bits": 3.0},
    ],
)
def test_the_bits_keep_to_every_budget_and_are_the_most_probable_that_do(
    small, batches, make_problem, budget, tied
):
    problem = make_problem(tied=tied, candidates_by_layer={"stem": (2, 3)}, **budget)
    table = measure(small, problem, batches, epochs=5)
    allocation = allocate(IlpAllocator(), problem, table)
    chosen = {x.name: Bits(x.weight_bits, x.activation_bits) for x in allocation.layers}
    assert problem.broken(chosen) == []
    assert chosen["fc"] == (8, 8)
    best = -1.0
    rows = {x.name: x for x in table.layers}
    for joint in itertools.product(*(problem.options(x) for x in problem.mixed)):
        bits = dict(zip((x.name for x in problem.mixed), joint, strict=True))
        if not problem.broken({**bits, "fc": Bits(8, 8)}):
            share = 1.0
            for name, (weights, inputs) in bits.items():
                share *= math.exp(-rows[name].sensitivity[weights])
                if not tied:
                    share *= math.exp(-rows[name].activation_sensitivity[inputs])
            best = max(best, share)
    assert math.exp(-allocation.objective) == pytest.approx(best)


def test_shares_sum_to_one_and_what_had_no_choice_has_no_preference(small, batches, make_problem):
    problem = make_problem(
        tied=False, candidates_by_layer={"stem": (2, 4)}, average_weight_bits=2.5
    )
    stem, shared, fc = measure(small, problem, batches, epochs=3).layers
    for values, widths in (
        (stem.sensitivity, (2, 4)),
        (stem.activation_sensitivity, (2, 4)),
        (shared.sensitivity, (2, 3, 4)),
        (shared.activation_sensitivity, (2, 3, 4)),
    ):
        assert sum(math.exp(-values[b]) for b in widths) == pytest.approx(1)
        assert list(values) == [2, 3, 4]
    assert stem.sensitivity[3] == stem.activation_sensitivity[3] == math.log(3)
    assert fc.sensitivity == fc.activation_sensitivity == dict.fromkeys((2, 3, 4), math.log(3))
    assert shared.sensitivity != shared.activation_sensitivity
    tied = make_problem(average_weight_bits=2.5)
    assert all(
        x.activation_sensitivity is None for x in measure(small, tied, batches, epochs=1).layers
    )


def test_the_first_step_is_adams_on_the_gradient_written_by_hand(small, batches, make_problem):
    """From zero Adam moves by its rate against the sign of the gradient of loss and excess."""
    problem = make_problem(tied=False, average_weight_bits=2.5)
    given = conditions(problem, batches[:1])
    choices = Learned(epochs=1, lr=0.07, penalty=2.0).search(small, given, given.training)

    fresh = open_choices(problem, CPU)
    net = plain_copy(small)
    mix(net, fresh, given, problem)
    images, targets = batches[0]
    loss = F.cross_entropy(net.train()(images), targets)
    (loss + 2.0 * excess(expected_costs(problem, CPU), fresh)).backward()
    for moved, start in zip(distinct(choices), distinct(fresh), strict=True):
        assert (start.logits.grad.abs() > 1e-6).all()
        torch.testing.assert_close(
            moved.logits.detach(), -0.07 * start.logits.grad.sign(), rtol=1e-2, atol=0
        )


def test_a_seed_decides_everything_and_a_layer_is_the_same_with_and_without_the_others(
    small, batches, layers
):
    net = nn.Sequential(small, nn.Dropout(0.5))
    named = [LayerInfo(f"0.{x.name}", x.num_weights, x.macs, x.num_inputs) for x in layers]
    problem = Problem(tuple(named), {}, (2, 4), Budget(average_weight_bits=3.0))
    table = measure(net, problem, batches, epochs=2)
    torch.rand(7)  # whatever was drawn before
    state = torch.get_rng_state()
    assert measure(net, problem, batches, epochs=2) == table
    assert torch.equal(torch.get_rng_state(), state)
    some = measure(net, problem, batches, epochs=2, layers=problem.layers[1:2])
    assert some.layers == table.layers[1:2]
    assert measure(net, problem, batches, epochs=2, seed=1) != table


def test_the_model_is_left_as_it_was(small, batches, make_problem):
    state = {name: value.clone() for name, value in small.state_dict().items()}
    measure(small, make_problem(average_weight_bits=2.5), batches, epochs=2)
    assert all(module.training for module in small.modules())
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    assert list(small.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_without_training_images_it_says_what_to_use(small, batches, layers):
    given = Conditions((2, 4), batches, AdqWeightQuantizer, LsqActivationQuantizer)
    with pytest.raises(
        UserError, match=r"^sensitivity: learned trains on training images .* or another metric"
    ):
        list(Learned().measure(small, layers, given))


def test_a_loss_that_is_not_finite_ends_the_search(small, batches, make_problem):
    images, targets = batches[0]
    broken = [(torch.full_like(images, torch.inf), targets)]
    problem = make_problem(average_weight_bits=2.5)
    given = Conditions(
        problem.candidates,
        batches,
        AdqWeightQuantizer,
        LsqActivationQuantizer,
        training=Training(Images(broken), optimizers, problem),
    )
    with pytest.raises(UserError, match=r"learned is not finite after epoch 2 \(loss nan\); lower"):
        list(Learned().measure(small, problem.layers, given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be more than 0, got 0.0"),
        ({"penalty": float("nan")}, "penalty must be more than 0, got nan"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Learned(**options)


def test_the_name_is_the_one_in_the_table():
    assert Learned().name == "learned"
