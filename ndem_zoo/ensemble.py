"""Several fitted models of one architecture that predict together, and how far they differ.

The weights of the members are stacked, and one pass of the common network, mapped over the stack, gives the energies and
forces of all: on a GPU, as many kernels as for one model. On a CPU one after the other is faster, so that is what
happens there. What the spread is worth as an error bar is measured on labeled data (`uncertainty.py`), and set right by one
factor for energies and one for forces (`Ensemble.calibrate`).
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from ndem_zoo import checkpoint as files
from ndem_zoo._version import __version__
from ndem_zoo.datasets.base import MolecularDataset, as_dataset
from ndem_zoo.datasets.checks import check_targets
from ndem_zoo.errors import ConfigError, DataError, FileFormatError
from ndem_zoo.graph import Batch
from ndem_zoo.inference import predict_columns
from ndem_zoo.models.estimator import NDeMModel, torch_device
from ndem_zoo.sampling import Collator, atom_indices, load, size_batches
from ndem_zoo.uncertainty import recalibration_factor

#: Record of a saved ensemble, beside the folders of its members, and version of its layout.
RECORD, FORMAT = "ensemble.json", 1


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

    Attributes
    ----------
    members_ : list of NDeMModel
        Copies of the models: what is done to a model later does not change the ensemble.
    calibration_ : dict or None
        What `calibrate` found; standard deviations are multiplied with its factors.
    """

    def __init__(
        self,
        models: Iterable[NDeMModel | str | os.PathLike],
        *,
        device: str | None = None,
        stacked: bool | None = None,
    ) -> None:
        members = [_copied(model) for model in models]
        if len(members) < 2:
            raise ConfigError(f"an ensemble of {len(members)} models; it needs two or more")
        for number, model in enumerate(members):
            _check_alike(members[0], model, number)
        first = self._first = members[0]
        self.members_, self.calibration_ = members, None
        self.device = torch_device(first.device if device is None else device)
        self.reference_ = dict(first.reference_)
        self.eval_batch_size: int = first.resolved_["settings"]["eval_batch_size"]
        can_be_stacked = first.potential_.backbone.can_be_stacked
        if stacked and not can_be_stacked:
            raise ConfigError(f"stacked=True, but a {type(first.potential_.backbone).__name__} cannot be stacked")
        self.stacked = self.device.type == "cuda" and can_be_stacked if stacked is None else stacked
        self._prepare()

    def _prepare(self, dtype: torch.dtype | None = None) -> None:
        """Make what computes, of the members' weights; in another precision, if it is given."""
        copied = [copy.deepcopy(model.potential_).requires_grad_(False) for model in self.members_]
        self._potentials = [potential.to(self.device, dtype).eval() for potential in copied]
        self._priors = [potential.prior for potential in copied if potential.prior is not None]
        for potential, model in zip(copied, self.members_, strict=True):
            potential.backbone.use_plan(model.plan, self.device)
        if self.stacked:
            for potential in self._potentials:  # a prior has no weights to stack, and comes on top: `_add_priors`
                potential.attach_prior(None)
            parameters, buffers = stack_module_state(self._potentials)
            self._state = {name: value.detach() for name, value in {**parameters, **buffers}.items()}
            self._network, self._potentials = self._potentials[0], []  # calls replace the weights that it has
            self._network.backbone.plan = "eager"  # a fused plan cannot be mapped over a stack of weights

    def __len__(self) -> int:
        return len(self.members_)

    def predict(self, dataset: Any, *, return_std: bool = True) -> dict[str, np.ndarray]:
        """Mean and standard deviation over the members.

        Parameters
        ----------
        dataset
            Structures in any form that `NDeMModel.predict` takes.
        return_std
            False leaves the standard deviations out.

        Returns
        -------
        prediction : dict
            ``"energy"`` and ``"energy_std"`` (S,) in eV, or another target under its name; where the potential has forces, ``"forces"`` and
            ``"forces_std"`` (A, 3) in eV/Å, the atoms of all structures one after the other. All float64. The standard
            deviation is that of these members (divided by their number, not by one less), times the factor of
            `calibrate`, if that was called.

        Raises
        ------
        DataError
            If a structure cannot be used; names its index.
        """
        structures = as_dataset(dataset)
        self._check_usable(structures)
        found = self._columns_of_usable(structures)
        return found if return_std else {name: value for name, value in found.items() if not name.endswith("_std")}

    def _check_usable(self, structures: MolecularDataset) -> None:
        """Raise DataError for a structure that cannot be predicted; nothing is computed."""
        self._first._check_usable(structures)
        for prior in self._priors[1:]:
            prior.check(structures)

    def _columns_of_usable(self, structures: MolecularDataset) -> dict[str, np.ndarray]:
        """Means and standard deviations in columns for structures that were checked."""
        return self._spread(self._members_on(structures))

    def _spread(self, members: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Mean and standard deviation over the first axis."""
        prediction = {}
        for name, values in members.items():
            prediction |= {name: values.mean(axis=0), f"{name}_std": values.std(axis=0) * self._factor(name)}
        return prediction

    def _factor(self, name: str) -> float:
        """What standard deviations are multiplied with."""
        return 1.0 if self.calibration_ is None else self.calibration_["factors"].get(name, 1.0)

    def calibrate(self, dataset: Any) -> Ensemble:
        """Find the factors that make standard deviations fit the errors on labeled data, and use them from now on.

        One factor for energies (or another target) and one for all force components, which make the deviations as large as
        the errors in the root mean square (`uncertainty.recalibration_factor`). What was not trained on is needed, such as
        the validation data.

        Parameters
        ----------
        dataset
            Labeled structures that no member was trained on.

        Returns
        -------
        self

        Raises
        ------
        DataError
            If there are no labels to compare with, or all members agree everywhere.
        """
        structures = as_dataset(dataset)
        self._check_usable(structures)
        names = [name for name in (self._first.potential_.target, "forces") if name in structures.targets]
        if not names:
            raise DataError(
                f"the data have no labels to compare with; they have {', '.join(structures.tasks) or 'none'}"
            )
        check_targets(structures, names)
        members, factors, sizes = self._members_on(structures), {}, {}
        free = slice(None) if structures.fixed is None else ~structures.fixed
        for name in (name for name in names if name in members):
            rows = free if name == "forces" else slice(None)
            error = members[name].mean(axis=0)[rows] - structures.targets[name][rows]
            factors[name], sizes[name] = recalibration_factor(error, members[name].std(axis=0)[rows])
        self.calibration_ = {
            "factors": factors,
            "numbers": sizes,
            "name": structures.name,
            "n_structures": len(structures),
            "split_hash": structures.split_hash,
        }
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write the members and the calibration into a folder, which appears whole or not at all.

        Raises
        ------
        FileExistsError
            If `path` is a file, or a folder that is no ensemble and not empty.
        """
        path = Path(path)
        if path.is_dir() and any(path.iterdir()) and not is_ensemble(path):
            raise FileExistsError(f"{path} exists and holds something else than an ensemble; nothing was written")
        names = [f"member-{number}" for number in range(len(self))]
        record = {"format": FORMAT, "ndem_zoo": __version__, "members": names, "calibration": self.calibration_}
        with files.atomic_folder(path) as folder:
            for name, model in zip(names, self.members_, strict=True):
                model.save(folder / name)
            files.save_json(folder / RECORD, record)

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: str | None = None, stacked: bool | None = None) -> Ensemble:
        """Read an ensemble that `save` wrote; executes no code from the folder.

        Parameters
        ----------
        path
            The folder.
        device, stacked
            See `Ensemble`.

        Raises
        ------
        FileNotFoundError
            If the folder or one of its files is missing.
        FileFormatError
            If a file is damaged, or from a newer version.
        """
        path = Path(path)
        record = files.load_json(path / RECORD)
        try:
            if record["format"] > FORMAT:
                raise FileFormatError(f"{path} has format {record['format']}; this version reads up to {FORMAT}")
            names, calibration = [str(name) for name in record["members"]], record["calibration"]
            if any(Path(name).name != name for name in names):
                raise FileFormatError(f"{path / RECORD} names members outside of its folder: {names}")
            if calibration is not None and not all(0 < float(f) < np.inf for f in calibration["factors"].values()):
                raise ValueError(f"factors {calibration['factors']}; they must be positive numbers")
            ensemble = cls([path / name for name in names], device=device, stacked=stacked)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path / RECORD} does not describe an ensemble of ours: {error!r}") from error
        ensemble.calibration_ = calibration
        return ensemble

    def predict_members(self, dataset: Any) -> dict[str, np.ndarray]:
        """What each of the M members says: ``"energy"`` (M, S) in eV and ``"forces"`` (M, A, 3) in eV/Å; see `predict`."""
        structures = as_dataset(dataset)
        self._check_usable(structures)
        return self._members_on(structures)

    def _members_on(self, structures: MolecularDataset) -> dict[str, np.ndarray]:
        """See `predict_members`, for structures that were checked."""
        if self.stacked:
            return self._predict_stacked(structures)
        found = [predict_columns(potential, structures, self.eval_batch_size) for potential in self._potentials]
        return {name: np.stack([columns[name] for columns in found]) for name in found[0]}

    def on_batches(self, device: torch.device, dtype: torch.dtype) -> Callable[[Batch], dict[str, np.ndarray]]:
        """What a calculator asks: means and standard deviations for a batch, of a copy on a device and in a precision.

        Returns
        -------
        predict
            From a batch to what `predict` returns, on the CPU in float64: energies (S,), forces (N, 3).
        """
        own = copy.copy(self)
        own.device = device
        own._prepare(dtype)

        def predict(batch: Batch) -> dict[str, np.ndarray]:
            members = {name: value.detach().double().cpu().numpy() for name, value in own._on_batch(batch).items()}
            return own._spread(members)

        return predict

    def _on_batch(self, batch: Batch) -> dict[str, Tensor]:
        """What each member says of a batch: (M, S), (M, N, 3)."""
        if self.stacked:
            with torch.no_grad():
                found = vmap(self._member, in_dims=(0, None))(self._state, batch.pos, batch=batch)
                return self._add_priors(found, batch)
        predictions = [potential(batch) for potential in self._potentials]
        columns = {self._first.potential_.target: [p.value for p in predictions]}
        if predictions[0].forces is not None:
            columns["forces"] = [p.forces for p in predictions]
        return {name: torch.stack(values) for name, values in columns.items()}

    def _predict_stacked(self, structures: MolecularDataset) -> dict[str, np.ndarray]:
        """See `predict_members`."""
        network, backbone = self._network, self._network.backbone
        columns = {network.target: np.empty((len(self), len(structures)))}
        if network.force_mode != "none":
            columns["forces"] = np.empty((len(self), len(structures.z), 3))
        order = size_batches(structures, self.eval_batch_size, backbone.cutoff, len(self), backbone.nearest)
        dtype = next(network.parameters()).dtype
        place = {"nearest": backbone.nearest, "device": self.device}
        collate = Collator(structures, backbone.cutoff, dtype, with_targets=False, **place)
        with contextlib.closing(load(collate, order)) as batches:
            for indices, batch in zip(order, batches, strict=True):
                predicted = self._on_batch(batch)
                columns[network.target][:, indices] = predicted[network.target].double().cpu().numpy()
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


def is_ensemble(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a saved ensemble."""
    return (Path(folder) / RECORD).is_file()


def _copied(model: NDeMModel | str | os.PathLike) -> NDeMModel:
    """A fitted model of one's own."""
    if not isinstance(model, NDeMModel):
        return NDeMModel.load(model)
    model._fitted()
    return copy.deepcopy(model)


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
