import errno
import hashlib
import os
import re
import secrets
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.errors import UserError
from adq_train.storage.files import (
    clear_leftovers,
    outward_link,
    sha256,
    sync_folder,
    write_text,
    written_whole,
)


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


def test_what_killed_runs_left_is_cleared_and_what_is_being_written_is_not(tmp_path):
    (tmp_path / ".x.0123abcd.tmp").write_text("a longer text that was cut off")
    os.link(tmp_path / ".x.0123abcd.tmp", tmp_path / "kept")
    (tmp_path / ".x.ffffffff.tmp").symlink_to("nowhere")
    for name in (".y.0123abcd.tmp", ".x.tmp", "x.0123abcd.tmp"):  # another file's, or a user's
        (tmp_path / name).write_text("stays")
    with written_whole(tmp_path / "x") as temporary:
        temporary.write_text("slow")
        write_text(tmp_path / "x", "new")
        clear_leftovers(tmp_path, "x")
        assert temporary.read_text() == "slow"
    rest = {"kept", ".y.0123abcd.tmp", ".x.tmp", "x.0123abcd.tmp", "x"}
    assert files(tmp_path).keys() == rest
    assert files(tmp_path)["x"] == "slow"
    assert (tmp_path / "kept").read_text() == "a longer text that was cut off"
    clear_leftovers(tmp_path)
    assert files(tmp_path).keys() == rest - {".y.0123abcd.tmp"}


def test_no_link_leads_a_write_elsewhere(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").symlink_to(mine)
    (folder / ".x.tmp").symlink_to(mine)
    write_text(folder / "x", "new")
    assert (folder / "x").read_text() == "new"
    assert not (folder / "x").is_symlink()
    # Even one that guesses the name.
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0123abcd")
    (folder / ".y.0123abcd.tmp").symlink_to(mine)
    monkeypatch.setattr("adq_train.storage.files.clear_leftovers", lambda *_: None)
    with pytest.raises(UserError, match="y: File exists"):
        write_text(folder / "y", "new")
    assert mine.read_text() == "precious"


def test_names_of_temporary_files_differ(tmp_path):
    names = set()
    for _ in range(5):
        with written_whole(tmp_path / "x") as temporary:
            names.add(temporary.name)
            temporary.write_text("")
    assert len(names) == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path):
    (tmp_path / "x").write_text("old")

    def fill():
        with written_whole(tmp_path / "x") as temporary:
            temporary.write_text("half")
            Path("/dev/full").write_text("new")

    with pytest.raises(UserError, match=f"cannot write {tmp_path}/x: No space left on device"):
        fill()
    assert files(tmp_path) == {"x": "old"}


def test_links_that_lead_out_of_a_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("")
    (folder / "sub" / "inside").symlink_to("../file")
    assert outward_link(folder) is None
    (tmp_path / "alias").symlink_to(folder)
    assert outward_link(tmp_path / "alias") is None
    for target in (tmp_path, tmp_path / "not-there", Path("../../up")):
        link = folder / "sub" / "out"
        link.symlink_to(target)
        assert outward_link(folder) == link
        link.unlink()


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
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        events.append(("fsync", re.sub(r"\.[0-9a-f]{8}\.", ".", name)))
        fsync(descriptor)

    def noting_replace(self, target):
        events.append(("replace", re.sub(r"\.[0-9a-f]{8}\.", ".", self.name), target.name))
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


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "device or a pipe"), ("folder", "folder")):
        with pytest.raises(UserError, match=f"it is a {kind}"), written_whole(tmp_path / name):
            pytest.fail("nothing is to be written")
    with pytest.raises(UserError, match="it is a folder"), written_whole(Path()):
        pytest.fail("nothing is to be written")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()
