"""Networks of timm as a model group; those named test_… are tiny."""

import sys
from dataclasses import replace

import pytest
import torch
from export_helpers import quantized_network

import adq_train
from adq_train.deploy.packed import packed_bytes
from adq_train.errors import UserError
from adq_train.models import TimmModel
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.full_precision import Strictness
from adq_train.settings.validate import validate

NODE = {"_target_": "adq_train.models.TimmModel", "name": "test_efficientnet", "weights": None}


def model(**changes):
    return TimmModel(**{"name": "test_vit", "weights": None, **changes})


def test_without_timm_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"name: needs the package timm .*pip install 'adq-train"):
        model()


class TestWithTimm:
    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm", reason="timm is not installed")

    def test_data_decide_on_channels_and_classes(self):
        network = model(options={"img_size": 16, "patch_size": 8}).build(7, 1).eval()
        assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 7)
        assert network.pos_embed.shape[1] == 1 + 2 * 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "test_vitt"}, r"name: timm has no model 'test_vitt' \(did you mean 'test_vi"),
            ({"name": "hf_hub:somebody/model"}, "name: timm has no model 'hf_hub:"),
            ({"weights": "V7"}, r"weights: test_vit has DEFAULT, .*, got 'V7'; a file of weights"),
            ({"options": {"checkpoint_path": "x"}}, "checkpoint_path is not of the network's"),
            ({"options": {"pretrained_cfg": "x"}}, "pretrained_cfg is not of the network's"),
            ({"options": {"img_size": [8, 10**6]}}, "img_size must be at most 4,096, got"),
            ({"options": {"block": {"a": 1}}}, "block must be a plain value"),
        ],
    )
    def test_what_is_wrong_is_named(self, changes, message):
        with pytest.raises(ValueError, match=message):
            model(**changes)

    def test_a_constructor_that_refuses_is_named(self):
        with pytest.raises(UserError, match=r"timm cannot build test_vit \(TypeError: .*'widht'"):
            model(options={"widht": 3}).build(10, 3)

    def test_pretrained_weights_are_asked_of_timm(self, timm, monkeypatch):
        asked = []

        def create_model(name, **arguments):
            asked.append((name, arguments))
            raise OSError("no route to host")

        monkeypatch.setattr(timm, "create_model", create_model)
        tag = timm.list_models("test_vit.*", pretrained=True)[0].partition(".")[2]
        for weights, name in (("DEFAULT", "test_vit"), (tag, f"test_vit.{tag}")):
            with pytest.raises(UserError, match=r"no route to host; .*pretrain\.checkpoint"):
                model(weights=weights).build(10, 3)
            assert asked.pop() == (name, {"pretrained": True, "num_classes": 10, "in_chans": 3})

    def test_every_layer_of_several_families_is_quantized(self):
        allowed = Strictness(True, ["pos_embed", "*relative_position_bias_table"])
        for name in ("test_efficientnet", "test_nfnet", "test_convnext", "test_vit", "test_maxvit"):
            network = TimmModel(name=name, weights=None).build(10, 3)
            size = (
                network.default_cfg["input_size"][-1] if name in ("test_vit", "test_maxvit") else 64
            )
            assert describe_layers(network, torch.zeros(1, 3, size, size), strictness=allowed)

    def test_a_packed_file_names_it_and_fetches_nothing(self, tmp_path):
        network, tables = quantized_network(NODE, shape=(3, 32, 32))
        path = tmp_path / "model.safetensors"
        named = replace(tables, model={**NODE, "weights": "DEFAULT", "options": None})
        path.write_bytes(packed_bytes(named)[0])
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(adq_train.load_packed(path)(images), network(images))

    def test_it_is_a_choice_of_the_command_line(self):
        from test_configs import composed

        _, parts = validate(composed("model=timm", "model.options={img_size:32}"))
        assert parts.model == TimmModel(name="resnet18", weights=None, options={"img_size": 32})
