"""SliDe: learn the forces of a classical energy of bonds, angles and torsions on molecules that are bent out of shape.

Ni et al., "Sliced Denoising: A Physics-Informed Molecular Pre-Training Method", ICLR 2024. Noise on internal coordinates
gives X~; the target is the force of springs that are at rest at X. A second head, on X~ with Gaussian noise on top,
predicts this noise (the paper's regularizer, Frad).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, displace, make_batch
from ndem_zoo.internal_coordinates import spring_forces
from ndem_zoo.models.potential import Potential
from ndem_zoo.noise import InternalSigmas, internal_displacement
from ndem_zoo.objectives.base import NoiseOptions, Objective, check_not_negative, mean_of_rows
from ndem_zoo.topology import with_internal_coordinates

#: Structures of the training data from which the size of the forces is taken, and the seed of their noise.
_MEASURED, _SEED = 256, 0


@dataclass(frozen=True)
class SliDeOptions(NoiseOptions):
    """Options of `SliDe`, besides those of the Gaussian noise of its regularizer.

    Attributes
    ----------
    sigma
        Of the regularizer's noise, in Å (SliDe: 0.04).
    rotor_sigma, bond_sigma, bend_sigma, torsion_sigma
        Noise on torsions about rotatable bonds, lengths, angles and other torsions, in degrees and Å (SliDe: 1 rad, 0.058 Å,
        0.129 rad and 0.18 rad).
    denoising_weight
        Weight of the regularizer beside the forces; 0 saves its pass. Choice: 1; no source gives it.
    """

    sigma: float | tuple[float, float] = 0.04
    rotor_sigma: float = 57.3
    bond_sigma: float = 0.058
    bend_sigma: float = 7.39
    torsion_sigma: float = 10.3
    denoising_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rotor_sigma", "bond_sigma", "bend_sigma", "torsion_sigma", "denoising_weight"):
            check_not_negative(name, getattr(self, name))
        if not any(self.internal_sigmas):
            raise ConfigError("the sigmas of all internal coordinates are 0: there are no forces to learn")

    @property
    def internal_sigmas(self) -> InternalSigmas:
        """Noise on the internal coordinates."""
        return InternalSigmas(self.rotor_sigma, self.bond_sigma, self.bend_sigma, self.torsion_sigma)


class SliDe(Objective):
    """Supervised terms on the clean structure, the forces of springs on a bent one, and the noise on top of that.

    Notes
    -----
    The springs have the constants of Lindh's model Hessian; the paper's are those of OpenFF Sage, which this package does
    not need. The paper compares forces along 128 random directions, with finite differences for the energy's slopes; the
    mean over directions is the mean square of the whole difference, which is what is minimized here, with exact forces.
    """

    Options: ClassVar[type] = SliDeOptions

    def prepare(self, dataset: MolecularDataset) -> MolecularDataset:
        """The dataset with its bonds, angles and torsions, and the parts of molecules that they connect."""
        return with_internal_coordinates(dataset)

    def build(self, potential: Potential, dataset: Any = None) -> None:
        """Make the heads, and measure how large the forces of the springs are."""
        self.force_head = potential.backbone.vector_head()
        self.noise_head = potential.backbone.vector_head() if self.options.denoising_weight else None
        size = 1.0 if dataset is None else self._size_of_forces(dataset)  # loaded afterwards
        self.register_buffer("size", torch.tensor(size, dtype=torch.float64))

    def _size_of_forces(self, dataset: MolecularDataset) -> float:
        """Root mean square of the target's components in eV/Å, on some of the training data; 1 if there are none."""
        part = dataset.select(np.arange(min(_MEASURED, len(dataset))))
        extras = {name: part.extras[name] for name in ("bonds", "angles", "torsions", "rotors", "hinges", "sides")}
        batch = make_batch(part.z, part.pos, part.counts, 1.0, search=False, extras=extras, dtype=torch.float64)
        forces = self.target(batch, torch.Generator().manual_seed(_SEED))[1]
        return float(forces.square().mean().sqrt()) or 1.0

    def target(self, batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A displacement (N, 3) in Å along internal coordinates, and the springs' forces (N, 3) there, in eV/Å."""
        displacement = internal_displacement(batch, rng, self.options.internal_sigmas)
        return displacement, spring_forces(batch, displacement)

    def forward(self, potential: Potential, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms ``energy``, ``forces``, ``springs`` and, with the regularizer, ``denoising``."""
        options, weight, cutoff = self.options, self.current_weight(), potential.backbone.cutoff
        terms = self.supervised.terms(
            potential(batch, need_forces=self.supervised.force_weight > 0), batch, potential.scale
        )
        if weight == 0:
            return terms
        displacement, forces = self.target(batch, rng)
        bent = displace(batch, displacement, cutoff, options.reuse_edges)
        residual = self.force_head(potential.backbone(bent), bent) - forces / self.size.to(forces.dtype)
        terms["springs"] = weight * mean_of_rows(residual.square(), ~batch.fixed)
        if self.noise_head is not None:
            noise = options.draw(batch, rng)
            noisy = displace(batch, displacement + noise.epsilon, cutoff, options.reuse_edges)
            residual = self.noise_head(potential.backbone(noisy), noisy) - noise.epsilon / noise.sigma
            terms["denoising"] = weight * options.denoising_weight * mean_of_rows(residual.square(), ~batch.fixed)
        return terms
