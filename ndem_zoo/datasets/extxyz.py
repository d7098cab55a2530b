"""Any extended XYZ file, eV and Å, as a dataset; and datasets and predictions as extended XYZ.

Frames are cut out of the file one by one, also of .gz, .bz2 and .xz, and parsed by ASE. Where labels are looked for is said in
`featurizers.base.LABEL_KEYS`. Files are written under a temporary name and renamed.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ndem_zoo.checkpoint import whole_file
from ndem_zoo.datasets.base import MolecularDataset, as_dataset
from ndem_zoo.datasets.checks import check_structures, check_targets
from ndem_zoo.datasets.files import Decompressed
from ndem_zoo.errors import DataError, FileFormatError, UnitsWarning

if TYPE_CHECKING:
    from ase import Atoms

#: First line of a frame; what claims more atoms is not believed.
_COUNT = re.compile(rb"\s*\d{1,9}\s*")


def load_extxyz(
    path: str | os.PathLike,
    n_train: int | float = 0.8,
    n_valid: int | float = 0.1,
    seed: int = 1,
    *,
    n_test: int | float | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    incomplete: str = "error",
) -> tuple[list[str], tuple[MolecularDataset, MolecularDataset, MolecularDataset], list]:
    """Load an extended XYZ file in eV and Å, split into training, validation and test data.

    Parameters
    ----------
    path
        The file; .gz, .bz2 and .xz are opened as well.
    n_train, n_valid, n_test, seed
        See `MolecularDataset.split`. Choice: 80 % and 10 %, the rest for testing.
    energy_key, forces_key, incomplete
        See `MolecularDataset.from_atoms`.

    Returns
    -------
    tasks : list of str
        Names of the labels that the file has.
    datasets : (train, valid, test)
        Three `MolecularDataset`.
    transformers : list
        Empty: nothing is normalized.

    Raises
    ------
    FileFormatError
        If the file is not extended XYZ, or is cut off; names the structure.
    DataError
        If labels are ambiguous or partly missing, or there are too few structures.
    """
    whole = read_extxyz(path, energy_key=energy_key, forces_key=forces_key, incomplete=incomplete)
    return whole.tasks, whole.split(n_train, n_valid, seed, n_test), []


def read_extxyz(
    path: str | os.PathLike,
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    incomplete: str = "error",
) -> MolecularDataset:
    """Read all structures of an extended XYZ file into one dataset; parameters and errors as in `load_extxyz`.

    Structures and labels are checked here, where their numbers are still those of the file.
    """
    frames = read_frames(path)
    try:
        whole = MolecularDataset.from_atoms(
            frames,
            energy_key=energy_key,
            forces_key=forces_key,
            incomplete=incomplete,
            name=Path(path).name,
        )
        check_structures(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnitsWarning)  # comes when they are trained on
            check_targets(whole, whole.targets)
        return whole
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_frames(path: str | os.PathLike) -> list[Atoms]:
    """All frames of a file; whatever ASE stumbles over becomes a FileFormatError that names the frame."""
    frames = [frame_of_text(text, path, number) for number, (text, _) in enumerate(frame_texts(path))]
    if not frames:
        raise FileFormatError(f"{path} holds no structures")
    return frames


def frame_texts(path: str | os.PathLike, offset: int = 0, number: int = 0) -> Iterator[tuple[bytes, int]]:
    """The text of each frame, one after the other: no more than one is in memory.

    Parameters
    ----------
    path
        The file; .gz, .bz2 and .xz are decompressed on the way.
    offset
        Byte (of the decompressed text) at which to begin: where an earlier frame ended.
    number
        Number of the frame that begins there, for messages.

    Yields
    ------
    text, end
        Lines of a frame, and the byte behind them.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If a frame does not begin with its number of atoms, or the file ends in it: nobody can tell where the next one
        begins, so that nothing behind it can be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    is_packed = Path(path).suffix.lower() in (".gz", ".bz2", ".xz")
    try:
        with io.BufferedReader(Decompressed(path)) if is_packed else open(path, "rb") as stream:
            _skip(stream, offset)
            line = stream.readline()
            while line:
                if not line.strip():  # Pitfall: ASE's reader ends at the first empty line, whatever follows
                    offset, line = offset + len(line), stream.readline()
                    continue
                lines = [line, *_rest_of_frame(line, stream)]
                line = stream.readline()
                while line.lstrip().startswith(b"VEC"):  # cell vectors in lines of their own
                    lines.append(line)
                    line = stream.readline()
                offset += sum(map(len, lines))
                yield b"".join(lines), offset
                number += 1
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{path}: structure {number} cannot be read as extended XYZ ({reason})") from error


