"""The parts of the validation that the command line's own tests do not reach."""

import shlex
from typing import Literal

import pytest
import torch
from hydra import compose, initialize_config_module

from adq_train.errors import ConfigError
from adq_train.models import OwnModel
from adq_train.settings.building import BASES, PARTIAL, build
from adq_train.settings.ranges import Range
from adq_train.settings.schema import register
from adq_train.settings.targets import fits, leaves
from adq_train.settings.validate import validate, with_homes


def composed(*overrides):
    register()
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (1.5, int, False),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        ("1", float, False),
        (None, float | None, True),
        ("a", float | None, False),
        ([0.1, 1], tuple[float, ...], True),
        ([0.1, "a"], tuple[float, ...], False),
        (0.1, list[float], False),
        (False, bool, True),
        (0, bool, False),
        ("anything", Literal["x"], True),  # unknown kinds of types are left to the part itself
    ],
)
def test_which_values_can_stand_for_a_type(value, hint, expected):
    assert fits(value, hint) is expected


@pytest.mark.parametrize(
    ("bounds", "good", "bad"),
    [
        ({"minimum": 0}, 0, -1),
        ({"above": 0}, 0.1, 0),
        ({"maximum": 8}, 8, 8.1),
        ({"below": 1}, 0.99, 1),
        ({"minimum": 0, "below": 1}, 0, float("nan")),
    ],
)
def test_ranges(bounds, good, bad):
    assert Range(**bounds).problem(good) is None
    assert str(bad) in Range(**bounds).problem(bad)


def test_leaves_have_dotted_names():
    assert dict(leaves({"a": {"b": [1, {"c": 2}]}, "d": None})) == {
        "a.b[0]": 1,
        "a.b[1].c": 2,
        "d": None,
    }


def test_a_group_without_a_target():
    with pytest.raises(ConfigError, match="model: needs a _target_"):
        build({"depth": 8}, "model", trial=lambda part: part)


