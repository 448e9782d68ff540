"""The typed configuration: every setting with its type, meaning, range, and what it changes.

All that the program says or decides about a setting is derived from its declaration here: checks,
``--help``, the identity of a run, the key of a shared float model, which settings are paths, and
the names of runs in reports. Imported by ``--help`` and by shell completion, so nothing here may
import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from adq_train.settings.ranges import Range


class Affects(Enum):
    """What a run with another value of a setting shares with this one."""

    NOTHING = "nothing"  # where and how a run goes
    ROUNDING = "rounding"  # how fast it goes: the same run, but the bits of a float model
    RESULT = "result"  # QAT and what comes before it; float models are shared
    FLOAT_MODEL = "float model"  # and with it the result


class Content(Enum):
    """What a setting that is a path leads to."""

    PLACE = "place"  # reports do not tell runs apart by it, but by what is there
    INPUT = "input"  # a file whose content is a part of the run, and its name of the run's name


@dataclass(frozen=True)
class About:
    """What is declared of a setting, besides its type and its default.

    Attributes:
        help: What it is, in one or two sentences.
        affects: What it changes.
        range: Of a number, or of the numbers of a list or map.
        choices: The words that it takes; none: any.
        path: Where it is a path, what that leads to.
        in_loss: Whether a training loss under another value is another figure.
        section: What is declared within it.
        share_of: What a number may be given as a share of, ``0.1x``; empty: of nothing.
    """

    help: str
    affects: Affects = Affects.RESULT
    range: Range | None = None
    choices: tuple[str, ...] = ()
    path: Content | None = None
    in_loss: bool = False
    section: type | None = None
    share_of: str = ""


def setting(
    default: Any,
    help: str,
    affects: Affects = Affects.FLOAT_MODEL,
    *,
    choices: tuple[str, ...] = (),
    path: Content | None = None,
    in_loss: bool = False,
    share_of: str = "",
    **bounds: float,
) -> Any:
    """Declares a setting; see :class:`About`. ``bounds`` are those of its :class:`Range`.

    One that is not said to affect less is part of a float model's key, which is never wrong.
    """
    allowed = Range(**bounds) if bounds else None
    about = About(help, affects, allowed, choices, path, in_loss, share_of=share_of)
    return _field(default.copy if isinstance(default, list) else default, about)


def section(kind: type, help: str) -> Any:
    """Declares a section that is filled here."""
    return _field(kind, About(help, section=kind))


def group(help: str, affects: Affects, own: type | None = None) -> Any:
    """Declares a group, filled from ``configs/``.

    Args:
        help: What it is.
        affects: What its settings change, where ``own`` does not say otherwise.
        own: Declares the settings that this program looks at, in whatever choice of the group.
    """
    return _field(MISSING, About(help, affects, section=own))


def _field(default: Any, about: About) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"about": about})
    return field(default=default, metadata={"about": about})


FLOAT_MODEL, RESULT, ROUNDING, NOTHING = (
    Affects.FLOAT_MODEL, Affects.RESULT, Affects.ROUNDING, Affects.NOTHING,
)  # fmt: skip
OF_FLOAT = "of the float model's"
PLACE, INPUT = Content.PLACE, Content.INPUT


@dataclass(frozen=True)
class BudgetConfig:
    """What the quantized model may cost; any number of limits together, null for none.

    Each is a number or, as ``0.1x``, a share of the float32 model's: 32 bits per weight and input
    element, 4 bytes per weight, MACs x 32 x 32 bit operations.
    """

    average_weight_bits: float | int | str | None = setting(
        None,
        "Mean bits of a weight over the layers whose bits are chosen; the first and the last stay "
        "outside.",
        RESULT,
        share_of=OF_FLOAT,
        minimum=1,
        maximum=8,
    )
    average_activation_bits: float | int | str | None = setting(
        None,
        "Mean bits of a layer's input element, over the same layers.",
        RESULT,
        share_of=OF_FLOAT,
        minimum=1,
        maximum=8,
    )
    model_size_bytes: float | int | str | None = setting(
        None,
        "Packed weights of all quantized layers, in bytes.",
        RESULT,
        share_of=OF_FLOAT,
        above=0,
    )
    bops: float | int | str | None = setting(
        None,
        "Bit operations of one image: sum of MACs x weight bits x activation bits.",
        RESULT,
        share_of=OF_FLOAT,
        above=0,
    )


@dataclass(frozen=True)
class BitsConfig:
    """Which bit-widths a layer may get."""

    candidates: list[int] = setting(
        [2, 3, 4], "Bit-widths that are measured and chosen from.", RESULT, minimum=2, maximum=8
    )
    # Any, not a typed map, here and below: Hydra takes no new keys for that without a plus.
    candidates_per_layer: Any = setting(
        None,
        "Fewer candidates for some layers, by name or pattern: {layer1.*: [3, 4]}.",
        RESULT,
        minimum=2,
        maximum=8,
    )
    tied: bool = setting(
        True,
        "Whether a layer's weights and its input get the same width; false chooses them apart, "
        "which needs a metric that measures them apart (sensitivity.tensors=separate).",
        RESULT,
    )
    first_last: int | None = setting(
        8,
        "The first and the last layer keep this many bits, outside the average; null: like the "
        "rest.",
        RESULT,
        minimum=2,
        maximum=8,
    )
    pinned: Any = setting(
        None,
        "Bits of further layers, by name or pattern: {layer1.0.conv1: 4, layer3.*: 2}.",
        RESULT,
        minimum=2,
        maximum=8,
    )
    full_precision: list[str] = setting(
        [],
        "Layers and parameters that may stay in full precision, by name or pattern "
        "([pos_embed, *.bias_table]): strict does not refuse them, and no warning names them.",
        NOTHING,
    )


@dataclass(frozen=True)
class PretrainConfig:
    """The float model that quantization starts from."""

    checkpoint: str | None = setting(
        None,
        "A state dict (.pt, .pth or .safetensors) to start from instead of training one.",
        FLOAT_MODEL,
        path=PLACE,
    )
    checkpoint_key: str | None = setting(
        None,
        "Which state of that file, where several fit (say, state_dict_ema); null: the plain one.",
        FLOAT_MODEL,
    )
    head: str = setting(
        "keep",
        "new: the last layer gets fresh weights, for other classes than the file's; "
        "pretrain.epochs of float training follow then.",
        RESULT,
        choices=("keep", "new"),
    )
    epochs: int = setting(
        60,
        "Epochs of float training; 0 takes the initial (say, torchvision's pretrained) weights.",
        FLOAT_MODEL,
        minimum=0,
    )
    lr: float = setting(0.1, "Learning rate of float training.", FLOAT_MODEL, above=0)
    weight_decay: float = setting(5e-4, "Its weight decay.", FLOAT_MODEL, minimum=0)


@dataclass(frozen=True)
class TrainerConfig:
    """Quantization-aware training (QAT), and what float training shares with it."""

    epochs: int = setting(60, "QAT epochs; 0 stops after calibration.", RESULT, minimum=0)
    batch_size: int = setting(
        128, "Images of a step, over all processes together.", FLOAT_MODEL, minimum=1
    )
    eval_batch_size: int = setting(
        500, "Images of a batch without training.", FLOAT_MODEL, minimum=1
    )
    device: str = setting(
        "auto", "auto: CUDA where there is one, else the CPU; or cpu, cuda, cuda:1.", NOTHING
    )
    label_smoothing: float = setting(
        0.0,
        "Share of the target's probability spread over all classes.",
        FLOAT_MODEL,
        in_loss=True,
        minimum=0,
        below=1,
    )
    class_weights: str = setting(
        "none",
        "balanced: rare classes count more in the loss, by N / (K N_c) with N_c of N training "
        "images in one of K classes.",
        FLOAT_MODEL,
        choices=("none", "balanced"),
        in_loss=True,
    )
    gradient_clip_norm: float | None = setting(
        None,
        "Largest L2 norm of the gradients; null leaves them as they are.",
        FLOAT_MODEL,
        above=0,
    )
    accumulate_batches: int = setting(
        1,
        "Batches whose gradients are added up before an optimizer step, as if they were one batch "
        "of so many times batch_size images.",
        FLOAT_MODEL,
        minimum=1,
    )
    precision: str = setting(
        "float32",
        "float32; tf32: the same with a GPU's convolutions and matrix products rounded to TF32; or "
        "autocast in bf16 or fp16 (with a scaled loss). Quantizers stay in float32.",
        FLOAT_MODEL,
        choices=("float32", "tf32", "bf16", "fp16"),
    )
    channels_last: bool = setting(
        False, "Memory layout of weights and images, channel by channel of each pixel.", ROUNDING
    )
    compile: str = setting(
        "none",
        "torch.compile for the quantizers or the whole model.",
        ROUNDING,
        choices=("none", "quantizers", "model"),
    )
    mixup_alpha: float = setting(
        0.0,
        "α of mixup, 0 for none; with cutmix as well, each batch gets one of them.",
        FLOAT_MODEL,
        in_loss=True,
        minimum=0,
    )
    cutmix_alpha: float = setting(
        0.0, "α of cutmix, 0 for none.", FLOAT_MODEL, in_loss=True, minimum=0
    )
    weight_average_decay: float = setting(
        0.0,
        "Decay per step of an average of the weights, which is evaluated and kept; 0: none.",
        FLOAT_MODEL,
        minimum=0,
        below=1,
    )
    oscillation_damping: float = setting(
        0.0,
        "Weight at the end of QAT of a loss that draws weights to their levels; 0: none.",
        RESULT,
        minimum=0,
    )
    batch_norm_reestimation: int | str = setting(
        0,
        "Training images that give batch norm's statistics anew before each evaluation, in QAT in "
        "batches of eval_batch_size; a number, or a share of them such as 0.1x; 0: none.",
        FLOAT_MODEL,
        share_of="of the training images",
        minimum=0,
    )
    skip_nonfinite_steps: int = setting(
        0,
        "Steps with a loss or gradient that is not finite which are left out before one is an "
        "error.",
        FLOAT_MODEL,
        minimum=0,
    )
    checkpoint_every_steps: int | None = setting(
        None, "A checkpoint after so many steps of an epoch, besides its last.", NOTHING, minimum=1
    )
    checkpoint_every_minutes: float | None = setting(
        None, "A checkpoint when so many minutes have passed since the last one.", NOTHING, above=0
    )
    deterministic: bool = setting(
        False,
        "PyTorch's deterministic algorithms: on a GPU the same bits in every run, at some cost.",
        FLOAT_MODEL,
    )
    check_ranks: bool = setting(
        False,
        "Compare the models of all processes after every step; costs a hash of the model.",
        NOTHING,
    )
    select: str = setting(
        "last",
        "The model that is tested: the last one, or the best on the validation split.",
        RESULT,
        choices=("last", "best"),
    )


@dataclass(frozen=True)
class DataSettings:
    """What the program looks at in every data set's settings."""

    root: str | None = setting(None, "The folder that holds the data set.", RESULT, path=PLACE)
    num_workers: int | None = setting(
        0, "Processes that read images; null: one for each CPU of a process of the run.", NOTHING
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """Float training has a rate and a decay of its own, in the section pretrain."""

    lr: float = setting(0.1, "Learning rate of QAT.", RESULT)
    weight_decay: float = setting(5e-4, "Weight decay of QAT.", RESULT)


@dataclass(frozen=True)
class FileSettings:
    """What is read instead of being measured or solved."""

    path: str | None = setting(None, "The file.", RESULT, path=INPUT)


@dataclass(frozen=True)
class DistillationSettings:
    """A teacher's weights."""

    checkpoint: str | None = setting(None, "The teacher's state dict.", RESULT, path=INPUT)


@dataclass(frozen=True)
class Config:
    """The whole configuration of one run; its groups are filled from configs/."""

    seed: int = setting(
        0,
        "Seed of everything that is drawn at random.",
        FLOAT_MODEL,
        minimum=0,
        maximum=2**31 - 1,
    )
    run_dir: str | None = setting(
        None,
        "The run's folder; null derives it: <output_root>/<experiment>/<overrides>-<hash>.",
        NOTHING,
        path=PLACE,
    )
    output_root: str = setting("outputs", "The folder of all runs.", NOTHING, path=PLACE)
    init_from: str | None = setting(
        None,
        "The folder of a finished run, or a file of its checkpoints: QAT starts from its weights.",
        NOTHING,
        path=PLACE,
    )
    init_from_sha256: str | None = setting(
        None,
        "SHA-256 of the checkpoint of init_from. A run notes it by itself, and may then find the "
        "file in another place.",
        RESULT,
    )
    logger: list[str] = setting(
        ["tensorboard"],
        "Trackers of the training besides metrics.jsonl, any of tensorboard, csv (metrics.csv), "
        "mlflow and wandb.",
        NOTHING,
        choices=("tensorboard", "csv", "mlflow", "wandb"),
    )
    dry_run: bool = setting(
        False,
        "Try everything with two steps of each stage, and keep nothing.",
        NOTHING,
    )
    strict: bool = setting(
        False,
        "Refuse a model of which a matrix of weights would stay in full precision, unless "
        "bits.full_precision lists it; false: a warning names it.",
        NOTHING,
    )
    debug: bool = setting(False, "Show the traceback of an error.", NOTHING)
    trusted_packages: list[str] = setting(
        [],
        "Packages of your own that a _target_ may name, besides the built-in list.",
        NOTHING,
    )

    budget: BudgetConfig = section(BudgetConfig, "What the quantized model may cost.")
    bits: BitsConfig = section(BitsConfig, "Which bit-widths a layer may get.")
    pretrain: PretrainConfig = section(PretrainConfig, "The float model.")
    trainer: TrainerConfig = section(TrainerConfig, "Training.")

    model: Any = group("The network.", FLOAT_MODEL)
    data: Any = group("The data set.", FLOAT_MODEL, DataSettings)
    weight_quantizer: Any = group("How weights are quantized.", RESULT)
    activation_quantizer: Any = group("How layers' inputs are quantized.", RESULT)
    sensitivity: Any = group("How Ω is measured.", RESULT, FileSettings)
    allocator: Any = group("Who chooses the bits.", RESULT, FileSettings)
    distillation: Any = group("Who teaches.", RESULT, DistillationSettings)
    optimizer: Any = group("Of weights, norms and biases.", FLOAT_MODEL, OptimizerSettings)
    quantizer_optimizer: Any = group("Of thresholds, steps and levels in QAT.", RESULT)
    scheduler: Any = group("The course of the learning rates.", FLOAT_MODEL)
    target: Any = group("What will run the network, where that is not float arithmetic.", RESULT)

    @property
    def rates(self) -> OptimizerSettings:
        """The learning rate and the weight decay of QAT."""
        return _typed(OptimizerSettings, self.optimizer)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Config:
        """The typed form of plain values; what is missing has its default, or is empty.

        Args:
            values: Nested as in ``config.yaml``; checked before.
        """
        return _typed(cls, values)

    def plain(self) -> dict[str, Any]:
        """The nested dictionaries of ``config.yaml``."""
        return {
            f.name: dict(vars(value)) if f.name in SECTIONS else value
            for f in fields(self)
            for value in [getattr(self, f.name)]
        }


T = TypeVar("T")


def _typed(kind: type[T], values: dict[str, Any]) -> T:
    given = {}
    for f in fields(kind):  # type: ignore[arg-type]
        if f.name in SECTIONS:
            given[f.name] = _typed(SECTIONS[f.name], values.get(f.name) or {})
        elif f.default is MISSING:
            given[f.name] = values.get(f.name) or {}
        elif f.name in values:
            given[f.name] = values[f.name]
    return kind(**given)


def about(of: type) -> dict[str, About]:
    """What is declared of the settings of a section, by name."""
    return {f.name: f.metadata["about"] for f in fields(of)}


GROUPS = tuple(f.name for f in fields(Config) if f.default is MISSING)
SECTIONS: dict[str, Any] = {
    name: x.section for name, x in about(Config).items() if x.section and name not in GROUPS
}


def declared() -> Iterator[tuple[str, About]]:
    """All declarations, by dotted name; that of a group or section comes before its own."""
    for name, of in about(Config).items():
        yield name, of
        for inner, more in about(of.section).items() if of.section else ():
            yield f"{name}.{inner}", more


def settings_where(test: Callable[[About], object]) -> tuple[str, ...]:
    """The dotted names of the settings whose declaration passes a test."""
    return tuple(name for name, of in declared() if test(of) and name not in SECTIONS)


def without(config: dict[str, Any], affecting: tuple[Affects, ...]) -> dict[str, Any]:
    """A configuration without the settings that affect one of some things.

    Args:
        config: Nested as in ``config.yaml``, of any version; unknown settings stay.
        affecting: See :class:`Affects`.
    """
    left: dict[str, Any] = {}
    declarations = dict(declared())
    for name, value in config.items():
        of = declarations.get(name, About(""))
        if of.section is not None and isinstance(value, dict):
            of_each = {k: declarations.get(f"{name}.{k}", of).affects for k in value}
            own = {k: v for k, v in value.items() if of_each[k] not in affecting}
            left |= {name: own} if own or not value else {}
        elif of.affects not in affecting and (value or name not in GROUPS):
            left[name] = value  # a group of which nothing is chosen is no part of a run
    return left


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """What a run is: its configuration without places and switches."""
    return without(config, (NOTHING, ROUNDING))


def float_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a float model depends on, of its configuration; unknown settings are left out."""
    return without(config, (NOTHING, RESULT))


_PATHS = {name.rpartition(".")[2] for name in settings_where(lambda of: of.path)}


def is_path(name: str) -> bool:
    """Whether a setting names a file or a folder, by its dotted name."""
    return name.rpartition(".")[2] in _PATHS


def register() -> None:
    """Make the schema known to Hydra, as ``schema`` in the defaults list of config.yaml."""
    schema: DictConfig = OmegaConf.structured(Config)
    for node in (schema, *(schema[name] for name in SECTIONS)):
        OmegaConf.set_readonly(node, None)  # which frozen classes make it
    ConfigStore.instance().store(name="schema", node=schema)
