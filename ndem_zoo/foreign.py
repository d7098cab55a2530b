"""Checkpoints of others: TorchMD-NET's Equivariant Transformer and its descendants (Zaidi et al., Frad, SliDe).

A file is read by a machine of our own that executes nothing (`datasets.pickles.read_torch_file`; no `torch.load`, so no torch
is too old to be safe); here its weights get our names, its hyper-parameters become options of `TorchMDNet`, and what our
network cannot represent is refused. `transfer.py` copies the weights; `NDeMTorchMDNet.from_checkpoint` makes a model of them.
None of the published files was at hand: names and shapes are those of the published code.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from ase import units
from torch import Tensor

from ndem_zoo.datasets.pickles import DictRecord, read_torch_file
from ndem_zoo.errors import ConfigError, FileFormatError
from ndem_zoo.models.base import Head
from ndem_zoo.models.torchmd_net import TorchMDNet
from ndem_zoo.physics import MAX_Z
from ndem_zoo.transfer import Report, Start

Flavor = Literal["plain", "whitened", "whitened_noise", "per_layer_norms", "get"]

#: eV in the units that energies of other packages have.
ENERGY_UNITS: dict[str, float] = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
    "Hartree": units.Hartree,
}

#: What a hyper-parameter must be for our network to compute the same; left out, it is that.
_MUST_BE: dict[str, Any] = {
    "model": "equivariant-transformer",
    "activation": "silu",
    "attn_activation": "silu",
    "rbf_type": "expnorm",
    "distance_influence": "both",
    "neighbor_embedding": True,
    "cutoff_lower": 0.0,
    "aggr": "add",
}

#: Weights that are left out on purpose, and why; the first pattern that fits counts.
_DROPPED: tuple[tuple[str, str], ...] = (
    (r"normalizer\.", "running statistics of the noise in pre-training; they would rescale ours"),
    (r"^representation_model\.distance\.box$", "a cell: it belongs to structures"),
    (r"^prior_model\.", "reference energies are those of the data"),
    (r"^(mean|std)$", "units of the target that it was trained on"),
    (r"^output_model_noise\.[1-4]\.", "SliDe's heads for bonds, angles and torsions: nothing here corresponds"),
    (r"^(angle_ijk_proj|dihedral_jk_proj)\.", "SliDe's heads for angles and torsions: nothing here corresponds"),
    (
        r"^representation_model\.(init_e|update_es|emb)\.",
        "SliDe's features of edges and angles (GET): TorchMDNet has none",
    ),
    (r"^representation_model\.(out_norm_vec|vec_norms)\.", "norms of vectors: TorchMDNet has none"),
    (r"^output_model\.atomic_mass$", "a constant"),
)


@dataclass(frozen=True)
class Imported:
    """A checkpoint of others, in our names.

    Attributes
    ----------
    path
        The file.
    flavor
        ``"plain"``; ``"whitened"``: a norm of the vectors before all heads; ``"whitened_noise"``: before the denoising head
        only; ``"per_layer_norms"`` (Frad on QM9); ``"get"`` (SliDe's network with features of angles).
    options
        Options of `TorchMDNet` that the weights were made for.
    tensors
        ``backbone....``, ``energy_head....`` and ``noise_head....``; the denoising head as it is in the file, where it
        predicts +epsilon.
    mean, std
        Of the target, in the file's units: E = sum_i (std * s_i + atom_references[z_i]) + mean.
    atom_references : (Z,) or None
        By atomic number, in the file's units; None if there are none.
    hyper_parameters
        Those in the file; empty for a bare set of weights.
    differences
        What our network does otherwise than the one that was trained; empty if nothing but the norms that `flavor` names.
    report
        What became of each weight.
    """

    path: str
    flavor: Flavor
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    mean: float
    std: float
    atom_references: np.ndarray | None
    hyper_parameters: dict[str, Any]
    differences: tuple[str, ...]
    report: Report

    @property
    def is_pretrained_only(self) -> bool:
        """Whether its energy head was never trained."""
        return bool(self.hyper_parameters.get("denoising_only"))

    def start(self) -> Start:
        """Backbone and denoising head as weights to begin with; energies are learned anew."""
        origin = {"model": f"checkpoint ({self.flavor})", "name": self.report.source, "split_hash": None}
        return Start("imported", "torchmd_net", self.options, self.tensors, 1, self.report, origin)

    def why_no_energies(self) -> str:
        """Why a model made of it would not give the energies of the one that was trained; empty if it would."""
        prior = self.hyper_parameters.get("prior_model")
        reasons = [
            (self.is_pretrained_only, "it was pre-trained by denoising only"),
            (not any(name.startswith("energy_head.") for name in self.tensors), "it has no energy head of ours"),
            (self.flavor not in ("plain", "whitened_noise"), f"its flavor is {self.flavor!r}"),
            (bool(self.differences), "; ".join(self.differences)),
            (self.hyper_parameters.get("output_model", "Scalar") != "Scalar", "its output model is not 'Scalar'"),
            (
                self.hyper_parameters.get("reduce_op", "add") not in ("add", "sum"),
                "its energies are no sums over atoms",
            ),
            (_other_priors(prior), f"it adds the prior {prior!r}"),
        ]
        return "; ".join(reason for holds, reason in reasons if holds)


def import_checkpoint(
    path: str | os.PathLike, *, partial: bool = False, noise_head: str = "output_model_noise"
) -> Imported:
    """Read a checkpoint of TorchMD-NET's ET, Zaidi et al., Frad or SliDe; executes nothing that is in the file.

    Parameters
    ----------
    path
        A Lightning checkpoint (``.ckpt``), or a set of weights that `torch.save` wrote.
    partial
        Also read networks that `TorchMDNet` cannot represent, for the weights that both have. The result is a starting
        point, not the same function.
    noise_head
        Which of the file's heads becomes the denoising head. SliDe's ``"output_model_ff"`` predicts forces of a classical
        model instead of noise.

    Returns
    -------
    imported : Imported
        Weights, options, units, and a report; ``print(imported.report)``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If the file is damaged, mentions names that data do not need, or holds no such network.
    ConfigError
        If `TorchMDNet` cannot represent the network, and `partial` is not asked for.
    """
    weights, hparams = _contents(read_torch_file(path), str(path))
    report = Report(str(path))
    tensors = _renamed(weights, noise_head, report)
    flavor, notes = _flavor(weights, hparams)
    report.notes += notes
    options = _options(tensors, hparams, str(path))
    differences = _differences(hparams, options, tensors)
    refused = [*differences, *_UNFIT.get(flavor, ())]
    if refused and not partial:
        raise ConfigError(f"{path}: {'; '.join(refused)}. partial=True takes the weights that both have")
    report.notes += refused
    _keep_what_fits(tensors, options, report)
    lacking = [name for name in report.fresh if name.startswith("backbone.")]
    if lacking and not partial:
        shapes = {name: report.mismatched[name] for name in lacking if name in report.mismatched}
        raise FileFormatError(
            f"{path} lacks weights of TorchMDNet, or has them in other shapes: {lacking} {shapes or ''}".rstrip()
        )
    report.loaded += tensors
    return Imported(
        path=str(path),
        flavor=flavor,
        options=options,
        tensors=tensors,
        mean=_number(weights, "mean", 0.0),
        std=_number(weights, "std", 1.0),
        atom_references=_atom_references(weights),
        hyper_parameters=hparams,
        differences=tuple(differences),
        report=report,
    )


#: Flavors that `TorchMDNet` cannot represent.
_UNFIT: dict[str, tuple[str, ...]] = {
    "get": ("the network is SliDe's GET, whose messages depend on angles, which TorchMDNet does not have",),
    "per_layer_norms": ("every layer normalizes its vectors (vec_norms), which TorchMDNet does not do",),
}


def _contents(value: Any, path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights without the prefix ``model.``, and hyper-parameters, of a Lightning checkpoint or a bare set of weights."""
    content = _mapping(value)
    hparams = _mapping(content.get("hyper_parameters", {}))
    weights = _mapping(content["state_dict"]) if "state_dict" in content else content
    arrays = {}
    for name, array in weights.items():
        if isinstance(name, str) and isinstance(array, np.ndarray) and array.dtype.kind in "fiub":
            arrays[re.sub(r"^model\.", "", name)] = array
        elif "state_dict" in content:
            raise FileFormatError(f"{path}: weight {name!r} is a {type(array).__name__}, not a tensor of numbers")
    embedding = arrays.get("representation_model.embedding.weight")
    if embedding is None or embedding.ndim != 2:
        raise FileFormatError(
            f"{path} holds no Equivariant Transformer: there is no table representation_model.embedding.weight among "
            f"{', '.join(list(arrays)[:5]) or 'no weights'}"
        )
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FileFormatError(f"{path}: weight {name!r} is not finite")
    plain = (str, int, float, bool, type(None), list)
    return arrays, {k: v for k, v in hparams.items() if isinstance(k, str) and isinstance(v, plain)}


def _mapping(value: Any) -> dict[Any, Any]:
    """A dict, an ordered one, Lightning's `AttributeDict`, or a Namespace, as a dict; anything else is empty."""
    if isinstance(value, DictRecord):
        return value.entries or value.fields
    return value if isinstance(value, dict) else {}


def _renamed(weights: Mapping[str, np.ndarray], noise_head: str, report: Report) -> dict[str, Tensor]:
    """Weights by our names; those without one go into the report."""
    if noise_head not in ("output_model_noise", "output_model_ff"):
        raise ConfigError(f"noise_head={noise_head!r}; allowed are 'output_model_noise' and 'output_model_ff'")
    places = (
        (r"^representation_model\.", "backbone."),
        (r"^output_model\.(?=output_network\.)", "energy_head."),
        (rf"^{noise_head}\.(0\.)?(?=output_network\.)", "noise_head."),
    )
    found: dict[str, Tensor] = {}
    for name, array in weights.items():
        reason = next((why for pattern, why in _DROPPED if re.search(pattern, name)), None)
        own = name
        for pattern, prefix in places:
            own = re.sub(pattern, prefix, own)
        if reason is not None or own == name:
            report.skipped[name] = reason or "nothing here corresponds"
            continue
        own = re.sub(r"\.update_net\.layers\.([02])\.", r".update_net.\1.", own)
        found[own] = torch.from_numpy(np.array(array))
    return found


def _flavor(weights: Mapping[str, Any], hparams: Mapping[str, Any]) -> tuple[Flavor, list[str]]:
    """Which of the family's networks it is, and what that means for the heads."""
    body = "representation_model."
    if any(name.startswith((f"{body}init_e.", f"{body}update_es.")) for name in weights):
        return "get", []
    if any(name.startswith(f"{body}vec_norms.") for name in weights):
        return "per_layer_norms", []
    if f"{body}out_norm_vec.weight" not in weights:
        return "plain", []
    # Choice: without hyper-parameters the norm is taken to be before all heads, which promises less.
    if hparams.get("seperate_noise") and not hparams.get("layernorm_on_vec"):
        return "whitened_noise", [
            "its denoising head reads normalized vectors, ours plain ones: a start, not the same function"
        ]
    return "whitened", ["its heads read normalized vectors, ours plain ones: a start, not the same function"]


def _options(tensors: Mapping[str, Tensor], hparams: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Options of `TorchMDNet`, from shapes where they show them, else from hyper-parameters."""
    max_z, channels = tensors["backbone.embedding.weight"].shape
    means = tensors.get("backbone.distance_expansion.means")
    if means is None or means.dim() != 1 or not 0 < float(means[0]) < 1:
        raise FileFormatError(f"{path} has no radial functions distance_expansion.means of the kind 'expnorm'")
    layers = {
        int(found[1]) for name in tensors if (found := re.match(r"backbone\.attention_layers\.(\d{1,4})\.", name))
    }
    if layers != set(range(len(layers))):
        raise FileFormatError(f"{path} has attention layers {sorted(layers)}; they must be numbered from 0 on")
    try:
        given = {
            "num_heads": int(hparams.get("num_heads", 8)),
            "cutoff": float(hparams.get("cutoff_upper", round(-math.log(float(means[0])), 4))),
            "vector_cutoff": bool(hparams.get("vector_cutoff", False)),
            "trainable_rbf": bool(hparams.get("trainable_rbf", False)),
        }
    except (TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{path} has hyper-parameters that are no numbers: {error}") from error
    return {
        "hidden_channels": channels,
        "num_layers": len(layers),
        "num_rbf": len(means),
        "max_z": max_z,
        "encode_vectors": False,
        **given,
    }


def _differences(hparams: Mapping[str, Any], options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Hyper-parameters with which our network would compute something else."""
    found = [
        f"it has {name}={hparams[name]!r}, TorchMDNet {value!r}"
        for name, value in _MUST_BE.items()
        if hparams.get(name, value) != value and not str(hparams[name]).startswith(f"{value}f2d")
    ]
    start = float(tensors["backbone.distance_expansion.means"][0])
    if not options["trainable_rbf"] and abs(start - math.exp(-options["cutoff"])) > 1e-3 * start:
        found.append(
            f"its radial functions begin at {start:.6g}, those of a cutoff of {options['cutoff']:g} Å at "
            f"{math.exp(-options['cutoff']):.6g}"
        )
    return found


def _keep_what_fits(tensors: dict[str, Tensor], options: dict[str, Any], report: Report) -> None:
    """Drop weights that `TorchMDNet` or its heads do not have in this shape, in place; heads count as a whole."""
    with torch.device("meta"):  # shapes alone: a table of one row and a million channels must not become a network
        backbone = TorchMDNet(**options)
        modules: dict[str, TorchMDNet | Head] = {
            "backbone": backbone,
            "energy_head": backbone.scalar_head(),
            "noise_head": backbone.vector_head(),
        }
    wanted = {
        f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()
    }
    for name in list(tensors):
        own = wanted.get(name)
        if own is None:
            report.skipped[name] = "nothing here corresponds"
        elif tensors[name].shape != own.shape:
            report.mismatched[name] = (tuple(tensors[name].shape), tuple(own.shape))
        if own is None or name in report.mismatched:
            del tensors[name]
    for part in ("energy_head", "noise_head"):
        names = [name for name in wanted if name.startswith(f"{part}.")]
        if not all(name in tensors for name in names):
            report.skipped |= {name: "the head is not whole" for name in names if tensors.pop(name, None) is not None}
    report.fresh |= {name: "the file has no such weight of this shape" for name in wanted if name not in tensors}


def _number(weights: Mapping[str, np.ndarray], name: str, default: float) -> float:
    """A scalar among the weights."""
    value = weights.get(name)
    return default if value is None or value.size != 1 else float(value.reshape(()))


def _atom_references(weights: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Reference energies (MAX_Z + 1,) in the file's units: those in use, or else those that they began with."""
    for name in ("atomref.weight", "initial_atomref"):
        found = next((v for k, v in weights.items() if re.fullmatch(rf"prior_model\.(0\.)?{re.escape(name)}", k)), None)
        if found is not None and found.ndim == 2 and found.shape[1] == 1 and len(found) <= MAX_Z + 1:
            table = np.zeros(MAX_Z + 1)
            table[: len(found)] = found[:, 0]
            return table
    return None


def _other_priors(prior: Any) -> bool:
    """Whether there is a prior beyond reference energies."""
    names = prior if isinstance(prior, list) else [prior]
    return any(name not in (None, "", "Atomref") for name in names)


def in_units(imported: Imported, energy_unit: str) -> dict[str, Any]:
    """Scale, shift and reference energies of a `Potential` in eV.

    Raises
    ------
    ConfigError
        If the unit is not known.
    """
    if energy_unit not in ENERGY_UNITS:
        raise ConfigError(f"energy_unit={energy_unit!r}; allowed are {', '.join(ENERGY_UNITS)}")
    factor = ENERGY_UNITS[energy_unit]
    reference = np.zeros(MAX_Z + 1) if imported.atom_references is None else factor * imported.atom_references
    return {"scale": factor * imported.std, "shift": factor * imported.mean, "reference": reference}


def with_energies(imported: Imported) -> Start:
    """Backbone, energy head and denoising head as weights of a fitted model, which they are.

    Raises
    ------
    ConfigError
        If its energies would not be those of the model that was trained.
    """
    reason = imported.why_no_energies()
    if reason:
        raise ConfigError(f"{imported.path} gives no energies: {reason}")
    return dataclasses.replace(imported.start(), kind="complete")
