import copy
import json
import logging
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from helpers import QUICK
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adq_train import load_packed
from adq_train.cli.export import export_main
from adq_train.errors import UserError
from adq_train.models import BasicBlock, CifarResNetModel
from adq_train.states import load_state, load_weights, weights_digest


def build(num_classes=4):
    return CifarResNetModel(depth=8, width=2).build(num_classes, 1)


@pytest.fixture
def small():
    torch.manual_seed(1)
    return build()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def loaded(path, model=None, **how):
    """The state of a network of other weights, once it has those of the file."""
    model = model or build()
    load_weights(model, path, **how)
    return model.state_dict()


def refused(path, model=None, **how):
    """Why a file is refused: one line; the network is as it was."""
    model = model or build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(model, path, **how)
    assert equal(model.state_dict(), before)
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    return text


def prefixed(state, prefix):
    return OrderedDict((prefix + name, x) for name, x in state.items())


def test_every_form_of_checkpoint_is_read_exactly(small, tmp_path):
    state = small.state_dict()
    forms = [
        state,
        dict(state),
        {**state, "epoch": 3},
        {"state_dict": state, "epoch": 3, "best": torch.tensor(3.5)},
        {"key": "x", "outer": {"state_dict": {"model": state}}},
        {
            "state_dict": prefixed(state, "model."),
            "optimizer": {"state": {0: {"m": torch.ones(1)}}},
        },
    ]
    forms += [
        {name: state}
        for name in ("model", "net", "model_state_dict", "model_state", "ema", "state_dict_ema",
                     "params", "params_ema", "anything")
    ]  # fmt: skip
    forms += [
        prefixed(state, prefix)
        for prefix in ("module.", "_orig_mod.", "model.", "net.", "backbone.", "model.backbone.",
                       "module._orig_mod.", "_orig_mod.module.", "layer1.")
    ]  # fmt: skip
    for form in forms:
        torch.save(form, tmp_path / "x.pt")
        assert equal(loaded(tmp_path / "x.pt"), state), list(form)[:3]
    kept = {name: x.clone() for name, x in state.items()}
    save_file(kept, tmp_path / "x.safetensors")
    save_file(kept, tmp_path / "with_another_name.pt")
    torch.save(state, tmp_path / "another.safetensors")
    torch.save(state, tmp_path / "old.tar", _use_new_zipfile_serialization=False)
    for name in ("x.safetensors", "with_another_name.pt", "another.safetensors", "old.tar"):
        assert equal(loaded(tmp_path / name), state)


def test_an_average_by_torch_is_read(small, tmp_path):
    average = AveragedModel(small)
    assert "n_averaged" in average.state_dict()
    torch.save({"model_ema": average.state_dict()}, tmp_path / "x.pt")
    assert equal(loaded(tmp_path / "x.pt"), small.state_dict())


def test_counters_that_are_missing_stay(small, tmp_path):
    state = {k: x for k, x in small.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "x.pt")
    found = loaded(tmp_path / "x.pt")
    assert equal({k: found[k] for k in state}, state)
    assert found["bn1.num_batches_tracked"] == 0


def test_where_several_states_fit_the_choice_is_said_or_made(small, tmp_path, caplog):
    torch.manual_seed(2)
    plain, average = build().state_dict(), build().state_dict()
    both = [
        ({"state_dict_ema": average, "state_dict": plain}, "state_dict_ema"),
        ({"ema": average, "outer": {"model": plain}}, "ema"),
        ({**prefixed(average, "ema_model."), **prefixed(plain, "online_model.")}, "ema_model"),
        ({"model": {**prefixed(average, "ema."), **plain}}, "model.ema"),
    ]
    for content, key in both:
        torch.save(content, tmp_path / "x.pt")
        caplog.clear()
        assert equal(loaded(tmp_path / "x.pt"), plain), key
        assert "several states that fit" in caplog.text
        assert key in caplog.text
        caplog.clear()
        assert equal(loaded(tmp_path / "x.pt", key=key), average), key
        assert not caplog.text
        assert "has no state 'other' that fits" in refused(tmp_path / "x.pt", key="other")


