"""A step in shares is the step: same terms, same gradient, same noise, for every objective, to the precision of float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ndem_zoo import registry
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.store import open_store
from ndem_zoo.errors import ConfigError
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet
from ndem_zoo.noise import InternalSigmas, gaussian, internal_displacement
from ndem_zoo.objectives.base import SupervisedLoss
from ndem_zoo.sampling import Collator, step_seed
from ndem_zoo.shares import Cutter, ShareRng, balanced
from ndem_zoo.training import Run, TrainSettings, seeded

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}
INDICES = np.array([6, 0, 3, 7, 1, 4, 2])


@pytest.fixture(scope="module")
def mixed(ethanol, aspirin) -> MolecularDataset:
    """Four frames of ethanol and four of aspirin, by turns; a few atoms are fixed, of one structure all but one."""
    parts = MolecularDataset.concatenate([(ethanol if k % 2 == 0 else aspirin)[k : k + 1] for k in range(8)])
    rng = np.random.default_rng(0)
    fixed = rng.random(len(parts.z)) < 0.2
    fixed[1:9] = True
    targets = parts.targets | {"energy": rng.normal(size=8)}
    return MolecularDataset(**parts.columns() | {"targets": targets, "fixed": fixed})


def step(dataset, name: str, options: dict, accumulate: int, weight: float = 1.0) -> tuple[dict, dict]:
    """Terms and gradient of one step."""
    cls = registry.lookup(registry.OBJECTIVES, name, "objective")
    with seeded(0):
        backbone = TorchMDNet(**TINY, encode_vectors=cls.encodes_vectors)
        potential = Potential(backbone, scale=2.0)
    objective = cls(SupervisedLoss(), weight, "constant", {**cls.probed_with, **options})
    prepared = objective.prepare(dataset)
    with seeded(1):
        objective.build(potential, prepared)
    settings = TrainSettings(batch_size=7, max_steps=1, precision="64-true", accumulate=accumulate, seed=3)
    run = Run(potential.train(), objective, prepared, None, settings, torch.device("cpu"))
    run.state.step = 5
    totals: dict[str, float] = {}
    for share in run.shares(INDICES):
        terms = run.forward(share)
        run.backward(sum(terms.values()))
        for key, term in terms.items():
            totals[key] = totals.get(key, 0.0) + term.item()
    return totals, {key: p.grad for key, p in run.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "options", "limits", "expected"),
    [
        ("supervised", {}, {"batch_size": 13}, 1),  # 400 atoms, at 30 a structure
        ("supervised", {}, {"batch_size": 14}, 2),
        ("ndem", {}, {"batch_size": 100}, 8),
        ("ndem", {}, {"batch_size": 100, "accumulate": 3}, 3),
        ("ndem", {}, {"batch_size": 100, "accumulate": 1}, 1),
        ("ndem", {}, {"batch_size": 100, "max_atoms": 801}, 3),
        ("ndem", {}, {"batch_size": None, "max_atoms": 800}, 2),
        ("ndem", {"sigma": (0.01, 0.2), "sigma_per": "batch"}, {"batch_size": 100}, 8),
        ("ndem_curvature", {"confidence": "learned"}, {"batch_size": 100}, 1),
        ("geossl", {}, {"batch_size": 100}, 1),
    ],
)
def test_number_of_shares_if_nobody_says(name, options, limits, expected):
    """On a CPU about 400 atoms each; one, where the objective looks at the whole batch."""
    columns = {
        "z": np.tile([6, 1, 8], 80),
        "pos": np.random.default_rng(0).normal(size=(240, 3)),
        "ptr": 30 * np.arange(9),
    }
    data = MolecularDataset(**columns, targets={"energy": np.zeros(8), "forces": np.zeros((240, 3))})
    cls = registry.lookup(registry.OBJECTIVES, name, "objective")
    with seeded(0):
        potential = Potential(TorchMDNet(**TINY))
    objective = cls(SupervisedLoss(), 1.0, "constant", {**cls.probed_with, **options})
    objective.build(potential, data)
    run = Run(potential, objective, data, None, TrainSettings(max_steps=1, **limits), torch.device("cpu"))
    assert run.shares.number == expected
    assert list(run.shares.mine) == list(range(expected))


CASES = {
    "supervised": ("supervised", {}),
    "ndem": ("ndem", {"sigma": (0.01, 0.2)}),
    "ndem-masked": ("ndem", {"loss_on": "masked", "sigma": (0.01, 0.2), "sigma_per": "batch"}),
    "ndem-flow": ("ndem", {"grad_main": "flow", "ratio": 1.0, "reduction": "element_mean"}),
    "noisy_nodes": ("noisy_nodes", {"separate_branch": False}),
    "dens": ("dens", {"probability": 0.6, "sigma": (0.01, 0.2)}),
    "dens-batch": ("dens", {"probability": 0.9, "probability_per": "batch", "denoising_loss": "l2mae"}),
    "frad": ("frad", {"internal": "all"}),
    "slide": ("slide", {}),
    "ndem_curvature": ("ndem_curvature", {"head": "both"}),
    "ndem_curvature-one-pass": ("ndem_curvature", {"probability": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_shares_add_up_to_the_step(mixed, case):
    whole_terms, whole_gradient = step(mixed, *CASES[case], 1)
    for shares in (3, 9):  # 9: two are empty
        terms, gradient = step(mixed, *CASES[case], shares)
        assert terms == pytest.approx(whole_terms, rel=1e-11)
        assert gradient.keys() == whole_gradient.keys()
        for key, value in whole_gradient.items():
            torch.testing.assert_close(gradient[key], value, rtol=1e-8, atol=1e-10)


def test_every_objective_is_compared_above():
    """But geossl, whose noise is drawn for pairs, which no share knows of the others."""
    assert {name for name, _ in CASES.values()} | {"geossl"} == set(registry.OBJECTIVES)


def test_pairs_count_in_shares_as_in_the_step(mixed):
    """GeoSSL's weights: with noise so small that only its size counts, every pair has the same expected loss 1/2."""
    options = {"levels": 1, "largest": 1e-3, "smallest": 1e-3}
    free = MolecularDataset(**mixed.columns() | {"fixed": None})
    ((share, *_),) = [list(Cutter(Collator(free, 5.0), 3, range(3))(INDICES))]
    objective = registry.lookup(registry.OBJECTIVES, "geossl", "objective")(options=options)
    rows = objective.rows(share.cut.whole, torch.Generator())["distances"]
    counts = free.counts[INDICES]
    assert rows.tolist() == (counts * (counts - 1)).tolist(), "all pairs, in both directions"
    assert float(share.cut.fraction(rows)) == pytest.approx(len(share.batch.src) / (counts * (counts - 1)).sum())


