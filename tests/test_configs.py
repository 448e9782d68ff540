"""Every choice of every group composes and builds; every experiment runs every stage."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from adq_train.data.synthetic import SHAPES
from adq_train.schema import GROUPS, register
from adq_train.validate import Parts, validate

CONFIGS = Path(__file__).parents[1] / "configs"
CHOICES = [
    (folder.name, file.stem)
    for folder in sorted(CONFIGS.iterdir())
    if folder.name != "hydra"
    for file in sorted(folder.glob("*.yaml"))
]
EXPERIMENTS = [name for group, name in CHOICES if group == "experiment"]


def composed(*overrides):
    register()
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        return compose("config", list(overrides))


def test_the_groups_on_disk_are_those_of_the_schema():
    assert {group for group, _ in CHOICES} == {*GROUPS, "experiment", "comparison", "ablation"}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds(group, choice, tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text('{"layers": []}')
    required = {
        ("data", "imagenet"): ["data.root=somewhere"],
        ("experiment", "resnet18_imagenet"): ["data.root=somewhere"],
        ("allocator", "fixed"): ["allocator.bits={layer*.conv1:4,fc:[2,3]}"],
        ("allocator", "from_file"): [f"allocator.path={kept}"],
        ("sensitivity", "from_file"): [f"sensitivity.path={kept}"],
    }
    arguments = required.get((group, choice), [])
    _, parts = validate(composed(f"{group}={choice}", *arguments))
    assert isinstance(parts, Parts)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_file_opens_with_a_comment(group, choice):
    lines = (CONFIGS / group / f"{choice}.yaml").read_text().splitlines()
    assert lines[0].startswith("#")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_opens_with_its_command_source_and_expectation(name):
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"adq-train experiment={name}" in comment
    assert "# Source:" in comment
    assert "# Expect:" in comment


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
        names = set(inspect.signature(get_object(node._target_)).parameters)
        assert names - at_run_time.get(group, set()) == set(node) - {"_target_", "_partial_"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_dry_on_synthetic_data(cli, tmp_path, name):
    like = next((shape for shape in SHAPES if name.endswith(shape)), "digits")
    pretrained = ["model.weights=null"] if "imagenet" in name else []
    outcome = cli(
        f"experiment={name}",
        "data=synthetic",
        f"data.like={like}",
        "data.train_images=32",
        "data.test_images=8",
        "data.validation_images=8",
        "data.calibration_images=8",
        "trainer.batch_size=8",
        "dry_run=true",
        *pretrained,
    )
    assert outcome.code == 0, outcome.err
    assert "dry run passed" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rival", [x for g, x in CHOICES if g == "comparison" and "mixed" not in x])
def test_a_rival_gets_the_same_bits_everywhere(experiment, rival, bits):
    """No limit of the experiment may hold back what budget.average_weight_bits allows."""
    cfg = composed(
        f"experiment={experiment}", f"comparison={rival}", f"budget.average_weight_bits={bits}"
    )
    assert cfg.allocator._target_.endswith(".UniformAllocator")
    assert {k for k, v in cfg.budget.items() if v is not None} == {"average_weight_bits"}
    weights = {"pact": "dorefa", "adq_paper": "adq", "adq_both": "adq"}.get(rival, rival)
    assert cfg.weight_quantizer._target_.split(".")[-2] == weights
    ours = {"adq": "n2uq", "adq_paper": "n2uq", "adq_both": "adq_activations"}
    activations = ours.get(rival, rival)
    assert cfg.activation_quantizer._target_.split(".")[-2] == activations
