"""Options and arithmetic of the objectives; what all of them promise is in test_contracts.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.models.potential import Potential
from ndem_zoo.noise import masked_gaussian
from ndem_zoo.objectives.base import SupervisedLoss
from ndem_zoo.objectives.ndem import NDeM
from ndem_zoo.objectives.noisy_nodes import NoisyNodes
from ndem_zoo.objectives.supervised import Supervised
from ndem_zoo.testing import (
    OBJECTIVE_PROBES,
    HarmonicBackbone,
    ObjectiveCase,
    check_objective,
    fill_weights,
    harmonic_case,
)
from ndem_zoo.testing.objectives import columns_of, weight_zero_is_supervised

SIGMA = 0.05


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------ supervised terms


@pytest.mark.parametrize(
    ("loss", "function"), [("mse", F.mse_loss), ("l1", F.l1_loss), ("smooth_l1", F.smooth_l1_loss)]
)
def test_supervised_terms_by_hand(loss, function):
    case = ObjectiveCase.of("supervised")
    batch = case.batch()
    objective, potential = case.build(supervised=SupervisedLoss(energy_weight=2.0, force_weight=5.0, loss=loss))
    terms = objective(potential, batch, rng())
    prediction, scale = potential(batch), 0.7
    energy = function(prediction.energy / scale, batch.targets["energy"] / scale)
    forces = function(prediction.forces / scale, batch.targets["forces"] / scale)
    torch.testing.assert_close(terms["energy"], 2.0 * energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["forces"], 5.0 * forces, rtol=1e-12, atol=0)


def test_a_weight_of_zero_leaves_a_term_out():
    case = ObjectiveCase.of("supervised")
    for weights, needed in (((1.0, 0.0), {"energy"}), ((0.0, 1.0), {"forces"})):
        supervised = SupervisedLoss(*weights)
        assert supervised.requires == needed
        assert set(case.terms(supervised=supervised)) == needed
    with pytest.raises(ConfigError, match="nothing to learn"):
        SupervisedLoss(0.0, 0.0)


def test_large_energies_are_subtracted_in_double_precision():
    """At -406,000 kcal/mol, float32 energies are 2 meV apart: an error of 1e-5 eV must survive."""
    reference = np.zeros(101)
    reference[[1, 6, 7, 8]] = -100.0, -3000.0, -4000.0, -6000.0
    case = ObjectiveCase.of("supervised")
    potential = fill_weights(Potential(case.backbone.cls(**case.backbone.options), reference=reference)).train()
    batch = case.batch(torch.float32)
    label = potential(batch, need_forces=False).energy.detach() + 1e-5
    terms = Supervised(SupervisedLoss(1.0, 0.0))(potential, batch.replace(targets={"energy": label}), rng())
    assert label.abs().max() > 1e4
    assert terms["energy"].item() == pytest.approx(1e-10, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------------ NDeM


VARIANTS = [
    {"grad_main": "flow"},
    {"grad_main": "label"},
    {"grad_main": 0.1},
    {"target": "kappa", "kappa": 15.0},
    {"target": "boltzmann"},
    {"sigma": (0.01, 0.2), "sigma_per": "batch", "sigma_sample": "uniform"},
    {"ratio": 1.0},
    {"loss_on": "masked"},
    {"reduction": "element_mean"},
    {"reuse_main_head": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_keep_the_contract(options):
    case = ObjectiveCase.of("ndem", options)
    for probe in OBJECTIVE_PROBES:
        probe(case)


def test_the_term_by_hand():
    """The formula of the paper, written out atom by atom."""
    case = ObjectiveCase.of("ndem", {"ratio": 0.5, "sigma": (0.02, 0.1), "unmasked_weight": 0.3})
    objective, potential = case.build(weight=2.5)
    batch = case.batch()
    term = objective(potential, batch, rng(7))["ndem"].item()
    options = {"cutoff": potential.backbone.cutoff, "sigma": (0.02, 0.1), "ratio": 0.5}
    noisy, noise = masked_gaussian(batch, rng(7), **options)
    forces = potential(batch).forces.detach() / 0.7
    noisy_forces = objective.noisy_force_head(potential.backbone(noisy), noisy).detach()
    total = 0.0
    for i in range(len(batch.z)):
        residual = forces[i] - noisy_forces[i] - noise.epsilon[i] / noise.sigma[i]
        total += (1.0 if noise.mask[i] else 0.3) * float(residual @ residual)
    assert term == pytest.approx(2.5 * total / len(batch.z), rel=1e-12)


def test_masked_only_divides_by_the_moved_atoms():
    case = ObjectiveCase.of("ndem", {"ratio": 0.5, "loss_on": "masked"})
    objective, potential = case.build()
    batch = case.batch()
    term = objective(potential, batch, rng(7))["ndem"].item()
    noisy, noise = masked_gaussian(batch, rng(7), cutoff=5.0, sigma=SIGMA, ratio=0.5)
    residual = potential(batch).forces / 0.7 - objective.noisy_forces(potential, noisy) - noise.epsilon / SIGMA
    moved = residual[noise.mask].square().sum(-1)
    assert 0 < len(moved) < len(residual)
    assert term == pytest.approx(moved.mean().item(), rel=1e-12)


def test_every_structure_is_divided_by_its_own_sigma():
    case = ObjectiveCase.of("ndem", {"sigma": (0.001, 1.0), "ratio": 0.5})
    objective, potential = case.build()
    batch = case.batch()
    _, noise = masked_gaussian(batch, rng(3), cutoff=5.0, sigma=(0.001, 1.0), ratio=0.5)
    target = objective.target(potential, batch, noise)
    for i in range(batch.n_systems):
        own = batch.system == i
        sigma = noise.sigma[own].unique()
        assert len(sigma) == 1
        torch.testing.assert_close(target[own], noise.epsilon[own] / sigma)
    assert len(noise.sigma.unique()) == batch.n_systems
    assert target.abs().max() < 6, "of unit variance, whatever the sigma"
    assert not target[~noise.mask].any()


def test_labels_stand_for_the_forces():
    """With labels, the term does not depend on what the main head says."""
    terms = []
    for factor in (1.0, -3.0):
        objective, potential, batch, generator = harmonic_case(NDeM, 20.0, grad_main="label")
        with torch.no_grad():
            potential.energy_head.stiffness.mul_(factor)
        terms.append(objective(potential, batch, generator)["ndem"].item())
    assert terms[0] == terms[1]


def test_zero_noise_leaves_the_difference_of_forces():
    """With a curvature and epsilon -> 0, the term is the mean square of F(X) - F'(X)."""
    options = {"target": "kappa", "kappa": 9.0, "sigma": 1e-9}
    objective, potential = ObjectiveCase.of("ndem", options).build()
    batch = ObjectiveCase.of("ndem").batch()
    term = objective(potential, batch, rng())["ndem"].item()
    difference = potential(batch).forces / 0.7 - objective.noisy_forces(potential, batch)
    assert term == pytest.approx(difference.square().sum(-1).mean().item(), rel=1e-6)


