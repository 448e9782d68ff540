"""States into networks: our own as they are, other people's once everything in them is checked."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.checkpoint_file import read_checkpoint
from adq_train.errors import UserError
from adq_train.models import last_layer

log = logging.getLogger(__name__)

# A counter that batch norm keeps; torch itself loads states without it.
COUNTER = "num_batches_tracked"
# What wrappers and profilers leave in a state besides the network's own tensors.
LEFTOVERS = re.compile(rf"(^|\.)(n_averaged|initted|step|total_ops|total_params|{COUNTER})$")
# Classifiers that GoogLeNet and Inception have for training alone; models.py takes them away.
AUXILIARY = re.compile(r"^(aux1|aux2|AuxLogits)\.")
AVERAGE = re.compile(r"ema|average|swa|shadow", re.IGNORECASE)
# torchvision's DenseNet weights have the names of before 2017, which Python no longer allows.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
DEEPEST = 4


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state that a network of this very class has written.

    Files and messages between processes keep tensors alone, so the versions of its modules are
    the network's own. Of a tensor with several names one is enough, as safetensors keeps it.

    Args:
        model: Changed in place.
        state: By the names of ``model.state_dict()``.

    Raises:
        RuntimeError: Names or shapes do not fit.
    """
    own = model.state_dict()
    full = OrderedDict(with_tied(own, state))
    full._metadata = own._metadata  # type: ignore[attr-defined]
    model.load_state_dict(full)


