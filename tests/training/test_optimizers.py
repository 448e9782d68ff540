"""Who moves what: weights and quantizers have optimizers of their own, and both are kept."""

import copy

import pytest
import torch
from training_helpers import IMAGES, network, take, trainer_of

from adq_train.training.optimizers import Optimizers, make_optimizers, parameter_groups


def sgd(groups):
    return torch.optim.SGD(groups, momentum=0.9)


def adam(groups):
    return torch.optim.Adam(groups, lr=0.01)


def both(model):
    return make_optimizers(model, 0.2, 0.01, sgd, adam)


def of_quantizers(model):
    return {id(p) for i in (0, 4) for p in model[i].input_quantizer.parameters() if p.requires_grad}


def test_only_weights_decay_and_quantizers_have_their_own_rate():
    model = network()
    weights, rest, quantizers = parameter_groups(model, 0.2, 0.01, 0.02)
    assert [g["weight_decay"] for g in (weights, rest, quantizers)] == [0.01, 0.0, 0.0]
    assert [g["lr"] for g in (weights, rest, quantizers)] == pytest.approx([0.2, 0.2, 0.02])
    assert {id(p) for p in weights["params"]} == {id(model[0].weight), id(model[4].weight)}
    assert all(p.dim() == 1 for p in rest["params"])
    assert len(rest["params"]) == 4  # two biases, the norm's two
    assert {id(p) for p in quantizers["params"]} == of_quantizers(model)
    assert parameter_groups(model, 0.2, 0.01)[2]["lr"] == 0.2
    assert len(parameter_groups(network(quantize=False), 0.2, 0.01, 0.02)) == 2


def test_every_trained_parameter_belongs_to_one_optimizer():
    model = network()
    weights, quantizers = both(model).parts
    assert {id(p) for g in quantizers.param_groups for p in g["params"]} == of_quantizers(model)
    assert quantizers.param_groups[0]["lr"] == 0.01
    assert quantizers.param_groups[0]["weight_decay"] == 0
    owned = [id(p) for g in both(model).param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [g["lr"] for g in weights.param_groups] == [0.2, 0.2]


def test_a_float_model_has_one_optimizer():
    assert len(both(network(quantize=False)).parts) == 1


def test_a_step_moves_weights_and_quantizers():
    model = network()
    before = copy.deepcopy(dict(model.named_parameters()))
    take(trainer_of(model, optimizer=both(model)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), name


def test_the_state_of_every_part_is_kept():
    model = network()
    trainer = trainer_of(model, optimizer=both(model))
    take(trainer, *[IMAGES] * 3)
    weights, state = copy.deepcopy((model.state_dict(), trainer.optimizer.state_dict()))
    ends = []
    for fresh in (True, False):
        model.load_state_dict(weights)
        again = both(model)
        if not fresh:
            again.load_state_dict(state)
        take(trainer_of(model, optimizer=again))
        ends.append(copy.deepcopy(model.state_dict()))
    model.load_state_dict(weights)
    take(trainer)
    for name, expected in model.state_dict().items():
        assert torch.equal(ends[1][name], expected), name
    moved = "4.input_quantizer.log_widths", "4.weight"
    assert all(not torch.equal(ends[0][name], ends[1][name]) for name in moved)


def test_a_state_of_other_parts_is_refused():
    model = network()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Optimizers(sgd(model.parameters())).load_state_dict(both(model).state_dict())


def test_rates_are_the_base_rates_times_the_schedule_s_factor():
    model = network()
    optimizers = make_optimizers(model, 0.2, 0.01, sgd, adam, schedule=lambda x: 1 - x)
    rates = [group["initial_lr"] for group in optimizers.param_groups]
    assert rates == [0.2, 0.2, 0.01]
    for progress in (0.75, 0.5, 0.0):  # of the base rates, not of those of the step before
        optimizers.at(progress)
        found = [group["lr"] for group in optimizers.param_groups]
        assert found == pytest.approx([x * (1 - progress) for x in rates])


def test_a_resume_keeps_the_base_rates():
    model = network()
    first, second = (
        make_optimizers(model, 0.2, 0.01, sgd, adam, schedule=lambda x: 1 - x) for _ in range(2)
    )
    first.at(0.9)
    second.load_state_dict(first.state_dict())
    second.at(0.5)
    found = [group["lr"] for group in second.param_groups]
    assert found == pytest.approx([0.1, 0.1, 0.005])


def test_without_a_schedule_rates_stay():
    optimizers = both(network())
    optimizers.at(0.9)
    assert [group["lr"] for group in optimizers.param_groups] == [0.2, 0.2, 0.01]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_step_that_is_not_finite_leaves_weights_as_they_are(kind, fused):
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    unused = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizers(kind([first, unused], lr=0.1, fused=fused), sgd([second]))
    for finite in (True, False, True):
        first.grad, second.grad = torch.ones(2), torch.ones(2)
        if not finite:
            first.grad[0] = torch.nan
        before = [p.detach().clone() for p in (first, second)]
        optimizer.skip_unless(torch.tensor(finite))
        optimizer.step()
        assert not torch.equal(first, before[0]) or not finite
        assert first.isfinite().all()
        if not finite and fused:
            assert torch.equal(first, before[0])
        assert bool((second != before[1]).all()) or not finite
    assert torch.equal(unused, torch.ones(2))
