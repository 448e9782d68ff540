"""Every choice of every group composes and builds; every experiment runs every stage."""

import functools
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from adq_train.data.synthetic import SHAPES
from adq_train.settings.schema import GROUPS, register
from adq_train.settings.validate import Parts, validate

CONFIGS = Path(__file__).parents[1] / "configs"
CHOICES = [
    (folder.name, file.stem)
    for folder in sorted(CONFIGS.iterdir())
    if folder.name != "hydra"
    for file in sorted(folder.glob("*.yaml"))
]
EXPERIMENTS = [name for group, name in CHOICES if group == "experiment"]


@functools.cache
def composed(*overrides):
    register()
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        return compose("config", list(overrides))


def test_the_groups_on_disk_are_those_of_the_schema():
    assert {group for group, _ in CHOICES} == {*GROUPS, "experiment", "comparison", "ablation"}


@pytest.mark.parametrize("group", dict.fromkeys(group for group, _ in CHOICES))
def test_every_choice_composes_and_builds(group, tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text('{"layers": []}')
    required = {
        **{("data", x): ["data.root=somewhere"] for x in ("imagenet", "folder", "table", "arrays")},
        ("experiment", "resnet18_imagenet"): ["data.root=somewhere"],
        ("allocator", "fixed"): ["allocator.bits={layer*.conv1:4,fc:[2,3]}"],
        ("allocator", "from_file"): [f"allocator.path={kept}"],
        ("sensitivity", "from_file"): [f"sensitivity.path={kept}"],
    }
    for choice in (choice for x, choice in CHOICES if x == group):
        if choice == "timm" and find_spec("timm") is None:
            continue  # it says so itself, see test_models.py
        arguments = required.get((group, choice), [])
        _, parts = validate(composed(f"{group}={choice}", *arguments))
        assert isinstance(parts, Parts), choice


def test_every_file_opens_with_a_comment():
    """That of an experiment has its command, source and expectation."""
    for group, choice in CHOICES:
        text = (CONFIGS / group / f"{choice}.yaml").read_text()
        assert text.startswith("#"), choice
        if group == "experiment":
            comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
            for part in (f"adq-train experiment={choice}", "# Source:", "# Expect:"):
                assert part in comment, choice


def test_every_knob_of_a_part_is_in_its_file():
    """A knob that a file leaves out could not be overridden without a plus."""
    import inspect

    from hydra.utils import get_object

    at_run_time = {
        "weight_quantizer": {"bit_width"},
        "activation_quantizer": {"bit_width"},
        "optimizer": None,  # torch's own, with many more knobs than anyone wants to see
        "quantizer_optimizer": None,
    }
    for group, choice in CHOICES:
        if group not in GROUPS or at_run_time.get(group, set()) is None:
            continue
        node = composed(f"{group}={choice}")[group]
        if node is None:  # target=float is that of no target
            continue
        names = set(inspect.signature(get_object(node._target_)).parameters)
        assert names - at_run_time.get(group, set()) == set(node) - {"_target_", "_partial_"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_dry_on_synthetic_data(cli, tmp_path, name):
    like = next((shape for shape in SHAPES if name.endswith(shape)), "digits")
    large = "imagenet" in name
    # On a CPU both take longer than all the rest.
    slow = ["trainer.compile=none", "trainer.precision=float32"]
    more = ["model.weights=null", "bits.candidates=[2,3]", *slow] if large else []
    outcome = cli(
        f"experiment={name}",
        "data=synthetic",
        f"data.like={like}",
        "data.train_images=32",
        f"data.test_images={2 if large else 8}",
        f"data.validation_images={2 if large else 8}",
        f"data.calibration_images={1 if large else 2}",
        f"trainer.batch_size={2 if large else 4}",
        "dry_run=true",
        *more,
    )
    assert outcome.code == 0, outcome.err
    assert "dry run passed" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_rival_gets_the_same_bits_everywhere(experiment):
    """No limit of the experiment may hold back what budget.average_weight_bits allows."""
    weights = {"pact": "dorefa", "adq_paper": "adq", "adq_both": "adq"}
    activations = {"adq": "n2uq", "adq_paper": "n2uq", "adq_both": "adq_activations"}
    for rival in (x for group, x in CHOICES if group == "comparison" and "mixed" not in x):
        cfg = composed(
            f"experiment={experiment}", f"comparison={rival}", "budget.average_weight_bits=3"
        )
        assert cfg.allocator._target_.endswith(".UniformAllocator"), rival
        limits = {name: value for name, value in cfg.budget.items() if value is not None}
        assert limits == {"average_weight_bits": 3}, rival
        weight = cfg.weight_quantizer._target_.split(".")[-2]
        assert weight == weights.get(rival, rival)
        activation = cfg.activation_quantizer._target_.split(".")[-2]
        assert activation == activations.get(rival, rival)
