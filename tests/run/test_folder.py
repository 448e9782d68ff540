import errno
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
import yaml

from adq_train.artifacts import RunResult
from adq_train.errors import UserError
from adq_train.run import folder as run_folder
from adq_train.run import manifest
from adq_train.run.folder import RunFolder, check_same_run, identity, input_files, read_status
from adq_train.run.manifest import differences, git_state, read_manifest
from adq_train.settings.schema import Config
from adq_train.storage import files
from adq_train.storage.locks import exclusive
from adq_train.storage.stamps import digest


@pytest.fixture
def full_disk(monkeypatch):
    """Makes every write to files whole fail from the moment that it is called."""

    def fill():
        def fail(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", fail)

    yield fill
    monkeypatch.undo()


def settings(**changes):
    """Some of a configuration, as it is kept."""
    return {
        "seed": 0,
        "run_dir": None,
        "output_root": "outputs",
        "dry_run": False,
        "debug": False,
        "trusted_packages": [],
        "data": {"name": "digits", "num_workers": 4},
        "trainer": {"epochs": 3, "device": "auto", "gradient_clip_norm": 1e-05},
        **changes,
    }


def config(**changes):
    return Config.of(settings(**changes))


def status(path):
    return json.loads((path / "status.json").read_text())


@pytest.fixture
def messages(caplog, monkeypatch):
    # The command line, which other tests run in this process, keeps messages from the root logger.
    monkeypatch.setattr(logging.getLogger("adq_train"), "propagate", True)
    caplog.set_level(logging.DEBUG, "adq_train")
    return caplog


# ── Identity


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"run_dir": "here", "output_root": "there", "dry_run": True, "debug": True}, True),
        ({"trusted_packages": ["mine"]}, True),
        ({"trainer": {"epochs": 3, "device": "cuda:1", "gradient_clip_norm": 1e-05}}, True),
        ({"data": {"name": "digits", "num_workers": 0}}, True),
        (
            {
                "trainer": {
                    "epochs": 3,
                    "device": "auto",
                    "gradient_clip_norm": 1e-05,
                    "compile": "model",
                }
                | {"channels_last": True}
            },
            True,
        ),
        ({"seed": 1}, False),
        ({"trainer": {"epochs": 4, "device": "auto", "gradient_clip_norm": 1e-05}}, False),
        ({"data": {"name": "cifar10", "num_workers": 4}}, False),
        ({"pretrain": {"epochs": 1}}, False),
    ],
)
def test_what_makes_a_run_another_one(changes, same):
    assert (identity(settings()) == identity(settings(**changes))) == same
    assert (digest(identity(settings())) == digest(identity(settings(**changes)))) == same


def test_identity_leaves_its_argument_alone():
    before = settings()
    identity(before)
    assert before == settings()


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    # printf '{"a": 1}' | sha256sum
    assert digest({"a": 1}) == "f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"


def test_differences_name_every_setting():
    old = {"a": 1, "b": {"c": 2, "d": [3]}, "only_old": "x"}
    new = {"a": 1, "b": {"c": 5, "d": [4]}, "only_new": {"e": 6}}
    assert list(differences(old, new)) == [
        "b.c: 2 → 5",
        "b.d: [3] → [4]",
        "only_new: None → {'e': 6}",
        "only_old: x → None",
    ]
    assert list(differences({"a": 0}, {"a": 0.0})) == ["a: 0 → 0.0"]
    assert list(differences(old, old)) == []


# ── What a folder may be


def test_a_new_folder_is_made_with_its_parents_and_filled(tmp_path):
    path = tmp_path / "a" / "b"
    with RunFolder(path, config()):
        assert yaml.safe_load((path / "config.yaml").read_text()) == config().plain()
        assert status(path) == {"state": "running", "stage": "setup", "error": None, "seconds": {}}
    assert status(path)["state"] == "done"
    assert {x.name for x in path.iterdir()} == {
        ".lock", "config.yaml", "status.json", "train.log"
    }  # fmt: skip


def test_nothing_is_made_before_the_folder_is_entered(tmp_path):
    RunFolder(tmp_path / "run", config())
    assert not (tmp_path / "run").exists()


