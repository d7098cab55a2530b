"""Equality with torchmd-net's own Equivariant Transformer, weights copied: energies, forces, vectors, weights' gradients.

Runs where torchmd-net is installed (it needs a recent torch); stored numbers are compared in test_torchmd_net.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from ase.build import molecule

from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import TorchMDNet
from ndem_zoo.testing import batch_of, fill_weights, waves
from ndem_zoo.testing.common import distorted, example_cluster, example_molecules

pytest.importorskip("torchmdnet", reason="torchmd-net is not installed")
# Atoms without neighbors and trainable radial functions are among the cases; torchmd-net warns about both.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = {"hidden_channels": 16, "num_layers": 2, "num_heads": 2, "num_rbf": 8, "cutoff": 5.0}
MEDIUM = {"hidden_channels": 48, "num_layers": 3, "num_heads": 4, "num_rbf": 20, "cutoff": 2.7}
MD17 = {"hidden_channels": 128, "num_layers": 6, "num_heads": 8, "num_rbf": 32, "cutoff": 5.0}

STRUCTURES = {
    "water": lambda: example_molecules()[1:2],
    "three molecules": example_molecules,
    "with atoms alone": lambda: [molecule("C"), *example_molecules(), molecule("H")],
    "36 atoms": lambda: [example_cluster(), *example_molecules()],
    "second row": lambda: [distorted(molecule(name)) for name in ("SO2", "CH3Cl", "PH3", "Si2H6", "C6H6")],
}


def load_reference():
    """The committed script that also writes the stored numbers."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "make_golden_torchmd_net.py"
    spec = importlib.util.spec_from_file_location("make_golden_torchmd_net", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_reference()


def close(value: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    size = float(expected.abs().max())
    assert size > 1e-4, what
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * size, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("vector_cutoff", [True, False])
@pytest.mark.parametrize("size", [SMALL, MEDIUM, MD17], ids=["small", "medium", "MD17"])
@pytest.mark.parametrize("structures", STRUCTURES)
@pytest.mark.parametrize("plan", TorchMDNet.plans)
def test_energies_forces_and_vectors(plan, structures, size, vector_cutoff):
    options = {**size, "vector_cutoff": vector_cutoff}
    batch = batch_of(STRUCTURES[structures](), options["cutoff"])
    potential = fill_weights(Potential(TorchMDNet(**options))).double()
    potential.backbone.plan = plan
    expected = REFERENCE.evaluate(potential, options, batch)
    prediction = potential(batch)
    vectors = fill_weights(potential.backbone.vector_head()).double()(prediction.features, batch)
    close(prediction.energy, expected["energy"], 1e-10, "energy")
    close(prediction.forces, expected["forces"], 1e-10, "forces")
    close(vectors, expected["vectors"], 1e-10, "vector head")


@pytest.mark.parametrize("vector_cutoff", [True, False])
@pytest.mark.parametrize("trainable_rbf", [True, False])
@pytest.mark.parametrize("structures", ["three molecules", "with atoms alone"])
@pytest.mark.parametrize("plan", TorchMDNet.plans)
def test_gradients_of_a_force_loss(plan, structures, trainable_rbf, vector_cutoff):
    options = {**MEDIUM, "vector_cutoff": vector_cutoff, "trainable_rbf": trainable_rbf}
    batch = batch_of(STRUCTURES[structures](), options["cutoff"])
    potential = fill_weights(Potential(TorchMDNet(**options))).double()
    potential.backbone.plan = plan
    if trainable_rbf:  # the formula's values are no sensible radial functions
        fresh = TorchMDNet(**options).distance_expansion.double()
        potential.backbone.distance_expansion.load_state_dict(fresh.state_dict())
    model = REFERENCE.torchmd_net_model(options)
    REFERENCE.copy_weights(potential, model)
    label = torch.from_numpy(waves(batch.pos.shape))
    energies = torch.from_numpy(waves((batch.n_systems,)))

    energy, forces = model.train()(batch.z, batch.pos.clone(), batch.system)
    ((energy[:, 0] - energies).square().sum() + (forces - label).square().sum()).backward()
    ours = potential.train()(batch)
    ((ours.energy - energies).square().sum() + (ours.forces - label).square().sum()).backward()

    theirs = {name: p.grad for name, p in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    compared = 0
    for name, p in potential.named_parameters():
        expected = theirs.pop(REFERENCE.their_name(name))
        if not p.requires_grad:
            assert expected is None or not expected.any(), f"{name} is not trained here, but has a gradient there"
            continue
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12 * largest, msg=lambda m, n=name: f"{n}: {m}")
        compared += 1
    assert not theirs, "every weight of theirs is one of ours"
    assert compared > 60
