"""What a configuration file of somebody else may do: choose values, and nothing that runs code.

Every file below ``--config-dir`` is read by the safe reader before Hydra sees it, its
interpolations are bounded, and what Hydra itself does (launchers, callbacks, logging, environment)
stays as the program and the command line say.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from adq_train.cli.values import quote
from adq_train.errors import ConfigError, UserError
from adq_train.settings.schema import register
from adq_train.storage.yaml_files import read_yaml

MAX_EXPANSIONS = 10_000
# What a file may say to Hydra: that a sweep is meant, and over what.
_FREE = ("mode", "overrides", "runtime", "searchpath", "verbose")
_OF_A_JOB = ("name", "id", "num", "override_dirname", "config_name", "config")


class CheckedFileSource(FileConfigSource):
    """Reads a configuration file only once the safe reader has seen it."""

    loaded: list[Path] = []  # noqa: RUF012 (of the class: Hydra makes the instances)

    def load_config(self, config_path: str) -> ConfigResult:
        """One file of a folder of configurations.

        Raises:
            UserError: It is not a plain YAML file of settings.
        """
        path = Path(os.path.realpath(Path(self.path, self._normalize_file_name(config_path))))
        if path.exists():
            content = read_yaml(path)
            if not isinstance(content, dict | None):
                raise UserError(f"{path}, line 1: holds no settings; write name: value")
            self.loaded.append(path)
        return super().load_config(config_path)


def check_files() -> None:
    """From now on Hydra reads files through :class:`CheckedFileSource`."""
    Plugins.instance()  # registers Hydra's own
    SourcesRegistry.instance().types["file"] = CheckedFileSource


@contextlib.contextmanager
def composing(config_dir: str | None) -> Iterator[Callable[[Sequence[str]], DictConfig]]:
    """Gives a way to compose configurations, with Hydra's own section, from overrides.

    Args:
        config_dir: A folder with more choices (``--config-dir``).
    """
    register()
    check_files()
    place = quote(f"file://{Path(config_dir or '.').resolve()}")  # may hold any character
    chosen = [f"hydra.searchpath=[{place}]"] if config_dir else []
    with initialize_config_module("adq_train.configs", version_base="1.3", job_name="adq-train"):
        yield lambda overrides: composed([*chosen, *overrides])


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration with Hydra's own section.

    Raises:
        ConfigError: It cannot be composed; one sentence.
    """
    CheckedFileSource.loaded.clear()
    try:
        return compose("config", list(overrides), return_hydra_config=True)
    except UserError as error:
        raise ConfigError([str(error)]) from error
    except RecursionError as error:
        files = ", ".join(map(str, dict.fromkeys(CheckedFileSource.loaded)))
        raise ConfigError([f"{files}: a defaults list leads back to itself; shorten it"]) from error
    except Exception as error:  # Hydra's, OmegaConf's and what a file provokes in them
        lines = str(error).splitlines() or [type(error).__name__]
        files = "; ".join(str(path) for path in CheckedFileSource.loaded[-1:])
        place = f"{files}: " if files and files not in lines[0] else ""
        raise ConfigError([place + " ".join(lines[:2]).strip()]) from error


def of_hydra(cfg: DictConfig) -> dict[str, Any]:
    """What Hydra would do, without what a file may choose."""
    node: Any = copy.deepcopy(OmegaConf.to_container(cfg.hydra, resolve=False))
    node["sweeper"].pop("params", None)
    node = {key: value for key, value in node.items() if key not in _FREE}
    node["job"] = {key: value for key, value in node["job"].items() if key not in _OF_A_JOB}
    return dict(node)


def interpolation_problems(cfg: DictConfig) -> Iterator[str]:
    """Interpolations that would never end, or that make far more of a file than it holds."""
    tree: Any = OmegaConf.to_container(cfg, resolve=False)
    known: dict[str, int] = {}

    def at(path: str) -> Any:
        node = tree
        for part in path.split("."):
            if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                return None
        return node

    def size(node: Any, path: str) -> int:
        if path in known:
            return known[path]
        known[path] = 1  # of one that leads back to itself, which OmegaConf refuses
        total = 1
        if isinstance(node, dict):
            total += sum(size(child, f"{path}.{key}".strip(".")) for key, child in node.items())
        elif isinstance(node, list):
            total += sum(size(child, f"{path}.{i}") for i, child in enumerate(node))
        elif isinstance(node, str):
            for inside in re.findall(r"\$\{([^}]*)\}", node):
                for name in re.findall(r"[^\s${}:,'\"]+", inside):
                    full = _absolute(name, path)
                    if (target := at(full)) is not None:
                        total += size(target, full)
        known[path] = total
        return total

    try:
        if size(tree, "") > MAX_EXPANSIONS:
            worst = max((x for x in known if isinstance(at(x), str)), key=known.__getitem__)
            yield (
                f"{worst}: its interpolations (${{name}}) expand to more than "
                f"{MAX_EXPANSIONS:,} values; write them out"
            )
    except RecursionError:
        yield "interpolations (${name}) lead on and on; write the value where it is needed"


def _absolute(name: str, path: str) -> str:
    """The full name of what an interpolation at ``path`` means."""
    name = name.replace("[", ".").replace("]", "")
    up = len(name) - len(name.lstrip("."))
    if not up:
        return name
    above = path.split(".")[:-up]
    return ".".join([*above, name[up:]]).strip(".")
