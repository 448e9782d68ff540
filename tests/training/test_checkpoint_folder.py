import errno
import hashlib
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adq_train.errors import UserError
from adq_train.storage import files
from adq_train.training import checkpoint_folder as checkpoint
from adq_train.training.checkpoint_folder import CheckpointFolder

KEY = "a" * 64
ALL = ("last", "previous", "best")


def state(epoch, key=KEY):
    return {"key": key, "epoch": epoch, "weights": torch.full((50,), float(epoch))}


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


@pytest.fixture
def messages(caplog, monkeypatch):
    # The command line, which other tests run in this process, keeps messages from the root logger.
    monkeypatch.setattr(logging.getLogger("adq_train"), "propagate", True)
    caplog.set_level(logging.DEBUG, "adq_train")
    return caplog


def epochs(folder, key=KEY):
    """The epoch of each file as a new process would load it."""
    found = {name: CheckpointFolder(folder.folder).load(key, (name,)) for name in ALL}
    return {name: content and content["epoch"] for name, content in found.items()}


def loaded(folder):
    content = CheckpointFolder(folder.folder).load(KEY)
    return content and content["epoch"]


def sums_hold(folder):
    """What ``sha256sum --check --strict`` asks for, and that no checkpoint is left out."""
    listed = {}
    for line in (folder.folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line[:64], line[66:]
        assert line[64:66] == "  "
        assert name not in listed
        listed[name] = digest
    there = {path.name: path for path in folder.folder.glob("*.pt")}
    return listed == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()
    }


def test_everything_that_training_keeps_comes_back(folder):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "key": KEY, "epoch": 3, "best_top1_percent": 12.5, "seconds": 0.25, "nothing": None,
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "rng": [torch.get_rng_state()], "bits": (2, 3), "frozen": True,
    }  # fmt: skip
    folder.save(content)
    found = CheckpointFolder(folder.folder).load(KEY)
    assert {k: found[k] for k in ("key", "epoch", "best_top1_percent", "seconds", "nothing")} == {
        "key": KEY, "epoch": 3, "best_top1_percent": 12.5, "seconds": 0.25, "nothing": None
    }  # fmt: skip
    assert (found["bits"], found["frozen"]) == ((2, 3), True)
    for name, value in model.state_dict().items():
        assert torch.equal(found["model"][name], value)
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(found["optimizer"]["state"][index][name], value)
    assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(found["rng"][0], torch.get_rng_state())


def test_nothing_there(folder):
    assert folder.load(KEY) is None
    assert not folder.folder.exists()


def test_last_previous_and_best(folder):
    folder.save(state(1), best=True)
    assert epochs(folder) == {"last": 1, "previous": None, "best": 1}
    folder.save(state(2), best=True)
    assert epochs(folder) == {"last": 2, "previous": 1, "best": 2}
    folder.save(state(3))
    assert epochs(folder) == {"last": 3, "previous": 2, "best": 2}
    folder.save(state(4))
    assert epochs(folder) == {"last": 4, "previous": 3, "best": 2}
    assert loaded(folder) == 4
    names = {path.name for path in folder.folder.iterdir()}
    assert names == {"SHA256SUMS", "last.pt", "previous.pt", "best.pt"}


@pytest.mark.parametrize("best", [True, False])
def test_sums_are_those_of_the_files_after_every_save(folder, best):
    for epoch in range(1, 4):
        folder.save(state(epoch), best=best and epoch != 2)
        assert sums_hold(folder)
    if shutil.which("sha256sum"):
        check = f"cd {folder.folder} && sha256sum --check --strict --quiet SHA256SUMS"
        assert os.system(check) == 0


