"""The data set that a run, a packed file or an ONNX file was made for."""

from __future__ import annotations

import sys
from typing import Any

import torch

from adq_train.data.base import ImageData, Loading
from adq_train.errors import ConfigError, UserError
from adq_train.export.architecture import refuse_parts
from adq_train.validate import TRUSTED_PREFIXES, build


def load_data(
    node: dict[str, Any], batch_size: int, trusted: tuple[str, ...] = TRUSTED_PREFIXES
) -> ImageData:
    """Loads a data set on the CPU.

    Args:
        node: A config's ``data`` section.
        batch_size: Images of a batch.
        trusted: Where the data set may be defined, for a section that is not from a file.

    Raises:
        UserError: The section is not one of a data set, or the data cannot be read.
    """
    try:
        source = build(node, "data", lambda part: part, trusted)
        data: ImageData = source.load(Loading(batch_size, batch_size, 0, torch.device("cpu")))
    except ConfigError as error:
        raise UserError("; ".join(error.problems)) from error
    return data


def check_data_source(node: Any) -> None:
    """Refuses a data section of a file that names anything but a data set of this package.

    The target must be a class that a module of ``adq_train.data`` itself defines; what such a
    module has imported, and what a dotted name reaches from there, does not count.

    Raises:
        UserError: Names the target.
    """
    target = node.get("_target_") if isinstance(node, dict) else None
    module, _, name = str(target).rpartition(".")
    if module.startswith("adq_train.data.") and module.count(".") == 2 and name.isidentifier():
        try:
            __import__(module)
        except ImportError:
            pass
        else:
            kind = getattr(sys.modules[module], name, None)
            if isinstance(kind, type) and kind.__module__ == module and hasattr(kind, "load"):
                refuse_parts(node, "data")
                return
    raise UserError(
        f"data._target_: {target!r} is not a data set of adq-train; give data=<one of its data "
        "sets>"
    )
