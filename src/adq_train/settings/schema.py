"""The fixed sections of the configuration: every field with its type, meaning and range.

Imported by ``--help`` and by shell completion, so nothing here may import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass(frozen=True)
class Range:
    """The values that a number may take; ``above`` and ``below`` are exclusive bounds."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with ``value``, or None when it lies in the range."""
        inside = (
            not math.isnan(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        return None if inside else f"must be {self}, got {value}"

    def __str__(self) -> str:
        parts = [
            f"{word} {bound:g}"
            for word, bound in (
                ("at least", self.minimum),
                ("more than", self.above),
                ("at most", self.maximum),
                ("less than", self.below),
            )
            if bound is not None
        ]
        return " and ".join(parts)


def number(default: Any, **bounds: float) -> Any:
    """A numeric field (or list or map of numbers) whose values must lie in ``Range(**bounds)``."""
    metadata = {"range": Range(**bounds)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(default: str, *others: str) -> Any:
    """A text field that takes one of a few words."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass
class BudgetConfig:
    """What the quantized model may cost; any number of limits together, null for none.

    Each is a number or, as ``0.1x``, a share of the float32 model's: 32 bits per weight and input
    element, 4 bytes per weight, MACs x 32 x 32 bit operations.
    """

    # Mean bits of a weight over the layers whose bits are chosen (first and last stay outside).
    average_weight_bits: float | int | str | None = number(None, minimum=1, maximum=8)
    # Mean bits of a layer's input element, over the same layers.
    average_activation_bits: float | int | str | None = number(None, minimum=1, maximum=8)
    # Packed weights of all quantized layers, in bytes.
    model_size_bytes: float | int | str | None = number(None, above=0)
    # Bit operations of one image: sum of MACs x weight bits x activation bits.
    bops: float | int | str | None = number(None, above=0)


@dataclass
class BitsConfig:
    """Which bit-widths a layer may get."""

    # Candidates of the allocation.
    candidates: list[int] = number([2, 3, 4], minimum=2, maximum=8)
    # Fewer candidates for some layers, by name or pattern: {layer1.*: [3, 4]}.
    candidates_per_layer: Any = number(None, minimum=2, maximum=8)
    # Whether a layer's weights and its input get the same width; false chooses them apart, which
    # needs a metric that measures them apart (sensitivity.tensors=separate).
    tied: bool = True
    # The first and the last layer keep this many bits, outside the average; null: like the rest.
    first_last: int | None = number(8, minimum=2, maximum=8)
    # Bits of further layers, by name or pattern: {layer1.0.conv1: 4, layer3.*: 2}.
    # (Any, not dict[str, int]: Hydra takes no new keys for a typed map without a plus.)
    pinned: Any = number(None, minimum=2, maximum=8)


@dataclass
class PretrainConfig:
    """The float model that quantization starts from."""

    # A state dict (.pt, .pth or .safetensors) to start from instead of training one.
    checkpoint: str | None = None
    # Which state of that file, where several fit (say, state_dict_ema); null: the plain one.
    checkpoint_key: str | None = None
    # new: the last layer gets fresh weights, for other classes than the file's; pretrain.epochs of
    # float training follow then.
    head: str = choice("keep", "new")
    # Epochs of float training; 0 takes the initial (say, torchvision's pretrained) weights.
    epochs: int = number(60, minimum=0)
    lr: float = number(0.1, above=0)
    weight_decay: float = number(5e-4, minimum=0)


@dataclass
class TrainerConfig:
    """Quantization-aware training (QAT), and what float training shares with it."""

    # QAT epochs; 0 stops after calibration.
    epochs: int = number(60, minimum=0)
    # Images of a step, over all processes together.
    batch_size: int = number(128, minimum=1)
    eval_batch_size: int = number(500, minimum=1)
    # auto: CUDA where there is one, else the CPU; or cpu, cuda, cuda:1.
    device: str = "auto"
    label_smoothing: float = number(0.0, minimum=0, below=1)
    # Largest L2 norm of the gradients; null leaves them as they are.
    gradient_clip_norm: float | None = number(None, above=0)
    # Batches whose gradients are added up before an optimizer step; the learning rate's schedule
    # and everything else see one batch of batch_size times so many images.
    accumulate_batches: int = number(1, minimum=1)
    # float32; tf32: the same with a GPU's convolutions and matrix products rounded to TF32; or
    # autocast in bf16 or fp16 (with a scaled loss). Quantizers stay in float32.
    precision: str = choice("float32", "tf32", "bf16", "fp16")
    # Memory layout of weights and images, and torch.compile for the quantizers or the whole
    # model: how fast it goes, not what it computes.
    channels_last: bool = False
    compile: str = choice("none", "quantizers", "model")
    # α of mixup and of cutmix, 0 for none; with both, each batch gets one of them.
    mixup_alpha: float = number(0.0, minimum=0)
    cutmix_alpha: float = number(0.0, minimum=0)
    # Decay per step of an average of the weights, which is evaluated and kept; 0: none.
    weight_average_decay: float = number(0.0, minimum=0, below=1)
    # Training images that give batch norm's statistics anew before each evaluation, in QAT in
    # batches of eval_batch_size; 0: none.
    batch_norm_reestimation: int = number(0, minimum=0)
    # Steps with a loss or gradient that is not finite which are left out before one is an error.
    skip_nonfinite_steps: int = number(0, minimum=0)
    # Checkpoints within an epoch, besides the one after it: every so many of its steps, or when
    # so many minutes have passed since the last one.
    checkpoint_every_steps: int | None = number(None, minimum=1)
    checkpoint_every_minutes: float | None = number(None, above=0)
    # PyTorch's deterministic algorithms: on a GPU the same bits in every run, at some cost.
    deterministic: bool = False
    # Compare the models of all processes after every step; costs a hash of the model.
    check_ranks: bool = False
    # The model that is tested: the last one, or the best on the validation split.
    select: str = choice("last", "best")


@dataclass
class Config:
    """The whole configuration of one run; the groups below are filled from ``configs/``."""

    seed: int = number(0, minimum=0, maximum=2**31 - 1)
    # The run's folder; null derives it: <output_root>/<experiment>/<overrides>-<hash>.
    run_dir: str | None = None
    output_root: str = "outputs"
    # The folder of a finished run, or a file of its checkpoints: QAT starts from its weights.
    init_from: str | None = None
    # SHA-256 of that checkpoint; the run notes it, and with it the place is not part of the run.
    init_from_sha256: str | None = None
    # Compose, validate, build everything, take two steps of each stage, leave no trace.
    dry_run: bool = False
    # Show the traceback of an error.
    debug: bool = False
    # Packages of your own that a _target_ may name, besides the built-in list.
    trusted_packages: list[str] = field(default_factory=list)

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    model: Any = MISSING
    data: Any = MISSING
    weight_quantizer: Any = MISSING
    activation_quantizer: Any = MISSING
    sensitivity: Any = MISSING
    allocator: Any = MISSING
    distillation: Any = MISSING
    optimizer: Any = MISSING
    quantizer_optimizer: Any = MISSING
    scheduler: Any = MISSING


SECTIONS = {
    "": Config,
    "budget": BudgetConfig,
    "bits": BitsConfig,
    "pretrain": PretrainConfig,
    "trainer": TrainerConfig,
}
GROUPS = tuple(f.name for f in fields(Config) if f.default is MISSING)


# Settings that name a file or a folder, in whatever section.
PATHS = ("run_dir", "output_root", "init_from", "root", "path", "checkpoint")


def is_path(name: str) -> bool:
    """Whether a setting names a file or a folder, by its dotted name."""
    return name.rpartition(".")[2] in PATHS


def register() -> None:
    """Make the schema known to Hydra, as ``schema`` in the defaults list of config.yaml."""
    ConfigStore.instance().store(name="schema", node=Config)
