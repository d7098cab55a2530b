"""`NDeMCalculator`: a trained model as an ASE calculator, for molecular dynamics, relaxation and everything else of ASE.

Energies and forces come from the same `Potential` and the same `Batch` as those of `NDeMModel.predict`. Between two
calls only positions go to the device: edges are made with a skin and used until an atom has moved half of it. Structures
outside of the training data are warned about (`validity.py`). Running dynamics is done by ASE, or by `ndem_zoo.dynamics`.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.data import chemical_symbols

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.ensemble import Ensemble, is_ensemble
from ndem_zoo.errors import ConfigError, DataError, RangeWarning
from ndem_zoo.featurizers.base import Structure, check_structure, geometry_of
from ndem_zoo.featurizers.radius import check_distances
from ndem_zoo.graph import Batch, make_batch, near_origin
from ndem_zoo.models.estimator import NDeMModel, check_known_elements, torch_device
from ndem_zoo.provenance import N_NEAREST
from ndem_zoo.validity import KINDS, training_range

if TYPE_CHECKING:
    from ase import Atoms

_DTYPES = {"32-true": torch.float32, "64-true": torch.float64}

#: How it is said that a distance is outside of the training data.
_WORDS = {
    "short": "nearer than any such pair in the training data",
    "unseen": "a distance that no such pair has in the training data",
    "apart": "farther from its neighbors than any atom of its element in the training data",
    "size": "farther than any atoms of a molecule in the training data",
}


@dataclass(frozen=True)
class _Edges:
    """Edges, and the structure that they were made for.

    `batch` lies on the device; `structure` and the index arrays stay on the CPU, to see what has changed. `origin` (n, 3)
    is subtracted from positions of atoms (`graph.near_origin`).
    """

    structure: Structure
    batch: Batch
    origin: np.ndarray
    src: np.ndarray
    dst: np.ndarray
    shift: np.ndarray
    pairs: np.ndarray | None

    @property
    def is_whole(self) -> bool:
        """Whether all pairs are edges."""
        return math.isinf(self.batch.cutoff)

    def fit(self, structure: Structure, skin: float) -> bool:
        """Whether the edges are complete for `structure`: same atoms and cell, and none moved by more than skin/2."""
        old = self.structure
        if not (
            np.array_equal(old.z, structure.z)
            and np.array_equal(old.pbc, structure.pbc)
            and np.array_equal(old.cell, structure.cell)
        ):
            return False
        if self.is_whole:
            return True
        return bool(np.square(structure.pos - old.pos).sum(axis=1).max() <= (0.5 * skin) ** 2)

    def lengths(self, pos: np.ndarray) -> np.ndarray:
        """Length of each edge; raises DataError if two atoms are closer than 0.1 Å. `pos` is less `origin`."""
        distance = np.linalg.norm(pos[self.src] + self.shift - pos[self.dst], axis=1)
        check_distances(self.src, self.dst, distance)
        return distance


class NDeMCalculator(Calculator):
    """ASE calculator of a fitted model: energy in eV and forces in eV/Å.

    Parameters
    ----------
    model
        A fitted `NDeMModel` or an `Ensemble`, or the path of a saved one. Its weights are copied: training it further
        does not change the calculator. An ensemble gives the mean, and ``results["energy_std"]`` in eV and
        ``results["forces_std"]`` (n, 3) in eV/Å.
    skin
        Å that the edges reach beyond the model's cutoff. A larger skin means fewer searches for neighbors and more
        edges in each step. Free molecules of up to `graph.ALL_PAIRS_UP_TO` atoms have all pairs as edges, and need
        none. Choice: 0.5.
    device
        Where to compute; default: the model's own `device`.
    precision
        ``"32-true"`` or ``"64-true"``; default: the one that the model was trained in. float64 makes long NVE runs
        smoother, at about twice the cost.

    Attributes
    ----------
    neighbor_searches : int
        How often edges have been made.
    outside : dict
        How many structures were outside of the training data, by what was: ``"element"``, ``"short"`` (a distance shorter
        than any of its pair of elements), ``"unseen"`` (a distance within 3.5 Å that its pair never had, as of a bond that
        is torn), ``"apart"`` (an atom farther from its nearest neighbors than any of its element), ``"size"`` (a molecule
        longer than any). Of large and periodic structures only those for which edges are
        made are looked at.

    Raises
    ------
    NotFittedError
        If the model has no weights.
    FileNotFoundError, FileFormatError
        If there is no model at the path, or a damaged one.
    ConfigError
        If an option is out of range.

    Notes
    -----
    `get_potential_energy` and `get_forces` raise `DataError` for positions that are not finite, atoms closer than
    0.1 Å (in a periodic or large structure: whenever edges are made), a singular periodic cell, and elements that the
    model was not trained on. There is no stress. The first structure outside of the training data in each way is warned about
    (`RangeWarning`).

    Examples
    --------
    >>> atoms.calc = NDeMCalculator("runs/ethanol/model")       # doctest: +SKIP
    >>> atoms.get_potential_energy(), atoms.get_forces()        # doctest: +SKIP
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces"]
    name = "ndem_zoo"

    def __init__(
        self,
        model: NDeMModel | Ensemble | str | os.PathLike,
        *,
        skin: float = 0.5,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= skin < math.inf:
            raise ConfigError(f"skin={skin!r} Å; it must be a number >= 0")
        if precision is not None and precision not in _DTYPES:
            raise ConfigError(f"precision={precision!r}; allowed are {', '.join(_DTYPES)}")
        model = _opened(model)
        first = model.members_[0] if isinstance(model, Ensemble) else model
        target = first._fitted().target
        if target != "energy":
            raise ConfigError(f"this model predicts {target!r}; a calculator needs one that predicts 'energy'")
        self.skin = float(skin)
        self.device = torch_device(model.device if device is None else device)
        # What was trained in half precision is used in single precision.
        self.dtype = _DTYPES.get(precision or first.resolved_["settings"]["precision"], torch.float32)
        if isinstance(model, Ensemble):
            self._predict = model.on_batches(self.device, self.dtype)
            self.implemented_properties = [*self.implemented_properties, "energy_std", "forces_std"]
        else:
            self._predict = _on_batches(model, self.device, self.dtype)
        self._cutoff = first.potential_.backbone.cutoff
        self._priors = [
            m.potential_.prior for m in getattr(model, "members_", [model]) if m.potential_.prior is not None
        ]
        self._priors = copy.deepcopy(self._priors)
        self._known, self._unknown = dict(first.reference_), first.unknown_elements
        self._range = training_range(model)
        self.outside = dict.fromkeys(KINDS, 0)
        self._edges: _Edges | None = None
        self.neighbor_searches = 0
        if first.potential_.force_mode == "none":
            self.implemented_properties = [p for p in self.implemented_properties if not p.startswith("forces")]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Put energy and forces of `atoms` into `results`; called by ASE.

        Raises
        ------
        DataError
            If the structure cannot be computed, or the result is not finite.
        """
        super().calculate(atoms, properties, system_changes)
        structure = self._checked(self.atoms)
        prediction = self._predict(self._batch(structure))
        results: dict[str, Any] = {
            name: (float(value[0]) if name.startswith("energy") else value) for name, value in prediction.items()
        }
        results["free_energy"] = energy = results["energy"]
        if not all(np.isfinite(value).all() for value in results.values()):
            raise DataError(f"the model gives the energy {energy} eV or forces that are not finite for this structure")
        self.results = results

    def _checked(self, atoms: Atoms) -> Structure:
        """The structure as arrays, if it is one that the model can compute."""
        structure = check_structure(geometry_of(atoms))
        return structure

    def _batch(self, structure: Structure) -> Batch:
        """The structure on the device, with the edges at hand if they are still complete."""
        edges = self._edges
        is_new = edges is None or not edges.fit(structure, self.skin)
        if is_new:
            edges = self._find_edges(structure)
        pos = structure.pos - edges.origin
        if is_new or edges.is_whole:  # few pairs: looking at their distances costs nothing
            self._compare(structure, edges, edges.lengths(pos))
        self._edges = edges
        pos = torch.as_tensor(pos, dtype=self.dtype).to(self.device, non_blocking=True)
        return edges.batch.replace(pos=pos)

    def _compare(self, structure: Structure, edges: _Edges, distance: np.ndarray) -> None:
        """Warn about what is outside of the training data; once for each kind, since dynamics may go on for long."""
        if edges.pairs is None:
            return
        found = self._range.check(structure.z, edges.dst, edges.pairs, distance, edges.is_whole)
        for kind, (place, length) in found.items():
            if not self.outside[kind]:
                self._warn(f"{_named(structure.z, edges, kind, place, length)}, {_WORDS[kind]}")
            self.outside[kind] += 1
        if self._unknown == "warn" and self._range.unknown(structure.z) is not None:
            self.outside["element"] += 1

    def _check_elements(self, structure: Structure) -> None:
        """Raise DataError for an element that the model has not seen, or warn about the first one."""
        if not self.outside["element"]:
            check_known_elements(structure.z, np.array([0, len(structure.z)]), self._known, self._unknown)

    @staticmethod
    def _warn(text: str) -> None:
        message = f"{text}: nothing is known about the errors there (calculator.outside counts; this is said once)"
        warnings.warn(message, RangeWarning, stacklevel=2)

    def _find_edges(self, structure: Structure) -> _Edges:
        """Search for neighbors up to cutoff + skin, once it is sure that the prior knows the structure."""
        self._check_elements(structure)
        for prior in self._priors:
            prior.check(
                MolecularDataset(
                    structure.z, structure.pos, np.array([0, len(structure.z)]),
                    cell=None if structure.cell is None else structure.cell[None],
                    pbc=None if structure.pbc is None else structure.pbc[None],
                )
            )  # fmt: skip
        self.neighbor_searches += 1
        count = np.array([len(structure.z)])
        periodic = {
            "cell": None if structure.cell is None else structure.cell[None],
            "pbc": None if structure.pbc is None else structure.pbc[None],
        }
        near = near_origin(structure.pos, count, self.dtype, **periodic)
        batch = make_batch(structure.z, near, count, self._cutoff + self.skin, **periodic, dtype=self.dtype)
        indices = batch.src.numpy(), batch.dst.numpy(), batch.shift.double().numpy()
        pairs = None if self._range is None else self._range.pairs(structure.z, *indices[:2])
        return _Edges(structure, batch.to(self.device), structure.pos - near, *indices, pairs)


def _named(z: np.ndarray, edges: _Edges, kind: str, place: int, length: float) -> str:
    """The atoms that are outside of the training data, and how far apart they are."""
    if kind == "apart":
        return f"atom {place} ({chemical_symbols[z[place]]}) has one of its {N_NEAREST} neighbors {length:.3f} Å away"
    a, b = int(edges.dst[place]), int(edges.src[place])
    return f"atoms {a} and {b} ({chemical_symbols[z[a]]}-{chemical_symbols[z[b]]}) are {length:.3f} Å apart"


def _opened(model: NDeMModel | Ensemble | str | os.PathLike) -> NDeMModel | Ensemble:
    """The model, or what is saved in a folder."""
    if isinstance(model, (NDeMModel, Ensemble)):
        return model
    return Ensemble.load(model) if is_ensemble(model) else NDeMModel.load(model)


def _on_batches(model: NDeMModel, device: torch.device, dtype: torch.dtype) -> Callable[[Batch], dict[str, np.ndarray]]:
    """Predictions of a copy of a model for batches, on the CPU in float64."""
    # Without gradients of the weights: an energy and its forces need only those of the positions.
    potential = copy.deepcopy(model._fitted()).requires_grad_(False).to(device, dtype).eval()
    potential.backbone.use_plan(model.plan, device)

    def predict(batch: Batch) -> dict[str, np.ndarray]:
        prediction = potential(batch)
        found = {"energy": prediction.value, "forces": prediction.forces}
        return {name: value.detach().double().cpu().numpy() for name, value in found.items() if value is not None}

    return predict
