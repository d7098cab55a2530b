"""Predictions for any number of structures in constant memory, which a crash neither repeats nor loses.

`predict_files` reads structures one after the other (`datasets.streams`), predicts them in blocks, and appends what comes
out to one store or one extended XYZ file. After each shard the output is flushed to the disk and a journal says how far it
reaches and where the input goes on; whatever a killed process left behind that is cut off again. `predict_stream` does the
same for structures in memory. Over many workers: `bulk_ray.py`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ndem_zoo.checkpoint import load_json, save_json, sync
from ndem_zoo.datasets.base import MolecularDataset, _columns_of, as_dataset
from ndem_zoo.datasets.store import JOURNAL, StoreWriter, is_store, locked, open_store
from ndem_zoo.datasets.streams import DatasetStream, Item, Stream, open_streams
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError
from ndem_zoo.featurizers.base import as_structure

if TYPE_CHECKING:
    from ase import Atoms

    from ndem_zoo.ensemble import Ensemble
    from ndem_zoo.models.estimator import NDeMModel

#: Choice: structures, and atoms, that are in memory together; batches are made of structures of similar size among them.
BLOCK, BLOCK_ATOMS = 2_000, 100_000

#: Choice: structures after which the output is made to last.
SHARD = 10_000

#: Choice: so many shards are equally long; from then on a shard is one part in so many of what is done, so that the number
#: of shards grows as the logarithm only.
EQUAL_SHARDS = 100

FORMAT, VERSION = "ndem_zoo predictions", 1
REJECTED = "rejected.jsonl"

ON_ERROR = ("stop", "record")

_INDEX = re.compile(r"^structure (\d+): ")


@dataclass(frozen=True)
class BulkRecord:
    """What a bulk prediction did.

    Attributes
    ----------
    structures
        Structures with predictions in the output.
    rejected
        Structures that could not be predicted, listed in the file of rejected ones.
    shards
        How often the output was made to last.
    resumed_at
        Structures that an earlier process had done.
    """

    structures: int
    rejected: int
    shards: int
    resumed_at: int


def predict_files(
    model: NDeMModel | Ensemble,
    sources: Any,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    on_error: str = "stop",
    shard: int = SHARD,
    report: Callable[[BulkRecord], None] | None = None,
) -> BulkRecord:
    """Predict all structures of files, in their order.

    Parameters
    ----------
    model
        A fitted model, or an `Ensemble`, whose standard deviations are written as well.
    sources
        One or several of: a path (see `datasets.streams.open_streams`), a `Stream`, or whatever
        `NDeMModel.predict` takes.
    out
        Name of an extended XYZ file (one that ends in ``xyz``): structures with all that they had, ``energy`` and
        ``forces`` being predicted, and labels being kept as ``REF_energy`` and ``REF_forces``. It grows under the name
        ``<out>.part``; ``<out>.json`` lists the shards. Any other name: folder of a store, whose targets are the
        predictions and whose ids are the numbers of the structures in the input; ``store.json`` lists the shards.
    resume
        Continue where an earlier process was interrupted; begin if there was none, and do nothing if it had finished.
    on_error
        ``"stop"``: the first structure that cannot be predicted is an error; what was done before it can be resumed.
        ``"record"``: such structures are left out, and listed with the reason in ``rejected.jsonl`` in the store, or
        ``<out>.rejected.jsonl``.
    shard
        Structures after which the output is made to last, or a hundredth of what is done, whichever is more: a killed process
        loses at most so many, and the journal of any number of structures stays short.
    report
        Called after each shard with what was done so far.

    Returns
    -------
    record : BulkRecord

    Raises
    ------
    DataError
        For a structure that cannot be predicted; names its number, its file and the reason. If there are no structures.
    FileFormatError
        If a file is damaged so that nobody can tell where the next structure begins, or the unfinished output is.
    FileExistsError
        If there is an unfinished output and `resume` is not asked for, or something else of this name.
    ConfigError
        If the unfinished output was begun with another model, other files or another `on_error`; if an option is out of
        range; if another process is writing the output.
    """
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error={on_error!r}; allowed are {', '.join(map(repr, ON_ERROR))}")
    if not (isinstance(shard, (int, np.integer)) and shard >= 1):
        raise ConfigError(f"shard={shard!r}; it must be a whole number of structures >= 1")
    streams = _streams_of(sources)
    settings = {"model": digest_of(model), "inputs": [s.identity() for s in streams], "on_error": on_error}
    worker = Worker(model, [stream.name for stream in streams], on_error)
    kind = _ExtxyzOutput if str(out).lower().endswith("xyz") else _StoreOutput
    with kind(Path(out), settings, resume) as output:
        begun = output.progress
        if not output.is_finished:
            items = _items(streams, begun, output.wants_atoms)
            with closing(items):
                for block, ends_shard in _blocks(items, int(shard), BLOCK):
                    output.write(worker.predict(block))
                    if ends_shard:
                        output.commit()
                        if report is not None:
                            report(output.record(begun))
            output.finish()
        return output.record(begun)


def predict_stream(
    model: NDeMModel | Ensemble, structures: Iterable[Any], *, block: int = BLOCK
) -> Iterator[dict[str, Any]]:
    """Predictions for structures that come one by one, such as those of a generator; only a block is in memory.

    Parameters
    ----------
    model
        A fitted model, or an `Ensemble`.
    structures
        `ase.Atoms`, tuples ``(z, pos[, cell[, pbc]])`` of arrays, or `Structure`.
    block
        Structures that are taken, and predicted, together.

    Yields
    ------
    prediction : dict
        Of each structure, in order: ``"energy"`` in eV (or another target), ``"forces"`` (n, 3) in eV/Å; of an ensemble
        also ``"energy_std"`` and ``"forces_std"``.

    Raises
    ------
    DataError
        For the first structure that cannot be predicted; names its number.
    """
    if not (isinstance(block, (int, np.integer)) and block >= 1):
        raise ConfigError(f"block={block!r}; it must be a whole number of structures >= 1")
    worker = Worker(model, [""], "stop")
    for some, _ in _blocks(_given(structures), int(block), int(block)):
        found = worker.predict(some)
        yield from map(found.of, range(len(found.items)))


def digest_of(model: NDeMModel | Ensemble) -> str:
    """SHA-256 of everything that the predictions of a model depend on: weights, reference energies, prior, calibration."""
    members = getattr(model, "members_", [model])
    digest = hashlib.sha256(json.dumps(getattr(model, "calibration_", None), sort_keys=True).encode())
    for member in members:
        potential = member._fitted()
        digest.update(json.dumps(member.resolved_["backbone"], sort_keys=True).encode())
        states = [potential.state_dict(), {} if potential.prior is None else potential.prior.state_dict()]
        for name, value in itertools.chain(*(sorted(state.items()) for state in states)):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------- input


@dataclass(frozen=True)
class Numbered:
    """A structure, and where in the input as a whole it is: its number, and that of its source."""

    number: int
    source: int
    item: Item


@dataclass(frozen=True)
class _Progress:
    """How far an output reaches, and where the input goes on."""

    read: int = 0
    rejected: int = 0
    rejected_bytes: int = 0
    source: int = 0
    row: int = 0
    place: int = 0


def _streams_of(sources: Any) -> list[Stream]:
    """The inputs, one after the other."""
    if isinstance(sources, (str, os.PathLike)):
        return open_streams(sources)
    if isinstance(sources, Stream):
        return [sources]
    is_list = isinstance(sources, (list, tuple))
    if is_list and sources and all(isinstance(s, (str, os.PathLike, Stream, MolecularDataset)) for s in sources):
        return [stream for source in sources for stream in _streams_of(source)]
    return [DatasetStream(as_dataset(sources))]


def _items(streams: Sequence[Stream], start: _Progress, with_atoms: bool) -> Iterator[Numbered]:
    """All structures behind those that are done."""
    number, row, place = start.read, start.row, start.place
    for source in range(start.source, len(streams)):
        with closing(streams[source].items(row, place, with_atoms)) as items:
            for item in items:
                yield Numbered(number, source, item)
                number += 1
        row = place = 0
    if not number:
        raise DataError("there are no structures to predict; needed is one or more")


def _given(structures: Iterable[Any]) -> Iterator[Numbered]:
    """Structures in memory."""
    for number, value in enumerate(structures):
        try:
            item = Item(number, 0, as_structure(value))
        except DataError as error:
            item = Item(number, 0, problem=str(error))
        yield Numbered(number, 0, item)


def _blocks(items: Iterable[Numbered], shard: int, block: int) -> Iterator[tuple[list[Numbered], bool]]:
    """Structures that are predicted together, and whether a shard ends behind them."""
    some: list[Numbered] = []
    atoms, end = 0, None
    for item in items:
        if end is None:
            end = item.number + max(shard, item.number // EQUAL_SHARDS)
        some.append(item)
        atoms += 0 if item.item.structure is None else len(item.item.structure.z)
        is_end = item.number + 1 == end
        if is_end or len(some) == block or atoms >= BLOCK_ATOMS:
            yield some, is_end
            some, atoms, end = [], 0, None if is_end else end
    if end is not None:
        yield some, True


# -------------------------------------------------------------------------------------------------------------- prediction


@dataclass(frozen=True)
class Predicted:
    """A block of structures with predictions, and those without.

    Attributes
    ----------
    items
        Structures with predictions.
    dataset
        The same as a dataset, whose targets are the predictions; None if there are none.
    rejected
        Structures that cannot be predicted, and why.
    last
        The last structure of all.
    """

    items: list[Numbered]
    dataset: MolecularDataset | None
    rejected: list[tuple[Numbered, str]]
    last: Numbered | None

    def of(self, row: int) -> dict[str, Any]:
        """Predictions of one structure."""
        dataset = self.dataset
        atoms = slice(dataset.ptr[row], dataset.ptr[row + 1])
        return {
            name: values[atoms] if name in dataset.per_atom else float(values[row])
            for name, values in dataset.targets.items()
        }


class Worker:
    """Predicts blocks with one model.

    Parameters
    ----------
    model
        A fitted model, or an `Ensemble`.
    names
        Of the sources, for messages.
    on_error
        See `predict_files`.

    Attributes
    ----------
    columns : dict of str to bool
        What is predicted, and whether it has a row for each atom.
    """

    def __init__(self, model: NDeMModel | Ensemble, names: Sequence[str], on_error: str) -> None:
        self.model, self.names, self.on_error = model, names, on_error
        self._has_warned = False
        model._check_usable(_EMPTY)  # whether it is fitted is seen before anything is written
        self.columns = {name: name.startswith("forces") for name in model._columns_of_usable(_EMPTY)}

    def predict(self, block: list[Numbered]) -> Predicted:
        """Predictions for structures; those that cannot be predicted raise DataError, or are recorded."""
        rejected = [(it, it.item.problem) for it in block if it.item.structure is None]
        items = [it for it in block if it.item.structure is not None]
        items, dataset = self._sifted(items, rejected)
        self._stop_at(rejected)
        if items:
            items, dataset = self._finite(items, dataset, self.model._columns_of_usable(dataset), rejected)
        rejected.sort(key=lambda pair: pair[0].number)
        return Predicted(items, dataset if items else None, rejected, block[-1] if block else None)

    def _sifted(self, items: list[Numbered], rejected: list) -> tuple[list[Numbered], MolecularDataset | None]:
        """Structures that the model can predict, as columns."""
        if not items:
            return items, None
        dataset = MolecularDataset(**_columns_of([it.item.structure for it in items]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            problems = unusable(self.model._check_usable, dataset)
        self._hand_on(caught, items)
        rejected += [(items[row], reason) for row, reason in problems.items()]
        good = [row for row in range(len(items)) if row not in problems]
        return [items[row] for row in good], dataset.select(good) if problems else dataset

    def _finite(
        self, items: list[Numbered], dataset: MolecularDataset, columns: Mapping[str, np.ndarray], rejected: list
    ) -> tuple[list[Numbered], MolecularDataset]:
        """Structures whose predictions are numbers, with these as targets."""
        per_atom = self.columns
        is_good = np.ones(len(items), dtype=bool)
        for name, values in columns.items():
            finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
            is_good &= np.logical_and.reduceat(finite, dataset.ptr[:-1]) if per_atom[name] else finite
        bad = [
            (items[row], "the model gives an energy or forces that are not finite") for row in np.flatnonzero(~is_good)
        ]
        self._stop_at(bad)
        rejected += bad
        n = len(items)
        known = {
            "cell": np.zeros((n, 3, 3)) if dataset.cell is None else dataset.cell,
            "pbc": np.zeros((n, 3), dtype=bool) if dataset.pbc is None else dataset.pbc,
        }
        ids = [str(it.number) for it in items]
        whole = MolecularDataset(
            dataset.z, dataset.pos, dataset.ptr, targets=columns, per_atom=per_atom, ids=ids, checked=True, **known
        )
        good = np.flatnonzero(is_good)
        return [items[row] for row in good], whole.select(good) if bad else whole

    def _stop_at(self, bad: list[tuple[Numbered, str]]) -> None:
        """Raise DataError for the first of these, if that is wanted."""
        if not bad or self.on_error == "record":
            return
        first, reason = min(bad, key=lambda pair: pair[0].number)
        where = f" ({self.names[first.source]}, structure {first.item.row})" if len(self.names) > 1 else ""
        kind = FileFormatError if first.item.structure is None and first.item.problem and self.names[0] else DataError
        raise kind(f"structure {first.number}{where}: {reason}")

    def _hand_on(self, caught: list[warnings.WarningMessage], items: list[Numbered]) -> None:
        """Warn with the numbers of the structures in the whole input, once."""
        for found in caught:
            text = _INDEX.sub(lambda m: f"structure {items[int(m[1])].number}: ", str(found.message))
            if not self._has_warned:
                warnings.warn(f"{text} (said of the first such structure only)", found.category, stacklevel=4)
            self._has_warned = True


_EMPTY = MolecularDataset(np.zeros(0, dtype=np.int64), np.zeros((0, 3)), np.zeros(1, dtype=np.int64))


def unusable(check: Callable[[MolecularDataset], None], dataset: MolecularDataset) -> dict[int, str]:
    """Numbers of the structures that a check does not pass, and why; it is asked about halves, and halves of these.

    Parameters
    ----------
    check
        Raises DataError for the first bad structure of a dataset.
    dataset
        Structures.
    """
    try:
        check(dataset)
        return {}
    except DataError as error:
        if len(dataset) == 1:
            return {0: _INDEX.sub("", str(error))}
    half = len(dataset) // 2
    left, right = (unusable(check, dataset.select(rows)) for rows in (slice(0, half), slice(half, len(dataset))))
    return left | {half + row: reason for row, reason in right.items()}


# ---------------------------------------------------------------------------------------------------------------- output


class _Growing:
    """A file that grows; what came after `size` bytes is cut off when it is opened, and nobody else may write it."""

    def __init__(self, path: Path, size: int) -> None:
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise FileFormatError(f"{path} has {found} bytes; its journal says {size}: it is damaged, begin anew")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(locked(path), "r+b")
        self._file.truncate(size)
        self._file.seek(size)
        self.size = size

    def write(self, data: bytes) -> None:
        """Append."""
        self._file.write(data)
        self.size += len(data)

    def sync(self) -> None:
        """Flush to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Output(ABC):
    """Where predictions go. Subclasses keep `shards`: notes of what is committed, the last of which says how far it reaches."""

    wants_atoms = False
    is_finished = False
    shards: list[dict[str, Any]]

    def __init__(self, settings: dict[str, Any], rejected: Path) -> None:
        self._settings, self._rejected_path = settings, rejected
        self._rejected: _Growing | None = None
        self._pending: list[Predicted] = []
        self._spans: dict[int, list[int]] = {}
        self._kept = self._bad = 0

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._rejected is not None:
            self._rejected.close()
        self.close()

    @property
    def progress(self) -> _Progress:
        """How far the output reaches."""
        return _Progress(**self.shards[-1]["next"]) if self.shards else _Progress()

    def record(self, begun: _Progress) -> BulkRecord:
        """What is done, if it was `begun` there."""
        now = self.progress
        return BulkRecord(now.read - now.rejected, now.rejected, len(self.shards), begun.read)

    def write(self, found: Predicted) -> None:
        """Append a block."""
        if found.last is None:
            return
        if found.dataset is not None:
            self.append(found)
        if found.rejected:
            self._write_rejected(found.rejected)
        for it in [*found.items, *(it for it, _ in found.rejected)]:
            span = self._spans.setdefault(it.source, [it.item.row, it.item.row])
            span[:] = [min(span[0], it.item.row), max(span[1], it.item.row + 1)]
        self._kept, self._bad = self._kept + len(found.items), self._bad + len(found.rejected)
        self._last = found.last

    def commit(self) -> None:
        """Make what was appended last."""
        before, last = self.progress, self._last
        if self._rejected is not None:
            self._rejected.sync()
        reached = _Progress(
            read=last.number + 1,
            rejected=before.rejected + self._bad,
            rejected_bytes=before.rejected_bytes if self._rejected is None else self._rejected.size,
            source=last.source,
            row=last.item.row + 1,
            place=last.item.after,
        )
        names = [entry["name"] for entry in self._settings["inputs"]]
        rows = [[names[source], *span] for source, span in sorted(self._spans.items())]
        note = {"numbers": [before.read, reached.read], "rows": rows, "structures": self._kept, "next": vars(reached)}
        self.keep(note)
        self._spans, self._kept, self._bad = {}, 0, 0

    def _write_rejected(self, rejected: list[tuple[Numbered, str]]) -> None:
        """List structures that cannot be predicted."""
        if self._rejected is None:
            self._rejected = _Growing(self._rejected_path, self.progress.rejected_bytes)
        for it, reason in rejected:
            name = self._settings["inputs"][it.source]["name"]
            entry = {"number": it.number, "input": name, "row": it.item.row, "reason": reason}
            self._rejected.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    @abstractmethod
    def append(self, found: Predicted) -> None:
        """Add a block to the output."""

    @abstractmethod
    def keep(self, note: dict[str, Any]) -> None:
        """Flush the output, and add a note to the journal."""

    @abstractmethod
    def finish(self) -> None:
        """Give the output its name."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files."""