def tied_names(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor of a state, in their order; most have one."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        groups.setdefault(place, []).append(name)
    return list(groups.values())


def with_tied(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with the other names of tensors that ``own`` knows under several."""
    full = dict(state)
    for names in tied_names(own):
        present = [x for x in names if x in state]
        full.update({x: state[present[0]] for x in names if present and x not in state})
    return full


def load_weights(
    model: nn.Module,
    path: Path,
    setting: str = "pretrain.checkpoint",
    key: str | None = None,
    new_head: bool = False,
) -> None:
    """Loads a checkpoint file into ``model``; every name, shape, type and value is checked first.

    The state may stand in any dictionaries of the file, under any prefix (``module.``,
    ``_orig_mod.``): it is the one whose names are the model's.

    Args:
        model: Changed in place.
        path: See :func:`adq_train.checkpoint_file.read_checkpoint`.
        setting: Where the path is from, for messages.
        key: Which state, where several fit; None: the plain one before an average.
        new_head: Whether the last layer keeps the weights that ``model`` has.

    Raises:
        UserError: Names what is missing, unexpected, of another shape or type, NaN, infinite, or
            a negative variance.
    """
    where = f"{setting}: {path}"
    own = model.state_dict()
    head = set(layer_names(model, last_layer(model)[0]))
    wanted = own.keys() - head if new_head else own.keys()
    found = _choose(states_in(read_checkpoint(path, setting), wanted), where, setting, key)
    state = {name: x for name, x in found.state.items() if not AUXILIARY.match(name) or name in own}
    if len(state) < len(found.state):
        log.info("%s: the auxiliary classifiers in %s are left out", setting, path)
    if new_head:
        state = {name: x for name, x in state.items() if name not in head}
        state.update({name: own[name] for name in head})
        log.info("%s: new weights for the last layer, %s", setting, ", ".join(sorted(head)))
    state = with_tied(own, state)
    if not own.keys() <= state.keys():
        state = _as_modules_read(model, state, found.versions)
    state = {**{name: x for name, x in own.items() if name.endswith(COUNTER)}, **state}
    state = {name: x for name, x in state.items() if name in own or not LEFTOVERS.search(name)}
    odd = dict(_misfits(own, state))
    if odd:
        raise UserError(
            f"{where} does not fit the model: {_list(odd)}; {_remedy(odd, head, setting)}"
        )
    wrong = [
        f"{name} is {_word(state[name].dtype)}, the model's {_word(own[name].dtype)}"
        for name in own
        if not _convertible(state[name], own[name])
    ]
    if wrong:
        raise UserError(f"{where} does not fit the model: {_list(wrong)}; save float weights")
    _say_converted(own, state, setting, path)
    # On the CPU, where they come from, so that values which float32 cannot hold are seen.
    state = {name: state[name].detach().to(own[name].dtype) for name in own}
    if bad := [x for name, values in state.items() if (x := value_problem(name, values))]:
        raise UserError(f"{where} has values that no network can use: {_list(bad)}; save it anew")
    load_state(model, state)


def layer_names(model: nn.Module, layer: str) -> list[str]:
    """The names of a layer's tensors in the state of the whole network."""
    return [f"{layer}.{name}" for name in model.get_submodule(layer).state_dict()]


@dataclass(frozen=True)
class Found:
    """A state in a checkpoint.

    Attributes:
        label: The dictionaries and the prefix that it stands under, with dots.
        state: Tensors by name, without the prefix; what stands beside it keeps its full name.
        versions: Of the modules, by their names, where the file has kept them.
        complete: Whether every wanted name is there.
        hits: How many are.
    """

    label: str
    state: dict[str, Tensor]
    versions: dict[str, Any] | None
    complete: bool
    hits: int


def states_in(content: Any, wanted: Any) -> list[Found]:
    """All states of a file that have every wanted name, or else the one that has the most.

    Args:
        content: What the file holds.
        wanted: Names of a network's tensors; counters of batch norm may be missing.
    """
    wanted = {x for x in wanted if not x.endswith(COUNTER)}
    found: list[Found] = []
    nodes: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while nodes:
        path, node = nodes.pop(0)
        if not isinstance(node, dict):
            continue
        tensors = {str(k): x for k, x in node.items() if isinstance(x, Tensor)}
        if tensors:
            found += _under_prefixes(path, tensors, getattr(node, "_metadata", None), wanted)
        if len(path) < DEEPEST:
            nodes += [((*path, str(k)), x) for k, x in node.items() if isinstance(x, dict)]
    complete = [x for x in found if x.complete]
    return complete or sorted(found, key=lambda x: (x.hits, len(x.state)), reverse=True)[:1]


def _under_prefixes(
    path: tuple[str, ...], tensors: dict[str, Tensor], versions: Any, wanted: set[str]
) -> Iterator[Found]:
    """The states that one dictionary holds, each under a prefix of its own."""
    if not any(OLD_DENSENET.search(x) for x in wanted):
        tensors = {OLD_DENSENET.sub(r"\1\2", name): x for name, x in tensors.items()}
    hits: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                hits["".join(f"{x}." for x in parts[:start])] += 1
    full = [prefix for prefix, count in hits.items() if count == len(wanted)]
    best = [prefix for prefix, _ in hits.most_common(1)]
    for prefix in full or best or [""]:
        yield Found(
            ".".join((*path, *prefix.split(".")[:-1])),
            {
                name.removeprefix(prefix): x
                for name, x in tensors.items()
                if _owner(name, full) in (None, prefix)
            },
            _without_prefix(versions, prefix),
            prefix in full,
            hits[prefix],
        )


def _owner(name: str, prefixes: list[str]) -> str | None:
    """The longest of some prefixes that a name begins with."""
    return max((x for x in prefixes if name.startswith(x)), key=len, default=None)


def _without_prefix(versions: Any, prefix: str) -> dict[str, Any] | None:
    """The versions of a state's modules, by names without the prefix."""
    if not isinstance(versions, dict):
        return None
    inside = {f"{name}.": x for name, x in versions.items() if f"{name}.".startswith(prefix)}
    return {name.removeprefix(prefix).removesuffix("."): x for name, x in inside.items()}


def _choose(found: list[Found], where: str, setting: str, key: str | None) -> Found:
    """One of the states of a file; where there was a choice, the log says so.

    Raises:
        UserError: There is none, or none of the name that was asked for.
    """
    if not found:
        raise UserError(f"{where} does not hold a state dict of tensors")
    labels = [x.label or "the file itself" for x in found]
    chosen = min(found, key=lambda x: (bool(AVERAGE.search(x.label)), x.label.count(".")))
    if key is not None:
        named = [x for x in found if x.label == key]
        if not named:
            raise UserError(
                f"{setting}_key: {where} has no state {key!r} that fits; it has {', '.join(labels)}"
            )
        (chosen,) = named
    elif len(found) > 1:
        log.warning(
            "%s has several states that fit (%s); taken: %s; pretrain.checkpoint_key, or a file "
            "with one state, chooses another",
            where,
            ", ".join(labels),
            chosen.label or "the file itself",
        )
    return chosen


def _as_modules_read(
    model: nn.Module, state: dict[str, Tensor], versions: dict[str, Any] | None
) -> dict[str, Tensor]:
    """A state under the names that the model's own modules give to those of older versions."""
    probe, old = copy.deepcopy(model), OrderedDict(state)
    if versions is not None:
        old._metadata = versions  # type: ignore[attr-defined]
    try:
        probe.load_state_dict(old, assign=True)
    except Exception:  # a module may refuse in any way; what does not fit is said by name
        return state
    return dict(probe.state_dict())


def _misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The names that do not fit, and why."""
    yield from ((name, f"{name} is missing") for name in own if name not in state)
    yield from ((name, f"{name} is not in the model") for name in state if name not in own)
    for name in own:
        if name not in state:
            continue
        if state[name].shape != own[name].shape:
            shapes = f"{tuple(state[name].shape)}, the model {tuple(own[name].shape)}"
            yield name, f"{name} has shape {shapes}"
        elif state[name].layout != torch.strided:
            yield name, f"{name} is sparse"


def _remedy(odd: Mapping[str, str], head: set[str], setting: str) -> str:
    """What helps against names that do not fit."""
    if any("_quantizer." in name for name in odd):
        return "it is of a quantized network: init_from=RUN_FOLDER starts from one"
    if odd.keys() <= head:
        if setting == "pretrain.checkpoint":
            return "pretrain.head=new gives the last layer fresh weights"
        return "a teacher must know the classes of the data"
    return "choose the model group that it was saved from, and save the network's state alone"


def _convertible(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor means the same in the dtype of the model's."""
    if own.is_floating_point():
        return value.is_floating_point()
    if value.is_complex() and not own.is_complex():
        return False
    return torch.equal(value.to(own.dtype).to(value.dtype), value)


def _say_converted(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], setting: str, path: Path
) -> None:
    kinds = {
        (_word(state[name].dtype), _word(x.dtype))
        for name, x in own.items()
        if x.is_floating_point() and state[name].dtype != x.dtype
    }
    for old, new in sorted(kinds):
        log.info("%s: %s holds %s weights; they become %s", setting, path, old, new)


def value_problem(name: str, values: Tensor) -> str | None:
    """Where a tensor holds a value that no network works with, or None.

    Args:
        name: Its name in a state; ``running_var`` is a variance.
        values: On any device.
    """
    bad = ~torch.isfinite(values)
    if name.endswith("running_var"):
        bad |= values < 0
    if not bad.any():
        return None
    place = bad.nonzero()[0].tolist()
    more = f" ({int(bad.sum())} of {values.numel():,} values)"
    return f"{name}{place if place else ''} is {values[tuple(place)].item():g}{more}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(problems: Any) -> str:
    """The first three problems, and how many more there are."""
    texts = list(problems.values() if isinstance(problems, dict) else problems)
    return "; ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def weights_digest(model: nn.Module) -> str:
    """Hexadecimal SHA-256 of all parameters and buffers with their names."""
    return state_digest(model.state_dict())


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of tensors with their names, in their order."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
