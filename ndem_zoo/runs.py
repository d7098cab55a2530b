"""What the commands of ``ndem-zoo`` do, without the command line: open data, train into a folder, evaluate, predict.

Everything here is a thin layer over loaders, `NDeMModel`, metrics and plots; `commands.py` gives it options, `demo.py`
and scripts call it directly. What is written is described at each function.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ndem_zoo import checkpoint as files
from ndem_zoo import registry
from ndem_zoo.datasets.streams import fingerprint
from ndem_zoo.errors import ConfigError, DataWarning, FileFormatError
from ndem_zoo.metrics import dataset_metrics, unit_of
from ndem_zoo.predictions import Predictions

if TYPE_CHECKING:
    from ase import Atoms

    from ndem_zoo.bulk import BulkRecord
    from ndem_zoo.datasets.base import MolecularDataset
    from ndem_zoo.datasets.streams import Stream
    from ndem_zoo.ensemble import Ensemble
    from ndem_zoo.models.estimator import NDeMModel

#: Choice: `train_run` judges a model on at most so many of the frames that are left for testing, unless told how many.
MAX_TEST = 1000

PARTS = ("train", "valid", "test")

#: Loader and options behind each prefix of a data source, beyond the names in the registry.
_SHORTHANDS: dict[str, tuple[str, dict[str, Any]]] = {"rmd17": ("md17", {"revised": True})}


# ------------------------------------------------------------------------------------------------------------------ data


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training, validation and test data, and where they came from.

    Attributes
    ----------
    source
        What was asked for, such as ``"md17:ethanol"``.
    train, valid, test
        The parts; `valid` and `test` are None when they are empty.
    seed
        Of the split.
    valid_source
        Where `valid` came from, if it is not a part of `source`.
    """

    source: str
    train: MolecularDataset
    valid: MolecularDataset | None
    test: MolecularDataset | None
    seed: int
    valid_source: str | None = None

    def parts(self) -> dict[str, MolecularDataset]:
        """The parts that are not empty, by name."""
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: part for name, part in named.items() if part is not None}

    def record(self) -> dict[str, Any]:
        """What ``split.json`` holds: the ids of the structures of each part, in order."""
        head = {"data": self.source, "seed": self.seed, "fingerprint": fingerprint(self.train)}
        named = {name: part.ids.tolist() for name, part in self.parts().items()}
        if self.valid_source is not None:
            named["valid"] = []  # ids of another source, which has numbers of its own
            head["valid_data"] = self.valid_source
        return head | named


@dataclasses.dataclass(frozen=True)
class Reading:
    """How data are found and read, whatever their source: the options of loaders that are not about splitting.

    Attributes
    ----------
    data_dir
        Folder with (or for) the files of a dataset with a name.
    download
        False: never touch the network.
    energy_key, forces_key
        Names of the labels in an extended XYZ file.
    """

    data_dir: str | os.PathLike | None = None
    download: bool = True
    energy_key: str | None = None
    forces_key: str | None = None

    def options(self) -> dict[str, Any]:
        """Those that are not at their defaults: not every loader has every one."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


#: Everything as the loader does it.
AS_IT_IS = Reading()


def open_splits(
    source: str, valid_source: str | None = None, reading: Reading = AS_IT_IS, *, seed: int = 1, **sizes: Any
) -> Splits:
    """Training, validation and test data from a source.

    Parameters
    ----------
    source
        ``"md17:ethanol"``, ``"rmd17:aspirin"``, ``"sample:ethanol"``, or any other ``NAME:ARGUMENT`` with a loader in
        `registry.DATASETS`; or the path of an extended XYZ file, or of the folder of a store.
    valid_source
        Another source, all of which is for validation; then all of `source` is for training unless `n_train` is given.
    reading
        Where files are, and how they are read.
    seed
        Of the split.
    **sizes
        `n_train`, `n_valid`, `n_test`, `split`: what the loader takes. Those that are None do not count.

    Raises
    ------
    ConfigError
        If there is no such source, or its loader does not take an option.
    DataError, FileFormatError, FileNotFoundError
        If the data cannot be used.
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    if valid_source is not None:
        if "n_valid" in given:
            raise ConfigError("n_valid and a source of validation data exclude each other: all of the latter is used")
        given = {"n_train": 1.0, "n_test": 0} | given | {"n_valid": 0}
    train, valid, test = _load(source, reading, seed=seed, **given)
    if valid_source is not None:
        valid = open_whole(valid_source, reading)
    if "n_test" not in given and len(test) > MAX_TEST:
        test = test.select(range(MAX_TEST))
    return Splits(source, train, valid if len(valid) else None, test if len(test) else None, seed, valid_source)


