import json

import pytest
from made_up import make_run, make_sweep
from matplotlib.figure import Figure

from adq_train.reporting import figures
from adq_train.reporting.gather import gather
from adq_train.reporting.groups import sections


def rows_of(folder):
    return sections(gather([folder]))[0].rows


def float_lines(rows):
    axes = Figure().subplots()
    figures.draw_float(axes, rows, ["red"] * len(rows))
    return [line.get_ydata()[0] for line in axes.lines]


def test_runs_from_one_float_model_share_its_line(tmp_path):
    make_sweep(tmp_path, {"ablation=none": [90, 91, 92], "ablation=a": [80, 81, 82]})
    assert float_lines(rows_of(tmp_path)) == [92.0]


def test_runs_from_several_float_models_have_a_line_each(tmp_path):
    make_run(tmp_path / "a", overrides=("x=1",), float_top1=93.0)
    changes = {"pretrain": {"epochs": 9}}
    make_run(tmp_path / "b", overrides=("x=2",), changes=changes, float_top1=95.0)
    assert float_lines(rows_of(tmp_path)) == [93.0, 95.0]


def test_bars_start_at_zero_and_pair_each_seed_with_its_float_model(tmp_path):
    for seed, (top1, float_top1) in enumerate(((90, 92), (91, 92), (95, 95))):
        make_run(tmp_path / str(seed), top1, seed=seed, float_top1=float_top1)
    (axes,) = figures.bars(rows_of(tmp_path), []).axes
    (bar,) = axes.patches
    assert (bar.get_x(), bar.get_width()) == (0, pytest.approx(-1))
    (spread,) = axes.collections
    ends = spread.get_segments()[0][:, 0]
    assert ends == pytest.approx([-2, 0])  # the standard deviation of −2, −1, 0 is 1


def test_a_long_name_is_broken_and_cut(tmp_path):
    make_run(tmp_path / "a", overrides=("x=1",))
    long = tuple(f"some.setting.number{i}=value" for i in range(9))
    make_run(tmp_path / "b", overrides=long, changes={"trainer": {"epochs": 9}})
    short, cut = sorted((figures.label(row.name) for row in rows_of(tmp_path)), key=len)
    assert short == "x=1"
    assert cut.count("\n") == 2
    assert cut.endswith("…")
    assert max(map(len, cut.splitlines())) <= 53


def test_one_method_at_several_budgets_is_one_line(tmp_path):
    for name in ("a", "b"):
        for bits in (2, 3):
            words = (f"comparison={name}", f"budget.average_weight_bits={bits}")
            changes = {"budget": {"average_weight_bits": bits}, "comparison": name}
            make_run(tmp_path / f"{name}{bits}", 90 + bits, overrides=words, changes=changes)
    rows = rows_of(tmp_path)
    assert len(rows) == 4
    assert {name: len(x) for name, x in figures.methods(rows).items()} == {
        "comparison=a": 2,
        "comparison=b": 2,
    }
    left, _ = figures.accuracy_and_cost(rows).axes
    lines = [bar.lines[0] for bar in left.containers]
    assert [list(line.get_ydata()) for line in lines] == [[92, 93]] * 2
    assert lines[0].get_color() != lines[1].get_color()
    xs = lines[0].get_xdata()
    assert left.get_xlim()[0] < min(xs) <= max(xs) < left.get_xlim()[1]
    assert left.get_ylim()[0] < 92 < 93 < left.get_ylim()[1]


def test_equal_costs_stand_side_by_side():
    assert figures.side_by_side([2, 4, 2, 3]) == pytest.approx([1.991, 4, 2.009, 3])
    assert figures.side_by_side([3, 3]) == pytest.approx([2.925, 3.075])
    assert figures.side_by_side([3]) == [3]


def test_where_all_cost_the_same_the_axis_has_that_cost_alone(tmp_path):
    make_sweep(tmp_path, {"ablation=none": [90, 91, 92], "ablation=a": [80, 81, 82]})
    rows = rows_of(tmp_path)
    left, right = figures.accuracy_and_cost(rows).axes
    assert [x.get_text() for x in left.get_xticklabels()] == ["3.0"]
    assert len(right.get_xticks()) == 1
    xs = [bar.lines[0].get_xdata()[0] for bar in left.containers]
    assert xs[0] < rows[0].summary("average_weight_bits").mean < xs[1]


def test_bits_of_inputs_stand_beside_those_of_weights_where_they_differ(tmp_path):
    for seed, inputs in enumerate((3, 4)):
        run = make_run(tmp_path / str(seed), seed=seed, bits=3)
        content = json.loads((run / "allocation.json").read_text())
        content["layers"][1]["activation_bits"] = inputs
        (run / "allocation.json").write_text(json.dumps(content))
    (axes,) = figures.bits(rows_of(tmp_path)).axes
    assert [text.get_text() for text in axes.texts] == ["3", "3 / 3.5", "3", "3"]
