"""Networks with quantized layers, without a run; and one short run for the commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import quantized_network

from adq_train.deploy.model import TableModel


@pytest.fixture(scope="session")
def finished_run(finished_once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few seconds."""
    folder = tmp_path_factory.mktemp("run") / "run=1,of=few"  # runs are named by their settings
    shutil.copytree(finished_once[0] / "run", folder)
    return folder


@pytest.fixture(scope="session")
def small() -> tuple[torch.nn.Module, TableModel]:
    """A trained-looking ResNet-8 of width 4 with its tables."""
    return quantized_network(bits=3, weights="adq_paper")  # one code has no level
