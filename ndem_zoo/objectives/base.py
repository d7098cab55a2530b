"""The contract of an objective, and the supervised terms that all of them share.

An objective gets a potential, a batch and a random generator, and returns named, weighted terms; the training loop
minimizes their sum. It alone knows of noise, auxiliary heads and weights.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real  # numpy's numbers too
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, sum_over_atoms
from ndem_zoo.models.base import Head
from ndem_zoo.models.potential import Potential, Prediction
from ndem_zoo.noise import Noise, SigmaPer, SigmaSample, gaussian, masked_gaussian
from ndem_zoo.physics import safe_norm
from ndem_zoo.shares import Cut

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset

Loss = Literal["mse", "l1", "smooth_l1", "l2mae"]
WeightSchedule = Literal["constant", "decay", "warmup"]


def _l2(error: Tensor, zero: Tensor, reduction: str) -> Tensor:
    """Length of each row of forces, absolute value of anything else."""
    return safe_norm(error) if error.dim() > 1 else error.abs()


#: Losses of errors and zeros, by name.
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "l2mae": _l2}


@dataclass(frozen=True)
class SupervisedLoss:
    """Weights and form of the supervised terms.

    Attributes
    ----------
    energy_weight, force_weight
        Weights of the two terms; 0 leaves one out (Table 7: 1 and 30).
    loss
        ``"mse"`` (TorchMD-NET), ``"smooth_l1"`` with beta 1 (Frad) or ``"l1"``, of energies per structure and of force
        components, both divided by the potential's scale; ``"l2mae"`` (EquiformerV2 on OC20): absolute errors of energies
        and lengths of the errors of forces. Forces on fixed atoms do not count.
    target
        Name of the label in the place of the energy.
    """

    energy_weight: float = 1.0
    force_weight: float = 30.0
    loss: Loss = "mse"
    target: str = "energy"

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, Loss)
        check_not_negative("energy_weight", self.energy_weight)
        check_not_negative("force_weight", self.force_weight)
        if self.energy_weight == 0 and self.force_weight == 0:
            raise ConfigError("energy_weight and force_weight are both 0: there is nothing to learn")

    @property
    def has_terms(self) -> bool:
        """Whether any label is learned; False in pre-training."""
        return bool(self.requires)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term, by the name of its label."""
        return {self.target: self.energy_weight, "forces": self.force_weight}

    @property
    def requires(self) -> frozenset[str]:
        """Labels that the terms need."""
        return frozenset(name for name, weight in self.weights.items() if weight)

    def terms(
        self, prediction: Prediction, batch: Batch, scale: Tensor, counts: Bool[Tensor, " N"] | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms of a prediction against the batch's labels.

        Parameters
        ----------
        prediction, batch
            What is compared.
        scale
            Of the potential.
        counts : (N,) bool, optional
            Atoms whose forces count; default those that are not fixed.

        Notes
        -----
        Energies are subtracted in float64, before anything is rounded; see `Potential`.
        """
        dtype = torch.promote_types(prediction.features.scalars.dtype, torch.float32)
        errors = {}
        if self.energy_weight:
            errors[self.target] = ((prediction.value - batch.targets[self.target]) / scale).to(dtype)
        if self.force_weight:
            errors["forces"] = (prediction.forces.to(dtype) - batch.targets["forces"].to(dtype)) / scale.to(dtype)
        return self.terms_of_errors(errors, ~batch.fixed if counts is None else counts)

    def terms_of_errors(
        self,
        errors: dict[str, Tensor],
        counts: Bool[Tensor, " N"] | None = None,
        importance: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms of errors of the target (S,) and of ``forces`` (N, 3), both divided by the scale.

        `counts` (N,) says whose forces count; default: everybody's. `importance` multiplies the loss of each structure (S,)
        and of each atom's forces (N,), by the name of the label.
        """
        loss = LOSSES[self.loss]
        found = {}
        for name, error in errors.items():
            each = loss(error, torch.zeros_like(error), reduction="none")
            if importance is not None:
                each = each * importance[name].view(-1, *[1] * (each.dim() - 1))
            average = mean_of_rows(each, counts) if name == "forces" and counts is not None else each.mean()
            found[name] = self.weights[name] * average
        return found


@dataclass(frozen=True)
class NoLabels(SupervisedLoss):
    """No supervised terms: what an objective gets in pre-training, where its auxiliary term is all there is."""

    energy_weight: float = 0.0
    force_weight: float = 0.0

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, Loss)
        if self.energy_weight or self.force_weight:
            raise ConfigError(
                f"energy_weight={self.energy_weight!r}, force_weight={self.force_weight!r}: in pre-training both are 0"
            )


def rows_that_count(counts: Bool[Tensor, " N"], batch: Batch) -> Float[Tensor, " S"]:
    """How many atoms of each structure count, in float64: see `Objective.rows`."""
    return sum_over_atoms(counts.double(), batch)


