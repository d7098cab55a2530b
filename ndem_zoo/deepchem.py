"""DeepChem's own classes around ours: models, featurizers, datasets, loaders; imported only on request.

The models are instances of `deepchem.models.Model` with DeepChem's manners (`fit` returns the loss and continues) that
hold one of our estimators and train through its loop. Nothing else imports DeepChem, but for
`MolecularDataset.to_deepchem` when it is called. Networks, numbers and files are those of the rest of the package; eV
and Å everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from ndem_zoo import checkpoint as files
from ndem_zoo.datasets.base import MolecularDataset, as_dataset, split_indices
from ndem_zoo.datasets.md17 import canonical_name, find_molecule, read_md17
from ndem_zoo.datasets.qm9 import find_qm9
from ndem_zoo.datasets.qm9 import load_qm9 as _load_columns_of_qm9
from ndem_zoo.errors import ConfigError, DataError, TrainingError
from ndem_zoo.featurizers.conformer import ConformerGraph, ConformerReport
from ndem_zoo.featurizers.radius import RadiusGraph
from ndem_zoo.graph import import_dgl
from ndem_zoo.metrics import error_metrics
from ndem_zoo.models.equiformer_v2.model import NDeMEquiformerV2
from ndem_zoo.models.estimator import NDeMModel
from ndem_zoo.models.schnetpack import NDeMPaiNN
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet
from ndem_zoo.objectives.base import check_whole
from ndem_zoo.optional import require
from ndem_zoo.properties import PROPERTIES
from ndem_zoo.sampling import Order
from ndem_zoo.training import _content_hash
from ndem_zoo.transfer import start_from

with contextlib.suppress(ImportError):
    import_dgl()  # Pitfall: DeepChem imports DGL itself, without our guard.
dc = require("deepchem", extra="deepchem")

__all__ = [
    "ConformerGraphFeaturizer",
    "CountSplitter",
    "EquiformerV2Model",
    "EstimatorModel",
    "PaiNNModel",
    "RadiusGraphFeaturizer",
    "TorchMDNetModel",
    "forces_metric",
    "from_deepchem",
    "load_md17",
    "load_qm9",
    "to_disk",
]

_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")

#: Choice: energies in `y` and in a graph that differ by less, relative to their size, are the same label.
SAME_ENERGY = 1e-6

#: Choice: structures in one file of a `DiskDataset`.
SHARD_SIZE = 1000


# ------------------------------------------------------------------------------------------------------------- featurizers


class RadiusGraphFeaturizer(dc.feat.Featurizer):
    """`ndem_zoo.featurizers.RadiusGraph` as a DeepChem featurizer: `ase.Atoms` to DGLGraphs, labels included.

    Unlike DeepChem's own it never leaves an empty array in place of a structure that failed: that is an error which
    names the structure.

    Parameters
    ----------
    cutoff, max_neighbors, skin, strict
        See `RadiusGraph`; lengths in Å.
    """

    def __init__(
        self, cutoff: float = 5.0, max_neighbors: int | None = None, skin: float = 0.0, strict: bool = True
    ) -> None:
        self.cutoff, self.max_neighbors, self.skin, self.strict = cutoff, max_neighbors, skin, strict
        self._graphs = RadiusGraph(cutoff, max_neighbors, skin, strict)

    def featurize(self, datapoints: Any, log_every_n: int = 1000, **kwargs: Any) -> np.ndarray:
        """Graphs (S,), an object array of DGLGraph; `log_every_n` and further options of DeepChem's are ignored.

        Raises
        ------
        DataError
            For the first structure that cannot be turned into a graph; names its index.
        """
        return self._graphs.featurize(datapoints)


class ConformerGraphFeaturizer(dc.feat.Featurizer):
    """`ndem_zoo.featurizers.ConformerGraph` as a DeepChem featurizer: SMILES or RDKit molecules to DGLGraphs.

    One graph for each molecule, that of the conformer of lowest energy, its atoms in the order of the input.

    Parameters
    ----------
    cutoff, n_conformers, seed, force_field, add_hydrogens, max_iterations, allow
        See `ConformerGraph`; the cutoff is in Å.
    on_failure
        ``"raise"``: one error that lists all molecules that failed; ``"drop"``: a warning, and an empty array in place of
        their graphs, by which DeepChem's loaders know what to leave out.
    """

    def __init__(
        self,
        cutoff: float = 5.0,
        n_conformers: int = 1,
        seed: int = 0,
        force_field: str | None = "MMFF94",
        add_hydrogens: bool = True,
        max_iterations: int = 2000,
        allow: Sequence[str] = (),
        on_failure: str = "raise",
    ) -> None:
        self.cutoff, self.n_conformers, self.seed, self.force_field = cutoff, n_conformers, seed, force_field
        self.add_hydrogens, self.max_iterations = add_hydrogens, max_iterations
        self.allow, self.on_failure = allow, on_failure
        self._graphs = ConformerGraph(
            cutoff,
            n_conformers,
            seed=seed,
            force_field=force_field,
            add_hydrogens=add_hydrogens,
            max_iterations=max_iterations,
            allow=allow,
            on_failure=on_failure,
        )

    @property
    def report_(self) -> ConformerReport:
        """What became of each molecule of the last call."""
        return self._graphs.report_

    def featurize(self, datapoints: Any, log_every_n: int = 1000, **kwargs: Any) -> np.ndarray:
        """Graphs (S,), an object array; `log_every_n` and further options of DeepChem's are ignored.

        Raises
        ------
        DataError
            See `ConformerGraph.featurize`.
        """
        graphs = self._graphs.featurize(datapoints)
        placed = np.empty(len(self.report_.outcomes), dtype=object)
        for index in range(len(placed)):
            placed[index] = np.array([])
        for index, graph in zip(self.report_.indices, graphs, strict=True):
            placed[index] = graph
        return placed


# ---------------------------------------------------------------------------------------------------------------- datasets


def to_disk(dataset: MolecularDataset, folder: str | os.PathLike | None = None, featurizer: Any = None) -> Any:
    """Write a dataset as a `deepchem.data.DiskDataset`, graphs as `X`; for one in memory see `MolecularDataset.to_deepchem`.

    Parameters
    ----------
    dataset
        Structures and labels.
    folder
        Where to; default a temporary folder, as DeepChem does.
    featurizer
        A DeepChem featurizer of `ase.Atoms`; default `RadiusGraphFeaturizer()`.

    Returns
    -------
    dataset : deepchem.data.DiskDataset
        `y` (S, T) float64 in the order of its `tasks`; forces, in eV/Å, are in the graphs (``ndata["F"]``).

    Raises
    ------
    DataError
        If a structure cannot be featurized; names its index.
    """
    featurizer = RadiusGraphFeaturizer() if featurizer is None else featurizer
    return dc.data.DiskDataset.create_dataset(
        _shards(dataset, featurizer), None if folder is None else os.fspath(folder), dataset._scalar_targets()
    )


def _shards(dataset: MolecularDataset, featurizer: Any) -> Iterator[tuple[np.ndarray, ...]]:
    """``(X, y, w, ids)`` of so many structures at a time; one empty shard if there are none."""
    for start in range(0, max(1, len(dataset)), SHARD_SIZE):
        part = dataset[start : start + SHARD_SIZE]
        yield _features(part, featurizer, start), part.y, part.w, np.array(part.ids, dtype=object)


def _features(dataset: MolecularDataset, featurizer: Any, start: int = 0) -> np.ndarray:
    """What a featurizer makes of the structures, the first of which has the number `start`."""
    if not len(dataset):
        return np.empty(0, dtype=object)
    features = featurizer.featurize([dataset.atoms(i) for i in range(len(dataset))])
    for index, item in enumerate(features):
        if isinstance(item, np.ndarray) and item.size == 0:
            raise DataError(f"structure {start + index}: {featurizer} failed; DeepChem does not say why")
    return features


def from_deepchem(dataset: Any, tasks: Sequence[str] | None = None) -> MolecularDataset:
    """Read a DeepChem dataset whose `X` holds DGLGraphs into a `MolecularDataset`.

    Parameters
    ----------
    dataset
        A `deepchem.data.Dataset`, in memory or on disk.
    tasks
        What the columns of `y` are; default the dataset's own tasks if they are names, else ``["energy"]``.

    Returns
    -------
    dataset : MolecularDataset
        Labels in the units that they came in, which are to be eV and Å; forces from the graphs. Structures whose weights
        are 0 are left out (with those DeepChem pads batches), unless all are 0, which says that there are no labels.

    Raises
    ------
    DataError
        If an item is no graph, `y` has another number of columns than there are tasks, weights are neither equal nor 0,
        or energies were transformed while forces were not; names the structure.
    """
    structures = _structures(dataset)
    y, w = np.asarray(dataset.y), np.asarray(dataset.w, dtype=np.float64)
    if not w.any():
        return structures
    names = _task_names(dataset) if tasks is None else list(tasks)
    n = len(structures)
    if y.dtype == object or y.size != n * len(names):
        raise DataError(
            f"y has shape {y.shape} and dtype {y.dtype}; for the tasks {', '.join(names)} it must be ({n}, {len(names)})"
        )
    y = y.reshape(n, len(names)).astype(np.float64)
    keep = _labeled_rows(w.reshape(n, -1))
    if "energy" in names:
        _check_not_transformed(structures, y[:, names.index("energy")], keep)
    columns = structures.columns()
    columns["targets"] = {**structures.targets, **{name: y[:, k] for k, name in enumerate(names)}}
    return MolecularDataset(**columns, ids=structures.ids, per_atom=dict.fromkeys(names, False)).select(keep)


def _structures(dataset: Any) -> MolecularDataset:
    """The graphs of a DeepChem dataset; `y` and `w` are not looked at."""
    if isinstance(dataset, MolecularDataset):
        return dataset
    if not all(hasattr(dataset, name) for name in ("X", "ids")):
        return as_dataset(dataset)
    found = as_dataset(list(dataset.X))
    return MolecularDataset(**found.columns(), ids=[str(i) for i in dataset.ids], per_atom=_per_atom(found))


def _per_atom(dataset: MolecularDataset) -> dict[str, bool]:
    """Which columns have one row per atom."""
    return {name: name in dataset.per_atom for name in (*dataset.targets, *dataset.extras)}


def _task_names(dataset: Any, default: Sequence[str] = ("energy",)) -> list[str]:
    """Names that a dataset has for its tasks, or `default`; DeepChem's numbers are none."""
    names = list(dataset.get_task_names()) if hasattr(dataset, "get_task_names") else []
    is_named = names and all(isinstance(name, str) for name in names)
    return [str(name) for name in (names if is_named else default)]


