"""Several fitted models of one architecture that predict together, and how far they differ.

The weights of the members are stacked, and one pass of the common network, mapped over the stack, gives the energies and
forces of all: on a GPU, as many kernels as for one model. On a CPU one after the other is faster, so that is what
happens there. What the spread is worth as an error bar is not judged here.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from ndem_zoo.datasets.base import MolecularDataset, as_dataset
from ndem_zoo.datasets.checks import check_structures
from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch
from ndem_zoo.inference import predict_columns
from ndem_zoo.models.estimator import NDeMModel, check_known_elements, torch_device
from ndem_zoo.sampling import Collator, atom_indices, load, size_batches


class Ensemble:
    """Fitted models of one architecture; predicts their mean and standard deviation.

    Parameters
    ----------
    models
        Two or more fitted models, or folders of saved ones. They must have the same backbone with the same options, make
        forces in the same way, compute in the same precision, and know the same elements with the same reference
        energies; their weights and scales are their own.
    device
        Where to compute; default: the first model's.
    stacked
        Whether all members go through one pass, with the backbone's eager plan; else one after the other, each with its
        own. Default: on a GPU only. Choice: on a CPU core, four members of the preset ``md17_fast`` took 1.5 times less
        for one ethanol and 1.6 times more for 64, since so many numbers leave the caches. The results are the same.

    Raises
    ------
    ConfigError
        If there are fewer than two models, or one differs from the first in more than its weights; says which and how.
    NotFittedError
        If a model has no weights yet.

    Notes
    -----
    The weights are copied: what is done to a model later does not change the ensemble.
    """

    def __init__(
        self,
        models: Iterable[NDeMModel | str | os.PathLike],
        *,
        device: str | None = None,
        stacked: bool | None = None,
    ) -> None:
        members = [model if isinstance(model, NDeMModel) else NDeMModel.load(model) for model in models]
        if len(members) < 2:
            raise ConfigError(f"an ensemble of {len(members)} models; it needs two or more")
        potentials = [copy.deepcopy(model._fitted()) for model in members]
        for number, model in enumerate(members):
            _check_alike(members[0], model, number)
        first = members[0]
        self.device = torch_device(first.device if device is None else device)
        self.reference_ = dict(first.reference_)
        self.eval_batch_size: int = first.resolved_["settings"]["eval_batch_size"]
        self._size, self._unknown = len(members), first.unknown_elements
        can_be_stacked = potentials[0].backbone.can_be_stacked
        if stacked and not can_be_stacked:
            raise ConfigError(f"stacked=True, but a {type(potentials[0].backbone).__name__} cannot be stacked")
        self.stacked = self.device.type == "cuda" and can_be_stacked if stacked is None else stacked
        self._potentials = [potential.to(self.device).eval() for potential in potentials]
        self._priors = [potential.prior for potential in potentials if potential.prior is not None]
        for potential, model in zip(potentials, members, strict=True):
            potential.backbone.use_plan(model.plan, self.device)
        if self.stacked:
            for potential in self._potentials:  # a prior has no weights to stack, and comes on top: `_add_priors`
                potential.attach_prior(None)
            parameters, buffers = stack_module_state(self._potentials)
            self._state = {name: value.detach() for name, value in {**parameters, **buffers}.items()}
            self._network, self._potentials = self._potentials[0], []  # calls replace the weights that it has
            self._network.backbone.plan = "eager"  # a fused plan cannot be mapped over a stack of weights

    def __len__(self) -> int:
        return self._size

    def predict(self, dataset: Any) -> dict[str, np.ndarray]:
        """Mean and standard deviation over the members.

        Parameters
        ----------
        dataset
            Structures in any form that `NDeMModel.predict` takes.

        Returns
        -------
        prediction : dict
            ``"energy"`` and ``"energy_std"`` (S,) in eV, or another target under its name; where the potential has forces, ``"forces"`` and
            ``"forces_std"`` (A, 3) in eV/Å, the atoms of all structures one after the other. All float64. The standard
            deviation is that of these members (divided by their number, not by one less).

        Raises
        ------
        DataError
            If a structure cannot be used; names its index.
        """
        prediction = {}
        for name, values in self.predict_members(dataset).items():
            prediction |= {name: values.mean(axis=0), f"{name}_std": values.std(axis=0)}
        return prediction

    def predict_members(self, dataset: Any) -> dict[str, np.ndarray]:
        """What each of the M members says: ``"energy"`` (M, S) in eV and ``"forces"`` (M, A, 3) in eV/Å; see `predict`."""
        structures = as_dataset(dataset)
        check_structures(structures)
        check_known_elements(structures.z, structures.ptr, self.reference_, self._unknown)
        for prior in self._priors:
            prior.check(structures)
        if self.stacked:
            return self._predict_stacked(structures)
        found = [predict_columns(potential, structures, self.eval_batch_size) for potential in self._potentials]
        return {name: np.stack([columns[name] for columns in found]) for name in found[0]}

    def _predict_stacked(self, structures: MolecularDataset) -> dict[str, np.ndarray]:
        """See `predict_members`."""
        network, backbone = self._network, self._network.backbone
        columns = {network.target: np.empty((self._size, len(structures)))}
        if network.force_mode != "none":
            columns["forces"] = np.empty((self._size, len(structures.z), 3))
        order = size_batches(structures, self.eval_batch_size, backbone.cutoff, self._size, backbone.nearest)
        dtype = next(network.parameters()).dtype
        place = {"nearest": backbone.nearest, "device": self.device}
        collate = Collator(structures, backbone.cutoff, dtype, with_targets=False, **place)
        with torch.no_grad(), contextlib.closing(load(collate, order)) as batches:
            for indices, batch in zip(order, batches, strict=True):
                predicted = vmap(self._member, in_dims=(0, None))(self._state, batch.pos, batch=batch)
                predicted = self._add_priors(predicted, batch)
                columns[network.target][:, indices] = predicted[network.target].cpu().numpy()
                if "forces" in predicted:
                    atoms, _ = atom_indices(structures.ptr, indices)
                    columns["forces"][:, atoms] = predicted["forces"].double().cpu().numpy()
        return columns

    def _add_priors(self, predicted: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """What the networks say, and each member's prior on top of it, if they have any."""
        if not self._priors:
            return predicted
        found = [prior(batch) for prior in self._priors]
        known = {"energy": [f.energy for f in found], "forces": [f.forces for f in found]}
        return {name: value + torch.stack(known[name]).to(value.dtype) for name, value in predicted.items()}

    def _member(self, state: dict[str, Tensor], pos: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The target (S,) and ``"forces"`` (N, 3), if any, with the weights of one member."""
        is_gradient = self._network.force_mode == "gradient"

        def total(pos: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            prediction = functional_call(
                self._network, state, (batch.replace(pos=pos),), {"need_forces": not is_gradient}
            )
            found = {self._network.target: prediction.value, "forces": prediction.forces}
            return prediction.value.sum(), {name: value for name, value in found.items() if value is not None}

        if not is_gradient:
            return total(pos)[1]
        gradient, found = grad(total, has_aux=True)(pos)
        return found | {"forces": -gradient}


def _check_alike(first: NDeMModel, model: NDeMModel, number: int) -> None:
    """Raise ConfigError unless both have the same network, elements and reference energies."""
    ours, theirs = first.resolved_, model.resolved_
    pairs = {
        "backbone": (ours["backbone"]["name"], theirs["backbone"]["name"]),
        **{
            f"backbone option {name}": (ours["backbone"]["options"].get(name), theirs["backbone"]["options"].get(name))
            for name in {**ours["backbone"]["options"], **theirs["backbone"]["options"]}
        },
        "target": (ours["supervised"]["target"], theirs["supervised"]["target"]),
        "forces": (ours["forces"], theirs["forces"]),
        "prior": (ours.get("prior"), theirs.get("prior")),
        "precision": (ours["settings"]["precision"], theirs["settings"]["precision"]),
        "elements": (sorted(first.reference_), sorted(model.reference_)),
    }
    for name, (expected, found) in pairs.items():
        if found != expected:
            raise ConfigError(f"model {number} has {name} {found!r}, model 0 has {expected!r}; they must be equal")
    for symbol, expected in first.reference_.items():
        if model.reference_[symbol] != expected:
            raise ConfigError(
                f"model {number} has the reference energy {model.reference_[symbol]!r} eV for {symbol}, model 0 has "
                f"{expected!r}; train all with the same reference_energies"
            )
