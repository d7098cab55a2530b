"""What a backbone and a head are: the contract that every network of the package fulfils.

A backbone turns a `Batch` into features of atoms and offers heads that read them. It does not know targets, noise or
objectives. `models/potential.py` makes energies and forces of it; `models/estimator.py` trains it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, Nearest
from ndem_zoo.physics import MAX_Z


class Features(NamedTuple):
    """Features of the atoms: what a backbone returns and heads read.

    Attributes
    ----------
    scalars : (N, C)
        Invariant features.
    vectors : (N, 3, C)
        Features that rotate with the structure.
    tensors : (N, K, C) or None
        Spherical-tensor features with K = (L + 1)², where the backbone has them.
    edges : object or None
        What the backbone has calculated for the edges, for its own heads.
    """

    scalars: Float[Tensor, "N C"]
    vectors: Float[Tensor, "N 3 C"]
    tensors: Float[Tensor, "N K C"] | None = None
    edges: Any = None


class Head(nn.Module, ABC):
    """Turns features into one number or one vector per atom.

    Attributes
    ----------
    sign_weights : tuple of str
        Weights of a vector head that its output is linear in: negating them negates it. Empty: not known.
    """

    sign_weights: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def forward(self, features: Features, batch: Batch) -> Tensor:
        """(N,) for a scalar head, (N, 3) for a vector head."""


class Backbone(nn.Module, ABC):
    """A network from structures to features of atoms.

    A subclass takes only keyword options with defaults, sets `cutoff` (Å), `max_z` (atomic numbers below it are known)
    and `tiny` (options with which the contract tests build it), and must not change when edges longer than `cutoff` are
    added to the batch.

    Attributes
    ----------
    nearest : Nearest or None
        Limit on the neighbors of an atom within the cutoff; batches may then be made with fewer edges. None: all count.
    is_smooth : bool
        Whether energies are continuous when atoms cross the cutoff; a limit on neighbors makes them jump all the same.
    symmetry : float
        How exactly energies stay and vectors turn when a structure of ordinary size is rotated, relative, in float64 and
        with the `tiny` options; networks that use grids state what was measured.
    mirror : bool
        Whether mirror images have equal energies.
    rng : torch.Generator or None
        Where randomness in training mode (dropout) comes from; None: torch's global generator. No part of saved models.
    """

    cutoff: float
    max_z: int = MAX_Z + 1
    nearest: Nearest | None = None
    is_smooth: bool = True
    symmetry: ClassVar[float] = 1e-8
    mirror: ClassVar[bool] = True
    rng: torch.Generator | None = None
    tiny: ClassVar[dict[str, Any]]
    #: Options in which a network may differ from the one whose weights it begins with.
    free_options: ClassVar[frozenset[str]] = frozenset({"encode_vectors"})
    #: Whether several networks can be run in one pass by `torch.func` (`Ensemble`).
    can_be_stacked: ClassVar[bool] = True
    #: Published sets of options by name; `from_preset` and the option ``preset`` of an estimator take them.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    #: How the pass is run: ``"eager"``, plain and the reference, or one of `plans`.
    plan: str = "eager"
    #: Plans that this backbone has; all give the same numbers.
    plans: ClassVar[tuple[str, ...]] = ("eager",)

    def __getstate__(self) -> dict[str, Any]:
        """Copies have no generator: two networks must not draw from one."""
        return self.__dict__ | {"rng": None}

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Backbone:
        """A backbone with the options of a preset, some of which may be replaced.

        Raises
        ------
        ConfigError
            If there is no such preset or option; lists those that there are.
        """
        return cls(**options_of(cls, {"preset": name, **options}))

    @abstractmethod
    def forward(self, batch: Batch, node_vectors: Float[Tensor, "N 3"] | None = None) -> Features:
        """Features of all atoms.

        Parameters
        ----------
        batch
            Structures; edges complete up to at least `cutoff`.
        node_vectors : (N, 3), optional
            A vector per atom that the features may depend on (force encoding); without unit.
        """

    def use_plan(self, plan: str, device: torch.device) -> None:
        """Choose how the pass is run.

        Parameters
        ----------
        plan
            One of `plans`, or ``"auto"``: ``"fused"`` on a CPU where the backbone has it, else ``"eager"``.
        device
            Where it will run.

        Raises
        ------
        ConfigError
            If the backbone does not have the plan.
        """
        if plan == "auto":
            plan = "fused" if "fused" in self.plans and device.type == "cpu" else "eager"
        if plan not in self.plans:
            raise ConfigError(f"plan={plan!r}; {type(self).__name__} has auto, {', '.join(self.plans)}")
        self.plan = plan

    @abstractmethod
    def scalar_head(self) -> Head:
        """A new head (N,) for these features, with freshly drawn weights."""

    @abstractmethod
    def vector_head(self, width: int | None = None) -> Head:
        """A new head (N, 3) for these features, with freshly drawn weights.

        Parameters
        ----------
        width
            Channels inside the head, for a smaller one than the backbone's own.
        """

    def charge_head(self) -> nn.Module:
        """A new head that gives scalars (N,) and vectors (N, 3) at once: partial charges and atomic dipoles."""
        return ChargeHead(self)


class ChargeHead(nn.Module):
    """A scalar head and a vector head side by side."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.scalar, self.vector = backbone.scalar_head(), backbone.vector_head()

    def forward(self, features: Features, batch: Batch) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        """Scalars and vectors of the atoms."""
        return self.scalar(features, batch), self.vector(features, batch)


def options_of(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """All options of `cls` with their values: `given`, completed by those of a preset and the constructor's defaults.

    ``preset`` in `given` names one of the presets of `cls`.

    Raises
    ------
    ConfigError
        If an option does not exist; lists those that do.
    """
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.name != "self"]
    known = {p.name: p.default for p in parameters}
    if "preset" in given and "preset" not in known:
        presets, name = getattr(cls, "presets", {}), given["preset"]
        if name not in presets:
            raise ConfigError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(presets) or 'none'}")
        given = presets[name] | {key: value for key, value in given.items() if key != "preset"}
    for name in given:
        if name not in known:
            raise ConfigError(f"{cls.__name__} has no option {name!r}; it has {', '.join(sorted(known))}")
    return known | given
