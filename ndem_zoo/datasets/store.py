"""Datasets on disk: a folder of flat ``.npy`` columns and a ``store.json``, mapped into memory when it is opened.

`StoreWriter` appends structures source by source, and can be killed and resumed at any time; `open_store` maps the
columns, so that millions of structures cost neither time nor memory until they are used; a random selection of them
(`StoredSelection`) is a list of numbers until somebody asks for its columns. What the numbers mean, and from which files
they were read, is known to the loaders. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ndem_zoo.checkpoint import load_record, save_record, sync, writing
from ndem_zoo.datasets.base import MolecularDataset, _atom_rows, _frozen, _integers
from ndem_zoo.datasets.checks import blocks, check_structures, check_targets
from ndem_zoo.datasets.files import DatasetCard
from ndem_zoo.errors import ConfigError, DataError, FileFormatError

FORMAT, VERSION = "ndem_zoo store", 1
RECORD, JOURNAL, LOCK = "store.json", "journal.json", ".lock"

#: Bytes before the numbers of a column: the header of a .npy file, padded, so that it can be rewritten in place.
HEADER = 256

#: Choice: characters that ids and other names may have, unless told otherwise; each takes 4 bytes.
STRING_WIDTH = 24

#: Choice: stores of up to so many bytes are compared with their checksums whenever they are opened: 0.2 s or less.
VERIFIED_UP_TO = 64 * 1024**2

#: Choice: the journal of an unfinished store is written when so many-th part of what it covers is new.
JOURNAL_EVERY = 100

#: Structures whose rows are gathered at a time.
_GATHERED_AT_ONCE = 20_000

#: Columns that every dataset may have, and of what they have a row each.
_FIXED_COLUMNS = {"z": "atoms", "pos": "atoms", "ptr": "ends", "cell": "structures", "pbc": "structures"}
_FIXED_COLUMNS |= {"fixed": "atoms", "ids": "structures"}

#: Checksum of no bytes.
_NOTHING = hashlib.sha256().hexdigest()

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")
_KINDS = "biufU"


# --------------------------------------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class _Column:
    """Form of a column: dtype, shape of a row, and of what it has a row each (atoms, structures, ends)."""

    dtype: str
    tail: tuple[int, ...]
    per: str

    def rows(self, structures: int, atoms: int) -> int:
        """How many rows it has; `ptr` has one more than there are structures, once there are any."""
        return {"atoms": atoms, "structures": structures, "ends": structures + (structures > 0)}[self.per]

    def size(self, structures: int, atoms: int) -> int:
        """Bytes of its file."""
        return HEADER + self.rows(structures, atoms) * np.dtype(self.dtype).itemsize * int(np.prod(self.tail))

    def header(self, structures: int, atoms: int) -> bytes:
        """Header of its .npy file, version 1.0."""
        shape = (self.rows(structures, atoms), *self.tail)
        text = repr({"descr": self.dtype, "fortran_order": False, "shape": shape}).encode("latin1")
        length = HEADER - 10  # after magic, version and the length itself
        return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


class StoreWriter:
    """Writes a store, source by source; resumes where an earlier writer was interrupted.

    What was appended counts only when it is committed: then the columns are flushed to the disk and the journal is
    replaced. A writer that is opened on an unfinished store cuts the columns back to the journal.

    Parameters
    ----------
    folder
        A new or empty folder, or an unfinished store.
    name, card
        Of the dataset; see `MolecularDataset`.
    settings
        What the content depends on (options of a conversion), as JSON has it; a resumed writer must have the same.
    check
        Whether structures and labels are checked when they are appended: they are not looked at again later.
    string_width
        Longest id (or other string) in characters.

    Attributes
    ----------
    sources : dict
        Records of the sources that are committed, by name: skip them.

    Raises
    ------
    FileExistsError
        If the folder holds a finished store, or files that are no store.
    ConfigError
        If the unfinished store was begun with other settings, or another process is writing it.
    FileFormatError
        If the unfinished store is damaged.

    Examples
    --------
    >>> with StoreWriter("converted", name="mine") as writer:  # doctest: +SKIP
    ...     for file in files:
    ...         if file.name not in writer.sources:
    ...             writer.append(read_extxyz(file))
    ...             writer.commit(file.name)
    ...     writer.finish()
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        name: str = "",
        card: DatasetCard | None = None,
        settings: Mapping[str, Any] | None = None,
        check: bool = True,
        string_width: int = STRING_WIDTH,
    ) -> None:
        self.folder = Path(folder)
        self.check, self.string_width = check, string_width
        self._files: dict[str, BinaryIO] = {}
        self._digests: dict[str, Any] = {}
        self._begun = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "card": _card_record(card),
            "settings": json.loads(json.dumps(dict(settings or {}))),
            "checked": bool(check),
        }
        has_journal = _can_be_written(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = locked(self.folder / LOCK)
        for path in filter(_is_leftover, self.folder.iterdir()):
            path.unlink()
        try:
            self._open(has_journal)
        except BaseException:
            self.close()
            raise

    def _open(self, has_journal: bool) -> None:
        """Take up the journal, or begin one."""
        self.schema: dict[str, _Column] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.structures = self.atoms = 0
        self._committed = 0, 0  # structures and atoms
        self._lasting = 0  # structures that the journal on the disk covers
        if has_journal:
            journal = _read_record(self.folder / JOURNAL)
            for key, value in self._begun.items():
                if key not in ("name", "card") and journal.get(key) != value:
                    raise ConfigError(
                        f"the unfinished store in {self.folder} was begun with {key} {journal.get(key)!r}, not {value!r}; "
                        "continue with the same, or give another folder"
                    )
            self.schema = _schema_of(journal, self.folder / JOURNAL)
            self.sources = {record["name"]: record for record in journal["sources"]}
            self.structures, self.atoms = journal["structures"], journal["atoms"]
            self._cut_back()
        else:
            self._write_journal()
        self._committed, self._lasting = (self.structures, self.atoms), self.structures

    def _cut_back(self) -> None:
        """Remove from the columns whatever came after the last commit."""
        for key, column in self.schema.items():
            path, size = self.folder / _file_of(key), column.size(self.structures, self.atoms)
            if not path.is_file() or path.stat().st_size < size:
                found = path.stat().st_size if path.is_file() else 0
                raise FileFormatError(
                    f"{path} has {found} bytes; the journal says {size}: the unfinished store is damaged, delete it"
                )
            self._files[key] = path.open("r+b")
            self._files[key].truncate(size)
            self._files[key].seek(size)
        self._begin_digests()

    def _begin_digests(self) -> None:
        self._digests = {key: hashlib.sha256() for key in self.schema}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def append(self, dataset: MolecularDataset) -> None:
        """Append structures with the same columns as all others have.

        Raises
        ------
        DataError
            If a structure or label cannot be used, a column is missing or has another form, or a string is too long.
            Whatever was appended since the last commit is lost then.
        """
        if not len(dataset):
            return
        if self.check and not dataset.checked:
            check_structures(dataset)
            check_targets(dataset, dataset.targets)
        try:
            for first, block in blocks(dataset):
                self._append_block(_columns_of(block), first)
                self.structures, self.atoms = self.structures + len(block), self.atoms + int(block.ptr[-1])
        except BaseException:
            self._forget()
            raise

    def _append_block(self, columns: dict[str, tuple[np.ndarray, str]], first: int) -> None:
        """Write rows to all files; the first of them is of structure `first`, for messages."""
        if not self.schema:
            self._begin(columns)
        self._compare(columns)
        for key, column in self.schema.items():
            self._write(key, column, columns[key][0], first)

    def _forget(self) -> None:
        """Go back to the last commit."""
        self._close_files()
        self.structures, self.atoms = self._committed
        if not self.structures:
            for key in self.schema:
                (self.folder / _file_of(key)).unlink(missing_ok=True)
            self.schema = {}
        self._cut_back()

    def _begin(self, columns: dict[str, tuple[np.ndarray, str]]) -> None:
        """The first structures say which columns there are."""
        files = {}
        for key, (values, per) in columns.items():
            _check_name(key)
            other = files.setdefault(_file_of(key).lower(), key)
            if other != key:
                raise DataError(f"columns {other} and {key} differ in case only; not every disk can tell them apart")
            self.schema[key] = _Column(_stored_dtype(key, values, self.string_width), values.shape[1:], per)
        for key in self.schema:
            path = self.folder / _file_of(key)
            with writing(path):
                self._files[key] = path.open("w+b")
                self._files[key].write(b"\0" * HEADER)
        self._begin_digests()

    def _compare(self, columns: dict[str, tuple[np.ndarray, str]]) -> None:
        """Raise unless these columns are those of the store."""
        if set(columns) != set(self.schema):
            differing = ", ".join(sorted(set(columns) ^ set(self.schema)))
            raise DataError(f"all parts of a store must have the same columns; one has and one lacks: {differing}")
        for key, (values, per) in columns.items():
            column = self.schema[key]
            if values.shape[1:] != column.tail or per != column.per:
                raise DataError(
                    f"{key} has rows of shape {values.shape[1:]} per {per}; the store has {column.tail} per {column.per}"
                )
            if not _fits(values, np.dtype(column.dtype)):
                raise DataError(f"{key} has dtype {values.dtype}, which does not fit the store's {column.dtype}")

    def _write(self, key: str, column: _Column, values: np.ndarray, first: int) -> None:
        """Append rows to a file."""
        if key == "ptr":
            values = values[1 if self.structures else 0 :] + self.atoms
        if column.dtype[1] == "U":
            _check_width(key, values, int(column.dtype[2:]), first)
        data = np.ascontiguousarray(values, dtype=column.dtype).reshape(-1).view(np.uint8)
        with writing(self.folder / _file_of(key)):
            self._files[key].write(data)
        self._digests[key].update(data)

    def commit(self, source: str, digest: str | None = None, note: Any = None) -> None:
        """Keep what was appended since the last commit, under the name of its source.

        It is on the disk when this returns, unless it is less than a hundredth of what was there before: then it waits for
        the commits that follow, or for the end, so that the journal of very many sources is not written for each.

        Parameters
        ----------
        source
            Name of the file (or part of one) that it came from, different for each commit.
        digest
            Checksum of that file, for the record.
        note
            Anything else about the source, as JSON has it; in its entry of `sources`.

        Raises
        ------
        ConfigError
            If a source of this name is there already.
        """
        if source in self.sources:
            raise ConfigError(f"source {source!r} is in the store already; sources that are can be skipped")
        is_due = JOURNAL_EVERY * (self.structures - self._lasting) >= self._lasting
        if is_due:
            self._flush()
        structures, atoms = self._committed
        self.sources[source] = {
            "name": source,
            "digest": digest,
            "structures": self.structures - structures,
            "atoms": self.atoms - atoms,
            "columns": {key: value.hexdigest() for key, value in self._digests.items()},
            **({} if note is None else {"note": note}),
        }
        self._committed = (self.structures, self.atoms)
        self._begin_digests()
        if is_due:
            self._write_journal()

    def _flush(self) -> None:
        """Bring the columns to the disk."""
        for key, file in self._files.items():
            with writing(self.folder / _file_of(key)):
                file.flush()
                os.fsync(file.fileno())

    def _record(self) -> dict[str, Any]:
        return self._begun | {
            "structures": self.structures,
            "atoms": self.atoms,
            "columns": {key: dataclasses.asdict(column) for key, column in self.schema.items()},
            "sources": list(self.sources.values()),
        }

    def _write_journal(self) -> None:
        save_record(self.folder / JOURNAL, self._record())
        with writing(self.folder):
            sync(self.folder)
        self._lasting = self.structures

    def finish(self) -> MolecularDataset:
        """Turn what is committed into a store, and open it.

        Raises
        ------
        ConfigError
            If something was appended and not committed.
        DataError
            If there are no structures.
        """
        if (self.structures, self.atoms) != self._committed:
            raise ConfigError("something was appended and not committed: commit it first")
        if not self.structures:
            raise DataError(f"there are no structures for the store in {self.folder}; needed is one or more")
        for key, file in self._files.items():
            with writing(self.folder / _file_of(key)):
                file.seek(0)
                file.write(self.schema[key].header(self.structures, self.atoms))
        self._flush()
        save_record(self.folder / RECORD, self._record())
        with writing(self.folder):
            sync(self.folder)
        self._lasting = self.structures
        (self.folder / JOURNAL).unlink()
        (self.folder / LOCK).unlink()
        self.close()
        return open_store(self.folder)

    def close(self) -> None:
        """Close the files: what is committed is on the disk then, what is not is lost.

        Raises
        ------
        StorageError
            If the disk is full and commits still had to be written; those before them last.
        """
        try:
            if self._files and self._lasting < self._committed[0]:
                self.structures, self.atoms = self._committed
                self._flush()
                self._write_journal()
        finally:
            self._close_files()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _close_files(self) -> None:
        """Let go of the columns. Pitfall: closing a file writes what is left of it, and on a full disk fails again."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files = {}


def save_store(dataset: MolecularDataset, folder: str | os.PathLike) -> None:
    """Write a whole dataset as a store; see `MolecularDataset.save`."""
    if _can_be_written(Path(folder)):
        raise FileExistsError(f"{folder} holds an unfinished store; delete it, or give another folder")
    strings = [dataset.ids, *(column for column in dataset.extras.values() if column.dtype.kind == "U")]
    width = max(1, *(column.dtype.itemsize // 4 for column in strings))
    with StoreWriter(folder, name=dataset.name, card=dataset.card, string_width=width) as writer:
        writer.append(dataset)
        writer.commit(dataset.name or "dataset")
        writer.finish()


def _can_be_written(folder: Path) -> bool:
    """Whether there is an unfinished store in a folder; raises FileExistsError if there is anything else."""
    if is_store(folder):
        raise FileExistsError(f"{folder} is a finished store; give another folder")
    if (folder / JOURNAL).is_file():
        return True
    if folder.exists() and any(path.name != LOCK and not _is_leftover(path) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, and no store; give another folder")
    return False


def _is_leftover(path: Path) -> bool:
    """Whether a file is a record that a killed writer left half-written."""
    return path.name.startswith((f".{JOURNAL}.", f".{RECORD}.")) and path.suffix == ".tmp"


def locked(path: Path) -> int:
    """Open a file, and keep other writers out for as long as its handle, which is returned, is open.

    Raises
    ------
    ConfigError
        If another process has it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ConfigError(f"another process is writing {path.parent if path.name == LOCK else path}") from error
    except OSError:  # Choice: some network disks cannot lock; there, nobody is kept out
        pass
    return handle


def _columns_of(dataset: MolecularDataset) -> dict[str, tuple[np.ndarray, str]]:
    """All columns by their key in the store, and of what they have a row each."""
    columns = {key: (getattr(dataset, key), per) for key, per in _FIXED_COLUMNS.items()}
    columns = {key: value for key, value in columns.items() if value[0] is not None}
    for kind in ("targets", "extras"):
        for name, values in getattr(dataset, kind).items():
            columns[f"{kind}/{name}"] = (values, "atoms" if name in dataset.per_atom else "structures")
    return columns


def _stored_dtype(key: str, values: np.ndarray, string_width: int) -> str:
    """How a column is stored: little-endian, atomic numbers in a byte, strings with room."""
    if values.dtype.kind not in _KINDS:
        raise DataError(f"{key} has dtype {values.dtype}; a store holds numbers, booleans and strings")
    if values.dtype.kind == "U":
        return f"<U{string_width}"
    return "|u1" if key == "z" else values.dtype.newbyteorder("<").str


def _fits(values: np.ndarray, dtype: np.dtype) -> bool:
    """Whether values survive being stored as `dtype`."""
    if values.dtype.kind == "U" or dtype.kind == "U":
        return values.dtype.kind == dtype.kind
    if values.dtype.kind in "iu" and dtype.kind in "iu" and len(values):
        limits = np.iinfo(dtype)
        return bool(limits.min <= values.min() and values.max() <= limits.max)
    return np.can_cast(values.dtype, dtype, "safe")


def _check_width(key: str, values: np.ndarray, width: int, first: int) -> None:
    """Raise DataError for a string that would be cut off."""
    if values.dtype.itemsize // 4 <= width:
        return
    long = np.flatnonzero(np.char.str_len(values).reshape(len(values), -1).max(axis=1) > width)
    if len(long):
        raise DataError(
            f"structure {first + long[0]}: {key} is {str(values[long[0]])!r}; the store has room for {width} characters: begin "
            "it with a larger string_width"
        )


def _check_name(key: str) -> None:
    _, name = _parts_of(key)
    if not _NAME.fullmatch(name):
        raise DataError(f"a column is called {name!r}; allowed are up to 64 letters, digits and any of _ . + -")


def _parts_of(key: str) -> tuple[str, str]:
    """``"targets/energy"`` as kind and name; the kind of ``"pos"`` is empty."""
    kind, slash, name = key.partition("/")
    return (kind, name) if slash else ("", kind)


def _file_of(key: str) -> str:
    """Name of a column's file: ``targets/energy`` is in ``targets.energy.npy``."""
    return f"{key.replace('/', '.')}.npy"


def _card_record(card: DatasetCard | None) -> dict[str, Any] | None:
    """A card without its files."""
    if card is None:
        return None
    names = ("name", "description", "theory", "licence", "homepage")
    record = {name: getattr(card, name) for name in names}
    return record | {"units": dict(card.units), "citation": list(card.citation)}


# --------------------------------------------------------------------------------------------------------------- reading


def is_store(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a store, finished or not yet opened: there is a ``store.json`` in it."""
    return (Path(folder) / RECORD).is_file()


def open_store(folder: str | os.PathLike, verify: bool | None = None) -> MolecularDataset:
    """Open a store; its columns are mapped into memory, and read from the disk where they are used.

    Parameters
    ----------
    folder
        What `MolecularDataset.save`, a `StoreWriter` or ``ndem-zoo convert`` wrote.
    verify
        Whether to read all columns and compare their checksums; None: if they have up to `VERIFIED_UP_TO` bytes together,
        since the larger ones would take long. The sizes of the files and ``store.json`` are always checked.

    Raises
    ------
    FileNotFoundError
        If there is no store.
    FileFormatError
        If the store is unfinished, damaged, or of a newer version; says what to do.
    """
    folder = Path(folder)
    if not is_store(folder):
        if (folder / JOURNAL).is_file():
            done = len(_read_record(folder / JOURNAL)["sources"])
            raise FileFormatError(
                f"{folder} is an unfinished store ({done} sources are done): run what was writing it again, with the same "
                "options, to resume it"
            )
        raise FileNotFoundError(f"{folder} holds no store (no {RECORD} in it); ndem-zoo convert makes one")
    record = _read_record(folder / RECORD)
    schema = _schema_of(record, folder / RECORD)
    structures, atoms = record["structures"], record["atoms"]
    arrays = {key: _mapped(folder / _file_of(key), schema[key], structures, atoms) for key in schema}
    size = sum(column.size(structures, atoms) for column in schema.values())
    if verify or (verify is None and size <= VERIFIED_UP_TO):
        _verify(folder, record, schema)
    return StoredDataset._opened(folder, record, schema, arrays)


def load_store(
    folder: str | os.PathLike,
    n_train: int | float = 0.8,
    n_valid: int | float = 0.1,
    seed: int = 1,
    *,
    n_test: int | float | None = None,
    verify: bool | None = None,
) -> tuple[list[str], tuple[MolecularDataset, MolecularDataset, MolecularDataset], list]:
    """Open a store, split into training, validation and test data.

    Parameters
    ----------
    folder, verify
        See `open_store`.
    n_train, n_valid, n_test, seed
        See `MolecularDataset.split`. Choice: 80 % and 10 %, the rest for testing.

    Returns
    -------
    tasks : list of str
        Names of the labels.
    datasets : (train, valid, test)
        Three `MolecularDataset`, which read from the store.
    transformers : list
        Empty: nothing is normalized.
    """
    whole = open_store(folder, verify)
    return whole.tasks, whole.split(n_train, n_valid, seed, n_test), []


def _read_record(path: Path) -> dict[str, Any]:
    """``store.json`` or a journal, if it is one that this version can read."""
    record = load_record(path)
    if record.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not the record of a store")
    if record.get("version") != VERSION:
        raise FileFormatError(f"{path} is of version {record.get('version')!r}; this ndem_zoo reads version {VERSION}")
    totals = [record.get("structures"), record.get("atoms")]
    try:
        sums = [sum(source[name] for source in record["sources"]) for name in ("structures", "atoms")]
        names = {source["name"]: source["columns"].keys() for source in record["sources"]}
    except (AttributeError, KeyError, TypeError) as error:
        raise FileFormatError(f"{path} is damaged: {error!r}") from error
    if not all(type(total) is int for total in totals) or sums != totals or len(names) != len(record["sources"]):
        raise FileFormatError(f"{path} is damaged: it says {totals} structures and atoms, its sources have {sums}")
    return record


def _schema_of(record: dict[str, Any], path: Path) -> dict[str, _Column]:
    """Forms of the columns, as far as they can be trusted to name files and shapes."""
    schema = {}
    try:
        for key, value in record["columns"].items():
            kind, name = _parts_of(key)
            column = _Column(str(value["dtype"]), tuple(value["tail"]), value["per"])
            known = kind in ("targets", "extras") if kind else _FIXED_COLUMNS.get(name) == column.per
            is_shape = all(type(n) is int and n >= 0 for n in column.tail)
            if not (known and is_shape and _NAME.fullmatch(name) and column.per in ("atoms", "structures", "ends")):
                raise ValueError(f"column {key!r}: {value!r}")
            if np.dtype(column.dtype).kind not in _KINDS:
                raise ValueError(f"column {key!r} has dtype {column.dtype}")
            schema[key] = column
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged: {error}") from error
    missing = [key for key in ("z", "pos", "ptr", "ids") if key not in schema]
    if missing and record["structures"]:
        raise FileFormatError(f"{path} is damaged: it has no column {missing[0]}")
    return schema


def _mapped(path: Path, column: _Column, structures: int, atoms: int) -> np.ndarray:
    """A column, mapped into memory; its file must be exactly what the record says."""
    size = column.size(structures, atoms)
    found = path.stat().st_size if path.is_file() else 0
    if found != size:
        raise FileFormatError(
            f"{path} has {found} bytes; the store says {size}: it was damaged or not copied as a whole"
        )
    with path.open("rb") as file:
        if file.read(HEADER) != column.header(structures, atoms):
            raise FileFormatError(f"{path} is damaged: its header is not that of {column.per} of dtype {column.dtype}")
    shape = (column.rows(structures, atoms), *column.tail)
    return np.memmap(path, dtype=column.dtype, mode="r", offset=HEADER, shape=shape)


def _verify(folder: Path, record: dict[str, Any], schema: dict[str, _Column]) -> None:
    """Compare the checksum of each source's rows in each column."""
    for key, column in schema.items():
        with (folder / _file_of(key)).open("rb") as file:
            position = [0, 0]
            for source in record["sources"]:
                begin = column.size(*position)
                position = [position[0] + source["structures"], position[1] + source["atoms"]]
                file.seek(begin)
                # A source without structures may have come before there were columns.
                expected = source["columns"].get(key) if source["structures"] else _NOTHING
                if _digest_of(file, column.size(*position) - begin) != expected:
                    raise FileFormatError(
                        f"{folder / _file_of(key)} is damaged: the rows that came from {source['name']} are not those that "
                        "were written"
                    )


def _digest_of(file: BinaryIO, size: int) -> str:
    """SHA-256 of the next `size` bytes."""
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, 1 << 18))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _card_of(record: dict[str, Any] | None) -> DatasetCard | None:
    """The card in a record; None if it has none."""
    if record is None:
        return None
    return DatasetCard(**{**record, "citation": tuple(record["citation"])})


