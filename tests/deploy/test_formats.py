import subprocess
import sys
from pathlib import Path

import pytest

from adq_train.deploy import formats
from adq_train.deploy.formats import FORMATS, Format, format_of
from adq_train.deploy.runtimes import RUNTIMES
from adq_train.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:
    tomllib = pytest.importorskip("tomli")

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.mark.parametrize("kind", FORMATS.values(), ids=list(FORMATS))
def test_every_entry_has_a_module_that_writes_and_a_runtime(kind):
    for package in kind.packages:
        pytest.importorskip(package)
    assert callable(kind.writer())
    assert kind.exact or kind.runtime in RUNTIMES


@pytest.mark.parametrize("kind", FORMATS.values(), ids=list(FORMATS))
def test_its_packages_are_those_of_its_extra(kind):
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    assert bool(kind.extra) == bool(kind.packages)
    brought = " ".join(extras.get(kind.extra, [])).replace("-", "_")
    assert all(package in brought for package in kind.packages)


def test_a_file_is_known_by_its_longest_ending(monkeypatch):
    longer = Format("longer", ".more.onnx", "", "", "")
    monkeypatch.setattr(formats, "FORMATS", {**FORMATS, "longer": longer})
    assert format_of(Path("a/model.onnx")) == FORMATS["onnx"]
    assert format_of(Path("model.more.onnx")) == longer
    assert format_of(Path("model.safetensors")) == FORMATS["packed"]
    assert format_of(Path("model.pb")) is None
    assert len({x.ending for x in FORMATS.values()}) == len(FORMATS)


def test_a_missing_package_names_the_extra():
    kind = Format("x", ".x", "x", "x", "x", extra="fpga", packages=("no_such_package",))
    with pytest.raises(UserError, match=r"package no_such_package; .*adq-train\[fpga\]"):
        kind.writer()


def test_the_table_is_shown_before_torch_is_loaded():
    code = "import adq_train.deploy.formats, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
