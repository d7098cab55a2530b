"""NDeM with curvature: against potentials whose change of forces is known exactly, and the paper's NDeM as a special case."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule

from ndem_zoo import NDeMTorchMDNet
from ndem_zoo.curvature import (
    ForceFieldDifference,
    ModelHessian,
    NoChange,
    Springs,
    explained,
    explained_between,
    first_order_change,
    fitted_springs,
    isotropic,
    make_curvature,
)
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.forcefields import make_force_field
from ndem_zoo.forcefields.base import ForceField
from ndem_zoo.noise import Noise
from ndem_zoo.objectives.ndem import NDeM
from ndem_zoo.objectives.ndem_curvature import NDeMCurvature
from ndem_zoo.physics import forces_from_energy, hessian_vector_product
from ndem_zoo.testing.common import batch_of, example_crystal, example_molecules, waves
from ndem_zoo.testing.objectives import SPRING_SCALE, harmonic_case

KCAL = units.kcal / units.mol
STIFFNESS = 20.0
CONSTANT = STIFFNESS * SPRING_SCALE  # eV/Å² of the harmonic potential


def harmonic(**options):
    """The objective on a potential in which every atom has a spring of its own: dF = -c epsilon is exact."""
    return harmonic_case(NDeMCurvature, STIFFNESS, **{"sigma": 0.1, "ratio": 1.0, **options})


def terms_of(**options) -> dict[str, float]:
    objective, potential, batch, rng = harmonic(**options)
    return {name: float(term.detach()) for name, term in objective(potential, batch, rng).items()}


# ----------------------------------------------------------------------------------------------- labels of moved structures


@pytest.mark.parametrize("curvature", [{"curvature": "isotropic", "constant": CONSTANT}, {"curvature": "model"}])
def test_labels_are_exact_on_springs(curvature):
    """Forces, energies (the trapezoid rule is exact for a parabola) and an independent head that knows the answer."""
    found = terms_of(head="both", **curvature)
    assert set(found) == {"energy", "forces", "noisy_energy", "noisy_forces", "ndem"}
    assert all(value == pytest.approx(0.0, abs=1e-20) for value in found.values()), found


@pytest.mark.parametrize("constant", [0.0, -1.0, 2 * CONSTANT])
def test_a_wrong_curvature_is_seen(constant):
    """The error is (c - k)² sigma², whatever its sign."""
    if constant < 0:
        with pytest.raises(ConfigError, match=r"constant=-1\.0; it must be a number >= 0"):
            terms_of(curvature="isotropic", constant=constant)
        return
    objective, potential, batch, rng = harmonic(curvature="isotropic", constant=constant)
    found = objective(potential, batch, rng)
    _, noise = objective.displace(potential, batch, torch.Generator().manual_seed(0))
    expected = 30.0 * ((constant - CONSTANT) / SPRING_SCALE * noise.epsilon).square().mean()
    assert float(found["noisy_forces"].detach()) == pytest.approx(float(expected), rel=1e-9)
    assert float(found["noisy_energy"].detach()) > 1e-6


def test_energy_by_the_trapezoid_rule(ethanol):
    """Against MMFF94 as the truth: the error of the energy falls with the third power of the displacement."""
    dataset = ethanol.select([0, 500, 1000])
    truth = make_force_field("mmff94").fit(dataset)
    dataset = dataset.replace_targets(truth.columns(dataset))
    batch = dataset.to_batch(5.0, torch.float64)
    objective = NDeMCurvature(options={"curvature": "mmff94"})
    direction = torch.as_tensor(np.random.default_rng(0).standard_normal(batch.pos.shape))
    curvature, errors = ForceFieldDifference(truth), []
    for size in (0.02, 0.01):
        epsilon = size * direction
        noise = Noise(epsilon, torch.full((len(batch.z), 1), size), torch.ones(len(batch.z), dtype=torch.bool))
        labels = objective.labels(batch, noise, curvature.force_change(batch, epsilon))
        after = truth(batch.replace(pos=batch.pos + epsilon))
        torch.testing.assert_close(labels["forces"], after.forces, atol=1e-10, rtol=0)
        change = (after.energy - batch.targets["energy"]).abs()
        errors.append((labels["energy"] - after.energy).abs())
        assert (errors[-1] < 0.1 * change).all()
    assert 6.0 < float((errors[0] / errors[1]).mean()) < 10.0


# -------------------------------------------------------------------------------------------- derivatives computed once


def mixed(ethanol: MolecularDataset) -> tuple[MolecularDataset, ForceField]:
    """Molecules of two sizes, and MMFF94 for them."""
    methane = MolecularDataset.from_atoms([molecule("CH4")])
    dataset = MolecularDataset.concatenate([ethanol.select([0, 700]).replace_targets({}), methane])
    return dataset, make_force_field("mmff94").fit(dataset)


def test_first_order_change_is_minus_the_hessian(ethanol):
    """Against MMFF94's Hessian by automatic differentiation, for structures of different sizes in one batch."""
    dataset, truth = mixed(ethanol)
    batch = dataset.to_batch(5.0, torch.float64)
    epsilon = torch.as_tensor(np.random.default_rng(0).standard_normal(batch.pos.shape))
    slopes = ForceFieldDifference(truth).slopes(dataset)
    assert slopes.shape == (23, 3, 27)
    assert not slopes[18:, :, 15:].any()  # methane has five atoms
    pos = batch.pos.clone().requires_grad_()
    forces = forces_from_energy(truth.energy(batch.replace(pos=pos)), pos, create_graph=True)
    expected = -hessian_vector_product(forces, pos, epsilon)
    found = first_order_change(torch.from_numpy(slopes), batch, epsilon)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_first_order_change_takes_the_prior_off(ethanol):
    dataset, truth = mixed(ethanol)
    assert np.abs(ForceFieldDifference(truth, truth).slopes(dataset)).max() < 1e-6


