"""Frad, SliDe and GeoSSL, and noise on bonds, angles and torsions: each against a truth of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import displace, make_batch
from ndem_zoo.internal_coordinates import (
    coordinates,
    lindh_constants,
    spring_energy,
    spring_forces,
    terms_of,
)
from ndem_zoo.noise import InternalSigmas, gaussian, internal_displacement, masked_gaussian, rotate
from ndem_zoo.objectives.dens import DeNS
from ndem_zoo.objectives.frad import Frad
from ndem_zoo.objectives.geossl import GeoSSL, n_scalars
from ndem_zoo.objectives.slide import SliDe
from ndem_zoo.testing import ObjectiveCase, batch_of, check_objective
from ndem_zoo.testing.common import distorted, example_crystal, with_labels

pytest.importorskip("rdkit.Chem")
pytestmark = pytest.mark.rdkit

EXTRAS = ("bonds", "angles", "torsions", "rotors", "hinges", "sides")
ALL = InternalSigmas(rotor=40.0, bond=0.06, bend=8.0, torsion=10.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def molecules():
    """Ethanol, aspirin-like branches, a ring, water, a nitrile and a lone atom, side by side with their terms."""
    names = ("CH3CH2OH", "C6H6", "H2O", "CH3CN", "CH3COOH", "isobutane", "trans-butane", "NH3")
    return ObjectiveCase.of("frad").batch_of([distorted(molecule(name)) for name in names] + [Atoms("Ar")])


@pytest.fixture(scope="module")
def batch():
    return molecules()


def internal(batch, pos):
    return coordinates(pos, terms_of(batch))


# ---------------------------------------------------------------------------------------------- internal coordinates


def test_internal_coordinates_are_those_of_ase(batch):
    """Lengths, angles and dihedrals of every molecule, against ASE's."""
    found, terms = internal(batch, batch.pos), terms_of(batch)
    atoms = Atoms(batch.z.numpy(), batch.pos.numpy())
    for kind, mask, measure in (
        (found.lengths, terms.is_bond, lambda row: atoms.get_distance(*row)),
        (found.angles, terms.is_angle, lambda row: math.radians(atoms.get_angle(*row))),
    ):
        rows = terms.bonds if mask is terms.is_bond else terms.angles
        expected = [measure(row) for row in rows[mask].tolist()]
        np.testing.assert_allclose(kind[mask].numpy(), expected, atol=1e-7)
        assert not kind[~mask].any()
    rows, mask = terms.torsions, found.is_torsion
    expected = np.array([math.radians(atoms.get_dihedral(*row)) for row in rows[mask].tolist()])
    # ASE counts from 0 to 360 degrees, with the other sign.
    turns = (found.torsions[mask].numpy() - expected) / (2 * np.pi)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-7)
    assert terms.is_torsion.sum() > mask.sum() > 40, "those along the nitrile have no meaning"


def test_derivatives_of_padding_and_straight_lines_are_finite(batch):
    pos = batch.pos.clone()
    nitrile = (batch.system == 3).nonzero().flatten()[:3]
    pos[nitrile] = torch.tensor([[0.0, 0, 0], [1.5, 0, 0], [2.7, 0, 0]], dtype=pos.dtype)
    pos.requires_grad_()
    found = internal(batch, pos)
    (gradient,) = torch.autograd.grad(sum(values.sum() for values in found[:3]), pos)
    assert torch.isfinite(gradient).all()


def test_lindh_constants_by_hand():
    """Of water, with the numbers of the publication: H and O are of the first and second row."""
    water = ObjectiveCase.of("frad").batch_of([molecule("H2O")])
    constants = lindh_constants(water.z, water.pos, terms_of(water))
    distance = float((water.pos[0] - water.pos[1]).norm()) / 0.529177210903
    rho = math.exp(0.3949 * (2.10**2 - distance**2))
    hartree = 27.211386245988
    assert constants.bonds[0].tolist() == pytest.approx([0.45 * rho * hartree / 0.529177210903**2] * 2, rel=1e-6)
    assert constants.angles[0].tolist() == pytest.approx([0.15 * rho * rho * hartree], rel=1e-6)


