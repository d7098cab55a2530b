"""Where a model comes from: what its data were, how far they reach, and the versions and machine it was trained with.

`NDeMModel` calls this when it trains, keeps what comes back, and writes it into ``config.json``; `card.py` puts it into
words. Everything is plain numbers, strings, lists and dicts. What is not known is None, never a guess.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

from ndem_zoo._version import __version__
from ndem_zoo.datasets.checks import blocks
from ndem_zoo.graph import neighbor_list
from ndem_zoo.physics import MAX_Z

if TYPE_CHECKING:
    import torch

    from ndem_zoo.datasets.base import MolecularDataset

#: Choice: distances are looked at in at most so many structures, evenly spaced, so that a large dataset takes seconds.
MOST_STRUCTURES = 1_000

#: Choice: radius in Å of the search for the shortest distances in periodic structures.
PERIODIC_RADIUS = 3.5

#: Choice: Å, width of the bins in which distances are counted, and the widest gap between two seen ones that is taken for
#: chance, and not for a distance that structures avoid (a bond and the next neighbor are about 0.8 Å apart).
BIN, GAP = 0.05, 0.3

#: Choice: neighbors of an atom whose distances are recorded. In organic molecules each bond that is torn leaves an atom of its
#: element with fewer near neighbors than three, or than it has.
N_NEAREST = 3

#: Distances that are held in memory together.
_AT_ONCE = 1_000_000

#: Packages beside torch, numpy and ase that results may depend on.
_FURTHER = ("e3nn", "vesin", "pytorch-lightning", "dgl", "schnetpack", "deepchem")


def describe_data(
    train_set: MolecularDataset, valid_set: MolecularDataset | None, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a training learned from.

    Parameters
    ----------
    train_set, valid_set
        The data.
    before
        The same of an earlier training of the same weights: what it saw belongs to the limits, too.

    Returns
    -------
    record : dict
        ``name``, ``n_train``, ``n_valid``, ``split_hash``, ``valid_split_hash`` (None without validation data),
        ``source`` (what the dataset's card says, or None), ``limits`` (see `limits_of`), ``earlier`` (name, size and hash
        of other data that the weights were trained on before).
    """
    record = {
        "name": train_set.name,
        "n_train": len(train_set),
        "n_valid": 0 if valid_set is None else len(valid_set),
        "split_hash": train_set.split_hash,
        "valid_split_hash": None if valid_set is None else valid_set.split_hash,
        "source": _source_of(train_set),
        "limits": limits_of(train_set),
        "earlier": [],
    }
    if before:
        record["earlier"] = list(before.get("earlier", ()))
        if before["split_hash"] != record["split_hash"]:
            record["earlier"].append({name: before[name] for name in ("name", "n_train", "split_hash")})
        record["limits"] = wider(before.get("limits"), record["limits"])
    return record


def _source_of(dataset: MolecularDataset) -> dict[str, Any] | None:
    """The parts of a dataset's card that do not depend on files."""
    card = dataset.card
    if card is None:
        return None
    return {
        "name": card.name,
        "description": card.description,
        "theory": card.theory,
        "units": dict(card.units),
        "licence": card.licence,
        "citation": list(card.citation),
        "homepage": card.homepage,
    }


# ---------------------------------------------------------------------------------------------------------------- limits