@pytest.mark.parametrize("save", [torch.save, lambda x, path: save_file(x, path)])
def test_half_and_double_weights_become_float32(small, tmp_path, caplog, save):
    caplog.set_level(logging.INFO)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {
            k: x.to(dtype) if x.is_floating_point() else x.clone()
            for k, x in small.state_dict().items()
        }
        save(state, tmp_path / "x.pt")
        found = loaded(tmp_path / "x.pt")
        for name, x in state.items():
            assert found[name].dtype == small.state_dict()[name].dtype
            assert torch.equal(found[name], x.to(found[name].dtype))
        assert f"{str(dtype)[6:]} weights; they become float32" in caplog.text


def test_weights_of_other_types_are_refused_by_name(small, tmp_path):
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64):
        torch.save({**small.state_dict(), "fc.weight": torch.ones(4, 8).to(dtype)}, tmp_path / "x")
        assert f"fc.weight is {str(dtype)[6:]}, the model's float32" in refused(tmp_path / "x")
    half = torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8)
    for odd, message in ((half, "fc.weight is qint8"), (torch.eye(4, 8).to_sparse(), "is sparse")):
        torch.save({**small.state_dict(), "fc.weight": odd}, tmp_path / "x")
        assert message in refused(tmp_path / "x")
    torch.save({**small.state_dict(), "bn1.num_batches_tracked": torch.tensor(0.5)}, tmp_path / "x")
    assert "bn1.num_batches_tracked is float32, the model's int64" in refused(tmp_path / "x")


def test_values_that_no_network_can_use_are_found(small, tmp_path):
    for name, place, value, message in (
        ("layer3.0.conv2.weight", (1, 2, 0, 1), math.nan, "[1, 2, 0, 1] is nan (1 of 576 values)"),
        ("fc.bias", (3,), math.inf, "[3] is inf"),
        ("layer1.0.bn2.running_mean", (0,), -math.inf, "[0] is -inf"),
        ("layer3.0.bn2.running_var", (5,), -1.0, "[5] is -1 (1 of 8 values)"),
        ("fc.weight", (0, 7), 1e300, "[0, 7] is inf"),
    ):
        state = {k: x.clone() for k, x in small.state_dict().items()}
        state[name] = state[name].double()
        state[name][place] = value
        torch.save(state, tmp_path / "x.pt")
        assert f"no network can use: {name}{message}" in refused(tmp_path / "x.pt")
    state["layer3.0.bn2.running_var"] = torch.zeros(8)  # as of a channel that is always 0
    torch.save({**state, "fc.weight": torch.ones(4, 8)}, tmp_path / "x.pt")
    assert loaded(tmp_path / "x.pt")["layer3.0.bn2.running_var"].sum() == 0


