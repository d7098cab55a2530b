"""Targets other than energies: readouts against sums by hand, references and scales, and the way through the estimator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.data import atomic_masses

from ndem_zoo import MolecularDataset, NDeMCalculator, NDeMTorchMDNet
from ndem_zoo.datasets.files import DatasetCard
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.metrics import error_metrics, unit_of
from ndem_zoo.models.potential import EXTENT, Potential
from ndem_zoo.models.torchmd_net import TorchMDNet
from ndem_zoo.testing import batch_of, fill_weights
from ndem_zoo.testing.common import distorted, example_molecules

TINY = TorchMDNet.tiny
NAMES = ("CH3CH2OH", "H2O", "CH3CN", "NH3", "CH4", "C2H4", "HCN", "CO2")


class Given(torch.nn.Module):
    """A head that says what it was told."""

    def __init__(self, *values: np.ndarray) -> None:
        super().__init__()
        self.values = [torch.from_numpy(value) for value in values]

    def forward(self, features, batch):
        return self.values[0] if len(self.values) == 1 else tuple(self.values)


def from_center(atoms) -> np.ndarray:
    return atoms.positions - atoms.get_center_of_mass()


def potential_of(target: str, *values: np.ndarray, **options) -> Potential:
    potential = Potential(TorchMDNet(**TINY), forces="none", target=target, **options).double()
    potential.energy_head = Given(*values)
    return potential


@pytest.fixture(scope="module")
def molecules() -> MolecularDataset:
    """Ninety molecules, with made-up properties that are sums and dipoles of their atoms."""
    structures = [distorted(molecule(name), 0.02 + 0.002 * i) for i in range(11) for name in NAMES]
    z = np.concatenate([atoms.numbers for atoms in structures])
    counts = np.array([len(atoms) for atoms in structures])
    ptr = np.concatenate([[0], np.cumsum(counts)])
    first = np.add.reduceat(np.arange(len(z)), ptr[:-1]) * 0.0
    charge = {1: 0.2, 6: -0.1, 7: -0.3, 8: -0.4}
    electrons = np.array([float(atoms.numbers @ np.square(from_center(atoms)).sum(1)) for atoms in structures])
    dipole = [
        np.linalg.norm(sum(charge[n] * r for n, r in zip(a.numbers, from_center(a), strict=True))) for a in structures
    ]
    distance = [np.linalg.norm(atoms.positions[0] - atoms.positions[-1]) for atoms in structures]
    targets = {
        "U0": np.add.reduceat(np.array([-13.0, -1000.0, -1500.0, -2000.0])[np.searchsorted([1, 6, 7, 8], z)], ptr[:-1]),
        "gap": 7.0 + 0.3 * np.array(distance),
        "mu": np.array(dipole),
        "r2": electrons,
        "made_up": first + counts,
    }
    return MolecularDataset(z, np.concatenate([atoms.positions for atoms in structures]), ptr, targets=targets)


def estimator(**options) -> NDeMTorchMDNet:
    settings = {"preset": "qm9_fast", "backbone_options": TINY, "max_steps": 3, "warmup_steps": 1, "validate_every": 3}
    return NDeMTorchMDNet(**settings | {"batch_size": 8, "progress": False} | options)


# ------------------------------------------------------------------------------------------------------------- readouts


def test_dipole_moment_is_that_of_charges_and_atomic_dipoles():
    structures = example_molecules()
    rng = np.random.default_rng(0)
    n = sum(map(len, structures))
    charge, dipole = rng.normal(size=n), rng.normal(size=(n, 3))
    found = potential_of("mu", charge, dipole, scale=1.7)(batch_of(structures, 5.0)).value
    position = np.concatenate([from_center(atoms) for atoms in structures])
    stops = np.cumsum([len(atoms) for atoms in structures])[:-1]
    moments = [part.sum(0) for part in np.split(dipole + charge[:, None] * position, stops)]
    np.testing.assert_allclose(found, 1.7 * np.linalg.norm(moments, axis=1), rtol=1e-12)


def test_dipole_moment_turns_and_moves_with_nothing():
    atoms = example_molecules()[0]
    potential = fill_weights(Potential(TorchMDNet(**TINY), forces="none", target="mu")).double()
    moved = atoms.copy()
    moved.rotate(40, (1, 2, 3))
    moved.positions += [3.0, -20.0, 7.0]
    one, other = potential(batch_of([atoms], 5.0)).value, potential(batch_of([moved], 5.0)).value
    assert float(one) > 1e-3
    torch.testing.assert_close(one, other, rtol=1e-8, atol=0)
    assert len(list(potential.energy_head.output_network)) == 2, "one network for charges and dipoles"


def test_a_dipole_of_nothing_has_a_finite_gradient():
    potential = fill_weights(Potential(TorchMDNet(**TINY), forces="none", target="mu")).double()
    potential(batch_of([molecule("N2"), molecule("CO")], 5.0)).value.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)


def test_spatial_extent_is_a_sum_of_squares():
    structures = example_molecules()
    n = sum(map(len, structures))
    values = np.random.default_rng(0).normal(size=n)
    reference = np.zeros(101)
    reference[[1, 6, 7, 8]] = 1.0, 6.0, 7.0, 8.0
    found = potential_of("r2", values, scale=0.3, reference=reference)(batch_of(structures, 5.0)).value
    z = np.concatenate([atoms.numbers for atoms in structures])
    square = np.concatenate([np.square(from_center(atoms)).sum(1) for atoms in structures]) / EXTENT
    stops = np.cumsum([len(atoms) for atoms in structures])[:-1]
    expected = [part.sum() for part in np.split((z + 0.3 * values) * square, stops)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_masses_are_those_of_ase():
    atoms = molecule("CH3CH2OH")
    mass = atomic_masses[atoms.numbers]
    np.testing.assert_allclose(atoms.get_center_of_mass(), mass @ atoms.positions / mass.sum())


def test_only_energies_have_forces():
    with pytest.raises(ConfigError, match=r"forces='direct' with target='gap': only an energy has forces"):
        Potential(TorchMDNet(**TINY), forces="direct", target="gap")
    with pytest.raises(ConfigError, match="forces='gradient' with target='gap'"):
        estimator(target="gap", forces="gradient").fit(example_molecules())


# ------------------------------------------------------------------------------------------------ references and scales


def test_references_that_explain_everything(molecules):
    for target, constants in (("U0", (-13.0, -1000.0, -1500.0, -2000.0)), ("r2", EXTENT * np.array([1.0, 6, 7, 8]))):
        model = estimator(target=target).fit(molecules)
        found = [model.reference_[symbol] for symbol in "HCNO"]
        np.testing.assert_allclose(found, constants, rtol=1e-6)
        assert float(model.potential_.scale) == 1.0, "nothing is left but rounding errors"


@pytest.mark.parametrize("target", ["gap", "made_up"])
def test_others_are_shifted_by_their_mean(molecules, target):
    model = estimator(target=target).fit(molecules)
    assert float(model.potential_.shift) == pytest.approx(molecules.targets[target].mean(), rel=1e-12)
    assert float(model.potential_.scale) == pytest.approx(molecules.targets[target].std(), rel=1e-12)
    assert set(model.reference_.values()) == {0.0}


def test_a_dipole_moment_is_not_shifted(molecules):
    model = estimator(target="mu").fit(molecules)
    assert float(model.potential_.shift) == 0.0
    assert (model.predict(molecules)["mu"] >= 0).all()


def test_references_of_the_dataset(molecules):
    table = {"H": -13.6, "C": -1029.0, "N": -1485.0, "O": -2042.0}
    card = DatasetCard("x", "", "", {}, "", (), atom_references={"U0": table})
    data = MolecularDataset(**molecules.columns(), card=card)
    assert estimator(target="U0", reference_energies="dataset").fit(data).reference_ == table
    with pytest.raises(ConfigError, match="has none for gap"):
        estimator(target="gap", reference_energies="dataset").fit(data)
    with pytest.raises(ConfigError, match="reference_energies='least'; allowed are 'fit', 'dataset', 'mean', 'none'"):
        estimator(target="gap", reference_energies="least").fit(data)


# ------------------------------------------------------------------------------------------------------- the estimator


@pytest.mark.parametrize("target", ["U0", "gap", "mu", "r2", "made_up"])
@pytest.mark.parametrize("objective", ["ndem", "supervised"])
def test_trained_saved_and_loaded(molecules, target, objective, tmp_path):
    model = estimator(target=target, objective=objective).fit(molecules[:60], molecules[60:])
    prediction = model.predict(molecules)
    assert set(prediction) == {target}
    assert f"valid_{target}_mae" in model.history_[-1]
    model.save(tmp_path / "model")
    loaded = NDeMTorchMDNet.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(molecules)[target], prediction[target])
    mae = np.abs(prediction[target] - molecules.targets[target]).mean()
    assert model.evaluate(molecules)[f"{target}_mae"] == pytest.approx(mae)
    assert model.score(molecules) == pytest.approx(-mae)


def test_a_dipole_moment_is_learned(molecules):
    model = estimator(target="mu", objective="supervised", max_steps=250, lr=3e-3, clip_norm=None, ema_decay=None)
    model.fit(molecules[:64], molecules[64:])
    spread = np.abs(molecules.targets["mu"][64:] - np.median(molecules.targets["mu"][:64])).mean()
    assert model.evaluate(molecules[64:])["mu_mae"] < 0.5 * spread


def test_without_forces_ndem_is_denoising(molecules):
    """QM9's case: F = 0 at a minimum, so that -F'(X + epsilon) = epsilon / sigma is what is learned."""
    from ndem_zoo.sampling import collate

    model = estimator(target="gap", weight=1.0).fit(molecules)
    batch = collate(molecules, np.arange(8), 5.0)
    objective, potential, rng = model.objective_, model.potential_, torch.Generator()
    term = objective(potential, batch, rng.manual_seed(3))["ndem"]
    noisy, noise = objective.options.displace(batch, rng.manual_seed(3), 5.0)
    residual = -objective.noisy_force_head(potential.backbone(noisy), noisy) - noise.epsilon / noise.sigma
    torch.testing.assert_close(term, residual.square().sum(-1).mean())


def test_what_a_property_is_not_good_for(molecules):
    model = estimator(target="gap").fit(molecules)
    with pytest.raises(ConfigError, match="this model predicts 'gap'; a calculator needs one"):
        NDeMCalculator(model)
    with pytest.raises(DataError, match="alpha is needed, but structure 0 and all others lack it"):
        estimator(target="alpha").fit(molecules)
    with pytest.raises(ConfigError, match=r"target was gap when the weights were made, and is U0: call fit"):
        model.set_params(target="U0").partial_fit(molecules, max_steps=1)


def test_metrics_are_named_after_the_target():
    z, ptr = np.array([1, 1]), np.array([0, 1, 2])
    found = error_metrics({"gap": np.array([1.0, 2.0])}, {"gap": np.array([1.5, 2.0])}, z, ptr)
    assert found == pytest.approx(
        {"gap_mae": 0.25, "gap_rmse": 0.125**0.5, "gap_mae_meV": 250.0, "gap_rmse_meV": 1e3 * 0.125**0.5}
    )
    assert [unit_of(name) for name in found] == ["eV", "eV", "meV", "meV"]
    assert (unit_of("mu_mae"), unit_of("energy_mae")) == ("D", "eV")


def test_a_column_of_one_number_each_is_a_column(molecules):
    """(S, 1), as a data frame gives it, would be compared with (S,) all against all."""
    columns = molecules.columns()
    for name in ("gap", "made_up"):
        labels = {name: columns["targets"][name].reshape(-1, 1)}
        data = MolecularDataset(**{**columns, "targets": labels})
        if name == "gap":
            assert data.targets["gap"].shape == (len(data),)
            continue
        with pytest.raises(
            DataError, match=r"made_up has shape \(88, 1\); a target has one number per structure, \(88,\)"
        ):
            estimator(target=name).fit(data)


def test_nothing_is_subtracted_from_a_dipole_moment(molecules):
    with pytest.raises(ConfigError, match="reference_energies='fit' with target='mu'"):
        estimator(target="mu", reference_energies="fit").fit(molecules)
