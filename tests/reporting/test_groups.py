from dataclasses import replace

import pytest
from made_up import CONFIG, LSQ, make_run, make_sweep, merged

from adq_train.errors import UserError
from adq_train.reporting.gather import gather
from adq_train.reporting.groups import sections
from adq_train.reporting.tables import wording

UNIFORM = {"allocator": {"_target_": "adq_train.allocation.uniform.UniformAllocator"}}


def only(folder, reference=None):
    (section,) = sections(gather([folder]), reference)
    return section


def table(section):
    return {row.name: [run.seed for run in row.runs] for row in section.rows}


def test_seeds_places_and_devices_make_no_rows(tmp_path):
    for seed in range(3):
        changes = {
            "output_root": f"out{seed}",
            "run_dir": f"x{seed}",
            "trainer": {"device": f"cuda:{seed}"},
            "data": {**CONFIG["data"], "root": f"/data{seed}", "num_workers": seed},
        }
        make_run(tmp_path / str(seed), 90 + seed, seed=seed, changes=changes, overrides=("a=1",))
    section = only(tmp_path)
    assert table(section) == {"as configured": [0, 1, 2]}
    assert section.common == "a=1"
    assert section.rows[0].summary("qat_top1_percent").mean == 91
    assert section.differences == (None,)


def test_overrides_name_the_rows_and_the_plainest_is_the_reference(tmp_path):
    make_sweep(tmp_path, {"ablation=a": [89, 89.1, 89.3], "ablation=none": [90, 90.1, 90.2]})
    section = only(tmp_path)
    assert table(section) == {"ablation=none": [0, 1, 2], "ablation=a": [0, 1, 2]}
    assert (section.data, section.model, section.common) == ("cifar10", "resnet20", "experiment=x")
    assert section.references == ("ablation=none", "ablation=none")
    assert section.differences[0] is None
    assert section.differences[1].verdict == "loss"
    assert section.differences[1].mean == pytest.approx(-(1 + 1 + 0.9) / 3)


def test_an_override_that_is_given_twice_counts_once_and_last(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"a{seed}", seed=seed, overrides=("a=1", "b=2"))
        changes = {"trainer": {"epochs": 9}}
        more = ("a=1", "b=2", "b=3")
        make_run(tmp_path / f"b{seed}", seed=seed, changes=changes, overrides=more)
    assert set(table(only(tmp_path))) == {"b=2", "b=3"}


def test_settings_name_the_rows_where_commands_do_not(tmp_path):
    """Knobs of a part that only one row has do not count: its name says it."""
    for seed in (0, 1):
        make_run(tmp_path / f"a{seed}", seed=seed)
        make_run(tmp_path / f"b{seed}", seed=seed, changes=LSQ)
        make_run(tmp_path / f"c{seed}", seed=seed, changes={"trainer": {"epochs": 9}})
    assert set(table(only(tmp_path))) == {
        "activation_quantizer=n2uq trainer.epochs=3 weight_quantizer=adq",
        "activation_quantizer=lsq trainer.epochs=3 weight_quantizer=lsq",
        "activation_quantizer=n2uq trainer.epochs=9 weight_quantizer=adq",
    }


