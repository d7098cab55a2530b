"""Published recipes as data: every number with its source, every conflict between sources beside it.

A preset gives values to the estimator's keywords that are left at None. `backbone` and `objectives` hold options by
name of the backbone and of the objective.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ndem_zoo.errors import ConfigError


class Sourced(NamedTuple):
    """A value and where it comes from."""

    value: Any
    source: str


_TABLE_7 = "NDeM, CVPR 2026, supplement, Table 7"
_TABLE_8 = "NDeM, CVPR 2026, supplement, Table 8"
_EQV2 = "EquiformerV2, ICLR 2024, OC20 configuration"
_TORCHMD = "TorchMD-NET's ET-MD17 recipe, which Table 7 otherwise equals"
_OURS = "our choice"

_MD17_PAPER: dict[str, Sourced] = {
    "target": Sourced("energy", _TABLE_7),
    "reference_energies": Sourced(
        None, _OURS + ": least squares; TorchMD-NET subtracts the mean, equal for one molecule"
    ),
    "batch_size": Sourced(8, _TABLE_7),
    "max_atoms": Sourced(None, _TABLE_7 + " counts structures"),
    "bucket": Sourced(False, "none of the recipes sorts by size; MD17 has one size"),
    "lr": Sourced(1e-3, _TABLE_7),
    "weight_decay": Sourced(0.0, "Frad and TorchMD-NET; Table 7 names AdamW without a value"),
    "warmup_steps": Sourced(1000, _TABLE_7),
    "warmup_factor": Sourced(0.0, _TORCHMD),
    "schedule": Sourced("plateau", _TABLE_7),
    "plateau_factor": Sourced(0.8, _TABLE_7),
    "plateau_patience": Sourced(30, _TABLE_7),
    "min_lr": Sourced(1e-7, _TABLE_7),
    "clip_norm": Sourced(None, "none of the recipes clips on MD17"),
    "ema_decay": Sourced(None, "none of the recipes averages weights on MD17"),
    "nb_epoch": Sourced(3000, _TORCHMD + "; not in Table 7"),
    "early_stopping": Sourced(300, _TORCHMD + "; not in Table 7"),
    "max_steps": Sourced(None, _TORCHMD),
    "validate_every": Sourced(None, _TORCHMD + ": every epoch"),
    "eval_batch_size": Sourced(64, _TORCHMD),
    "energy_weight": Sourced(1.0, _TABLE_7),
    "force_weight": Sourced(30.0, _TABLE_7 + "; the main text says 1:100, see md17_paper_1_100"),
    "loss": Sourced("mse", "TorchMD-NET; the paper says 'normalized' only, Frad uses smooth_l1"),
    "weight": Sourced(1.0, _TABLE_7),
    "weight_schedule": Sourced("constant", _TABLE_7),
    "scale": Sourced("force_rms", _OURS + "; Frad: standard deviation of the energies"),
    "forces": Sourced("gradient", "TorchMD-NET's ET-MD17 recipe (derivative: true)"),
    "backbone": Sourced(
        {
            "torchmd_net": {"hidden_channels": 128, "num_layers": 6, "num_heads": 8, "num_rbf": 32, "cutoff": 5.0},
            "equiformer_v2": {"preset": "md17"},
        },
        _TABLE_7 + "; cutoff: TorchMD-NET; EquiformerV2 has no published one for MD17",
    ),
    "objectives": Sourced(
        {
            "ndem": {"sigma": 0.05, "ratio": 0.25},
            "noisy_nodes": {"sigma": 0.05},
            "dens": {"sigma": 0.05, "ratio": 0.25, "probability": 0.25},
        },
        _TABLE_7 + " (sigma); the paper gives no ratio, 0.25 is DeNS's on MD17",
    ),
}

_QM9_PAPER = _MD17_PAPER | {
    "max_atoms": Sourced(None, _TABLE_8 + " counts molecules"),
    "bucket": Sourced(False, "none of the recipes sorts by size"),
    "plateau_factor": Sourced(0.8, "no use with a cosine schedule"),
    "plateau_patience": Sourced(30, "no use with a cosine schedule"),
    "weight_decay": Sourced(0.0, "Frad's and TorchMD-NET's QM9 recipes; Table 8 names AdamW without a value"),
    "clip_norm": Sourced(None, "none of the recipes clips on QM9"),
    "ema_decay": Sourced(None, "none of the ET recipes averages weights on QM9"),
    "validate_every": Sourced(None, "TorchMD-NET's ET-QM9 recipe: every epoch"),
    "energy_weight": Sourced(1.0, "one label"),
    "weight_schedule": Sourced("constant", _TABLE_8),
    "target": Sourced("gap", "one of the twelve; choose with the keyword `target`"),
    "reference_energies": Sourced(
        None, _TABLE_8 + " names atom references: 'dataset' takes those; least squares fits better"
    ),
    "batch_size": Sourced(128, _TABLE_8),
    "eval_batch_size": Sourced(128, "TorchMD-NET's ET-QM9 recipe"),
    "lr": Sourced(4e-4, _TABLE_8),
    "warmup_steps": Sourced(10_000, _TABLE_8),
    "warmup_factor": Sourced(0.0, "TorchMD-NET's ET-QM9 recipe"),
    "schedule": Sourced("cosine", _TABLE_8),
    "min_lr": Sourced(0.0, _TABLE_8 + " gives none"),
    "nb_epoch": Sourced(None, _TABLE_8 + " counts steps"),
    "early_stopping": Sourced(None, "no use with a cosine schedule; Frad: 1500 epochs"),
    "max_steps": Sourced(300_000, _TABLE_8 + ": length of the cosine"),
    "forces": Sourced("none", "QM9 has no forces"),
    "force_weight": Sourced(0.0, "QM9 has no forces"),
    "loss": Sourced("l1", _OURS + ": errors are reported as MAE; TorchMD-NET: mse"),
    "weight": Sourced(0.5, _TABLE_8),
    "scale": Sourced("target_std", "TorchMD-NET's ET-QM9 recipe (standardize: true)"),
    "backbone": Sourced(
        {
            "torchmd_net": {"hidden_channels": 256, "num_layers": 8, "num_heads": 8, "num_rbf": 64, "cutoff": 5.0},
            "equiformer_v2": {"preset": "qm9"},
        },
        _TABLE_8 + "; cutoff: TorchMD-NET",
    ),
    "objectives": Sourced(
        {"ndem": {"sigma": 0.01, "ratio": 1.0}, "noisy_nodes": {"sigma": 0.01}},
        _TABLE_8 + " (sigma); all atoms, as in Noisy Nodes",
    ),
}

_UNUSED = "no use with a cosine schedule"

_OC20_153M = _MD17_PAPER | {
    "target": Sourced("energy", _EQV2),
    "max_atoms": Sourced(None, _EQV2 + " counts structures, balanced by size between GPUs"),
    "bucket": Sourced(False, _EQV2 + " shuffles"),
    "plateau_factor": Sourced(0.8, _UNUSED),
    "plateau_patience": Sourced(30, _UNUSED),
    "max_steps": Sourced(None, _EQV2 + " counts epochs"),
    "weight": Sourced(15.0, "DeNS, TMLR 2024, OC20 All+MD; the NDeM paper gives none for OC20"),
    "weight_schedule": Sourced("constant", "DeNS, TMLR 2024, OC20"),
    "reference_energies": Sourced("mean", _EQV2 + ": adsorption energies are normalized by mean and spread"),
    "batch_size": Sourced(512, _EQV2 + ": 4 on each of 128 GPUs"),
    "eval_batch_size": Sourced(16, _OURS),
    "lr": Sourced(4e-4, _EQV2),
    "weight_decay": Sourced(1e-3, _EQV2),
    "warmup_steps": Sourced(3360, _EQV2 + ": 0.01 epochs of the 172 million frames of All+MD"),
    "warmup_factor": Sourced(0.2, _EQV2),
    "schedule": Sourced("cosine", _EQV2),
    "min_lr": Sourced(4e-6, _EQV2 + ": 0.01 of lr"),
    "clip_norm": Sourced(100.0, _EQV2),
    "ema_decay": Sourced(0.999, _EQV2),
    "nb_epoch": Sourced(1, _EQV2),
    "early_stopping": Sourced(None, _EQV2),
    "validate_every": Sourced(5000, _EQV2 + ": 5 to 25 thousand steps"),
    "energy_weight": Sourced(2.0, "NDeM, CVPR 2026: 2; " + _EQV2 + ": 2 or 4"),
    "force_weight": Sourced(100.0, _EQV2),
    "loss": Sourced("l2mae", _EQV2),
    "scale": Sourced(2.887317180633545, _EQV2 + ": of the adsorption energies of the 2M split, also for forces"),
    "forces": Sourced("direct", _EQV2),
    "backbone": Sourced({"equiformer_v2": {"preset": "153M"}, "torchmd_net": {}}, _EQV2),
    "objectives": Sourced(
        {
            "ndem": {"sigma": 0.1, "ratio": 0.5},
            "noisy_nodes": {"sigma": 0.1},
            "dens": {"sigma": 0.1, "ratio": 0.25, "probability": 0.125},
        },
        "DeNS, TMLR 2024, OC20; the NDeM paper gives none of its own",
    ),
}

_OC20_31M = _OC20_153M | {
    "batch_size": Sourced(512, _EQV2 + ": 8 on each of 64 GPUs"),
    "nb_epoch": Sourced(3, _EQV2),
    "energy_weight": Sourced(4.0, _EQV2),
    "backbone": Sourced({"equiformer_v2": {"preset": "31M"}, "torchmd_net": {}}, _EQV2),
}

PRESETS: dict[str, dict[str, Sourced]] = {
    "md17_paper": _MD17_PAPER,
    "md17_paper_1_100": _MD17_PAPER | {"force_weight": Sourced(100.0, "NDeM, CVPR 2026, main text: 1:100")},
    "md17_fast": _MD17_PAPER
    | {
        "batch_size": Sourced(4, _OURS),
        "warmup_steps": Sourced(500, _OURS),
        "schedule": Sourced("cosine", _OURS),
        "clip_norm": Sourced(10.0, _OURS),
        "ema_decay": Sourced(0.999, _OURS),
        "nb_epoch": Sourced(None, _OURS),
        "max_steps": Sourced(30_000, _OURS),
        "validate_every": Sourced(500, _OURS),
        "early_stopping": Sourced(None, _OURS),
        "backbone": Sourced(
            {
                "torchmd_net": {"hidden_channels": 64, "num_layers": 3, "num_heads": 8, "num_rbf": 32, "cutoff": 5.0},
                "equiformer_v2": {"preset": "tiny"},
            },
            _OURS,
        ),
    },
    "qm9_paper": _QM9_PAPER,
    "qm9_fast": _QM9_PAPER
    | {
        "batch_size": Sourced(32, _OURS),
        "lr": Sourced(1e-3, _OURS),
        "warmup_steps": Sourced(200, _OURS),
        "clip_norm": Sourced(10.0, _OURS),
        "ema_decay": Sourced(0.999, _OURS),
        "max_steps": Sourced(20_000, _OURS),
        "validate_every": Sourced(1000, _OURS),
        "backbone": Sourced(
            {
                "torchmd_net": {"hidden_channels": 64, "num_layers": 3, "num_heads": 8, "num_rbf": 32, "cutoff": 5.0},
                "equiformer_v2": {"preset": "tiny"},
            },
            _OURS,
        ),
    },
    "oc20_153M": _OC20_153M,
    "oc20_83M": _OC20_153M
    | {
        "batch_size": Sourced(64, _EQV2 + ": 4 on each of 16 GPUs"),
        "lr": Sourced(2e-4, _EQV2),
        "min_lr": Sourced(2e-6, _EQV2 + ": 0.01 of lr"),
        "warmup_steps": Sourced(3125, _EQV2 + ": 0.1 epochs of 2 million frames"),
        "nb_epoch": Sourced(12, _EQV2),
        "weight": Sourced(10.0, "DeNS, TMLR 2024, OC20-2M; the NDeM paper gives none for OC20"),
        "backbone": Sourced({"equiformer_v2": {"preset": "83M"}, "torchmd_net": {}}, _EQV2),
        "objectives": Sourced(
            {
                "ndem": {"sigma": 0.1, "ratio": 0.5},
                "noisy_nodes": {"sigma": 0.1},
                "dens": {"sigma": 0.1, "ratio": 0.5, "probability": 0.5},
            },
            "DeNS, TMLR 2024, OC20-2M; the NDeM paper gives none of its own",
        ),
    },
    "oc20_31M": _OC20_31M,
    "oc20_tiny": _OC20_31M
    | {
        "batch_size": Sourced(4, _OURS),
        "eval_batch_size": Sourced(8, _OURS),
        "weight": Sourced(1.0, _OURS),
        "lr": Sourced(2e-3, _OURS),
        "min_lr": Sourced(2e-5, _OURS),
        "warmup_steps": Sourced(50, _OURS),
        "ema_decay": Sourced(0.99, _OURS),
        "nb_epoch": Sourced(2, _OURS),
        "validate_every": Sourced(None, _OURS),
        "backbone": Sourced(
            {
                "equiformer_v2": {"preset": "tiny", "grid_resolution": 8, "num_distance_basis": 128},
                "torchmd_net": {},
            },
            _OURS + ": coarse grids, few radial functions",
        ),
    },
}

#: Used where an estimator is given no preset.
DEFAULT_PRESET = "md17_paper"


def preset_values(name: str | None) -> dict[str, Any]:
    """Values of a preset by keyword; of the default one for None.

    Raises
    ------
    ConfigError
        If there is no such preset; lists those that there are.
    """
    name = DEFAULT_PRESET if name is None else name
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return {key: sourced.value for key, sourced in PRESETS[name].items()}