def mean_of_rows(values: Tensor, counts: Bool[Tensor, " N"]) -> Tensor:
    """Mean over the rows of `values`, (N,) or (N, d), that count, as a scalar; 0 if there are none."""
    values = values.mean(dim=-1) if values.dim() > 1 else values
    return (values * counts).sum() / counts.sum().clamp(min=1)


@dataclass(frozen=True)
class NoiseOptions:
    """Options of every objective that moves atoms by Gaussian noise.

    Attributes
    ----------
    sigma
        Noise in Å, or a range (min, max) (NDeM, Table 7: 0.05). Choice: the same for all objectives, so that they are
        compared at equal noise.
    ratio
        Fraction of the atoms that is moved.
    sigma_sample, sigma_per
        How a sigma is drawn from a range, and for what (NDeM: ``"batch"``; Choice: ``"structure"``, less variance).
    reuse_edges
        True keeps the edges of the clean structure, with new vectors: for small noise, where neighbors hardly change,
        and their search (12 Å, 20 neighbors: OC20) costs time. Small molecules get all pairs, and no search.
    """

    sigma: float | tuple[float, float] = 0.05
    ratio: float = 1.0
    sigma_sample: SigmaSample = "loguniform"
    sigma_per: SigmaPer = "structure"
    reuse_edges: bool = False

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_ratio(self.ratio)
        check_choice("sigma_sample", self.sigma_sample, SigmaSample)
        check_choice("sigma_per", self.sigma_per, SigmaPer)

    def displace(
        self, batch: Batch, rng: torch.Generator, cutoff: float, shrink: float = 1.0, **options: Any
    ) -> tuple[Batch, Noise]:
        """The batch with atoms moved, its edges complete up to `cutoff` Å, and what was done; see `masked_gaussian`.

        `shrink` multiplies sigma.
        """
        how = {"sample": self.sigma_sample, "per": self.sigma_per, "reuse_edges": self.reuse_edges, **options}
        is_range = isinstance(self.sigma, (tuple, list))
        sigma = tuple(shrink * value for value in self.sigma) if is_range else shrink * self.sigma
        return masked_gaussian(batch, rng, cutoff=cutoff, sigma=sigma, ratio=self.ratio, **how)

    def draw(self, batch: Batch, rng: torch.Generator, **options: Any) -> Noise:
        """The noise alone, with nothing moved; see `gaussian`."""
        how = {"sample": self.sigma_sample, "per": self.sigma_per, **options}
        return gaussian(batch, rng, sigma=self.sigma, ratio=self.ratio, **how)


