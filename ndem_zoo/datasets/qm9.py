"""QM9: 130,831 small organic molecules at equilibrium, with twelve properties from DFT.

`load_qm9` finds or downloads the official archive, reads it once into memory-mapped columns, drops the molecules whose
geometries are not those of their formulas, and splits. Two other layouts that are around are read as well. Numbers are
converted here, once, to the units of `ndem_zoo.properties`: totals, not atomization energies. Checksums, addresses and
the constants of the atoms are those of the data's figshare collection (978904), as several public loaders agree on them.
"""

from __future__ import annotations

import difflib
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import units
from ase.data import atomic_numbers

from ndem_zoo.checkpoint import file_digest
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.cache import open_cached
from ndem_zoo.datasets.files import (
    MAX_SMALL_FILE,
    DatasetCard,
    Decompressed,
    RemoteFile,
    archived_files,
    data_folder,
    fetch,
    find_file,
    read_npz,
)
from ndem_zoo.datasets.sdf import iter_sdf
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError
from ndem_zoo.featurizers.base import as_numbers

#: What can be learned, in the order of the official files, with the unit there.
QM9_TARGETS: dict[str, str] = {
    "mu": "D",
    "alpha": "a0³",
    "homo": "Hartree",
    "lumo": "Hartree",
    "gap": "Hartree",
    "r2": "a0²",
    "zpve": "Hartree",
    "U0": "Hartree",
    "U": "Hartree",
    "H": "Hartree",
    "G": "Hartree",
    "Cv": "cal/mol/K",
}

#: Rotational constants in GHz: extras, never converted.
ROTATIONAL = ("A", "B", "C")

#: What the official files hold of each molecule, in this order.
COLUMNS = (*ROTATIONAL, *QM9_TARGETS)

#: Names that other packages use (SchNetPack, PyG, MoleculeNet, the papers), in lower case.
ALIASES: dict[str, str] = {
    "dipole": "mu",
    "dipole_moment": "mu",
    "polarizability": "alpha",
    "isotropic_polarizability": "alpha",
    "e_homo": "homo",
    "epsilon_homo": "homo",
    "e_lumo": "lumo",
    "epsilon_lumo": "lumo",
    "e_gap": "gap",
    "delta_epsilon": "gap",
    "homo_lumo_gap": "gap",
    "electronic_spatial_extent": "r2",
    "zero_point_energy": "zpve",
    "u_0": "U0",
    "energy": "U0",
    "energy_u0": "U0",
    "energy_u": "U",
    "u298": "U",
    "u_298": "U",
    "enthalpy": "H",
    "enthalpy_h": "H",
    "h298": "H",
    "free_energy": "G",
    "free_g": "G",
    "g298": "G",
    "c_v": "Cv",
    "heat_capacity": "Cv",
}

#: Molecules in the official files, and how many of them are uncharacterized.
N_MOLECULES, N_UNCHARACTERIZED = 133_885, 3_054

#: Energies of the free atoms in Hartree at the level of theory of the molecules, and heat capacities in cal/mol/K:
#: the table atomref.txt of the collection.
_ATOMS = {
    "U0": {"H": -0.500273, "C": -37.846772, "N": -54.583861, "O": -75.064579, "F": -99.718730},
    "U": {"H": -0.498857, "C": -37.845355, "N": -54.582445, "O": -75.063163, "F": -99.717314},
    "H": {"H": -0.497912, "C": -37.844411, "N": -54.581501, "O": -75.062219, "F": -99.716370},
    "G": {"H": -0.510927, "C": -37.861317, "N": -54.598897, "O": -75.079532, "F": -99.733544},
    "Cv": dict.fromkeys("HCNOF", 2.981),
}

#: Energies of atomization that molecules have, in Hartree per atom: QM9's U0 lie between -0.20 and -0.11. Others mean
#: another unit, or energies that are none of totals.
_ATOMIZATION = (-0.3, 0.0)

#: Changes whenever what is cached is to be made anew.
_FORMAT = 1

_FIGSHARE = (
    "https://ndownloader.figshare.com/files/{}",
    "https://springernature.figshare.com/ndownloader/files/{}",
    "https://api.figshare.com/v2/file/download/{}",
)
_ARCHIVE, _SDF, _CSV, _LIST = "dsgdb9nsd.xyz.tar.bz2", "gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"