def test_first_order_labels_approach_the_exact_ones(ethanol):
    """Through `fit`'s own path: the difference of the two labels falls with the square of sigma."""
    dataset = ethanol.select([0, 500, 1000])
    errors = []
    for sigma in (0.01, 0.005):
        options = {"curvature": "mmff94", "sigma": sigma, "ratio": 1.0}
        exact, linear = (NDeMCurvature(options={**options, "first_order": which}) for which in (False, True))
        for objective in (exact, linear):
            objective.build(harmonic_case(NDeMCurvature, STIFFNESS)[1], dataset)
        assert exact.complete(dataset) is dataset
        batch = linear.complete(dataset).to_batch(5.0, torch.float64)
        potential = harmonic_case(NDeMCurvature, STIFFNESS)[1]
        moved, noise = exact.displace(potential, batch, torch.Generator().manual_seed(0))
        changes = [o.change(batch, noise.epsilon, moved) for o in (exact, linear)]
        errors.append(float((changes[0] - changes[1]).norm()))
        assert errors[-1] < 0.1 * float(changes[0].norm())
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_first_order_needs_a_force_field_and_memory(ethanol, monkeypatch):
    with pytest.raises(ConfigError, match=r"first_order=True is for force fields; curvature='springs' is none"):
        NDeMCurvature(options={"curvature": "springs", "first_order": True})
    dataset, truth = mixed(ethanol)
    monkeypatch.setattr("ndem_zoo.curvature._MOST_BYTES", 7451)  # 36 * 23 * 9 = 7452
    with pytest.raises(ConfigError, match="of 23 atoms, up to 9 in a structure"):
        ForceFieldDifference(truth).slopes(dataset)
    batch = dataset.to_batch(5.0, torch.float64)
    objective = NDeMCurvature(options={"curvature": "mmff94", "first_order": True})
    with pytest.raises(ConfigError, match="`complete`"):
        objective.change(batch, torch.zeros_like(batch.pos), batch)


