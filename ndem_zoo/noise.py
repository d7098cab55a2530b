"""Noise on coordinates: pure functions of a batch and a random generator.

Gaussian noise on atoms, and noise on bonds, angles and torsions, which moves parts of molecules as a whole. Nothing here
knows what a network should make of the noise; that is an objective's matter. Which atoms are bonded comes from
`topology.py`, by way of the batch's extras.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ndem_zoo.errors import ConfigError
from ndem_zoo.featurizers.terms import HINGES_PER_WORD
from ndem_zoo.graph import Batch, displace, mean_over_atoms, sum_over_atoms
from ndem_zoo.physics import safe_norm
from ndem_zoo.shares import ShareRng

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
    probability_per: SigmaPer = "structure",
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
    probability, probability_per
        That a structure is moved at all; drawn for each, or once for the whole batch.
    reuse_edges
        Keep the edges of the batch, whatever the noise; see `graph.displace`.

    Notes
    -----
    With ``ratio=1`` the mean displacement of a structure without fixed atoms is subtracted: a translation of the whole
    structure cannot be seen. With a mask it can, and nothing is subtracted.
    """
    how = {"sample": sample, "per": per, "probability": probability, "probability_per": probability_per}
    noise = gaussian(batch, rng, sigma=sigma, ratio=ratio, **how)
    return displace(batch, noise.epsilon, cutoff, reuse_edges), noise


def gaussian(
    batch: Batch,
    rng: torch.Generator,
    *,
    sigma: float | tuple[float, float],
    ratio: float = 1.0,
    sample: SigmaSample = "loguniform",
    per: SigmaPer = "structure",
    probability: float = 1.0,
    probability_per: SigmaPer = "structure",
) -> Noise:
    """The noise of `masked_gaussian`, sigma in Å, without moving anything; of a share of a batch: its part of the batch's."""
    if isinstance(rng, ShareRng):
        how = {"sample": sample, "per": per, "probability": probability, "probability_per": probability_per}
        noise = gaussian(rng.cut.whole, rng.common, sigma=sigma, ratio=ratio, **how)
        return Noise(*(rows.index_select(0, rng.cut.atoms) for rows in noise))
    sigmas = draw_sigma(batch, rng, sigma, sample, per)
    mask = draw_mask(batch, rng, ratio)
    if probability < 1:
        n = batch.n_systems if probability_per == "structure" else 1
        chosen = torch.rand(n, generator=rng, device=batch.pos.device, dtype=batch.pos.dtype) < probability
        mask = mask & chosen.expand(batch.n_systems).index_select(0, batch.system)
    normal = torch.randn(batch.pos.shape, generator=rng, device=batch.pos.device, dtype=batch.pos.dtype)
    epsilon = normal * sigmas * mask.unsqueeze(-1)
    if ratio >= 1:
        has_fixed = sum_over_atoms(batch.fixed.to(epsilon.dtype), batch) > 0  # (S,)
        # Of a structure that is not moved, all displacements are 0, and so is their mean.
        center = mean_over_atoms(epsilon, batch).masked_fill(has_fixed.unsqueeze(-1), 0.0)
        epsilon = epsilon - center.index_select(0, batch.system)
    return Noise(epsilon, sigmas, mask)


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


