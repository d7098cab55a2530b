"""The contract of a force field, sums of them, and labels less what a force field says.

Upstream: batches and datasets. Downstream: `curvature.py`, which asks what changes under a displacement, and the
estimator, which learns what is left (its keyword `prior`). Everything is float64, in eV and Å.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.graph import Batch
from ndem_zoo.physics import forces_from_energy
from ndem_zoo.registry import FORCE_FIELDS, lookup
from ndem_zoo.sampling import Collator, atom_indices, size_batches

#: Structures that are looked at side by side.
_STRUCTURES_AT_ONCE = 64

#: Å; neighbor lists of larger structures need some radius also where nobody looks at edges.
_LEAST_RADIUS = 1.0


class ClassicalPrediction(NamedTuple):
    """What a force field says about a batch.

    Attributes
    ----------
    energy : (S,) float64
        eV, with a zero of the force field's own.
    forces : (N, 3) float64
        eV/Å.
    """

    energy: Float[Tensor, " S"]
    forces: Float[Tensor, "N 3"]


class ForceField(nn.Module, ABC):
    """Energy and forces from a formula with few constants, which are buffers.

    Attributes
    ----------
    cutoff : float
        Radius in Å up to which a batch's edges must be complete; 0 where edges are not looked at.
    """

    cutoff: float = 0.0
    #: Whether its energy consists of operations of torch alone, which can be traced.
    is_traceable: ClassVar[bool] = False
    #: Whether a structure that it cannot describe is an error; else its energy is NaN, which takes no look at the numbers.
    names_unknown: bool = True
    #: Whether `fit` makes it describe the labels that it gets, and so what another force field left of them.
    is_fitted_to_forces: ClassVar[bool] = False

    @abstractmethod
    def fit(self, dataset: MolecularDataset) -> Self:
        """Take the constants, or the molecules that they are for, from training data.

        Raises
        ------
        DataError
            If the force field cannot describe a structure; names it.
        """

    @abstractmethod
    def energy(self, batch: Batch) -> Float[Tensor, " S"]:
        """Energies in eV, float64, that can be differentiated by the batch's positions."""

    def check(self, dataset: MolecularDataset) -> None:
        """Raise DataError for a structure that the fitted force field cannot describe; names it."""

    def molecules(self) -> list[list[int]]:
        """Atomic numbers of the molecules that it is made for, in their order; none: it is for all structures."""
        return []

    def forward(self, batch: Batch) -> ClassicalPrediction:
        """Energies and forces, detached."""
        with torch.enable_grad():
            pos = batch.pos.detach().double().requires_grad_()
            energy = self.energy(batch.replace(pos=pos, shift=batch.shift.double()))
            forces = forces_from_energy(energy, pos, create_graph=False)
        return ClassicalPrediction(energy.detach(), forces)

    def batches(self, dataset: MolecularDataset, at_once: int = _STRUCTURES_AT_ONCE) -> Iterator[tuple]:
        """Numbers of structures, and their batch in float64 with labels where the constants are, until all are there."""
        device = next((buffer.device for buffer in self.buffers()), torch.device("cpu"))
        cutoff = max(self.cutoff, _LEAST_RADIUS)
        collate = Collator(dataset, cutoff, torch.float64, device=device)
        for indices in size_batches(dataset, at_once, cutoff):
            yield indices, collate(indices)

    def columns(self, dataset: MolecularDataset) -> dict[str, np.ndarray]:
        """``energy`` (S,) in eV and ``forces`` (A, 3) in eV/Å of a whole dataset."""
        self.check(dataset)
        energy, forces = np.empty(len(dataset)), np.empty((len(dataset.z), 3))
        for indices, batch in self.batches(dataset):
            found = self(batch)
            energy[indices] = found.energy.cpu().numpy()
            forces[atom_indices(dataset.ptr, indices)[0]] = found.forces.cpu().numpy()
        return {"energy": energy, "forces": forces}

    def subtract(self, dataset: MolecularDataset) -> MolecularDataset:
        """The dataset with energies and forces less those of the force field: what is left to learn."""
        found = self.columns(dataset)
        less = {name: values - found[name] for name, values in dataset.targets.items() if name in found}
        return dataset.replace_targets({**dataset.targets, **less})

    def _apply(self, fn, recurse: bool = True):
        # Pitfall: Module.float() would round constants that energies of hundreds of eV are made of.
        exact = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state, prefix, *args, **keywords):
        """Tables get the shape that they were saved with: nobody knows it before."""
        for name, value in self._buffers.items():
            stored = state.get(prefix + name)
            if stored is not None and value is not None and stored.shape != value.shape:
                self._buffers[name] = torch.empty_like(stored, device=value.device)
        super()._load_from_state_dict(state, prefix, *args, **keywords)


