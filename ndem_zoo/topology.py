"""Which atoms of given geometries are bonded: molecules for force fields, bonded terms for objectives.

Datasets hold elements and positions only. `perceive` finds the molecules behind them, each once, however many frames it
has; `add_terms` writes their bonds, angles, torsions and rotors into the extras, as `ConformerGraph.to_dataset` does for
molecules that begin as SMILES. Periodic structures and metals have no such bonds, and are an error. RDKit is imported
when the first structure is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from jaxtyping import Bool, Float, Int

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import DataError
from ndem_zoo.featurizers.terms import HINGES_PER_WORD, NO_ATOM, find_terms, pad_terms, side_of
from ndem_zoo.optional import require

if TYPE_CHECKING:
    from rdkit.Chem import Mol

#: Bond orders of MD17's molecules: the connections of a frame choose among them.
MD17_TEMPLATES: dict[str, str] = {
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "azobenzene": "c1ccccc1N=Nc1ccccc1",
    "benzene": "c1ccccc1",
    "ethanol": "CCO",
    "malonaldehyde": "O=CCC=O",
    "naphthalene": "c1ccc2ccccc2c1",
    "paracetamol": "CC(=O)Nc1ccc(O)cc1",
    "salicylic": "OC(=O)c1ccccc1O",
    "toluene": "Cc1ccccc1",
    "uracil": "O=c1cc[nH]c(=O)[nH]1",
}

#: Elements whose bonds have the orders that bond perception reckons with.
NONMETALS = frozenset(atomic_numbers[s] for s in "H He B C N O F Ne Si P S Cl Ar Ge As Se Br Kr Te I Xe".split())

#: Two heavy atoms are bonded up to this multiple of the sum of their covalent radii. Choice: bonds of MD17 at 500 K reach
#: 1.17 (measured), the two bridgeheads of bicyclo[1.1.1]pentane, which are not bonded, are at 1.23.
BONDED = 1.2

#: Neighbors that an atom can have; of more, the farthest are not bonded. Choice: bridgeheads in the small cages of QM9 are
#: as near as 1.15 without a bond.
MOST_NEIGHBORS = {5: 4, 6: 4, 7: 4, 8: 3, 9: 1}

#: Another frame has the same bonds if these heavy pairs are below, and all others above. Choice: wide, so that vibrations
#: change no bond (MD17 at 500 K: 1.17 and 1.35), and a pair between the two is decided by the quietest frame.
STILL_BONDED, STILL_APART = 1.5, 1.1

#: A hydrogen is bonded to its nearest atom, up to this multiple of the sum of radii (MD17 at 500 K: 1.26).
HYDROGEN_BONDED = 1.7

#: Largest number of distances that are looked at together.
_PAIRS_AT_ONCE = 4_000_000

#: Choice: combinations of bond orders that are tried before a molecule is given up; molecules of QM9 need far fewer.
_MAX_ITERATIONS = 100_000

#: Columns of the terms, and how many atoms each has.
TERM_WIDTHS = {"bonds": 2, "angles": 3, "torsions": 4, "rotors": 4}


@dataclass(frozen=True, eq=False)
class Topologies:
    """The molecules of a dataset.

    Attributes
    ----------
    mols
        Different molecules: sanitized, all hydrogens explicit, the atoms in the order of the data, and the geometry in
        which they were found as conformer. Equal molecules whose atoms are numbered differently count as different.
    index : (S,) int64
        Which of them each structure is.
    """

    mols: list[Mol]
    index: Int[np.ndarray, " S"] = field(repr=False)


def perceive(dataset: MolecularDataset, *, charge: int = 0, templates: Mapping[str, str] | None = None) -> Topologies:
    """Find the molecules of a dataset.

    Parameters
    ----------
    dataset
        Structures without periodic boundaries.
    charge
        Total charge of every structure.
    templates
        SMILES by name. A molecule whose connections are those of a template gets its bond orders and formal charges, which
        are otherwise worked out from the valences. Those of MD17's molecules are built in.

    Raises
    ------
    DataError
        If a structure is periodic or holds a metal, or no molecule with this charge has its connections; or if a template
        is no SMILES. Names the structure.

    Notes
    -----
    Structures with equal sequences of elements are looked at together. The quietest of them (smallest rms force; without
    forces the lowest energy; else the first) gives the bonds; those of the others that have the same bonds are frames of
    the same molecule, and the rest begins anew. So a trajectory costs one perception, and isomers one each. A hydrogen
    belongs to the atom that is nearest in units of the radii: a frame in which a shared proton has changed its side is
    another tautomer.
    """
    _check_dataset(dataset)
    known = [_template(name, smiles) for name, smiles in {**(templates or {}), **MD17_TEMPLATES}.items()]
    quietness = _quietness(dataset)
    index = np.full(len(dataset), -1, dtype=np.int64)
    mols: list[Mol] = []
    for members in _same_elements(dataset):
        frames = _Frames(dataset, members)
        while len(frames.members):
            quietest = int(np.argmin(quietness[frames.members]))
            number = int(frames.members[quietest])
            bonds = frames.bonds(quietest)
            atoms = slice(dataset.ptr[number], dataset.ptr[number + 1])
            try:
                mols.append(_molecule(dataset.z[atoms], dataset.pos[atoms], bonds, charge, known))
            except DataError as error:
                raise DataError(f"structure {number}: {error}; {_ADVICE}") from error
            same = frames.have_bonds(bonds)
            same[quietest] = True
            index[frames.members[same]] = len(mols) - 1
            frames = _Frames(dataset, frames.members[~same])
    return Topologies(mols, index)


def add_terms(
    dataset: MolecularDataset, *, charge: int = 0, templates: Mapping[str, str] | None = None
) -> MolecularDataset:
    """The dataset with extras ``bonds``, ``angles``, ``torsions`` and ``rotors``, as `ConformerGraph.to_dataset` makes them.

    (S, B, 2), (S, A, 3), (S, T, 4) and (S, R, 4) int32: numbers of atoms within the structure, filled up with -1. Bonds
    that turn hydrogens only are rotors, too.

    Raises
    ------
    DataError
        As `perceive`.
    """
    found = perceive(dataset, charge=charge, templates=templates)
    terms = [find_terms(mol).columns() for mol in found.mols]
    columns = {name: pad_terms([t[name] for t in terms], width)[found.index] for name, width in TERM_WIDTHS.items()}
    return dataset.with_extras(columns)


def add_hinges(dataset: MolecularDataset) -> MolecularDataset:
    """The dataset with the bonds about which a part of a molecule can be moved as a whole; it has its terms already.

    Extras: ``hinges`` (S, H, 3) int32, atoms i, j, k within the structure for each bond j-k that is in no ring, filled up
    with -1: the atoms on the side of k, which are not more than those of j, can be moved, and i is another neighbor of j
    (-1 if there is none). Those of the rotors come first, in their order. ``sides`` (A, W) int64: bit ``h % 62`` of word
    ``h // 62`` is set for the atoms that hinge h moves.
    """
    bonds, rotors = dataset.extras["bonds"], dataset.extras["rotors"]
    known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    found = []
    for number in range(len(dataset)):
        z = np.ascontiguousarray(dataset.z[dataset.ptr[number] : dataset.ptr[number + 1]], dtype=np.uint8)
        key = b"".join((z.tobytes(), b" ", bonds[number].tobytes(), rotors[number].tobytes()))
        if key not in known:
            rows = [table[number][table[number][:, 0] != NO_ATOM].tolist() for table in (bonds, rotors)]
            known[key] = _hinges(z, *rows)
        found.append(known[key])
    words = max((side.shape[1] for _, side in found), default=1)
    sides = [np.pad(side, ((0, 0), (0, words - side.shape[1]))) for _, side in found]
    columns = {"hinges": pad_terms([hinges for hinges, _ in found], 3)}
    sides_of_atoms = np.concatenate(sides or [np.zeros((0, words), np.int64)])
    return dataset.with_extras(columns).with_extras({"sides": sides_of_atoms}, per_atom=True)


def _hinges(z: np.ndarray, bonds: list[list[int]], rotors: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Hinges (H, 3) and sides (n, W) of one molecule."""
    neighbors: list[list[int]] = [[] for _ in z]
    for i, j in bonds:
        neighbors[i].append(j)
        neighbors[j].append(i)
    rows = [rotor[:3] for rotor in rotors]
    turned = {frozenset(row[1:]) for row in rows}
    for j, k in bonds:
        side, other = side_of(neighbors, j, k), side_of(neighbors, k, j)
        if frozenset((j, k)) in turned or side & other:  # in a ring, either end is reached from the other
            continue
        j, k = (k, j) if len(side) > len(other) else (j, k)
        ends = sorted((int(z[x]) == 1, x) for x in neighbors[j] if x != k)
        rows.append([ends[0][1] if ends else NO_ATOM, j, k])
    sides = np.zeros((len(z), max(1, -(-len(rows) // HINGES_PER_WORD))), dtype=np.int64)
    for number, (_, j, k) in enumerate(rows):
        word, bit = divmod(number, HINGES_PER_WORD)
        sides[list(side_of(neighbors, j, k)), word] |= 1 << bit
    return np.array(rows, dtype=np.int64).reshape(-1, 3), sides


def with_internal_coordinates(dataset: MolecularDataset) -> MolecularDataset:
    """The dataset with everything that noise along bonds, angles and torsions needs, which it may have already."""
    if not TERM_WIDTHS.keys() <= dataset.extras.keys():
        dataset = add_terms(dataset)
    return dataset if {"hinges", "sides"} <= dataset.extras.keys() else add_hinges(dataset)


# ------------------------------------------------------------------------------------------------------------ connections


class _Frames:
    """Structures with equal elements in equal order, and the distances of their pairs, reckoned when asked for."""

    def __init__(self, dataset: MolecularDataset, members: Int[np.ndarray, " M"]) -> None:
        self.dataset, self.members = dataset, members
        if not len(members):
            return
        start = int(dataset.ptr[members[0]])
        self.n = int(dataset.ptr[members[0] + 1]) - start
        self.z = np.asarray(dataset.z[start : start + self.n], dtype=np.int64)
        self.first, self.second = np.triu_indices(self.n, 1)
        self.sums = covalent_radii[self.z][self.first] + covalent_radii[self.z][self.second]
        self.is_hydrogen = self.z == 1
        self.is_heavy = ~(self.is_hydrogen[self.first] | self.is_hydrogen[self.second])

    def ratios(self, members: Int[np.ndarray, " M"]) -> Float[np.ndarray, "M P"]:
        """Distances of all pairs in units of the sums of radii."""
        pos = self.dataset.pos[self.dataset.ptr[members][:, None] + np.arange(self.n)]
        return np.linalg.norm(pos[:, self.first] - pos[:, self.second], axis=-1) / self.sums

    def partners(self, ratios: Float[np.ndarray, "M P"]) -> Bool[np.ndarray, "M P"]:
        """Pairs in which a hydrogen is bonded: each one's nearest atom."""
        square = np.full((len(ratios), self.n, self.n), np.inf)
        square[:, self.first, self.second] = square[:, self.second, self.first] = ratios
        chosen = np.zeros(square.shape, dtype=bool)
        if self.n > 1:
            hydrogens = np.flatnonzero(self.is_hydrogen)
            nearest = square[:, hydrogens].argmin(axis=-1)  # (M, H)
            rows = np.arange(len(ratios))[:, None]
            chosen[rows, hydrogens, nearest] = square[rows, hydrogens, nearest] < HYDROGEN_BONDED
        chosen |= chosen.swapaxes(1, 2)
        return chosen[:, self.first, self.second]

    def bonds(self, which: int) -> Bool[np.ndarray, " P"]:
        """Which pairs are bonded in one of the frames."""
        ratios = self.ratios(self.members[which : which + 1])
        bonds = np.where(self.is_heavy, ratios < BONDED, self.partners(ratios))[0]
        most = np.array([MOST_NEIGHBORS.get(int(z), self.n) for z in self.z])
        for pair in sorted(np.flatnonzero(bonds & self.is_heavy), key=lambda pair: -ratios[0, pair]):
            degree = np.bincount(np.concatenate([self.first[bonds], self.second[bonds]]), minlength=self.n)
            ends = [self.first[pair], self.second[pair]]
            bonds[pair] = (degree[ends] <= most[ends]).all()
        return bonds

    def have_bonds(self, bonds: Bool[np.ndarray, " P"]) -> Bool[np.ndarray, " M"]:
        """Which of the frames have these bonds and no others."""
        step = max(1, _PAIRS_AT_ONCE // max(1, self.n * self.n))
        blocks = [self._have(self.members[i : i + step], bonds) for i in range(0, len(self.members), step)]
        return np.concatenate(blocks)

    def _have(self, members: Int[np.ndarray, " M"], bonds: Bool[np.ndarray, " P"]) -> Bool[np.ndarray, " M"]:
        ratios = self.ratios(members)
        heavy = np.where(bonds, ratios < STILL_BONDED, ratios > STILL_APART)
        return np.where(self.is_heavy, heavy, self.partners(ratios) == bonds).all(axis=1)


def _same_elements(dataset: MolecularDataset) -> Iterator[Int[np.ndarray, " M"]]:
    """Numbers of the structures that have the same elements in the same order, one such set after the other."""
    found: dict[bytes, list[int]] = {}
    z = np.ascontiguousarray(dataset.z, dtype=np.uint8)
    for number in range(len(dataset)):
        found.setdefault(z[dataset.ptr[number] : dataset.ptr[number + 1]].tobytes(), []).append(number)
    for members in found.values():
        yield np.array(members, dtype=np.int64)


def _quietness(dataset: MolecularDataset) -> Float[np.ndarray, " S"]:
    """A number for each structure that is smaller the nearer it is to rest, comparable within a molecule."""
    if "forces" in dataset.targets and len(dataset):
        square = np.square(dataset.targets["forces"]).sum(axis=1)
        return np.add.reduceat(square, dataset.ptr[:-1])
    return dataset.targets["energy"] if "energy" in dataset.targets else np.arange(len(dataset), dtype=np.float64)


# -------------------------------------------------------------------------------------------------------------- molecules

_ADVICE = "objectives that need no bonds are ndem, noisy_nodes and dens"


def _check_dataset(dataset: MolecularDataset) -> None:
    """Raise DataError for structures that have no bonds in the sense of molecules."""
    if dataset.is_periodic:
        number = int(np.flatnonzero(np.asarray(dataset.pbc).any(axis=1))[0])
        raise DataError(f"structure {number}: it is periodic, and bonds are known of molecules only; {_ADVICE}")
    strange = np.flatnonzero(~np.isin(dataset.z, list(NONMETALS)))
    if len(strange):
        number = int(np.searchsorted(dataset.ptr, strange[0], side="right")) - 1
        atom, symbol = int(strange[0] - dataset.ptr[number]), chemical_symbols[int(dataset.z[strange[0]])]
        allowed = ", ".join(chemical_symbols[z] for z in sorted(NONMETALS))
        raise DataError(
            f"structure {number}: atom {atom} is {symbol}, whose bonds have no order; allowed are {allowed}; {_ADVICE}"
        )


def _template(name: str, smiles: Any) -> Mol:
    """The molecule of a template, with all hydrogens."""
    chem = require("rdkit.Chem", extra="chem")
    with require("rdkit.rdBase", extra="chem").BlockLogs():
        mol = chem.MolFromSmiles(smiles) if isinstance(smiles, str) else None
    if mol is None:
        raise DataError(f"templates[{name!r}]={smiles!r} is no SMILES")
    return chem.AddHs(mol)


def _molecule(z: np.ndarray, pos: np.ndarray, bonds: np.ndarray, charge: int, templates: list[Mol]) -> Mol:
    """A sanitized molecule with these atoms and connections, and this geometry."""
    chem = require("rdkit.Chem", extra="chem")
    first, second = np.triu_indices(len(z), 1)
    mol = _skeleton(z.tolist(), list(zip(first[bonds].tolist(), second[bonds].tolist(), strict=True)))
    conformer = chem.Conformer(len(z))
    for atom, x in enumerate(np.asarray(pos, dtype=np.float64).tolist()):
        conformer.SetAtomPosition(atom, x)
    mol.AddConformer(conformer, assignId=True)
    with require("rdkit.rdBase", extra="chem").BlockLogs():
        try:
            if not any(_take_orders(mol, template, charge) for template in templates) and bonds.any():
                mol = _with_orders(mol, charge)
            chem.SanitizeMol(mol)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"there is no molecule of charge {charge:+d} with its connections ({reason})") from error
    return mol


def _skeleton(z: list[int], bonds: list[tuple[int, int]]) -> Mol:
    """Atoms and single bonds: all that distances tell."""
    chem = require("rdkit.Chem", extra="chem")
    mol = chem.RWMol()
    for number in z:
        atom = chem.Atom(int(number))
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
    for i, j in bonds:
        mol.AddBond(i, j, chem.BondType.SINGLE)
    return mol


def _with_orders(mol: Mol, charge: int) -> Mol:
    """Bond orders and formal charges worked out from the valences."""
    chem = require("rdkit.Chem", extra="chem")
    determine = require("rdkit.Chem.rdDetermineBonds", extra="chem")
    bonded = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetDegree()]
    part = chem.RWMol(mol)
    for lone in sorted({atom.GetIdx() for atom in mol.GetAtoms()} - set(bonded), reverse=True):
        part.RemoveAtom(lone)  # it has no valence that could be right
    part = part.GetMol()
    # Choice: no stereo; it says nothing on which terms there are, and a thermal frame could turn it.
    options = {"charge": charge, "embedChiral": False}
    if "maxIterations" in determine.DetermineBondOrders.__doc__:  # RDKit 2024 and later
        options["maxIterations"] = _MAX_ITERATIONS
    determine.DetermineBondOrders(part, **options)
    _copy_orders(mol, part, bonded)
    return mol


def _take_orders(mol: Mol, template: Mol, charge: int) -> bool:
    """Give `mol` the bond orders and charges of a template, if it has its connections; whether it has."""
    chem = require("rdkit.Chem", extra="chem")
    if mol.GetNumAtoms() != template.GetNumAtoms() or mol.GetNumBonds() != template.GetNumBonds():
        return False
    if chem.GetFormalCharge(template) != charge:
        return False
    pairs = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in template.GetBonds()]
    match = mol.GetSubstructMatch(_skeleton([atom.GetAtomicNum() for atom in template.GetAtoms()], pairs))
    if match:
        _copy_orders(mol, template, match)
    return bool(match)


def _copy_orders(mol: Mol, source: Mol, places: Sequence[int]) -> None:
    """Bond orders and formal charges of `source`, whose atom i is atom ``places[i]`` of `mol`."""
    chem = require("rdkit.Chem", extra="chem")
    source = chem.Mol(source)
    chem.Kekulize(source, clearAromaticFlags=True)
    for bond in source.GetBonds():
        i, j = places[bond.GetBeginAtomIdx()], places[bond.GetEndAtomIdx()]
        mol.GetBondBetweenAtoms(i, j).SetBondType(bond.GetBondType())
    for atom in source.GetAtoms():
        mol.GetAtomWithIdx(places[atom.GetIdx()]).SetFormalCharge(atom.GetFormalCharge())
