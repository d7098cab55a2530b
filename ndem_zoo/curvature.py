"""What a displacement does to the forces: dF = -K epsilon, for different models of the curvature K, or beyond first order.

A `Curvature` answers one question, `force_change(batch, epsilon)`. NDeM's paper takes K = c * identity; here are also one
constant per element, springs between atoms, the difference that a force field makes (`ndem_zoo.forcefields`), and the
Hessian of the potential in training. `explained` tells what share of true force changes each gets right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.graph import Batch, displace, sum_by_index
from ndem_zoo.internal_coordinates import BOND_STIFFNESS, lindh_stiffness
from ndem_zoo.physics import BOLTZMANN, MAX_Z, forces_from_energy, hessian_vector_product, safe_norm

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset
    from ndem_zoo.forcefields.base import ForceField
    from ndem_zoo.models.potential import Potential


#: What `ForceFieldDifference.slopes` may take at most.
_MOST_BYTES = 4 * 2**30


class Curvature(nn.Module, ABC):
    """A model of how forces change when atoms move."""

    @abstractmethod
    def force_change(
        self, batch: Batch, epsilon: Float[Tensor, "N 3"], moved: Batch | None = None
    ) -> Float[Tensor, "N 3"]:
        """F(X + epsilon) - F(X) in eV/Å for displacements in Å.

        Parameters
        ----------
        batch
            Structures before they are moved.
        epsilon : (N, 3)
            Displacements in Å.
        moved
            The batch afterwards, with edges of its own, where it is there already.
        """


class ElementCurvature(Curvature):
    """One constant for each element: dF_i = -c[z_i] epsilon_i.

    Parameters
    ----------
    constants : (MAX_Z + 1,)
        Curvatures c in eV/Å² by atomic number.

    Raises
    ------
    ConfigError
        If a constant is negative or not finite.
    """

    def __init__(self, constants: Float[np.ndarray, " Z"]) -> None:
        super().__init__()
        constants = np.asarray(constants, dtype=np.float64)
        if constants.shape != (MAX_Z + 1,) or not np.isfinite(constants).all() or (constants < 0).any():
            raise ConfigError(f"curvatures must be {MAX_Z + 1} numbers >= 0 in eV/Å², received {constants}")
        self.register_buffer("constants", torch.as_tensor(constants))

    def force_change(
        self, batch: Batch, epsilon: Float[Tensor, "N 3"], moved: Batch | None = None
    ) -> Float[Tensor, "N 3"]:
        """-c[z_i] epsilon_i in eV/Å."""
        return -self.constants.index_select(0, batch.z).to(epsilon.dtype).unsqueeze(-1) * epsilon


def isotropic(constant: float) -> ElementCurvature:
    """The paper's K = c * identity, with c in eV/Å² for all elements."""
    return ElementCurvature(np.full(MAX_Z + 1, float(constant)))


