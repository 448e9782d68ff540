"""What a float model is kept under: nothing that changes its bits may be left out."""

import copy

import pytest

from adq_train.run import shared_model as shared
from adq_train.run.shared_model import NOT_FOR_FLOAT_TRAINING, SharedModel, float_inputs
from adq_train.settings.schema import TrainerConfig
from adq_train.storage.stamps import digest

HERE = {
    "hardware": "cpu AVX2",
    "cpu_threads": 4,
    "versions": {"torch": "2", "torchvision": "1", "adq_train": "3", "python": "3.11"},
    "kernels": {"kernels": "C"},
}
CONFIG = {
    "seed": 0,
    "pretrain": {"checkpoint": None, "epochs": 5, "lr": 0.1, "weight_decay": 0.0},
    "scheduler": {"_target_": "cosine"},
    "optimizer": {"_target_": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.9},
    "data": {"_target_": "digits", "root": None, "num_workers": 2, "train_images": 10},
    "trainer": vars(TrainerConfig()),
    "weight_quantizer": {"_target_": "adq"},
}


def key(monkeypatch, here=HERE, device="cpu", processes=1, **changes):
    monkeypatch.setattr(shared, "environment", lambda _: here)
    config = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            config[section][field] = value
        else:
            config[section] = value
    return digest(float_inputs(config, {"width": 4}, 5, "ab", device, processes))


def test_every_setting_that_may_change_bits_changes_the_key(monkeypatch):
    first = key(monkeypatch)
    assert key(monkeypatch) == first
    others = [
        key(monkeypatch, **{f"trainer__{name}": "another"})
        for name in (*CONFIG["trainer"], "a_setting_of_tomorrow")
        if name not in NOT_FOR_FLOAT_TRAINING
    ]
    others += [
        key(monkeypatch, seed=1),
        key(monkeypatch, pretrain__lr=0.2),
        key(monkeypatch, scheduler={}),
        key(monkeypatch, optimizer__momentum=0.0),
        key(monkeypatch, data__train_images=20),
        key(monkeypatch, processes=2),
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
    for name in NOT_FOR_FLOAT_TRAINING:
        assert key(monkeypatch, **{f"trainer__{name}": "another"}) == first
    same = {
        "data__root": "/elsewhere", "data__num_workers": 9, "optimizer__lr": 9.0,
        "optimizer__weight_decay": 9.0, "weight_quantizer": {}, "pretrain__checkpoint": "x",
    }  # fmt: skip
    assert key(monkeypatch, **same) == first
    assert key(monkeypatch, {**HERE, "kernels": {"kernels": "plain PyTorch"}}) == first
    on_gpu = {**HERE, "hardware": "NVIDIA H100"}
    assert key(monkeypatch, on_gpu) == key(monkeypatch, {**on_gpu, "cpu_threads": 1}) != first


@pytest.mark.parametrize("noted", ["../../etc", "pretrain-0123456789ab/..", "pretrain-x", ""])
def test_a_manifest_names_no_other_place(tmp_path, noted):
    (tmp_path / "model.safetensors").write_text("")
    assert SharedModel(tmp_path / "shared", {}, noted).folder.parent == tmp_path / "shared"
    assert SharedModel(tmp_path / "shared", {}, noted).folder.name != noted
