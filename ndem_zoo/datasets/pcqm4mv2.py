"""PCQM4Mv2: 3.4 million molecules of PubChem at DFT equilibrium, with HOMO-LUMO gaps, to pre-train on.

`load_pcqm4mv2` reads OGB's archive of geometries as a stream, piece by piece, into memory-mapped columns; the gaps are
taken from OGB's table where it is at hand, since denoising needs none. The archive's address and checksum are OGB's; of
the table no checksum of the file itself is known, so it is used as it is found.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from ndem_zoo.checkpoint import file_digest
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.cache import open_cached
from ndem_zoo.datasets.files import (
    DatasetCard,
    Decompressed,
    RemoteFile,
    archived_files,
    data_folder,
    fetch,
    find_file,
    lines_of,
)
from ndem_zoo.datasets.sdf import Entry, iter_sdf
from ndem_zoo.errors import ConfigError, DataError, FileFormatError

#: Molecules in the official archive: the training part; of the others OGB gives no geometries.
N_MOLECULES = 3_378_606

#: Changes whenever what is cached is to be made anew.
_FORMAT = 1

#: Choice: molecules that are in memory at a time while the archive is read, some 20 MB.
_PIECE = 20_000

_ARCHIVE, _SDF = "pcqm4m-v2-train.sdf.tar.gz", "pcqm4m-v2-train.sdf"
_TABLES = ("data.csv.gz", "data.csv", "pcqm4m-v2.csv", "pcqm4m-v2.csv.gz")
_SUBFOLDERS = ("pcqm4m-v2", "pcqm4m-v2/raw", "raw", "pcqm4mv2", "pcqm4mv2/raw")

#: Atoms in a SMILES: those in brackets with their element, and those that need none.
_SMILES_ATOM = re.compile(r"\[\d*([A-Z][a-z]?|[a-z]{1,2})[^\]]*\]|(Cl|Br|[BCNOPSFI]|[bcnops])")

#: PCQM4Mv2, whose only address has no TLS: people get the file themselves. Address and MD5: OGB's page of the data; the size: a public record of a download with this MD5.
PCQM4MV2 = DatasetCard(
    name="PCQM4Mv2",
    description="Equilibrium geometries of PubChem's molecules (PubChemQC), the training part of OGB-LSC's challenge.",
    theory="B3LYP/6-31G*",
    units={"positions": "Å", "gap": "eV"},
    licence="PubChemQC is in the public domain by its authors' word; that of OGB's selection could not be read",
    citation=(
        "W. Hu et al., OGB-LSC: a large-scale challenge for machine learning on graphs, NeurIPS Datasets and Benchmarks "
        "(2021)",
        "M. Nakata and T. Shimazaki, PubChemQC project: a large-scale first-principles electronic structure database for "
        "data-driven chemistry, J. Chem. Inf. Model. 57, 1300 (2017)",
    ),
    homepage="https://ogb.stanford.edu/docs/lsc/pcqm4mv2/",
    files={
        _ARCHIVE: RemoteFile(
            urls=(f"http://ogb-data.stanford.edu/data/lsc/{_ARCHIVE}",),
            md5="fd72bce606e7ddf36c2a832badeec6ab",
            size=1_559_712_928,
        )
    },
)


def load_pcqm4mv2(
    target: str | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
    n_train: int | float | None = None,
    n_valid: int | float = 10_000,
    n_test: int | float = 0,
    seed: int = 1,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[list[str], tuple[MolecularDataset, MolecularDataset, MolecularDataset], list]:
    """Load PCQM4Mv2's geometries, in Å, and the gaps where they are wanted, split at random.

    Parameters
    ----------
    target
        None: geometries alone, for pre-training (`pretrain`). ``"gap"``: the HOMO-LUMO gap in eV, which needs OGB's table
        ``data.csv.gz`` beside the archive or in a folder below `data_dir` (it is in OGB's ``pcqm4m-v2.zip``).
    data_dir
        Folder with ``pcqm4m-v2-train.sdf.tar.gz`` (or the unpacked ``.sdf``), or one above it, or that file. Default: the
        environment variable NDEM_ZOO_DATA, else the user's cache folder.
    download
        False: never touch the network. The archive has 1.6 GB.
    n_train
        Number or fraction of molecules; None: all that the others leave.
    n_valid, n_test
        Numbers or fractions. Choice: 10,000 to validate and none to test; OGB's own validation and test molecules have no
        geometries.
    seed
        Of the split ``numpy.random.default_rng(seed).permutation``.
    cache_dir
        Where the memory-mapped columns go that the archive is read into once; default: the data folder that is the default
        of `data_dir`. They need about 2.5 GB.

    Returns
    -------
    tasks : list of str
        ``[]`` or ``["gap"]``.
    datasets : (train, valid, test)
        Three `MolecularDataset`; ids are OGB's numbers of the molecules, from 0.
    transformers : list
        Empty: nothing is normalized.

    Raises
    ------
    ConfigError
        For another target.
    DataError
        If files are not there, do not belong together, or have too few molecules for the split.
    FileFormatError
        If a file is damaged or cut off; names the molecule.
    """
    if target not in (None, "", "gap"):
        raise ConfigError(f"PCQM4Mv2 has no target {target!r}; allowed are 'gap', and None for geometries alone")
    source = find_pcqm4mv2(data_dir, download)
    table = find_table(source, data_dir) if target else None
    whole = open_pcqm4mv2(source, table, cache_dir=cache_dir)
    tasks = ["gap"] if target else []
    if n_train is None:
        n_train = len(whole) - sum(_count(size, len(whole)) for size in (n_valid, n_test))
        if n_train < 1:
            raise DataError(
                f"{source} has {len(whole):,} molecules; n_valid={n_valid!r} and n_test={n_test!r} leave none"
            )
    return tasks, whole.split(n_train, n_valid, seed, n_test), []


def _count(size: int | float, n: int) -> int:
    """A number of molecules, rounded as `split_indices` rounds fractions."""
    return round(n * size) if isinstance(size, float) and 0 < size <= 1 else int(size)


def find_pcqm4mv2(data_dir: str | os.PathLike | None = None, download: bool = True) -> Path:
    """Path of the geometries: the user's own, packed or not, or a download."""
    folder = data_folder(data_dir)
    if folder.is_file():
        return fetch(PCQM4MV2, _ARCHIVE, folder.parent) if folder.name == _ARCHIVE else folder
    own = find_file(folder, (_ARCHIVE, _SDF), _SUBFOLDERS)
    if own is not None and own.name == _SDF:
        return own
    return fetch(PCQM4MV2, _ARCHIVE, data_dir, download, subfolders=_SUBFOLDERS)


def find_table(source: Path, data_dir: str | os.PathLike | None = None) -> Path:
    """Path of OGB's table of gaps.

    Raises
    ------
    DataError
        If it is not there: says where it can be had.
    """
    for folder in (source.parent, data_folder(data_dir)):
        found = find_file(folder, _TABLES, (*_SUBFOLDERS, "../raw"))
        if found is not None:
            return found
    raise DataError(
        f"the gaps of PCQM4Mv2 are not beside {source}: put {_TABLES[0]} there, from OGB's pcqm4m-v2.zip "
        f"({PCQM4MV2.homepage}); for pre-training none are needed, target=None"
    )


def open_pcqm4mv2(
    source: str | os.PathLike, table: str | os.PathLike | None = None, *, cache_dir: str | os.PathLike | None = None
) -> MolecularDataset:
    """All molecules, memory-mapped; the files are read only if that was not done before (minutes for the official ones)."""
    key = {"format": _FORMAT, "files": [file_digest(path) for path in (source, table) if path is not None]}
    return open_cached(
        "PCQM4Mv2", key, lambda: read_pcqm4mv2(source, table), card=PCQM4MV2, cache_dir=cache_dir, string_width=8
    )


# ------------------------------------------------------------------------------------------------------------- reading


def read_pcqm4mv2(
    source: str | os.PathLike, table: str | os.PathLike | None = None, piece: int = _PIECE
) -> Iterator[MolecularDataset]:
    """Read the geometries piece by piece, with gaps if there is a table.

    Parameters
    ----------
    source
        ``.sdf`` or ``.sdf.tar.gz``.
    table
        csv file, packed or not, with the columns ``idx``, ``smiles`` and ``homolumogap``.
    piece
        Molecules in each dataset.

    Raises
    ------
    FileFormatError
        If a file is damaged.
    DataError
        If a molecule of the table has other heavy atoms than the one in the same place of the archive.
    """
    source = Path(source)
    gaps, smiles = (None, []) if table is None else _read_table(Path(table))
    first = 0
    entries = _iter_entries(source)
    while chunk := list(islice(entries, piece)):
        stop = first + len(chunk)
        if gaps is not None:
            if stop > len(gaps):
                raise DataError(f"{table} has {len(gaps):,} molecules, {source} has more")
            _compare(source, table, first, chunk, smiles[first:stop])
        yield _dataset(source, chunk, first, None if gaps is None else gaps[first:stop])
        first = stop
    if first == 0:
        raise FileFormatError(f"{source} holds no molecules")


def _iter_entries(source: Path) -> Iterator[Entry]:
    """Entries of the SD file, or of the one SD file in the archive, which is streamed and never unpacked."""
    if source.name.endswith(".sdf"):
        with source.open(encoding="ascii", errors="replace") as lines:
            yield from iter_sdf(lines, str(source))
        return
    with Decompressed(source) as stream:
        for name, file in archived_files(stream, source):
            if name.endswith(".sdf"):
                where = f"{source}: {name}"
                yield from iter_sdf(lines_of(file, where), where)


def _dataset(source: Path, entries: Sequence[Entry], first: int, gaps: np.ndarray | None) -> MolecularDataset:
    """A piece; `first` is the number of its first molecule."""
    z = []
    for number, entry in enumerate(entries, first):
        unknown = [symbol for symbol in entry.symbols if symbol not in atomic_numbers or symbol == "X"]
        if unknown or not entry.symbols:
            what = f"has the element {unknown[0]!r}" if unknown else "has no atoms"
            raise FileFormatError(f"{source}: molecule {number} {what}; allowed are one or more chemical symbols")
        z += [atomic_numbers[symbol] for symbol in entry.symbols]
    return MolecularDataset(
        z=np.array(z, dtype=np.uint8),
        pos=np.array([x for entry in entries for x in entry.pos]).reshape(-1, 3),
        ptr=np.concatenate([[0], np.cumsum([len(entry.symbols) for entry in entries])]),
        targets={} if gaps is None else {"gap": gaps},  # eV in the table already
        ids=np.arange(first, first + len(entries)),
        card=PCQM4MV2,
        name="PCQM4Mv2",
    )


def _read_table(path: Path) -> tuple[np.ndarray, list[str]]:
    """Gaps in eV and SMILES of all molecules, in the order of their numbers."""
    import pandas as pd

    try:
        with Decompressed(path) if path.suffix == ".gz" else contextlib.nullcontext(path) as stream:
            table = pd.read_csv(stream, usecols=["idx", "smiles", "homolumogap"])
        gaps, numbers = table["homolumogap"].to_numpy(dtype=np.float64), table["idx"].to_numpy(dtype=np.int64)
    except (ValueError, OSError) as error:
        raise FileFormatError(f"{path} is not OGB's table with idx, smiles and homolumogap ({error})") from error
    wrong = np.flatnonzero(numbers != np.arange(len(numbers)))
    if len(wrong):
        raise FileFormatError(f"{path}: row {wrong[0]} has idx {numbers[wrong[0]]}; rows must be in order, from 0")
    return gaps, table["smiles"].tolist()


def _compare(source: Path, table: Any, first: int, entries: Sequence[Entry], smiles: Sequence[str]) -> None:
    """Raise DataError unless molecules have the heavy atoms of their SMILES: catches rows that are out of step."""
    for number, (entry, text) in enumerate(zip(entries, smiles, strict=True), first):
        found = Counter(symbol for symbol in entry.symbols if symbol != "H")
        stated = heavy_atoms(text)
        if found != stated:
            raise DataError(
                f"molecule {number} has the heavy atoms {_formula(found)} in {source}, but {text!r} in {table} has "
                f"{_formula(stated)}: the files do not belong together"
            )


def _formula(counts: Counter[str]) -> str:
    return "".join(f"{symbol}{counts[symbol]}" for symbol in sorted(counts)) or "none"


def heavy_atoms(smiles: str) -> Counter[str]:
    """How many atoms of each element but hydrogen a SMILES has."""
    symbols = (bracket or plain for bracket, plain in _SMILES_ATOM.findall(smiles))
    return Counter(symbol.capitalize() for symbol in symbols if symbol != "H")
