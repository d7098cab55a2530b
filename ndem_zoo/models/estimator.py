"""The estimator: hyper-parameters in, a trained potential out, with scikit-learn's manners.

It holds no mathematics and no loop: it resolves presets, checks data, builds potential and objective, hands them to
`training.train`, and saves and loads what came out.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from ase.data import atomic_masses, atomic_numbers, chemical_symbols
from jaxtyping import Int
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError as SklearnNotFittedError

from ndem_zoo import checkpoint as files
from ndem_zoo import provenance, registry
from ndem_zoo._version import __version__
from ndem_zoo.card import model_card
from ndem_zoo.datasets.base import MolecularDataset, as_dataset
from ndem_zoo.datasets.checks import blocks, check_structures, check_targets, root_mean_square
from ndem_zoo.distributed import is_first, own_gpu
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError, NotFittedError
from ndem_zoo.forcefields.base import ForceField, make_force_field
from ndem_zoo.history import read_history, write_history
from ndem_zoo.inference import predict_columns
from ndem_zoo.metrics import dataset_metrics
from ndem_zoo.models.base import Backbone, options_of
from ndem_zoo.models.potential import EXTENT, Potential
from ndem_zoo.objectives.base import NoLabels, Objective, SupervisedLoss
from ndem_zoo.physics import MAX_Z, fit_reference_energies
from ndem_zoo.presets import preset_values
from ndem_zoo.properties import property_of
from ndem_zoo.training import TrainSettings, seeded, train
from ndem_zoo.transfer import Start, begin, start_from

if TYPE_CHECKING:
    from ndem_zoo.foreign import Imported

#: Version of the layout of a saved model's folder.
FORMAT = 2

#: Choice: atomic numbers of so many atoms are looked at together.
ATOMS_AT_ONCE = 1 << 24

_SETTINGS = tuple(f.name for f in dataclasses.fields(TrainSettings))
_MODEL_FILES = {"config.json", "weights.safetensors", "history.csv", "card.md"}


class ModelNotFittedError(NotFittedError, SklearnNotFittedError):
    """Ours, and the one that scikit-learn's tools look for."""