class Objective(nn.Module, ABC):
    """Something to minimize.

    A subclass names its options in a dataclass `Options`, builds its heads in `build`, and returns named terms.

    Parameters
    ----------
    supervised
        The supervised terms.
    weight
        Weight of the auxiliary term (the paper's lambda).
    weight_schedule
        ``"constant"``; ``"decay"``, linearly to 0 over the training; ``"warmup"``, linearly from 0 over its first tenth.
    options
        Values for the fields of `Options`.

    Raises
    ------
    ConfigError
        For an option that does not exist or a value that is not allowed.

    Attributes
    ----------
    progress : float
        Fraction of the training that is done, 0 to 1; set by the loop before each step.
    """

    Options: ClassVar[type]
    #: Whether the backbone has to accept `node_vectors`: its option `encode_vectors` is then switched on.
    encodes_vectors: ClassVar[bool] = False
    #: Options that the contract tests build it with.
    probed_with: ClassVar[dict[str, Any]] = {}
    #: Labels beyond those of the supervised terms.
    extra_requirements: ClassVar[frozenset[str]] = frozenset()
    #: Whether there is a term besides the supervised ones, which pre-training could learn.
    has_auxiliary_term: ClassVar[bool] = True
    #: Whether all that it draws is drawn for atoms and structures, such that a batch in shares has the noise of the whole.
    shares_noise: ClassVar[bool] = True
    #: Attribute with the head that tells the noise of a structure, and its sign: +1 if it gives epsilon / sigma, -1 if minus
    #: that. It is taken over from a pre-trained model, negated where the signs differ.
    denoises_with: ClassVar[tuple[str, int] | None] = ("noise_head", 1)

    def __init__(
        self,
        supervised: SupervisedLoss | None = None,
        weight: float = 1.0,
        weight_schedule: WeightSchedule = "constant",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_not_negative("weight", weight)
        check_choice("weight_schedule", weight_schedule, WeightSchedule)
        self.supervised = supervised or SupervisedLoss()
        self.weight, self.weight_schedule = float(weight), weight_schedule
        self.options = make_options(self.Options, options or {}, type(self).__name__)
        self.progress = 0.0

    @property
    def requires(self) -> frozenset[str]:
        """Labels that must be present; checked before the first step."""
        return self.supervised.requires | self.extra_requirements

    def prepare(self, dataset: MolecularDataset) -> MolecularDataset:
        """The dataset with what the objective needs besides labels, such as bonds; here: as it is.

        Estimators call it for training and validation data, before they check the labels; nothing is built yet.

        Raises
        ------
        DataError
            If the structures cannot have what is needed.
        """
        return dataset

    def complete(self, dataset: MolecularDataset) -> MolecularDataset:
        """The training data with what the objective, now built, computes of each structure once; here: as they are.

        Estimators call it before every training.
        """
        return dataset

    def build(self, potential: Potential, dataset: Any = None) -> None:
        """Make what belongs to the objective alone: once, before the first step.

        Parameters
        ----------
        potential
            The potential that will be trained.
        dataset
            The training data, for objectives that look at them as a whole; None when a saved objective is rebuilt,
            whose buffers are loaded afterwards.
        """

    @abstractmethod
    def forward(self, potential: Potential, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Named, weighted scalars; their sum is minimized.

        Parameters
        ----------
        potential
            The potential in training.
        batch
            Structures with labels.
        rng
            The only source of randomness, on the batch's device.
        """

    @property
    def needs_whole_batch(self) -> bool:
        """Whether it looks at a step's batch as a whole, such that it cannot be cut into shares."""
        return False

    def rows(self, batch: Batch, rng: torch.Generator) -> dict[str, Float[Tensor, " S"]]:
        """Over how many rows of each structure a term is a mean; of a term that is not named, its atoms that are not fixed.

        A batch may be cut into shares (`ndem_zoo.shares`): the mean over all of it is then that over each share, weighted by
        the share's rows.

        Parameters
        ----------
        batch
            The whole batch, without positions, edges and labels.
        rng
            Draws what it drew in `forward`, for terms that are means over what was moved.

        Returns
        -------
        rows : dict
            (S,) float64, by the name of the term; terms that `forward` does not return do not matter.
        """
        return {self.supervised.target: torch.ones(batch.n_systems, dtype=torch.float64, device=batch.pos.device)}

    def counted(self, terms: dict[str, Tensor], cut: Cut, rng: torch.Generator) -> dict[str, Tensor]:
        """The terms of a share, each times its part of the rows that the term is a mean over in the whole batch.

        Parameters
        ----------
        terms
            Scalars, what `forward` returned for the share.
        cut
            What the share is a share of.
        rng
            As it was for the whole batch, before anything was drawn.
        """
        with torch.no_grad():
            rows, free = self.rows(cut.whole, rng), rows_that_count(~cut.whole.fixed, cut.whole)
            parts = {name: cut.fraction(rows.get(name, free)) for name in terms}
        return {name: parts[name].to(term.dtype) * term for name, term in terms.items()}

    def denoising_head(self) -> tuple[Head, int] | None:
        """The head that `denoises_with` names and its sign; None if there is none."""
        name, sign = self.denoises_with or ("", 0)
        head = getattr(self, name, None)
        return (head, sign) if isinstance(head, Head) else None

    def current_weight(self) -> float:
        """Weight of the auxiliary term at this point of the training."""
        if self.weight_schedule == "decay":
            return self.weight * (1.0 - self.progress)
        if self.weight_schedule == "warmup":
            return self.weight * min(1.0, 10.0 * self.progress)
        return self.weight


def make_options(cls: type, given: dict[str, Any], owner: str) -> Any:
    """Build the dataclass `cls` from `given`; an unknown name is an error that lists the known ones."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in given:
        if name not in known:
            allowed = ", ".join(known) if known else "no options"
            raise ConfigError(f"objective {owner} has no option {name!r}; it has {allowed}")
    return cls(**given)


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Raise ConfigError unless `value` is one of the strings of the Literal `allowed`."""
    if value not in get_args(allowed):
        raise ConfigError(f"{name}={value!r}; allowed are {', '.join(get_args(allowed))}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is a number >= 0."""
    if not (isinstance(value, Real) and 0 <= value < float("inf")):
        raise ConfigError(f"{name}={value!r}; it must be a number >= 0")


def check_sigma(sigma: Any) -> None:
    """Raise ConfigError unless `sigma` is a positive number or an ascending pair of them (Å)."""
    values = tuple(sigma) if isinstance(sigma, (tuple, list)) else (sigma,)
    is_valid = all(isinstance(v, Real) and 0 < v < float("inf") for v in values) and len(values) in (1, 2)
    if not is_valid or (len(values) == 2 and values[0] > values[1]) or (len(values) == 1 and values[0] is not sigma):
        raise ConfigError(
            f"sigma={sigma!r}; allowed are a positive number in Å or an ascending pair (min, max) of them"
        )


def check_ratio(ratio: Any, name: str = "ratio") -> None:
    """Raise ConfigError unless 0 < `ratio` <= 1."""
    if not (isinstance(ratio, Real) and 0 < ratio <= 1):
        raise ConfigError(f"{name}={ratio!r}; it must be above 0 and at most 1")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ConfigError unless `value` is a whole number that is not below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name}={value!r}; it must be a whole number, {least} or more")