def _skip(stream: IO[bytes], offset: int) -> None:
    """Go on to a byte; what is compressed has to be read up to there."""
    if stream.seekable():
        stream.seek(offset)
        return
    while offset > 0:
        piece = stream.read(min(offset, 1 << 20))
        if not piece:
            raise EOFError(f"the file ends {offset} bytes before")
        offset -= len(piece)


def _rest_of_frame(head: bytes, stream: IO[bytes]) -> list[bytes]:
    """Lines of a frame behind its first one."""
    if not _COUNT.fullmatch(head):
        raise ValueError(f"expected is a number of atoms, found is {head[:60]!r}")
    lines = list(itertools.islice(stream, int(head) + 1))
    if len(lines) <= int(head):
        raise ValueError(f"the file ends after {len(lines)} of {int(head) + 1} lines")
    return lines


def frame_of_text(text: bytes, path: str | os.PathLike, number: int) -> Atoms:
    """The frame that a piece of text from `frame_texts` describes.

    Raises
    ------
    FileFormatError
        If ASE cannot read it; names the file, and the frame by its number.
    """
    from ase.io.extxyz import read_xyz

    try:
        return next(read_xyz(io.StringIO(text.decode("utf-8").replace("\r\n", "\n")), 0))
    # Pitfall: ASE's reader raises whatever its parser trips over (IndexError, KeyError, StopIteration, ...).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{path}: structure {number} cannot be read as extended XYZ ({reason})") from error


def write_extxyz(
    path: str | os.PathLike, data: Any, predictions: Mapping[str, np.ndarray | Sequence[np.ndarray]] | None = None
) -> None:
    """Write structures with labels, or with predictions beside their labels, as extended XYZ.

    Without predictions, ``energy`` and ``forces`` are the labels. With predictions, they are the predicted values.
    ``REF_energy`` and ``REF_forces`` always are the labels, where there are any.

    Parameters
    ----------
    path
        The file; replaced as a whole, or not at all.
    data
        A dataset, or anything that `as_dataset` takes.
    predictions
        What a model's `predict` returned for `data`: ``"energy"`` (S,) in eV and ``"forces"``, (S, n, 3) or a list of
        (n_i, 3), in eV/Å.

    Raises
    ------
    DataError
        If a structure cannot be used, or predictions do not fit the structures.

    Notes
    -----
    ASE writes positions and forces with 8 decimals. To read the labels back from a file with predictions, pass
    ``energy_key="REF_energy", forces_key="REF_forces"``.
    """
    dataset = as_dataset(data)
    check_structures(dataset)
    frames = [_frame(dataset, i, predictions) for i in range(len(dataset))]
    if not frames:
        raise DataError("there are no structures to write; needed is one or more")
    write_frames(Path(path), frames)


def _frame(dataset: MolecularDataset, index: int, predictions: Mapping[str, Any] | None) -> Atoms:
    """One structure as it is written."""
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = dataset.atoms(index)
    labels = dict(atoms.calc.results) if atoms.calc is not None else {}
    if "energy" in labels:
        atoms.info["REF_energy"] = float(labels["energy"])
    if "forces" in labels:
        atoms.arrays["REF_forces"] = np.array(labels["forces"])
    if predictions is not None:
        predicted = {name: _prediction(predictions, name, index, dataset) for name in ("energy", "forces")}
        predicted = {name: value for name, value in predicted.items() if value is not None}
        atoms.calc = SinglePointCalculator(atoms, **predicted) if predicted else None
    return atoms


def _prediction(predictions: Mapping[str, Any], name: str, index: int, dataset: MolecularDataset) -> Any:
    """Predicted energy or forces of one structure; None if they were not predicted."""
    values = predictions.get(name)
    if values is None:
        return None
    if len(values) != len(dataset):
        raise DataError(f"predictions[{name!r}] has {len(values)} entries; there are {len(dataset)} structures")
    if name == "energy":
        return float(np.reshape(values[index], ()))
    n = int(dataset.counts[index])
    forces = np.asarray(values[index], dtype=np.float64)
    if forces.shape != (n, 3):
        raise DataError(f"structure {index}: predicted forces have shape {forces.shape}; needed is ({n}, 3)")
    return forces


def write_frames(path: Path, frames: list[Atoms]) -> None:
    """Write structures, whole or not at all."""
    from ase.io import write

    with whole_file(path, text=True) as stream:
        write(stream, frames, format="extxyz")
