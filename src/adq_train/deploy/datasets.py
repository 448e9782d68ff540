"""The data set that a run, a packed file or an ONNX file was made for."""

from __future__ import annotations

import importlib.resources
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from adq_train.data.base import ImageData, Loading
from adq_train.deploy.architecture import how_to_trust, is_own, refuse_parts
from adq_train.errors import ConfigError, UserError, did_you_mean
from adq_train.settings.building import build
from adq_train.settings.targets import TRUSTED_PREFIXES
from adq_train.settings.validate import with_homes

log = logging.getLogger(__name__)


def load_data(
    node: dict[str, Any],
    batch_size: int,
    trusted: tuple[str, ...] = TRUSTED_PREFIXES,
    download: bool = False,
) -> ImageData:
    """Loads a data set on the CPU.

    Args:
        node: A config's ``data`` section.
        batch_size: Images of a batch.
        trusted: Where the data set may be defined, for a section that is not from a file.
        download: Whether it may be fetched where it is not there.

    Raises:
        UserError: The section is not one of a data set, or the data cannot be read.
    """
    try:
        source = build(node, "data", lambda part: part, trusted)
        cpu = torch.device("cpu")
        data: ImageData = source.load(Loading(batch_size, batch_size, 0, cpu, download=download))
    except ConfigError as error:
        raise UserError("; ".join(error.problems)) from error
    return data


def data_section(
    recorded: Any, choice: str | None, changes: Mapping[str, str], from_file: bool = False
) -> tuple[dict[str, Any], bool]:
    """The ``data`` section to evaluate on, and whether its data may be downloaded.

    What is recorded chooses a data set and how to split it; it decides neither on a download nor
    on the number of processes, and in a file that is passed around not on what is read from this
    machine either.

    Args:
        recorded: What the file or the run says, or None.
        choice: The name of another data set, or None.
        changes: Settings to change, by name, in YAML; ``download`` is not one of a data set.
        from_file: Whether it is recorded in a packed or ONNX file.

    Raises:
        UserError: There is no such data set, or none at all, or a file names a folder to read.
    """
    section = recorded if choice is None else _chosen(choice)
    if not isinstance(section, dict):
        raise UserError("data: the file does not say what it was trained on; give data=<name>")
    try:
        settings = OmegaConf.from_dotlist([f"{key}={value}" for key, value in changes.items()])
        changed: Any = with_homes(OmegaConf.to_container(settings))
    except Exception as error:  # YAML and OmegaConf have errors of their own
        raise UserError(f"data: a value cannot be read ({error})") from error
    if "_target_" in changed:
        raise UserError("data._target_: cannot be changed; choose a data set with data=<name>")
    download = changed.pop("download", False)
    if not isinstance(download, bool):
        raise UserError(f"data.download: must be true or false, got {download!r}")
    root = section.get("root")
    if choice is None and root not in (None, "???") and "root" not in changed:
        if from_file:
            raise UserError(
                "data.root: no file decides what is read here; add data.root=<folder> (the file "
                f"names {root!r}; data.root=null looks in the usual places)"
            )
        log.info("data is read from %s, as the run says; data.root=… reads it elsewhere", root)
    if type(section.get("num_workers")) is int:
        section = {**section, "num_workers": min(section["num_workers"], os.cpu_count() or 1)}
    return {key: v for key, v in {**section, **changed}.items() if v != "???"}, download


def _chosen(choice: str) -> Any:
    """The section of one of this package's data sets."""
    folder = importlib.resources.files("adq_train.configs") / "data"
    known = [Path(x.name).stem for x in folder.iterdir() if x.name.endswith(".yaml")]
    if choice not in known:
        raise UserError(
            f"data: there is no data set {choice!r}{did_you_mean(choice, known)}; choose from "
            f"{', '.join(sorted(known))}"
        )
    return OmegaConf.to_container(OmegaConf.create((folder / f"{choice}.yaml").read_text("utf-8")))


def check_data_source(node: Any, trusted: tuple[str, ...] = TRUSTED_PREFIXES) -> None:
    """Refuses a data section of a file that names anything but a data set of this package.

    The target must be a class that a module of ``adq_train.data`` itself defines; what such a
    module has imported, and what a dotted name reaches from there, does not count.

    Args:
        node: The section.
        trusted: Starts of module names; those of packages of the reader's own count as well.

    Raises:
        UserError: Names the target.
    """
    target = node.get("_target_") if isinstance(node, dict) else None
    if is_own(str(target), trusted):
        refuse_parts(node, "data", trusted)
        return
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
        f"sets>{how_to_trust(target)}"
    )
