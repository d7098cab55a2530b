"""MMFF94 in torch: RDKit types the atoms and names the constants, once for each molecule; energies are made on the device.

T. A. Halgren, J. Comput. Chem. 17, 490 (1996), equations 2 to 8. For organic molecules. Against RDKit's own energies and
forces it differs by rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import DataError
from ndem_zoo.featurizers.terms import find_terms
from ndem_zoo.forcefields.base import ForceField
from ndem_zoo.forcefields.internal import cosine, length, unit
from ndem_zoo.forcefields.molecules import (
    check_known,
    distinct_molecules,
    molecule_of,
    numbers_of,
    padded,
    positions_of,
    present,
)
from ndem_zoo.graph import Batch
from ndem_zoo.optional import require
from ndem_zoo.physics import KCAL_PER_MOL

if TYPE_CHECKING:
    from rdkit.Chem import Mol

# Eq. 2 to 8: constants of the functional form. mdyn/Å in kcal/mol/Å², with angles in degrees.
_DEGREES = 180.0 / np.pi
_BOND = 143.9325
_ANGLE, _STRETCH_BEND = _BOND / _DEGREES**2, _BOND / _DEGREES
_CUBIC_STRETCH, _CUBIC_BEND = -2.0, -0.4 / _DEGREES
_COULOMB, _BUFFER, _SCALE_14 = 332.0716, 0.05, 0.75

#: Atoms and constants of each kind of term.
_WIDTHS = {"bond": (2, 2), "angle": (3, 3), "stretch_bend": (3, 5), "plane": (4, 1), "torsion": (4, 3), "pair": (2, 3)}


class MMFF94(ForceField):
    """The Merck molecular force field, 1994 version."""

    is_traceable: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(0, dtype=torch.long))
        self.register_buffer("numbers", torch.zeros(0, 0, dtype=torch.long))
        for name, (atoms, constants) in _WIDTHS.items():
            self.register_buffer(f"{name}_atoms", torch.zeros(0, 0, atoms, dtype=torch.long))
            self.register_buffer(f"{name}_constants", torch.zeros(0, 0, constants, dtype=torch.float64))
            self.register_buffer(f"{name}_present", torch.zeros(0, 0, dtype=torch.bool))

    def fit(self, dataset: MolecularDataset) -> Self:
        """Find the molecules of the data and their constants; labels are used only to choose quiet frames.

        Raises
        ------
        DataError
            If a molecule has atoms that MMFF94 does not know.
        """
        mols, keys = distinct_molecules(dataset)
        found = [_constants(mol) for mol in mols]
        for name in _WIDTHS:
            atoms, constants = zip(*(f[name] for f in found), strict=True)
            setattr(self, f"{name}_atoms", padded(atoms, torch.long))
            setattr(self, f"{name}_constants", padded(constants, torch.float64))
            setattr(self, f"{name}_present", present(atoms))
        self.keys, self.numbers = torch.as_tensor(keys), numbers_of(mols)
        return self

    def molecules(self) -> list[list[int]]:
        """Atomic numbers of the molecules that it was made for, in their order."""
        return [row[row > 0].tolist() for row in self.numbers]

    def check(self, dataset: MolecularDataset) -> None:
        """Raise DataError for a structure that is none of the molecules it was made for."""
        check_known(dataset, self.keys, "MMFF94")

    def energy(self, batch: Batch) -> Float[Tensor, " S"]:
        """Energies in eV; NaN for a structure of another molecule."""
        which, known = molecule_of(batch, self.keys, self.names_unknown)
        total = batch.pos.new_zeros(batch.n_systems)
        for name, formula in _FORMULAS.items():
            atoms = getattr(self, f"{name}_atoms")[which]
            if atoms.shape[1] == 0:
                continue
            pos = positions_of(batch, atoms, known).unbind(2)
            energies = formula(pos, getattr(self, f"{name}_constants")[which].unbind(-1))
            total = total + (energies * getattr(self, f"{name}_present")[which]).sum(1)
        return KCAL_PER_MOL * total.masked_fill(~known, torch.nan)


# ------------------------------------------------------------------------------------------------------------- formulas


def _stretch(p: list[Tensor], c: tuple[Tensor, ...]) -> Tensor:
    """Eq. 2: quartic stretch; constants force constant and length."""
    change = length(*p) - c[1]
    x = _CUBIC_STRETCH * change
    return 0.5 * _BOND * c[0] * change**2 * (1 + x + 7 / 12 * x**2)


def _bend(p: list[Tensor], c: tuple[Tensor, ...]) -> Tensor:
    """Eq. 3, and eq. 4 for linear angles; constants force constant, angle in degrees, whether it is linear."""
    cos = cosine(*p)
    change = _angle(cos) - c[1]
    bent = 0.5 * _ANGLE * c[0] * change**2 * (1 + _CUBIC_BEND * change)
    return torch.where(c[2] > 0, _BOND * c[0] * (1 + cos), bent)


def _stretch_bend(p: list[Tensor], c: tuple[Tensor, ...]) -> Tensor:
    """Eq. 5; constants both force constants, both lengths, angle in degrees."""
    stretch = c[0] * (length(p[0], p[1]) - c[2]) + c[1] * (length(p[1], p[2]) - c[3])
    return _STRETCH_BEND * stretch * (_angle(cosine(*p)) - c[4])


def _out_of_plane(p: list[Tensor], c: tuple[Tensor, ...]) -> Tensor:
    """Eq. 6: Wilson's angle between the bond from the center p[0] to p[3], and the plane of p[0], p[1], p[2]."""
    normal = unit(torch.linalg.cross(p[1] - p[0], p[2] - p[0]))
    sine = (normal * unit(p[3] - p[0])).sum(-1)
    return 0.5 * _ANGLE * c[0] * (_DEGREES * torch.asin(_inside(sine))) ** 2