def test_the_same_settings_may_continue(tmp_path):
    with RunFolder(tmp_path / "run", config()):
        pass
    moved = config(output_root="elsewhere", debug=True)
    with RunFolder(tmp_path / "run", moved):
        assert status(tmp_path / "run")["state"] == "running"
    check_same_run(tmp_path / "run", config().plain())


def test_other_settings_are_refused_and_named(tmp_path):
    with RunFolder(tmp_path / "run", config()):
        pass
    before = {x: x.read_bytes() for x in (tmp_path / "run").iterdir()}
    trainer = {"epochs": 9, "device": "cpu", "gradient_clip_norm": 0.5}
    other = config(seed=1, trainer=trainer, data={"name": "digits", "extra": 1})
    message = r"data\.extra: None → 1; seed: 0 → 1; trainer\.epochs: 3 → 9 and 1 more"
    with pytest.raises(UserError, match=message):
        RunFolder(tmp_path / "run", other)
    assert {x: x.read_bytes() for x in (tmp_path / "run").iterdir()} == before


def test_a_run_that_began_after_the_first_look_is_refused(tmp_path):
    late = RunFolder(tmp_path / "run", config(seed=1))
    with RunFolder(tmp_path / "run", config()):
        pass
    with pytest.raises(UserError, match="seed: 0 → 1"), late:
        pass
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 0
    check_lock_is_free(tmp_path / "run")


def check_lock_is_free(path):
    with RunFolder(path, config()):
        pass


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run", config()):
        pass
    assert status(tmp_path / "run")["state"] == "done"


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=f"{tmp_path} is not empty and holds no run"):
        RunFolder(tmp_path, config())
    assert [x.name for x in tmp_path.iterdir()] == ["letter.txt"]


def test_a_kill_during_the_first_write_does_not_spoil_the_folder(tmp_path):
    left = tmp_path / ".config.yaml.0123abcd.tmp"
    left.write_text("seed: 0\nda")
    with RunFolder(tmp_path, config()):
        pass
    assert status(tmp_path)["state"] == "done"
    assert not left.exists()


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match=f"{tmp_path}/run is a file"):
        RunFolder(tmp_path / "run", config())


@pytest.mark.parametrize("text", ["a: [1", "- 1\n", "name: mine\n", "", "\x00"])
def test_a_config_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path} holds a config.yaml that is not one of a run"):
        RunFolder(tmp_path, config())


def test_a_path_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    message = f"cannot write to {tmp_path}/file/run .*output_root"
    with pytest.raises(UserError, match=message), RunFolder(tmp_path / "file" / "run", config()):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with (
        pytest.raises(UserError, match=r"config\.yaml: Permission denied"),
        RunFolder(tmp_path / "run", config()),
    ):
        pass


def test_a_full_disk_at_the_start_leaves_no_lock(tmp_path, full_disk, monkeypatch):
    full_disk()
    with pytest.raises(UserError, match="No space left"), RunFolder(tmp_path, config()):
        pass
    monkeypatch.undo()
    check_lock_is_free(tmp_path)


def test_a_new_folder_that_cannot_be_filled_is_removed(tmp_path, monkeypatch):
    def full(path, text):
        raise UserError("No space left on device")

    monkeypatch.setattr(run_folder, "write_text", full)
    with pytest.raises(UserError, match="No space"), RunFolder(tmp_path / "run", config()):
        pass
    assert not (tmp_path / "run").exists()


def test_a_full_disk_at_the_end_leaves_no_lock_and_no_log_handler(tmp_path, full_disk, monkeypatch):
    handlers = list(logging.getLogger("adq_train").handlers)

    def run():
        with RunFolder(tmp_path / "run", config()):
            full_disk()

    with pytest.raises(UserError, match="No space left"):
        run()
    monkeypatch.undo()
    assert logging.getLogger("adq_train").handlers == handlers
    check_lock_is_free(tmp_path / "run")


# ── The lock

