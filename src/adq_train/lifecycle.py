"""A quantized network of any class to a file and back, and into a form that other programs run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from adq_train.artifacts import BitAllocation, SensitivityTable
from adq_train.deploy.formats import FORMATS, Source, format_of
from adq_train.deploy.model import tables_of_network
from adq_train.deploy.verify import Agreement, write_checked
from adq_train.errors import ConfigError, UserError
from adq_train.nested import mapped
from adq_train.quantization.base import MakeActivationQuantizer, Makers, MakeWeightQuantizer
from adq_train.quantization.copies import own_copy, unwrapped
from adq_train.quantization.prepare import quantized_layers
from adq_train.quantization.restore import restored
from adq_train.quantization.target import target_of
from adq_train.settings.building import build
from adq_train.states import state_digest, tied_names, value_problem
from adq_train.storage.files import written_whole
from adq_train.storage.stamps import digest
from adq_train.task import Forward, Output, Task, prepare_task

FORMAT = "adq-train quantized network"
VERSION = "1"
OURS = ("adq_train.",)


@dataclass(frozen=True)
class Quantized:
    """What a quantized network was made from; it carries this as ``model.adq``.

    Attributes:
        table: The sensitivities that its bits were chosen by.
        allocation: Its bits, with averages, packed size and bit operations.
        quantizers: How its quantizers are made, as nodes of a configuration; None for makers that
            are no classes of this package.
        target: What will run it, ``float`` or ``int8``.
    """

    table: SensitivityTable
    allocation: BitAllocation
    quantizers: tuple[dict[str, Any] | None, dict[str, Any] | None]
    target: str = "float"


def described(make: Callable[[int], nn.Module]) -> dict[str, Any] | None:
    """How a maker of quantizers is written down: a class of this package and its settings."""
    kind, settings = make, {}
    if isinstance(make, functools.partial) and not make.args:
        kind, settings = make.func, make.keywords
    target = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
    plain = all(isinstance(x, str | bool | int | float | None) for x in settings.values())
    if not (isinstance(kind, type) and target.startswith(OURS) and plain):
        return None
    return {"_target_": target, "_partial_": True, **settings}


def carrying(
    model: nn.Module,
    table: SensitivityTable,
    allocation: BitAllocation,
    make: Makers,
    target: str = "float",
) -> nn.Module:
    """Gives a quantized network, in place, what it was made from; see :class:`Quantized`."""
    made = described(make[0]), described(make[1])
    # torch declares that attributes of modules are tensors or modules, and takes any.
    model.adq = Quantized(table, allocation, made, target)  # type: ignore[assignment]
    return model


def carried_by(model: nn.Module) -> Quantized:
    """What a quantized network carries.

    Raises:
        UserError: It is none.
    """
    found = getattr(model, "adq", None)
    if not isinstance(found, Quantized) or not quantized_layers(model):
        raise UserError("model: it is not a quantized network; give what quantize() returned")
    return found


def require_trainable() -> None:
    """Refuses torch.inference_mode(), in which a network's new tensors could never be trained.

    Raises:
        UserError: It is on.
    """
    if torch.is_inference_mode_enabled():
        raise UserError(
            "torch.inference_mode() is on, and what is made in it cannot be trained; call this "
            "outside of it, or use torch.no_grad()"
        )


def _require_finite(model: nn.Module) -> None:
    """Refuses a network that training has broken, which its classes need not show.

    Raises:
        UserError: A parameter is NaN or infinite, or a state is no tensor; it is named.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"model: {name} is a {type(value).__name__}; a file holds tensors alone, so keep "
                "what get_extra_state() returns elsewhere"
            )
    for name, value in model.named_parameters():
        if problem := value_problem(name, value):
            raise UserError(
                f"model: {name} holds NaN or infinite values ({problem}); go back to where "
                "training was finite"
            )