def _one_task(dataset: Any, target: str) -> Any:
    """The dataset with the one column of `y` that is `target`, where it has names for its columns.

    Raises
    ------
    DataError
        If its only column has the name of another target that we know.
    """
    names = _task_names(dataset, default=())
    if target not in names:
        if len(names) == 1 and names[0] in PROPERTIES:
            raise DataError(f"y is {names[0]!r}, but the model predicts {target!r}: give the model target={names[0]!r}")
        return dataset
    if len(names) == 1:
        return dataset
    k = names.index(target)
    return SimpleNamespace(X=dataset.X, y=dataset.y[:, k : k + 1], w=dataset.w[:, k : k + 1], ids=dataset.ids)


def _labeled_rows(w: np.ndarray) -> np.ndarray:
    """Numbers of the structures that have weight; weights that differ otherwise are refused."""
    has, whole = w.any(axis=1), (w != 0).all(axis=1)
    if (has & ~whole).any():
        index = int(np.flatnonzero(has & ~whole)[0])
        raise DataError(f"structure {index} lacks some of its labels (weights {w[index].tolist()}); choose one task")
    odd = np.flatnonzero(has & (w != w[has][0, 0]).any(axis=1))
    if len(odd):
        raise DataError(
            f"structure {odd[0]} has the weight {w[odd[0]].tolist()}, others have {w[has][0, 0]}; training weighs all "
            "structures equally: allowed is one weight for all, and 0 for those to leave out"
        )
    return np.flatnonzero(has)