class StoredDataset(MolecularDataset):
    """A store, or a run of neighboring structures in it: columns are views of files.

    Made by `open_store`. It is used as any other `MolecularDataset`; only selections behave differently: they are
    `StoredSelection`.

    Attributes
    ----------
    folder
        Where it is.
    settings
        What it was made with; see `StoreWriter`.
    sources
        What it was made of: the record of each source.
    """

    folder: Path
    settings: dict[str, Any]
    sources: list[dict[str, Any]]

    @classmethod
    def _opened(
        cls, folder: Path, record: dict[str, Any], schema: dict[str, _Column], arrays: dict[str, np.ndarray]
    ) -> StoredDataset:
        """The dataset of mapped columns."""
        columns: dict[str, Any] = {"targets": {}, "extras": {}}
        per_atom = {}
        for key, array in arrays.items():
            kind, name = _parts_of(key)
            plain = np.asarray(array)  # Pitfall: indexing an np.memmap is several times slower than indexing an array
            if kind:
                columns[kind][name], per_atom[name] = plain, schema[key].per == "atoms"
            else:
                columns[name] = plain
        try:
            new = cls(
                **columns,
                per_atom=per_atom,
                name=str(record.get("name", "")),
                card=_card_of(record.get("card")),
                checked=record.get("checked") is True,
            )
        except (DataError, TypeError, KeyError) as error:
            raise FileFormatError(f"{folder} is damaged: {error}") from error
        new.folder, new.settings, new.sources = folder, dict(record.get("settings") or {}), record["sources"]
        return new

    def select(self, indices: Any) -> MolecularDataset:
        """The structures with these numbers, in this order; nothing is copied. See `MolecularDataset.select`."""
        index = _integers(indices, len(self))
        if len(index) and (np.diff(index) == 1).all():
            return super().select(slice(int(index[0]), int(index[-1]) + 1))
        return StoredSelection(self, index)


