"""Tensors and numbers on disk, without pickle: safetensors and JSON, written so that no half-written file is ever read.

A folder is written under a temporary name beside its place, flushed to the disk, and renamed: it is there whole, or it
is not there. Reading never executes code. What the tensors mean is known to the callers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ndem_zoo.errors import FileFormatError

_CHECKPOINT = re.compile(r"step-(\d{10})")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder to write into; it takes the name `path` only when the block ends without an error.

    A folder that had the name before is replaced; should the process die in between, its content is still there under
    the name ``.<name>.<random>.old``.

    Raises
    ------
    FileExistsError
        If `path` is a file.
    """
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file; a folder is to be written under this name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, ".tmp")
    temporary.mkdir()  # Pitfall: tempfile.mkdtemp makes folders for the owner alone, whatever the umask says
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(temporary)
        old = _beside(path, ".old")
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, ".tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors; shared memory is written once for each name."""
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, str(path))
    path.chmod(mode)  # Pitfall: some versions of safetensors make files that only their owner can read


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If the file is truncated or not a safetensors file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged or not a safetensors file: {error}") from error


def save_json(path: str | os.PathLike, value: Any) -> None:
    """Write numbers, strings, lists and dicts; floats come back bit for bit.

    Raises
    ------
    TypeError
        If something in `value` has no JSON form.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def load_json(path: str | os.PathLike) -> Any:
    """Read what `save_json` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is damaged or not JSON: {error}") from error


def checkpoint_path(directory: str | os.PathLike, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return Path(directory) / f"step-{step:010d}"


def checkpoints(directory: str | os.PathLike) -> list[Path]:
    """All checkpoints of a run, newest first; half-written ones have other names."""
    folder = Path(directory)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _CHECKPOINT.fullmatch(p.name)), reverse=True)


def remove_old_checkpoints(directory: str | os.PathLike, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(directory)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(directory: str | os.PathLike) -> None:
    """Delete what a killed process left half-written in the folder of a run."""
    for pattern in (".step-*.tmp", ".step-*.old"):
        for path in Path(directory).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in Path(directory).glob(".history.csv.*.tmp"):
        path.unlink(missing_ok=True)


def flatten_optimizer(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, named ``<parameter number>.<name>``."""
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, values in state["state"].items()
        for name, value in values.items()
    }


def unflatten_optimizer(tensors: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer state with the groups of `like` and the tensors of `flatten_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    return {"state": state, "param_groups": like["param_groups"]}


def _beside(path: Path, suffix: str) -> Path:
    """A hidden name in the same folder that nothing else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{suffix}")


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