def boltzmann(z: np.ndarray, forces: np.ndarray, temperature: float) -> ElementCurvature:
    """Mean curvature of each element in a thermal sample, from its forces alone.

    For Boltzmann samples, integration by parts gives <F_i F_j> = kT <H_ij>; so c_z = <F²> / kT, averaged over the
    components of all atoms of element z.

    Parameters
    ----------
    z : (A,)
        Atomic numbers.
    forces : (A, 3)
        Forces in eV/Å.
    temperature
        Of the sample in K.

    Raises
    ------
    DataError
        If a force is not finite.
    ConfigError
        If the temperature is not positive.

    Notes
    -----
    Stiff modes dominate <F²>, and samples of a few picoseconds scatter by some ten percent. Where geometries were
    sampled with another potential than the labels' (rMD17, relaxations) the identity does not hold.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature!r} K; it must be positive")
    square = np.square(np.asarray(forces, dtype=np.float64)).mean(axis=1)
    if not np.isfinite(square).all():
        atom = int(np.flatnonzero(~np.isfinite(square))[0])
        raise DataError(f"atom {atom} of the training data has forces {forces[atom]}, which are not finite")
    total = np.bincount(z, weights=square, minlength=MAX_Z + 1)
    number = np.maximum(np.bincount(z, minlength=MAX_Z + 1), 1)
    return ElementCurvature(total / number / (BOLTZMANN * temperature))


class Springs(Curvature):
    """Springs along the lines between atoms: dF_i = -sum_j k_ij u_ij (u_ij . (epsilon_i - epsilon_j)).

    k_ij is Lindh's, exponential in the squared distance, times a factor for the pair of elements: bonds need not be known,
    nets of atoms in a crystal have springs as molecules have.

    Parameters
    ----------
    factors : (MAX_Z + 1, MAX_Z + 1), optional
        Symmetric factors >= 0; default 1, Lindh's own.
    is_learned
        Whether the factors are weights, for objectives that let the model tell them.

    Notes
    -----
    Translations and, to first order, rotations of the whole change nothing. Edges beyond a few Å have springs of no
    strength, so a batch's edges serve, whatever their cutoff.
    """

    def __init__(self, factors: Float[np.ndarray, "Z Z"] | None = None, is_learned: bool = False) -> None:
        super().__init__()
        table = np.ones((MAX_Z + 1, MAX_Z + 1)) if factors is None else np.asarray(factors, dtype=np.float64)
        if table.shape != (MAX_Z + 1, MAX_Z + 1) or not np.isfinite(table).all() or (table < 0).any():
            raise ConfigError(f"factors of springs must be finite and >= 0, of shape {(MAX_Z + 1,) * 2}")
        # A learned factor is the exponential of a weight: it stays positive.
        self.exponents = nn.Parameter(torch.zeros(table.shape, dtype=torch.float64)) if is_learned else None
        self.register_buffer("factors", torch.as_tensor(table))

    def stiffness(self, batch: Batch) -> tuple[Float[Tensor, " E"], Float[Tensor, "E 3"]]:
        """Spring constant of each edge in eV/Å², and its direction."""
        vectors = batch.vectors().double()
        distance = safe_norm(vectors)
        direction = vectors / distance.masked_fill(distance == 0, 1.0).unsqueeze(-1)
        ends = batch.z.index_select(0, batch.dst), batch.z.index_select(0, batch.src)
        factor = self.factors[ends]
        if self.exponents is not None:
            factor = factor * torch.exp(0.5 * (self.exponents[ends] + self.exponents[ends[::-1]]))
        return factor * lindh_stiffness(*ends, distance), direction

    def force_change(
        self, batch: Batch, epsilon: Float[Tensor, "N 3"], moved: Batch | None = None
    ) -> Float[Tensor, "N 3"]:
        """Forces of the springs after the displacement, to first order, in eV/Å."""
        constant, direction = self.stiffness(batch)
        ends = epsilon.double()
        stretch = (direction * (ends.index_select(0, batch.dst) - ends.index_select(0, batch.src))).sum(-1)
        pull = -(constant * stretch).unsqueeze(-1) * direction
        return sum_by_index(pull, batch.dst, len(batch.z)).to(epsilon.dtype)


def fitted_springs(dataset: MolecularDataset, temperature: float, cutoff: float = 3.0) -> Springs:
    """Springs whose factors come from the covariance of the training forces.

    Parameters
    ----------
    dataset
        A thermal sample with forces, drawn from the surface that the forces belong to.
    temperature
        Of the sample in K.
    cutoff
        Longest pair in Å that is looked at. Choice: 3, beyond bonds.

    Raises
    ------
    DataError
        If there are no forces.
    ConfigError
        If the temperature is not positive.

    Notes
    -----
    Eq. For a Boltzmann sample and any field g, <g . F> = -kT <div g>. With g = c(r) u (u . F_j) on atom i, u the direction
    from i to j, this is <c (u . F_i)(u . F_j)> = kT <c u H_ij u + (2 c / r + dc/dr) u . F_j>, and a spring has u H_ij u = -k.
    With c Lindh's constant, factors are the least-squares ones over the bonds of two elements (pairs with a tenth of Lindh's
    constant of a bond or more), at least 0; 1 where there are none.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature!r} K; it must be positive")
    if "forces" not in dataset.targets:
        raise DataError(f"springs are fitted to forces; the dataset has {dataset.tasks}")
    kT = BOLTZMANN * temperature
    right, square = (torch.zeros((MAX_Z + 1) ** 2, dtype=torch.float64) for _ in range(2))
    for start in range(0, len(dataset), 256):
        batch = dataset.select(slice(start, start + 256)).to_batch(cutoff, torch.float64)
        if not len(batch.src):  # atoms alone
            continue
        vectors, forces = batch.vectors(), batch.targets["forces"]
        ends = batch.z.index_select(0, batch.dst), batch.z.index_select(0, batch.src)
        distance = safe_norm(vectors).requires_grad_()
        constant = lindh_stiffness(*ends, distance)
        (slope,) = torch.autograd.grad(constant.sum(), distance)
        constant, distance = constant.detach(), distance.detach()
        direction = vectors / distance.unsqueeze(-1)
        near, far = ((direction * forces.index_select(0, atoms)).sum(-1) for atoms in (batch.dst, batch.src))
        observed = constant * (2 * far / distance - near * far / kT) + slope * far
        kind = ends[0] * (MAX_Z + 1) + ends[1]
        is_near = (constant >= 0.1 * BOND_STIFFNESS).double()
        right.index_add_(0, kind, observed * is_near)
        square.index_add_(0, kind, constant.square() * is_near)
    both = [values.view(MAX_Z + 1, -1) + values.view(MAX_Z + 1, -1).T for values in (right, square)]
    fitted = (both[0] / both[1].clamp(min=1e-300)).clamp(min=0.0)
    return Springs(torch.where(both[1] > 0, fitted, torch.ones_like(fitted)).numpy())


