"""What a float model is kept under: nothing that changes its bits may be left out."""

import copy

import pytest

from adq_train.run import shared_model as shared
from adq_train.run.shared_model import SharedModel, float_inputs
from adq_train.settings.schema import Config
from adq_train.storage.stamps import digest

HERE = {
    "hardware": "cpu AVX2",
    "cpu_threads": 4,
    "versions": {"torch": "2", "torchvision": "1", "adq_train": "3", "python": "3.11"},
    "kernels": {"kernels": "C"},
}
CONFIG = {
    "pretrain": {"epochs": 5},
    "scheduler": {"_target_": "cosine"},
    "optimizer": {"_target_": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.9},
    "data": {"_target_": "digits", "root": None, "num_workers": 2, "train_images": 10},
    "model": {"width": 4},
}


def key(monkeypatch, here=HERE, fingerprint="ab", device="cpu", processes=1, sha256=None, **more):
    """The key of a float model; other settings as section__setting."""
    monkeypatch.setattr(shared, "environment", lambda _: here)
    config = copy.deepcopy(CONFIG)
    for name, value in more.items():
        section, _, field = name.partition("__")
        config.setdefault(section, {})[field] = value
    return digest(float_inputs(Config.of(config), fingerprint, device, processes, sha256))


def test_what_is_no_setting_changes_the_key_too(monkeypatch):
    """For settings see test_schema.py."""
    first = key(monkeypatch)
    assert key(monkeypatch) == first
    others = [
        key(monkeypatch, fingerprint="cd"),
        key(monkeypatch, processes=2),
        key(monkeypatch, sha256="01"),
        key(monkeypatch, optimizer__momentum=0.0),
        key(monkeypatch, data__train_images=20),
        key(monkeypatch, model__width=5),
        key(monkeypatch, {**HERE, "hardware": "cpu AVX512"}),
        key(monkeypatch, {**HERE, "cpu_threads": 2}),
        *(
            key(monkeypatch, {**HERE, "versions": {**HERE["versions"], name: "9"}})
            for name in ("torch", "torchvision", "adq_train")
        ),
    ]
    assert first not in others
    assert len(set(others)) == len(others)


def test_what_changes_no_bit_of_a_float_model_shares_it(monkeypatch):
    first = key(monkeypatch)
    same = {
        "data__root": "/elsewhere", "data__num_workers": 9, "optimizer__lr": 9.0,
        "optimizer__weight_decay": 9.0, "weight_quantizer__bits": 1, "pretrain__checkpoint": "x",
    }  # fmt: skip
    assert key(monkeypatch, **same) == first
    assert key(monkeypatch, {**HERE, "kernels": {"kernels": "plain PyTorch"}}) == first
    assert key(monkeypatch, {**HERE, "versions": {**HERE["versions"], "python": "9"}}) == first
    on_gpu = {**HERE, "hardware": "NVIDIA H100"}
    assert key(monkeypatch, on_gpu) == key(monkeypatch, {**on_gpu, "cpu_threads": 1}) != first


def test_a_file_is_known_by_its_content_and_the_state_that_was_taken(monkeypatch):
    first = key(monkeypatch, sha256="01", pretrain__checkpoint="a")
    assert key(monkeypatch, sha256="01", pretrain__checkpoint="elsewhere/a") == first
    assert key(monkeypatch, sha256="02", pretrain__checkpoint="a") != first
    averaged = {"pretrain__checkpoint": "a", "pretrain__checkpoint_key": "ema"}
    assert key(monkeypatch, sha256="01", **averaged) != first


@pytest.mark.parametrize("noted", ["../../etc", "pretrain-0123456789ab/..", "pretrain-x", ""])
def test_a_manifest_names_no_other_place(tmp_path, noted):
    (tmp_path / "model.safetensors").write_text("")
    assert SharedModel(tmp_path / "shared", {}, noted).folder.parent == tmp_path / "shared"
    assert SharedModel(tmp_path / "shared", {}, noted).folder.name != noted
