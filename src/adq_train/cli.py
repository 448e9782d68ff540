"""Entry points: compose, validate, run; nothing else.

Torch is imported only when a run begins, so that ``--help`` and completion answer at once.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import traceback
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from tqdm import tqdm

from adq_train.errors import ConfigError, UserError
from adq_train.overrides import problems_of
from adq_train.schema import register


def main() -> None:
    """``adq-train``: float model → sensitivity → bit allocation → QAT → result."""
    # Appending an experiment would let it win over an ablation; selecting it keeps the order.
    argv = [re.sub(r"^\+(experiment|comparison|ablation)=", r"\1=", text) for text in sys.argv[1:]]
    args = get_args_parser().parse_args(argv)
    register()
    if not (args.help or args.hydra_help or args.shell_completion):
        problems = problems_of(args.overrides, args.config_dir)
        if problems:
            fail(ConfigError(problems))
    outcomes: dict[str, bool] = {}

    @hydra.main(config_path="pkg://adq_train.configs", config_name="config", version_base="1.3")
    def job(cfg: DictConfig) -> None:
        name = " ".join(HydraConfig.get().overrides.task)
        outcomes[name] = run_job(cfg, args.config_dir)

    with tempfile.TemporaryDirectory() as scratch:
        # Hydra's own record of a sweep says less than the folders of its runs; it goes away.
        given = any(argument.startswith("hydra.sweep.dir=") for argument in argv)
        sys.argv[1:] = argv if given else [*argv, f"hydra.sweep.dir={scratch}"]
        job()
    failed = [name for name, went_well in outcomes.items() if not went_well]
    if len(outcomes) > 1:
        print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} runs are done", file=sys.stderr)
        for name in failed:
            print(f"failed: {name}", file=sys.stderr)
    if failed:
        sys.exit(1)


def run_job(cfg: DictConfig, config_dir: str | None) -> bool:
    """Runs one configuration and reports an error as a message; whether it went well."""
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    # Of a sweep, the command that repeats this run alone.
    where = [f"--config-dir={config_dir}"] if config_dir else []
    command = ["adq-train", *where, *overrides]
    configure_logging()
    if hydra_config.mode == RunMode.MULTIRUN:
        print(f"\n══ run {hydra_config.job.num + 1}: {' '.join(overrides)}", file=sys.stderr)
    try:
        from adq_train import pipeline

        pipeline.run(cfg, hydra_config.runtime.choices.get("experiment"), overrides, command)
    except UserError as error:
        show_error(error, cfg.debug)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        print(f"error: {type(error).__name__}: {error} (debug=true shows where)", file=sys.stderr)
        if cfg.debug:
            traceback.print_exc()
    else:
        return True
    return False


def configure_logging() -> None:
    """Messages of the program to standard error, without decoration."""
    logger = logging.getLogger("adq_train")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(Console(logging.INFO))


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
    print(lead + "\n  ".join(problems), file=sys.stderr)


def fail(error: UserError) -> NoReturn:
    """Reports an error of the command line and exits."""
    show_error(error, debug=any(a in ("debug=true", "debug=True") for a in sys.argv))
    sys.exit(2)
