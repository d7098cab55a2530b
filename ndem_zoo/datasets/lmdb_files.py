"""Records in LMDB files: pickled PyG objects (``.lmdb``) and ASE's JSON (``.aselmdb``), by number, without executing anything.

Both kinds become dicts of fields, with arrays as numpy arrays; what the fields mean is known to `oc20.py`. Files are
opened when a process first reads from them, so that workers can share the object. Needs the package lmdb only: neither
torch_geometric nor ase-db-backends.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ndem_zoo.datasets.pickles import read_pickle, read_record
from ndem_zoo.errors import DataError, FileFormatError
from ndem_zoo.optional import require

#: Keys that are no records, in either kind of file.
_SIDE_KEYS = frozenset({b"length", b"nextid", b"deleted_ids", b"metadata"})

_NUMBER = re.compile(rb"0|[1-9][0-9]{0,17}")

#: Choice: bytes of JSON in one record; 50,000 atoms fit in. Compressed files may claim a thousand times their size.
MAX_JSON = 16 * 1024**2

_ARRAY_TYPES = frozenset("float64 float32 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split())


class LmdbRecords:
    """The records of one LMDB file, in the order of their numbers.

    Parameters
    ----------
    path
        A ``.lmdb`` file of pickled PyG objects, or an ``.aselmdb`` file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If it is no LMDB file, is truncated, has keys that are no numbers, or not as many as it says.
    ImportError
        If lmdb is not installed; names the extra.

    Notes
    -----
    Keys are sorted by number (LMDB has them in the order of their bytes: 0, 1, 10, 2). Pitfall: the structure of the file
    itself is read by the LMDB library, which trusts it.
    """

    _user: _Shared | None = None

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.is_json = self.path.suffix == ".aselmdb"
        self.numbers = self._read_numbers()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Fields of a record.

        Raises
        ------
        FileFormatError
            If it cannot be read, or would have executed something; names the file and the key.
        """
        return self._decode(str(int(self.numbers[index])).encode())

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """Records `start` to `stop`, one after the other."""
        for index in range(*slice(start, stop).indices(len(self))):
            yield self[index]

    def close(self) -> None:
        """Close the file, if nobody else reads it; it is opened again when it is read from."""
        if self._user is not None:
            _release(self.path, self._user)
            self._user = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_user": None}

    def _open(self) -> Any:
        """The environment of this process."""
        if self._user is None or self._user.owner != os.getpid():
            self._user = _acquire(self.path)
        return self._user.environment

    def _get(self, key: bytes) -> bytes:
        """Value of a key."""
        lmdb = require("lmdb", extra="oc20")
        try:
            with self._open().begin() as transaction:
                value = transaction.get(key)
        except lmdb.Error as error:
            raise FileFormatError(f"{self.path}: key {_shown(key)} cannot be read ({error})") from error
        if value is None:
            raise FileFormatError(f"{self.path}: there is no key {_shown(key)}")
        return value

    def _decode(self, key: bytes) -> dict[str, Any]:
        value = self._get(key)
        try:
            return read_json_record(value) if self.is_json else read_record(value)
        except FileFormatError as error:
            raise FileFormatError(f"{self.path}: key {_shown(key)} {error}") from error

    def _read_numbers(self) -> np.ndarray:
        """Numbers of the records, ascending."""
        lmdb = require("lmdb", extra="oc20")
        numbers = []
        try:
            with self._open().begin() as transaction:
                side = {key: transaction.get(key) for key in _SIDE_KEYS}
                for key in transaction.cursor().iternext(values=False):
                    if _NUMBER.fullmatch(key):
                        numbers.append(int(key))
                    elif key not in _SIDE_KEYS:
                        raise FileFormatError(f"{self.path}: key {_shown(key)} is no number; needed are 0, 1, 2, ...")
        except lmdb.Error as error:
            raise FileFormatError(f"{self.path} cannot be read as an LMDB file ({error})") from error
        finally:
            self.close()
        self._check_length(side.get(b"length"), len(numbers))
        found = np.array(sorted(numbers), dtype=np.int64)
        deleted = side.get(b"deleted_ids")
        if self.is_json and deleted is not None:
            found = np.setdiff1d(found, self._deleted(deleted))
        if not len(found):
            raise FileFormatError(f"{self.path} holds no records")
        return found

    def _check_length(self, value: bytes | None, n: int) -> None:
        """Raise unless the file has as many records as it says; not all files say."""
        if value is None or self.is_json:
            return
        try:
            length = read_pickle(value)
        except FileFormatError as error:
            raise FileFormatError(f"{self.path}: key length {error}") from error
        if isinstance(length, (str, bytes)) or length != n:
            raise FileFormatError(
                f"{self.path} says that it has {str(length)[:40]} records; it has {n}: it is incomplete"
            )

    def _deleted(self, value: bytes) -> list[int]:
        ids = _json(value, self.path, "deleted_ids")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise FileFormatError(f"{self.path}: key deleted_ids is no list of numbers")
        return ids