def test_lindh_constants_are_of_the_size_of_measured_ones():
    """Stretching of O-H in water: 8.45 mdyn/Å, of C-C and C-H in ethane about 4.5 and 5; the model is stiffer."""
    mdyn = 6.241509  # eV/Å²
    batch = ObjectiveCase.of("frad").batch_of([molecule("H2O"), molecule("C2H6")])
    constants = lindh_constants(batch.z, batch.pos, terms_of(batch))
    water, ethane = constants.bonds / mdyn
    for found, measured in ((water[:2], 8.45), (ethane[:1], 4.5), (ethane[1:7], 5.0)):
        assert 1.0 < float(found.min()) / measured <= float(found.max()) / measured < 1.6


# --------------------------------------------------------------------------------------------------------- the noise


def test_rotate_is_right_handed():
    axis = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    turned = rotate(torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64), axis, torch.tensor([math.pi / 2]).double())
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64))


def test_rotor_noise_keeps_lengths_and_angles(batch):
    displacement = internal_displacement(batch, rng(3), InternalSigmas(rotor=60.0))
    before, after = internal(batch, batch.pos), internal(batch, batch.pos + displacement)
    torch.testing.assert_close(after.lengths, before.lengths, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.angles, before.angles, rtol=0, atol=1e-10)
    for system in range(batch.n_systems):
        moved = displacement[batch.system == system].norm(dim=-1) > 1e-6
        n_rotors = int((batch.extras["rotors"][system, :, 0] >= 0).sum())
        assert bool(moved.any()) == (n_rotors > 0)
        assert not n_rotors or moved.double().mean() < 0.8, "only the smaller sides move"
    benzene = displacement[batch.system == 1]
    assert not benzene.any()


def test_rotors_turn_by_the_noise_that_was_asked_for():
    """Over many draws: the torsion of acetic acid's rotors has the standard deviation, and no mean."""
    case = ObjectiveCase.of("frad")
    batch = case.batch_of([molecule("CH3COOH")] * 2000)
    rotors = batch.extras["rotors"]
    displacement = internal_displacement(batch, rng(1), InternalSigmas(rotor=20.0))
    starts = (torch.cumsum(batch.n_atoms, 0) - batch.n_atoms).reshape(-1, 1, 1)
    terms = terms_of(batch)
    own = terms._replace(torsions=rotors.long() + starts, is_torsion=rotors[..., 0] >= 0)
    before, after = coordinates(batch.pos, own).torsions, coordinates(batch.pos + displacement, own).torsions
    turned = torch.remainder(after - before + math.pi, 2 * math.pi) - math.pi
    assert turned.shape == (2000, 2)
    for column in turned.T:
        assert math.degrees(column.std()) == pytest.approx(20.0, rel=0.06)
        assert abs(math.degrees(column.mean())) < 2.0
    assert abs(torch.corrcoef(turned.T)[0, 1]) < 0.1, "rotors are independent"


@pytest.mark.parametrize("kind", ["bond", "bend", "torsion"])
def test_one_kind_of_noise_changes_that_kind(kind):
    """Hydrogen peroxide has one of each: only what was asked for changes, by as much as was asked for."""
    sizes = {"bond": 0.05, "bend": 6.0, "torsion": 15.0}
    batch = ObjectiveCase.of("frad").batch_of([molecule("H2O2")] * 2000)
    sigmas = InternalSigmas(rotor=0.0, **{kind: sizes[kind]})
    displacement = internal_displacement(batch, rng(2), sigmas)
    before, after = internal(batch, batch.pos), internal(batch, batch.pos + displacement)
    twist = torch.remainder(after.torsions - before.torsions + math.pi, 2 * math.pi) - math.pi
    changes = {
        "bond": after.lengths - before.lengths,
        "bend": torch.rad2deg(after.angles - before.angles),
        "torsion": torch.rad2deg(twist),
    }
    for name, change in changes.items():
        largest = change.abs().max().item()
        assert largest > sizes[name] if name == kind else largest < 1e-6, (name, largest)
    # Three bonds (all hinges), two angles (of the hydrogens), one torsion, which each end turns.
    expected = sizes[kind] * {"bond": 1.0, "bend": 1.0, "torsion": math.sqrt(2.0)}[kind]
    moving = changes[kind][:, changes[kind].abs().amax(dim=0) > 0]
    for column in moving.T:
        assert column.std().item() == pytest.approx(expected, rel=0.06 if kind != "bend" else 0.45)


