"""Diagnostics of a dataset: ranges, composition, duplicates, net forces, virial temperature, suspicious units.

`summarize` computes them, `Summary` prints them as a table. Nothing here is an error: what must stop a training is in
`checks.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ndem_zoo.datasets.checks import SUSPICIOUS_FORCE
from ndem_zoo.physics import BOLTZMANN, KCAL_PER_MOL

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset

#: Choice: frames whose distances differ by less than this, in Å, are near duplicates; consecutive MD frames (0.5 fs)
#: are about ten times as far apart.
NEAR = 1e-3

#: Choice: no search for near duplicates beyond this many structures; the table says so.
NEAR_LIMIT = 200_000


@dataclass(frozen=True)
class Range:
    """Smallest, largest and mean value, and the standard deviation."""

    low: float
    high: float
    mean: float
    std: float

    @classmethod
    def of(cls, values: np.ndarray) -> Range:
        """Range of numbers, an array of any shape."""
        return cls(float(values.min()), float(values.max()), float(values.mean()), float(values.std()))


@dataclass(frozen=True)
class Summary:
    """What `MolecularDataset.summary` found; eV, Å and K.

    Attributes
    ----------
    name, n_structures, n_atoms
        Name and sizes.
    atoms_per_structure, energy, energy_per_atom
        Ranges; energies are totals in eV, None without labels.
    elements
        Number of atoms by symbol.
    formulas
        Number of structures by formula, most frequent first.
    n_periodic, n_fixed
        Structures with periodic boundaries, and atoms that must not move.
    force_rms, force_max, force_mean
        Root mean square of the force components, largest component, mean length of the force vectors; eV/Å.
    net_force_rms
        Root mean square of the components of the sum of forces of each structure, eV/Å: 0 for exact forces on free
        structures.
    exact_duplicates, near_duplicates
        Structures that repeat an earlier one bit for bit, or up to 0.001 Å after rotation, reflection and exchange of
        like atoms; near duplicates include the exact ones, and are None where they were not searched for.
    temperature, temperature_error
        Virial temperature in K and its standard error, as if frames were independent; None where it has no meaning.
    not_finite
        Number of non-finite values, by column.
    raw_units
        Units of the raw file.
    warnings
        What looks wrong.
    """

    name: str
    n_structures: int
    n_atoms: int
    atoms_per_structure: Range | None = None
    elements: dict[str, int] = field(default_factory=dict)
    formulas: dict[str, int] = field(default_factory=dict)
    n_periodic: int = 0
    n_fixed: int = 0
    energy: Range | None = None
    energy_per_atom: Range | None = None
    force_rms: float | None = None
    force_max: float | None = None
    force_mean: float | None = None
    net_force_rms: float | None = None
    exact_duplicates: int = 0
    near_duplicates: int | None = None
    temperature: float | None = None
    temperature_error: float | None = None
    not_finite: dict[str, int] = field(default_factory=dict)
    raw_units: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """The table: (what, value)."""
        rows = [("structures", f"{self.n_structures:,}"), ("atoms", f"{self.n_atoms:,}")]
        if self.atoms_per_structure is not None:
            a = self.atoms_per_structure
            rows.append(("atoms per structure", f"{a.low:.0f} to {a.high:.0f}, mean {a.mean:.1f}"))
        rows.append(("elements", ", ".join(f"{symbol} {number:,}" for symbol, number in self.elements.items())))
        rows.append(("composition", _first(self.formulas, 4)))
        rows.append(("periodic, fixed atoms", f"{self.n_periodic:,} structures, {self.n_fixed:,} atoms"))
        rows += self._energy_rows() + self._force_rows()
        near = "not searched" if self.near_duplicates is None else f"{self.near_duplicates:,}"
        rows.append(("duplicates", f"{self.exact_duplicates:,} exact, {near} within {NEAR:g} Å"))
        rows.append(("units", f"eV, Å in memory{self._raw()}"))
        return rows + [("warning", text) for text in self.warnings]

    def _energy_rows(self) -> list[tuple[str, str]]:
        if self.energy is None:
            return [("energy", "no labels")]
        e, atom = self.energy, self.energy_per_atom
        return [
            ("energy", f"{e.low:.3f} to {e.high:.3f} eV, std {e.std:.4f} eV = {e.std / KCAL_PER_MOL:.2f} kcal/mol"),
            ("energy per atom", f"{atom.low:.3f} to {atom.high:.3f} eV"),
        ]

    def _force_rows(self) -> list[tuple[str, str]]:
        if self.force_rms is None:
            return [("forces", "no labels")]
        rms, largest, net = self.force_rms, self.force_max, self.net_force_rms
        rows = [
            (
                "force components",
                f"rms {rms:.4f} eV/Å = {rms / KCAL_PER_MOL:.2f} kcal/mol/Å, largest {largest:.3f} eV/Å",
            ),
            ("mean |F|", f"{self.force_mean:.4f} eV/Å"),
            ("net force", f"rms {net:.2e} eV/Å = {net / KCAL_PER_MOL:.2e} kcal/mol/Å"),
        ]
        if self.temperature is not None:
            rows.append(("virial temperature", f"{self.temperature:.0f} +- {self.temperature_error:.0f} K"))
        return rows

    def _raw(self) -> str:
        units = ", ".join(f"{what} in {unit}" for what, unit in self.raw_units.items())
        return f" (raw file: {units})" if units else ""

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(what) for what, _ in rows)
        title = self.name or "dataset"
        return "\n".join([title, "-" * len(title), *(f"{what:<{width}}  {value}" for what, value in rows)])


def _first(counts: dict[str, int], limit: int) -> str:
    """The most frequent entries as text."""
    shown = [f"{name} ({number:,})" for name, number in list(counts.items())[:limit]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def summarize(dataset: MolecularDataset) -> Summary:
    """Compute the diagnostics of a dataset; see `Summary`."""
    n = len(dataset)
    card = dataset.card
    basics = {
        "name": dataset.name,
        "n_structures": n,
        "n_atoms": len(dataset.z),
        "raw_units": dict(card.units) if card is not None else {},
    }
    if n == 0:
        return Summary(**basics, warnings=("the dataset is empty",))
    not_finite = {
        name: int((~np.isfinite(values)).sum())
        for name, values in {"positions": dataset.pos, **dataset.targets}.items()
        if not np.isfinite(values).all()
    }
    exact = exact_duplicates(dataset)
    values = {
        "atoms_per_structure": Range.of(dataset.counts),
        "elements": _elements(dataset.z),
        "formulas": _formulas(dataset),
        "n_periodic": 0 if dataset.pbc is None else int(dataset.pbc.any(axis=1).sum()),
        "n_fixed": 0 if dataset.fixed is None else int(dataset.fixed.sum()),
        "exact_duplicates": exact,
        "near_duplicates": None if not_finite else near_duplicates(dataset),
        "not_finite": not_finite,
        **({} if "energy" in not_finite else _energies(dataset)),
        **({} if {"forces", "positions"} & set(not_finite) else _forces(dataset)),
    }
    return Summary(**basics, **values, warnings=tuple(_suspicions(dataset, values)))


def _elements(z: np.ndarray) -> dict[str, int]:
    from ase.data import chemical_symbols

    numbers, counts = np.unique(z, return_counts=True)
    known = len(chemical_symbols)
    return {chemical_symbols[a] if 0 <= a < known else f"Z={a}": int(c) for a, c in zip(numbers, counts, strict=True)}


def _formulas(dataset: MolecularDataset) -> dict[str, int]:
    """Number of structures by formula (Hill order), most frequent first."""
    from ase.formula import Formula

    compositions = Counter(np.sort(part).tobytes() for part in np.split(np.asarray(dataset.z), dataset.ptr[1:-1]))
    dtype = dataset.z.dtype
    named = {}
    for key, number in compositions.most_common():
        symbols = _elements(np.frombuffer(key, dtype=dtype))
        try:
            name = str(Formula.from_dict(symbols).convert("hill"))
        except ValueError:  # an element that does not exist
            name = " ".join(f"{symbol}{count}" for symbol, count in symbols.items())
        named[name] = number
    return named


def _energies(dataset: MolecularDataset) -> dict[str, Range]:
    energy = dataset.targets.get("energy")
    if energy is None:
        return {}
    return {"energy": Range.of(energy), "energy_per_atom": Range.of(energy / np.maximum(dataset.counts, 1))}


def _forces(dataset: MolecularDataset) -> dict[str, float]:
    forces = dataset.targets.get("forces")
    if forces is None or len(forces) == 0:
        return {}
    values = {
        "force_rms": float(np.sqrt(np.square(forces).mean())),
        "force_max": float(np.abs(forces).max()),
        "force_mean": float(np.linalg.norm(forces, axis=1).mean()),
        "net_force_rms": float(np.sqrt(np.square(_sums(forces, dataset)).mean())),
    }
    found = virial_temperature(dataset)
    return values if found is None else {**values, "temperature": found[0], "temperature_error": found[1]}


def _sums(values: np.ndarray, dataset: MolecularDataset) -> np.ndarray:
    """Sum of per-atom values over each structure that has atoms: (S, ...)."""
    starts = dataset.ptr[:-1][dataset.counts > 0]
    return np.add.reduceat(np.asarray(values), starts, axis=0)


def virial_temperature(dataset: MolecularDataset) -> tuple[float, float] | None:
    """Temperature of the ensemble that the frames are a sample of, if it is one.

    Parameters
    ----------
    dataset
        Free structures with forces.

    Returns
    -------
    temperature, error : float
        In K; the standard error takes frames as independent, which MD frames are not. None without forces, with
        periodic boundaries or fixed atoms, or when all structures are single atoms.

    Notes
    -----
    Eq.: frames from the Boltzmann distribution of the potential that made the labels have <-F.x> = (3N - 3) kT, with x
    measured from the structure's center. Another temperature than that of the simulation says that frames and labels
    do not belong together (rMD17: frames of one potential, labels of another), or that the frames are no equilibrium.
    """
    forces = dataset.targets.get("forces")
    has_freedom = dataset.counts > 1
    if forces is None or dataset.is_periodic or not has_freedom.any():
        return None
    if dataset.fixed is not None and dataset.fixed.any():
        return None
    sizes = dataset.counts[dataset.counts > 0]
    center = np.repeat(_sums(dataset.pos, dataset) / sizes[:, None], sizes, axis=0)
    virial = -_sums((forces * (dataset.pos - center)).sum(axis=1), dataset)
    free = sizes > 1
    temperature = virial[free] / ((3 * sizes[free] - 3) * BOLTZMANN)
    error = temperature.std(ddof=1) / np.sqrt(len(temperature)) if len(temperature) > 1 else np.inf
    return float(temperature.mean()), float(error)


def exact_duplicates(dataset: MolecularDataset) -> int:
    """Number of structures that repeat the elements, positions and cell of an earlier one bit for bit."""
    seen = set()
    z, pos = np.asarray(dataset.z), np.asarray(dataset.pos)
    for i, (start, stop) in enumerate(zip(dataset.ptr[:-1], dataset.ptr[1:], strict=True)):
        digest = hashlib.blake2b(z[start:stop].tobytes(), digest_size=16)
        digest.update(pos[start:stop].tobytes())
        if dataset.cell is not None:
            digest.update(dataset.cell[i].tobytes() + dataset.pbc[i].tobytes())
        seen.add(digest.digest())
    return len(dataset) - len(seen)


def near_duplicates(dataset: MolecularDataset) -> int | None:
    """Number of structures that have a near twin among the earlier ones; None if periodic, or too many to search.

    Twins have the same composition, and their distances agree within 0.001 Å: those of the atoms to the center (sorted,
    per element) and those between atoms (sorted, per pair of elements). Neither changes with a rotation or reflection.
    """
    from scipy.spatial import cKDTree

    if dataset.is_periodic or len(dataset) > NEAR_LIMIT:
        return None
    groups: dict[bytes, list[int]] = {}
    for i, part in enumerate(np.split(np.asarray(dataset.z), dataset.ptr[1:-1])):
        groups.setdefault(np.sort(part).tobytes(), []).append(i)
    repeated = 0
    for members in groups.values():
        if len(members) == 1:
            continue
        centers = np.stack([_radii(dataset, i) for i in members])
        pairs = cKDTree(centers).query_pairs(NEAR, p=np.inf, output_type="ndarray")
        twins = {int(max(a, b)) for a, b in pairs if _are_twins(dataset, members[a], members[b])}
        repeated += len(twins)
    return repeated


def _radii(dataset: MolecularDataset, i: int) -> np.ndarray:
    """Distances of the atoms from the center, sorted within each element."""
    z, pos = _part(dataset, i)
    radii = np.linalg.norm(pos - pos.mean(axis=0), axis=1)
    return radii[np.lexsort((radii, z))]


def _are_twins(dataset: MolecularDataset, i: int, j: int) -> bool:
    return bool(np.abs(_distances(dataset, i) - _distances(dataset, j)).max(initial=0.0) < NEAR)


def _distances(dataset: MolecularDataset, i: int) -> np.ndarray:
    """Interatomic distances, sorted within each pair of elements."""
    z, pos = _part(dataset, i)
    a, b = np.triu_indices(len(z), 1)
    distance = np.linalg.norm(pos[a] - pos[b], axis=1)
    low, high = np.minimum(z[a], z[b]), np.maximum(z[a], z[b])
    return distance[np.lexsort((distance, high, low))]


def _part(dataset: MolecularDataset, i: int) -> tuple[np.ndarray, np.ndarray]:
    rows = slice(dataset.ptr[i], dataset.ptr[i + 1])
    return np.asarray(dataset.z[rows], dtype=np.int64), np.asarray(dataset.pos[rows])


def _suspicions(dataset: MolecularDataset, values: dict) -> list[str]:
    """Sentences about what looks wrong."""
    found = [f"{number:,} values of {name} are not finite" for name, number in values["not_finite"].items()]
    if values.get("force_mean", 0.0) > SUSPICIOUS_FORCE:
        found.append(f"mean |F| = {values['force_mean']:.1f} eV/Å is large: kcal/mol/Å that were not converted?")
    if "positions" not in values["not_finite"]:
        ratio = bond_length_ratio(dataset)
        if ratio is not None and not 0.6 < ratio < 1.5:
            guess = " (Bohr instead of Å?)" if 1.5 < ratio < 2.3 else " (nm instead of Å?)" if ratio < 0.2 else ""
            found.append(f"nearest neighbors are {ratio:.2f} times as far apart as covalent bonds{guess}")
    if values["exact_duplicates"]:
        found.append(
            f"{values['exact_duplicates']:,} structures repeat an earlier one: they may leak into the test set"
        )
    return found


def bond_length_ratio(dataset: MolecularDataset, samples: int = 200) -> float | None:
    """Median distance to the nearest neighbor, in units of the sum of covalent radii; None for single atoms.

    About 1 for anything bonded, 1.9 when positions are in Bohr, 0.1 in nm. Up to `samples` structures, evenly spread.
    """
    from ase.data import covalent_radii

    chosen = np.unique(np.linspace(0, len(dataset) - 1, samples).astype(int))
    ratios = []
    for i in chosen:
        z, pos = _part(dataset, i)
        if len(z) < 2 or len(z) > 500 or ((z < 0) | (z >= len(covalent_radii))).any():
            continue
        distance = np.linalg.norm(pos[:, None] - pos[None], axis=-1)
        np.fill_diagonal(distance, np.inf)
        partner = distance.argmin(axis=1)
        ratios.append(distance.min(axis=1) / (covalent_radii[z] + covalent_radii[z[partner]]))
    return float(np.median(np.concatenate(ratios))) if ratios else None
