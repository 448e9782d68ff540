"""Copies of a network that can be taken apart: nothing in them computes past its own layers."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from adq_train.errors import UserError
from adq_train.quantization.attention import called, can_be_called

log = logging.getLogger(__name__)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        UserError: A part of the model cannot be copied.
    """
    # Weights that hooks have made carry the graph of the last step, which cannot be copied.
    made = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, made)
    except Exception as error:  # a part of the model may fail in any way
        raise UserError(
            f"model: it cannot be copied ({type(error).__name__}: {error}); take out of it what "
            "copy.deepcopy() cannot copy"
        ) from error


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within what ``torch.compile`` and data parallelism put around it.

    A compiled network would go on with the layers that it was compiled with.
    """
    inner: dict[type, str] = {DataParallel: "module", DistributedDataParallel: "module"}
    # Where torch's compiler was never loaded, nothing has been compiled; it takes a second.
    if compiler := sys.modules.get("torch._dynamo.eval_frame"):
        inner[compiler.OptimizedModule] = "_orig_mod"
    for kind, attribute in inner.items():
        if isinstance(model, kind):
            log.info("the %s is taken off; wrap what comes back again", kind.__name__)
            return unwrapped(getattr(model, attribute))
    return model


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy without wrappers, inside it as well, whose layers are all called.

    Raises:
        UserError: The model cannot be copied.
    """
    model = copied(unwrapped(model))
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and unwrapped(child) is not child:
                setattr(module, name, unwrapped(child))
    unfuse(model)
    return model


def unfuse(model: nn.Module) -> None:
    """Lets torch's attention and its transformer encoders call their layers, in place.

    They would read the weights of their linear layers instead, whatever these have become; the
    encoders in evaluation mode without gradients, where they hand on tensors of a nested layout.
    """
    attentions = {x: called(x) for x in model.modules() if can_be_called(x)}  # type: ignore[arg-type]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in attentions:
            model.set_submodule(name, attentions[module])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # read by the choice of the fused path alone
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def below(kind: type[nn.Module], methods: Mapping[str, Any]) -> type[nn.Module]:
    """A class below that of a network, with other methods."""
    base, methods = kind, dict(methods)
    if issubclass(kind, fx.GraphModule):
        # Each has a class of its own, for its forward(); its copies would call that without end.
        base, methods = kind.__mro__[1], {"forward": kind.forward, **methods}
    return type(kind.__name__, (base,), methods)