def test_kappa_is_in_ev_per_square_angstrom():
    """Whatever the potential's scale, kappa is physical: the target times the scale is kappa epsilon."""
    objective, potential, batch, _ = harmonic_case(NDeM, 20.0, target="kappa", kappa=9.0)
    _, noise = masked_gaussian(batch, rng(), cutoff=3.0, sigma=SIGMA, ratio=0.5)
    torch.testing.assert_close(objective.target(potential, batch, noise) * 0.7, 9.0 * noise.epsilon)


def test_main_head_alone():
    """With `reuse_main_head` there is no other head, and springs obey the relation."""
    objective, potential, batch, generator = harmonic_case(NDeM, 1 / SIGMA, reuse_main_head=True)
    assert not list(objective.parameters())
    assert objective(potential, batch, generator)["ndem"].item() < 1e-24
    with pytest.raises(ConfigError, match="reuse_main_head=True needs a potential with forces"):
        NDeM(options={"reuse_main_head": True}).build(Potential(HarmonicBackbone(), forces="none"))


def test_boltzmann_constants_are_part_of_the_saved_objective():
    case = ObjectiveCase.of("ndem", {"target": "boltzmann", "temperature": 300.0})
    objective, potential = case.build()
    fresh = NDeM(options=case.options)
    fresh.build(potential)
    fresh.double().load_state_dict(objective.state_dict())
    assert fresh.curvature.constants.equal(objective.curvature.constants)
    assert objective.curvature.constants[6] > 0
    generators = rng(1), rng(1)
    batch = case.batch()
    first, second = (o(potential, batch, g)["ndem"] for o, g in zip((objective, fresh), generators, strict=True))
    assert first.equal(second)


def test_boltzmann_constants_need_finite_forces():
    case = ObjectiveCase.of("ndem", {"target": "boltzmann"})
    columns = columns_of(case.batch())
    forces = columns.targets["forces"].copy()
    forces[3, 1] = np.nan
    columns.targets["forces"] = forces
    with pytest.raises(DataError, match="atom 3"):
        NDeM(options=case.options).build(case.backbone.potential(), columns)


