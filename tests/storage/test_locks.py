"""Two writers, and somebody who deletes what keeps them apart."""

import fcntl
import shutil

import pytest

from adq_train.errors import UserError
from adq_train.storage.locks import LOCK, FolderLock, exclusive


def test_a_deleted_or_replaced_lock_file_admits_nobody(tmp_path):
    first = FolderLock(tmp_path)
    first.take()
    for change in (lambda: (tmp_path / LOCK).unlink(), lambda: (tmp_path / LOCK).write_text("")):
        change()
        with pytest.raises(BlockingIOError):
            FolderLock(tmp_path).take()
    first.release()
    FolderLock(tmp_path).take()


def test_where_folders_cannot_be_locked_the_first_one_notices(tmp_path, monkeypatch):
    """As on a network file system: the file's lock alone."""
    flock = fcntl.flock

    def of_files_alone(descriptor, how):
        if descriptor in folders:
            raise OSError(9, "Bad file descriptor")
        flock(descriptor, how)

    folders = []
    real_open = FolderLock.take.__globals__["os"].open

    def noting_open(path, flags, *mode):
        descriptor = real_open(path, flags, *mode)
        if path == tmp_path:
            folders.append(descriptor)
        return descriptor

    monkeypatch.setattr("adq_train.storage.locks.os.open", noting_open)
    monkeypatch.setattr("adq_train.storage.locks.fcntl.flock", of_files_alone)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    with pytest.raises(BlockingIOError):
        second.take()
    first.require()
    (tmp_path / LOCK).unlink()
    first.require()  # nobody else is there yet
    second.take()
    with pytest.raises(UserError, match=r"\.lock was replaced while this run was writing"):
        first.require()
    second.require()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    folder, mine = tmp_path / "folder", tmp_path / "mine"
    folder.mkdir()
    (folder / LOCK).symlink_to(mine)
    with pytest.raises(UserError, match=f"cannot write to {folder}"), exclusive(folder):
        pass
    assert not mine.exists()


def test_a_folder_that_is_deleted_and_made_again_is_another_one(tmp_path):
    folder = tmp_path / "folder"
    with exclusive(folder):
        shutil.rmtree(folder)
        with exclusive(folder):
            assert (folder / LOCK).exists()
