"""What a configuration comes to before any stage."""

import pytest
import torch
from hydra import compose, initialize_config_module

from adq_train.errors import ConfigError, UserError
from adq_train.run.session import Session, composed, smaller
from adq_train.settings.schema import register
from adq_train.settings.validate import validate

SMALL = ("experiment=quickstart", "model.width=4", "data.train_images=400")


def test_a_session_from_overrides_is_that_of_the_command_line():
    session = Session.compose([*SMALL, "bits.pinned={layer1.*: 4}", "seed=3"])
    assert (session.config.seed, session.data.name) == (3, "digits")
    assert {x for name, x in session.problem.pinned.items() if "layer1" in name} == {4}
    assert session.problem.budget.average_weight_bits == session.config.budget.average_weight_bits
    first, again = (Session.compose([*SMALL, f"seed={seed}"]).model for seed in (3, 3))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(tensor, session.model.state_dict()[name]), name


def test_nothing_of_a_dry_run_can_be_kept_for_a_whole_one():
    with pytest.raises(UserError, match="dry_run: only adq-train has dry runs"):
        Session.compose([*SMALL, "dry_run=true"])


def test_a_dry_run_is_smaller_and_elsewhere(tmp_path):
    overrides = [*SMALL, "optimizer.lr=0.3", "pretrain.lr=0.2", "sensitivity=learned"]
    register()
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        whole = compose("config", [*overrides, "distillation=teacher", "distillation.epochs=9"])
    config, parts = validate(smaller(whole, str(tmp_path)))
    assert config.output_root == str(tmp_path)
    assert (config.pretrain.epochs, config.trainer.epochs) == (1, 1)
    assert (parts.sensitivity.epochs, parts.distillation.epochs) == (1, 1)
    assert (config.pretrain.lr, config.rates.lr) == (pytest.approx(2e-4), 0.0)
    assert (whole.pretrain.epochs, whole.optimizer.lr, whole.distillation.epochs) == (40, 0.3, 9)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_the_rates_of_qat_are_asked_for(name):
    with pytest.raises(ConfigError, match=rf"optimizer\.{name}: a value is required"):
        composed([*SMALL, f"~optimizer.{name}"])