def test_a_model_trains_with_first_order_changes(ethanol):
    """`fit` computes the derivatives, also for data that come later, and asks the force field in no step."""
    model = NDeMTorchMDNet(
        objective="ndem_curvature", objective_options={"curvature": "mmff94", "first_order": True}, max_steps=2,
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2}, progress=False,
    )  # fmt: skip
    model.fit(ethanol.select(slice(0, 8)))
    model.objective_.curvature.force_change = None
    model.partial_fit(ethanol.select(slice(20, 25)), max_steps=2)
    assert [row["step"] for row in model.history_] == [1, 2, 1, 2]
    assert all(row["train_noisy_forces"] > 0 for row in model.history_)


# ------------------------------------------------------------------------------------------------- the paper's special case


def test_an_independent_head_with_c_over_sigma_is_the_papers_ndem(ethanol):
    """Same noise, same head: F'(X~) against F(X) - c epsilon, with c = scale / sigma, is the paper's term."""
    model = NDeMTorchMDNet(
        objective="supervised", backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2}
    )
    potential = model.set_params(progress=False, scale=0.8).fit(ethanol.select([0, 1]), max_steps=1).potential_
    potential = potential.double().train()
    batch = ethanol.select([3, 4, 5]).to_batch(5.0, torch.float64)
    noise = {"sigma": 0.05, "ratio": 0.5}
    paper = NDeM(options={**noise, "grad_main": "label"})
    ours = NDeMCurvature(options={**noise, "curvature": "isotropic", "constant": 0.8 / 0.05, "head": "independent"})
    for objective in (paper, ours):
        objective.build(potential, ethanol.select([0]))
        objective.double()
    ours.noisy_force_head.load_state_dict(paper.noisy_force_head.state_dict())
    found = [o(potential, batch, torch.Generator().manual_seed(3))["ndem"] for o in (paper, ours)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    assert float(found[0]) > 0.1


# --------------------------------------------------------------------------------------------------------- one pass, weights


def test_one_pass_moves_some_and_weighs_them():
    """Of many copies a third is moved; the others count 1, these `weight`."""
    objective, potential, batch, rng = harmonic(curvature="isotropic", constant=0.0, probability=0.3, energy=False)
    objective.weight = 0.25
    found = objective(potential, batch, rng)
    _moved, noise = objective.displace(potential, batch, torch.Generator().manual_seed(0))
    per_atom = 30.0 * (STIFFNESS * noise.epsilon).square().mean(-1)
    assert 0 < noise.mask.double().mean() < 1
    assert float(found["forces"].detach()) == pytest.approx(0.25 * float(per_atom.mean()), rel=1e-9)
    assert float(found["energy"].detach()) == pytest.approx(0.0, abs=1e-20)
    assert set(found) == {"energy", "forces"}


def test_sigma_falls_over_the_training():
    objective, potential, batch, _ = harmonic(curvature="none", sigma_schedule="decay", sigma=(0.05, 0.1))
    sizes = []
    for objective.progress in (0.0, 0.5, 1.0):
        _, noise = objective.displace(potential, batch, torch.Generator().manual_seed(1))
        sizes.append(noise.sigma)
    torch.testing.assert_close(sizes[1], 0.55 * sizes[0])
    torch.testing.assert_close(sizes[2], 0.1 * sizes[0])


def test_closed_form_confidence(ethanol):
    """t² / (t² + 2 e² (1 - exp(-sigma² / 2 l²))), as a person computes it."""
    model = NDeMTorchMDNet(
        objective="ndem_curvature",
        objective_options={"curvature": "mmff94", "confidence": "closed_form", "sigma": 0.03, "tolerance": 0.1},
        scale=0.5,
        progress=False,
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(ethanol.select(np.arange(0, 40, 2)), max_steps=1)
    objective, potential = model.objective_, model.potential_
    train = ethanol.select(np.arange(0, 40, 2))
    error = make_force_field("mmff94").fit(train).subtract(train).targets["forces"]
    e2 = float(np.square(error).mean())
    assert float(objective.force_error) ** 2 == pytest.approx(e2)
    batch = train.select([0, 1]).to_batch(5.0)
    _, noise = objective.displace(potential, batch, torch.Generator().manual_seed(0))
    variance = 2 * e2 * (1 - np.exp(-(0.03**2) / (2 * 0.04**2)))
    expected = 0.05**2 / (0.05**2 + variance)
    assert objective._closed_form(potential, noise, batch).tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert 0.01 < expected < 0.9


def test_learned_confidence_goes_to_the_ratio_of_the_errors():
    objective, potential, batch, rng = harmonic(curvature="isotropic", constant=0.0, confidence="learned", sigma=0.1)
    labels = batch.targets["forces"]
    off = batch.replace(targets={**batch.targets, "forces": labels + 0.5 * torch.as_tensor(waves(labels.shape))})
    for _ in range(1500):
        found = objective(potential, off, rng)
    clean = float(np.square(0.5 * waves(labels.shape)).mean())
    # The mean displacement of each structure is taken off the noise.
    noisy = clean + (CONSTANT * 0.1) ** 2 * (1 - batch.n_systems / len(batch.z))
    assert float(objective.clean_square) == pytest.approx(clean, rel=0.05)
    seen = objective.noisy_square[objective.noisy_square != 1.0]
    assert seen.tolist() == pytest.approx([noisy], rel=0.15)
    assert np.isfinite(float(found["noisy_forces"].detach()))


def test_learned_confidence_in_float32_and_without_fixed_atoms(ethanol):
    """Labels of fixed atoms mean nothing: the averages do not see them."""
    model = NDeMTorchMDNet(
        objective="ndem_curvature", progress=False,
        objective_options={"curvature": "lindh", "confidence": "learned", "sigma": (0.01, 0.1)},
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(ethanol.select([0, 1, 2, 3]), max_steps=3)  # fmt: skip
    objective, potential = model.objective_, model.potential_
    assert objective.noisy_square.dtype == torch.float32
    assert 1 <= int((objective.noisy_square != 1).sum()) <= 8
    batch = ethanol.select([4, 5]).to_batch(5.0)
    fixed = torch.zeros(len(batch.z), dtype=torch.bool)
    fixed[:3] = True
    nonsense = batch.targets["forces"] + 1e4 * fixed.unsqueeze(-1)
    found = []
    for forces in (batch.targets["forces"], nonsense):
        objective.clean_square.fill_(1.0)
        targets = {**batch.targets, "forces": forces}
        objective(potential, batch.replace(fixed=fixed, targets=targets), torch.Generator().manual_seed(0))
        found.append((float(objective.clean_square), objective.noisy_square.tolist()))
        objective.noisy_square.fill_(1.0)
    objective(potential, batch.replace(fixed=fixed), torch.Generator().manual_seed(0))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert objective.noisy_square.tolist() == pytest.approx(found[1][1], rel=1e-6)
    assert found[0][0] != 1.0


def test_another_target_with_an_independent_head(ethanol):
    """Labels of displaced structures have no energy where none is learned."""
    train = ethanol.select(np.arange(4))
    train = train.replace_targets({"gap": np.arange(4.0), "forces": train.targets["forces"]})
    model = NDeMTorchMDNet(
        objective="ndem_curvature", target="gap", progress=False,
        objective_options={"curvature": "lindh", "head": "independent", "sigma": 0.02},
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(train, max_steps=2)  # fmt: skip
    assert model.history_[-1]["train_ndem"] > 0


@pytest.mark.parametrize("probability", [1.0, 0.3])
def test_trust_counts_for_energies_as_for_forces(monkeypatch, probability):
    """Half of it: half of the terms of what was moved; what was not moved has an error of 0."""
    name = "_trust" if probability == 1 else "_closed_form"
    names = [f"noisy_{label}" if probability == 1 else label for label in ("energy", "forces")]
    found = []
    for trust in (1.0, 0.5):
        objective, potential, batch, rng = harmonic(curvature="isotropic", constant=0.0, probability=probability)
        monkeypatch.setattr(
            NDeMCurvature, name, lambda *_, n=batch.n_systems, trust=trust: torch.full((n,), trust, dtype=torch.float64)
        )
        terms = objective(potential, batch, rng)
        found.append([float(terms[label].detach()) for label in names])
    assert min(found[0]) > 1e-6
    assert found[1] == pytest.approx([0.5 * value for value in found[0]], rel=1e-9)


def test_weight_of_the_energy_can_be_left_out():
    assert "noisy_energy" not in terms_of(curvature="none", energy=False)
    assert "noisy_energy" in terms_of(curvature="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "bends"}, "curvature='bends'; allowed are none, isotropic, .* mmff94, pairs, valence"),
        ({"curvature": "isotropic"}, "constant=None with curvature='isotropic'"),
        ({"curvature": "valence", "constant": 3.0}, "constant=3.0 with curvature='valence'"),
        ({"probability": 0.5, "head": "both"}, "probability=0.5 with head='both': one pass serves the main head only"),
        ({"curvature": "learned_springs", "head": "independent"}, "learned springs need the main head"),
        (
            {"curvature": "springs", "confidence": "closed_form"},
            "needs a force field's error; curvature='springs' has none",
        ),
        (
            {"confidence": "learned", "probability": 0.5},
            "confidence='learned' with probability=0.5: it compares two passes",
        ),
        ({"confidence": "learned", "head": "independent"}, "confidence='learned' with head='independent'"),
        ({"head": "noisy"}, "head='noisy'; allowed are main, independent, both"),
        ({"length": 0.0}, "length=0.0; it must be positive"),
        ({"sigma_schedule": "cosine"}, "allowed are constant, decay"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        harmonic(**options)


# --------------------------------------------------------------------------------------------------------------- curvatures


def test_springs_are_the_hessian_of_springs():
    """Against the second derivative of 1/2 k (r - r0)² at r = r0, molecules and a crystal; no net force, no torque."""
    for structures in (example_molecules(), [example_crystal()]):
        batch = batch_of(structures, 5.0)
        springs = Springs()
        constant, _ = springs.stiffness(batch)
        rest = torch.linalg.vector_norm(batch.vectors(), dim=-1)

        def energy(pos: torch.Tensor, batch=batch, constant=constant, rest=rest) -> torch.Tensor:
            vectors = batch.replace(pos=pos).vectors()
            return 0.25 * (constant * (torch.linalg.vector_norm(vectors, dim=-1) - rest).square()).sum()

        epsilon = 1e-3 * torch.as_tensor(waves(batch.pos.shape))
        hessian = torch.autograd.functional.hessian(energy, batch.pos).flatten(0, 1).flatten(1)
        expected = -(hessian @ epsilon.flatten()).view_as(epsilon)
        found = springs.force_change(batch, epsilon)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
        assert float(found.abs().max()) > 1e-4
        still = torch.ones_like(epsilon)
        assert float(springs.force_change(batch, still).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [4.0, 30.0])
def test_springs_of_a_thermal_diatomic_come_back(k):
    """Molecules in a Boltzmann distribution of one known spring: the covariance of forces gives its constant."""
    kT, rest, n = units.kB * 600.0, 1.13, 40_000
    rng = np.random.default_rng(0)
    grid = np.linspace(0.5, 2.0, 8001)
    weight = grid**2 * np.exp(-0.5 * k * (grid - rest) ** 2 / kT)  # the shell's volume counts
    r = rng.choice(grid, n, p=weight / weight.sum())
    u = rng.standard_normal((n, 3))
    u /= np.linalg.norm(u, axis=1)[:, None]
    pos = np.stack([np.zeros((n, 3)), r[:, None] * u], axis=1)
    pull = (k * (r - rest))[:, None] * u
    forces = np.stack([pull, -pull], axis=1)
    dataset = MolecularDataset(np.tile([6, 8], n), pos.reshape(-1, 3), 2 * np.arange(n + 1))
    dataset = dataset.replace_targets({"energy": np.zeros(n), "forces": forces.reshape(-1, 3)})
    springs = fitted_springs(dataset, 600.0)
    constant, _ = Springs().stiffness(dataset.to_batch(3.0, torch.float64))
    expected = k * float(constant.mean() / constant.square().mean())  # least squares of factor * constant against k
    assert float(springs.factors[6, 8]) == pytest.approx(expected, rel=0.008)
    assert float(springs.factors[1, 1]) == 1.0  # no such bonds: Lindh's own
    with pytest.raises(ConfigError, match=r"temperature=0\.0 K"):
        fitted_springs(dataset, 0.0)


def test_the_models_hessian_is_its_finite_difference(ethanol):
    model = NDeMTorchMDNet(
        objective="supervised", precision="64-true", progress=False,
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(ethanol.select([0, 1, 2]), max_steps=3)  # fmt: skip
    batch = ethanol.select([9, 10]).to_batch(5.0, torch.float64)
    epsilon = torch.as_tensor(waves(batch.pos.shape))
    step = 1e-5
    ahead, behind = (model.potential_(batch.replace(pos=batch.pos + s * step * epsilon)).forces for s in (1, -1))
    found = ModelHessian(model.potential_).force_change(batch, epsilon)
    torch.testing.assert_close(found, ((ahead - behind) / (2 * step)).detach(), rtol=1e-5, atol=1e-7)
    assert not found.requires_grad


@pytest.mark.parametrize("prior", [None, "valence"])
def test_the_models_hessian_explains_its_own_changes(ethanol, prior):
    """Of a network in float32, and with its prior, which has nearly all of it."""
    model = NDeMTorchMDNet(
        objective="supervised", progress=False, prior=prior,
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(ethanol.select(np.arange(0, 600, 20)), max_steps=3)  # fmt: skip
    found = explained(ModelHessian(model.potential_), ethanol.select([9, 10]), model, (0.002,))
    assert found[0.002] > 0.99
    assert model.potential_.prior is None if prior is None else model.potential_.prior is not None


def test_learned_springs_learn_the_models_hessian_and_nothing_else(ethanol):
    model = NDeMTorchMDNet(
        objective="ndem_curvature", weight=0.5, progress=False,
        objective_options={"curvature": "learned_springs", "sigma": 0.02},
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(ethanol.select([0, 1, 2]), max_steps=2)  # fmt: skip
    objective, potential = model.objective_, model.potential_.train()
    terms = objective(potential, ethanol.select([4]).to_batch(5.0), torch.Generator().manual_seed(0))
    moved, noise = objective.displace(potential, ethanol.select([4]).to_batch(5.0), torch.Generator().manual_seed(0))
    clean = ethanol.select([4]).to_batch(5.0)
    seen = (potential(moved).forces - potential(clean).forces).detach()
    told = objective.curvature.force_change(clean, noise.epsilon).detach()
    expected = ((told - seen) / float(potential.scale)).square().mean()
    assert float(terms["springs"].detach()) == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) != pytest.approx(float(((told + seen) / float(potential.scale)).square().mean()), rel=1e-2)
    potential.zero_grad()
    objective.zero_grad()
    terms["springs"].backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in potential.parameters())
    touched = objective.curvature.exponents.grad.nonzero().tolist()
    assert {tuple(pair) for pair in touched} == {(a, b) for a in (1, 6, 8) for b in (1, 6, 8)} - {(8, 8)}


def test_springs_of_atoms_alone_are_lindhs():
    dataset = MolecularDataset(np.array([1, 8]), np.zeros((2, 3)), np.array([0, 1, 2]))
    springs = fitted_springs(dataset.replace_targets({"forces": np.zeros((2, 3))}), 300.0)
    assert (springs.factors == 1).all()


def test_what_is_explained_of_genuine_changes(shared_data):
    """True DFT force changes along a trajectory of MD17 (2 fs apart): fitted bonds and angles get nearly all of it, MMFF94
    most, springs between atoms a large part, one constant for all less than nothing."""
    with np.load(shared_data / "md17_trajectory" / "ethanol_first2000.npz") as raw:
        z, pos, forces = raw["z"], raw["R"], raw["F"] * KCAL

    def frames(numbers: np.ndarray) -> MolecularDataset:
        return MolecularDataset(
            np.tile(z, len(numbers)), pos[numbers].reshape(-1, 3), len(z) * np.arange(len(numbers) + 1)
        ).replace_targets({"energy": np.zeros(len(numbers)), "forces": forces[numbers].reshape(-1, 3)})

    with np.load(shared_data / "md17" / "md17_ethanol.npz") as raw:
        rows = np.arange(0, 5800, 58)
        train = MolecularDataset(
            np.tile(z, 100), raw["R"][rows].reshape(-1, 3), len(z) * np.arange(101)
        ).replace_targets({"energy": raw["E"][rows, 0] * KCAL, "forces": raw["F"][rows].reshape(-1, 3) * KCAL})
    before, after = frames(np.arange(0, 1900, 19)), frames(np.arange(4, 1904, 19))
    fields = {name: ForceFieldDifference(make_force_field(name).fit(train)) for name in ("pairs", "valence", "mmff94")}
    share = {name: explained_between(model, before, after) for name, model in fields.items()}
    share["springs"] = explained_between(fitted_springs(train, 500.0), before, after)
    share["isotropic"] = explained_between(isotropic(516 * KCAL), before, after)
    assert share["valence"] > 0.99
    assert share["valence"] > share["mmff94"] > share["pairs"] > share["springs"] > share["isotropic"]
    assert share["mmff94"] > 0.97
    assert share["springs"] > 0.6
    assert share["isotropic"] < 0.2


def test_what_is_explained_of_noise(ethanol):
    """A force field explains itself fully, no change nothing; isotropic about a third of MMFF94's changes."""
    dataset = ethanol.select(np.arange(0, 300, 10))
    truth = make_force_field("mmff94").fit(dataset)
    assert explained(ForceFieldDifference(truth), dataset, truth, (0.02,)) == {0.02: pytest.approx(1.0)}
    assert explained(NoChange(), dataset, truth, (0.02,)) == {0.02: pytest.approx(0.0)}
    third = explained(isotropic(512 * KCAL), dataset, truth, (0.01, 0.05))
    assert 0.25 < third[0.01] < 0.5
    assert 0.2 < third[0.05] < 0.45


def test_fixed_atoms_and_calculators_and_mismatches(ethanol):
    from ase.calculators.lj import LennardJones

    rng = np.random.default_rng(0)
    atoms = Atoms("Ar4", 2.6 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]]))
    dataset = MolecularDataset.from_atoms([atoms])
    dataset = MolecularDataset(**{**dataset.columns(), "fixed": np.array([True, False, False, False])})
    calculator = LennardJones(sigma=2.3, epsilon=0.01, rc=8.0, smooth=False)
    found = explained(NoChange(), dataset, calculator, (0.01,), seed=int(rng.integers(9)))
    assert found[0.01] == pytest.approx(0.0)
    seen = []

    class Watched(NoChange):
        def force_change(self, batch, epsilon, moved=None):
            seen.append(epsilon)
            return super().force_change(batch, epsilon)

    explained(Watched(), dataset, calculator, (0.01,))
    assert not seen[0][0].any(), "a fixed atom is not moved"
    assert seen[0][1:].abs().min() > 0
    with pytest.raises(DataError, match="must have the same atoms"):
        explained_between(NoChange(), ethanol.select([0]), ethanol.select([0, 1]))
    with pytest.raises(ConfigError, match="gives no forces"):
        explained(NoChange(), dataset, 3.0)


# ------------------------------------------------------------------------------------------------------------ with a prior


@pytest.fixture(scope="module")
def with_prior(ethanol):
    """A potential whose prior is MMFF94, and the residual data."""
    train = ethanol.select(np.arange(0, 200, 10))
    model = NDeMTorchMDNet(
        prior="mmff94", objective="supervised", progress=False,
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(train, max_steps=1)  # fmt: skip
    return model, model.potential_.prior.subtract(train)


def test_what_the_prior_changes_is_taken_off(with_prior):
    """Published curvatures are of whole forces, fitted ones of what the prior left."""
    model, rest = with_prior
    keywords = {"constant": None, "temperature": 500.0}
    batch = rest.select([0, 1]).to_batch(5.0, torch.float64)
    epsilon = 0.05 * torch.as_tensor(waves(batch.pos.shape))
    same = make_curvature("mmff94", model.potential_, rest, **keywords).force_change(batch, epsilon)
    assert float(same.abs().max()) < 1e-9
    fitted = make_curvature("valence", model.potential_, rest, **keywords)
    direct = make_force_field("valence").fit(rest)
    expected = direct(batch.replace(pos=batch.pos + epsilon)).forces - direct(batch).forces
    torch.testing.assert_close(fitted.force_change(batch, epsilon), expected)
    assert float(expected.abs().max()) > 0.01
    for name in ("springs", "element"):
        with pytest.raises(ConfigError, match="describes whole forces; with a prior use"):
            make_curvature(name, model.potential_, rest, **keywords)


def test_confidence_knows_the_error_of_the_whole(ethanol):
    """A published force field beside a prior: its error is that on the labels, not on what the prior left."""
    train = ethanol.select(np.arange(0, 200, 10))
    model = NDeMTorchMDNet(
        prior="pairs", objective="ndem_curvature", progress=False,
        objective_options={"curvature": "mmff94", "confidence": "closed_form", "sigma": 0.02},
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(train, max_steps=1)  # fmt: skip
    error = make_force_field("mmff94").fit(train).subtract(train).targets["forces"]
    assert float(model.objective_.force_error) == pytest.approx(float(np.sqrt(np.square(error).mean())), rel=1e-6)


def test_a_periodic_system_with_direct_forces():
    """Slabs: springs from Lindh's rule, an equivariant head of forces; nonsense on fixed atoms counts nowhere."""
    atoms, rng = example_crystal(), np.random.default_rng(1)
    n = 3 * len(atoms)
    dataset = MolecularDataset.from_atoms([atoms] * 3)
    forces, fixed = rng.standard_normal((n, 3)), np.arange(n) % len(atoms) == 0
    forces[fixed] = 900.0
    columns = dataset.columns() | {
        "pos": np.tile(atoms.positions, (3, 1)) + 0.05 * rng.standard_normal((n, 3)),
        "targets": {"energy": rng.standard_normal(3), "forces": forces},
        "fixed": fixed,
    }
    model = NDeMTorchMDNet(
        objective="ndem_curvature", forces="direct", progress=False, seed=1, scale=1.0,
        objective_options={"curvature": "lindh", "head": "both", "sigma": 0.02, "energy": False},
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
    ).fit(MolecularDataset(**columns), max_steps=5)  # fmt: skip
    last = model.history_[-1]
    for name in ("train_forces", "train_noisy_forces", "train_ndem"):
        assert 0 < last[name] < 1e4, name