#: Folders below the data folder in which the files may lie.
_SUBFOLDERS = ("qm9", "raw", "qm9/raw")

_CSV_NAMES = {"U0": "u0", "U": "u298", "H": "h298", "G": "g298", "Cv": "cv"}


def _figshare(number: int, md5: str, size: int, aliases: tuple[str, ...] = ()) -> RemoteFile:
    return RemoteFile(tuple(url.format(number) for url in _FIGSHARE), md5=md5, size=size, aliases=aliases)


def _unit_factor(unit: str) -> float:
    """What a number of a file is multiplied by; the only conversion."""
    return units.Hartree if unit == "Hartree" else 1.0


#: QM9. MD5 and sizes as figshare gives them; three public loaders agree on each.
QM9 = DatasetCard(
    name="QM9",
    description="Equilibrium geometries and properties of organic molecules with up to nine of C, N, O, F.",
    theory="B3LYP/6-31G(2df,p)",
    units={"positions": "Å", **QM9_TARGETS, **dict.fromkeys(ROTATIONAL, "GHz")},
    licence="none that could be read with the files; the loader of load-atoms states CC0",
    citation=(
        "R. Ramakrishnan et al., Quantum chemistry structures and properties of 134 kilo molecules, "
        "Sci. Data 1, 140022 (2014)",
        "L. Ruddigkeit et al., Enumeration of 166 billion organic small molecules in the chemical universe database "
        "GDB-17, J. Chem. Inf. Model. 52, 2864 (2012)",
    ),
    homepage="https://doi.org/10.6084/m9.figshare.c.978904",
    files={
        _ARCHIVE: _figshare(3195389, "ad1ebd51ee7f5b3a6e32e974e5d54012", 86_144_227),
        _LIST: _figshare(3195404, "a361887bacb427b8a0ce7903d92a53b4", 486_752, ("uncharacterized_indices.txt",)),
    },
    atom_references={
        target: {symbol: value * _unit_factor(QM9_TARGETS[target]) for symbol, value in atoms.items()}
        for target, atoms in _ATOMS.items()
    },
)


def load_qm9(
    target: str | Sequence[str] | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
    n_train: int | float = 110_000,
    n_valid: int | float = 10_000,
    n_test: int | float | None = None,
    seed: int = 1,
    uncharacterized: str | os.PathLike = "drop",
    cache_dir: str | os.PathLike | None = None,
) -> tuple[list[str], tuple[MolecularDataset, MolecularDataset, MolecularDataset], list]:
    """Load QM9, in eV and Å, split into training, validation and test data.

    Parameters
    ----------
    target
        One of mu (D), alpha (a0³), homo, lumo, gap (eV), r2 (a0²), zpve, U0, U, H, G (eV), Cv (cal/mol/K), or several, in
        a list or separated by commas. None: all twelve.
    data_dir
        Folder with the files, or one above it, or one file: ``dsgdb9nsd.xyz.tar.bz2`` (downloaded where it is missing),
        ``gdb9.sdf`` beside ``gdb9.sdf.csv``, or an npz file with ``id N Z R A B C mu ... Cv`` in the official units (in a
        folder: ``qm9.npz``).
        Default: the environment variable NDEM_ZOO_DATA, else the user's cache folder.
    download
        False: never touch the network.
    n_train, n_valid
        Numbers of molecules, or fractions (default 110,000 and 10,000, the protocol of TorchMD-NET).
    n_test
        Number or fraction of test molecules; default: all the rest.
    seed
        Of the split ``numpy.random.default_rng(seed).permutation``, over the molecules sorted by their numbers.
    uncharacterized
        What to do with the 3,054 molecules whose geometries belong to other formulas than their own: ``"drop"`` them, with
        the official list, or ``"keep"`` them; or the path of the list.
    cache_dir
        Where the memory-mapped columns go that the files are read into once; default: the data folder that is the default of
        `data_dir`.

    Returns
    -------
    tasks : list of str
        Names of the targets.
    datasets : (train, valid, test)
        Three `MolecularDataset`. Extras: A, B, C, the rotational constants in GHz, and, from the official archive,
        ``smiles``, those of GDB-17. Ids are the numbers of the molecules, from 1.
    transformers : list
        Empty: nothing is normalized.

    Raises
    ------
    ConfigError
        For an unknown target; names the right one.
    DataError
        If the files are not there and cannot be downloaded, do not fit together, hold other units than they should, or have
        too few molecules for the split.
    FileFormatError
        If a file is truncated or damaged; names the molecule.

    Warns
    -----
    DataWarning
        If a file is not the official one.

    Notes
    -----
    QM9 has no forces. Energies are totals; ``card.atom_references`` holds the energies of the free atoms, so that
    ``U0 - sum(references)`` is the energy of atomization. Coordinates in ``gdb9.sdf`` have four decimals only.
    """
    targets = _targets_of(target)
    source = find_qm9(data_dir, download)
    drop = _find_list(source, uncharacterized, data_dir, download)
    whole = open_qm9(source, drop, cache_dir=cache_dir).with_targets(targets)
    try:
        parts = whole.split(n_train, n_valid, seed, n_test)
    except DataError as error:
        raise DataError(
            f"{source}: {error}; give n_train= and n_valid= that fit, as counts or as fractions such as 0.8 and 0.1"
        ) from error
    return targets, parts, []