class StoredSelection(MolecularDataset):
    """Structures of a store, in any order: numbers of rows, which become columns only when these are asked for.

    Training, prediction and items gather what they need from the store; ``dataset.pos`` and the like copy, once.

    Parameters
    ----------
    store
        Where they are.
    index : (S,) int64
        Which.
    """

    def __init__(self, store: StoredDataset, index: np.ndarray) -> None:
        kept = ("per_atom", "card", "name", "checked", "_featurizer")
        self.__dict__.update({name: store.__dict__[name] for name in kept}, _graphs=None)
        self._store, self._index = store, _frozen(index)
        self.ptr = _frozen(np.concatenate([[0], np.cumsum(store.ptr[index + 1] - store.ptr[index])]).astype(np.int64))
        # Pitfall: were the selection itself in `_Gathered`, the two would keep each other, and what they have gathered,
        # alive until the garbage is collected.
        rows = _Rows(store.ptr, self._index, self.ptr)
        self._chosen = rows
        self.targets: Mapping[str, np.ndarray] = _Gathered(rows, store.targets, store.per_atom)
        self.extras: Mapping[str, np.ndarray] = _Gathered(rows, store.extras, store.per_atom)

    def origin(self) -> tuple[MolecularDataset, np.ndarray]:
        """The store, and the numbers in it."""
        return self._store, self._index

    def select(self, indices: Any) -> MolecularDataset:
        """The structures with these numbers, in this order; nothing is copied. See `MolecularDataset.select`."""
        new = self._store.select(self._index[_integers(indices, len(self))])
        new.name, new.card, new._featurizer = self.name, self.card, self._featurizer
        return new

    def structure(self, index: int) -> Any:
        """Structure `index` as arrays."""
        return self._store.structure(int(self._index[range(len(self))[index]]))

    @cached_property
    def z(self) -> np.ndarray:
        """Atomic numbers: (A,)."""
        return self._chosen.gather(self._store.z, True)

    @cached_property
    def pos(self) -> np.ndarray:
        """Positions in Å: (A, 3)."""
        return self._chosen.gather(self._store.pos, True)

    @cached_property
    def fixed(self) -> np.ndarray | None:
        """Atoms that must not move: (A,)."""
        return self._chosen.gather(self._store.fixed, True)

    @cached_property
    def cell(self) -> np.ndarray | None:
        """Cells: (S, 3, 3)."""
        return self._chosen.gather(self._store.cell, False)

    @cached_property
    def pbc(self) -> np.ndarray | None:
        """Periodic directions: (S, 3)."""
        return self._chosen.gather(self._store.pbc, False)

    @cached_property
    def ids(self) -> np.ndarray:
        """Names: (S,)."""
        return self._chosen.gather(self._store.ids, False)

    def _rows_of(self, name: str, rows: Any) -> np.ndarray:
        """Some rows of a column, without gathering the others."""
        if name == "ptr":
            return self.ptr[rows]
        if name in ("z", "pos", "fixed") or name in self.per_atom:
            atoms = np.arange(*rows.indices(int(self.ptr[-1])))
            owner = np.searchsorted(self.ptr, atoms, side="right") - 1
            return self._store._rows_of(name, self._store.ptr[self._index[owner]] + atoms - self.ptr[owner])
        return self._store._rows_of(name, self._index[rows])

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        shape = self._store._shape_of(name)
        if shape is None or name == "ptr":
            return None if shape is None else self.ptr.shape
        is_per_atom = name in ("z", "pos", "fixed") or name in self.per_atom
        return (int(self.ptr[-1]) if is_per_atom else len(self), *shape[1:])

    def __repr__(self) -> str:
        title = f"{self.name}: " if self.name else ""
        targets = ", ".join(self.tasks) or "none"
        return f"<MolecularDataset {title}{len(self):,} structures, {int(self.ptr[-1]):,} atoms, targets: {targets}, on disk>"