def test_all_noise_changes_everything_and_breaks_no_ring(batch):
    displacement = internal_displacement(batch, rng(5), ALL)
    before, after = internal(batch, batch.pos), internal(batch, batch.pos + displacement)
    assert (after.lengths - before.lengths).abs().max() < 0.06 * 5
    assert (after.lengths - before.lengths)[terms_of(batch).is_bond].std() == pytest.approx(0.06, rel=0.5)
    ring = [i for i in (batch.system == 1).nonzero().flatten().tolist() if batch.z[i] == 6]
    assert not displacement[ring].any()
    lone = displacement[batch.system == 8]
    assert not lone.any()


def test_a_batch_gives_what_its_molecules_give_alone(batch):
    """Turning by hand, one molecule and one rotor after the other, gives the same."""
    displacement = internal_displacement(batch, rng(9), InternalSigmas(rotor=30.0))
    number = batch.extras["rotors"].shape[1]
    draws = torch.randn((batch.n_systems, number, 4), generator=rng(9), dtype=torch.float64) * math.radians(30.0)
    for system in range(batch.n_systems):
        rows = (batch.system == system).nonzero().flatten()
        pos = batch.pos[rows].numpy().copy()
        atoms = Atoms(batch.z[rows].numpy(), pos)
        for h in range(number):
            rotor = batch.extras["rotors"][system, h].tolist()
            if rotor[0] < 0:
                continue
            side = (batch.extras["sides"][rows, 0] >> h & 1).bool().numpy()
            axis = atoms.positions[rotor[2]] - atoms.positions[rotor[1]]
            part = atoms[side]
            part.rotate(math.degrees(draws[system, h, 0]), axis, center=atoms.positions[rotor[1]])
            atoms.positions[side] = part.positions
        np.testing.assert_allclose(atoms.positions - pos, displacement[rows].numpy(), atol=1e-12)


def test_a_side_with_a_fixed_atom_stays(batch):
    fixed = torch.zeros_like(batch.fixed)
    sides = batch.extras["sides"][:9, 0]
    fixed[int((sides & 1).nonzero()[0])] = True  # on the side of ethanol's first rotor
    held = batch.replace(fixed=fixed)
    displacement = internal_displacement(held, rng(4), ALL)
    assert not displacement[fixed].any()
    second = (sides >> 1 & ~sides & 1).bool()  # what only the other rotor turns
    assert displacement[:9][second].any()


def test_noise_without_bonds_is_refused():
    plain = batch_of([molecule("H2O")], 3.0)
    with pytest.raises(ConfigError, match=r"no extras rotors, hinges, sides.*with_internal_coordinates"):
        internal_displacement(plain, rng(), ALL)
    with pytest.raises(ConfigError, match=r"no extras bonds, angles, torsions"):
        spring_forces(plain, torch.zeros(3, 3, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------------------- Frad


@pytest.mark.parametrize("internal", ["rotors", "all"])
def test_frads_target_is_the_last_step_only(batch, internal):
    """The network sees both noises; the target is what lies between the hidden structure and the one that it sees."""
    objective = Frad(options={"sigma": 0.03, "internal": internal})
    noisy, noise = objective.options.displace(batch, rng(6), 5.0)
    sigmas = InternalSigmas(20.0) if internal == "rotors" else InternalSigmas(20.0, 0.058, 7.39, 10.3)
    generator = rng(6)
    hidden = batch.pos + internal_displacement(batch, generator, sigmas)
    torch.testing.assert_close(noisy.pos - hidden, noise.epsilon, rtol=0, atol=1e-14)
    assert noise.epsilon.std().item() == pytest.approx(0.03, rel=0.15)
    assert (noisy.pos - batch.pos - noise.epsilon).norm(dim=-1).max() > 0.1


@pytest.mark.parametrize("separate", [True, False])
def test_frad_by_hand(separate):
    case = ObjectiveCase.of("frad", {"sigma": 0.02, "separate_branch": separate})
    objective, potential = case.build(weight=0.3)
    batch = case.batch()
    terms = objective(potential, batch, rng(5))
    generator = rng(5)
    soft = internal_displacement(batch, generator, InternalSigmas(20.0))
    noise = gaussian(batch, generator, sigma=0.02)
    noisy = displace(batch, soft + noise.epsilon, 5.0)
    labels = objective.supervised.terms(potential(batch if separate else noisy), batch, potential.scale)
    residual = objective.noise_head(potential.backbone(noisy), noisy) - noise.epsilon / 0.02
    torch.testing.assert_close(terms["denoising"], 0.3 * residual.square().mean())
    torch.testing.assert_close(terms["forces"], labels["forces"])


def test_frad_without_rotor_noise_is_noisy_nodes():
    results = []
    for name, options in (("frad", {"rotor_sigma": 0.0}), ("noisy_nodes", {})):
        case = ObjectiveCase.of(name, options)
        objective, potential = case.build()
        results.append(objective(potential, ObjectiveCase.of("frad").batch(), rng(8)))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])


