"""Runs that are killed at random moments, and disks that are full; slow."""

import contextlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import QUICK

SCRIPT = Path(__file__).parents[1] / "scripts" / "kill_test.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes through /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_end_with_the_bits_of_one_that_was_not(tmp_path, processes):
    report = runpy.run_path(str(SCRIPT))["kill_runs"](tmp_path, processes, kills=6, seed=1)
    assert not report.wrong
    assert sum(report.kills.values()) >= 6


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A file system of that size, which only root may make."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def adq_train(folder, *more):
    return subprocess.run(
        [sys.executable, "-m", "adq_train", *QUICK, "run_dir=run", *more],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [16, 100, 200])
def test_a_full_disk_is_told_and_the_run_continues_on_a_larger_one(tmp_path, kilobytes):
    disk = tmp_path / "disk"
    with small_disk(disk, kilobytes):
        done = adq_train(disk)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "No space left on device" in done.stderr
        assert done.stderr.count("\nerror: ") == 1
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = adq_train(disk)
        assert again.returncode == 0, again.stderr