def canonical_target(name: str) -> str:
    """A target's name, if it is one.

    Raises
    ------
    ConfigError
        If it is not; says what it is called here, or lists the targets.
    """
    if name in QM9_TARGETS:
        return name
    lower = {target.lower(): target for target in QM9_TARGETS}
    meant = ALIASES.get(str(name).lower(), lower.get(str(name).lower()))
    if meant is not None:
        raise ConfigError(f"QM9's target {name!r} is called {meant!r} here")
    near = difflib.get_close_matches(str(name), [*QM9_TARGETS, *ALIASES], n=1)
    hint = f"; did you mean {ALIASES.get(near[0], near[0])!r}?" if near else ""
    raise ConfigError(f"QM9 has no target {name!r}; it has {', '.join(QM9_TARGETS)}{hint}")


def _targets_of(target: str | Sequence[str] | None) -> list[str]:
    """Names of the targets that were asked for, each once."""
    if target is None or target in ("", "all"):
        return list(QM9_TARGETS)
    names = target.split(",") if isinstance(target, str) else list(target)
    if not names:
        raise ConfigError(f"target={target!r} names no target; QM9 has {', '.join(QM9_TARGETS)}, and None means all")
    return list(dict.fromkeys(canonical_target(name.strip() if isinstance(name, str) else name) for name in names))


# -------------------------------------------------------------------------------------------------------------- files


def find_qm9(data_dir: str | os.PathLike | None = None, download: bool = True) -> Path:
    """Path of QM9's file: the user's own in any of the three layouts, or a download of the official archive."""
    folder = data_folder(data_dir)
    if folder.is_file():
        return fetch(QM9, _ARCHIVE, folder.parent) if folder.name == _ARCHIVE else folder
    own = find_file(folder, (_ARCHIVE, _SDF, "qm9.npz"), _SUBFOLDERS)
    if own is not None and own.name != _ARCHIVE:
        return own
    return fetch(QM9, _ARCHIVE, data_dir, download, subfolders=_SUBFOLDERS)


def _find_list(source: Path, choice: str | os.PathLike, data_dir: Any, download: bool) -> Path | None:
    """Path of the list of uncharacterized molecules; None if they are to be kept."""
    if choice == "keep":
        return None
    if choice != "drop":
        path = Path(choice).expanduser()
        if not path.is_file():
            raise ConfigError(f"uncharacterized={str(choice)!r}; allowed are 'drop', 'keep' and the path of a list")
        return path
    names = (_LIST, *QM9.files[_LIST].aliases)
    beside = find_file(source.parent, names, (*_SUBFOLDERS, "..", "../raw"))
    if beside is not None:
        return fetch(QM9, _LIST, beside.parent) if beside.name == _LIST else beside
    try:
        folder = source.parent if data_dir is not None and Path(data_dir).is_file() else data_dir
        return fetch(QM9, _LIST, folder, download, subfolders=_SUBFOLDERS)
    except DataError as error:
        raise DataError(
            f"which {N_UNCHARACTERIZED:,} molecules of QM9 to drop is not known: {error}; uncharacterized='keep' keeps them, "
            "and uncharacterized=PATH names the list"
        ) from error


