"""A valence force field with couplings, fitted to the training forces: bonds are all that has to be known.

Stretches, bends, torsions, their couplings and pairs of atoms three or more bonds apart, as in the class II force fields
(Hwang, Stockfisch, Hagler, J. Am. Chem. Soc. 116, 2515, 1994), with features that are bounded and smooth everywhere.
Constants are shared by terms whose atoms have equal surroundings, also between molecules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import DataError
from ndem_zoo.featurizers.terms import BondedTerms, find_terms
from ndem_zoo.forcefields.internal import cosine, length, smooth_torsion, triple
from ndem_zoo.forcefields.linear import LinearForceField
from ndem_zoo.forcefields.molecules import (
    check_known,
    distinct_molecules,
    keys_of,
    molecule_of,
    padded,
    positions_of,
    present,
)
from ndem_zoo.graph import Batch

if TYPE_CHECKING:
    from rdkit.Chem import Mol

#: Choice: 1/Å; a stretch counts as 1 - exp(-1.5 (r - r0)), Morse's variable, which is bounded for long bonds.
STIFFNESS = 1.5

#: Choice: lengths in Å over which pairs that are not bonded decay.
RANGES = (0.6, 1.2, 2.4)

Positions = list[Float[Tensor, "S T 3"]]
Row = tuple[int, ...]


def _stretch(r: Tensor, reference: Tensor) -> Tensor:
    return 1.0 - torch.exp(-STIFFNESS * (r - reference))


def _bond(p: Positions, ref: Tensor) -> list[Tensor]:
    x = _stretch(length(*p), ref[..., 0])
    return [x, x**2, x**3, x**4]


def _pair(p: Positions, ref: Tensor) -> list[Tensor]:
    r = length(*p)
    return [torch.exp(-r / decay) for decay in RANGES]


def _angle(p: Positions, ref: Tensor) -> list[Tensor]:
    x, y = _stretch(length(p[0], p[1]), ref[..., 0]), _stretch(length(p[1], p[2]), ref[..., 1])
    bend = cosine(*p) - ref[..., 2]
    return [bend, bend**2, bend**3, x * y, x * bend, y * bend]


def _bends(p: Positions, ref: Tensor) -> list[Tensor]:
    return [(cosine(p[1], p[0], p[2]) - ref[..., 0]) * (cosine(p[3], p[0], p[4]) - ref[..., 1])]


def _plane(p: Positions, ref: Tensor) -> list[Tensor]:
    volume = triple(*p)
    return [volume**2, volume**4]


def _torsion(p: Positions, ref: Tensor) -> list[Tensor]:
    t, x = smooth_torsion(*p), _stretch(length(p[1], p[2]), ref[..., 0])
    first, last = cosine(p[0], p[1], p[2]) - ref[..., 1], cosine(p[1], p[2], p[3]) - ref[..., 2]
    powers = [t, t**2, t**3, t * x, t**2 * x]
    return [*powers, t * first, t * last, t**2 * first, t**2 * last, first * last, t * first * last]


class Group(NamedTuple):
    """One kind of term.

    Attributes
    ----------
    values
        Features of the terms (S, T), from positions of their atoms and reference values.
    n_values, width, n_references
        Number of features, of atoms, and of reference values.
    """

    values: Callable[[Positions, Tensor], list[Tensor]]
    n_values: int
    width: int
    n_references: int


GROUPS: dict[str, Group] = {
    "bonds": Group(_bond, 4, 2, 1),
    "pairs": Group(_pair, len(RANGES), 2, 0),
    "angles": Group(_angle, 6, 3, 3),
    "bends": Group(_bends, 1, 5, 2),
    "planes": Group(_plane, 2, 4, 0),
    "torsions": Group(_torsion, 11, 4, 3),
}


class ValenceForceField(LinearForceField):
    """Energy of stretches, bends, torsions, their couplings, and of pairs that are not bonded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(0, dtype=torch.long))
        for name, group in GROUPS.items():
            self.register_buffer(f"{name}_atoms", torch.zeros(0, 0, group.width, dtype=torch.long))
            self.register_buffer(f"{name}_class", torch.zeros(0, 0, 1, dtype=torch.long))
            self.register_buffer(f"{name}_reference", torch.zeros(0, 0, group.n_references, dtype=torch.float64))
            self.register_buffer(f"{name}_present", torch.zeros(0, 0, dtype=torch.bool))
            self.register_buffer(f"{name}_classes", torch.zeros((), dtype=torch.long))

    def first_of_kinds(self, dataset: MolecularDataset) -> Int[np.ndarray, " K"]:
        """The first structure of each molecule."""
        return np.unique(keys_of(dataset), return_index=True)[1]

    def prepare(self, dataset: MolecularDataset) -> None:
        """Find the molecules, number the kinds of terms, and average their geometry."""
        mols, keys = distinct_molecules(dataset)
        self.keys = torch.as_tensor(keys)
        found = [_MoleculeTerms(mol) for mol in mols]
        average = _Averages(dataset, keys, found)
        for name, group in GROUPS.items():
            numbers: dict[tuple, int] = {}
            atoms = [
                np.array([row for row, _ in m.terms[name]], dtype=np.int64).reshape(-1, group.width) for m in found
            ]
            kinds = [
                np.array([numbers.setdefault(kind, len(numbers)) for _, kind in m.terms[name]]).reshape(-1, 1)
                for m in found
            ]
            setattr(self, f"{name}_atoms", padded(atoms, torch.long))
            setattr(self, f"{name}_class", padded(kinds, torch.long))
            references = [average.of(name, k) for k in range(len(found))]
            setattr(self, f"{name}_reference", padded(references, torch.float64))
            setattr(self, f"{name}_present", present(atoms))
            setattr(self, f"{name}_classes", torch.tensor(len(numbers)))
        self._widths = None
        self.coefficients = torch.zeros(sum(self.widths.values()), dtype=torch.float64)

    @property
    def widths(self) -> dict[str, int]:
        """Number of features by kind of term."""
        if getattr(self, "_widths", None) is None:  # read once: numbers on a GPU have to be waited for
            self._widths = {name: int(getattr(self, f"{name}_classes")) * g.n_values for name, g in GROUPS.items()}
        return self._widths

    def _load_from_state_dict(self, *args, **keywords):
        self._widths = None  # those of other molecules
        super()._load_from_state_dict(*args, **keywords)

    def check(self, dataset: MolecularDataset) -> None:
        """Raise DataError for a structure that is none of the molecules of the training data."""
        check_known(dataset, self.keys, "the valence force field")

    def features(self, batch: Batch) -> Float[Tensor, "S P"]:
        """Values of all terms, summed over those of a kind; NaN for a structure of another molecule."""
        which, known = molecule_of(batch, self.keys)
        parts = [batch.pos.new_zeros(batch.n_systems, 0)]  # an atom alone has no terms
        for name, group in GROUPS.items():
            width = self.widths[name]
            if width == 0:
                continue
            table = [getattr(self, f"{name}_{what}")[which] for what in ("atoms", "class", "reference", "present")]
            parts.append(_summed(batch, group, *table, width))
        return torch.cat(parts, dim=1).masked_fill(~known.unsqueeze(1), torch.nan)


