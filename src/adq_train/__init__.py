"""Train networks at two to four bits: sensitivity profiling, bit allocation and QAT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adq_train.export.packed import load_packed

__all__ = ["__version__", "load_packed"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Here, not above: it brings torch along, which takes seconds that --help does not have.
    if name == "load_packed":
        from adq_train.export.packed import load_packed

        return load_packed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
