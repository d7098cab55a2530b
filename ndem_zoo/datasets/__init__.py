"""Datasets: loaders that read raw files into `MolecularDataset`, in eV and Å with float64 labels.

`base.py` holds the dataset, `store.py` keeps it on disk, `files.py` downloads and checksums, `checks.py` what must stop
a training, `summary.py` diagnostics; the loaders are one file each. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset, as_dataset, split_indices
    from ndem_zoo.datasets.checks import check_structures, check_targets
    from ndem_zoo.datasets.extxyz import load_extxyz, read_extxyz, write_extxyz
    from ndem_zoo.datasets.files import DatasetCard, RemoteFile, fetch
    from ndem_zoo.datasets.md17 import load_md17, read_md17
    from ndem_zoo.datasets.oc20 import convert_oc20, linear_reference, load_oc20, read_oc20, split_by_system
    from ndem_zoo.datasets.oc20_submission import write_submission
    from ndem_zoo.datasets.pcqm4mv2 import load_pcqm4mv2, read_pcqm4mv2
    from ndem_zoo.datasets.qm9 import load_qm9, read_qm9
    from ndem_zoo.datasets.sample import load_sample, read_sample
    from ndem_zoo.datasets.store import StoreWriter, is_store, load_store, open_store
    from ndem_zoo.datasets.summary import Summary, virial_temperature

_HOME = {
    "DatasetCard": "files",
    "MolecularDataset": "base",
    "RemoteFile": "files",
    "StoreWriter": "store",
    "Summary": "summary",
    "as_dataset": "base",
    "check_structures": "checks",
    "check_targets": "checks",
    "convert_oc20": "oc20",
    "fetch": "files",
    "is_store": "store",
    "linear_reference": "oc20",
    "load_extxyz": "extxyz",
    "load_md17": "md17",
    "load_oc20": "oc20",
    "load_pcqm4mv2": "pcqm4mv2",
    "load_qm9": "qm9",
    "load_sample": "sample",
    "load_store": "store",
    "open_store": "store",
    "read_extxyz": "extxyz",
    "read_md17": "md17",
    "read_oc20": "oc20",
    "read_pcqm4mv2": "pcqm4mv2",
    "read_qm9": "qm9",
    "read_sample": "sample",
    "split_by_system": "oc20",
    "split_indices": "base",
    "virial_temperature": "summary",
    "write_extxyz": "extxyz",
    "write_submission": "oc20_submission",
}

__all__ = [
    "DatasetCard",
    "MolecularDataset",
    "RemoteFile",
    "StoreWriter",
    "Summary",
    "as_dataset",
    "check_structures",
    "check_targets",
    "convert_oc20",
    "fetch",
    "is_store",
    "linear_reference",
    "load_extxyz",
    "load_md17",
    "load_oc20",
    "load_pcqm4mv2",
    "load_qm9",
    "load_sample",
    "load_store",
    "open_store",
    "read_extxyz",
    "read_md17",
    "read_oc20",
    "read_pcqm4mv2",
    "read_qm9",
    "read_sample",
    "split_by_system",
    "split_indices",
    "virial_temperature",
    "write_extxyz",
    "write_submission",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
