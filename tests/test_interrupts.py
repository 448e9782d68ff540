"""Signals: at once, or held back until somebody asks."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adq_train import interrupts
from adq_train.interrupts import Interrupted, caught, deferred


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_block_at_once(number):
    before = signal.getsignal(number)

    def wait():
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("it went on")

    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as stop, caught():
        wait()
    assert stop.value.number == number
    assert signal.getsignal(number) is before


def test_a_held_signal_waits_to_be_asked_for():
    seen = []

    def work(received):
        seen.append(received())
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(received())
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what was received already
        seen.append(received())

    with pytest.raises(Interrupted), caught(), deferred() as received:
        work(received)
    assert seen == [0, signal.SIGTERM, signal.SIGTERM]


def test_the_next_run_of_a_process_begins_without_the_signal_of_the_last():
    with pytest.raises(Interrupted), caught():
        os.kill(os.getpid(), signal.SIGTERM)
    with caught(), deferred() as received:
        assert received() == 0


def test_a_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal, time\n"
        "from adq_train import interrupts\n"
        "interrupts.ONE_CTRL_C_SECONDS = 0.05\n"
        "with interrupts.caught(), interrupts.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_worker_leaves_the_signal_to_the_run():
    with caught():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_another_thread_catches_nothing():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work():
        with caught():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_a_process_ends_with_its_parent(tmp_path):
    program = (
        "import subprocess, sys, time, os\n"
        "child = 'from adq_train.interrupts import end_with_parent as e; import time; e(); "
        'open("ready", "w").close(); time.sleep(60)\'\n'
        "process = subprocess.Popen([sys.executable, '-c', child])\n"
        "while not os.path.exists('ready'): time.sleep(0.01)\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    end = time.monotonic() + 10
    child = Path("/proc", done.stdout.strip(), "cmdline")
    while time.monotonic() < end and child.exists() and child.read_bytes():  # a zombie has none
        time.sleep(0.01)
    assert not (child.exists() and child.read_bytes())


def test_an_orphan_ends_itself(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(interrupts.ctypes, "CDLL", lambda _: FakeC())
    if sys.platform == "linux":
        with pytest.raises(SystemExit):
            interrupts.end_with_parent()


class FakeC:
    def prctl(self, *arguments):
        assert arguments == (1, signal.SIGTERM)
