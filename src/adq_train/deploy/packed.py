"""The packed file: one safetensors file with everything that evaluation needs (docs/export.md)."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from adq_train.data.base import InputFormat
from adq_train.deploy.architecture import check_builder, limited_to
from adq_train.deploy.bits import pack, unpack
from adq_train.deploy.layer_tables import Edge, LayerTables, Staircase, WeightTable
from adq_train.deploy.model import TableModel, assemble
from adq_train.errors import UserError
from adq_train.quantization.target import TARGETS, Int8Target
from adq_train.settings.targets import TRUSTED_PREFIXES, trusted_prefixes
from adq_train.storage.decoding import strict_json

FORMAT = "adq-train packed model"
VERSION = 2  # 1 where there are no edges
INT8 = Int8Target.name
DIGEST = b'"sha256":"'
NO_DIGEST = "0" * 64
# No index of a real network comes near; a damaged or hostile one must not fill the memory.
LARGEST_INDEX = 1 << 22
LARGEST_FILE = 1 << 32
# Values of an image that a network may ask for: three channels of 4096 × 4096.
LARGEST_IMAGE = 3 << 24


@dataclass(frozen=True)
class Sizes:
    """What the parts of a packed file take, in bytes.

    Attributes:
        codes: Packed weight codes.
        tables: Codebooks, scales, thresholds and levels.
        floats: What stays float.
        file: The whole file; the rest is the header and the index.
    """

    codes: int
    tables: int
    floats: int
    file: int


def load_packed(
    path: str | Path,
    unpack_weights: bool = True,
    network: nn.Module | Callable[[], nn.Module] | None = None,
    trusted_packages: Sequence[str] = (),
) -> nn.Module:
    """The network of a packed file, ready to evaluate on the CPU.

    No code comes from the file: it holds tensors and names a model, which must be one of
    adq-train's builders or of a package that you trust. Its
    logits are those of the trained network, bit for bit, on the CPU in float32, unless batch
    norms were folded or float parts rounded when it was written.

    Args:
        path: A file that ``adq-export`` or ``adq_train.export`` wrote.
        unpack_weights: Whether to unpack the weights to float32 now. Otherwise they stay codes
            of one byte each, and are looked up whenever their layer runs: less memory, slower.
        network: The architecture of a network of your own, float with any weights, or what
            builds it; None: the model that the file names.
        trusted_packages: Packages of your own that the file may name; they will be imported.

    Returns:
        A module that maps images (N, C, H, W), normalised as in training, to logits
        (N, num_classes). What the file of a run says of its images are attributes:
        ``image_shape`` (C, H, W); ``class_names``, one per class or none; ``mean`` and ``std``,
        tensors (C, 1, 1) for pixels in 0 … 1, so that the network takes ``(pixels - mean) / std``,
        or None where that is not known.

    Raises:
        UserError: The file is missing, damaged, something else, or of a newer version.
    """
    own = network() if callable(network) and not isinstance(network, nn.Module) else network
    return open_packed(Path(path), unpack_weights, own, trusted_prefixes(trusted_packages))[1]


def open_packed(
    path: Path,
    unpack_weights: bool = True,
    network: nn.Module | None = None,
    trusted: tuple[str, ...] = TRUSTED_PREFIXES,
) -> tuple[TableModel, nn.Module]:
    """A packed file's content and its network, as :func:`load_packed` gives it.

    Raises:
        UserError: As there.
    """
    model = read_packed(path)
    if network is None and not model.model:
        raise UserError(f"{path} holds a network of your own; give load_packed(path, network=…)")
    if network is None:
        try:
            check_builder(model.model, trusted)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    try:
        with limited_to(
            len(model.layers) + len(model.floats),
            sum(x.weight.codes.numel() for x in model.layers.values())
            + sum(x.numel() for x in model.floats.values()),
        ):
            network = assemble(model, unpack_weights, network, trusted)
    except UserError as error:
        raise UserError(f"{path} does not fit its own architecture: {error}") from error
    except Exception as error:  # a bent file may lead to anything
        raise UserError(f"{path} does not fit its own architecture: {error!r}") from error
    if model.expects is not None:
        describe_input(network, model.expects)
    return model, network


def describe_input(network: nn.Module, expects: InputFormat) -> None:
    """Gives a network, in place, the attributes that :func:`load_packed` promises."""
    network.image_shape = expects.image_shape  # type: ignore[assignment]
    network.class_names = expects.class_names  # type: ignore[assignment]
    pixels = expects.pixels
    for name in ("mean", "std"):
        values = None
        if pixels is not None:
            values = torch.tensor(getattr(pixels, name), dtype=torch.float64) / pixels.peak
            values = values.float().view(-1, 1, 1)
        # No part of the state, but moved with the network.
        network.register_buffer(name, values, persistent=False)


def packed_bytes(model: TableModel, float_type: torch.dtype = torch.float32) -> tuple[bytes, Sizes]:
    """The content of a packed file.

    Args:
        model: What to write.
        float_type: Precision of what stays float; tables are always float32.

    Raises:
        UserError: A value does not fit the precision.
    """
    floats = [x.to(float_type).flatten() for x in model.floats.values()]
    for name, values in zip(model.floats, floats, strict=True):
        if not values.isfinite().all():
            raise UserError(f"{name} has values that {float_type} cannot hold; use float32")
    tensors = {
        "codes": _joined([pack(x.weight.codes, x.weight.bit_width) for x in model.layers.values()]),
        "tables": _joined(
            [t for x in model.layers.values() for t in tables_in_order(x)]
            + [torch.tensor([x.step for x in model.edges])]
        ),
        "floats": _joined(floats),
        "index": torch.frombuffer(bytearray(zlib.compress(_index(model), 9)), dtype=torch.uint8),
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION if model.edges else 1),
        "sha256": NO_DIGEST,
        "model": _json(model.model),
        "run": _json(model.run),
    }
    data = save_tensors(tensors, metadata)
    place = _digest_place(data)
    data = data[: place.start] + hashlib.sha256(data).hexdigest().encode() + data[place.stop :]
    codes, tables, rest = (tensors[name].nbytes for name in ("codes", "tables", "floats"))
    return data, Sizes(codes, tables, rest, len(data))


def read_packed(path: Path) -> TableModel:
    """The content of a packed file.

    Raises:
        UserError: The file is missing, damaged, something else, or of a newer version.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} cannot be read: it is not a regular file")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise UserError(f"{path} has {size:,} bytes, more than the {LARGEST_FILE:,} allowed")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    metadata = _metadata(data, path)
    try:
        tensors = load_tensors(data)
        node, run = strict_json(metadata["model"]), strict_json(metadata["run"])
        unzip = zlib.decompressobj()
        text = unzip.decompress(tensors["index"].numpy().tobytes(), LARGEST_INDEX)
        if unzip.unconsumed_tail:
            raise ValueError(f"an index of more than {LARGEST_INDEX:,} bytes")
        return _parsed(strict_json(text), node, run, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a bent file may lead to anything
        raise UserError(f"{path} is not a packed model that adq-export wrote: {error!r}") from error


def _metadata(data: bytes, path: Path) -> dict[str, str]:
    """The strings of the header, once the file is known to be ours and whole."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata: Any = strict_json(data[8 : 8 + length]).get("__metadata__") or {}
        kind, version = metadata.get("format"), str(metadata.get("format_version", ""))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged, or not a safetensors file; give a run's folder, or a file that "
            "adq-export wrote"
        ) from error
    if kind != FORMAT:
        raise UserError(f"{path} is not a packed model of adq-train; make one with adq-export")
    if not (version.isdecimal() and len(version) < 10 and int(version) > 0):
        raise UserError(f"{path} is damaged: its format version is {version[:20]!r}")
    if int(version) > VERSION:
        raise UserError(
            f"{path} has format version {version}, this adq-train reads up to {VERSION}; update it"
        )
    place = _digest_place(data)
    zeroed = data[: place.start] + NO_DIGEST.encode() + data[place.stop :]
    if hashlib.sha256(zeroed).hexdigest().encode() != data[place]:
        raise UserError(f"{path} is damaged (its SHA-256 is another); export or copy it again")
    return {str(key): str(value) for key, value in metadata.items()}


def _digest_place(data: bytes) -> slice:
    """Where the file's own SHA-256 stands; it is taken with zeros in this place."""
    start = data.find(DIGEST) + len(DIGEST)
    return slice(start, start + len(NO_DIGEST))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0)


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def tables_in_order(layer: LayerTables) -> Iterator[Tensor]:
    """The float32 tables of a layer in the order of the file."""
    yield layer.weight.codebook
    if layer.weight.scale is not None:
        yield layer.weight.scale
    yield layer.input.thresholds
    yield layer.input.levels


