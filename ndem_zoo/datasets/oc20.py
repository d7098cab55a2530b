"""OC20: relaxations of adsorbates on surfaces, for the tasks S2EF (energy and forces) and IS2RE (relaxed energy).

`load_oc20` finds the official files, or takes a folder of one's own; what is large is converted once, by `convert_oc20`,
into a store on disk (`store.py`) that training reads from. Energies are adsorption energies unless asked otherwise.
The formats are read in `oc20_formats.py`, LMDB files are opened in `lmdb_files.py`.
"""

from __future__ import annotations

import collections
import contextlib
import json
import multiprocessing
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from ndem_zoo.datasets.base import MolecularDataset, split_indices
from ndem_zoo.datasets.checks import check_structures, check_targets
from ndem_zoo.datasets.files import DatasetCard, RemoteFile, data_folder, fetch, read_npz, unpacked
from ndem_zoo.datasets.lmdb_files import LmdbRecords, numeric_order
from ndem_zoo.datasets.oc20_formats import (
    ENERGIES,
    STORED,
    Frame,
    ReferenceEnergies,
    frame_of_ase,
    frame_of_pyg,
    frames_dataset,
    frames_of_text,
)
from ndem_zoo.datasets.pickles import read_plain
from ndem_zoo.datasets.store import StoreWriter, is_store, open_store
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError

TASKS = ("s2ef", "is2re")

#: Mean |energy| in eV above which energies cannot be adsorption energies: OC20's have a mean of -0.8 and are cut at 10.
SUSPICIOUS_ENERGY = 50.0

#: Choice: records of an LMDB file that are converted, and committed, together; text files have at most as many frames.
CHUNK = 5000

#: Choice: a folder of one's own with more bytes than this is converted into a store; less is read into memory.
IN_MEMORY = 200 * 1024**2

#: Characters that ids may have in a store: ``<sid>_<fid>``, or file and number.
_ID_WIDTH, _FILE_ID_WIDTH = 24, 64

_BASE = "https://dl.fbaipublicfiles.com/opencatalystproject/data/"

#: Official archives: name, MD5 (fairchem 1.10, docs/core/datasets/oc20.md), size, number of structures.
_ARCHIVES = {
    "s2ef_train_200K.tar": ("f8d0909c2623a393148435dede7d3a46", "344 MB", 200_000),
    "s2ef_train_2M.tar": ("953474cb93f0b08cdc523399f03f7c36", "3.4 GB", 2_000_000),
    "s2ef_train_20M.tar": ("863bc983245ffc0285305a1850e19cf7", "34 GB", 20_000_000),
    "s2ef_train_all.tar": ("12a7087bfd189a06ccbec9bc7add2bcd", "225 GB", 133_934_018),
    "s2ef_val_id.tar": ("f57f7f5c1302637940f2cc858e789410", "1.7 GB", 999_866),
    "s2ef_val_ood_ads.tar": ("431ab0d7557a4639605ba8b67793f053", "1.7 GB", 999_838),
    "s2ef_val_ood_cat.tar": ("532d6cd1fe541a0ddb0aa0f99962b7db", "1.7 GB", 999_809),
    "s2ef_val_ood_both.tar": ("5731862978d80502bbf7017d68c2c729", "1.9 GB", 999_944),
    "s2ef_rattled.tar": ("40431149b27b64ce1fb40cac4e2e064b", "29 GB", 16_677_031),
    "s2ef_md.tar": ("9fed845aaab8fb4bf85e3a8db57796e0", "42 GB", 38_315_405),
    "s2ef_test_lmdbs.tar.gz": ("bcada432482f6e87b24e14b6b744992a", "30 GB", 3_999_394),
    "is2res_train_val_test_lmdbs.tar.gz": ("cfc04dd2f87b4102ab2f607240d25fb1", "8.1 GB", 660_010),
}

_SIDE_FILES = {
    "oc20_data_mapping.pkl": ("6b5d485019861f6e7efca38338375b61", ""),
    "mapping_adslab_slab.pkl": ("079041076c3f15d18ecb5d17c509cdfe", ""),
    "oc20_ref.pkl": ("043e1e0b0cce64c62f01a8563dbc3178", "oc22/"),
}

