from dataclasses import replace

from helpers import ALLOCATION

from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Budget, Problem
from adq_train.allocation.fixed import FixedAllocator
from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable
from adq_train.reporting.allocation_text import render, solved

LAYERS = (LayerInfo("stem", 8, 10, 1), LayerInfo("body", 80, 1000, 1), LayerInfo("fc", 8, 10, 1))


def text(bits):
    problem = Problem(LAYERS, {"stem": 8}, (2, 3), Budget(average_weight_bits=3))
    rows = tuple(LayerSensitivity(x.name, x.num_weights, x.macs, {2: 0.5, 3: 0.25}) for x in LAYERS)
    table = SensitivityTable("made-up", (2, 3), rows)
    return render(problem, table, allocate(FixedAllocator(bits), problem, table))


def test_each_layer_says_what_other_bits_would_change():
    lines = text({"body": 2, "fc": 3}).splitlines()
    assert lines[0] == "Bits by fixed; summed Ω (made-up): 0.75"
    assert lines[1] == f"budget.average_weight_bits: {184 / 88:.10g} of 3"
    rows = [line.split() for line in lines[4:6]]
    assert rows == [
        ["body", "2/2", "3/3", "-2.500e-01", "+10", "+5,000", "yes"],
        ["fc", "3/3", "2/2", "+2.500e-01", "-1", "-50", "yes"],
    ]
    assert "stem is pinned to 8 bits" in lines


def test_what_was_not_measured_is_said():
    out = text({"body": [2, 3], "fc": 2})
    assert "summed Ω (made-up): not measured" in out
    assert " ? " in out


def test_no_more_is_claimed_than_the_values_can_bear():
    for optimal, caveat, expected in (
        (True, None, "ilp, proven optimal"),
        (False, None, "ilp"),
        (True, "which are within noise", "ilp, optimal for these Ω, which are within noise"),
        (False, "which are within noise", "ilp, by these Ω, which are within noise"),
    ):
        assert solved(replace(ALLOCATION, optimal=optimal, caveat=caveat)) == expected
