"""Files of datasets: what they are (`DatasetCard`), where they come from (`fetch`), and how they are read (`read_npz`).

A file that the user has is taken as it is, with a warning when it is not the official one; a file is downloaded over TLS
only, and must have the official checksum. Compressed files may not hold much more than their size (`allowed_size`), archives
are read and never unpacked. Nothing here knows what the numbers mean, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import os
import sys
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urljoin

import numpy as np

from ndem_zoo.checkpoint import file_digest, whole_file
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError

Download = bool | Literal["unverified"]

#: Environment variable with the folder for downloads.
DATA_FOLDER_VARIABLE = "NDEM_ZOO_DATA"

#: Environment variable with another number for `MAX_RATIO`; ``inf`` for no limit.
RATIO_VARIABLE = "NDEM_ZOO_MAX_RATIO"

#: Choice: what is decompressed may be so many times as large as its file (structures as text: up to 8 times, arrays: up to
#: 40), and so many bytes in any case, since small files of zeros are harmless.
MAX_RATIO, ALWAYS_ALLOWED = 100.0, 256 << 20

#: Choice: bytes of a line of text in an archive, and of a file in an archive of many small ones; genuine ones have 100 and
#: 3,000.
MAX_LINE, MAX_SMALL_FILE = 1 << 16, 1 << 20

#: Pitfall: figshare refuses requests that do not name a browser.
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; ndem_zoo)"}


@dataclass(frozen=True)
class RemoteFile:
    """Where one file can be downloaded, and how to recognize it.

    Attributes
    ----------
    urls
        Mirrors, tried in this order. Without TLS (``http:``), or without a checksum, nothing is downloaded: the first is then
        where people are told to get the file.
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
    download: Download = True,
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
        False: never touch the network. ``"unverified"``: also a file whose checksum nobody has published, over TLS; a
        warning tells the checksum of what came, and where it is now.
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
        If the file is not there and cannot be downloaded: no checksum of it is known, no address has TLS, or every download
        failed or had a wrong checksum. Says which file to put where. What was downloaded then is deleted.
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
            f"{file} of {card.name} is not in {folder}, and download={download!r}; {_advice(remote, file, folder)}"
        )
    if download not in (True, "unverified"):
        raise ConfigError(f"download={download!r}; allowed are True, False and 'unverified'")
    return _download(card, file, folder, download == "unverified")


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


def _download(card: DatasetCard, file: str, folder: Path, unverified: bool) -> Path:
    """Try the mirrors one after the other, then the archive."""
    remote = card.files[file]
    problems = []
    for url in remote.urls:
        try:
            return _retrieve(url, remote, file, folder, unverified)
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


def _retrieve(url: str, remote: RemoteFile, file: str, folder: Path, unverified: bool) -> Path:
    """Download one file; it gets its name only when its checksum is right, or wanted although none is known."""
    import pooch

    _check_tls(url)
    if remote.checksum is None and not unverified:
        raise DataError("no checksum of it is known; download='unverified' takes what comes over TLS")
    shows_progress = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    inner = pooch.HTTPDownloader(progressbar=shows_progress, headers=_HEADERS, hooks={"response": _check_redirect})

    def download(address: str, output: str, pup: object) -> None:
        with open(output, "wb") as stream:
            inner(address, _AtMost(stream, remote.size, file), pup)

    path = Path(pooch.retrieve(url, known_hash=remote.checksum, fname=file, path=folder, downloader=download))
    if remote.checksum is None:
        warnings.warn(
            f"no official checksum of {file} is known, so that the download from {url} could not be verified: {path} has the "
            f"sha256 {file_digest(path)}",
            DataWarning,
            stacklevel=5,
        )
    return path


