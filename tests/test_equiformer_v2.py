"""EquiformerV2: sizes, numbers of fairchem-core 1.10, rotations, grids, derivatives, and what its options promise."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import fcc111
from e3nn import o3

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Nearest, make_batch
from ndem_zoo.models.equiformer_v2 import passes, products, so3
from ndem_zoo.models.equiformer_v2.attention import SphereLayerNorm, SphereRMSNorm, neighbor_softmax
from ndem_zoo.models.equiformer_v2.model import EquiformerV2, fade, gaussians
from ndem_zoo.models.equiformer_v2.presets import PRESETS
from ndem_zoo.models.potential import Potential
from ndem_zoo.testing import batch_of, fill_weights, waves
from ndem_zoo.testing.common import distorted, example_cluster, example_crystal, example_molecules
from ndem_zoo.training import decay_groups

GOLDEN = json.loads((Path(__file__).parent / "data" / "equiformer_v2_golden.json").read_text(encoding="utf-8"))
F64 = torch.float64
CPU = torch.device("cpu")


def potential_of(forces: str = "gradient", dtype: torch.dtype = F64, **options) -> Potential:
    """A small network with reproducible weights, in evaluation mode."""
    return fill_weights(Potential(EquiformerV2(**EquiformerV2.tiny | options), forces=forces)).to(dtype).eval()


def random_rotations(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    q = torch.nn.functional.normalize(torch.randn(number, 4, generator=generator, dtype=F64), dim=1)
    w, v = q[:, :1].unsqueeze(-1), q[:, 1:]
    cross = torch.zeros(number, 3, 3, dtype=F64)
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        cross[:, a, b], cross[:, b, a] = -v[:, c], v[:, c]
    return torch.eye(3, dtype=F64) + 2 * (w * cross + cross @ cross)


def turned(batch, matrix):
    return batch.replace(pos=batch.pos @ matrix.T, shift=batch.shift @ matrix.T, cell=batch.cell @ matrix.T)


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("31M", 31_058_690), ("83M", 83_164_802), ("153M", 153_602_690), ("tiny", 326_498), ("qm9", 13_031_842)],
)
def test_parameter_counts_of_presets(name, expected):
    with torch.device("meta"):
        potential = Potential(EquiformerV2.from_preset(name), forces="direct")
    assert (
        sum(
            p.numel() for m in (potential.backbone, potential.energy_head, potential.force_head) for p in m.parameters()
        )
        == expected
    )
    if name == "qm9":  # without a force head: what public configuration files call 11.2M
        assert sum(p.numel() for p in potential.backbone.parameters()) == 11_259_872


def test_force_encoding_adds_1024_parameters_to_the_153M_model():
    def count(**options):
        with torch.device("meta"):
            return sum(p.numel() for p in EquiformerV2.from_preset("153M", **options).parameters())

    assert count(encode_vectors=True) - count() == 1024


def test_width_of_a_vector_head():
    with torch.device("meta"):
        backbone = EquiformerV2.from_preset("153M")
        counts = [sum(p.numel() for p in backbone.vector_head(width).parameters()) for width in (None, 64, 16)]
    assert counts[0] == counts[1] == 6_900_865
    assert round(counts[2], -4) == 3_070_000  # with the rest 156.7M, which the paper's 157M may be
    narrow = fill_weights(EquiformerV2(**EquiformerV2.tiny)).double()
    batch = batch_of(example_molecules(), 5.0)
    head = fill_weights(narrow.vector_head(width=3)).double()
    assert head(narrow(batch), batch).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="width=0; it must be positive"):
        narrow.vector_head(0)


def test_presets_have_sources_and_only_known_options():
    for name, preset in PRESETS.items():
        assert all(len(sourced.source) > 5 for sourced in preset.values()), name
    with pytest.raises(ConfigError, match=r"no preset '30M'; it has 31M, 83M, 153M, qm9, md17, tiny"):
        EquiformerV2.from_preset("30M")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mmax": 3}, "mmax=3; with lmax=2 it must be from 0 to 2"),
        ({"grid_resolution": 17}, "grid_resolution=17; with lmax=2 it must be even and at least 6"),
        ({"grid_resolution": 4}, "at least 6"),
        ({"norm_type": "layer_norm"}, "allowed are layer_norm_sh, rms_norm_sh"),
        ({"roll": "none"}, "allowed are fixed, random"),
        ({"num_heads": 0}, "num_heads=0; it must be positive"),
        ({"alpha_drop": 1.0}, "at least 0 and below 1"),
        ({"num_distance_basis": 1}, "at least 2"),
    ],
)
def test_options_that_make_no_network_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EquiformerV2(**EquiformerV2.tiny | options)


# ------------------------------------------------------------------------------------------------------------ parity


def golden_batch(dtype: torch.dtype):
    counts = np.array(GOLDEN["counts"])
    columns = (np.array(GOLDEN[name]) for name in ("z", "pos"))
    return make_batch(*columns, counts, 12.0, cell=np.array(GOLDEN["cell"]), pbc=np.array(GOLDEN["pbc"]), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", GOLDEN["entries"])
def test_numbers_of_fairchem(name, dtype):
    entry = GOLDEN["entries"][name]
    potential = fill_weights(Potential(EquiformerV2(**entry["options"]), forces="direct")).to(dtype).eval()
    batch = golden_batch(dtype)
    vectors = torch.from_numpy(waves(batch.pos.shape, 3.0)) if entry["options"].get("encode_vectors") else None
    with torch.no_grad():
        found = potential(batch, node_vectors=vectors)
    values = {"energy": found.energy, "forces": found.forces, "features": found.features.tensors[::5, :, ::5]}
    for key, value in values.items():
        expected = torch.tensor(entry[key], dtype=F64)
        size = float(expected.abs().max())
        assert size > 0.04, key
        # Of equal weights and frames: to rounding. What fairchem's own random rolls change is stored beside it.
        error = float((value.double() - expected).abs().max()) / size
        assert error < (1e-11 if dtype == F64 else 1e-5), f"{key}: {error:.1e}"


# --------------------------------------------------------------------------------------------------------- rotations


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-12)])
def test_wigner_matrices_turn_spherical_harmonics(dtype, tolerance):
    rotations = random_rotations(20)
    points = torch.nn.functional.normalize(torch.from_numpy(waves((20, 3))), dim=1)
    moved = torch.einsum("eij,ej->ei", rotations, points)
    for degree, block in enumerate(so3.wigner_blocks(rotations.to(dtype), 6)):
        before, after = (o3.spherical_harmonics(degree, p, True, "norm") for p in (points, moved))
        assert (torch.einsum("eij,ej->ei", block.double(), before) - after).abs().max() < tolerance, degree
        assert (block @ block.mT - torch.eye(2 * degree + 1)).abs().max() < 10 * tolerance


def test_wigner_matrices_are_those_of_e3nn():
    rotations = random_rotations(10)
    for degree, block in enumerate(so3.wigner_blocks(rotations, 6)):
        expected = o3.wigner_D(degree, *o3.matrix_to_angles(rotations.float()))  # e3nn works in float32
        assert (block - expected).abs().max() < 5e-5, degree


AXES = [[0, 1, 0], [0, -1, 0], [1, 0, 0], [0, 0, -1], [1e-9, 1, 0], [-1e-9, -1, 1e-9], [0.3, so3.SEAM, -0.5]]


def test_frames_turn_edges_onto_the_polar_axis():
    edges = torch.cat([torch.tensor(AXES, dtype=F64), torch.from_numpy(waves((30, 3)))])
    for roll in (None, torch.linspace(0, 6, len(edges), dtype=F64)):
        frames = so3.edge_rotations(edges, roll)
        up = torch.einsum("eij,ej->ei", frames, edges / edges.norm(dim=1, keepdim=True))
        assert (up - torch.tensor([0.0, 1.0, 0.0], dtype=F64)).abs().max() < 1e-14
        assert (frames @ frames.mT - torch.eye(3, dtype=F64)).abs().max() < 1e-14
        assert torch.linalg.det(frames).min() > 0.999
    other = so3.edge_rotations(edges, torch.ones(len(edges), dtype=F64)) @ so3.edge_rotations(edges).mT
    cos, sin = math.cos(1.0), math.sin(1.0)
    about_y = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=F64)
    assert (other - about_y).abs().max() < 1e-14


def test_derivatives_of_frames_exist_on_the_polar_axis():
    edges = torch.tensor(AXES[:6], dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(so3.edge_rotations, edges)
    assert torch.autograd.gradgradcheck(so3.edge_rotations, edges)


def test_layout_sorts_by_order():
    chosen = so3.layout(2, 1)
    assert chosen.degrees == (0, 1, 2, 1, 2, 1, 2)
    assert chosen.index == (0, 2, 6, 3, 7, 1, 5)  # l² + l + m
    assert chosen.radial == (0, 1, 2, 3, 4, 3, 4)
    assert chosen.scales == (1, 1, math.sqrt(5 / 3), 1, math.sqrt(5 / 3), 1, math.sqrt(5 / 3))
    assert so3.layout(6, 2).size == 29


def test_an_edge_along_the_polar_axis_has_no_orders_but_zero():
    # Harmonics of the edge's own direction, in its frame: only m = 0.
    edges = torch.from_numpy(waves((12, 3)))
    rows = so3.wigner_rows(so3.edge_rotations(edges), 4, 2)
    own = o3.spherical_harmonics([0, 1, 2, 3, 4], edges, True, "norm")
    inside = torch.einsum("ekj,ej->ek", rows, own)
    assert (inside[:, :5] - 1).abs().max() < 1e-13
    assert inside[:, 5:].abs().max() < 1e-13


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize(("lmax", "resolution"), [(2, (6, 7)), (4, (18, 18)), (6, (18, 18)), (6, (14, 15))])
def test_grids_give_coefficients_back(lmax, resolution):
    to, back = so3.grid_matrices(lmax, lmax, resolution, False, F64, CPU)
    assert (back.T @ to - torch.eye((lmax + 1) ** 2, dtype=F64)).abs().max() < 1e-13
    theirs = o3.ToS2Grid(lmax, resolution, normalization="component")
    expected = torch.einsum("mbi,am->bai", theirs.shb, theirs.sha).flatten(0, 1)
    assert (to - expected).abs().max() < 1e-6
    theirs = o3.FromS2Grid(resolution, lmax, normalization="component")
    expected = torch.einsum("am,mbi->bai", theirs.sha, theirs.shb).flatten(0, 1)
    assert (back - expected).abs().max() < 1e-6


def test_grid_columns_by_order_and_with_orders_left_out():
    natural, by_order = (so3.grid_matrices(4, 4, (18, 18), flag, F64, CPU)[0] for flag in (False, True))
    assert torch.equal(by_order, natural[:, list(so3.layout(4, 4).index)])
    few, scales = so3.layout(4, 2), torch.tensor(so3.layout(4, 2).scales, dtype=F64)
    assert torch.equal(so3.grid_matrices(4, 2, (18, 18), True, F64, CPU)[0], natural[:, list(few.index)] * scales)


def test_quadrature_is_exact_for_polynomials():
    height = torch.cos((torch.arange(18, dtype=F64) + 0.5) * (math.pi / 18))
    for power in range(18):
        exact = 0.0 if power % 2 else 2.0 / (power + 1)
        assert abs(float((so3.quadrature(18) * height**power).sum()) - exact) < 1e-14, power


# --------------------------------------------------------------------------------------------------- steps, in chunks


def step_cases():
    n_edges, n_atoms, channels = 40, 7, 6
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    src, dst = (torch.randint(0, n_atoms, (n_edges,), generator=generator) for _ in range(2))
    for lmax, mmax in ((2, 2), (3, 1), (2, 0)):
        chosen = so3.layout(lmax, mmax)
        rows = so3.wigner_rows(so3.edge_rotations(draw(n_edges, 3)), lmax, mmax)
        to, back = so3.grid_matrices(lmax, mmax, (10, 10), True, F64, CPU)
        for inputs, outputs, extra, which in ((2 * channels, 5, 11, "edge"), (channels, 4, 0, "so2")):
            weights = [draw((lmax + 1) * outputs + extra, (lmax + 1) * inputs), draw((lmax + 1) * outputs + extra)]
            weights += [draw(2 * n * outputs, n * inputs) for _, n in chosen.blocks[1:]]
            shape = passes.SO2(chosen, outputs)
            if which == "so2":
                yield (
                    f"so2 {lmax}{mmax}",
                    passes.SO2Convolution,
                    shape,
                    [draw(n_edges, chosen.size, channels), *weights],
                )
                continue
            radial = [draw(n_edges, 4), draw(chosen.n_radial * inputs, 4), draw(chosen.n_radial * inputs)]
            tensors = [draw(n_atoms, (lmax + 1) ** 2, channels), rows, *radial, *weights]
            yield f"edge {lmax}{mmax}", passes.EdgeConvolution, passes.Edges(shape, src, dst), tensors
        y = draw(n_edges, chosen.size, channels)
        yield f"sphere {lmax}{mmax}", passes.SphereActivation, passes.Grid(to, back, True), [y, draw(n_edges, channels)]
        yield f"all {lmax}{mmax}", passes.SphereActivation, passes.Grid(to, back, False), [y, None]
        yield f"network {lmax}{mmax}", passes.SphereNetwork, passes.Grid(to, back, False), [y, draw(channels, channels)]
        yield f"sum {lmax}{mmax}", passes.MessageSum, passes.Sum(dst, n_atoms), [y, draw(n_edges, 2), rows]


STEPS = list(step_cases())


@pytest.mark.parametrize(
    ("step", "constants", "tensors"), [case[1:] for case in STEPS], ids=[case[0] for case in STEPS]
)
def test_steps_in_chunks_equal_plain_ones(step, constants, tensors, monkeypatch):
    for name in ("GRID_BYTES", "EDGE_BYTES"):
        monkeypatch.setattr(passes, name, {"cpu": 1})  # 16 rows at a time: three chunks
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    given = [t for t in tensors if t is not None]
    quick, plain = step.run(constants, *tensors), step.plain(constants, *tensors)
    upstream = [torch.from_numpy(waves(value.shape)) for value in plain]
    found, expected = (torch.autograd.grad(value, given, upstream) for value in (quick, plain))
    for one, other in zip((*quick, *found), (*plain, *expected), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("enabled", [True, False])
def test_products_are_those_of_float64(enabled):
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 90), (90, 51), (51,)]
    a, b, bias = (torch.randn(shape, generator=generator, dtype=F64) for shape in shapes)
    x, y = a.float(), b.float()
    with torch.backends.mkldnn.flags(enabled=enabled):
        found = {
            "a b": products.product(x, y),
            "a b, transposes": products.product(x.T.contiguous().T, y.T.contiguous().T),
            "a b, strided": products.product(torch.cat([x, x], dim=1)[:, 90:], y),
            "linear": products.linear(x, y.T.contiguous(), bias.float()) - bias.float(),
        }
    for name, value in found.items():
        assert float((value - a @ b).norm() / (a @ b).norm()) < 1e-6, name
    assert products.product(x[:0], y).shape == (0, 51)
    assert torch.equal(products.product(a, b), torch.nn.functional.linear(a, b.T))


def test_second_derivatives_of_a_step():
    name, step, constants, tensors = STEPS[0]
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(lambda *t: step.run(constants, *t), tensors, fast_mode=True), name


# ------------------------------------------------------------------------------------------------------------- layers


def test_norms_by_hand():
    x = torch.from_numpy(waves((3, 9, 4)))
    layer, rms = SphereLayerNorm(2, 4).double(), SphereRMSNorm(2, 4).double()
    degrees = [slice(0, 1), slice(1, 4), slice(4, 9)]
    for atom in range(3):
        mean_squares = [float(x[atom, rows].square().mean()) for rows in degrees]
        scale = 1 / math.sqrt((mean_squares[1] + mean_squares[2]) / 2 + 1e-5)
        torch.testing.assert_close(layer(x)[atom, 1:], x[atom, 1:] * scale)
        centered = x[atom, 0] - x[atom, 0].mean()
        torch.testing.assert_close(layer(x)[atom, 0], centered / math.sqrt(float(centered.square().mean()) + 1e-5))
        mean_squares[0] = float(centered.square().mean())
        scale = 1 / math.sqrt(sum(mean_squares) / 3 + 1e-5)
        torch.testing.assert_close(rms(x)[atom, 1:], x[atom, 1:] * scale)
        torch.testing.assert_close(rms(x)[atom, 0], centered * scale)


def test_what_is_not_decayed():
    potential = potential_of("direct")
    _, others = decay_groups(potential, 1e-3)
    exempt = {id(parameter) for parameter in others["params"]}
    trained = {name: parameter for name, parameter in potential.named_parameters() if parameter.requires_grad}
    names = {name for name, parameter in trained.items() if id(parameter) in exempt}
    assert {name.split(".")[-1] for name in set(trained) - names} == {"weight", "alpha_dot"}
    assert {"backbone.norm.affine_weight", "backbone.norm.norm_l0.weight", "force_head.ga.alpha_norm.weight"} <= names
    assert "backbone.blocks.0.ga.so2_conv_1.fc_m0.bias" in names
    assert not any("embedding.weight" in name or ("fc_m" in name and name.endswith("weight")) for name in names)


def test_radial_functions():
    values = gaussians(torch.tensor([0.0, 3.0], dtype=F64), 12.0, 5)  # centers 0, 3, ..., 12; standard deviation 6
    assert values[1].tolist() == pytest.approx([math.exp(-0.5 * (k / 2) ** 2) for k in (1, 0, 1, 2, 3)], abs=1e-15)
    assert values[0, 4] == pytest.approx(math.exp(-2.0))


def test_softmax_over_neighbors():
    score, dst = torch.from_numpy(waves((5, 2))), torch.tensor([2, 0, 2, 2, 0])
    share = neighbor_softmax(score, dst, 4, None)
    for atom in (0, 2):
        torch.testing.assert_close(share[dst == atom], torch.softmax(score[dst == atom], dim=0))
    torch.testing.assert_close(neighbor_softmax(score + 1e4, dst, 4, None), share)
    leaving = torch.tensor([[1.0], [1e-9], [1.0], [0.0], [1.0]], dtype=F64)
    faded = neighbor_softmax(score, dst, 4, leaving)
    torch.testing.assert_close(faded[[0, 2]], torch.softmax(score[[0, 2]], dim=0))
    assert not faded[3].any()
    assert faded[1].max() < 1e-17
    assert neighbor_softmax(score[1:2], torch.tensor([0]), 1, leaving[1:2]).max() < 1e-8  # an only neighbor fades, too


def test_the_envelope_is_smooth():
    u = torch.tensor([0.0, 1.0 - 1e-9, 1.0, 1.5], dtype=F64).requires_grad_()
    value = fade(u)
    (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), u)
    for quantity in (value - torch.tensor([1.0, 0, 0, 0]), slope, bend):
        assert quantity.abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------------------- symmetry


def rotation_error(**options) -> float:
    """Largest relative change of energies and turned-back forces in a rotation."""
    potential = potential_of("direct", **options)
    (matrix,) = random_rotations(1)
    worst = 0.0
    for batch in (batch_of(example_molecules(), 5.0), batch_of([example_crystal()], 5.0)):
        with torch.no_grad():
            before, after = potential(batch), potential(turned(batch, matrix))
        pairs = ((after.energy, before.energy), (after.forces, before.forces @ matrix.T))
        worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
    return worst


def test_the_finer_the_grid_the_more_exact_the_symmetry():
    errors = [rotation_error(grid_resolution=resolution) for resolution in (6, 10, 18, 30)]
    assert errors[0] > 1e-5, errors  # coarse grids break it
    assert errors[1] < errors[0] / 10, errors
    assert errors[2] < 1e-7, errors
    assert errors[3] < 1e-11, errors


def test_gates_need_no_grid():
    assert rotation_error(use_gate_act=True, use_grid_mlp=False, grid_resolution=6) < 1e-12


def test_mirror_images_differ_unless_orders_of_both_signs_do_not_mix():
    potential, batch = potential_of("direct", grid_resolution=30), batch_of(example_molecules(), 5.0)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=F64)) @ random_rotations(1)[0]

    def change() -> float:
        with torch.no_grad():
            before, after = potential(batch), potential(turned(batch, mirror))
        assert before.energy.abs().max() > 0.01
        return float((after.energy - before.energy).abs().max())

    assert change() > 1e-6
    with torch.no_grad():
        for name, weight in potential.named_parameters():
            if ".fc_m." in name:
                weight[len(weight) // 2 :] = 0.0  # the half that mixes +m with -m
    assert change() < 1e-10


def test_rolls_are_seen_only_through_the_grid():
    def spread(resolution: int) -> float:
        potential = potential_of("direct", roll="random", grid_resolution=resolution)
        batch = batch_of(example_molecules(), 5.0)
        with torch.no_grad():
            still = potential(batch).energy
            assert torch.equal(potential(batch).energy, still)  # evaluation has no random rolls
            potential.backbone.rng = torch.Generator().manual_seed(3)
            rolled = potential.train()(batch).energy
            assert not torch.equal(potential(batch).energy, rolled)
            potential.backbone.rng.manual_seed(3)
            assert torch.equal(potential(batch).energy, rolled)
        return float((rolled - still).abs().max())

    assert spread(30) < 1e-12 < 1e-7 < spread(6)


# -------------------------------------------------------------------------------------------------------- derivatives


def test_gradient_forces_of_a_molecule_with_edges_along_the_axes():
    # Edges exactly along +y, -y, x and z; the last two atoms are at right angles.
    atoms = Atoms("COHN", [[0, 0, 0], [0, 1.2, 0], [1.1, 0, 0], [0, 1.2, 1.3]])
    # Frames jump at the seam by a roll: with a fine grid, that is below the accuracy of differences.
    potential, batch = potential_of(grid_resolution=18), batch_of([atoms], 5.0)
    forces, h = potential(batch).forces, 1e-3
    assert forces.abs().max() > 1e-3
    for index in np.ndindex(4, 3):
        energies = []
        for step in (2, 1, -1, -2):
            moved = batch.pos.clone()
            moved[index] += step * h
            energies.append(potential(batch.replace(pos=moved), need_forces=False).energy.item())
        slope = np.dot([-1, 8, -8, 1], energies) / (12 * h)
        assert forces[index].item() == pytest.approx(-slope, abs=1e-7 * float(forces.abs().max()) + 1e-9)


def test_second_derivatives_along_the_polar_axis_are_finite():
    potential = potential_of().train()
    for positions in ([[0, 0, 0], [0, 1.2, 0]], [[0, 0, 0], [0, 1.2, 0], [0, 2.4, 0]]):
        potential.zero_grad()
        batch = batch_of([Atoms("CON"[: len(positions)], positions)], 5.0)
        potential(batch).forces.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)
        assert sum(float(p.grad.abs().max()) for p in potential.parameters() if p.grad is not None) > 1e-6


@pytest.mark.parametrize("forces", ["direct", "gradient"])
def test_checkpointing_changes_no_gradient(forces):
    batch = batch_of([*example_molecules(), example_crystal()], 5.0)
    found = []
    for checkpointed in (False, True):
        options = {"checkpoint_activations": checkpointed, "alpha_drop": 0.3, "drop_path_rate": 0.3}
        potential = potential_of(forces, **options).train()
        potential.backbone.rng = torch.Generator().manual_seed(4)
        prediction = potential(batch)
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        found.append({name: p.grad for name, p in potential.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_direct_forces_keep_no_graph_of_positions():
    batch = batch_of(example_molecules(), 5.0)
    edges = potential_of("direct")(batch).features.edges
    assert not any(t.requires_grad for t in (edges.basis, edges.into, edges.back, edges.envelope))


# ------------------------------------------------------------------------------------------------------------- options


def test_a_limit_on_neighbors_that_bites():
    options = {"max_neighbors": 6, "smooth_cutoff": False}
    potential, atoms = potential_of("direct", **options), example_cluster()
    assert potential.backbone.nearest == Nearest(6, True)
    assert not potential.backbone.is_smooth
    with torch.no_grad():
        complete = potential(batch_of([atoms], 5.0))
        limited = potential(
            make_batch(atoms.numbers, atoms.positions, np.array([36]), 5.0, nearest=Nearest(6), dtype=F64)
        )
        more = potential_of("direct", **options | {"max_neighbors": 12})(batch_of([atoms], 5.0))
    assert complete.features.edges.batch.dst.bincount().max() == 6
    torch.testing.assert_close(limited.energy, complete.energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(limited.forces, complete.forces, rtol=1e-10, atol=1e-12)
    assert (more.energy - complete.energy).abs().max() > 1e-4


def test_energies_jump_at_the_cutoff_unless_smooth():
    def jump(smooth: bool) -> float:
        potential = potential_of("none", smooth_cutoff=smooth)
        with torch.no_grad():
            energies = [
                potential(batch_of([Atoms("CO", [[0, 0, 0], [0.6 * d, 0, 0.8 * d]])], 5.0)).energy
                for d in (5.0 - 1e-6, 5.0 + 1e-6)
            ]
        return float((energies[1] - energies[0]).abs())

    assert jump(True) < 1e-9
    assert jump(False) > 1e-3


def test_node_vectors_are_seen_and_zeros_are_none():
    potential, batch = potential_of("direct"), batch_of(example_molecules(), 5.0)
    vectors = torch.from_numpy(waves(batch.pos.shape))
    with torch.no_grad():
        plain, zeros, seen = (potential(batch, node_vectors=v).energy for v in (None, 0 * vectors, vectors))
    assert torch.equal(plain, zeros)
    assert (seen - plain).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="encode_vectors=True"):
        potential_of("direct", encode_vectors=False)(batch, node_vectors=vectors)


def test_paths_are_dropped_structure_by_structure():
    backbone = EquiformerV2(**EquiformerV2.tiny | {"drop_path_rate": 0.5}).double().train()
    backbone.rng = torch.Generator().manual_seed(0)
    batch = batch_of(example_molecules() * 4, 5.0)
    factors = [backbone._drawn(batch, batch.pos)[1] for _ in range(50)]
    for kept in factors:
        for structure in range(batch.n_systems):
            assert len(kept[:, batch.system == structure].unique(dim=1).T) == 1
    stacked = torch.stack(factors)
    assert set(stacked.unique().tolist()) == {0.0, 2.0}
    assert stacked.mean() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(stacked[:, 0], stacked[:, 1])  # the branches of a block are drawn apart


def test_dropout_draws_from_its_generator_alone_and_only_in_training():
    options = {"alpha_drop": 0.4, "drop_path_rate": 0.2}
    potential, batch = potential_of("direct", **options), batch_of(example_molecules(), 5.0)
    plain = potential_of("direct")
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(potential(batch).energy, plain(batch).energy)
        potential.train().backbone.rng = torch.Generator().manual_seed(5)
        first, second = potential(batch).energy, potential(batch).energy
        potential.backbone.rng.manual_seed(5)
        again = potential(batch).energy
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert copy.deepcopy(potential).backbone.rng is None


def test_bfloat16_leaves_islands_of_float32():
    batch = batch_of([*example_molecules(), example_crystal()], 5.0, dtype=torch.float32)
    potential = potential_of("direct", torch.float32)
    exact = potential(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = potential.train()(batch)
        loss = found.energy.sum() + found.forces.square().sum()
    loss.backward()
    assert found.features.tensors.dtype == torch.float32
    assert found.features.edges.into.dtype == torch.float32
    assert found.forces.dtype == torch.float32
    for value, expected in ((found.energy, exact.energy), (found.forces, exact.forces)):
        error = float((value - expected).abs().max() / expected.abs().max())
        assert 1e-6 < error < 0.05, error
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)


def test_slab_with_atoms_beyond_every_cutoff():
    slab = distorted(fcc111("Cu", (1, 1, 3), vacuum=8.0), 0.1) + Atoms("H", [[0, 0, 30.0]])
    slab.pbc = [True, True, False]
    batch = batch_of([slab, Atoms("N", [[0, 0, 0]])], 5.0, dtype=torch.float32)
    prediction = potential_of("direct", torch.float32)(batch)
    assert torch.isfinite(prediction.forces).all()
    assert not prediction.forces[-1].any()  # an atom alone feels nothing
