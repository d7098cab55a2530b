"""Hypothesis strategies for structures: usable ones in every form that arrays have, and ones that must be refused.

For tests of backbones, featurizers and whatever else takes structures. `structures` draws what every entry must compute,
`bad_structures` what it must refuse; both give a `RawStructure`, arrays just as a user might pass them. Hypothesis is
imported when a strategy is made. Whether a structure is usable is for the test to say: nothing here checks any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ndem_zoo.optional import require

if TYPE_CHECKING:
    from ase import Atoms
    from hypothesis.strategies import SearchStrategy

#: Å between the points of the grid that atoms are put on, and how far they are displaced from it at most.
_SPACING, _DISPLACED = 1.4, 0.25


@dataclass(frozen=True)
class RawStructure:
    """A structure as somebody might pass it: nothing is known about its parts.

    Attributes
    ----------
    z : (n,)
        Atomic numbers.
    pos : (n, 3)
        Positions in Å.
    cell : (3, 3) or None
        Cell vectors as rows in Å.
    pbc : (3,) or None
        Which cell vectors are periodic.
    kind : str
        What is odd about it, such as ``"NaN"`` or ``"read-only"``.
    """

    z: Any
    pos: Any
    cell: Any = None
    pbc: Any = None
    kind: str = "plain"

    def arrays(self) -> tuple[Any, ...]:
        """``(z, pos)`` or ``(z, pos, cell, pbc)``, as featurizers take them."""
        return (self.z, self.pos) if self.cell is None else (self.z, self.pos, self.cell, self.pbc)

    def atoms(self) -> Atoms:
        """As `ase.Atoms`; raises whatever ASE does where ASE cannot hold it."""
        from ase import Atoms

        return Atoms(numbers=self.z, positions=self.pos, cell=self.cell, pbc=self.pbc)


# -------------------------------------------------------------------------------------------------------------- forms

#: Forms in which good numbers come: what is done to the arrays `z` and `pos`.
FORMS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]] = {
    "plain": lambda z, pos: (z, pos),
    "read-only": lambda z, pos: (_read_only(z), _read_only(pos)),
    "every second row": lambda z, pos: (np.repeat(z, 2)[::2], np.repeat(pos, 2, axis=0)[::2]),
    "reversed twice": lambda z, pos: (z[::-1].copy()[::-1], pos[::-1].copy()[::-1]),
    "columns of a table": lambda z, pos: (z, np.column_stack([np.zeros(len(pos)), pos])[:, 1:]),
    "Fortran order": lambda z, pos: (z, np.asfortranarray(pos)),
    "other byte order": lambda z, pos: (z.astype(">i4"), pos.astype(">f8")),
    "bytes and float32": lambda z, pos: (z.astype(np.uint8), pos.astype(np.float32)),
    "unsigned": lambda z, pos: (z.astype(np.uint64), pos),
    "lists": lambda z, pos: (z.tolist(), pos.tolist()),
    "far away": lambda z, pos: (z, pos + np.array([31234.5, -8765.25, 90000.0])),
}


def _read_only(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flags.writeable = False
    return values


def structures(
    elements: Sequence[int] = (1, 6, 7, 8),
    max_atoms: int = 8,
    *,
    periodic: bool | None = None,
    forms: Sequence[str] = tuple(FORMS),
) -> SearchStrategy[RawStructure]:
    """Structures that can be computed: 1 to `max_atoms` atoms, all of them 0.9 Å apart or more.

    Parameters
    ----------
    elements
        Atomic numbers to draw from.
    max_atoms
        Largest number of atoms.
    periodic
        Whether they have cells, with one, two or three periodic directions; None: some have.
    forms
        Names in `FORMS`: read-only and strided memory, other dtypes, lists, places far from the origin.

    Raises
    ------
    ImportError
        Without Hypothesis; names the extra.

    Examples
    --------
    >>> from hypothesis import given
    >>> from ndem_zoo.testing import structures
    >>> @given(structures(max_atoms=4))
    ... def test_my_reader(structure):
    ...     graph = my_reader(structure.arrays())
    """
    st = require("hypothesis.strategies", extra="dev")
    kinds = [periodic] if periodic is not None else [False, True]
    return st.builds(
        _structure,
        st.lists(st.sampled_from(list(elements)), min_size=1, max_size=max_atoms),
        st.integers(0, 2**32 - 1),
        st.sampled_from(kinds),
        st.sampled_from([(1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 0, 0), (0, 0, 1)]),
        st.sampled_from(list(forms)),
    )


def _structure(z: list[int], seed: int, is_periodic: bool, pbc: tuple[int, ...], form: str) -> RawStructure:
    """Atoms on a grid in an oblique box, each displaced a little."""
    rng = np.random.default_rng(seed)
    n, side = len(z), int(np.ceil(len(z) ** (1 / 3)))
    points = rng.permutation(np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3))[:n]
    pos = _SPACING * points + rng.uniform(-_DISPLACED, _DISPLACED, (n, 3))
    cell, flags = None, None
    if is_periodic:
        flags = np.array(pbc, dtype=bool)
        # Oblique by less than the gap between images, so that these stay as far apart as the atoms.
        cell = np.diag(side * _SPACING + rng.uniform(1.0, 4.0, 3)) + np.triu(rng.uniform(-0.5, 0.5, (3, 3)), 1)
        if rng.random() < 0.5:
            cell[~flags] = 0.0
    z, pos = FORMS[form](np.array(z, dtype=np.int64), pos)
    return RawStructure(z, pos, cell, flags, form)


# --------------------------------------------------------------------------------------------------------------- flaws


def _changed(raw: RawStructure, rng: np.random.Generator, value: float) -> RawStructure:
    """One coordinate is another number."""
    pos = np.array(raw.pos, dtype=np.float64)
    pos[rng.integers(len(pos)), rng.integers(3)] = value
    return replace(raw, pos=pos)


def _with_z(raw: RawStructure, rng: np.random.Generator, value: int) -> RawStructure:
    z = np.array(raw.z, dtype=np.int64)
    z[rng.integers(len(z))] = value
    return replace(raw, z=z)


def _twin(raw: RawStructure, rng: np.random.Generator, distance: float) -> RawStructure:
    """One more atom, this far from one that is there, or from an image of it."""
    z, pos = np.array(raw.z, dtype=np.int64), np.array(raw.pos, dtype=np.float64)
    atom, direction = rng.integers(len(z)), rng.normal(size=3)
    other = pos[atom] + distance * direction / np.linalg.norm(direction)
    if raw.cell is not None:
        other = other + (rng.integers(-2, 3, 3) * raw.pbc) @ raw.cell
    return replace(raw, z=np.append(z, z[atom]), pos=np.vstack([pos, other]))


def _celled(raw: RawStructure, cell: Any, pbc: Any = (True, True, True)) -> RawStructure:
    return replace(raw, cell=cell, pbc=pbc)


def _masked(raw: RawStructure) -> RawStructure:
    pos = np.ma.array(np.array(raw.pos, dtype=np.float64))
    pos[0, 0] = np.ma.masked
    return replace(raw, pos=pos)


_Flaw = Any  # from a structure and a generator to a structure
_Z = lambda raw: np.array(raw.z, dtype=np.int64)
_R = lambda raw: np.array(raw.pos, dtype=np.float64)

#: Ways to spoil a structure.
FLAWS: dict[str, Callable[[RawStructure, np.random.Generator], RawStructure]] = {
    "no atoms": lambda raw, rng: replace(raw, z=np.zeros(0, dtype=np.int64), pos=np.zeros((0, 3))),
    "no atoms, lists": lambda raw, rng: replace(raw, z=[], pos=[]),
    "duplicate": lambda raw, rng: _twin(raw, rng, 0.0),
    "too near": lambda raw, rng: _twin(raw, rng, float(rng.uniform(1e-9, 0.09))),
    "NaN": lambda raw, rng: _changed(raw, rng, np.nan),
    "infinite": lambda raw, rng: _changed(raw, rng, float(rng.choice([np.inf, -np.inf]))),
    "huge coordinate": lambda raw, rng: _changed(raw, rng, float(rng.choice([1e7, -1e12, 1e38, 1e200, 1.7e308]))),
    "scattered": lambda raw, rng: _twin(raw, rng, float(rng.choice([5e3, 9e4]))) if raw.cell is None else _changed(
        raw, rng, -2e8
    ),
    "masked": lambda raw, rng: _masked(raw),
    "complex": lambda raw, rng: replace(raw, pos=_R(raw) + 0.5j),
    "complex without imaginary part": lambda raw, rng: replace(raw, pos=_R(raw).astype(complex)),
    "positions as text": lambda raw, rng: replace(raw, pos=_R(raw).astype(str)),
    "positions as words": lambda raw, rng: replace(raw, pos=[["a", "b", "c"]] * len(_Z(raw))),
    "positions as objects": lambda raw, rng: replace(raw, pos=np.array([[None] * 3] * len(_Z(raw)), dtype=object)),
    "positions as dates": lambda raw, rng: replace(raw, pos=np.zeros((len(_Z(raw)), 3), dtype="datetime64[s]")),
    "positions as booleans": lambda raw, rng: replace(raw, pos=np.eye(3, dtype=bool)[[0] * len(_Z(raw))]),
    "flat positions": lambda raw, rng: replace(raw, pos=_R(raw).ravel()),
    "two coordinates": lambda raw, rng: replace(raw, pos=_R(raw)[:, :2]),
    "four coordinates": lambda raw, rng: replace(raw, pos=np.column_stack([_R(raw), _R(raw)[:, 0]])),
    "one axis too many": lambda raw, rng: replace(raw, pos=_R(raw)[:, :, None]),
    "one position too many": lambda raw, rng: replace(raw, pos=np.vstack([_R(raw), [9.0, 9.0, 9.0]])),
    "one position too few": lambda raw, rng: replace(raw, pos=_R(raw)[1:]),
    "ragged": lambda raw, rng: replace(raw, z=[1, 8], pos=[[0.0, 0.0, 0.0], [1.0, 0.0]]),
    "no positions": lambda raw, rng: replace(raw, pos=None),
    "a number as positions": lambda raw, rng: replace(raw, pos=1.0),
    "a text as positions": lambda raw, rng: replace(raw, pos="positions"),
    "element 0": lambda raw, rng: _with_z(raw, rng, 0),
    "negative element": lambda raw, rng: _with_z(raw, rng, int(rng.choice([-1, -6, -(2**31), -(2**63)]))),
    "element beyond the table": lambda raw, rng: _with_z(raw, rng, int(rng.choice([101, 118, 119, 255, 257, 2**40]))),
    "element beyond integers": lambda raw, rng: replace(raw, z=[2**70] * len(_Z(raw))),
    "elements as numbers with a point": lambda raw, rng: replace(raw, z=_Z(raw) + 0.5),
    "elements as NaN": lambda raw, rng: replace(raw, z=np.full(len(_Z(raw)), np.nan)),
    "elements as booleans": lambda raw, rng: replace(raw, z=np.ones(len(_Z(raw)), dtype=bool)),
    "elements as text": lambda raw, rng: replace(raw, z=["x"] * len(_Z(raw))),
    "elements as objects": lambda raw, rng: replace(raw, z=np.array([None] * len(_Z(raw)), dtype=object)),
    "elements in a column": lambda raw, rng: replace(raw, z=_Z(raw)[:, None]),
    "a number as elements": lambda raw, rng: replace(raw, z=6),
    "no elements": lambda raw, rng: replace(raw, z=None),
    "cell of zeros": lambda raw, rng: _celled(raw, np.zeros((3, 3))),
    "cell with equal vectors": lambda raw, rng: _celled(raw, np.ones((3, 3)) * 12.0),
    "cell with vectors nearly in one plane": lambda raw, rng: _celled(
        raw, np.array([[12.0, 0, 0], [0, 12.0, 0], [6.0, 6.0, 1e-5]])
    ),
    "cell with a zero vector": lambda raw, rng: _celled(raw, np.diag([15.0, 15.0, 0.0])),
    "cell with NaN": lambda raw, rng: _celled(raw, np.diag([15.0, 15.0, np.nan])),
    "cell with inf": lambda raw, rng: _celled(raw, np.diag([15.0, np.inf, 15.0])),
    "tiny cell": lambda raw, rng: _celled(raw, np.eye(3) * float(rng.choice([1e-300, 1e-12, 1e-3, 0.03]))),
    "flat cell": lambda raw, rng: _celled(raw, np.diag([15.0, 15.0, float(rng.choice([1e-9, 1e-4, 0.02]))])),
    "sheared cell": lambda raw, rng: _celled(raw, np.array([[15.0, 0, 0], [3e7, 15.0, 0], [0, 0, 15.0]])),
    "huge cell": lambda raw, rng: _celled(raw, np.eye(3) * float(rng.choice([1e7, 1e30, 1e160, 1e300]))),
    "lengths as cell": lambda raw, rng: _celled(raw, np.array([15.0, 15.0, 15.0])),
    "two cell vectors": lambda raw, rng: _celled(raw, np.diag([15.0, 15.0, 15.0])[:2]),
    "text as cell": lambda raw, rng: _celled(raw, "cubic"),
    "complex cell": lambda raw, rng: _celled(raw, np.eye(3) * (15.0 + 1j)),
    "two flags": lambda raw, rng: _celled(raw, np.eye(3) * 15.0, np.array([True, True])),
    "flags as text": lambda raw, rng: _celled(raw, np.eye(3) * 15.0, ["T", "T", "F"]),
    "flags as numbers": lambda raw, rng: _celled(raw, np.eye(3) * 15.0, np.array([1.0, np.nan, 0.0])),
}  # fmt: skip


def bad_structures(
    elements: Sequence[int] = (1, 6, 7, 8), max_atoms: int = 8, *, flaws: Sequence[str] = tuple(FLAWS)
) -> SearchStrategy[RawStructure]:
    """Structures that no function may take without an error that says what is wrong.

    Parameters
    ----------
    elements, max_atoms
        Of the good structure that is spoilt; see `structures`.
    flaws
        Names in `FLAWS`, of which one is drawn; it is the `kind` of the structure.

    Raises
    ------
    ImportError
        Without Hypothesis; names the extra.
    """
    st = require("hypothesis.strategies", extra="dev")
    good = structures(elements, max_atoms, forms=("plain", "read-only"))
    return st.builds(_spoilt, good, st.sampled_from(list(flaws)), st.integers(0, 2**32 - 1))


def _spoilt(raw: RawStructure, flaw: str, seed: int) -> RawStructure:
    return replace(FLAWS[flaw](raw, np.random.default_rng(seed)), kind=flaw)
