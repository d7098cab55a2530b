"""Fixtures that several test modules share: the embedded sample, genuine data where they are at hand, DGL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ndem_zoo import registry

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def registries_as_they_were():
    """What a test registers, nobody sees afterwards."""
    tables = [registry.BACKBONES, registry.MODELS, registry.OBJECTIVES, registry.DATASETS, registry.FORCE_FIELDS]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with genuine benchmark data that are not part of the project; skips where it is absent."""
    folder = Path(os.environ.get("NDEM_ZOO_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "md17").is_dir():
        pytest.skip(f"no genuine benchmark data in {folder} (set NDEM_ZOO_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def dgl():
    """The DGL module, imported as the package does; skips where it is not installed."""
    from ndem_zoo.graph import import_dgl

    try:
        return import_dgl()
    except ImportError as error:
        pytest.skip(f"needs DGL ({error})")


@pytest.fixture(scope="session")
def ethanol():
    """All 2,000 frames of the embedded ethanol sample."""
    from ndem_zoo.datasets import read_sample

    return read_sample("ethanol")


@pytest.fixture(scope="session")
def aspirin():
    """All 300 frames of the embedded aspirin sample."""
    from ndem_zoo.datasets import read_sample

    return read_sample("aspirin")
