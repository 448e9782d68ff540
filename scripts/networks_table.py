"""What becomes of twelve networks: the share that is quantized, sizes, time, and every round trip.

    python scripts/networks_table.py                # all of them, as the table of docs/models.md
    python scripts/networks_table.py vit-tiny u-net # some

Each is built with random weights, quantized on random images by Ω = gradient, saved, loaded, and
exported. What onnxruntime gives is compared image by image, by the largest difference as a share of
the largest output; beside it stands what rounding alone may do: the same for inputs that are larger
by a millionth. Times are CPU seconds of one thread. Needs the extras timm and export.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adq_train
from adq_train.artifacts import LayerSensitivity
from adq_train.deploy.apart import FileHere
from adq_train.models import TimmModel, TorchvisionModel
from adq_train.quantization.watch import is_matrix
from adq_train.sensitivity.gradient import Gradient

IMAGES = 8
CLASSES = 10
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Network:
    """A network and the images that it takes: how it is built, channels, and side in pixels."""

    build: Callable[[], nn.Module]
    channels: int = 3
    side: int = 64


def timm(name: str, side: int = 64, **options: Any) -> Network:
    model = TimmModel(name=name, weights=None, options=options)
    return Network(lambda: model.build(CLASSES, 3), side=side)


def torchvision(name: str) -> Network:
    model = TorchvisionModel(name=name, weights=None)
    return Network(lambda: model.build(CLASSES, 3))


def unet() -> nn.Module:
    """The network of examples/segmentation.py, four times as wide."""
    spec = importlib.util.spec_from_file_location("unet", ROOT / "examples" / "segmentation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.UNet(width=32)
    return network


def networks() -> dict[str, Callable[[], Network]]:
    """By name; a function each, as timm is asked for its own alone."""
    return {
        "ViT-tiny (timm)": lambda: timm("vit_tiny_patch16_224", img_size=64),
        "Swin-tiny (timm)": lambda: timm("swin_tiny_patch4_window7_224", 56, img_size=56),
        "MobileNetV3-large (timm)": lambda: timm("mobilenetv3_large_100"),
        "EfficientNet-B0, TF padding (timm)": lambda: timm("tf_efficientnet_b0"),
        "ConvNeXt-atto (timm)": lambda: timm("convnext_atto"),
        "ResNetV2-50, BiT (timm)": lambda: timm("resnetv2_50x1_bit"),
        "U-Net, examples/segmentation.py": lambda: Network(unet, 1, 48),
        "ResNet-18 (torchvision)": lambda: torchvision("resnet18"),
        "ResNet-50 (torchvision)": lambda: torchvision("resnet50"),
        "MobileNetV2 (torchvision)": lambda: torchvision("mobilenet_v2"),
        "DenseNet-121 (torchvision)": lambda: torchvision("densenet121"),
        "RegNetY-400MF (torchvision)": lambda: torchvision("regnet_y_400mf"),
    }


class Clocked(Gradient):
    """Ω = gradient, and the CPU seconds that it took."""

    seconds: ClassVar[list[float]] = []

    def measure(self, *arguments: Any) -> Iterator[LayerSensitivity]:
        """All layers at once."""
        rows, taken = timed(lambda: list(super(Clocked, self).measure(*arguments)))
        self.seconds.append(taken)
        return iter(rows)


class Kept(logging.Handler):
    """Keeps what is said of weights in full precision."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """One message."""
        if "in full precision" in record.getMessage():
            self.lines.append(record.getMessage())


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the CPU seconds that it took."""
    start = time.process_time()
    result = act()
    return result, time.process_time() - start


@dataclass(frozen=True)
class Row:
    """What was measured of one network; agreements are largest differences of each image's outputs.

    Those of ONNX are shares of the largest output, and so is the rounding: how far a millionth of
    the input moves the outputs.
    """

    weights: int
    quantized: int
    left: tuple[str, ...]
    packed_bytes: int
    float_bytes: int
    omega_seconds: float
    loaded: Tensor
    packed: Tensor
    onnx: Tensor
    rounding: Tensor
    onnx_seconds: float