def _summed(
    batch: Batch, group: Group, atoms: Tensor, kind: Tensor, reference: Tensor, is_there: Tensor, width: int
) -> Float[Tensor, "S W"]:
    """Features of one kind of term, summed for each class."""
    values = group.values(positions_of(batch, atoms), reference)
    values = torch.stack(values, dim=-1) * is_there.unsqueeze(-1)  # (S, T, V)
    first = torch.arange(batch.n_systems, device=atoms.device).view(-1, 1, 1) * width
    place = first + kind * group.n_values + torch.arange(group.n_values, device=atoms.device)
    summed = values.new_zeros(batch.n_systems * width).index_add(0, place.flatten(), values.flatten())
    return summed.view(batch.n_systems, width)


class _MoleculeTerms:
    """Terms of one molecule by kind: their atoms, and what they share constants by."""

    def __init__(self, mol: Mol) -> None:
        found = find_terms(mol)
        self.neighbors = [sorted(a.GetIdx() for a in atom.GetNeighbors()) for atom in mol.GetAtoms()]
        self.kind = _surroundings([atom.GetAtomicNum() for atom in mol.GetAtoms()], self.neighbors)
        self.terms = {
            "bonds": [self._ordered(row) for row in _rows(found.bonds)],
            "pairs": [self._ordered(row) for row in self._far_pairs(found)],
            "angles": self._both_ways(_rows(found.angles)),
            "bends": [self._bends(*both) for both in self._angle_pairs(_rows(found.angles))],
            "planes": [self._plane(center) for center, others in enumerate(self.neighbors) if len(others) == 3],
            "torsions": self._both_ways(_rows(found.torsions)),
        }

    def _ordered(self, row: Row) -> tuple[Row, tuple]:
        """Atoms in the one of two orders whose surroundings come first, and these surroundings."""
        kinds = tuple(self.kind[atom] for atom in row)
        return (row, kinds) if kinds <= kinds[::-1] else (row[::-1], kinds[::-1])

    def _both_ways(self, rows: list[Row]) -> list[tuple[Row, tuple]]:
        """Ordered terms whose features depend on the order; in both where these are alike: the data's does not matter then."""
        ordered = [self._ordered(row) for row in rows]
        return ordered + [(row[::-1], kinds) for row, kinds in ordered if kinds == kinds[::-1]]

    def _far_pairs(self, found: BondedTerms) -> list[Row]:
        """Pairs that are neither bonded nor neighbors of one atom."""
        near = {frozenset(row) for row in _rows(found.bonds)} | {frozenset((i, k)) for i, _, k in _rows(found.angles)}
        return [pair for pair in combinations(range(len(self.neighbors)), 2) if frozenset(pair) not in near]

    @staticmethod
    def _angle_pairs(angles: list[Row]) -> Iterator[tuple[Row, Row]]:
        """Angles at one atom, two by two."""
        return (both for both in combinations(angles, 2) if both[0][1] == both[1][1])

    def _bends(self, one: Row, two: Row) -> tuple[Row, tuple]:
        (one, kind_one), (two, kind_two) = self._ordered(one), self._ordered(two)
        if kind_two < kind_one:
            one, two, kind_one, kind_two = two, one, kind_two, kind_one
        shared = tuple(sorted(self.kind[atom] for atom in {one[0], one[2]} & {two[0], two[2]}))
        return (one[1], one[0], one[2], two[0], two[2]), (kind_one, kind_two, shared)

    def _plane(self, center: int) -> tuple[Row, tuple]:
        others = sorted(self.neighbors[center], key=lambda atom: self.kind[atom])
        return (center, *others), (self.kind[center], *(self.kind[atom] for atom in others))