class NDeMModel(BaseEstimator):
    """Force field with `fit` and `predict`.

    Every keyword left at None takes the preset's value (`ndem_zoo.presets`); the constructor only stores them, and the
    network is built by `fit`. Use a subclass, which names the backbone.

    Parameters
    ----------
    preset : str, optional
        Recipe, one of `ndem_zoo.presets.PRESETS`; default the one that the subclass names.
    target : str, optional
        What is predicted: ``"energy"``, whose derivative are forces, or another label with one number per structure; for
        those of `ndem_zoo.properties`, such as ``"gap"`` or ``"mu"``, the way from atoms to structures is known.
    objective : str
        ``"ndem"``, ``"supervised"``, or one of its rivals: ``"noisy_nodes"``, ``"dens"``, ``"frad"``, ``"slide"``,
        ``"geossl"``. `frad` and `slide` need bonds, which are found from the geometries where the data have none.
    weight : float, optional
        Weight of the objective's auxiliary term (the paper's lambda).
    weight_schedule : str, optional
        ``"constant"``, ``"decay"`` or ``"warmup"``.
    objective_options : dict, optional
        Options of the objective: `sigma`, `ratio`, ... (`NDeMOptions`, `NoisyNodesOptions`).
    backbone_options : dict, optional
        Options of the backbone, such as `hidden_channels`.
    forces : str, optional
        ``"gradient"`` (-dE/dx), ``"direct"`` (a vector head) or ``"none"``.
    energy_weight, force_weight : float, optional
        Weights of the supervised terms.
    loss : str, optional
        ``"mse"``, ``"l1"``, ``"smooth_l1"`` or ``"l2mae"``, of labels divided by the scale.
    scale : float or str, optional
        The network's unit of energy (eV) and force (eV/Å), or of another target: a number, ``"force_rms"`` (of the
        training forces) or ``"target_std"`` (of the training targets beyond the reference energies).
    reference_energies : dict or str, optional
        What is subtracted from the target before it is learned. Energy in eV by chemical symbol or atomic number, such as
        those of isolated atoms; ``"fit"``, a least squares fit to the training data; ``"dataset"``, those that the
        dataset's card has; ``"mean"``, one number for every structure, the mean of the training data (adsorption
        energies, gaps); ``"none"``. Default: ``"fit"`` for what is nearly a sum over atoms, ``"mean"`` for the rest.
    prior : str, optional
        Classical force field to which the difference is learned (delta-learning): a name in
        `ndem_zoo.registry.FORCE_FIELDS`, or several with a plus between them. ``"valence"`` and ``"pairs"`` are fitted to the
        training forces first, ``"mmff94"`` and ``"gfn2-xtb"`` are published; see `ndem_zoo.forcefields`.
    device : str
        ``"auto"`` (CUDA where there is one, else CPU), or any torch device.
    precision : str
        ``"32-true"``, ``"64-true"`` or ``"bf16-mixed"``; see `ndem_zoo.training.TrainSettings`.
    seed : int
        Of weights, order of the data, and noise.
    deterministic : bool
        Whether training uses deterministic algorithms of torch only; see `ndem_zoo.training.TrainSettings`.
    batch_size, eval_batch_size, max_atoms, accumulate, bucket, lr, weight_decay, warmup_steps, warmup_factor, schedule, plateau_factor, plateau_patience, min_lr, \
clip_norm, ema_decay, nb_epoch, max_steps, early_stopping, validate_every
        See `ndem_zoo.training.TrainSettings`. With `max_atoms` and no `batch_size`, only atoms are counted.
    prefetch : bool, optional
        Likewise; None: on a GPU only.
    plan : str
        How the network is run, with the same results to rounding: ``"eager"`` (plain operations), ``"fused"`` (hand-written
        derivatives, on a CPU in native code) or ``"auto"`` (fused on a CPU where the backbone has it, else eager).
    unknown_elements : str
        What to do with structures to predict, or to validate on, that contain elements without training data: ``"error"``,
        or ``"warn"``. Their embeddings are as they were drawn, and their reference energies 0.
    progress : bool
        Whether `fit` shows progress.

    Attributes
    ----------
    potential_ : Potential
        Backbone, heads, reference energies; after `fit` with the best weights.
    objective_ : Objective
        With its own heads.
    history_ : list of dict
        One row for each validation.
    interrupted_ : bool
        Whether Ctrl-C ended the last training before its limits.
    spikes_ : list of dict
        Steps of the last training whose loss was far above those before; see `ndem_zoo.history.History`.
    reference_ : dict
        Reference energies in eV by chemical symbol, of all elements of the training data.
    resolved_ : dict
        All settings after the preset was applied.
    training_data_, provenance_ : dict
        What was learned from; versions, machine and the last `evaluate`. See `ndem_zoo.provenance`.
    init_report_ : ndem_zoo.transfer.Report or None
        What became of the weights that the last `fit` or `pretrain` began with; print it.
    """

    backbone_name: ClassVar[str]
    default_preset: ClassVar[str] = "md17_paper"

    def __init__(
        self,
        *,
        preset: str | None = None,
        target: str | None = None,
        objective: str = "ndem",
        weight: float | None = None,
        weight_schedule: str | None = None,
        objective_options: dict[str, Any] | None = None,
        backbone_options: dict[str, Any] | None = None,
        forces: str | None = None,
        energy_weight: float | None = None,
        force_weight: float | None = None,
        loss: str | None = None,
        scale: float | str | None = None,
        reference_energies: dict[str | int, float] | str | None = None,
        prior: str | None = None,
        device: str = "auto",
        precision: str = "32-true",
        seed: int = 0,
        deterministic: bool = False,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        max_atoms: int | None = None,
        accumulate: int | None = None,
        bucket: bool | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        warmup_steps: int | None = None,
        warmup_factor: float | None = None,
        schedule: str | None = None,
        plateau_factor: float | None = None,
        plateau_patience: int | None = None,
        min_lr: float | None = None,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
        nb_epoch: int | None = None,
        max_steps: int | None = None,
        early_stopping: int | None = None,
        validate_every: int | None = None,
        prefetch: bool | None = None,
        plan: str = "auto",
        unknown_elements: str = "error",
        progress: bool = True,
    ) -> None:
        self.preset = preset
        self.target = target
        self.objective = objective
        self.weight = weight
        self.weight_schedule = weight_schedule
        self.objective_options = objective_options
        self.backbone_options = backbone_options
        self.forces = forces
        self.energy_weight = energy_weight
        self.force_weight = force_weight
        self.loss = loss
        self.scale = scale
        self.reference_energies = reference_energies
        self.prior = prior
        self.device = device
        self.precision = precision
        self.seed = seed
        self.deterministic = deterministic
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_atoms = max_atoms
        self.accumulate = accumulate
        self.bucket = bucket
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.warmup_factor = warmup_factor
        self.schedule = schedule
        self.plateau_factor = plateau_factor
        self.plateau_patience = plateau_patience
        self.min_lr = min_lr
        self.clip_norm = clip_norm
        self.ema_decay = ema_decay
        self.nb_epoch = nb_epoch
        self.max_steps = max_steps
        self.early_stopping = early_stopping
        self.validate_every = validate_every
        self.prefetch = prefetch
        self.plan = plan
        self.unknown_elements = unknown_elements
        self.progress = progress

    # --------------------------------------------------------------------------------------------------- training

    def fit(
        self,
        dataset: Any,
        valid: Any = None,
        *,
        nb_epoch: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        init_from: str | os.PathLike | NDeMModel | Imported | None = None,
        init_partial: bool = False,
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        tensorboard: bool = False,
        callback: Callable[[dict[str, float]], None] | None = None,
        devices: int | str = 1,
        nodes: int = 1,
    ) -> NDeMModel:
        """Train anew.

        Parameters
        ----------
        dataset, valid
            Training and validation data: a `MolecularDataset`, a DeepChem dataset of DGLGraphs, a list of DGLGraphs,
            or a list of `ase.Atoms`. Without validation data, the last weights are kept instead of the best.
        nb_epoch, max_steps, max_time
            Limits on passes over the data, steps and seconds; training ends with the first that is reached. Given any
            of them, those of the constructor and preset do not hold.
        init_from
            Where the weights begin. A fitted model, or the folder of a saved one: its backbone, energy and force heads,
            and its scale, unless the keyword `scale` is given. A pre-trained model (`pretrain`), its folder, or a checkpoint
            of TorchMD-NET's relatives (`ndem_zoo.foreign`): its backbone, and its denoising head where the objective has
            one of that shape. What became of each weight is in `init_report_`.
        init_partial
            Take what fits from a network with other options. False: every weight of the backbone must fit.
        checkpoint_dir
            Folder for ``history.csv`` and checkpoints.
        checkpoint_every
            Steps between checkpoints; default: only at the end.
        resume
            Continue the training in `checkpoint_dir`, if there is one.
        tensorboard
            Also write TensorBoard files into `checkpoint_dir`.
        callback
            Called with every row of the history.
        devices, nodes
            How many devices (``"auto"``: all that were started) of how many machines train together. Every process, started
            by ``torchrun`` or SLURM, runs the same script and ends with the same model; the first one writes files and calls
            `callback`. `batch_size` and `max_atoms` are those of all devices together: the steps are the same on any number.

        Returns
        -------
        self

        Raises
        ------
        DataError
            If a structure or label cannot be used; names its index. Nothing is written then.
        ConfigError
            If an option is not allowed, or not as many processes were started as `devices` and `nodes` say.
        TrainingError
            If the training diverges, or if one of several processes is gone.
        """
        limits = {"nb_epoch": nb_epoch, "max_steps": max_steps, "max_time": max_time}
        return self._train_anew(
            dataset,
            valid,
            limits,
            init_from,
            init_partial,
            directory=None if checkpoint_dir is None else Path(checkpoint_dir),
            checkpoint_every=checkpoint_every,
            resume=resume,
            tensorboard=tensorboard,
            callback=callback,
            devices=devices,
            nodes=nodes,
        )

    def pretrain(
        self,
        dataset: Any,
        valid: Any = None,
        *,
        nb_epoch: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        init_from: str | os.PathLike | NDeMModel | Imported | None = None,
        init_partial: bool = False,
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        tensorboard: bool = False,
        callback: Callable[[dict[str, float]], None] | None = None,
        devices: int | str = 1,
        nodes: int = 1,
    ) -> NDeMModel:
        """Train the backbone on structures without labels, by the auxiliary term of the objective alone.

        The result has no energies: it is what `fit` of another model takes as `init_from`. Labels that the data have are
        not looked at; the noise is told from the noisy structure, as near a minimum of the energy, where the forces are 0.

        Parameters
        ----------
        dataset, valid
            Structures in any form that `fit` takes. With validation data, the weights with the smallest auxiliary term on
            them are kept, noise head included; the noise on them is always the same.
        nb_epoch, max_steps, max_time, init_from, init_partial, checkpoint_dir, checkpoint_every, resume, tensorboard, \
callback, devices, nodes
            As for `fit`.

        Returns
        -------
        self

        Raises
        ------
        ConfigError
            If the objective has no auxiliary term, or one that needs labels (``"dens"``; ``"ndem"`` with
            ``grad_main="label"`` or ``target="boltzmann"``).
        DataError
            If a structure cannot be used; names its index.

        Notes
        -----
        Choice: the term counts with weight 1 throughout, whatever `weight` and `weight_schedule` are for `fit`.
        """
        limits = {"nb_epoch": nb_epoch, "max_steps": max_steps, "max_time": max_time}
        return self._train_anew(
            dataset,
            valid,
            limits,
            init_from,
            init_partial,
            pretraining=True,
            directory=None if checkpoint_dir is None else Path(checkpoint_dir),
            checkpoint_every=checkpoint_every,
            resume=resume,
            tensorboard=tensorboard,
            callback=callback,
            devices=devices,
            nodes=nodes,
        )

    def _train_anew(
        self,
        dataset: Any,
        valid: Any,
        limits: dict[str, Any],
        init_from: Any,
        init_partial: bool,
        pretraining: bool = False,
        **options: Any,
    ) -> NDeMModel:
        """Check everything, build, and train."""
        start = None if init_from is None else start_from(init_from, init_partial)
        train_set, valid_set = self._checked(dataset, valid, limits, known=None, pretraining=pretraining)
        prior, train_set, valid_set = (
            (None, train_set, valid_set) if pretraining else self._beyond_prior(train_set, valid_set, is_new=True)
        )
        self._build(train_set, start, init_partial, pretraining, prior)
        return self._train(train_set, valid_set, limits, **options)

    def partial_fit(
        self,
        dataset: Any,
        valid: Any = None,
        *,
        nb_epoch: int | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        callback: Callable[[dict[str, float]], None] | None = None,
    ) -> NDeMModel:
        """Train on from the present weights, or begin; see `fit`.

        Reference energies and scale stay. Settings changed by `set_params` since then hold from now on; another
        objective begins with new heads.

        Raises
        ------
        ConfigError
            If the backbone or the way forces are made was changed, for which only `fit` can build new weights; if the
            model is only pre-trained.
        DataError
            If the data contain an element for which there is no reference energy yet.
        """
        if self._is_pretrained:
            raise ConfigError("this model is only pre-trained, without energies: call fit(..., init_from=this model)")
        limits = {"nb_epoch": nb_epoch, "max_steps": max_steps, "max_time": max_time}
        train_set, valid_set = self._checked(dataset, valid, limits, known=getattr(self, "reference_", None))
        is_new = not hasattr(self, "potential_")
        prior, train_set, valid_set = self._beyond_prior(train_set, valid_set, is_new)
        if is_new:
            self._build(train_set, prior=prior)
        else:
            self._rebuild_objective(train_set)
        return self._train(train_set, valid_set, limits, callback=callback)

    def _train(
        self,
        train_set: MolecularDataset,
        valid_set: MolecularDataset | None,
        limits: dict[str, Any],
        callback: Callable[[dict[str, float]], None] | None = None,
        **options: Any,
    ) -> NDeMModel:
        """Run the loop and keep its history."""
        self.potential_.backbone.use_plan(self._plan(), torch_device(self.device))
        self.training_data_ = _plain(provenance.describe_data(train_set, valid_set, self.training_data_))
        given = {name: limit for name, limit in limits.items() if limit is not None}
        machine = provenance.machine(torch_device(self.device))
        self.provenance_ = {"init_from": self.provenance_.get("init_from"), "fit": given, "machine": machine}
        identity = {name: self.resolved_[name] for name in ("backbone", "forces", "scale", "prior")}
        prior = self.potential_.prior
        if prior is not None:
            prior.to(torch_device(self.device))  # the objective may ask it, though the potential does not

        def whole(row: dict[str, float]) -> None:
            with self.potential_.with_prior(prior):  # a callback may predict, or save the model
                callback(row)

        train_set = self.objective_.complete(train_set)
        with self.potential_.without_prior():  # the labels are less the prior's
            history = train(
                self.potential_,
                self.objective_,
                train_set,
                valid_set,
                _settings(self.resolved_, limits),
                device=torch_device(self.device),
                progress=self.progress,
                callback=None if callback is None else whole,
                identity=_plain(identity | {"reference_energies": self.resolved_["reference_energies"]}),
                recipe={"model": type(self).__name__, "resolved": _plain(self.resolved_)},
                **options,
            )
        self.history_ = [*getattr(self, "history_", []), *history]
        self.interrupted_, self.spikes_ = history.interrupted, list(history.spikes)
        return self

    def _checked(
        self,
        dataset: Any,
        valid: Any,
        limits: dict[str, Any],
        known: Iterable[str] | None,
        pretraining: bool = False,
    ) -> tuple[MolecularDataset, MolecularDataset | None]:
        """The data as columns; they and all settings are checked before anything is built or written.

        Elements must be among `known`, for which there are reference energies; None: those of the training data.
        """
        resolved = self._resolve(pretraining)
        if self.unknown_elements not in ("error", "warn"):
            raise ConfigError(f"unknown_elements={self.unknown_elements!r}; allowed are 'error' and 'warn'")
        _settings(resolved, limits)
        torch_device(self.device)
        objective = self._make_objective(resolved)
        if pretraining:
            _check_needs_no_labels(objective, resolved)
        checked = []
        for name, data in (("training", dataset), ("validation", valid)):
            if data is None and name == "validation":
                checked.append(None)
                continue
            try:
                columns = as_dataset(data)
                if len(columns) == 0:
                    raise DataError("which is empty: it must hold at least one structure")
                check_structures(columns)
                columns = objective.prepare(columns)
                check_targets(columns, objective.requires)
                check_one_number(columns, resolved["supervised"]["target"])
                known = [chemical_symbols[number] for number in elements_of(columns.z)] if known is None else known
                action = self.unknown_elements if name == "validation" else "error"
                check_known_elements(columns.z, columns.ptr, known, action)
            except DataError as error:
                raise type(error)(f"{name} set, {error}") from error
            checked.append(columns.with_targets([]) if pretraining else columns)
        return checked[0], checked[1]

    # --------------------------------------------------------------------------------------------------- building

    def _resolve(self, pretraining: bool = False) -> dict[str, Any]:
        """All settings: the preset's, replaced by what was given, and by what holds without labels."""
        values = preset_values(self.preset or self.default_preset)
        own = {
            name: value for name, value in self.get_params(deep=False).items() if value is not None and name in values
        }
        merged = values | own
        backbone = merged.pop("backbone").get(self.backbone_name, {}) | (self.backbone_options or {})
        options = merged.pop("objectives").get(self.objective, {}) | (self.objective_options or {})
        if merged["target"] != "energy":
            if self.forces not in (None, "none"):
                raise ConfigError(f"forces={self.forces!r} with target={merged['target']!r}: only an energy has forces")
            merged["forces"] = "none"
        settings = {name: merged[name] for name in _SETTINGS if name in merged}
        settings |= {
            name: getattr(self, name) for name in ("precision", "seed", "prefetch", "accumulate", "deterministic")
        }
        if self.max_atoms is not None and self.batch_size is None:
            settings["batch_size"] = None
        if self.nb_epoch is not None or self.max_steps is not None:
            settings |= {"nb_epoch": self.nb_epoch, "max_steps": self.max_steps}
        if self.prior is not None and merged["target"] != "energy":
            raise ConfigError(f"prior={self.prior!r} with target={merged['target']!r}: force fields have energies only")
        if merged["forces"] == "none" and merged["force_weight"]:
            if self.force_weight:
                raise ConfigError(
                    f"forces='none' with force_weight={self.force_weight!r}: there are no forces to train"
                )
            merged["force_weight"] = 0.0
        if registry.lookup(registry.OBJECTIVES, self.objective, "objective").encodes_vectors:
            backbone = {"encode_vectors": True} | backbone
        cls = registry.lookup(registry.BACKBONES, self.backbone_name, "backbone")
        resolved = {
            "settings": settings,
            "backbone": {"name": self.backbone_name, "options": options_of(cls, backbone)},
            "objective": {
                "name": self.objective,
                "options": options,
                "weight": merged["weight"],
                "weight_schedule": merged["weight_schedule"],
            },
            "supervised": {name: merged[name] for name in ("energy_weight", "force_weight", "loss", "target")},
            "forces": merged["forces"],
            "scale": merged["scale"],
            "reference_energies": _plain(merged["reference_energies"]),
            "pretraining": False,
            "prior": self.prior,
        }
        return _without_labels(resolved) if pretraining else resolved

    @staticmethod
    def _make_backbone(resolved: dict[str, Any]) -> Backbone:
        cls = registry.lookup(registry.BACKBONES, resolved["backbone"]["name"], "backbone")
        return cls(**resolved["backbone"]["options"])

    @staticmethod
    def _make_objective(resolved: dict[str, Any]) -> Objective:
        record = resolved["objective"]
        cls = registry.lookup(registry.OBJECTIVES, record["name"], "objective")
        supervised = (NoLabels if resolved.get("pretraining") else SupervisedLoss)(**resolved["supervised"])
        return cls(supervised, record["weight"], record["weight_schedule"], record["options"])

    def _fit_prior(self, train_set: MolecularDataset) -> ForceField | None:
        """The force field to which the difference is learned, ready for these data."""
        resolved = self._resolve()
        if resolved["prior"] is None:
            return None
        prior, backbone = make_force_field(resolved["prior"]), self._make_backbone(resolved)
        if prior.cutoff > backbone.cutoff or (prior.cutoff and backbone.nearest is not None):
            seen = f"{backbone.cutoff} Å" + ("" if backbone.nearest is None else ", and the nearest neighbors only")
            raise ConfigError(
                f"prior={self.prior!r} needs all neighbors up to {prior.cutoff} Å; the backbone sees {seen}"
            )
        try:
            return prior.fit(train_set)
        except DataError as error:
            raise DataError(f"training set, prior {self.prior!r}: {error}") from error

    def _beyond_prior(
        self, train_set: MolecularDataset, valid_set: MolecularDataset | None, is_new: bool
    ) -> tuple[ForceField | None, MolecularDataset, MolecularDataset | None]:
        """The prior, fitted if the model is new, and what a network has to learn beyond it."""
        prior = self._fit_prior(train_set) if is_new else self.potential_.prior
        return prior, _less(prior, train_set), _less(prior, valid_set, "validation")

    def _build(
        self,
        train_set: MolecularDataset,
        start: Start | None = None,
        partial: bool = False,
        pretraining: bool = False,
        prior: ForceField | None = None,
    ) -> None:
        """Make potential and objective for these data, with weights drawn from the seed or those to start from."""
        resolved = self._resolve(pretraining)
        if start is not None and start.kind == "fitted" and start.origin.get("prior") != resolved["prior"]:
            raise ConfigError(
                f"init_from learned the difference to prior={start.origin.get('prior')!r}, this model has {resolved['prior']!r}"
            )
        target = resolved["supervised"]["target"]
        reference, shift = _references(train_set, target, resolved["reference_energies"])
        scale = _scale(train_set, target, reference, resolved["scale"])
        units = {"reference": reference, "scale": scale, "shift": shift}
        with seeded(self.seed):
            potential = Potential(self._make_backbone(resolved), forces=resolved["forces"], target=target, **units)
        potential.attach_prior(prior)
        _check_table(train_set, potential.backbone)
        objective = self._make_objective(resolved)
        with seeded(self.seed + 1):  # own draws: the potential's weights do not depend on the objective
            objective.build(potential, train_set)
        self.init_report_ = None
        if start is not None:
            if resolved["settings"]["precision"] == "64-true":
                potential, objective = potential.double(), objective.double()  # or the weights would be rounded
            how = {"partial": partial, "keep_scale": self.scale is not None}
            self.init_report_ = begin(start, potential, objective, resolved["backbone"], **how)
        self.resolved_ = resolved
        self.potential_, self.objective_ = potential, objective
        self.reference_ = _by_symbol(reference, train_set.z)
        self.history_ = []
        self.training_data_ = {}
        self.provenance_ = {"init_from": None if start is None else dict(start.origin)}

    def _take(self, start: Start, units: dict[str, Any], elements: Iterable[str], partial: bool) -> NDeMModel:
        """Become a model with these weights that predicts in these units; without units, a pre-trained one."""
        resolved = self._resolve(pretraining=not units)
        if resolved["prior"] is not None:
            raise ConfigError(
                f"prior={resolved['prior']!r}: imported energies are whole ones; fit with init_from instead"
            )
        if property_of(resolved["supervised"]["target"]).readout != "sum":
            raise ConfigError(f"target={resolved['supervised']['target']!r}: only sums over atoms can be imported")
        resolved |= {"scale": units["scale"], "reference_energies": "imported"} if units else {}
        unknown = [symbol for symbol in elements if symbol not in atomic_numbers]
        if unknown:
            raise ConfigError(f"elements has {unknown[0]!r}, which is no chemical symbol")
        dtype = torch.float64 if self.precision == "64-true" else torch.float32
        with seeded(self.seed):
            backbone = self._make_backbone(resolved)
            potential = Potential(backbone, forces=resolved["forces"], target=resolved["supervised"]["target"], **units)
        objective = self._make_objective(resolved)
        with seeded(self.seed + 1):
            objective.build(potential)
        potential, objective = potential.to(dtype).eval(), objective.to(dtype)
        self.init_report_ = begin(start, potential, objective, resolved["backbone"], partial=partial)
        self.resolved_, self.potential_, self.objective_ = resolved, potential, objective
        self.reference_ = {symbol: float(potential.reference[atomic_numbers[symbol]]) for symbol in elements}
        self.training_data_ = {"name": start.report.source, "n_train": 0, "n_valid": 0, "split_hash": "unknown"}
        self.provenance_ = {"init_from": dict(start.origin)}
        self.history_, self.interrupted_ = [], False
        return self

    def _rebuild_objective(self, train_set: MolecularDataset) -> None:
        """Take over changed settings; make the objective anew if it is another one."""
        before, now = self.resolved_, self._resolve()
        for name, old in _fixed_by_weights(before).items():
            new = _fixed_by_weights(now)[name]
            if new != old:
                raise ConfigError(f"{name} was {old} when the weights were made, and is {new}: call fit")
        if any(now[name] != before[name] for name in ("objective", "supervised")):
            heads = self.objective_.state_dict()
            self.objective_ = self._make_objective(now)
            with seeded(self.seed + 1):
                self.objective_.build(self.potential_, train_set)
            if all(now["objective"][name] == before["objective"][name] for name in ("name", "options")):
                self.objective_.load_state_dict(heads)  # only weights of terms were changed
        self.resolved_ = now

    def _plan(self) -> str:
        """How the backbone is run: what is written by hand has one precision."""
        if self.precision != "bf16-mixed":
            return self.plan
        if self.plan == "fused":
            raise ConfigError("plan='fused' computes in float32 or float64: choose plan='eager' for bf16-mixed")
        return "eager"

    # -------------------------------------------------------------------------------------------------- prediction

    def predict(self, dataset: Any, *, return_std: bool = False) -> dict[str, Any]:
        """Energies and forces.

        Parameters
        ----------
        dataset
            Structures in any form that `fit` takes, also a single DGLGraph or `ase.Atoms`; labels are not looked at.
        return_std
            Standard deviations are what an `Ensemble` of several models has; a single one refuses.

        Returns
        -------
        prediction : dict
            ``"energy"``, or the name of the target: (S,) float64 in eV, or its unit (`ndem_zoo.properties`).
            ``"forces"``, if the potential has them: (S, n, 3) in eV/Å if all structures have n atoms, else a list of
            (n_i, 3).

        Raises
        ------
        NotFittedError
            Before `fit` or `load`.
        DataError
            If a structure cannot be used; names its index.
        ConfigError
            If `return_std` is asked for.
        """
        if return_std:
            raise ConfigError(
                "return_std=True, but a single model has no spread: train two or more that differ in their seed, and ask "
                "ndem_zoo.Ensemble([...]).predict(dataset, return_std=True)"
            )
        columns, structures = self._predict_columns(dataset)
        if "forces" in columns:
            columns["forces"] = _per_structure(columns["forces"], structures.ptr)
        return columns

    def evaluate(self, dataset: Any, metrics: list[str] | None = None) -> dict[str, float]:
        """Errors on labeled data.

        Parameters
        ----------
        dataset
            Structures with the target, forces or both.
        metrics
            Names to return; default all of `ndem_zoo.metrics.dataset_metrics`.

        Raises
        ------
        DataError
            If there are no structures, or no labels to compare with, or one of them is not finite.
        ConfigError
            If a metric does not exist; lists those that do.
        """
        columns, structures = self._predict_columns(dataset)
        if len(structures) == 0:
            raise DataError("the dataset is empty: it must hold at least one structure")
        check_one_number(structures, self.potential_.target)
        check_targets(structures, set(columns) & set(structures.targets))
        found = dataset_metrics(columns, structures)
        if not found:
            raise DataError(f"the dataset has none of {', '.join(columns)} to compare with")
        self.note_evaluation(structures, found)
        unknown = [name for name in metrics or [] if name not in found]
        if unknown:
            raise ConfigError(f"there is no metric {unknown[0]!r} here; there are {', '.join(found)}")
        return found if metrics is None else {name: found[name] for name in metrics}

    def note_evaluation(self, dataset: MolecularDataset, metrics: dict[str, float], part: str = "") -> None:
        """Remember errors for the model card; `evaluate` does so by itself, and only the last ones are kept.

        Parameters
        ----------
        dataset
            What they are of.
        metrics
            See `ndem_zoo.metrics.dataset_metrics`.
        part
            What the data are to the run, such as ``"test"``.
        """
        head = {"name": dataset.name, "part": part, "n_structures": len(dataset), "split_hash": dataset.split_hash}
        self.provenance_["evaluation"] = head | {"metrics": _plain(dict(metrics))}

    def score(self, dataset: Any, y: Any = None) -> float:
        """Negative MAE of the force components in eV/Å (of the target in its unit where there are no forces).

        `y` is there for scikit-learn, and not looked at.
        """
        found = self.evaluate(dataset)
        return -found.get("forces_mae", found.get(f"{self.potential_.target}_mae", np.nan))

    def _predict_columns(self, dataset: Any) -> tuple[dict[str, np.ndarray], MolecularDataset]:
        """Predictions in columns, and the structures that they are for."""
        structures = as_dataset(dataset)
        self._check_usable(structures)
        return self._columns_of_usable(structures), structures

    def _check_usable(self, structures: MolecularDataset) -> None:
        """Raise DataError for a structure that cannot be predicted; nothing is computed."""
        potential = self._fitted()
        check_structures(structures)
        check_known_elements(structures.z, structures.ptr, self.reference_, self.unknown_elements)
        _check_table(structures, potential.backbone)
        if potential.prior is not None:
            potential.prior.check(structures)

    def _columns_of_usable(self, structures: MolecularDataset) -> dict[str, np.ndarray]:
        """Predictions in columns for structures that were checked."""
        potential = self._fitted().to(torch_device(self.device))
        potential.backbone.use_plan(self._plan(), torch_device(self.device))
        return predict_columns(potential, structures, self.resolved_["settings"]["eval_batch_size"])

    @property
    def _is_pretrained(self) -> bool:
        """Whether there are weights, but no energies."""
        return bool(getattr(self, "resolved_", {}).get("pretraining"))

    def _weights(self) -> Potential:
        """The potential, whether or not it has energies."""
        if not hasattr(self, "potential_"):
            raise ModelNotFittedError(f"this {type(self).__name__} has no weights yet: call fit, or load a saved model")
        return self.potential_

    def _fitted(self) -> Potential:
        """The potential, to predict with."""
        if self._is_pretrained:
            raise ModelNotFittedError(
                f"this {type(self).__name__} is only pre-trained, and knows no energies: call fit(..., init_from=this model)"
            )
        return self._weights()

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "potential_") and not self._is_pretrained

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.target_tags.required = False
        return tags

    # --------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted model into a folder: ``config.json``, ``weights.safetensors``, ``history.csv``, ``card.md``.

        Nothing is pickled. The folder appears whole or not at all; one that is there already is replaced if it holds a
        model and nothing else, and refused otherwise. Where processes have trained together, the first one writes, and the
        call does nothing in the others.

        Raises
        ------
        NotFittedError
            Before `fit`.
        FileExistsError
            If `path` is a file, or a folder with other content.
        StorageError
            If the disk is full; a model that was there before still is.
        """
        potential, path = self._weights(), Path(path)
        if not is_first():
            return
        present = {item.name for item in path.iterdir()} if path.is_dir() else set()
        if present and not ("config.json" in present and present <= _MODEL_FILES):
            other = ", ".join(sorted(present - _MODEL_FILES)) or "no config.json"
            raise FileExistsError(f"{path} exists and holds something else than a model ({other}); nothing was written")
        tensors = {f"potential.{name}": value for name, value in potential.state_dict().items()}
        tensors |= {f"objective.{name}": value for name, value in self.objective_.state_dict().items()}
        if potential.prior is not None:
            tensors |= {f"prior.{name}": value.contiguous() for name, value in potential.prior.state_dict().items()}
        config = {
            "format": FORMAT,
            "ndem_zoo": __version__,
            "model": type(self).__name__,
            "params": _plain(self.get_params(deep=False)),
            "resolved": _plain(self.resolved_),
            "reference": self.reference_,
            "training_data": self.training_data_,
            "provenance": self.provenance_,
        }
        with files.atomic_folder(path) as folder:
            files.save_tensors(folder / "weights.safetensors", tensors)
            write_history(folder / "history.csv", self.history_)
            digests = {name: files.file_digest(folder / name) for name in ("weights.safetensors", "history.csv")}
            files.save_record(folder / "config.json", config | {"sha256": digests})
            files.write_text(
                folder / "card.md", model_card(config, potential.n_parameters, self.history_, float(potential.shift))
            )

    def export(
        self,
        path: str | os.PathLike,
        format: str = "torch_export",
        *,
        device: str | None = None,
        precision: str | None = None,
    ) -> Path:
        """Write the fitted model as one file that runs without this package.

        Parameters
        ----------
        path, device, precision
            See `ndem_zoo.export.export_model`.
        format
            ``"torch_export"``, a program for `torch.export.load`; ``"aotinductor"``, the same compiled for this kind of
            processor (torch 2.6 or later and a C++ compiler); ``"metatomic"``, for LAMMPS, i-PI and ASE through metatomic.

        Returns
        -------
        path : Path
            The file.

        Raises
        ------
        ConfigError
            If the model cannot be exported: it predicts something else than energies, or its backbone or prior cannot be
            traced.
        """
        from ndem_zoo.export import export_model  # here: torch's compiler takes long to import

        return export_model(self, path, format, device=device, precision=precision)

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: str | None = None) -> NDeMModel:
        """Read a model that `save` wrote; executes no code from the folder.

        Parameters
        ----------
        path
            The folder.
        device
            Replaces the saved model's `device`.

        Returns
        -------
        model
            Of the class that was saved; equal to the saved one bit for bit.

        Raises
        ------
        FileNotFoundError
            If the folder or one of its files is missing.
        FileFormatError
            If a file is damaged, from a newer version, or of another class than `cls`.
        """
        path = Path(path)
        config = files.load_record(path / "config.json")
        try:
            if config["format"] > FORMAT:
                raise FileFormatError(f"{path} has format {config['format']}; this version reads up to {FORMAT}")
            model_class = registry.lookup(registry.MODELS, config["model"], "model")
            params, resolved = config["params"], config["resolved"]
            digests = config.get("sha256", {})  # models of older versions have none
            tensors = files.load_tensors(path / "weights.safetensors", digests.get("weights.safetensors"))
            files.check_digest(path / "history.csv", digests.get("history.csv"))
            if config["format"] == 1:  # from before there were targets other than energies
                resolved["supervised"].setdefault("target", "energy")
                resolved.setdefault("reference_energies", None)
                tensors.setdefault("potential.shift", torch.zeros((), dtype=torch.float64))
            resolved.setdefault("pretraining", False)  # models from before there was any
            resolved.setdefault("prior", None)
            if not issubclass(model_class, cls):
                raise FileFormatError(f"{path} holds a {config['model']}, not a {cls.__name__}")
            model = model_class(**params | ({} if device is None else {"device": device}))
            model.reference_, model.training_data_ = config["reference"], config["training_data"]
            model.provenance_ = config.get("provenance", {})  # models of older versions have none
            model._restore(resolved, tensors)
        except (KeyError, TypeError, ConfigError) as error:
            raise FileFormatError(f"{path / 'config.json'} does not describe a model of ours: {error!r}") from error
        model.history_ = read_history(path / "history.csv")
        return model

    def _restore(self, resolved: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Rebuild potential and objective, and fill in their weights."""
        dtype = torch.float64 if resolved["settings"]["precision"] == "64-true" else torch.float32
        with seeded(0):
            target = resolved["supervised"]["target"]
            potential = Potential(self._make_backbone(resolved), forces=resolved["forces"], target=target)
            prior = None if resolved["prior"] is None else make_force_field(resolved["prior"])
            potential.attach_prior(prior)
            objective = self._make_objective(resolved)
            objective.build(potential)
        modules = {"potential.": potential.to(dtype), "objective.": objective.to(dtype)}
        for name, module in (modules | ({} if prior is None else {"prior.": prior})).items():
            state = {key[len(name) :]: value for key, value in tensors.items() if key.startswith(name)}
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise FileFormatError(f"the saved weights do not fit the saved configuration: {error}") from error
        self.resolved_, self.potential_, self.objective_ = resolved, potential.eval(), objective


