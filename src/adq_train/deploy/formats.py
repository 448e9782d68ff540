"""The forms that a network is exported in: one entry of this table and one module each.

Imports nothing that takes time: the command line shows the table before torch is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adq_train.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from adq_train.data.base import Batches
    from adq_train.deploy.model import TableModel
    from adq_train.deploy.packed import Sizes

# Of what a file says about itself in its metadata; the value is JSON.
METADATA_KEY = "adq_train"


@dataclass(frozen=True)
class Source:
    """What a file is made from.

    Attributes:
        network: The trained, quantized network, on the CPU, in evaluation mode.
        tables: The same as tables; batch norms folded where that was asked for.
        example: Inputs (N, …) of the network.
        float_type: Precision of what stays float, for the forms that have a choice.
        trusted: Where the model that the tables name may be defined; empty: in this package.
    """

    network: nn.Module
    tables: TableModel
    example: Tensor
    float_type: torch.dtype
    trusted: tuple[str, ...] = ()

    @property
    def architecture(self) -> nn.Module | None:
        """The network, where the tables do not name a builder of this package."""
        named = str(self.tables.model.get("_target_")).startswith("adq_train.")
        return None if named else self.network


@dataclass(frozen=True)
class Written:
    """A file's content.

    Attributes:
        content: Its bytes.
        reference: The network that the file is compared with.
        sizes: The parts of a packed file.
        remarks: What a user is to know about it, a line each.
        resolution: How far rounding moves an output, at least: half a step where outputs have one.
    """

    content: bytes
    reference: nn.Module
    sizes: Sizes | None = None
    remarks: tuple[str, ...] = ()
    resolution: float = 0.0


@dataclass(frozen=True)
class Format:
    """One form of file.

    Attributes:
        name: On the command line.
        ending: Of the file's name.
        module: Of this package; its ``write`` makes a :class:`Written` of a :class:`Source`.
        runtime: What runs the file, a name of :data:`~.runtimes.RUNTIMES`; of a packed file,
            the function.
        help: What it is for, in a few words.
        extra: The extra of this package that it needs; empty for none.
        packages: What that extra brings, as they are imported.
        exact: Whether the file is promised to be the trained network, bit for bit. Then it is
            compared on random images, otherwise on the test set.
        as_trained: Whether it is made from the trained network's own tables; then what it is
            compared with must be that network bit for bit, unless batch norms are folded.
        integer: Whether the file is an integer network, which rounds more than the trained one
            does: on how many images that shows is reported.
        float16: Whether ``float_type`` is a choice.
        num_images: About so many of the test images, spread evenly, are looked at where its runtime
            is slow; None: all.
    """

    name: str
    ending: str
    module: str
    runtime: str
    help: str
    extra: str = ""
    packages: tuple[str, ...] = ()
    exact: bool = False
    as_trained: bool = False
    integer: bool = False
    float16: bool = False
    num_images: int | None = None

    def every(self, test: Batches) -> int:
        """k, where every k-th test image of each batch is looked at."""
        from adq_train.data.base import num_images  # with the data there is torch already

        return max(1, -(-num_images(test) // self.num_images)) if self.num_images else 1

    @property
    def file(self) -> str:
        """The name within a run's folder."""
        return f"export/model{self.ending}"

    def writer(self) -> Callable[[Source], Written]:
        """The module's ``write``, imported.

        Raises:
            UserError: A package of the extra is missing; says how to install it.
        """
        for package in self.packages:
            require(package, self.extra)
        module = importlib.import_module(f"adq_train.deploy.{self.module}")
        return cast("Callable[[Source], Written]", module.write)


FORMATS = {
    x.name: x
    for x in (
        Format(
            "packed", ".safetensors", "packed_form", "adq_train.load_packed",
            "smallest file, for adq_train.load_packed", exact=True, float16=True,
        ),
        Format(
            "onnx", ".onnx", "onnx", "onnxruntime", "standard ONNX operations, codes and lookups",
            "export", ("onnx", "onnxscript", "onnxruntime"), as_trained=True,
        ),
        Format(
            "qdq", ".qdq.onnx", "qdq", "onnxruntime", "int8 ONNX, fast on CPUs (target=int8)",
            "export", ("onnx", "onnxruntime"), integer=True,
        ),
        Format(
            "tflite", ".tflite", "tflite", "LiteRT",
            "integers for LiteRT (TensorFlow Lite); for runs with target=int8",
            "edge", ("ai_edge_litert",),
        ),
        Format(
            "tflm", ".tflm.tflite", "tflm", "TensorFlow Lite Micro",
            "the same with packed weights, for microcontrollers",
            "micro", ("ai_edge_litert", "tflite_micro"),
        ),
        Format(
            "qonnx", ".qonnx.onnx", "qonnx", "qonnx",
            "integer weights and MultiThreshold nodes, for FINN", "fpga", ("qonnx",), integer=True,
            num_images=1000,
        ),
    )
}  # fmt: skip


def format_of(path: Path) -> Format | None:
    """The format of a file by its name; the longest ending counts."""
    found = [x for x in FORMATS.values() if path.name.endswith(x.ending)]
    return max(found, key=lambda x: len(x.ending), default=None)


class MissingPackageError(UserError):
    """A package of an extra is not installed."""


def require(package: str, extra: str = "export") -> Any:
    """Imports a package of an extra.

    Raises:
        MissingPackageError: It is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = "" if missing else f" ({error})"
        raise MissingPackageError(
            f"this format needs the package {package}{reason}; pip install 'adq-train[{extra}]'"
        ) from error