OC20 = DatasetCard(
    name="OC20",
    description=(
        "Open Catalyst 2020: DFT relaxations of 82 adsorbates on 11,500 surfaces; energies and forces of their frames "
        "(S2EF), energies of relaxed structures (IS2RE)."
    ),
    theory="RPBE, VASP",
    units={"positions": "Å", "energy": "eV", "forces": "eV/Å"},
    licence="CC BY 4.0",
    citation=(
        "L. Chanussot et al., Open Catalyst 2020 (OC20) dataset and community challenges, ACS Catal. 11, 6059 (2021); "
        "arXiv:2010.09990",
    ),
    homepage="https://fair-chem.github.io/catalysts/datasets/oc20.html",
    files={
        **{name: RemoteFile(urls=(_BASE + name,), md5=md5) for name, (md5, _, _) in _ARCHIVES.items()},
        **{name: RemoteFile(urls=(_BASE + sub + name,), md5=md5) for name, (md5, sub) in _SIDE_FILES.items()},
    },
)

_VALID = ("val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")
_TEST = ("test_id", "test_ood_ads", "test_ood_cat", "test_ood_both")

#: Splits of each task: the archive that holds them, and the folders in which they may lie below the data folder.
SPLITS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "s2ef": {
        "200k": ("s2ef_train_200K.tar", ("s2ef/200k/train",)),
        "2M": ("s2ef_train_2M.tar", ("s2ef/2M/train",)),
        "20M": ("s2ef_train_20M.tar", ("s2ef/20M/train",)),
        "all_train": ("s2ef_train_all.tar", ("s2ef/all/train",)),
        **{name: (f"s2ef_{name}.tar", (f"s2ef/all/{name}",)) for name in _VALID},
        "rattled": ("s2ef_rattled.tar", ("s2ef/rattled",)),
        "md": ("s2ef_md.tar", ("s2ef/md",)),
        **{name: ("s2ef_test_lmdbs.tar.gz", (f"s2ef/all/{name}",)) for name in _TEST},
    },
    "is2re": {
        "10k": ("is2res_train_val_test_lmdbs.tar.gz", ("is2re/10k/train",)),
        "100k": ("is2res_train_val_test_lmdbs.tar.gz", ("is2re/100k/train",)),
        "all_train": ("is2res_train_val_test_lmdbs.tar.gz", ("is2re/all/train",)),
        **{name: ("is2res_train_val_test_lmdbs.tar.gz", (f"is2re/all/{name}",)) for name in (*_VALID, *_TEST)},
    },
}

#: What an options dict of a conversion holds; also the settings of its store.
_Options = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- loading


