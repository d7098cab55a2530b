"""A model that is fitted in milliseconds, in float64, for tests of what is done with predictions."""

from __future__ import annotations

from typing import Any

from ndem_zoo import NDeMTorchMDNet


def tiny_exact_model(**options: Any) -> NDeMTorchMDNet:
    """Of 8 channels and one layer, for molecules of H, C and O; `options` come on top."""
    return NDeMTorchMDNet(
        **{
            "preset": "md17_fast",
            "objective": "supervised",
            "backbone_options": {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4},
            "precision": "64-true",
            "reference_energies": {"H": -13.6, "C": -1030.0, "O": -2042.0},
            "device": "cpu",
            "progress": False,
            **options,
        }
    )