def for_structures(batch: Batch, rng: torch.Generator, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
    """What is drawn for structures: a row for each, (S, ...); of a share of a batch, its part of what the whole batch gets.

    Parameters
    ----------
    batch
        The structures.
    rng
        Source of randomness, on the batch's device.
    draw
        Draws (n, ...) for n structures from a generator.
    """
    if isinstance(rng, ShareRng):
        return draw(rng.cut.whole.n_systems, rng.common).index_select(0, rng.cut.structures)
    return draw(batch.n_systems, rng)


def _extreme(values: Tensor, batch: Batch, reduce: str) -> Float[Tensor, " N"]:
    """Smallest or largest value of each structure, given back to its atoms."""
    start = values.new_full((batch.n_systems,), 3.0 if reduce == "amin" else -3.0)
    return start.scatter_reduce(0, batch.system, values, reduce).index_select(0, batch.system)


# ---------------------------------------------------------------------------------- noise on bonds, angles and torsions


class InternalSigmas(NamedTuple):
    """Standard deviations of the noise on internal coordinates; 0 leaves a kind alone.

    Attributes
    ----------
    rotor
        Of the torsions about rotatable bonds, in degrees.
    bond
        Of the lengths of bonds in no ring, in Å.
    bend
        Of one angle at each of these bonds, in degrees.
    torsion
        Of the torsion of each of these bonds about the one before it, in degrees.
    """

    rotor: float
    bond: float = 0.0
    bend: float = 0.0
    torsion: float = 0.0


def internal_displacement(batch: Batch, rng: torch.Generator, sigmas: InternalSigmas) -> Float[Tensor, "N 3"]:
    """Draw noise on internal coordinates, and return by how many Å it moves each atom.

    Parameters
    ----------
    batch
        Molecules with the extras ``rotors``, ``hinges`` and ``sides`` (`topology.with_internal_coordinates`).
    rng
        Source of randomness, on the batch's device.
    sigmas
        How much.

    Raises
    ------
    ConfigError
        If the batch lacks these extras.

    Notes
    -----
    A hinge is a bond j-k in no ring; its smaller side, that of k, moves as a rigid body. It is turned about j-k (rotors),
    about the normal of i-j-k (the angle), about i-j (the torsion of k), and shifted along j-k (the length): four movements
    that leave all other lengths, and the angles within either side, as they are. Hinges are treated one after the other,
    each where those before have put it. Sides with a fixed atom stay. Angles at bonds on a straight line with the one
    before have no normal, and stay.
    """
    extras = _internal_extras(batch)
    if not any(sigmas):
        return torch.zeros_like(batch.pos)
    starts = batch.starts
    n_rotors = (extras["rotors"][..., 0] >= 0).sum(dim=1)
    only_rotors = not (sigmas.bond or sigmas.bend or sigmas.torsion)
    number = min(extras["rotors"].shape[1], extras["hinges"].shape[1]) if only_rotors else extras["hinges"].shape[1]
    scale = [math.radians(sigmas.rotor), math.radians(sigmas.bend), math.radians(sigmas.torsion), sigmas.bond]
    place = {"device": batch.pos.device, "dtype": batch.pos.dtype}
    draws = for_structures(batch, rng, lambda n, source: torch.randn((n, number, 4), generator=source, **place))
    # Numbers, not a tensor of them: copying one to a GPU would wait for it.
    draws = torch.stack([draws[..., kind] * sigma for kind, sigma in enumerate(scale)], dim=-1)
    pos = batch.pos
    for h in range(number):
        hinge = extras["hinges"][:, h].long()  # (S, 3)
        word, bit = divmod(h, HINGES_PER_WORD)
        moved = ((extras["sides"][:, word] >> bit) & 1).bool()  # (N,)
        is_stuck = sum_over_atoms((moved & batch.fixed).to(pos.dtype), batch) > 0
        spin, bend, torsion, stretch = draws[:, h].unbind(-1)
        amounts = torch.stack([spin.masked_fill(h >= n_rotors, 0.0), bend, torsion, stretch], dim=-1)
        amounts = amounts.masked_fill((is_stuck | (hinge[:, 2] < 0)).unsqueeze(-1), 0.0)
        pos = _move_side(pos, batch, starts, hinge, moved, amounts)
    return pos - batch.pos


def _internal_extras(batch: Batch) -> dict[str, Tensor]:
    """The extras that tell which parts of a molecule can be moved."""
    names = ("rotors", "hinges", "sides")
    missing = [name for name in names if name not in batch.extras]
    if missing:
        raise ConfigError(
            f"the batch has no extras {', '.join(missing)}, so that nobody knows what its bonds are: prepare the dataset with "
            "ndem_zoo.topology.with_internal_coordinates, as estimators do, or choose an objective that needs no bonds"
        )
    return {name: batch.extras[name] for name in names}


def _move_side(
    pos: Float[Tensor, "N 3"],
    batch: Batch,
    starts: Tensor,
    hinge: Tensor,
    moved: Bool[Tensor, " N"],
    amounts: Float[Tensor, "S 4"],
) -> Float[Tensor, "N 3"]:
    """Positions after one hinge of each structure: turned by three angles about j, and shifted along the bond."""
    i, j, k = (pos.index_select(0, starts + atom.clamp(min=0)) for atom in hinge.unbind(-1))
    spin, bend, torsion, stretch = amounts.unbind(-1)
    has_i = hinge[:, 0] >= 0
    arm, bond = (i - j) * has_i.unsqueeze(-1), k - j
    normal = torch.linalg.cross(arm, bond)
    turns = [(bond, spin), (normal, bend), (arm, torsion)]
    after = bond
    arms = pos - j.index_select(0, batch.system)
    for axis, angle in turns:
        length = safe_norm(axis)
        # Choice: an axis shorter than 1e-3 is none, such as the normal of three atoms on a line.
        angle = angle.masked_fill(length < 1e-3, 0.0)
        axis = axis / length.clamp(min=1e-3).unsqueeze(-1)
        after = rotate(after, axis, angle)
        arms = rotate(arms, axis.index_select(0, batch.system), angle.index_select(0, batch.system))
    shift = after / safe_norm(after, keepdim=True).clamp(min=1e-3) * stretch.unsqueeze(-1)
    turned = (j + shift).index_select(0, batch.system) + arms
    # What is not turned keeps its positions to the last bit.
    moved = moved & (amounts != 0).any(dim=-1).index_select(0, batch.system)
    return torch.where(moved.unsqueeze(-1), turned, pos)


def rotate(
    vectors: Float[Tensor, "M 3"], axis: Float[Tensor, "M 3"], angle: Float[Tensor, " M"]
) -> Float[Tensor, "M 3"]:
    """Vectors turned about unit axes by angles in radians, right-handed (Rodrigues' formula)."""
    cos, sin = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
    along = (vectors * axis).sum(-1, keepdim=True) * axis
    # Where the angle is 0 this is the vector itself, whatever the axis.
    return torch.lerp(along, vectors, cos) + torch.linalg.cross(axis, vectors) * sin
