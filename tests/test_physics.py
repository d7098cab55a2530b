"""Norms, forces, Hessian-vector products and reference energies, against closed forms and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import units

from ndem_zoo import physics
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.graph import Batch
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import TorchMDNet
from ndem_zoo.testing import BackboneCase, HarmonicBackbone, batch_of, fill_weights, waves
from ndem_zoo.testing.common import example_molecules

# --------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("keepdim", [True, False])
def test_safe_norm_is_the_norm(dim, keepdim):
    v = torch.from_numpy(waves((4, 3, 5)))
    expected = torch.linalg.vector_norm(v, dim=dim, keepdim=keepdim)
    torch.testing.assert_close(physics.safe_norm(v, dim=dim, keepdim=keepdim), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_safe_norm_and_its_derivatives_vanish_at_zero(dtype):
    v = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], dtype=dtype, requires_grad=True)
    norm = physics.safe_norm(v)
    assert norm.tolist() == [0.0, 5.0], "exact, without a small number under the root"
    (first,) = torch.autograd.grad(norm.sum(), v, create_graph=True)
    assert first[0].tolist() == [0.0] * 3
    torch.testing.assert_close(first[1], torch.tensor([0.6, 0.0, 0.8], dtype=dtype))
    (second,) = torch.autograd.grad((first * first.new_tensor([1.0, 2.0, 3.0])).sum(), v, create_graph=True)
    assert second[0].tolist() == [0.0] * 3
    (third,) = torch.autograd.grad(second.square().sum(), v)
    assert torch.isfinite(third).all()


def test_second_derivatives_of_safe_norm():
    v = torch.from_numpy(waves((3, 3))).requires_grad_()
    assert torch.autograd.gradcheck(physics.safe_norm, (v,))
    assert torch.autograd.gradgradcheck(physics.safe_norm, (v,))


# -------------------------------------------------------------------------------------------------------------- forces


def test_forces_of_an_energy_that_does_not_depend_on_positions():
    pos = torch.zeros(4, 3, requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    for energy in (torch.ones(2), 3 * weight):
        forces = physics.forces_from_energy(energy, pos, create_graph=True)
        assert forces.equal(torch.zeros(4, 3))


def spring_potential(stiffness: float, scale: float) -> tuple[Potential, Batch]:
    batch = batch_of(example_molecules(), 3.0)
    batch = batch.replace(extras={"origin": batch.pos + 0.1 * torch.from_numpy(waves(batch.pos.shape))})
    return Potential(HarmonicBackbone(stiffness=stiffness), scale=scale).double(), batch


def test_potential_of_springs():
    potential, batch = spring_potential(stiffness=12.0, scale=0.7)
    d = batch.pos - batch.extras["origin"]
    prediction = potential(batch)
    expected = torch.stack([p.square().sum() * 0.7 * 12.0 / 2 for p in d.split(batch.n_atoms.tolist())])
    torch.testing.assert_close(prediction.energy.detach(), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(prediction.forces.detach(), -0.7 * 12.0 * d, rtol=1e-13, atol=1e-15)


def test_forces_have_a_graph_in_training_only():
    potential, batch = spring_potential(12.0, 0.7)
    assert potential.train()(batch).forces.requires_grad
    evaluated = potential.eval()(batch)
    assert not any(value.requires_grad for value in (evaluated.forces, evaluated.energy, evaluated.features.scalars))
    assert potential(batch, create_graph=True).forces.requires_grad
    with torch.no_grad():
        assert potential(batch).forces.abs().max() > 0.1, "no_grad does not switch the derivative off"
    assert potential(batch, need_forces=False).forces is None


@pytest.mark.parametrize(("mode", "scale"), [("sideways", 1.0), ("gradient", 0.0), ("gradient", float("nan"))])
def test_impossible_potentials(mode, scale):
    with pytest.raises(ConfigError, match=r"forces='sideways'|scale=(0.0|nan)"):
        Potential(HarmonicBackbone(), forces=mode, scale=scale)


def test_hessian_vector_product_of_springs():
    potential, batch = spring_potential(12.0, 0.7)
    pos = batch.pos.clone().requires_grad_()
    v = torch.from_numpy(waves(pos.shape))
    forces = potential(batch.replace(pos=pos), create_graph=True).forces
    product = physics.hessian_vector_product(forces, pos, v)
    torch.testing.assert_close(product, 0.7 * 12.0 * v, rtol=1e-13, atol=1e-14)


def test_hessian_vector_product_against_finite_differences():
    case = BackboneCase.of("torchmd_net")
    potential, batch = case.potential(), case.batch(example_molecules())
    v, h = torch.from_numpy(waves(batch.pos.shape)), 1e-4
    pos = batch.pos.clone().requires_grad_()
    product = physics.hessian_vector_product(potential(batch.replace(pos=pos), create_graph=True).forces, pos, v)
    steps = [potential(batch.replace(pos=batch.pos + step * h * v)).forces for step in (2, 1, -1, -2)]
    numeric = -(-steps[0] + 8 * steps[1] - 8 * steps[2] + steps[3]) / (12 * h)
    torch.testing.assert_close(product, numeric, rtol=0, atol=1e-7 * float(product.abs().max()))


def test_hessian_vector_product_needs_a_graph():
    pos = torch.zeros(2, 3, requires_grad=True)
    constant = torch.ones(2, 3, requires_grad=True)
    assert physics.hessian_vector_product(constant, pos, torch.ones(2, 3)).equal(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="does not require grad"):  # zeros would hide a forgotten create_graph
        physics.hessian_vector_product(torch.ones(2, 3), pos, torch.ones(2, 3))


# -------------------------------------------------------------------------------------------------- reference energies


def columns_of(compositions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """z and ptr of structures like "OHH"."""
    numbers = {"H": 1, "C": 6, "N": 7, "O": 8}
    z = np.array([numbers[symbol] for composition in compositions for symbol in composition], dtype=np.uint8)
    return z, np.cumsum([0] + [len(composition) for composition in compositions])


def test_element_counts():
    z, ptr = columns_of(["OHH", "CO", "H"])
    counts = physics.element_counts(z, ptr)
    assert counts.shape == (3, physics.MAX_Z + 1)
    assert counts[:, [1, 6, 8]].tolist() == [[2, 0, 1], [0, 1, 1], [1, 0, 0]]
    assert counts.sum() == 6


def test_reference_energies_are_recovered_from_mixed_compositions(shared_data):
    with np.load(shared_data / "multi" / "small_mols_mini_train.npz") as raw:
        z, ptr = raw["Z"], np.concatenate([[0], np.cumsum(raw["N"])])
    truth = np.zeros(physics.MAX_Z + 1)
    truth[[1, 6, 7, 8]] = -13.6057, -1029.4831, -1485.3025, -2042.9708  # eV
    energy = physics.element_counts(z, ptr) @ truth
    found = physics.fit_reference_energies(z, ptr, energy)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-9)


def test_reference_energies_against_lstsq_over_all_structures(shared_data):
    with np.load(shared_data / "multi" / "small_mols_mini_train.npz") as raw:
        z, ptr, energy = raw["Z"], np.concatenate([[0], np.cumsum(raw["N"])]), raw["E"] * units.kcal / units.mol
    found = physics.fit_reference_energies(z, ptr, energy)
    counts = physics.element_counts(z, ptr)
    expected, *_ = np.linalg.lstsq(counts[:, [1, 6, 7, 8]].astype(float), energy, rcond=None)
    np.testing.assert_allclose(found[[1, 6, 7, 8]], expected, rtol=1e-9)
    assert np.std(energy - counts @ found) < 0.01 * np.std(energy)


def test_one_composition_gets_its_mean_energy():
    z, ptr = columns_of(["OHH"] * 5)
    energy = -2080.0 + np.arange(5.0)
    found = physics.fit_reference_energies(z, ptr, energy)
    assert (physics.element_counts(z, ptr) @ found) == pytest.approx(np.full(5, -2078.0), rel=1e-14)
    # Of all solutions of 2 H + O = mean, the shortest.
    assert found[1] == pytest.approx(2 * -2078.0 / 5)
    assert found[8] == pytest.approx(-2078.0 / 5)


def test_compositions_count_by_their_number():
    z, ptr = columns_of(["H", "H", "H", "HH"])
    found = physics.fit_reference_energies(z, ptr, np.array([1.0, 1.0, 1.0, 4.0]))
    assert found[1] == pytest.approx((3 * 1.0 + 2 * 4.0) / (3 + 4))


def test_energies_that_are_not_finite():
    z, ptr = columns_of(["H", "H", "H"])
    with pytest.raises(DataError, match="structure 1: energy nan"):
        physics.fit_reference_energies(z, ptr, np.array([1.0, np.nan, np.inf]))


def potential_with(reference: np.ndarray | None) -> Potential:
    return fill_weights(Potential(TorchMDNet(**TorchMDNet.tiny), reference=reference, scale=1 / 3))


def references() -> np.ndarray:
    reference = np.zeros(physics.MAX_Z + 1)
    reference[[1, 6, 8]] = -13.605693122994, -1029.123456789, -2042.987654321
    return reference


@pytest.mark.parametrize(
    "convert",
    [
        Potential.float,
        Potential.half,
        lambda p: p.to(torch.float32),
        lambda p: p.to("cpu"),
        lambda p: torch.nn.ModuleList([p]).float(),
    ],
    ids=["float", "half", "to a dtype", "to a device", "float of a parent"],
)
def test_reference_energies_stay_in_double_precision(convert):
    potential = potential_with(references()).double()
    convert(potential)
    assert potential.reference.dtype == potential.scale.dtype == torch.float64
    assert potential.reference.tolist() == references().tolist()
    assert potential.scale.item() == 1 / 3


def test_energies_in_single_precision_are_rounded_in_the_network_only():
    batch = batch_of(example_molecules()[:2], 5.0, dtype=torch.float32)
    energy, network = potential_with(references())(batch).energy, potential_with(None)(batch).energy
    assert energy.dtype == torch.float64
    exact = physics.element_counts(*columns_of(["CCOHHHHHH", "OHH"])) @ references()
    # Rounded to float32, these energies would be off by 1e-4 eV.
    np.testing.assert_allclose((energy - network).detach().numpy(), exact, rtol=0, atol=1e-11)


def test_reference_energies_block_by_block(monkeypatch):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 50)
    z, ptr, energy = rng.choice([1, 6, 8], counts.sum()), np.concatenate([[0], np.cumsum(counts)]), rng.normal(size=50)
    whole = physics.fit_reference_energies(z, ptr, energy)
    table = np.stack([np.add.reduceat(z == number, ptr[:-1]) for number in (1, 6, 8)], axis=1)
    np.testing.assert_allclose(whole[[1, 6, 8]], np.linalg.lstsq(table, energy, rcond=None)[0], atol=1e-12)
    monkeypatch.setattr(physics, "_STRUCTURES_AT_ONCE", 7)
    np.testing.assert_allclose(physics.fit_reference_energies(z, ptr, energy), whole, atol=1e-12)
