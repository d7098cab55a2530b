"""Accurate force fields from few quantum-chemistry frames: NDeM and its relatives, in PyTorch.

The public names are imported when they are first used: ``import ndem_zoo`` itself pulls in neither torch nor DGL.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ndem_zoo._version import __version__

if TYPE_CHECKING:
    from ndem_zoo.calculator import NDeMCalculator
    from ndem_zoo.datasets.base import MolecularDataset
    from ndem_zoo.datasets.extxyz import load_extxyz
    from ndem_zoo.datasets.md17 import load_md17
    from ndem_zoo.datasets.oc20 import load_oc20
    from ndem_zoo.datasets.pcqm4mv2 import load_pcqm4mv2
    from ndem_zoo.datasets.qm9 import load_qm9
    from ndem_zoo.datasets.sample import load_sample
    from ndem_zoo.datasets.store import open_store
    from ndem_zoo.ensemble import Ensemble
    from ndem_zoo.featurizers.conformer import ConformerGraph
    from ndem_zoo.featurizers.radius import RadiusGraph
    from ndem_zoo.models.equiformer_v2.model import EquiformerV2, NDeMEquiformerV2
    from ndem_zoo.models.estimator import NDeMModel
    from ndem_zoo.models.schnetpack import NDeMPaiNN, SchNetPackBackbone
    from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet

_HOME = {
    "ConformerGraph": "featurizers.conformer",
    "Ensemble": "ensemble",
    "EquiformerV2": "models.equiformer_v2.model",
    "MolecularDataset": "datasets.base",
    "NDeMCalculator": "calculator",
    "NDeMEquiformerV2": "models.equiformer_v2.model",
    "NDeMModel": "models.estimator",
    "NDeMPaiNN": "models.schnetpack",
    "NDeMTorchMDNet": "models.torchmd_net",
    "RadiusGraph": "featurizers.radius",
    "SchNetPackBackbone": "models.schnetpack",
    "TorchMDNet": "models.torchmd_net",
    "load_extxyz": "datasets.extxyz",
    "load_md17": "datasets.md17",
    "load_oc20": "datasets.oc20",
    "load_pcqm4mv2": "datasets.pcqm4mv2",
    "load_qm9": "datasets.qm9",
    "load_sample": "datasets.sample",
    "open_store": "datasets.store",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ndem_zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ndem_zoo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
