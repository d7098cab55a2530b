"""`check_dataset`: what every loader of a dataset must do, shown on a small raw file whose content is known.

Probes are listed in `DATASET_PROBES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest

import numpy as np
import torch

from ndem_zoo.graph import from_dgl, import_dgl
from ndem_zoo.testing.common import Probe, require, require_close, require_same_bits, run_probes

#: What a dataset's loader returns: names of targets, (train, valid, test), transformers.
Loaded = tuple[list[str], tuple[Any, Any, Any], list[Any]]


#: Relative agreement with values converted by hand: the constants of ASE are of another year than today's, 1e-8 apart.
UNITS = 1e-7


@dataclass(frozen=True)
class DatasetCase:
    """A loader to probe, on a small raw file in the original format whose content is known.

    Attributes
    ----------
    name : str
        For messages.
    load : callable
        From a seed to what the loader returns.
    row : int
        A structure of the raw file, whose content follows.
    positions, forces : (n, 3)
        Its positions in Å and forces in eV/Å, converted by hand; None for data without forces.
    energy : float
        Its energy in eV, converted by hand; None for data without energies.
    train_rows : sequence of int
        Rows of the raw file in the training set for seed 1: the same on every platform.
    targets : mapping
        Its further labels with one number per structure, converted by hand.
    """

    name: str
    load: Callable[[int], Loaded]
    row: int
    positions: np.ndarray
    energy: float | None
    forces: np.ndarray | None
    train_rows: Sequence[int]
    targets: Mapping[str, float] = field(default_factory=dict)


def check_dataset(
    load: Callable[[int], Loaded],
    *,
    row: int,
    positions: np.ndarray,
    energy: float | None = None,
    forces: np.ndarray | None = None,
    targets: Mapping[str, float] | None = None,
    train_rows: Sequence[int],
    name: str = "dataset",
    skip: Sequence[str] = (),
) -> None:
    """Hold a dataset's loader to its contract, on a small raw file in the original format.

    Parameters
    ----------
    load
        From a seed to ``(tasks, (train, valid, test), transformers)``.
    row, positions, energy, forces, targets, train_rows
        What is known about the raw file, in eV and Å; see `DatasetCase`. Convert by hand, not with the code under test.
    name
        For messages.
    skip
        Names of probes to leave out.

    Raises
    ------
    AssertionError
        If a probe fails; lists all that do.
    """
    case = DatasetCase(name, load, row, positions, energy, forces, train_rows, targets or {})
    run_probes(DATASET_PROBES, case, skip)


def _find_row(case: DatasetCase, parts: Sequence[Any]) -> tuple[Any, int]:
    """The part that holds the known structure, and its number there: found by its positions."""
    positions = np.asarray(case.positions)
    for part in parts:
        for i in range(len(part)):
            found = part.atoms(i).positions
            if found.shape == positions.shape and np.abs(found - positions).max() < 1e-6:
                return part, i
    raise AssertionError(f"no structure has the positions of row {case.row} of the raw file, in Å")


def moleculenet_triple(case: DatasetCase) -> None:
    """Catches loaders that return something else than ``(tasks, (train, valid, test), transformers)``."""
    tasks, parts, transformers = case.load(1)
    require(isinstance(transformers, list), f"transformers is a {type(transformers).__name__}, not a list")
    require(len(parts) == 3 and len(parts[0]) > 0, f"{len(parts)} parts, of sizes {[len(part) for part in parts]}")
    for part in parts:
        require(list(part.tasks) == list(tasks), f"tasks are {list(tasks)}, but a part has {list(part.tasks)}")


def column_types(case: DatasetCase) -> None:
    """Catches labels rounded to float32, and columns that do not fit together."""
    for part in case.load(1)[1]:
        n, n_atoms = len(part), len(part.z)
        require(np.issubdtype(part.z.dtype, np.integer) and part.z.shape == (n_atoms,), f"z is {part.z.dtype}")
        require(part.ptr.shape == (n + 1,) and part.ptr[-1] == n_atoms, f"ptr ends with {part.ptr[-1]} of {n_atoms}")
        require(part.pos.dtype == np.float64 and part.pos.shape == (n_atoms, 3), f"pos is {part.pos.dtype}")
        rows = {"energy": (n,), "forces": (n_atoms, 3)}
        for name, values in part.targets.items():
            require(values.dtype == np.float64, f"{name} is {values.dtype}, not float64")
            require(values.shape == rows.get(name, values.shape), f"{name} has shape {values.shape}")


def units(case: DatasetCase) -> None:
    """Catches wrong or missing conversions: a structure has the labels that were computed by hand."""
    part, i = _find_row(case, case.load(1)[1])
    structure = part.atoms(i)
    if case.energy is not None:
        energy = structure.get_potential_energy()
        require(abs(energy / case.energy - 1) < UNITS, f"energy {energy!r} eV, expected {case.energy!r} eV")
    if case.forces is not None:  # Pitfall: ASE gives zeros for the forces on fixed atoms unless it is told not to
        require_close(
            torch.as_tensor(structure.get_forces(apply_constraint=False)),
            torch.as_tensor(case.forces),
            UNITS,
            "forces in eV/Å",
        )
    for name, expected in case.targets.items():
        found = float(part.targets[name][i])
        require(abs(found - expected) <= UNITS * abs(expected), f"{name} {found!r}, expected {expected!r}")


def disjoint_splits(case: DatasetCase) -> None:
    """Catches test structures in the training set, and structures that get lost or counted twice."""
    parts = case.load(1)[1]
    ids = [set(part.ids.tolist()) for part in parts]
    for part, found in zip(parts, ids, strict=True):
        require(len(found) == len(part), f"{len(part)} structures have {len(found)} different ids")
    common = (ids[0] & ids[1]) | (ids[0] & ids[2]) | (ids[1] & ids[2])
    require(not common, f"{len(common)} structures are in two parts, such as {sorted(common)[:3]}")


def stable_splits(case: DatasetCase) -> None:
    """Catches splits that depend on anything but the seed: the platform, a global generator, the number of calls."""
    first, second, other = (case.load(seed)[1][0] for seed in (1, 1, 2))
    require(first.split_hash == second.split_hash, "the same seed gives another training set the second time")
    require(first.split_hash != other.split_hash, "seeds 1 and 2 give the same training set")
    known = case.row in set(case.train_rows)
    in_train = _find_row(case, [first]) if known else None
    if in_train is not None:
        position = list(case.train_rows).index(case.row)
        require(in_train[1] == position, f"row {case.row} is number {in_train[1]} of the training set, not {position}")
    require(len(first) == len(case.train_rows), f"{len(first)} training structures, expected {len(case.train_rows)}")


def complete_card(case: DatasetCase) -> None:
    """Catches data without units, level of theory, licence or citation, and checksums that are none."""
    part = case.load(1)[1][0]
    card = part.card
    if card is None:
        raise SkipTest(f"{case.name} reads the user's own files, of which nothing is known")
    for name in ("name", "description", "theory", "licence"):
        require(str(getattr(card, name)).strip() != "", f"the card has no {name}")
    require(len(card.citation) > 0, "the card has no citation")
    missing = {"positions", *part.tasks} - set(card.units)
    require(not missing, f"the card does not give the units of {sorted(missing)}")
    for file, remote in card.files.items():
        for kind, digits in (("sha256", 64), ("md5", 32)):
            digest = getattr(remote, kind)
            require(digest is None or re.fullmatch(f"[0-9a-f]{{{digits}}}", digest), f"{kind} of {file} is {digest!r}")
        require(all(url.startswith(("https://", "http://")) for url in remote.urls), f"urls of {file}: {remote.urls}")


def agreeing_views(case: DatasetCase) -> None:
    """Catches items that disagree with the columns: a Batch, a slice and an ase.Atoms show the same structure."""
    part, i = _find_row(case, case.load(1)[1])
    rows = slice(int(part.ptr[i]), int(part.ptr[i + 1]))
    batch = part.select([i]).to_batch(5.0, dtype=torch.float64)
    atoms = part.atoms(i)
    require(np.array_equal(batch.z.numpy(), part.z[rows]), "atomic numbers of the batch differ from the column")
    require(np.array_equal(batch.pos.numpy(), part.pos[rows]), "positions of the batch differ from the column")
    require(np.array_equal(atoms.numbers, part.z[rows]), "atomic numbers of the ase.Atoms differ from the column")
    require(np.array_equal(atoms.positions, part.pos[rows]), "positions of the ase.Atoms differ from the column")
    for name, column in part.targets.items():
        expected = column[rows] if name in part.per_atom else column[i : i + 1]
        require(np.array_equal(batch.targets[name].numpy(), expected), f"{name} of the batch differs from the column")


def graphs(case: DatasetCase) -> None:
    """Catches DGL items without fields, or with edges of another structure."""
    try:
        import_dgl()
    except ImportError as error:
        raise SkipTest(str(error)) from error
    part, i = _find_row(case, case.load(1)[1])
    batch = from_dgl(part[i], cutoff=5.0, dtype=torch.float64)
    expected = part.select([i]).to_batch(5.0, dtype=torch.float64)
    for name in ("z", "pos"):
        require_same_bits(getattr(batch, name), getattr(expected, name), f"{name} of the graph")
    for name in {"energy", "forces"} & set(part.targets):
        require_same_bits(batch.targets[name], expected.targets[name], f"{name} of the graph")


def read_only(case: DatasetCase) -> None:
    """Catches columns that a user can change by accident for everyone who shares them."""
    part = case.load(1)[1][0]
    for name, column in {"pos": part.pos, "z": part.z, **part.targets}.items():
        require(not column.flags.writeable, f"{name} can be written to")


#: Every probe of `check_dataset`.
DATASET_PROBES: list[Probe] = [
    moleculenet_triple,
    column_types,
    units,
    disjoint_splits,
    stable_splits,
    complete_card,
    agreeing_views,
    graphs,
    read_only,
]
