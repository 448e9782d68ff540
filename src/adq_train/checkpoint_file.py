"""Reads checkpoint files as people have them, without running code that they may hold."""

from __future__ import annotations

import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import torch

from adq_train.errors import UserError

# What a person who trusts a file may do with it. The result keeps tensors, and dictionaries of
# tensors; what is a module in the file becomes its state.
CONVERT = (
    "import numpy, torch; "
    "f = lambda v: v.state_dict() if hasattr(v, 'state_dict') else "
    "torch.from_numpy(v) if isinstance(v, numpy.ndarray) else v; "
    "t = lambda v: torch.is_tensor(v) or isinstance(v, dict) and all(map(t, v.values())); "
    "x = f(torch.load({source!r}, 'cpu', weights_only=False)); "
    "torch.save({{k: f(v) for k, v in x.items() if t(f(v))}}, {target!r})"
)
CONVERT_SCRIPT = (
    "import torch; torch.save(torch.jit.load({source!r}, 'cpu').state_dict(), {target!r})"
)
AGAIN = "copy or download it again"


def read_checkpoint(path: Path, setting: str) -> Any:
    """What a file holds: nested dictionaries of tensors and plain values, on the CPU.

    The content tells what kind of file it is, not the name: files of ``torch.save``, which are
    read with ``weights_only=True``, and safetensors.

    Args:
        path: The file.
        setting: Where the path is from, for messages.

    Raises:
        UserError: The file is missing, damaged, of another kind, or needs code to be read.
    """
    try:
        return _read(path)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be read ({error.strerror or error})") from error


def _read(path: Path) -> Any:
    if path.is_dir():
        raise UserError(f"{path} is a folder; {_choice_in(path)}")
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path} is damaged: it is empty; {AGAIN}")
    if head.lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page, not a checkpoint; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS; fetch the file itself with git lfs pull")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        _check_archive(path, size)
    try:
        with path.open("rb") as file:  # by its name torch would take it for another kind
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's bytes may raise anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named or (head.startswith(b"\x80") and "eights only" in str(error)):
            what = f" ({named[1]})" if named else ""
            raise UserError(
                f"{path} cannot be read as plain tensors: it holds objects besides{what}, and "
                f"making them would run code; if you trust it, {_conversion(CONVERT, path)}"
            ) from error
        if not head.startswith((b"PK", b"\x80")):
            raise UserError(
                f"{path} is damaged, or no checkpoint (it begins with {head[:12]!r}); give the "
                "model's state_dict() as torch.save or safetensors write it"
            ) from error
        raise UserError(f"{path} is damaged or cut off; {AGAIN}") from error


def _choice_in(folder: Path) -> str:
    """What to give instead of a folder."""
    if (folder / "status.json").is_file():
        return f"init_from={folder} starts from the run in it"
    inside = sorted(
        x.name for x in folder.iterdir() if x.suffix in (".pt", ".pth", ".bin", ".safetensors")
    )
    return f"give a file in it ({', '.join(inside[:3])})" if inside else "it holds no checkpoint"


def _read_safetensors(path: Path) -> Any:
    """The tensors of a safetensors file; its header says what it is."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            kind = str((file.metadata() or {}).get("format", ""))
        if kind.startswith("adq-train"):
            raise UserError(
                f"{path} is an exported quantized model; give float weights, or the run itself as "
                "init_from=RUN_FOLDER"
            )
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); {AGAIN}") from error


def _check_archive(path: Path, size: int) -> None:
    """Refuses archives that torch.save has not written.

    Raises:
        UserError: Says what it is; nothing of it was unpacked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); {AGAIN}") from error
    names = [x.filename.partition("/")[2] for x in entries]
    if "constants.pkl" in names:
        raise UserError(
            f"{path} is a TorchScript file; if you trust it, {_conversion(CONVERT_SCRIPT, path)}"
        )
    if "data.pkl" not in names:
        raise UserError(f"{path} is an archive, but not one that torch.save has written")
    if sum(x.file_size for x in entries) > size:  # torch.save does not compress
        raise UserError(f"{path} is compressed, and larger than it looks; write it with torch.save")


def _conversion(code: str, path: Path) -> str:
    """How to make a plain file of one that must run code to be read."""
    target = path.with_name(f"{path.stem}.weights.pt")
    command = shlex.quote(code.format(source=str(path), target=str(target)))
    return f"run python -c {command} and give {target}"
