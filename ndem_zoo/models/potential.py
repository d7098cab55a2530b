"""A potential: backbone, heads, reference energies and the way forces are made.

The one object that training, prediction, the calculator and every export share. Energies and forces leave it in eV and
eV/Å; inside, the network works in units of `scale`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, sum_over_atoms
from ndem_zoo.models.base import Backbone, Features
from ndem_zoo.physics import MAX_Z, forces_from_energy

ForceMode = Literal["gradient", "direct", "none"]


class Prediction(NamedTuple):
    """What a potential says about a batch.

    Attributes
    ----------
    energy : (S,) float64
        Total energies in eV, reference energies included.
    forces : (N, 3) or None
        Forces in eV/Å; None when the potential has none or none were asked for.
    features : Features
        Of the backbone, for objectives that read them with their own heads.
    """

    energy: Float[Tensor, " S"]
    forces: Float[Tensor, "N 3"] | None
    features: Features


class Potential(nn.Module):
    """Energy and forces of structures.

    E = sum_i (reference[z_i] + scale * s_i), with s_i the scalar head's output; F = -dE/dpos (``"gradient"``), or
    scale times the output of a vector head (``"direct"``), or not at all (``"none"``).

    Parameters
    ----------
    backbone
        Network from structures to features.
    forces
        Where forces come from.
    reference : (MAX_Z + 1,), optional
        Reference energies in eV by atomic number; default zeros. Kept in float64 whatever the network's dtype:
        the float32 spacing at aspirin's total energy is 0.03 kcal/mol.
    scale
        Energy unit of the network in eV; also its force unit in eV/Å.

    Raises
    ------
    ConfigError
        For an unknown force mode or a scale that is not positive.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        forces: ForceMode = "gradient",
        reference: Float[np.ndarray, " Z"] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if forces not in get_args(ForceMode):
            raise ConfigError(f"forces={forces!r}; allowed are {', '.join(get_args(ForceMode))}")
        if not (np.isfinite(scale) and scale > 0):
            raise ConfigError(f"scale={scale!r} eV; it must be a positive number")
        self.backbone = backbone
        self.force_mode = forces
        self.energy_head = backbone.scalar_head()
        self.force_head = backbone.vector_head() if forces == "direct" else None
        energies = np.zeros(MAX_Z + 1) if reference is None else np.asarray(reference, dtype=np.float64)
        self.register_buffer("reference", torch.as_tensor(energies))
        self.register_buffer("scale", torch.tensor(float(scale), dtype=torch.float64))

    def _apply(self, fn, recurse: bool = True):
        # Pitfall: Module.float() would round the reference energies; only their device may change.
        reference, scale = self.reference, self.scale
        super()._apply(fn, recurse)
        self.reference = reference.to(self.reference.device)
        self.scale = scale.to(self.scale.device)
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
        if self.force_mode != "gradient" or not need_forces:
            return self._evaluate(batch, node_vectors, need_forces)
        create_graph = self.training if create_graph is None else create_graph
        with torch.enable_grad():
            pos = batch.pos
            if not pos.requires_grad:
                pos = pos.detach().requires_grad_()
                pos.is_private = True  # nobody can ask for its gradient: see ndem_zoo.fused
            prediction = self._evaluate(batch.replace(pos=pos), node_vectors, need_forces=False)
            forces = forces_from_energy(prediction.energy, pos, create_graph)
        if not create_graph:
            prediction = Prediction(
                prediction.energy.detach(), None, Features(*(_detach(f) for f in prediction.features))
            )
        return prediction._replace(forces=forces)

    def _evaluate(self, batch: Batch, node_vectors: Tensor | None, need_forces: bool) -> Prediction:
        """Everything but derivatives."""
        features = self.backbone(batch, node_vectors)
        per_atom = self.energy_head(features, batch)  # (N,), in units of scale
        network = sum_over_atoms(per_atom, batch).double() * self.scale
        energy = network + sum_over_atoms(self.reference.index_select(0, batch.z), batch)
        forces = None
        if self.force_head is not None and need_forces:
            forces = self.force_head(features, batch) * self.scale.to(per_atom.dtype)
        return Prediction(energy, forces, features)

    @property
    def n_parameters(self) -> int:
        """Number of weights, as papers count them: buffers excluded."""
        return sum(p.numel() for p in self.parameters())


def _detach(value: Any) -> Any:
    """Tensors, and what a backbone left for its heads, without the graph of derivatives."""
    return value.detach() if hasattr(value, "detach") else value
