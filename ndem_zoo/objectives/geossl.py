"""GeoSSL-DDM, also SE(3)-DDM: from one view of a structure, denoise the pair distances of another.

Liu, Guo and Tang, "Molecular Geometry Pretraining with SE(3)-Invariant Denoising Distance Matching", ICLR 2023. Two views
differ by Gaussian noise; the distances of one get noise of a level of its own, and a head that reads the features of the
other one's atoms learns the score of the distances. No bonds are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import ALL_PAIRS_UP_TO, Batch, make_batch
from ndem_zoo.models.base import Backbone
from ndem_zoo.models.potential import Potential
from ndem_zoo.noise import for_structures
from ndem_zoo.objectives.base import NoiseOptions, Objective, check_not_negative, check_whole, mean_of_rows
from ndem_zoo.physics import safe_norm


@dataclass(frozen=True)
class GeoSSLOptions(NoiseOptions):
    """Options of `GeoSSL`, besides those of the noise between the two views (GeoSSL: sigma 0.3 on all atoms).

    Attributes
    ----------
    levels
        Number of noise levels of the distances, in geometric steps (GeoSSL: 30 or 50).
    largest, smallest
        Standard deviations in Å of the first and the last level (GeoSSL: 10 and 0.01).
    annealing_power
        Weight of a level is its sigma to this power (GeoSSL tries 0.05 to 10). Choice: 2, which makes the levels equal: a
        perfect ignorance costs 1/2 at each.
    head_width
        Channels inside the head; None: those of the atoms' features.
    """

    levels: int = 30
    largest: float = 10.0
    smallest: float = 0.01
    annealing_power: float = 2.0
    head_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("levels", self.levels, 1)
        check_not_negative("annealing_power", self.annealing_power)
        if self.head_width is not None:
            check_whole("head_width", self.head_width, 1)
        is_valid = all(isinstance(v, Real) for v in (self.largest, self.smallest)) and 0 < self.smallest <= self.largest
        if not is_valid or self.largest == float("inf"):
            raise ConfigError(
                f"smallest={self.smallest!r}, largest={self.largest!r}; they must be positive numbers in Å, ascending"
            )


class DistanceScore(nn.Module):
    """Score of noisy pair distances, from the features of both atoms: (E,) in 1/Å, before the division by sigma."""

    def __init__(self, n_scalars: int, width: int) -> None:
        super().__init__()
        self.distance = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.score = nn.Sequential(
            nn.Linear(n_scalars + width, width), nn.SiLU(), nn.Linear(width, width // 2 or 1), nn.SiLU()
        )
        self.last = nn.Linear(width // 2 or 1, 1)

    def forward(
        self, scalars: Float[Tensor, "N C"], batch: Batch, distance: Float[Tensor, " E"]
    ) -> Float[Tensor, " E"]:
        """The score times sigma, for each pair; the same for i-j and j-i."""
        pairs = scalars.index_select(0, batch.src) + scalars.index_select(0, batch.dst)
        embedded = self.distance(distance.to(scalars.dtype).unsqueeze(-1))
        return self.last(self.score(torch.cat([pairs, embedded], dim=-1))).squeeze(-1)


class GeoSSL(Objective):
    """Supervised terms on the clean structure, plus denoising of its pair distances as seen from a noisy one, and back.

    Pairs are the edges of the batch: in small molecules all pairs. Those of two fixed atoms do not count.
    """

    Options: ClassVar[type] = GeoSSLOptions
    shares_noise: ClassVar[bool] = False

    def build(self, potential: Potential, dataset: Any = None) -> None:
        """Make the head, and the levels of noise."""
        options, n = self.options, n_scalars(potential.backbone)
        self.head = DistanceScore(n, options.head_width or n)
        levels = np.geomspace(options.largest, options.smallest, options.levels)
        self.register_buffer("sigmas", torch.from_numpy(levels), persistent=False)

    def forward(self, potential: Potential, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms ``energy``, ``forces`` and ``distances``."""
        weight = self.current_weight()
        clean = potential(batch, need_forces=self.supervised.force_weight > 0)
        terms = self.supervised.terms(clean, batch, potential.scale)
        if weight == 0:
            return terms
        other, _ = self.options.displace(batch, rng, potential.backbone.cutoff)
        features = potential.backbone(other)
        losses = [self.matching(features.scalars, batch, rng), self.matching(clean.features.scalars, other, rng)]
        return terms | {"distances": weight * sum(losses) / 2}

    def rows(self, batch: Batch, rng: torch.Generator) -> dict[str, Float[Tensor, " S"]]:
        """See `Objective.rows`: the mean is over pairs.

        Choice: their number is exact in molecules whose pairs are all edges; above, an atom has as many as in the largest
        of these.
        """
        atoms = batch.n_atoms.double()
        return super().rows(batch, rng) | {"distances": atoms * (atoms - 1).clamp(max=ALL_PAIRS_UP_TO - 1)}

    def matching(self, scalars: Float[Tensor, "N C"], batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        """Denoising score matching of the batch's pair distances, told the features of the atoms in the other view.

        Eq. 1/2 sigma^p (s + (d~ - d) / sigma²)², averaged over pairs, where d~ = d + sigma * noise and s is the score.
        """
        n, device = len(self.sigmas), batch.pos.device
        level = for_structures(batch, rng, lambda s, source: torch.randint(n, (s,), generator=source, device=device))
        sigma = self.sigmas.index_select(0, level).index_select(0, batch.system).index_select(0, batch.dst)
        sigma = sigma.to(scalars.dtype)
        distance = safe_norm(batch.vectors()).detach().to(scalars.dtype)
        noise = torch.randn(distance.shape, generator=rng, device=distance.device, dtype=distance.dtype)
        score = self.head(scalars, batch, distance + sigma * noise) / sigma
        loss = (score + noise / sigma).square() * sigma**self.options.annealing_power / 2
        return mean_of_rows(loss, ~(batch.fixed.index_select(0, batch.src) & batch.fixed.index_select(0, batch.dst)))


def n_scalars(backbone: Backbone) -> int:
    """Number of invariant features that a backbone gives each atom."""
    parameter = next(backbone.parameters())
    atom = make_batch([1], np.zeros((1, 3)), [1], backbone.cutoff, dtype=parameter.dtype).to(parameter.device)
    was_training = backbone.training
    try:
        with torch.no_grad():
            return backbone.eval()(atom).scalars.shape[-1]
    finally:
        backbone.train(was_training)
