"""What a featurizer is, and how a structure and its labels are read from `ase.Atoms` or plain arrays.

A featurizer turns one structure into one DGLGraph. A structure that it cannot turn is an error that says which one and
why; nothing is left out. Neighbor lists and the fields of a graph live in `ndem_zoo.graph`, datasets in
`ndem_zoo.datasets`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ndem_zoo.errors import DataError
from ndem_zoo.graph import into_cell
from ndem_zoo.physics import MAX_Z

if TYPE_CHECKING:
    from ase import Atoms
    from dgl import DGLGraph

#: Where energies (`Atoms.info`) and forces (`Atoms.arrays`) are looked for besides ASE's calculator, in this order.
LABEL_KEYS: dict[str, tuple[str, ...]] = {
    "energy": ("energy", "REF_energy", "Energy", "ENERGY", "total_energy", "dft_energy", "DFT_energy", "E"),
    "forces": ("forces", "REF_forces", "Forces", "FORCES", "force", "dft_forces", "DFT_forces", "F"),
}

#: Choice: largest coordinate in Å, which float64 resolves to 1e-10; largest extent of a structure, and of a periodic cell
#: vector, in Å, which float32 resolves to 6e-5; and smallest distance in Å between opposite faces of a periodic cell: of
#: nearer ones, images of an atom overlap, or so many cells are within a cutoff that the search for them would not end.
MAX_COORDINATE, MAX_EXTENT, MIN_HEIGHT = 1e6, 1e3, 0.1

ALLOWED_POSITIONS = f"allowed are finite numbers up to {MAX_COORDINATE:g} Å"

#: Choice: two labels of one structure that differ by less (relative to their size) are the same label written twice.
SAME_LABEL = 1e-6


@dataclass(frozen=True, eq=False)
class Structure:
    """One structure as arrays, float64.

    Attributes
    ----------
    z : (n,) int64
        Atomic numbers.
    pos : (n, 3)
        Positions in Å.
    cell : (3, 3) or None
        Cell vectors as rows in Å.
    pbc : (3,) bool or None
        Which cell vectors are periodic.
    energy : float or None
        Total energy in eV.
    forces : (n, 3) or None
        Forces in eV/Å.
    fixed : (n,) bool or None
        Atoms that must not move.
    """

    z: np.ndarray
    pos: np.ndarray
    cell: np.ndarray | None = None
    pbc: np.ndarray | None = None
    energy: float | None = None
    forces: np.ndarray | None = None
    fixed: np.ndarray | None = None


class Featurizer(ABC):
    """Turns structures into DGL graphs; subclasses say how one structure becomes one graph.

    A structure is an `ase.Atoms`, a tuple ``(z, pos)``, ``(z, pos, cell)`` or ``(z, pos, cell, pbc)`` of arrays, or a
    `Structure`. Called with one of them, a featurizer returns a DGLGraph; `featurize` takes many and returns an array
    of them, as DeepChem's featurizers do.
    """

    @abstractmethod
    def graph(self, structure: Structure) -> DGLGraph:
        """The graph of a structure whose arrays have been checked."""

    def __call__(self, structure: Any) -> Any:
        """Graph of one structure; for a list of structures, the same as `featurize`."""
        if isinstance(structure, list):
            return self.featurize(structure)
        return self.graph(as_structure(structure))

    def featurize(self, structures: Any) -> np.ndarray:
        """Graphs of many structures.

        Parameters
        ----------
        structures
            Iterable of structures; a single one counts as a list of one.

        Returns
        -------
        graphs : (S,) object array of DGLGraph

        Raises
        ------
        DataError
            For the first structure that cannot be turned into a graph; names its index and the reason.
        """
        items = [structures] if _is_one(structures) else list(structures)
        graphs = np.empty(len(items), dtype=object)
        for index, item in enumerate(items):
            try:
                graphs[index] = self.graph(as_structure(item))
            except DataError as error:
                raise DataError(f"structure {index}: {error}") from error
        return graphs

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _is_one(value: Any) -> bool:
    """Whether `value` is one structure; `ase.Atoms` can be iterated over, but gives single atoms then."""
    return isinstance(value, (Structure, tuple)) or _is_atoms(value)


def _is_atoms(value: Any) -> bool:
    from ase import Atoms

    return isinstance(value, Atoms)


def as_structure(value: Any) -> Structure:
    """Read and check one structure.

    Parameters
    ----------
    value
        `ase.Atoms`, a tuple ``(z, pos[, cell[, pbc]])`` (a cell without pbc is periodic in all directions), or a
        `Structure`.

    Raises
    ------
    DataError
        If it is none of these, or its arrays cannot be those of a structure.
    """
    if _is_atoms(value):
        return check_structure(read_atoms(value))
    if isinstance(value, Structure):
        return check_structure(value)
    if not (isinstance(value, tuple) and 2 <= len(value) <= 4):
        raise DataError(f"got {type(value).__name__}; a structure is an ase.Atoms or a tuple (z, pos[, cell[, pbc]])")
    z, pos, cell, pbc = (*value, None, None)[:4]
    if cell is not None:
        cell = as_numbers("cell", cell, np.float64)
        pbc = np.ones(3, dtype=bool) if pbc is None else as_numbers("pbc", pbc, bool)
    return check_structure(
        Structure(as_numbers("atomic numbers", z), as_numbers("positions", pos, np.float64), cell, pbc)
    )


def as_numbers(name: str, values: Any, dtype: Any = None) -> np.ndarray:
    """`values` as an array of plain numbers; not copied when its dtype is right.

    Parameters
    ----------
    name
        For the error.
    values : any shape
        An array, or lists.
    dtype
        ``float64``: real numbers are taken, and nothing that numpy would make some of (text, dates, the real parts of complex
        numbers); ``bool``: booleans, and numbers that are 0 or 1; None: the dtype that it has.

    Raises
    ------
    DataError
        If it is no array of such numbers, is ragged, or has masked entries.
    """
    try:
        array = np.asanyarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that numpy cannot look into
        raise DataError(f"{name} cannot be an array: {' '.join(str(error).split())}") from error
    if isinstance(array, np.ma.MaskedArray):
        if np.ma.is_masked(array):
            raise DataError(
                f"{name} has {np.ma.count_masked(array)} masked entries; allowed are numbers for all of them"
            )
        array = array.data
    if array.size == 0 and array.dtype.kind in "fiub":
        return array.astype(np.int64 if dtype is None and array.dtype.kind == "f" else dtype or array.dtype)
    allowed = {np.dtype(np.float64): "fiu", np.dtype(bool): "biuf"}.get(np.dtype(dtype) if dtype else None, "fiub")
    if array.dtype.kind not in allowed:
        wanted = f" of {np.dtype(dtype).name}" if dtype else ""
        what = "booleans" if dtype is bool else "real numbers"
        raise DataError(f"{name} cannot be an array{wanted}: the dtype is {array.dtype}; allowed are {what}")
    if dtype is bool and array.dtype.kind != "b" and not np.isin(array, (0, 1)).all():
        raise DataError(f"{name} has the values {array.tolist()}; allowed are True and False")
    return array if dtype is None else np.asanyarray(array, dtype=dtype)


def check_structure(structure: Structure) -> Structure:
    """Raise DataError if the arrays of `structure` do not fit together or hold impossible values.

    Overlapping atoms are found where distances are known: in the neighbor list, or by `datasets.checks` for a dataset.
    """
    z, pos = structure.z, structure.pos
    if z.ndim != 1 or not (np.issubdtype(z.dtype, np.integer)):
        raise DataError(f"atomic numbers have shape {z.shape} and dtype {z.dtype}; allowed are integers of shape (n,)")
    if len(z) == 0:
        raise DataError("it has no atoms; allowed is one or more")
    if pos.shape != (len(z), 3):
        raise DataError(f"positions have shape {pos.shape}; {len(z)} atoms need ({len(z)}, 3)")
    if not (np.abs(pos) <= MAX_COORDINATE).all():  # nor is NaN
        atom = int(np.flatnonzero(~(np.abs(pos) <= MAX_COORDINATE).all(axis=1))[0])
        raise DataError(f"position of atom {atom} is {pos[atom]}; {ALLOWED_POSITIONS}")
    if not ((z >= 1) & (z <= MAX_Z)).all():
        atom = int(np.flatnonzero((z < 1) | (z > MAX_Z))[0])
        raise DataError(f"atom {atom} has atomic number {z[atom]}; allowed are 1 to {MAX_Z}")
    if structure.forces is not None and structure.forces.shape != pos.shape:
        raise DataError(f"forces have shape {structure.forces.shape}; {len(z)} atoms need ({len(z)}, 3)")
    check_cell(structure.cell, structure.pbc)
    check_extent(pos, structure.cell, structure.pbc)
    return structure


def check_extent(pos: np.ndarray, cell: np.ndarray | None, pbc: np.ndarray | None) -> None:
    """Raise DataError if atoms at `pos` (n, 3), in Å, are so far apart that float32 cannot tell where they are.

    In directions that `pbc` (3,) says are periodic, atoms may be in any image of the `cell` (3, 3).
    """
    extent = np.ptp(pos, axis=0).max()
    if extent > MAX_EXTENT and cell is not None and pbc is not None and np.any(pbc):
        extent = np.ptp(into_cell(pos, cell, pbc), axis=0).max()
    if extent > MAX_EXTENT:
        raise DataError(
            f"the structure extends over {extent:.4g} Å; allowed are {MAX_EXTENT:g} Å (atoms that are so far apart do not "
            "interact: make them structures of their own)"
        )


def check_cell(cell: np.ndarray | None, pbc: np.ndarray | None) -> None:
    """Raise DataError unless the directions periodic by `pbc` (3,) have independent vectors in `cell` (3, 3), in Å."""
    if pbc is None or not np.any(pbc):
        return
    if cell is None or np.shape(cell) != (3, 3) or np.shape(pbc) != (3,):
        raise DataError(f"cell has shape {np.shape(cell)} and pbc {np.shape(pbc)}; needed are (3, 3) and (3,)")
    if not np.isfinite(cell).all():
        raise DataError(f"the cell {np.asarray(cell).tolist()} is not finite")
    rows = np.asarray(cell, dtype=np.float64)[np.asarray(pbc, dtype=bool)]
    if np.abs(rows).max() > MAX_EXTENT or np.linalg.norm(rows, axis=1).max() > MAX_EXTENT:
        raise DataError(f"the cell {np.asarray(cell).tolist()} has periodic vectors longer than {MAX_EXTENT:g} Å")
    if is_singular(cell, pbc):
        raise DataError(
            f"the cell {np.asarray(cell).tolist()} is singular in its periodic directions pbc={np.asarray(pbc).tolist()}; "
            "periodic cell vectors must be linearly independent"
        )
    heights = 1.0 / np.linalg.norm(np.linalg.pinv(rows), axis=0)
    if heights.min() < MIN_HEIGHT:
        raise DataError(
            f"the cell {np.asarray(cell).tolist()} has opposite faces {heights.min():.3g} Å apart in its periodic directions; "
            f"allowed is {MIN_HEIGHT} Å or more (another unit of length, or a cell to reduce: ase.geometry.minkowski_reduce)"
        )


def is_singular(cell: np.ndarray, pbc: np.ndarray) -> bool:
    """Whether the rows of `cell` (3, 3) that `pbc` (3,) says are periodic are linearly dependent, whatever their lengths."""
    rows = np.asarray(cell)[np.asarray(pbc, dtype=bool)]
    gram = rows @ rows.T
    # Choice: 1e-10 is the square of an angle of 1e-5 rad between vectors.
    return bool(np.linalg.det(gram) <= 1e-10 * np.prod(np.diagonal(gram)))


def geometry_of(atoms: Atoms) -> Structure:
    """Elements, positions and, if it is periodic, cell of `ase.Atoms`; neither labels nor constraints."""
    is_periodic = bool(np.any(atoms.pbc))
    return Structure(
        z=np.asarray(atoms.numbers, dtype=np.int64),
        pos=np.array(atoms.positions, dtype=np.float64),
        cell=np.array(atoms.cell.array, dtype=np.float64) if is_periodic else None,
        pbc=np.array(atoms.pbc, dtype=bool) if is_periodic else None,
    )


def read_atoms(atoms: Atoms, energy_key: str | None = None, forces_key: str | None = None) -> Structure:
    """Read a structure, its labels and its fixed atoms from `ase.Atoms`.

    Labels come from the results that a calculator holds for exactly this geometry (nothing is calculated), and from
    `info` and `arrays` under the names in `LABEL_KEYS`. With ``energy_key`` or ``forces_key`` only that entry is read.

    Raises
    ------
    DataError
        If two entries name different labels (say, predictions and references), or a label has the wrong shape.
    """
    n = len(atoms)
    energy = _label(atoms, "energy", energy_key)
    if energy is not None and np.size(energy) != 1:
        raise DataError(f"the energy has shape {np.shape(energy)}; allowed is one number in eV")
    forces = _label(atoms, "forces", forces_key)
    if forces is not None and np.shape(forces) != (n, 3):
        raise DataError(f"forces have shape {np.shape(forces)}; {n} atoms need ({n}, 3)")
    has_cell = bool(np.any(atoms.pbc)) or atoms.cell.rank > 0
    return Structure(
        z=np.asarray(atoms.numbers, dtype=np.int64),
        pos=np.array(atoms.positions, dtype=np.float64),
        cell=np.array(atoms.cell.array, dtype=np.float64) if has_cell else None,
        pbc=np.array(atoms.pbc, dtype=bool) if has_cell else None,
        energy=None if energy is None else float(np.reshape(energy, ())),
        forces=None if forces is None else np.array(forces, dtype=np.float64),
        fixed=fixed_atoms(atoms),
    )


def _label(atoms: Atoms, name: str, key: str | None) -> Any:
    """The label `name` from wherever it is, as numbers; None when it is nowhere."""
    stored = atoms.info if name == "energy" else atoms.arrays
    calculated = _calculated(atoms, name)
    if key is not None:
        # Pitfall: ASE's readers move "energy" and "forces" out of info and arrays into a calculator.
        value = stored.get(key, calculated if key == name else None)
        return None if value is None else _numbers(key, value)
    found = {k: _numbers(k, stored[k]) for k in LABEL_KEYS[name] if k in stored}
    if calculated is not None:
        found = {name: _numbers(name, calculated)} | found
    if not found:
        return None
    (first, value), *others = found.items()
    for other, alternative in others:
        if not _is_same(value, alternative):
            raise DataError(
                f"{first!r} and {other!r} are different labels; choose one with {name}_key={first!r} or {other!r}"
            )
    return value


def _numbers(key: str, value: Any) -> np.ndarray:
    """A label as an array of float64. Pitfall: ASE's readers leave what they cannot read as a number as text."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{key} is {str(value)[:60]!r}; allowed are numbers") from error


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.ravel(a), np.ravel(b)
    return a.shape == b.shape and np.allclose(a, b, rtol=SAME_LABEL, atol=SAME_LABEL, equal_nan=True)


def _calculated(atoms: Atoms, name: str) -> Any:
    """A result that the calculator of `atoms` holds for this very geometry; None if it would have to calculate."""
    from ase.calculators.calculator import PropertyNotImplementedError

    calculator = atoms.calc
    if calculator is None or name not in getattr(calculator, "results", {}):
        return None
    try:
        return calculator.get_property(name, atoms, allow_calculation=False)
    except PropertyNotImplementedError:
        return None


def fixed_atoms(atoms: Atoms) -> np.ndarray | None:
    """Mask (n,) of the atoms that `FixAtoms` constraints hold; None without any.

    Raises
    ------
    DataError
        For constraints of another kind, which a mask cannot express.
    """
    from ase.constraints import FixAtoms

    if not atoms.constraints:
        return None
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            kind = type(constraint).__name__
            raise DataError(
                f"it has a constraint {kind}; only FixAtoms is known, remove it with atoms.set_constraint()"
            )
        fixed[constraint.index] = True
    return fixed if fixed.any() else None
