"""How each of the six programs begins and ends: version, signals, output, errors, exit code.

Imports nothing that takes time, so that Ctrl-C is answered from the first moment.
"""

from __future__ import annotations

import errno
import importlib
import signal
import sys
import traceback
from functools import partial
from typing import NoReturn

from adq_train import __version__, interrupts
from adq_train.cli import streams, threads
from adq_train.errors import ConfigError, UserError
from adq_train.messages import show_error, speaks
from adq_train.printable import printable

PROGRAMS = {
    "adq-train": "adq_train.cli.train:main",
    "adq-report": "adq_train.cli.report:main",
    "adq-pareto": "adq_train.cli.pareto:main",
    "adq-export": "adq_train.cli.export:export_main",
    "adq-eval": "adq_train.cli.export:eval_main",
    "adq-clean": "adq_train.cli.clean:main",
}


def run(name: str, needs_output: bool = True) -> NoReturn:
    """Runs a program and ends the process.

    Args:
        name: Of the program.
        needs_output: Whether output that is lost makes a failure of a success: exit code 141 where
            the reader went away, as after SIGPIPE, and 1 where the output could not be written.
    """
    code = 1
    try:
        with interrupts.caught(leave_imports=True):
            out, _ = streams.survive()
            code = act(name)
            sys.stdout.flush()
            sys.stderr.flush()
            if code == 0 and out.error is not None and needs_output:
                gone = out.error.errno in (errno.EPIPE, errno.EIO)
                code = 128 + signal.SIGPIPE if gone else 1
                if not gone:
                    print(f"error: cannot write the output ({out.error.strerror})", file=sys.stderr)
    except interrupts.Interrupted as stop:
        code = 128 + stop.number
        interrupts.say(stop)
    sys.exit(code)


def act(name: str) -> int:
    """The program itself, which is imported here.

    Returns:
        Its exit code: 2 where the command line is wrong, 1 after another error.
    """
    if "--version" in sys.argv[1:]:
        print(f"{name} {__version__}")
        return 0
    threads.prepare()
    debug = bool({"--debug", "debug=true", "debug=True"} & set(sys.argv))
    sys.argv = [x for x in sys.argv if x != "--debug"]
    module, _, attribute = PROGRAMS[name].partition(":")
    try:
        getattr(importlib.import_module(module), attribute)()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(printable(str(end.code)), file=sys.stderr)
            return 1
        return end.code or 0
    except UserError as error:
        if speaks():  # once for all processes of a run
            show_error(error, debug)
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())
        hint = f" ({name} --debug … shows where)"
        print(printable(f"error: {type(error).__name__}: {reason}{hint}"), file=sys.stderr)
        return 1
    return 0


# A run keeps its result in files; that nobody reads its words does not change how it ended.
train = partial(run, "adq-train", needs_output=False)
report, pareto, export, evaluate, clean = (partial(run, name) for name in [*PROGRAMS][1:])