def _check_tls(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise DataError(f"{url} is no https address, and files are downloaded over TLS only")


def _check_redirect(response: Any, *_: Any, **__: Any) -> None:
    """Raise DataError before a redirection to an address without TLS is followed; called for every answer of a server."""
    if response.is_redirect:
        _check_tls(urljoin(response.url, response.headers["location"]))


class _AtMost:
    """Passes on to a file what is written, up to so many bytes."""

    def __init__(self, stream: IO, size: int | None, name: str) -> None:
        self._stream, self._left, self._name = stream, size, name

    def write(self, data: bytes) -> None:
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise DataError(f"{self._name} is larger than the official file")
        self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def _from_archive(card: DatasetCard, file: str, folder: Path) -> Path:
    """Take a file out of the official archive, which is downloaded first if need be."""
    remote = card.files[file]
    archive = fetch(card, remote.archive, folder, warn=False)
    with tarfile.open(archive) as tar:
        member = tar.getmember(remote.member)
        _check_member(member, archive, remote.size)
        algorithm, _, expected = (remote.checksum or "sha256:").partition(":")
        digest = hashlib.new(algorithm)
        with tar.extractfile(member) as source, whole_file(folder / file) as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
            if digest.hexdigest() != expected:
                raise FileFormatError(f"{remote.member} in {archive} does not have the checksum {remote.checksum}")
    return folder / file


# -------------------------------------------------------------------------------------------------------- compressed files


def allowed_size(path: str | os.PathLike) -> float:
    """Bytes that a compressed file may hold: `MAX_RATIO` times its size, and `ALWAYS_ALLOWED` in any case.

    Parameters
    ----------
    path
        The file. The environment variable NDEM_ZOO_MAX_RATIO replaces `MAX_RATIO`, for all files.

    Raises
    ------
    ConfigError
        If that variable is no number of 1 or more.
    """
    text = os.environ.get(RATIO_VARIABLE, "")
    try:
        ratio = float(text) if text else MAX_RATIO
    except ValueError:
        ratio = 0.0
    if not ratio >= 1:
        raise ConfigError(f"{RATIO_VARIABLE}={text!r}; allowed is a number of 1 or more, or inf")
    return max(ALWAYS_ALLOWED, ratio * os.path.getsize(path))


class Decompressed(io.RawIOBase):
    """What a compressed file holds, up to what it may hold; for reading only.

    Parameters
    ----------
    path
        A file whose name ends in ``.gz``, ``.bz2`` or ``.xz``.

    Raises
    ------
    FileFormatError
        When more is read than `allowed_size`, or the file is damaged or cut off; names it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        import bz2
        import gzip
        import lzma

        openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        self._path, self._allowed = path, allowed_size(path)
        self._left = self._allowed
        self._damages = (OSError, EOFError, zlib.error, lzma.LZMAError)
        self._stream = openers[Path(path).suffix.lower()](path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer of bytes; see `io.RawIOBase`."""
        try:
            data = self._stream.read(len(buffer))
        except self._damages as error:
            raise FileFormatError(_damage(self._path, error)) from error
        self._left -= len(data)
        if self._left < 0:
            raise FileFormatError(
                f"{self._path} decompresses to more than {self._allowed:,.0f} bytes, many times its size, and is not read on; "
                f"if you trust it, set {RATIO_VARIABLE} to a larger number than {MAX_RATIO:g}"
            )
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes, in pieces: nobody's header makes a buffer of any size."""
        pieces: list[bytes] = []
        while size != 0:
            piece = super().read(1 << 20 if size < 0 else min(size, 1 << 20))
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece) if size > 0 else 0
        return b"".join(pieces)

    def readall(self) -> bytes:
        return self.read(-1)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _damage(path: str | os.PathLike, error: BaseException) -> str:
    kind = "".join(Path(path).suffixes[-2:]).lstrip(".")
    return f"{path} is damaged, truncated or no {kind} file ({_one_line(error)})"


