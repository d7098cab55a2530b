"""Published sizes of EquiformerV2 as data: every value with its source."""

from __future__ import annotations

from typing import Any

from ndem_zoo.presets import Sourced

_PAPER = "EquiformerV2, ICLR 2024, appendix D (OC20), and its configuration files"
_QM9 = "EquiformerV2, ICLR 2024, Table 13 (QM9), as copied in public configuration files"
_OURS = "our choice"

_OC20: dict[str, Sourced] = {
    "sphere_channels": Sourced(128, _PAPER),
    "attn_hidden_channels": Sourced(64, _PAPER),
    "num_heads": Sourced(8, _PAPER),
    "attn_alpha_channels": Sourced(64, _PAPER),
    "attn_value_channels": Sourced(16, _PAPER),
    "ffn_hidden_channels": Sourced(128, _PAPER),
    "edge_channels": Sourced(128, _PAPER),
    "num_distance_basis": Sourced(600, "fairchem-core 1.10, which ignores its key of that name (512)"),
    "grid_resolution": Sourced(18, _PAPER),
    "cutoff": Sourced(12.0, _PAPER),
    "max_neighbors": Sourced(20, _PAPER),
    "strict_neighbors": Sourced(True, "default of fairchem-core 1.10"),
    "norm_type": Sourced("layer_norm_sh", _PAPER),
    "use_grid_mlp": Sourced(True, _PAPER),
    "use_gate_act": Sourced(False, _PAPER),
    "use_sep_s2_act": Sourced(True, _PAPER),
    "use_attn_renorm": Sourced(True, _PAPER),
    "alpha_drop": Sourced(0.1, _PAPER),
    "weight_init": Sourced("uniform", _PAPER),
    "max_z": Sourced(90, _PAPER),
    "average_atoms": Sourced(77.81317, "mean of IS2RE's 100k split; fairchem-core 1.10"),
    "average_neighbors": Sourced(23.395238876342773, "IS2RE's 100k split within 5 Å; fairchem-core 1.10"),
}


def _deep(num_layers: int, lmax: int, mmax: int, drop_path: float) -> dict[str, Sourced]:
    """A size of the OC20 series."""
    values = {"num_layers": num_layers, "lmax": lmax, "mmax": mmax, "drop_path_rate": drop_path}
    return _OC20 | {name: Sourced(value, _PAPER) for name, value in values.items()}


def _small(source: str, **values: Any) -> dict[str, Sourced]:
    """A size for molecules, where it differs from the OC20 series."""
    return _OC20 | {name: Sourced(value, source) for name, value in values.items()}


PRESETS: dict[str, dict[str, Sourced]] = {
    "31M": _deep(8, 4, 2, 0.1),
    "83M": _deep(12, 6, 2, 0.05),
    "153M": _deep(20, 6, 3, 0.1),
    "qm9": _small(
        _QM9, num_layers=6, lmax=4, mmax=4, sphere_channels=96, attn_hidden_channels=48, num_heads=4,
        attn_alpha_channels=64, attn_value_channels=24, ffn_hidden_channels=96, edge_channels=64,
        num_distance_basis=128, cutoff=5.0, max_neighbors=500, alpha_drop=0.2, drop_path_rate=0.05,
    )
    | {
        "average_atoms": Sourced(18.03065905448718, "mean of QM9; constant of the first Equiformer's code"),
        "average_neighbors": Sourced(15.57930850982666, "mean within 5 Å in QM9; constant of the first Equiformer's code"),
    },
    "md17": _small(
        _OURS + ": no EquiformerV2 for MD17 is published", num_layers=4, lmax=3, mmax=2, sphere_channels=64,
        attn_hidden_channels=32, num_heads=4, attn_alpha_channels=32, attn_value_channels=16, ffn_hidden_channels=64,
        edge_channels=64, num_distance_basis=128, cutoff=5.0, max_neighbors=None, alpha_drop=0.0, drop_path_rate=0.0,
        smooth_cutoff=True, average_atoms=1.0, average_neighbors=12.0,
    ),
    "tiny": _small(
        _OURS + ": for tests and laptops", num_layers=2, lmax=2, mmax=2, sphere_channels=32, attn_hidden_channels=16,
        num_heads=4, attn_alpha_channels=16, attn_value_channels=8, ffn_hidden_channels=32, edge_channels=32,
        alpha_drop=0.0, drop_path_rate=0.0,
    ),
}  # fmt: skip
