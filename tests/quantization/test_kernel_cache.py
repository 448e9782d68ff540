"""No library is loaded that another user, a crash or an odd compiler may have made."""

import hashlib
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from adq_train.quantization import kernel_cache, kernels, steps

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler here")

FUNCTIONS = "".join(f"void {name}(void) {{}}\n" for name in kernels.FUNCTIONS)
TINY = f'const char adq_compiler[] = "tiny";\n{FUNCTIONS}'


@pytest.fixture
def cache(monkeypatch, tmp_path, caplog):
    """The cache's folder, not made yet, for a source that compiles at once."""
    caplog.set_level("INFO", logger="adq_train")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "tiny.c")
    kernels.SOURCE.write_text(TINY)
    return tmp_path / "home" / "adq_train"


def loaded():
    """The kernels as a new process would find them."""
    return kernels.loaded.__wrapped__()


def in_cache(folder):
    return sorted(folder.glob("kernels-*"))


def evil(tmp_path):
    """A library that leaves a mark when it is loaded, and the mark."""
    mark = tmp_path / "mark"
    source = tmp_path / "evil.c"
    source.write_text(
        f"#include <stdio.h>\n{TINY}__attribute__((constructor)) void run(void)"
        f'{{ fclose(fopen("{mark}", "w")); }}'
    )
    library = tmp_path / "evil.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    library.chmod(0o700)
    return library, mark


