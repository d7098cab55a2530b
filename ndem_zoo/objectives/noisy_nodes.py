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
from ndem_zoo.objectives.base import NoiseOptions, Objective, mean_of_rows


@dataclass(frozen=True)
class NoisyNodesOptions(NoiseOptions):
    """Options of `NoisyNodes`, besides those of the noise (all atoms are moved, as published).

    Attributes
    ----------
    separate_branch
        True: labels are learned on the clean structure, the noise in a second pass (Frad's fine-tuning). False: one
        pass over the noisy structure for both, whose labels are those of the clean one (Godwin et al., Zaidi et al.).
    """

    separate_branch: bool = True


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
        noisy, noise = options.displace(batch, rng, potential.backbone.cutoff)
        prediction, terms = None, {}
        if self.supervised.has_terms:
            prediction = potential(batch if options.separate_branch else noisy, need_forces=need_forces)
            terms = self.supervised.terms(prediction, batch, potential.scale)
        if weight == 0:
            return terms
        is_read = prediction is not None and not options.separate_branch
        features = prediction.features if is_read else potential.backbone(noisy)
        residual = self.noise_head(features, noisy) - noise.epsilon / noise.sigma
        return terms | {"denoising": weight * mean_of_rows(residual.square(), ~batch.fixed)}