def load_oc20(
    task: str = "s2ef",
    split: str = "all",
    data_dir: str | os.PathLike | None = None,
    *,
    valid: str | None = None,
    test: str | None = None,
    energy: str = "adsorption",
    stored: str | None = None,
    reference: Any = None,
    store: str | os.PathLike | None = None,
    download: bool = False,
    workers: int = 1,
    n_train: int | float | None = None,
    n_valid: int | float | None = None,
    n_test: int | float | None = None,
    seed: int = 1,
    split_by: str = "structure",
) -> tuple[list[str], tuple[MolecularDataset, MolecularDataset, MolecularDataset], list]:
    """Load OC20, or files of one's own in any of its formats, in eV and Å.

    Parameters
    ----------
    task
        ``"s2ef"`` or ``"is2re"``; also ``"s2ef/val_id"``, with the split.
    split
        An official split (`SPLITS`: ``"200k"``, ``"2M"``, ``"20M"``, ``"all_train"``, ``"val_id"``, ``"val_ood_ads"``,
        ..., ``"md"``, ``"rattled"``), or ``"all"``: all structures in `data_dir`, which are one's own.
    data_dir
        For an official split: the folder with its archive (``.tar`` files are read without unpacking), or with its
        unpacked files; default see `files.data_folder`. For ``"all"``: a folder of ``N.extxyz.xz`` and ``N.txt.xz``, of
        ``.lmdb`` or of ``.aselmdb`` files, or one such file, or a store.
    valid, test
        Official splits for validation and test data.
    energy
        ``"adsorption"`` (default) or ``"total"``.
    stored
        What the files hold, if it is not what their format usually does: raw totals in text and ``.aselmdb`` files,
        adsorption energies in pickled LMDB files.
    reference
        Energies of slab and gas for files that lack them: path of ``oc20_ref.pkl`` or of a JSON file, or a mapping.
    store
        Folder for the converted data of `split`. Default: ``stores/...`` in `data_dir`; ``"all"`` has none, and small
        folders of one's own are read into memory.
    download
        True: download the archive if it is not there. They are large.
    workers
        Processes of a conversion.
    n_train, n_valid, n_test, seed
        If given, the structures of `split` are split at random, see `MolecularDataset.split`.
    split_by
        ``"structure"``, or ``"system"``: all frames of one relaxation go to the same part, and sizes count systems.

    Returns
    -------
    tasks : list of str
        ``["energy", "forces"]``, or ``["energy"]`` for IS2RE.
    datasets : (train, valid, test)
        `split` is the first, whatever it is called, unless it was split at random; parts that were not asked for are
        empty. ``extras`` has ``tags`` (0 below the surface, 1 surface, 2 adsorbate), ``sid``, ``fid``, and for IS2RE
        ``y_init`` and ``pos_relaxed``; ``fixed`` says which atoms do not move.
    transformers : list
        Empty: nothing is normalized.

    Raises
    ------
    ConfigError
        For an unknown task or split, or options that exclude each other.
    DataError
        If files are missing, damaged, or lack reference energies; says which.

    Warns
    -----
    DataWarning
        If energies that should be adsorption energies look like raw totals; if frames of one relaxation are in different
        parts of a random split.
    """
    task, _, given = task.partition("/")
    split = given or split
    options = _options(task, energy, stored, reference)
    sizes = (n_train, n_valid, seed, n_test)
    first = _open_split(task, split, data_dir, options, store, download, workers)
    if any(size is not None for size in (n_train, n_valid, n_test)):
        if valid is not None or test is not None:
            raise ConfigError("valid and test name splits; sizes of a random split exclude them")
        parts = _random_parts(first, sizes, split_by)
    else:
        others = [
            first.select([]) if name is None else _open_split(task, name, data_dir, options, None, download, workers)
            for name in (valid, test)
        ]
        parts = (first, *others)
    return first.tasks, parts, []


def read_oc20(
    path: str | os.PathLike,
    task: str = "s2ef",
    *,
    energy: str = "adsorption",
    stored: str | None = None,
    reference: Any = None,
) -> MolecularDataset:
    """Read a file or folder in one of OC20's formats into memory; parameters and errors as in `load_oc20`."""
    options = _options(task, energy, stored, reference)
    parts = [read_source(source, options) for source in find_sources(path)]
    whole = parts[0] if len(parts) == 1 else MolecularDataset.concatenate(parts)
    whole.name = f"OC20 {task} {Path(path).name}"
    warn_if_total(whole, options, str(path))
    return whole


def convert_oc20(
    path: str | os.PathLike,
    out: str | os.PathLike,
    task: str = "s2ef",
    *,
    energy: str = "adsorption",
    stored: str | None = None,
    reference: Any = None,
    workers: int = 1,
    name: str | None = None,
    report: Callable[[int, int, int], None] | None = None,
) -> MolecularDataset:
    """Convert a file or folder in one of OC20's formats into a store; a conversion that was interrupted is resumed.

    Parameters
    ----------
    path
        See `load_oc20`; also a ``.tar`` archive of text files.
    out
        Folder of the store: new, empty, or an unfinished one of the same conversion.
    task, energy, stored, reference
        See `load_oc20`.
    workers
        Processes. Pitfall: with more than one, a script that calls this must have ``if __name__ == "__main__":``.
    name
        Of the dataset.
    report
        Called after each source with the number of sources done, of all sources, and of structures.

    Returns
    -------
    store : MolecularDataset
        The store, opened.
    """
    options = _options(task, energy, stored, reference)
    settings = {key: value for key, value in options.items() if key != "reference"}
    sources = find_sources(path)
    writer = StoreWriter(
        out,
        name=name or f"OC20 {task} {Path(path).name}",
        card=OC20,
        settings=settings | {"reference": options["reference"] is not None},
        string_width=_FILE_ID_WIDTH
        if any(source.log is None and not source.is_lmdb for source in sources)
        else _ID_WIDTH,
    )
    with writer:
        left = [source for source in sources if source.name not in writer.sources]
        warned = False
        for source, part in _parts(left, options, workers):
            warned = warned or warn_if_total(part, options, source.name)
            writer.append(part)
            writer.commit(source.name)
            if report is not None:
                report(len(writer.sources), len(sources), writer.structures)
        return writer.finish()