@pytest.mark.parametrize("options", [{"internal": "all"}, {"sigma": (0.01, 0.05), "ratio": 0.5}], ids=str)
def test_variants_of_frad_keep_the_contract(options):
    check_objective("frad", options)


# ------------------------------------------------------------------------------------------------------------- SliDe


def test_springs_forces_are_the_slope_of_their_energy(batch):
    displacement = internal_displacement(batch, rng(7), InternalSigmas(25.0, 0.05, 7.0, 10.0))
    forces = spring_forces(batch, displacement)
    terms = terms_of(batch)
    rest, constants = coordinates(batch.pos, terms), lindh_constants(batch.z, batch.pos, terms)
    there, step = batch.pos + displacement, 1e-5
    for seed in range(4):
        direction = torch.randn(forces.shape, generator=rng(seed), dtype=torch.float64)
        up, down = (spring_energy(there + sign * step * direction, rest, constants, terms) for sign in (1, -1))
        slope = torch.zeros(batch.n_systems, dtype=torch.float64).index_add(
            0, batch.system, -(forces * direction).sum(-1)
        )
        torch.testing.assert_close((up - down) / (2 * step), slope, rtol=1e-5, atol=1e-4)
    assert forces.abs().max() > 1.0
    assert not forces[batch.system == 8].any()


def test_springs_are_at_rest_where_they_were_made(batch):
    assert spring_forces(batch, torch.zeros_like(batch.pos)).abs().max() < 1e-10
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).expand_as(batch.pos)
    assert spring_forces(batch, shift).abs().max() < 1e-8


def test_a_stretched_spring_pulls_by_its_constant():
    """Of a diatomic molecule: F = -k (r - r0), with no other term."""
    batch = ObjectiveCase.of("frad").batch_of([molecule("HCl")])
    k = lindh_constants(batch.z, batch.pos, terms_of(batch)).bonds[0, 0]
    axis = (batch.pos[1] - batch.pos[0]) / (batch.pos[1] - batch.pos[0]).norm()
    forces = spring_forces(batch, torch.stack([torch.zeros(3, dtype=torch.float64), 0.1 * axis]))
    torch.testing.assert_close(forces, 0.1 * k * torch.stack([axis, -axis]))


def test_torsions_take_the_shorter_way():
    """A torsion at 175 degrees that is turned by 10 is 10 degrees from rest, not 350."""
    batch = ObjectiveCase.of("frad").batch_of([molecule("H2O2")])
    terms = terms_of(batch)
    start = coordinates(batch.pos, terms)
    sides = batch.extras["sides"][:, 0]
    rotor = batch.extras["rotors"][0, 0].tolist()
    axis = batch.pos[rotor[2]] - batch.pos[rotor[1]]
    side = (sides & 1).bool()

    def turned(pos, degrees):
        arms = pos - pos[rotor[1]]
        angle = torch.full((len(pos),), math.radians(degrees), dtype=torch.float64)
        moved = rotate(arms, (axis / axis.norm()).expand_as(arms), angle) + pos[rotor[1]]
        return torch.where(side.unsqueeze(-1), moved, pos)

    flat = turned(batch.pos, 175.0 - math.degrees(start.torsions[0, 0]))
    rest, constants = coordinates(flat, terms), lindh_constants(batch.z, flat, terms)
    assert math.degrees(rest.torsions[0, 0]) == pytest.approx(175.0)
    energy = spring_energy(turned(flat, 10.0), rest, constants, terms)
    assert energy.item() == pytest.approx(0.5 * constants.torsions[0, 0].item() * math.radians(10.0) ** 2, rel=1e-6)