def open_whole(source: str, reading: Reading = AS_IT_IS) -> MolecularDataset:
    """All structures of a source, in the order of its file; see `open_splits`."""
    from ndem_zoo.datasets.base import split_indices
    from ndem_zoo.datasets.md17 import TooManyFramesWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TooManyFramesWarning)  # nobody trains on them
        shuffled, _, _ = _load(source, reading, n_train=1.0, n_valid=0, n_test=0, seed=0)
    # Loaders shuffle, all in the same way.
    order, _, _ = split_indices(len(shuffled), 1.0, 0, 0, 0)
    return shuffled.select(np.argsort(order))


def _load(source: str, reading: Reading, **options: Any) -> tuple[MolecularDataset, MolecularDataset, MolecularDataset]:
    """Call the loader of a source."""
    options |= reading.options()
    name, argument, fixed = _loader_of(source)
    loader = registry.lookup(registry.DATASETS, name, "kind of data")
    known = inspect.signature(loader).parameters
    for option in options:
        if option not in known:
            raise ConfigError(f"data {source!r} have no option {option!r}; they have {', '.join(list(known)[1:])}")
    _, parts, _ = loader(argument, **fixed, **options)
    return parts


def _loader_of(source: str) -> tuple[str, str, dict[str, Any]]:
    """Name of the loader, its first argument, and options that the prefix stands for."""
    prefix, colon, argument = source.partition(":")
    if colon and prefix in _SHORTHANDS:
        name, fixed = _SHORTHANDS[prefix]
        return name, argument, fixed
    if colon and prefix in registry.DATASETS:
        return prefix, argument, {}
    if colon and not os.path.exists(source) and os.sep not in prefix and "." not in prefix:
        known = ", ".join(sorted([*registry.DATASETS, *_SHORTHANDS]))
        raise ConfigError(f"there is no kind of data {prefix!r} (in {source!r}); there are {known}, files and stores")
    return "store" if os.path.isdir(source) else "extxyz", source, {}


def convert_run(
    source: str,
    out: str | os.PathLike,
    reading: Reading = AS_IT_IS,
    *,
    task: str | None = None,
    energy: str = "adsorption",
    stored: str | None = None,
    reference: str | os.PathLike | None = None,
    workers: int = 1,
    report: Callable[[int, int, int], None] | None = None,
) -> MolecularDataset:
    """Write the structures of a source as a store, from which training reads; an interrupted conversion is resumed.

    Parameters
    ----------
    source
        Files in one of OC20's formats (a folder, an archive, or a file; see `convert_oc20`), or any other source; see
        `open_splits`.
    out
        Folder of the store.
    reading
        Where files are, and how they are read; not for OC20.
    task
        ``"s2ef"`` (default) or ``"is2re"``, for files in OC20's formats.
    energy, stored, reference, workers, report
        See `convert_oc20`.

    Returns
    -------
    store : MolecularDataset
        The store, opened.
    """
    from ndem_zoo.datasets.oc20 import convert_oc20, is_oc20
    from ndem_zoo.datasets.store import open_store

    if is_oc20(source):
        options = {"energy": energy, "stored": stored, "reference": reference, "workers": workers, "report": report}
        return convert_oc20(source, out, task or "s2ef", **options)
    if task is not None or stored is not None or reference is not None:
        raise ConfigError(f"{source!r} is not in one of OC20's formats; task, stored and reference are for those")
    open_whole(source, reading).save(out)
    return open_store(out)