def test_what_ndem_requires():
    energy_only = SupervisedLoss(1.0, 0.0)
    assert NDeM().requires == {"energy", "forces"}
    assert NDeM(energy_only).requires == {"energy"}
    assert NDeM(energy_only, options={"grad_main": "label"}).requires == {"energy", "forces"}
    assert NDeM(energy_only, options={"target": "boltzmann"}).requires == {"energy", "forces"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0}, "sigma=0; allowed are a positive number"),
        ({"sigma": (0.1, 0.01)}, r"sigma=\(0.1, 0.01\)"),
        ({"sigma": (0.1, 0.2, 0.3)}, "sigma="),
        ({"sigma": (0.1,)}, "sigma="),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"sigma": "0.1"}, "sigma='0.1'"),
        ({"ratio": 0.0}, "ratio=0.0; it must be above 0 and at most 1"),
        ({"ratio": 1.1}, "ratio=1.1"),
        ({"grad_main": "detach"}, "grad_main='detach'; allowed are stop, flow, label"),
        ({"grad_main": 1.5}, "grad_main=1.5; .* between 0"),
        ({"grad_main": None}, "grad_main=None; "),
        ({"target": "paperr"}, "target='paperr'; allowed are paper, kappa, boltzmann"),
        ({"target": "kappa"}, "kappa=None with target='kappa'"),
        ({"kappa": 3.0}, "kappa=3.0 with target='paper'"),
        ({"temperature": 0}, "temperature=0 K"),
        ({"loss_on": "some"}, "loss_on='some'"),
        ({"unmasked_weight": -1.0}, "unmasked_weight=-1.0"),
        ({"reduction": "sum"}, "reduction='sum'"),
        ({"sigma_sample": "normal"}, "sigma_sample='normal'"),
        ({"sigma_per": "atom"}, "sigma_per='atom'"),
        ({"sgima": 0.1}, "objective NDeM has no option 'sgima'; it has sigma, ratio"),
    ],
    ids=str,
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message):
        NDeM(options=options)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight_schedule": "cosine"}, "weight_schedule='cosine'; allowed are constant, decay, warmup"),
    ],
)
def test_impossible_weights(keywords, message):
    with pytest.raises(ConfigError, match=message):
        NDeM(**keywords)
    with pytest.raises(ConfigError, match="objective Supervised has no option 'sigma'; it has no options"):
        Supervised(options={"sigma": 0.1})


def test_options_are_plain_values():
    """So that they can be written to a config file and read back."""
    options = NDeM(options={"sigma": [0.01, 0.1]}).options
    assert dataclasses.replace(options) == options
    assert NDeM(options=dataclasses.asdict(options)).options == options


# ----------------------------------------------------------------------------------------------------------- noisy nodes


def test_one_pass_learns_labels_and_noise_on_the_noisy_structure():
    case = ObjectiveCase.of("noisy_nodes", {"separate_branch": False, "sigma": 0.03})
    objective, potential = case.build(weight=0.2)
    batch = case.batch()
    terms = objective(potential, batch, rng(5))
    noisy, noise = masked_gaussian(batch, rng(5), cutoff=5.0, sigma=0.03, ratio=1.0)
    prediction = potential(noisy)
    supervised = SupervisedLoss().terms(prediction, batch, potential.scale)
    denoised = objective.noise_head(prediction.features, noisy) - noise.epsilon / 0.03
    torch.testing.assert_close(terms["energy"], supervised["energy"])
    torch.testing.assert_close(terms["forces"], supervised["forces"])
    torch.testing.assert_close(terms["denoising"], 0.2 * denoised.square().mean())


def test_separate_branch_learns_labels_on_the_clean_structure():
    case = ObjectiveCase.of("noisy_nodes", {"ratio": 0.5})
    objective, potential = case.build(weight=0.2)
    batch = case.batch()
    terms = objective(potential, batch, rng(5))
    noisy, noise = masked_gaussian(batch, rng(5), cutoff=5.0, sigma=SIGMA, ratio=0.5)
    supervised = SupervisedLoss().terms(potential(batch), batch, potential.scale)
    denoised = objective.noise_head(potential.backbone(noisy), noisy) - noise.epsilon / SIGMA
    torch.testing.assert_close(terms["forces"], supervised["forces"])
    torch.testing.assert_close(terms["denoising"], 0.2 * denoised.square().mean())


def test_one_pass_keeps_the_contract_but_for_weight_zero():
    """At weight 0 it still trains on noisy structures: that is noise augmentation, not the supervised baseline."""
    check_objective("noisy_nodes", {"separate_branch": False}, skip=["weight_zero_is_supervised"])
    with pytest.raises(AssertionError, match="term energy at weight 0"):
        weight_zero_is_supervised(ObjectiveCase.of("noisy_nodes", {"separate_branch": False}))


