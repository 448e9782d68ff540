"""Tries random edits of the configuration: each must run or be refused in one clear message.

    python scripts/fuzz_configs.py --edits 500

Each edit changes one to three settings or groups to something random, right or wrong. Refused is
what the command line refuses before a run's folder is made; what passes stops at that point. An
edit counts as wrong where a traceback or an unforeseen exception shows, or where a file is left.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from adq_train.cli.program import act
from adq_train.errors import UserError
from adq_train.run.folder import RunFolder
from adq_train.settings.ranges import leaves
from adq_train.settings.schema import register

SMALL = (
    "data=synthetic",
    "data.like=digits",
    "data.train_images=64",
    "data.test_images=8",
    "data.validation_images=8",
    "data.calibration_images=8",
    "model.width=4",
)
# Without those that would download something, or take long to build.
GROUPS = {
    "data": ("synthetic", "digits", "imagenet", "fashion_mnist"),
    "model": ("resnet8", "resnet20"),
    "weight_quantizer": ("adq", "adq_paper", "apot", "dorefa", "lsq", "n2uq"),
    "activation_quantizer": ("adq", "apot", "dorefa", "lsq", "n2uq", "pact"),
    "sensitivity": (
        "fisher",
        "from_file",
        "gradient",
        "hessian",
        "learned",
        "mse",
        "perturbation",
    ),
    "allocator": ("fixed", "from_file", "greedy", "ilp", "random", "uniform"),
    "optimizer": ("adamw", "sgd"),
    "quantizer_optimizer": ("adam", "sgd"),
    "scheduler": ("cosine", "linear", "step"),
    "ablation": ("none", "symmetric", "uniform_bits", "grid"),
    "comparison": ("adq", "lsq", "pact"),
}
VALUES = (
    "-1", "0", "1", "2", "3", "7", "8", "40", "0.5", "-0.5", "1e-9", "1e30", "nan", "inf", "-inf",
    "true", "false", "null", "''", "word", "ünïcode", "'two words'", "[]", "[1]", "[2,4]", "[4,2]",
    "[2,2]", "[[2],[3]]", "[nan]", "[word]", "{}", "{fc: 4}", "{fc: [2, 4]}", "{nothing: 3}",
    "{'*': 2}", "{fc: word}", "0.1x", "-1x", "x", "???", "${seed}", "${nothing}", "${oc.env:HOME}",
    "/dev/null", "/proc/nothing", ".", "../../etc/passwd", "9" * 30, "os.system",
    "adq_train.cli.train.main", "adq_train.errors.UserError", "torch.optim.SGD", "a=b", "1,",
    "[1", "{", "'",
)  # fmt: skip
# Deep in memory or time: more of it is slow, not wrong.
KEPT_SMALL = ("model.width", "data.train_images", "data.test_images", "model.depth", "data.like")


@dataclass
class Fuzz:
    """What was tried: how many edits ended how, and those that went wrong with what they said."""

    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[tuple[list[str], str]] = field(default_factory=list)


class PassedError(UserError):
    """The run would begin here."""


def names() -> list[str]:
    """All settings of a configuration, with the targets of its parts."""
    GlobalHydra.instance().clear()
    register()
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        content = OmegaConf.to_container(compose("config", list(SMALL)))
    found = [name.split("[")[0] for name, _ in leaves(content)]
    empty = ["bits.pinned", "bits.candidates_per_layer", "trusted_packages"]
    left_out = (*KEPT_SMALL, "debug")  # which asks for tracebacks
    return [x for x in dict.fromkeys([*found, *empty]) if x not in left_out]


def edit(known: list[str], choose: random.Random) -> list[str]:
    """One to three random overrides."""
    overrides = []
    for _ in range(choose.randint(1, 3)):
        kind = choose.random()
        if kind < 0.6:
            overrides.append(f"{choose.choice(known)}={choose.choice(VALUES)}")
        elif kind < 0.75:
            group = choose.choice(list(GROUPS))
            plus = "+" * choose.randint(0, 1)
            overrides.append(f"{plus}{group}={choose.choice((*GROUPS[group], 'nothing'))}")
        elif kind < 0.85:  # a typo
            name = list(choose.choice(known))
            name.insert(choose.randrange(len(name)), choose.choice("xyz._"))
            overrides.append(f"{''.join(name)}={choose.choice(VALUES)}")
        elif kind < 0.95:
            mark = choose.choice(("+", "++", "~"))
            overrides.append(f"{mark}{choose.choice(known)}={choose.choice(VALUES)}")
        else:
            overrides.append("".join(choose.choices("abc=.[]{}+~$,'\" ", k=choose.randint(1, 9))))
    return overrides


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """Works in a folder of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            yield Path(scratch)
        finally:
            os.chdir(before)


def attempt(overrides: list[str]) -> tuple[str, str]:
    """How an edit ended, ``passes``, ``refused`` or ``wrong``, and what was said."""
    said = io.StringIO()
    code = 0

    def stop(self: RunFolder) -> RunFolder:
        raise PassedError("passes")

    with (
        empty_folder() as folder,
        mock.patch.object(RunFolder, "__enter__", stop),
        mock.patch.object(sys, "argv", ["adq-train", *SMALL, *overrides]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        GlobalHydra.instance().clear()
        try:
            code = act("adq-train")
        except BaseException as error:  # nothing may come through
            said.write(f"Traceback: {error!r}")
        left = [x.name for x in folder.iterdir()]
    text = said.getvalue()
    if left:
        return "wrong", f"left {left}; {text}"
    if "Traceback" in text or "debug=true shows where" in text or "HYDRA_FULL_ERROR" in text:
        return "wrong", text
    if "error: passes" in text:
        return "passes", text
    if not code or not ("error: " in text or " errors:\n" in text):
        return "wrong", f"exit code {code} without a message; {text}"
    return "refused", text


def fuzz(edits: int, seed: int = 0) -> Fuzz:
    """Tries random edits.

    Args:
        edits: How many.
        seed: Of the edits.
    """
    choose, known, result = random.Random(seed), names(), Fuzz()
    for _ in range(edits):
        overrides = edit(known, choose)
        end, text = attempt(overrides)
        result.ends[end] += 1
        if end == "wrong":
            result.wrong.append((overrides, text))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = fuzz(options.edits, options.seed)
    for overrides, text in result.wrong:
        print(f"{overrides}\n    {text.strip()[-600:]}")
    print(f"{options.edits} edits, seed {options.seed}: {dict(result.ends)}")
    sys.exit(bool(result.wrong))


if __name__ == "__main__":
    main()