def file_of(source: str) -> str | None:
    """Path of the extended XYZ file that a source is; None for a dataset with a name."""
    name, argument, _ = _loader_of(source)
    return argument if name == "extxyz" else None


# ---------------------------------------------------------------------------------------------------------------- models


def make_model(name: str, keywords: Mapping[str, Any], settings: Iterable[str] = ()) -> NDeMModel:
    """A model that is not fitted yet, from keywords and from ``key=value`` settings.

    Parameters
    ----------
    name
        In `registry.MODELS`.
    keywords
        Of the constructor; those that are None are left at their defaults.
    settings
        ``"key=value"`` each. A key is a keyword of the constructor, or an option of the objective or the backbone; with
        ``objective.`` or ``backbone.`` before it, where both have it. Values are JSON, or else strings.

    Raises
    ------
    ConfigError
        For a key that nobody knows, or one that is given twice; lists what there is.
    """
    cls = registry.lookup(registry.MODELS, name, "model")
    values = {key: value for key, value in keywords.items() if value is not None}
    pairs = [_parse_setting(text) for text in settings]
    objective = dict(pairs).get("objective", values.get("objective", cls().objective))
    known = {
        "": sorted(cls().get_params(deep=False)),
        "objective": _objective_options(objective),
        "backbone": _backbone_options(cls.backbone_name),
    }
    options: dict[str, dict[str, Any]] = {"": {}, "objective": {}, "backbone": {}}
    for key, value in pairs:
        group, option = _home_of(key, known, objective)
        if option in options[group] or (group == "" and option in values):
            raise ConfigError(f"{key!r} is given twice")
        options[group][option] = value
    values |= options[""]
    for group in ("objective", "backbone"):
        if options[group]:
            keyword = f"{group}_options"
            values[keyword] = (values.get(keyword) or {}) | options[group]
    return cls(**values)


