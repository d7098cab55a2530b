"""What a small displacement does to the forces: dF = -K epsilon, for different models of the curvature K.

A `Curvature` answers one question, `force_change(batch, epsilon)`. NDeM's paper takes K = c * identity; that and one
constant per element are here. A new model is one more subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.graph import Batch
from ndem_zoo.physics import BOLTZMANN, MAX_Z


class Curvature(nn.Module, ABC):
    """A model of how forces change when atoms move."""

    @abstractmethod
    def force_change(self, batch: Batch, epsilon: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """F(X + epsilon) - F(X) in eV/Å for displacements in Å, to first order."""


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

    def force_change(self, batch: Batch, epsilon: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
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
