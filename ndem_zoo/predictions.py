"""Predictions beside their labels, as ``predictions.npz`` in the folder of a run: what parity plots are drawn from.

Written by `runs.train_run`, read by `report.py`; plain arrays, nothing pickled. The errors in tables do not come from
here but from ``metrics.json``: of a large dataset only some structures are kept.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ndem_zoo.checkpoint import write_bytes
from ndem_zoo.datasets.files import read_npz
from ndem_zoo.errors import FileFormatError

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset

FILE = "predictions.npz"

#: Choice: so many structures are kept, evenly spaced.
MOST_STRUCTURES = 2_000

_PREDICTED, _TARGET = "predicted.", "target."


@dataclass(frozen=True)
class Predictions:
    """Predictions and labels of some structures.

    Attributes
    ----------
    part
        What the structures are to the run: ``"test"`` or ``"valid"``.
    n_structures
        How many there were; kept are ``len(ptr) - 1`` of them.
    z : (A,)
        Atomic numbers.
    ptr : (S + 1,)
        Where each structure begins and ends.
    free : (A,) bool
        Atoms whose forces count.
    predicted, target
        ``"energy"`` or another target (S,), ``"forces"`` (A, 3); eV and eV/Å, or the target's unit. Both have the same
        names.
    """

    part: str
    n_structures: int
    z: np.ndarray
    ptr: np.ndarray
    free: np.ndarray
    predicted: Mapping[str, np.ndarray]
    target: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, part: str, dataset: MolecularDataset, predicted: Mapping[str, np.ndarray]) -> Predictions:
        """Predictions in columns beside the labels of a dataset; what has no label is left out."""
        n = len(dataset)
        rows = np.unique(np.linspace(0, n - 1, min(n, MOST_STRUCTURES)).astype(np.int64))
        kept = dataset.select(rows)
        names = [name for name in predicted if name in dataset.targets]
        atoms = _atoms_of(dataset.ptr, rows)
        own = {name: np.asarray(predicted[name])[atoms if name == "forces" else rows] for name in names}
        free = np.ones(len(kept.z), dtype=bool) if kept.fixed is None else ~kept.fixed
        return cls(part, n, np.asarray(kept.z), kept.ptr, free, own, {name: kept.targets[name] for name in names})

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``predictions.npz``, whole or not at all."""
        arrays = {"part": np.array(self.part), "n_structures": np.array(self.n_structures)}
        arrays |= {"z": self.z, "ptr": self.ptr, "free": self.free}
        arrays |= {_PREDICTED + name: np.asarray(values, dtype=np.float64) for name, values in self.predicted.items()}
        arrays |= {_TARGET + name: np.asarray(values, dtype=np.float64) for name, values in self.target.items()}
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        write_bytes(Path(folder) / FILE, stream.getvalue())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Predictions | None:
        """What `save` wrote; None where there is nothing.

        Raises
        ------
        FileFormatError
            If the file is damaged, or its arrays do not fit together.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        with _archive(path) as archive:
            names = [key.removeprefix(_TARGET) for key in archive.files if key.startswith(_TARGET)]
            columns = [prefix + name for prefix in (_PREDICTED, _TARGET) for name in names]
            needed = ["part", "n_structures", "z", "ptr", "free", *columns]
            unknown = sorted(set(archive.files) - set(needed))
        if unknown:
            raise FileFormatError(f"{path} is damaged: it has an array {unknown[0]!r}, which nothing is known about")
        raw = read_npz(path, needed)
        lengths = {name: len(raw["z"]) if name == "forces" else len(raw["ptr"]) - 1 for name in names}
        fits = all(len(raw[prefix + name]) == n for name, n in lengths.items() for prefix in (_PREDICTED, _TARGET))
        if not fits or raw["ptr"][-1] != len(raw["z"]) or len(raw["free"]) != len(raw["z"]):
            raise FileFormatError(f"{path} has arrays that do not fit together")
        predicted, target = ({name: raw[prefix + name] for name in names} for prefix in (_PREDICTED, _TARGET))
        return cls(str(raw["part"]), int(raw["n_structures"]), raw["z"], raw["ptr"], raw["free"], predicted, target)

    def force_errors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Length of the true force and of the error's vector of each free atom, (A,) in eV/Å; None without forces."""
        if "forces" not in self.target:
            return None
        true = self.target["forces"][self.free]
        error = self.predicted["forces"][self.free] - true
        return np.linalg.norm(true, axis=1), np.linalg.norm(error, axis=1)

    def note(self) -> str:
        """In words, what the structures are."""
        kept, names = len(self.ptr) - 1, {"valid": "validation"}
        of = "" if kept == self.n_structures else f" of {self.n_structures:,}"
        return f"{kept:,}{of} {names.get(self.part, self.part)} structures"


def _archive(path: Path) -> np.lib.npyio.NpzFile:
    read_npz(path, [])  # with our messages for what is damaged
    return np.load(path, allow_pickle=False)


def _atoms_of(ptr: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of the atoms of some structures."""
    return np.concatenate([np.arange(ptr[row], ptr[row + 1]) for row in rows])