def elements_of(z: Int[np.ndarray, " A"]) -> Int[np.ndarray, " n"]:
    """The atomic numbers that occur, ascending; in blocks, since sorting them all would copy a memory-mapped column."""
    is_present = np.zeros(256, dtype=bool)
    for start in range(0, len(z), ATOMS_AT_ONCE):
        is_present[z[start : start + ATOMS_AT_ONCE]] = True
    return np.flatnonzero(is_present)


def check_known_elements(z: np.ndarray, ptr: np.ndarray, known: Iterable[str], action: str = "error") -> None:
    """Raise DataError for an element that a model has not seen: its weights and reference energy would mean nothing.

    Parameters
    ----------
    z : (A,)
        Atomic numbers.
    ptr : (S + 1,)
        Where each structure begins and ends.
    known
        Chemical symbols of the training data.
    action
        ``"error"``, or ``"warn"`` for a `DataWarning` instead.
    """
    known = sorted(atomic_numbers[symbol] for symbol in known)
    if np.isin(elements_of(z), known).all():
        return
    bad = np.flatnonzero(~np.isin(z, known))
    if len(bad):
        index = int(np.searchsorted(ptr, bad[0], side="right") - 1)
        names = ", ".join(chemical_symbols[number] for number in known)
        message = (
            f"structure {index}: atom {bad[0] - ptr[index]} is {chemical_symbols[z[bad[0]]]}, which the model has not been "
            f"trained on; it knows {names}"
        )
        if action == "error":
            raise DataError(message)
        warnings.warn(message, DataWarning, stacklevel=3)


