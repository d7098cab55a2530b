"""The parts of NDeM for SchNetPack's `NeuralNetworkPotential`: noise, noisy copies, a head for them, the difference.

Noise is added to each structure by a transform (`AddNDeMNoise`). `NDeMDoubleBatch` appends the noisy copies as further
structures of the batch, so that the stock representation passes over both halves at once; `NDeMNoisyForceHead` reads the
second half and takes it away again, so that every stock output module sees the clean half only. Units are those of the
SchNetPack data (kcal/mol/Å for MD17). `strip_ndem` makes a stock model of a trained one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch
from ndem_zoo.noise import SigmaPer, SigmaSample, masked_gaussian
from ndem_zoo.objectives.base import check_choice, check_ratio, check_sigma, check_whole
from ndem_zoo.optional import require

P = require("schnetpack.properties", extra="schnetpack")
spk = require("schnetpack", extra="schnetpack")

#: What the noise transform adds to a structure: noisy positions in Å, and the noise over its standard deviation.
POSITIONS, NOISE = "ndem_positions", "ndem_noise"
#: Where the noisy forces travel from their head to the difference.
NOISY_FORCES = "_ndem_forces"
#: Prefix of the clean half's entries while the batch is doubled.
SAVED = "_ndem_clean"

#: Of each structure or edge: appended unchanged. Charge and spin are there for electronic embeddings only.
_REPEATED = (P.Z, P.offsets, P.n_atoms, P.cell, P.pbc, P.total_charge, P.spin_multiplicity)
_SHIFTED = (P.idx_i, P.idx_j, P.idx_m)

#: Choice: neighbor lists reach so many sigma beyond the cutoff. A distance changes by a Gaussian of width sqrt(2) sigma, so
#: one pair in 10⁸ is missed.
SKIN = 8.0

GradMain = Literal["stop", "flow"]
HeadMode = Literal["vector", "gradient"]


class AddNDeMNoise(spk.transform.Transform):
    """Add noisy positions and the noise to a structure, or to a batch.

    As a transform of the data it gets one structure at a time. Among the input modules of a model it gets a batch, in
    training mode only, and can draw one sigma for all of it, as the paper does; since SchNetPack reads targets before the
    model is called, the loss must then come from ``NDeMForceDifference(subtract_noise=True)``.

    Parameters
    ----------
    sigma
        Standard deviation in Å, or a range (min, max) to draw from (NDeM, Table 7: 0.05).
    ratio
        Fraction of the atoms that is moved; at least one is, and below 1 at least one is not. Choice: 0.25, as DeNS on
        MD17; the paper gives none.
    sample, per
        How a sigma is drawn from a range, and for what; ``per="batch"`` matters for batches only.
    seed
        None draws new noise every time, for training; a number gives each structure its own noise that never changes,
        for validation and testing.
    cutoff, neighbor_cutoff
        Radii in Å of network and neighbor list. If both are given, a neighbor list that is too short for the noise is an
        error (`SKIN`).

    Raises
    ------
    ConfigError
        For a value that is not allowed.

    Notes
    -----
    Atoms whose entry ``considered_atoms`` is False are not moved. Noise is drawn from a generator of its own, seeded with
    the seed of the process and never advancing torch's: data order, weights and dropout are those of a run without it.
    """

    is_preprocessor: bool = True
    is_postprocessor: bool = False

    def __init__(
        self,
        sigma: float | Sequence[float] = 0.05,
        ratio: float = 0.25,
        sample: SigmaSample = "loguniform",
        per: SigmaPer = "structure",
        seed: int | None = None,
        cutoff: float | None = None,
        neighbor_cutoff: float | None = None,
    ) -> None:
        super().__init__()
        # Hydra has lists of its own.
        self.sigma: Any = sigma if isinstance(sigma, Real) else tuple(sigma)  # type: ignore[arg-type]
        check_sigma(self.sigma)
        check_ratio(ratio)
        check_choice("sample", sample, SigmaSample)
        check_choice("per", per, SigmaPer)
        if seed is not None:
            check_whole("seed", seed, 0)
        self.ratio, self.sample, self.per, self.seed = float(ratio), sample, per, seed
        if cutoff is not None and neighbor_cutoff is not None:
            _check_skin(cutoff, neighbor_cutoff, self.sigma)
        self._rng: torch.Generator | None = None
        self._seeded_with: tuple[int, torch.device] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and those in the processes of a data loader, have generators of their own."""
        return self.__dict__ | {"_rng": None, "_seeded_with": None}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``ndem_positions`` (N, 3) in Å and ``ndem_noise`` (N, 3), the noise over its sigma."""
        is_batch = P.idx_m in inputs
        if is_batch and not self.training:
            return inputs
        batch = _atoms_of(inputs)
        noisy, noise = masked_gaussian(
            batch,
            self._generator(inputs, batch.pos.device),
            cutoff=0.0,
            sigma=self.sigma,
            ratio=self.ratio,
            sample=self.sample,
            per=self.per,
            reuse_edges=True,
        )
        # Made in the model, the positions are too late for the model's own list of what has derivatives.
        inputs[POSITIONS], inputs[NOISE] = noisy.pos.requires_grad_(is_batch), noise.epsilon / noise.sigma
        return inputs

    def _generator(self, inputs: dict[str, Tensor], device: torch.device) -> torch.Generator:
        """The structure's own generator, or the process's."""
        if self.seed is not None:
            own = 1_000_003 * self.seed + int(inputs[P.idx].reshape(-1)[0])
            return torch.Generator(device).manual_seed(own)
        # Pitfall: a data loader starts its processes anew in every epoch. Each has another initial seed then, whereas a
        # generator that came along as a copy would draw the same noise in every process and epoch.
        key = torch.initial_seed(), device
        if self._rng is None or self._seeded_with != key:
            self._rng, self._seeded_with = torch.Generator(device).manual_seed(key[0] ^ 0x4E44654D), key
        return self._rng


def _check_skin(cutoff: float, neighbor_cutoff: float, sigma: Any) -> None:
    """Refuse a neighbor list that misses neighbors of the noisy structure."""
    largest = sigma if isinstance(sigma, Real) else sigma[-1]
    needed = cutoff + SKIN * largest
    if neighbor_cutoff < needed - 1e-6:
        raise ConfigError(
            f"neighbor_cutoff={neighbor_cutoff} Å; with cutoff={cutoff} Å and noise up to sigma={largest} Å it must be at "
            f"least {needed:.3f} Å, so that noisy structures have all their neighbors"
        )


def _atoms_of(inputs: dict[str, Tensor]) -> Batch:
    """The atoms of SchNetPack's dictionary as a batch without edges."""
    pos = inputs[P.R]
    n = pos.shape[0]
    system = inputs.get(P.idx_m)
    none = torch.zeros(0, dtype=torch.long, device=pos.device)
    considered = inputs.get("considered_atoms")
    return Batch(
        z=inputs[P.Z],
        pos=pos.detach(),
        src=none,
        dst=none,
        shift=pos.new_zeros(0, 3),
        system=torch.zeros(n, dtype=torch.long, device=pos.device) if system is None else system,
        n_systems=1 if system is None else inputs[P.n_atoms].shape[0],
        cutoff=0.0,
        cell=pos.new_zeros(0, 3, 3),
        fixed=torch.zeros(n, dtype=torch.bool, device=pos.device)
        if considered is None
        else ~considered.reshape(-1).bool(),
    )


