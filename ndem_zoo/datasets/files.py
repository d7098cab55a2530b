"""Files of datasets: what they are (`DatasetCard`), where they come from (`fetch`), and how they are read (`read_npz`).

A file that the user has is taken as it is, with a warning when it is not the official one; a file that is downloaded
must have the official checksum. Nothing here knows what the numbers mean, and nothing is unpickled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from ndem_zoo.checkpoint import file_digest
from ndem_zoo.errors import DataError, DataWarning, FileFormatError

#: Environment variable with the folder for downloads.
DATA_FOLDER_VARIABLE = "NDEM_ZOO_DATA"

#: Pitfall: figshare refuses requests that do not name a browser.
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; ndem_zoo)"}


@dataclass(frozen=True)
class RemoteFile:
    """Where one file can be downloaded, and how to recognize it.

    Attributes
    ----------
    urls
        Mirrors, tried in this order.
    sha256, md5
        Official checksums, as far as they are known; None is "not known", never a guess.
    size
        Bytes of the official file, if known.
    aliases
        Other names under which the same file is around.
    archive, member
        Name (in the same card) of an archive that holds the file too, and the path in it: the last resort.
    """

    urls: tuple[str, ...]
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None
    aliases: tuple[str, ...] = ()
    archive: str | None = None
    member: str | None = None

    @property
    def checksum(self) -> str | None:
        """The stronger of the known checksums as ``"algorithm:digest"``; None if none is known."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        return f"md5:{self.md5}" if self.md5 else None

    def is_official(self, path: str | os.PathLike) -> bool | None:
        """Whether `path` has the official content; None when no checksum is known."""
        if self.checksum is None:
            return None
        if self.size is not None and os.path.getsize(path) != self.size:
            return False
        algorithm, _, digest = self.checksum.partition(":")
        return file_digest(path, algorithm) == digest


@dataclass(frozen=True)
class DatasetCard:
    """What a user of a dataset must know.

    Attributes
    ----------
    name, description
        What it is.
    theory
        Level of theory of the labels.
    units
        Units in the raw files, by quantity; in memory everything is eV and Å.
    licence
        Licence of the data, or that none is known.
    citation
        What to cite.
    homepage
        Where it is described.
    files
        Its files by official name.
    atom_references
        Values of the free atoms at the level of theory of the labels, by target and chemical symbol, in the target's unit
        in memory (eV for energies).
    """

    name: str
    description: str
    theory: str
    units: Mapping[str, str]
    licence: str
    citation: tuple[str, ...]
    homepage: str = ""
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    atom_references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def data_folder(data_dir: str | os.PathLike | None = None) -> Path:
    """Folder for data: `data_dir`, else the environment variable NDEM_ZOO_DATA, else the user's cache folder."""
    if data_dir is not None:
        return Path(data_dir).expanduser()
    if os.environ.get(DATA_FOLDER_VARIABLE):
        return Path(os.environ[DATA_FOLDER_VARIABLE]).expanduser()
    import pooch

    return Path(pooch.os_cache("ndem_zoo"))


def fetch(
    card: DatasetCard,
    file: str,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
    *,
    subfolders: Sequence[str] = (),
    warn: bool = True,
) -> Path:
    """Path of a dataset's file: the user's own copy if there is one, a download otherwise.

    Parameters
    ----------
    card
        The dataset.
    file
        Official name of the file.
    data_dir
        Folder that is searched, and that downloads go to; default see `data_folder`. It may be the folder of the file
        or one above it (`subfolders`).
    download
        False: never touch the network.
    subfolders
        Folders below `data_dir` that may hold the file, as in the official archive.
    warn
        Whether to warn about a file that is not the official one.

    Returns
    -------
    path
        An existing file.

    Raises
    ------
    DataError
        If the file is not there and cannot be downloaded, or every download had a wrong checksum; says which file to
        put where. A download with a wrong checksum is deleted.
    """
    remote = card.files[file]
    folder = data_folder(data_dir)
    found = find_file(folder, (file, *remote.aliases), subfolders)
    if found is not None:
        if warn and remote.is_official(found) is False:
            warnings.warn(
                f"{found} is not the official {file} of {card.name}: its checksum differs from {remote.checksum}. "
                "It is used as it is; results on it are not comparable with published ones.",
                DataWarning,
                stacklevel=3,
            )
        return found
    if not download:
        raise DataError(
            f"{file} of {card.name} is not in {folder}, and download=False; {_advice(remote, file, folder)}"
        )
    return _download(card, file, folder)