def test_slide_by_hand():
    case = ObjectiveCase.of("slide", {"denoising_weight": 0.4})
    objective, potential = case.build(weight=0.5)
    batch = case.batch()
    terms = objective(potential, batch, rng(5))
    generator = rng(5)
    displacement = internal_displacement(batch, generator, InternalSigmas(57.3, 0.058, 7.39, 10.3))
    forces = spring_forces(batch, displacement)
    noise = gaussian(batch, generator, sigma=0.04)
    bent, noisy = (batch.replace(pos=batch.pos + d) for d in (displacement, displacement + noise.epsilon))
    springs = objective.force_head(potential.backbone(bent), bent) - forces / objective.size
    denoised = objective.noise_head(potential.backbone(noisy), noisy) - noise.epsilon / 0.04
    torch.testing.assert_close(terms["springs"], 0.5 * springs.square().mean())
    torch.testing.assert_close(terms["denoising"], 0.5 * 0.4 * denoised.square().mean())
    assert set(terms) == {"energy", "forces", "springs", "denoising"}


def test_slides_target_is_of_unit_size():
    case = ObjectiveCase.of("slide")
    objective, _ = case.build()
    batch = case.batch()
    ratios = [
        (objective.target(batch, rng(seed))[1] / objective.size).square().mean().sqrt().item() for seed in range(40)
    ]
    assert np.mean(ratios) == pytest.approx(1.0, rel=0.3)
    assert objective.size > 0.5


def test_random_slices_add_up_to_the_whole():
    """The paper's loss, over many directions, is the mean square of the whole difference, which is what is minimized."""
    difference = torch.randn((7, 3), generator=rng(1), dtype=torch.float64)
    directions = torch.randn((40_000, 7, 3), generator=rng(2), dtype=torch.float64)
    sliced = (directions * difference).sum(dim=(1, 2)).square().mean()
    assert sliced.item() == pytest.approx(difference.square().sum().item(), rel=0.03)


def test_slide_without_regularizer_keeps_the_contract():
    check_objective("slide", {"denoising_weight": 0.0})


# ------------------------------------------------------------------------------------------------------------ GeoSSL


def test_geossl_by_hand():
    """Pair by pair, from the formula, with the same draws."""
    options = {"levels": 5, "largest": 2.0, "smallest": 0.1, "annealing_power": 1.5, "sigma": 0.2, "head_width": 7}
    case = ObjectiveCase.of("geossl", options)
    objective, potential = case.build(weight=0.6)
    batch = case.batch()
    term = objective(potential, batch, rng(5))["distances"].item()
    generator = rng(5)
    other, _ = masked_gaussian(batch, generator, cutoff=5.0, sigma=0.2)
    features = [potential.backbone(b).scalars for b in (other, batch)]
    sigmas = [2.0 * (0.1 / 2.0) ** (i / 4) for i in range(5)]
    total = 0.0
    for scalars, view in zip(features, (batch, other), strict=True):
        level = torch.randint(5, (batch.n_systems,), generator=generator)
        noise = torch.randn(len(batch.src), generator=generator, dtype=torch.float64)
        for e, (j, i) in enumerate(zip(batch.src.tolist(), batch.dst.tolist(), strict=True)):
            sigma = sigmas[level[batch.system[i]]]
            d = (view.pos[j] - view.pos[i]).norm()
            noisy = d + sigma * noise[e]
            head = objective.head
            pair = torch.cat([scalars[i] + scalars[j], head.distance(noisy.reshape(1))])
            score = head.last(head.score(pair)) / sigma
            total += float(0.5 * (score + (noisy - d) / sigma**2).detach() ** 2 * sigma**1.5) / len(batch.src)
    assert term == pytest.approx(0.6 * total / 2, rel=1e-10)


def test_the_right_score_costs_least():
    """Where distances are normal with standard deviation s, the best score is -(d - mean) / (s² + sigma²)."""
    n, spread, mean = 4000, 0.3, 2.0
    z, d = np.ones(2 * n), mean + spread * torch.randn(n, generator=rng(1), dtype=torch.float64)
    pos = torch.zeros(2 * n, 3, dtype=torch.float64)
    pos[1::2, 0] = d
    batch = make_batch(z, pos.numpy(), np.full(n, 2), 9.0, dtype=torch.float64)
    objective = GeoSSL(options={"levels": 1, "largest": 0.5, "smallest": 0.5})
    objective.register_buffer("sigmas", torch.tensor([0.5], dtype=torch.float64))

    def cost(factor: float) -> float:
        objective.head = lambda scalars, batch, distance: -factor * (distance - mean) / (spread**2 + 0.25) * 0.5
        return float(objective.matching(torch.zeros(2 * n, 1, dtype=torch.float64), batch, rng(2)))

    best, others = cost(1.0), [cost(factor) for factor in (-1.0, 0.0, 0.7, 1.4)]
    assert all(best < other for other in others)
    assert cost(0.0) == pytest.approx(0.5, rel=0.05), "with power 2, ignorance costs 1/2 at every level"
    assert best == pytest.approx(0.5 * (1 - 0.25 / 0.34), rel=0.08)