def _options(task: str, energy: str, stored: str | None, reference: Any) -> _Options:
    """_Options of reading, checked; reference energies are read."""
    for name, value, allowed in (
        ("task", task, TASKS),
        ("energy", energy, ENERGIES),
        ("stored", stored, (None, *ENERGIES)),
    ):
        if value not in allowed:
            raise ConfigError(f"{name}={value!r}; allowed are {', '.join(map(repr, allowed))}")
    return {"task": task, "energy": energy, "stored": stored, "reference": read_reference(reference)}


def _open_split(
    task: str,
    split: str,
    data_dir: str | os.PathLike | None,
    options: _Options,
    store: str | os.PathLike | None,
    download: bool,
    workers: int,
) -> MolecularDataset:
    """One split: its store, which is made if need be, or in memory."""
    if split == "all":
        return _open_own(task, data_dir, options, store, workers)
    known = {name.lower(): name for name in SPLITS[task]}
    if split.lower() not in known:
        raise ConfigError(
            f"{task} has no split {split!r}; it has {', '.join(SPLITS[task])}, and 'all' for one's own files"
        )
    split = known[split.lower()]
    folder = data_folder(data_dir)
    out = Path(store) if store is not None else folder / "stores" / f"oc20_{task}_{split}_{options['energy']}"
    if not is_store(out):
        source = _find_split(task, split, folder, download)
        _convert(source, out, options, workers, f"OC20 {task} {split}")
    return _opened(out, options)


def _open_own(
    task: str, data_dir: str | os.PathLike | None, options: _Options, store: str | os.PathLike | None, workers: int
) -> MolecularDataset:
    """All structures of a folder of one's own."""
    if store is not None and is_store(store):
        return _opened(Path(store), options)
    if data_dir is None:
        raise ConfigError("split='all' reads files of one's own: name their folder with data_dir=")
    path = Path(data_dir).expanduser()
    if is_store(path):
        return _opened(path, options)
    if store is None:
        size = sum(source.size for source in {source.path: source for source in find_sources(path)}.values())
        if size <= IN_MEMORY:
            choices = {key: options[key] for key in ("energy", "stored", "reference")}
            return read_oc20(path, task, **choices)
        raise DataError(
            f"{path} has {size / 1024**2:,.0f} MB of files, too many to be read into memory each time: name a folder for the "
            "converted data with store="
        )
    return _convert(path, Path(store), options, workers, f"OC20 {task} {path.name}")


def _convert(path: Path, out: Path, options: _Options, workers: int, name: str) -> MolecularDataset:
    task, choices = options["task"], {key: options[key] for key in ("energy", "stored", "reference")}
    return convert_oc20(path, out, task, workers=workers, name=name, **choices)


def _opened(folder: Path, options: _Options) -> MolecularDataset:
    """A store that was made with these options."""
    store = open_store(folder)
    for name in ("task", "energy"):
        found = store.settings.get(name)
        if found is not None and found != options[name]:
            raise ConfigError(
                f"{folder} was converted with {name}={found!r}, not {options[name]!r}; give another store="
            )
    return store


def _find_split(task: str, split: str, folder: Path, download: bool) -> Path:
    """Unpacked files or the archive of an official split."""
    archive, inner = SPLITS[task][split]
    stem = archive.removesuffix(".gz").removesuffix(".tar")
    places = [f"{stem}/{stem}", stem] if archive.endswith(".tar") else []
    for sub in inner:
        places += [sub, f"data/{sub}", f"{stem}/{sub}", f"{stem}/data/{sub}"]
    for place in places:
        if (folder / place).is_dir() and files_in(folder / place):
            return folder / place
    if archive.endswith(".tar"):
        return fetch(OC20, archive, folder, download)
    raise DataError(
        f"split {split!r} of {task} is not in {folder} (looked for {', '.join(places)}): get {archive} from {_BASE}{archive} "
        f"({_ARCHIVES[archive][1]}), unpack it, and name the folder that holds it with data_dir="
    )


