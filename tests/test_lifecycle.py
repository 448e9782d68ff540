"""A network of one's own to a file and back, and out of the process."""

import copy
import functools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import adq_train
from adq_train.deploy.verify import Agreement
from adq_train.errors import UserError
from adq_train.lifecycle import _digest, export
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer, LsqWeightQuantizer
from adq_train.quantization.prepare import quantized_layers


class Network(nn.Module):
    """A batch norm, a weight that two layers share, and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.mix, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.mix.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.grouped(x)).mean((2, 3))
        return self.head(torch.relu(self.tied(torch.relu(self.mix(x)))))


@pytest.fixture
def images():
    return torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(images):
    torch.manual_seed(0)
    return adq_train.quantize(Network(), [images], average_bits=3)


def trained(model, images, steps=3):
    """A few steps of training, whatever happened to the model before."""
    optimizer = torch.optim.SGD(adq_train.parameter_groups(model, 0.05, 1e-4), momentum=0.9)
    adq_train.follow(model, optimizer)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(32) % 5 * (step + 1) % 5).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("given", [Network, Network()], ids=["builder", "network"])
def test_training_goes_on_from_a_file_as_if_there_had_been_none(tmp_path, model, images, given):
    trained(model, images)
    adq_train.save(model, tmp_path / "model.safetensors")
    before = copy.deepcopy(given.state_dict()) if isinstance(given, nn.Module) else {}
    again = adq_train.load(tmp_path / "model.safetensors", given)
    assert torch.equal(again(images), model(images))
    assert again.adq == model.adq
    for name, tensor in before.items():
        assert torch.equal(given.state_dict()[name], tensor), name
    ends = [trained(x, images).state_dict() for x in (model, again)]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_a_quantized_network_carries_its_table_its_bits_and_its_sizes(model):
    carried = model.adq
    layers = quantized_layers(model)
    assert {x.name for x in carried.table.layers} <= set(layers)
    for name, bits in carried.allocation.bits().items():
        assert layers[name].weight_quantizer.bit_width == bits.weight_bits
    codes = sum(
        -(-layers[x.name].weight.numel() * x.weight_bits // 8) for x in carried.allocation.layers
    )
    assert carried.allocation.model_size_bytes == codes
    assert copy.deepcopy(model).adq == carried


def test_settings_of_quantizers_come_back(tmp_path, images):
    make = functools.partial(AdqWeightQuantizer, decay=0.5, level_set="full", adaptation="centroid")
    model = adq_train.quantize(Network(), [images], average_bits=3, make_weight_quantizer=make)
    adq_train.save(model, tmp_path / "a.safetensors")
    again = adq_train.load(tmp_path / "a.safetensors", Network)
    for layer in quantized_layers(again).values():
        found = layer.weight_quantizer
        assert (found.decay, found.level_set, found.adaptation) == (0.5, "full", "centroid")


def test_a_quantizer_of_ones_own_is_asked_for(tmp_path, images):
    def mine(bits):
        return LsqWeightQuantizer(bits)

    model = adq_train.quantize(
        Network(), [images], average_bits=3,
        make_weight_quantizer=mine, make_activation_quantizer=LsqActivationQuantizer,
    )  # fmt: skip
    file = tmp_path / "a.safetensors"
    adq_train.save(model, file)
    with pytest.raises(UserError, match=r"make_weight_quantizer: .* one of your own; give it here"):
        adq_train.load(file, Network)
    again = adq_train.load(file, Network, make_weight_quantizer=mine)
    assert torch.equal(again(images), model.eval()(images))


def rewrite(file, metadata):
    """Somebody's file: its digest is right."""
    state = load_file(file)
    metadata = {k: v for k, v in metadata.items() if k != "sha256"}
    save_file(state, file, {**metadata, "sha256": _digest(state, metadata)})


FOREIGN = ("os.system", "subprocess.Popen", "adq_train.storage.files.os.system")


