"""NDeM with a curvature better than c * identity: forces at displaced geometries, from labels plus what changes.

F(X + epsilon) = F(X) + dF(X -> X + epsilon): the paper takes dF = -c epsilon, which is a third of the truth on MD17, and so
can only ask a head of its own for it. A force field fitted to the same labels gets dF nearly right (`curvature.explained`);
then the displaced structure is a labeled one, and the potential itself can learn from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ndem_zoo.curvature import NAMED, Curvature, ForceFieldDifference, first_order_change, make_curvature
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, sum_over_atoms
from ndem_zoo.models.potential import Potential, Prediction
from ndem_zoo.noise import Noise
from ndem_zoo.objectives.base import (
    NoiseOptions,
    Objective,
    check_choice,
    check_not_negative,
    check_ratio,
    mean_of_rows,
)

WhichHead = Literal["main", "independent", "both"]
Confidence = Literal["none", "closed_form", "learned"]
SigmaSchedule = Literal["constant", "decay"]

#: Choice: sigma at the end of a decay, as a fraction of that at its beginning.
_LAST_SIGMA = 0.1

#: Choice: bins of log(sigma) for learned confidence, from 1 mÅ to 1 Å, and how slowly their averages change.
_BINS, _SLOWNESS = 12, 0.99

#: Extra of the training data, (A, 3, 3 n): see `ForceFieldDifference.slopes`.
_SLOPES = "force_slopes"


@dataclass(frozen=True)
class NDeMCurvatureOptions(NoiseOptions):
    """Options of `NDeMCurvature`, besides those of the noise.

    Attributes
    ----------
    curvature
        Where the change of the forces comes from: one of `ndem_zoo.curvature.NAMED`, a force field of
        `ndem_zoo.registry.FORCE_FIELDS`, or a sum of them. Choice: ``"valence"``, which is fitted to the training forces.
    head
        Who learns from displaced structures: the ``"main"`` head (energies and forces of the potential), an
        ``"independent"`` one as in the paper, or ``"both"``.
    energy
        Whether the main head also learns E(X + epsilon) = E(X) - (F(X) + F(X + epsilon)) . epsilon / 2 (trapezoid rule).
    probability
        1: every structure is seen as it is, and displaced in a second pass (twice the cost). Below 1: one pass, in which
        each structure is displaced with this probability, at no cost; for ``head="main"``.
    confidence
        Weight of a displaced structure by its sigma, for the main head. ``"closed_form"``: t² / (t² + v), with v = 2 e² (1 - exp(-sigma² /
        (2 l²))) the variance of the change's error, e the force field's error on the training forces and l = `length`;
        t = `tolerance` times the scale. ``"learned"``: the mean square error on clean structures over that on displaced
        ones with a similar sigma, at most 1.
    tolerance
        For ``"closed_form"``: what error counts half, in units of the potential's scale.
    length
        For ``"closed_form"``: distance in Å over which the force field's error changes. Choice: 0.04, about kT / F_rms of
        MD17's molecules.
    sigma_schedule
        ``"decay"``: sigma falls linearly to a tenth over the training.
    first_order
        Whether the force field's derivatives at the training structures, computed once before the training, stand for the
        differences that it makes: a step then costs no force field (also no GFN2-xTB), and the change is right to first
        order in sigma. Takes 36 bytes times the atoms of all structures times those of the largest.
    constant
        For ``curvature="isotropic"``: c in eV/Å².
    temperature
        Of the training data in K, for ``curvature="springs"`` and ``"element"`` (MD17: 500).
    """

    curvature: str = "valence"
    head: WhichHead = "main"
    energy: bool = True
    probability: float = 1.0
    confidence: Confidence = "none"
    tolerance: float = 0.05
    length: float = 0.04
    sigma_schedule: SigmaSchedule = "constant"
    first_order: bool = False
    constant: float | None = None
    temperature: float = 500.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("head", WhichHead), ("confidence", Confidence), ("sigma_schedule", SigmaSchedule)):
            check_choice(name, getattr(self, name), allowed)
        check_ratio(self.probability, "probability")
        for name in ("tolerance", "length", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}; it must be positive")
        if (self.constant is not None) != (self.curvature == "isotropic"):
            raise ConfigError(
                f"constant={self.constant!r} with curvature={self.curvature!r}: give the constant (eV/Å²) for 'isotropic' only"
            )
        if self.first_order and self.curvature in NAMED:
            raise ConfigError(f"first_order=True is for force fields; curvature={self.curvature!r} is none")
        if self.constant is not None:
            check_not_negative("constant", self.constant)
        if self.probability < 1 and self.head != "main":
            raise ConfigError(
                f"probability={self.probability} with head={self.head!r}: one pass serves the main head only"
            )
        if self.curvature == "learned_springs" and (self.head == "independent" or self.probability < 1):
            raise ConfigError("learned springs need the main head's forces before and after: head='main' or 'both'")
        if self.confidence != "none" and self.head == "independent":
            raise ConfigError(
                f"confidence={self.confidence!r} with head='independent': it weighs the main head's terms"
            )
        if self.confidence == "learned" and self.probability < 1:
            raise ConfigError(
                f"confidence='learned' with probability={self.probability}: it compares two passes over the same structures"
            )
        if self.confidence == "closed_form" and self.curvature in NAMED:
            raise ConfigError(
                f"confidence='closed_form' needs a force field's error; curvature={self.curvature!r} has none"
            )


class NDeMCurvature(Objective):
    """Supervised terms, and the same of displaced structures, whose labels follow from a curvature.

    `weight` is that of a displaced structure against a labeled one.
    """

    Options: ClassVar[type] = NDeMCurvatureOptions
    probed_with: ClassVar[dict[str, Any]] = {"curvature": "lindh"}
    extra_requirements: ClassVar[frozenset[str]] = frozenset({"forces"})

    def build(self, potential: Potential, dataset: Any = None) -> None:
        """Make the curvature for these data, and the independent head if one is asked for."""
        options = self.options
        if options.head != "independent" and potential.force_mode == "none":
            raise ConfigError(
                "the main head has no forces to learn: use head='independent', or a potential with forces"
            )
        needs_head = options.head != "main"
        self.noisy_force_head = potential.backbone.vector_head() if needs_head else None
        self.curvature: Curvature = make_curvature(
            options.curvature, potential, dataset, constant=options.constant, temperature=options.temperature
        )
        self.register_buffer("force_error", torch.zeros((), dtype=torch.float64))
        if dataset is not None and isinstance(self.curvature, ForceFieldDifference):
            self.force_error = _force_error(self.curvature, dataset)
        self.register_buffer("clean_square", torch.ones((), dtype=torch.float64))
        self.register_buffer("noisy_square", torch.ones(_BINS, dtype=torch.float64))

    def complete(self, dataset: MolecularDataset) -> MolecularDataset:
        """The training data with the derivatives of the force field's forces, if they are wanted."""
        if not self.options.first_order:
            return dataset
        return dataset.with_extras({_SLOPES: self.curvature.slopes(dataset)}, per_atom=True)

    def forward(self, potential: Potential, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms ``energy`` and ``forces``; in a second pass ``noisy_energy``, ``noisy_forces``, ``ndem``, ``springs``."""
        weight = self.current_weight()
        if weight == 0:
            return self.supervised.terms(potential(batch), batch, potential.scale)
        moved, noise = self.displace(potential, batch, rng)
        change = self.change(batch, noise.epsilon, moved)
        labels = self.labels(batch, noise, change.detach())
        if self.options.probability < 1:
            return self._one_pass(potential, moved.replace(targets=labels), noise, weight)
        clean = potential(batch)
        terms = self.supervised.terms(clean, batch, potential.scale)
        noisy = moved.replace(targets=labels)
        if self.options.head != "independent":
            prediction = potential(noisy)
            trust = self._trust(potential, noise, (clean, batch), (prediction, noisy))
            found = self._terms(prediction, noisy, potential, trust, trust if self.options.energy else None)
            terms |= {f"noisy_{name}": weight * term for name, term in found.items()}
            if self.options.curvature == "learned_springs":
                terms["springs"] = self._spring_term(potential, clean, prediction, change, batch)
        if self.noisy_force_head is not None:
            terms["ndem"] = weight * self._independent_term(potential, noisy)
        return terms

    @property
    def needs_whole_batch(self) -> bool:
        """Learned confidence compares the errors of all structures of a step."""
        return self.options.confidence == "learned"

    def rows(self, batch: Batch, rng: torch.Generator) -> dict[str, Float[Tensor, " S"]]:
        """See `Objective.rows`: displaced structures have energies, too."""
        rows = super().rows(batch, rng)
        return rows | {f"noisy_{name}": value for name, value in rows.items()}

    def displace(self, potential: Potential, batch: Batch, rng: torch.Generator) -> tuple[Batch, Noise]:
        """The structures after the noise; with one pass, only some of them are moved."""
        options = self.options
        fraction = 1.0 if options.sigma_schedule == "constant" else 1.0 - (1.0 - _LAST_SIGMA) * self.progress
        return options.displace(batch, rng, potential.backbone.cutoff, probability=options.probability, shrink=fraction)

    def change(self, batch: Batch, epsilon: Float[Tensor, "N 3"], moved: Batch) -> Float[Tensor, "N 3"]:
        """Change of the forces in eV/Å."""
        if not self.options.first_order:
            return self.curvature.force_change(batch, epsilon, moved)
        if _SLOPES not in batch.extras:
            raise ConfigError("first_order=True needs data that went through the objective's `complete`")
        return first_order_change(batch.extras[_SLOPES], batch, epsilon)

    def labels(self, batch: Batch, noise: Noise, change: Float[Tensor, "N 3"]) -> dict[str, Tensor]:
        """Labels of the displaced structures: forces, and energies by the trapezoid rule."""
        before = batch.targets["forces"]
        after = before + change.to(before.dtype)
        labels = {**batch.targets, "forces": after}
        if self.supervised.energy_weight and self.supervised.target == "energy":
            work = ((before + after) * noise.epsilon.to(before.dtype)).sum(-1)
            labels["energy"] = batch.targets["energy"] - 0.5 * sum_over_atoms(work, batch)
        return labels

    def _one_pass(self, potential: Potential, noisy: Batch, noise: Noise, weight: float) -> dict[str, Tensor]:
        """Terms of a batch in which some structures are displaced."""
        is_moved = sum_over_atoms(noise.mask.double(), noisy) > 0
        trust = self._closed_form(potential, noise, noisy) * weight
        forces = torch.where(is_moved, trust, torch.ones_like(trust))
        energy = torch.where(is_moved, trust * self.options.energy, torch.ones_like(trust))
        return self._terms(potential(noisy), noisy, potential, forces, energy)

    def _terms(
        self,
        prediction: Prediction,
        noisy: Batch,
        potential: Potential,
        force_weight: Float[Tensor, " S"],
        energy_weight: Float[Tensor, " S"] | None,
    ) -> dict[str, Tensor]:
        """Supervised terms, with a weight for each structure; None leaves the energies out."""
        dtype, errors, importance = prediction.forces.dtype, {}, {}
        if self.supervised.energy_weight and energy_weight is not None:
            errors["energy"] = ((prediction.energy - noisy.targets["energy"]) / potential.scale).to(dtype)
            importance["energy"] = energy_weight.to(dtype)
        if self.supervised.force_weight:
            errors["forces"] = (prediction.forces - noisy.targets["forces"].to(dtype)) / potential.scale.to(dtype)
            importance["forces"] = force_weight.to(dtype).index_select(0, noisy.system)
        return self.supervised.terms_of_errors(errors, ~noisy.fixed, importance)

    def _trust(
        self,
        potential: Potential,
        noise: Noise,
        clean: tuple[Prediction, Batch],
        noisy: tuple[Prediction, Batch],
    ) -> Float[Tensor, " S"]:
        """Weight of each displaced structure by its sigma."""
        if self.options.confidence != "learned":
            return self._closed_form(potential, noise, noisy[1])
        with torch.no_grad():
            free = (~clean[1].fixed).to(self.noisy_square.dtype)  # the averages have the network's dtype
            square, expected = (
                free * (prediction.forces - batch.targets["forces"]).to(free.dtype).square().mean(-1)
                for prediction, batch in (noisy, clean)
            )
            place = (noise.sigma[:, 0].double().log10() + 3.0) / 3.0 * _BINS
            bins = place.long().clamp(0, _BINS - 1)
            counts = torch.zeros_like(self.noisy_square).index_add_(0, bins, free)
            sums = torch.zeros_like(self.noisy_square).index_add_(0, bins, square)
            seen = torch.lerp(sums / counts.clamp(min=1), self.noisy_square, _SLOWNESS)
            self.noisy_square = torch.where(counts > 0, seen, self.noisy_square)
            self.clean_square = torch.lerp(expected.sum() / free.sum().clamp(min=1), self.clean_square, _SLOWNESS)
            trust = (self.clean_square / self.noisy_square.clamp(min=1e-12)).clamp(max=1.0)
            return trust[bins[clean[1].starts]]

    def _closed_form(self, potential: Potential, noise: Noise, batch: Batch) -> Float[Tensor, " S"]:
        """Weight from the error that a force field's difference has at a sigma; 1 without confidence."""
        sigma = noise.sigma[batch.starts, 0].double()
        if self.options.confidence != "closed_form":
            return torch.ones_like(sigma)
        variance = 2 * self.force_error**2 * -torch.expm1(-(sigma**2) / (2 * self.options.length**2))
        tolerance = (self.options.tolerance * potential.scale) ** 2
        return tolerance / (tolerance + variance)

    def _independent_term(self, potential: Potential, noisy: Batch) -> Tensor:
        """Mean square of the independent head's error, summed over x, y, z (the paper's reduction)."""
        found = self.noisy_force_head(potential.backbone(noisy), noisy)
        residual = found - (noisy.targets["forces"] / potential.scale).to(found.dtype)
        return mean_of_rows(residual.square().sum(-1, keepdim=True), ~noisy.fixed)

    @staticmethod
    def _spring_term(
        potential: Potential, clean: Prediction, noisy: Prediction, change: Float[Tensor, "N 3"], batch: Batch
    ) -> Tensor:
        """What the springs' own weights learn from: the main head's difference of forces, which learns nothing here."""
        seen = (noisy.forces - clean.forces).detach()
        return mean_of_rows(((change - seen) / potential.scale.to(seen.dtype)).square(), ~batch.fixed)


def _force_error(curvature: ForceFieldDifference, dataset: Any) -> Tensor:
    """Root mean square error of a force field's forces on the training data, in eV/Å."""
    known = getattr(curvature.force_field, "force_error", None)
    if known is not None:  # on structures left out of the fit
        return known.clone()
    error = curvature.force_field.columns(dataset)["forces"] - dataset.targets["forces"]
    if curvature.less is not None:
        error = error - curvature.less.columns(dataset)["forces"]
    return torch.as_tensor(float(np.sqrt(np.square(error).mean())), dtype=torch.float64)
