"""How OpenMP's threads behave, said in the environment before torch is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from adq_train.cpus import usable_cpus

# What says how long a thread that waits spins before it sleeps; one of them is enough.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CGROUPS = Path("/sys/fs/cgroup")


def defaults(environment: Mapping[str, str], cpus: int, quota: float | None) -> dict[str, str]:
    """What to add to an environment; the user's own setting wins.

    Waiting threads sleep: those that spin take the time of the threads that they wait for, where
    others use the cores too. And there are no more threads than a container may use cores: OpenMP
    counts the cores that the process may be moved to, not its share of them.

    Args:
        environment: The variables so far.
        cpus: Cores that the process may run on.
        quota: Cores' worth of time that it may use, or None.
    """
    new: dict[str, str] = {}
    if not any(name in environment for name in WAITING):
        new["OMP_WAIT_POLICY"] = "PASSIVE"
    if "OMP_NUM_THREADS" not in environment and quota is not None and math.ceil(quota) < cpus:
        new["OMP_NUM_THREADS"] = str(max(math.ceil(quota), 1))
    return new


def cpu_quota(cgroups: Path = CGROUPS) -> float | None:
    """The cores' worth of time that a container leaves to its processes; None without a limit."""
    with suppress(OSError, ValueError):
        share, period = (cgroups / "cpu.max").read_text().split()
        return float(share) / float(period) if share != "max" else None
    with suppress(OSError, ValueError):  # version 1
        share, period = ((cgroups / f"cpu/cpu.cfs_{x}_us").read_text() for x in ("quota", "period"))
        return float(share) / float(period) if float(share) > 0 else None
    return None


def prepare() -> None:
    """Applies :func:`defaults` to this process, and to those that it starts."""
    os.environ.update(defaults(os.environ, usable_cpus(), cpu_quota()))
