"""Train networks at two to four bits: sensitivity profiling, bit allocation and QAT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adq_train.api import Recipe, follow, quantize
    from adq_train.deploy.packed import load_packed
    from adq_train.lifecycle import export, load, save
    from adq_train.training.optimizers import parameter_groups

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "export",
    "follow",
    "load",
    "load_packed",
    "parameter_groups",
    "quantize",
    "save",
]

_HOMES = {
    "Recipe": "adq_train.api",
    "export": "adq_train.lifecycle",
    "follow": "adq_train.api",
    "load": "adq_train.lifecycle",
    "load_packed": "adq_train.deploy.packed",
    "parameter_groups": "adq_train.training.optimizers",
    "quantize": "adq_train.api",
    "save": "adq_train.lifecycle",
}


def __getattr__(name: str) -> Any:
    """Imports a function on its first use: the command line must answer before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module 'adq_train' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
