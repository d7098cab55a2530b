"""Write tests/data/torchmd_net_golden.json: what torchmd-net itself computes, for environments where it cannot be installed.

    pip install torchmd-net            # 3.1; needs a recent torch
    python scripts/make_golden_torchmd_net.py

Weights come from `ndem_zoo.testing.fill_weights`, a formula, so that the file holds inputs and results only. The parity
test (tests/test_parity_torchmd_net.py) imports this module for the model and the names of its weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ndem_zoo.graph import Batch  # noqa: E402
from ndem_zoo.models.potential import Potential  # noqa: E402
from ndem_zoo.models.torchmd_net import TorchMDNet  # noqa: E402
from ndem_zoo.testing import fill_weights  # noqa: E402
from ndem_zoo.testing.common import distorted, example_cluster  # noqa: E402

GOLDEN_FILE = ROOT / "tests" / "data" / "torchmd_net_golden.json"

#: The configurations of the golden file: small, one with each kind of cutoff, one with pairs beyond it.
CONFIGURATIONS = [
    {"hidden_channels": 16, "num_layers": 2, "num_heads": 2, "num_rbf": 8, "cutoff": 5.0, "vector_cutoff": True},
    {"hidden_channels": 16, "num_layers": 2, "num_heads": 2, "num_rbf": 8, "cutoff": 5.0, "vector_cutoff": False},
    {"hidden_channels": 24, "num_layers": 3, "num_heads": 4, "num_rbf": 6, "cutoff": 2.6, "vector_cutoff": True},
    {"hidden_channels": 24, "num_layers": 3, "num_heads": 4, "num_rbf": 6, "cutoff": 2.6, "vector_cutoff": False},
]


def structures() -> list[Atoms]:
    """Molecules of several sizes and elements, one atom alone, and 36 atoms, of which not all see each other."""
    molecules = [distorted(molecule(name)) for name in ("CH3CH2OH", "C6H6", "CH3CN", "H2O", "SO2")]
    return [*molecules, Atoms("N", [[0.1, 0.2, 0.3]]), example_cluster()]


def torchmd_net_model(options: dict[str, Any], precision: int = 64, max_num_neighbors: int = 128) -> torch.nn.Module:
    """torchmd-net's ET with the options of `TorchMDNet`; `precision` in bits."""
    from torchmdnet.models.model import create_model

    arguments = {
        "model": "equivariant-transformer",
        "output_model": "Scalar",
        "embedding_dimension": options["hidden_channels"],
        "num_layers": options["num_layers"],
        "num_heads": options["num_heads"],
        "num_rbf": options["num_rbf"],
        "cutoff_upper": options["cutoff"],
        "cutoff_lower": 0.0,
        "vector_cutoff": options["vector_cutoff"],
        "trainable_rbf": options.get("trainable_rbf", False),
        "rbf_type": "expnorm",
        "activation": "silu",
        "attn_activation": "silu",
        "distance_influence": "both",
        "neighbor_embedding": True,
        "derivative": True,
        "max_z": 100,
        "max_num_neighbors": max_num_neighbors,
        "precision": precision,
        "reduce_op": "add",
        "aggr": "add",
        "atom_filter": -1,
        "prior_model": None,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_model(arguments)


def their_name(name: str) -> str | None:
    """Name in torchmd-net of a weight of our `Potential`; None for what it does not have."""
    for ours, theirs in (("backbone.", "representation_model."), ("energy_head.", "output_model.")):
        if name.startswith(ours):
            return re.sub(r"update_net\.(\d)", r"update_net.layers.\1", theirs + name.removeprefix(ours))
    return None


def copy_weights(potential: Potential, model: torch.nn.Module) -> None:
    """Give torchmd-net's model the weights and radial constants of `potential`; nothing may be left over."""
    given = {their_name(name): value for name, value in potential.state_dict().items() if their_name(name)}
    own = {"mean", "std", "representation_model.distance.box"}
    missing, unexpected = model.load_state_dict(given, strict=False)
    if set(missing) - own or unexpected:
        raise RuntimeError(f"weights do not match: missing {missing}, unexpected {unexpected}")


def torchmd_net_vector_head(potential_head: torch.nn.Module, channels: int) -> torch.nn.Module:
    """torchmd-net's vector output module with the weights of our vector head."""
    from torchmdnet.models.output_modules import EquivariantVectorOutput

    head = EquivariantVectorOutput(channels, activation="silu", dtype=torch.float64)
    given = potential_head.state_dict()
    head.load_state_dict({re.sub(r"update_net\.(\d)", r"update_net.layers.\1", k): v for k, v in given.items()})
    return head


def evaluate(potential: Potential, options: dict[str, Any], batch: Batch) -> dict[str, torch.Tensor]:
    """What torchmd-net says with our weights: energy (S,), forces (N, 3), vectors (N, 3) of a vector head."""
    model = torchmd_net_model(options)
    copy_weights(potential, model)
    energy, forces = model(batch.z, batch.pos.clone(), batch.system)
    x, vec, z, pos, system = model.representation_model(batch.z, batch.pos.clone(), batch.system)
    head = torchmd_net_vector_head(fill_weights(potential.backbone.vector_head()).double(), options["hidden_channels"])
    vectors = head.pre_reduce(x, vec, z, pos, system)
    return {"energy": energy[:, 0], "forces": forces, "vectors": vectors}


def main() -> None:
    """Compute all configurations and write the file."""
    from ndem_zoo.testing import batch_of

    atoms = structures()
    entries = []
    for options in CONFIGURATIONS:
        potential = fill_weights(Potential(TorchMDNet(**options))).double()
        result = evaluate(potential, options, batch_of(atoms, options["cutoff"]))
        expansion = potential.backbone.distance_expansion
        constants = {"means": expansion.means.tolist(), "betas": expansion.betas.tolist()}
        entries.append({"options": options, **constants, **{k: v.detach().tolist() for k, v in result.items()}})
    content = {
        "made_with": {name: importlib.metadata.version(name) for name in ("torchmd-net", "torch", "numpy", "ase")},
        "counts": [len(a) for a in atoms],
        "z": np.concatenate([a.numbers for a in atoms]).tolist(),
        "pos": np.concatenate([a.positions for a in atoms]).tolist(),
        "entries": entries,
    }
    temporary = GOLDEN_FILE.with_suffix(".tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, GOLDEN_FILE)
    print(f"wrote {GOLDEN_FILE} ({GOLDEN_FILE.stat().st_size / 1024:.0f} kB)")


if __name__ == "__main__":
    main()