def check_one_number(dataset: MolecularDataset, target: str) -> None:
    """Raise DataError unless a target, if it is there, has one number for each structure."""
    values = dataset.targets.get(target)
    if values is not None and values.shape != (len(dataset),):
        raise DataError(
            f"{target} has shape {values.shape}; a target has one number per structure, ({len(dataset)},)"
            + (" (give one of its columns)" if values.ndim > 1 else "")
        )


def _check_table(dataset: MolecularDataset, backbone: Backbone) -> None:
    """Raise DataError for an atomic number beyond the backbone's tables."""
    if len(dataset) and np.max(dataset.z) < backbone.max_z:
        return
    bad = np.flatnonzero(dataset.z >= backbone.max_z)
    if len(bad):
        index = int(np.searchsorted(dataset.ptr, bad[0], side="right") - 1)
        raise DataError(
            f"structure {index}: atomic number {dataset.z[bad[0]]}; this backbone knows those below {backbone.max_z} "
            "(option max_z)"
        )


def torch_device(name: str) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU; ``"cuda"``, where processes train together, one GPU for each.

    Raises
    ------
    ConfigError
        If CUDA is asked for and there is none, or the name is unknown.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return own_gpu()
    if name == "auto":
        return torch.device("cpu")
    allowed = "allowed are 'auto', 'cpu', 'cuda', 'cuda:0', ..."
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={name!r}; {allowed}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}; {allowed}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise ConfigError(f"device={name!r}, but torch sees {seen} CUDA devices; device='auto' takes what there is")
    return device