def _require_float32(network: nn.Module) -> None:
    """Refuses a network that computes in another type; files hold float32.

    Raises:
        UserError: Names a parameter.
    """
    for name, value in network.named_parameters():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise UserError(
                f"model: {name} is of {value.dtype}, and files are of float32; export model.float()"
            )


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a quantized network with all that training goes on from, for :func:`load`.

    Args:
        model: From :func:`~.api.quantize` or :func:`load`, trained or not.
        path: The file, in the safetensors format: weights, quantizers, bits, sensitivities.

    Raises:
        UserError: The model is not quantized, holds NaN or infinite values, or something else than
            tensors, or the file cannot be written.
    """
    model = unwrapped(model)
    carried = carried_by(model)
    _require_finite(model)
    every = model.state_dict()
    state = {name: every[name].cpu().contiguous().clone() for name, *_ in tied_names(every)}
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "table": carried.table.to_json(),
        "allocation": carried.allocation.to_json(),
        "quantizers": json.dumps(carried.quantizers),
        **({} if carried.target == "float" else {"target": carried.target}),
    }
    metadata["sha256"] = _digest(state, metadata)
    with written_whole(Path(path)) as temporary:
        temporary.write_bytes(save_tensors(state, metadata))


def load(
    path: str | Path,
    network: nn.Module | Callable[[], nn.Module],
    *,
    make_weight_quantizer: MakeWeightQuantizer | None = None,
    make_activation_quantizer: MakeActivationQuantizer | None = None,
) -> nn.Module:
    """The quantized network of a file that :func:`save` wrote, ready to train or to evaluate.

    No code comes from the file: its quantizers are classes of this package, or those given here.

    Args:
        path: The file.
        network: The float network with any weights, left as it was; or what builds it.
        make_weight_quantizer: Maps a bit-width to a quantizer, where it was made by one of your
            own.
        make_activation_quantizer: The same for inputs.

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        UserError: The file is missing, damaged or something else, does not fit the network, or
            needs a quantizer of yours.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} cannot be read: there is no such file; see adq_train.save")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); write it with adq_train.save") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a quantized network; write it with adq_train.save")
    if metadata.get("format_version") != VERSION:
        found = metadata.get("format_version")
        raise UserError(f"{path} has format version {found}, this adq-train reads {VERSION}")
    if metadata.pop("sha256", None) != _digest(state, metadata):
        raise UserError(f"{path} is damaged (its SHA-256 is another); copy or write it again")
    try:
        table = SensitivityTable.from_json(metadata["table"])
        allocation = BitAllocation.from_json(metadata["allocation"])
        nodes: Any = json.loads(metadata["quantizers"])
        of_weights, of_inputs = nodes
        target = target_of(metadata.get("target", "float"))
    except (KeyError, ValueError, TypeError, RecursionError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}); write it again") from error
    try:
        make = (
            _maker("weight_quantizer", make_weight_quantizer, of_weights),
            _maker("activation_quantizer", make_activation_quantizer, of_inputs),
        )
    except ConfigError as error:
        raise UserError(f"{path} is damaged ({error}); write it again") from error
    require_trainable()
    made = network if isinstance(network, nn.Module) else network()
    if not isinstance(made, nn.Module):
        raise UserError(f"network: must be a network or give one, got {made!r}")
    model = own_copy(made).cpu()
    try:
        restored(model, allocation, target.makers(make), state, target)
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit the network: {reason}") from error
    return carrying(model, table, allocation, make, target.name).eval()


def _digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of what a file holds, without what it says of itself."""
    return digest([state_digest(dict(sorted(state.items()))), dict(sorted(metadata.items()))])


def _maker(group: str, given: Any, node: Any) -> Any:
    """The maker that was given, or the one that the file describes."""
    if given is not None:
        return given
    if node is None:
        raise UserError(f"make_{group}: the network has one of your own; give it here too")
    return build(node, group, lambda make: make(2), OURS)


def export(
    model: nn.Module,
    path: str | Path,
    example: Any,
    format: str | None = None,
    *,
    forward: Forward | None = None,
    output: Output | None = None,
    tolerance: float = 0.001,
) -> Agreement:
    """Writes a quantized network in a form that other programs run, and checks what it wrote.

    Args:
        model: From :func:`~.api.quantize` or :func:`load`; left as it was.
        path: The file.
        example: Inputs (N, …) of the network, normalised; the file is checked on them. For a packed
            file also a tuple of arguments, a mapping of named ones, or what ``forward`` takes.
        format: ``packed`` for ``adq_train.load_packed(path, network=…)``; with one input, one
            output and N free ``onnx``, ``qonnx`` and, for networks of ``target="int8"``, ``qdq``,
            ``tflite`` and ``tflm``; None: by the ending of the file, as ``adq-export`` names it.
        forward: ``forward(model, example)`` gives a result, as of :func:`~.api.quantize`.
        output: ``output(result)`` picks the tensors that are checked.
        tolerance: Share of the example's rows, 0 … 1, on which a runtime may give another top-1
            class, or another value where there is one output; a packed file is equal in all.

    Returns:
        How the file's outputs agree with the network's on the example.

    Raises:
        UserError: The model is not quantized, holds NaN or infinite values or is not in float32,
            or cannot be exported, or the file's outputs are
            other ones; no file is left then.
    """
    carried_by(model)
    _require_finite(model)
    if not 0 <= tolerance <= 1:
        raise UserError(f"tolerance: must be a share from 0 to 1, got {tolerance!r}")
    path = Path(path)
    kind = FORMATS.get(format) if format else format_of(path)
    if kind is None:
        endings = ", ".join(f"{x.name} (…{x.ending})" for x in FORMATS.values())
        raise UserError(
            f"format: must be one of {endings}, got {format!r} for {path.name}; name the file so, "
            "or give format"
        )
    network = own_copy(model).cpu().eval()
    example = mapped(lambda x: x.detach().cpu(), example)
    _require_float32(network)
    task = prepare_task(network, [example if forward else (example, None)], Task(forward, output))
    if task.count is not None and not kind.exact:
        raise UserError(
            f"format: {kind.name} takes a network from one tensor to one; wrap it in a module that "
            "is so, or use format=packed"
        )
    source = Source(network, tables_of_network(network), example, torch.float32)
    with written_whole(path) as temporary:
        return write_checked(temporary, kind, source, [example], tolerance)[1]