class _StoreOutput(_Output):
    """A store with the predictions as targets; its journal is the store's own."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        super().__init__(settings, folder / REJECTED)
        self.folder = folder
        self._writer: StoreWriter | None = None
        if resume and is_store(folder):
            stored = open_store(folder)
            _compare(stored.settings, settings, folder)
            self.shards, self.is_finished = _notes(stored.sources, folder), True
            return
        if not resume and (folder / JOURNAL).is_file():
            raise FileExistsError(
                f"{folder} holds unfinished predictions: resume them, delete them, or give another name"
            )
        if (folder / JOURNAL).is_file():
            _compare(load_json(folder / JOURNAL).get("settings"), settings, folder)
        self._writer = StoreWriter(folder, name="predictions", settings=settings)
        self.shards = _notes(self._writer.sources.values(), folder)

    def append(self, found: Predicted) -> None:
        self._writer.append(found.dataset)

    def keep(self, note: dict[str, Any]) -> None:
        self._writer.commit("{}:{}".format(*note["numbers"]), note=note)
        self.shards.append(note)

    def finish(self) -> None:
        if not self._writer.structures:
            raise DataError(f"all structures were rejected; the reasons are in {self._rejected_path}")
        self._writer.finish()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _ExtxyzOutput(_Output):
    """An extended XYZ file that grows as ``<name>.part``, with its journal in ``<name>.json``."""

    wants_atoms = True

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        super().__init__(settings, path.with_name(f"{path.name}.rejected.jsonl"))
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self._journal_path = path.with_name(f"{path.name}.json")
        self._file: _Growing | None = None
        if path.is_dir():
            raise FileExistsError(f"{path} is a folder; a file is to be written under this name")
        journal = self._found(settings, resume)
        self.shards = journal["shards"]
        self.is_finished = journal["finished"]
        if not self.is_finished:
            self._file = _Growing(self.part, self.shards[-1]["bytes"][1] if self.shards else 0)
            self._save(False)
        self._digest = hashlib.sha256()

    def _found(self, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
        """The journal to go on with, or an empty one."""
        if self._journal_path.is_file():
            journal = load_json(self._journal_path)
            if not isinstance(journal, dict) or journal.get("format") != FORMAT or journal.get("version") != VERSION:
                raise FileExistsError(f"{self._journal_path} is not a journal of predictions; give another name")
            if not resume and not journal["finished"]:
                raise FileExistsError(
                    f"{self.path} is unfinished ({self.part}): resume it, delete it with {self._journal_path}, or give another name"
                )
            if resume:
                _compare(journal["settings"], settings, self.path)
                return self._renamed(journal)
        elif resume and self.path.exists():
            raise FileExistsError(f"{self.path} has no journal {self._journal_path} to resume with; give another name")
        return {"shards": [], "finished": False}

    def _renamed(self, journal: dict[str, Any]) -> dict[str, Any]:
        """The journal, with the last step of a process that was killed between renaming the file and saying so."""
        if not journal["finished"] and not self.part.exists() and self.path.is_file() and journal["shards"]:
            verify_extxyz(self.path, journal)
            self.shards = journal["shards"]
            self._save(True)
            return journal | {"finished": True}
        return journal

    def append(self, found: Predicted) -> None:
        from ase.io import write

        for row, it in enumerate(found.items):
            _attach(it.item.atoms, found.of(row))
        text = io.StringIO()
        write(text, [it.item.atoms for it in found.items], format="extxyz")
        data = text.getvalue().encode()
        self._digest.update(data)
        self._file.write(data)

    def keep(self, note: dict[str, Any]) -> None:
        self._file.sync()
        begin = self.shards[-1]["bytes"][1] if self.shards else 0
        self.shards.append(note | {"bytes": [begin, self._file.size], "sha256": self._digest.hexdigest()})
        self._digest = hashlib.sha256()
        self._save(False)

    def _save(self, is_finished: bool) -> None:
        head = {"format": FORMAT, "version": VERSION, "finished": is_finished, "settings": self._settings}
        save_json(self._journal_path, head | {"shards": self.shards})

    def finish(self) -> None:
        if not self._file.size:
            raise DataError(f"all structures were rejected; the reasons are in {self._rejected_path}")
        os.replace(self.part, self.path)
        sync(self.path.parent)
        self._save(True)
        self.is_finished = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def verify_extxyz(path: str | os.PathLike, journal: Mapping[str, Any] | None = None) -> None:
    """Compare an extended XYZ file of predictions with the checksums of its shards.

    Parameters
    ----------
    path
        What `predict_files` wrote.
    journal
        Content of ``<path>.json``; default: it is read. (Predictions in a store: ``open_store(folder, verify=True)``.)

    Raises
    ------
    FileFormatError
        If the file is not what was written; names the structures.
    """
    path = Path(path)
    journal = load_json(f"{path}.json") if journal is None else journal
    with path.open("rb") as file:
        for shard in journal["shards"]:
            begin, end = shard["bytes"]
            digest, left = hashlib.sha256(), end - begin
            while left and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
            if digest.hexdigest() != shard["sha256"]:
                first, stop = shard["numbers"]
                raise FileFormatError(
                    f"{path} is damaged: structures {first} to {stop - 1} are not those that were written"
                )
        if file.read(1):
            raise FileFormatError(f"{path} is damaged: it goes on behind its last shard")


def _notes(sources: Iterable[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Notes in the journal of a store."""
    try:
        notes = [source["note"] for source in sources]
        for note in notes:
            _Progress(**note["next"])
    except (KeyError, TypeError) as error:
        raise FileFormatError(
            f"{folder} is a store, but not one of predictions ({error!r}); give another name"
        ) from error
    return notes


