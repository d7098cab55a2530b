"""What the package has, by name: one line each. The contract tests, the CLI and `load` read these tables.

Values are ``"module:attribute"``, imported when asked for, so that a table costs nothing. What another package or a
notebook brings along is added by `register`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ndem_zoo.errors import ConfigError

BACKBONES: dict[str, str] = {
    "equiformer_v2": "ndem_zoo.models.equiformer_v2.model:EquiformerV2",
    "schnetpack": "ndem_zoo.models.schnetpack:SchNetPackBackbone",
    "torchmd_net": "ndem_zoo.models.torchmd_net:TorchMDNet",
}

MODELS: dict[str, str] = {
    "NDeMEquiformerV2": "ndem_zoo.models.equiformer_v2.model:NDeMEquiformerV2",
    "NDeMPaiNN": "ndem_zoo.models.schnetpack:NDeMPaiNN",
    "NDeMTorchMDNet": "ndem_zoo.models.torchmd_net:NDeMTorchMDNet",
}

OBJECTIVES: dict[str, str] = {
    "supervised": "ndem_zoo.objectives.supervised:Supervised",
    "ndem_curvature": "ndem_zoo.objectives.ndem_curvature:NDeMCurvature",
    "noisy_nodes": "ndem_zoo.objectives.noisy_nodes:NoisyNodes",
    "ndem": "ndem_zoo.objectives.ndem:NDeM",
    "dens": "ndem_zoo.objectives.dens:DeNS",
    "frad": "ndem_zoo.objectives.frad:Frad",
    "slide": "ndem_zoo.objectives.slide:SliDe",
    "geossl": "ndem_zoo.objectives.geossl:GeoSSL",
}

FORCE_FIELDS: dict[str, str] = {
    "pairs": "ndem_zoo.forcefields.pairs:PairPotential",
    "valence": "ndem_zoo.forcefields.valence:ValenceForceField",
    "mmff94": "ndem_zoo.forcefields.mmff94:MMFF94",
    "gfn2-xtb": "ndem_zoo.forcefields.xtb:GFN2xTB",
}

DATASETS: dict[str, str] = {
    "md17": "ndem_zoo.datasets.md17:load_md17",
    "qm9": "ndem_zoo.datasets.qm9:load_qm9",
    "pcqm4mv2": "ndem_zoo.datasets.pcqm4mv2:load_pcqm4mv2",
    "extxyz": "ndem_zoo.datasets.extxyz:load_extxyz",
    "sample": "ndem_zoo.datasets.sample:load_sample",
    "oc20": "ndem_zoo.datasets.oc20:load_oc20",
    "store": "ndem_zoo.datasets.store:load_store",
}

#: Entries that can be looked up everywhere, but built only where a module is installed that not everybody has.
NEEDS: dict[str, str] = {"schnetpack": "schnetpack", "NDeMPaiNN": "schnetpack", "frad": "rdkit", "slide": "rdkit"}


def missing_for(name: str) -> str | None:
    """Module that the entry `name` needs and that is not installed; None if nothing is missing."""
    module = NEEDS.get(name)
    return module if module is not None and importlib.util.find_spec(module) is None else None


def register(table: dict[str, str], name: str, entry: Any) -> None:
    """Add a class or function from elsewhere to `table`, for this process.

    Parameters
    ----------
    table
        `BACKBONES`, `OBJECTIVES`, `MODELS` or `DATASETS`.
    name
        What it is asked for by; of a model, the name of its class, by which a saved one is found again.
    entry
        Defined at the top level of a module or notebook. Code that loads a saved model must have registered its parts
        before, as it must have imported them.

    Raises
    ------
    ConfigError
        If the name is taken by something else, or `entry` cannot be found by its module and name.

    Notes
    -----
    The same entry may come twice, so that cells of a notebook can be run again.
    """
    module, attribute = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
    if module is None or getattr(importlib.import_module(module), str(attribute), None) is not entry:
        raise ConfigError(f"{entry!r} cannot be found as {module}:{attribute}; define it at the top level of a module")
    path = f"{module}:{attribute}"
    if table.get(name, path) != path:
        raise ConfigError(f"{name!r} is taken by {table[name]}; choose another name for {path}")
    if table is MODELS and name != attribute:
        raise ConfigError(f"a model is registered by the name of its class, {attribute!r}, not as {name!r}")
    table[name] = path


def lookup(table: dict[str, str], name: str, what: str) -> Any:
    """Import what `table` lists under `name`.

    Raises
    ------
    ConfigError
        If there is no such name; lists those that there are.
    """
    if name not in table:
        raise ConfigError(f"there is no {what} {name!r}; there are {', '.join(sorted(table))}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
