"""What finished runs no longer need goes, and nothing that anybody needs."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from adq_train.errors import UserError
from adq_train.run import cleaning
from adq_train.run.artifact_files import ARTIFACTS
from adq_train.run.cleaning import clean
from adq_train.storage.locks import FolderLock

KEPT = ("checkpoints/last.pt", "checkpoints/best.pt", "checkpoints/float.pt", "config.yaml")


def write(path, size=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def run(root, name, state="done", shared="pretrain-000000000001"):
    """A run's folder as far as cleaning looks at it."""
    folder = root / name
    for file in (*KEPT, "checkpoints/previous.pt", "checkpoints/SHA256SUMS", ".lock", *ARTIFACTS):
        write(folder / file)
    write(folder / "checkpoints/.last.pt.0123abcd.tmp", 7)
    (folder / "status.json").write_text(json.dumps({"state": state, "stage": "qat", "seconds": {}}))
    models = {"pretrain": {"sha256": "0", "shared": shared}}
    (folder / "manifest.json").write_text(json.dumps({"float_models": models}))
    return folder


def float_model(root, number, done=True):
    folder = root / f"shared/pretrain-{number:012x}"
    for file in ("checkpoints/last.pt", "checkpoints/previous.pt", "depends_on.json", ".lock"):
        write(folder / file, 100)
    if done:
        write(folder / "model.safetensors", 50)
    return folder


def everything(root):
    return {str(x.relative_to(root)): x.stat().st_size for x in root.rglob("*") if x.is_file()}


def gone(root, **options):
    """The files that cleaning removes, and the bytes that it tells."""
    before = everything(root)
    told = {str(x.path.relative_to(root)): x.bytes for x in clean(root, **options)}
    after = everything(root)
    assert all(before[name] == size for name, size in after.items())
    return set(before) - set(after), told


def test_a_finished_run_keeps_what_evaluates_exports_or_starts_another(tmp_path):
    run(tmp_path, "sweep/a")
    os.link(tmp_path / "sweep/a/.lock", tmp_path / "sweep/a/.config.yaml.0123abcd.tmp")
    expected = {
        "sweep/a/checkpoints/previous.pt": 10,
        "sweep/a/checkpoints/.last.pt.0123abcd.tmp": 7,
        "sweep/a/.config.yaml.0123abcd.tmp": 10,  # two names of one file
        "sweep/a/.lock": 0,
    }
    removed, told = gone(tmp_path, dry_run=True)
    assert removed == set()
    assert told == expected
    removed, told = gone(tmp_path)
    assert removed == set(expected)
    assert gone(tmp_path) == (set(), {})


def test_float_models_are_thinned_and_go_where_no_run_names_them(tmp_path):
    run(tmp_path, "a")
    mine, other, untrained = (float_model(tmp_path, x, x < 3) for x in (1, 2, 3))
    removed, _ = gone(tmp_path)
    assert not other.exists()
    assert sorted(x.name for x in mine.iterdir()) == ["depends_on.json", "model.safetensors"]
    assert len(everything(untrained)) == 4
    assert "shared/pretrain-000000000002/model.safetensors" in removed


@pytest.mark.parametrize("state", ["running", "interrupted", "failed", None])
def test_unfinished_runs_and_what_they_may_need_are_left_alone(tmp_path, state):
    folder = run(tmp_path, "a", state or "done")
    if state is None:
        (folder / "status.json").write_text("{damaged")
    float_model(tmp_path, 2)
    before = everything(folder)
    gone(tmp_path)
    assert everything(folder) == before
    assert (tmp_path / "shared/pretrain-000000000002/model.safetensors").exists()


def test_a_run_that_lacks_a_result_is_not_finished(tmp_path):
    folder = run(tmp_path, "a")
    (folder / "result.json").unlink()
    assert gone(tmp_path) == (set(), {})


def test_a_folder_where_somebody_works_is_passed_over(tmp_path):
    folder = run(tmp_path, "a")
    run(tmp_path, "b")
    lock = FolderLock(folder)
    lock.take()
    try:
        removed, _ = gone(tmp_path)
    finally:
        lock.release()
    assert removed
    assert all(name.startswith("b/") for name in removed)


def test_links_are_not_followed(tmp_path):
    elsewhere = run(tmp_path / "elsewhere", "a")
    root = tmp_path / "outputs"
    root.mkdir()
    (root / "link").symlink_to(elsewhere)
    folder = run(root, "b")
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").symlink_to(elsewhere / "checkpoints")
    before = everything(elsewhere)
    list(clean(root))
    assert everything(elsewhere) == before


def test_a_kill_at_any_file_leaves_nothing_broken(tmp_path, monkeypatch):
    """What is needed is there at every moment, and the next start does the rest."""
    whole = {}
    for number in range(20):
        root = tmp_path / str(number)
        run(root, "a")
        float_model(root, 1)
        float_model(root, 2)
        calls = iter(range(number))
        remove = cleaning._remove

        def killed(path, calls=calls, remove=remove):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            remove(path)

        with monkeypatch.context() as patch:
            patch.setattr(cleaning, "_remove", killed)
            with contextlib.suppress(KeyboardInterrupt):
                list(clean(root))
        assert all((root / "a" / name).exists() for name in (*KEPT, *ARTIFACTS))
        model = root / "shared/pretrain-000000000001"
        assert (model / "model.safetensors").exists()
        list(clean(root))
        whole = whole or everything(root)
        assert not (root / "shared/pretrain-000000000002").exists()
        assert everything(root) == whole


def test_the_program_tells_and_refuses(tmp_path):
    run(tmp_path, "a")
    program = [sys.executable, "-c", "from adq_train.cli.program import clean; clean()"]
    done = subprocess.run([*program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].split() == ["27", "bytes", "freed,", "3", "files"]
    done = subprocess.run([*program, str(tmp_path / "no")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not a folder; give that of the runs" in done.stderr
    with pytest.raises(UserError, match="is not a folder"):
        list(clean(tmp_path / "no"))
