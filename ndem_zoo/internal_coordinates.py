"""Lengths, angles and torsions of molecules on the device, and a classical energy of them: a spring for each.

Which atoms take part is in the batch's extras (`topology.py`, `featurizers/terms.py`). The spring constants are those of
Lindh's model Hessian, which need elements and distances only. `objectives/slide.py` learns the forces of this energy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from ase import units
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch
from ndem_zoo.physics import safe_norm

#: R. Lindh, A. Bernhardsson, G. Karlström, P.-Å. Malmqvist, Chem. Phys. Lett. 241, 423 (1995): constants in Hartree (per
#: bohr² for lengths), and by rows of the periodic table (1, 2, 3 and below) decay in 1/bohr² and distance in bohr.
LINDH_BOND, LINDH_ANGLE, LINDH_TORSION = 0.45, 0.15, 0.005

#: Lindh's constant of a bond of the length that he takes for its elements, in eV/Å².
BOND_STIFFNESS = LINDH_BOND * units.Hartree / units.Bohr**2
LINDH_DECAY = ((1.0, 0.3949, 0.3949), (0.3949, 0.28, 0.28), (0.3949, 0.28, 0.28))
LINDH_DISTANCE = ((1.35, 2.10, 2.53), (2.10, 2.87, 3.40), (2.53, 3.40, 3.40))

#: A torsion about or next to a bond angle whose sine is smaller has no meaning. Choice: 170 degrees and beyond.
SMALLEST_SINE = math.sin(math.radians(170.0))


class Coordinates(NamedTuple):
    """Internal coordinates of a batch; rows of padding hold 0.

    Attributes
    ----------
    lengths : (S, B)
        Of bonds, in Å.
    angles : (S, A)
        In radians.
    torsions : (S, T)
        In radians, from -pi to pi.
    is_torsion : (S, T) bool
        False for padding, and where the atoms are nearly on a line.
    """

    lengths: Float[Tensor, "S B"]
    angles: Float[Tensor, "S A"]
    torsions: Float[Tensor, "S T"]
    is_torsion: Bool[Tensor, "S T"]


class Terms(NamedTuple):
    """Atoms of the internal coordinates as rows of a batch, 0 where there is none, and which there are."""

    bonds: Int[Tensor, "S B 2"]
    angles: Int[Tensor, "S A 3"]
    torsions: Int[Tensor, "S T 4"]
    is_bond: Bool[Tensor, "S B"]
    is_angle: Bool[Tensor, "S A"]
    is_torsion: Bool[Tensor, "S T"]


class Constants(NamedTuple):
    """Spring constants: (S, B) eV/Å², (S, A) and (S, T) eV/rad²; 0 for padding."""

    bonds: Float[Tensor, "S B"]
    angles: Float[Tensor, "S A"]
    torsions: Float[Tensor, "S T"]


def terms_of(batch: Batch) -> Terms:
    """The terms in a batch's extras.

    Raises
    ------
    ConfigError
        If it has none.
    """
    names = ("bonds", "angles", "torsions")
    missing = [name for name in names if name not in batch.extras]
    if missing:
        raise ConfigError(
            f"the batch has no extras {', '.join(missing)}: prepare the dataset with ndem_zoo.topology.add_terms, as estimators "
            "do, or choose an objective that needs no bonds"
        )
    starts = batch.starts.reshape(-1, 1, 1)
    local = [batch.extras[name].long() for name in names]
    there = [atoms[..., 0] >= 0 for atoms in local]
    rows = [(atoms + starts) * mask.unsqueeze(-1) for atoms, mask in zip(local, there, strict=True)]
    return Terms(*rows, *there)


def coordinates(pos: Float[Tensor, "N 3"], terms: Terms) -> Coordinates:
    """Internal coordinates of positions in Å; can be differentiated."""
    first, second = (pos[terms.bonds[..., column]] for column in range(2))
    i, j, k = (pos[terms.angles[..., column]] for column in range(3))
    torsions, is_torsion = _torsions(*(pos[terms.torsions[..., column]] for column in range(4)))
    is_torsion = is_torsion & terms.is_torsion
    angles = _angles(i - j, k - j, terms.is_angle)
    return Coordinates(safe_norm(second - first), angles, torsions * is_torsion, is_torsion)


def _angles(one: Tensor, other: Tensor, there: Bool[Tensor, "S A"]) -> Tensor:
    """Angles between vectors, exact also near 0 and pi; 0 where there is none."""
    # Pitfall: atan2(0, 0) has no derivative, and a mask afterwards would not keep it from being NaN.
    dot = (one * other).sum(-1).masked_fill(~there, 1.0)
    return torch.atan2(safe_norm(torch.linalg.cross(one, other)), dot)


def _torsions(i: Tensor, j: Tensor, k: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """Torsions about j-k by IUPAC's sign, and where they mean something."""
    before, bond, after = j - i, k - j, l - k
    one, other = torch.linalg.cross(before, bond), torch.linalg.cross(bond, after)
    lengths = [safe_norm(vector) for vector in (before, bond, after)]
    there = (safe_norm(one) > SMALLEST_SINE * lengths[0] * lengths[1]) & (
        safe_norm(other) > SMALLEST_SINE * lengths[1] * lengths[2]
    )
    sine = lengths[1] * (before * other).sum(-1)
    cosine = (one * other).sum(-1)
    return torch.atan2(sine.masked_fill(~there, 0.0), cosine.masked_fill(~there, 1.0)), there


