"""Runs a network again and again from one layer on, without repeating what lies before it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adq_train.errors import first_line
from adq_train.nested import few, tensors
from adq_train.quantization.graph import Tracer
from adq_train.quantization.layers import QuantLayer
from adq_train.task import RUN

log = logging.getLogger(__name__)

Values = dict[fx.Node, Any]


# Operations besides the layers that can be quantized: a batch norm of any kind, as its mode may
# change, a quantized layer, as it may be replaced, and torch's attention, which nothing looks into.
WHOLE = (_BatchNorm, QuantLayer, nn.MultiheadAttention)


class Trial(fx.Interpreter):
    """Runs the listed operations once and sees whether any of them changes a tensor in place."""

    in_place = False

    def run_node(self, n: fx.Node) -> Any:
        """One operation."""
        before = [(x, x._version) for _, x in tensors(self.fetch_args_kwargs_from_env(n))]
        result = super().run_node(n)
        self.in_place |= any(x._version != version for x, version in before)
        return result


class WholeRuns:
    """Runs the whole network each time.

    Args:
        model: In evaluation mode.
        batches: Images (N, C, H, W) each.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = model, batches

    def from_layer(self, name: str, index: int) -> Callable[[], Tensor]:
        """The whole network, whatever the layer."""
        return partial(self.model, self.batches[index])


class PartialRuns:
    """Runs the operations from a layer's first call on; what they need is computed once.

    For each batch the values that are still needed behind the layer are kept. Asked for the
    layers in the order of their execution, all that lies before them is computed once. Where the
    values of all batches together would take more than ``limit_bytes``, the batches beyond that
    are computed from the images for each layer, so at most one batch's values come on top.

    Args:
        model: In evaluation mode.
        batches: Images (N, C, H, W) each.
        graph: The model's operations in their order.
        limit_bytes: Most bytes of values to keep.
        in_place: Whether an operation changes a tensor in place.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        graph: fx.Graph,
        limit_bytes: int,
        in_place: bool,
    ) -> None:
        self.batches, self.limit_bytes, self.in_place = batches, limit_bytes, in_place
        self.nodes = list(graph.nodes)
        self.interpreter = fx.Interpreter(model, graph=graph)
        self.first_call: dict[str, int] = {}
        for position, node in enumerate(self.nodes):
            if node.op == "call_module":
                # A module that is not looked into, such as torch's own attention, may hold layers.
                called = set(model.get_submodule(str(node.target)).modules())
                for name, module in model.named_modules(remove_duplicate=False):
                    if module in called:
                        self.first_call.setdefault(name, position)
        self.kept: dict[int, tuple[int, Values]] = {}
        self.kept_bytes: dict[int, int] = {}

    def from_layer(self, name: str, index: int) -> Callable[[], Tensor]:
        """What gives the logits (N, num_classes) of batch ``index``, as often as it is called.

        It runs the operations from the first call of the layer on: only the layer ``name``, and
        what is called after it, may be changed between the calls.
        """
        start = self.first_call[name]
        position, values = self.kept.pop(index, (0, {}))
        self.kept_bytes.pop(index, None)
        if position > start:
            position, values = 0, {}
        self.interpreter.args_iter = iter([self.batches[index]])
        self._run(position, start, values)
        size = num_bytes(values.values())
        if size + sum(self.kept_bytes.values()) <= self.limit_bytes:
            self.kept[index], self.kept_bytes[index] = (start, values), size
        return partial(self._rest, start, values)

    def _rest(self, start: int, values: Values) -> Tensor:
        if self.in_place:
            # The kept values must stay. One deep copy of all leaves shared memory shared.
            values = dict(zip(values, copy.deepcopy(list(values.values())), strict=True))
        output: Tensor = self._run(start, len(self.nodes), dict(values))
        return output

    def _run(self, start: int, end: int, values: Values) -> Any:
        """Runs some operations, and forgets each value after its last use."""
        result = None
        self.interpreter.env = values
        for node in self.nodes[start:end]:
            result = self.interpreter.run_node(node)
            if node.users:
                values[node] = result
            for used_up in self.interpreter.user_to_last_uses.get(node, ()):
                del values[used_up]
        return result


Runs = WholeRuns | PartialRuns


def make_runs(model: nn.Module, batches: Sequence[Tensor], limit_bytes: int) -> Runs:
    """Partial runs where the network's operations can be listed, whole ones elsewhere.

    The list is tried on two images first: it must give the very same logits.

    Args:
        model: In evaluation mode.
        batches: Images (N, C, H, W) each, at least one batch.
        limit_bytes: Most bytes of values to keep; 0 for whole runs.
    """
    if not limit_bytes:
        return WholeRuns(model, batches)
    some = few(batches[0], 2)
    tracer = Tracer(WHOLE)
    tracer.traced_func_name = RUN if hasattr(model, RUN) else "forward"
    try:
        graph = tracer.trace(model)
        trial = Trial(model, graph=graph)
        found = trial.run(copy.deepcopy(some))
        same = torch.equal(found, model(copy.deepcopy(some)))
    except Exception as error:  # a forward() that is traced may fail in any way
        log.info("profile: whole runs, as the model cannot be traced (%s)", first_line(error))
        return WholeRuns(model, batches)
    if not same:
        log.info("profile: whole runs, as the traced model gives other outputs")
        return WholeRuns(model, batches)
    return PartialRuns(model, batches, graph, limit_bytes, trial.in_place)


def num_bytes(values: Iterable[Any]) -> int:
    """Memory behind some values; tensors that share it count once."""
    storages = [x.untyped_storage() for _, x in tensors(list(values))]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
