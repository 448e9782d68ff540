"""Ours beside the best rival at equal bytes, chosen by validation accuracy."""

import pytest
from made_up import LSQ, make_run

from adq_train.reporting import figures
from adq_train.reporting.gather import gather
from adq_train.reporting.groups import sections
from adq_train.reporting.leads import leads

PACT = {
    "weight_quantizer": {"_target_": "adq_train.quantization.dorefa.DorefaWeightQuantizer"},
    "activation_quantizer": {"_target_": "adq_train.quantization.pact.PactActivationQuantizer"},
}


def rows_of(folder, made):
    """``made``: (name, changes, bits, last loss, top-1 by seed); validation is 90 - the loss."""
    for name, changes, bits, loss, tops in made:
        for seed, top1 in enumerate(tops):
            make_run(
                folder / f"{name},{bits},{seed}",
                top1,
                seed=seed,
                bits=bits,
                overrides=(f"comparison={name}", f"budget.average_weight_bits={bits}"),
                changes={**changes, "budget": {"average_weight_bits": bits}},
                losses=(2.0, loss),
            )
    (section,) = sections(gather([folder]))
    return section.rows


def test_each_size_has_its_best_of_both_kinds_by_validation(tmp_path):
    rows = rows_of(
        tmp_path,
        [
            ("adq", {}, 2, 0.5, [88.0, 88.2, 88.4]),
            ("lsq", LSQ, 2, 0.7, [87.0, 87.3, 87.5]),
            # The test split likes it better, and must not choose.
            ("pact", PACT, 2, 0.9, [87.9, 88.1, 88.3]),
            ("adq", {}, 3, 0.4, [89.0, 89.1, 89.3]),
        ],
    )
    (lead,) = leads(rows)  # nothing rivals the row at three bits
    assert "adq" in lead.ours.name
    assert "lsq" in lead.rival.name
    assert lead.among == (1, 2)
    assert lead.difference.mean == pytest.approx((1.0 + 0.9 + 0.9) / 3)
    assert lead.difference.test == "paired t-test"


def test_sizes_within_a_hundredth_are_equal(tmp_path):
    rows = rows_of(tmp_path, [("adq", {}, 3.0, 0.5, [88.0]), ("lsq", LSQ, 3.02, 0.7, [87.0])])
    assert len(leads(rows)) == 1
    rows = rows_of(tmp_path / "far", [("adq", {}, 3.0, 0.5, [88.0]), ("lsq", LSQ, 3.2, 0.7, [87])])
    assert leads(rows) == []


def test_curves_are_means_with_a_band(tmp_path):
    for seed, losses in enumerate([(3.0, 1.0), (5.0, 2.0)]):
        make_run(tmp_path / str(seed), seed=seed, losses=losses)
    (section,) = sections(gather([tmp_path]))
    figure = figures.curves(section.rows)
    loss, validation = figure.axes
    (line,) = loss.lines
    assert line.get_xydata().tolist() == [[1, 4.0], [2, 1.5]]
    (band,) = loss.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(1.5 - 0.5**0.5)
    assert heights.max() == pytest.approx(4 + 2**0.5)
    assert validation.lines[0].get_ydata().tolist() == [86.0, 88.5]


def test_without_training_there_is_no_curve(tmp_path):
    make_run(tmp_path / "run", losses=())
    (section,) = sections(gather([tmp_path]))
    assert figures.curves(section.rows) is None
