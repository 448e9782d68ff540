"""Networks with quantized layers, without a run; and one short run for the commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from export_helpers import quantized_network
from helpers import QUICK
from hydra.core.global_hydra import GlobalHydra

from adq_train.cli import main
from adq_train.export.model import TableModel


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few seconds."""
    root = tmp_path_factory.mktemp("run")
    folder = root / "run=1,of=few"  # runs are named by their settings
    before = sys.argv
    GlobalHydra.instance().clear()
    sys.argv = ["adq-train", *QUICK, f"run_dir='{folder}'", f"output_root={root}"]
    try:
        main()
    finally:
        sys.argv = before
    return folder


@pytest.fixture(scope="session")
def small() -> tuple[torch.nn.Module, TableModel]:
    """A trained-looking ResNet-8 of width 4 with its tables."""
    return quantized_network(bits=3)