def read_uncharacterized(path: str | os.PathLike) -> np.ndarray:
    """Numbers of the uncharacterized molecules: (M,) int64, from the official table or one number per line.

    Raises
    ------
    FileFormatError
        If there are none, or they cannot be numbers of molecules.

    Warns
    -----
    DataWarning
        If there are not 3,054.
    """
    rows = [line.split() for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines()]
    # The official table has a header, a rule at its end, and the number in front of two SMILES and a distance.
    numbers = np.array([int(words[0]) for words in rows if words and words[0].isdecimal()], dtype=np.int64)
    if not len(numbers) or numbers.min() < 1 or numbers.max() > N_MOLECULES or len(np.unique(numbers)) != len(numbers):
        raise FileFormatError(f"{path} is no list of numbers of molecules, each once, from 1 to {N_MOLECULES}")
    if len(numbers) != N_UNCHARACTERIZED:
        message = (
            f"{path} lists {len(numbers):,} uncharacterized molecules; the official list has {N_UNCHARACTERIZED:,}"
        )
        warnings.warn(message, DataWarning, stacklevel=2)
    return np.sort(numbers)


def open_qm9(
    source: str | os.PathLike, drop: str | os.PathLike | None, *, cache_dir: str | os.PathLike | None = None
) -> MolecularDataset:
    """All molecules of a file, memory-mapped; the file is read only if that was not done before.

    Parameters
    ----------
    source
        Of one of the three layouts; see `load_qm9`.
    drop
        List of molecules to leave out, or None.
    cache_dir
        See `load_qm9`.
    """
    source = Path(source)
    table = _table_of(source) if source.suffix == ".sdf" else None
    inputs = [path for path in (source, table, drop) if path is not None]
    key = {"format": _FORMAT, "files": [file_digest(path) for path in inputs], "drop": drop is not None}
    # Choice: SMILES of QM9 have up to 29 characters.
    return open_cached("QM9", key, lambda: [read_qm9(source, drop)], card=QM9, cache_dir=cache_dir, string_width=32)


# ------------------------------------------------------------------------------------------------------------ reading


def read_qm9(source: str | os.PathLike, drop: str | os.PathLike | None = None) -> MolecularDataset:
    """Read all molecules of a file into memory, sorted by their numbers, with all targets; see `load_qm9`.

    Raises
    ------
    FileFormatError
        If the file is damaged, or in none of the three layouts.
    DataError
        If numbers do not fit together, or are in another unit.
    """
    source = Path(source)
    raw = _read_raw(source)
    _check_raw(source, raw)
    keep = np.ones(len(raw.ids), bool) if drop is None else ~np.isin(raw.ids, read_uncharacterized(drop))
    if not keep.any():
        raise DataError(f"{source}: all of its {len(keep):,} molecules are uncharacterized")
    order = np.argsort(raw.ids, kind="stable")
    whole = MolecularDataset(
        z=raw.z,
        pos=raw.pos,
        ptr=np.concatenate([[0], np.cumsum(raw.counts)]),
        # The only conversion of units: everything behind this line is in eV and Å.
        targets={name: raw.columns[name] * _unit_factor(unit) for name, unit in QM9_TARGETS.items()},
        ids=raw.ids,
        extras={name: raw.columns[name] for name in ROTATIONAL}
        | ({} if raw.smiles is None else {"smiles": raw.smiles}),
        card=QM9,
        name="QM9",
    )
    chosen = order[keep[order]]
    return whole if len(chosen) == len(whole) and (np.diff(chosen) == 1).all() else whole.select(chosen)


class _Raw(NamedTuple):
    """Columns of a file, in its own units and order."""

    ids: np.ndarray
    counts: np.ndarray
    z: np.ndarray
    pos: np.ndarray
    columns: Mapping[str, np.ndarray]
    smiles: np.ndarray | None


class _Molecule(NamedTuple):
    number: int
    symbols: list[str]
    pos: list[float]
    values: list[float]
    smiles: str


def _read_raw(source: Path) -> _Raw:
    name = source.name
    if name.endswith(".npz"):
        return _read_flat(source)
    if name.endswith(".sdf"):
        return _collect(_iter_sdf(source), source, with_smiles=False)
    if name.endswith(".tar.bz2"):
        return _collect(_iter_archive(source), source, with_smiles=True)
    raise FileFormatError(f"{source} is no file of QM9: allowed are *.xyz.tar.bz2, *.sdf with *.sdf.csv, and *.npz")


