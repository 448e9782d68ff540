"""Entry points: compose, validate, run; nothing else.

Torch is imported only when a run begins, so that ``--help`` and completion answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from adq_train import interrupts
from adq_train.cli.overrides import problems_of, trust_typed
from adq_train.cli.settings_help import settings_text
from adq_train.cli.values import quote, quoted
from adq_train.errors import ConfigError, UserError
from adq_train.printable import PrintableFormatter, printable
from adq_train.reporting.progress import speaks
from adq_train.settings.schema import register
from adq_train.storage.files import with_home


def main() -> None:
    """``adq-train``: float model → sensitivity → bit allocation → QAT → result."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        interrupts.end_with_parent()
    if sys.argv[1:2] == ["--settings"]:
        try:
            print(printable(settings_text(*sys.argv[2:3])))
        except ConfigError as error:
            fail(error)
        return
    # Appending an experiment would let it win over an ablation; selecting it keeps the order.
    argv = [re.sub(r"^\+(experiment|comparison|ablation)=", r"\1=", text) for text in sys.argv[1:]]
    argv = [
        f"{flag}={with_home(value)}" if flag == "--config-dir" and equals else text
        for text in argv
        for flag, equals, value in [text.partition("=")]
    ]
    args = get_args_parser().parse_args(argv)
    only_words = bool(args.help or args.hydra_help or args.shell_completion)
    register()
    if not (only_words or args.cfg or args.info or args.overrides):
        if speaks():  # nobody wants the defaults' 120 epochs by accident
            sys.argv[1:] = ["--help"]
            with contextlib.suppress(SystemExit):
                hydra_main(lambda _: None)
        sys.exit(2)
    given = dict(zip(args.overrides, quoted(args.overrides), strict=True))
    argv = [given.get(text, text) for text in argv]
    args.overrides = list(given.values())
    if not only_words:
        problems = [
            *flag_problems(args),
            *problems_of(args.overrides, args.config_dir, args.multirun),
        ]
        if problems:
            fail(ConfigError(problems))
    elsewhere = any(text.startswith("hydra/launcher=") for text in argv)
    if elsewhere and importlib.util.find_spec("submitit") is None:
        fail(ConfigError(["hydra/launcher: needs pip install 'adq-train[slurm]'"]))
    command = ["adq-train", *argv]
    if not (only_words or args.cfg or args.info or elsewhere):
        # While there is no folder to leave behind.
        importlib.import_module("adq_train.run.pipeline")
    code, outcomes = run_jobs(argv, args, command, elsewhere)
    if len(outcomes) > 1 and speaks():
        print(printable(table_of(outcomes)), file=sys.stderr)
    code = code or int(any(outcome.code for outcome in outcomes))
    if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # What PyTorch does at exit would wait for processes that may be gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def run_jobs(
    argv: list[str], args: argparse.Namespace, command: list[str], elsewhere: bool
) -> tuple[int, list[Outcome]]:
    """Lets Hydra run the one job of a command, or all of its sweep.

    Args:
        argv: The command line, for Hydra.
        args: The same, read.
        command: What was typed.
        elsewhere: Whether a launcher runs the jobs in other processes.

    Returns:
        The exit code that Hydra asks for, and how the jobs ended.
    """
    process = os.getpid()
    # Jobs of a sweep may run on other machines; their outcomes come back through a folder.
    outcomes: list[Outcome] = []
    scratch = Path(tempfile.mkdtemp(dir="." if elsewhere else None, prefix=".adq-"))
    try:

        def job(cfg: DictConfig) -> None:
            outcome = run_job(cfg, args.config_dir, command)
            if os.getpid() != process:
                keep(outcome, scratch)
                return
            outcomes.append(outcome)
            if outcome.code >= 128:
                sys.exit(outcome.code)

        # Hydra's own record of a sweep says less than the folders of its runs; it goes away.
        if not any(argument.startswith("hydra.sweep.dir=") for argument in argv):
            # beside the other overrides, which argparse wants in one place
            place = argv.index(args.overrides[0]) if args.overrides else len(argv)
            argv.insert(place, f"hydra.sweep.dir={quote(str(scratch))}")
        sys.argv[1:] = argv
        code = 0
        try:
            hydra_main(job)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        outcomes += kept(scratch)
    finally:  # a cleaned /tmp has taken it away already
        shutil.rmtree(scratch, ignore_errors=True)
    return code, outcomes


def hydra_main(job: Callable[[DictConfig], None]) -> None:
    """Lets Hydra do what ``sys.argv`` says, with ``job`` for every configuration."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors are told here, not by it
    hydra.main(config_path="pkg://adq_train.configs", config_name="config", version_base="1.3")(
        job
    )()


def flag_problems(args: argparse.Namespace) -> Iterator[str]:
    """Flags of Hydra that let a file say what code runs."""
    if args.experimental_rerun is not None:
        yield "--experimental-rerun: unpickles a file, which runs its code; give the command again"
    for flag in ("config_path", "config_name"):
        if getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            yield f"--{name}: is not supported; put your own choices below a --config-dir"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its number in a sweep, its overrides, its exit code, and why."""

    number: int
    name: str
    code: int
    reason: str


def keep(outcome: Outcome, folder: Path) -> None:
    """Writes an outcome for the process that began the sweep."""
    folder.mkdir(exist_ok=True)
    (folder / f"{outcome.number}.outcome.json").write_text(json.dumps(asdict(outcome)), "utf-8")


