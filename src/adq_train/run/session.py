"""Everything that a configuration comes to, before any stage of a run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from torch import nn

from adq_train.allocation.budget import Problem
from adq_train.allocation.problem import problem_of
from adq_train.data.base import Batch, ImageData, Loading
from adq_train.errors import UserError
from adq_train.models import warn_of_large_images
from adq_train.quantization.copies import unfuse
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.full_precision import Strictness
from adq_train.run.init_from import Start, open_start, pinned
from adq_train.sensitivity.base import ReadsAhead
from adq_train.settings.schema import Config, register
from adq_train.settings.validate import Parts, validate
from adq_train.states import load_state, load_weights
from adq_train.training.device import use
from adq_train.training.distillation import Teacher
from adq_train.training.distributed import ALONE, Ranks
from adq_train.training.optimizers import Optimizers, make_optimizers


@dataclass(frozen=True)
class Session:
    """Data, networks and problem of a run, made from its configuration.

    Attributes:
        config: The configuration.
        parts: What its groups name.
        data: The data set.
        model: The float network, on the device, with its first or given weights.
        teacher: For distillation.
        problem: The layers of the model, and what may be chosen for them.
        start: The run that QAT begins with, if it does not begin with the float model.
        ranks: The processes of the run.
    """

    config: Config
    parts: Parts
    data: ImageData
    model: nn.Module
    teacher: Teacher | None
    problem: Problem
    start: Start | None = None
    ranks: Ranks = ALONE

    @classmethod
    def open(cls, config: Config, parts: Parts, ranks: Ranks = ALONE) -> Session:
        """Reads the data, builds the networks and looks at their layers.

        Args:
            config: Validated.
            parts: What its groups name.
            ranks: The processes of the run.

        Raises:
            UserError: A file or the data set is missing or damaged, or does not fit the model; a
                layer cannot be quantized; or the budget cannot be met.
        """
        trainer = config.trainer
        use(parts.device, deterministic=trainer.deterministic, precision=trainer.precision)
        torch.manual_seed(config.seed)
        with ranks.local_main_first():
            data = parts.data.load(loading(config, parts.device, ranks))
            model = parts.model.build(data.num_classes, data.image_shape[0])
        warn_of_large_images(model, data.image_shape)
        unfuse(model)
        start = open_start(config, data)
        data = data.for_dry_run() if config.dry_run else data
        given = config.pretrain
        if given.checkpoint:
            own_head = given.head == "new"
            load_weights(model, Path(given.checkpoint), key=given.checkpoint_key, new_head=own_head)
        if start and start.float_state and not given.checkpoint:
            load_state(model, start.float_state)
        model.to(parts.device)
        ranks.broadcast_model(model)
        torch.manual_seed(config.seed)  # a trained teacher begins like a float model of its own
        teacher = parts.distillation.teacher(model, data.num_classes, data.image_shape[0])
        for network in (model, *([teacher.model] if teacher else [])):
            unfuse(network)
            if trainer.channels_last:  # in all stages: a resumed run has the same bits then
                network.to(memory_format=torch.channels_last)
        parts.target.num_edges(model)  # it refuses what it cannot take, before any training
        images, _ = next(data.calibration.epoch(0))
        strictness = Strictness(config.strict, config.bits.full_precision)
        layers = describe_layers(model, images[:1], data.num_classes, strictness=strictness)
        problem = problem_of(layers, config.bits, config.budget)
        parts.allocator.check(problem)
        if isinstance(parts.sensitivity, ReadsAhead):
            apart = not problem.tied and parts.allocator.needs_table
            parts.sensitivity.check(problem.layers, problem.candidates, apart)
        return cls(config, parts, data, model, teacher, problem, start, ranks)

    @classmethod
    def compose(cls, overrides: Sequence[str]) -> Session:
        """A session from overrides as ``adq-train`` takes them, for studies and notebooks.

        Args:
            overrides: ``experiment=quickstart``, ``seed=1``, …

        Raises:
            UserError: As :meth:`open`; or a setting is wrong.
        """
        config, parts = composed(overrides)
        if config.dry_run:  # what it trained would be kept as if it were whole
            raise UserError("dry_run: only adq-train has dry runs; leave it out")
        return cls.open(pinned(config), parts)

    @property
    def calibration(self) -> list[Batch]:
        """The calibration images with their targets."""
        return list(self.data.calibration.epoch(0))

    def optimizers(self, model: nn.Module, *, is_float: bool = False) -> Optimizers:
        """The optimizers of a model, with the rates of QAT or of float training."""
        rates = self.config.pretrain if is_float else self.config.rates
        return make_optimizers(
            model,
            rates.lr,
            rates.weight_decay,
            self.parts.make_optimizer,
            self.parts.make_quantizer_optimizer,
            self.parts.scheduler,
        )


def composed(overrides: Sequence[str]) -> tuple[Config, Parts]:
    """The configuration and the parts that overrides come to.

    Raises:
        ConfigError: A setting is wrong.
    """
    register()
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        return validate(compose("config", list(overrides)))


def loading(config: Config, device: torch.device, ranks: Ranks = ALONE) -> Loading:
    """How the data set is to be read."""
    trainer = config.trainer
    return Loading(
        trainer.batch_size * trainer.accumulate_batches,
        trainer.eval_batch_size,
        config.seed,
        device,
        ranks.world_size,
    )


def smaller(cfg: DictConfig, folder: str) -> DictConfig:
    """The configuration of a dry run: an epoch of two steps, and nothing that is kept.

    A dry run tells whether everything runs, not whether two steps from untrained weights converge:
    at the full rate they diverge where a whole run does not. In QAT all is computed, and no weight
    moves.

    Args:
        cfg: Of the whole run; composed, and valid.
        folder: Where the dry run may write.
    """
    small = copy.deepcopy(cfg)
    small.output_root = folder
    small.pretrain.lr *= 1e-3
    small.optimizer.lr = 0.0
    for section in (small.pretrain, small.trainer, small.sensitivity, small.distillation):
        if "epochs" in section:
            section.epochs = min(1, section.epochs)
    return small
