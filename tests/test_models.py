import logging
from itertools import pairwise
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from adq_train.errors import UserError
from adq_train.models import (
    BasicBlock,
    CifarResNetModel,
    OwnModel,
    TorchvisionModel,
    _adapt_ends,
    warn_of_large_images,
)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def resnet_parameters(depth, width, num_classes, in_channels):
    """Counted from the paper's table: 3 × 3 convolutions, two values per normalised channel."""
    channels = [in_channels, width]
    for stage in range(3):
        channels += [width * 2**stage] * (2 * (depth - 2) // 6)
    return sum(9 * a * b + 2 * b for a, b in pairwise(channels)) + (4 * width + 1) * num_classes


@pytest.mark.parametrize(
    ("depth", "known"), [(8, None), (20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)]
)
def test_parameters_of_resnets_for_cifar10(depth, known):
    model = CifarResNetModel(depth=depth, width=16).build(10, 3)
    assert num_parameters(model) == resnet_parameters(depth, 16, 10, 3)
    assert known is None or num_parameters(model) == known
    with_weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(with_weights) == depth


@pytest.mark.parametrize(
    ("width", "num_classes", "in_channels", "size"), [(4, 10, 1, 8), (3, 7, 3, 32), (1, 100, 3, 9)]
)
def test_shapes_of_small_resnets(width, num_classes, in_channels, size):
    model = CifarResNetModel(depth=8, width=width).build(num_classes, in_channels)
    assert num_parameters(model) == resnet_parameters(8, width, num_classes, in_channels)
    images = torch.randn(2, in_channels, size, size)
    assert model(images).shape == (2, num_classes)
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda *hook: shapes.append(tuple(hook[2].shape[1:])))
    model(images)
    half, quarter = -(-size // 2), -(-size // 4)
    assert shapes == [
        (width, size, size), (2 * width, half, half), (4 * width, quarter, quarter)
    ]  # fmt: skip


@pytest.mark.parametrize(("channels", "stride"), [((2, 2), 1), ((2, 4), 2), ((3, 6), 2)])
def test_the_shortcut_of_a_block_is_option_a(channels, stride):
    torch.manual_seed(0)
    block = BasicBlock(*channels, stride).eval()
    x = torch.randn(2, channels[0], 6, 6)
    main = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    extra = channels[1] - channels[0]
    shortcut = torch.zeros_like(main)
    for channel in range(channels[0]):
        for row in range(main.shape[2]):
            for column in range(main.shape[3]):
                source = x[:, channel, row * stride, column * stride]
                shortcut[:, channel + extra // 2, row, column] = source
    torch.testing.assert_close(block(x), (main + shortcut).relu())


def test_the_preactivated_network_is_the_papers():
    torch.manual_seed(0)
    model = CifarResNetModel(depth=20, width=4, preact=True).build(10, 3).eval()
    assert num_parameters(model) == resnet_parameters(20, 4, 10, 3)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
    x = model.conv1(torch.randn(2, 3, 16, 16))  # of the first layer alone
    images = x
    for block in (*model.layer1, *model.layer2, *model.layer3):
        inner = block.conv1(block.bn1(x).relu())
        x = block.shortcut(x) + block.conv2(block.bn2(inner).relu())
    logits = model.fc(model.bn1(x).relu().mean((2, 3)))
    model.conv1 = nn.Identity()
    torch.testing.assert_close(model(images), logits)


def test_initial_weights_are_he_normal():
    torch.manual_seed(0)
    model = CifarResNetModel(depth=20, width=16).build(10, 3)
    weight = model.layer3[2].conv2.weight
    expected = (2 / (64 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=0.05 * expected)


@pytest.mark.parametrize("depth", [2, 7, 18, 21, 0, -4])
def test_impossible_depths(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6 n \+ 2 .*, got {depth}"):
        CifarResNetModel(depth=depth, width=16)


def test_impossible_width():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        CifarResNetModel(depth=8, width=0)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
@pytest.mark.parametrize(("num_classes", "in_channels"), [(1000, 3), (7, 1)])
def test_torchvision_models_with_random_weights(name, num_classes, in_channels):
    model = TorchvisionModel(name=name, weights=None).build(num_classes, in_channels)
    assert model.eval()(torch.randn(2, in_channels, 64, 64)).shape == (2, num_classes)
    original = torchvision.models.get_model(name, num_classes=num_classes)
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    first = next(key for key, shape in shapes.items() if len(shape) == 4)
    shapes[first] = (shapes[first][0], in_channels, *shapes[first][2:])
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"no classifier 'resnet19' \(did you mean 'resnet1\d'"):
        TorchvisionModel(name="resnet19", weights=None)
    with pytest.raises(ValueError, match="no classifier 'fasterrcnn_resnet50_fpn'"):
        TorchvisionModel(name="fasterrcnn_resnet50_fpn", weights=None)


def test_unknown_weights_are_listed():
    with pytest.raises(ValueError, match=r"resnet18 has .*IMAGENET1K_V1.*, got 'V7'"):
        TorchvisionModel(name="resnet18", weights="V7")


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_auxiliary_classifiers_are_gone_in_training_too():
    model = TorchvisionModel(name="googlenet", weights=None).build(10, 3)
    logits = model.train()(torch.randn(2, 3, 64, 64))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 10)
    assert not any(key.startswith("aux") for key in model.state_dict())


@pytest.fixture
def pretrained(monkeypatch):
    """A stand-in for the download: the weights of a random model with 1000 classes."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: dict(state)
    )
    return state


def test_pretrained_weights_that_fit_are_kept(pretrained):
    model = TorchvisionModel(name="resnet18", weights="IMAGENET1K_V1").build(1000, 3)
    found = model.state_dict()
    assert found.keys() == pretrained.keys()
    assert all(torch.equal(found[key], pretrained[key]) for key in found)


def test_pretrained_weights_keep_all_but_the_ends(pretrained):
    model = TorchvisionModel(name="resnet18", weights="DEFAULT").build(7, 1)
    found = model.state_dict()
    ends = {"conv1.weight", "fc.weight", "fc.bias"}
    for key in found.keys() - ends:
        assert torch.equal(found[key], pretrained[key])
    assert found["fc.weight"].shape == (7, 512)
    torch.testing.assert_close(found["conv1.weight"], pretrained["conv1.weight"].sum(1, True))


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("invalid hash")])
def test_weights_that_cannot_be_downloaded(monkeypatch, error):
    def download(*arguments, **more):
        raise error

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    message = r"IMAGENET1K_V1 of resnet18 .*download\.pytorch\.org.*pretrain\.checkpoint"
    with pytest.raises(UserError, match=message):
        TorchvisionModel(name="resnet18", weights="IMAGENET1K_V1").build(10, 3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_channels", [1, 2, 4])
def test_the_first_layer_sees_the_sum_of_its_filters(in_channels, bias):
    """An image that is the same in every channel gives what it gave before."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias)
    model = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    image = torch.randn(2, 1, 8, 8)
    before = model(image.expand(-1, 3, -1, -1))
    head = model[3]
    _adapt_ends(model, 4, in_channels)
    assert model[0].weight.shape == (5, in_channels, 3, 3)
    torch.testing.assert_close(model(image.expand(-1, in_channels, -1, -1)), before)
    assert model[3] is head


@pytest.mark.parametrize("bias", [False, True])
def test_a_new_last_layer_has_the_classes_of_the_data(bias):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=bias))
    first = model[0]
    _adapt_ends(model, 9, 3)
    assert model[0] is first
    assert (model[1].out_features, model[1].bias is not None) == (9, bias)


