"""Write tests/data/equiformer_v2_golden.json: what fairchem-core 1.10's EquiformerV2 computes, where it cannot be installed.

    python3.11 -m venv oracle
    oracle/bin/pip install "torch==2.4.1" "numpy<2" "e3nn==0.5.1" torch_geometric==2.6.1 numba lmdb hydra-core submitit orjson \
        wandb tensorboard huggingface_hub tqdm pyyaml setuptools
    oracle/bin/pip install --no-deps fairchem-core==1.10.0
    oracle/bin/pip install "pytorch-lightning>=2.4,<2.6" ase vesin jaxtyping safetensors pooch pandas scikit-learn
    oracle/bin/python scripts/make_golden_equiformer_v2.py

fairchem imports torch_scatter, which it does not declare and which has no wheels; `stand_in_scatter` provides what it
asks for. Weights come from `ndem_zoo.testing.fill_weights`, a formula, so that the file holds inputs and results only.
fairchem rolls the frames of its edges at random; here both use ours, and the file says how much its own rolls change.
The benchmark (benchmarks/equiformer) imports this module for the model and the names of its weights.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ndem_zoo.graph import Batch, within  # noqa: E402
from ndem_zoo.models.base import options_of  # noqa: E402
from ndem_zoo.models.equiformer_v2.model import EquiformerV2  # noqa: E402
from ndem_zoo.models.equiformer_v2.so3 import edge_rotations  # noqa: E402
from ndem_zoo.models.potential import Potential  # noqa: E402
from ndem_zoo.testing import batch_of, fill_weights, waves  # noqa: E402
from ndem_zoo.testing.common import distorted, example_crystal, example_molecules  # noqa: E402

GOLDEN_FILE = ROOT / "tests" / "data" / "equiformer_v2_golden.json"

_SMALL = {
    "num_layers": 2, "sphere_channels": 16, "attn_hidden_channels": 8, "num_heads": 2, "attn_alpha_channels": 8,
    "attn_value_channels": 4, "ffn_hidden_channels": 12, "edge_channels": 16, "num_distance_basis": 600, "max_z": 90,
    "average_atoms": 7.5, "average_neighbors": 11.25,
}  # fmt: skip

#: The configurations of the golden file: the variants that presets use, then those that options offer besides.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "31M, 83M": _SMALL | {"lmax": 4, "mmax": 2},
    "153M": _SMALL | {"num_layers": 1, "lmax": 6, "mmax": 3},
    "qm9": _SMALL | {"num_layers": 1, "lmax": 4, "mmax": 4, "cutoff": 5.0, "max_neighbors": 500},
    "md17": _SMALL | {"lmax": 3, "mmax": 2, "cutoff": 6.0, "max_neighbors": 500},
    "tiny, force encoding": _SMALL | {"lmax": 2, "mmax": 2, "encode_vectors": True},
    "rms norm, coarse grid": _SMALL | {"lmax": 3, "mmax": 2, "norm_type": "rms_norm_sh", "grid_resolution": None},
    "gates": _SMALL | {"lmax": 2, "mmax": 1, "use_gate_act": True, "use_grid_mlp": False},
    "sphere without network": _SMALL | {"lmax": 3, "mmax": 2, "use_grid_mlp": False, "use_attn_renorm": False},
    "not separable": _SMALL | {"lmax": 2, "mmax": 2, "use_sep_s2_act": False, "weight_init": "normal"},
}  # fmt: skip


def structures() -> list[Atoms]:
    """Distorted: a slab with an adsorbate, rock salt, three molecules."""
    slab = fcc111("Cu", (2, 2, 2), vacuum=8.0)
    add_adsorbate(slab, molecule("OH"), 1.6, "ontop")
    slab.pbc = True
    return [distorted(slab, 0.15), example_crystal(), *example_molecules()]


# ------------------------------------------------------------------------------------------------------- their model


def stand_in_scatter() -> None:
    """Put a module with the one function of torch_scatter that is called in its place."""

    def scatter(src: Tensor, index: Tensor, dim: int = 0, dim_size: int | None = None, reduce: str = "sum") -> Tensor:
        size = int(index.max()) + 1 if dim_size is None else dim_size
        shape = [1] * src.dim()
        shape[dim] = -1
        target = src.new_zeros((*src.shape[:dim], size, *src.shape[dim + 1 :]))
        return target.scatter_reduce(
            dim, index.reshape(shape).expand_as(src), src, {"add": "sum"}.get(reduce, reduce), include_self=False
        )

    module = types.ModuleType("torch_scatter")
    module.scatter = module.segment_coo = module.segment_csr = scatter
    sys.modules.setdefault("torch_scatter", module)


class Graph(types.SimpleNamespace):
    """What fairchem's backbone wants to know of the edges."""

    @classmethod
    def of(cls, batch: Batch) -> Graph:
        """The edges of our batch; their source is our neighbor, their target our center."""
        vectors = batch.vectors()
        return cls(
            edge_index=torch.stack([batch.src, batch.dst]),
            edge_distance=vectors.norm(dim=-1),
            edge_distance_vec=vectors,
            atomic_numbers_full=batch.z,
            batch_full=batch.system,
            node_offset=0,
        )


