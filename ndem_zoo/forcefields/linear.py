"""Force fields whose energy is linear in their constants, fitted to forces by ridge regression in closed form.

The strength of the ridge is chosen by cross-validation over structures, so the error on unseen structures is known, too.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import DataError
from ndem_zoo.forcefields.base import ForceField, require_forces
from ndem_zoo.graph import Batch

#: Choice: structures that a fit looks at, evenly spaced, besides the first of every kind; there are a few hundred constants.
MAX_STRUCTURES = 1000

#: Choice: what the ridge is chosen from, relative to the mean square of a standardized column.
RIDGES = tuple(10.0**power for power in range(-6, 1))

#: Edges times derivatives that are held at a time: some 100 MB with the eight or so numbers of an edge.
_NUMBERS_AT_ONCE = 1_000_000

#: Choice: parts of the data for the cross-validation.
FOLDS = 5


class LinearForceField(ForceField):
    """E = features . coefficients.

    Attributes
    ----------
    coefficients : (P,)
        eV; the features have no unit.
    force_error : scalar
        Root mean square of the force components' error in eV/Å on structures left out of the fit.
    """

    is_fitted_to_forces: ClassVar[bool] = True
    is_traceable: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("coefficients", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("force_error", torch.zeros((), dtype=torch.float64))

    @abstractmethod
    def first_of_kinds(self, dataset: MolecularDataset) -> Int[np.ndarray, " K"]:
        """Structures that no fit may leave out, or something that the others do not have would be unknown."""

    @abstractmethod
    def prepare(self, dataset: MolecularDataset) -> None:
        """Set everything but the coefficients."""

    @abstractmethod
    def features(self, batch: Batch) -> Float[Tensor, "S P"]:
        """What the energy is linear in, float64, differentiable by positions."""

    def energy(self, batch: Batch) -> Float[Tensor, " S"]:
        """Energies in eV."""
        return self.features(batch) @ self.coefficients

    def fit(self, dataset: MolecularDataset) -> Self:
        """Fit the coefficients to forces.

        Raises
        ------
        DataError
            If there are no forces, or one is not finite.
        """
        name = type(self).__name__
        require_forces(dataset, name)
        if len(dataset) > MAX_STRUCTURES:
            spaced = np.linspace(0, len(dataset) - 1, MAX_STRUCTURES).astype(np.int64)
            dataset = dataset.select(np.union1d(spaced, self.first_of_kinds(dataset)))
        self.prepare(dataset)
        folds: list[_Sums | None] = [None] * min(FOLDS, len(dataset))
        for number, (_, batch) in enumerate(self.batches(dataset, max(1, -(-len(dataset) // 20)))):
            found = _Sums.of(self._design(batch), batch.targets["forces"], batch.fixed)
            slot = number % len(folds)
            folds[slot] = found if folds[slot] is None else folds[slot] + found
        coefficients, error = ridge([fold for fold in folds if fold is not None])
        if not bool(torch.isfinite(coefficients).all()):
            raise DataError(f"{name}: the training forces are not all finite, or the geometries are degenerate")
        self.coefficients, self.force_error = coefficients, error
        return self

    def _design(self, batch: Batch) -> Float[Tensor, "P N 3"]:
        """Forces that each feature would make with a coefficient of 1 eV.

        A structure has fewer coordinates than there are features, or the other way round: derivatives are taken along the
        fewer. Structures do not see each other, so one coordinate of each is moved at a time.
        """
        if not len(self.coefficients):
            return batch.pos.new_zeros(0, len(batch.z), 3)
        n_atoms, place = batch.n_atoms, batch.places
        if 3 * int(n_atoms.max()) < len(self.coefficients):
            moves = torch.eye(3 * int(n_atoms.max()), dtype=torch.float64).view(-1, int(n_atoms.max()), 3)[:, place]

            def along(move: Tensor) -> Tensor:
                return torch.func.jvp(lambda pos: self.features(batch.replace(pos=pos)), (batch.pos,), (move,))[1]

            found = torch.func.vmap(along, chunk_size=self._at_once(batch))(moves)  # (3 n, S, P)
            rows = (3 * place.unsqueeze(-1) + torch.arange(3)).flatten()
            return -found[rows, batch.system.repeat_interleave(3)].T.reshape(-1, len(batch.z), 3)
        with torch.enable_grad():
            pos = batch.pos.detach().requires_grad_()
            features = self.features(batch.replace(pos=pos)).sum(0)
            units = torch.eye(len(features), dtype=features.dtype).split(self._at_once(batch))
            found = [
                torch.autograd.grad(features, pos, unit, is_grads_batched=True, retain_graph=True)[0] for unit in units
            ]
        return -torch.cat(found)

    @staticmethod
    def _at_once(batch: Batch) -> int:
        """How many derivatives are taken side by side: each holds some numbers for every edge."""
        return max(1, _NUMBERS_AT_ONCE // max(len(batch.src), 3 * len(batch.z)))


class _Sums:
    """Normal equations of some structures: B^T B, B^T y, y^T y and the number of equations."""

    def __init__(self, square: Tensor, right: Tensor, total: Tensor, number: int) -> None:
        self.square, self.right, self.total, self.number = square, right, total, number

    @classmethod
    def of(cls, design: Float[Tensor, "P N 3"], forces: Float[Tensor, "N 3"], fixed: Tensor) -> _Sums:
        """Those of one batch; fixed atoms do not count."""
        rows = design[:, ~fixed].flatten(1)
        y = forces[~fixed].flatten()
        return cls(rows @ rows.T, rows @ y, y @ y, len(y))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.square + other.square, self.right + other.right, self.total + other.total, self.number + other.number
        )

    def without(self, other: _Sums) -> _Sums:
        """The sums of all the others."""
        return _Sums(
            self.square - other.square, self.right - other.right, self.total - other.total, self.number - other.number
        )

    def solve(self, strength: float, unit: Tensor) -> Tensor:
        """Coefficients for one ridge; columns are in units of `unit`, so that it means the same for all of them."""
        scaled = self.square / unit / unit[:, None]
        scaled.diagonal().add_(strength * self.number)
        return torch.linalg.solve(scaled, self.right / unit) / unit

    def error(self, coefficients: Tensor) -> Tensor:
        """Sum of squared errors."""
        return self.total - 2 * coefficients @ self.right + coefficients @ self.square @ coefficients


def ridge(folds: list[_Sums]) -> tuple[Float[Tensor, " P"], Float[Tensor, ""]]:
    """Coefficients with the ridge that predicts left-out folds best, and its root mean square error there."""
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    # A feature that never moves an atom gets the unit 1 and the coefficient 0.
    unit = (total.square.diagonal() / total.number).clamp(min=0).sqrt()
    unit = torch.where(unit > 1e-10, unit, torch.ones_like(unit))
    if len(folds) == 1:
        best = RIDGES[len(RIDGES) // 2]
        found = total.solve(best, unit)
        return found, (total.error(found).clamp(min=0) / total.number).sqrt()
    errors = {
        strength: sum(fold.error(total.without(fold).solve(strength, unit)) for fold in folds) for strength in RIDGES
    }
    best = min(errors, key=lambda strength: float(errors[strength]))
    return total.solve(best, unit), (errors[best].clamp(min=0) / total.number).sqrt()