@pytest.mark.parametrize("target", [*FOREIGN, "adq_train.models.CifarResNetModel", "adq_train.X"])
def test_no_code_comes_from_a_file(tmp_path, model, target):
    file = tmp_path / "a.safetensors"
    adq_train.save(model, file)
    with safe_open(str(file), "pt") as content:
        metadata = content.metadata()
    bad = {"_target_": target, "_partial_": True, "command": f"touch {tmp_path}/was-here"}
    metadata["quantizers"] = json.dumps([bad, None])
    rewrite(file, metadata)
    with pytest.raises(UserError, match="weight_quantizer"):
        adq_train.load(file, Network)
    assert not (tmp_path / "was-here").exists()


def test_files_that_are_something_else(tmp_path, model):
    file = tmp_path / "a.safetensors"
    adq_train.save(model, file)
    with pytest.raises(UserError, match="does not fit the network: "):
        adq_train.load(file, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    whole = file.read_bytes()
    for wrong, message in (
        (whole[: len(whole) // 2], "cannot be read"),
        (b"", "cannot be read"),
        (whole.replace(b'"format_version":"1"', b'"format_version":"9"'), "version 9"),
        (whole.replace(b"adq-train quantized", b"adq-train_quantized"), "is not a quantized"),
        (whole.replace(b"weight_bits", b"weight_bitz"), "is damaged"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=message):
            adq_train.load(file, Network)
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            adq_train.load(nothing, Network)
    file.write_bytes(whole)
    with safe_open(str(file), "pt") as content:
        metadata = content.metadata()
    for bent in (
        {**metadata, "quantizers": "[" * 200_000},
        {**metadata, "quantizers": "[1]"},
        {**metadata, "allocation": metadata["allocation"].replace('"stem"', '"norm"')},
        {k: v for k, v in metadata.items() if k != "table"},
    ):
        file.write_bytes(whole)
        rewrite(file, bent)
        with pytest.raises(UserError, match=r"damaged|does not fit"):
            adq_train.load(file, Network)


def test_only_quantized_networks_have_such_a_life(tmp_path, images):
    for act in (lambda: adq_train.save(Network(), tmp_path / "a"),
                lambda: export(Network(), tmp_path / "a.onnx", images)):  # fmt: skip
        with pytest.raises(UserError, match="model: it is not a quantized network"):
            act()
    assert not list(tmp_path.iterdir())


def test_a_packed_file_of_ones_own_network(tmp_path, model, images):
    trained(model, images)
    file = tmp_path / "model.safetensors"
    assert export(model, file, images).largest_difference == 0
    for network in (Network, Network(), model):
        packed = adq_train.load_packed(file, network=network)
        assert torch.equal(packed(images), model(images))
    num_bytes = sum(x.numel() * x.element_size() for x in Network().state_dict().values())
    assert file.stat().st_size < num_bytes * 4  # a header of names outweighs a tiny network
    with pytest.raises(UserError, match=r"holds a network of your own; .*network="):
        adq_train.load_packed(file)
    with pytest.raises(UserError, match="not fit its own architecture"):
        adq_train.load_packed(file, network=nn.Linear(3, 3))


def test_an_onnx_file_of_ones_own_network(tmp_path, model, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    trained(model, images)
    file = tmp_path / "model.onnx"
    agreement = export(model, file, images)
    assert (agreement.num_images, agreement.different) == (32, 0)
    session = onnxruntime.InferenceSession(str(file))
    (name,) = (x.name for x in session.get_inputs())
    for count in (1, 7):  # N is free
        (found,) = session.run(None, {name: images[:count].numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found), model(images[:count]), atol=1e-4, rtol=1e-4
        )
    with pytest.raises(UserError, match=r"format: must be one of .*, got None for model\.pb"):
        export(model, tmp_path / "model.pb", images)
    assert [x.name for x in tmp_path.iterdir()] == ["model.onnx"]


def test_integers_of_ones_own_network(tmp_path, model, images):
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(UserError, match="not one of target=int8"):
        export(model, tmp_path / "model.tflite", images)
    torch.manual_seed(0)
    integers = adq_train.quantize(Network(), [images], average_bits=3, target="int8")
    file = tmp_path / "model.tflite"
    agreement = export(trained(integers, images), file, images)
    assert (agreement.num_images, agreement.different) == (32, 0)
    assert file.read_bytes()[4:8] == b"TFL3"
    assert [x.name for x in tmp_path.iterdir()] == ["model.tflite"]


def test_the_model_is_left_as_it_was(tmp_path, model, images):
    model.train()
    before = copy.deepcopy(model.state_dict())
    adq_train.save(model, tmp_path / "a")
    export(model, tmp_path / "b.safetensors", images)
    assert model.training
    assert list(before) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_a_compiled_network_is_saved_as_what_it_is(tmp_path, model, images):
    adq_train.save(torch.compile(model, backend="eager"), tmp_path / "a")
    again = adq_train.load(tmp_path / "a", Network)
    assert torch.equal(again(images), model.eval()(images))


class Permuted(Network):
    """Its outputs depend on integers, which a packed file does not hold."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([4, 2, 0, 1, 3]))

    def forward(self, x):
        return super().forward(x)[:, self.order]


def test_a_packed_file_holds_all_that_the_outputs_depend_on_or_is_refused(tmp_path, images):
    model = adq_train.quantize(Permuted(), [images], average_bits=3)
    with pytest.raises(UserError, match=r"no buffer of torch.int64, and the network has order; "):
        export(model, tmp_path / "a.safetensors", images)
    assert not list(tmp_path.iterdir())


class Embedded(nn.Module):
    """A float embedding that has its weight in common with a quantized layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.embedding = nn.Embedding(5, 8)
        self.embedding.weight = self.head.weight

    def forward(self, x):
        row = self.embedding.weight[x.argmax(1) % 5]
        return self.head(torch.relu(self.inner(x)) + row)


def test_a_float_tensor_that_a_quantized_layer_shares_is_in_the_file(tmp_path):
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    model = adq_train.quantize(Embedded(), [inputs], average_bits=3, first_last_bits=None)
    export(model, tmp_path / "a.safetensors", inputs)
    torch.manual_seed(7)
    packed = adq_train.load_packed(tmp_path / "a.safetensors", network=Embedded)
    assert torch.equal(packed(inputs), model.eval()(inputs))


def test_a_changed_bit_is_noticed(tmp_path, model):
    file = tmp_path / "a.safetensors"
    adq_train.save(model, file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .its SHA-256 is another"):
        adq_train.load(file, Network)


def test_buffers_that_are_views_of_one_tensor(tmp_path, images):
    network = Network()
    both = torch.arange(4.0)
    network.register_buffer("low", both[:2])
    network.register_buffer("high", both[2:])
    model = adq_train.quantize(network, [images], average_bits=3)
    adq_train.save(model, tmp_path / "a")

    def build():
        again = Network()
        again.register_buffer("low", torch.zeros(2))
        again.register_buffer("high", torch.zeros(2))
        return again

    assert adq_train.load(tmp_path / "a", build).high.tolist() == [2.0, 3.0]


def test_a_network_that_has_the_attribute_itself_is_refused(images):
    network = Network()
    network.adq = nn.Linear(2, 2)
    with pytest.raises(UserError, match="model: its attribute adq"):
        adq_train.quantize(network, [images])


class Small(nn.Module):
    """Two convolutions and a classifier, called in some other way."""

    def __init__(self, way=None):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.head, self.way = nn.Linear(128, 5), way
        if way == "scalar":
            self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.second(input=x) if self.way == "named" else self.second(x)
        x = x.view(len(x), -1) if self.way == "len" else torch.flatten(torch.relu(x), 1)
        x = self.head(x)
        return x * self.scale if self.way == "scalar" else x


def small(images, way=None, **options):
    torch.manual_seed(0)
    return adq_train.quantize(Small(way), [images], average_bits=3, **options)


FORMATS = [("float", "packed"), ("float", "onnx"), ("int8", "qdq"), ("int8", "tflite")]


@pytest.mark.parametrize(("target", "format"), FORMATS)
def test_a_file_that_loses_a_hook_is_refused(images, tmp_path, target, format):
    model = small(images, target=target)
    export(model, tmp_path / "whole", images, format=format)
    model.second.register_forward_hook(lambda module, inputs, output: 3 * output + 1)
    with pytest.raises(UserError, match="no file was written"):
        export(model, tmp_path / "x", images, format=format)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("target", "format"), FORMATS)
def test_a_layer_may_be_called_by_the_name_of_its_input(images, tmp_path, target, format):
    model = small(images, "named", target=target)
    assert export(model, tmp_path / "x", images, format=format).different == 0


def test_a_parameter_without_dimensions_is_packed(images, tmp_path):
    model = small(images, "scalar")
    export(model, tmp_path / "x", images, format="packed")
    assert adq_train.load_packed(tmp_path / "x", network=Small("scalar")).scale == 2


def test_an_output_size_is_packed(tmp_path):
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(1, 4, 3, stride=2), nn.ConvTranspose2d(4, 3, 3, stride=2)

        def forward(self, x):
            return self.up(self.down(x), output_size=x.shape[2:])

    images = torch.randn(8, 1, 8, 8)
    model = adq_train.quantize(Up(), [images], first_last_bits=None, bits={"*": 4})
    assert model(images).shape == (8, 3, 8, 8)
    assert export(model, tmp_path / "x", images, format="packed").largest_difference == 0


@pytest.mark.parametrize("number", [2, 16])
def test_an_onnx_file_of_one_batch_size_is_refused(images, tmp_path, number):
    with pytest.raises(UserError, match=r"fixes the size of a batch.*x\.shape\[0\]"):
        export(small(images, "len"), tmp_path / "x", images[:number], format="onnx")


@pytest.mark.parametrize("name", ["second.weight", "second.input_quantizer.log_widths"])
def test_broken_values_are_not_written(images, tmp_path, name):
    model = small(images)
    with torch.no_grad():
        model.get_parameter(name).fill_(torch.nan)
    for write in (adq_train.save, functools.partial(export, example=images, format="onnx")):
        with pytest.raises(UserError, match=f"{name} holds NaN"):
            write(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_is_no_tensor_is_not_written(images, tmp_path):
    class Extra(Small):
        def get_extra_state(self):
            return {"seen": 3}

    model = adq_train.quantize(Extra(), [images], average_bits=3)
    with pytest.raises(UserError, match="_extra_state is a dict"):
        adq_train.save(model, tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_only_float32_is_exported(images, tmp_path, dtype):
    with pytest.raises(UserError, match=r"export model\.float\(\)"):
        export(small(images).to(dtype), tmp_path / "x", images.to(dtype), format="packed")


def test_a_runtime_may_differ_on_a_share_of_the_example(images, tmp_path, monkeypatch):
    model = small(images)
    one = Agreement(len(images), 1, 0.5)
    monkeypatch.setattr("adq_train.deploy.verify.compare", lambda *_: one)
    with pytest.raises(UserError, match=r"on 1 of .*more than tolerance=0\.001 allows"):
        export(model, tmp_path / "m.onnx", images)
    assert not list(tmp_path.iterdir())
    assert export(model, tmp_path / "m.onnx", images, tolerance=1 / len(images)) == one
    with pytest.raises(UserError, match="tolerance: must be a share from 0 to 1, got 2"):
        export(model, tmp_path / "m.onnx", images, tolerance=2)


def test_a_weight_that_forward_uses_itself_is_refused_in_one_line(images, tmp_path):
    class Tied(Small):
        def forward(self, x):
            return super().forward(x) @ self.head.weight

    torch.manual_seed(0)
    model = adq_train.quantize(Tied(), [images], average_bits=3)
    for format, told in (("packed", "cannot be run beside"), ("onnx", "unsupported operand")):
        with pytest.raises(UserError, match=told):
            export(model, tmp_path / "x", images, format=format)