class _Rows:
    """Which rows of a store's columns a selection has."""

    def __init__(self, source: np.ndarray, index: np.ndarray, ptr: np.ndarray) -> None:
        self.source, self.index, self.ptr = source, index, ptr

    def gather(self, column: np.ndarray | None, per_atom: bool) -> np.ndarray | None:
        """These rows, in memory."""
        if column is None:
            return None
        if not per_atom:
            return _frozen(column[self.index])
        out = np.empty((int(self.ptr[-1]), *column.shape[1:]), dtype=column.dtype)
        for start in range(0, len(self.index), _GATHERED_AT_ONCE):
            rows, _ = _atom_rows(self.source, self.index[start : start + _GATHERED_AT_ONCE])
            out[self.ptr[start] : self.ptr[start] + len(rows)] = column[rows]
        return _frozen(out)


class _Gathered(Mapping):
    """Targets or extras of a selection: gathered when they are asked for, and kept."""

    def __init__(self, rows: _Rows, columns: Mapping[str, np.ndarray], per_atom: frozenset[str]) -> None:
        self._rows, self._columns, self._per_atom = rows, columns, per_atom
        self._known: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._known:
            self._known[name] = self._rows.gather(self._columns[name], name in self._per_atom)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._columns  # Pitfall: a Mapping's own would gather the column to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)
