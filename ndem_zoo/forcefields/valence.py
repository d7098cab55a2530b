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
from ndem_zoo.forcefields.internal import cosine, length
from ndem_zoo.forcefields.linear import LinearForceField
from ndem_zoo.forcefields.molecules import (
    check_known,
    distinct_molecules,
    keys_of,
    molecule_of,
    numbers_of,
    padded,
    positions_of,
    present,
)
from ndem_zoo.graph import Batch
from ndem_zoo.physics import safe_norm

if TYPE_CHECKING:
    from rdkit.Chem import Mol

#: Choice: 1/Å; a stretch counts as 1 - exp(-1.5 (r - r0)), Morse's variable, which is bounded for long bonds.
STIFFNESS = 1.5

#: Choice: lengths in Å over which pairs that are not bonded decay.
RANGES = (0.6, 1.2, 2.4)

Values = list[Float[Tensor, "S T"]]
Units = list[Float[Tensor, "S T 3"]]
Row = tuple[int, ...]


def _stretch(r: Tensor, reference: Tensor) -> Tensor:
    return 1.0 - torch.exp(-STIFFNESS * (r - reference))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _bond(u: Units, r: Values, ref: Tensor) -> Values:
    x = _stretch(r[0], ref[..., 0])
    return [x, x**2, x**3, x**4]


def _pair(u: Units, r: Values, ref: Tensor) -> Values:
    return [torch.exp(-r[0] / decay) for decay in RANGES]


def _angle(u: Units, r: Values, ref: Tensor) -> Values:
    x, y = _stretch(r[0], ref[..., 0]), _stretch(r[1], ref[..., 1])
    bend = _dot(*u) - ref[..., 2]
    return [bend, bend**2, bend**3, x * y, x * bend, y * bend]


def _bends(u: Units, r: Values, ref: Tensor) -> Values:
    return [(_dot(u[0], u[1]) - ref[..., 0]) * (_dot(u[2], u[3]) - ref[..., 1])]


def _plane(u: Units, r: Values, ref: Tensor) -> Values:
    square = _dot(u[0], torch.linalg.cross(u[1], u[2])) ** 2  # of the volume that the unit vectors span; 0 in one plane
    return [square, square**2]


def _torsion(u: Units, r: Values, ref: Tensor) -> Values:
    first, last = -_dot(u[0], u[1]), -_dot(u[1], u[2])  # cosines of the angles
    # sin sin cos(phi), phi the torsion: without the pole that cos(phi) has at straight angles. Eq.: Lagrange's identity
    t, x = first * last - _dot(u[0], u[2]), _stretch(r[1], ref[..., 0])
    first, last, square = first - ref[..., 1], last - ref[..., 2], t**2
    powers = [t, square, t**3, t * x, square * x]
    return [*powers, t * first, t * last, square * first, square * last, first * last, t * first * last]


class Group(NamedTuple):
    """One kind of term.

    Attributes
    ----------
    values
        Features of the terms, each (S, T), from unit vectors between atoms (S, T, 3), lengths in Å, and reference values.
    n_values, width, n_references
        Number of features, of atoms, and of reference values.
    vectors
        From which of the atoms to which the vectors go.
    """

    values: Callable[[Units, Values, Tensor], Values]
    n_values: int
    width: int
    n_references: int
    vectors: tuple[tuple[int, int], ...]


GROUPS: dict[str, Group] = {
    "bonds": Group(_bond, 4, 2, 1, ((0, 1),)),
    "pairs": Group(_pair, len(RANGES), 2, 0, ((0, 1),)),
    "angles": Group(_angle, 6, 3, 3, ((1, 0), (1, 2))),
    "bends": Group(_bends, 1, 5, 2, ((0, 1), (0, 2), (0, 3), (0, 4))),
    "planes": Group(_plane, 2, 4, 0, ((0, 1), (0, 2), (0, 3))),
    "torsions": Group(_torsion, 11, 4, 3, ((0, 1), (1, 2), (2, 3))),
}


