import hashlib
import json
import os
import random
import resource
import zlib
from dataclasses import replace

import pytest
import torch
from export_helpers import RESNET8, SHAPE, int8_network, quantized_network, torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

import adq_train
from adq_train.data.base import InputFormat
from adq_train.deploy.fold import fold_batch_norms
from adq_train.deploy.model import tables_of_network
from adq_train.deploy.packed import packed_bytes, read_packed
from adq_train.errors import UserError
from adq_train.models import CifarResNet


@pytest.fixture
def written(small, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed_bytes(small[1])[0])
    return path


def changed(path, tensors=None, **metadata):
    """Writes the file with other content and a digest that is right for it."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    header.update(metadata, sha256="0" * 64)
    content = save({**load(data), **(tensors or {})}, header)
    digest = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest, 1))


def with_index(path, change):
    """Writes the file with a changed index."""
    index = json.loads(zlib.decompress(load_file(path)["index"].numpy().tobytes()))
    change(index)
    text = zlib.compress(json.dumps(index).encode())
    changed(path, {"index": torch.frombuffer(bytearray(text), dtype=torch.uint8)})


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 2},
        {"bits": 8},
        {"bits": 5, "weights": "lsq", "inputs": "lsq"},
        {"bits": 4, "granularity": "channel", "level_set": "full"},
        {
            "bits": 3,
            "model": torchvision("mobilenet_v3_small"),  # grouped convolutions, layers with biases
            "shape": (3, 32, 32),
            "inputs": "lsq",
        },
    ],
    ids=["two-bits", "eight-bits", "lsq", "channel", "mobilenet"],
)
def test_logits_are_the_trained_networks_bit_for_bit(tmp_path, how):
    network, model = quantized_network(**how)
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed_bytes(model)[0])
    images = torch.randn(5, *model.expects.image_shape)
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(adq_train.load_packed(path)(images), expected)
        assert torch.equal(adq_train.load_packed(path, unpack_weights=False)(images), expected)


@pytest.fixture(scope="module")
def with_edges():
    """A network for integers, and its tables."""
    network = int8_network(CifarResNet(8, 4, 10, 1), SHAPE)
    tables = tables_of_network(network)
    return network, replace(tables, model=RESNET8, expects=InputFormat(10, SHAPE))


def test_edges_between_layers_come_back_bit_for_bit(with_edges, tmp_path):
    network, model = with_edges
    assert len(model.edges) == 7
    path, images = tmp_path / "model.safetensors", torch.randn(50, *SHAPE)
    path.write_bytes(packed_bytes(model)[0])
    assert read_packed(path).edges == model.edges
    with torch.no_grad():
        expected = network(images)
        for way in ({}, {"unpack_weights": False}, {"network": network}):
            assert torch.equal(adq_train.load_packed(path, **way)(images), expected)
        path.write_bytes(packed_bytes(fold_batch_norms(model))[0])
        folded = adq_train.load_packed(path)
        assert not [x for x in folded.modules() if isinstance(x, torch.nn.BatchNorm2d)]
        assert (folded(images) - expected).abs().median() < 1e-4
    # A program of before there were edges must not leave them out.
    assert b'"format_version":"2"' in path.read_bytes()
    path.write_bytes(packed_bytes(replace(model, edges=()))[0])
    assert b'"format_version":"1"' in path.read_bytes()


@pytest.mark.parametrize(
    "ends",
    [[[0, 255]] * 6, [[0, 255]] * 8, [[1, 255]] * 7, [[0, 256]] * 7, [[0.0, 255]] * 7, [7] * 7, 7],
)
def test_edges_that_lie_are_refused(with_edges, tmp_path, ends):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed_bytes(with_edges[1])[0])
    with_index(path, lambda x: x.update(edges=ends))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        adq_train.load_packed(path)


def test_sizes_are_what_the_allocation_promises(small):
    data, sizes = packed_bytes(small[1])
    layers = small[1].layers.values()
    assert sizes.codes == sum(-(-x.weight.codes.numel() * x.weight.bit_width // 8) for x in layers)
    assert sizes.floats == 4 * sum(x.numel() for x in small[1].floats.values())
    assert sizes.file == len(data)


def test_a_resnet20_file_is_within_two_percent_of_its_content():
    node = {"_target_": "adq_train.models.CifarResNetModel", "depth": 20, "width": 16}
    _, model = quantized_network(node, shape=(3, 32, 32), bits=3)
    sizes = packed_bytes(model)[1]
    assert sizes.file < 1.02 * (sizes.codes + sizes.tables + sizes.floats)


def test_float16_halves_the_float_parts(small, tmp_path):
    data, sizes = packed_bytes(small[1], torch.float16)
    assert sizes.floats == 2 * sum(x.numel() for x in small[1].floats.values())
    path = tmp_path / "half.safetensors"
    path.write_bytes(data)
    read = read_packed(path)
    for name, value in small[1].floats.items():
        assert read.floats[name].dtype is torch.float32
        assert torch.equal(read.floats[name], value.half().float())


def test_values_beyond_float16_are_refused(small):
    floats = {**small[1].floats, "bn1.running_var": torch.full((4,), 1e5)}
    with pytest.raises(UserError, match=r"bn1.running_var has values that .*float16 cannot hold"):
        packed_bytes(replace(small[1], floats=floats), torch.float16)


def test_loading_leaves_random_numbers_alone(written):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    adq_train.load_packed(written)
    assert torch.equal(torch.rand(1), expected)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(small, tmp_path, place, flip):
    data = bytearray(packed_bytes(small[1])[0])
    # Half of the examples in the header, where the structure is.
    header = 8 + int.from_bytes(data[:8], "little")
    position = int(2 * place * header) if place < 0.5 else int((2 * place - 1) * len(data))
    data[position] ^= flip
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        adq_train.load_packed(path)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.999])
def test_any_truncation_is_noticed(written, share):
    data = written.read_bytes()
    written.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"model\.safetensors is"):
        adq_train.load_packed(written)


def test_other_files_are_named_as_such(written, tmp_path):
    other = tmp_path / "float.safetensors"
    save_file({"x": torch.zeros(3)}, other)
    with pytest.raises(UserError, match="not a packed model of adq-train"):
        adq_train.load_packed(other)
    other.write_text("[1, 2]")
    with pytest.raises(UserError, match="not a safetensors file"):
        adq_train.load_packed(other)
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        adq_train.load_packed(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be read"):
        adq_train.load_packed(tmp_path)


def test_a_newer_format_asks_for_an_update(written):
    changed(written, format_version="3")
    with pytest.raises(UserError, match="format version 3, this adq-train reads up to 2; update"):
        adq_train.load_packed(written)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "adq_train.models.pickle.loads",
        "adq_train.models.BasicBlock",
        "adq_train.run.manifest.subprocess.run",
        "torch.hub.load",
        ["os.system"],
        None,
    ],
)
def test_no_target_of_a_file_is_imported(written, target, monkeypatch):
    changed(written, model=json.dumps({**RESNET8, "_target_": target}))
    monkeypatch.setattr("adq_train.deploy.architecture.construct", None)  # nothing may get this far
    with pytest.raises(UserError, match=r"model\._target_: .* nothing was imported"):
        adq_train.load_packed(written)


@pytest.mark.parametrize("target", ["antigravity.x", "adq_train.models.TorchvisionModel"])
def test_no_target_within_a_files_model_is_imported(written, target, monkeypatch):
    changed(written, model=json.dumps({**RESNET8, "width": {"_target_": target}}))
    monkeypatch.setattr("adq_train.deploy.architecture.construct", None)  # nothing may get this far
    with pytest.raises(UserError, match=r"model\.width\._target_: .* nothing was imported"):
        adq_train.load_packed(written)


def test_pretrained_weights_are_not_fetched(written, monkeypatch):
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    node = {**torchvision("squeezenet1_1"), "weights": "DEFAULT"}
    changed(written, model=json.dumps(node))
    with pytest.raises(UserError, match="does not fit its own architecture"):
        adq_train.load_packed(written)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.pop("layers"),
        lambda x: x.update(layers=7),
        lambda x: x["layers"][1].update(weight_bits=9),
        lambda x: x["layers"][1].update(weight_levels=2),
        lambda x: x["layers"][1].update(input_levels=300),
        lambda x: x["layers"][1].update(shape=[4, 4, 3, -3]),
        lambda x: x["layers"][1].update(shape=[10**9, 10**9, 3, 3]),
        lambda x: x["layers"][1].update(shape=[4, 4, 9]),
        lambda x: x["layers"][1].update(name="nowhere"),
        lambda x: x["layers"].pop(),
        lambda x: x["floats"].pop(),
        lambda x: x["floats"][0].__setitem__(0, "nowhere"),
        lambda x: x["floats"][0].__setitem__(1, [2, 2]),
        lambda x: x.update(folded={"bn1": "nowhere"}),
        lambda x: x.update(folded={"bn1": "bn1"}),
        lambda x: x["input"].update(num_classes=-3),
        lambda x: x["input"].update(num_classes="many"),
        lambda x: x["input"].update(num_classes=11),
    ],
)
def test_an_index_that_lies_is_refused(written, change):
    with_index(written, change)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        adq_train.load_packed(written)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x["input"].update(image_shape=[1, 40_000, 40_000]),
        lambda x: x["input"].update(image_shape=[4096, 4096, 4096]),
        lambda x: x["input"]["pixels"].update(resize=100_000),
        lambda x: x["layers"].append(x["layers"][-1]),
        lambda x: x["floats"].append(x["floats"][-1]),
        lambda x: x["layers"][1].update(shape=[]),
        lambda x: x["layers"][1].update(shape=[True] * 4),
        lambda x: x["layers"][1].update(weight_levels=257, weight_bits=8),
        lambda x: x["layers"][1].update(input_levels=1e400),
        lambda x: x.update(folded={"relu": "conv1"}),
        lambda x: x.update(folded={"bn1": "bn1"}),
        lambda x: x["data"].update(crop_padding=float("nan")),
    ],
)
def test_bombs_and_bent_values_of_an_index_are_refused(written, change):
    with_index(written, change)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        adq_train.load_packed(written)


@pytest.mark.parametrize(
    "node",
    [
        {**RESNET8, "width": 10**4},
        {**RESNET8, "width": 10**9},
        {**RESNET8, "width": 10**30},
        {**RESNET8, "depth": 6 * 10**6 + 2},
        torchvision("vit_h_14"),
    ],
)
def test_a_network_that_the_file_does_not_hold_is_not_built(written, node):
    changed(written, model=json.dumps(node))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="does not fit its own architecture"):
        adq_train.load_packed(written)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def test_several_problems_are_one_line(written):
    changed(written, model=json.dumps({"_target_": RESNET8["_target_"], "deptV": 8, "width": 4}))
    with pytest.raises(
        UserError, match=r"did you mean 'depth'.*; model\.depth: a value is"
    ) as error:
        adq_train.load_packed(written)
    assert "\n" not in str(error.value)


def test_an_index_that_explodes_is_refused(written):
    text = zlib.compress(b" " * (1 << 27), 9)
    changed(written, {"index": torch.frombuffer(bytearray(text), dtype=torch.uint8)})
    with pytest.raises(UserError, match="an index of more than 4,194,304 bytes"):
        adq_train.load_packed(written)


@pytest.mark.parametrize("version", ["0", "9" * 5000, "-1", "1.5", ""])
def test_versions_that_are_none_are_damage(written, version):
    changed(written, format_version=version)
    with pytest.raises(UserError, match="its format version is"):
        adq_train.load_packed(written)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        adq_train.load_packed(tmp_path / "pipe")


def test_floats_that_no_network_has_are_refused(written):
    floats = load(written.read_bytes())["floats"]
    for value in (float("nan"), float("inf")):
        changed(written, {"floats": torch.full_like(floats, value)})
        with pytest.raises(UserError, match="has values that are not finite"):
            adq_train.load_packed(written)
    changed(written, {"floats": torch.full_like(floats, -1.0)})
    with pytest.raises(UserError, match=r"running_var.* negative variance"):
        adq_train.load_packed(written)


def test_thresholds_that_no_input_reaches_come_back(small, tmp_path):
    name, tables = next(iter(small[1].layers.items()))
    thresholds = tables.input.thresholds.clone()
    thresholds[-2:] = torch.inf
    bent = replace(tables, input=replace(tables.input, thresholds=thresholds))
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed_bytes(replace(small[1], layers={**small[1].layers, name: bent}))[0])
    assert torch.equal(read_packed(path).layers[name].input.thresholds, thresholds)


WORDS = (0, -1, 1.5, 10**12, "", "x", None, True, [], {}, [[]], 1e308, "fc", [1, 8, 8])


def values_of(node):
    """Every place of a value in nested JSON, as (its holder, its key)."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from values_of(node[key])


