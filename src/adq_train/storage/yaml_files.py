"""YAML files as anybody may have written them: read whole, small and without running code."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from adq_train.errors import UserError

# A configuration of this project has some 200 values in 10 kB.
MAX_BYTES = 1_000_000
MAX_VALUES = 50_000
MAX_DEPTH = 50
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")
PLAIN = {f"tag:yaml.org,2002:{name}" for name in _TAGS}


def read_yaml(path: Path) -> Any:
    """The content of a YAML file in plain dictionaries, lists and values.

    Interpolations stay text. Values mean what they mean to OmegaConf: ``1e-3`` is a number.

    Raises:
        UserError: It is no regular file, too large, not UTF-8 or not plain YAML; says where.
    """
    try:
        text = _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: a byte that is not UTF-8; save the file as UTF-8"
        ) from error
    loader: Any = None
    try:
        loader = get_yaml_loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        num_values = _expanded(node, {}, 1)
        if num_values > MAX_VALUES:
            raise UserError(
                f"{path}: its aliases (*name) make {num_values:,} values of it, more than "
                f"{MAX_VALUES:,}; write out what it needs"
            )
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(_explained(path, error)) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(
            f"{path}, line {line}: a character that YAML does not allow "
            f"(#x{ord(text[error.position]):02x}); delete it"
        ) from error
    except RecursionError as error:
        raise UserError(
            f"{path}: nested more than {MAX_DEPTH} levels deep, or holds itself; write it flat"
        ) from error
    except ValueError as error:  # a number of 5,000 digits, a date that is none
        raise UserError(f"{path}: a value that cannot be read ({error}); quote it") from error
    finally:
        if loader is not None:
            loader.dispose()


def _read(path: Path) -> bytes:
    """The bytes of a regular file within the limit; a pipe would never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:  # noqa: PTH123 (of a descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path} is not a regular file; give a YAML file")
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES:,} bytes; it is no configuration")
    return content


def _expanded(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node holds once every alias is written out.

    Raises:
        RecursionError: It is nested too deep, as one that holds itself is.
        ConstructorError: It has a tag that asks for something else than a plain value.
    """
    if node.tag not in PLAIN:
        raise yaml.constructor.ConstructorError(None, None, f"a tag {node.tag}", node.start_mark)
    if depth > MAX_DEPTH:
        raise RecursionError
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_expanded(child, known, depth + 1) for child in children)
    return known[id(node)]


def _explained(path: Path, error: yaml.MarkedYAMLError) -> str:
    """Where a file is not plain YAML, why, and what helps."""
    mark = error.problem_mark or error.context_mark
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = " ".join(str(error.problem or error.context).split())
    remedy = "correct it there"
    if r"'\t'" in problem:
        remedy = "indent with spaces"
    elif "duplicate key" in problem:
        remedy = "keep one of them"
    elif isinstance(error, yaml.constructor.ConstructorError):
        remedy = "write a plain value; tags (!…) are not read"
    elif "undefined alias" in problem:
        remedy = "define it above with &name, or quote the value"
    elif "expected a single document" in str(error.context):
        problem, remedy = "a second document begins", "keep one document to a file"
    elif "mapping values are not allowed" in problem:
        remedy = "put a space after the colon and quote values that hold one"
    return f"{path}{place}: {problem}; {remedy}"