def limits_of(dataset: MolecularDataset) -> dict[str, Any]:
    """How far structures reach: outside of it nothing is known about a model.

    Returns
    -------
    limits : dict
        ``elements`` (atoms of each, by symbol), ``atoms`` (fewest and most in a structure), ``n_periodic`` and
        ``n_structures``; from ``n_looked_at`` structures, evenly spaced: ``shortest`` (Å, by pair of elements such as
        ``"H-O"``; in periodic structures only pairs within `PERIODIC_RADIUS`), ``longest`` (Å, within a structure that is
        not periodic; None if there is none with two atoms), ``seen`` (Å, by pair: from where to where there were distances,
        up to `PERIODIC_RADIUS`, a list of pairs of numbers), ``nearest`` (Å, by element: the largest distance of an atom from
        its nearest neighbor, the one after it, ..., `N_NEAREST` of them; None where an atom had no such neighbor).
    """
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), MOST_STRUCTURES)).astype(np.int64))
    counts = sum(np.bincount(block.z, minlength=MAX_Z + 1) for _, block in blocks(dataset))
    table, longest = _distances(dataset.select(rows))
    return {
        "elements": {chemical_symbols[z]: int(counts[z]) for z in np.flatnonzero(counts)},
        "atoms": [int(dataset.counts.min()), int(dataset.counts.max())],
        "n_periodic": 0 if dataset.pbc is None else int(dataset.pbc.any(axis=1).sum()),
        "n_structures": len(dataset),
        "n_looked_at": len(rows),
        "longest": longest,
        **table.record(),
    }


class _Table:
    """Distances of pairs of elements: the shortest of each, in which bins there were any, and how far neighbors are."""

    def __init__(self) -> None:
        self.shortest = np.full((MAX_Z + 1, MAX_Z + 1), np.inf)
        self.seen = np.zeros((MAX_Z + 1, MAX_Z + 1, round(PERIODIC_RADIUS / BIN)), dtype=bool)
        self.nearest = np.zeros((MAX_Z + 1, N_NEAREST))

    def enter(self, a: np.ndarray, b: np.ndarray, distance: np.ndarray) -> None:
        """Distances between atoms of two elements, in any order."""
        low, high, distance = np.minimum(a, b).ravel(), np.maximum(a, b).ravel(), distance.ravel()
        np.minimum.at(self.shortest, (low, high), distance)
        near = distance < PERIODIC_RADIUS
        self.seen[low[near], high[near], (distance[near] / BIN).astype(np.int64)] = True

    def enter_nearest(self, z: np.ndarray, distance: np.ndarray) -> None:
        """Distances (N, `N_NEAREST`) of atoms from their nearest neighbors, in order."""
        np.maximum.at(self.nearest, z, distance)

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        low, high = np.nonzero(np.triu(np.isfinite(self.shortest)))
        pairs = {f"{chemical_symbols[a]}-{chemical_symbols[b]}": (a, b) for a, b in zip(low, high, strict=True)}
        seen = {name: _merged_ranges(_ranges(self.seen[pair])) for name, pair in pairs.items()}
        return {
            "shortest": {name: float(self.shortest[pair]) for name, pair in pairs.items()},
            "seen": {name: ranges for name, ranges in seen.items() if ranges},
            "nearest": {
                chemical_symbols[z]: [float(d) if np.isfinite(d) else None for d in self.nearest[z]]
                for z in np.flatnonzero(self.nearest.any(axis=1))
            },
        }


