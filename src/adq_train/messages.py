"""What programs say on standard error: their log, and errors as one message."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback

from adq_train.errors import ConfigError, UserError
from adq_train.printable import PrintableFormatter, printable


def speaks() -> bool:
    """Whether this process reports: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


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
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def show_error(error: UserError, debug: bool) -> None:
    """One message, and the traceback where it was asked for."""
    if debug:
        traceback.print_exception(error)
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    lead = "error: " if len(problems) == 1 else f"{len(problems)} errors:\n  "
    print(printable(lead + "\n  ".join(problems)), file=sys.stderr)