def test_learned_confidence_needs_the_whole_batch(mixed):
    with pytest.raises(ConfigError, match="looks at a step's batch as a whole"):
        step(mixed, "ndem_curvature", {"confidence": "learned"}, 2)


# --------------------------------------------------------------------------------------------------------------- noise


def test_noise_of_shares_is_the_noise_of_the_whole(mixed):
    collate = Collator(mixed, 5.0, torch.float64)
    batch = collate(INDICES)
    how = {"sigma": (0.01, 0.5), "ratio": 0.5, "probability": 0.7}
    whole = gaussian(batch, torch.Generator().manual_seed(step_seed(1, 2)), **how)
    seen = torch.zeros(len(batch.z), dtype=torch.long)
    for share in Cutter(collate, 3, range(3))(INDICES):
        noise = gaussian(share.batch, ShareRng(share.cut, 1, 2), **how)
        for part, expected in zip(noise, whole, strict=True):
            assert torch.equal(part, expected[share.cut.atoms])
        assert torch.equal(share.batch.pos, batch.pos[share.cut.atoms])
        seen[share.cut.atoms] += 1
    assert (seen == 1).all(), "every atom is in one share"


def test_a_share_has_randomness_of_its_own_besides(mixed):
    """What is drawn with the generator itself, as dropout is, must not be the same in all shares."""
    shares = Cutter(Collator(mixed, 5.0), 3, range(3))(INDICES)
    draws = [torch.rand(4, generator=ShareRng(share.cut, 1, 2)).tolist() for share in shares]
    assert len(set(map(tuple, draws))) == 3
    again = [torch.rand(4, generator=ShareRng(share.cut, 1, 2)).tolist() for share in shares]
    assert again == draws


def test_internal_noise_of_shares_is_that_of_the_whole(mixed):
    from ndem_zoo.topology import with_internal_coordinates

    collate = Collator(with_internal_coordinates(mixed), 5.0, torch.float64)
    sigmas = InternalSigmas(30.0, 0.05, 5.0, 10.0)
    whole = internal_displacement(collate(INDICES), torch.Generator().manual_seed(step_seed(4, 0)), sigmas)
    assert float(whole.abs().max()) > 0.1
    for share in Cutter(collate, 2, range(2))(INDICES):
        moved = internal_displacement(share.batch, ShareRng(share.cut, 4, 0), sigmas)
        torch.testing.assert_close(moved, whole[share.cut.atoms], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- balance


@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_shares_are_balanced(number):
    costs = np.random.default_rng(number).integers(1, 200, 60)
    shares = balanced(costs, number)
    assert len(shares) == number
    assert sorted(np.concatenate(shares).tolist()) == list(range(60))
    assert all((np.diff(share) > 0).all() for share in shares)
    loads = [int(costs[share].sum()) for share in shares]
    best = max(costs.sum() / number, costs.max())
    assert max(loads) <= 4 / 3 * best + 1e-9, "Graham's bound"


def test_a_share_of_a_selection_has_the_selected_structures(mixed, tmp_path):
    """A part of a store knows where its rows are; shares must ask there, too."""
    mixed.save(tmp_path / "store")
    part = open_store(tmp_path / "store").select([7, 2, 5])
    whole, counts = Collator(part, 5.0).skeleton(np.array([2, 0]))
    assert counts.tolist() == part.counts[[2, 0]].tolist()
    assert whole.n_atoms.tolist() == counts.tolist()
    expected = np.concatenate([part.fixed[part.ptr[k] : part.ptr[k + 1]] for k in (2, 0)])
    assert whole.fixed.tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------------------------- training


def test_a_training_in_shares_is_the_training(ethanol):
    """Over all steps of a run, with its schedules, and with a thread that makes the shares."""
    options = {"backbone_options": TINY, "batch_size": 3, "precision": "64-true", "lr": 1e-2, "warmup_steps": 2}
    options |= {
        "validate_every": 3,
        "clip_norm": 5.0,
        "ema_decay": 0.9,
        "device": "cpu",
        "progress": False,
        "preset": "md17_fast",
    }
    whole = NDeMTorchMDNet(**options).fit(ethanol[:10], ethanol[1000:1007], max_steps=9)
    shares = NDeMTorchMDNet(**options, accumulate=2, prefetch=True).fit(ethanol[:10], ethanol[1000:1007], max_steps=9)
    for a, b in zip(whole.history_, shares.history_, strict=True):
        assert {**a, "seconds": 0} == pytest.approx({**b, "seconds": 0}, rel=1e-9)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_shares_are_counted_from_one(value):
    with pytest.raises(ConfigError, match=r"accumulate=.*; it must be a whole number, 1 or more"):
        TrainSettings(max_steps=1, accumulate=value)