def _settings(resolved: dict[str, Any], limits: dict[str, Any]) -> TrainSettings:
    """Settings of a run; where `fit` was given limits, those of the constructor and preset do not hold."""
    given = any(limit is not None for limit in limits.values())
    return TrainSettings(**resolved["settings"] | (limits if given else {}))


def _without_labels(resolved: dict[str, Any]) -> dict[str, Any]:
    """Settings of pre-training: the auxiliary term alone and in full, no forces, nothing that is taken from labels."""
    return resolved | {
        "objective": resolved["objective"] | {"weight": 1.0, "weight_schedule": "constant"},
        "supervised": resolved["supervised"] | {"energy_weight": 0.0, "force_weight": 0.0},
        "forces": "none",
        "scale": 1.0 if isinstance(resolved["scale"], str) else resolved["scale"],
        "reference_energies": "none",
        "prior": None,
        "pretraining": True,
    }


def _check_needs_no_labels(objective: Objective, resolved: dict[str, Any]) -> None:
    """Raise ConfigError unless pre-training has something to learn without labels."""
    name = resolved["objective"]["name"]
    if not objective.has_auxiliary_term:
        raise ConfigError(f"objective={name!r} has no auxiliary term: there is nothing to learn without labels")
    labels = objective.requires & {"energy", "forces", resolved["supervised"]["target"]}
    if labels:
        options = ", ".join(f"{key}={value!r}" for key, value in resolved["objective"]["options"].items())
        raise ConfigError(
            f"objective={name!r} with {options or 'its defaults'} needs {', '.join(sorted(labels))}, which pre-training does "
            "not have; ndem with grad_main='stop' and target='paper', and noisy_nodes, need none"
        )


