"""What training must not start with: impossible structures, missing or broken labels, labels in another unit.

Called once before the first step, for whole datasets, without a loop over structures (periodic cells excepted) and block
by block, so that large datasets stay on the disk; a store on disk that was checked when it was written is believed. Each
error names the structure, the value and what is allowed. Whether frames are duplicates or out of equilibrium is not an
error: see `summary.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ndem_zoo.errors import DataError, UnitsWarning
from ndem_zoo.featurizers.base import ALLOWED_POSITIONS, MAX_COORDINATE, MAX_EXTENT, check_cell, check_extent
from ndem_zoo.featurizers.radius import MIN_DISTANCE, check_distances
from ndem_zoo.graph import neighbor_list
from ndem_zoo.physics import MAX_Z

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset

#: Mean |F| in eV/Å above which another unit is suspected (thermal frames have about 2), and above which it is certain.
SUSPICIOUS_FORCE = 10.0
IMPOSSIBLE_FORCE = 1e3

#: Choice: radius in Å of the search for overlapping periodic images. Cell lists with bins of 0.1 Å would take 100 times
#: as long.
_SEARCH_RADIUS = 2.0

#: Choice: atoms that are looked at together; their positions take 48 MB.
BLOCK_ATOMS = 2_000_000

#: A direction that no lattice is aligned with, to sort atoms along.
_DIRECTION = np.array([0.5257311121191336, 0.6180339887498949, 0.5844443852190474])


def check_structures(dataset: MolecularDataset) -> None:
    """Raise DataError for the first structure that cannot be one.

    Checked are: at least one atom; finite positions, not beyond 10^6 Å, and 1,000 Å apart at most; atomic numbers 1 to 100;
    cells that are finite, not singular in their periodic directions, and neither flat nor longer than 1,000 Å; no two
    atoms, periodic images included, closer than 0.1 Å.

    Parameters
    ----------
    dataset
        Any number of structures; nothing is done if it was checked already (`MolecularDataset.checked`).

    Raises
    ------
    DataError
        Names the structure, the value found and what is allowed.
    """
    if dataset.checked or len(dataset) == 0:
        return
    for check in (_check_counts, _check_positions, _check_elements, _check_cells, _check_extents, _check_overlap):
        for first, block in blocks(dataset):
            check(block, first)


def blocks(dataset: MolecularDataset) -> Iterator[tuple[int, MolecularDataset]]:
    """The dataset in pieces of about `BLOCK_ATOMS` atoms: number of the first structure, and the piece."""
    if dataset.ptr[-1] <= BLOCK_ATOMS:
        yield 0, dataset
        return
    start = 0
    while start < len(dataset):
        stop = int(np.searchsorted(dataset.ptr, dataset.ptr[start] + BLOCK_ATOMS, side="right")) - 1
        stop = max(stop, start + 1)
        yield start, dataset.select(slice(start, stop))
        start = stop


def root_mean_square(dataset: MolecularDataset, target: str) -> float:
    """Root mean square of all numbers of a target, block by block."""
    sums = [(float(np.square(values).mean()), values.size) for values in _values(dataset, target) if values.size]
    if len(sums) == 1:
        return float(np.sqrt(sums[0][0]))  # the same bits as without blocks
    return float(np.sqrt(sum(mean * size for mean, size in sums) / sum(size for _, size in sums)))


def _values(dataset: MolecularDataset, target: str) -> Iterator[np.ndarray]:
    return (block.targets[target] for _, block in blocks(dataset))


def check_targets(dataset: MolecularDataset, requires: Iterable[str]) -> None:
    """Raise DataError if labels that are needed are missing, not finite, or certainly in another unit.

    Parameters
    ----------
    dataset
        Structures with labels.
    requires
        Names of targets or extras, such as an objective's `requires`.

    Raises
    ------
    DataError
        For a missing or non-finite label, or forces whose mean is above 1000 eV/Å.

    Warns
    -----
    UnitsWarning
        If the mean force is above 10 eV/Å, as it is in kcal/mol/Å.
    """
    columns = {*dataset.extras, *dataset.targets}
    for name in sorted(requires):
        if name not in columns:
            has = ", ".join(sorted(columns)) or "no labels"
            raise DataError(f"{name} is needed, but structure 0 and all others lack it; the dataset has {has}")
        if not (dataset.checked and name in dataset.targets):
            for first, block in blocks(dataset):
                _check_finite(block, name, first)
    if "forces" in requires:
        check_force_units(dataset)


def check_force_units(dataset: MolecularDataset) -> None:
    """Warn, or raise DataError, when the mean length of the forces is too large for eV/Å."""
    sums = [float(np.linalg.norm(forces, axis=1).sum()) for forces in _values(dataset, "forces")]
    mean = sum(sums) / max(1, int(dataset.ptr[-1]))
    hint = "1 kcal/mol/Å = 0.04336 eV/Å, 1 Hartree/Bohr = 51.42 eV/Å; convert with ase.units"
    if mean > IMPOSSIBLE_FORCE:
        raise DataError(f"the mean |F| is {mean:.4g} eV/Å; allowed is up to {IMPOSSIBLE_FORCE:g}. Not eV/Å? {hint}")
    if mean > SUSPICIOUS_FORCE:
        warnings.warn(
            f"the mean |F| is {mean:.4g} eV/Å, which is large: are the labels in kcal/mol and kcal/mol/Å? {hint}",
            UnitsWarning,
            stacklevel=3,
        )


def _structure_of(dataset: MolecularDataset, atom: int) -> tuple[int, int]:
    """Structure of a row of the atom columns, and the atom's number in it."""
    index = int(np.searchsorted(dataset.ptr, atom, side="right") - 1)
    return index, int(atom - dataset.ptr[index])