def archived_files(stream: IO, path: str | os.PathLike, size: int | None = None) -> Iterator[tuple[str, IO]]:
    """Names and contents of the files in a tar archive that is streamed, and never unpacked.

    Parameters
    ----------
    stream
        The archive, decompressed.
    path
        Its file, for errors.
    size
        Largest number of bytes of a file; None: only the stream limits them.

    Raises
    ------
    FileFormatError
        If the archive is damaged, or holds what an archive of data has no use for: links, devices, sparse or too large
        files.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if member.isdir():
                    continue
                _check_member(member, path, size)
                yield member.name, tar.extractfile(member)
        drain(stream)
    # Pitfall: tarfile reads sizes as it finds them; a damaged header may be any of the latter.
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, (DataError, ConfigError)):
            raise
        raise FileFormatError(_damage(path, error)) from error


def _check_member(member: tarfile.TarInfo, path: str | os.PathLike, size: int | None) -> None:
    """Raise FileFormatError unless a member of an archive is a plain file of no more than `size` bytes."""
    if not member.isreg() or member.issparse():
        kind = (
            "a link" if member.islnk() or member.issym() else "a sparse file" if member.issparse() else "no plain file"
        )
        raise FileFormatError(f"{path}: {member.name} is {kind}; allowed in an archive of data are plain files")
    if size is not None and member.size > size:
        raise FileFormatError(f"{path}: {member.name} has {member.size:,} bytes; allowed are {size:,}")


def unpacked(raw: bytes, path: str | os.PathLike) -> bytes:
    """Content of an ``.xz`` file, or of a part of an archive, that was read from `path`.

    Raises
    ------
    FileFormatError
        If it is damaged or cut off, or more than `allowed_size` of the file.
    """
    import lzma

    allowed, inflater = allowed_size(path), lzma.LZMADecompressor()
    try:
        most = -1 if math.isinf(allowed) else int(allowed)
        text = inflater.decompress(raw, max_length=most)
        if not inflater.eof and len(text) == most:
            raise FileFormatError(
                f"it decompresses to more than {most:,} bytes, many times its size; if you trust it, set {RATIO_VARIABLE} "
                f"to a larger number than {MAX_RATIO:g}"
            )
        if not inflater.eof:
            raise FileFormatError("it is cut off")
    except lzma.LZMAError as error:
        raise FileFormatError(_one_line(error)) from error
    return text


def lines_of(stream: IO, where: str) -> Iterator[str]:
    """Lines of a file in an archive, as text.

    Raises
    ------
    FileFormatError
        If a line is longer than `MAX_LINE` bytes.
    """
    while line := stream.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise FileFormatError(f"{where} has a line of more than {MAX_LINE:,} bytes")
        yield line.decode("ascii", errors="replace")


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
        If the file is truncated or no npz file, lacks a key, holds pickled objects, or arrays of other sizes than it
        says or than `allowed_size`.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise FileFormatError(f"{path} is a single array; needed is an npz archive")
        with archive:
            _check_arrays(archive, path)
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


def _check_arrays(archive: np.lib.npyio.NpzFile, path: str | os.PathLike) -> None:
    """Raise FileFormatError if arrays would be larger than the file may hold, or than its directory says they are."""
    entries, allowed = archive.zip.infolist(), allowed_size(path)
    total = sum(entry.file_size for entry in entries)
    if total > allowed:
        raise FileFormatError(
            f"{path} decompresses to {total:,} bytes, allowed are {allowed:,.0f}; if you trust it, set {RATIO_VARIABLE} to a "
            f"larger number than {MAX_RATIO:g}"
        )
    for entry in entries:
        if not entry.filename.endswith(".npy"):
            continue
        with archive.zip.open(entry) as stream:
            # Pitfall: numpy makes room for the shape that the header says, before it reads.
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            size = math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and size != entry.file_size - stream.tell():
                raise FileFormatError(
                    f"{path}: {entry.filename} has the shape {shape} of {dtype}, {size:,} bytes, and "
                    f"{entry.file_size - stream.tell():,} bytes of data; they must agree"
                )