def _collect(molecules: Iterable[_Molecule], source: Path, with_smiles: bool) -> _Raw:
    """Put molecules side by side in flat arrays, without keeping an object for each."""
    ids, counts, z = array("q"), array("q"), array("B")
    pos, values, smiles = array("d"), array("d"), []
    elements = {symbol: atomic_numbers[symbol] for symbol in _ATOMS["U0"]}
    for molecule in molecules:
        try:
            z.extend([elements[symbol] for symbol in molecule.symbols])
        except KeyError as error:
            raise FileFormatError(
                f"{source}: molecule {molecule.number} has the element {error.args[0]!r}; allowed are H, C, N, O, F"
            ) from None
        ids.append(molecule.number)
        counts.append(len(molecule.symbols))
        pos.extend(molecule.pos)
        values.extend(molecule.values)
        smiles.append(molecule.smiles)
    table = np.array(values, dtype=np.float64).reshape(len(ids), len(COLUMNS))
    return _Raw(
        np.array(ids, dtype=np.int64),
        np.array(counts, dtype=np.int64),
        np.array(z, dtype=np.uint8),
        np.array(pos, dtype=np.float64).reshape(-1, 3),
        {name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(COLUMNS)},
        np.array(smiles) if with_smiles and smiles else None,
    )


def _iter_archive(source: Path) -> Iterator[_Molecule]:
    """Molecules of the official archive, which is streamed and never unpacked."""
    # bz2's own reader notices wherever an archive is cut off; tarfile alone ends quietly between members.
    with Decompressed(source) as stream:
        for name, file in archived_files(stream, source, MAX_SMALL_FILE):
            yield _read_xyz(file.read().decode("ascii", errors="replace"), f"{source}: {name}")


def _read_xyz(text: str, where: str) -> _Molecule:
    """One molecule in the extended format of the official archive.

    Number of atoms; ``gdb``, its number and 15 properties; element, position and charge of each atom; frequencies; SMILES of
    GDB-17 and of the relaxed geometry; InChI.
    """
    # Pitfall: some numbers are written by Mathematica, such as 7.9254*^-6.
    lines = text.replace("*^", "e").splitlines()
    try:
        n = int(lines[0])
        tag, number, *properties = lines[1].split()
        atoms = [line.split() for line in lines[2 : 2 + n]]
        values = [float(word) for word in properties]
        pos = [float(word) for atom in atoms for word in atom[1:4]]
        smiles = lines[3 + n].split()[0]
        is_right = tag == "gdb" and len(values) == len(COLUMNS) and all(len(atom) == 5 for atom in atoms)
        if not is_right or len(atoms) != n:
            raise ValueError(f"{len(atoms)} lines of atoms of {n}, {len(values)} properties of {len(COLUMNS)}")
        return _Molecule(int(number), [atom[0] for atom in atoms], pos, values, smiles)
    except (ValueError, IndexError) as error:
        raise FileFormatError(f"{where} is not in QM9's format ({error})") from error


def _table_of(source: Path) -> Path:
    """The table that belongs to an SD file.

    Raises
    ------
    DataError
        If it is not there.
    """
    path = source.with_name(f"{source.name}.csv")
    if not path.is_file():
        raise DataError(f"{source} has no {path.name} beside it, which holds the properties")
    return path


def _iter_sdf(source: Path) -> Iterator[_Molecule]:
    """Molecules of the SD file with the properties of the table, whose names must agree, line by line."""
    import pandas as pd

    path = _table_of(source)
    try:
        table = pd.read_csv(path)
        names = [_CSV_NAMES.get(name, name) for name in COLUMNS]
        ids, values = table["mol_id"].astype(str).to_numpy(), table[names].to_numpy(dtype=np.float64)
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not MoleculeNet's table of QM9 ({error})") from error
    n = -1
    with open(source, encoding="ascii", errors="replace") as lines:
        for n, entry in enumerate(iter_sdf(lines, str(source))):
            if n >= len(ids) or entry.title != ids[n]:
                other = repr(ids[n]) if n < len(ids) else "nothing"
                raise DataError(f"molecule {n} is {entry.title!r} in {source} and {other} in {path}; they must agree")
            yield _Molecule(_number(entry.title, source), entry.symbols, entry.pos, values[n].tolist(), "")
    if n + 1 != len(ids):
        raise DataError(f"{source} has {n + 1:,} molecules, {path} has {len(ids):,}; they must agree")