HOLDER = """
import sys
from pathlib import Path
from adq_train.storage.locks import exclusive
from adq_train.run.folder import RunFolder
from adq_train.settings.schema import Config
with {call}:
    print("locked", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds a folder until it is told to stop, or killed."""

    def __init__(self, call):
        code = HOLDER.format(call=call)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout.readline() == "locked\n"

    def __enter__(self):
        return self

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path):
    path = tmp_path / "run"
    with Holder(f"RunFolder(Path({str(path)!r}), Config.of({settings()!r}))") as other:
        message = f"another process is writing to {path}"
        with pytest.raises(UserError, match=message), RunFolder(path, config()):
            pass
        other.kill()
        assert status(path)["state"] == "running"
        check_lock_is_free(path)
        assert status(path)["state"] == "done"


def test_one_run_at_a_time_within_a_process(tmp_path):
    with (
        RunFolder(tmp_path / "run", config()),
        pytest.raises(UserError, match="another process is writing"),
        RunFolder(tmp_path / "run", config()),
    ):
        pass
    assert status(tmp_path / "run")["state"] == "done"


def test_exclusive_makes_the_folder_and_waits_for_the_one_that_holds_it(tmp_path, messages):
    path = tmp_path / "a" / "shared"
    waiting, inside = threading.Event(), threading.Event()

    class Waits(logging.Handler):
        def emit(self, record):
            if f"waiting for another run that is working in {path}" in record.getMessage():
                waiting.set()

    def enter():
        with exclusive(path):
            inside.set()

    handler = Waits()
    logging.getLogger("adq_train").addHandler(handler)
    try:
        with Holder(f"exclusive(Path({str(path)!r}))") as other:
            thread = threading.Thread(target=enter)
            thread.start()
            assert waiting.wait(60)
            assert not inside.is_set()
            other.kill()
            thread.join(60)
            assert inside.is_set()
    finally:
        logging.getLogger("adq_train").removeHandler(handler)


def test_exclusive_does_not_wait_for_what_is_free(tmp_path, messages):
    for _ in range(2):
        with exclusive(tmp_path):
            pass
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path):
        raise ZeroDivisionError
    with exclusive(tmp_path):
        pass
    assert messages.text == ""


def test_exclusive_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=f"cannot write to {tmp_path}/file/shared"),
        exclusive(tmp_path / "file" / "shared"),
    ):
        pass


# ── State, stages and log


def fail_in(path, stage, error):
    with RunFolder(path, config()) as folder, folder.stage(stage):
        raise error


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (UserError("data.root: no such folder"), "failed", "data.root: no such folder"),
        (ValueError("boom"), "failed", "boom"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
    ],
)
def test_a_failure_is_noted_and_passed_on(tmp_path, error, state, reason):
    with pytest.raises(type(error)):
        fail_in(tmp_path, "profile", error)
    found = status(tmp_path)
    assert found.pop("seconds")["profile"] >= 0
    assert found == {"state": state, "stage": "profile", "error": reason}
    check_lock_is_free(tmp_path)
    assert status(tmp_path)["state"] == "done"


def test_a_full_disk_does_not_hide_the_first_error(tmp_path, full_disk, monkeypatch):
    def run():
        with RunFolder(tmp_path / "run", config()):
            full_disk()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    monkeypatch.undo()
    check_lock_is_free(tmp_path / "run")


def test_the_time_of_a_stage_adds_up_over_starts(tmp_path, monkeypatch):
    clock = iter([10.0, 12.5, 100.0, 101.0, 200.0, 200.25])
    monkeypatch.setattr(run_folder.time, "perf_counter", lambda: next(clock))
    with RunFolder(tmp_path, config()) as folder:
        with folder.stage("profile"):
            assert (status(tmp_path)["state"], status(tmp_path)["stage"]) == ("running", "profile")
        assert status(tmp_path)["seconds"] == {"profile": 2.5}
        with folder.stage("qat"):
            pass
    assert status(tmp_path) == {
        "state": "done", "stage": None, "error": None, "seconds": {"profile": 2.5, "qat": 1.0}
    }  # fmt: skip
    with RunFolder(tmp_path, config()) as folder, folder.stage("profile"):
        pass
    assert status(tmp_path)["seconds"] == {"profile": 2.75, "qat": 1.0}