def _check_not_transformed(structures: MolecularDataset, energy: np.ndarray, rows: np.ndarray) -> None:
    """Raise DataError if `y` is no longer the energy in the graphs, whose forces no transformer reaches."""
    known = structures.targets.get("energy")
    if known is None or "forces" not in structures.targets:
        return
    wrong = rows[~np.isclose(energy[rows], known[rows], rtol=SAME_ENERGY, atol=SAME_ENERGY)]
    if len(wrong):
        index = wrong[0]
        raise DataError(
            f"structure {index}: y is {energy[index]:g}, but the energy in its graph is {known[index]:g} eV. A transformer "
            "changed y, and cannot change the forces in the graph: load with transformers=[] (the model has reference "
            "energies and a scale of its own)"
        )


# ------------------------------------------------------------------------------------------------------------------ models


def forces_metric() -> Any:
    """A `deepchem.metrics.Metric` for the force error (eV/Å), for `GridHyperparamOpt` and `ValidationCallback`.

    `EstimatorModel.evaluate` fills in its value, ``scores["mae_forces"]``; by itself it is NaN, since DeepChem shows metrics
    the energies only.
    """
    return dc.metrics.Metric(_not_a_number, name="mae_forces", mode="regression")


def _not_a_number(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    return float("nan")


@dataclasses.dataclass
class _Phase:
    """A training on one set of data with one set of settings, which can be continued in the same bits.

    `folder` (in the model's) holds its checkpoints, `key` is what it depends on; it began after `start` steps and `rows` of
    history, and has made `step` more.
    """

    folder: str
    key: str
    start: int
    rows: int
    step: int = 0


class _Predicted:
    """A model that has predicted already: what DeepChem's `Evaluator` needs."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def predict(self, dataset: Any, transformers: Iterable = ()) -> np.ndarray:
        return dc.trans.undo_transforms(self.values, list(transformers))


class EstimatorModel(dc.models.Model):
    """One of our estimators as a DeepChem model; use `TorchMDNetModel`, `EquiformerV2Model` or `PaiNNModel`.

    Parameters
    ----------
    estimator : NDeMModel, optional
        An estimator, fitted or not, that is used as it is.
    model_dir : str, optional
        Folder for checkpoints; default a temporary one that is deleted with the model.
    tensorboard : bool
        Whether callbacks write to TensorBoard files in ``model_dir/tensorboard``.
    wandb_logger : deepchem.models.WandbLogger, optional
        For `ValidationCallback`.
    **params
        Without `estimator`: keywords of `NDeMModel` (`preset`, `objective`, `lr`, `batch_size`, `backbone_options`, ...). A
        misspelt one is an error.

    Attributes
    ----------
    model : NDeMModel
        The estimator: `predict`, `save` and `history_` of ours are there.

    Notes
    -----
    `fit` continues in the same bits while data and settings stay the same (fit(2 epochs) twice is fit(4), where the
    schedules do not depend on the length of the training as ``"cosine"`` does). Other data or settings begin with the
    present weights and a new optimizer. It is no `TorchModel`: that one cannot be validated during a force training, keeps
    the graphs of all steps in memory, and has no plateau schedule. Of `TorchModel.fit` it lacks `deterministic`, `variables`
    and `loss`: the order of the data comes from the seed, all weights are trained, and the loss is the objective's.

    Examples
    --------
    >>> from ndem_zoo.deepchem import TorchMDNetModel
    >>> model = TorchMDNetModel(preset="md17_fast", objective="supervised")
    """

    estimator_class: ClassVar[type[NDeMModel]]

    def __init__(
        self,
        estimator: NDeMModel | None = None,
        *,
        model_dir: str | None = None,
        tensorboard: bool = False,
        wandb_logger: Any = None,
        **params: Any,
    ) -> None:
        if estimator is not None and params:
            raise ConfigError(f"give an estimator or its keywords, not both (got {', '.join(params)})")
        if estimator is None:
            estimator = self.estimator_class(**params)
        elif not isinstance(estimator, self.estimator_class):
            raise ConfigError(f"estimator is {type(estimator).__name__}; needed is {self.estimator_class.__name__}")
        super().__init__(model=estimator, model_dir=model_dir)
        self.tensorboard, self.wandb_logger = tensorboard, wandb_logger
        self._writer: Any = None
        self._source: NDeMModel | str | os.PathLike | None = None
        self._global_step = 0
        self._phase: _Phase | None = None

    # -------------------------------------------------------------------------------------------------------- training

    def fit(
        self,
        dataset: Any,
        nb_epoch: int = 10,
        max_checkpoints_to_keep: int = 5,
        checkpoint_interval: int = 1000,
        restore: bool = False,
        callbacks: Callable | Sequence[Callable] = (),
        all_losses: list[float] | None = None,
        *,
        valid: Any = None,
    ) -> float:
        """Train for so many more epochs.

        Parameters
        ----------
        dataset
            A DeepChem dataset of DGLGraphs with one column of labels in `y` (energies in eV, or the estimator's `target`),
            or several of which one has its name; forces in eV/Å in the graphs. Also all that `NDeMModel.fit` takes.
        nb_epoch
            Passes over the data from here on.
        max_checkpoints_to_keep
            Older ones are deleted; 0 writes none.
        checkpoint_interval
            Steps between checkpoints, besides the one at the end; 0 writes none at all. What the next `fit` continues from
            is written into `model_dir` in any case.
        restore
            Begin from the newest checkpoint in `model_dir`.
        callbacks
            One or several ``f(model, step)``, called after every step. They see the weights of that step, not their
            average (`ema_decay`), which replaces them when the training is over.
        all_losses
            A list to which the average loss of every epoch (of every `validate_every` steps, if that is set) is appended.
        valid
            Validation data for the plateau schedule, early stopping, and the choice of the best weights; DeepChem has no
            such thing, and leaves it to callbacks.

        Returns
        -------
        loss : float
            Average over the steps of the last epoch; with `validate_every`, as the presets of OC20 have it, over those since
            the last validation in this call. Where nothing was left to do, that of the call before.

        Raises
        ------
        DataError
            If a structure or label cannot be used; names its index.
        ConfigError
            If an option is not allowed, or `restore` finds nothing.
        TrainingError
            If the training diverges or fails.
        """
        check_whole("nb_epoch", nb_epoch, 1)
        check_whole("max_checkpoints_to_keep", max_checkpoints_to_keep, 0)
        check_whole("checkpoint_interval", checkpoint_interval, 0)
        if restore:
            self.restore()
        interval = checkpoint_interval if max_checkpoints_to_keep else 0
        actions = [callbacks] if callable(callbacks) else list(callbacks)
        if interval:
            actions.insert(0, lambda model, step: step % interval or model.save_checkpoint(max_checkpoints_to_keep))
        try:
            losses = self._train(self._labeled(dataset), self._labeled(valid), nb_epoch, interval or None, actions)
        except TypeError as error:
            # Pitfall: GridHyperparamOpt takes a TypeError for a missing nb_epoch, and trains again without it.
            raise TrainingError(f"the training failed: {error}") from error
        if all_losses is not None:
            all_losses.extend(losses)
        if interval and self._global_step % interval:
            self.save_checkpoint(max_checkpoints_to_keep)
        return losses[-1] if losses else float(self.model.history_[-1]["train_loss"])

    def _labeled(self, dataset: Any) -> MolecularDataset | None:
        """Data in our form; the only column of `y` is what the estimator predicts."""
        if dataset is None or isinstance(dataset, MolecularDataset):
            return dataset
        if all(hasattr(dataset, name) for name in ("X", "y", "w", "ids")):
            return from_deepchem(_one_task(dataset, self._target), [self._target])
        return as_dataset(dataset)

    @property
    def _target(self) -> str:
        return self.model._resolve()["supervised"]["target"]

    def _train(
        self,
        dataset: MolecularDataset | None,
        valid: MolecularDataset | None,
        nb_epoch: int,
        checkpoint_every: int | None,
        actions: list[Callable],
    ) -> list[float]:
        """Run the estimator's loop, and return the losses of its new epochs."""
        estimator = self.model
        known = getattr(estimator, "reference_", None)
        train_set, valid_set = estimator._checked(dataset, valid, {"nb_epoch": nb_epoch}, known)
        prior, train_set, valid_set = estimator._beyond_prior(train_set, valid_set, is_new=known is None)
        if known is None:
            start = None if self._source is None else start_from(self._source)
            estimator._build(train_set, start, prior=prior)
        else:
            estimator._rebuild_objective(train_set)
        earlier = self._phase
        phase, is_resumed = self._begin(train_set, valid_set)
        settings = estimator.resolved_["settings"]
        limits = {name: settings.get(name) for name in ("max_atoms", "bucket") if name in settings}
        order = Order(train_set.counts, settings["batch_size"], settings["seed"], **limits)
        total, before = order.locate(phase.step)[0] + nb_epoch, phase.step
        estimator.history_ = estimator.history_[: phase.rows]
        with self._after_each_step(actions):
            estimator._train(
                train_set,
                valid_set,
                {"nb_epoch": total, "max_steps": None, "max_time": None},
                directory=Path(self.model_dir) / phase.folder,
                checkpoint_every=checkpoint_every,
                resume=is_resumed,
            )
        if earlier is not None and earlier.folder != phase.folder:
            shutil.rmtree(Path(self.model_dir) / earlier.folder, ignore_errors=True)
        return [row["train_loss"] for row in estimator.history_[phase.rows :] if row["step"] > before]

    def _begin(self, train_set: MolecularDataset, valid_set: MolecularDataset | None) -> tuple[_Phase, bool]:
        """The phase to train in, and whether it goes on: with the same data and settings, from its newest checkpoint."""
        hashes = [None if data is None else _content_hash(data) for data in (train_set, valid_set)]
        content = json.dumps([hashes, self.model.resolved_], sort_keys=True, default=str)
        key = hashlib.sha256(content.encode()).hexdigest()
        phase = self._phase
        if phase is not None and phase.key == key:
            found = files.checkpoints(Path(self.model_dir) / phase.folder)
            if found and found[0].name == files.checkpoint_path("", phase.step).name:
                return phase, True
        folder = tempfile.mkdtemp(prefix="training-", dir=self.model_dir)
        self._phase = _Phase(Path(folder).name, key, self._global_step, len(self.model.history_))
        return self._phase, False

    @contextlib.contextmanager
    def _after_each_step(self, actions: list[Callable]) -> Iterator[None]:
        """Count steps and call `actions` after each: a step is over when the next one begins, or the loop ends.

        The loop calls the objective once for each step, which is where PyTorch lets one in.
        """
        phase, potential, n_begun = self._phase, self.model.potential_, 0
        backbone, prior = potential.backbone, potential.prior

        def act() -> None:
            phase.step += 1
            self._global_step = phase.start + phase.step
            rng, backbone.rng = backbone.rng, None  # an action must not use up the randomness of the next step
            device = next(backbone.parameters()).device.type
            try:
                # The loop trains without the prior; an action predicts, or saves, with it.
                with torch.autocast(device, enabled=False), potential.with_prior(prior):
                    for action in actions:
                        action(self, self._global_step)
            finally:
                backbone.rng = rng

        def begin(module: torch.nn.Module, inputs: tuple) -> None:
            nonlocal n_begun
            if n_begun:
                act()
            n_begun += 1

        handle = self.model.objective_.register_forward_pre_hook(begin)
        try:
            yield
        finally:
            handle.remove()
        if n_begun:
            act()

    def load_from_pretrained(self, source_model: EstimatorModel | NDeMModel | str | os.PathLike) -> None:
        """Let the first `fit` begin with backbone, energy and force heads of another model, and its scale.

        Parameters
        ----------
        source_model
            A fitted model of this module, a fitted or pre-trained estimator, the folder of a saved one, or a checkpoint; see
            ``init_from`` of `NDeMModel.fit`.

        Raises
        ------
        ConfigError
            If this model has weights already.
        """
        if hasattr(self.model, "potential_"):
            raise ConfigError("this model has weights already: load_from_pretrained comes before the first fit")
        self._source = source_model.model if isinstance(source_model, EstimatorModel) else source_model

    def fit_on_batch(self, X: Sequence, y: Sequence, w: Sequence) -> float:
        """Not there: an optimizer belongs to a training on a dataset.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError("use fit: the optimizer belongs to a training on one dataset, not to a batch")

    # ------------------------------------------------------------------------------------------------------ prediction

    def predict(self, dataset: Any, transformers: Sequence = ()) -> np.ndarray:
        """Predict energies in eV, or the estimator's target: (S, 1) float64.

        Parameters
        ----------
        dataset
            Structures, as for `fit`; labels are not looked at.
        transformers
            What was done to `y`, to be undone. Allowed for a target without forces only.

        Raises
        ------
        ConfigError
            If a transformer of `y` is given, and the model has forces.
        """
        self._check_transformers(transformers)
        columns, _ = self.model._predict_columns(_structures(dataset))
        return dc.trans.undo_transforms(columns[self._target][:, None], list(transformers))

    def predict_on_batch(self, X: Any) -> np.ndarray:
        """Predict for a list of graphs: (S, 1) float64."""
        return self.predict(as_dataset(list(X)))

    def predict_forces(self, dataset: Any) -> list[np.ndarray]:
        """Forces of each structure: a list of (n_i, 3) float64 in eV/Å.

        Raises
        ------
        ConfigError
            If the model has none.
        """
        columns, structures = self.model._predict_columns(_structures(dataset))
        if "forces" not in columns:
            raise ConfigError(f"this model predicts {self._target} without forces")
        return np.split(columns["forces"], structures.ptr[1:-1])

    def _check_transformers(self, transformers: Sequence) -> None:
        """Raise ConfigError for transformers of `y`, where forces would not follow."""
        changed = [type(t).__name__ for t in transformers if t.transform_y]
        if changed and self.model._resolve()["forces"] != "none":
            raise ConfigError(
                f"{changed[0]} transforms y, and cannot transform the forces in the graphs: load with transformers=[] "
                "(the model has reference energies and a scale of its own)"
            )

    def evaluate(
        self,
        dataset: Any,
        metrics: Any = (),
        transformers: Sequence = (),
        per_task_metrics: bool = False,
        use_sample_weights: bool = False,
        n_classes: int = 2,
    ) -> Any:
        """Scores of DeepChem's metrics, and the mean absolute errors of energies and forces.

        Parameters
        ----------
        dataset
            A DeepChem dataset as for `fit`, or a `MolecularDataset`.
        metrics
            One or several `deepchem.metrics.Metric` or functions, which see the energies.
        transformers, per_task_metrics, use_sample_weights, n_classes
            As of `deepchem.models.Model.evaluate`.

        Returns
        -------
        scores : dict
            By the names of `metrics`, and ``mae_energy`` (eV; for another target ``mae_<target>`` in its unit) and
            ``mae_forces`` (eV/Å), as far as there are labels. With `per_task_metrics` a second dict, as DeepChem's.

        Raises
        ------
        DataError
            If a force error is asked for, and there are no forces.
        """
        self._check_transformers(transformers)
        metrics = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
        columns, structures = self.model._predict_columns(_structures(dataset))
        predicted = columns[self._target][:, None]
        y, w = _labels(dataset, structures, self._target)
        labels = dc.data.NumpyDataset(np.arange(len(y)), y, w, structures.ids)
        scores = dc.utils.evaluate.Evaluator(
            _Predicted(predicted), labels, list(transformers)
        ).compute_model_performance(
            metrics, per_task_metrics=per_task_metrics, use_sample_weights=use_sample_weights, n_classes=n_classes
        )
        by_name, has_label = scores[0] if per_task_metrics else scores, w.any(axis=1)
        if has_label.any():
            true, found = (dc.trans.undo_transforms(values, list(transformers)) for values in (y, predicted))
            by_name[f"mae_{self._target}"] = float(np.abs(true - found)[has_label].mean())
        by_name |= _force_error(columns, structures, has_label if has_label.any() else ~has_label)
        if np.isnan(by_name.get("mae_forces", 0.0)):
            raise DataError(
                "a force error is asked for, but the graphs have no forces (ndata['F']), or the model has none"
            )
        return scores

    def get_task_type(self) -> str:
        """``"regression"``."""
        return "regression"

    def get_num_tasks(self) -> int:
        """1: energy, or the estimator's target."""
        return 1

    def get_global_step(self) -> int:
        """Steps of training that were made, over all calls of `fit`."""
        return self._global_step

    def _log_scalar_to_tensorboard(self, name: str, value: Any, step: int) -> None:
        """Write a number where TensorBoard finds it; `ValidationCallback` does so."""
        if self._writer is None:
            board = require("torch.utils.tensorboard", extra="tensorboard")
            self._writer = board.SummaryWriter(os.path.join(self.model_dir, "tensorboard"))
        self._writer.add_scalar(name, value, step)
        self._writer.flush()

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, max_checkpoints_to_keep: int = 5, model_dir: str | None = None) -> None:
        """Write the present weights and the number of steps into a new folder ``checkpoint-<number>``.

        It holds a model of ours (``model``, for `NDeMModel.load`), without pickles. The optimizer is beside it, in the
        folder of the training that `fit` keeps in `model_dir`.

        Parameters
        ----------
        max_checkpoints_to_keep
            Older ones in the same folder are deleted; 0 writes none.
        model_dir
            Where to; default the model's own folder.
        """
        if max_checkpoints_to_keep == 0:
            return
        home = Path(self.model_dir if model_dir is None else model_dir)
        numbers = [int(_CHECKPOINT.fullmatch(Path(path).name)[1]) for path in self.get_checkpoints(str(home))]
        record = {"global_step": self._global_step, "phase": self._phase and dataclasses.asdict(self._phase)}
        with files.atomic_folder(home / f"checkpoint-{max(numbers, default=0) + 1:06d}") as folder:
            self.model.save(folder / "model")
            files.save_record(folder / "steps.json", record)
        for path in self.get_checkpoints(str(home))[max_checkpoints_to_keep:]:
            shutil.rmtree(path)

    def get_checkpoints(self, model_dir: str | None = None) -> list[str]:
        """Folders of all checkpoints, newest first."""
        home = Path(self.model_dir if model_dir is None else model_dir)
        names = [item.name for item in home.iterdir() if _CHECKPOINT.fullmatch(item.name)] if home.is_dir() else []
        return [str(home / name) for name in sorted(names, key=lambda name: int(name.split("-")[1]), reverse=True)]

    def restore(self, checkpoint: str | None = None, model_dir: str | None = None) -> None:
        """Take over weights and number of steps from a checkpoint; settings stay those of this model.

        Parameters
        ----------
        checkpoint
            One of `get_checkpoints`; default the newest.
        model_dir
            Where to look for the newest; default the model's own folder.

        Raises
        ------
        ConfigError
            If there is no checkpoint, or its network or target is another one.
        FileFormatError
            If the checkpoint is damaged.
        """
        if checkpoint is None:
            found = self.get_checkpoints(model_dir)
            if not found:
                raise ConfigError(f"there is no checkpoint in {self.model_dir if model_dir is None else model_dir}")
            checkpoint = found[0]
        source = NDeMModel.load(Path(checkpoint) / "model", device=self.model.device)
        record = files.load_record(Path(checkpoint) / "steps.json")
        own = self.model._resolve()
        for name in ("backbone", "forces", "prior"):
            if source.resolved_[name] != own[name]:
                raise ConfigError(f"{checkpoint} has {name}={source.resolved_[name]!r}, this model has {own[name]!r}")
        if source.resolved_["supervised"]["target"] != self._target:
            raise ConfigError(f"{checkpoint} predicts another target than {self._target!r}")
        names = ("potential_", "objective_", "reference_", "resolved_", "training_data_", "provenance_", "history_")
        for name in names:
            setattr(self.model, name, getattr(source, name))
        self._global_step = record["global_step"]
        self._phase = _Phase(**record["phase"]) if record["phase"] else None

    def save(self) -> None:
        """Write a checkpoint into `model_dir`."""
        self.save_checkpoint()

    def reload(self) -> None:
        """Restore the newest checkpoint in `model_dir`."""
        self.restore()


class TorchMDNetModel(EstimatorModel):
    """`NDeMTorchMDNet` as a DeepChem model; see `EstimatorModel` and, for its keywords, `NDeMModel`."""

    estimator_class = NDeMTorchMDNet


class EquiformerV2Model(EstimatorModel):
    """`NDeMEquiformerV2` as a DeepChem model; see `EstimatorModel` and, for its keywords, `NDeMModel`."""

    estimator_class = NDeMEquiformerV2


class PaiNNModel(EstimatorModel):
    """`NDeMPaiNN` as a DeepChem model; see `EstimatorModel` and, for its keywords, `NDeMModel`.

    Needs SchNetPack, when its network is built.
    """

    estimator_class = NDeMPaiNN


def _labels(dataset: Any, structures: MolecularDataset, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights (S, 1) as DeepChem has them; those of a dataset of ours are its target, if it has it.

    Raises
    ------
    DataError
        If `y` has more than one column.
    """
    n = len(structures)
    if not isinstance(dataset, MolecularDataset) and hasattr(dataset, "y"):
        dataset = _one_task(dataset, target)
        y, w = np.asarray(dataset.y), np.asarray(dataset.w, dtype=np.float64)
    else:
        has = target in structures.targets
        y, w = structures.targets[target] if has else np.zeros(n), np.full(n, float(has))
    if y.dtype == object or y.size != n:
        raise DataError(f"y has shape {y.shape} and dtype {y.dtype}; needed is one {target} per structure, ({n}, 1)")
    return y.reshape(n, 1).astype(np.float64), w.reshape(n, 1)


def _force_error(columns: dict[str, np.ndarray], structures: MolecularDataset, chosen: np.ndarray) -> dict[str, float]:
    """``mae_forces`` over the free atoms of the structures that a mask chooses, if there is something to compare."""
    if "forces" not in columns or "forces" not in structures.targets:
        return {}
    atoms = np.repeat(chosen, structures.counts)
    predicted, true = {"forces": columns["forces"][atoms]}, {"forces": structures.targets["forces"][atoms]}
    fixed = None if structures.fixed is None else structures.fixed[atoms]
    found = error_metrics(predicted, true, structures.z[atoms], structures.ptr, fixed)
    return {"mae_forces": found["forces_mae"]} if "forces_mae" in found else {}


# ----------------------------------------------------------------------------------------------------------------- loaders


class CountSplitter(dc.splits.Splitter):
    """Splits by counts and a seed of its own, as `MolecularDataset.split` does; DeepChem's know fractions only.

    Parameters
    ----------
    n_train, n_valid, n_test
        Numbers of structures, or fractions; without `n_test`, all the rest.
    seed
        Of ``numpy.random.default_rng(seed).permutation``.
    """

    def __init__(
        self, n_train: int | float, n_valid: int | float, n_test: int | float | None = None, seed: int = 1
    ) -> None:
        self.n_train, self.n_valid, self.n_test, self.seed = n_train, n_valid, n_test, seed

    def split(self, dataset: Any, *_: Any, **__: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers (n_train,), (n_valid,), (n_test,) of the structures; fractions and seed of the call do not hold.

        Raises
        ------
        DataError
            If there are too few structures.
        """
        return split_indices(len(dataset), self.n_train, self.n_valid, self.seed, self.n_test)


def load_md17(
    molecule: str,
    featurizer: Any = None,
    splitter: Any = "default",
    transformers: Sequence = (),
    reload: bool = True,
    data_dir: str | os.PathLike | None = None,
    save_dir: str | os.PathLike | None = None,
    *,
    revised: bool = False,
    download: bool = True,
) -> tuple[list[str], tuple, list]:
    """Load one molecule of MD17 or revised MD17 in the manner of `deepchem.molnet`.

    Parameters
    ----------
    molecule, revised, data_dir, download
        See `ndem_zoo.datasets.load_md17`.
    featurizer
        A featurizer of `ase.Atoms`; default `RadiusGraphFeaturizer()`.
    splitter
        A DeepChem splitter, its name in `deepchem.molnet`, or None for all frames in one dataset. ``"default"``:
        ``CountSplitter(950, 50, 1000)``, the training and validation frames of `ndem_zoo.datasets.load_md17`. Choice: 1,000
        test frames, because every frame becomes a graph of its own here, and files have up to a million.
    transformers
        Instances of `TransformerGenerator`, or their names in `deepchem.molnet`; none that changes `y`.
    reload
        Whether to keep the graphs on disk, and take them from there the next time. DeepChem's files are pickles: load
        only your own.
    save_dir
        Where they are kept; default DeepChem's data folder.

    Returns
    -------
    tasks : list of str
        ``["energy"]``: `y` is (S, 1) in eV. The forces in eV/Å are in the graphs.
    datasets : (train, valid, test)
        Each a `deepchem.data.DiskDataset` with `reload`, else a `NumpyDataset`; a tuple of one without splitter.
    transformers : list
        Those that were applied.

    Raises
    ------
    ConfigError
        For an unknown molecule, or a transformer that changes `y`.
    DataError
        See `ndem_zoo.datasets.load_md17`.
    """
    molecule, revised = canonical_name(molecule, revised)
    path = find_molecule(molecule, revised, data_dir, download)
    name = f"{'rmd17' if revised else 'md17'}_{molecule}"
    splitter = CountSplitter(950, 50, 1000) if isinstance(splitter, str) and splitter == "default" else splitter
    recipe = _Recipe(name, ["energy"], featurizer, splitter, transformers, path, has_forces=True)
    return recipe.load(lambda: read_md17(path, revised, name=name), reload, save_dir)


def load_qm9(
    target: str = "gap",
    featurizer: Any = None,
    splitter: Any = "default",
    transformers: Sequence = (),
    reload: bool = True,
    data_dir: str | os.PathLike | None = None,
    save_dir: str | os.PathLike | None = None,
    *,
    download: bool = True,
    uncharacterized: str | os.PathLike = "drop",
) -> tuple[list[str], tuple, list]:
    """Load QM9 with its DFT geometries in the manner of `deepchem.molnet`.

    Parameters
    ----------
    target
        One of the twelve; see `ndem_zoo.datasets.load_qm9` for names and units.
    data_dir, download, uncharacterized
        See `ndem_zoo.datasets.load_qm9`.
    featurizer, transformers, reload, save_dir
        See `load_md17`; here there are no forces, and transformers may change `y` (a model is then given them in `predict`
        and `evaluate`).
    splitter
        As in `load_md17`; ``"default"``: ``CountSplitter(110_000, 10_000)``.

    Returns
    -------
    tasks, datasets, transformers
        As of `load_md17`; `y` is the target, in eV and a0.

    Raises
    ------
    ConfigError
        For an unknown target.
    DataError
        If the files are not there, or have too few molecules for the split.
    """
    path = find_qm9(data_dir, download)
    options = {
        "data_dir": data_dir,
        "download": download,
        "uncharacterized": uncharacterized,
        "n_train": 1.0,
        "n_valid": 0,
    }
    tasks, (whole, _, _), _ = _load_columns_of_qm9(target, **options)
    whole = whole.select(np.argsort(np.asarray(whole.ids, dtype=np.int64)))
    splitter = CountSplitter(110_000, 10_000) if isinstance(splitter, str) and splitter == "default" else splitter
    recipe = _Recipe(f"qm9_{tasks[0]}_{len(whole)}", tasks, featurizer, splitter, transformers, path, has_forces=False)
    return recipe.load(lambda: whole, reload, save_dir)


class _Recipe:
    """How a dataset in DeepChem's form is made: what `load_...` was asked for, and the folder that keeps the result."""

    def __init__(
        self,
        name: str,
        tasks: list[str],
        featurizer: Any,
        splitter: Any,
        transformers: Sequence,
        source: Path,
        *,
        has_forces: bool,
    ) -> None:
        known = dc.molnet.load_function.molnet_loader
        self.name, self.tasks, self.source, self.has_forces = name, tasks, source, has_forces
        self.featurizer = RadiusGraphFeaturizer() if featurizer is None else featurizer
        self.splitter = _named(known.splitters, splitter, "splitter")
        self.generators = [_named(known.transformers, item, "transformer") for item in transformers]

    def folder(self, save_dir: str | os.PathLike | None) -> Path:
        """Where the graphs are kept.

        Pitfall: DeepChem's own names of folders leave out lists, paths, sizes and seeds.
        """
        status = self.source.stat()
        parts = [self.tasks, str(self.source.resolve()), status.st_size, status.st_mtime_ns]
        parts += [_described(item) for item in (self.featurizer, self.splitter, *self.generators)]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        home = dc.utils.data_utils.get_data_dir() if save_dir is None else save_dir
        return Path(home) / f"{self.name}-featurized-{digest}"

    def load(
        self, read: Callable[[], MolecularDataset], reload: bool, save_dir: str | os.PathLike | None
    ) -> tuple[list[str], tuple, list]:
        """Tasks, datasets and transformers, from the folder if they are there."""
        folder = self.folder(save_dir) if reload else None
        if folder is not None and (folder / "transformers.pkl").exists():
            names = ["train_dir", "valid_dir", "test_dir"] if self.splitter is not None else ["all_dir"]
            kept = tuple(dc.data.DiskDataset(str(folder / name)) for name in names)
            return self.tasks, kept, dc.utils.data_utils.load_transformers(str(folder))
        parts = self._made(self._parts(read()), on_disk=reload)
        transformers = [generator.create_transformer(parts[0]) for generator in self.generators]
        if self.has_forces and any(t.transform_y for t in transformers):
            raise ConfigError(
                "transformers that change y cannot change the forces in the graphs: choose transformers=[]"
            )
        for transformer in transformers:
            parts = tuple(transformer.transform(part) for part in parts)
        if folder is not None:
            self._keep(folder, parts, transformers)
        return self.tasks, parts, transformers

    def _parts(self, whole: MolecularDataset) -> list[MolecularDataset]:
        """The datasets before anything is featurized: splitters see numbers and ids."""
        if self.splitter is None:
            return [whole]
        rows = dc.data.NumpyDataset(np.arange(len(whole)), y=whole.y, w=whole.w, ids=np.array(whole.ids, dtype=object))
        fractions = {"frac_train": 0.8, "frac_valid": 0.1, "frac_test": 0.1}
        return [whole.select(np.asarray(part, dtype=np.int64)) for part in self.splitter.split(rows, **fractions)]

    def _made(self, parts: list[MolecularDataset], on_disk: bool) -> tuple:
        """Datasets of DeepChem's."""
        parts = [part.with_targets([*self.tasks, *(["forces"] if self.has_forces else [])]) for part in parts]
        if on_disk:
            return tuple(to_disk(part, featurizer=self.featurizer) for part in parts)
        return tuple(
            dc.data.NumpyDataset(_features(part, self.featurizer), part.y, part.w, np.array(part.ids, dtype=object))
            for part in parts
        )

    def _keep(self, folder: Path, parts: tuple, transformers: list) -> None:
        """Move what was made on disk to its folder; the transformers go last, and say that it is whole."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        names = ["train_dir", "valid_dir", "test_dir"] if self.splitter is not None else ["all_dir"]
        for part, name in zip(parts, names, strict=True):
            part.move(str(folder / name))
        dc.utils.data_utils.save_transformers(str(folder), transformers)


def _named(known: dict[str, Any], item: Any, what: str) -> Any:
    """What a name stands for in `deepchem.molnet`; anything else as it is."""
    if not isinstance(item, str):
        return item
    if item.lower() not in known:
        raise ConfigError(f"there is no {what} {item!r}; there are {', '.join(sorted(known))}")
    return known[item.lower()]


def _described(item: Any) -> str:
    """Class and options of a featurizer, splitter or transformer, complete."""
    values = {name: value for name, value in vars(item).items() if not name.startswith("_")} if item is not None else {}
    kind = f"{type(item).__module__}.{type(item).__qualname__}"
    return json.dumps([kind, {name: repr(value) for name, value in sorted(values.items())}])