def _number(title: str, source: Path) -> int:
    """Number of a molecule from its name ``gdb_17``."""
    prefix, _, number = title.partition("_")
    if prefix != "gdb" or not number.isdecimal():
        raise FileFormatError(f"{source} has a molecule of the name {title!r}; needed are names such as 'gdb_17'")
    return int(number)


def _read_flat(source: Path) -> _Raw:
    """The flat layout: atoms of all molecules one after the other."""
    raw = read_npz(source, ("id", "N", "Z", "R", *COLUMNS), ("smiles",))
    for name in ("id", "N", "Z"):
        if raw[name].dtype.kind not in "iu" or raw[name].ndim != 1:
            shape, dtype = raw[name].shape, raw[name].dtype
            raise DataError(f"{source}: {name} has shape {shape} and dtype {dtype}; needed are integers of shape (n,)")
    n, n_atoms = len(raw["id"]), len(raw["Z"])
    shapes = {"N": (n,), "Z": (n_atoms,), "R": (n_atoms, 3), **dict.fromkeys(COLUMNS, (n,))}
    for name, shape in shapes.items():
        if raw[name].shape != shape:
            raise DataError(
                f"{source}: {name} has shape {raw[name].shape}; {n} molecules of {n_atoms} atoms need {shape}"
            )
    counts = raw["N"].astype(np.int64)
    if counts.sum() != n_atoms or (counts < 1).any():
        raise DataError(f"{source}: N adds up to {counts.sum()} atoms, but Z has {n_atoms}; all must be positive")
    columns = {name: as_numbers(f"{source}: {name}", raw[name], np.float64) for name in COLUMNS}
    unknown = np.flatnonzero(~np.isin(raw["Z"], [atomic_numbers[symbol] for symbol in _ATOMS["U0"]]))
    if len(unknown):
        raise DataError(
            f"{source}: atom {unknown[0]} has atomic number {raw['Z'][unknown[0]]}; allowed are 1, 6, 7, 8, 9"
        )
    smiles = raw.get("smiles")
    pos = as_numbers(f"{source}: R", raw["R"], np.float64)
    return _Raw(raw["id"].astype(np.int64), counts, raw["Z"].astype(np.uint8), pos, columns, smiles)


def _check_raw(source: Path, raw: _Raw) -> None:
    """Raise unless numbers are finite, ids are different, and energies are totals in Hartree."""
    if not len(raw.ids):
        raise FileFormatError(f"{source} holds no molecules")
    if len(np.unique(raw.ids)) != len(raw.ids) or raw.ids.min() < 1:
        values, times = np.unique(raw.ids, return_counts=True)
        raise DataError(
            f"{source}: molecule {values[times.argmax()]} is there {times.max()} times; each must be there once"
        )
    owner = np.repeat(np.arange(len(raw.ids)), raw.counts)
    bad = ~np.isfinite(raw.pos).all(axis=1)
    if bad.any():
        raise DataError(f"{source}: a position of molecule {raw.ids[owner[bad][0]]} is not finite")
    for name, values in raw.columns.items():
        if not np.isfinite(values).all():
            raise DataError(f"{source}: {name} of molecule {raw.ids[~np.isfinite(values)][0]} is not finite")
    for target in ("U0", "U", "H", "G"):
        _check_totals(source, raw, target, owner)


def _check_totals(source: Path, raw: _Raw, target: str, owner: np.ndarray) -> None:
    """Raise unless energies of atomization are what those of molecules are: catches eV, and atomization energies."""
    table = np.zeros(10)
    for symbol, value in _ATOMS[target].items():
        table[atomic_numbers[symbol]] = value
    per_atom = (raw.columns[target] - np.bincount(owner, table[raw.z], len(raw.ids))) / raw.counts
    low, high = _ATOMIZATION
    bad = np.flatnonzero((per_atom < low) | (per_atom > high))
    if len(bad):
        i = bad[0]
        raise DataError(
            f"{source}: {target} of molecule {raw.ids[i]} is {raw.columns[target][i]:.6g}, which would be an energy of "
            f"atomization of {per_atom[i]:.3g} Hartree per atom; allowed is {low} to {high}. Needed are total energies in "
            "Hartree, no energies of atomization, and no eV"
        )
