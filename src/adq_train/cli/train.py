"""``adq-train``: reads the command line and runs its jobs.

Torch is imported only when a run begins, so that ``--help`` and completion answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from adq_train import interrupts
from adq_train.cli.arguments import without_dashes
from adq_train.cli.jobs import Job, Outcome, combinations, exit_code, leave, run_job, table_of
from adq_train.cli.overrides import examine
from adq_train.cli.settings_help import settings_text
from adq_train.cli.slurm import run_elsewhere
from adq_train.cli.values import quoted
from adq_train.errors import ConfigError
from adq_train.messages import speaks
from adq_train.printable import printable
from adq_train.settings.schema import register
from adq_train.storage.files import with_home


def main() -> None:
    """``adq-train``: float model → sensitivity → bit allocation → QAT → result.

    Raises:
        ConfigError: The command line is wrong; lists every problem.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        interrupts.end_with_parent()
    if sys.argv[1:2] == ["--settings"]:
        print(printable(settings_text(*sys.argv[2:3])))
        return
    argv = [as_meant(text) for text in sys.argv[1:]]
    args = read_flags(argv)
    # Hydra, which answers some of them, takes flags before settings alone.
    argv = [*(text for text in argv if text not in args.overrides), *args.overrides]
    register()
    if args.help or args.hydra_help or args.shell_completion:
        answer(argv)
        return
    if not (args.cfg or args.info or args.overrides):
        if speaks():  # nobody wants the defaults' 120 epochs by accident
            with contextlib.suppress(SystemExit):
                answer(["--help"])
        sys.exit(2)
    given = dict(zip(args.overrides, quoted(args.overrides), strict=True))
    argv, overrides = [given.get(text, text) for text in argv], list(given.values())
    line = examine(overrides, args.config_dir, args.multirun)
    if problems := [*flag_problems(args), *line.problems]:
        raise ConfigError(problems)
    if args.cfg or args.info:
        answer(argv)
        return
    all_overrides = combinations(overrides, line.params) if line.is_sweep else [tuple(overrides)]
    command = ("adq-train", *argv)
    outcomes = run_jobs(
        [
            Job(own, number if line.is_sweep else 0, args.config_dir, command)
            for number, own in enumerate(all_overrides, 1)
        ]
    )
    if len(outcomes) > 1 and speaks():
        print(printable(table_of(outcomes)), file=sys.stderr)
    leave(exit_code(outcomes))


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides.

    Raises:
        ConfigError: A flag that there is not.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        unknown = [x for x in message.split() if x.startswith("--")]
        if "unrecognized" in message and unknown:
            message = f"{unknown[0]}: there is no such flag; {without_dashes(unknown[0])}"
        raise ConfigError([f"{message}; adq-train --help shows examples"])

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(argv)  # settings may stand before and after a flag


def as_meant(text: str) -> str:
    """A word of the command line as Hydra is to read it."""
    flag, equals, value = text.partition("=")
    if flag == "--config-dir" and equals:
        return f"{flag}={with_home(value)}"
    # Appending an experiment would let it win over an ablation; selecting it keeps the order.
    return re.sub(r"^\+(experiment|comparison|ablation)=", r"\1=", text)


def answer(argv: list[str]) -> None:
    """Lets Hydra say what was asked for: help, completion, the configuration."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors are told here, not by it
    sys.argv[1:] = argv
    hydra.main(config_path="pkg://adq_train.configs", config_name="config", version_base="1.3")(
        lambda cfg: None
    )()


def run_jobs(jobs: Sequence[Job]) -> list[Outcome]:
    """Runs one job after the other, or all of them elsewhere; a signal ends them.

    Raises:
        ConfigError: One of them cannot be composed; none has begun then.
    """
    cfgs = [job.configuration() for job in jobs]
    if cfgs[0].hydra.runtime.choices["hydra/launcher"] == "slurm":
        launcher: Any = OmegaConf.to_container(cfgs[0].hydra.launcher, resolve=True)
        return run_elsewhere(jobs, launcher)
    outcomes: list[Outcome] = []
    for job, cfg in zip(jobs, cfgs, strict=True):
        outcomes.append(run_job(job, cfg))
        if outcomes[-1].code >= 128:
            break
    return outcomes


def flag_problems(args: argparse.Namespace) -> Iterator[str]:
    """Flags of Hydra that let a file say what code runs."""
    if args.experimental_rerun is not None:
        yield "--experimental-rerun: unpickles a file, which runs its code; give the command again"
    for flag in ("config_path", "config_name"):
        if getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            yield f"--{name}: is not supported; put your own choices below a --config-dir"
