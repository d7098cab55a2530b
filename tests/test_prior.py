"""Learning the difference to a force field: what comes out is network plus prior, wherever a potential is used."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from sklearn.base import clone

from ndem_zoo import NDeMCalculator, NDeMEquiformerV2, NDeMModel, NDeMTorchMDNet
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError, DataWarning
from ndem_zoo.forcefields import make_force_field

SMALL = {
    "objective": "supervised",
    "progress": False,
    "max_steps": 5,
    "backbone_options": {"hidden_channels": 16, "num_layers": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def data(ethanol):
    return tuple(
        ethanol.select(rows) for rows in (np.arange(0, 400, 10), np.arange(5, 105, 10), np.arange(1005, 1205, 10))
    )


@pytest.fixture(scope="module")
def model(data):
    return NDeMTorchMDNet(prior="valence", **SMALL).fit(*data[:2])


@pytest.fixture(scope="module")
def crystal_like():
    """Oxygen on copper in two periodic directions, half of it fixed, with labels of EMT; numbers of the free atoms."""
    rng, structures, labels = np.random.default_rng(0), [], []
    for _ in range(12):
        atoms = fcc111("Cu", (2, 2, 2), vacuum=6.0)
        add_adsorbate(atoms, "O", 1.2, "fcc")
        atoms.positions += 0.08 * rng.standard_normal(atoms.positions.shape)
        structures.append(atoms)
        atoms.calc = EMT()
        labels.append((atoms.get_potential_energy(), atoms.get_forces()))
        atoms.calc = None
        atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 2))
    dataset = MolecularDataset.from_atoms(structures).replace_targets(
        {"energy": np.array([e for e, _ in labels]), "forces": np.concatenate([f for _, f in labels])}
    )
    assert dataset.fixed.sum() == 12 * 4
    return dataset, np.flatnonzero(~dataset.fixed[: dataset.counts[0]])


def test_prediction_is_network_plus_prior(model, data):
    potential, test = model.potential_, data[2]
    found = model.predict(test)
    with potential.without_prior():
        network = model.predict(test)
    prior = potential.prior.columns(test)
    np.testing.assert_allclose(found["energy"], network["energy"] + prior["energy"], atol=1e-5)
    np.testing.assert_allclose(
        found["forces"].reshape(-1, 3), network["forces"].reshape(-1, 3) + prior["forces"], atol=1e-5
    )
    assert np.abs(network["forces"]).max() > 1e-6
    assert np.abs(prior["forces"]).max() > 1.0


def test_five_steps_with_the_prior_beat_five_without(model, data):
    without = NDeMTorchMDNet(**SMALL).fit(*data[:2])
    assert model.evaluate(data[2])["forces_mae"] < 0.15 * without.evaluate(data[2])["forces_mae"]
    assert model.evaluate(data[2])["energy_mae"] < without.evaluate(data[2])["energy_mae"]


def test_the_history_tells_the_error_of_the_whole(model, data):
    """Validation looks at residual labels: the errors are those of network plus prior on the labels."""
    last = min(model.history_, key=lambda row: row["valid_forces_mae"])
    assert last["valid_forces_mae"] == pytest.approx(model.evaluate(data[1])["forces_mae"], rel=1e-3)


def test_saved_and_loaded(model, data, tmp_path):
    model.save(tmp_path / "model")
    again = NDeMModel.load(tmp_path / "model")
    for name, values in model.predict(data[2]).items():
        np.testing.assert_array_equal(again.predict(data[2])[name], values)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["resolved"]["prior"] == "valence"
    assert "the difference was learned: valence\n- Reference energies beyond the prior" in (
        tmp_path / "model" / "card.md"
    ).read_text(encoding="utf-8")
    weights = tmp_path / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        NDeMModel.load(tmp_path / "model")


def test_copies_and_clones(model, data):
    np.testing.assert_array_equal(copy.deepcopy(model).predict(data[2])["energy"], model.predict(data[2])["energy"])
    assert clone(model).prior == "valence"


def test_moved_with_the_potential(model):
    """Where the network is, there is the prior; its constants stay float64."""
    moved = copy.deepcopy(model.potential_).to("meta", torch.float32)
    assert {tensor.device.type for tensor in moved.prior.buffers()} == {"meta"}
    assert moved.prior.coefficients.dtype == torch.float64
    assert {tensor.device.type for tensor in model.potential_.prior.buffers()} == {"cpu"}


def test_calculator(model, data):
    atoms = data[2].atoms(0)
    atoms.calc = NDeMCalculator(model)
    expected = model.predict(data[2].select([0]))
    assert atoms.get_potential_energy() == pytest.approx(expected["energy"][0], abs=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"][0], atol=1e-4)


def test_training_on_and_with_other_data(model, data):
    more = copy.deepcopy(model)
    prior = more.potential_.prior
    more.partial_fit(data[0], max_steps=3)
    assert more.potential_.prior is prior
    with pytest.raises(ConfigError, match="prior was valence when the weights were made, and is None"):
        more.set_params(prior=None).partial_fit(data[0], max_steps=3)


def test_resumed_is_uninterrupted(data, tmp_path):
    keywords = {**SMALL, "prior": "pairs"}
    whole = NDeMTorchMDNet(**keywords).fit(data[0], data[1], max_steps=8)
    NDeMTorchMDNet(**keywords).fit(data[0], data[1], max_steps=4, checkpoint_dir=tmp_path)
    resumed = NDeMTorchMDNet(**keywords).fit(data[0], data[1], max_steps=8, checkpoint_dir=tmp_path, resume=True)
    np.testing.assert_array_equal(resumed.predict(data[2])["energy"], whole.predict(data[2])["energy"])


def test_labels_that_are_a_force_field_leave_nothing_to_learn(data):
    """MMFF94's own labels: the residual is rounding, and an untrained network adds next to nothing."""
    truth = make_force_field("mmff94").fit(data[0])
    train, test = (part.replace_targets(truth.columns(part)) for part in (data[0], data[2]))
    found = NDeMTorchMDNet(prior="mmff94", scale=1e-3, **{**SMALL, "max_steps": 1}).fit(train).evaluate(test)
    assert found["forces_mae"] < 0.01
    assert found["energy_mae"] < 0.01


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"prior": "uff"}, "no force field 'uff'"),
        ({"prior": "valence", "target": "gap"}, "prior='valence' with target='gap': force fields have energies only"),
        (
            {"prior": "pairs", "backbone_options": {"cutoff": 4.0}},
            "needs all neighbors up to 5.0 Å; the backbone sees 4.0 Å",
        ),
    ],
)
def test_options_that_do_not_go_together(data, keywords, message):
    with pytest.raises(ConfigError, match=message):
        NDeMTorchMDNet(**{**SMALL, **keywords}).fit(data[0])