def _parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` as a pair."""
    key, equals, value = text.partition("=")
    if not (key.strip() and equals):
        raise ConfigError(f"setting {text!r}: it must have the form key=value")
    words = {"None": None, "True": True, "False": False}
    if value.strip() in words:
        return key.strip(), words[value.strip()]
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value.strip()


def _objective_options(name: str) -> list[str]:
    cls = registry.lookup(registry.OBJECTIVES, name, "objective")
    return [field.name for field in dataclasses.fields(cls.Options)]


def _backbone_options(name: str) -> list[str]:
    return list(inspect.signature(registry.lookup(registry.BACKBONES, name, "backbone")).parameters)


def _home_of(key: str, known: Mapping[str, Sequence[str]], objective: str) -> tuple[str, str]:
    """Whose option a key is: ``""`` (the constructor's), ``"objective"`` or ``"backbone"``; and its bare name."""
    prefix, dot, bare = key.partition(".")
    if dot and prefix in ("objective", "backbone"):
        homes, option = [prefix] if bare in known[prefix] else [], bare
    else:
        homes, option = [group for group in known if key in known[group]], key
    if len(homes) > 1:
        choices = " or ".join(f"the {home or 'model'}" for home in homes)
        raise ConfigError(f"{key!r} may be an option of {choices}; write objective.{key} or backbone.{key}")
    if not homes:
        raise ConfigError(
            f"there is no setting {key!r}. The model has {', '.join(known[''])}; the objective {objective} has "
            f"{', '.join(known['objective']) or 'none'}; the backbone has {', '.join(known['backbone'])}"
        )
    return homes[0], option


def model_folder(path: str | os.PathLike) -> Path:
    """Folder of a saved model: `path` itself, or ``model`` in the folder of a run.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "config.json").is_file():
            return folder
    was_there = files.what_was_there(Path(path)) or files.what_was_there(Path(path) / "model")
    raise FileNotFoundError(f"{path} holds no saved model (no config.json in it or in its folder 'model'){was_there}")


def load_model(path: str | os.PathLike, device: str | None = None) -> NDeMModel:
    """The saved model in `path`; see `model_folder`."""
    from ndem_zoo.models.estimator import NDeMModel

    return NDeMModel.load(model_folder(path), device=device)


def load_predictor(
    paths: str | os.PathLike | Sequence[str | os.PathLike], device: str | None = None
) -> NDeMModel | Ensemble:
    """The saved model or ensemble in a folder, or the ensemble of the models in several; see `model_folder`."""
    from ndem_zoo.ensemble import Ensemble, is_ensemble

    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if len(paths) > 1:
        return Ensemble([model_folder(path) for path in paths], device=device)
    return Ensemble.load(paths[0], device=device) if is_ensemble(paths[0]) else load_model(paths[0], device)


# -------------------------------------------------------------------------------------------------------------- training


def train_run(
    model: NDeMModel,
    splits: Splits,
    out: str | os.PathLike,
    *,
    nb_epoch: int | None = None,
    max_steps: int | None = None,
    max_time: float | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    init_from: str | os.PathLike | None = None,
    init_partial: bool = False,
    pretrain: bool = False,
    devices: int | str = 1,
    nodes: int = 1,
    command: str = "",
) -> dict[str, Any]:
    """Train a model and leave everything about it in a folder.

    Written are ``model/`` (see `NDeMModel.save`), ``history.csv``, ``split.json`` (the ids of the structures of each
    part), ``metrics.json`` (what is returned), ``predictions.npz`` (of the test data, or else the validation data; see
    `predictions.Predictions`), checkpoints ``step-...``, and, where matplotlib is installed, ``parity.png`` and
    ``learning_curve.png``.

    Parameters
    ----------
    model
        Not fitted.
    splits
        Data.
    out
        The folder.
    nb_epoch, max_steps, max_time, checkpoint_every, resume, tensorboard, init_from, init_partial, devices, nodes
        See `NDeMModel.fit`. Of several processes the first one writes the files, and predicts what is in them.
    pretrain
        Whether to pre-train (`NDeMModel.pretrain`): the data need no labels, and there are no errors to write.
    command
        That would do the same again; for the record.

    Returns
    -------
    record : dict
        Settings, numbers of steps and seconds, versions; in the first process also errors on validation and test data, and
        their units.

    Raises
    ------
    ConfigError
        If the folder holds a run and `resume` is not asked for.
    KeyboardInterrupt
        If Ctrl-C came before the first step. Later, the training ends, everything is written, and
        ``record["training"]["interrupted"]`` is True.
    """
    from ndem_zoo.distributed import is_first

    out = Path(out)
    if not resume and ((out / "model").exists() or files.checkpoints(out)):
        raise ConfigError(f"{out} holds a training already: choose another folder, or resume to continue it")
    (model.pretrain if pretrain else model.fit)(
        splits.train,
        splits.valid,
        nb_epoch=nb_epoch,
        max_steps=max_steps,
        max_time=max_time,
        init_from=init_from,
        init_partial=init_partial,
        checkpoint_dir=out,
        checkpoint_every=checkpoint_every,
        resume=resume,
        tensorboard=tensorboard,
        devices=devices,
        nodes=nodes,
    )
    if not model.history_:
        raise KeyboardInterrupt
    if not is_first():
        return run_record(model, splits, command)
    model.provenance_["command"] = command or None
    model.save(out / "model")
    files.save_record(out / "split.json", splits.record())
    record = run_record(model, splits, command)
    judged = {} if pretrain else {name: part for name, part in splits.parts().items() if name != "train"}
    predictions = {name: predict_columns_of(model, part) for name, part in judged.items()}
    for name, predicted in predictions.items():
        part = splits.parts()[name]
        found = dataset_metrics(predicted, part)
        record[name] = {"n_structures": len(part)} | found
        model.note_evaluation(part, found, name)
        Predictions.of(name, part, predicted).save(out)  # the test data come last
    model.save(out / "model")  # again: now its card has the errors
    record["units"] = units_of(record.get("valid", {}), record.get("test", {}))
    files.save_record(out / "metrics.json", record)
    write_plots(model, splits, predictions, out)
    return record


def run_record(model: NDeMModel, splits: Splits, command: str = "") -> dict[str, Any]:
    """What a run was: model, objective, data, steps, versions."""
    last, resolved = model.history_[-1], model.resolved_
    sizes = {f"n_{name}": len(part) for name, part in splits.parts().items()}
    return {
        "command": command,
        "model": type(model).__name__,
        "preset": model.preset,
        "objective": resolved["objective"]["name"],
        "weight": resolved["objective"]["weight"],
        "pretraining": resolved["pretraining"],
        "init_from": str(model.init_report_) if getattr(model, "init_report_", None) is not None else None,
        "n_parameters": model.potential_.n_parameters,
        "data": {"source": splits.source, "name": splits.train.name, "seed": splits.seed} | sizes,
        "training": {
            "steps": int(last["step"]),
            "epochs": float(last["epoch"]),
            "seconds": float(last["seconds"]),
            "interrupted": model.interrupted_,
        },
        "environment": environment(model),
    }


def predict_columns_of(model: NDeMModel, dataset: MolecularDataset) -> dict[str, np.ndarray]:
    """A model's predictions as columns: the target (S,), ``"forces"`` (A, 3) in eV/Å."""
    return model._predict_columns(dataset)[0]


def write_plots(
    model: NDeMModel, splits: Splits, predictions: Mapping[str, Mapping[str, np.ndarray]], out: Path
) -> None:
    """Parity plot of the test data (else the validation data) and learning curve; nothing without matplotlib."""
    from ndem_zoo.plots import has_matplotlib, learning_curve_figure, parity_figure, save_figure

    if not has_matplotlib():
        return
    objective = model.resolved_["objective"]["name"]
    save_figure(learning_curve_figure({objective: model.history_}), out / "learning_curve.png")
    shown = "test" if "test" in predictions else "valid"
    if shown in predictions:
        part = splits.parts()[shown]
        figure = parity_figure({f"{objective}, {shown} data": predictions[shown]}, part.targets, part.ptr)
        save_figure(figure, out / "parity.png")


def units_of(*metrics: Mapping[str, Any]) -> dict[str, str]:
    """Unit of every metric."""
    names = {name for found in metrics for name in found if name != "n_structures"}
    return {name: unit_of(name) for name in sorted(names)}


def environment(model: NDeMModel | None = None) -> dict[str, Any]:
    """Versions, threads, and the device (of a model, or else the one that ``"auto"`` is): what a result may depend on."""
    from ndem_zoo import provenance
    from ndem_zoo.models.estimator import torch_device

    return provenance.environment(torch_device("auto" if model is None else model.device))


# ------------------------------------------------------------------------------------------------- evaluate and predict


def evaluate_run(
    path: str | os.PathLike,
    source: str,
    reading: Reading = AS_IT_IS,
    *,
    part: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """Errors of a saved model.

    Parameters
    ----------
    path
        Folder of a run or of a model.
    source
        Labeled data; see `open_splits`.
    reading
        Where files are, and how they are read.
    part
        ``"all"`` structures of the source, or the ``"train"``, ``"valid"`` or ``"test"`` ones that the run's
        ``split.json`` names; ``"auto"`` takes the test part when the source is the one that the run was trained on.
    device
        Where to compute.

    Returns
    -------
    record : dict
        ``"metrics"`` and ``"units"``; which data they are for.
    """
    dataset, part = _part_of(path, source, reading, part)
    model = load_model(path, device)
    begin = time.perf_counter()
    metrics = model.evaluate(dataset)
    return {
        "model": str(path),
        "data": {"source": source, "part": part, "n_structures": len(dataset)},
        "metrics": metrics,
        "units": units_of(metrics),
        "seconds": time.perf_counter() - begin,
        "environment": environment(model),
    }


def _part_of(path: str | os.PathLike, source: str, reading: Reading, part: str) -> tuple[MolecularDataset, str]:
    """The structures to judge a model by."""
    allowed = ("auto", "all", *PARTS)
    if part not in allowed:
        raise ConfigError(f"part={part!r}; allowed are {', '.join(allowed)}")
    whole = open_whole(source, reading)
    rows = _rows_of_split(model_folder(path), whole)
    if part == "auto":
        part = "test" if "test" in rows else "all"
    if part == "all":
        if rows:
            warnings.warn(f"{len(rows['train'])} of these structures were trained on", DataWarning, stacklevel=3)
        return whole, part
    if part not in rows:
        raise ConfigError(f"part={part!r}: {path} has no split.json that names this part of {source}")
    return whole.select(rows[part]), part


def _rows_of_split(folder: Path, whole: MolecularDataset) -> dict[str, np.ndarray]:
    """Rows of `whole` that a run used for each part; empty if it was made from other data."""
    file = next((f / "split.json" for f in (folder, folder.parent) if (f / "split.json").is_file()), None)
    if file is None:
        return {}
    split = files.load_record(file)
    row = {identity: number for number, identity in enumerate(whole.ids.tolist())}
    if not all(identity in row for part in PARTS for identity in split.get(part, ())):
        return {}
    rows = {name: np.array([row[i] for i in split[name]], dtype=np.int64) for name in PARTS if split.get(name)}
    # Pitfall: ids are often just numbers, which any other file has as well.
    return rows if fingerprint(whole.select(rows["train"])) == split["fingerprint"] else {}


def predict_run(
    models: str | os.PathLike | Sequence[str | os.PathLike],
    sources: str | Sequence[str],
    out: str | os.PathLike,
    reading: Reading = AS_IT_IS,
    *,
    device: str | None = None,
    **options: Any,
) -> BulkRecord:
    """Predict any number of structures in constant memory; see `bulk.predict_files`.

    Parameters
    ----------
    models
        Folder of a run, a model or an ensemble; or several of runs or models, which make an ensemble.
    sources
        Structures, one source or several; labels are not needed. See `open_splits`; also the files of
        `datasets.streams.open_streams`.
    out
        Extended XYZ file, or folder of a store.
    reading
        Where the files of a dataset with a name are.
    device
        Where to compute.
    **options
        `resume`, `on_error`, `shard`, `report`.

    Returns
    -------
    record : BulkRecord
    """
    from ndem_zoo.bulk import predict_files

    sources = [sources] if isinstance(sources, str) else sources
    streams = [stream for source in sources for stream in _streams_of(source, reading)]
    return predict_files(load_predictor(models, device), streams, out, **options)


def _streams_of(source: str, reading: Reading) -> list[Stream]:
    """The structures of a source, one after the other."""
    from ndem_zoo.datasets.streams import DatasetStream, open_streams

    name, argument, _ = _loader_of(source)
    if name in ("extxyz", "store"):
        return open_streams(argument)
    return [DatasetStream(open_whole(source, reading), source)]


def read_start(source: str, reading: Reading = AS_IT_IS) -> Atoms:
    """A structure to begin with: the first (or ``FILE@N``: the one with number N) of a file, or of a data source.

    Raises
    ------
    FileNotFoundError, FileFormatError
        If there is no such file, or ASE cannot read it.
    """
    if file_of(source) is None:
        return open_whole(source, reading).atoms(0)
    from ase.io import read

    path, at, number = source.rpartition("@")
    if not (at and number.lstrip("-").isdigit()):
        path, number = source, "0"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return read(path, index=int(number))
    # Pitfall: ASE's readers raise whatever they trip over.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{path}: ASE cannot read structure {number} ({reason})") from error
