"""Bulk predictions over many workers, through Ray Data: `read_ray` makes a dataset of files, `predict_ray` adds predictions.

Needs Ray with its extra ``data`` (the extra ``ray`` of this package). Ray's blocks are as large as its batches, and nothing
is computed before the result is asked for, so that memory stays as small as with `bulk.predict_files`. Ray repeats what a lost
worker had, but begins anew when the whole job dies: to go on where it was, predict shard by shard, or use `predict_files`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ndem_zoo.bulk import ON_ERROR, Numbered, Worker
from ndem_zoo.datasets.streams import Item, open_streams
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.featurizers.base import Structure
from ndem_zoo.optional import require

if TYPE_CHECKING:
    import ray

#: Choice: structures that one task of Ray reads.
READ_TOGETHER = 2_000


def read_ray(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> ray.data.Dataset:
    """A Ray dataset of the structures of files; each task reads a piece of a file.

    Parameters
    ----------
    paths
        See `datasets.streams.open_streams`; every worker must be able to read them under this name.

    Returns
    -------
    dataset
        Rows with ``number`` (in the whole input), ``input`` (name of the file), ``row`` (in it), ``z`` (n,), ``pos`` (n, 3)
        in Å, ``cell`` (3, 3) and ``pbc`` (3,), and ``error``: why a structure cannot be read, empty if it can. Ray does not
        keep their order unless it is told to.

    Raises
    ------
    FileNotFoundError, FileFormatError, DataError
        If there are no such files; see `open_streams`.
    ImportError
        If Ray is not installed; names the extra.
    """
    data = require("ray.data", extra="ray")
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return data.from_items(list(_pieces([os.path.abspath(path) for path in paths]))).flat_map(_read)


def predict_ray(
    dataset: ray.data.Dataset,
    model: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    concurrency: int | tuple[int, int] = 2,
    batch_size: int = 1024,
    on_error: str = "stop",
    device: str | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """Predict the structures of a Ray dataset.

    Parameters
    ----------
    dataset
        Rows with ``z`` (n,) and ``pos`` (n, 3) in Å, and perhaps ``cell`` (3, 3) and ``pbc`` (3,), such as those of `read_ray`.
        All other columns are kept.
    model
        Folder of a saved model, run or ensemble, or several, which make an ensemble; every worker must be able to read it.
    concurrency
        Workers, each with a model of its own; a pair of numbers: from so many to so many.
    batch_size
        Structures that a worker gets together; it makes batches of similar size of them.
    on_error
        ``"stop"``: a structure that cannot be predicted ends the job. ``"record"``: the reason is in the column ``error``,
        and its predictions are not a number.
    device
        Where a worker computes; default: the model's own. With ``num_gpus`` each worker sees its share of the GPUs.
    **options
        Of Ray's ``map_batches``, such as ``num_cpus`` or ``num_gpus``, for each worker.

    Returns
    -------
    dataset
        The same rows with ``energy`` (eV) or another target, ``forces`` (n, 3) in eV/Å, those of ensembles with
        ``energy_std`` and ``forces_std``, and ``error``. Not yet computed: write or iterate it.

    Raises
    ------
    ConfigError
        If an option is out of range.
    ImportError
        If Ray is not installed; names the extra.
    """
    require("ray.data", extra="ray")
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error={on_error!r}; allowed are {', '.join(map(repr, ON_ERROR))}")
    if not (isinstance(batch_size, (int, np.integer)) and batch_size >= 1):
        raise ConfigError(f"batch_size={batch_size!r}; it must be a whole number of structures >= 1")
    paths = [model] if isinstance(model, (str, os.PathLike)) else model
    return dataset.map_batches(
        Predictor,
        fn_constructor_args=([os.path.abspath(path) for path in paths], on_error, device),
        batch_size=int(batch_size),
        batch_format="numpy",
        concurrency=concurrency,
        **options,
    )


class Predictor:
    """What a worker of Ray is: it loads the model once, and adds predictions to batches of rows.

    Parameters
    ----------
    paths
        Folders of a model, or of the members of an ensemble.
    on_error, device
        See `predict_ray`.
    """

    def __init__(self, paths: Sequence[str], on_error: str = "stop", device: str | None = None) -> None:
        from ndem_zoo.runs import load_predictor

        self._worker = Worker(load_predictor(paths[0] if len(paths) == 1 else paths, device), [""], on_error)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns of a batch, and those of its predictions.

        Parameters
        ----------
        batch
            Columns with a row for each of S structures; see `predict_ray`.
        """
        rows = [Numbered(_number(batch, row), 0, _item(batch, row)) for row in range(len(batch["z"]))]
        found = self._worker.predict(rows)
        columns = {name: values for name, values in batch.items() if name != "error"}
        place = {id(it): row for row, it in enumerate(rows)}
        errors = [""] * len(rows)
        for it, reason in found.rejected:
            errors[place[id(it)]] = reason
        predicted = {place[id(it)]: found.of(row) for row, it in enumerate(found.items)}
        for name, is_per_atom in self._worker.columns.items():
            missing = [np.full((len(np.atleast_1d(z)), 3), np.nan) if is_per_atom else np.nan for z in batch["z"]]
            values = [predicted[row][name] if row in predicted else missing[row] for row in range(len(rows))]
            columns[name] = _ragged(values) if is_per_atom else np.array(values)
        return columns | {"error": np.array(errors, dtype=object)}