def test_a_backbone_with_few_neighbors_takes_no_pair_potential(data):
    with pytest.raises(ConfigError, match="the nearest neighbors only"):
        NDeMEquiformerV2(prior="pairs", backbone_options=None, progress=False, max_steps=1).fit(data[0])


def test_structures_that_the_prior_does_not_know(model, data):
    water = MolecularDataset.from_atoms([Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])])
    alone = water.atoms(0)
    alone.calc = NDeMCalculator(model)
    for ask in (lambda: model.predict(water), alone.get_potential_energy):
        with pytest.raises(DataError, match=r"structure 0: .* no molecule with the atomic numbers \[8, 1, 1\]"):
            ask()
    labeled = water.replace_targets({"energy": np.zeros(1), "forces": np.zeros((3, 3))})
    with pytest.raises(DataError, match="validation set, structure 0"):
        NDeMTorchMDNet(prior="mmff94", **SMALL).fit(data[0], labeled)
    crystal = MolecularDataset.from_atoms([Atoms("HO", [[0, 0, 0], [0, 0, 1.0]], cell=[4, 4, 4], pbc=True)])
    crystal = crystal.replace_targets({"energy": np.zeros(1), "forces": np.zeros((2, 3))})
    with pytest.raises(DataError, match="training set, prior 'valence': structure 0: it is periodic"):
        NDeMTorchMDNet(prior="valence", **SMALL).fit(crystal)


def test_a_callback_sees_the_whole(data, tmp_path):
    """Training runs on what the prior leaves; who predicts or saves in between gets energies and forces all the same."""
    seen = []
    learner = NDeMTorchMDNet(prior="valence", **SMALL)

    def look(row: dict) -> None:
        learner.save(tmp_path / "model")
        seen.append((row["valid_forces_mae"], learner.evaluate(data[1])["forces_mae"]))

    learner.fit(data[0], data[1], max_steps=2, callback=look)
    assert seen
    for residual, whole in seen:
        assert whole == pytest.approx(residual, rel=1e-3)
    again = NDeMModel.load(tmp_path / "model")
    assert again.evaluate(data[1])["forces_mae"] == pytest.approx(seen[-1][1], rel=1e-6)
    assert isinstance(learner.potential_.prior, type(again.potential_.prior))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(data):
    """The prior is where the network is, in training (the curvature of a published force field asks it), in prediction,
    and when training goes on after a prediction."""
    keywords = {**SMALL, "objective": "ndem_curvature", "objective_options": {"curvature": "mmff94", "sigma": 0.02}}
    learner = NDeMTorchMDNet(prior="valence", device="cuda", **keywords).fit(*data[:2])
    found = learner.predict(data[2])
    learner.partial_fit(data[0], max_steps=1)
    learner.device = "cpu"
    assert np.isfinite(found["energy"]).all()
    assert learner.evaluate(data[2])["forces_mae"] < 0.2


def test_a_prior_of_pairs_on_a_slab(crystal_like):
    """Periodic, with fixed atoms: forces are the derivative of the energy, prior included, whatever the neighbor list."""
    frames, numbers = crystal_like
    learner = NDeMTorchMDNet(prior="pairs", **SMALL).fit(frames)
    atoms, step = frames.atoms(3), 1e-4
    atoms.set_constraint()
    atoms.calc = NDeMCalculator(learner, precision="64-true")
    forces, predicted = atoms.get_forces(), learner.predict(frames)["forces"][3]
    np.testing.assert_allclose(predicted, forces, atol=1e-3)
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[numbers[-1], 2] += sign * step
        moved.calc = NDeMCalculator(learner, precision="64-true")
        energies.append(moved.get_potential_energy())
    assert -(energies[0] - energies[1]) / (2 * step) == pytest.approx(forces[numbers[-1], 2], abs=1e-5)
    strange = atoms.copy()
    strange.numbers[numbers[-1]] = 7
    strange.calc = NDeMCalculator(learner.set_params(unknown_elements="warn"))
    with pytest.warns(DataWarning), pytest.raises(DataError, match="atomic number 7 is not among those"):
        strange.get_potential_energy()
