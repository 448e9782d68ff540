"""Ctrl-C and SIGTERM: at once where nothing is lost, else after the step that is under way."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

# torchrun passes a Ctrl-C on that its processes have received already; that is no second one.
ONE_CTRL_C_SECONDS = 1.0


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


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into :class:`Interrupted` during a with block.

    A second signal ends the process at once. Does nothing outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def receive(number: int, _: object) -> None:
        if os.getpid() != process:  # a loader's worker, which the run will end itself
            return
        now = time.monotonic()
        if _State.number is None:
            _State.number, _State.since = number, now
        elif now - _State.since > ONE_CTRL_C_SECONDS:
            os._exit(128 + number)
        else:
            return
        if not _State.holders:
            raise Interrupted(number)

    _State.number = None
    before = {x: signal.signal(x, receive) for x in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.number = None


@contextlib.contextmanager
def held() -> Iterator[Callable[[], int]]:
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