def test_messages_of_a_run_go_to_its_log_alone(tmp_path, messages):
    log = logging.getLogger("adq_train.somewhere")
    with RunFolder(tmp_path / "a", config()):
        log.info("the first – run")
    with RunFolder(tmp_path / "b", config()):
        log.debug("the second run")
    log.info("after")
    first, second = ((tmp_path / x / "train.log").read_text("utf-8") for x in "ab")
    assert first.endswith("INFO    the first – run\n")
    assert second.endswith("DEBUG   the second run\n")
    assert "second" not in first
    assert "first" not in second


def test_the_log_of_a_failure_has_its_traceback(tmp_path, messages):
    with pytest.raises(ValueError, match="boom"):
        fail_in(tmp_path, "qat", ValueError("boom"))
    text = (tmp_path / "train.log").read_text()
    assert "stopped in stage qat: boom" in text
    assert "Traceback" in text
    assert "in fail_in" in text


def test_no_status_is_none_and_a_damaged_one_is_named(tmp_path):
    assert read_status(tmp_path) is None
    for content, field in (
        (b"", "Expecting value"),
        (b"\xff", "codec"),
        (b"[]", r"it is \[\]"),
        (b"[" * 100_000, "recursion"),
        (b"{}", "state is missing"),
        (b'{"state": 1}', "state is 1, not a text"),
        (b'{"state": "done", "seconds": 3}', "seconds is 3, not an object"),
        (b'{"state": "done", "seconds": {"qat": "x"}}', r"seconds\.qat is 'x', not a number"),
        (b'{"state": "done", "seconds": {"qat": -1}}', r"seconds\.qat is -1; .* at least 0"),
    ):
        (tmp_path / "status.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"status\.json cannot be read \(.*{field}.*delete it"):
            read_status(tmp_path)


# ── Artifacts and the manifest

RESULT = RunResult(90.0, 80.0, 89.5, 99.0, 450, {"qat": 1.5})


def test_artifacts_are_saved_and_loaded(tmp_path):
    with RunFolder(tmp_path, config()) as folder:
        assert folder.load("result.json", RunResult) is None
        folder.save("result.json", RESULT)
        assert folder.load("result.json", RunResult) == RESULT
    assert json.loads((tmp_path / "result.json").read_text())["qat_top1_percent"] == 89.5


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": 1}', b"\xff\xfe"])
def test_a_damaged_artifact_is_named_with_a_remedy(tmp_path, content):
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run", config())
    (tmp_path / "run" / "result.json").write_bytes(content)
    message = f"{tmp_path}/run/result.json is .*; delete it to make it anew"
    with pytest.raises(UserError, match=message):
        folder.load("result.json", RunResult)


FACTS = {
    "seed": 0,
    "data": {"name": "digits", "fingerprint": "ab"},
    "checkpoint_sha256": None,
    "files": {"allocator.path": "ab"},
}


def test_the_manifest_says_what_ran_where(tmp_path):
    with RunFolder(tmp_path, config()) as folder:
        folder.write_manifest(FACTS)
    manifest = read_manifest(tmp_path)
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["python"] == platform.python_version()
    assert FACTS.items() <= manifest.items()
    assert {"git", "platform", "cpu_threads", "hardware", "kernels"} <= manifest.keys()


def test_the_manifest_of_the_first_start_stays(tmp_path):
    with RunFolder(tmp_path, config()) as folder:
        folder.write_manifest(FACTS)
        before = (tmp_path / "manifest.json").read_text()
        folder.write_manifest({**FACTS, "command": ["another"]})
    assert (tmp_path / "manifest.json").read_text() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data", {"name": "digits", "fingerprint": "cd"}),
        ("checkpoint_sha256", "ef"),
        ("files", {"allocator.path": "cd"}),
    ],
)
def test_inputs_that_changed_since_the_first_start(tmp_path, key, value):
    with RunFolder(tmp_path, config()) as folder:
        folder.write_manifest(FACTS)
        with pytest.raises(UserError, match=f"{key}: not what the run in {tmp_path} began with"):
            folder.write_manifest({**FACTS, key: value})


