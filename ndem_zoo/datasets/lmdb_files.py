"""Records in LMDB files: pickled PyG objects (``.lmdb``) and ASE's JSON (``.aselmdb``), by number, without executing anything.

Both kinds become dicts of fields, with arrays as numpy arrays; what the fields mean is known to `oc20.py`. The pages of a
file are read by `lmdb_pages.py`, when it is opened; forked workers share the open file, others open it anew. Needs neither
the package lmdb nor torch_geometric nor ase-db-backends.
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

from ndem_zoo.datasets.lmdb_pages import PagedFile, Place
from ndem_zoo.datasets.pickles import read_pickle, read_record
from ndem_zoo.errors import DataError, FileFormatError

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
        If it is no LMDB file, is truncated or damaged, has keys that are no numbers, or not as many as it says.

    Notes
    -----
    Keys are sorted by number (LMDB has them in the order of their bytes: 0, 1, 10, 2). The values have no checksums.
    """

    _file: PagedFile | None = None

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.is_json = self.path.suffix == ".aselmdb"
        try:
            self.numbers, self._places = self._read_places()
        finally:
            self.close()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Fields of a record.

        Raises
        ------
        FileFormatError
            If it cannot be read, or would have executed something; names the file and the key.
        """
        key = str(int(self.numbers[index])).encode()
        value = self._read(Place(*self._places[index].tolist()))
        try:
            return read_json_record(value) if self.is_json else read_record(value)
        except FileFormatError as error:
            raise FileFormatError(f"{self.path}: key {_shown(key)} {error}") from error

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """Records `start` to `stop`, one after the other."""
        for index in range(*slice(start, stop).indices(len(self))):
            yield self[index]

    def close(self) -> None:
        """Close the file; it is opened again when it is read from."""
        if self._file is not None:
            os.close(self._file.handle)
            self._file = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def _open(self) -> PagedFile:
        """The open file."""
        if self._file is None:
            if not self.path.is_file():
                raise FileNotFoundError(f"there is no file {self.path}")
            handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            try:
                self._file = PagedFile(handle)
            except BaseException as error:
                os.close(handle)
                if isinstance(error, FileFormatError):
                    raise FileFormatError(f"{self.path} {error}") from error
                raise
        return self._file

    def _read(self, place: Place) -> bytes:
        """The value at a place."""
        file = self._open()
        try:
            return file.read(place)
        except FileFormatError as error:
            raise FileFormatError(f"{self.path} {error}") from error

    def _read_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the records (n,), ascending, and the places (n, 2) of their values."""
        numbers, places, side = [], [], {}
        file = self._open()
        try:
            for key, place in file.places():
                if _NUMBER.fullmatch(key):
                    numbers.append(int(key))
                    places.append(place)
                elif key in _SIDE_KEYS:
                    side[key] = file.read(place)
                else:
                    raise FileFormatError(f": key {_shown(key)} is no number; needed are 0, 1, 2, ...")
        except FileFormatError as error:
            separator = "" if str(error).startswith(":") else " "
            raise FileFormatError(f"{self.path}{separator}{error}") from error
        self._check_length(side.get(b"length"), len(numbers))
        found = np.array(numbers, dtype=np.int64)
        order = np.argsort(found)
        deleted = side.get(b"deleted_ids")
        if self.is_json and deleted is not None:
            order = order[~np.isin(found[order], self._deleted(deleted))]
        if not len(order):
            raise FileFormatError(f"{self.path} holds no records")
        return found[order], np.array(places, dtype=np.int64).reshape(-1, 2)[order]

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