def test_another_head(small, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "x.pt"
    headless = {k: x for k, x in small.state_dict().items() if not k.startswith("fc.")}
    for state, what in ((small.state_dict(), "fc.weight has shape (4, 8), the model (7, 8)"),
                        (headless, "fc.weight is missing")):  # fmt: skip
        torch.save(state, path)
        assert what in refused(path, build(7))
        assert refused(path, build(7)).endswith(
            "pretrain.head=new gives the last layer fresh weights"
        )
        teacher = refused(path, build(7), setting="distillation.checkpoint")
        assert teacher.endswith("a teacher must know the classes of the data")
        model = build(7)
        before = copy.deepcopy(model.fc.state_dict())
        load_weights(model, path, new_head=True)
        assert equal(model.fc.state_dict(), before)
        assert all(torch.equal(model.state_dict()[k], x) for k, x in headless.items())
        assert "new weights for the last layer, fc.bias, fc.weight" in caplog.text
    # Also where the shape would fit.
    torch.save(small.state_dict(), path)
    model = build()
    load_weights(model, path, new_head=True)
    assert not torch.equal(model.fc.weight, small.fc.weight)
    assert torch.equal(model.conv1.weight, small.conv1.weight)


def test_a_checkpoint_that_does_not_fit(small, tmp_path):
    state = small.state_dict()
    del state["fc.bias"]
    state["extra"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(2, 3, 3, 3)
    torch.save(state, tmp_path / "x.pt")
    text = refused(tmp_path / "x.pt")
    for part in (
        f"{tmp_path / 'x.pt'} does not fit the model",
        "fc.bias is missing",
        "extra is not in the model",
        "conv1.weight has shape (2, 3, 3, 3), the model (2, 1, 3, 3)",
        "choose the model group",
    ):
        assert part in text
    assert " more" not in text


def test_a_checkpoint_of_another_model_names_three_problems(small, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    lacking = [k for k in small.state_dict() if not k.endswith("num_batches_tracked")]
    text = refused(tmp_path / "x.pt")
    assert "conv1.weight is missing; " in text
    assert f" and {len(lacking) + 1 - 3} more;" in text


def test_what_stands_beside_the_network_is_named(small, tmp_path):
    state = prefixed(small.state_dict(), "model.")
    torch.save({"state_dict": {**state, "criterion.weight": torch.ones(4)}}, tmp_path / "x.pt")
    assert "criterion.weight is not in the model" in refused(tmp_path / "x.pt")
    # A profiler's counts are known.
    torch.save({**state, "model.fc.total_ops": torch.ones(1)}, tmp_path / "x.pt")
    assert equal(loaded(tmp_path / "x.pt"), small.state_dict())
    quantized = {**small.state_dict(), "conv1.weight_quantizer.codebook": torch.ones(4)}
    torch.save(quantized, tmp_path / "x.pt")
    assert "init_from=RUN_FOLDER" in refused(tmp_path / "x.pt")


def test_a_tensor_that_claims_to_be_huge(small, tmp_path):
    """One value, shown as 10^12 of them: nothing is made of that size."""
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({**small.state_dict(), "fc.weight": huge}, tmp_path / "x.pt")
    assert "fc.weight has shape (1000000, 1000000)" in refused(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("y/data.pkl", bytes(10**6))
    assert "is compressed, and larger than it looks" in refused(tmp_path / "y.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint(small, tmp_path, name, share):
    path = tmp_path / name
    save = torch.save if name == "x.pt" else save_file
    save(small.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert re.search(f"{path} is damaged", refused(path))


def test_files_that_are_no_checkpoints(small, tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "folder").mkdir()
    torch.save(small.state_dict(), tmp_path / "folder" / "best.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w") as archive:
        archive.writestr("a.npy", b"x")
    for path, message in (
        (tmp_path / "none.pt", "there is no file"),
        (tmp_path / "fifo.pt", "not a regular file"),
        (tmp_path / "folder", r"is a folder; give a file in it \(best.pt\)"),
        (tmp_path / "run", f"is a folder; init_from={tmp_path / 'run'} starts from the run"),
        (tmp_path / "arrays.npz", "not one that torch.save has written"),
        (written("page.pt", b"<!DOCTYPE html><html>404"), "is a web page"),
        (written("lfs.pt", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (written("text.pt", b"hello"), "no checkpoint .it begins with b'hello'"),
        (written("noise.pt", bytes(range(1, 200))), "is damaged, or no checkpoint"),
    ):
        text = refused(path)
        assert text.startswith("pretrain.checkpoint: ")
        assert re.search(message, text), text
    for content in ([1, 2], {"epoch": 3}, torch.zeros(2), {}):
        torch.save(content, tmp_path / "x.pt")
        assert "does not hold a state dict of tensors" in refused(tmp_path / "x.pt")


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_checkpoint_does_not_run(tmp_path, save):
    trace, path = tmp_path / "trace", tmp_path / "x.pt"
    save({"fc.weight": Runs(trace)}, path)
    assert f"{path} cannot be read as plain tensors" in refused(path)
    assert not trace.exists()
    # The attack works on whoever trusts the file.
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_remedy_for_files_that_need_code_helps(small, tmp_path):
    """Each message holds a command that makes a file which can be read."""
    state = small.state_dict()
    cases = {
        "a scalar.pt": {"state_dict": state, "accuracy": numpy.float64(93)},
        "arguments.pt": {"model": state, "args": Namespace(lr=0.1)},
        "arrays.pt": {name: x.numpy() for name, x in state.items()},
        "module.pt": small,
        "wrapped.pt": {"model": small, "epoch": 3},
    }
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    torch.jit.trace(small.eval(), torch.ones(1, 1, 8, 8)).save(tmp_path / "script.pt")
    codes, targets = [], []
    for name in (*cases, "script.pt"):
        text = refused(tmp_path / name)
        words = shlex.split(text[text.index("run python -c ") :])
        assert words[:3] == ["run", "python", "-c"]
        codes.append(words[3])
        targets.append(tmp_path / f"{name[:-3]}.weights.pt")
        assert str(targets[-1]) in text
    one_after_the_other = (
        "import sys\nfor code in sys.argv[1:]: exec(code, {})"  # one import of torch
    )
    command = [sys.executable, "-c", one_after_the_other, *codes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for target in targets:
        assert equal(loaded(target), state), target


def mnasnet():
    torch.manual_seed(0)
    return torchvision.models.mnasnet0_5(num_classes=3)


def test_module_versions_are_kept_or_restored(tmp_path):
    """torchvision's MNASNet refuses a state without them."""
    model, other = mnasnet(), torchvision.models.mnasnet0_5(num_classes=3)
    bare = dict(model.state_dict())
    with pytest.raises(ValueError, match="version"):
        other.load_state_dict(bare)
    load_state(other, bare)
    assert equal(other.state_dict(), model.state_dict())
    for content in (model.state_dict(), bare, nn.DataParallel(model).state_dict()):
        torch.save({"model": content}, tmp_path / "x.pt")
        assert equal(loaded(tmp_path / "x.pt", torchvision.models.mnasnet0_5(num_classes=3)), bare)
    save_model(model, str(tmp_path / "x.safetensors"))
    path = tmp_path / "x.safetensors"
    assert equal(loaded(path, torchvision.models.mnasnet0_5(num_classes=3)), bare)


def test_a_tied_tensor_needs_one_of_its_names(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model = tied()
    save_model(model, str(tmp_path / "x.safetensors"))
    assert equal(loaded(tmp_path / "x.safetensors", tied()), model.state_dict())


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_the_files_that_torchvision_publishes(tmp_path):
    """Names of before 2017 in DenseNet, of version 1 in ViT, and GoogLeNet's extra classifiers."""
    models = torchvision.models
    dense = models.DenseNet(8, (2, 2), 8, num_classes=3)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", k): x
        for k, x in dense.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "x.pt")
    fresh = models.DenseNet(8, (2, 2), 8, num_classes=3)
    assert equal(loaded(tmp_path / "x.pt", fresh), dense.state_dict())

    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 1}
    sizes |= {"hidden_dim": 4, "mlp_dim": 4, "num_classes": 3}
    vit = models.VisionTransformer(**sizes)
    old = {
        k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): x
        for k, x in vit.state_dict().items()
    }
    torch.save({"model": prefixed(old, "module.")}, tmp_path / "x.pt")
    fresh = models.VisionTransformer(**sizes)
    assert equal(loaded(tmp_path / "x.pt", fresh), vit.state_dict())

    google = models.googlenet(num_classes=3, aux_logits=True)
    torch.save(google.state_dict(), tmp_path / "x.pt")
    google.aux1 = google.aux2 = None
    fresh = models.googlenet(num_classes=3, aux_logits=False)
    assert equal(loaded(tmp_path / "x.pt", fresh), google.state_dict())


@pytest.fixture
def strict_about_versions(monkeypatch):
    """Blocks that refuse a state without the version of their class, as MNASNet does."""

    def load(self, state, prefix, metadata, *more):
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')} of {prefix} is not known")
        nn.Module._load_from_state_dict(self, state, prefix, metadata, *more)

    monkeypatch.setattr(BasicBlock, "_version", 2)
    monkeypatch.setattr(BasicBlock, "_load_from_state_dict", load)


def test_a_run_keeps_module_versions(job, monkeypatch, strict_about_versions, no_pictures):
    """Through the shared float model, its own checkpoints, averages, a resume and the export."""
    more = ("trainer.weight_average_decay=0.9", "trainer.select=best")
    for run_dir in ("run", "again"):
        assert job(*QUICK, *more, f"run_dir={run_dir}").code == 0
    result = Path("again/result.json").read_text()
    Path("again/status.json").unlink()
    assert job(*QUICK, *more, "run_dir=again").code == 0
    top1 = json.loads(result)["qat_top1_percent"]
    assert json.loads(Path("again/result.json").read_text())["qat_top1_percent"] == top1
    floats = next(Path("outputs/shared").glob("*/model.safetensors"))
    outcome = job(*QUICK, f"pretrain.checkpoint={floats}", "trainer.epochs=0", "run_dir=third")
    assert outcome.code == 0, outcome.err
    monkeypatch.setattr(sys, "argv", ["adq-export", "again"])
    export_main()
    assert isinstance(load_packed("again/export/model.safetensors"), nn.Module)


def test_a_new_head_is_trained(job, no_pictures):
    """The checkpoint's other layers are where its float training begins."""
    quick = (*QUICK, "pretrain.lr=1e-9", "pretrain.weight_decay=0", "trainer.epochs=0")
    torch.manual_seed(3)
    given = CifarResNetModel(depth=8, width=4).build(3, 1)
    torch.save(given.state_dict(), "x.pt")
    outcome = job(*quick, "pretrain.checkpoint=x.pt", "run_dir=run")
    assert outcome.code != 0
    assert "pretrain.head=new" in outcome.err
    outcome = job(*quick, "pretrain.checkpoint=x.pt", "pretrain.head=new", "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert "new weights for the last layer, fc.bias, fc.weight" in outcome.err
    assert "pretrain: 1 epochs" in outcome.err
    trained = load_file(next(Path("outputs/shared").glob("*/model.safetensors")))
    assert trained["fc.weight"].shape == (10, 16)
    torch.testing.assert_close(trained["layer2.0.conv1.weight"], given.layer2[0].conv1.weight.data)
    # Another file is another float model.
    torch.save({k: x * 2 for k, x in given.state_dict().items()}, "x.pt")
    assert job(*quick, "pretrain.checkpoint=x.pt", "pretrain.head=new", "run_dir=other").code == 0
    assert len(list(Path("outputs/shared").glob("*/model.safetensors"))) == 2


def test_settings_about_a_checkpoint_that_is_not_given(cli):
    outcome = cli(*QUICK, "pretrain.head=new", "pretrain.checkpoint_key=ema")
    assert outcome.code != 0
    for name in ("head: new", "checkpoint_key: ema"):
        assert f"pretrain.{name} is about pretrain.checkpoint; give that too" in outcome.err
    outcome = cli(*QUICK, "pretrain.head=new", "pretrain.checkpoint=x.pt", "init_from=run")
    assert "pretrain.head: new needs float training, and init_from does none" in outcome.err


def test_the_digest_depends_on_every_value_and_name():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).bfloat16()
    first = weights_digest(net)
    assert weights_digest(copy.deepcopy(net)) == first
    renamed = nn.Sequential()
    renamed.add_module("first", net[0])
    renamed.add_module("1", net[1])
    assert weights_digest(renamed) != first
    net[1].running_mean[1] += 1
    second = weights_digest(net)
    net[0].weight.data[0, 0, 0, 0] += 1
    assert len({first, second, weights_digest(net)}) == 3
