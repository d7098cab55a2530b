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

_FRAD = "Frad, code of the NMI edition, fine-tuning on MD17"
_SLIDE = "SliDe, ICLR 2024, code, fine-tuning on MD17"
_DENS = "DeNS, TMLR 2024, MD17 (Equiformer, aspirin)"
_GEOSSL = "GeoSSL-DDM, ICLR 2023, code, fine-tuning on MD17"
_NODES = "Noisy Nodes, ICLR 2022, QM9"
_KCAL = 0.04336410390059322  # eV, 1 kcal/mol

_OTHERS = _MD17_PAPER["objectives"].value  # those that the recipes of rivals say nothing of

_MD17_FRAD = _MD17_PAPER | {
    "loss": Sourced("smooth_l1", _FRAD),
    "scale": Sourced(_KCAL, _FRAD + ": errors in kcal/mol and kcal/mol/Å; the network's own unit there is another"),
    "energy_weight": Sourced(0.01, _FRAD + ": 0.2, with gradients of the energy scaled by 0.05 (ema_alpha_y)"),
    "force_weight": Sourced(0.8, _FRAD),
    "weight": Sourced(
        0.1, _FRAD + "; much less in effect there, where the target is divided by the pre-training's sigma"
    ),
    "objectives": Sourced(
        _OTHERS
        | {
            "frad": {"sigma": 0.005, "internal": "rotors", "rotor_sigma": 20.0, "separate_branch": True},
            "noisy_nodes": {"sigma": 0.005, "separate_branch": True},
            "slide": {"sigma": 0.04},
        },
        _FRAD + "; slide: " + _SLIDE.replace("fine-tuning on MD17", "pre-training"),
    ),
}

_MD17_DENS = _MD17_PAPER | {
    "lr": Sourced(5e-4, _DENS),
    "weight_decay": Sourced(1e-6, _DENS),
    "warmup_steps": Sourced(1190, _DENS + ": 10 epochs of 950 frames"),
    "warmup_factor": Sourced(0.002, _DENS + ": from 1e-6"),
    "schedule": Sourced("cosine", _DENS),
    "min_lr": Sourced(1e-6, _OURS + ": where the warm-up begins"),
    "nb_epoch": Sourced(1500, _DENS),
    "early_stopping": Sourced(None, _UNUSED),
    "energy_weight": Sourced(1.0, _DENS),
    "force_weight": Sourced(80.0, _DENS + "; malonaldehyde 100, uracil 20, naphthalene 2:20"),
    "loss": Sourced("l2mae", _DENS),
    "scale": Sourced("target_std", _DENS),
    "weight": Sourced(5.0, _DENS),
    "weight_schedule": Sourced("decay", _DENS),
    "backbone": Sourced(_MD17_PAPER["backbone"].value, "as md17_paper; " + _DENS + " has another network"),
    "objectives": Sourced(
        _OTHERS | {"dens": {"sigma": 0.05, "ratio": 0.25, "probability": 0.25, "denoising_loss": "l2mae"}},
        _DENS + "; toluene: probability 0.125, sigma 0.025",
    ),
}

_MD17_GEOSSL = _MD17_PAPER | {
    "batch_size": Sourced(5, _GEOSSL),
    "lr": Sourced(5e-4, _GEOSSL),
    "warmup_steps": Sourced(0, _GEOSSL),
    "schedule": Sourced("cosine", _GEOSSL),
    "min_lr": Sourced(0.0, _GEOSSL),
    "nb_epoch": Sourced(1000, _GEOSSL),
    "early_stopping": Sourced(None, _UNUSED),
    "energy_weight": Sourced(0.05, _GEOSSL),
    "force_weight": Sourced(0.95, _GEOSSL),
    "loss": Sourced("l1", _GEOSSL),
    "scale": Sourced(_KCAL, _GEOSSL + ": errors in kcal/mol and kcal/mol/Å"),
    "weight": Sourced(1.0, _OURS + ": there distances are denoised in pre-training only"),
    "backbone": Sourced(
        _MD17_PAPER["backbone"].value, "as md17_paper; " + _GEOSSL + ": SchNet or PaiNN of 128 channels"
    ),
    "objectives": Sourced(
        _OTHERS | {"geossl": {"sigma": 0.3, "levels": 30, "largest": 10.0, "smallest": 0.01}},
        _GEOSSL.replace("fine-tuning on MD17", "pre-training"),
    ),
}

_QM9_NOISY_NODES = _QM9_PAPER | {
    "lr": Sourced(1e-4, _NODES),
    "ema_decay": Sourced(0.9999, _NODES + ", with a slow start as here"),
    "weight": Sourced(0.1, _NODES + "; 0.01 for U0, U, H and G"),
    "backbone": Sourced(_QM9_PAPER["backbone"].value, "as qm9_paper; " + _NODES + " has another network (GNS)"),
    "objectives": Sourced(
        _QM9_PAPER["objectives"].value | {"noisy_nodes": {"sigma": 0.02, "separate_branch": False}}, _NODES
    ),
}

PRESETS: dict[str, dict[str, Sourced]] = {
    "md17_paper": _MD17_PAPER,
    "md17_frad": _MD17_FRAD,
    "md17_slide": _MD17_FRAD | {"lr": Sourced(5e-4, _SLIDE + "; otherwise Frad's recipe, also its objective")},
    "md17_dens": _MD17_DENS,
    "md17_geossl": _MD17_GEOSSL,
    "qm9_noisy_nodes": _QM9_NOISY_NODES,
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
