"""Ensembles: all members at once say what each says alone; members that do not belong together are refused."""

from __future__ import annotations

import numpy as np
import pytest

from ndem_zoo import Ensemble, EquiformerV2, NDeMEquiformerV2, NDeMTorchMDNet
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError, NotFittedError
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