def test_a_node_within_a_node_is_built_and_trusted_alike():
    resnet = {"_target_": "adq_train.models.CifarResNetModel", "depth": 8, "width": 2}
    node = {"_target_": "adq_train.training.distillation.TrainedTeacher", "epochs": 1}
    part = build({**node, "model": resnet}, "distillation", trial=lambda part: part)
    assert (part.model.depth, part.model.width) == (8, 2)
    for wrong, message in (
        ({**resnet, "depth": 9}, "distillation.model.depth must be 6 n"),
        (
            {**resnet, "_target_": "adq_train.storage.files.os.system"},
            "is not a class that a trusted",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            build({**node, "model": wrong}, "distillation", trial=lambda part: part)


@pytest.mark.parametrize(
    "target",
    [
        "adq_train.run.manifest.subprocess.run",
        "adq_train.run.manifest.subprocess.Popen",
        "adq_train.storage.files.os.system",
        "adq_train.storage.files.write_text",
        "torch.optim.sgd.torch.load",
        "torch.optim.sgd.torch.nn.Linear",
        "adq_train.cli.train.main",
    ],
)
def test_what_a_trusted_module_imports_is_not_trusted(target, tmp_path):
    mark = tmp_path / "mark"
    node = {"_target_": target, "_partial_": True, "args": ["touch", str(mark)]}
    with pytest.raises(ConfigError, match="is not a class that a trusted package defines"):
        build(node, "allocator", trial=lambda part: part())
    assert not mark.exists()


def test_a_trusted_package_of_the_user_s_own(tmp_path, monkeypatch):
    (tmp_path / "my_allocators.py").write_text(
        "from adq_train.allocation.allocator import Allocator\n"
        "class Everything(Allocator):\n"
        "    name = 'everything'\n"
        "    def __init__(self, bits: int) -> None:\n"
        "        self.bits = bits\n"
        "    def choose(self, problem, table):\n"
        "        return {}, False\n"
        "class Loads:\n"
        "    def load(self, loading):\n"
        "        return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["~allocator.time_limit_seconds", "+allocator.bits=4"]
    target = "allocator._target_=my_allocators.Everything"
    with pytest.raises(ConfigError, match=r"add trusted_packages=\[my_allocators\]"):
        validate(composed(target, *mine))
    _, parts = validate(composed(target, *mine, "trusted_packages=[my_allocators]"))
    assert parts.allocator.bits == 4
    # Trusting a package makes no allocator of whatever it holds.
    for target, reason in (("Loads", "is not a Allocator"), ("Allocator.choose", "is not a class")):
        with pytest.raises(ConfigError, match=f"my_allocators.{target} {reason}"):
            build({"_target_": f"my_allocators.{target}"}, "allocator", id, ("my_allocators.",))
    assert build({"_target_": "my_allocators.Loads"}, "data", id, ("my_allocators.",))


OWN_NETWORKS = """
from typing import TYPE_CHECKING
from torch import nn
if TYPE_CHECKING:
    from elsewhere import Unknown

class Net(nn.Module):
    def __init__(self, num_classes: int, width: "Unknown" = 2):
        super().__init__()

class Builder(nn.Module):
    def build(self, num_classes, in_channels):
        return self

import missing_dependency
"""


def test_a_network_of_the_user_s_own_needs_no_builder(tmp_path, monkeypatch):
    path = tmp_path / "my_networks.py"
    path.write_text(OWN_NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("my_networks.",)
    node = {"_target_": "my_networks.Net", "width": 3}
    with pytest.raises(ConfigError) as caught:  # the reason is not lost, and no remedy misplaced
        build(node, "model", id, own)
    assert str(caught.value).endswith("Net (No module named 'missing_dependency')")
    path.write_text(OWN_NETWORKS.replace("import missing_dependency", ""))
    assert isinstance(build(node, "model", id, own).build(4, 1), torch.nn.Module)
    assert not isinstance(build({"_target_": "my_networks.Builder"}, "model", id, own), OwnModel)
    for group in ("data", "allocator"):
        with pytest.raises(ConfigError, match="is not a "):
            build(node, group, id, own)
    # A module of this package that reads files is no network for whoever writes a config.yaml.
    for target in ("deploy.apart.FileHere", "deploy.apart.FileApart", "models.CifarResNet"):
        with pytest.raises(ConfigError, match="neither a subclass of nn"):
            build({"_target_": f"adq_train.{target}", "path": "x"}, "model", id)


@pytest.mark.parametrize("group", BASES)
def test_no_group_takes_a_class_of_another_kind(group, tmp_path):
    """Nor as an argument: a nested part must be what its parameter's type says."""
    node = {"_target_": "subprocess.Popen", "args": ["touch", str(tmp_path / "mark")]}
    if group in PARTIAL:
        node["_partial_"] = True
    with pytest.raises(ConfigError, match=f"{group}._target_: subprocess.Popen is not a "):
        build(node, group, lambda make: make(), ("subprocess.",))
    inner = {"_target_": "adq_train.training.distillation.TrainedTeacher", "epochs": 1}
    with pytest.raises(ConfigError, match=r"distillation\.model\._target_: subprocess.Popen"):
        build({**inner, "model": node}, "distillation", id, ("adq_train.", "subprocess."))
    resnet = {"_target_": "adq_train.models.CifarResNetModel", "depth": node, "width": 2}
    with pytest.raises(ConfigError, match=r"model\.depth\._target_: subprocess.Popen is not a int"):
        build(resnet, "model", id, ("adq_train.", "subprocess."))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+data._partial_=true", "data._partial_: must be left out, got True"),
        ("optimizer._partial_=false", "optimizer._partial_: must be true: it is completed"),
        ("~weight_quantizer._partial_", "weight_quantizer._partial_: must be true"),
        ("optimizer.lr=", "optimizer.lr: must be a number, got ''"),
        ("optimizer.lr=-1", "optimizer.lr: must be at least 0, got -1"),
        ("optimizer.lr=null", "optimizer.lr: must be "),
        ("optimizer.lr=true", "optimizer.lr: must be "),
        ("optimizer.momentum=1.5", "optimizer.momentum: must be at least 0 and less than 1"),
        ("optimizer.weight_decay=-1e-3", "optimizer.weight_decay: must be at least 0"),
        ("optimizer.momentum=0", "optimizer: Nesterov momentum requires"),
        ("optimizer=adam optimizer.betas=[0.9,1]", "optimizer.betas: must be at least 0 and less"),
        ("optimizer=adamw optimizer.lr=-1", "optimizer.lr: must be at least 0, got -1"),
        ("pretrain.lr=-1", "pretrain.lr: must be more than 0"),
        ("run_dir=", "run_dir: is empty; give a path"),
        ("pretrain.checkpoint=", "pretrain.checkpoint: is empty"),
        ("output_root='${run_dir}' run_dir='${output_root}'", "run_dir: Recursive interpolation"),
    ],
)
def test_settings_that_no_part_can_use(override, message):
    with pytest.raises(ConfigError) as error:
        validate(composed(*shlex.split(override, posix=False)))
    assert message in str(error.value)


def test_home_is_written_out_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config, _ = validate(composed("run_dir='~/runs'", "output_root='~nobody-here/x'"))
    assert config.run_dir == "/home/me/runs"
    assert config.output_root == "~nobody-here/x"
    node = {"data": {"root": "~/images", "like": "~"}, "distillation": {"model": {"path": "~"}}}
    assert with_homes(node) == {
        "data": {"root": "/home/me/images", "like": "~"},
        "distillation": {"model": {"path": "/home/me"}},
    }


def test_a_prefix_of_a_trusted_name_is_not_trusted():
    with pytest.raises(ConfigError, match="not from a trusted package"):
        validate(composed("allocator._target_=adq_train_evil.Run"))


def test_a_broken_interpolation_is_named():
    with pytest.raises(ConfigError, match="output_root"):
        validate(composed("output_root=${nowhere}"))


def test_every_default_is_valid_and_plain():
    config, _ = validate(composed())
    for _, value in leaves(config.plain()):
        assert value is None or isinstance(value, bool | int | float | str)


def test_budgets_are_numbers_or_shares_of_the_float_model():
    config, _ = validate(composed("budget.model_size_bytes=0.1x", "budget.average_weight_bits=3"))
    assert config.budget.model_size_bytes == "0.1x"
    assert repr(config.budget.average_weight_bits) == "3.0"  # the same run as 3.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.bops=0.1", None),
        ("budget.bops=0.1X", "budget.bops: must be a number, or a share"),
        ("trainer.batch_norm_reestimation=0.1x", None),
        (
            "trainer.batch_norm_reestimation=10x",
            "reestimation: must be a number, or a share of the tr",
        ),
        ("trainer.batch_norm_reestimation=-1", "reestimation: must be at least 0"),
        ("budget.bops=2x", "budget.bops: must be a number, or a share"),
        ("budget.average_weight_bits=0x", "budget.average_weight_bits: must be a number, or"),
        ("budget.average_weight_bits=9", "budget.average_weight_bits: must be at least 1 and at"),
        ("bits.candidates_per_layer={fc:[2,4]}", None),
        ("bits.candidates_per_layer=[2,4]", "bits.candidates_per_layer: must map layer names"),
        ("bits.candidates_per_layer={fc:2}", "bits.candidates_per_layer.fc: must be a list of"),
        ("bits.candidates_per_layer={fc:[2.5]}", "bits.candidates_per_layer.fc: must be a list"),
        ("bits.candidates_per_layer={fc:[]}", "bits.candidates_per_layer.fc: must be ascending"),
        ("bits.candidates_per_layer={fc:[4,2]}", "bits.candidates_per_layer.fc: must be ascending"),
        ("bits.candidates_per_layer={fc:[2,9]}", "bits.candidates_per_layer: must be at least 2"),
        ("bits.candidates_per_layer={fc:[4,8]}", "set bits.candidates=[2, 3, 4, 8]"),
    ],
)
def test_budgets_and_candidates(override, message):
    if message is None:
        validate(composed(override))
        return
    with pytest.raises(ConfigError) as error:
        validate(composed(override))
    assert message in str(error.value)


def test_a_foreign_target_is_not_imported_wherever_it_stands(tmp_path, monkeypatch):
    (tmp_path / "foreign_code.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    foreign = {"_target_": "foreign_code.x"}
    own = {"_target_": "adq_train.models.CifarResNetModel", "width": 16}
    for node in (foreign, {**own, "depth": foreign}, {**foreign, "depth": own}):
        with pytest.raises(ConfigError, match="not a class that a trusted package defines"):
            build(node, "model", lambda part: part)


@pytest.mark.parametrize("bits", ["4.5", "null", "[4,8]", "true"])
def test_pinned_bits_are_whole_numbers(bits):
    with pytest.raises(ConfigError, match=r"bits\.pinned"):
        validate(composed("experiment=quickstart", f"bits.pinned={{fc: {bits}}}"))


def test_a_device_without_float64_is_refused():
    with pytest.raises(ConfigError, match="'mps' cannot be used here"):
        validate(composed("experiment=quickstart", "trainer.device=mps"))
