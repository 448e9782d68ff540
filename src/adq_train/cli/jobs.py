"""The jobs of a command: one, or every combination of a sweep; each runs and says how it ended."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from adq_train import interrupts
from adq_train.cli.overrides import trust_typed
from adq_train.cli.sources import composing
from adq_train.cli.values import parse
from adq_train.errors import ConfigError, UserError
from adq_train.messages import configure_logging, show_error, speaks
from adq_train.printable import printable


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its overrides, its exit code, and why."""

    name: str
    code: int
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """One run that a command asks for. It goes to another process as it is.

    Attributes:
        overrides: Of this run alone.
        number: Its place in a sweep, from 1; 0 where it is the only one.
        config_dir: Where the user's own choices are.
        whole_command: What was typed, which of a sweep is more than this job.
    """

    overrides: tuple[str, ...]
    number: int
    config_dir: str | None
    whole_command: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        """Its overrides, without those that are for Hydra."""
        return [text for text in self.overrides if not text.lstrip("+~").startswith("hydra")]

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return " ".join(self.settings)

    def configuration(self) -> DictConfig:
        """Its configuration, with Hydra's own section.

        Raises:
            ConfigError: It cannot be composed.
        """
        with composing(self.config_dir) as compose:
            return compose(self.overrides)

    def __call__(self) -> Outcome:
        """Runs it in this process, which may be on another machine."""
        return run_job(self, self.configuration())

    def checkpoint(self) -> Any:
        """Submitit asks for this when a job's time is over: the same again, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def combinations(overrides: Sequence[str], params: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The overrides of each job of a sweep, in the order of the command line.

    Args:
        overrides: The command line; values with commas and ranges are swept over.
        params: What the configuration sweeps over besides (``hydra.sweeper.params``).
    """
    choices: dict[str, list[str]] = {}
    for override in map(parse, [*(f"{k}={v}" for k, v in params.items()), *overrides]):
        key = override.get_key_element()
        choices[key] = (
            [f"{key}={value}" for value in override.sweep_string_iterator()]
            if override.is_sweep_override()
            else [override.input_line or ""]
        )
    return list(itertools.product(*choices.values()))


def run_job(job: Job, cfg: DictConfig) -> Outcome:
    """Runs one configuration and reports an error as a message.

    Args:
        job: What is asked for.
        cfg: Its configuration, with Hydra's own section.
    """
    if "torch" not in sys.modules and speaks():
        print("adq-train: loading PyTorch …", file=sys.stderr)
    from adq_train.run import pipeline
    from adq_train.training.distributed import (
        from_environment,
        is_first_to_report,
        joined,
        launch_prefix,
    )

    HydraConfig.instance().set_config(cfg)  # for ${hydra:…} in a value
    experiment = cfg.hydra.runtime.choices.get("experiment")
    with open_dict(cfg):
        del cfg["hydra"]
    where = [f"--config-dir={job.config_dir}"] if job.config_dir else []
    ranks = from_environment()
    # Of a sweep, the command that repeats this run alone.
    command = [*launch_prefix(ranks), *where, *job.settings]
    configure_logging(quiet=not ranks.is_main)
    if job.number and ranks.is_main:
        print(f"\n══ run {job.number}: {job.name}", file=sys.stderr)
    code, reason = 1, ""
    try:
        if job.number and ranks.world_size > 1:
            raise UserError("a sweep runs one job after the other; start each with torchrun")
        require_typed_trust(cfg, job.settings)
        with contextlib.ExitStack() as stack:
            with interrupts.left_alone():  # while the others are waited for
                ranks = stack.enter_context(joined())
            stack.enter_context(interrupts.caught())
            pipeline.run(cfg, experiment, job.settings, command, ranks)
        code = 0
    except interrupts.Interrupted as stop:
        code, reason = 128 + stop.number, str(stop)
        if ranks.is_main and cfg.dry_run:
            print(f"\n{stop}; nothing was kept", file=sys.stderr)
        elif ranks.is_main:
            again = command if ranks.world_size > 1 else job.whole_command
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
    return Outcome(job.name, code, reason)


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


def table_of(outcomes: Sequence[Outcome]) -> str:
    """How a sweep ended: a line for each job that is not done, with the reason."""
    failed = [x for x in outcomes if x.code]
    lines = [f"\n{len(outcomes) - len(failed)} of {len(outcomes)} runs are done"]
    for x in failed:
        first, *more = x.reason.splitlines() or [""]
        lines += [f"failed: {x.name}", f"        {first}{' …' if more else ''}"]
    if failed:
        lines.append("the same command does only these again")
    return "\n".join(lines)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """That of a command: a signal's where one came, else whether a job failed."""
    codes = [x.code for x in outcomes]
    return max((code for code in codes if code >= 128), default=int(any(codes)))


def leave(code: int) -> None:
    """Ends the process where that is not a success."""
    if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # What PyTorch does at exit would wait for processes that may be gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