def _fixed_by_weights(resolved: dict[str, Any]) -> dict[str, Any]:
    """The settings that weights are made for, by name."""
    return {
        "backbone": resolved["backbone"],
        "forces": resolved["forces"],
        "target": resolved["supervised"]["target"],
        "prior": resolved["prior"],
    }


def _less(
    prior: ForceField | None, dataset: MolecularDataset | None, name: str = "training"
) -> MolecularDataset | None:
    """What a network has to learn of a dataset: labels less those of the prior."""
    if prior is None or dataset is None:
        return dataset
    try:
        return prior.subtract(dataset)
    except DataError as error:
        raise DataError(f"{name} set, {error}") from error


def _references(
    train_set: MolecularDataset, target: str, wanted: dict[str | int, float] | str | None
) -> tuple[np.ndarray, float]:
    """Reference energies by atomic number, and what is added once for each structure; see `NDeMModel`."""
    nothing = np.zeros(MAX_Z + 1)
    if property_of(target).readout == "dipole" and wanted not in (None, "none"):
        raise ConfigError(
            f"reference_energies={wanted!r} with target={target!r}: nothing is subtracted from a dipole moment"
        )
    if isinstance(wanted, dict):
        return _reference_from(wanted, elements_of(train_set.z)), 0.0
    allowed = ("fit", "dataset", "mean", "none")
    if wanted is not None and wanted not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ConfigError(f"reference_energies={wanted!r}; allowed are {names}, or energies by chemical symbol")
    known = property_of(target)
    if wanted is None:
        wanted = "fit" if known.has_references else "mean" if known.readout == "sum" else "none"
    if wanted == "dataset":
        tables = {} if train_set.card is None else train_set.card.atom_references
        if target not in tables:
            raise ConfigError(f"reference_energies='dataset', but the dataset has none for {target}: try 'fit'")
        return _reference_from(tables[target], elements_of(train_set.z)), 0.0
    if wanted == "none" or target not in train_set.targets:
        return nothing, 0.0
    values = train_set.targets[target]
    if wanted == "mean":
        return nothing, float(np.mean(values))
    weight = _extents(train_set) if known.readout == "spatial_extent" else None
    return fit_reference_energies(train_set.z, train_set.ptr, values, weight), 0.0