def _compare(found: Any, settings: Mapping[str, Any], where: Path) -> None:
    """Raise ConfigError unless an output was begun with these settings."""
    found = found if isinstance(found, Mapping) else {}
    for name, value in settings.items():
        if found.get(name) != value:
            raise ConfigError(
                f"{where} was begun with {name} {found.get(name)!r}, not {value!r}: resume with the same, or give another name"
            )


def _attach(atoms: Atoms, predicted: Mapping[str, Any]) -> None:
    """Predictions into the calculator of `atoms`; labels that were there become ``REF_...``, if there is none yet.

    What ASE's calculators do not know goes into `info` and `arrays`: standard deviations under their names, other targets
    under ``pred_...``.
    """
    from ase.calculators.singlepoint import SinglePointCalculator

    labels = dict(atoms.calc.results) if atoms.calc is not None else {}
    if "energy" in labels:
        atoms.info.setdefault("REF_energy", float(labels["energy"]))
    if "forces" in labels and "REF_forces" not in atoms.arrays:
        atoms.arrays["REF_forces"] = np.array(labels["forces"])
    known = {name: np.array(predicted[name]) for name in ("energy", "forces") if name in predicted}
    atoms.calc = SinglePointCalculator(atoms, **known) if known else None
    for name, value in predicted.items():
        if name not in known:
            key = name if name.endswith("_std") else f"pred_{name}"
            (atoms.arrays if np.ndim(value) else atoms.info)[key] = value
