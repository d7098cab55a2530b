"""Predictions of lists: in buckets of size, in the order that was given, and without graphs of derivatives."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from ase.build import bulk

from ndem_zoo import inference, sampling
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.inference import predict_columns
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import TorchMDNet


@pytest.fixture(scope="module")
def potential():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Potential(TorchMDNet(**TorchMDNet.tiny, cutoff=4.0), reference=np.linspace(-50.0, 0.0, 101)).double()


@pytest.fixture(scope="module")
def mixed(ethanol):
    """Molecules of 1 to 9 atoms, one of 60, one crystal: in no order of size."""
    frames = [ethanol.atoms(i)[: 1 + (7 * i) % 9] for i in range(12)]
    cluster = bulk("C", "diamond", a=3.6, cubic=True).repeat((2, 2, 2))[:60]
    cluster.pbc = False
    crystal = bulk("C", "diamond", a=3.6)
    for number, atoms in enumerate((cluster, crystal)):
        atoms.rattle(0.1, seed=number)
    for atoms in frames:
        atoms.calc = None
    return MolecularDataset.from_atoms([*frames[:5], cluster, *frames[5:9], crystal, *frames[9:]])


def one_by_one(potential: Potential, dataset: MolecularDataset) -> dict[str, np.ndarray]:
    found = [predict_columns(potential, dataset.select([i]), 1) for i in range(len(dataset))]
    return {name: np.concatenate([f[name] for f in found]) for name in ("energy", "forces")}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_results_come_in_the_order_of_the_dataset(potential, mixed, batch_size):
    expected, found = one_by_one(potential, mixed), predict_columns(potential, mixed, batch_size)
    assert found["forces"].shape == (len(mixed.z), 3)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-11)
    assert np.ptp(expected["energy"]) > 1.0, "a swap would show"


def test_a_large_structure_does_not_blow_up_a_batch(potential, mixed, monkeypatch):
    seen = []
    forward = Potential.forward
    monkeypatch.setattr(
        Potential, "forward", lambda self, batch, **o: (seen.append(batch.n_systems), forward(self, batch, **o))[1]
    )
    monkeypatch.setattr(sampling, "MAX_ATOMS", 61)
    found = predict_columns(potential, mixed, 64)
    assert seen[0] == 1
    assert sum(seen) == len(mixed)
    assert len(seen) == 2 or max(seen[1:]) > 3, "the small ones stay together"
    np.testing.assert_allclose(found["energy"], one_by_one(potential, mixed)["energy"], rtol=0, atol=1e-11)


def test_nothing_to_predict(potential, mixed):
    found = predict_columns(potential, mixed.select([]), 8)
    assert found["energy"].shape == (0,)
    assert found["forces"].shape == (0, 3)


def test_no_graph_outlives_the_forces(potential, ethanol, monkeypatch):
    """The energy's graph is needed for the forces; a graph of the forces would double the memory."""
    kept, in_derivative, during = [], [False], []
    grad = torch.autograd.grad

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.append(weakref.ref(self))
            during.append(in_derivative[0])

    def derivative(*arguments, **options):
        in_derivative[0] = True
        try:
            return grad(*arguments, **options)
        finally:
            in_derivative[0] = False

    predictions = []
    forward = Potential.forward

    def recorded(self, batch, **options):
        predictions.append(forward(self, batch, **options))
        return predictions[-1]

    monkeypatch.setattr(torch.autograd, "grad", derivative)
    monkeypatch.setattr(Potential, "forward", recorded)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        predict_columns(potential, ethanol[:8], 4)
    assert len(kept) > 100, "the test must see the graph of the energy"
    assert not any(during), "the derivative makes no graph of its own"
    assert not any(ref() is not None for ref in kept), "and nothing of the energy's is left"
    assert len(predictions) == 2
    tensors = [t for p in predictions for t in (p.energy, p.forces, *p.features) if t is not None]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("was_training", [True, False])
def test_the_mode_is_put_back_even_after_an_error(potential, ethanol, monkeypatch, was_training):
    monkeypatch.setattr(inference, "load", lambda collate, order: (1 / 0 for _ in order))
    potential.train(was_training)
    with pytest.raises(ZeroDivisionError):
        predict_columns(potential, ethanol[:2], 1)
    assert potential.training is was_training
    potential.eval()
