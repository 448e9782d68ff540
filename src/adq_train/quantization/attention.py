"""torch's attention with its projections as layers that are called, so as to be quantized."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

SEPARATE = ("q_proj", "k_proj", "v_proj")
PRODUCTS = "adq_products"  # the attribute of an attention between whose quantizers it multiplies


class InProjection(nn.Linear):
    """The projections of queries, keys and values in one weight (3 E, E), one below the other."""

    def forward(self, input: Tensor, rows: slice = slice(None)) -> Tensor:
        """Maps (…, E) to (…, 3 E), or to what some of the rows give."""
        bias = None if self.bias is None else self.bias[rows]
        return F.linear(input, self.weight[rows], bias)


class Attention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that calls its projections; made by :func:`called`.

    The layers are ``in_proj`` (or ``q_proj``, ``k_proj`` and ``v_proj``, where their sizes differ)
    and ``out_proj``. The products within, of queries with keys and of weights with values, stay in
    floating point, unless :func:`~.products.connect_products` has put quantizers on them.
    """

    in_proj: InProjection

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What ``nn.MultiheadAttention`` gives; ``is_causal`` is a hint that is not needed.

        Args:
            query: (N, L, E), (L, N, E) without ``batch_first``, or (L, E).
            key: (N, S, …), in the same order.
            value: (N, S, …), in the same order.
            key_padding_mask: (N, S) or (S,): True, or what is added, for keys to leave out.
            need_weights: Whether to return the weights too.
            attn_mask: (L, S) or (N · heads, L, S), in the same terms.
            average_attn_weights: Whether those are averaged over the heads.
            is_causal: That ``attn_mask`` is causal.

        Raises:
            RuntimeError: ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask; give that too")
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._projected(query, key, value))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if products := vars(self).get(PRODUCTS):
            context, weights = products.attend(q, k, v, mask, dropout)
        elif need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            context = weights @ v
        else:
            context = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        context = context.transpose(1, 2).flatten(2)  # (N, L, E)
        if not batched:
            context = context[0]
        elif not self.batch_first:
            context = context.transpose(0, 1)
        if weights is None or not need_weights:
            return self.out_proj(context), None
        weights = weights.mean(1) if average_attn_weights else weights
        return self.out_proj(context), weights if batched else weights[0]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each in one call where they are made of the same tensor."""
        if not self._qkv_same_embed_dim:
            given = zip(SEPARATE, (query, key, value), strict=True)
            return tuple(getattr(self, name)(x) for name, x in given)
        size = self.embed_dim
        if query is key and key is value:
            return tuple(self.in_proj(query).split(size, -1))
        q = self.in_proj(query, slice(0, size))
        if key is value:
            return (q, *self.in_proj(key, slice(size, None)).split(size, -1))
        k = self.in_proj(key, slice(size, 2 * size))
        return q, k, self.in_proj(value, slice(2 * size, None))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """(N, heads, L, E / heads) of a projected tensor."""
        if not batched:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores, (N or 1, heads or 1, L, S)."""
        mask = None
        if attention is not None:
            mask = _added(attention, q)
            heads = (-1, self.num_heads) if mask.dim() == 3 else (1, 1)
            mask = mask.reshape(*heads, *mask.shape[-2:])
        if padding is not None:
            keys = _added(padding, q).view(-1, 1, 1, k.shape[-2])
            mask = keys if mask is None else mask + keys
        return mask

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        _rename(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *more)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added to scores."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def can_be_called(attention: nn.Module) -> bool:
    """Whether :func:`called` takes a module: torch's own attention, with plain projections.

    One with a bias of keys and values, or with a zero among the keys, is not.
    """
    if type(attention) is not nn.MultiheadAttention or "forward" in vars(attention):
        return False
    plain = attention.bias_k is None and not attention.add_zero_attn
    names = (
        ("in_proj_weight",)
        if attention._qkv_same_embed_dim
        else tuple(f"{name}_weight" for name in SEPARATE)
    )
    kept = all(attention._parameters.get(name) is not None for name in names)
    return plain and kept and not is_parametrized(attention.out_proj)


def called(attention: nn.MultiheadAttention) -> Attention:
    """The same attention, with layers that are called; parameters are shared where they can be.

    Args:
        attention: One that :func:`can_be_called`; left as it was.
    """
    new, out = Attention.__new__(Attention), nn.Linear.__new__(nn.Linear)
    for module, source in ((new, attention), (out, attention.out_proj)):
        module.__dict__.update({name: copy.copy(value) for name, value in vars(source).items()})
    taken = {name: new._parameters[name] for name in new._parameters}
    for name in taken:
        new._parameters[name] = None
    layers: dict[str, nn.Module | None] = {}
    bias = taken["in_proj_bias"]
    if attention._qkv_same_embed_dim:
        layers["in_proj"] = _linear(InProjection, taken["in_proj_weight"], bias)
    else:
        own: list[nn.Parameter | None] = [None] * 3
        if bias is not None:
            parts = bias.detach().chunk(3)
            own = [nn.Parameter(part.clone(), bias.requires_grad) for part in parts]
        for name, part in zip(SEPARATE, own, strict=True):
            layers[name] = _linear(nn.Linear, taken[f"{name}_weight"], part)
    new._modules = {**layers, "out_proj": out}
    return new.train(attention.training)


def _linear(kind: type[nn.Linear], weight: Any, bias: Any) -> nn.Linear:
    """A layer that holds given parameters."""
    rows, columns = weight.shape
    layer = kind(columns, rows, bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def _rename(attention: Attention, state: dict[str, Any], prefix: str) -> None:
    """Gives the projections' tensors of a state the names that they have here, in place."""
    for part in ("weight", "bias") if attention._qkv_same_embed_dim else ():
        if f"{prefix}in_proj_{part}" in state:
            state[f"{prefix}in_proj.{part}"] = state.pop(f"{prefix}in_proj_{part}")
    for name in () if attention._qkv_same_embed_dim else SEPARATE:
        if f"{prefix}{name}_weight" in state:
            state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name}_weight")
    if not attention._qkv_same_embed_dim and f"{prefix}in_proj_bias" in state:
        parts = state.pop(f"{prefix}in_proj_bias").chunk(3)
        state.update({f"{prefix}{x}.bias": part for x, part in zip(SEPARATE, parts, strict=True)})


def with_new_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state, in which the projections of ``nn.MultiheadAttention`` may have their older names.

    Args:
        network: Whose names are wanted.
        state: Left as it was.
    """
    renamed = dict(state)
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            _rename(module, renamed, f"{name}.")
    return renamed