def _index(model: TableModel) -> bytes:
    """What says how to cut the three tensors into layers."""
    content = {
        "input": model.expects and model.expects.to_dict(),
        "data": model.data,
        "layers": [
            {
                "name": name,
                "shape": list(layer.weight.codes.shape),
                "weight_bits": layer.weight.bit_width,
                "weight_levels": len(layer.weight.codebook),
                "scaled": layer.weight.scale is not None,
                "input_bits": layer.input.bit_width,
                "input_levels": len(layer.input.levels),
            }
            for name, layer in model.layers.items()
        ],
        "floats": [[name, list(tensor.shape)] for name, tensor in model.floats.items()],
        "folded": model.folded,
        **({"edges": [[x.low, x.high] for x in model.edges]} if model.edges else {}),
        **({"target": model.target} if model.edges and model.target != INT8 else {}),
    }
    return _json(content).encode()


class _Reader:
    """Hands out consecutive parts of a one-dimensional tensor."""

    def __init__(self, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        if tensor.dim() != 1 or tensor.dtype not in dtypes:
            raise ValueError(f"a tensor of {tensor.dtype} with {tensor.dim()} dimensions")
        self.tensor = tensor
        self.position = 0

    def take(self, count: int) -> Tensor:
        part = self.tensor[self.position : self.position + count]
        if count < 0 or len(part) != count:
            raise ValueError(f"{count} values asked for, {len(part)} left")
        self.position += count
        return part.clone()

    def finish(self) -> None:
        if self.position != len(self.tensor):
            raise ValueError(f"{len(self.tensor) - self.position} values too many")


def _parsed(
    index: Any, node: dict[str, Any], run: dict[str, Any], tensors: dict[str, Tensor]
) -> TableModel:
    codes = _Reader(tensors["codes"], (torch.uint8,))
    tables = _Reader(tensors["tables"], (torch.float32,))
    floats = _Reader(tensors["floats"], (torch.float32, torch.float16))
    layers = {}
    for row in index["layers"]:
        bits, shape = int(row["weight_bits"]), _shape(row["shape"])
        if not (2 <= bits <= 8 and 1 <= row["weight_levels"] <= 2**bits):
            raise ValueError(f"{row['weight_levels']} levels of {bits} bits")
        if not (2 <= row["input_bits"] <= 8 and 1 <= row["input_levels"] <= 2 ** row["input_bits"]):
            raise ValueError(f"{row['input_levels']} levels of {row['input_bits']} bits")
        count = math.prod(shape)
        chosen = unpack(codes.take(-(-count * bits // 8)), bits, count).view(shape)
        codebook = tables.take(row["weight_levels"])
        if int(chosen.max()) >= len(codebook):
            raise ValueError("a code without a level")
        weight = WeightTable(
            bits, chosen, codebook, tables.take(shape[0]) if row["scaled"] else None
        )
        thresholds, levels = tables.take(row["input_levels"] - 1), tables.take(row["input_levels"])
        # Those that no input reaches are infinite.
        if thresholds.isnan().any() or not (thresholds[1:] >= thresholds[:-1]).all():
            raise ValueError("thresholds that do not ascend")
        for part in (weight.codebook, weight.scale, levels):
            if part is not None and not part.isfinite().all():
                raise ValueError("a level or a scale that is not finite")
        if row["name"] in layers:
            raise ValueError(f"layer {row['name']!r} twice")
        stairs = Staircase(int(row["input_bits"]), thresholds, levels)
        layers[str(row["name"])] = LayerTables(weight, stairs)
    edges = tuple(_edge(float(tables.take(1)), *ends) for ends in index.get("edges", []))
    target = str(index.get("target", INT8))
    if target not in TARGETS:
        raise ValueError(f"edges of {target!r}")
    kept = {
        str(name): floats.take(math.prod(_shape(shape, least=0))).float().view(shape)
        for name, shape in index["floats"]
    }
    if len(kept) < len(index["floats"]):
        raise ValueError("a float tensor that is there twice")
    for name, value in kept.items():
        if not value.isfinite().all() or (name.endswith("running_var") and (value < 0).any()):
            raise ValueError(f"{name!r} has values that are not finite, or a negative variance")
    for reader in (codes, tables, floats):
        reader.finish()
    folded = {str(norm): str(convolution) for norm, convolution in index["folded"].items()}
    if index["input"] is None and not node:
        return TableModel(node, index["data"], None, layers, kept, folded, edges, run, target)
    expects = InputFormat.from_dict(index["input"])
    if math.prod(expects.image_shape) > LARGEST_IMAGE:
        raise ValueError(
            f"images of {expects.image_shape}; at most {LARGEST_IMAGE:,} values are allowed"
        )
    resize = expects.pixels and expects.pixels.resize
    if resize and expects.image_shape[0] * resize**2 > LARGEST_IMAGE:
        raise ValueError(
            f"images resized to {resize} a side, too many for {LARGEST_IMAGE:,} values"
        )
    return TableModel(node, index["data"], expects, layers, kept, folded, edges, run, target)


def _edge(step: float, low: int, high: int) -> Edge:
    whole = type(low) is int and type(high) is int
    if not (whole and -128 <= low <= 0 < high <= low + 255 and 0 < step < math.inf):
        raise ValueError(f"an edge of step {step}, {low} to {high}")
    return Edge(step, low, high)


def _shape(sizes: Any, least: int = 1) -> tuple[int, ...]:
    known = type(sizes) is list and len(sizes) >= least
    if not known or not all(type(size) is int and size >= least for size in sizes):
        raise ValueError(f"a shape of {sizes}")
    return tuple(sizes)
