"""Ensembles: all members at once say what each says alone; members that do not belong together are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ase.io import read, write

from ndem_zoo import Ensemble, EquiformerV2, NDeMCalculator, NDeMEquiformerV2, NDeMTorchMDNet
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError, FileFormatError, NotFittedError
from ndem_zoo.models.potential import Potential

TINY = {"hidden_channels": 8, "num_layers": 2, "num_heads": 2, "num_rbf": 4}
REFERENCE = {"H": -13.6, "C": -1030.0, "O": -2042.0}


def fitted(train_set, **options) -> NDeMTorchMDNet:
    defaults = {"backbone_options": TINY, "reference_energies": REFERENCE, "precision": "64-true", "lr": 1e-2}
    defaults |= {"warmup_steps": 0, "device": "cpu", "progress": False, "objective": "supervised"}
    return NDeMTorchMDNet(**defaults | options).fit(train_set, max_steps=2)


@pytest.fixture(scope="module")
def members(ethanol):
    """Three models, each trained on frames of its own: scales differ, too."""
    return [fitted(ethanol[20 * seed : 20 * seed + 8], seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def mixed(ethanol):
    """Structures of 1 to 9 atoms."""
    frames = [ethanol.atoms(i)[: 1 + (4 * i) % 9] for i in range(10)]
    for atoms in frames:
        atoms.calc = None
    return MolecularDataset.from_atoms(frames)


def loop(models, dataset) -> dict[str, np.ndarray]:
    """Predictions of one model after the other: (M, S) and (M, A, 3)."""
    found = [model.predict(dataset) for model in models]
    columns = {"energy": np.stack([f["energy"] for f in found])}
    if "forces" in found[0]:
        columns["forces"] = np.stack([np.concatenate([*f["forces"]]) for f in found])
    return columns


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("forces", ["gradient", "direct", "none"])
def test_the_members_at_once_are_the_members_one_by_one(ethanol, mixed, members, forces, stacked):
    if forces != "gradient":
        members = [fitted(ethanol[:8], seed=seed, forces=forces) for seed in range(3)]
    expected, ensemble = loop(members, mixed), Ensemble(members, stacked=stacked)
    together, prediction = ensemble.predict_members(mixed), ensemble.predict(mixed)
    assert len(ensemble) == 3
    assert set(together) == set(expected) == ({"energy"} if forces == "none" else {"energy", "forces"})
    assert set(prediction) == {name + end for name in expected for end in ("", "_std")}
    for name, values in expected.items():
        assert values.std(axis=0).max() > 1e-4, "the members must differ"
        np.testing.assert_allclose(together[name], values, rtol=0, atol=1e-10)
        np.testing.assert_allclose(prediction[name], values.sum(axis=0) / 3, rtol=0, atol=1e-10)
        variance = ((values - values.mean(axis=0)) ** 2).sum(axis=0) / 3
        np.testing.assert_allclose(prediction[f"{name}_std"], np.sqrt(variance), rtol=0, atol=1e-10)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("forces", ["gradient", "direct", "none"])
def test_each_member_has_a_prior_of_its_own(ethanol, forces, stacked):
    """Fitted to the member's own data; and structures that a prior does not know are refused before anything is computed."""
    parts = [ethanol.select(np.arange(seed, 400, 40)) for seed in range(2)]
    models = [fitted(part, prior="valence", forces=forces, seed=seed) for seed, part in enumerate(parts)]
    expected, ensemble = loop(models, ethanol[:5]), Ensemble(models, stacked=stacked)
    found = ensemble.predict_members(ethanol[:5])
    priors = [model.potential_.prior.columns(ethanol[:5]) for model in models]
    for name, values in expected.items():
        assert np.abs(priors[0][name] - priors[1][name]).max() > 1e-3
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-9)
    with pytest.raises(DataError, match="structure 0: the valence force field has no molecule"):
        ensemble.predict(ethanol.atoms(0)[:3])
    with pytest.raises(ConfigError, match="model 1 has prior None, model 0 has 'valence'"):
        Ensemble([models[0], fitted(parts[0], forces=forces)], stacked=stacked)


