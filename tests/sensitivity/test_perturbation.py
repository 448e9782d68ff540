import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.perturbation import Perturbation

BIT_WIDTHS = (2, 4)
LAYERS = (LayerInfo("0", 36, 576, 36), LayerInfo("4", 192, 192, 64))


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    net[1].running_mean.normal_()
    return net.train()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(n, 1, 6, 6), torch.randint(3, (n,))) for n in (5, 2)]


def measure(model, batches, **options):
    quantizers = AdqWeightQuantizer, LsqActivationQuantizer
    conditions = Conditions(BIT_WIDTHS, batches, *quantizers)
    return list(Perturbation(**options).measure(model, LAYERS, conditions))


def quantized_by_hand(model, name, bits, images, tensors):
    """A copy of the model in evaluation mode with one layer quantized, without any surgery."""
    net = copy.deepcopy(model).eval()
    layer = net.get_submodule(name)
    if tensors != "activations":
        weight_quantizer = AdqWeightQuantizer(bits)
        weight_quantizer.calibrate(layer.weight.detach())
        layer.weight.data = weight_quantizer(layer.weight).detach()
    if tensors != "weights":
        seen = images if name == "0" else net[:4](images)
        input_quantizer = LsqActivationQuantizer(bits)
        input_quantizer.calibrate(seen.detach())
        layer.register_forward_pre_hook(lambda _, inputs: input_quantizer(inputs[0]))
    return net


@pytest.mark.parametrize("tensors", ["both", "weights", "activations"])
@pytest.mark.parametrize("criterion", ["kl", "loss", "mse"])
def test_sensitivities_are_those_of_a_hand_made_copy(model, batches, criterion, tensors):
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(images)
        for row in measure(model, batches, criterion=criterion, tensors=tensors):
            for bits in BIT_WIDTHS:
                after = quantized_by_hand(model, row.name, bits, images, tensors)(images)
                if criterion == "kl":
                    each = F.kl_div(after.log_softmax(1), before.softmax(1), reduction="none")
                    each = each.sum(1)
                elif criterion == "loss":
                    loss = nn.CrossEntropyLoss(reduction="none")
                    each = loss(after, targets) - loss(before, targets)
                else:
                    each = (after - before).square().sum(1) / before.var(0, correction=0).sum()
                assert row.sensitivity[bits] == pytest.approx(float(each.mean()), abs=1e-6)
                error = float(each.std()) / len(images) ** 0.5
                assert row.standard_error[bits] == pytest.approx(error, abs=1e-6)
                assert abs(row.sensitivity[bits]) > 1e-5


def test_rows_carry_the_layers_in_their_order(model, batches):
    rows = measure(model, batches)
    assert [(x.name, x.num_weights, x.macs) for x in rows] == [("0", 36, 576), ("4", 192, 192)]
    assert all(tuple(x.sensitivity) == BIT_WIDTHS for x in rows)
    assert all(x.sensitivity[2] > x.sensitivity[4] > 0 for x in rows)


def test_the_model_is_left_as_it_was(model, batches):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    measure(model, batches)
    assert list(model.modules()) == modules
    assert all(m.training and not m._forward_hooks for m in modules)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_damaged_weights_name_the_layer(model, batches):
    model[4].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer 4: the weights hold NaN"):
        measure(model, batches)


def test_the_name_tells_the_options():
    assert Perturbation().name == "perturbation-kl-both"
    assert Perturbation("loss", "weights").name == "perturbation-loss-weights"
    assert Perturbation(recalibrate_batch_norm=True).name == "perturbation-kl-both-recalibrated"


@pytest.mark.parametrize(
    "options", [{"criterion": "cosine"}, {"tensors": "inputs"}, {"kept_bytes": -1}], ids=str
)
def test_options_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Perturbation(**options)


