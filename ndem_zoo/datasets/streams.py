"""Structures of files one after the other, however large the files are: what bulk predictions read from.

A stream gives the structures of one input in its order, from any row on, and holds a few of them at a time: extended XYZ
is read line by line, npz archives in blocks of rows, LMDB files record by record, stores are mapped into memory. Labels are
not looked at. A structure that cannot be read is given as the reason why, so that the caller decides what becomes of it; a
file in which nobody can tell where the next structure begins is an error.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.checks import blocks
from ndem_zoo.datasets.extxyz import frame_of_text, frame_texts
from ndem_zoo.datasets.store import RECORD, is_store, open_store
from ndem_zoo.errors import DataError, FileFormatError
from ndem_zoo.featurizers.base import Structure

if TYPE_CHECKING:
    from ase import Atoms

#: Bytes at each end of a file that tell it from another one of the same size.
_END = 1 << 16

#: Choice: rows of an npz archive that are read together.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Item:
    """A structure of an input, or why there is none.

    Attributes
    ----------
    row
        Its number in the input.
    after
        Where the input goes on behind it, for `Stream.items`.
    structure
        Its arrays; None if it cannot be read.
    atoms
        All that the input says of it, if that was asked for.
    problem
        Why it cannot be read; empty if it can.
    """

    row: int
    after: int
    structure: Structure | None = None
    atoms: Atoms | None = None
    problem: str = ""


class Stream(ABC):
    """Structures of one input, in its order.

    Attributes
    ----------
    name
        Of the input, without its folder.
    """

    name: str

    @abstractmethod
    def items(self, row: int = 0, place: int = 0, with_atoms: bool = False) -> Iterator[Item]:
        """Structures from number `row` on.

        Parameters
        ----------
        row
            Number of the first one.
        place
            Where it begins: `Item.after` of the one before it, 0 for the first.
        with_atoms
            Whether each comes with its `ase.Atoms` as well.
        """

    @abstractmethod
    def cuts(self, size: int) -> Iterator[tuple[int, int]]:
        """Row and place of every structure with a number divisible by `size`, and at last those of the end."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells the input from another one, as JSON has it."""


class ExtxyzStream(Stream):
    """An extended XYZ file; .gz, .bz2 and .xz are decompressed on the way."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.name = self.path.name

    def items(self, row: int = 0, place: int = 0, with_atoms: bool = False) -> Iterator[Item]:
        with closing(frame_texts(self.path, place, row)) as texts:
            for number, (text, after) in enumerate(texts, start=row):
                try:
                    atoms = frame_of_text(text, self.path, number)
                except FileFormatError as error:
                    yield Item(number, after, problem=str(error))
                    continue
                yield Item(number, after, bare_structure(atoms), atoms if with_atoms else None)

    def cuts(self, size: int) -> Iterator[tuple[int, int]]:
        row = place = 0
        for _, after in frame_texts(self.path):
            if row % size == 0:
                yield row, place
            row, place = row + 1, after
        yield row, place

    def identity(self) -> dict[str, Any]:
        return file_identity(self.path)


class DatasetStream(Stream):
    """A `MolecularDataset`; of a store, rows are read from the disk where they are used."""

    def __init__(self, dataset: MolecularDataset, name: str = "", identity: dict[str, Any] | None = None) -> None:
        self.dataset, self.name, self._identity = dataset, name or dataset.name or "dataset", identity

    def items(self, row: int = 0, place: int = 0, with_atoms: bool = False) -> Iterator[Item]:
        for number in range(row, len(self.dataset)):
            found = self.dataset.structure(number)
            structure = Structure(found.z, found.pos, found.cell, found.pbc)
            yield Item(number, 0, structure, self.dataset.atoms(number) if with_atoms else None)

    def cuts(self, size: int) -> Iterator[tuple[int, int]]:
        return _even_cuts(len(self.dataset), size)

    def identity(self) -> dict[str, Any]:
        if self._identity is None:
            self._identity = {"name": self.name, "rows": len(self.dataset), "sha256": fingerprint(self.dataset)}
        return self._identity


class NpzStream(Stream):
    """A file in the layout of MD17 or rMD17: one molecule, many geometries."""

    _KEYS: ClassVar = (("z", "R"), ("nuclear_charges", "coords"))

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.name = self.path.name
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                keys = next((pair for pair in self._KEYS if set(pair) <= names), None)
                if keys is None:
                    raise FileFormatError(
                        f"{path} has neither z and R nor nuclear_charges and coords; it has {', '.join(sorted(names))}"
                    )
                self._pos_key = keys[1]
                with _array_in(archive, keys[0]) as (stream, shape, dtype):
                    self.z = _rows(stream, shape[0] if shape else 1, dtype, ())
                with _array_in(archive, keys[1]) as (_, self.shape, self.dtype):
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path} is damaged, truncated or no npz file ({error})") from error
        is_layout = self.z.dtype.kind in "iu" and self.dtype.kind == "f" and self.shape[1:] == (len(self.z), 3)
        if not is_layout:
            raise FileFormatError(
                f"{path}: {keys[0]} has shape {self.z.shape} and {self.z.dtype}, {keys[1]} {self.shape} and {self.dtype}; needed are "
                "integers (n,) and floats (frames, n, 3)"
            )

    def items(self, row: int = 0, place: int = 0, with_atoms: bool = False) -> Iterator[Item]:
        tail, z = self.shape[1:], self.z.astype(np.int64)
        size = self.dtype.itemsize * int(np.prod(tail))
        try:
            with zipfile.ZipFile(self.path) as archive, _array_in(archive, self._pos_key) as (stream, shape, dtype):
                stream.seek(row * size, os.SEEK_CUR)
                for start in range(row, shape[0], _ROWS_AT_ONCE):
                    block = _rows(stream, min(_ROWS_AT_ONCE, shape[0] - start), dtype, tail).astype(np.float64)
                    for number, pos in enumerate(block, start=start):
                        structure = Structure(z, pos)
                        yield Item(number, 0, structure, _atoms(structure) if with_atoms else None)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise FileFormatError(f"{self.path} is damaged or truncated ({error})") from error

    def cuts(self, size: int) -> Iterator[tuple[int, int]]:
        return _even_cuts(self.shape[0], size)

    def identity(self) -> dict[str, Any]:
        return file_identity(self.path)


class LmdbStream(Stream):
    """A ``.lmdb`` file of pickled PyG objects, or an ``.aselmdb`` file; see `lmdb_files`."""

    def __init__(self, path: str | os.PathLike) -> None:
        from ndem_zoo.datasets.lmdb_files import LmdbRecords

        self.path = Path(path)
        self.name = self.path.name
        self._records = LmdbRecords(path)

    def items(self, row: int = 0, place: int = 0, with_atoms: bool = False) -> Iterator[Item]:
        from ndem_zoo.datasets.oc20 import frame_of_record

        for number in range(row, len(self._records)):
            try:
                frame = frame_of_record(self._records, number)
            except FileFormatError as error:
                yield Item(number, 0, problem=str(error))
                continue
            structure = Structure(frame.z, frame.pos, frame.cell, frame.pbc)
            yield Item(number, 0, structure, _atoms(structure) if with_atoms else None)

    def cuts(self, size: int) -> Iterator[tuple[int, int]]:
        return _even_cuts(len(self._records), size)

    def identity(self) -> dict[str, Any]:
        return file_identity(self.path)


def _even_cuts(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Of an input where each row can be found at once."""
    yield from ((row, 0) for row in range(0, n, size))
    yield n, 0


