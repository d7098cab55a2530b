"""A potential: backbone, heads, reference energies and the way forces are made.

The one object that training, prediction, the calculator and every export share. Energies and forces leave it in eV and
eV/Å, other targets in the unit of `ndem_zoo.properties`; inside, the network works in units of `scale`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from ase.data import atomic_masses
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, sum_over_atoms
from ndem_zoo.models.base import Backbone, Features
from ndem_zoo.physics import MAX_Z, forces_from_energy, safe_norm
from ndem_zoo.properties import property_of

if TYPE_CHECKING:
    from ndem_zoo.forcefields.base import ForceField

ForceMode = Literal["gradient", "direct", "none"]


#: Choice: what a spatial extent is counted in, in Å²: about the sum of squared distances to the center in a molecule of QM9.
EXTENT = 100.0


class Prediction(NamedTuple):
    """What a potential says about a batch.

    Attributes
    ----------
    value : (S,) float64
        The target: total energies in eV, reference energies included, or another property in its unit.
    forces : (N, 3) or None
        Forces in eV/Å; None when the potential has none or none were asked for.
    features : Features
        Of the backbone, for objectives that read them with their own heads.
    """

    value: Float[Tensor, " S"]
    forces: Float[Tensor, "N 3"] | None
    features: Features

    @property
    def energy(self) -> Float[Tensor, " S"]:
        """`value`, where it is an energy."""
        return self.value


class Potential(nn.Module):
    """Energy and forces of structures, or another property of them.

    E = shift + sum_i (reference[z_i] + scale * s_i), with s_i the scalar head's output; F = -dE/dpos (``"gradient"``),
    or scale times the output of a vector head (``"direct"``), or not at all (``"none"``). Properties with another readout
    (`ndem_zoo.properties`), with r_i the position relative to the center of mass: the dipole moment, scale times the
    length of sum_i (v_i + s_i r_i), and the spatial extent, sum_i (reference[z_i] + scale * s_i) r_i² / (100 Å²).

    Parameters
    ----------
    backbone
        Network from structures to features.
    forces
        Where forces come from; only energies have any.
    reference : (MAX_Z + 1,), optional
        Reference energies in eV (or the target's unit) by atomic number; default zeros. Kept in float64 whatever the
        network's dtype: the float32 spacing at aspirin's total energy is 0.03 kcal/mol.
    scale
        Unit of the network: of energy in eV and force in eV/Å, or the target's.
    shift
        Added once for each structure, in the unit of the target.
    target
        Name of what is predicted.

    Attributes
    ----------
    prior : ForceField or None
        A classical potential whose energies and forces are added: what is learned is the difference to it. Not a
        submodule: no weight of it is trained, and the training, whose labels are less the prior's, runs without it.

    Raises
    ------
    ConfigError
        For an unknown force mode, a scale that is not positive, or forces of something that is no energy.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        forces: ForceMode = "gradient",
        reference: Float[np.ndarray, " Z"] | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
        target: str = "energy",
    ) -> None:
        super().__init__()
        if forces not in get_args(ForceMode):
            raise ConfigError(f"forces={forces!r}; allowed are {', '.join(get_args(ForceMode))}")
        if forces != "none" and target != "energy":
            raise ConfigError(f"forces={forces!r} with target={target!r}: only an energy has forces; use forces='none'")
        if not (np.isfinite(scale) and scale > 0):
            raise ConfigError(f"scale={scale!r} eV; it must be a positive number")
        self.backbone, self.target = backbone, target
        self.force_mode = forces
        self.__dict__["prior"] = None
        self.readout = property_of(target).readout
        self.energy_head = backbone.charge_head() if self.readout == "dipole" else backbone.scalar_head()
        self.force_head = backbone.vector_head() if forces == "direct" else None
        if self.readout != "sum":
            masses = torch.as_tensor(atomic_masses[: MAX_Z + 1])
            self.register_buffer("masses", masses, persistent=False)
        energies = np.zeros(MAX_Z + 1) if reference is None else np.asarray(reference, dtype=np.float64)
        self.register_buffer("reference", torch.as_tensor(energies))
        self.register_buffer("scale", torch.tensor(float(scale), dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(float(shift), dtype=torch.float64))

    @contextmanager
    def with_prior(self, prior: ForceField | None) -> Iterator[None]:
        """With another prior, or none, for a while."""
        before, self.__dict__["prior"] = self.prior, prior
        try:
            yield
        finally:
            self.__dict__["prior"] = before

    def without_prior(self) -> AbstractContextManager[None]:
        """The network alone, as it is trained."""
        return self.with_prior(None)

    def attach_prior(self, prior: ForceField | None) -> None:
        """Add the energies and forces of `prior` from now on."""
        self.__dict__["prior"] = prior

    def _apply(self, fn, recurse: bool = True):
        if self.prior is not None:
            self.prior._apply(fn, recurse)
        # Pitfall: Module.float() would round the reference energies; only their device may change.
        exact = {name: getattr(self, name) for name in ("reference", "scale", "shift", "masses") if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(
        self,
        batch: Batch,
        *,
        node_vectors: Float[Tensor, "N 3"] | None = None,
        need_forces: bool = True,
        create_graph: bool | None = None,
    ) -> Prediction:
        """Energies and forces of a batch.

        Parameters
        ----------
        batch
            Structures.
        node_vectors : (N, 3), optional
            Passed on to the backbone.
        need_forces
            False skips the derivative.
        create_graph
            Whether gradient forces can be differentiated; default: in training mode only.

        Notes
        -----
        Works under ``torch.no_grad()`` too: the derivative is taken with gradients enabled.
        """
        prediction = self._of_network(batch, node_vectors, need_forces, create_graph)
        if self.prior is None:
            return prediction
        known = self.prior(batch)
        forces = None if prediction.forces is None else prediction.forces + known.forces.to(prediction.forces.dtype)
        return prediction._replace(value=prediction.value + known.energy, forces=forces)

    def _of_network(
        self, batch: Batch, node_vectors: Tensor | None, need_forces: bool, create_graph: bool | None
    ) -> Prediction:
        """Everything but the prior."""
        if self.force_mode != "gradient" or not need_forces:
            return self._evaluate(batch, node_vectors, need_forces)
        create_graph = self.training if create_graph is None else create_graph
        with torch.enable_grad():
            pos = batch.pos
            if not pos.requires_grad:
                pos = pos.detach().requires_grad_()
                pos.is_private = True  # nobody can ask for its gradient: see ndem_zoo.fused
            prediction = self._evaluate(batch.replace(pos=pos), node_vectors, need_forces=False)
            forces = forces_from_energy(prediction.value, pos, create_graph)
        if not create_graph:
            prediction = Prediction(
                prediction.value.detach(), None, Features(*(_detach(f) for f in prediction.features))
            )
        return prediction._replace(forces=forces)

    def _evaluate(self, batch: Batch, node_vectors: Tensor | None, need_forces: bool) -> Prediction:
        """Everything but derivatives."""
        features = self.backbone(batch, node_vectors)
        forces = None
        if self.force_head is not None and need_forces:
            forces = self.force_head(features, batch)
            forces = forces * self.scale.to(forces.dtype)
        return Prediction(self._read_out(features, batch), forces, features)

    def _read_out(self, features: Features, batch: Batch) -> Float[Tensor, " S"]:
        """The target, from what the head says of the atoms."""
        if self.readout == "dipole":
            charges, dipoles = self.energy_head(features, batch)
            moment = dipoles.double() + charges.double().unsqueeze(-1) * from_center_of_mass(batch, self.masses)
            return self.scale * safe_norm(sum_over_atoms(moment, batch)) + self.shift
        per_atom = self.energy_head(features, batch)  # (N,), in units of scale
        reference = self.reference.index_select(0, batch.z)
        if self.readout == "spatial_extent":
            weight = from_center_of_mass(batch, self.masses).square().sum(-1) / EXTENT
            per_atom, reference = per_atom.double() * weight, reference * weight
        network = sum_over_atoms(per_atom, batch).double() * self.scale
        return network + (sum_over_atoms(reference, batch) + self.shift)

    @property
    def n_parameters(self) -> int:
        """Number of weights, as papers count them: buffers excluded."""
        return sum(p.numel() for p in self.parameters())


def _detach(value: Any) -> Any:
    """Tensors, and what a backbone left for its heads, without the graph of derivatives."""
    return value.detach() if hasattr(value, "detach") else value


def from_center_of_mass(batch: Batch, masses: Float[Tensor, " Z"]) -> Float[Tensor, "N 3"]:
    """Positions relative to the center of mass of their structure in Å, float64; masses by atomic number."""
    mass = masses.index_select(0, batch.z).unsqueeze(-1)
    pos = batch.pos.double()
    center = sum_over_atoms(mass * pos, batch) / sum_over_atoms(mass, batch)
    return pos - center.index_select(0, batch.system)
