import copy
from collections import Counter

import pytest
import torch
from torch import nn

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.lsq import LsqActivationQuantizer, LsqWeightQuantizer
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.gradient import Gradient, fisher_vectors
from adq_train.sensitivity.perturbation import Perturbation

BIT_WIDTHS = (2, 4)
TENSORS = ("both", "weights", "activations")


def measure(model, layers, batches, bit_widths=BIT_WIDTHS, seed=0, **options):
    conditions = Conditions(bit_widths, batches, AdqWeightQuantizer, LsqActivationQuantizer, seed)
    return {x.name: x for x in Gradient(**options).measure(model, layers, conditions)}


def near(expected, relative=1e-4):
    return pytest.approx(expected, rel=relative, abs=1e-12)


def information(logits):
    """F = diag(p) - p pᵀ of each image (N, C, C)."""
    p = logits.double().softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def divergences(model, name, bits, batches, tensors):
    """½ δᵀ F δ of each image, with δ from the Jacobian of the logits by every call's output."""
    net = copy.deepcopy(model).eval()
    layer = net.get_submodule(name)
    inputs = []
    keep = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0].clone()))
    for images, _ in batches:
        net(images)
    keep.remove()
    weight_quantizer, input_quantizer = AdqWeightQuantizer(bits), LsqActivationQuantizer(bits)
    weight_quantizer.calibrate(layer.weight.detach())
    input_quantizer.calibrate(torch.cat([x.detach().flatten() for x in inputs]))
    quantized_layer = copy.deepcopy(layer)
    if tensors != "activations":
        quantized_layer.weight.data = weight_quantizer(layer.weight).detach()

    def changed(x):
        return quantized_layer(x if tensors == "weights" else input_quantizer(x))

    def each_change(image):
        steps = []
        hook = layer.register_forward_hook(
            lambda _, x, z: steps.append((changed(x[0]) - z).detach().clone())
        )
        net(image)
        hook.remove()
        return steps

    found = []
    for image in torch.cat([images for images, _ in batches]).split(1):
        steps = each_change(image)

        def logits(*shifts, image=image):
            remaining = iter(shifts)
            hook = layer.register_forward_hook(lambda _, x, z: z + next(remaining))
            outputs = net(image)
            hook.remove()
            return outputs[0]

        zeros = tuple(torch.zeros_like(x) for x in steps)
        jacobians = torch.autograd.functional.jacobian(logits, zeros)
        pairs = zip(jacobians, steps, strict=True)
        delta = sum(x.flatten(1) @ y.flatten() for x, y in pairs).double()
        found.append(float((delta @ information(net(image))[0] @ delta).detach()) / 2)
    return torch.tensor(found)


@pytest.mark.parametrize("tensors", TENSORS)
def test_every_class_taken_gives_what_each_images_jacobian_gives(small, layers, batches, tensors):
    """One layer of the network is called twice; the operations behind layers work in place."""
    rows = measure(small, layers, batches, tensors=tensors, draws=0)
    assert [(x.name, x.num_weights, x.macs) for x in rows.values()] == [
        (x.name, x.num_weights, x.macs) for x in layers
    ]
    for name, row in rows.items():
        assert tuple(row.sensitivity) == BIT_WIDTHS
        for bits in BIT_WIDTHS:
            each = divergences(small, name, bits, batches, tensors)
            assert row.sensitivity[bits] == near(float(each.mean()))
            assert row.standard_error[bits] == near(float(each.std()) / len(each) ** 0.5)
            assert row.sensitivity[bits] > 1e-7


