"""The built wheel carries everything and runs in a folder that knows nothing of the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import QUICK

ROOT = Path(__file__).parents[1]


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves folders behind in the source tree
    files = run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]).stdout.split(
        "\n"
    )
    for name in filter(None, files):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder)]
    run([*build, str(source)])
    (built,) = folder.glob("*.whl")
    return built


def test_it_carries_every_config_and_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"adq_train/configs/{path.relative_to(ROOT / 'configs')}" in names
    for path in (ROOT / "src" / "adq_train").rglob("*"):
        if path.suffix in (".py", ".c", ".css", ".j2", ".typed", ".yaml"):
            assert str(path.relative_to(ROOT / "src")) in names


def test_it_runs_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(site),
            str(wheel),
        ]
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # Before the editable install on the path.
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = run(
        [sys.executable, "-c", "import adq_train; print(adq_train.__file__)"],
        cwd=elsewhere,
        env=environment,
    )
    assert where.stdout.startswith(str(site))
    done = run(
        [sys.executable, "-m", "adq_train", *QUICK, "dry_run=true"],
        cwd=elsewhere,
        env=environment,
    )
    assert "dry run passed" in done.stdout
    assert (site / "bin" / "adq-train").exists()
    assert list(elsewhere.iterdir()) == []