def _extents(dataset: MolecularDataset) -> np.ndarray:
    """What the constants of the atoms are multiplied with in a spatial extent."""
    mass, starts = atomic_masses[dataset.z], dataset.ptr[:-1]
    total = np.add.reduceat(mass, starts)
    center = np.add.reduceat(mass[:, None] * dataset.pos, starts) / total[:, None]
    return np.square(dataset.pos - np.repeat(center, dataset.counts, axis=0)).sum(axis=1) / EXTENT


def _scale(train_set: MolecularDataset, target: str, reference: np.ndarray, wanted: float | str) -> float:
    """The network's unit, in that of the target."""
    if not isinstance(wanted, str):
        return float(wanted)
    if wanted not in ("force_rms", "target_std"):
        raise ConfigError(f"scale={wanted!r}; allowed are a number in eV, 'force_rms' and 'target_std'")
    if wanted == "force_rms" and "forces" in train_set.targets and target == "energy":
        value = root_mean_square(train_set, "forces")
    elif target in train_set.targets:
        parts = [_beyond_references(block, target, reference) for _, block in blocks(train_set)]
        value = float(np.std(np.concatenate(parts)))
    else:
        value = 1.0
    return value if value > 1e-8 else 1.0  # a single structure has no spread but rounding errors


def _beyond_references(dataset: MolecularDataset, target: str, reference: np.ndarray) -> np.ndarray:
    """The target (S,) without the sum of the constants of the atoms."""
    atoms = reference[dataset.z]
    if property_of(target).readout == "spatial_extent":
        atoms = atoms * _extents(dataset)
    return dataset.targets[target] - np.add.reduceat(atoms, dataset.ptr[:-1])


