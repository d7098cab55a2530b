"""Bonds, angles, torsions and rotors of an RDKit molecule, as arrays of atom indices.

What objectives that move molecules along their internal coordinates need to know of the topology. Only the connections
count, not the geometry; `conformer.py` makes the geometries, and datasets keep the arrays in their extras.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from ndem_zoo.optional import require

if TYPE_CHECKING:
    from rdkit.Chem import Atom, Mol

#: Stands in padded arrays where there is no further term.
NO_ATOM = -1

#: Hinges that are kept as bits of one integer of the column ``sides`` (`topology.add_hinges`).
HINGES_PER_WORD = 62


@dataclass(frozen=True, eq=False)
class BondedTerms:
    """Atoms of the internal coordinates of one molecule, each coordinate once.

    Attributes
    ----------
    bonds : (B, 2) int64
        Bonded atoms, the smaller index first.
    angles : (A, 3) int64
        Atoms i, j, k of angles at j, with i < k.
    torsions : (T, 4) int64
        Atoms i, j, k, l of all proper torsions about bonds j-k, with j < k.
    rotors : (R, 4) int64
        One torsion for each rotatable bond; the side of l is the one with fewer atoms, so it is what should turn.
    """

    bonds: Int[np.ndarray, "B 2"]
    angles: Int[np.ndarray, "A 3"]
    torsions: Int[np.ndarray, "T 4"]
    rotors: Int[np.ndarray, "R 4"]

    def of_first(self, n: int) -> BondedTerms:
        """The terms that only the first `n` atoms take part in."""
        return BondedTerms(**{name: rows[(rows < n).all(axis=1)] for name, rows in self.columns().items()})

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def find_terms(mol: Mol, *, hydrogen_rotors: bool = True) -> BondedTerms:
    """Internal coordinates of a molecule.

    Parameters
    ----------
    mol
        An RDKit molecule; hydrogens count where they are atoms of it (see ``Chem.AddHs``).
    hydrogen_rotors
        Whether bonds that turn hydrogens only (methyl, hydroxyl) are rotors. False is Frad's convention, which leaves
        no rotor in ethanol or toluene.

    Notes
    -----
    A bond is rotatable if it is single, not in a ring, and neither of its atoms is the end of a chain or has a triple
    bond: the pattern ``[!$(*#*)&!D1]-&!@[!$(*#*)&!D1]`` of Frad's and SliDe's code, D counting all neighbors or, without
    `hydrogen_rotors`, the heavy ones.
    """
    neighbors = [sorted(other.GetIdx() for other in atom.GetNeighbors()) for atom in mol.GetAtoms()]
    bonds = sorted(tuple(sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))) for bond in mol.GetBonds())
    angles = [(i, j, k) for j, around in enumerate(neighbors) for n, i in enumerate(around) for k in around[n + 1 :]]
    torsions = [
        (i, j, k, l) for j, k in bonds for i in neighbors[j] for l in neighbors[k] if i != k and l != j and i != l
    ]
    rotors = [_rotor(mol, neighbors, j, k) for j, k in bonds if _is_rotatable(mol, j, k, hydrogen_rotors)]
    return BondedTerms(_rows(bonds, 2), _rows(angles, 3), _rows(torsions, 4), _rows(rotors, 4))


def _rows(terms: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(terms, dtype=np.int64).reshape(-1, width)


def _is_rotatable(mol: Mol, j: int, k: int, with_hydrogens: bool) -> bool:
    chem = require("rdkit.Chem", extra="chem")
    bond = mol.GetBondBetweenAtoms(j, k)
    if bond.GetBondType() != chem.BondType.SINGLE or bond.IsInRing():
        return False
    return all(_can_turn(mol.GetAtomWithIdx(atom), with_hydrogens, chem) for atom in (j, k))


def _can_turn(atom: Atom, with_hydrogens: bool, chem: Any) -> bool:
    """Whether something hangs on an end of a bond that turning the bond would move."""
    degree = sum(with_hydrogens or other.GetAtomicNum() != 1 for other in atom.GetNeighbors())
    return degree > 1 and not any(bond.GetBondType() == chem.BondType.TRIPLE for bond in atom.GetBonds())


def _rotor(mol: Mol, neighbors: list[list[int]], j: int, k: int) -> tuple[int, int, int, int]:
    """The torsion that stands for a rotatable bond: through heavy atoms where there are, the smaller side last."""
    if len(side_of(neighbors, j, k)) > len(side_of(neighbors, k, j)):
        j, k = k, j
    # `side_of(neighbors, a, b)` are the atoms that hang on b: now those on k are not more than those on j.
    ends = [
        min((x for x in neighbors[at] if x != other), key=lambda x: (mol.GetAtomWithIdx(x).GetAtomicNum() == 1, x))
        for at, other in ((j, k), (k, j))
    ]
    return ends[0], j, k, ends[1]


def side_of(neighbors: list[list[int]], start: int, end: int) -> set[int]:
    """Atoms that can be reached from `end` without passing `start`: of a bond in no ring, those on its side."""
    found, waiting = {end}, [end]
    while waiting:
        for atom in neighbors[waiting.pop()]:
            if atom not in found and atom != start:
                found.add(atom)
                waiting.append(atom)
    return found


def pad_terms(terms: list[np.ndarray], width: int) -> Int[np.ndarray, "S M width"]:
    """Ragged arrays (m_s, width) of several molecules as one (S, M, width), filled up with `NO_ATOM`."""
    longest = max((len(rows) for rows in terms), default=0)
    padded = np.full((len(terms), longest, width), NO_ATOM, dtype=np.int32)
    for row, values in zip(padded, terms, strict=True):
        row[: len(values)] = values
    return padded
