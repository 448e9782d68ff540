"""The float networks: CIFAR ResNets, and any classifier of torchvision or timm by name.

Torchvision and timm are imported once they are needed: they take longer than a small network.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.errors import UserError, did_you_mean

log = logging.getLogger(__name__)


class ModelSource(Protocol):
    """A network's knobs."""

    def build(self, num_classes: int, in_channels: int) -> nn.Module:
        """The network with its first weights."""
        ...


MOST = 4096  # of any number among the options of a network of timm
# What a network's constructor may take of the data.
OF_DATA = ("num_classes", "in_channels")


@dataclass(frozen=True)
class OwnModel:
    """A network's class as a model source: its constructor gets what it takes of the data.

    Attributes:
        kind: The class.
        settings: Arguments of its constructor.
    """

    kind: type[nn.Module]
    settings: Mapping[str, Any]

    def build(self, num_classes: int, in_channels: int) -> nn.Module:
        """The network; ``num_classes`` and ``in_channels`` are passed where it takes them.

        Raises:
            UserError: Its settings name other numbers, or its constructor fails.
        """
        taken = inspect.signature(self.kind).parameters
        numbers = dict(zip(OF_DATA, (num_classes, in_channels), strict=True))
        of_data = {name: number for name, number in numbers.items() if name in taken}
        for name, number in of_data.items():
            if self.settings.get(name, number) != number:
                raise UserError(
                    f"model.{name}: is {self.settings[name]}, but the data has {number}; leave it "
                    "out, it comes from the data"
                )
        try:
            return self.kind(**{**of_data, **self.settings})
        except Exception as error:  # a constructor may fail in any way
            raise UserError(
                f"model: {self.kind.__qualname__} cannot be built ({type(error).__name__}: {error})"
            ) from error


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.extra_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu(out + self.shortcut(x))
        return result

    def shortcut(self, x: Tensor) -> Tensor:
        """Every stride-th pixel, with zeros for the channels that are new."""
        if self.stride == 1 and not self.extra_channels:
            return x
        before = self.extra_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.extra_channels - before))


class PreactBlock(BasicBlock):
    """The block with normalisation and ReLU before each convolution (arXiv 1603.05027)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        result: Tensor = out + self.shortcut(x)
        return result


class CifarResNet(nn.Module):
    """The ResNets for small images of He et al. 2016 (arXiv 1512.03385, section 4.2).

    Args:
        depth: 6 n + 2 layers with weights, n blocks in each of three stages.
        width: Channels of the first stage; the next two have twice and four times as many.
        num_classes: Number of classes.
        in_channels: 1 for grey images, 3 for colour.
        preact: Whether each convolution but the first has its normalisation and ReLU before it,
            not behind it (arXiv 1603.05027).
    """

    def __init__(
        self, depth: int, width: int, num_classes: int, in_channels: int, preact: bool = False
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.preact = preact
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4 * width if preact else width)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(blocks, width, width, 1)
        self.layer2 = self._stage(blocks, width, 2 * width, 2)
        self.layer3 = self._stage(blocks, 2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, blocks: int, in_channels: int, out_channels: int, stride: int
    ) -> nn.Sequential:
        block = PreactBlock if self.preact else BasicBlock
        return nn.Sequential(
            block(in_channels, out_channels, stride),
            *(block(out_channels, out_channels, 1) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.conv1(x)
        x = x if self.preact else self.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu(self.bn1(x)) if self.preact else x
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


SMALL = 64  # pixels of a side, for which these networks are made


def warn_of_large_images(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Says what a ResNet for small images costs on images (C, H, W) that are not small."""
    _, height, width = image_shape
    if isinstance(model, CifarResNet) and max(height, width) > SMALL:
        log.warning(
            "model: this ResNet for small images keeps all %d × %d pixels in its first stage, and "
            "takes %.0f times the time of 32 × 32; data.image_size=64 data.resize=72 makes a "
            "folder's images smaller, model=torchvision takes larger ones", height, width,
            height * width / 32**2,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CifarResNetModel:
    """A ResNet for small images.

    Attributes:
        depth: 8, 14, 20, 32, 44, 56 … (6 n + 2).
        width: Channels of the first stage; 16 in the paper.
        preact: Whether normalisation and ReLU stand before the convolutions (arXiv 1603.05027).
    """

    depth: int
    width: int
    preact: bool = False

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, 32, 44, 56 …), got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    def build(self, num_classes: int, in_channels: int) -> nn.Module:
        """The network with random weights."""
        return CifarResNet(self.depth, self.width, num_classes, in_channels, self.preact)


