"""A row of the table of networks says what was measured of a network."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def table(monkeypatch):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("networks_table")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.place = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x):
        return self.c(self.b(self.a(x).relu() + self.place).relu().mean((2, 3)))


def test_a_row_of_a_network_with_a_part_that_stays_float(table, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "IMAGES", 4)
    network = table.Network(Small, channels=1, side=8)
    row = table.measure(network, tmp_path)
    assert (row.quantized, row.weights) == (36 + 144 + 12, 36 + 144 + 12 + 144)
    assert row.float_bytes == 4 * (row.weights + 4 + 4 + 3)
    assert row.packed_bytes == (tmp_path / "packed.safetensors").stat().st_size
    (left,) = row.left
    assert left.startswith("place stays in full precision")
    assert row.loaded.tolist() == row.packed.tolist() == [0, 0, 0, 0]
    assert row.onnx.max() < 1e-3
    assert row.omega_seconds > 0
    cells = [x.strip() for x in table.line("small", network, row).strip("|").split("|")]
    assert len(cells) == len(table.COLUMNS)
    assert cells[:4] == ["small", "1 × 8 × 8", "0.00 M", "57.14 %"]
    assert cells[6:8] == ["bit for bit", "bit for bit"]


def test_differences_are_told_image_by_image(table, monkeypatch):
    monkeypatch.setattr(table, "IMAGES", 4)
    row = table.Row(
        1, 1, (), 1, 1, 1.0, *[torch.zeros(4)] * 2, torch.tensor([0, 0, 0.53, 1e-6]),
        torch.full((4,), 1e-6), 1.0,
    )  # fmt: skip
    cells = table.line("x", table.Network(Small), row).split(" | ")
    assert cells[8:10] == ["3 of 4; 53 %", "< 0.001 %"]