class SumOfForceFields(ForceField):
    """Several force fields, each fitted to what the ones before it left.

    Parameters
    ----------
    parts
        In the order in which they are fitted.

    Raises
    ------
    ConfigError
        If one after the first is published: it describes whole energies, whatever the others left, and they would count
        twice.
    """

    def __init__(self, parts: list[ForceField]) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            if number and not part.is_fitted_to_forces:
                raise ConfigError(
                    f"part {number} of a sum of force fields is {type(part).__name__}, which describes whole energies: only "
                    "the first may, such as in 'mmff94+valence'; the others must be fitted to what is left"
                )
        self.parts = nn.ModuleList(parts)

    @property
    def cutoff(self) -> float:
        """The largest of the parts'."""
        return max(part.cutoff for part in self.parts)

    @property
    def is_traceable(self) -> bool:
        """Whether all parts are."""
        return all(part.is_traceable for part in self.parts)

    @property
    def names_unknown(self) -> bool:
        """Whether a structure that a part cannot describe is an error; for all parts together."""
        return any(part.names_unknown for part in self.parts)

    @names_unknown.setter
    def names_unknown(self, value: bool) -> None:
        for part in self.parts:
            part.names_unknown = value

    def molecules(self) -> list[list[int]]:
        """Atomic numbers of the molecules that the parts are made for; parts that are for some have the same."""
        return max((part.molecules() for part in self.parts), key=len)

    @property
    def force_error(self) -> Float[Tensor, ""]:
        """Scalar: error of the force components in eV/Å on structures left out of the last part's fit."""
        return self.parts[-1].force_error

    def fit(self, dataset: MolecularDataset) -> Self:
        """Fit one part after the other."""
        for number, part in enumerate(self.parts):
            part.fit(dataset)
            if number + 1 < len(self.parts):
                dataset = part.subtract(dataset)
        return self

    def energy(self, batch: Batch) -> Float[Tensor, " S"]:
        """Sum of the energies."""
        return sum(part.energy(batch) for part in self.parts)

    def forward(self, batch: Batch) -> ClassicalPrediction:
        """Sums of energies and forces."""
        found = [part(batch) for part in self.parts]
        return ClassicalPrediction(sum(f.energy for f in found), sum(f.forces for f in found))

    def check(self, dataset: MolecularDataset) -> None:
        """What each part says."""
        for part in self.parts:
            part.check(dataset)


def make_force_field(name: str) -> ForceField:
    """The force field of a name, or of several with a plus between them, such as ``"mmff94+valence"``.

    Raises
    ------
    ConfigError
        If there is none of this name; lists those that there are. For a sum, see `SumOfForceFields`.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{name!r} is no force field; allowed are {', '.join(sorted(FORCE_FIELDS))}, or a sum a+b")
    parts = [lookup(FORCE_FIELDS, part.strip(), "force field")() for part in name.split("+")]
    return parts[0] if len(parts) == 1 else SumOfForceFields(parts)


def check_complete(batch: Batch, cutoff: float, owner: str) -> None:
    """Raise ConfigError unless the batch's edges are complete up to `cutoff` Å."""
    if batch.nearest is not None or batch.cutoff < cutoff:
        raise ConfigError(
            f"{owner} needs all neighbors up to {cutoff} Å; the edges are "
            + (f"those to the {batch.nearest.number} nearest" if batch.nearest else f"complete up to {batch.cutoff} Å")
        )


def require_forces(dataset: MolecularDataset, owner: str) -> None:
    """Raise DataError unless there are structures with forces."""
    if len(dataset) == 0 or "forces" not in dataset.targets:
        raise DataError(f"{owner} is fitted to forces; the dataset has {len(dataset)} structures with {dataset.tasks}")