def find_file(folder: Path, names: Iterable[str], subfolders: Sequence[str] = ()) -> Path | None:
    """The first existing file among `names`, in `folder` and then in its `subfolders`."""
    for place in (folder, *(folder / sub for sub in subfolders)):
        for name in names:
            if (place / name).is_file():
                return place / name
    return None


def _advice(remote: RemoteFile, file: str, folder: Path) -> str:
    source = f" from {remote.urls[0]}" if remote.urls else ""
    return f"get {file}{source} and put it into {folder}, or name the folder that holds it with data_dir="


def _download(card: DatasetCard, file: str, folder: Path) -> Path:
    """Try the mirrors one after the other, then the archive."""
    remote = card.files[file]
    problems = []
    for url in remote.urls:
        try:
            return _retrieve(url, remote, file, folder)
        except (OSError, ValueError) as error:  # no network or bad answer; wrong checksum
            problems.append(f"{url}: {_one_line(error)}")
    if remote.archive is not None:
        try:
            return _from_archive(card, file, folder)
        except (OSError, ValueError, tarfile.TarError, KeyError) as error:
            problems.append(f"{remote.archive}: {_one_line(error)}")
    reasons = "; ".join(problems) or "no address is known"
    raise DataError(f"cannot download {file} of {card.name} ({reasons}); {_advice(remote, file, folder)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _retrieve(url: str, remote: RemoteFile, file: str, folder: Path) -> Path:
    """Download one file; it gets its name only when its checksum is right."""
    import pooch

    shows_progress = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    path = pooch.retrieve(
        url,
        known_hash=remote.checksum,
        fname=file,
        path=folder,
        downloader=pooch.HTTPDownloader(progressbar=shows_progress, headers=_HEADERS),
    )
    if remote.checksum is None:
        warnings.warn(
            f"no official checksum of {file} is known, so the download from {url} could not be verified; "
            f"its sha256 is {file_digest(path)}",
            DataWarning,
            stacklevel=5,
        )
    return Path(path)


def _from_archive(card: DatasetCard, file: str, folder: Path) -> Path:
    """Take a file out of the official archive, which is downloaded first if need be."""
    remote = card.files[file]
    archive = fetch(card, remote.archive, folder, warn=False)
    with tarfile.open(archive) as tar:
        source = tar.extractfile(tar.getmember(remote.member))
        if source is None:
            raise FileFormatError(f"{remote.member} in {archive} is not a file")
        with source, tempfile.NamedTemporaryFile(dir=folder, prefix=f".{file}.", delete=False) as target:
            try:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
                if remote.is_official(target.name) is False:
                    raise FileFormatError(f"{remote.member} in {archive} does not have the checksum {remote.checksum}")
                os.chmod(target.name, 0o644)  # temporary files are for the owner alone
                os.replace(target.name, folder / file)
            except BaseException:
                os.unlink(target.name)
                raise
    return folder / file


def drain(stream: IO[bytes]) -> None:
    """Read a packed stream to its end: only there its checksum is compared, and an archive in it may end before."""
    while stream.read(1 << 20):
        pass


def read_npz(path: str | os.PathLike, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Read arrays from an npz file, without unpickling anything.

    Parameters
    ----------
    path
        The file.
    required
        Keys that must be there.
    optional
        Keys that are read if they are there.

    Raises
    ------
    FileFormatError
        If the file is truncated or no npz file, lacks a key, or holds pickled objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise FileFormatError(f"{path} is a single array; needed is an npz archive")
        with archive:
            missing = [key for key in required if key not in archive.files]
            if missing:
                raise FileFormatError(f"{path} has no {', '.join(missing)}; it has {', '.join(archive.files)}")
            wanted = [*required, *(key for key in optional if key in archive.files)]
            return {key: archive[key] for key in wanted}
    except (FileNotFoundError, FileFormatError):
        raise
    # Pitfall: of a damaged archive zipfile and numpy raise whatever they trip over (NotImplementedError, KeyError, ...).
    except Exception as error:
        is_pickle = "Object arrays" in str(error)
        reason = (
            "holds pickled objects, which are never loaded" if is_pickle else "is damaged, truncated or no npz file"
        )
        raise FileFormatError(f"{path} {reason} ({_one_line(error)})") from error
