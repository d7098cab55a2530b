"""Noise on coordinates: pure functions (batch, rng) -> (noisy batch, noise).

Nothing here knows what a network should make of the noise; that is an objective's matter.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ndem_zoo.graph import Batch, displace, mean_over_atoms, sum_over_atoms

SigmaSample = Literal["loguniform", "uniform"]
SigmaPer = Literal["structure", "batch"]


class Noise(NamedTuple):
    """What was done to the atoms.

    Attributes
    ----------
    epsilon : (N, 3)
        Displacement in Å; exactly 0 where `mask` is False.
    sigma : (N, 1)
        Standard deviation in Å that the structure's noise was drawn with.
    mask : (N,) bool
        True for the atoms that were moved.
    """

    epsilon: Float[Tensor, "N 3"]
    sigma: Float[Tensor, "N 1"]
    mask: Bool[Tensor, " N"]


def masked_gaussian(
    batch: Batch,
    rng: torch.Generator,
    *,
    cutoff: float,
    sigma: float | tuple[float, float],
    ratio: float = 1.0,
    sample: SigmaSample = "loguniform",
    per: SigmaPer = "structure",
    probability: float = 1.0,
    reuse_edges: bool = False,
) -> tuple[Batch, Noise]:
    """Move a random subset of the atoms by Gaussian noise.

    Parameters
    ----------
    batch
        Structures; fixed atoms are never moved.
    rng
        Source of randomness, on the batch's device.
    cutoff
        Radius in Å up to which the noisy batch's edges must be complete.
    sigma
        Standard deviation in Å, or the range (min, max) from which one is drawn.
    ratio
        Probability that an atom is moved. Of every structure at least one free atom is moved, and below 1 at least
        one is left, if it has two.
    sample, per
        How a sigma is drawn from a range, and for what: each structure, or the whole batch (as in the paper).
    probability
        That a structure is moved at all.
    reuse_edges
        Keep the edges of the batch, whatever the noise; see `graph.displace`.

    Notes
    -----
    With ``ratio=1`` the mean displacement of a structure without fixed atoms is subtracted: a translation of the whole
    structure cannot be seen. With a mask it can, and nothing is subtracted.
    """
    sigmas = draw_sigma(batch, rng, sigma, sample, per)
    mask = draw_mask(batch, rng, ratio)
    if probability < 1:
        chosen = torch.rand(batch.n_systems, generator=rng, device=batch.pos.device) < probability
        mask = mask & chosen.index_select(0, batch.system)
    normal = torch.randn(batch.pos.shape, generator=rng, device=batch.pos.device, dtype=batch.pos.dtype)
    epsilon = normal * sigmas * mask.unsqueeze(-1)
    if ratio >= 1:
        has_fixed = sum_over_atoms(batch.fixed.to(epsilon.dtype), batch) > 0  # (S,)
        # Of a structure that is not moved, all displacements are 0, and so is their mean.
        center = mean_over_atoms(epsilon, batch).masked_fill(has_fixed.unsqueeze(-1), 0.0)
        epsilon = epsilon - center.index_select(0, batch.system)
    return displace(batch, epsilon, cutoff, reuse_edges), Noise(epsilon, sigmas, mask)


def draw_sigma(
    batch: Batch, rng: torch.Generator, sigma: float | tuple[float, float], sample: SigmaSample, per: SigmaPer
) -> Float[Tensor, "N 1"]:
    """Standard deviation in Å for every atom, equal within a structure."""
    if not isinstance(sigma, (tuple, list)):
        return batch.pos.new_full((batch.z.shape[0], 1), float(sigma))
    low, high = (float(value) for value in sigma)
    n = batch.n_systems if per == "structure" else 1
    uniform = torch.rand((n, 1), generator=rng, device=batch.pos.device, dtype=batch.pos.dtype)
    drawn = low * (high / low) ** uniform if sample == "loguniform" else low + (high - low) * uniform
    return drawn.expand(batch.n_systems, 1).index_select(0, batch.system)


def draw_mask(batch: Batch, rng: torch.Generator, ratio: float) -> Bool[Tensor, " N"]:
    """Bernoulli mask over the free atoms; see `masked_gaussian` for what is guaranteed."""
    draw = torch.rand(batch.z.shape, generator=rng, device=batch.pos.device, dtype=torch.float64)
    if ratio >= 1:
        return ~batch.fixed
    low = _extreme(draw.masked_fill(batch.fixed, 2.0), batch, "amin")
    high = _extreme(draw.masked_fill(batch.fixed, -1.0), batch, "amax")
    mask = ((draw < ratio) & (draw != high)) | (draw == low)
    return mask & ~batch.fixed


def _extreme(values: Tensor, batch: Batch, reduce: str) -> Float[Tensor, " N"]:
    """Smallest or largest value of each structure, given back to its atoms."""
    start = values.new_full((batch.n_systems,), 3.0 if reduce == "amin" else -3.0)
    return start.scatter_reduce(0, batch.system, values, reduce).index_select(0, batch.system)
