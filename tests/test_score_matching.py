"""The supplement's proposition 1 in numbers: explicit and denoising score matching are minimized by the same network.

The density of clean structures is a mixture of two Gaussians in two dimensions, so that the score of the noisy density,
which nobody knows for molecules, is a formula here. The network is one with weights that are not at the optimum.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ndem_zoo.graph import make_batch
from ndem_zoo.noise import gaussian
from ndem_zoo.physics import BOLTZMANN

SIGMA = 0.4
CENTERS = torch.tensor([[-1.0, 0.3], [0.8, -0.5]], dtype=torch.float64)
SPREADS = torch.tensor([0.5, 0.3], dtype=torch.float64)
WEIGHTS = torch.tensor([0.35, 0.65], dtype=torch.float64)

#: Quadrature: Gauss-Hermite points per dimension for smooth integrals under Gaussians; exact for polynomials to degree 79.
POINTS = 40


def noisy_log_density(x: Tensor, sigma: float = SIGMA) -> Tensor:
    """log p(x~): the mixture, each component widened by the noise."""
    variance = SPREADS**2 + sigma**2
    square = (x.unsqueeze(-2) - CENTERS).square().sum(-1)
    return torch.logsumexp(torch.log(WEIGHTS / (2 * math.pi * variance)) - square / (2 * variance), dim=-1)


def noisy_score(x: Tensor, sigma: float = SIGMA) -> Tensor:
    x = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(noisy_log_density(x, sigma).sum(), x)
    return score


def hermite(points: int = POINTS) -> tuple[Tensor, Tensor]:
    """Nodes (P, 2) and weights (P,) of the mean over a standard normal in two dimensions."""
    import numpy as np

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(points))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes), (weights.unsqueeze(0) * weights.unsqueeze(1)).flatten()


def network() -> nn.Module:
    torch_rng = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=torch_rng, dtype=torch.float64))
    return net


def explicit(net: nn.Module) -> Tensor:
    """J1 by quadrature over the noisy density: E || net(x~) - grad log p(x~) ||²."""
    nodes, weights = hermite()
    total = 0.0
    for weight, center, spread in zip(WEIGHTS, CENTERS, SPREADS, strict=True):
        x = center + nodes * math.sqrt(spread**2 + SIGMA**2)
        total = total + weight * (weights * (net(x) - noisy_score(x)).square().sum(-1)).sum()
    return total


def denoising(net: nn.Module, sign: float = 1.0, power: int = 2) -> Tensor:
    """J2 by quadrature over clean points and noise: E || net(x~) - grad log p(x~ | x) ||², which is -epsilon / sigma²."""
    nodes, weights = hermite(24)
    noise = SIGMA * nodes
    total = 0.0
    for weight, center, spread in zip(WEIGHTS, CENTERS, SPREADS, strict=True):
        clean = center + spread * nodes
        seen = clean.unsqueeze(1) + noise.unsqueeze(0)  # (P, P, 2)
        difference = net(seen) + sign * noise / SIGMA**power
        total = total + weight * torch.einsum("i,j,ij->", weights, weights, difference.square().sum(-1))
    return total


def gradient(loss: Tensor, net: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def test_both_forms_have_the_same_gradient():
    net = network()
    one, other = gradient(explicit(net), net), gradient(denoising(net), net)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * one.abs().max().item())
    assert one.abs().max() > 0.1


@pytest.mark.parametrize("change", [{"sign": -1.0}, {"power": 1}, {"power": 3}], ids=str)
def test_a_wrong_target_has_another_gradient(change):
    """The comparison can fail: with the sign turned, or another power of sigma, it does."""
    net = network()
    one, other = gradient(explicit(net), net), gradient(denoising(net, **change), net)
    assert (other - one).abs().max() > 0.05 * one.abs().max()


def test_they_differ_by_a_constant():
    """J2 - J1 is the same for every network: what no network can know of the noise."""
    gaps = []
    for factor in (0.3, 0.8, 1.3):
        net = network()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(factor)
        gaps.append((denoising(net) - explicit(net)).item())
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-4)
    nodes, weights = hermite()
    score_square = sum(
        w * (weights * noisy_score(c + nodes * math.sqrt(s**2 + SIGMA**2)).square().sum(-1)).sum()
        for w, c, s in zip(WEIGHTS, CENTERS, SPREADS, strict=True)
    )
    assert gaps[0] == pytest.approx(2 / SIGMA**2 - score_square.item(), rel=1e-4)


def test_the_package_s_noise_is_that_of_the_proposition():
    """By Monte Carlo, with `noise.gaussian`: the best linear prediction of -epsilon/sigma² from x~ is the score's slope.

    Clean atoms are normal with spread s, so that log p(x~) has the score -x~ / (s² + sigma²); for atoms in a harmonic well
    at temperature T that is F(x) / kT, smoothed: denoising learns forces where the data are a Boltzmann ensemble.
    """
    n, spread = 40_000, 0.07
    pos = spread * torch.randn((n, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = make_batch([1] * n, pos.numpy(), [1] * n, 3.0, dtype=torch.float64)
    noise = gaussian(batch, torch.Generator().manual_seed(2), sigma=0.05, ratio=0.999)
    seen = (batch.pos + noise.epsilon)[noise.mask]
    target = (-noise.epsilon / noise.sigma.square())[noise.mask]
    slope = ((seen * target).sum() / seen.square().sum()).item()
    assert slope == pytest.approx(-1 / (spread**2 + 0.05**2), rel=0.02)
    temperature = 500.0
    stiffness = BOLTZMANN * temperature / spread**2  # eV/Å²: the well whose ensemble has this spread
    smoothed = -stiffness / (BOLTZMANN * temperature) / (1 + stiffness * 0.05**2 / (BOLTZMANN * temperature))
    assert slope == pytest.approx(smoothed, rel=0.02)