def test_single_precision(ethanol):
    models = [fitted(ethanol[:8], seed=seed, precision="32-true") for seed in range(2)]
    expected, found = loop(models, ethanol[:5]), Ensemble(models, stacked=True).predict_members(ethanol[:5])
    assert np.abs(found["energy"] - expected["energy"]).max() < 1e-5, "total energies are not rounded to float32"
    np.testing.assert_allclose(found["forces"], expected["forces"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_saved_models_and_later_changes(ethanol, members, tmp_path, stacked):
    for number, model in enumerate(members):
        model.save(tmp_path / str(number))
    loaded = [NDeMTorchMDNet.load(tmp_path / str(number)) for number in range(3)]
    expected = loop(members, ethanol[:3])
    mixture = [tmp_path / "0", str(tmp_path / "1"), loaded[2]]
    ensembles = [Ensemble(models, stacked=stacked) for models in (loaded, mixture)]
    loaded[0].partial_fit(ethanol[:8], max_steps=2)
    for ensemble in ensembles:
        np.testing.assert_allclose(ensemble.predict_members(ethanol[:3])["energy"], expected["energy"], atol=1e-10)
    assert all(model.potential_.training is False for model in members)


def test_all_members_in_one_pass(ethanol, members, monkeypatch):
    """The network runs once for a batch, on a GPU by default; on a CPU the members come one after the other."""
    passes = []
    forward = Potential.forward
    monkeypatch.setattr(
        Potential, "forward", lambda self, batch, **o: (passes.append(batch.n_systems), forward(self, batch, **o))[1]
    )
    for stacked, expected in ((True, [4]), (None, [4, 4, 4])):
        passes.clear()
        Ensemble(members, device="cpu", stacked=stacked).predict(ethanol[:4])
        assert passes == expected


def test_a_stacked_ensemble_takes_the_eager_plan(ethanol, members):
    """Of its own copy: the model keeps its plan."""
    backbone = members[0].potential_.backbone
    before = getattr(backbone, "plan", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "plan", "fused" if before is None else before, raising=False)
        ensemble = Ensemble(members, stacked=True)
        assert ensemble._network.backbone.plan == "eager"
        assert backbone.plan == ("fused" if before is None else before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone_options": TINY | {"num_layers": 1}}, "model 1 has backbone option num_layers 1, model 0 has 2"),
        ({"forces": "direct"}, "model 1 has forces 'direct', model 0 has 'gradient'"),
        ({"precision": "32-true"}, "model 1 has precision '32-true', model 0 has '64-true'"),
        ({"reference_energies": REFERENCE | {"C": -1000.0}}, r"model 1 has the reference energy -1000\.0 eV for C"),
    ],
)
def test_models_that_do_not_belong_together(ethanol, members, options, message):
    with pytest.raises(ConfigError, match=message):
        Ensemble([members[0], fitted(ethanol[:8], **options)])


def test_other_elements(ethanol, members):
    frames = ethanol[:4]
    columns = frames.columns() | {"z": np.where(frames.z == 8, 6, frames.z)}
    with pytest.raises(ConfigError, match=r"model 1 has elements \['C', 'H'\], model 0 has \['C', 'H', 'O'\]"):
        Ensemble([members[0], fitted(MolecularDataset(**columns))])
    nitrogen = MolecularDataset(**frames.columns() | {"z": np.where(frames.z == 8, 7, frames.z)})
    with pytest.raises(DataError, match="is N, which the model has not been trained on"):
        Ensemble(members).predict(nitrogen)


def test_too_few_or_not_fitted(members):
    with pytest.raises(ConfigError, match="an ensemble of 1 models; it needs two or more"):
        Ensemble(members[:1])
    with pytest.raises(NotFittedError):
        Ensemble([members[0], NDeMTorchMDNet()])


def test_members_that_predict_different_things(ethanol):
    labels = {"gap": np.linspace(5, 6, 8), "homo": np.linspace(-7, -6, 8)}
    data = MolecularDataset(**{**ethanol[:8].columns(), "targets": labels})
    members = [fitted(data, target=target, reference_energies=None, preset="qm9_fast") for target in ("gap", "homo")]
    with pytest.raises(ConfigError, match="model 1 has target 'homo', model 0 has 'gap'"):
        Ensemble(members)


def test_networks_that_cannot_be_stacked(ethanol):
    options = {"preset": "md17_fast", "backbone_options": EquiformerV2.tiny, "progress": False, "device": "cpu"}
    options |= {"reference_energies": REFERENCE}
    members = [NDeMEquiformerV2(**options, seed=seed).fit(ethanol[:4], max_steps=1) for seed in range(2)]
    with pytest.raises(ConfigError, match="stacked=True, but a EquiformerV2 cannot be stacked"):
        Ensemble(members, stacked=True)
    predicted = Ensemble(members).predict(ethanol[:3])
    energies = [model.predict(ethanol[:3])["energy"] for model in members]
    np.testing.assert_allclose(predicted["energy"], np.mean(energies, axis=0))


# ---------------------------------------------------------------------------------------------------------- uncertainty


@pytest.mark.parametrize("stacked", [True, False])
def test_calibration_makes_deviations_as_large_as_errors(ethanol, members, stacked):
    valid, ensemble = ethanol[100:130], Ensemble(members, stacked=stacked)
    before = ensemble.predict(valid)
    assert ensemble.calibrate(valid) is ensemble
    after = ensemble.predict(valid)
    for name in ("energy", "forces"):
        np.testing.assert_array_equal(after[name], before[name])
        error = after[name] - valid.targets[name]
        assert np.sqrt(np.mean(after[f"{name}_std"] ** 2)) == pytest.approx(np.sqrt(np.mean(error**2)))
        ratio = after[f"{name}_std"] / before[f"{name}_std"]
        np.testing.assert_allclose(ratio, ensemble.calibration_["factors"][name], rtol=1e-9)
    assert ensemble.calibration_["split_hash"] == valid.split_hash
    assert ensemble.calibration_["numbers"] == {"energy": 30, "forces": 810}


def test_fixed_atoms_do_not_count(ethanol, members):
    fixed = np.tile(np.arange(9) < 3, 20)
    columns = ethanol[100:120].columns()
    targets = columns["targets"] | {"forces": np.where(fixed[:, None], 1e3, columns["targets"]["forces"])}
    with_fixed = MolecularDataset(**columns | {"fixed": fixed, "targets": targets})
    factor = Ensemble(members).calibrate(with_fixed).calibration_
    assert factor["numbers"]["forces"] == 20 * 6 * 3
    found = Ensemble(members).predict(ethanol[100:120])
    error = (found["forces"] - ethanol[100:120].targets["forces"])[~fixed]
    expected = np.sqrt(np.mean(error**2) / np.mean(found["forces_std"][~fixed] ** 2))
    assert factor["factors"]["forces"] == pytest.approx(expected)


def test_an_ensemble_is_saved_with_its_calibration(ethanol, members, tmp_path):
    ensemble = Ensemble(members).calibrate(ethanol[100:110])
    ensemble.save(tmp_path / "ensemble")
    again = Ensemble.load(tmp_path / "ensemble")
    for name, values in ensemble.predict(ethanol[:4]).items():
        np.testing.assert_array_equal(again.predict(ethanol[:4])[name], values)
    assert again.calibration_ == ensemble.calibration_
    ensemble.save(tmp_path / "ensemble")  # over itself
    assert "energy_std" not in again.predict(ethanol[:2], return_std=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(FileExistsError, match="something else than an ensemble"):
        ensemble.save(tmp_path / "other")
    record = json.loads((tmp_path / "ensemble" / "ensemble.json").read_text())
    for change, message in (
        ({"format": 99}, "format 99"),
        ({"members": ["../../x", "member-1"]}, "outside of its folder"),
        ({"members": 3}, "does not describe an ensemble"),
        ({"calibration": {"factors": {"energy": "x"}}}, "does not describe an ensemble"),
        ({"calibration": {"factors": {"energy": -1.0}}}, "does not describe an ensemble"),
    ):
        (tmp_path / "ensemble" / "ensemble.json").write_text(json.dumps(record | change))
        with pytest.raises(FileFormatError, match=message):
            Ensemble.load(tmp_path / "ensemble")
    with pytest.raises(FileNotFoundError):
        Ensemble.load(tmp_path)


def test_what_cannot_be_calibrated(ethanol, members):
    bare = ethanol[:4].with_targets([])
    with pytest.raises(DataError, match="no labels to compare with"):
        Ensemble(members).calibrate(bare)
    with pytest.raises(DataError, match="standard deviations are 0"):
        Ensemble([members[0], members[0]]).calibrate(ethanol[:4])


def test_a_single_model_has_no_deviation(ethanol, members):
    with pytest.raises(ConfigError, match=r"return_std=True, but a single model has no spread.*Ensemble"):
        members[0].predict(ethanol[:2], return_std=True)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("precision", [None, "32-true"])
def test_the_calculator_gives_the_deviations(ethanol, members, stacked, precision, tmp_path):
    ensemble = Ensemble(members, stacked=stacked).calibrate(ethanol[100:110])
    expected = ensemble.predict(ethanol[50:51])
    atoms = ethanol.atoms(50)
    atoms.calc = NDeMCalculator(ensemble, precision=precision)
    rounding = 1e-9 if precision is None else 1e-4
    assert atoms.get_potential_energy() == pytest.approx(expected["energy"][0], abs=rounding)
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=rounding)
    results = atoms.calc.results
    assert type(results["energy_std"]) is float
    assert results["energy_std"] == pytest.approx(expected["energy_std"][0], rel=1e-3 + rounding)
    np.testing.assert_allclose(results["forces_std"], expected["forces_std"], rtol=2e-2, atol=10 * rounding)
    assert atoms.calc.get_property("energy_std", atoms) == results["energy_std"]
    assert ensemble.predict(ethanol[50:51])["energy"][0] == expected["energy"][0], "the ensemble stays as it was"
    write(tmp_path / "a.extxyz", atoms)  # ASE knows nothing of these results, and leaves them
    assert read(tmp_path / "a.extxyz").get_potential_energy() == pytest.approx(expected["energy"][0], abs=1e-3)
