import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.errors import UserError
from adq_train.files import sha256, sync_folder, write_text, written_whole


def files(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_takes_its_name_when_the_block_succeeds(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with written_whole(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert files(tmp_path) == {"x.txt": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def half_way():
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        half_way()
    assert files(tmp_path) == {"x.txt": "old"}


def test_text_is_written_as_utf8(tmp_path):
    write_text(tmp_path / "x", "1 … 2\n")
    assert (tmp_path / "x").read_bytes() == b"1 \xe2\x80\xa6 2\n"


def test_what_a_kill_left_behind_is_overwritten(tmp_path):
    (tmp_path / ".x.tmp").write_text("a longer text that was cut off")
    write_text(tmp_path / "x", "new")
    assert files(tmp_path) == {"x": "new"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path):
    (tmp_path / "x").write_text("old")
    (tmp_path / ".x.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/x: No space left on device"):
        write_text(tmp_path / "x", "new")
    assert files(tmp_path) == {"x": "old"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_at_any_step(tmp_path, monkeypatch, step):
    (tmp_path / "x").write_text("old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(tmp_path / "x", "new")
    assert files(tmp_path) == {"x": "old"}


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/no/x: No such file"):
        write_text(tmp_path / "no" / "x", "new")


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(descriptor):
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def noting_replace(self, target):
        events.append(("replace", self.name, target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    write_text(tmp_path / "x", "new")
    assert events == [("fsync", ".x.tmp"), ("replace", ".x.tmp", "x"), ("fsync", tmp_path.name)]


def test_sync_folder_leaves_no_descriptor_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    sync_folder(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=200))
def test_sha256_of_a_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_sha256_of_more_than_one_block(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
