"""Networks as QAT leaves them, made without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from adq_train.artifacts import BitAllocation, LayerBits
from adq_train.data.base import InputFormat, Pixels
from adq_train.deploy.layer_tables import tables_of
from adq_train.deploy.model import TableModel, float_state
from adq_train.models import CifarResNet
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.prepare import prepare, quantized_layers
from adq_train.quantization.target import target_of
from adq_train.settings.building import build
from adq_train.training.calibration import calibrated

CONFIGS = Path(__file__).parents[1] / "configs"
RESNET8 = {"_target_": "adq_train.models.CifarResNetModel", "depth": 8, "width": 4}
DIGITS = OmegaConf.to_container(OmegaConf.load(CONFIGS / "data" / "digits.yaml"))


def make(group: str, name: str, **changes: Any) -> Any:
    """A quantizer factory from its yaml."""
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml"))
    return build({**node, **changes}, group, trial=lambda part: part)


def torchvision(name: str) -> dict[str, Any]:
    return {"_target_": "adq_train.models.TorchvisionModel", "name": name, "weights": None}


def quantized_network(
    model: dict[str, Any] = RESNET8,
    *,
    shape: tuple[int, int, int] = (1, 8, 8),
    bits: int = 3,
    weights: str = "adq",
    inputs: str = "n2uq",
    **changes: Any,
) -> tuple[nn.Module, TableModel]:
    """A network with quantized layers and statistics in its batch norms, and its tables."""
    torch.manual_seed(0)
    network = build(model, "model", trial=lambda part: part).build(10, shape[0])
    images = torch.randn(4, *shape)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    network.train()
    with torch.no_grad():
        network(images)
    network.eval()
    found = describe_layers(network, images[:1])
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        network.get_submodule(x.name).register_forward_pre_hook(
            lambda _, args, name=x.name: seen.update({name: args[0].flatten()[:4096]})
        )
        for x in found
    ]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    layers = tuple(LayerBits(x.name, bits, bits) for x in found)
    allocation = BitAllocation("test", {}, layers, 0, 0, 0, 0, 0, 0, False)
    make_weights = make("weight_quantizer", weights, **changes)
    prepare(network, allocation, make_weights, make("activation_quantizer", inputs), seen, 0)
    quantized = quantized_layers(network)
    expects = InputFormat(10, shape, (), Pixels((100.0,) * shape[0], (50.0,) * shape[0]))
    tables = {name: tables_of(name, layer) for name, layer in quantized.items()}
    floats = {k: v.detach() for k, v in float_state(network, quantized).items()}
    return network.eval(), TableModel(model, DIGITS, expects, tables, floats)


def int8_network(
    network: nn.Module,
    shape: tuple[int, int, int],
    *,
    bits: int = 4,
    weights: str = "adq",
    inputs: str = "lsq",
    target: str = "int8",
) -> nn.Module:
    """A network that was calibrated for a target, in evaluation mode; norms of both signs."""
    torch.manual_seed(0)
    images = torch.randn(16, *shape)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data[::3] *= -1
            nn.init.normal_(module.bias, std=0.2)
    layers = tuple(LayerBits(x.name, bits, bits) for x in describe_layers(network, images[:1]))
    allocation = BitAllocation("test", {}, layers, 0, 0, 0, 0, 0, 0, False)
    chosen = target_of(target)
    makers = chosen.makers(
        (make("weight_quantizer", weights), make("activation_quantizer", inputs))
    )
    return calibrated(network, allocation, makers, [images], 0, chosen).eval()


SHAPE = (1, 8, 8)


class Mixed(nn.Module):
    """What the ResNets lack: groups, a stride, a bias, concatenation, both pools, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, 2, "valid"), nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.right = nn.Conv2d(4, 4, 1)
        self.pool, self.drop = nn.MaxPool2d(2, 1), nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.norm(self.first(x)))
        x = torch.cat([torch.relu(self.left(x)), self.right(x)], 1)
        x = F.avg_pool2d(self.pool(x), 2)
        return self.head(self.drop(x.view(x.size(0), -1)))


class Shared(nn.Module):
    """A convolution that is called twice, once for another value than that of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.again(x))
        x = F.relu(x + self.again(x))
        return self.head(x.mean((2, 3)))


def networks() -> dict[str, nn.Module]:
    """Small networks that integers can compute."""
    torch.manual_seed(1)
    return {
        "resnet": CifarResNet(8, 4, 5, 1),
        "preact": CifarResNet(8, 4, 5, 1, preact=True),
        "mixed": Mixed(),
        "shared": Shared(),
    }