@pytest.mark.parametrize(
    "change",
    [
        {"git": {"commit": "f" * 40, "dirty": False}},
        {"cpu_threads": 77},
        {"kernels": {"kernels": "another"}},
        {"hardware": "another"},
        {"versions": {"torch": "9"}},
    ],
    ids=lambda x: next(iter(x)),
)
def test_other_conditions_are_told_and_noted_once(tmp_path, monkeypatch, messages, change):
    with RunFolder(tmp_path, config()) as folder:
        folder.write_manifest(FACTS)
        first = read_manifest(tmp_path)
        here = manifest.environment()
        monkeypatch.setattr(manifest, "environment", lambda _: {**here, **change})
        for _ in range(2):
            folder.write_manifest(FACTS)
    (noted,) = read_manifest(tmp_path)["continued"]
    assert change.items() <= noted.items()
    assert {**read_manifest(tmp_path), "continued": None} == {**first, "continued": None}
    (told,) = [x for x in messages.messages if "continues under other conditions" in x]
    assert next(iter(change)) in told


def test_conditions_that_the_run_chooses_are_compared_too(tmp_path, messages):
    with RunFolder(tmp_path, config()) as folder:
        facts = {**FACTS, "processes": 1, "compile": "none", "channels_last": False}
        folder.write_manifest(facts)
        folder.write_manifest({**facts, "processes": 2, "compile": "model", "channels_last": True})
    assert "compile: none → model" in messages.text
    assert "channels_last: False → True" in messages.text
    assert "processes: 1 → 2" in messages.text


def test_another_float_model_is_refused(tmp_path):
    with RunFolder(tmp_path, config()) as folder:
        folder.write_manifest(FACTS)
        folder.goes_on_with("pretrain", "ab", "1" * 64, "pretrain-000000000000")
        folder.goes_on_with("teacher", "ab", "2" * 64)
        folder.goes_on_with("pretrain", "ab", "1" * 64)
        assert folder.float_model("pretrain") == "pretrain-000000000000"
        for stage in ("pretrain", "teacher"):
            with pytest.raises(UserError, match=f"{stage}: the float model is not the one that"):
                folder.goes_on_with(stage, "ab", "3" * 64)


def test_the_files_of_a_configuration(tmp_path):
    path = tmp_path / "allocation.json"
    path.write_text("{}")
    found = {"distillation": {"checkpoint": None}, "sensitivity": {"path": "nowhere"}}
    assert input_files({**found, "allocator": {"path": str(path)}}) == {"allocator.path": path}
    assert input_files({**found, "allocator": {}}) == {}


def test_a_damaged_manifest_is_named(tmp_path):
    with RunFolder(tmp_path, config()) as folder:
        for content, field in (
            ("{", "Expecting"),
            ("[]", r"it is \[\]"),
            ('{"seed": "x"}', "seed is 'x', not a whole number"),
            ('{"data": 3}', "data is 3, not an object"),
            ('{"data": {"fingerprint": null}}', r"data\.fingerprint is None, not a text"),
            ('{"model": {"num_float_values": -1}}', r"model\.num_float_values is -1"),
            ('{"command": "adq-train"}', "command is 'adq-train', not a list"),
            ('{"continued": [1]}', "continued is not a list of objects"),
            ('{"float_models": {"pretrain": "ab"}}', r"float_models\.pretrain is 'ab'"),
        ):
            (tmp_path / "manifest.json").write_text(content)
            with pytest.raises(UserError, match=rf"manifest\.json cannot be read \(.*{field}"):
                folder.write_manifest(FACTS)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        read_manifest(tmp_path)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with one committed file, in the place of this package."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "module.py").write_text("1\n")
    git("init", "--quiet")
    git("add", "module.py")
    git("commit", "--quiet", "--message", "x")
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "module.py"))
    return tmp_path, git("rev-parse", "HEAD")


def test_git_state_of_a_clean_and_of_a_changed_checkout(checkout):
    folder, commit = checkout
    assert git_state() == {"commit": commit, "dirty": False}
    (folder / "module.py").write_text("2\n")
    assert git_state() == {"commit": commit, "dirty": True}


def test_no_git_state_of_a_copy_inside_another_checkout(checkout, monkeypatch):
    folder, _ = checkout
    (folder / "installed.py").write_text("")
    monkeypatch.setattr(manifest, "__file__", str(folder / "installed.py"))
    assert git_state() is None


def test_no_git_state_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert git_state() is None