def test_a_linear_layer_has_its_closed_form():
    """Δz = ΔW x, so Ω = ½ · mean of xᵀ ΔWᵀ F ΔW x."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3))
    x = torch.randn(20, 5)
    quantizer = AdqWeightQuantizer(2)
    quantizer.calibrate(net[0].weight.detach())
    delta = (x @ (quantizer(net[0].weight) - net[0].weight).T).double()
    each = torch.einsum("ni,nij,nj->n", delta, information(net(x)), delta).detach() / 2
    layers = [LayerInfo("0", 15, 15, 5)]
    row = measure(net, layers, [(x, None)], tensors="weights", draws=0)["0"]
    assert row.sensitivity[2] == near(float(each.mean()))


@pytest.mark.parametrize("tensors", TENSORS)
def test_a_small_change_costs_its_divergence(small, layers, tensors):
    """At 8 bits the third order is small."""
    torch.manual_seed(2)
    batches = [(torch.randn(64, 1, 6, 6), None)]
    conditions = Conditions((8,), batches, LsqWeightQuantizer, N2uqActivationQuantizer)
    exact = Perturbation(tensors=tensors).measure(small, layers, conditions)
    rows = Gradient(tensors=tensors, draws=0).measure(small, layers, conditions)
    for expected, row in zip(exact, rows, strict=True):
        assert row.sensitivity[8] == near(expected.sensitivity[8], 0.05)
        assert row.standard_error[8] == near(expected.standard_error[8], 0.1)


def test_random_vectors_have_the_information_as_their_mean():
    torch.manual_seed(0)
    logits = 2 * torch.randn(2, 4)
    expected = information(logits)
    exact = fisher_vectors(logits, 0, 0).double()
    assert torch.allclose(torch.einsum("kni,knj->nij", exact, exact), expected, atol=1e-6)
    drawn = fisher_vectors(logits, 20_000, 0).double()
    assert torch.allclose(torch.einsum("kni,knj->nij", drawn, drawn), expected, atol=0.01)


def test_many_draws_come_near_the_exact_value(small, layers):
    torch.manual_seed(3)
    images = torch.randn(8, 1, 6, 6)
    exact = measure(small, layers, [(images, None)], draws=0)
    drawn = measure(small, layers, [(images, None)], draws=400)
    for name, row in drawn.items():
        for bits in BIT_WIDTHS:
            assert row.sensitivity[bits] == near(exact[name].sensitivity[bits], 0.2)


def test_the_standard_error_falls_with_the_number_of_images(small, layers):
    torch.manual_seed(4)
    images = torch.randn(512, 1, 6, 6)
    few = measure(small, layers, [(images[:32], None)])
    many = measure(small, layers, [(images, None)])
    for name, row in many.items():
        ratio = few[name].standard_error[2] / row.standard_error[2]
        assert 2 < ratio < 8  # 4 = √(512 / 32)


def test_one_image_has_no_standard_error(small, layers, batches):
    rows = measure(small, layers, [tuple(x[:1] for x in batches[0])])
    assert all(x.standard_error is None for x in rows.values())


@pytest.mark.parametrize("draws", [0, 2])
def test_separate_holds_weights_and_activations_each_alone(small, layers, batches, draws):
    weights = measure(small, layers, batches, tensors="weights", draws=draws)
    activations = measure(small, layers, batches, tensors="activations", draws=draws)
    for name, row in measure(small, layers, batches, tensors="separate", draws=draws).items():
        assert row.sensitivity == weights[name].sensitivity
        assert row.standard_error == weights[name].standard_error
        assert row.activation_sensitivity == activations[name].sensitivity
        assert row.activation_standard_error == activations[name].standard_error
        assert weights[name].activation_sensitivity is None


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_layers_that_share_a_weight_are_quantized_together():
    torch.manual_seed(5)
    net, images = Tied(), torch.randn(64, 4)
    conditions = Conditions((8,), [(images, None)], LsqWeightQuantizer, LsqActivationQuantizer)
    layers = describe_layers(net, images[:1])
    (expected,) = Perturbation(tensors="weights").measure(net, layers[:1], conditions)
    (row,) = Gradient("weights", draws=0).measure(net, layers[:1], conditions)
    assert row.sensitivity[8] == near(expected.sensitivity[8], 0.05)


def test_a_layer_has_the_same_value_whatever_else_is_measured(small, layers, batches):
    together = measure(small, layers, batches)
    for info in layers:
        assert measure(small, [info], batches)[info.name] == together[info.name]
    assert measure(small, layers, batches, seed=1) != together


def test_maps_of_classes_cost_the_sum_over_their_places():
    torch.manual_seed(6)
    net, images = nn.Sequential(nn.Conv2d(1, 3, 3)), torch.randn(64, 1, 4, 4)
    conditions = Conditions((8,), [(images, None)], LsqWeightQuantizer, LsqActivationQuantizer)
    layers = describe_layers(net, images[:1])
    (expected,) = Perturbation().measure(net, layers, conditions)
    (row,) = Gradient(draws=64).measure(net, layers, conditions)
    assert row.sensitivity[8] == near(expected.sensitivity[8], 0.1)
    with pytest.raises(UserError, match=r"draws: 0 needs outputs .* got \(64, 3, 2, 2\)"):
        next(Gradient(draws=0).measure(net, layers, conditions))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(small, layers, batches, frozen):
    small.requires_grad_(not frozen)
    state = {name: value.clone() for name, value in small.state_dict().items()}
    modules = list(small.modules())
    with torch.no_grad():
        measure(small, layers, batches)
    assert list(small.modules()) == modules
    assert all(x.training and not x._forward_hooks for x in modules)
    assert not any("forward" in vars(x) for x in modules)
    assert all(p.requires_grad != frozen and p.grad is None for p in small.parameters())
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_a_batch_takes_two_passes_whatever_the_number_of_layers_and_bits(small, layers, batches):
    """After two for the inputs' sample and the outputs; a pair of images is looked at first."""
    passes = Counter()
    net = copy.deepcopy(small)
    plain = type(small).forward

    class Counted(type(small)):
        def forward(self, x):
            passes[len(x)] += 1
            return plain(self, x)

    net.__class__ = Counted
    assert measure(net, layers, [batches[0]]) == measure(small, layers, [batches[0]])
    assert passes == {5: 4, 2: 1}


