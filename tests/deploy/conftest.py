"""Networks with quantized layers, without a run."""

from __future__ import annotations

import pytest
import torch
from export_helpers import quantized_network

from adq_train.deploy.model import TableModel


@pytest.fixture(scope="session")
def small() -> tuple[torch.nn.Module, TableModel]:
    """A trained-looking ResNet-8 of width 4 with its tables."""
    return quantized_network(bits=3, weights="adq_paper")  # one code has no level
