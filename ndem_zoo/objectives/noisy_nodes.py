"""Noisy Nodes: predict the noise itself. Right near minima of the energy; the control that NDeM has to beat elsewhere.

Godwin et al., "Simple GNN Regularisation for 3D Molecular Property Prediction and Beyond", ICLR 2022 (one pass);
Feng et al., "Fractional Denoising for 3D Molecular Pre-training", ICML 2023 (separate branch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ndem_zoo.graph import Batch
from ndem_zoo.models.potential import Potential
from ndem_zoo.noise import SigmaPer, SigmaSample, masked_gaussian
from ndem_zoo.objectives.base import Objective, check_choice, check_ratio, check_sigma


@dataclass(frozen=True)
class NoisyNodesOptions:
    """Options of `NoisyNodes`.

    Attributes
    ----------
    separate_branch
        True: labels are learned on the clean structure, the noise in a second pass (Frad's fine-tuning). False: one
        pass over the noisy structure for both, whose labels are those of the clean one (Godwin et al., Zaidi et al.).
    sigma
        Noise in Å, or a range (min, max). Choice: NDeM's 0.05, so that the two are compared at equal noise.
    ratio
        Fraction of the atoms that is moved (all, as published).
    sigma_sample, sigma_per
        How a sigma is drawn from a range, and for what.
    """

    separate_branch: bool = True
    sigma: float | tuple[float, float] = 0.05
    ratio: float = 1.0
    sigma_sample: SigmaSample = "loguniform"
    sigma_per: SigmaPer = "structure"

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_ratio(self.ratio)
        check_choice("sigma_sample", self.sigma_sample, SigmaSample)
        check_choice("sigma_per", self.sigma_per, SigmaPer)


class NoisyNodes(Objective):
    """Supervised terms, plus the mean square of (predicted noise - epsilon / sigma)."""

    Options: ClassVar[type] = NoisyNodesOptions

    def build(self, potential: Potential, dataset: Any = None) -> None:
        """Make the denoising head."""
        self.noise_head = potential.backbone.vector_head()

    def forward(self, potential: Potential, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms ``energy``, ``forces`` and ``denoising``."""
        options, weight = self.options, self.current_weight()
        need_forces = self.supervised.force_weight > 0
        noisy, noise = masked_gaussian(
            batch,
            rng,
            cutoff=potential.backbone.cutoff,
            sigma=options.sigma,
            ratio=options.ratio,
            sample=options.sigma_sample,
            per=options.sigma_per,
        )
        prediction = potential(batch if options.separate_branch else noisy, need_forces=need_forces)
        terms = self.supervised.terms(prediction, batch, potential.scale)
        if weight == 0:
            return terms
        features = potential.backbone(noisy) if options.separate_branch else prediction.features
        residual = self.noise_head(features, noisy) - noise.epsilon / noise.sigma
        return terms | {"denoising": weight * residual.square().mean()}
