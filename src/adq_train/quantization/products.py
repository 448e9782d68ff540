"""Products inside attention, of queries with keys and of weights with values, at eight bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adq_train.errors import UserError
from adq_train.quantization.attention import PRODUCTS, Attention
from adq_train.quantization.copies import below
from adq_train.quantization.edges import EDGES, EdgeQuantizer

Quantize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Products:
    """``F.scaled_dot_product_attention`` between quantizers of what it multiplies.

    Attributes:
        query: Of queries (…, L, E).
        key: Of keys (…, S, E).
        weights: Of attention weights (…, L, S), in 0 … 1.
        value: Of values (…, S, Ev).
    """

    query: Quantize
    key: Quantize
    weights: Quantize
    value: Quantize

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What torch's function of that name takes and gives, (…, L, Ev)."""
        if is_causal:
            shape = query.shape[-2], key.shape[-2]
            attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
        if enable_gqa:
            key, value = (
                x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value)
            )
        return self.attend(query, key, value, attn_mask, dropout_p, scale)[0]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The context (…, L, Ev), and the quantized weights (…, L, S).

        Args:
            query: (…, L, E).
            key: (…, S, E).
            value: (…, S, Ev).
            mask: Added to the scores (…, L, S).
            dropout: Share of the weights that are left out.
            scale: Of the scores; by default 1 / √E.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (self.query(query) @ self.key(key).transpose(-2, -1)) * scale
        weights = scores.softmax(-1) if mask is None else _masked_softmax(scores + mask)
        weights = self.weights(weights)
        weights = F.dropout(weights, dropout) if dropout else weights
        context = weights @ self.value(value)
        return context.to(query.dtype), weights.to(query.dtype)


def _masked_softmax(scores: Tensor) -> Tensor:
    """Weights (…, L, S) that are zero, as torch's, in a row in which every key is masked (-inf).

    Filled before the softmax too: there such a row's weights would be NaN, and so its gradients.
    """
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


OPERANDS = tuple(field.name for field in fields(Products))


class _Redirected(TorchFunctionMode):
    """Within it, torch's function of attention is one between quantizers."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of a function of torch."""
        if func is F.scaled_dot_product_attention:
            func = self.products
        return func(*args, **(kwargs or {}))


def attentions(network: nn.Module) -> dict[str, nn.Module]:
    """The modules whose products can be quantized, by name.

    They are ``nn.MultiheadAttention`` in its form that calls its layers, and modules whose class
    calls ``scaled_dot_product_attention`` by this name in one of its methods.
    """
    return {name: module for name, module in network.named_modules() if _attends(module)}


def _attends(module: nn.Module) -> bool:
    if isinstance(module, Attention | nn.MultiheadAttention | fx.GraphModule):
        return isinstance(module, Attention)
    own = (kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__)
    methods = (getattr(x, "__func__", x) for kind in own for x in vars(kind).values())
    codes = (getattr(method, "__code__", None) for method in methods)
    called = F.scaled_dot_product_attention.__name__
    return PRODUCTS in vars(module) or any(called in code.co_names for code in codes if code)


def connect_products(network: nn.Module, quantizers: Iterable[nn.Module] | None = None) -> None:
    """Puts quantizers on the products of a network's attentions, in place.

    They are a list ``edge_quantizers`` of the network: for each attention those of queries, keys,
    weights and values.

    Args:
        network: On any device. One that has such quantizers gets others.
        quantizers: Four for each attention; None: new ones, not calibrated.

    Raises:
        UserError: It has no attention, or another number.
    """
    found = require_attentions(network)
    count = len(found) * len(OPERANDS)
    new = [EdgeQuantizer() for _ in range(count)] if quantizers is None else list(quantizers)
    if len(new) != count:
        raise UserError(f"model: its attentions have {count} operands, not {len(new)}")
    device = next(network.parameters()).device
    setattr(network, EDGES, nn.ModuleList(new).to(device))
    for number, module in enumerate(found.values()):
        if not isinstance(module, Attention) and PRODUCTS not in vars(module):
            forward = {"forward": _redirecting(type(module).forward)}
            module.__class__ = below(type(module), forward)
        if getattr(module, "fused_attn", True) is False:
            # timm's switch between torch's function and products of its own.
            vars(module)["fused_attn"] = True
        start = number * len(OPERANDS)
        vars(module)[PRODUCTS] = Products(*new[start : start + len(OPERANDS)])


def _redirecting(before: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        with _Redirected(vars(self)[PRODUCTS]):
            return before(self, *inputs, **named)

    return forward


def require_attentions(network: nn.Module) -> dict[str, nn.Module]:
    """As :func:`attentions`.

    Raises:
        UserError: There are none.
    """
    if found := attentions(network):
        return found
    raise UserError(
        "target: attention finds none in this model: no nn.MultiheadAttention, and no class that "
        "calls scaled_dot_product_attention; use target=float"
    )


def has_products(network: nn.Module) -> bool:
    """Whether :func:`connect_products` has worked on a network."""
    return any(PRODUCTS in vars(module) for module in network.modules())


def operand_names(network: nn.Module) -> list[str]:
    """What each quantizer of :func:`connect_products` works on, for messages."""
    return [
        f"the {part} of {name or 'the model'}" for name in attentions(network) for part in OPERANDS
    ]
