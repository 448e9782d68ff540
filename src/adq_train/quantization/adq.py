"""ADQ weights: a codebook per layer, initialised from quantiles, that follows the weights.

Jia et al. 2025 (arXiv 2510.19760). Known from the paper: one codebook per layer from quantiles
of the positive and of the negative weights, joined by zero, and its online adaptation by an
exponential moving average (EMA). The rest is this project's choice and configurable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adq_train.quantization.base import WeightQuantizer, check_choice, is_pruned
from adq_train.quantization.fitting import at_ranks, best_clip, cell_statistics, lloyd_max
from adq_train.quantization.functional import assign, at_least_float32, midpoints
from adq_train.quantization.steps import CodebookSTE

INITIALIZATIONS = ("quantile", "uniform", "kmeans", "random")
LEVEL_SETS = ("symmetric", "full", "no_zero")
GRANULARITIES = ("layer", "channel")
ADAPTATIONS = ("centroid", "quantile", "none")
# With centroids, a level whose moving average of weights is smaller is moved: less than one weight.
DEAD = 0.5


def side_sizes(bit_width: int, level_set: str) -> tuple[int, int]:
    """Number of negative and of positive levels of a level set.

    Args:
        bit_width: b.
        level_set: ``symmetric``: 2^(b-1) - 1 on each side; ``full``: one more positive level;
            ``no_zero``: 2^(b-1) on each side. The first two have a zero besides.
    """
    half = 2 ** (bit_width - 1)
    return {"symmetric": (half - 1, half - 1), "full": (half - 1, half), "no_zero": (half, half)}[
        level_set
    ]


def _fit_sides(weights: Tensor, bit_width: int, level_set: str) -> tuple[Tensor, Tensor, int, int]:
    """Negative and positive weights, and how many levels each side gets.

    A side without weights gives its own levels to the other one.
    """
    negative, positive = weights[weights < 0], weights[weights > 0]
    low, high = side_sizes(bit_width, level_set)
    if not len(negative):
        low, high = 0, low + high
    elif not len(positive):
        low, high = low + high, 0
    return negative, positive, low, high


def _side_quantiles(weights: Sequence[Tensor], bit_width: int, level_set: str) -> Tensor:
    """ADQ's initialisation: levels of equal mass on each side of zero, (layers, L) sorted.

    A side with m levels gets the quantiles of its weights at (i - 1/2) / m. Levels coincide where
    there are fewer distinct weights than levels. The zero, where there is one, is not among them.

    No number is read from the device: how many levels the negative side has, too, is a tensor.
    """
    low, high = side_sizes(bit_width, level_set)
    negative = torch.stack([(w < 0).sum() for w in weights])[:, None]
    positive = torch.stack([(w > 0).sum() for w in weights])[:, None]
    sizes = torch.tensor([[len(w)] for w in weights]).to(negative.device, non_blocking=True)
    own = torch.where(positive == 0, low + high, low)
    own = torch.where(negative == 0, 0, own)
    slots = torch.arange(low + high, device=own.device)
    below = slots < own
    # Ranks among all weights, where the positive ones stand last; without any, those of zeros.
    place = (slots - torch.where(below, 0, own)).double() + 0.5
    share = place / torch.where(below, own, low + high - own)
    count = torch.where(below, negative, positive)
    first = torch.where(below, 0, sizes - positive)
    return at_ranks(weights, first + share * (count - 1).clamp_min(0))


def _with_zero(levels: Tensor, level_set: str) -> Tensor:
    """The levels (layers, L), and a zero if the level set has one, sorted."""
    if level_set == "no_zero":
        return levels.sort().values
    return F.pad(levels, (1, 0)).sort().values


def _zero_level(codebooks: Tensor, level_set: str) -> Tensor:
    """Which level is the zero, (…, K) bool: the first among equals that is not negative."""
    slots = torch.arange(codebooks.shape[-1], device=codebooks.device)
    below = (codebooks < 0).sum(-1, keepdim=True)
    return (slots == below) & (level_set != "no_zero")


def _apart(rows: Tensor) -> list[Tensor]:
    """Each row in memory of its own, by one copy."""
    apart = [torch.empty_like(row) for row in rows.unbind()]
    torch._foreach_copy_(apart, list(rows.unbind()))
    return apart


def _free_levels(codebooks: Tensor, pinned: Tensor, level_set: str) -> Tensor:
    """Codebooks (layers, K) without their zeros."""
    if level_set == "no_zero":
        return codebooks
    slots = torch.arange(codebooks.shape[1] - 1, device=codebooks.device)
    return codebooks.gather(1, slots + (slots >= pinned.byte().argmax(1, keepdim=True)))


def uniform_codebook(weights: Tensor, bit_width: int, level_set: str) -> Tensor:
    """A rival: evenly spaced levels over the range whose clipping makes the squared error smallest.

    Args:
        weights: (n,) finite.
        bit_width: b.
        level_set: See :func:`side_sizes`; without a zero the levels are odd multiples of half a
            step.

    Returns:
        (K,) sorted levels.
    """
    *_, low, high = _fit_sides(weights, bit_width, level_set)
    # Sorted first: a stride through a filter bank can meet one corner of the kernels alone.
    sample = weights.sort().values[:: max(1, len(weights) // 2**16)]
    if level_set != "no_zero":
        step = best_clip(sample, low, high) if high else best_clip(-sample, 0, low)
        return torch.arange(-low, high + 1, device=weights.device, dtype=weights.dtype) * step
    halves = torch.arange(-low, high, device=weights.device, dtype=weights.dtype) + 0.5
    reach = sample.abs().max() / max(low, high)
    if reach == 0:
        return halves / max(low, high)
    relative = sample / reach
    steps = torch.arange(1, 101, device=weights.device) / 100
    errors = torch.stack(
        [(levels[assign(relative, levels)] - relative).square().mean()
         for levels in steps[:, None] * halves]
    )  # fmt: skip
    return halves * (steps[errors.argmin()] * reach)


def random_codebook(weights: Tensor, bit_width: int, level_set: str, seed: int) -> Tensor:
    """A rival: levels drawn from the weights of each side, with replacement.

    Args:
        weights: (n,) finite.
        bit_width: b.
        level_set: See :func:`side_sizes`.
        seed: Of the draw.

    Returns:
        (K,) sorted levels.
    """
    negative, positive, low, high = _fit_sides(weights, bit_width, level_set)
    generator = torch.Generator().manual_seed(seed)

    def draw(side: Tensor, count: int) -> Tensor:
        if len(side) == 0:
            return side.new_zeros(count)
        return side[torch.randint(len(side), (count,), generator=generator).to(side.device)]

    zero = weights.new_zeros(0 if level_set == "no_zero" else 1)
    return torch.cat([draw(negative, low), zero, draw(positive, high)]).sort().values


def revive_dead_level(
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    pinned: Tensor,
    reach: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves the emptiest level into the most populated cell, if its EMA count is below ``DEAD``.

    The new level stands halfway between the crowded level and the farther border of its cell.
    It takes half of that level's EMA count and the sum that agrees with its own value: with its
    old state the next update would undo the move. Free of branches on data, so that a GPU need
    not wait for the CPU.

    Args:
        codebook: (K,) sorted levels.
        counts: (K,) EMA of the number of weights of each level.
        sums: (K,) EMA of their sum.
        pinned: (K,) bool; a pinned level is never dead.
        reach: Smallest and largest weight, () each.

    Returns:
        Codebook, counts and sums, each (K,), not sorted.
    """
    # (1,), not (): PyTorch reads an index of no dimension.
    dead = torch.where(pinned, torch.inf, counts).argmin(0, keepdim=True)
    crowded = counts.argmax(0, keepdim=True)
    # No weight lies between the reach and a dead level beyond it.
    inner = midpoints(codebook).clamp(*reach)
    borders = torch.cat([reach[0].view(1), inner, reach[1].view(1)])
    level = codebook[crowded]
    below, above = borders[crowded], borders[crowded + 1]
    value = (level + torch.where(above - level >= level - below, above, level + below - level)) / 2

    # A cell with a single weight has nothing to share.
    move = (counts[dead] < DEAD) & (counts[crowded] >= 2)
    half = counts[crowded] / 2
    slots = torch.arange(len(codebook), device=codebook.device)
    is_dead = move & (slots == dead)
    is_crowded = move & (slots == crowded)
    new_codebook = torch.where(is_dead, value, codebook)
    new_counts = torch.where(is_dead | is_crowded, half, counts)
    new_sums = torch.where(is_dead, half * value, torch.where(is_crowded, sums / 2, sums))
    return new_codebook, new_counts, new_sums


