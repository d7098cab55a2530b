"""Whether a structure is within what a model was trained on, as far as elements and distances tell.

`TrainingRange` compares with the limits that every model records when it is fitted (`provenance.limits_of`). It costs some
microseconds for the edges of a molecule, so that `NDeMCalculator` asks at every step. What is within is not therefore right;
what is outside, the model has never seen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from ndem_zoo.errors import DataError
from ndem_zoo.graph import neighbor_list
from ndem_zoo.physics import MAX_Z
from ndem_zoo.provenance import BIN, N_NEAREST, PERIODIC_RADIUS, nearest_distances, wider

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset
    from ndem_zoo.ensemble import Ensemble
    from ndem_zoo.models.estimator import NDeMModel

#: Choice: Å that distances may be beyond those that were seen, and share by which a molecule may be longer.
MARGIN, LONGER = 0.1, 0.05

#: What may be outside: an element; a distance shorter than any of its pair of elements; a distance within
#: `PERIODIC_RADIUS` that its pair never had; an atom farther from its neighbors than any of its element; the size of a molecule.
KINDS = ("element", "short", "unseen", "apart", "size")
_SHORT, _UNSEEN = 1, 2


class TrainingRange:
    """Elements and distances of the training data of a model.

    Parameters
    ----------
    limits
        What `provenance.limits_of` returned; in a fitted model, ``model.training_data_["limits"]``. Models of older
        versions have no ``seen`` and ``nearest``: then only the shortest distances and the size of molecules count.

    Attributes
    ----------
    longest
        Å; None where there was no molecule with two atoms.

    Raises
    ------
    DataError
        If the record is damaged.
    """

    def __init__(self, limits: Mapping[str, Any]) -> None:
        try:
            known = sorted(atomic_numbers[symbol] for symbol in limits["elements"])
            self.longest: float | None = limits["longest"]
            self._code = np.full(MAX_Z + 1, len(known))
            self._code[known] = np.arange(len(known))
            self._table = self._make_table(limits)
            self._nearest = np.full((len(known) + 1, N_NEAREST), np.inf)
            for symbol, distances in limits.get("nearest", {}).items():
                self._nearest[self._code[atomic_numbers[symbol]]] = [
                    np.inf if d is None else d + MARGIN for d in distances
                ]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the record of the limits of the training data is damaged: {error!r}") from error

    def _make_table(self, limits: Mapping[str, Any]) -> np.ndarray:
        """What distances are, by pair of elements and bin: 0 seen, `_SHORT`, `_UNSEEN`; the last bin is for all beyond."""
        n = len(limits["elements"]) + 1  # the last one is for elements that are not known
        starts = BIN * np.arange(round(PERIODIC_RADIUS / BIN) + 1)
        has_ranges = "seen" in limits
        table = np.full((n, n, len(starts)), _UNSEEN if has_ranges else 0, dtype=np.int8)
        for name, shortest in limits["shortest"].items():
            a, b = (self._code[atomic_numbers[symbol]] for symbol in name.split("-"))
            row = table[a, b]
            for start, stop in limits.get("seen", {}).get(name, ()):
                row[(starts + BIN > start - MARGIN) & (starts < stop + MARGIN)] = 0
            row[starts + BIN <= shortest - MARGIN] = _SHORT
            table[b, a] = row
        table[:, :, -1] = 0
        table[-1] = table[:, -1] = 0  # an element that is not known is said to be so, once
        return table

    def pairs(self, z: np.ndarray, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """Rows (E,) of the table for edges between atoms with numbers `z` (N,), as `check` wants them."""
        n = len(self._table)
        return (self._code[z[src]] * n + self._code[z[dst]]) * self._table.shape[2]

    def check(
        self, z: np.ndarray, dst: np.ndarray, pairs: np.ndarray, distance: np.ndarray, is_whole: bool
    ) -> dict[str, tuple[int, float]]:
        """What is outside, and what shows it.

        Parameters
        ----------
        z : (N,)
            Atomic numbers.
        dst, pairs, distance : (E,)
            Centers of the edges, rows of the table (see `pairs`), and lengths in Å. Edges must be complete up to
            `PERIODIC_RADIUS`, or the cutoff where that is shorter.
        is_whole
            Whether the edges are all pairs of a molecule, in the order of `graph.all_pairs`; the longest of them is its size.

        Returns
        -------
        found : dict
            For each of `KINDS` that is outside (but ``"element"``, which no distance tells), the number of an edge, or for
            ``"apart"`` that of an atom, and the distance in Å.
        """
        n = len(z)
        if is_whole and n > N_NEAREST:  # each center has an edge from every other atom, one center after the other
            nearest = np.sort(distance.reshape(n, n - 1), axis=1)[:, :N_NEAREST]
        else:
            nearest = nearest_distances(dst, distance, n)
        found = self._apart(z, nearest)
        if not len(distance):
            return found
        bins = np.minimum(distance * (1 / BIN), self._table.shape[2] - 1).astype(np.int64)
        kinds = self._table.ravel()[pairs + bins]
        if kinds.any():
            for name, kind in (("short", _SHORT), ("unseen", _UNSEEN)):
                edges = np.flatnonzero(kinds == kind)
                if len(edges):
                    edge = int(edges[distance[edges].argmin()])
                    found[name] = edge, float(distance[edge])
        if is_whole and self.longest is not None and distance.max() > self.longest * (1 + LONGER):
            found["size"] = int(distance.argmax()), float(distance.max())
        return found

    def _apart(self, z: np.ndarray, nearest: np.ndarray) -> dict[str, tuple[int, float]]:
        """An atom whose neighbors are farther than those of any atom of its element."""
        excess = nearest > self._nearest[self._code[z]]
        if not excess.any():
            return {}
        atom, place = (int(index) for index in np.argwhere(excess)[0])
        return {"apart": (atom, float(nearest[atom, place]))}

    def unknown(self, z: np.ndarray) -> str | None:
        """Symbol of an element of atoms with numbers `z` (N,) that there was none of; None if there is none such."""
        bad = z[self._code[z] == len(self._table) - 1]
        return chemical_symbols[int(bad[0])] if len(bad) else None

    def outside(self, dataset: MolecularDataset) -> list[tuple[str, ...]]:
        """For each structure, what is outside: any of `KINDS`, or nothing.

        Parameters
        ----------
        dataset
            Structures with edges that can be made (see `datasets.checks.check_structures`).
        """
        return [self._outside(dataset, row) for row in range(len(dataset))]

    def _outside(self, dataset: MolecularDataset, row: int) -> tuple[str, ...]:
        structure = dataset.structure(row)
        src, dst, shift = neighbor_list(structure.pos, PERIODIC_RADIUS, structure.cell, structure.pbc)
        distance = np.linalg.norm(structure.pos[src] + shift - structure.pos[dst], axis=1)
        found = set(self.check(structure.z, dst, self.pairs(structure.z, src, dst), distance, False))
        if self.unknown(structure.z) is not None:
            found.add("element")
        is_free = structure.pbc is None or not structure.pbc.any()
        if is_free and self.longest is not None and self._size(structure.pos) > self.longest * (1 + LONGER):
            found.add("size")
        return tuple(kind for kind in KINDS if kind in found)

    @staticmethod
    def _size(pos: np.ndarray) -> float:
        """Longest distance in Å; of a block of rows at a time."""
        return max(float(np.linalg.norm(pos[i : i + 256, None] - pos, axis=-1).max()) for i in range(0, len(pos), 256))


def training_range(model: NDeMModel | Ensemble) -> TrainingRange | None:
    """What a model, or all members of an ensemble together, were trained on; None where that was not recorded.

    It was not by older versions, and is not known of weights that were imported.
    """
    limits = [member.training_data_.get("limits") for member in getattr(model, "members_", [model])]
    return TrainingRange(functools.reduce(wider, limits)) if all(limits) else None