def _turn(p: list[Tensor], c: tuple[Tensor, ...]) -> Tensor:
    """Eq. 7: Fourier series of a torsion, in powers of its cosine."""
    first, axis, last = p[1] - p[0], p[2] - p[1], p[3] - p[2]
    cos = (unit(torch.linalg.cross(first, axis)) * unit(torch.linalg.cross(axis, last))).sum(-1)
    return 0.5 * (c[0] * (1 + cos) + c[1] * (2 - 2 * cos**2) + c[2] * (1 + 4 * cos**3 - 3 * cos))


def _not_bonded(p: list[Tensor], c: tuple[Tensor, ...]) -> Tensor:
    """Eq. 8 and buffered Coulomb energy; constants R*, epsilon, product of charges."""
    r = length(*p)
    x = r / c[0].masked_fill(c[0] == 0, 1.0)
    buffered = c[1] * (1.07 / (x + 0.07)) ** 7 * (1.12 / (x**7 + 0.12) - 2)
    return buffered + _COULOMB * c[2] / (r + _BUFFER)


def _angle(cos: Tensor) -> Tensor:
    """Degrees."""
    return _DEGREES * torch.acos(_inside(cos))


def _inside(value: Tensor) -> Tensor:
    """Away from -1 and 1, where inverse functions have no derivative."""
    return value.clamp(-1 + 1e-12, 1 - 1e-12)


_FORMULAS = {
    "bond": _stretch,
    "angle": _bend,
    "stretch_bend": _stretch_bend,
    "plane": _out_of_plane,
    "torsion": _turn,
    "pair": _not_bonded,
}


# ------------------------------------------------------------------------------------------------------------ constants


def _constants(mol: Mol) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Atoms and constants of all terms of a molecule, by kind."""
    helpers = require("rdkit.Chem.rdForceFieldHelpers", extra="chem")
    properties = helpers.MMFFGetMoleculeProperties(mol, mmffVariant="MMFF94")
    if properties is None:
        smiles = require("rdkit.Chem", extra="chem").MolToSmiles(mol)
        raise DataError(
            f"MMFF94 has no atom types for the molecule {smiles}; use the force fields 'valence' or 'pairs'"
        )
    terms = {name: _Rows(*widths) for name, widths in _WIDTHS.items()}
    found = find_terms(mol)
    lengths = {}
    for i, j in found.bonds.tolist():
        _, stiffness, rest = properties.GetMMFFBondStretchParams(mol, i, j)
        lengths[i, j] = lengths[j, i] = rest
        terms["bond"].add((i, j), (stiffness, rest))
    for i, j, k in found.angles.tolist():
        _, stiffness, rest = properties.GetMMFFAngleBendParams(mol, i, j, k)
        is_linear = _is_linear(properties, j)
        terms["angle"].add((i, j, k), (stiffness, rest, float(is_linear)))
        coupling = None if is_linear else properties.GetMMFFStretchBendParams(mol, i, j, k)
        if coupling:
            terms["stretch_bend"].add((i, j, k), (*coupling[1:], lengths[i, j], lengths[j, k], rest))
    for row in found.torsions.tolist():
        constants = properties.GetMMFFTorsionParams(mol, *row)
        if constants:
            terms["torsion"].add(row, constants[1:])
    _add_planes(mol, properties, terms["plane"])
    _add_pairs(mol, properties, terms["pair"])
    return {name: rows.arrays() for name, rows in terms.items()}


class _Rows:
    """Terms of one kind as they are found."""

    def __init__(self, n_atoms: int, n_constants: int) -> None:
        self.shapes, self.atoms, self.constants = (n_atoms, n_constants), [], []

    def add(self, atoms: Any, constants: Any) -> None:
        self.atoms.append(atoms)
        self.constants.append(constants)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Atoms (T, w) int64, constants (T, c) float64."""
        atoms = np.array(self.atoms, dtype=np.int64).reshape(-1, self.shapes[0])
        return atoms, np.array(self.constants, dtype=np.float64).reshape(-1, self.shapes[1])


#: MMFF94 types whose angles are linear (parameter file MMFFPROP, column linh): sp carbons and nitrogens, and the like.
_LINEAR_TYPES = frozenset((4, 42, 53, 61))


def _is_linear(properties: Any, atom: int) -> bool:
    return properties.GetMMFFAtomType(atom) in _LINEAR_TYPES


def _add_planes(mol: Mol, properties: Any, rows: _Rows) -> None:
    """Each of the three neighbors of a trigonal atom out of the plane of the two others."""
    for atom in mol.GetAtoms():
        around = [a.GetIdx() for a in atom.GetNeighbors()]
        if len(around) != 3:
            continue
        center = atom.GetIdx()
        for number, out in enumerate(around):
            a, b = (x for k, x in enumerate(around) if k != number)
            stiffness = properties.GetMMFFOopBendParams(mol, a, center, b, out)
            if stiffness:
                rows.add((center, a, b, out), (stiffness,))


def _add_pairs(mol: Mol, properties: Any, rows: _Rows) -> None:
    """Pairs that are three or more bonds apart; charges count less at three."""
    apart = require("rdkit.Chem", extra="chem").GetDistanceMatrix(mol)
    charges = [properties.GetMMFFPartialCharge(i) for i in range(mol.GetNumAtoms())]
    for i in range(mol.GetNumAtoms()):
        for j in range(i + 1, mol.GetNumAtoms()):
            if apart[i, j] < 3:
                continue
            _, _, size, depth = properties.GetMMFFVdWParams(i, j)
            product = charges[i] * charges[j] * (_SCALE_14 if apart[i, j] == 3 else 1.0)
            rows.add((i, j), (size, depth, product))