def _random_parts(
    dataset: MolecularDataset, sizes: tuple, split_by: str
) -> tuple[MolecularDataset, MolecularDataset, MolecularDataset]:
    """A random split, by structure or by system."""
    n_train, n_valid, seed, n_test = sizes
    n_train, n_valid = 0.8 if n_train is None else n_train, 0.1 if n_valid is None else n_valid
    if split_by == "system":
        return split_by_system(dataset, n_train, n_valid, seed, n_test)
    if split_by != "structure":
        raise ConfigError(f"split_by={split_by!r}; allowed are 'structure' and 'system'")
    parts = dataset.split(n_train, n_valid, seed, n_test)
    seen = [np.unique(part.extras["sid"]) for part in parts if len(part) and "sid" in part.extras]
    if sum(map(len, seen)) > len(np.unique(np.concatenate([*seen, []]))):
        warnings.warn(
            "frames of one relaxation are in different parts of the random split, so that errors on the held-out part say "
            "little about other systems; split_by='system' keeps them together",
            DataWarning,
            stacklevel=3,
        )
    return parts


def split_by_system(
    dataset: MolecularDataset,
    n_train: int | float,
    n_valid: int | float,
    seed: int = 1,
    n_test: int | float | None = None,
) -> tuple[MolecularDataset, MolecularDataset, MolecularDataset]:
    """Split at random such that all frames of a system (``extras["sid"]``) are in one part.

    Parameters
    ----------
    dataset
        With the extra ``sid``.
    n_train, n_valid, n_test, seed
        Numbers of systems, or fractions; see `MolecularDataset.split`.

    Raises
    ------
    DataError
        If the structures have no system, or there are too few systems.
    """
    if "sid" not in dataset.extras:
        raise DataError("the structures have no extras['sid'], so that nobody knows which belong to one system")
    systems, owner = np.unique(dataset.extras["sid"], return_inverse=True)
    groups = split_indices(len(systems), n_train, n_valid, seed, n_test)
    return tuple(dataset.select(np.flatnonzero(np.isin(owner.reshape(-1), group))) for group in groups)


def warn_if_total(dataset: MolecularDataset, options: _Options, where: str) -> bool:
    """Warn if energies that should be adsorption energies are too large for that; whether it did."""
    if options["energy"] != "adsorption" or "energy" not in dataset.targets or not len(dataset):
        return False
    mean = float(dataset.targets["energy"].mean())
    if abs(mean) <= SUSPICIOUS_ENERGY:
        return False
    warnings.warn(
        f"{where}: the mean energy is {mean:.1f} eV, which looks like raw total energies, not adsorption energies (OC20's "
        "mean is -0.8 eV). If the files hold totals, say so with stored='total', and give reference= where they lack "
        "reference energies; if totals are what you want, energy='total'",
        DataWarning,
        stacklevel=3,
    )
    return True


# ---------------------------------------------------------------------------------------------------- reference energies