def test_other_data_and_other_models_are_other_tables(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", changes={"model": {**CONFIG["model"], "width": 6}})
    digits = {"_target_": "adq_train.data.digits.Digits"}
    make_run(tmp_path / "c", changes={"data": digits})
    found = [(x.model, x.data) for x in sections(gather([tmp_path]))]
    assert sorted(found) == [
        ("resnet20", "cifar10"),
        ("resnet20", "digits"),
        ("resnet20, width 6", "cifar10"),
    ]


def test_other_files_under_the_same_settings_are_another_row(tmp_path):
    make_run(tmp_path / "a")
    data = {"name": "cifar10", "fingerprint": "cd" * 32}
    make_run(tmp_path / "b", manifest={"data": data})
    assert set(table(only(tmp_path))) == {
        f"data.fingerprint={'ab' * 6}",
        f"data.fingerprint={'cd' * 6}",
    }


def test_a_checkpoint_for_each_seed_is_one_row_and_two_for_a_seed_are_two(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / str(seed), seed=seed, manifest={"checkpoint_sha256": f"{seed}" * 64})
    assert list(table(only(tmp_path)).values()) == [[0, 1]]
    make_run(tmp_path / "other", seed=0, manifest={"checkpoint_sha256": "f" * 64})
    assert len(only(tmp_path).rows) == 3


def test_a_file_for_each_seed_is_one_row_beside_others(tmp_path):
    target = "adq_train.allocation.from_file.FromFileAllocator"
    for seed in (0, 1):
        path = str(tmp_path / f"{seed}.json")
        make_run(tmp_path / f"ilp{seed}", seed=seed, overrides=("allocator=ilp",))
        make_run(
            tmp_path / f"file{seed}",
            seed=seed,
            overrides=("allocator=from_file",),
            changes={"allocator": {"_target_": target, "path": path}},
            manifest={"files": {"allocator.path": f"{seed}" * 64}},
        )
    assert table(only(tmp_path)) == {"allocator=from_file": [0, 1], "allocator=ilp": [0, 1]}


def test_losses_that_are_not_the_same_figure_are_not_compared(tmp_path):
    teacher = {"_target_": "adq_train.training.distillation.TrainedTeacher", "weight": 1.0}
    for name, changes in (
        ("a", {"distillation": teacher}),
        ("b", {"distillation": {**teacher, "weight": 0.5}}),
        ("c", {"distillation": teacher, "trainer": {"label_smoothing": 0.1}}),
        ("d", {"distillation": teacher, "trainer": {"epochs": 9}}),
    ):
        for seed in (0, 1):
            make_run(
                tmp_path / f"{name}{seed}", 90 + seed, seed=seed, overrides=(f"ablation={name}",),
                changes=changes,
            )  # fmt: skip
    (section,) = sections(gather([tmp_path]), "ablation=a")
    found = {row.name: d for row, d in zip(section.rows, section.differences, strict=True)}
    assert found["ablation=b"].lower_losses is None
    assert found["ablation=c"].lower_losses is None
    assert found["ablation=d"].lower_losses == (0, 2)


def test_the_same_run_twice_counts_once(tmp_path):
    make_run(tmp_path / "a", 90)
    make_run(tmp_path / "b", 99)
    section = only(tmp_path)
    assert section.rows[0].by_seed() == {0: 90}
    (problem,) = section.problems
    assert problem.startswith(f"{tmp_path / 'b'}: the same settings and seed as {tmp_path / 'a'}")


def test_a_missing_seed_and_a_failed_row_are_named(tmp_path):
    make_sweep(tmp_path / "x", {"ablation=none": [90, 91, 92]})
    make_sweep(tmp_path / "y", {"ablation=a": [90]}, seeds=(1,))
    b = {"trainer": {"epochs": 7}}
    make_run(
        tmp_path / "z", seed=0, state="failed", overrides=("ablation=b", "experiment=x"), changes=b
    )
    section = only(tmp_path)
    assert table(section) == {"ablation=none": [0, 1, 2], "ablation=a": [1], "ablation=b": []}
    assert "ablation=a: no run for seed 0, 2, which other rows have" in section.problems
    assert "ablation=b: no run for seed 1, 2, which other rows have" in section.problems


@pytest.fixture
def two_budgets(tmp_path):
    for bits in (2, 3):
        for name, changes in (("adq", UNIFORM), ("lsq", {**UNIFORM, **LSQ})):
            for seed in range(3):
                make_run(
                    tmp_path / f"{name}{bits}{seed}",
                    80 + bits + seed / 10 + (name == "adq") * (1 + seed / 100),
                    seed=seed,
                    overrides=(f"comparison={name}", f"budget.average_weight_bits={bits}"),
                    changes=merged(changes, {"budget": {"average_weight_bits": bits}}),
                )
    return tmp_path


def test_rows_are_compared_at_the_same_budget(two_budgets):
    section = only(two_budgets)
    pairs = {row.name: name for row, name in zip(section.rows, section.references, strict=True)}
    assert pairs == {
        f"comparison={name} budget.average_weight_bits={bits}": (
            f"comparison=adq budget.average_weight_bits={bits}"
        )
        for bits in (2, 3)
        for name in ("adq", "lsq")
    }
    assert [x and x.verdict for x in section.differences] == [None, "loss", None, "loss"]


def test_a_reference_by_some_of_its_overrides_or_by_its_name(two_budgets):
    section = only(two_budgets, "comparison=lsq")
    for row, name in zip(section.rows, section.references, strict=True):
        assert name == row.name.replace("adq", "lsq")
    whole = "comparison=lsq budget.average_weight_bits=2"
    assert set(only(two_budgets, whole).references) == {whole}


def test_an_unknown_reference_is_an_error(two_budgets):
    with pytest.raises(UserError, match="no row is called 'comparison=lsqq'"):
        only(two_budgets, "comparison=lsqq")


def test_the_correction_covers_all_rows_of_a_table(two_budgets):
    tested = [x for x in only(two_budgets).differences if x]
    assert [x.p_holm for x in tested] == pytest.approx([2 * x.p_value for x in tested])


def test_other_versions_and_commits_are_remarked(tmp_path):
    make_run(tmp_path / "a")
    git = {"commit": "1" * 40, "dirty": True}
    make_run(tmp_path / "b", seed=1, manifest={"git": git, "versions": {"torch": "2.7.0"}})
    assert only(tmp_path).remarks == (
        "made with different commits: 00000000, 11111111",
        "some were made with uncommitted changes",
        'made with different versions: {"torch": "2.6.0"}; {"torch": "2.7.0"}',
    )


def test_a_file_that_two_seeds_share_is_a_choice(tmp_path):
    for seed, digest in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        make_run(tmp_path / str(seed), seed=seed, manifest={"checkpoint_sha256": digest})
    assert sorted(table(only(tmp_path)).values()) == [[0, 1], [2]]


def test_a_float_model_from_a_file_is_not_one_that_was_trained(tmp_path):
    make_run(tmp_path / "trained", seed=0)
    make_run(tmp_path / "given", seed=1, manifest={"checkpoint_sha256": "a" * 64})
    assert sorted(table(only(tmp_path)).values()) == [[0], [1]]


def test_a_file_for_each_seed_is_one_row_and_said(tmp_path):
    for seed in range(3):
        make_run(tmp_path / str(seed), seed=seed, manifest={"checkpoint_sha256": f"{seed}" * 64})
    section = only(tmp_path)
    assert list(table(section).values()) == [[0, 1, 2]]
    assert section.problems == ("each seed has its own pretrain.checkpoint",)


def test_random_bits_of_one_draw_for_each_seed_are_one_row_and_said(tmp_path):
    def make(name, seed, draw):
        changes = {"allocator": {"_target_": "a.random.RandomAllocator", "seed": draw}}
        overrides = ("allocator=random", f"allocator.seed={draw}")
        make_run(tmp_path / name, 90 + draw, seed=seed, changes=changes, overrides=overrides)

    for seed in range(3):
        make_run(tmp_path / f"chosen{seed}", seed=seed, overrides=())
        make(f"draw{seed}", seed, draw=seed)
    section = only(tmp_path)
    assert table(section) == {"as configured": [0, 1, 2], "allocator=random": [0, 1, 2]}
    assert section.problems == ("each seed has its own allocator.seed",)
    make("another", seed=0, draw=7)  # several draws of a seed are rows of their own
    assert len(table(only(tmp_path))) == 5


def test_rows_of_one_budget_that_use_other_bits_are_not_called_equal(tmp_path):
    for seed in range(3):
        budget = {"budget": {"average_weight_bits": 2.81}}
        full, less = {"overrides": ("ablation=none",)}, {"overrides": ("ablation=uniform_bits",)}
        make_run(tmp_path / f"a{seed}", 90 + seed, seed=seed, bits=2.48, changes=budget, **full)
        changes = {**budget, **UNIFORM}
        make_run(tmp_path / f"b{seed}", 89, seed=seed, bits=2, changes=changes, **less)
    section = only(tmp_path)
    (difference,) = [x for x in section.differences if x is not None]
    assert difference.more_bits == pytest.approx((-0.48, -0.48))
    assert "not at equal bits: -0.48 for weights" in wording(difference, False)
    assert "equal bits" not in wording(replace(difference, more_bits=(0.01, 0.0)), False)