def kept(folder: Path) -> list[Outcome]:
    """The outcomes of all jobs, in their order."""
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.outcome.json")]
    return sorted((Outcome(**x) for x in found), key=lambda x: x.number)


def table_of(outcomes: Sequence[Outcome]) -> str:
    """How a sweep ended: a line for each job that is not done, with the reason."""
    failed = [x for x in outcomes if x.code]
    lines = [f"\n{len(outcomes) - len(failed)} of {len(outcomes)} runs are done"]
    for x in failed:
        first, *more = x.reason.splitlines()
        lines += [f"failed: {x.name}", f"        {first}{' …' if more else ''}"]
    if failed:
        lines.append("the same command does only these again")
    return "\n".join(lines)


def run_job(cfg: DictConfig, config_dir: str | None, whole_command: list[str]) -> Outcome:
    """Runs one configuration and reports an error as a message.

    Args:
        cfg: The composed configuration.
        config_dir: Where the user's own choices are.
        whole_command: What was typed, which of a sweep is more than this job.
    """
    from adq_train.run import pipeline
    from adq_train.training.distributed import (
        from_environment,
        is_first_to_report,
        joined,
        launch_prefix,
    )

    hydra_config = HydraConfig.get()
    # As typed: an interpolation in them is for the whole configuration to resolve.
    typed: Any = OmegaConf.to_container(hydra_config.overrides, resolve=False)
    overrides: list[str] = typed["task"]
    # Of a sweep, the command that repeats this run alone.
    where = [f"--config-dir={config_dir}"] if config_dir else []
    ranks = from_environment()
    command = [*launch_prefix(ranks), *where, *overrides]
    configure_logging(quiet=not ranks.is_main)
    sweep = hydra_config.mode == RunMode.MULTIRUN
    number = hydra_config.job.num if sweep else 0
    if sweep and ranks.is_main:
        print(f"\n══ run {number + 1}: {' '.join(overrides)}", file=sys.stderr)
    code, reason = 1, ""
    if sweep and ranks.world_size > 1:
        reason = "a sweep runs one job after the other; start each with torchrun"
        if ranks.is_main:
            show_error(UserError(reason), cfg.debug)
        return Outcome(number, " ".join(overrides), code, reason)
    try:
        require_typed_trust(cfg, overrides)
        with contextlib.ExitStack() as stack:
            with interrupts.left_alone():  # while the others are waited for
                ranks = stack.enter_context(joined())
            stack.enter_context(interrupts.caught())
            experiment = hydra_config.runtime.choices.get("experiment")
            pipeline.run(cfg, experiment, overrides, command, ranks)
        code = 0
    except interrupts.Interrupted as stop:
        code, reason = 128 + stop.number, str(stop)
        if ranks.is_main and cfg.dry_run:
            print(f"\n{stop}; nothing was kept", file=sys.stderr)
        elif ranks.is_main:
            again = command if ranks.world_size > 1 else whole_command
            print(f"\n{stop}; what is done is kept, continue with", file=sys.stderr)
            print(f"  {shlex.join(again)}", file=sys.stderr)
    except UserError as error:
        reason = str(error)
        if is_first_to_report():
            show_error(error, cfg.debug)
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = f"{type(error).__name__}: {error}"
        if full:
            reason = f"the disk is full ({error}); free some space, and the same command continues"
        if is_first_to_report():
            hint = "" if full else " (debug=true shows where)"
            print(printable(f"error: {reason}{hint}"), file=sys.stderr)
            if cfg.debug:
                traceback.print_exc()
    return Outcome(number, " ".join(overrides), code, reason)


def require_typed_trust(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses packages that a file trusts and the command line does not.

    Raises:
        ConfigError: Names them.
    """
    typed = trust_typed(overrides)
    if list(cfg.trusted_packages) != typed:
        raise ConfigError(
            [
                f"trusted_packages: {list(cfg.trusted_packages)} comes from a file; if you "
                "trust them, give them on the command line"
            ]
        )


def configure_logging(quiet: bool = False) -> None:
    """Messages of the program to standard error, without decoration; quiet: nowhere."""
    logger = logging.getLogger("adq_train")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    # A log that a full disk does not take is no reason for tracebacks.
    logging.raiseExceptions = False
    # TensorBoard's thread hands its errors to whoever writes next, who tells them.
    threading.excepthook = lambda failed: logger.debug("a thread failed: %s", failed.exc_value)
    console = Console(logging.INFO)
    console.setFormatter(PrintableFormatter())
    logger.handlers = [logging.NullHandler()] if quiet else [console]


class Console(logging.Handler):
    """Writes messages to standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        tqdm.write(self.format(record), file=sys.stderr)


def show_error(error: UserError, debug: bool) -> None:
    """One message, and the traceback where it was asked for."""
    if debug:
        traceback.print_exception(error)
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    lead = "error: " if len(problems) == 1 else f"{len(problems)} errors:\n  "
    print(printable(lead + "\n  ".join(problems)), file=sys.stderr)


def fail(error: UserError) -> NoReturn:
    """Reports an error of the command line, once for all processes of a run, and exits."""
    if speaks():
        show_error(error, debug=any(a in ("debug=true", "debug=True") for a in sys.argv))
    sys.exit(2)