def test_a_file_system_without_links(folder, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    folder.save(state(1), best=True)
    folder.save(state(2))
    assert epochs(folder) == {"last": 2, "previous": 1, "best": 1}
    assert sums_hold(folder)


# ── Killed at any moment

WATCHED = {files.__file__, checkpoint.__file__}


def traced(save, at_line):
    """Calls ``save``, and ``at_line(number)`` before each line of the code that saves, from 1."""
    number = 0

    def trace(frame, event, argument):
        nonlocal number
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            number += 1
            sys.settrace(None)  # looking is no line of its own
            at_line(number)
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        save()
    finally:
        sys.settrace(None)


def copy_of(folder, to):
    """A copy as ``cp -a`` makes one: two names of one file stay that."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    names = {}
    for path in folder.folder.iterdir():
        first = names.setdefault(path.stat().st_ino, to / path.name)
        if first == to / path.name:
            shutil.copy2(path, first)
        else:
            os.link(first, to / path.name)
    return CheckpointFolder(to)


def content_of(folder):
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.folder.iterdir()}


def left_by_kills(folder, root, content, best):
    """What a kill before each line of a save would leave: folders, each that differs once."""
    left, before = [], None

    def look(number):
        nonlocal before
        found = content_of(folder) if folder.folder.exists() else {}
        if found != before:
            before = found
            left.append(copy_of(folder, root / str(number)) if found else None)

    traced(lambda: folder.save(content, best=best), look)
    return left


def contents(folder):
    return sorted(path.read_bytes() for path in folder.folder.iterdir())


def test_a_killed_process_leaves_what_is_looked_at_here(folder, tmp_path):
    folder.save(state(1), best=True)
    killed, seen = copy_of(folder, tmp_path / "killed"), []
    traced(lambda: folder.save(state(9), best=True), lambda number: seen.append(contents(folder)))
    middle = len(seen) // 2
    assert middle > 15
    child = os.fork()
    if child == 0:
        traced(
            lambda: killed.save(state(9), best=True),
            lambda number: os._exit(9) if number == middle else None,
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert contents(killed) == seen[middle - 1]
    assert contents(killed) not in (seen[0], seen[-1])


def test_a_kill_at_any_line_leaves_the_old_or_the_new_checkpoint(folder, tmp_path):
    for epoch in (1, 2):
        folder.save(state(epoch), best=True)
    outcomes = []
    for broken in left_by_kills(folder, tmp_path, state(9), True):
        outcomes.append(loaded(broken))
        found = epochs(broken)
        # The best one is never lost, and never older than what the newest state believes.
        assert found["best"] in (2, 9)
        if loaded(broken) == 9:
            assert found["best"] == 9
        # The next save puts everything in order.
        broken.save(state(10), best=True)
        assert loaded(broken) == 10
        assert epochs(broken)["best"] == 10
        assert sums_hold(broken)
    assert set(outcomes) == {2, 9}
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 8


def test_a_kill_during_the_first_save(folder, tmp_path):
    nothing, *left = left_by_kills(folder, tmp_path, state(1), True)
    assert nothing is None
    for first in left:
        assert loaded(first) in (None, 1)
        first.save(state(2))
        assert loaded(first) == 2
        assert sums_hold(first)
    assert len(left) > 5


def test_a_kill_while_a_damaged_checkpoint_is_replaced(folder, tmp_path):
    for epoch in (1, 2):
        folder.save(state(epoch))
    flip_a_bit(folder.folder / "last.pt")
    left = left_by_kills(folder, tmp_path, state(9), False)
    assert {loaded(broken) for broken in left} == {1, 9}


def test_a_kill_in_the_middle_of_writing(folder, monkeypatch):
    folder.save(state(1))
    folder.save(state(2))
    save = torch.save

    def half(content, file):
        save(content, file)
        file.truncate(file.tell() // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        folder.save(state(3))
    assert epochs(folder) == {"last": 2, "previous": 1, "best": None}


def test_an_interrupt_at_any_system_call(folder, tmp_path, monkeypatch):
    """Ctrl-C, where Python's own cleaning up still runs."""
    folder.save(state(1), best=True)
    calls = [(os, "fsync"), (os, "link"), (os, "open"), (Path, "replace"), (Path, "unlink")]
    interrupted = 0
    for owner, name in calls:
        original = getattr(owner, name)
        for position in range(1, 20):
            broken = copy_of(folder, tmp_path / "broken")
            count = 0

            def interrupt(*arguments, original=original, position=position, **more):
                nonlocal count
                count += 1
                if count == position:
                    raise KeyboardInterrupt
                return original(*arguments, **more)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupt)
                try:
                    broken.save(state(9), best=True)
                except KeyboardInterrupt:
                    interrupted += 1
                else:
                    break
            assert loaded(broken) in (1, 9)
            assert epochs(broken)["best"] in (1, 9)
    assert interrupted > 15


# ── Damage