class ValenceForceField(LinearForceField):
    """Energy of stretches, bends, torsions, their couplings, and of pairs that are not bonded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(0, dtype=torch.long))
        self.register_buffer("numbers", torch.zeros(0, 0, dtype=torch.long))
        self.register_buffer("_ends", torch.zeros(0, 2, 0, dtype=torch.long), persistent=False)  # see `_lay_out`
        self.register_buffer("_places", torch.zeros(0, 0, dtype=torch.long), persistent=False)
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
        self.keys, self.numbers = torch.as_tensor(keys), numbers_of(mols)
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
        self._lay_out()
        self.coefficients = torch.zeros(self.n_features, dtype=torch.float64)

    def _lay_out(self) -> None:
        """Tables of all kinds of terms side by side, so that a batch is looked up once: small operations take the time.

        ``_ends`` (M, 2, K): atoms from which and to which the vectors of all terms go; ``_places`` (M, V): the feature that each
        value of a term is added to.
        """
        device, begin, ends, places = self.keys.device, 0, [[], []], []
        for name, group in GROUPS.items():
            atoms, kind = getattr(self, f"{name}_atoms"), getattr(self, f"{name}_class")
            for side in (0, 1):
                ends[side] += [atoms[..., vector[side]] for vector in group.vectors]
            place = begin + kind * group.n_values + torch.arange(group.n_values, device=device)  # (M, T, V)
            there = getattr(self, f"{name}_present").unsqueeze(-1)
            places.append(place.masked_fill(~there, -1).transpose(1, 2).flatten(1))
            begin += int(getattr(self, f"{name}_classes")) * group.n_values
        places = torch.cat(places, dim=1)
        self.n_features = begin
        self._ends = torch.stack([torch.cat(side, dim=1) for side in ends], dim=1)
        self._places = places.masked_fill(places < 0, begin)  # what fills up a table goes into a column of its own

    def _load_from_state_dict(self, *args, **keywords):
        super()._load_from_state_dict(*args, **keywords)
        self._lay_out()

    def molecules(self) -> list[list[int]]:
        """Atomic numbers of the molecules that it was made for, in their order."""
        return [row[row > 0].tolist() for row in self.numbers]

    def check(self, dataset: MolecularDataset) -> None:
        """Raise DataError for a structure that is none of the molecules of the training data."""
        check_known(dataset, self.keys, "the valence force field")

    def features(self, batch: Batch) -> Float[Tensor, "S P"]:
        """Values of all terms, summed over those of a kind; NaN for a structure of another molecule."""
        which, known = molecule_of(batch, self.keys, self.names_unknown)
        tails, heads = positions_of(batch, self._ends[which], known).unbind(1)
        vectors = heads - tails
        lengths = safe_norm(vectors, keepdim=True)
        units = vectors / lengths.masked_fill(lengths == 0, 1.0)
        lengths, begin, values = lengths.squeeze(-1), 0, []
        for name, group in GROUPS.items():
            reference = getattr(self, f"{name}_reference")[which]
            number, size = len(group.vectors), reference.shape[1]
            if size:
                own = slice(begin, begin + number * size)
                u = units[:, own].unflatten(1, (number, size)).unbind(1)
                r = lengths[:, own].unflatten(1, (number, size)).unbind(1)
                values += group.values(u, r, reference)
            begin += number * size
        width = self.n_features + 1
        summed = batch.pos.new_zeros(batch.n_systems * width)
        if values:  # an atom alone has no terms
            rows = width * torch.arange(batch.n_systems, device=which.device).unsqueeze(1)
            summed = summed.index_add(0, (self._places[which] + rows).flatten(), torch.cat(values, dim=1).flatten())
        return summed.view(-1, width)[:, :-1].masked_fill(~known.unsqueeze(1), torch.nan)


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
