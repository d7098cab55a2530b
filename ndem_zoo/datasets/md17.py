"""MD17 and revised MD17: molecular dynamics of small molecules with DFT energies and forces.

`load_md17` finds or downloads a molecule's file, converts kcal/mol to eV, and splits it as TorchMD-NET does or by
rMD17's official lists. Files that the user has, subsets included, are read from `data_dir`. Checksums here were read in
public sources; where none was found, the entry says None.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ndem_zoo.datasets.base import MolecularDataset, split_indices
from ndem_zoo.datasets.files import DatasetCard, Download, RemoteFile, data_folder, fetch, find_file, read_npz
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError
from ndem_zoo.featurizers.base import as_numbers
from ndem_zoo.physics import KCAL_PER_MOL, MAX_Z

#: Molecules of MD17: stem of the official file name, and number of frames in the official file.
#: Frame counts: sizes of published test sets, consistent with each other; used for a warning about subsets only.
MD17_MOLECULES: dict[str, tuple[str, int]] = {
    "aspirin": ("md17_aspirin", 211_762),
    "benzene": ("md17_benzene2017", 627_983),
    "ethanol": ("md17_ethanol", 555_092),
    "malonaldehyde": ("md17_malonaldehyde", 993_237),
    "naphthalene": ("md17_naphthalene", 326_250),
    "salicylic": ("md17_salicylic", 320_231),
    "toluene": ("md17_toluene", 442_790),
    "uracil": ("md17_uracil", 133_770),
}

#: Molecules of rMD17: figshare's number of the file (article 12672038), its MD5 and its size in bytes.
RMD17_MOLECULES: dict[str, tuple[int, str, int]] = {
    "aspirin": (62265757, "17fd6fb69066888613f7e16b358a7553", 153_601_803),
    "azobenzene": (62265754, "be79df918468eb3579aa73a0becf7390", 175_180_782),
    "benzene": (62265739, "18c9242bc90fbf28215f6dd81e650f16", 88_801_794),
    "ethanol": (62265733, "eb837fb8deb27d4e0d52f71a03aff776", 67_201_791),
    "malonaldehyde": (62265736, "cdc1d70c0c34062ddde6e5071eb6fe21", 67_201_791),
    "naphthalene": (62265751, "0efba19c9907e3852318b1e6008b3b9e", 132_001_800),
    "paracetamol": (62265760, "ba10784f7b67635427085f6d7ec2dd97", 146_401_802),
    "salicylic": (62265748, "900fedf242da438400fa4293348d7dd1", 117_601_798),
    "toluene": (62265742, "0f2913d51f8149c90ab28d697a076f64", 110_401_797),
    "uracil": (62265745, "992a4479c28a07e0cce6da964805be31", 88_801_794),
}

#: rMD17's official splits: figshare's number of the file and its MD5.
RMD17_SPLITS: dict[str, tuple[int, str]] = {
    "index_train_01.csv": (62265793, "22264dcf2e42d6133362411abbbe4ce8"),
    "index_train_02.csv": (62265772, "28dbc9a3d5e7c47e653b1cc01809df35"),
    "index_train_03.csv": (62265775, "8de68b1b288c790e633c9d05ff5f04dd"),
    "index_train_04.csv": (62265766, "3764257abf8121a0905f364468ba83da"),
    "index_train_05.csv": (62265778, "4670362bd554c9c22581c936432236b3"),
    "index_test_01.csv": (62265781, "124c8a0849e84e244d6ce8424e1c05cf"),
    "index_test_02.csv": (62265769, "9dc098724c1680daca038b785ee4f602"),
    "index_test_03.csv": (62265787, "fd96f4623291dc23dd80b24dd634ca0b"),
    "index_test_04.csv": (62265790, "f0acce759fa4fe46b3a0b2a450e7e260"),
    "index_test_05.csv": (62265784, "4892da12e88a3c30c9a15f1f95e6eaac"),
}

RMD17_FRAMES = 100_000

#: Other names of the molecules.
ALIASES: dict[str, str] = {
    "salicylic_acid": "salicylic",
    "salicylicacid": "salicylic",
    "acetylsalicylic_acid": "aspirin",
    "benzene2017": "benzene",
    "benzene_2017": "benzene",
    "malondialdehyde": "malonaldehyde",
    "naphtalene": "naphthalene",
    "acetaminophen": "paracetamol",
    "methylbenzene": "toluene",
}

#: The authors' advice, from the README of the rMD17 archive.
RMD17_ADVICE = (
    "As the structures are taken from a molecular dynamics simulation (i.e. time series data), they are not guaranteed "
    "to be independent samples. [...] DO NOT train a model on more than 1000 samples from this dataset."
)

_FIGSHARE = "https://ndownloader.figshare.com/files/{}"
_MATERIALS_CLOUD = "https://archive.materialscloud.org/records/pfffs-fff86/files/rmd17.tar.bz2?download=1"
_SGDML = "https://sgdml.org/secure_proxy.php?file=data/npz/{}"

#: Folders below the data folder in which the files may lie, as the official archives unpack.
_SUBFOLDERS = {
    False: ("md17", "raw", "md17/raw"),
    True: ("rmd17/npz_data", "npz_data", "rmd17", "raw/rmd17/npz_data", "rmd17/raw/rmd17/npz_data"),
}

#: What the arrays are called in the files.
_KEYS = {
    False: {"z": "z", "pos": "R", "energy": "E", "forces": "F"},
    True: {"z": "nuclear_charges", "pos": "coords", "energy": "energies", "forces": "forces"},
}

_UNITS = {"positions": "Å", "energy": "kcal/mol", "forces": "kcal/mol/Å"}


class TooManyFramesWarning(DataWarning):
    """More training frames than the authors of rMD17 allow."""


def _md17_file(stem: str) -> RemoteFile:
    """An MD17 file, whose checksum nobody has published; older releases were called NAME_dft.npz."""
    old = stem.removeprefix("md17_") + "_dft.npz"
    return RemoteFile(urls=(_SGDML.format(f"{stem}.npz"),), aliases=(old,))


def _rmd17_file(molecule: str) -> RemoteFile:
    number, md5, size = RMD17_MOLECULES[molecule]
    return RemoteFile(
        urls=(_FIGSHARE.format(number),),
        md5=md5,
        size=size,
        archive="rmd17.tar.bz2",
        member=f"rmd17/npz_data/rmd17_{molecule}.npz",
    )


def _split_file(name: str) -> RemoteFile:
    number, md5 = RMD17_SPLITS[name]
    member = f"rmd17/splits/{name}"
    return RemoteFile(urls=(_FIGSHARE.format(number),), md5=md5, archive="rmd17.tar.bz2", member=member)


#: MD17. Url: kgcnn (sgdml.org). No official checksum found: people get the files themselves.
MD17 = DatasetCard(
    name="MD17",
    description="Ab initio molecular dynamics at 500 K of eight small molecules; the authors' energies and forces.",
    theory="PBE + vdW-TS",
    units=_UNITS,
    licence="none that could be read; subsets are redistributed under CC0",
    citation=(
        "S. Chmiela et al., Machine learning of accurate energy-conserving molecular force fields, "
        "Sci. Adv. 3, e1603015 (2017)",
        "S. Chmiela et al., Towards exact molecular dynamics simulations with machine-learned force fields, "
        "Nat. Commun. 9, 3887 (2018)",
    ),
    homepage="http://www.sgdml.org/#datasets",
    files={f"{stem}.npz": _md17_file(stem) for stem, _ in MD17_MOLECULES.values()},
)

#: rMD17. MD5 of the files: two independent public loaders give the same; of the archive: five, one with the sha256.
RMD17 = DatasetCard(
    name="rMD17",
    description="100,000 frames of each of ten MD17 molecules, energies and forces computed anew with tight settings.",
    theory="PBE/def2-SVP",
    units=_UNITS,
    licence="CC0 1.0",
    citation=(
        "A. S. Christensen and O. A. von Lilienfeld, On the role of gradients for machine learning of molecular energies "
        "and forces, Mach. Learn.: Sci. Technol. 1, 045018 (2020)",
    ),
    homepage="https://figshare.com/articles/dataset/Revised_MD17_dataset_rMD17_/12672038",
    files={
        **{f"rmd17_{molecule}.npz": _rmd17_file(molecule) for molecule in RMD17_MOLECULES},
        **{name: _split_file(name) for name in RMD17_SPLITS},
        "rmd17.tar.bz2": RemoteFile(
            urls=(_FIGSHARE.format(23950376), _MATERIALS_CLOUD),
            sha256="cddeea2ec2c4b22a9de16a9a65a3eeedac5b29da9c99c20bbff0153912bf922b",
            md5="cb1a927628d96f2e966025da4fb63d18",
            size=1_066_301_513,
        ),
    },
)


def load_md17(
    molecule: str,
    revised: bool = False,
    n_train: int | float = 950,
    n_valid: int | float = 50,
    seed: int = 1,
    data_dir: str | os.PathLike | None = None,
    download: Download = True,
    *,
    n_test: int | float | None = None,
    split: int | None = None,
) -> tuple[list[str], tuple[MolecularDataset, MolecularDataset, MolecularDataset], list]:
    """Load one molecule of MD17 or revised MD17, in eV and Å, split into training, validation and test data.

    Parameters
    ----------
    molecule
        One of aspirin, benzene, ethanol, malonaldehyde, naphthalene, salicylic, toluene, uracil; revised also azobenzene
        and paracetamol. Usual aliases work (``salicylic_acid``, ``benzene2017``, ``md17_aspirin``, ``revised ethanol``).
    revised
        True for rMD17.
    n_train, n_valid
        Numbers of frames, or fractions (default 950/50, the protocol of TorchMD-NET on MD17).
    seed
        Of the split ``numpy.random.default_rng(seed).permutation``.
    data_dir
        Folder with the file, or one above it as the official archives unpack; downloads go there too. Default: the
        environment variable NDEM_ZOO_DATA, else the user's cache folder. A file there is used as it is, with a warning
        when it is not the official one.
    download
        False: never touch the network. True: rMD17. ``"unverified"``: also MD17, whose checksums nobody has published: what
        comes over TLS is taken, and a warning tells its checksum.
    n_test
        Number or fraction of test frames; default: all the rest.
    split
        rMD17 only, 1 to 5: the official split, 1,000 training and 1,000 test frames. `n_train` and `n_valid` frames are
        drawn from the former.

    Returns
    -------
    tasks : list of str
        ``["energy", "forces"]``.
    datasets : (train, valid, test)
        Three `MolecularDataset`, energies (S,) in eV, forces (A, 3) in eV/Å.
    transformers : list
        Empty: nothing is normalized.

    Raises
    ------
    ConfigError
        For an unknown molecule or an impossible split.
    DataError
        If the file is not there and cannot be downloaded, holds NaN or arrays that do not fit together, or has too few
        frames.
    FileFormatError
        If the file is truncated or lacks an array.

    Warns
    -----
    DataWarning
        If the file is not the official one.
    TooManyFramesWarning
        If more than 1,000 frames of rMD17 are for training.
    """
    molecule, revised = canonical_name(molecule, revised)
    if split is not None:
        _check_split(split, revised)
    path = find_molecule(molecule, revised, data_dir, download)
    whole = read_md17(path, revised, name=f"{'rMD17' if revised else 'MD17'} {molecule}")
    if split is None:
        parts = split_indices(len(whole), n_train, n_valid, seed, n_test)
    else:
        parts = _official_split(path, split, len(whole), (n_train, n_valid, n_test), seed, data_dir, download)
    if revised and len(parts[0]) > 1000:
        message = f"training on {len(parts[0]):,} frames of rMD17; its authors say: {RMD17_ADVICE!r}"
        warnings.warn(message, TooManyFramesWarning, stacklevel=2)
    train, valid, test = (whole.select(part) for part in parts)
    return ["energy", "forces"], (train, valid, test), []


def canonical_name(molecule: str, revised: bool = False) -> tuple[str, bool]:
    """Official name of a molecule, and whether revised MD17 is meant (``"revised aspirin"``, ``"rmd17_aspirin"``).

    Raises
    ------
    ConfigError
        If there is no such molecule; lists those that there are.
    """
    name = "_".join(str(molecule).strip().lower().replace("-", " ").split())
    for prefix in ("rmd17_", "revised_", "md17_"):
        if name.startswith(prefix):
            name, revised = name.removeprefix(prefix), revised or prefix != "md17_"
    name = name.removesuffix(".npz").removesuffix("_dft")
    name = ALIASES.get(name, name)
    known = RMD17_MOLECULES if revised else MD17_MOLECULES
    if name in known:
        return name, revised
    if name in RMD17_MOLECULES:
        raise ConfigError(f"{name} is in revised MD17 only; pass revised=True")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    which = "rMD17" if revised else "MD17"
    raise ConfigError(f"{which} has no molecule {molecule!r}; it has {', '.join(sorted(known))}{hint}")


def find_molecule(
    molecule: str, revised: bool = False, data_dir: str | os.PathLike | None = None, download: Download = True
) -> Path:
    """Path of a molecule's file: the user's own, or a download; see `load_md17`."""
    molecule, revised = canonical_name(molecule, revised)
    file = f"rmd17_{molecule}.npz" if revised else f"{MD17_MOLECULES[molecule][0]}.npz"
    card = RMD17 if revised else MD17
    return fetch(card, file, data_dir, download, subfolders=_SUBFOLDERS[revised])


def read_md17(path: str | os.PathLike, revised: bool = False, name: str = "") -> MolecularDataset:
    """Read a whole file in the layout of MD17 or rMD17, in kcal/mol, into a dataset in eV.

    Parameters
    ----------
    path
        An npz file with ``z, R, E, F`` or, revised, ``nuclear_charges, coords, energies, forces``.
    revised
        Which of the two.
    name
        For reports.

    Raises
    ------
    FileFormatError
        If the file is truncated or lacks an array.
    DataError
        If arrays do not fit together or hold NaN; names the array, and the frame.
    """
    keys = _KEYS[revised]
    raw = read_npz(path, keys.values(), optional=("old_indices", "md5"))
    z, pos, energy, forces = (raw[keys[column]] for column in ("z", "pos", "energy", "forces"))
    n, size = check_shapes(path, keys, z, pos, energy, forces)
    pos, energy, forces = (
        as_numbers(f"{path}: {keys[column]}", values, np.float64)
        for column, values in (("pos", pos), ("energy", energy), ("forces", forces))
    )
    for key, values in ((keys["pos"], pos), (keys["energy"], energy), (keys["forces"], forces)):
        check_finite(path, key, values)
    _check_frames(path, name, n, revised)
    _check_own_md5(path, raw, keys)
    return MolecularDataset(
        z=np.tile(z.astype(np.uint8), n),
        pos=pos.reshape(n * size, 3),
        ptr=np.arange(n + 1) * size,
        # The only conversion of units: everything behind this line is in eV and Å.
        targets={
            "energy": energy.reshape(n) * KCAL_PER_MOL,
            "forces": forces.reshape(n * size, 3) * KCAL_PER_MOL,
        },
        ids=raw["old_indices"] if "old_indices" in raw and raw["old_indices"].shape == (n,) else None,
        card=RMD17 if revised else MD17,
        name=name,
    )


def check_shapes(path: Any, keys: dict[str, str], z: Any, pos: Any, energy: Any, forces: Any) -> tuple[int, int]:
    """Numbers of frames and atoms, if the arrays fit together; DataError otherwise.

    `z` is (n,), `pos` in Å and `forces` are (frames, n, 3), `energy` is (frames,) or (frames, 1).
    """
    if z.ndim != 1 or not np.issubdtype(z.dtype, np.integer):
        raise DataError(
            f"{path}: {keys['z']} has shape {z.shape} and dtype {z.dtype}; needed are integers of shape (n,)"
        )
    if len(z) == 0:
        raise DataError(f"{path}: {keys['z']} is empty; needed is one or more atoms")
    bad = np.flatnonzero((z < 1) | (z > MAX_Z))
    if len(bad):
        raise DataError(f"{path}: atom {bad[0]} has atomic number {z[bad[0]]}; allowed are 1 to {MAX_Z}")
    if pos.ndim != 3 or pos.shape[1:] != (len(z), 3):
        raise DataError(f"{path}: {keys['pos']} has shape {pos.shape}; {len(z)} atoms need (frames, {len(z)}, 3)")
    if forces.shape != pos.shape:
        raise DataError(
            f"{path}: {keys['forces']} has shape {forces.shape}; {keys['pos']} has {pos.shape}, both must agree"
        )
    if energy.shape not in ((len(pos),), (len(pos), 1)):
        raise DataError(
            f"{path}: {keys['energy']} has shape {energy.shape}; {len(pos)} frames need ({len(pos)},) or (..., 1)"
        )
    return len(pos), len(z)


def check_finite(path: Any, key: str, values: np.ndarray) -> None:
    """Raise DataError if an array (frames, ...) is not finite; names the frame."""
    bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if len(bad):
        raise DataError(
            f"{path}: {key} of structure {bad[0]} is not finite; {len(bad)} of {len(values)} frames are bad"
        )


def _check_frames(path: Any, name: str, n: int, revised: bool) -> None:
    """Warn about a file that must be a subset of the official one, going by its number of frames."""
    if revised:
        return  # the checksum has told
    official = {f"MD17 {molecule}": frames for molecule, (_, frames) in MD17_MOLECULES.items()}.get(name)
    if official is not None and n != official:
        warnings.warn(
            f"{path} is not the official file of {name}: it has {n:,} frames, the official one has {official:,}, so its "
            "checksum is not the official one. It is used as it is; results on it are not comparable with published ones.",
            DataWarning,
            stacklevel=4,
        )


def _check_own_md5(path: Any, raw: dict[str, np.ndarray], keys: dict[str, str]) -> None:
    """Warn if the contents do not match the checksum that sGDML's files carry of themselves."""
    if "md5" not in raw or raw["md5"].ndim != 0:
        return
    stored = raw["md5"].item()
    stored = stored.decode(errors="replace") if isinstance(stored, bytes) else str(stored)
    digest = hashlib.md5(usedforsecurity=False)
    for column in ("z", "pos", "energy", "forces"):
        array = np.ascontiguousarray(raw[keys[column]]).reshape(-1)
        digest.update(hashlib.md5(array, usedforsecurity=False).digest())
    if digest.hexdigest() != stored.strip():
        warnings.warn(
            f"the contents of {path} do not match the checksum that it carries ({stored}): it was changed or damaged",
            DataWarning,
            stacklevel=4,
        )