class AdqWeightQuantizer(WeightQuantizer):
    """Adaptive codebook quantization of one layer's weights.

    After each optimizer step the codebook follows the weights. ``quantile``: c_k ← γ c_k +
    (1 - γ) r_k q_k, with q_k the quantile that belongs to level k, of the weights as they are now,
    and r_k the ratio of level and quantile at the start, 1 for levels that start at the quantiles.
    ``centroid``: N_k ← γ N_k + (1 - γ) n_k, S_k ← γ S_k + (1 - γ) s_k, c_k ← S_k / N_k, with n_k
    and s_k the count and sum of the weights nearest to level k; at fixed weights this ends at the
    Lloyd–Max codebook. The defaults are those that docs/method.md measures to be best.

    Args:
        bit_width: b, 2 … 8.
        initialization: ``quantile`` (the paper's), ``kmeans`` (from there to the means of the
            cells, the Lloyd–Max codebook), ``uniform`` or ``random``.
        level_set: ``no_zero``, ``full`` or ``symmetric`` (the paper's); see :func:`side_sizes`.
            A layer that was pruned keeps its zeros: it gets ``full`` in the place of ``no_zero``.
        granularity: ``layer`` (the paper's), or ``channel``: weights are divided by the mean
            magnitude of their output channel before the shared codebook.
        adaptation: What the EMA tracks: each level's ``quantile``, times its ratio at the start,
            the ``centroid`` of each cell, or ``none`` for a codebook that stays as initialised.
        decay: γ, in [0, 1).

    Raises:
        ValueError: An argument lies outside its range.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    pinned: Tensor
    ratio: Tensor
    scale: Tensor

    def __init__(
        self,
        bit_width: int,
        *,
        initialization: str = "kmeans",
        level_set: str = "no_zero",
        granularity: str = "layer",
        adaptation: str = "quantile",
        decay: float = 0.99,
    ) -> None:
        super().__init__(bit_width)
        check_choice("initialization", initialization, INITIALIZATIONS)
        check_choice("level_set", level_set, LEVEL_SETS)
        check_choice("granularity", granularity, GRANULARITIES)
        check_choice("adaptation", adaptation, ADAPTATIONS)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")
        self.initialization = initialization
        self.level_set = level_set
        self.granularity = granularity
        self.adaptation = adaptation
        self.decay = decay
        num_levels = sum(side_sizes(bit_width, level_set)) + (level_set != "no_zero")
        self.register_buffer("codebook", torch.zeros(num_levels))
        self.register_buffer("counts", torch.zeros(num_levels))
        self.register_buffer("sums", torch.zeros(num_levels))
        self.register_buffer("pinned", torch.zeros(num_levels, dtype=torch.bool))
        self.register_buffer("ratio", torch.ones(sum(side_sizes(bit_width, level_set))))
        self.register_buffer("scale", torch.ones(1))

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises the codebook from a weight tensor (C_out, …)."""
        if self.level_set == "no_zero" and is_pruned(values):
            self.level_set = "full"
        self.scale = self._channel_scale(values)
        weights = self._scaled(values)
        quantiles = _side_quantiles([weights], self.bit_width, self.level_set)
        if self.initialization == "uniform":
            codebook = uniform_codebook(weights, self.bit_width, self.level_set)
        elif self.initialization == "random":
            codebook = random_codebook(weights, self.bit_width, self.level_set, seed)
        else:
            codebook = _with_zero(quantiles, self.level_set)[0]
        pinned = _zero_level(codebook, self.level_set)
        if self.initialization == "kmeans":
            codebook = lloyd_max(weights, codebook, pinned)
        self.codebook, self.pinned = codebook, pinned
        # Of zeros alone there are no others to keep a distance from.
        free = _free_levels(codebook[None], pinned[None], self.level_set)
        self.ratio = torch.where(quantiles == 0, 1.0, free / quantiles)[0]
        self.counts = cell_statistics(weights, assign(weights, codebook), len(codebook))[0]
        # S = N c, not the true sums: adaptation then starts from the initial codebook.
        self.sums = self.counts * codebook

    def forward(self, x: Tensor) -> Tensor:
        """Maps a weight tensor to the levels nearest to it, times the channel scale."""
        x = at_least_float32(x)
        if self.granularity == "layer":
            quantized: Tensor = CodebookSTE.apply(x, self.codebook, False)
            return quantized
        scaled: Tensor = CodebookSTE.apply(x / self.scale, self.codebook, False)
        return scaled * self.scale

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into the codebook, uint8, of the shape of ``x``."""
        return assign(at_least_float32(x) / self.scale, self.codebook).to(torch.uint8)

    def levels(self) -> Tensor:
        """The codebook (K,), of the weights divided by their channel's scale."""
        return self.codebook

    def output_scale(self, weight: Tensor) -> Tensor:
        """The channel scale in use, (C_out, 1, …), which follows the weights; (1,) per layer."""
        return self.scale

    @torch.no_grad()
    def adapt(self, weight: Tensor) -> None:
        """One EMA update of the codebook towards the weights as they are now."""
        if self.adaptation == "none":
            return
        if self.adaptation == "quantile":
            AdqWeightQuantizer.adapt_all([self], [weight])
            return
        weights = self._followed(weight)
        indices = assign(weights, self.codebook)
        counts, sums = cell_statistics(weights, indices, len(self.codebook))
        counts = torch.lerp(counts, self.counts, self.decay)
        sums = torch.lerp(sums, self.sums, self.decay)
        # Below the smallest normal number the quotient is noise; such a level stays.
        keep = self.pinned | (counts < torch.finfo(counts.dtype).tiny)
        codebook = torch.where(keep, self.codebook, sums / counts)
        reach = weights.min(), weights.max()
        codebook, counts, sums = revive_dead_level(codebook, counts, sums, self.pinned, reach)
        # A revived level stands elsewhere in the order; its state and the zero move with it.
        order = codebook.argsort(stable=True)
        self.codebook, self.counts = codebook[order], counts[order]
        self.sums, self.pinned = sums[order], self.pinned[order]

    @classmethod
    @torch.no_grad()
    def adapt_all(cls, quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor]) -> None:
        """One update of each; quantizers that follow quantiles alike share their small operations.

        On a GPU each operation of a few numbers costs a launch.
        """
        alike: dict[tuple[Any, ...], list[tuple[AdqWeightQuantizer, Tensor]]] = {}
        for quantizer, weight in zip(quantizers, weights, strict=True):
            assert isinstance(quantizer, AdqWeightQuantizer)
            if quantizer.adaptation != "quantile":
                quantizer.adapt(weight)
                continue
            key = quantizer.bit_width, quantizer.level_set, quantizer.decay, weight.device
            alike.setdefault(key, []).append((quantizer, quantizer._followed(weight)))
        for (bit_width, level_set, decay, _), members in alike.items():
            some = [quantizer for quantizer, _ in members]
            # Apart from the zero, which stands elsewhere once all weights have one sign.
            target = _side_quantiles([weight for _, weight in members], bit_width, level_set)
            # Ratios far apart may turn two targets round, but levels are in order.
            target = (torch.stack([q.ratio for q in some]) * target).sort().values
            codebooks = torch.stack([q.codebook for q in some])
            free = _free_levels(codebooks, torch.stack([q.pinned for q in some]), level_set)
            codebooks = _with_zero(torch.lerp(target, free, decay), level_set)
            rows = _apart(codebooks), _apart(_zero_level(codebooks, level_set))
            for quantizer, levels, zero in zip(some, *rows, strict=True):
                quantizer.codebook, quantizer.pinned = levels, zero

    def _followed(self, weight: Tensor) -> Tensor:
        """The weights that the codebook follows, (n,), once the scale has followed them."""
        if self.granularity == "layer":
            return at_least_float32(weight.detach()).flatten()
        self.scale = self._channel_scale(weight)
        return self._scaled(weight)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        ratio = state.get(f"{prefix}ratio")
        if self.level_set != "symmetric" and ratio is not None:
            # A zero that was not asked for is that of a layer that was pruned when calibrated.
            has_zero = ratio.numel() < len(self.codebook)
            self.level_set = "full" if has_zero else "no_zero"
            self.ratio = self.ratio.new_ones(len(self.codebook) - has_zero)
        super()._load_from_state_dict(state, prefix, *rest)

    def _channel_scale(self, weight: Tensor) -> Tensor:
        """Mean magnitude per output channel, (C_out, 1, …); ones where a channel is all zero."""
        if self.granularity == "layer":
            return torch.ones(1, device=weight.device)
        scale = weight.detach().float().abs().mean(dim=tuple(range(1, weight.dim())), keepdim=True)
        return torch.where(scale > 0, scale, 1.0)

    def _scaled(self, weight: Tensor) -> Tensor:
        return (weight.detach().float() / self.scale).flatten()
