"""Data between this package and SchNetPack: datasets and its ASE databases, batches and its dictionaries.

Databases carry their units; here they are eV, Å and those of `ndem_zoo.properties`, there what one asks for. Edges have one
direction and one meaning in both: from the center i = `dst` to the neighbor j = `src`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor

from ndem_zoo.checkpoint import writing
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.checks import check_structures
from ndem_zoo.errors import DataError, FileFormatError
from ndem_zoo.graph import PER_ATOM, Batch, within
from ndem_zoo.optional import require
from ndem_zoo.properties import property_of

P = require("schnetpack.properties", extra="schnetpack")

#: Our units as SchNetPack spells them.
_SPELLED = {"eV": "eV", "D": "Debye", "a0³": "a0 a0 a0", "a0²": "a0 a0", "cal/mol/K": "cal/mol/K"}
_UNITS = {"forces": "eV/Ang", "stress": "eV/Ang/Ang/Ang"}
#: Property that says of each atom whether it may move; SchNetPack's ConsiderOnlySelectedAtoms reads it.
CONSIDERED = "considered_atoms"
#: SchNetPack's tables of atom references have so many rows.
_REFERENCE_ROWS = 100


# ---------------------------------------------------------------------------------------------------------- databases


def write_ase_db(
    dataset: MolecularDataset,
    path: str | os.PathLike,
    *,
    names: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dataset as an ASE database that SchNetPack's `AtomsDataModule` and `spktrain` read.

    Parameters
    ----------
    dataset
        Structures and labels in eV and Å.
    path
        File that is made; its name ends in ``.db``.
    names
        Names of targets in the file where they differ, such as ``{"U0": "energy_U0"}`` for SchNetPack's QM9.
    units
        Units of targets in the file, as SchNetPack spells them, such as ``{"energy": "kcal/mol"}``; default: our own.
    metadata
        Further entries of the file; SchNetPack's MD17 wants ``{"molecule": "ethanol"}``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    DataError
        If the file exists or its name does not end in ``.db``, a structure cannot be used, or `names` or `units` speak of a target that is not there.

    Notes
    -----
    Atoms that are fixed have False in the property ``considered_atoms``; references of free atoms that the dataset's card
    knows are written, too. Ids and `extras` are not.
    """
    path = Path(path)
    if path.suffix != ".db" or path.exists():
        problem = "exists already" if path.exists() else "does not end in .db, as SchNetPack wants it"
        raise DataError(f"{path}: {problem}")
    check_structures(dataset)
    names, units = dict(names or {}), dict(units or {})
    for given in (names, units):
        for target in given.keys() - dataset.targets.keys():
            raise DataError(f"there is no target {target!r} to write; the dataset has {', '.join(dataset.tasks)}")
    factors = {t: _factor(_unit_of(t), units.get(t), t) for t in dataset.targets}
    table = {names.get(t, t): units.get(t) or _unit_of(t) for t in dataset.targets}
    if dataset.fixed is not None:
        table[CONSIDERED] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), _sqlite(), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        unfinished = os.path.join(folder, path.name)
        data = require("schnetpack.data", extra="schnetpack")
        references = _references(dataset, names, factors)
        file = data.ASEAtomsData.create(unfinished, "Ang", table, atomrefs=references)
        if metadata:
            file.update_metadata(**metadata)
        rows = [_row(dataset, i, names, factors) for i in range(len(dataset))]
        file.add_systems(property_list=rows, atoms_list=[_atoms(dataset, i) for i in range(len(dataset))])
        with open(unfinished, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    return path


@contextlib.contextmanager
def _sqlite() -> Iterator[None]:
    """A database that a full disk does not take raises the system's error."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error) or "disk I/O" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def read_ase_db(path: str | os.PathLike, *, names: Mapping[str, str] | None = None) -> MolecularDataset:
    """Read a SchNetPack database as a dataset, in eV and Å.

    Parameters
    ----------
    path
        The file.
    names
        Names of properties here where they differ from the file's, such as ``{"energy_U0": "U0"}``.

    Raises
    ------
    DataError
        If there is no such file, or a property whose unit is known here has none there or one of another kind.
    FileFormatError
        If the file is damaged.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file")
    data = require("schnetpack.data", extra="schnetpack")
    try:
        return _dataset_of(path, data.ASEAtomsData(str(path), distance_unit="Ang"), dict(names or {}))
    except DataError:
        raise
    # Pitfall: of a damaged file SQLite, ASE's reader and SchNetPack's raise whatever they trip over.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{path} is damaged or no database of SchNetPack's ({reason[:300]})") from error


def _dataset_of(path: str | os.PathLike, file: Any, names: Mapping[str, str]) -> MolecularDataset:
    """All structures of an open database."""
    factors = {p: _factor(unit, _unit_of(names.get(p, p)), f"{path}: {p}") for p, unit in file.units.items()}
    rows = list(file.iter_properties())
    if not rows:
        raise DataError(f"{path}: the database is empty")
    counts = [int(row[P.n_atoms]) for row in rows]
    pbc = np.stack([row[P.pbc].numpy() for row in rows])
    is_periodic = bool(pbc.any())
    considered = [row[CONSIDERED].reshape(-1) for row in rows if CONSIDERED in row]
    targets, per_atom = _labels(rows, factors, names)
    return MolecularDataset(
        torch.cat([row[P.Z] for row in rows]).numpy(),
        torch.cat([row[P.R] for row in rows]).double().numpy(),
        np.concatenate([[0], np.cumsum(counts)]),
        targets=targets,
        per_atom=per_atom,
        cell=torch.cat([row[P.cell] for row in rows]).double().numpy() if is_periodic else None,
        pbc=pbc if is_periodic else None,
        fixed=~torch.cat(considered).bool().numpy() if considered else None,
        name=Path(path).stem,
    )


def _labels(
    rows: list[dict[str, Tensor]], factors: Mapping[str, float], names: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
    """Columns of the properties in our units, and which of them have one row per atom."""
    targets, per_atom = {}, {}
    for name in [name for name in factors if name != CONSIDERED]:
        ours = names.get(name, name)
        values = [np.atleast_1d(row[name].numpy()) for row in rows]
        per_atom[ours] = ours in PER_ATOM or any(len(value) != 1 for value in values)
        targets[ours] = factors[name] * np.concatenate(values).astype(np.float64)
    return targets, per_atom


def _unit_of(target: str) -> str | None:
    """Our unit of a target, as SchNetPack spells it; None where nothing is known."""
    return _UNITS.get(target) or _SPELLED.get(property_of(target).unit)


def _factor(given: str | None, wanted: str | None, what: str) -> float:
    """What a number in one unit is multiplied with to be in the other; 1 where no other is wanted."""
    if wanted is None or given == wanted:
        return 1.0
    if given is None:
        raise DataError(f"{what} has no unit; it is needed to convert it to {wanted}")
    try:
        return float(require("schnetpack.units", extra="schnetpack").convert_units(given, wanted))
    except Exception as error:  # a parser of expressions: whatever it meets
        raise DataError(f"{what}: {given!r} cannot be converted to {wanted!r} ({error})") from error


def _references(
    dataset: MolecularDataset, names: Mapping[str, str], factors: Mapping[str, float]
) -> dict[str, list[float]]:
    """SchNetPack's table of free atoms for each target that has one: a number for each atomic number."""
    known = getattr(dataset.card, "atom_references", None) or {}
    tables = {}
    for target in dataset.targets.keys() & known.keys():
        table = np.zeros(_REFERENCE_ROWS)
        for symbol, value in known[target].items():
            table[atomic_numbers[symbol]] = factors[target] * value
        tables[names.get(target, target)] = table.tolist()
    return tables


def _row(
    dataset: MolecularDataset, index: int, names: Mapping[str, str], factors: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Labels of a structure; SchNetPack wants a first axis, of length 1 or of the atoms, in every one of them."""
    atoms = slice(dataset.ptr[index], dataset.ptr[index + 1])
    row = {}
    for target, column in dataset.targets.items():
        values = column[atoms] if target in dataset.per_atom else column[index : index + 1]
        row[names.get(target, target)] = factors[target] * np.asarray(values)
    if dataset.fixed is not None:
        row[CONSIDERED] = ~np.asarray(dataset.fixed[atoms])
    return row


def _atoms(dataset: MolecularDataset, index: int) -> Atoms:
    """Elements, positions and cell of a structure, without labels."""
    atoms = slice(dataset.ptr[index], dataset.ptr[index + 1])
    periodic = {} if dataset.cell is None else {"cell": dataset.cell[index], "pbc": dataset.pbc[index]}
    return Atoms(numbers=dataset.z[atoms], positions=dataset.pos[atoms], **periodic)


# ------------------------------------------------------------------------------------------------------------ batches


def to_schnetpack(batch: Batch, cutoff: float | None = None) -> dict[str, Tensor]:
    """A batch as the dictionary that SchNetPack's models read.

    Parameters
    ----------
    batch
        Structures; targets go along under their names, in the dtype of the positions.
    cutoff
        If given, edges that are not shorter, in Å, are left out.

    Notes
    -----
    Tensors are shared. SchNetPack's models make positions require gradients in place, so a copy of these is given.
    """
    if cutoff is not None:
        batch = within(batch, cutoff)
    considered = {CONSIDERED: ~batch.fixed} if bool(batch.fixed.any()) else {}
    return {
        P.idx: torch.arange(batch.n_systems, device=batch.z.device),
        P.n_atoms: batch.n_atoms,
        P.Z: batch.z,
        P.R: batch.pos.clone(),
        P.cell: batch.cell,
        P.pbc: (batch.cell != 0).any(dim=-1).reshape(-1),
        P.idx_m: batch.system,
        P.idx_i: batch.dst,
        P.idx_j: batch.src,
        P.offsets: batch.shift,
        **{name: value.to(batch.pos.dtype) for name, value in batch.targets.items()},
        **considered,
    }


def from_schnetpack(
    inputs: Mapping[str, Tensor], cutoff: float, targets: Iterable[str] = ("energy", "forces")
) -> Batch:
    """SchNetPack's dictionary as a batch.

    Parameters
    ----------
    inputs
        What `AtomsLoader` or `AtomsConverter` make; in eV and Å, if labels and predictions shall mean what they say.
    cutoff
        Radius in Å of its neighbor list, which the dictionary does not know.
    targets
        Entries that are labels; those that are not there are passed over.

    Raises
    ------
    DataError
        If the dictionary has no neighbor list.
    """
    missing = [key for key in (P.Z, P.R, P.idx_i, P.idx_j, P.offsets, P.n_atoms) if key not in inputs]
    if missing:
        raise DataError(f"the dictionary has no {', '.join(missing)}; it has {', '.join(sorted(inputs))}")
    z, pos, n_systems = inputs[P.Z], inputs[P.R].detach(), len(inputs[P.n_atoms])
    considered = inputs.get(CONSIDERED)
    cell = inputs[P.cell] if P.cell in inputs else pos.new_zeros(n_systems, 3, 3)
    if P.pbc in inputs:
        cell = cell * inputs[P.pbc].reshape(n_systems, 3, 1)
    return Batch(
        z=z.long(),
        pos=pos,
        src=inputs[P.idx_j].long(),
        dst=inputs[P.idx_i].long(),
        shift=inputs[P.offsets].to(pos.dtype),
        system=torch.repeat_interleave(torch.arange(n_systems, device=z.device), inputs[P.n_atoms]),
        n_systems=n_systems,
        cutoff=float(cutoff),
        cell=cell.to(pos.dtype),
        fixed=torch.zeros_like(z, dtype=torch.bool) if considered is None else ~considered.reshape(-1).bool(),
        targets={name: inputs[name].detach().double() for name in targets if name in inputs},
    )