def read_reference(source: Any) -> ReferenceEnergies | None:
    """Reference energies of systems, from ``oc20_ref.pkl``, a JSON file, or a mapping.

    Parameters
    ----------
    source
        A path, a mapping from ``"random<sid>"`` to eV, `ReferenceEnergies`, or None.

    Raises
    ------
    FileFormatError
        If the file is damaged, or a pickle with anything but text and numbers in it.
    """
    if source is None or isinstance(source, ReferenceEnergies):
        return source
    if isinstance(source, Mapping):
        return ReferenceEnergies(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with reference energies")
    try:
        values = json.loads(path.read_bytes()) if path.suffix == ".json" else read_plain(path.read_bytes())
    except FileFormatError as error:
        raise FileFormatError(f"{path} {error}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{path} holds {type(values).__name__}; needed is a dict of energies")
    try:
        return ReferenceEnergies(values)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def linear_reference(path: str | os.PathLike) -> dict[str, float]:
    """Energy of each element in eV from a file such as ``oc20_linref.npz``, for `reference_energies` of a model.

    Parameters
    ----------
    path
        An npz file with ``coeff`` (100,), by atomic number.

    Returns
    -------
    reference : dict
        From symbols to eV.

    Notes
    -----
    Pitfall: the official file has garbage up to 1e12 for elements that OC20 lacks, and at index 0. Only entries with
    0 < |value| < 20 eV are taken, which are the 56 usable ones.
    """
    coefficients = read_npz(path, ("coeff",))["coeff"].reshape(-1)
    usable = (np.abs(coefficients) > 0) & (np.abs(coefficients) < 20.0)
    usable[0] = False
    return {chemical_symbols[z]: float(coefficients[z]) for z in np.flatnonzero(usable)}


# ------------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """What is read, and committed, at once: a text file and its log, or some records of an LMDB file.

    Attributes
    ----------
    name
        Different for each source of a folder, the same each time.
    path
        The file, or the archive that it is in.
    log
        The file with systems and reference energies; None if there is none.
    span, log_span
        First byte and number of bytes in the archive; None outside of archives.
    records
        First record, and the one after the last; None for text.
    """

    name: str
    path: Path
    log: Path | None = None
    span: tuple[int, int] | None = None
    log_span: tuple[int, int] | None = None
    records: tuple[int, int] | None = None

    @property
    def is_lmdb(self) -> bool:
        """Whether the source is an LMDB file, and not text."""
        return self.records is not None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


def is_oc20(path: str | os.PathLike) -> bool:
    """Whether a path is to be read by `convert_oc20`: a folder that is no store, an archive, an LMDB file, or text with a log.

    Any other extended XYZ file is read by `read_extxyz`.
    """
    path = Path(path)
    if path.is_dir():
        return not is_store(path)
    if not path.is_file() or path.suffix == ".tar":
        return path.is_file()
    is_logged = _kind(path) == "text" and _text_source(path, path.name).log is not None
    return is_logged or _kind(path) in ("pyg", "ase")


def find_sources(path: str | os.PathLike) -> list[Source]:
    """All that can be read at a path: a file, an archive, or a folder; in the order of their numbers.

    Raises
    ------
    FileNotFoundError
        If there is no such path.
    DataError
        If there is nothing to read, or files of several formats.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        raise DataError(f"{path} is a compressed archive: unpack it, and name the folder")
    if path.is_file() and path.suffix == ".tar":
        return _archive_sources(path)
    files = [path] if path.is_file() else files_in(path)
    if not files:
        raise DataError(f"{path} has no .extxyz, .extxyz.xz, .lmdb or .aselmdb files")
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{path} has files of several formats ({', '.join(kinds)}): name one file, or a folder with one format"
        )
    root = path.parent if path.is_file() else path
    sources: list[Source] = []
    for file in files:
        name = file.relative_to(root).as_posix()
        sources += [_text_source(file, name)] if kinds == ["text"] else _lmdb_sources(file, name)
    return sources


def _kind(path: Path) -> str:
    """Format of a file, by its name."""
    name = path.name.lower()
    if name.endswith((".extxyz", ".extxyz.xz")):
        return "text"
    return {".lmdb": "pyg", ".aselmdb": "ase"}.get(path.suffix.lower(), "")


def files_in(folder: Path) -> list[Path]:
    """Files of known formats in a folder, or, if there are none, below it."""
    for pattern in ("*", "**/*"):
        found = [file for file in folder.glob(pattern) if _kind(file) and file.is_file()]
        if found:
            return sorted(found, key=lambda file: (file.parent.as_posix(), numeric_order(file)))
    return []


def _log_name(name: str) -> tuple[str, str]:
    """Names that the log of a text file may have."""
    stem = name.removesuffix(".xz").removesuffix(".extxyz")
    return f"{stem}.txt.xz", f"{stem}.txt"


def _text_source(file: Path, name: str) -> Source:
    logs = [file.with_name(log) for log in _log_name(file.name)]
    return Source(name, file, next((log for log in logs if log.is_file()), None))