class _Shared:
    """An open environment, how many use it, and in which process."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.users, self.owner = environment, 0, os.getpid()


#: Pitfall: the LMDB library cannot open a file twice in a process.
_OPEN: dict[Path, _Shared] = {}


def _acquire(path: Path) -> _Shared:
    """The environment of a file in this process, opened if need be.

    Pitfall: an environment that was opened before a fork must not be used by the child, and blocks the path there; it has
    no locks, so the child can close its copy.
    """
    key = path.resolve()
    shared = _OPEN.get(key)
    if shared is not None and shared.owner != os.getpid():
        shared.environment.close()
        shared = None
    if shared is None:
        shared = _OPEN[key] = _Shared(_environment(path))
    shared.users += 1
    return shared


def _release(path: Path, shared: _Shared) -> None:
    """One user less; the last one closes the file."""
    if shared.owner != os.getpid():
        return
    shared.users -= 1
    if not shared.users:
        shared.environment.close()
        _OPEN.pop(path.resolve(), None)


def _environment(path: Path) -> Any:
    """An LMDB environment for reading, of a file that is as long as it says."""
    lmdb = require("lmdb", extra="oc20")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        environment = lmdb.open(str(path), readonly=True, lock=False, subdir=False, readahead=False, max_readers=64)
    except lmdb.Error as error:
        raise FileFormatError(f"{path} is damaged or no LMDB file ({error})") from error
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = path.stat().st_size
    if size < needed:  # Pitfall: reading behind the end of a mapped file would kill the process
        environment.close()
        raise FileFormatError(f"{path} is truncated: it has {size:,} bytes of {needed:,}")
    return environment


def _shown(key: bytes) -> str:
    """A key for messages."""
    return repr(bytes(key[:40]).decode("ascii", "backslashreplace"))


def _json(value: bytes, path: Path, key: str) -> Any:
    try:
        return inflated_json(value)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: key {key} {error}") from error


def inflated_json(value: bytes) -> Any:
    """What a compressed piece of JSON says.

    Raises
    ------
    FileFormatError
        If it is damaged, or larger than `MAX_JSON` when it is decompressed.
    """
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(value, MAX_JSON)
        if inflater.unconsumed_tail:
            raise FileFormatError(f"decompresses to more than {MAX_JSON:,} bytes; no structure needs so many")
        if not inflater.eof:
            raise FileFormatError("is truncated")
        return json.loads(text, parse_int=_short_integer)
    except (zlib.error, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"is damaged: {' '.join(str(error).split())[:200]}") from error


def _short_integer(text: str) -> int:
    if len(text) > 40:
        raise FileFormatError(f"has an integer of {len(text)} digits")
    return int(text)


def read_json_record(value: bytes) -> dict[str, Any]:
    """Fields of a structure in an ``.aselmdb`` file; arrays become numpy arrays.

    Raises
    ------
    FileFormatError
        If it is damaged; the message goes on after the name of a key.
    """
    record = inflated_json(value)
    if not isinstance(record, dict):
        raise FileFormatError(f"holds {type(record).__name__}; needed is a structure's dict")
    return {name: _array(name, field) if _is_array(field) else field for name, field in record.items()}


def _is_array(field: Any) -> bool:
    return isinstance(field, dict) and "__ndarray__" in field


def _array(name: str, field: dict[str, Any]) -> np.ndarray:
    """``{"__ndarray__": [shape, dtype, numbers]}`` as an array."""
    parts = field["__ndarray__"]
    if not (isinstance(parts, list) and len(parts) == 3 and isinstance(parts[0], list) and isinstance(parts[2], list)):
        raise FileFormatError(f"has a field {name[:40]!r} that is no [shape, dtype, numbers]")
    shape, dtype, flat = parts
    if not isinstance(dtype, str) or dtype not in _ARRAY_TYPES:
        raise FileFormatError(f"has a field {name[:40]!r} of dtype {str(dtype)[:40]!r}; allowed are plain numbers")
    if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) != len(flat):
        raise FileFormatError(f"has a field {name[:40]!r} of shape {str(shape)[:60]} with {len(flat)} numbers")
    if not all(type(number) in (int, float, bool) for number in flat):
        raise FileFormatError(f"has a field {name[:40]!r} with entries that are no numbers")
    try:
        return np.array(flat, dtype=dtype).reshape(shape)
    except (OverflowError, ValueError, TypeError) as error:
        raise FileFormatError(f"has a field {name[:40]!r} that does not fit {dtype}: {error}") from error


def lmdb_files(path: str | os.PathLike) -> list[Path]:
    """The LMDB files that a path stands for: itself, or those in a folder, in the order of their numbers.

    Raises
    ------
    DataError
        If there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    files = [file for file in path.glob("*") if file.suffix in (".lmdb", ".aselmdb") and file.is_file()]
    if not files:
        raise DataError(f"{path} has no .lmdb or .aselmdb files")
    return sorted(files, key=numeric_order)


def numeric_order(path: Path) -> tuple:
    """Key to sort names with numbers: 2 before 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name))