def planted(library, name):
    """What a library must be called to be taken for the one that has ``name``."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    return f"{name.rpartition('-')[0]}-{digest}.so"


def test_a_library_is_built_once_and_is_ours_alone(cache):
    first = loaded()
    (library,) = in_cache(cache)
    assert [x.stat().st_mode & 0o777 for x in (cache, library)] == [0o700, 0o700]
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert first.description == {"kernels": "C", "compiler": "tiny", "sha256": digest}
    with mock.patch.object(subprocess, "Popen", side_effect=AssertionError("built again")):
        assert loaded().description == first.description
    assert list(cache.iterdir()) == [library]


def test_the_real_kernels_tell_what_compiled_them():
    told = kernels.in_use()
    assert told["kernels"] == "C"
    assert told["compiler"].split()[0] in ("gcc", "clang")
    assert len(told["sha256"]) == 64


def test_a_planted_library_would_leave_its_mark(cache, tmp_path):
    """What the tests below look for does happen where a library is let through."""
    library, mark = evil(tmp_path)
    loaded()
    (good,) = in_cache(cache)
    good.unlink()
    shutil.copy(library, cache / planted(library, good.name))
    loaded()
    assert mark.exists()


def test_a_damaged_or_planted_file_is_not_loaded_but_made_anew(cache, tmp_path):
    library, mark = evil(tmp_path)
    loaded()
    (good,) = in_cache(cache)
    whole = good.read_bytes()

    def holding(content):
        def damage(path):
            path.unlink()  # the old file is in use here
            path.write_bytes(content)
            path.chmod(0o700)

        return damage

    truncated = holding(whole[: len(whole) // 2])
    empty = holding(b"")
    flipped = holding(whole[:-1] + bytes([whole[-1] ^ 1]))
    replaced = holding(library.read_bytes())

    def linked(path):
        path.unlink()
        path.symlink_to(library)

    def pipe(path):
        path.unlink()
        os.mkfifo(path)

    def open_to_others(path):
        path.unlink()
        fitting = path.with_name(planted(library, path.name))
        shutil.copy(library, fitting)
        fitting.chmod(0o777)

    def of_another(path):
        path.unlink()
        fitting = path.with_name(planted(library, path.name))
        shutil.copy(library, fitting)
        os.chown(fitting, 12345, -1)

    kinds = [truncated, empty, flipped, replaced, linked, pipe, open_to_others]
    for damage in kinds + [of_another] * (os.geteuid() == 0):
        damage(good)
        assert loaded().functions is not None, damage
        assert in_cache(cache) == [good], damage
        assert good.read_bytes() == whole, damage
        assert not mark.exists(), damage


def test_a_folder_that_is_not_ours_alone_is_not_used(cache, tmp_path, caplog):
    library, mark = evil(tmp_path)
    loaded()
    (good,) = in_cache(cache)
    name = planted(library, good.name)
    elsewhere = tmp_path / "elsewhere"

    def fresh():
        for path in (cache.parent, elsewhere):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        for folder in (cache, elsewhere):
            folder.mkdir(mode=0o700, parents=True)
            shutil.copy(library, folder / name)

    def of_another():
        os.chown(cache, 12345, -1)

    def link_of_another():
        shutil.rmtree(cache)
        cache.symlink_to(elsewhere)
        os.chown(cache, 12345, -1, follow_symlinks=False)

    def above_of_another():
        os.chown(cache.parent, 12345, -1)

    def our_link_to_a_folder_of_another():
        shutil.rmtree(cache)
        cache.symlink_to(elsewhere)
        os.chown(elsewhere, 12345, -1)

    def above_open_to_all():
        cache.parent.chmod(0o777)

    def a_file():
        shutil.rmtree(cache)
        cache.write_text("")

    kinds = [above_open_to_all, a_file]
    if os.geteuid() == 0:
        kinds += [of_another, link_of_another, above_of_another, our_link_to_a_folder_of_another]
    for kind in kinds:
        fresh()
        kind()
        caplog.clear()
        assert loaded().functions is not None, kind  # compiled for this process alone
        assert not mark.exists(), kind
        assert caplog.text.count("\n") == 1, kind
        assert "for this process alone" in caplog.text, kind


def test_what_lay_in_a_folder_that_others_could_write_to_is_thrown_away(cache, tmp_path):
    library, mark = evil(tmp_path)
    loaded()
    (good,) = in_cache(cache)
    for mode in (0o777, 0o1777, 0o770):
        shutil.copy(library, cache / planted(library, good.name))
        cache.chmod(mode)
        assert loaded().functions is not None
        assert in_cache(cache) == [good]
        assert cache.stat().st_mode & 0o7777 == 0o700
        assert not mark.exists()


def test_a_folder_reached_through_our_own_links_is_used(cache, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    cache.parent.symlink_to("real/../real")
    assert loaded().functions is not None
    assert len(in_cache(real / "adq_train")) == 1


def test_a_relative_cache_is_not_a_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", ".")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel_cache.cache_folder() == tmp_path / ".cache" / "adq_train"


def test_where_no_folder_can_be_written_the_plain_path_serves(cache, monkeypatch, caplog):
    def refuse(*arguments, **names):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(kernel_cache.tempfile, "TemporaryDirectory", refuse)
    assert loaded().description == {
        "kernels": "plain PyTorch",
        "reason": "[Errno 30] Read-only file system",
    }
    assert caplog.text.count("\n") == 1


def test_a_file_system_that_runs_no_code(cache, monkeypatch, caplog):
    load = kernels.ctypes.CDLL

    def refuse(path):
        if str(cache) in path:
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(kernels.ctypes, "CDLL", refuse)
    assert loaded().functions is not None
    assert "failed to map" in caplog.text
    assert "for this process alone" in caplog.text


def script(tmp_path, text):
    """A compiler that does ``text``, with ``$out`` the file that it is asked for."""
    path = tmp_path / "cc with spaces"
    path.write_text(f"#!/bin/sh\nfor out; do :; done\n{text}\n")
    path.chmod(0o700)
    return f"'{path}' --flag"


def test_a_compiler_that_fails_leaves_plain_pytorch_and_one_line(
    cache, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(kernel_cache, "TIMEOUT_SECONDS", 0.5)
    incomplete = tmp_path / "incomplete.c"
    incomplete.write_text("void adq_staircase(void) {}\n")
    cases = {
        "echo 'no such flag' >&2; echo more >&2; exit 1": "no such flag",
        "exit 3": "ended with 3",
        "kill -9 $$": "ended with -9",
        "sleep 1000 & sleep 1000": "took over 0.5 seconds",
        "cat > /dev/null; exit 4": "ended with 4",  # waits for nothing on its input
        'echo text > "$out"': "file too short",
        'head -c 4096 /dev/zero > "$out"': "invalid ELF header",
        "true": "No such file",
        f"cc -shared -fPIC '{incomplete}' -o \"$out\"": "left something out",
    }
    for text, reason in cases.items():
        shutil.rmtree(cache, ignore_errors=True)
        monkeypatch.setenv("CC", script(tmp_path, text))
        caplog.clear()
        found = loaded()
        assert found.functions is None, text
        assert found.description["kernels"] == "plain PyTorch", text
        assert reason in found.description["reason"], text
        assert caplog.text.count("\n") == 1, text
        assert "plain PyTorch" in caplog.text, text


def test_what_a_compiler_started_ends_with_it(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_cache, "TIMEOUT_SECONDS", 0.5)
    pids = tmp_path / "pids"
    monkeypatch.setenv("CC", script(tmp_path, f"sleep 1000 & echo $! > '{pids}'; wait"))
    assert loaded().functions is None
    child = Path("/proc", pids.read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_compiler_may_have_arguments(cache, monkeypatch):
    kernels.SOURCE.write_text(TINY.replace('"tiny"', "NAME"))
    monkeypatch.setenv("CC", """cc '-DNAME="with arguments"'""")
    assert loaded().description["compiler"] == "with arguments"
    for unusual, reason in {"": "NAME", "cc '": "$CC cannot be read"}.items():
        monkeypatch.setenv("CC", unusual)
        assert reason in loaded().description["reason"]


def test_without_a_compiler_the_plain_path_serves(cache, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    assert loaded().functions is None
    assert "plain PyTorch" in caplog.text
    assert "no C compiler" in caplog.text


def test_the_fast_path_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("ADQ_TRAIN_KERNELS", "0")
    assert loaded().description["reason"] == "ADQ_TRAIN_KERNELS=0"


def test_several_processes_may_compile_at_once(cache):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kernel_cache.build(kernels.SOURCE, cache), range(4)))
    assert set(found) == set(in_cache(cache))
    assert all(kernel_cache.is_whole(x) for x in found)
    assert list(cache.iterdir()) == in_cache(cache)


def test_a_library_is_on_the_disk_before_it_has_its_name(cache, monkeypatch):
    events = []
    replace = Path.replace
    monkeypatch.setattr(kernel_cache.os, "fsync", lambda _: events.append("synced"))
    monkeypatch.setattr(
        Path, "replace", lambda old, new: (events.append("renamed"), replace(old, new))
    )
    loaded()
    assert events == ["synced", "renamed"]


def test_the_plain_path_serves_where_the_kernels_are_none(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernels, "loaded", kernels.loaded.__wrapped__)
    x, borders = torch.randn(9), torch.linspace(-1, 1, 3)
    expected = torch.arange(4.0)[torch.bucketize(x, borders)]
    assert torch.equal(steps.staircase(x, borders, torch.arange(4.0)), expected)