def _pieces(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What each task reads: a place in an input, and how many structures from there."""
    number = 0
    for path in paths:
        for source, stream in enumerate(open_streams(path)):
            starts = list(stream.cuts(READ_TOGETHER))
            for (row, place), (stop, _) in itertools.pairwise(starts):
                yield {"path": path, "source": source, "row": row, "place": place, "stop": stop, "number": number + row}
            number += starts[-1][0]


def _read(piece: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """In a worker: the structures of a piece."""
    stream = open_streams(piece["path"])[piece["source"]]
    for item in stream.items(piece["row"], piece["place"]):
        if item.row >= piece["stop"]:
            return
        known = item.structure or Structure(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))
        yield {
            "number": piece["number"] + item.row - piece["row"],
            "input": stream.name,
            "row": item.row,
            "z": known.z,
            "pos": known.pos,
            "cell": np.zeros((3, 3)) if known.cell is None else known.cell,
            "pbc": np.zeros(3, dtype=bool) if known.pbc is None else known.pbc,
            "error": item.problem,
        }


def _number(batch: Mapping[str, np.ndarray], row: int) -> int:
    """Number of a structure in the input; else in its batch."""
    return int(batch["number"][row]) if "number" in batch else row


def _item(batch: Mapping[str, np.ndarray], row: int) -> Item:
    """A row as a structure, or why it is none."""
    if "error" in batch and str(batch["error"][row]):
        return Item(row, 0, problem=str(batch["error"][row]))
    try:
        z, pos = np.asarray(batch["z"][row]), np.asarray(batch["pos"][row], dtype=np.float64)
        if z.ndim != 1 or z.dtype.kind not in "iu" or pos.shape != (len(z), 3):
            raise DataError(
                f"z has shape {z.shape} and {z.dtype}, pos {pos.shape}; needed are integers (n,) and (n, 3)"
            )
        pbc = np.asarray(batch["pbc"][row], dtype=bool) if "pbc" in batch else np.zeros(3, dtype=bool)
        cell = np.asarray(batch["cell"][row], dtype=np.float64) if pbc.any() else None
        if pbc.shape != (3,) or (cell is not None and cell.shape != (3, 3)):
            raise DataError(f"cell and pbc have other shapes than (3, 3) and (3,): {np.shape(cell)}, {pbc.shape}")
    except (KeyError, TypeError, ValueError) as error:
        return Item(row, 0, problem=str(error))
    return Item(row, 0, Structure(z.astype(np.int64), pos, cell, pbc if pbc.any() else None))


def _ragged(values: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays (n, 3) of structures of different sizes as one column."""
    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column