def test_impossible_noisy_nodes():
    for options, message in (
        ({"sigma": -1}, "sigma=-1"),
        ({"ratio": 2}, "ratio=2"),
        ({"kappa": 1}, "no option 'kappa'"),
    ):
        with pytest.raises(ConfigError, match=message):
            NoisyNodes(options=options)


# ---------------------------------------------------------------------------------------------------------- fixed atoms


@pytest.mark.parametrize("name", ["supervised", "ndem", "noisy_nodes", "dens", "frad", "slide", "geossl"])
def test_fixed_atoms_have_no_say(name):
    """Neither their labels nor what heads say of them count; they are not moved either."""
    case = ObjectiveCase.of(name)
    batch = case.batch()
    fixed = torch.zeros_like(batch.fixed)
    fixed[[0, 3, 11]] = True
    forces = batch.targets["forces"].clone()
    forces[fixed] += 1e3
    objective, potential = case.build()
    held = batch.replace(fixed=fixed)
    terms = objective(potential, held, rng(5))
    other = objective(potential, held.replace(targets={**batch.targets, "forces": forces}), rng(5))
    for key in terms:
        assert torch.equal(terms[key], other[key])
    free = objective(potential, batch.replace(targets={**batch.targets, "forces": forces}), rng(5))
    assert free["forces"] > 1e3 * terms["forces"], "while they are free, they do"
    if name == "ndem":  # their residual is F - F', which is not 0
        head = objective.noisy_force_head
        value = objective(potential, held, rng(5))["ndem"]
        noisy, noise = objective.options.displace(held, rng(5), potential.backbone.cutoff)
        residual = potential(held).forces / 0.7 - head(potential.backbone(noisy), noisy) - noise.epsilon / noise.sigma
        torch.testing.assert_close(value, residual[~fixed].square().sum(-1).mean(), rtol=1e-10, atol=0)
        assert not noise.mask[fixed].any()


def test_l2mae_is_the_mean_length_of_the_errors():
    case = ObjectiveCase.of("supervised")
    batch = case.batch()
    objective, potential = case.build(supervised=SupervisedLoss(energy_weight=4.0, force_weight=100.0, loss="l2mae"))
    terms, prediction = objective(potential, batch, rng()), potential(batch)
    energy = (prediction.energy - batch.targets["energy"]).abs().mean() / 0.7
    forces = (prediction.forces - batch.targets["forces"]).norm(dim=-1).mean() / 0.7
    torch.testing.assert_close(terms["energy"], 4.0 * energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["forces"], 100.0 * forces, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------------------ DeNS


def test_dens_by_hand():
    """Moved atoms: the noise, told their forces; the others: forces; all structures: their energy before the noise."""
    case = ObjectiveCase.of("dens", {"sigma": 0.1, "ratio": 0.4, "probability": 0.7})
    objective, potential = case.build(weight=3.0, supervised=SupervisedLoss(energy_weight=2.0, force_weight=5.0))
    batch = case.batch()
    terms = objective(potential, batch, rng(2))
    noisy, noise = masked_gaussian(batch, rng(2), cutoff=5.0, sigma=0.1, ratio=0.4, probability=0.7)
    moved = noise.mask
    assert 0 < moved.sum() < len(moved)
    encoding = torch.where(moved.unsqueeze(-1), batch.targets["forces"], 0.0)
    prediction = potential(noisy, node_vectors=encoding)
    energy = ((prediction.energy - batch.targets["energy"]) / 0.7).square().mean()
    forces = ((prediction.forces - batch.targets["forces"]) / 0.7)[~moved].square().mean()
    head = objective.noise_head(potential.backbone(noisy, encoding), noisy)
    noise_term = (head - noise.epsilon / 0.1)[moved].square().mean()
    for key, value in {"energy": 2.0 * energy, "forces": 5.0 * forces, "denoising": 3.0 * noise_term}.items():
        torch.testing.assert_close(terms[key], value, rtol=1e-10, atol=0)


def test_heads_of_another_width():
    for name, head in (("ndem", "noisy_force_head"), ("dens", "noise_head")):
        narrow, _ = ObjectiveCase.of(name, {"head_width": 3}).build()
        usual, _ = ObjectiveCase.of(name).build()
        sizes = [sum(p.numel() for p in getattr(o, head).parameters()) for o in (narrow, usual)]
        assert sizes[0] < 0.7 * sizes[1]
        with pytest.raises(ConfigError, match="head_width=0"):
            ObjectiveCase.of(name, {"head_width": 0}).build()
