"""Derivatives of the energy, norms that can be differentiated twice, and reference energies.

The only place where derivatives with respect to positions are taken. Nothing here knows a network: energies come in,
forces and Hessian-vector products go out. Unit constants are those of `ase.units`.
"""

from __future__ import annotations

import numpy as np
import torch
from ase import units
from jaxtyping import Float, Int
from torch import Tensor

from ndem_zoo.errors import DataError

#: Elements that the package knows: atomic numbers 1 to MAX_Z.
MAX_Z = 100

#: One kcal/mol in eV, and Boltzmann's constant in eV/K.
KCAL_PER_MOL = units.kcal / units.mol
BOLTZMANN = units.kB

#: Structures whose compositions are compared at a time: their table takes 80 MB.
_STRUCTURES_AT_ONCE = 100_000


def safe_norm(vectors: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    """Euclidean norm of `vectors`, of any shape, along `dim`; value and all derivatives are 0 where the vector is 0.

    Pitfall: `torch.linalg.vector_norm` of a zero vector gives NaN parameter gradients under a force loss, and adding a
    small number under the root would change every other value.
    """
    square = vectors.square().sum(dim=dim, keepdim=keepdim)
    is_zero = square == 0
    return square.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def forces_from_energy(energy: Float[Tensor, " S"], pos: Float[Tensor, "N 3"], create_graph: bool) -> Tensor:
    """Forces -dE/dpos in eV/Å from energies in eV; zeros for an energy that does not depend on positions.

    Parameters
    ----------
    energy : (S,)
        Energies of the structures; structures do not interact, so one backward pass serves all.
    pos : (N, 3)
        Positions in Å with ``requires_grad``.
    create_graph
        Whether the forces themselves can be differentiated: needed to train on them.
    """
    if not energy.requires_grad:  # a structure without edges, say
        return torch.zeros_like(pos)
    pos.forces_only = True  # says to hand-written passes (`ndem_zoo.fused`) that no gradient of a weight is wanted
    try:
        (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=create_graph, allow_unused=True)
    finally:
        del pos.forces_only
    return torch.zeros_like(pos) if gradient is None else -gradient


def hessian_vector_product(forces: Tensor, pos: Tensor, vector: Tensor) -> Tensor:
    """Product H v (N, 3) of the energy's Hessian with `vector`, from forces with a graph; eV/Å for v in Å."""
    (product,) = torch.autograd.grad(-(forces * vector).sum(), pos, retain_graph=True, allow_unused=True)
    return torch.zeros_like(pos) if product is None else product


def element_counts(
    z: Int[np.ndarray, " A"], ptr: Int[np.ndarray, " S1"], weight: Float[np.ndarray, " A"] | None = None
) -> np.ndarray:
    """How many atoms of each element every structure has, or the sum of their weights: (S, MAX_Z + 1)."""
    n = len(ptr) - 1
    cell = np.repeat(np.arange(n), np.diff(ptr)) * (MAX_Z + 1) + np.asarray(z, dtype=np.int64)
    return np.bincount(cell, weights=weight, minlength=n * (MAX_Z + 1)).reshape(n, MAX_Z + 1)


def _compositions(
    counts: np.ndarray, energy: np.ndarray, number: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different rows of `counts`, and for each the sums of `energy` and `number`."""
    rows, inverse = np.unique(counts, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    number = np.broadcast_to(number, len(inverse))
    return rows, np.bincount(inverse, weights=energy), np.bincount(inverse, weights=number)


def fit_reference_energies(
    z: np.ndarray, ptr: np.ndarray, energy: np.ndarray, weight: Float[np.ndarray, " A"] | None = None
) -> Float[np.ndarray, " Z"]:
    """Energy per element that explains the total energies best, by least squares of minimal norm.

    For structures of one composition this is their mean energy, spread over the atoms. Any other property that is nearly
    a sum over atoms can stand for the energy.

    Parameters
    ----------
    z : (A,)
        Atomic numbers of all structures.
    ptr : (S + 1,)
        Where each structure begins and ends in `z`.
    energy : (S,)
        Total energies in eV, float64.
    weight : (A,), optional
        What the constant of an atom is multiplied with in the sum; default 1.

    Returns
    -------
    reference : (MAX_Z + 1,) float64
        eV by atomic number; 0 for elements that do not occur.

    Raises
    ------
    DataError
        If an energy is not finite; names the structure.
    """
    energy = np.asarray(energy, dtype=np.float64)
    if not np.isfinite(energy).all():
        index = int(np.flatnonzero(~np.isfinite(energy))[0])
        raise DataError(f"structure {index}: energy {energy[index]} eV is not finite")

    def counts_of(i: int, stop: int) -> np.ndarray:
        atoms = slice(ptr[i], ptr[stop])
        return element_counts(z[atoms], ptr[i : stop + 1] - ptr[i], None if weight is None else weight[atoms])

    # Structures of equal composition enter as one row: far smaller, and the same minimum when weighted by their number.
    blocks = [
        _compositions(counts_of(i, stop), energy[i:stop], 1.0)
        for i in range(0, max(1, len(energy)), _STRUCTURES_AT_ONCE)
        for stop in [min(i + _STRUCTURES_AT_ONCE, len(energy))]
    ]
    rows, total, number = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    if len(blocks) > 1:
        rows, total, number = _compositions(rows, total, number)
    present = np.flatnonzero(rows.any(axis=0))
    mean, root = total / number, np.sqrt(number)
    solution, *_ = np.linalg.lstsq(rows[:, present] * root[:, None], mean * root, rcond=None)
    reference = np.zeros(MAX_Z + 1)
    reference[present] = solution
    return reference