def lindh_constants(z: Int[Tensor, " N"], pos: Float[Tensor, "N 3"], terms: Terms) -> Constants:
    """Spring constants of Lindh's model Hessian at a geometry in Å.

    Eq. rho_ij = exp(a_ij (r0_ij² - r_ij²)); k_ij = 0.45 rho_ij, k_ijk = 0.15 rho_ij rho_jk and
    k_ijkl = 0.005 rho_ij rho_jk rho_kl, in Hartree and bohr.
    """

    def rho(a: Tensor, b: Tensor) -> Tensor:
        return _lindh_rho(z[a], z[b], (pos[a] - pos[b]).square().sum(-1))

    bonds, angles, torsions = (t.unbind(-1) for t in (terms.bonds, terms.angles, terms.torsions))
    stretch = BOND_STIFFNESS * rho(*bonds)
    bend = LINDH_ANGLE * units.Hartree * rho(*angles[:2]) * rho(*angles[1:])
    twist = LINDH_TORSION * units.Hartree * rho(*torsions[:2]) * rho(*torsions[1:3]) * rho(*torsions[2:])
    return Constants(stretch * terms.is_bond, bend * terms.is_angle, twist * terms.is_torsion)


def lindh_stiffness(
    first: Int[Tensor, " E"], second: Int[Tensor, " E"], distance: Float[Tensor, " E"]
) -> Float[Tensor, " E"]:
    """Spring constants of Lindh's model Hessian in eV/Å² of pairs of atomic numbers at distances in Å."""
    return BOND_STIFFNESS * _lindh_rho(first, second, distance.square())


def _lindh_rho(first: Tensor, second: Tensor, square: Tensor) -> Tensor:
    """exp(a (r0² - r²)) of pairs of atomic numbers at squared distances in Å²."""
    rows = _periodic_rows(first), _periodic_rows(second)
    decay, distance = (_by_rows(table, *rows, square) for table in (LINDH_DECAY, LINDH_DISTANCE))
    return torch.exp(decay * (distance.square() - square / units.Bohr**2))


def _periodic_rows(z: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """0 for hydrogen and helium, 1 for lithium to neon, 2 for all others."""
    return (z > 2).long() + (z > 10).long()


def _by_rows(table: tuple[tuple[float, ...], ...], a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Entries of a table for rows of the periodic table, in the dtype of `like`."""
    # Choice: sums of comparisons with numbers; a table on the device would have to be copied there, and be waited for.
    values = torch.zeros_like(like)
    for i, numbers in enumerate(table):
        for j, number in enumerate(numbers):
            values = values.masked_fill((a == i) & (b == j), number)
    return values


def spring_energy(
    pos: Float[Tensor, "N 3"], rest: Coordinates, constants: Constants, terms: Terms
) -> Float[Tensor, " S"]:
    """Energy in eV of springs in all internal coordinates at positions in Å: 1/2 sum of k (q - q_rest)², torsions the shorter way round."""
    now = coordinates(pos, terms)
    twist = torch.remainder(now.torsions - rest.torsions + math.pi, 2 * math.pi) - math.pi
    twist = twist * (now.is_torsion & rest.is_torsion)
    energies = (
        constants.bonds * (now.lengths - rest.lengths).square(),
        constants.angles * (now.angles - rest.angles).square(),
        constants.torsions * twist.square(),
    )
    return sum(energy.sum(dim=1) for energy in energies) / 2


def spring_forces(batch: Batch, displacement: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """Forces in eV/Å on displaced atoms, when springs of Lindh's strength are at rest where the batch has the atoms.

    Raises
    ------
    ConfigError
        If the batch has no terms.
    """
    terms = terms_of(batch)
    with torch.no_grad():
        rest, constants = coordinates(batch.pos, terms), lindh_constants(batch.z, batch.pos, terms)
    with torch.enable_grad():
        pos = (batch.pos + displacement).detach().requires_grad_()
        energy = spring_energy(pos, rest, constants, terms)
        (gradient,) = torch.autograd.grad(energy.sum(), pos)
    return -gradient
