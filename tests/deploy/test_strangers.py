"""What a run folder or a file from anybody may not do."""

import json
import logging
import os
import shutil

import pytest
from export_helpers import DIGITS
from omegaconf import OmegaConf

from adq_train.data import cifar, fashion_mnist
from adq_train.deploy.datasets import data_section, load_data
from adq_train.deploy.trained import open_run
from adq_train.deploy.write import export_run, inside, made
from adq_train.errors import UserError

CIFAR = {
    "_target_": "adq_train.data.cifar.Cifar", "name": "cifar10", "root": None,
    "train_images": None, "validation_images": 5, "calibration_images": 5, "crop_padding": 4,
    "flip": True,
}  # fmt: skip


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    return tmp_path / "run"


def edited(run, **sections):
    """Changes the configuration that a run folder holds."""
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    (run / "config.yaml").write_text(OmegaConf.to_yaml({**config, **sections}))


def test_a_folder_cannot_trust_itself(run, program):
    marker = run / "marker"
    node = {"_target_": "subprocess.Popen", "args": ["touch", str(marker)]}
    for section in ("data", "model", "weight_quantizer", "activation_quantizer"):
        for place in (node, {"_target_": "adq_train.data.digits.Digits", "test_images": node}):
            before = (run / "config.yaml").read_text()
            edited(run, trusted_packages=["subprocess"], **{section: place})
            for name in ("adq-eval", "adq-export"):
                code, _, err = program(name, run)
                assert code == 1
                (line,) = err.splitlines()
                assert f"{section}." in line
                assert "trusted_packages=[subprocess]" in line
            (run / "config.yaml").write_text(before)
    assert not marker.exists()


def test_trust_comes_from_the_command_line(run, monkeypatch, program, tmp_path):
    (tmp_path / "my_data.py").write_text(
        "from adq_train.data.synthetic import Synthetic\nclass Mine(Synthetic):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    edited(run, data={**config["data"], "_target_": "my_data.Mine"})
    with pytest.raises(UserError, match=r"add trusted_packages=\[my_data\]"):
        open_run(run)
    # Of a run with stamps, an edited configuration is one that the results are not from.
    with pytest.raises(UserError, match="made by another run, or from other settings"):
        open_run(run, ["my_data"])
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["float_models"]  # as runs of the first version are
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert open_run(run, ["my_data"]).load_data().num_classes == 10
    # The command gets as far as the checkpoint, which was made for other data.
    for name in ("adq-eval", "adq-export"):
        assert "last.pt is missing" in program(name, run, "trusted_packages=[my_data]").err
    code, _, err = program("adq-eval", run, "trusted_packages=[a b]")
    assert (code, "must be a list of names" in err) == (2, True)


def test_a_run_does_not_choose_which_file_is_its_checkpoint(run):
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    edited(run, trainer={**config["trainer"], "select": "../../other/last"})
    with pytest.raises(UserError, match=r"trainer\.select: must be last or best"):
        open_run(run)


def test_nothing_is_written_where_a_link_in_the_folder_leads(run, tmp_path):
    (tmp_path / "outside").mkdir()
    (run / "export").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"leads out of .*; give output=FILE"):
        export_run(run)
    assert list((tmp_path / "outside").iterdir()) == []
    named = tmp_path / "outside" / "mine"
    assert export_run(run, named).path == str(named)
    (run / "export").unlink()
    assert inside(run, "export/x") == run / "export" / "x"


def test_folders_for_a_file_that_was_refused_are_not_left(tmp_path):
    with pytest.raises(KeyError), made(tmp_path / "a" / "b"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    with made(tmp_path / "a" / "b"):
        pass
    with pytest.raises(KeyError), made(tmp_path / "a" / "b"):
        raise KeyError
    assert (tmp_path / "a" / "b").is_dir()


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    asked = []

    def fetched(*arguments):
        asked.append(arguments)
        raise UserError("fetched")

    for module in (cifar, fashion_mnist):
        monkeypatch.setattr(module, "CACHE_FOLDER", tmp_path)
        monkeypatch.setattr(module, "download", fetched)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path)
    fashion, _ = data_section(None, "fashion_mnist", {})
    for section in (CIFAR, fashion):
        again, download = data_section(section, None, {"flip": "false"}, from_file=True)
        with pytest.raises(UserError, match=r"data\.root=<folder>.*data\.download=true fetches it"):
            load_data(again, 10, download=download)
        assert not asked
        again, download = data_section(section, None, {"download": "true"}, from_file=True)
        with pytest.raises(UserError, match="fetched"):
            load_data(again, 10, download=download)
        assert asked.pop()
    with pytest.raises(UserError, match="must be true or false, got 'maybe'"):
        data_section(CIFAR, None, {"download": "maybe"})


def test_a_file_does_not_say_what_is_read(caplog):
    section = {**CIFAR, "root": "/somebody/else"}
    with pytest.raises(UserError, match=r"no file decides .* names '/somebody/else'"):
        data_section(section, None, {}, from_file=True)
    for given, root in (("null", None), ("/mine", "/mine")):
        assert data_section(section, None, {"root": given}, from_file=True)[0]["root"] == root
    logging.getLogger("adq_train").propagate = True
    with caplog.at_level("INFO", "adq_train"):
        assert data_section(section, None, {})[0]["root"] == "/somebody/else"
    assert "read from /somebody/else" in caplog.text


def test_processes_are_no_more_than_cores_unless_asked():
    section = {**DIGITS, "num_workers": 400}
    assert data_section(section, None, {})[0]["num_workers"] <= (os.cpu_count() or 1)
    assert data_section(section, None, {"num_workers": "3"})[0]["num_workers"] == 3
    assert json.dumps(section)  # as it was