def _lmdb_sources(file: Path, name: str) -> list[Source]:
    n = len(LmdbRecords(file))
    spans = [(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
    return [Source(f"{name}[{start}:{stop}]", file, records=(start, stop)) for start, stop in spans]


def _archive_sources(path: Path) -> list[Source]:
    """Text files in an archive, which is not unpacked."""
    try:
        with tarfile.open(path, "r:") as archive:
            plain = (member for member in archive if member.isreg() and not member.issparse())
            members = {member.name: (member.offset_data, member.size) for member in plain}
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{path} is no tar archive, or damaged ({error})") from error
    sources = []
    for name in sorted((name for name in members if _kind(Path(name)) == "text"), key=lambda n: numeric_order(Path(n))):
        log = next((log for log in _log_name(name) if log in members), None)
        sources.append(Source(name, path, path if log else None, members[name], members.get(log)))
    if not sources:
        raise DataError(f"{path} has no .extxyz or .extxyz.xz files")
    end = max(start + size for start, size in members.values())
    if path.stat().st_size < end:
        raise FileFormatError(f"{path} is truncated: it has {path.stat().st_size:,} bytes of {end:,}")
    return sources


def read_source(source: Source, options: _Options) -> MolecularDataset:
    """The structures of a source, checked.

    Raises
    ------
    DataError, FileFormatError
        If they cannot be used; names the file, and the structure or key.
    """
    if source.records is None:
        kind = "text"
        log = None if source.log is None else _text(source.log, source.log_span, _log_name(source.name)[0])
        frames = frames_of_text(_text(source.path, source.span, source.name), log, source.name)
    else:
        kind = _kind(source.path)
        with contextlib.closing(LmdbRecords(source.path)) as records:
            frames = [frame_of_record(records, index, options["task"]) for index in range(*source.records)]
    stored = options["stored"] or STORED[kind]
    dataset = frames_dataset(
        frames,
        energy=options["energy"],
        stored=stored,
        reference=options["reference"],
        where=source.name,
        card=OC20,
        name=source.name,
    )
    try:
        check_structures(dataset)
        check_targets(dataset, dataset.targets)
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from error
    dataset.checked = True
    return dataset


def frame_of_record(records: LmdbRecords, index: int, task: str = "s2ef") -> Frame:
    """The frame in a record of an LMDB file.

    Raises
    ------
    FileFormatError
        If it cannot be read; names the file and the key.
    """
    where = f"{records.path}: key '{records.numbers[index]}'"
    fields = records[index]
    return frame_of_ase(fields, where) if records.is_json else frame_of_pyg(fields, task, where)


def _text(path: Path, span: tuple[int, int] | None, name: str) -> str:
    """Content of a text file, decompressed if it is."""
    with path.open("rb") as file:
        if span is not None:
            file.seek(span[0])
        raw = file.read() if span is None else file.read(span[1])
    is_compressed = raw[:6] == b"\xfd7zXZ\x00"
    if span is None and path.suffix == ".xz" and not is_compressed:
        raise FileFormatError(f"{path} is damaged or truncated: it does not begin as an xz file does")
    try:
        return (unpacked(raw, path) if is_compressed else raw).decode("utf-8")
    except (FileFormatError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: {name} is damaged or truncated ({error})") from error


def _parts(sources: Sequence[Source], options: _Options, workers: int) -> Iterator[tuple[Source, MolecularDataset]]:
    """Each source with its structures, in order; read by `workers` processes, not more than two sources ahead each."""
    if workers < 1:
        raise ConfigError(f"workers={workers!r}; it must be at least 1")
    if workers == 1 or len(sources) < 2:
        yield from ((source, read_source(source, options)) for source in sources)
        return
    # Pitfall: a forked process would inherit the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin_worker, (options,)) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for source in sources:
                waiting.append((source, pool.submit(_read_in_worker, source)))
                if len(waiting) > 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_WORKER_OPTIONS: _Options = {}


def _begin_worker(options: _Options) -> None:
    """In a worker: keep the options, reference energies included, which are sent once."""
    _WORKER_OPTIONS.update(options)


def _read_in_worker(source: Source) -> MolecularDataset:
    return read_source(source, _WORKER_OPTIONS)
