"""What load_packed brings along: little of the program, and what a caller has to know."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch
from export_helpers import quantized_network
from PIL import Image

import adq_train
from adq_train.deploy.evaluable import read_image
from adq_train.deploy.packed import packed_bytes

HEAVY = (
    "hydra", "omegaconf", "matplotlib", "tensorboard", "scipy", "sklearn", "onnx", "onnxruntime",
    "torchvision", "rich", "tqdm", "jinja2", "yaml", "PIL",
)  # fmt: skip
SCRIPT = """
import json, sys, torch
before = set(sys.modules)
import adq_train
network = adq_train.load_packed(sys.argv[1])
with torch.no_grad():
    network(torch.zeros(1, 1, 8, 8))
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_loading_imports_nothing_of_training(small, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed_bytes(small[1])[0])
    command = [sys.executable, "-c", SCRIPT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    new = json.loads(done.stdout)
    assert "adq_train.deploy.packed" in new
    assert not {x.split(".")[0] for x in new} & set(HEAVY)
    assert not [x for x in new if x.startswith(("torch._dynamo", "torch.onnx"))]
    for part in ("run", "training", "reporting", "sensitivity", "cli"):
        assert not [x for x in new if x.startswith(f"adq_train.{part}")]


def test_the_network_says_what_it_expects(tmp_path):
    _, model = quantized_network(shape=(3, 8, 8))
    pixels = replace(model.expects.pixels, mean=(10.0, 5.0, 2.0), std=(4.0, 3.0, 7.0), peak=16.0)
    expects = replace(model.expects, pixels=pixels, class_names=tuple("abcdefghij"))
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed_bytes(replace(model, expects=expects))[0])
    network = adq_train.load_packed(path)
    assert network.image_shape == (3, 8, 8)
    assert network.class_names == tuple("abcdefghij")
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    images = torch.from_numpy(values).permute(2, 0, 1)[None] / 255
    normalised = (images - network.mean) / network.std
    torch.testing.assert_close(normalised, read_image(tmp_path / "a.png", expects))
    assert not {"mean", "std"} & network.state_dict().keys()
    assert network.to("meta").mean.device.type == "meta"


def test_what_is_not_known_is_none(tmp_path):
    _, model = quantized_network()
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed_bytes(replace(model, expects=replace(model.expects, pixels=None)))[0])
    network = adq_train.load_packed(path)
    assert (network.mean, network.std, network.class_names) == (None, None, ())
