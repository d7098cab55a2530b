"""Noise: who is moved, by how much, and what is guaranteed, over many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms

from ndem_zoo.graph import Batch, make_batch
from ndem_zoo.noise import draw_mask, draw_sigma, masked_gaussian
from ndem_zoo.testing import batch_of
from ndem_zoo.testing.common import example_cluster, example_molecules


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def structures_of(counts: list[int], fixed: list[int] | None = None) -> Batch:
    """Structures of so many atoms, all at one place, with some atoms fixed."""
    n = sum(counts)
    mask = np.zeros(n, dtype=bool)
    mask[fixed or []] = True
    return make_batch(np.ones(n), np.zeros((n, 3)), np.array(counts), 5.0, fixed=mask, dtype=torch.float64)


def per_structure(values: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    return list(values.split(batch.n_atoms.tolist()))


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.95])
def test_at_least_one_atom_is_moved_and_one_is_left(ratio):
    batch, generator = structures_of([1, 2, 3, 9] * 50), rng()
    for _ in range(20):
        for mask in per_structure(draw_mask(batch, generator, ratio), batch):
            assert mask.any()
            assert len(mask) == 1 or not mask.all()


def test_ratio_one_moves_all():
    assert draw_mask(structures_of([1, 2, 9]), rng(), 1.0).all()


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_fraction_that_is_moved(ratio):
    n = 200  # so large that the guarantees hardly matter
    batch = structures_of([n] * 20).replace(src=torch.zeros(0, dtype=torch.long), dst=torch.zeros(0, dtype=torch.long))
    draws = torch.cat([draw_mask(batch, rng(seed), ratio) for seed in range(10)]).double()
    assert draws.mean().item() == pytest.approx(ratio, abs=4 * math.sqrt(ratio * (1 - ratio) / len(draws)))


def test_small_structures_follow_the_rule():
    """Of two atoms with ratio 1/4, exactly one is moved: the other is kept back."""
    masks = draw_mask(structures_of([2] * 4000), rng(), 0.25).reshape(-1, 2)
    assert (masks.sum(1) == 1).all()
    assert masks[:, 0].double().mean().item() == pytest.approx(0.5, abs=0.04), "each equally often"


def test_fixed_atoms_never_move():
    batch, generator = structures_of([3, 4, 2, 2] * 20, fixed=[0, 1, 7, 8, 9, 10]), rng()
    alone = batch.system == 3  # atoms 9 and 10 are this structure's only ones
    for ratio in (0.2, 0.7, 1.0):
        for _ in range(20):
            moved, noise = masked_gaussian(batch, generator, cutoff=5.0, sigma=0.1, ratio=ratio)
            assert not noise.mask[batch.fixed].any()
            assert not noise.epsilon[batch.fixed].any()
            assert moved.pos[batch.fixed].equal(batch.pos[batch.fixed])
            free = [
                mask[~fixed]
                for mask, fixed in zip(*(per_structure(x, batch) for x in (noise.mask, batch.fixed)), strict=True)
            ]
            assert all(mask.any() for mask in free if len(mask)), "every structure with free atoms is moved"
            if ratio < 1:
                assert all(not mask.all() for mask in free if len(mask) > 1), "and one free atom is left"
            assert not noise.mask[alone].any()


# --------------------------------------------------------------------------------------------------------- displacements


def test_displacements_are_gaussian_of_the_right_size():
    batch = structures_of([10] * 2000)
    moved, noise = masked_gaussian(batch, rng(), cutoff=5.0, sigma=0.05, ratio=0.5)
    assert moved.pos.equal(batch.pos + noise.epsilon)
    assert not noise.epsilon[~noise.mask].any(), "exactly 0 where nothing is moved"
    z = (noise.epsilon / noise.sigma)[noise.mask].flatten()
    error = 1 / math.sqrt(len(z))
    assert z.mean().item() == pytest.approx(0, abs=4 * error)
    assert z.square().mean().item() == pytest.approx(1, abs=4 * error * math.sqrt(2))
    assert z.pow(4).mean().item() == pytest.approx(3, abs=4 * error * math.sqrt(96))
    x, y = (noise.epsilon / noise.sigma)[noise.mask][:, :2].T
    assert (x * y).mean().item() == pytest.approx(0, abs=4 * error * math.sqrt(3)), "components are independent"


@pytest.mark.parametrize("n", [2, 9])
def test_moving_all_atoms_leaves_the_center(n):
    batch = structures_of([n] * 3000)
    _, noise = masked_gaussian(batch, rng(), cutoff=5.0, sigma=0.05, ratio=1.0)
    net = torch.stack(per_structure(noise.epsilon, batch)).sum(1)
    assert net.abs().max() < 1e-15
    # Without its mean, a displacement has (n - 1) / n of its variance.
    variance = (noise.epsilon / 0.05).square().mean().item()
    assert variance == pytest.approx((n - 1) / n, abs=4 * math.sqrt(2 / (3 * n * 3000)))


def test_centers_stay_free_with_a_mask_and_with_fixed_atoms():
    free = structures_of([6] * 50)
    _, noise = masked_gaussian(free, rng(), cutoff=5.0, sigma=0.05, ratio=0.5)
    assert torch.stack(per_structure(noise.epsilon, free)).sum(1).norm(dim=1).min() > 1e-4
    held = structures_of([6] * 50, fixed=list(range(0, 150, 6)))  # one atom in each of the first 25 structures
    _, noise = masked_gaussian(held, rng(), cutoff=5.0, sigma=0.05, ratio=1.0)
    net = torch.stack(per_structure(noise.epsilon, held)).sum(1).norm(dim=1)
    has_fixed = torch.stack(per_structure(held.fixed, held)).any(1)
    assert net[has_fixed].min() > 1e-4
    assert net[~has_fixed].max() < 1e-15


# --------------------------------------------------------------------------------------------------------------- sigmas


@pytest.mark.parametrize("sigma", [0.05, np.float64(0.05)])
def test_a_fixed_sigma(sigma):
    drawn = draw_sigma(structures_of([2, 3]), rng(), sigma, "loguniform", "structure")
    assert drawn.shape == (5, 1)
    assert (drawn == 0.05).all()


@pytest.mark.parametrize("sample", ["loguniform", "uniform"])
@pytest.mark.parametrize("bounds", [(0.01, 0.5), [0.01, 0.5]])
def test_sigmas_of_structures(sample, bounds):
    batch = structures_of([2] * 5000)
    drawn = draw_sigma(batch, rng(), bounds, sample, "structure").reshape(-1, 2)
    assert (drawn[:, 0] == drawn[:, 1]).all(), "equal within a structure"
    assert drawn.min() >= 0.01
    assert drawn.max() <= 0.5
    rank = (
        (drawn[:, 0].log() - math.log(0.01)) / math.log(50) if sample == "loguniform" else (drawn[:, 0] - 0.01) / 0.49
    )
    assert rank.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 5000))
    assert rank.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_one_sigma_for_a_batch():
    batch = structures_of([2] * 100)
    drawn = [draw_sigma(batch, rng(seed), (0.01, 0.5), "loguniform", "batch") for seed in range(3)]
    assert all(len(values.unique()) == 1 for values in drawn)
    assert len(torch.cat(drawn).unique()) == 3


def test_noise_has_the_sigma_of_its_structure():
    batch = structures_of([200, 200]).replace(
        src=torch.zeros(0, dtype=torch.long), dst=torch.zeros(0, dtype=torch.long)
    )
    _, noise = masked_gaussian(batch, rng(1), cutoff=5.0, sigma=(0.001, 1.0), ratio=0.9)
    for epsilon, sigma, mask in zip(*(per_structure(x, batch) for x in noise), strict=True):
        assert epsilon[mask].square().mean().sqrt().item() == pytest.approx(sigma[0].item(), rel=0.15)
    sigmas = noise.sigma.unique()
    assert sigmas.max() / sigmas.min() > 2, "the seed gives two different sigmas, so the test means something"


# -------------------------------------------------------------------------------------------------------- the noisy batch


def test_the_same_generator_gives_the_same_noise():
    batch = batch_of(example_molecules(), 5.0)
    options = {"cutoff": 5.0, "sigma": (0.01, 0.1), "ratio": 0.5}
    first, second, other = (masked_gaussian(batch, rng(seed), **options)[1] for seed in (3, 3, 4))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert not first.epsilon.equal(other.epsilon)


def test_the_noisy_batch_has_all_its_edges():
    cluster = example_cluster()
    noisy, noise = masked_gaussian(batch_of([cluster], 3.0), rng(), cutoff=3.0, sigma=0.3, ratio=0.5)
    moved = Atoms(cluster.numbers, cluster.positions + noise.epsilon.numpy())
    expected = batch_of([moved], 3.0)
    assert len(noisy.src) == len(expected.src) != len(batch_of([cluster], 3.0).src)
    torch.testing.assert_close(noisy.vectors().norm(dim=1).sum(), expected.vectors().norm(dim=1).sum())


def test_labels_and_extras_ride_along():
    batch = batch_of(example_molecules(), 5.0, targets={"energy": np.arange(3.0)})
    noisy, _ = masked_gaussian(batch, rng(), cutoff=5.0, sigma=0.1)
    assert noisy.targets["energy"] is batch.targets["energy"]


def test_noise_in_single_precision():
    batch = batch_of(example_molecules(), 5.0, dtype=torch.float32)
    noisy, noise = masked_gaussian(batch, rng(), cutoff=5.0, sigma=(0.01, 0.1), ratio=0.5)
    assert {x.dtype for x in (noisy.pos, noise.epsilon, noise.sigma)} == {torch.float32}


def test_some_structures_are_left_as_they_are():
    batch = structures_of([4] * 1000)
    for ratio in (0.5, 1.0):
        noisy, noise = masked_gaussian(batch, rng(), cutoff=5.0, sigma=0.1, ratio=ratio, probability=0.25)
        moved = torch.stack([part.any() for part in per_structure(noise.mask, batch)])
        assert 0.2 < moved.double().mean() < 0.3
        assert torch.equal(noise.epsilon != 0, noise.mask.unsqueeze(-1).expand(-1, 3))
        torch.testing.assert_close(noisy.pos, batch.pos + noise.epsilon)


def test_edges_are_reused_on_request():
    batch = batch_of([example_cluster()], 4.0)
    options = {"cutoff": 4.0, "sigma": 0.3}
    reused, one = masked_gaussian(batch, rng(), reuse_edges=True, **options)
    rebuilt, other = masked_gaussian(batch, rng(), **options)
    assert torch.equal(one.epsilon, other.epsilon)
    assert reused.src is batch.src
    assert not torch.equal(rebuilt.vectors().norm(dim=-1).sort().values, reused.vectors().norm(dim=-1).sort().values)