def _rows(terms: np.ndarray) -> list[Row]:
    return [tuple(row) for row in terms.tolist()]


def _surroundings(z: list[int], neighbors: list[list[int]]) -> list[tuple]:
    """Each atom's element, those of its neighbors, and those of theirs. Choice: two bonds far."""
    kinds: list[tuple] = [(number,) for number in z]
    for _ in range(2):
        kinds = [
            (kinds[atom][0], *sorted(map(repr, (kinds[other] for other in around))))
            for atom, around in enumerate(neighbors)
        ]
    return kinds


class _Averages:
    """Mean lengths and cosines of the kinds of bonds and angles in the training data."""

    def __init__(self, dataset: MolecularDataset, keys: np.ndarray, molecules: list[_MoleculeTerms]) -> None:
        self.molecules = molecules
        sums: dict[tuple, list[float]] = {}
        owner = keys_of(dataset)
        for key, molecule in zip(keys, molecules, strict=True):
            frames = np.flatnonzero(owner == key)
            pos = torch.as_tensor(dataset.pos[dataset.ptr[frames][:, None] + np.arange(len(molecule.neighbors))])
            for name, measure in (("bonds", length), ("angles", cosine)):
                for row, kind in molecule.terms[name]:
                    entry = sums.setdefault((name, kind), [0.0, 0])
                    entry[0] += float(measure(*(pos[:, atom] for atom in row)).sum())
                    entry[1] += len(frames)
        self.mean = {kind: total / number for kind, (total, number) in sums.items()}

    def of(self, name: str, number: int) -> Float[np.ndarray, "T q"]:
        """Reference values of the terms of one kind in molecule `number`."""
        molecule = self.molecules[number]
        rows = [self._references(molecule, name, row) for row, _ in molecule.terms[name]]
        return np.array(rows, dtype=np.float64).reshape(len(rows), GROUPS[name].n_references)

    def _references(self, molecule: _MoleculeTerms, name: str, row: Row) -> list[float]:
        if name == "bonds":
            return [self._mean(molecule, "bonds", row)]
        if name == "angles":
            return [
                self._mean(molecule, "bonds", row[:2]),
                self._mean(molecule, "bonds", row[1:]),
                self._mean(molecule, "angles", row),
            ]
        if name == "bends":
            center, *ends = row
            return [self._mean(molecule, "angles", (ends[i], center, ends[i + 1])) for i in (0, 2)]
        if name == "torsions":
            return [
                self._mean(molecule, "bonds", row[1:3]),
                *(self._mean(molecule, "angles", row[i : i + 3]) for i in (0, 1)),
            ]
        return []

    def _mean(self, molecule: _MoleculeTerms, name: str, row: Row) -> float:
        found = self.mean.get((name, molecule._ordered(tuple(row))[1]))
        if found is None:
            raise DataError(f"atoms {list(row)} have no {name} in the training data")
        return found
