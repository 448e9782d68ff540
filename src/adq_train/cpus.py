"""The CPUs of this process. Imports nothing that takes time."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(allowed(0)) if allowed else os.cpu_count() or 1