class ForceFieldDifference(Curvature):
    """What a force field says after the displacement less what it says before: exact at any size of displacement.

    Parameters
    ----------
    force_field
        Fitted.
    less
        A prior to which the difference is learned: what it changes is taken off.
    """

    def __init__(self, force_field: ForceField, less: ForceField | None = None) -> None:
        super().__init__()
        self.force_field = force_field
        self.__dict__["less"] = less  # not ours: the potential keeps it

    def force_change(
        self, batch: Batch, epsilon: Float[Tensor, "N 3"], moved: Batch | None = None
    ) -> Float[Tensor, "N 3"]:
        """Difference of the forces in eV/Å."""
        if moved is None:
            cutoffs = [field.cutoff for field in (self.force_field, self.less) if field is not None]
            moved = displace(batch, epsilon, max(cutoffs))
        change = self.force_field(moved).forces - self.force_field(batch).forces
        if self.less is not None:
            change = change - (self.less(moved).forces - self.less(batch).forces)
        return change.to(epsilon.dtype)

    def slopes(self, dataset: MolecularDataset, step: float = 1e-3) -> Float[np.ndarray, "A 3 M"]:
        """Derivatives dF_i/dx_j of all structures in eV/Å², float32, by central differences: for `first_order_change`.

        Parameters
        ----------
        dataset
            Structures (S), with A atoms in all and at most n in one.
        step
            Displacement in Å.

        Returns
        -------
        slopes : (A, 3, 3 n)
            Of each force, by the coordinates of the atoms of its structure, in their order; 0 where there are none.

        Raises
        ------
        ConfigError
            If they would take more than 4 GiB.
        """
        largest = int(dataset.counts.max(initial=0))
        n_bytes = 36 * len(dataset.z) * largest
        if n_bytes > _MOST_BYTES:
            raise ConfigError(
                f"derivatives of the forces of {len(dataset.z)} atoms, up to {largest} in a structure, take "
                f"{n_bytes / 2**30:.1f} GiB; allowed are {_MOST_BYTES / 2**30:.0f}: leave first_order=False"
            )
        place = np.arange(len(dataset.z)) - np.repeat(dataset.ptr[:-1], dataset.counts)
        found = np.empty((len(dataset.z), 3, 3 * largest), np.float32)
        for column in range(3 * largest):
            shift = np.zeros_like(dataset.pos)
            shift[place == column // 3, column % 3] = step
            after, before = (self._forces(dataset.replace_positions(dataset.pos + s)) for s in (shift, -shift))
            found[:, :, column] = (after - before) / (2 * step)
        return found

    def _forces(self, dataset: MolecularDataset) -> Float[np.ndarray, "A 3"]:
        forces = self.force_field.columns(dataset)["forces"]
        return forces if self.less is None else forces - self.less.columns(dataset)["forces"]


def first_order_change(
    slopes: Float[Tensor, "N 3 M"], batch: Batch, epsilon: Float[Tensor, "N 3"]
) -> Float[Tensor, "N 3"]:
    """Change of the forces in eV/Å to first order in the displacements.

    Parameters
    ----------
    slopes : (N, 3, 3 n)
        See `ForceFieldDifference.slopes`.
    batch
        Structures.
    epsilon : (N, 3)
        Displacements in Å.
    """
    moves = epsilon.new_zeros(batch.n_systems, slopes.shape[2] // 3, 3)
    moves[batch.system, batch.places] = epsilon
    own = moves.flatten(1).index_select(0, batch.system).unsqueeze(-1)
    return (slopes.to(epsilon.dtype) @ own).squeeze(-1)


class NoChange(Curvature):
    """Forces stay as they are: noise as plain augmentation; right for what is left beyond a good prior."""

    def force_change(
        self, batch: Batch, epsilon: Float[Tensor, "N 3"], moved: Batch | None = None
    ) -> Float[Tensor, "N 3"]:
        """Zeros."""
        return torch.zeros_like(epsilon)


class ModelHessian(Curvature):
    """The Hessian of a potential itself: -H epsilon by one more derivative, detached.

    Parameters
    ----------
    potential
        With gradient forces; not a part of this module. A prior that it has counts; in training it has none.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        if potential.force_mode != "gradient":
            raise ConfigError(f"a potential with forces={potential.force_mode!r} has no Hessian: use 'gradient'")
        self.__dict__["potential"] = potential

    def force_change(
        self, batch: Batch, epsilon: Float[Tensor, "N 3"], moved: Batch | None = None
    ) -> Float[Tensor, "N 3"]:
        """-H epsilon in eV/Å, of the network as it is now, and of its prior."""
        potential, backbone = self.potential, self.potential.backbone
        dtype = next(potential.parameters()).dtype
        plan, backbone.plan = backbone.plan, "eager"  # hand-written derivatives go one order less far
        try:
            with torch.enable_grad(), potential.without_prior():
                change = _minus_hessian(lambda b: potential(b, create_graph=True).forces, batch, epsilon, dtype)
        finally:
            backbone.plan = plan
        if potential.prior is not None:
            with torch.enable_grad():
                change = change + _minus_hessian(
                    lambda b: forces_from_energy(potential.prior.energy(b), b.pos, create_graph=True),
                    batch,
                    epsilon,
                    torch.float64,
                )
        return change.to(epsilon.dtype)


def _minus_hessian(
    forces_of: Callable[[Batch], Tensor], batch: Batch, epsilon: Float[Tensor, "N 3"], dtype: torch.dtype
) -> Float[Tensor, "N 3"]:
    """-H epsilon from forces with a graph, computed in `dtype`."""
    pos = batch.pos.detach().to(dtype).requires_grad_()
    forces = forces_of(batch.to(dtype=dtype).replace(pos=pos))
    if not forces.requires_grad:  # nothing that depends on positions
        return torch.zeros_like(pos)
    return -hessian_vector_product(forces, pos, epsilon.detach().to(dtype)).detach()


# ------------------------------------------------------------------------------------------------------ what is explained


def explained(
    curvature: Curvature,
    dataset: MolecularDataset,
    reference: Any,
    sigmas: Iterable[float] = (0.01, 0.02, 0.05, 0.1),
    seed: int = 0,
) -> dict[float, float]:
    """Share of true force changes under Gaussian noise that a curvature gets right.

    Parameters
    ----------
    curvature
        The model.
    dataset
        Structures to displace, all atoms that are not fixed.
    reference
        What is true: a `ForceField`, a fitted model of ours, or an ASE calculator.
    sigmas
        Standard deviations in Å.
    seed
        Of the noise.

    Returns
    -------
    share : dict
        One minus the sum of squared errors over the sum of squared changes, by sigma: 1 is all, 0 what "no change" gets,
        and it can be negative.
    """
    rng = np.random.default_rng(seed)
    free = np.ones((len(dataset.z), 1)) if dataset.fixed is None else ~dataset.fixed[:, None]
    before = reference_forces(reference, dataset)
    found = {}
    for sigma in sigmas:
        moved = dataset.replace_positions(dataset.pos + sigma * rng.standard_normal(dataset.pos.shape) * free)
        truth = reference_forces(reference, moved) - before
        found[float(sigma)] = explained_between(curvature, dataset, moved, truth)
    return found


def explained_between(
    curvature: Curvature,
    before: MolecularDataset,
    after: MolecularDataset,
    change: Float[np.ndarray, "A 3"] | None = None,
) -> float:
    """Share of the force changes between structures and moved ones that a curvature gets right; see `explained`.

    Parameters
    ----------
    curvature
        The model.
    before, after
        The same structures at two moments, such as neighboring frames of a trajectory. Atoms must not have been wrapped
        into the cell in between.
    change : (A, 3), optional
        True changes of the forces in eV/Å; default the difference of the labels. Fixed atoms do not count.

    Raises
    ------
    DataError
        If the two do not hold the same atoms.
    """
    if len(before) != len(after) or not np.array_equal(before.z, after.z) or not np.array_equal(before.ptr, after.ptr):
        raise DataError("the structures before and after must have the same atoms in the same order")
    change = after.targets["forces"] - before.targets["forces"] if change is None else change
    cutoff, device = _radius_and_device(curvature)
    error = total = 0.0
    for start in range(0, len(before), 64):
        part = slice(start, start + 64)
        batch, moved = (d.select(part).to_batch(cutoff, torch.float64).to(device) for d in (before, after))
        atoms = slice(before.ptr[start], before.ptr[min(start + 64, len(before))])
        truth = torch.as_tensor(change[atoms], device=device)
        guess = curvature.force_change(batch, moved.pos - batch.pos, moved).detach().double()
        free = (~batch.fixed).double().unsqueeze(-1)
        error += float(((truth - guess) * free).square().sum())
        total += float((truth * free).square().sum())
    return 1.0 - error / total if total else float("nan")


def _radius_and_device(curvature: Curvature) -> tuple[float, torch.device]:
    """Up to where a curvature looks at edges, in Å (at least 6, for springs), and where it computes."""
    potential = getattr(curvature, "potential", None)
    seen = [getattr(curvature, "force_field", None), getattr(curvature, "less", None)]
    seen += [] if potential is None else [potential.backbone, potential.prior]
    owner = curvature if potential is None else potential
    tensors = chain(owner.parameters(), owner.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return max([6.0, *(part.cutoff for part in seen if part is not None)]), device


def reference_forces(reference: Any, dataset: MolecularDataset) -> Float[np.ndarray, "A 3"]:
    """Forces in eV/Å of all structures, from a force field, a model of ours, or an ASE calculator."""
    if hasattr(reference, "columns"):
        return reference.columns(dataset)["forces"]
    if hasattr(reference, "predict"):
        return np.concatenate([np.asarray(f).reshape(-1, 3) for f in reference.predict(dataset)["forces"]])
    if not hasattr(reference, "get_forces"):
        raise ConfigError(f"{reference!r} gives no forces: pass a ForceField, a fitted model, or an ASE calculator")
    return np.concatenate([reference.get_forces(dataset.atoms(i)) for i in range(len(dataset))])


# ----------------------------------------------------------------------------------------------------------------- by name

#: Curvatures that are not force fields, by name.
NAMED = ("none", "isotropic", "element", "springs", "lindh", "learned_springs", "model")


def make_curvature(
    name: str, potential: Potential, dataset: MolecularDataset | None, *, constant: float | None, temperature: float
) -> Curvature:
    """The curvature of a name, made for training data.

    Parameters
    ----------
    name
        One of `NAMED`: ``"none"``; ``"isotropic"``, with `constant` in eV/Å²; ``"element"``, `boltzmann`; ``"springs"``,
        `fitted_springs`; ``"lindh"``, springs with Lindh's constants; ``"learned_springs"``; ``"model"``, `ModelHessian`. Or
        a force field of `ndem_zoo.registry.FORCE_FIELDS`, or a sum of them.
    potential
        In training; a prior that it has is taken into account.
    dataset
        The training data, less the prior; None if constants are loaded afterwards.
    constant, temperature
        See `name`; K.

    Raises
    ------
    ConfigError
        If there is none of this name, or it does not go with the prior.
    """
    from ndem_zoo.forcefields import make_force_field

    prior = potential.prior
    if name in ("element", "springs", "lindh", "learned_springs") and prior is not None:
        raise ConfigError(
            f"curvature={name!r} describes whole forces; with a prior use a force field, 'model' or 'none'"
        )
    if name == "none":
        return NoChange()
    if name == "isotropic":
        return isotropic(0.0 if constant is None else constant)
    if name == "element":
        return isotropic(0.0) if dataset is None else boltzmann(dataset.z, dataset.targets["forces"], temperature)
    if name in ("lindh", "learned_springs"):
        return Springs(is_learned=name == "learned_springs")
    if name == "springs":
        return Springs() if dataset is None else fitted_springs(dataset, temperature)
    if name == "model":
        return ModelHessian(potential)
    try:
        force_field = make_force_field(name)
    except ConfigError as error:
        raise ConfigError(f"curvature={name!r}; allowed are {', '.join(NAMED)}, or a force field: {error}") from error
    # What is fitted to the labels describes what the prior left; what is published describes whole forces.
    parts = getattr(force_field, "parts", [force_field])
    is_whole = not all(part.is_fitted_to_forces for part in parts)
    if is_whole and prior is not None and len(parts) > 1:
        raise ConfigError(
            f"curvature={name!r} with a prior: name one force field, or make it the prior with curvature='none'"
        )
    if dataset is not None:
        force_field.fit(dataset)
    return ForceFieldDifference(force_field, prior if is_whole else None)
