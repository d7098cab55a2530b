"""The contract tests: `check_backbone`, `check_objective`, `check_dataset`, for this package's classes and for yours.

As scikit-learn ships `check_estimator`, so that a class written elsewhere is held to the same rules:

>>> from ndem_zoo.testing import check_backbone
>>> check_backbone("torchmd_net")

Each check is a list of probes, small functions that raise AssertionError with the numbers; to see them one by one in
pytest, parametrize over the list (tests/test_contracts.py does). For tests of your own there are Hypothesis strategies,
`structures` and `bad_structures`.
"""

from ndem_zoo.testing.backbones import BACKBONE_PROBES, BackboneCase, check_backbone, golden_numbers
from ndem_zoo.testing.common import batch_of, fill_weights, waves
from ndem_zoo.testing.datasets import DATASET_PROBES, DatasetCase, check_dataset
from ndem_zoo.testing.objectives import (
    NDEM_PROBES,
    OBJECTIVE_PROBES,
    HarmonicBackbone,
    ObjectiveCase,
    check_objective,
    harmonic_case,
    objective_probes,
)
from ndem_zoo.testing.structures import FLAWS, FORMS, RawStructure, bad_structures, structures

__all__ = [
    "BACKBONE_PROBES",
    "DATASET_PROBES",
    "FLAWS",
    "FORMS",
    "NDEM_PROBES",
    "OBJECTIVE_PROBES",
    "BackboneCase",
    "DatasetCase",
    "HarmonicBackbone",
    "ObjectiveCase",
    "RawStructure",
    "bad_structures",
    "batch_of",
    "check_backbone",
    "check_dataset",
    "check_objective",
    "fill_weights",
    "golden_numbers",
    "harmonic_case",
    "objective_probes",
    "structures",
    "waves",
]