def test_geossl_needs_no_bonds():
    case = ObjectiveCase.of("geossl", {"sigma": 0.05})
    objective, potential = case.build()
    crystal = with_labels(batch_of([example_crystal()], potential.backbone.cutoff))
    assert objective(potential, crystal, rng())["distances"] > 0


def test_pairs_of_fixed_atoms_do_not_count():
    case = ObjectiveCase.of("geossl")
    objective, potential = case.build()
    batch = case.batch()
    held = batch.replace(fixed=torch.ones_like(batch.fixed))
    assert objective.matching(potential.backbone(held).scalars, held, rng()).item() == 0.0


def test_n_scalars_leaves_the_backbone_alone():
    potential = ObjectiveCase.of("geossl").build()[1]
    assert potential.backbone.training
    assert n_scalars(potential.backbone) == potential.backbone(ObjectiveCase.of("geossl").batch()).scalars.shape[1]
    assert potential.backbone.training


# -------------------------------------------------------------------------------------------------------------- DeNS


def test_dens_with_lengths_of_errors():
    case = ObjectiveCase.of("dens", {"sigma": 0.1, "ratio": 0.4, "denoising_loss": "l2mae"})
    objective, potential = case.build(weight=3.0)
    batch = case.batch()
    term = objective(potential, batch, rng(2))["denoising"]
    noisy, noise = masked_gaussian(batch, rng(2), cutoff=5.0, sigma=0.1, ratio=0.4)
    forces = torch.where(noise.mask.unsqueeze(-1), batch.targets["forces"], 0.0)
    head = objective.noise_head(potential.backbone(noisy, forces), noisy)
    expected = 3.0 * (head - noise.epsilon / 0.1)[noise.mask].norm(dim=-1).mean()
    torch.testing.assert_close(term, expected)


def test_a_coin_for_the_whole_batch():
    batch = ObjectiveCase.of("dens").batch()
    how = {"cutoff": 5.0, "sigma": 0.1, "ratio": 0.5, "probability": 0.5}
    counts = {"batch": set(), "structure": set()}
    heads = 0
    for seed in range(60):
        for per, seen in counts.items():
            mask = masked_gaussian(batch, rng(seed), probability_per=per, **how)[1].mask
            moved = len(batch.system[mask].unique())
            seen.add(moved)
            heads += moved == 3 and per == "batch"
    assert counts["batch"] == {0, 3}
    assert {1, 2} <= counts["structure"]
    assert 15 < heads < 45


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Frad, {"internal": "bonds"}, "internal='bonds'; allowed are rotors, all"),
        (Frad, {"rotor_sigma": -1.0}, "rotor_sigma=-1.0; it must be a number >= 0"),
        (Frad, {"tau": 0.1}, "objective Frad has no option 'tau'; it has sigma"),
        (SliDe, {"bond_sigma": float("nan")}, "bond_sigma=nan"),
        (
            SliDe,
            {"rotor_sigma": 0, "bond_sigma": 0, "bend_sigma": 0, "torsion_sigma": 0},
            "there are no forces to learn",
        ),
        (GeoSSL, {"levels": 0}, "levels=0; it must be a whole number, 1 or more"),
        (GeoSSL, {"smallest": 2.0, "largest": 1.0}, "smallest=2.0, largest=1.0"),
        (GeoSSL, {"head_width": 0}, "head_width=0"),
        (DeNS, {"denoising_loss": "l3"}, "denoising_loss='l3'; allowed are mse"),
        (DeNS, {"probability_per": "atom"}, "probability_per='atom'"),
    ],
    ids=str,
)
def test_impossible_options(cls, options, message):
    with pytest.raises(ConfigError, match=message):
        cls(options=options)
