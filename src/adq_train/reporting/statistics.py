"""Means, and what the seeds allow to say about a difference of two means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# Below this many seeds a test says more about its assumptions than about the runs.
FEWEST_SEEDS = 3
LEVEL = 0.05


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one figure over runs.

    Attributes:
        n: How many runs.
        mean: Their mean.
        std: Sample standard deviation (divided by n − 1); None for a single run.
    """

    n: int
    mean: float
    std: float | None


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean and sample standard deviation; None of no values."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Summary(len(values), statistics.fmean(values), std)


@dataclass(frozen=True)
class Difference:
    """A row's mean minus the reference row's, and what may be said about it.

    Attributes:
        mean: In the units of the figure; over the common seeds alone, but for Welch's test and
            where there are none.
        test: ``paired t-test``, ``Welch's t-test``, or None where there was none.
        n: Pairs of common seeds; else runs of the row and of the reference.
        p_value: Two-sided; None without a test.
        p_holm: The same after Holm's correction over the rows of a table.
        verdict: ``gain``, ``loss``, ``not shown``, or why nothing can be said.
        lower_losses: In how many of how many common seeds the final training loss is lower.
        more_bits: Average bits of weights and of inputs beyond the reference row's.
    """

    mean: float
    test: str | None
    n: tuple[int, ...]
    p_value: float | None
    p_holm: float | None
    verdict: str
    lower_losses: tuple[int, int] | None = None
    more_bits: tuple[float, float] | None = None


def compare(row: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Compares two rows by their runs; None where either has none.

    With three common seeds or more, a paired t-test over these: runs of one seed share the float
    model and the order of the images. Otherwise Welch's t-test, which does not assume equal
    variances, where both rows have three seeds or more.

    Args:
        row: A figure by seed.
        reference: The same of the reference row.
    """
    from scipy import stats

    if not row or not reference:
        return None
    common = sorted(row.keys() & reference.keys())
    few = min(len(row), len(reference)) < FEWEST_SEEDS
    if common and (few or len(common) >= FEWEST_SEEDS):
        pairs = [row[seed] - reference[seed] for seed in common]
        mean = statistics.fmean(pairs)
        if few:
            return Difference(mean, None, (len(pairs),), None, None, "too few seeds")
        if max(pairs) - min(pairs) < 1e-9:  # rounding must not pass for a tiny spread
            same = abs(mean) < 1e-9
            verdict = "the same in every seed" if same else "no spread to test against"
            return Difference(mean, None, (len(pairs),), None, None, verdict)
        found = stats.ttest_1samp(pairs, 0.0)
        return Difference(mean, "paired t-test", (len(pairs),), float(found.pvalue), None, "")
    n = len(row), len(reference)
    mean = statistics.fmean(row.values()) - statistics.fmean(reference.values())
    if few:
        return Difference(mean, None, n, None, None, "too few seeds")
    one, other = list(row.values()), list(reference.values())
    if max(max(x) - min(x) for x in (one, other)) < 1e-9:
        return Difference(mean, None, n, None, None, "no spread to test against")
    found = stats.ttest_ind(one, other, equal_var=False)
    return Difference(mean, "Welch's t-test", n, float(found.pvalue), None, "")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values that were found together (Holm 1979).

    With p_(1) ≤ … ≤ p_(m), the corrected p_(i) is max over j ≤ i of min(1, (m − j + 1) p_(j)).
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def judge(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """Corrects the p-values of one table together, and calls gains and losses by them."""
    tested = [x for x in differences if x is not None and x.p_value is not None]
    corrected = iter(holm([x.p_value for x in tested if x.p_value is not None]))
    judged: list[Difference | None] = []
    for difference in differences:
        if difference is None or difference.p_value is None:
            judged.append(difference)
            continue
        p = next(corrected)
        shown = "gain" if difference.mean > 0 else "loss"
        verdict = shown if p < LEVEL and not math.isnan(p) else "not shown"
        judged.append(replace(difference, p_holm=p, verdict=verdict))
    return judged