def _check_counts(dataset: MolecularDataset, first: int) -> None:
    empty = np.flatnonzero(dataset.counts == 0)
    if len(empty):
        raise DataError(f"structure {first + empty[0]}: it has no atoms; allowed is one or more")


def _check_positions(dataset: MolecularDataset, first: int) -> None:
    bad = np.flatnonzero(~(np.abs(dataset.pos) <= MAX_COORDINATE).all(axis=1))  # NaN is not, either
    if len(bad):
        index, atom = _structure_of(dataset, bad[0])
        raise DataError(
            f"structure {first + index}: position of atom {atom} is {dataset.pos[bad[0]]}; {ALLOWED_POSITIONS}"
        )


def _check_elements(dataset: MolecularDataset, first: int) -> None:
    z = np.asarray(dataset.z)
    bad = np.flatnonzero((z < 1) | (z > MAX_Z))
    if len(bad):
        index, atom = _structure_of(dataset, bad[0])
        number = z[bad[0]]
        raise DataError(f"structure {first + index}: atom {atom} has atomic number {number}; allowed are 1 to {MAX_Z}")


def _check_cells(dataset: MolecularDataset, first: int) -> None:
    if dataset.pbc is None:
        return
    for index in np.flatnonzero(dataset.pbc.any(axis=1)):
        try:
            check_cell(dataset.cell[index], dataset.pbc[index])
        except DataError as error:
            raise DataError(f"structure {first + index}: {error}") from error


def _check_extents(dataset: MolecularDataset, first: int) -> None:
    if not len(dataset.pos) or np.ptp(dataset.pos, axis=0).max() <= MAX_EXTENT:
        return
    starts = dataset.ptr[:-1]
    extents = np.maximum.reduceat(dataset.pos, starts) - np.minimum.reduceat(dataset.pos, starts)
    for index in np.flatnonzero((extents > MAX_EXTENT).any(axis=1)):
        pos = dataset.pos[dataset.ptr[index] : dataset.ptr[index + 1]]
        periodic = (None, None) if dataset.pbc is None else (dataset.cell[index], dataset.pbc[index])
        try:
            check_extent(pos, *periodic)
        except DataError as error:
            raise DataError(f"structure {first + index}: {error}") from error


def _check_finite(dataset: MolecularDataset, name: str, first: int = 0) -> None:
    values = dataset.targets[name] if name in dataset.targets else dataset.extras[name]
    bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if not len(bad):
        return
    row = int(bad[0])
    index, where = row, ""
    if name in dataset.per_atom:
        index, atom = _structure_of(dataset, row)
        where = f" of atom {atom}"
    raise DataError(
        f"structure {first + index}: {name}{where} is {values[row]}; allowed are finite numbers ({len(bad)} rows are not)"
    )


def _check_overlap(dataset: MolecularDataset, first: int) -> None:
    """Raise DataError for atoms of one structure, or their images, that are closer than 0.1 Å."""
    pairs = close_pairs(dataset.pos, np.repeat(np.arange(len(dataset)), dataset.counts), MIN_DISTANCE)
    if len(pairs):
        one, second = pairs[0]
        index, a = _structure_of(dataset, one)
        distance = np.linalg.norm(dataset.pos[second] - dataset.pos[one])
        _check_pair(first + index, a, int(second - dataset.ptr[index]), distance)
    if dataset.pbc is None:
        return
    for index in np.flatnonzero(dataset.pbc.any(axis=1)):
        pos = dataset.pos[dataset.ptr[index] : dataset.ptr[index + 1]]
        src, dst, shift = neighbor_list(pos, _SEARCH_RADIUS, dataset.cell[index], dataset.pbc[index])
        if len(src):
            distance = np.linalg.norm(pos[src] + shift - pos[dst], axis=1)
            nearest = distance.argmin()
            _check_pair(first + int(index), int(dst[nearest]), int(src[nearest]), distance[nearest])


def _check_pair(index: int, first: int, second: int, distance: float) -> None:
    try:
        check_distances(np.array([second]), np.array([first]), np.array([distance]))
    except DataError as error:
        raise DataError(f"structure {index}: {error}") from error


def close_pairs(pos: np.ndarray, system: np.ndarray, distance: float) -> np.ndarray:
    """Pairs of rows of one structure that are closer than `distance`, without images.

    The atoms of each structure are sorted along one direction; a pair that is close is close along it too, so each atom
    is compared with the next one, the one after it, ... only as long as these are near along the direction.

    Parameters
    ----------
    pos : (A, 3)
        Positions in Å.
    system : (A,)
        Structure of each atom, ascending.
    distance
        In Å.

    Returns
    -------
    pairs : (P, 2) int64
        Rows (i, j) with i < j, sorted.
    """
    along = pos @ _DIRECTION
    order = np.lexsort((along, system))
    along, system, pos = along[order], system[order], pos[order]
    found = []
    left, step = np.arange(len(pos)), 1
    while len(left):
        left = left[left + step < len(pos)]
        right = left + step
        near = (system[right] == system[left]) & (along[right] - along[left] < distance)
        left, right = left[near], right[near]
        hit = np.square(pos[right] - pos[left]).sum(axis=1) < distance**2
        found.append(np.stack([order[left[hit]], order[right[hit]]], axis=1))
        step += 1
    pairs = np.sort(np.concatenate(found), axis=1) if found else np.zeros((0, 2), dtype=np.int64)
    return pairs[np.lexsort(pairs.T[::-1])]
