"""Frad: move molecules along their soft coordinates first, then predict the coordinate noise on top of it, and only that.

Feng et al., "Fractional Denoising for 3D Molecular Pre-training", ICML 2023; Ni et al., "Pre-training with fractional
denoising to enhance molecular property prediction", Nature Machine Intelligence 2024. X -- noise along internal
coordinates --> X' -- Gaussian noise --> X~: the network sees X~, and the target is X~ - X'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.graph import Batch, displace
from ndem_zoo.noise import InternalSigmas, Noise, internal_displacement
from ndem_zoo.objectives.base import check_choice, check_not_negative
from ndem_zoo.objectives.noisy_nodes import NoisyNodes, NoisyNodesOptions
from ndem_zoo.topology import with_internal_coordinates

Internal = Literal["rotors", "all"]


@dataclass(frozen=True)
class FradOptions(NoisyNodesOptions):
    """Options of `Frad`, besides those of `NoisyNodes` and of the noise, which is the part that is predicted.

    Attributes
    ----------
    internal
        ``"rotors"``: only torsions about rotatable bonds are changed (the authors' RN); ``"all"``: lengths, angles and
        other torsions, too (VRN).
    rotor_sigma
        Of the torsions about rotatable bonds, in degrees (fine-tuning on MD17: 20; pre-training: 2; VRN: 1 rad, 57.3).
    bond_sigma, bend_sigma, torsion_sigma
        With ``internal="all"``: of lengths in Å, angles and other torsions in degrees (VRN: 0.058 Å, 0.129 rad and 0.18 rad,
        as quoted in secondary sources).

    Notes
    -----
    Fine-tuning on MD17 as published has sigma 0.005 Å, and a weight of 0.1; here `sigma` begins at the value that all
    objectives share.
    """

    internal: Internal = "rotors"
    rotor_sigma: float = 20.0
    bond_sigma: float = 0.058
    bend_sigma: float = 7.39
    torsion_sigma: float = 10.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("internal", self.internal, Internal)
        for name in ("rotor_sigma", "bond_sigma", "bend_sigma", "torsion_sigma"):
            check_not_negative(name, getattr(self, name))

    @property
    def internal_sigmas(self) -> InternalSigmas:
        """Noise on the internal coordinates."""
        if self.internal == "rotors":
            return InternalSigmas(self.rotor_sigma)
        return InternalSigmas(self.rotor_sigma, self.bond_sigma, self.bend_sigma, self.torsion_sigma)

    def displace(self, batch: Batch, rng: torch.Generator, cutoff: float, **options: Any) -> tuple[Batch, Noise]:
        """The batch after both noises, and the second of them, which is the target."""
        soft = internal_displacement(batch, rng, self.internal_sigmas)
        noise = self.draw(batch, rng)
        return displace(batch, soft + noise.epsilon, cutoff, self.reuse_edges), noise


class Frad(NoisyNodes):
    """Supervised terms, plus the mean square of (predicted noise - epsilon / sigma) after hidden internal noise.

    Molecules without rotatable bonds get coordinate noise alone, as in the authors' code.

    Notes
    -----
    The authors divide the target by a running standard deviation of itself, which is sigma; here sigma is known.
    """

    Options: ClassVar[type] = FradOptions

    def prepare(self, dataset: MolecularDataset) -> MolecularDataset:
        """The dataset with its bonds, and the parts of molecules that they connect."""
        return with_internal_coordinates(dataset)