def open_streams(path: str | os.PathLike) -> list[Stream]:
    """The inputs that a path stands for: a file, a store, or all files of a folder.

    Parameters
    ----------
    path
        An extended XYZ file (also compressed), an ``.npz`` in the layout of MD17 or rMD17, an ``.lmdb`` or ``.aselmdb``
        file, a store, or a folder of ``.extxyz``, ``.extxyz.xz``, ``.lmdb`` or ``.aselmdb`` files, in the order of the
        numbers in their names.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    FileFormatError
        If a file is damaged, or not what its name says.
    DataError
        If a folder has no such files, or it is a packed archive.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir() and is_store(path):
        name = path.name
        return [DatasetStream(open_store(path), name, {"name": name, **_ends(path / RECORD)})]
    if path.is_dir():
        from ndem_zoo.datasets.oc20 import files_in

        found = files_in(path)
        if not found:
            raise DataError(f"{path} has no .extxyz, .extxyz.xz, .lmdb or .aselmdb files, and is no store")
        return [stream for file in found for stream in open_streams(file)]
    if path.name.endswith((".tar", ".tar.gz", ".tgz", ".zip")):
        raise DataError(f"{path} is an archive: unpack it, and name the folder")
    kinds: dict[str, Any] = {".npz": NpzStream, ".lmdb": LmdbStream, ".aselmdb": LmdbStream}
    return [kinds.get(path.suffix.lower(), ExtxyzStream)(path)]


def bare_structure(atoms: Atoms) -> Structure:
    """Elements, positions in Å and cell of `ase.Atoms`, without labels, constraints and whatever else it has."""
    periodic = bool(atoms.pbc.any())
    return Structure(
        z=atoms.numbers.astype(np.int64),
        pos=np.array(atoms.positions, dtype=np.float64),
        cell=np.array(atoms.cell.array) if periodic else None,
        pbc=np.array(atoms.pbc) if periodic else None,
    )


def _atoms(structure: Structure) -> Atoms:
    from ase import Atoms

    return Atoms(numbers=structure.z, positions=structure.pos, cell=structure.cell, pbc=structure.pbc)


# ------------------------------------------------------------------------------------------------------------- identity


def file_identity(path: Path) -> dict[str, Any]:
    """Name, size, and a checksum of both ends of a file: reading all of a large one would take as long as predicting."""
    return {"name": path.name, **_ends(path)}


def _ends(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_END))
        stream.seek(max(0, size - _END))
        digest.update(stream.read(_END))
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}


def fingerprint(dataset: MolecularDataset) -> str:
    """SHA-256 of the elements and positions of a dataset."""
    digest = hashlib.sha256()
    for name, dtype in (("z", "<i8"), ("pos", "<f8")):
        for _, block in blocks(dataset):
            digest.update(np.ascontiguousarray(getattr(block, name), dtype=dtype).tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------ npz


@contextmanager
def _array_in(archive: zipfile.ZipFile, key: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """An array in an npz archive: its bytes, shape and dtype."""
    with archive.open(f"{key}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{key} is an array of version {version}")
        shape, is_fortran, dtype = read(stream)
        if dtype.hasobject:
            raise ValueError(f"{key} holds pickled objects, which are never loaded")
        if is_fortran and len(shape) > 1:
            raise ValueError(f"{key} has its columns one after the other; needed are rows")
        yield stream, shape, dtype


def _rows(stream: IO[bytes], count: int, dtype: np.dtype, tail: tuple[int, ...]) -> np.ndarray:
    """The next rows of an array."""
    size = count * dtype.itemsize * int(np.prod(tail))
    data = stream.read(size)
    if len(data) != size:
        raise EOFError(f"an array ends after {len(data)} of {size} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(count, *tail)