def flip_a_bit(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_one_damaged_bit_in_the_last_means_the_previous(folder, messages, position):
    for epoch in (1, 2):
        folder.save(state(epoch))
    flip_a_bit(folder.folder / "last.pt", position)
    assert loaded(folder) == 1
    assert "last.pt is damaged (its SHA-256 is not in SHA256SUMS); not used" in messages.text
    folder.save(state(3))
    assert epochs(folder) == {"last": 3, "previous": 1, "best": None}
    assert sums_hold(folder)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_last_means_the_previous(folder, messages, share):
    for epoch in (1, 2):
        folder.save(state(epoch))
    path = folder.folder / "last.pt"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert loaded(folder) == 1
    assert "last.pt is damaged" in messages.text


def test_both_damaged_means_to_start_anew(folder, messages):
    for epoch in (1, 2):
        folder.save(state(epoch))
    for name in ("last", "previous"):
        flip_a_bit(folder.folder / f"{name}.pt")
    assert loaded(folder) is None
    assert "last.pt is damaged" in messages.text
    assert "previous.pt is damaged" in messages.text


def test_any_damaged_bit_in_the_sums_costs_at_most_one_checkpoint(folder):
    for epoch in (1, 2):
        folder.save(state(epoch))
    path = folder.folder / "SHA256SUMS"
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (1, 128):
            damaged = bytearray(content)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            assert loaded(folder) in (1, 2)


def test_lost_sums(folder, messages):
    folder.save(state(1))
    (folder.folder / "SHA256SUMS").unlink()
    assert loaded(folder) is None
    assert "last.pt is damaged" in messages.text


def test_a_checkpoint_of_another_run_is_left_alone(folder, messages):
    folder.save(state(1), best=True)
    assert folder.load("b" * 64) is None
    assert "last.pt belongs to a run with other settings; not used" in messages.text
    assert loaded(folder) == 1
    folder.save(state(5, key="b" * 64))
    assert folder.load(KEY)["epoch"] == 1
    assert folder.load("b" * 64)["epoch"] == 5


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(folder, tmp_path, messages):
    folder.save(state(1))
    folder.save({**state(2), "extra": Runs(tmp_path / "trace")})
    assert loaded(folder) == 1
    assert not (tmp_path / "trace").exists()
    assert "last.pt cannot be read" in messages.text
    # The attack works on whoever trusts the file.
    torch.load(folder.folder / "last.pt", weights_only=False)
    assert (tmp_path / "trace").exists()


def test_a_file_of_something_else_with_a_right_sum(folder, messages):
    folder.save(state(1))
    folder.save([1, 2, 3])
    assert loaded(folder) == 1


# ── A full disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    for epoch in (1, 2):
        folder.save(state(epoch), best=True)
    before = {path.name: path.read_bytes() for path in folder.folder.iterdir()}
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda state, _: write(state, Path("/dev/full")))
    message = f"cannot write {folder.folder}/last.pt: No space left on device"
    with pytest.raises(UserError, match=message):
        folder.save({**state(3), "large": torch.zeros(100_000)}, best=True)
    assert {path.name: path.read_bytes() for path in folder.folder.iterdir()} == before


@pytest.mark.parametrize("large", [False, True])
def test_a_disk_that_becomes_full_at_any_call(folder, tmp_path, monkeypatch, large):
    folder.save(state(1), best=True)
    content = {**state(9), "large": torch.zeros(100_000 if large else 1)}
    messages: list[str] = []
    for owner, name in ((os, "fsync"), (Path, "open"), (Path, "write_text"), (Path, "replace")):
        original = getattr(owner, name)
        for position in range(1, 20):
            broken = copy_of(folder, tmp_path / "broken")
            count = 0

            def fail(*arguments, original=original, position=position, **more):
                nonlocal count
                count += 1
                if count == position:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return original(*arguments, **more)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fail)
                try:
                    broken.save(content, best=True)
                except UserError as error:
                    messages.append(str(error))
                except OSError:
                    # Reading what is there; a full disk does not fail that.
                    assert name == "open"
                else:
                    break
            assert loaded(broken) in (1, 9)
            assert epochs(broken)["best"] in (1, 9)
            assert not list(broken.folder.glob(".*.tmp"))
    assert len(messages) > 10
    assert all("No space left on device" in message for message in messages)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=f"cannot make {tmp_path}/file/checkpoints"):
        CheckpointFolder(tmp_path / "file" / "checkpoints").save(state(1))


def test_what_cannot_be_saved_at_all_is_a_mistake_of_the_program(folder):
    folder.save(state(1))
    with pytest.raises(Exception, match=r"pickle|local") as caught:
        folder.save({**state(2), "function": lambda: None})
    assert not isinstance(caught.value, UserError)
    assert loaded(folder) == 1


def test_the_best_outlives_a_save_over_what_a_kill_left(folder):
    folder.save(state(1), best=True)
    # Killed after best.pt has got its name, before last.pt has.
    os.link(folder.folder / "best.pt", folder.folder / ".last.pt.0123abcd.tmp")
    folder.save(state(2))
    assert epochs(folder) == {"last": 2, "previous": 1, "best": 1}
    assert sums_hold(folder)