def _distances(dataset: MolecularDataset) -> tuple[_Table, float | None]:
    """What distances there are, and the longest within a structure that is not periodic."""
    table, longest = _Table(), 0.0
    is_periodic = np.zeros(len(dataset), dtype=bool) if dataset.pbc is None else dataset.pbc.any(axis=1)
    for size in np.unique(dataset.counts[~is_periodic]):
        rows = np.flatnonzero(~is_periodic & (dataset.counts == size))
        for part in np.array_split(rows, -(-len(rows) * int(size) ** 2 // _AT_ONCE)):
            longest = max(longest, _enter_molecules(table, dataset.select(part), int(size)))
    for row in np.flatnonzero(is_periodic):
        _enter_periodic(table, dataset.select([row]))
    return table, longest or None


def nearest_distances(dst: np.ndarray, distance: np.ndarray, n_atoms: int) -> np.ndarray:
    """Distances (N, `N_NEAREST`) in Å of atoms from their nearest neighbors, in order; infinite where there are not so many.

    Parameters
    ----------
    dst, distance : (E,)
        Center and length of each edge, in any order; the length in Å.
    n_atoms
        Number of atoms N.
    """
    order = np.lexsort((distance, dst))
    center, distance = dst[order], distance[order]
    place = np.arange(len(center)) - np.searchsorted(center, np.arange(n_atoms))[center]
    kept = place < N_NEAREST
    found = np.full((n_atoms, N_NEAREST), np.inf)
    found[center[kept], place[kept]] = distance[kept]
    return found


def _ranges(seen: np.ndarray) -> list[list[float]]:
    """From where to where, in Å, bins in a row are set."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(np.int8)))
    return [[round(start * BIN, 6), round(stop * BIN, 6)] for start, stop in edges.reshape(-1, 2).tolist()]


def _merged_ranges(ranges: Sequence[Sequence[float]]) -> list[list[float]]:
    """Ranges in order, with those in one that overlap or are hardly apart."""
    merged: list[list[float]] = []
    for start, stop in sorted(ranges):
        if merged and start - merged[-1][1] < GAP:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    return merged


def _enter_molecules(table: _Table, part: MolecularDataset, size: int) -> float:
    """Put all distances of structures of one size, not periodic, into the table; returns the longest."""
    first, second = np.triu_indices(size, k=1)
    if not len(first):
        table.enter_nearest(part.z.astype(np.int64), np.full((len(part), N_NEAREST), np.inf))
        return 0.0
    pos, z = part.pos.reshape(-1, size, 3), part.z.reshape(-1, size).astype(np.int64)
    distance = np.linalg.norm(pos[:, first] - pos[:, second], axis=-1)
    table.enter(z[:, first], z[:, second], distance)
    centers = size * np.arange(len(pos))[:, None]
    both = np.concatenate([centers + first, centers + second], axis=1).ravel()
    twice = np.concatenate([distance, distance], axis=1).ravel()
    table.enter_nearest(z.ravel(), nearest_distances(both, twice, z.size))
    return float(distance.max())


def _enter_periodic(table: _Table, one: MolecularDataset) -> None:
    """Put the distances of one periodic structure, images included, into the table."""
    src, dst, shift = neighbor_list(one.pos, PERIODIC_RADIUS, one.cell[0], one.pbc[0])
    z = one.z.astype(np.int64)
    distance = np.linalg.norm(one.pos[src] + shift - one.pos[dst], axis=-1)
    table.enter(z[src], z[dst], distance)
    table.enter_nearest(z, nearest_distances(dst, distance, len(z)))


def wider(one: Mapping[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Limits of two sets of structures together; of the second, if there is no record of the first."""
    if not one:
        return other
    longest = [limits["longest"] for limits in (one, other) if limits["longest"] is not None]
    return {
        "elements": _merged(one["elements"], other["elements"], max),
        "atoms": [min(one["atoms"][0], other["atoms"][0]), max(one["atoms"][1], other["atoms"][1])],
        **{name: max(one[name], other[name]) for name in ("n_periodic", "n_structures", "n_looked_at")},
        "shortest": _merged(one["shortest"], other["shortest"], min),
        "longest": max(longest, default=None),
        "seen": _merged(one.get("seen", {}), other["seen"], lambda ranges: _merged_ranges([*itertools.chain(*ranges)])),
        "nearest": _merged(one.get("nearest", {}), other["nearest"], _farther),
    }


def _farther(distances: Iterable[Sequence[float | None]]) -> list[float | None]:
    """The largest of each; None, which is no limit, is larger than all."""
    return [None if None in column else max(column) for column in zip(*distances, strict=True)]


def _merged(one: Mapping[str, Any], other: Mapping[str, Any], choose: Any) -> dict[str, Any]:
    return {key: choose(table[key] for table in (one, other) if key in table) for key in {**one, **other}}


# --------------------------------------------------------------------------------------------------------------- machine


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads and hardware: what a result may depend on.

    Parameters
    ----------
    device
        Where is computed.
    """
    import ase
    import torch

    return {
        "ndem_zoo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "ase": ase.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """`environment`, the processor, and the versions of further packages as far as they are installed."""
    further = {name: version for name in _FURTHER if (version := _version_of(name)) is not None}
    return environment(device) | {"processor": processor(), "cores": os.cpu_count(), "packages": further}


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