def _per_structure(values: np.ndarray, ptr: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """(S, n, 3) for structures of one size, else a list of (n_i, 3)."""
    counts = np.diff(ptr)
    if len(counts) and (counts == counts[0]).all():
        return values.reshape(len(counts), counts[0], 3)
    return np.split(values, ptr[1:-1]) if len(counts) else []


def _reference_from(given: dict[str | int, float], present: np.ndarray) -> np.ndarray:
    """Given reference energies by atomic number; all elements of the data must be there."""
    reference = np.full(MAX_Z + 1, np.nan)
    for key, value in given.items():
        number = atomic_numbers.get(key) if isinstance(key, str) and not key.isdigit() else int(key)
        if number is None or not 0 < number < len(reference):
            raise ConfigError(f"reference_energies has {key!r}, which is no element up to Z = {len(reference) - 1}")
        reference[number] = float(value)
    for number in present:
        if not np.isfinite(reference[number]):
            raise ConfigError(f"reference_energies lacks {chemical_symbols[number]}, which the training data contain")
    return np.nan_to_num(reference)


def _by_symbol(reference: np.ndarray, z: np.ndarray) -> dict[str, float]:
    return {chemical_symbols[number]: float(reference[number]) for number in elements_of(z)}


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts, as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, (np.generic, torch.Tensor)) else value
