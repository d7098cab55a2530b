"""Tensors and numbers on disk, without pickle: safetensors and JSON, written so that no half-written file is ever read.

A file or folder is written under a temporary name beside its place, flushed to the disk, and renamed: it is there
whole, or it is not there. Records carry checksums, so that what was damaged later is found out. Reading never executes
code. What the tensors mean is known to the callers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from ndem_zoo.errors import FileFormatError, StorageError

#: Key of a record's checksum.
CHECKSUM = "checksum"

#: Reasons for which a disk does not take what it is given: no space, no quota, a limit of sizes, a failing device.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_CHECKPOINT = re.compile(r"step-(\d{10})")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Whatever writes `path` runs in this block, so that a full disk ends in an error that says so.

    Raises
    ------
    StorageError
        If the disk has no space left, a quota or a limit of sizes is reached, or the device fails; names `path`.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number not in _REFUSALS:
            raise
        advice = "make room or name another place; nothing that was there before is lost"
        raise StorageError(number, f"cannot be written ({os.strerror(number)}): {advice}", os.fspath(path)) from error


def _error_number(error: Exception) -> int | None:
    """The system's number of an error; safetensors has it in its message only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"(?:code: |os error )(\d+)", str(error))
    return int(found[1]) if found else None


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder to write into; it takes the name `path` only when the block ends without an error.

    A folder that had the name before is replaced; should the process die in between, its content is still there under
    the name ``.<name>.<random>.old``.

    Raises
    ------
    FileExistsError
        If `path` is a file.
    StorageError
        If the disk is full.
    """
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file; a folder is to be written under this name")
    temporary = _beside(path, ".tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()  # Pitfall: tempfile.mkdtemp makes folders for the owner alone, whatever the umask says
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            sync(temporary)
            _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give a whole folder its name; what had it before goes away when that has reached the disk, else it comes back."""
    old = _beside(path, ".old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(temporary, path)
        sync(path.parent)
    except OSError:
        if path.exists():
            os.replace(path, temporary)
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, text: bool = False) -> Iterator[IO]:
    """Open a file that appears under its name when all of it is on the disk, or not at all.

    Parameters
    ----------
    path
        Its name; folders that are missing are made.
    text
        Whether it takes text (UTF-8) instead of bytes.

    Raises
    ------
    StorageError
        If the disk is full.
    """
    path = Path(path)
    temporary = _beside(path, ".tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("x" if text else "xb", encoding="utf-8" if text else None) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as stream:
        stream.write(content)


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors; shared memory is written once for each name."""
    path = Path(path)
    with writing(path):
        path.touch()
        mode = path.stat().st_mode
        # Pitfall: `safetensors.torch.save_file` makes a type of ctypes for every size in bytes that it meets, and these stay.
        save_file({name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}, str(path))
        path.chmod(mode)  # Pitfall: some versions of safetensors make files that only their owner can read


def load_tensors(path: str | os.PathLike, sha256: str | None = None) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Parameters
    ----------
    path
        The file.
    sha256
        Its checksum, if one was recorded: safetensors has none of its own.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If the file is truncated, not a safetensors file, or has another checksum.
    """
    check_digest(path, sha256)
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged or not a safetensors file: {error}") from error


def file_digest(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Checksum of a file as hexadecimal digits."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_digest(path: str | os.PathLike, sha256: str | None) -> None:
    """Compare a file with its recorded checksum; None is "none was recorded".

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If its checksum is another one.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    if sha256 is not None and file_digest(path) != sha256:
        raise FileFormatError(f"{path} is damaged: its checksum is not the recorded one")


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
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}{what_was_there(Path(path).parent)}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged or not JSON: {error}") from error


def what_was_there(folder: Path) -> str:
    """For messages: where the content of a folder is that a process died replacing; empty if there is no such thing."""
    found = [] if folder.exists() else sorted(folder.parent.glob(f".{folder.name}.*.old"))
    return f"; a process died while it replaced {folder}: what was there is whole in {found[0]}" if found else ""


def save_record(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write a dict as `save_json` does, with a checksum of its content under the key `CHECKSUM`."""
    content = json.loads(json.dumps(dict(record)))  # as it will be read: keys are text, tuples are lists
    save_json(path, content | {CHECKSUM: _content_digest(content)})


def load_record(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `save_record` wrote, without its checksum.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If it is not a JSON object, or not the one that was written. One without a checksum is taken as it is: those of
        older versions have none, and who changes a record by hand takes it out.
    """
    record = load_json(path)
    if not isinstance(record, dict):
        raise FileFormatError(f"{path} is damaged: it holds a {type(record).__name__}, needed is an object")
    # Were only the entry of this name looked for, damage to the name would leave the record without a checksum.
    checksums = [key for key in record if _is_checksum_of_the_others(record, key)]
    if checksums != [CHECKSUM] * (CHECKSUM in record):
        raise FileFormatError(
            f"{path} is damaged: its content does not have its checksum; if you changed it on purpose, take out {CHECKSUM!r}"
        )
    record.pop(CHECKSUM, None)
    return record


def _is_checksum_of_the_others(record: dict[str, Any], key: str) -> bool:
    """Whether an entry is the checksum of all other entries."""
    is_one = isinstance(record[key], str) and len(record[key]) == 64
    return is_one and record[key] == _content_digest({k: v for k, v in record.items() if k != key})


def _content_digest(content: dict[str, Any]) -> str:
    """SHA-256 of what JSON says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        old = _beside(path, ".old")  # so that none is half there under its name
        os.replace(path, old)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(directory: str | os.PathLike) -> None:
    """Delete what a killed process left half-written in the folder of a run."""
    for pattern in (".step-*.tmp", ".step-*.old", ".dump-step-*.tmp"):
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


def sync(path: str | os.PathLike) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
