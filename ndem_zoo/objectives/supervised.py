"""Plain supervised training on energies and forces: the baseline of everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ndem_zoo.graph import Batch
from ndem_zoo.models.potential import Potential
from ndem_zoo.objectives.base import Objective


@dataclass(frozen=True)
class SupervisedOptions:
    """There are none beyond the weights of the terms."""


class Supervised(Objective):
    """Energy and force terms, nothing else; `weight` has no effect."""

    Options: ClassVar[type] = SupervisedOptions
    has_auxiliary_term: ClassVar[bool] = False
    denoises_with: ClassVar[tuple[str, int] | None] = None

    def forward(self, potential: Potential, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms ``energy`` and ``forces``."""
        prediction = potential(batch, need_forces=self.supervised.force_weight > 0)
        return self.supervised.terms(prediction, batch, potential.scale)