def test_separate_holds_weights_and_activations_each_alone(model, batches):
    weights = measure(model, batches, tensors="weights")
    activations = measure(model, batches, tensors="activations")
    for row, first, second in zip(
        measure(model, batches, tensors="separate"), weights, activations, strict=True
    ):
        assert row.sensitivity == first.sensitivity
        assert row.activation_sensitivity == second.sensitivity
        assert first.activation_sensitivity is None
        assert first.sensitivity != second.sensitivity


@pytest.mark.parametrize("kept_bytes", [0, 10**9])
def test_recalibrated_batch_norms_have_the_statistics_of_the_perturbed_network(
    model, batches, kept_bytes
):
    """By hand: the norm after the first layer averages the batches' means and variances.

    So it does in the float network that the perturbed one is compared with.
    """
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    rows = measure(
        model,
        batches,
        criterion="loss",
        tensors="weights",
        recalibrate_batch_norm=True,
        kept_bytes=kept_bytes,
    )
    with torch.no_grad():
        before = estimated_anew(copy.deepcopy(model).eval(), batches)
        for bits in BIT_WIDTHS:
            net = quantized_by_hand(model, "0", bits, images, "weights")
            after = estimated_anew(net, batches)(images)
            rise = F.cross_entropy(after, targets) - F.cross_entropy(before(images), targets)
            assert rows[0].sensitivity[bits] == pytest.approx(float(rise), abs=1e-6)
    # No batch norm lies behind the last layer.
    plain = measure(before, batches, criterion="loss", tensors="weights")
    assert rows[1].sensitivity == pytest.approx(plain[1].sensitivity, abs=1e-6)
    assert rows[0] != plain[0]


def estimated_anew(net, batches):
    seen = [net[0](x).transpose(0, 1).flatten(1) for x, _ in batches]
    net[1].running_mean.copy_(sum(x.mean(1) for x in seen) / len(seen))
    net[1].running_var.copy_(sum(x.var(1) for x in seen) / len(seen))
    return net


def test_one_image_has_no_standard_error(model):
    rows = measure(model, [(torch.randn(1, 1, 6, 6), torch.tensor([0]))])
    assert all(x.standard_error is None for x in rows)


@pytest.mark.parametrize("criterion", ["kl", "loss"])
def test_softmax_over_one_class_is_refused_and_squared_distance_offered(model, batches, criterion):
    model[4] = nn.Linear(64, 1)
    with pytest.raises(UserError, match=rf"criterion: {criterion} needs two .* set criterion=mse"):
        measure(model, batches, criterion=criterion)


@pytest.mark.parametrize("shape", [(1,), (), (1, 2, 2)], ids=str)
def test_squared_distance_ranks_layers_of_one_output_by_what_they_do(batches, shape):
    """Values (N, 1), (N,) and maps (N, 1, 2, 2): none of them is 0, and fewer bits cost more."""
    torch.manual_seed(0)
    size = torch.Size(shape).numel()
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, size))
    net.append(nn.Flatten(0) if shape == () else nn.Unflatten(1, shape))
    conditions = Conditions(BIT_WIDTHS, batches, AdqWeightQuantizer, LsqActivationQuantizer)
    layers = (LayerInfo("0", 36, 576, 36), LayerInfo("3", 64 * size, 64 * size, 64))
    for row in Perturbation("mse").measure(net, layers, conditions):
        assert 1 > row.sensitivity[2] > row.sensitivity[4] > 0


@pytest.mark.parametrize("criterion", ["kl", "loss"])
def test_differences_of_rounding_are_nothing(model, batches, criterion):
    """Two outputs that are equal but for the order of their sums: a softmax of ½ whatever else."""
    last = nn.Linear(64, 2)
    last.weight.data[1] = last.weight.data[0]
    last.bias.data[1] = last.bias.data[0]

    class Twice(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], (x[:, 1] * 3) / 3], 1)

    net = nn.Sequential(*model[:4], last, Twice())
    batches = [(images, targets % 2) for images, targets in batches]
    for row in measure(net, batches, criterion=criterion):
        assert set(row.sensitivity.values()) == {0.0}