@pytest.mark.parametrize("shape", [(1,), (), (1, 2, 2)], ids=str)
def test_softmax_over_one_class_is_refused(batches, shape):
    size = torch.Size(shape).numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, size))
    net.append(nn.Flatten(0) if shape == () else nn.Unflatten(1, shape))
    with pytest.raises(UserError, match=r"gradient needs two or more .*criterion=mse"):
        measure(net, [LayerInfo("1", 36 * size, 36 * size, 36)], batches)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (torch.Tensor.detach, "cannot differentiate the network (none reaches layer first"),
        (lambda x: torch.from_numpy(x.numpy()), "cannot differentiate the network (Can't call"),
    ],
    ids=["detached", "numpy"],
)
def test_what_cannot_be_differentiated_is_told(between, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(between(self.first(x)))

    layers = [LayerInfo("first", 36, 36, 6), LayerInfo("last", 18, 18, 6)]
    with pytest.raises(UserError) as error:
        measure(Net(), layers, [(torch.randn(4, 6), None)])
    assert message in str(error.value)
    assert "take sensitivity=perturbation" in str(error.value)
    assert "\n" not in str(error.value)


class Turned(nn.Module):
    """Its layer sees the places first and the images second."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x.transpose(0, 1)).mean(0)


class Windows(Turned):
    """Its layer sees the places of all images in one axis, image after image."""

    def forward(self, x):
        return self.fc(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def test_images_must_come_first_in_every_layer():
    torch.manual_seed(0)
    images = torch.randn(4, 2, 6)
    info = [LayerInfo("fc", 18, 36, 12)]
    with pytest.raises(UserError, match=r"images first, but the output \(2, 2, 3\) of layer fc"):
        measure(Turned(), info, [(images, None)])
    turned, windows = Turned(), Windows()
    windows.load_state_dict(turned.state_dict())
    row = measure(windows, info, [(images, None)], draws=0)["fc"]
    each = divergences(windows, "fc", 2, [(images, None)], "both")
    assert row.sensitivity[2] == near(float(each.mean()))


def test_an_output_that_nothing_changes_costs_nothing():
    """Two outputs that are equal: a softmax of ½ whatever else."""

    class Twice(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], (x[:, 0] * 3) / 3], 1)

    net = nn.Sequential(nn.Linear(6, 1), Twice())
    info = [LayerInfo("0", 6, 6, 6)]
    rows = measure(net, info, [(torch.randn(4, 6), None)])
    assert set(rows["0"].sensitivity.values()) == {0.0}


def test_damaged_weights_name_the_layer(small, layers, batches):
    small.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer fc: the weights hold NaN"):
        measure(small, layers, batches)


def test_bits_apart_need_separate():
    Gradient("separate").check((), BIT_WIDTHS, apart=True)
    Gradient().check((), BIT_WIDTHS, apart=False)
    with pytest.raises(UserError, match=r"gradient-both does not .* sensitivity.tensors=separate"):
        Gradient().check((), BIT_WIDTHS, apart=True)


@pytest.mark.parametrize("options", [{"tensors": "inputs"}, {"draws": -1}], ids=str)
def test_options_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Gradient(**options)


def test_the_name_tells_the_options():
    assert Gradient().name == "gradient-both"
    assert Gradient("separate").name == "gradient-separate"
