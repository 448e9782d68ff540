"""Ctrl-C, SIGTERM, SIGHUP: at once where nothing is lost, else after the step under way."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from adq_train.messages import speaks

# torchrun passes a Ctrl-C on that its processes have received already; that is no second one.
ONE_CTRL_C_SECONDS = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def end_with_parent() -> None:
    """Asks Linux for SIGTERM when the parent dies, for torchrun leaves its processes behind."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
        if os.getppid() == 1:  # it is dead already
            sys.exit(1)


class _State:
    """What has been received, for the process: signals know no other scope."""

    number: int | None = None
    since = 0.0
    holders = 0


def say(stop: Interrupted) -> None:
    """Tells a person, once for all processes of a run, that a program was stopped."""
    if speaks():
        print(f"\n{stop}", file=sys.stderr, flush=True)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported; an exception may be swallowed there."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def caught(leave_imports: bool = False) -> Iterator[None]:
    """Turns SIGINT, SIGTERM and SIGHUP into :class:`Interrupted` during a with block.

    A second signal ends the process at once. Does nothing outside of the main thread. SIGHUP stays
    ignored where it was (nohup).

    Args:
        leave_imports: End the process at once where one comes while a module is imported: nothing
            is under way then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a loader's worker, which the run will end itself
            return
        now = time.monotonic()
        if _State.number is None:
            _State.number, _State.since = number, now
        elif now - _State.since > ONE_CTRL_C_SECONDS:
            os._exit(128 + number)
        else:
            return
        if leave_imports and _importing(frame):
            with contextlib.suppress(Exception):  # the stream may be in the middle of a write
                say(Interrupted(number))
            os._exit(128 + number)
        if not _State.holders:
            raise Interrupted(number)

    _State.number = None
    heard = [x for x in SIGNALS if x != signal.SIGHUP or signal.getsignal(x) != signal.SIG_IGN]
    before = {x: signal.signal(x, receive) for x in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.number = None


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process during a with block, whatever it is waiting for."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {x: signal.getsignal(x) for x in numbers}
    alone = threading.current_thread() is threading.main_thread()
    changed = [x for x in numbers if alone and before[x] != signal.SIG_IGN]
    for number in changed:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Keeps signals back during a with block; gives a way to ask for one that has come.

    Yields:
        The number of the signal that was received, or 0.

    Raises:
        Interrupted: After the block, where one has come and nobody has acted on it.
    """
    _State.holders += 1
    try:
        yield lambda: _State.number or 0
    finally:
        _State.holders -= 1
    if _State.number is not None and not _State.holders:
        raise Interrupted(_State.number)
