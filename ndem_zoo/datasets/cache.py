"""Datasets that are read from slow files once: the columns go into a store in the data folder, and are mapped from then on.

A loader says what the content depends on (checksums of its files, options); another checksum is another store, so nothing
that is out of date can be opened. The store itself is `store.py`'s.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.files import DatasetCard, data_folder
from ndem_zoo.datasets.store import StoreWriter, is_store, open_store
from ndem_zoo.errors import DataWarning, FileFormatError

#: Folder below the data folder, for all datasets.
FOLDER = "stores"

#: Reasons for which a cache cannot be written: a read-only disk, no space left, no quota left, a limit of sizes.
_NO_PLACE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_cached(
    name: str,
    depends_on: Mapping[str, Any],
    read: Callable[[], Iterable[MolecularDataset]],
    *,
    card: DatasetCard | None = None,
    cache_dir: str | os.PathLike | None = None,
    string_width: int = 24,
) -> MolecularDataset:
    """Open the store of a dataset, after having written it if need be.

    Parameters
    ----------
    name
        Of the dataset; in lower case, the first part of the name of the store's folder.
    depends_on
        What the content depends on, as JSON has it: checksums of files, options, the version of what reads them.
    read
        Reads the files, piece by piece; called only if there is no store yet. Pieces that an interrupted run has written
        are not written again.
    card
        Of the dataset; a store keeps only a part of it.
    cache_dir
        Where the folder `FOLDER` is; default: the data folder (see `files.data_folder`).
    string_width
        See `StoreWriter`.

    Warns
    -----
    DataWarning
        If the folder cannot be written to (the dataset is in memory then), or a damaged store was made anew.
    """
    digest = hashlib.sha256(json.dumps(dict(depends_on), sort_keys=True).encode()).hexdigest()
    folder = data_folder(cache_dir) / FOLDER / f"{name.lower()}-{digest[:16]}"
    try:
        with _alone(folder):
            whole = _opened(folder)
            if whole is None:
                whole = _written(folder, read(), name=name, card=card, string_width=string_width)
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in _NO_PLACE:
            raise
        warnings.warn(
            f"{folder} cannot be written ({error.strerror}), so {name} is read into memory each time; name another place "
            "with cache_dir=",
            DataWarning,
            stacklevel=4,
        )
        whole = MolecularDataset.concatenate(list(read()))
    whole.name, whole.card = name, card
    return whole


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is making this store: the workers of one training all ask for it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _opened(folder: Path) -> MolecularDataset | None:
    """The store, if there is a whole one."""
    if not is_store(folder):
        return None
    try:
        return open_store(folder)
    except FileFormatError as error:
        warnings.warn(f"{error}; it is made anew", DataWarning, stacklevel=5)
        shutil.rmtree(folder)
        return None


def _written(folder: Path, pieces: Iterable[MolecularDataset], **options: Any) -> MolecularDataset:
    """Write the pieces, but for those that are there already, and open the store."""
    with StoreWriter(folder, **options) as writer:
        for number, piece in enumerate(pieces):
            source = f"piece {number}"
            if source not in writer.sources:
                writer.append(piece)
                writer.commit(source)
        return writer.finish()
