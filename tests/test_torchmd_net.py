"""The Equivariant Transformer: sizes, names, equations; and torchmd-net's own numbers, stored where it does not install.

tests/data/torchmd_net_golden.json was written by scripts/make_golden_torchmd_net.py with torchmd-net itself; where it is
installed, test_parity_torchmd_net.py compares live.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import make_batch
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import ExpNormalBasis, TorchMDNet, cosine_cutoff
from ndem_zoo.testing import BackboneCase, batch_of, check_backbone, fill_weights
from ndem_zoo.testing.backbones import crossing
from ndem_zoo.testing.common import example_molecules

GOLDEN = json.loads((Path(__file__).parent / "data" / "torchmd_net_golden.json").read_text(encoding="utf-8"))
QM9 = {"hidden_channels": 256, "num_layers": 8, "num_rbf": 64}


# --------------------------------------------------------------------------------------------------------- sizes and names


@pytest.mark.parametrize(("options", "count"), [({}, 1_339_906), (QM9, 6_864_898)], ids=["MD17", "QM9"])
def test_parameter_counts(options, count):
    potential = Potential(TorchMDNet(**options))
    assert potential.n_parameters == count
    noisy_head = sum(p.numel() for p in potential.backbone.vector_head().parameters())
    assert noisy_head == sum(p.numel() for p in potential.energy_head.parameters())
    assert options or noisy_head == 86_530


def test_what_is_not_trained_has_no_effect():
    """Weights of the published architecture that no energy depends on are kept, and not trained."""
    potential = Potential(TorchMDNet(**TorchMDNet.tiny))
    frozen = {name for name, p in potential.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.attention_layers.0.vec_proj.weight", "energy_head.output_network.1.vec2_proj.weight"}
    case = BackboneCase.of("torchmd_net")
    potential, batch = case.potential(), case.batch(example_molecules())
    before = potential(batch)
    with torch.no_grad():
        for name, p in potential.named_parameters():
            if name in frozen:
                p.add_(1.0)
    after = potential(batch)
    assert after.energy.equal(before.energy)
    assert after.forces.equal(before.forces)


def expected_shapes(f: int = 128, k: int = 32, layers: int = 6) -> dict[str, tuple[int, ...]]:
    """Names and shapes of published checkpoints (F channels, K radial functions), without their prefixes."""

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes = {
        "embedding.weight": (100, f),
        "distance_expansion.means": (k,),
        "distance_expansion.betas": (k,),
        "neighbor_embedding.embedding.weight": (100, f),
        **linear("neighbor_embedding.distance_proj", f, k),
        **linear("neighbor_embedding.combine", f, 2 * f),
        "out_norm.weight": (f,),
        "out_norm.bias": (f,),
    }
    for i in range(layers):
        layer = f"attention_layers.{i}"
        shapes |= {f"{layer}.layernorm.weight": (f,), f"{layer}.layernorm.bias": (f,)}
        shapes |= linear(f"{layer}.q_proj", f, f) | linear(f"{layer}.k_proj", f, f)
        shapes |= linear(f"{layer}.v_proj", 3 * f, f) | linear(f"{layer}.o_proj", 3 * f, f)
        shapes |= linear(f"{layer}.dk_proj", f, k) | linear(f"{layer}.dv_proj", 3 * f, k)
        shapes[f"{layer}.vec_proj.weight"] = (3 * f, f)
    return shapes


def expected_head_shapes() -> dict[str, tuple[int, ...]]:
    """Both heads at 128 channels, as in published checkpoints."""
    return {
        "output_network.0.vec1_proj.weight": (128, 128),
        "output_network.0.vec2_proj.weight": (64, 128),
        "output_network.0.update_net.0.weight": (128, 256),
        "output_network.0.update_net.0.bias": (128,),
        "output_network.0.update_net.2.weight": (128, 128),
        "output_network.0.update_net.2.bias": (128,),
        "output_network.1.vec1_proj.weight": (64, 64),
        "output_network.1.vec2_proj.weight": (1, 64),
        "output_network.1.update_net.0.weight": (64, 128),
        "output_network.1.update_net.0.bias": (64,),
        "output_network.1.update_net.2.weight": (2, 64),
        "output_network.1.update_net.2.bias": (2,),
    }


def test_names_and_shapes_are_those_of_published_checkpoints():
    backbone = TorchMDNet()
    assert {name: tuple(value.shape) for name, value in backbone.state_dict().items()} == expected_shapes()
    for head in (backbone.scalar_head(), backbone.vector_head()):
        assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == expected_head_shapes()


def test_fresh_weights_are_drawn_as_published():
    backbone = TorchMDNet()
    layer = backbone.attention_layers[2]
    bound = math.sqrt(6 / (128 + 384))  # Xavier-uniform
    assert 0.95 * bound < layer.v_proj.weight.abs().max() <= bound
    assert not layer.v_proj.bias.any()
    assert backbone.embedding.weight.std().item() == pytest.approx(1, abs=0.05)
    assert (layer.layernorm.weight == 1).all()


# ----------------------------------------------------------------------------------------------------------- the equations


def test_cosine_cutoff():
    d = torch.tensor([0.0, 1.25, 2.5, 3.75, 5.0, 6.0, 10.0], dtype=torch.float64)
    root = math.sqrt(0.5)
    expected = torch.tensor([1, (1 + root) / 2, 0.5, (1 - root) / 2, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(cosine_cutoff(d, 5.0), expected, rtol=0, atol=1e-15)


def test_radial_functions():
    basis = ExpNormalBasis(4.0, 5, trainable=False).double()
    d = np.array([0.0, 0.7, 2.1, 3.99, 4.0, 4.5])
    mu = np.linspace(math.exp(-4.0), 1.0, 5)
    beta = (2 / 5 * (1 - math.exp(-4.0))) ** -2
    phi = np.where(d < 4.0, (np.cos(math.pi * d / 4.0) + 1) / 2, 0.0)
    expected = phi[:, None] * np.exp(-beta * (np.exp(-5 / 4.0 * d)[:, None] - mu) ** 2)
    np.testing.assert_allclose(basis(torch.from_numpy(d)).numpy(), expected, rtol=1e-5, atol=1e-12)
    assert not basis(torch.tensor([4.0, 9.0]).double()).any()


def test_an_atom_alone_still_attends_to_itself():
    """The first layer by hand: the only message is the one along the self-loop, at distance 0."""
    backbone, silu = BackboneCase.of("torchmd_net").potential().backbone, torch.nn.functional.silu
    layer, received = backbone.attention_layers[0], []
    layer.o_proj.register_forward_hook(lambda module, inputs, output: received.append(inputs[0]))
    backbone(batch_of([Atoms("C")], 5.0))

    no_neighbors = torch.zeros(16, dtype=torch.float64)
    x = layer.layernorm(backbone.neighbor_embedding.combine(torch.cat([backbone.embedding.weight[6], no_neighbors])))
    rbf = backbone.distance_expansion(torch.zeros(1, dtype=torch.float64))[0]
    q, k, dk = (vector.view(2, 8) for vector in (layer.q_proj(x), layer.k_proj(x), silu(layer.dk_proj(rbf))))
    attention = silu((q * k * dk).sum(-1, keepdim=True))  # (heads, 1)
    value = (layer.v_proj(x) * silu(layer.dv_proj(rbf))).view(2, 3, 8)[:, 0]  # the first third of each head
    expected = (attention * value).reshape(1, 16)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(received[0], expected)


# ----------------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    ("options", "skip"),
    [
        ({"vector_cutoff": False}, ["smooth_cutoff"]),
        ({"encode_vectors": True}, []),
        ({"trainable_rbf": True, "cutoff": 3.5, "num_heads": 4}, []),
        ({"num_layers": 1}, []),
    ],
    ids=str,
)
def test_variants_keep_the_contract(options, skip):
    check_backbone("torchmd_net", options, skip=skip)


def jump(vector_cutoff: bool) -> dict[str, float]:
    """Change of energy and forces as an atom crosses the cutoff within 2e-6 Å."""
    case = BackboneCase.of("torchmd_net", {"vector_cutoff": vector_cutoff})
    inside, outside = crossing(case, -1e-6), crossing(case, 1e-6)
    return {name: float((getattr(outside, name) - getattr(inside, name)).abs().max()) for name in ("energy", "forces")}


def test_energy_is_continuous_with_the_vector_cutoff_only():
    smooth, old = jump(True), jump(False)
    assert smooth["energy"] < 1e-10
    assert smooth["forces"] < 1e-5
    assert old["energy"] > 1e-4, "the published discontinuity, kept for the published checkpoints"


def test_both_cutoffs_have_the_same_weights():
    one, other = (TorchMDNet(**TorchMDNet.tiny, vector_cutoff=value).state_dict() for value in (True, False))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}


def test_node_vectors_need_an_encoder():
    batch = batch_of(example_molecules(), 5.0, dtype=torch.float32)
    with pytest.raises(ConfigError, match="encode_vectors=True"):
        TorchMDNet(**TorchMDNet.tiny)(batch, torch.ones(len(batch.z), 3))
    plain, encoder = TorchMDNet(**TorchMDNet.tiny), TorchMDNet(**TorchMDNet.tiny, encode_vectors=True)
    extra = sum(p.numel() for p in encoder.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == TorchMDNet.tiny["hidden_channels"]
    fill_weights(plain), fill_weights(encoder)
    assert encoder(batch).scalars.equal(plain(batch).scalars), "without node vectors nothing changes"
    zeros = encoder(batch, torch.zeros(len(batch.z), 3)).scalars
    torch.testing.assert_close(zeros, plain(batch).scalars)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_channels": 30},
        {"hidden_channels": 9, "num_heads": 3},
        {"num_heads": 0},
        {"cutoff": -1.0},
        {"num_rbf": 0},
    ],
    ids=str,
)
def test_impossible_sizes(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TorchMDNet(**options)


# ------------------------------------------------------------------------------------------------- torchmd-net's own numbers


@pytest.mark.parametrize(
    "entry", GOLDEN["entries"], ids=lambda e: f"{e['options']['cutoff']}-{e['options']['vector_cutoff']}"
)
def test_stored_numbers_of_torchmd_net(entry):
    options = entry["options"]
    potential = fill_weights(Potential(TorchMDNet(**options))).double()
    expansion = potential.backbone.distance_expansion
    for name in ("means", "betas"):
        stored = torch.tensor(entry[name], dtype=torch.float64)
        torch.testing.assert_close(getattr(expansion, name), stored, rtol=1e-6, atol=0)
        getattr(expansion, name).copy_(stored)  # float32's last bits differ between versions of torch
    batch = make_batch(
        np.array(GOLDEN["z"]),
        np.array(GOLDEN["pos"]),
        np.array(GOLDEN["counts"]),
        options["cutoff"],
        dtype=torch.float64,
    )
    prediction = potential(batch, create_graph=False)
    vectors = fill_weights(potential.backbone.vector_head()).double()(prediction.features, batch)
    found = {"energy": prediction.energy, "forces": prediction.forces, "vectors": vectors}
    for name, value in found.items():
        stored = torch.tensor(entry[name], dtype=torch.float64)
        assert stored.abs().max() > 1e-3
        torch.testing.assert_close(value.detach(), stored, rtol=0, atol=1e-10 * float(stored.abs().max()), msg=name)
