"""`NDeMCalculator`: a trained model as an ASE calculator, for molecular dynamics, relaxation and everything else of ASE.

Energies and forces come from the same `Potential` and the same `Batch` as those of `NDeMModel.predict`. Between two
calls only positions go to the device: edges are made with a skin and used until an atom has moved half of it. Running
dynamics is done by ASE, or by `ndem_zoo.dynamics`.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.featurizers.base import Structure, check_structure, geometry_of
from ndem_zoo.featurizers.radius import check_distances
from ndem_zoo.graph import Batch, make_batch, near_origin
from ndem_zoo.models.estimator import NDeMModel, check_known_elements, torch_device

if TYPE_CHECKING:
    from ase import Atoms

_DTYPES = {"32-true": torch.float32, "64-true": torch.float64}


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

    def fit(self, structure: Structure, skin: float) -> bool:
        """Whether the edges are complete for `structure`: same atoms and cell, and none moved by more than skin/2."""
        old = self.structure
        if not (
            np.array_equal(old.z, structure.z)
            and np.array_equal(old.pbc, structure.pbc)
            and np.array_equal(old.cell, structure.cell)
        ):
            return False
        if math.isinf(self.batch.cutoff):  # all pairs
            return True
        return bool(np.square(structure.pos - old.pos).sum(axis=1).max() <= (0.5 * skin) ** 2)

    def check_overlap(self, pos: np.ndarray) -> None:
        """Raise DataError if two atoms are closer than 0.1 Å; `pos` is less `origin`."""
        check_distances(self.src, self.dst, np.linalg.norm(pos[self.src] + self.shift - pos[self.dst], axis=1))


class NDeMCalculator(Calculator):
    """ASE calculator of a fitted model: energy in eV and forces in eV/Å.

    Parameters
    ----------
    model
        A fitted `NDeMModel`, or the path of a saved one. Its weights are copied: training it further does not change
        the calculator.
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
    model was not trained on. There is no stress.

    Examples
    --------
    >>> atoms.calc = NDeMCalculator("runs/ethanol/model")       # doctest: +SKIP
    >>> atoms.get_potential_energy(), atoms.get_forces()        # doctest: +SKIP
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces"]
    name = "ndem_zoo"

    def __init__(
        self,
        model: NDeMModel | str | os.PathLike,
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
        model = model if isinstance(model, NDeMModel) else NDeMModel.load(model)
        # Copied, and without gradients of the weights: an energy and its forces need only those of the positions.
        potential = copy.deepcopy(model._fitted()).requires_grad_(False)
        if potential.target != "energy":
            raise ConfigError(
                f"this model predicts {potential.target!r}; a calculator needs one that predicts 'energy'"
            )
        self.skin = float(skin)
        self.device = torch_device(model.device if device is None else device)
        # What was trained in half precision is used in single precision.
        self.dtype = _DTYPES.get(precision or model.resolved_["settings"]["precision"], torch.float32)
        self._potential = potential.to(self.device, self.dtype).eval()
        self._potential.backbone.use_plan(model.plan, self.device)
        self._known, self._unknown = dict(model.reference_), model.unknown_elements
        self._edges: _Edges | None = None
        self.neighbor_searches = 0
        if potential.force_mode == "none":
            self.implemented_properties = ["energy", "free_energy"]

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
        prediction = self._potential(self._batch(structure))
        energy = prediction.energy.item()
        results: dict[str, Any] = {"energy": energy, "free_energy": energy}
        if prediction.forces is not None:
            results["forces"] = prediction.forces.detach().double().cpu().numpy()
        if not all(np.isfinite(value).all() for value in results.values()):
            raise DataError(f"the model gives the energy {energy} eV or forces that are not finite for this structure")
        self.results = results

    def _checked(self, atoms: Atoms) -> Structure:
        """The structure as arrays, if it is one that the model can compute."""
        structure = check_structure(geometry_of(atoms))
        check_known_elements(structure.z, np.array([0, len(structure.z)]), self._known, self._unknown)
        return structure

    def _batch(self, structure: Structure) -> Batch:
        """The structure on the device, with the edges at hand if they are still complete."""
        edges = self._edges
        if edges is None or not edges.fit(structure, self.skin):
            edges = self._find_edges(structure)
            edges.check_overlap(structure.pos - edges.origin)
            self._edges = edges
        elif math.isinf(edges.batch.cutoff):  # few pairs: looking at their distances costs nothing
            edges.check_overlap(structure.pos - edges.origin)
        pos = torch.as_tensor(structure.pos - edges.origin, dtype=self.dtype).to(self.device, non_blocking=True)
        return edges.batch.replace(pos=pos)

    def _find_edges(self, structure: Structure) -> _Edges:
        """Search for neighbors up to cutoff + skin, once it is sure that the prior knows the structure."""
        if self._potential.prior is not None:
            self._potential.prior.check(
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
        cutoff = self._potential.backbone.cutoff + self.skin
        batch = make_batch(structure.z, near, count, cutoff, **periodic, dtype=self.dtype)
        indices = batch.src.numpy(), batch.dst.numpy(), batch.shift.double().numpy()
        return _Edges(structure, batch.to(self.device), structure.pos - near, *indices)