def measure(network: Network, folder: Path) -> Row:
    """Takes one network through everything.

    Args:
        network: The network.
        folder: To write files in.
    """
    torch.manual_seed(0)
    model = network.build().eval()
    images = torch.randn(IMAGES, network.channels, network.side, network.side)
    kept, logger = Kept(), logging.getLogger("adq_train")
    logger.addHandler(kept)
    try:
        quantized = adq_train.quantize(model, [images], average_bits=3.0, sensitivity=Clocked())
    finally:
        logger.removeHandler(kept)
    quantized.eval()
    matrices = sum(x.numel() for x in model.parameters() if is_matrix(x))
    layers = quantized.adq.table.layers  # type: ignore[union-attr]
    with torch.no_grad():
        expected = quantized(images)

    def apart(other: nn.Module, given: Tensor = images) -> Tensor:
        with torch.no_grad():
            return (other(given) - expected).abs().flatten(1).amax(1)

    adq_train.save(quantized, folder / "saved.safetensors")
    loaded = apart(adq_train.load(folder / "saved.safetensors", network.build))
    adq_train.export(quantized, folder / "packed.safetensors", images)
    packed = apart(adq_train.load_packed(folder / "packed.safetensors", network=network.build))
    onnx = folder / "model.onnx"
    _, onnx_seconds = timed(lambda: adq_train.export(quantized, onnx, images))
    largest = float(expected.abs().max())
    return Row(
        matrices,
        sum(x.num_weights for x in layers),
        tuple(kept.lines),
        (folder / "packed.safetensors").stat().st_size,
        4 * sum(x.numel() for x in model.state_dict().values() if x.is_floating_point()),
        Clocked.seconds[-1],
        loaded,
        packed,
        apart(FileHere(onnx, "onnxruntime")) / largest,
        apart(quantized, images * (1 + 1e-6)) / largest,
        onnx_seconds,
    )


def line(name: str, network: Network, row: Row) -> str:
    """A line of the table."""

    def same(differences: Tensor) -> str:
        largest, equal = float(differences.max()), int((differences < 1e-5).sum())
        if largest == 0:
            return "bit for bit"
        if equal == IMAGES:
            return "< 0.001 %"
        share = f"{100 * largest:.0f} %" if largest >= 0.1 else f"{100 * largest:.2g} %"
        return f"{equal} of {IMAGES}; {share}"

    cells = (
        name,
        f"{network.channels} × {network.side} × {network.side}",
        f"{row.weights / 1e6:.2f} M",
        f"{100 * row.quantized / row.weights:.2f} %",
        f"{row.packed_bytes / 1e6:.2f} MB, 1 / {row.float_bytes / row.packed_bytes:.1f}",
        f"{row.omega_seconds:.0f} s",
        same(row.loaded),
        same(row.packed),
        same(row.onnx),
        same(row.rounding),
        f"{row.onnx_seconds:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "network", "image", "weights", "quantized", "packed file", "Ω", "saved, loaded", "packed",
    "ONNX", "rounding", "to ONNX",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names, in small letters; none: all")
    wanted = parser.parse_args().names
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for other in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(other).setLevel(logging.ERROR)
    print(HEAD, flush=True)
    notes = []
    for name, make in networks().items():
        if wanted and not any(part in name.lower() for part in wanted):
            continue
        network = make()
        with tempfile.TemporaryDirectory() as folder:
            row = measure(network, Path(folder))
        print(line(name, network, row), flush=True)
        notes += [f"{name}: {text}" for text in row.left]
    print("\n".join(["", *notes]))
    versions = ", ".join(f"{x} {_version(x)}" for x in ("torch", "torchvision", "timm"))
    print(f"\nPython {platform.python_version()}, {versions}, one thread")


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)


if __name__ == "__main__":
    main()
