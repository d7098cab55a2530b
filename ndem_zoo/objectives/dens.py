"""DeNS: denoise non-equilibrium structures, told by their forces how far from equilibrium they are.

Y.-L. Liao, T. Smidt, A. Das et al., "Generalizing Denoising to Non-Equilibrium Structures Improves Equivariant Force
Fields", TMLR 2024. Some structures of a batch are corrupted: part of their atoms is moved, and the network, which gets
the true forces of these atoms as input, has to tell by how much, besides the energy of the structure before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ndem_zoo.graph import Batch
from ndem_zoo.models.potential import Potential
from ndem_zoo.noise import SigmaPer
from ndem_zoo.objectives.base import (
    LOSSES,
    Loss,
    NoiseOptions,
    Objective,
    check_choice,
    check_ratio,
    check_whole,
    mean_of_rows,
    rows_that_count,
)


@dataclass(frozen=True)
class DeNSOptions(NoiseOptions):
    """Options of `DeNS`, besides those of the noise.

    Attributes
    ----------
    ratio
        Fraction of the atoms of a corrupted structure that is moved (MD17: 0.25; OC20-2M: 0.5).
    probability
        That a structure is corrupted (MD17: 0.25; OC20-2M: 0.5).
    probability_per
        Whether that is drawn for each ``"structure"`` (MD17) or for the whole ``"batch"`` (OC20).
    denoising_loss
        Form of the denoising term, one of those of `SupervisedLoss`: ``"mse"``, of the components; DeNS itself has
        ``"l2mae"``, lengths of the errors. Choice: as in the other objectives, so that weights compare.
    head_width
        Channels inside the denoising head; None: those of the backbone's other heads.
    """

    ratio: float = 0.25
    probability: float = 0.25
    probability_per: SigmaPer = "structure"
    denoising_loss: Loss = "mse"
    head_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.probability, "probability")
        check_choice("probability_per", self.probability_per, SigmaPer)
        check_choice("denoising_loss", self.denoising_loss, Loss)
        if self.head_width is not None:
            check_whole("head_width", self.head_width, 1)

    @property
    def corrupted(self) -> dict[str, Any]:
        """Which structures are moved at all, as `noise.gaussian` takes it."""
        return {"probability": self.probability, "probability_per": self.probability_per}


class DeNS(Objective):
    """Energies of all structures, forces on the atoms that were not moved, and the noise on those that were.

    There is one pass: moved atoms have no force label, since their forces are known before the noise only. Noise is in
    units of the sigma that it was drawn with; the authors' code divides by the largest one of a range.
    """

    Options: ClassVar[type] = DeNSOptions
    encodes_vectors: ClassVar[bool] = True
    probed_with: ClassVar[dict[str, Any]] = {"probability": 1.0}
    extra_requirements: ClassVar[frozenset[str]] = frozenset({"forces"})

    def rows(self, batch: Batch, rng: torch.Generator) -> dict[str, Float[Tensor, " S"]]:
        """See `Objective.rows`: noise is averaged over the moved atoms, forces over those that are neither moved nor fixed."""
        rows = super().rows(batch, rng)
        if self.current_weight():
            moved = self.options.draw(batch, rng, **self.options.corrupted).mask
            rows |= {
                "denoising": rows_that_count(moved, batch),
                "forces": rows_that_count(~(moved | batch.fixed), batch),
            }
        return rows

    def build(self, potential: Potential, dataset: Any = None) -> None:
        """Make the denoising head."""
        self.noise_head = potential.backbone.vector_head(self.options.head_width)

    def forward(self, potential: Potential, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms ``energy``, ``forces`` and ``denoising``."""
        weight, need_forces = self.current_weight(), self.supervised.force_weight > 0
        if weight == 0:
            return self.supervised.terms(potential(batch, need_forces=need_forces), batch, potential.scale)
        options = self.options
        noisy, noise = options.displace(batch, rng, potential.backbone.cutoff, **options.corrupted)
        forces = batch.targets["forces"].to(batch.pos.dtype) * noise.mask.unsqueeze(-1)
        prediction = potential(noisy, node_vectors=forces, need_forces=need_forces)
        counts = ~(noise.mask | batch.fixed)
        terms = self.supervised.terms(prediction, batch, potential.scale, counts)
        residual = self.noise_head(prediction.features, noisy) - noise.epsilon / noise.sigma
        errors = LOSSES[options.denoising_loss](residual, torch.zeros_like(residual), reduction="none")
        return terms | {"denoising": weight * mean_of_rows(errors, noise.mask)}