@dataclass(frozen=True, kw_only=True)
class TorchvisionModel:
    """A torchvision classifier, adapted to the data's channels and classes where they differ.

    Attributes:
        name: A name of ``torchvision.models.list_models(module=torchvision.models)``.
        weights: None for random weights; ``DEFAULT``, ``IMAGENET1K_V1`` … for pretrained ones.
    """

    name: str
    weights: str | None

    def __post_init__(self) -> None:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if self.name not in known:
            raise ValueError(
                f"name: torchvision has no classifier {self.name!r}{did_you_mean(self.name, known)}"
            )
        if self.weights is not None:
            choices = torchvision.models.get_model_weights(self.name).__members__
            if self.weights not in choices:
                raise ValueError(
                    f"weights: {self.name} has {', '.join(choices)}, got {self.weights!r}"
                )

    def build(self, num_classes: int, in_channels: int) -> nn.Module:
        """The network; a first or last layer that does not fit the data is replaced.

        Args:
            num_classes: Another number than the weights' gets a new last layer.
            in_channels: Another number than 3 gets the first layer's filters summed over channels.

        Raises:
            UserError: The weights cannot be downloaded.
        """
        import torchvision

        model: nn.Module
        if self.weights is None:
            model = torchvision.models.get_model(self.name, num_classes=num_classes)
        else:
            weights = torchvision.models.get_model_weights(self.name)[self.weights]
            try:
                model = torchvision.models.get_model(self.name, weights=weights)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"model.weights: torchvision's weights {self.weights} of {self.name} could "
                    f"not be downloaded ({error}); fetch {weights.url} elsewhere and give it as "
                    "pretrain.checkpoint with model.weights=null"
                ) from error
        # The auxiliary classifiers of GoogLeNet and Inception would change what forward() returns.
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            if hasattr(model, auxiliary):
                setattr(model, auxiliary, None)
                model.aux_logits = False  # type: ignore[assignment]
        _adapt_ends(model, num_classes, in_channels)
        return model


# What timm's factory itself takes, besides the network: files to read, and places to fetch from.
_OF_THE_FACTORY = (
    "pretrained",
    "checkpoint",
    "cache",
    "scriptable",
    "exportable",
    "no_jit",
    "feat",
)


@dataclass(frozen=True, kw_only=True)
class TimmModel:
    """A classifier of timm, with the data's channels and classes.

    Attributes:
        name: A name of ``timm.list_models()``, without a tag.
        weights: None for random weights; ``DEFAULT``, or the tag of pretrained ones.
        options: Plain values for the network's constructor, such as ``{img_size: 32}``.
    """

    name: str
    weights: str | None
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        timm = self._timm()
        known = timm.list_models()
        if self.name not in known:
            hint = did_you_mean(self.name, known)
            raise ValueError(f"name: timm has no model {self.name!r}{hint}")
        tagged = timm.list_models(f"{self.name}.*", pretrained=True)
        choices = ["DEFAULT", *(x.partition(".")[2] for x in tagged)] if tagged else []
        if self.weights is not None and self.weights not in choices:
            raise ValueError(
                f"weights: {self.name} has {', '.join(choices) or 'none'}, got {self.weights!r}; "
                "a file of weights is given as pretrain.checkpoint"
            )
        if not isinstance(self.options or {}, Mapping):
            raise ValueError(f"options: must map names to values, got {self.options!r}")
        for name, value in (self.options or {}).items():
            if name.startswith(_OF_THE_FACTORY):
                raise ValueError(f"options: {name} is not of the network's constructor")
            numbers = value if isinstance(value, list | tuple) else [value]
            if not all(isinstance(x, str | bool | int | float | None) for x in numbers):
                raise ValueError(f"options: {name} must be a plain value, got {value!r}")
            # A file may hold these; none may ask for more memory than there is.
            if any(isinstance(x, int | float) and abs(x) > MOST for x in numbers):
                raise ValueError(f"options: {name} must be at most {MOST:,}, got {value!r}")

    @staticmethod
    def _timm() -> Any:
        try:
            return importlib.import_module("timm")
        except ImportError as error:
            raise ValueError(
                f"name: needs the package timm ({error}); pip install 'adq-train[timm]'"
            ) from error

    def build(self, num_classes: int, in_channels: int) -> nn.Module:
        """The network; pretrained weights are fitted to the data's classes and channels by timm.

        Raises:
            UserError: The weights cannot be downloaded, or the options do not suit the network.
        """
        tag = "" if self.weights in (None, "DEFAULT") else f".{self.weights}"
        try:
            network: nn.Module = self._timm().create_model(
                f"{self.name}{tag}",
                pretrained=self.weights is not None,
                num_classes=num_classes,
                in_chans=in_channels,
                **(self.options or {}),
            )
        except UserError:
            raise
        except Exception as error:  # downloads and constructors may fail in any way
            reason = " ".join(str(error).split())
            why = f"{type(error).__name__}: {reason}"
            if self.weights is not None:
                why += "; weights from elsewhere are given as pretrain.checkpoint, weights=null"
            raise UserError(f"model: timm cannot build {self.name} ({why})") from error
        return network


def _ends(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolutions and linear layers in the order of their registration."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def last_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the layer that knows the classes: the last one that is registered."""
    return _ends(model)[-1]


def _adapt_ends(model: nn.Module, num_classes: int, in_channels: int) -> None:
    """Replaces the first convolution or the last layer where the data asks for another."""
    first_name, first = _ends(model)[0]
    if isinstance(first, nn.Conv2d) and first.in_channels != in_channels:
        filters = first.weight.detach().sum(1, keepdim=True) / in_channels
        new = nn.Conv2d(
            in_channels,
            first.out_channels,
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            bias=first.bias is not None,
        )
        new.weight.data.copy_(filters.expand_as(new.weight))
        if first.bias is not None and new.bias is not None:
            new.bias.data.copy_(first.bias.data)
        model.set_submodule(first_name, new)
        if hasattr(model, "transform_input"):  # GoogLeNet and Inception rescale three channels
            model.transform_input = False  # type: ignore[assignment]
    last_name, last = last_layer(model)
    if isinstance(last, nn.Linear) and last.out_features != num_classes:
        new_head = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
        model.set_submodule(last_name, new_head)
    elif isinstance(last, nn.Conv2d) and last.out_channels != num_classes:  # SqueezeNet's
        model.set_submodule(last_name, nn.Conv2d(last.in_channels, num_classes, 1))
