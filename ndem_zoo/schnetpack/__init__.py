"""NDeM inside SchNetPack: parts for its configuration files, and converters of data.

With these parts `spktrain` trains with NDeM by configuration alone (``spktrain experiment=ndem_md17``). The other way round,
SchNetPack's networks as backbones of this package, is `ndem_zoo.models.schnetpack`. Hydra imports this package in every
application of an environment to find `configs`, so it must pull in neither torch nor SchNetPack: names are lazy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndem_zoo.schnetpack.converters import from_schnetpack, read_ase_db, to_schnetpack, write_ase_db
    from ndem_zoo.schnetpack.modules import (
        AddNDeMNoise,
        MeanSquare,
        NDeMDoubleBatch,
        NDeMForceDifference,
        NDeMNoisyForceHead,
        strip_ndem,
    )

_HOME = {
    "AddNDeMNoise": "modules",
    "MeanSquare": "modules",
    "NDeMDoubleBatch": "modules",
    "NDeMForceDifference": "modules",
    "NDeMNoisyForceHead": "modules",
    "from_schnetpack": "converters",
    "read_ase_db": "converters",
    "strip_ndem": "modules",
    "to_schnetpack": "converters",
    "write_ase_db": "converters",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Pitfall: Hydra looks for submodules with getattr first, and imports them only after an AttributeError.
    if name not in _HOME:
        raise AttributeError(f"module 'ndem_zoo.schnetpack' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ndem_zoo.schnetpack.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