def _check_split(split: int, revised: bool) -> None:
    if not revised:
        raise ConfigError(f"split={split!r}: only revised MD17 has official splits; pass revised=True")
    if split not in (1, 2, 3, 4, 5) or isinstance(split, bool):
        raise ConfigError(f"split={split!r}; allowed are 1, 2, 3, 4, 5")


def _official_split(
    path: Path, split: int, n: int, sizes: tuple, seed: int, data_dir: Any, download: Download
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the official split; training and validation share its training list, shuffled by `seed`."""
    train = _read_split(path, f"index_train_0{split}.csv", n, data_dir, download)
    test = _read_split(path, f"index_test_0{split}.csv", n, data_dir, download)
    n_train, n_valid, n_test = sizes
    first, second, _ = split_indices(len(train), n_train, n_valid, seed)
    if n_test is not None:
        keep, _, _ = split_indices(len(test), n_test, 0, seed)
        test = test[np.sort(keep)]
    return train[first], train[second], test


def _read_split(path: Path, name: str, n: int, data_dir: Any, download: Download) -> np.ndarray:
    """Row numbers from a split file beside the data, in the data folder, or downloaded."""
    beside = find_file(path.parent, (name,), ("splits", "../splits"))
    folder = beside.parent if beside is not None else data_folder(data_dir)
    file = fetch(RMD17, name, folder, download, subfolders=("rmd17/splits", "splits"), warn=n == RMD17_FRAMES)
    try:
        rows = np.loadtxt(file, dtype=np.int64, ndmin=1)
    except ValueError as error:
        raise FileFormatError(f"{file} is not a list of row numbers, one per line ({error})") from error
    if len(rows) == 0 or len(np.unique(rows)) != len(rows):
        raise FileFormatError(f"{file} has {len(rows)} rows, {len(np.unique(rows))} of them different; all must be")
    if rows.min() < 0 or rows.max() >= n:
        raise DataError(
            f"{file} names row {rows.max()}, but {path} has {n:,} frames: the list belongs to another file (the official "
            f"lists belong to the official files of {RMD17_FRAMES:,} frames)"
        )
    return rows