class NDeMDoubleBatch(nn.Module):
    """Input module, before `PairwiseDistances`: append the noisy copies as further structures of the same batch.

    Does nothing when the batch has no noise: at inference.
    """

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Doubled entries; the clean half's own are kept under other names."""
        if POSITIONS not in inputs:
            return inputs
        if P.idx_i_triples in inputs:
            raise ConfigError(
                "the batch has triples of atoms, which noisy copies cannot have; leave out NDeM or triples"
            )
        n, n_systems = inputs[P.Z].shape[0], inputs[P.n_atoms].shape[0]
        for key in (P.R, *_REPEATED, *_SHIFTED):
            if key in inputs:
                inputs[SAVED + key] = inputs[key]
        inputs[P.R] = torch.cat([inputs[P.R], inputs[POSITIONS].to(inputs[P.R].dtype)])
        for key in _REPEATED:
            if key in inputs:
                inputs[key] = torch.cat([inputs[key]] * 2)
        for key, start in zip(_SHIFTED, (n, n, n_systems), strict=True):
            inputs[key] = torch.cat([inputs[key], inputs[key] + start])
        return inputs


class NDeMNoisyForceHead(nn.Module):
    """First output module: predict forces of the noisy half with weights of its own, then undo the doubling.

    Parameters
    ----------
    n_in
        Features of the representation (`n_atom_basis`).
    n_layers, n_hidden
        Of SchNetPack's network for the head; `n_hidden` None halves the features layer by layer.
    mode
        ``"vector"``: a gated equivariant network on vector features (PaiNN; SO3net with `return_vector_representation`);
        ``"gradient"``: minus the derivative of a second energy by the noisy positions, for SchNet, which has none.

    Notes
    -----
    Weights are drawn without advancing torch's generator, so that those of the other modules are the stock model's.
    """

    def __init__(self, n_in: int, n_layers: int = 2, n_hidden: int | None = None, mode: HeadMode = "vector") -> None:
        super().__init__()
        check_choice("mode", mode, HeadMode)
        check_whole("n_in", n_in, 1)
        check_whole("n_layers", n_layers, 1)
        self.mode = mode
        silu = nn.functional.silu
        size = {"n_in": n_in, "n_out": 1, "n_layers": n_layers, "n_hidden": n_hidden, "activation": silu}
        with torch.random.fork_rng(devices=[]):
            if mode == "vector":
                self.net = spk.nn.build_gated_equivariant_mlp(**size, sactivation=silu)
            else:
                # A constant has no derivative, and several GPUs refuse parameters without a gradient.
                self.net = spk.nn.build_mlp(**size, last_bias=False)
        #: SchNetPack makes these entries require gradients where they are in the batch.
        self.required_derivatives = [POSITIONS] if mode == "gradient" else []

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The clean half as it was, and ``_ndem_forces`` (N, 3) in units of the force scale."""
        if POSITIONS not in inputs:
            return inputs
        n, n_edges = (inputs[SAVED + key].shape[0] for key in (P.Z, P.idx_i))
        if inputs[P.Rij].shape[0] != 2 * n_edges:
            raise ConfigError("edges were taken away after NDeMDoubleBatch; put it behind the modules that do so")
        inputs[NOISY_FORCES] = self._forces(inputs, n)
        for key in [key for key in inputs if key.endswith("_representation")]:
            inputs[key] = inputs[key][:n]
        inputs[P.Rij] = inputs[P.Rij][:n_edges]
        for key in [key for key in inputs if key.startswith(SAVED)]:
            inputs[key.removeprefix(SAVED)] = inputs.pop(key)
        return inputs

    def _forces(self, inputs: dict[str, Tensor], n: int) -> Tensor:
        scalars = inputs["scalar_representation"][n:]
        if self.mode == "vector":
            if "vector_representation" not in inputs:
                raise ConfigError("the representation gives no vectors; use NDeMNoisyForceHead(mode='gradient')")
            return self.net((scalars, inputs["vector_representation"][n:]))[1][:, :, 0]
        # Pitfall: both halves share one graph, which the derivative of the main energy still needs.
        energy = self.net(scalars).sum()
        (slope,) = torch.autograd.grad(energy, inputs[POSITIONS], create_graph=self.training, retain_graph=True)
        return -slope


class NDeMForceDifference(nn.Module):
    """Last output module: forces of the clean structure minus those of the noisy one, in units of `force_scale`.

    Eq.: F(X)/S - F'(X + epsilon), which should be epsilon / sigma: the entry ``ndem_noise`` of the batch. Zeros without
    noise, at inference, because SchNetPack expects every output to be there.

    Parameters
    ----------
    force_key
        Entry of the predicted forces; None: there are none, and they are 0, as at the minima of QM9.
    output_key
        Entry that is written.
    force_scale
        S, in the data's unit of force. Choice: 20 kcal/mol/Å, about the root mean square of the forces of MD17.
    grad_main
        ``"stop"``: no gradient reaches the main forces from here; ``"flow"``: it does. Choice: ``"stop"``; the paper does
        not say.
    subtract_noise
        True writes the residual, for `UnsupervisedModelOutput` with `MeanSquare`: for noise that is made by an input module.

    Raises
    ------
    ConfigError
        For a value that is not allowed.
    """

    def __init__(
        self,
        force_key: str | None = P.forces,
        output_key: str = "ndem_difference",
        force_scale: float = 20.0,
        grad_main: GradMain = "stop",
        subtract_noise: bool = False,
    ) -> None:
        super().__init__()
        check_choice("grad_main", grad_main, GradMain)
        if not (isinstance(force_scale, Real) and 0 < force_scale < float("inf")):
            raise ConfigError(f"force_scale={force_scale!r}; it must be a positive number")
        self.force_key, self.output_key, self.force_scale = force_key, output_key, float(force_scale)
        self.grad_main, self.subtract_noise = grad_main, subtract_noise
        self.model_outputs = [output_key]

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write the difference, (N, 3)."""
        noisy = inputs.get(NOISY_FORCES)
        if noisy is None:
            inputs[self.output_key] = torch.zeros_like(inputs[P.R])
            return inputs
        difference = -noisy
        if self.force_key is not None:
            forces = inputs[self.force_key] / self.force_scale
            difference = (forces.detach() if self.grad_main == "stop" else forces) - noisy
        inputs[self.output_key] = difference - inputs[NOISE] if self.subtract_noise else difference
        return inputs


