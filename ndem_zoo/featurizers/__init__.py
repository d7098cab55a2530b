"""Featurizers: from structures (`ase.Atoms`, arrays) to DGL graphs.

`radius.py` connects atoms within a cutoff; `conformer.py` does so after it made geometries of SMILES; `terms.py` finds
bonded terms; `base.py` holds the contract and reads structures and their labels. Names
are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndem_zoo.featurizers.base import Featurizer, Structure
    from ndem_zoo.featurizers.conformer import ConformerGraph
    from ndem_zoo.featurizers.radius import RadiusGraph
    from ndem_zoo.featurizers.terms import BondedTerms, find_terms

__all__ = ["BondedTerms", "ConformerGraph", "Featurizer", "RadiusGraph", "Structure", "find_terms"]

_HOME = {
    "BondedTerms": "terms",
    "ConformerGraph": "conformer",
    "Featurizer": "base",
    "RadiusGraph": "radius",
    "Structure": "base",
    "find_terms": "terms",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