def their_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `EquiformerV2` under fairchem's names."""
    names = {
        "cutoff": "max_radius", "max_z": "max_num_elements", "average_atoms": "avg_num_nodes",
        "average_neighbors": "avg_degree", "strict_neighbors": "enforce_max_neighbors_strictly",
    }  # fmt: skip
    ours = {"roll", "smooth_cutoff", "encode_vectors", "checkpoint_activations", "num_distance_basis"}
    complete = options_of(EquiformerV2, options)
    found = {names.get(name, name): value for name, value in complete.items() if name not in ours}
    found["lmax_list"], found["mmax_list"] = [found.pop("lmax")], [found.pop("mmax")]
    return found


def fairchem_model(options: dict[str, Any], same_roll: bool = True) -> nn.ModuleDict:
    """Backbone and two heads of fairchem; the graph is that of the batch, the rolls are ours or its own."""
    stand_in_scatter()
    from fairchem.core.models.equiformer_v2 import equiformer_v2 as theirs

    class Reference(theirs.EquiformerV2Backbone):
        def generate_graph(self, data, **ignored):
            return data.graph

        def _init_edge_rot_mat(self, data, edge_index, edge_distance_vec):
            if same_roll:
                return edge_rotations(edge_distance_vec).detach()
            return super()._init_edge_rot_mat(data, edge_index, edge_distance_vec)

    backbone = Reference(**their_options(options))
    return nn.ModuleDict(
        {"backbone": backbone, "energy": theirs.EqV2ScalarHead(backbone), "forces": theirs.EqV2VectorHead(backbone)}
    )


_RADIAL = {"linear_1": "net.0", "norm_1": "net.1", "linear_2": "net.3", "norm_2": "net.4", "linear_3": "net.6"}


def their_name(name: str, options: dict[str, Any]) -> str | None:
    """Name in fairchem's modules of a weight of our `Potential`; None for what it does not have."""
    for ours, theirs in (("energy_head.ffn.", "energy.energy_block."), ("force_head.ga.", "forces.force_block.")):
        name = name.replace(ours, theirs)
    if not name.startswith(("backbone.", "energy.", "forces.")) or "vector_embedding" in name:
        return None
    name = name.replace("backbone.embedding.", "backbone.sphere_embedding.")
    name = re.sub(r"radial\.((source|target)_embedding)", r"\1", name)
    before = "" if "edge_degree" in name else "so2_conv_1."
    name = re.sub(r"radial\.(\w+?_\d)", lambda found: f"{before}rad_func.{_RADIAL[found[1]]}", name)
    name = name.replace("edge_degree.", "edge_degree_embedding.")
    name = re.sub(r"fc_m\.(\d)", r"so2_m_conv.\1.fc", name)
    name = re.sub(r"grid_mlp\.(\d)", lambda found: f"grid_mlp.{2 * int(found[1])}", name)
    return name.replace("scalar_linear.", "scalar_mlp.0." if options.get("use_grid_mlp", True) else "gating_linear.")


def copy_weights(potential: Potential, model: nn.ModuleDict, options: dict[str, Any]) -> None:
    """Give fairchem's modules the weights of `potential`; nothing may be left over."""
    own = dict(model.named_parameters())
    given = {their_name(name, options): value for name, value in potential.named_parameters()}
    given.pop(None, None)
    if given.keys() != own.keys():
        raise RuntimeError(f"weights do not match: {sorted(given.keys() ^ own.keys())}")
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value.reshape(own[name].shape))


def fairchem_data(batch: Batch, options: dict[str, Any]) -> Any:
    """A batch as fairchem's models take it, with the edges that count."""
    backbone = EquiformerV2(**options)
    near = within(batch, backbone.cutoff, backbone.nearest)
    return types.SimpleNamespace(
        pos=batch.pos, atomic_numbers=batch.z, batch=batch.system, natoms=batch.n_atoms, graph=Graph.of(near)
    )