@pytest.mark.parametrize("seed", range(2))
def test_any_bent_index_ends_in_an_error_or_a_network(written, seed):
    choose = random.Random(seed)
    original = written.read_bytes()

    def bend(index):
        holder, key = choose.choice(list(values_of(index)))
        if choose.random() < 0.2:
            del holder[key]
        else:
            holder[key] = choose.choice(WORDS)

    messages = []
    for _ in range(40):
        written.write_bytes(original)
        with_index(written, bend)
        try:
            adq_train.load_packed(written)
        except UserError as error:
            messages.append(str(error))
    assert 20 < len(messages) <= 40
    assert not any("\n" in message for message in messages)


def test_tensors_that_lie_are_refused(written):
    before = written.read_bytes()
    tensors = load(before)
    for wrong in (
        {"codes": tensors["codes"].float()},
        {"codes": torch.full_like(tensors["codes"], 255)},  # codes without a level
        {"tables": -tensors["tables"]},  # thresholds that fall
        {"floats": tensors["floats"][:-1].clone()},
        {"floats": torch.cat([tensors["floats"], torch.zeros(1)])},
        {"index": torch.zeros(9, dtype=torch.uint8)},
    ):
        written.write_bytes(before)
        changed(written, wrong)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            adq_train.load_packed(written)


def test_everything_comes_back(small, written):
    read = read_packed(written)
    assert (read.model, read.data, read.expects) == (RESNET8, small[1].data, small[1].expects)
    assert list(read.layers) == list(small[1].layers)
    for name, tables in small[1].layers.items():
        assert torch.equal(read.layers[name].weight.codes, tables.weight.codes)
        assert torch.equal(read.layers[name].input.thresholds, tables.input.thresholds)


def test_the_package_has_no_other_lazy_names():
    with pytest.raises(AttributeError, match="nothing"):
        adq_train.__getattr__("nothing")
