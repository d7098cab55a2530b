"""NDeM: let a second head learn the difference of forces before and after a displacement.

Tang et al., "Coordinate Denoising for Non-Equilibrium Molecular Representation Learning", CVPR 2026. From the expansion
F(X + epsilon) - F(X) = -H epsilon, with H replaced by c * identity, follows F(X) - F'(X + epsilon) = +c epsilon,
wherever X lies on the energy surface. Every choice that the paper leaves open is an option here.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real  # numpy's numbers too
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ndem_zoo import curvature
from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch
from ndem_zoo.models.potential import Potential, Prediction
from ndem_zoo.noise import Noise
from ndem_zoo.objectives.base import (
    NoiseOptions,
    Objective,
    check_choice,
    check_not_negative,
    check_whole,
    rows_that_count,
)

GradMain = Literal["stop", "flow", "label"]
Target = Literal["paper", "kappa", "boltzmann"]
LossOn = Literal["all", "masked"]
Reduction = Literal["atom_sum_xyz", "element_mean"]


@dataclass(frozen=True)
class NDeMOptions(NoiseOptions):
    """Options of `NDeM`, besides those of the noise: what the paper fixes, and our choices where it does not.

    Attributes
    ----------
    ratio
        Fraction of the atoms that is moved. Choice: 0.25, as DeNS on MD17; the paper gives none.
    grad_main
        What stands for F(X). ``"stop"``: the main head's forces, without gradient; ``"flow"``: with it, which pulls the
        forces toward the curvature 1/sigma; a number between: the gradient times that number; ``"label"``: the labels.
        Choice: ``"stop"``; the paper does not say.
    target
        What the difference of forces, in units of the potential's scale, should be. ``"paper"``: epsilon / sigma;
        ``"kappa"``: `kappa` times epsilon; ``"boltzmann"``: likewise with one constant for each element, <F²> / kT of
        the training data.
    kappa
        Curvature in eV/Å², for ``target="kappa"``.
    temperature
        Of the training data in K, for ``target="boltzmann"`` (MD17: 500).
    loss_on
        ``"all"`` atoms, as in the paper's formula, or only the ``"masked"`` (moved) ones. Fixed atoms never count.
    unmasked_weight
        Weight of the atoms that were not moved, with ``loss_on="all"``.
    reduction
        ``"atom_sum_xyz"``: the squares are summed over x, y, z and averaged over atoms (the paper's formula);
        ``"element_mean"``: averaged over all components, three times smaller.
    head_width
        Channels inside the noisy-force head; None: those of the backbone's other heads. The paper does not say.
    reuse_main_head
        True lets the main head predict the noisy forces (the paper reports that this harms).
    """

    ratio: float = 0.25
    grad_main: GradMain | float = "stop"
    target: Target = "paper"
    kappa: float | None = None
    temperature: float = 500.0
    loss_on: LossOn = "all"
    unmasked_weight: float = 1.0
    reduction: Reduction = "atom_sum_xyz"
    head_width: int | None = None
    reuse_main_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("unmasked_weight", self.unmasked_weight)
        if self.head_width is not None:
            check_whole("head_width", self.head_width, 1)
        for name, allowed in (("target", Target), ("loss_on", LossOn), ("reduction", Reduction)):
            check_choice(name, getattr(self, name), allowed)
        if isinstance(self.grad_main, str):
            check_choice("grad_main", self.grad_main, GradMain)
        elif not (isinstance(self.grad_main, Real) and 0 <= self.grad_main <= 1):
            raise ConfigError(
                f"grad_main={self.grad_main!r}; allowed are {', '.join(get_args(GradMain))}, or a factor on the gradient "
                "between 0 (stop) and 1 (flow)"
            )
        if (self.kappa is not None) != (self.target == "kappa"):
            raise ConfigError(
                f"kappa={self.kappa!r} with target={self.target!r}: give kappa (eV/Å²) for target='kappa' only"
            )
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r} K; it must be positive")

    @property
    def flow(self) -> float:
        """Factor on the gradient that reaches the main forces."""
        return {"stop": 0.0, "flow": 1.0, "label": 0.0}.get(self.grad_main, self.grad_main)


class NDeM(Objective):
    """Supervised terms, plus the mean square of (F(X) - F'(X + epsilon) - target).

    All three are in units of the potential's scale. Where a potential has no forces, F(X) is 0, which is its value at
    a minimum of the energy, and the objective is classic denoising.
    """

    Options: ClassVar[type] = NDeMOptions
    # F'(X + epsilon) = F(X) - c epsilon
    denoises_with: ClassVar[tuple[str, int] | None] = ("noisy_force_head", -1)

    @property
    def requires(self) -> frozenset[str]:
        """Labels of the supervised terms, and forces where they take part in the target."""
        needs_forces = self.options.grad_main == "label" or self.options.target == "boltzmann"
        return super().requires | (frozenset({"forces"}) if needs_forces else frozenset())

    def build(self, potential: Potential, dataset: Any = None) -> None:
        """Make the noisy-force head, and the curvature if one is asked for."""
        options = self.options
        if options.reuse_main_head and potential.force_mode == "none":
            raise ConfigError("reuse_main_head=True needs a potential with forces")
        self.noisy_force_head = None if options.reuse_main_head else potential.backbone.vector_head(options.head_width)
        self.curvature = None
        if options.target == "kappa":
            self.curvature = curvature.isotropic(options.kappa)
        elif options.target == "boltzmann":
            self.curvature = (
                curvature.isotropic(0.0)  # its constants are loaded afterwards
                if dataset is None
                else curvature.boltzmann(dataset.z, dataset.targets["forces"], options.temperature)
            )

    def forward(self, potential: Potential, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms ``energy``, ``forces`` and ``ndem``."""
        options, weight = self.options, self.current_weight()
        clean, terms = None, {}
        if self.supervised.has_terms or potential.force_mode != "none":
            clean = potential(batch)
            terms = self.supervised.terms(clean, batch, potential.scale)
        if weight == 0:
            return terms
        noisy, noise = options.displace(batch, rng, potential.backbone.cutoff)
        noisy_forces = self.noisy_forces(potential, noisy)
        # F(X) - F'(X + epsilon) = +c epsilon
        residual = self.reference_forces(potential, clean, batch, noisy_forces) - noisy_forces
        residual = residual - self.target(potential, batch, noise)
        return terms | {"ndem": weight * self.mean_square(residual, noise, ~batch.fixed)}

    def rows(self, batch: Batch, rng: torch.Generator) -> dict[str, Float[Tensor, " S"]]:
        """See `Objective.rows`: with ``loss_on="masked"`` the mean is over the moved atoms."""
        rows = super().rows(batch, rng)
        if self.options.loss_on == "masked" and self.current_weight():
            rows["ndem"] = rows_that_count(self.options.draw(batch, rng).mask, batch)
        return rows

    def noisy_forces(self, potential: Potential, noisy: Batch) -> Float[Tensor, "N 3"]:
        """F'(X + epsilon) in units of the scale; without a force derivative, unless the main head is reused."""
        if self.noisy_force_head is not None:
            return self.noisy_force_head(potential.backbone(noisy), noisy)
        forces = potential(noisy).forces
        return forces / potential.scale.to(forces.dtype)

    def reference_forces(
        self, potential: Potential, clean: Prediction | None, batch: Batch, like: Tensor
    ) -> Float[Tensor, "N 3"]:
        """F(X) in units of the scale, with as much gradient as `grad_main` lets through; `like` (N, 3) gives the dtype."""
        if self.options.grad_main == "label":
            return (batch.targets["forces"] / potential.scale).to(like.dtype)
        if clean is None or clean.forces is None:
            return torch.zeros_like(like)
        forces = clean.forces / potential.scale.to(clean.forces.dtype)
        return torch.lerp(forces.detach(), forces, self.options.flow) if self.options.flow else forces.detach()

    def target(self, potential: Potential, batch: Batch, noise: Noise) -> Float[Tensor, "N 3"]:
        """What F(X) - F'(X + epsilon) should be, in units of the scale; 0 for atoms that were not moved."""
        if self.curvature is None:
            return noise.epsilon / noise.sigma
        change = self.curvature.force_change(batch, noise.epsilon)
        return -change / potential.scale.to(change.dtype)

    def mean_square(self, residual: Float[Tensor, "N 3"], noise: Noise, free: Bool[Tensor, " N"]) -> Tensor:
        """Average over the atoms that count, a scalar: those that are `free`, or of these the moved ones."""
        options = self.options
        square = residual.square()
        per_atom = square.sum(-1) if options.reduction == "atom_sum_xyz" else square.mean(-1)
        others = options.unmasked_weight if options.loss_on == "all" else 0.0
        weight = torch.ones_like(per_atom).masked_fill(~noise.mask, others) * free
        # With all atoms the paper divides by their number whatever the weights; with the masked ones, by theirs.
        counted = noise.mask if options.loss_on == "masked" else free
        return (per_atom * weight).sum() / counted.sum().clamp(min=1)