class MeanSquare(nn.Module):
    """Mean of the squares of a prediction: a loss for `UnsupervisedModelOutput`."""

    def forward(self, prediction: Tensor) -> Tensor:
        """A scalar."""
        return prediction.square().mean()


_PARTS = (AddNDeMNoise, NDeMDoubleBatch, NDeMNoisyForceHead, NDeMForceDifference)


def strip_ndem(model: nn.Module) -> nn.Module:
    """A copy of a trained SchNetPack model without the parts of NDeM: a stock model for spkdeploy, LAMMPS and others.

    Parameters
    ----------
    model
        `schnetpack.model.NeuralNetworkPotential`, as ``best_model`` holds it.

    Raises
    ------
    ConfigError
        If it is another kind of object, or has no parts of NDeM.
    """
    if not isinstance(model, spk.model.NeuralNetworkPotential):
        raise ConfigError(f"{type(model).__name__} is no schnetpack.model.NeuralNetworkPotential")
    plain = copy.deepcopy(model)
    for name in ("input_modules", "output_modules"):
        kept = [module for module in getattr(plain, name) if not isinstance(module, _PARTS)]
        setattr(plain, name, nn.ModuleList(kept))
    if len(list(plain.modules())) == len(list(model.modules())):
        raise ConfigError("the model has no parts of NDeM to take away")
    plain.collect_derivatives()
    plain.collect_outputs()
    return plain