def test_a_last_layer_that_is_a_convolution():
    """SqueezeNet's; its pretrained weights have 1000 classes."""
    model = torchvision.models.squeezenet1_1()
    _adapt_ends(model, 7, 3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_googlenets_own_normalisation_needs_three_channels():
    model = torchvision.models.googlenet(
        aux_logits=False, transform_input=True, init_weights=False
    ).eval()
    _adapt_ends(model, 1000, 3)
    assert model.transform_input
    _adapt_ends(model, 1000, 1)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 1000)


class Taking(nn.Module):
    """Takes one number of the data under its name, and has a setting of its own."""

    def __init__(self, num_classes, width=2):
        super().__init__()
        self.sizes = num_classes, width


def test_a_class_gets_what_its_constructor_takes_of_the_data():
    assert OwnModel(Taking, {}).build(7, 3).sizes == (7, 2)
    assert OwnModel(Taking, {"width": 5, "num_classes": 7}).build(7, 3).sizes == (7, 5)
    with pytest.raises(UserError, match=r"model\.num_classes: is 6, but the data has 7; leave it"):
        OwnModel(Taking, {"num_classes": 6}).build(7, 3)
    with pytest.raises(UserError, match=r"model: Taking cannot be built \(TypeError: .*'depth'"):
        OwnModel(Taking, {"depth": 6}).build(7, 3)


def test_large_images_in_a_network_for_small_ones_are_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("adq_train"), "propagate", True)
    network = CifarResNetModel(depth=8, width=4).build(2, 3)
    warn_of_large_images(network, (3, 64, 64))
    warn_of_large_images(nn.Linear(2, 2), (3, 224, 224))
    assert not caplog.records
    warn_of_large_images(network, (3, 224, 224))
    assert "49 times the time of 32 × 32; data.image_size=64 data.resize=72" in caplog.text