def fairchem_outputs(model: nn.ModuleDict, data: Any) -> dict[str, Tensor]:
    """Energies (S,) and forces (N, 3) of fairchem's modules, and the features of the atoms (N, K, C)."""
    # The backbone replaces distances by radial functions in the graph that it is given.
    emb = model["backbone"](types.SimpleNamespace(**vars(data) | {"graph": Graph(**vars(data.graph))}))
    features = emb["node_embedding"].embedding
    outputs = {"features": features, "energy": model["energy"](data, emb)["energy"]}
    return outputs | {"forces": model["forces"](data, emb)["forces"]}


def encoded(model: nn.ModuleDict, potential: Potential, vectors: Tensor) -> None:
    """Add the force encoding, as DeNS does before the edge-degree embedding, to fairchem's backbone."""
    from e3nn import o3

    linear, backbone = potential.backbone.vector_embedding, model["backbone"]
    lmax = potential.backbone.sizes.lmax
    harmonics = o3.spherical_harmonics(o3.Irreps.spherical_harmonics(lmax), vectors, True, "component")
    harmonics = harmonics * vectors.norm(dim=-1, keepdim=True) / 3**0.5
    weight = torch.repeat_interleave(linear.weight, 2 * torch.arange(lmax + 1) + 1, dim=0)  # (K, C, 1)
    added = torch.einsum("nk,kc->nkc", harmonics, weight[:, :, 0])
    added[:, 0] += linear.bias

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.embedding = output.embedding + added
        return output

    backbone.edge_degree_embedding.register_forward_hook(hook)


def evaluate(
    potential: Potential, options: dict[str, Any], batch: Batch, vectors: Tensor | None, same_roll: bool = True
) -> dict[str, Tensor]:
    """What fairchem says with our weights."""
    with torch.no_grad(), default_dtype(batch.pos.dtype):
        model = fairchem_model(options, same_roll).to(batch.pos.dtype).eval()
        copy_weights(potential, model, options)
        if vectors is not None:
            encoded(model, potential, vectors)
        return fairchem_outputs(model, fairchem_data(batch, options))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype, in which fairchem makes buffers and rotations whatever the positions have."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -------------------------------------------------------------------------------------------------------------- file


def golden_entry(options: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """Results of a configuration, and how far fairchem's own rolls, drawn twice, take them apart."""
    potential = fill_weights(Potential(EquiformerV2(**options), forces="direct")).to(batch.pos.dtype).eval()
    vectors = torch.from_numpy(waves(batch.pos.shape, 3.0)) if options.get("encode_vectors") else None
    results = evaluate(potential, options, batch, vectors)
    torch.manual_seed(0)
    rolled = evaluate(potential, options, batch, vectors, same_roll=False)
    spread = {
        f"{name}_spread_of_rolls": float((rolled[name] - results[name]).abs().max()) for name in ("energy", "forces")
    }
    with torch.no_grad():
        ours = potential(batch, node_vectors=vectors)
    for name in ("energy", "forces"):
        error = (getattr(ours, name) - results[name]).abs().max() / results[name].abs().max()
        print(
            f"{name}: {error:.1e} off; rolls {spread[f'{name}_spread_of_rolls']:.1e}; up to {results[name].abs().max():.2f}"
        )
    features = results.pop("features")[::5, :, ::5]
    return {"options": options, "features": features.tolist(), **{k: v.tolist() for k, v in results.items()}, **spread}


def main() -> None:
    """Compute all configurations and write the file."""
    atoms = structures()
    batch = batch_of(atoms, 12.0)
    packages = ("fairchem-core", "torch", "numpy", "ase", "e3nn")
    content = {
        "made_with": {name: importlib.metadata.version(name) for name in packages},
        "counts": [len(a) for a in atoms],
        "z": np.concatenate([a.numbers for a in atoms]).tolist(),
        "pos": np.concatenate([a.positions for a in atoms]).tolist(),
        "cell": [a.cell.array.tolist() for a in atoms],
        "pbc": [a.pbc.tolist() for a in atoms],
        "entries": {name: golden_entry(options, batch) for name, options in CONFIGURATIONS.items()},
    }
    temporary = GOLDEN_FILE.with_suffix(".tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, GOLDEN_FILE)
    print(f"wrote {GOLDEN_FILE} ({GOLDEN_FILE.stat().st_size / 1024:.0f} kB)")


if __name__ == "__main__":
    main()
