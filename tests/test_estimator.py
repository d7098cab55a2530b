"""The estimator: scikit-learn's manners, all forms of input, files without code in them, errors before anything is done."""

from __future__ import annotations

import inspect
import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ase
import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

from ndem_zoo import checkpoint as files
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError, NotFittedError, UnitsWarning
from ndem_zoo.models import estimator as module
from ndem_zoo.models.estimator import elements_of
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet
from ndem_zoo.objectives.ndem import NDeMOptions
from ndem_zoo.presets import PRESETS
from ndem_zoo.registry import MODELS, NEEDS, OBJECTIVES, lookup, missing_for
from ndem_zoo.training import TrainSettings

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}


def estimator(**options) -> NDeMTorchMDNet:
    defaults = {"backbone_options": TINY, "batch_size": 3, "max_steps": 4, "warmup_steps": 0}
    defaults |= {"lr": 1e-2, "min_lr": 0.0, "device": "cpu", "progress": False}
    return NDeMTorchMDNet(**{**defaults, **options})


@pytest.fixture(scope="module")
def train_set(ethanol):
    return ethanol[:10]


@pytest.fixture(scope="module")
def test_set(ethanol):
    return ethanol[500:504]


@pytest.fixture(scope="module")
def fitted(train_set):
    return estimator().fit(train_set)


@pytest.fixture(scope="module")
def mixed():
    """Four structures of three compositions, with labels: sizes 3, 2, 3 and 1."""
    rng = np.random.default_rng(0)
    counts, z = [3, 2, 3, 1], [8, 1, 1, 1, 1, 8, 1, 1, 8]
    pos = np.concatenate([np.arange(n)[:, None] * [0.9, 0.2, 0.0] for n in counts]) + 0.05 * rng.normal(size=(9, 3))
    targets = {"energy": rng.normal(size=4), "forces": rng.normal(size=(9, 3))}
    return MolecularDataset(np.array(z), pos, np.cumsum([0, *counts]), targets=targets)


def state(model) -> dict[str, torch.Tensor]:
    return {**model.potential_.state_dict(), **{f"objective.{k}": v for k, v in model.objective_.state_dict().items()}}


def assert_same_model(a, b) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]


def assert_same_predictions(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        for x, y in zip(value, b[name], strict=True):
            np.testing.assert_array_equal(x, y)


# --------------------------------------------------------------------------------------------------------- scikit-learn


class OnArrays(NDeMTorchMDNet):
    """Takes rows of two-dimensional arrays, as scikit-learn's checks insist: each becomes the shape of an H2 molecule."""

    @staticmethod
    def dataset(X, y=None) -> MolecularDataset:
        X = np.asarray(X, dtype=float)
        pos = np.zeros((len(X), 2, 3))
        pos[:, 1, 0] = 0.8 + 0.1 * np.tanh(X).mean(axis=1)
        energy = np.zeros(len(X)) if y is None else np.asarray(y, dtype=float)
        return MolecularDataset(
            np.ones(2 * len(X), int), pos.reshape(-1, 3), np.arange(len(X) + 1) * 2, targets={"energy": energy}
        )

    def fit(self, X, y=None):
        return super().fit(self.dataset(X, y))

    def partial_fit(self, X, y=None):
        return super().partial_fit(self.dataset(X, y))

    def predict(self, X):
        return super().predict(self.dataset(X))["energy"]

    def score(self, X, y=None):
        return super().score(self.dataset(X, y))


#: Checks by name, without data, and with arrays; names move between versions of scikit-learn.
PLAIN_CHECKS = """check_estimator_cloneable check_estimator_repr check_no_attributes_set_in_init
check_parameters_default_constructible check_get_params_invariance check_set_params
check_do_not_raise_errors_in_init_or_set_params check_valid_tag_types check_mixin_order""".split()
DATA_CHECKS = """check_dont_overwrite_parameters check_estimators_overwrite_params check_estimators_pickle
check_estimators_fit_returns_self check_fit_idempotent check_fit_check_is_fitted check_estimators_unfitted
check_fit_score_takes_y check_dict_unchanged check_readonly_memmap_input check_methods_subset_invariance
check_methods_sample_order_invariance check_pipeline_consistency check_positive_only_tag_during_fit""".split()


def check(name: str):
    function = getattr(estimator_checks, name, None)
    if function is None:
        pytest.skip(f"this scikit-learn has no {name}")
    return function


def test_most_checks_exist():
    assert sum(hasattr(estimator_checks, name) for name in PLAIN_CHECKS + DATA_CHECKS) >= 18


@pytest.mark.parametrize("name", PLAIN_CHECKS)
@pytest.mark.parametrize("model", MODELS)
def test_scikit_learn_check(name, model):
    check(name)(model, lookup(MODELS, model, "model")(progress=False))


@pytest.mark.parametrize("name", DATA_CHECKS)
def test_scikit_learn_check_with_data(name):
    options = {"backbone_options": TINY, "force_weight": 0.0, "forces": "none", "precision": "64-true", "max_steps": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(name)("OnArrays", OnArrays(**options, objective="supervised", device="cpu", progress=False))


def test_the_constructor_stores_what_it_is_given():
    options = {"sigma": (0.01, 0.1)}
    model = estimator(objective_options=options)
    assert model.get_params()["objective_options"] is options
    assert model.objective_options is options
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert copy is not model


def test_clone_forgets_what_was_learned(fitted):
    copy = clone(fitted)
    assert not hasattr(copy, "potential_")
    assert not [name for name in vars(copy) if name.endswith("_") and not name.startswith("_")]
    with pytest.raises(SklearnNotFittedError):
        check_is_fitted(copy)
    check_is_fitted(fitted)


@pytest.mark.parametrize("call", ["predict", "evaluate", "score", "save"])
def test_before_fit(train_set, tmp_path, call):
    argument = tmp_path / "model" if call == "save" else train_set
    with pytest.raises(NotFittedError, match="call fit, or load a saved model") as caught:
        getattr(estimator(), call)(argument)
    assert isinstance(caught.value, SklearnNotFittedError), "scikit-learn's tools look for their own"
    assert not list(tmp_path.iterdir())


def test_set_params_and_get_params(train_set):
    model = estimator().set_params(weight=0.5, lr=0.1)
    assert model.get_params()["weight"] == 0.5
    assert model.fit(train_set).resolved_["settings"]["lr"] == 0.1
    assert model.objective_.weight == 0.5
    with pytest.raises(ValueError, match="wieght"):
        model.set_params(wieght=1.0)


def test_a_misspelt_keyword_is_an_error():
    with pytest.raises(TypeError, match="wieght"):
        NDeMTorchMDNet(wieght=1.0)
    with pytest.raises(TypeError):
        NDeMTorchMDNet("md17_paper")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective_options": {"sigmaa": 0.1}}, "NDeM has no option 'sigmaa'; it has sigma, ratio, .*grad_main"),
        ({"backbone_options": {"layers": 3}}, "TorchMDNet has no option 'layers'; it has .*num_layers"),
        (
            {"objective": "nedm"},
            "there is no objective 'nedm'; there are .*ndem, ndem_curvature, noisy_nodes, .*supervised",
        ),
        ({"preset": "md17"}, "there is no preset 'md17'; there are md17_paper"),
        ({"forces": "numeric"}, "forces='numeric'; allowed are gradient, direct, none"),
        ({"scale": "kcal"}, "scale='kcal'; allowed are a number in eV, 'force_rms' and 'target_std'"),
        ({"scale": -1.0}, r"scale=-1\.0 eV; it must be a positive number"),
        ({"weight": -1}, "weight=-1; it must be a number >= 0"),
        ({"weight_schedule": "linear"}, "weight_schedule='linear'; allowed are constant, decay, warmup"),
        ({"loss": "huber"}, "loss='huber'; allowed are mse, l1, smooth_l1"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"seed": "one"}, "seed='one'; it must be a whole number"),
        ({"precision": "32"}, "precision='32'; allowed are 32-true, 64-true"),
        ({"forces": "none", "force_weight": 30.0}, "forces='none' with force_weight=30.0"),
        ({"energy_weight": 0.0, "forces": "none"}, "nothing to learn"),
        ({"device": "gpu"}, "device='gpu'; allowed are 'auto', 'cpu', 'cuda'"),
        ({"device": "meta"}, "device='meta'; allowed are"),
        ({"device": None}, "device=None; allowed are"),
        ({"device": "cuda:99"}, "device='cuda:99', but torch sees .* CUDA devices"),
    ],
)
def test_options_that_are_refused(train_set, tmp_path, options, message):
    """Before anything is built: an earlier fit of the same estimator is not lost."""
    model = estimator(**options)
    with pytest.raises(ConfigError, match=message):
        model.fit(train_set, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_settings_do_not_destroy_an_earlier_fit(train_set):
    model = estimator().fit(train_set)
    before = model.potential_
    for options in ({"lr": -1.0}, {"schedule": "linear"}, {"device": "gpu"}, {"max_steps": 0}):
        with pytest.raises(ConfigError):
            model.set_params(**options).fit(train_set)
        model.set_params(lr=1e-2, schedule=None, device="cpu", max_steps=4)
    assert model.potential_ is before


@pytest.mark.parametrize("form", ["dataset", "atoms"])
def test_grid_search_over_the_weight(train_set, form):
    data = train_set if form == "dataset" else [train_set.atoms(i) for i in range(len(train_set))]
    search = GridSearchCV(estimator(max_steps=2), {"weight": np.array([0.0, 1.0, 100.0])}, cv=2, error_score="raise")
    search.fit(data)
    scores = search.cv_results_["mean_test_score"]
    assert scores.shape == (3,)
    assert len(set(scores)) == 3, "the weight must make a difference"
    assert (scores < 0).all()
    assert search.best_params_["weight"] in (0.0, 1.0, 100.0)
    assert search.best_estimator_.objective_.weight == search.best_params_["weight"]
    assert set(search.predict(data)) == {"energy", "forces"}


@pytest.mark.parametrize("form", ["dataset", "atoms"])
def test_cross_val_score_is_that_of_folds_by_hand(train_set, form):
    data = train_set if form == "dataset" else [train_set.atoms(i) for i in range(len(train_set))]
    scores = cross_val_score(estimator(max_steps=2), data, cv=2, error_score="raise")
    halves = train_set[:5], train_set[5:]  # KFold does not shuffle
    expected = [
        -estimator(max_steps=2).fit(fit_on).evaluate(test_on)["forces_mae"]
        for test_on, fit_on in (halves, halves[::-1])
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.parametrize("through", ["pickle", "joblib"])
def test_pickled_estimators(fitted, test_set, tmp_path, through):
    if through == "pickle":
        copy = pickle.loads(pickle.dumps(fitted))
    else:
        joblib.dump(fitted, tmp_path / "model.joblib")
        copy = joblib.load(tmp_path / "model.joblib")
    assert_same_predictions(copy.predict(test_set), fitted.predict(test_set))
    assert copy.get_params() == fitted.get_params()


def test_score_is_the_negative_force_error(fitted, test_set):
    expected = -np.abs(np.concatenate(fitted.predict(test_set)["forces"]) - test_set.targets["forces"]).mean()
    assert fitted.score(test_set) == pytest.approx(expected, rel=1e-12)
    energies = MolecularDataset(**{**test_set.columns(), "targets": {"energy": test_set.targets["energy"]}})
    expected = -np.abs(fitted.predict(test_set)["energy"] - test_set.targets["energy"]).mean()
    assert fitted.score(energies) == pytest.approx(expected, rel=1e-12)


# -------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_preset_gives_what_was_left_open(preset):
    values = {name: entry.value for name, entry in PRESETS[preset or "md17_paper"].items()}
    resolved = NDeMTorchMDNet(preset=preset)._resolve()
    for name in ("lr", "batch_size", "schedule", "ema_decay", "max_steps", "nb_epoch", "validate_every", "clip_norm"):
        assert resolved["settings"][name] == values[name], name
    assert resolved["supervised"]["force_weight"] == values["force_weight"]
    assert resolved["objective"]["weight"] == values["weight"]
    assert values["backbone"]["torchmd_net"].items() <= resolved["backbone"]["options"].items()
    assert resolved["objective"]["options"] == values["objectives"]["ndem"]


def test_what_is_given_replaces_the_preset():
    model = NDeMTorchMDNet(
        preset="md17_fast",
        lr=0.5,
        force_weight=0.0,
        backbone_options={"num_layers": 1},
        objective_options={"ratio": 0.9},
        ema_decay=0.0,
    )
    resolved = model._resolve()
    assert resolved["settings"]["lr"] == 0.5
    assert resolved["settings"]["ema_decay"] == 0.0
    assert resolved["supervised"]["force_weight"] == 0.0
    assert resolved["backbone"]["options"]["num_layers"] == 1
    assert resolved["backbone"]["options"]["hidden_channels"] == 64, "the rest is still the preset's"
    assert resolved["objective"]["options"] == {"sigma": 0.05, "ratio": 0.9}


@pytest.mark.parametrize(
    ("constructor", "call", "limits"),
    [
        ({}, {}, (3000, None, None)),
        ({"max_steps": 5}, {}, (None, 5, None)),
        ({"nb_epoch": 2}, {}, (2, None, None)),
        ({"nb_epoch": 2, "max_steps": 5}, {}, (2, 5, None)),
        ({"max_steps": 5}, {"nb_epoch": 1}, (1, None, None)),
        ({"max_steps": 5}, {"max_time": 9.0}, (None, None, 9.0)),
        ({}, {"max_steps": 7, "max_time": 9.0}, (None, 7, 9.0)),
    ],
)
def test_limits_given_later_replace_those_given_earlier(train_set, constructor, call, limits):
    seen = []

    def train(*arguments, **options):
        seen.extend(value for value in arguments if isinstance(value, TrainSettings))
        raise KeyboardInterrupt

    model = NDeMTorchMDNet(backbone_options=TINY, device="cpu", **constructor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", train)
        with pytest.raises(KeyboardInterrupt):
            model.fit(train_set, **call)
    assert (seen[0].nb_epoch, seen[0].max_steps, seen[0].max_time) == limits


def test_docstrings_name_every_parameter():
    documented = NDeMTorchMDNet.__mro__[1].__doc__
    for name in inspect.signature(NDeMTorchMDNet).parameters:
        assert name in documented, name


# ------------------------------------------------------------------------------------------------------- forms of input


def test_every_form_of_input_gives_the_same_bits(train_set, dgl):
    forms = {
        "dataset": train_set,
        "atoms": [train_set.atoms(i) for i in range(10)],
        "graphs": [train_set[i] for i in range(10)],
        "batched graph": dgl.batch([train_set[i] for i in range(10)]),
        "object array": np.array(train_set.X),
        "tuple": tuple(train_set.atoms(i) for i in range(10)),
    }
    models = {name: estimator(ema_decay=0.9).fit(data, data) for name, data in forms.items()}
    for model in models.values():
        assert_same_model(model, models["dataset"])
        assert model.reference_ == models["dataset"].reference_


@pytest.mark.deepchem
def test_a_deepchem_dataset_gives_the_same_bits(train_set, test_set, fitted):
    pytest.importorskip("deepchem")
    data = train_set.to_deepchem()
    assert_same_model(estimator().fit(data), fitted)
    assert_same_predictions(fitted.predict(test_set.to_deepchem()), fitted.predict(test_set))


def test_predict_takes_every_form(fitted, test_set, dgl):
    expected = fitted.predict(test_set)
    forms = [
        [test_set.atoms(i) for i in range(4)],
        [test_set[i] for i in range(4)],
        dgl.batch([test_set[i] for i in range(4)]),
    ]
    for data in forms:
        assert_same_predictions(fitted.predict(data), expected)


def test_predict_takes_a_single_structure(fitted, test_set, dgl):
    expected = fitted.predict(test_set)
    for data in (test_set.atoms(2), test_set[2], test_set[2:3]):
        found = fitted.predict(data)
        assert found["energy"].shape == (1,)
        assert found["forces"].shape == (1, 9, 3)
        np.testing.assert_allclose(found["energy"][0], expected["energy"][2], rtol=1e-9)
        np.testing.assert_allclose(found["forces"][0], expected["forces"][2], atol=1e-5)


def test_shapes_and_types_of_predictions(fitted, test_set, mixed):
    found = fitted.predict(test_set)
    assert isinstance(found["forces"], np.ndarray)
    assert found["energy"].shape == (4,)
    assert found["forces"].shape == (4, 9, 3)
    assert found["energy"].dtype == found["forces"].dtype == np.float64
    model = estimator(batch_size=2, eval_batch_size=3).fit(mixed)
    found = model.predict(mixed)
    assert isinstance(found["forces"], list)
    assert [f.shape for f in found["forces"]] == [(3, 3), (2, 3), (3, 3), (1, 3)]
    for i in range(4):  # each structure gets its own, whatever shares the batch with it
        alone = model.predict(mixed[i : i + 1])
        np.testing.assert_allclose(alone["energy"][0], found["energy"][i], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(alone["forces"][0], found["forces"][i], atol=1e-5)


def test_predictions_do_not_depend_on_the_batch_size(train_set):
    model = estimator(precision="64-true").fit(train_set)
    expected = model.predict(train_set)
    for size in (1, 3, 7):
        model.resolved_["settings"]["eval_batch_size"] = size
        found = model.predict(train_set)
        np.testing.assert_allclose(found["energy"], expected["energy"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(found["forces"], expected["forces"], rtol=0, atol=1e-10)


def test_predict_of_nothing(fitted, train_set):
    found = fitted.predict(train_set[:0])
    assert found["energy"].shape == (0,)
    assert len(found["forces"]) == 0
    with pytest.raises(DataError, match="no structures"):
        fitted.predict([])
    with pytest.raises(DataError, match="empty"):
        fitted.evaluate(train_set[:0])


def test_labels_are_not_looked_at(fitted, test_set):
    columns = test_set.columns()
    broken = {"energy": np.full(4, np.nan), "forces": np.full((36, 3), 1e9)}
    blind = MolecularDataset(**{**columns, "targets": {}})
    wrong = MolecularDataset(**{**columns, "targets": broken})
    for data in (blind, wrong):
        assert_same_predictions(fitted.predict(data), fitted.predict(test_set))
    with pytest.raises(DataError, match="none of energy, forces to compare with"):
        fitted.evaluate(blind)
    with pytest.raises(DataError, match="structure 0: energy is nan"):
        fitted.evaluate(MolecularDataset(**{**columns, "targets": {"energy": broken["energy"]}}))


def test_predict_changes_nothing(fitted, test_set):
    before, training = state(fitted), fitted.potential_.training
    before = {name: value.clone() for name, value in before.items()}
    fitted.predict(test_set)
    assert all(torch.equal(value, before[name]) for name, value in state(fitted).items())
    assert fitted.potential_.training == training
    assert all(p.grad is None or not p.grad.abs().sum() for p in fitted.potential_.parameters()) or not training


@pytest.mark.parametrize("kind", ["molecule", "crystal"])
def test_forces_are_the_slope_of_the_energy(train_set, kind):
    model = estimator(precision="64-true").fit(train_set)
    atoms = train_set.atoms(0)
    if kind == "crystal":
        atoms = ase.Atoms("HOC", positions=[[0, 0, 0], [1.1, 0.2, 0], [0.3, 1.2, 0.4]], cell=[3.0, 3.2, 3.4], pbc=True)
    forces = model.predict(atoms)["forces"][0]
    assert np.abs(forces).max() > 1e-2
    step = 1e-4
    for atom, axis in ((0, 0), (1, 2), (2, 1)):
        moved = []
        for sign in (1, -1):
            copy = atoms.copy()
            copy.positions[atom, axis] += sign * step
            moved.append(copy)
        up, down = model.predict(moved)["energy"]
        assert forces[atom, axis] == pytest.approx(-(up - down) / (2 * step), rel=1e-5, abs=1e-7)


def test_metrics_that_are_asked_for(fitted, test_set):
    everything = fitted.evaluate(test_set)
    assert fitted.evaluate(test_set, ["forces_mae_kcal"]) == {"forces_mae_kcal": everything["forces_mae_kcal"]}
    with pytest.raises(ConfigError, match="no metric 'mae' here; there are energy_mae"):
        fitted.evaluate(test_set, ["mae"])


# -------------------------------------------------------------------------------------------------------- force modes


def test_direct_forces(train_set, test_set):
    model = estimator(forces="direct").fit(train_set)
    found = model.predict(test_set)
    assert found["forces"].shape == (4, 9, 3)
    assert model.potential_.force_head is not None
    turned = [test_set.atoms(i) for i in range(4)]
    for atoms in turned:
        atoms.rotate(70, (1, 2, 3))
    rotation = ase.Atoms("HHH", positions=np.eye(3))
    rotation.rotate(70, (1, 2, 3))
    expected = found["forces"] @ rotation.positions
    np.testing.assert_allclose(model.predict(turned)["forces"], expected, atol=1e-4 * np.abs(expected).max())


def test_without_forces(train_set, test_set, tmp_path):
    """forces="none" leaves the force term out unless it was asked for, and needs no force labels."""
    energies = MolecularDataset(**{**train_set.columns(), "targets": {"energy": train_set.targets["energy"]}})
    model = estimator(forces="none").fit(energies, energies)
    assert model.resolved_["supervised"]["force_weight"] == 0.0
    assert set(model.predict(test_set)) == {"energy"}
    assert "train_forces" not in model.history_[0]
    assert "valid_energy_mae" in model.history_[0]
    assert model.score(test_set) == -model.evaluate(test_set)["energy_mae"]
    model.save(tmp_path / "model")
    assert_same_predictions(NDeMTorchMDNet.load(tmp_path / "model").predict(test_set), model.predict(test_set))


def test_forces_alone(train_set):
    forces = MolecularDataset(**{**train_set.columns(), "targets": {"forces": train_set.targets["forces"]}})
    model = estimator(energy_weight=0.0).fit(forces, forces)
    assert set(model.reference_.values()) == {0.0}
    assert "valid_forces_mae" in model.history_[0]
    with pytest.raises(DataError, match="energy is needed"):
        estimator().fit(forces)


# --------------------------------------------------------------------------------------- reference energies and scale


def test_reference_energies_are_fitted_to_the_energies(mixed, train_set):
    columns = {**mixed.columns(), "targets": {"energy": np.array([12.0, 2.0, 12.0, 10.0]), "forces": np.ones((9, 3))}}
    exact = MolecularDataset(**columns)
    model = estimator(batch_size=2).fit(exact)
    assert model.reference_ == {"H": pytest.approx(1.0), "O": pytest.approx(10.0)}
    ethanol = estimator().fit(train_set).reference_
    total = 6 * ethanol["H"] + 2 * ethanol["C"] + ethanol["O"]
    assert total == pytest.approx(train_set.targets["energy"].mean(), rel=1e-12)


@pytest.mark.parametrize("keys", [("H", "C", "O"), (1, 6, 8), ("1", "6", "8")])
def test_given_reference_energies(train_set, test_set, keys):
    values = (-13.587, -1029.0, -2041.8)
    model = estimator(reference_energies=dict(zip(keys, values, strict=True)), lr=0.0).fit(train_set)
    assert model.reference_ == dict(zip(("C", "H", "O"), (values[1], values[0], values[2]), strict=True))
    with torch.no_grad():
        for p in model.potential_.parameters():
            p.zero_()
    found = model.predict(test_set)["energy"]
    np.testing.assert_allclose(found, 6 * values[0] + 2 * values[1] + values[2], rtol=1e-14)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"H": 0.0, "C": 0.0}, "reference_energies lacks O, which the training data contain"),
        ({"H": 0.0, "C": 0.0, "O": np.nan}, "reference_energies lacks O"),
        ({"H": 0.0, "C": 0.0, "O": 0.0, "Xx": 0.0}, "reference_energies has 'Xx', which is no element"),
        ({"H": 0.0, "C": 0.0, "O": 0.0, 101: 0.0}, "reference_energies has .101., which is no element up to Z = 100"),
    ],
)
def test_reference_energies_that_are_refused(train_set, given, message):
    with pytest.raises(ConfigError, match=message):
        estimator(reference_energies=given).fit(train_set)


def test_scale(train_set, mixed):
    forces, energy = train_set.targets["forces"], train_set.targets["energy"]
    expected = {"force_rms": np.sqrt(np.mean(forces**2)), "target_std": np.std(energy), 0.25: 0.25}
    for given, value in expected.items():
        model = estimator(scale=given, max_steps=1).fit(train_set)
        assert float(model.potential_.scale) == pytest.approx(value, rel=1e-9)
    # Reference energies that explain everything leave rounding errors: no unit to measure energies in.
    exact = MolecularDataset(**{**mixed.columns(), "targets": {"energy": np.array([12.1, 2.2, 12.1, 9.9])}})
    model = estimator(scale="target_std", forces="none", batch_size=2, max_steps=1).fit(exact)
    assert float(model.potential_.scale) == 1.0


# --------------------------------------------------------------------------------------------------------- save and load

#: Objectives with heads, buffers, and options that JSON knows in another form.
VARIANTS = {
    "supervised": {"objective": "supervised"},
    "noisy_nodes": {"objective": "noisy_nodes", "objective_options": {"sigma": (0.01, 0.1), "separate_branch": False}},
    "ndem": {"objective": "ndem", "ema_decay": 0.9},
    "boltzmann": {"objective_options": {"target": "boltzmann", "grad_main": 0.5}},
    "kappa": {"objective_options": {"target": "kappa", "kappa": 20.0, "sigma": (0.02, 0.06), "sigma_per": "batch"}},
    "reuse": {"objective_options": {"reuse_main_head": True}},
    "direct": {"forces": "direct"},
    "double": {"precision": "64-true", "reference_energies": {"H": -13.6, 6: -1000.1, "8": -2000.2}},
    "dens": {"objective": "dens", "objective_options": {"head_width": 5}},
    "frad": {"objective": "frad", "objective_options": {"internal": "all"}},
    "slide": {"objective": "slide"},
    "geossl": {"objective": "geossl", "objective_options": {"head_width": 6, "levels": 7}},
    "ndem_curvature": {
        "objective": "ndem_curvature",
        "objective_options": {"curvature": "pairs", "head": "both", "confidence": "closed_form"},
    },
    "prior": {"objective": "supervised", "prior": "mmff94+pairs"},
    "bf16": {"precision": "bf16-mixed"},
    "numpy": {
        "weight": np.float64(0.3),
        "batch_size": np.int64(2),
        "backbone_options": {**TINY, "num_rbf": np.int64(5)},
    },
}


def needs(variant: str) -> list:
    """Marks of a variant whose objective needs an optional module."""
    if variant not in NEEDS:
        return []
    missing = missing_for(variant)
    return [getattr(pytest.mark, NEEDS[variant]), pytest.mark.skipif(missing is not None, reason=f"needs {missing}")]


def test_all_objectives_are_saved():
    assert {options.get("objective", "ndem") for options in VARIANTS.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=needs(name)) for name in VARIANTS])
def test_loaded_is_saved_bit_for_bit(train_set, test_set, tmp_path, variant):
    model = estimator(**VARIANTS[variant]).fit(train_set, test_set)
    model.save(tmp_path / "model")
    loaded = NDeMTorchMDNet.load(tmp_path / "model")
    assert type(loaded) is NDeMTorchMDNet
    assert_same_model(loaded, model)
    assert_same_predictions(loaded.predict(test_set), model.predict(test_set))
    assert loaded.history_ == model.history_
    assert loaded.reference_ == model.reference_
    assert loaded.training_data_ == model.training_data_
    assert not loaded.potential_.training
    # ... and it can go on from there as the original can
    for each in (model, loaded):
        each.partial_fit(train_set, max_steps=2)
    assert_same_model(loaded, model)


def test_saved_again_is_the_same_file(fitted, tmp_path):
    fitted.save(tmp_path / "one")
    NDeMTorchMDNet.load(tmp_path / "one").save(tmp_path / "two")
    for name in ("config.json", "weights.safetensors", "card.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_get_params_survive(tmp_path, train_set):
    options = {"objective_options": {"sigma": 0.1}, "weight": 2.0, "seed": 3, "clip_norm": 1.0, "preset": "md17_fast"}
    model = estimator(**options).fit(train_set)
    model.save(tmp_path / "model")
    assert NDeMTorchMDNet.load(tmp_path / "model").get_params() == model.get_params()
    assert NDeMTorchMDNet.load(tmp_path / "model", device="auto").get_params()["device"] == "auto"


def test_a_model_can_be_saved_after_its_training_was_aborted(train_set, tmp_path):
    def abort(row):
        raise KeyboardInterrupt

    model = estimator()
    with pytest.raises(KeyboardInterrupt):
        model.fit(train_set, callback=abort)
    model.save(tmp_path / "model")
    assert_same_predictions(NDeMTorchMDNet.load(tmp_path / "model").predict(train_set), model.predict(train_set))


class Trap:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_loading_executes_nothing(fitted, test_set, tmp_path, monkeypatch):
    fitted.save(tmp_path / "model")
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in (
        "weights.pt",
        "model.pkl",
        "pytorch_model.bin",
        "checkpoint.ckpt",
        "__init__.py",
        "weights.safetensors.index",
    ):
        (tmp_path / "model" / name).write_bytes(trap)

    def forbidden(*arguments, **options):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, forbidden)
    loaded = NDeMTorchMDNet.load(tmp_path / "model")
    assert_same_predictions(loaded.predict(test_set), fitted.predict(test_set))
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "model" / "weights.safetensors").write_bytes(trap)
    with pytest.raises(FileFormatError):
        NDeMTorchMDNet.load(tmp_path / "model")
    assert not (tmp_path / "sprung").exists()


def edit(path: Path, change) -> None:
    config = json.loads(path.read_text())
    del config["checksum"]  # as who changes it by hand has to
    config = change(config) or config
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=3), "has format 3; this version reads up to 2"),
        (lambda c: c.update(format="new"), "does not describe a model"),
        (lambda c: c.update(model="os:system"), "there is no model 'os:system'"),
        (lambda c: c.update(model="NoSuchNet"), "there is no model 'NoSuchNet'"),
        (lambda c: c.pop("resolved") and None, "does not describe a model.*resolved"),
        (lambda c: c["params"].update(shell="rm"), "does not describe a model.*shell"),
        (lambda c: c["resolved"]["backbone"].update(name="os:system"), "there is no backbone 'os:system'"),
        (lambda c: c["resolved"]["backbone"]["options"].update(num_layers=2), "do not fit the saved configuration"),
        (lambda c: [1, 2], "it holds a list, needed is an object"),
    ],
)
def test_configurations_that_are_refused(fitted, tmp_path, change, message):
    fitted.save(tmp_path / "model")
    edit(tmp_path / "model" / "config.json", change)
    with pytest.raises(FileFormatError, match=message):
        NDeMTorchMDNet.load(tmp_path / "model")


def test_the_class_must_fit(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    with pytest.raises(FileFormatError, match="holds a NDeMTorchMDNet, not a OnArrays"):
        OnArrays.load(tmp_path / "model")
    assert type(module.NDeMModel.load(tmp_path / "model")) is NDeMTorchMDNet


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "history.csv"])
def test_missing_and_truncated_files(fitted, tmp_path, name):
    fitted.save(tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FileFormatError, match=f"{name} is damaged"):
        NDeMTorchMDNet.load(tmp_path / "model")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        NDeMTorchMDNet.load(tmp_path / "model")


def test_saving_never_deletes_what_is_not_a_model(fitted, tmp_path):
    folder = tmp_path / "model"
    fitted.save(folder)
    fitted.save(folder)  # a model is replaced
    for name in ("thesis.tex", "step-0000000010"):
        (folder / name).mkdir()
        with pytest.raises(
            FileExistsError, match=f"holds something else than a model \\({name}\\); nothing was written"
        ):
            fitted.save(folder)
        (folder / name).rmdir()
    other = tmp_path / "project"
    other.mkdir()
    fitted.save(other)  # empty
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "config.json").write_text("{}")
    (tmp_path / "web" / "index.js").write_text("precious")
    for path in (tmp_path / "web", tmp_path / "web" / "index.js"):
        with pytest.raises(FileExistsError):
            fitted.save(path)
    assert (tmp_path / "web" / "index.js").read_text() == "precious"


def test_the_card_says_what_the_model_is(fitted, tmp_path, train_set):
    fitted.save(tmp_path / "model")
    card = (tmp_path / "model" / "card.md").read_text()
    assert f"{fitted.potential_.n_parameters:,} parameters" in card
    assert train_set.split_hash in card
    assert "H (60 atoms), C (20 atoms), O (10 atoms)" in card
    assert "10 structures" in card


def test_the_card_names_the_errors_of_the_weights_that_it_describes(train_set, test_set, tmp_path):
    """After partial_fit an earlier training may have had a better moment, but its weights are gone."""
    model = estimator(validate_every=1).fit(train_set, test_set, max_steps=4)
    model.set_params(lr=0.5).partial_fit(train_set, test_set, max_steps=3)
    losses = [row["valid_loss"] for row in model.history_]
    assert min(losses[:4]) < min(losses[4:])
    model.save(tmp_path / "model")
    card = (tmp_path / "model" / "card.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| force MAE, per component (eV/Å)")]
    assert float(row.split("|")[2]) == pytest.approx(model.evaluate(test_set)["forces_mae"], rel=1e-4)


def test_models_built_in_threads_at_once_are_those_built_alone(train_set):
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda seed: estimator(seed=seed, max_steps=1).fit(train_set), [0, 1, 0, 1]))
    for seed, model in zip([0, 1, 0, 1], models, strict=True):
        assert_same_model(model, estimator(seed=seed, max_steps=1).fit(train_set))


# ------------------------------------------------------------------------------------- starting points and continuing


@pytest.mark.parametrize("form", ["model", "path", "string"])
def test_init_from(train_set, test_set, fitted, tmp_path, form):
    fitted.save(tmp_path / "model")
    source = {"model": fitted, "path": tmp_path / "model", "string": str(tmp_path / "model")}[form]
    model = estimator(lr=0.0, weight_decay=0.0).fit(train_set, init_from=source, max_steps=1)
    assert_same_predictions(model.predict(test_set), fitted.predict(test_set))
    other = estimator(lr=0.0, seed=9, objective="supervised").fit(train_set, init_from=source, max_steps=1)
    assert_same_predictions(other.predict(test_set), fitted.predict(test_set))


def test_init_from_gives_the_same_forces_whatever_the_new_data(train_set, test_set, fitted):
    """Data with twice the forces would have twice the scale: fine-tuning must not begin with doubled predictions."""
    columns = train_set.columns() | {"targets": {name: 2.0 * value for name, value in train_set.targets.items()}}
    doubled = type(train_set)(**columns)
    model = estimator(lr=0.0, weight_decay=0.0).fit(doubled, init_from=fitted, max_steps=1)
    np.testing.assert_array_equal(model.predict(test_set)["forces"], fitted.predict(test_set)["forces"])
    asked = estimator(lr=0.0, scale=7.0).fit(doubled, init_from=fitted, max_steps=1)
    assert float(asked.potential_.scale) == 7.0


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"hidden_channels": 16}])
def test_init_from_another_architecture(train_set, fitted, options):
    with pytest.raises(ConfigError, match="init_from has another architecture"):
        estimator(backbone_options={**TINY, **options}).fit(train_set, init_from=fitted)


def test_fit_starts_anew_and_partial_fit_goes_on(train_set, fitted):
    model = estimator().fit(train_set).fit(train_set)
    assert_same_model(model, fitted)
    assert [row["step"] for row in model.history_] == [row["step"] for row in fitted.history_]
    model.partial_fit(train_set, max_steps=3)
    assert len(model.history_) == len(fitted.history_) + 1
    assert not torch.equal(
        model.potential_.energy_head.output_network[0].vec1_proj.weight,
        fitted.potential_.energy_head.output_network[0].vec1_proj.weight,
    )
    frozen = estimator().fit(train_set).set_params(lr=0.0).partial_fit(train_set, max_steps=3)
    assert_same_model(frozen, fitted)


def test_partial_fit_begins_where_there_is_nothing(train_set, fitted):
    assert_same_model(estimator().partial_fit(train_set), fitted)


def test_partial_fit_keeps_scale_and_reference(train_set, ethanol, fitted):
    other = ethanol[100:104]
    model = estimator().fit(train_set).partial_fit(other, max_steps=1)
    assert torch.equal(model.potential_.scale, fitted.potential_.scale)
    assert torch.equal(model.potential_.reference, fitted.potential_.reference)
    assert model.training_data_["n_train"] == 4


def test_partial_fit_takes_over_changed_settings(train_set, fitted):
    model = estimator().fit(train_set).set_params(weight=0.125, lr=0.0)
    model.partial_fit(train_set, max_steps=1)
    assert model.objective_.weight == 0.125
    assert_same_model(model, fitted)  # another weight keeps the noisy-force head
    model.set_params(objective="noisy_nodes").partial_fit(train_set, max_steps=1)
    assert type(model.objective_).__name__ == "NoisyNodes"
    with pytest.raises(ConfigError, match="call fit"):
        model.set_params(backbone_options={**TINY, "num_layers": 2}).partial_fit(train_set, max_steps=1)


def test_no_model_meets_an_element_that_it_has_not_seen(train_set, fitted, mixed):
    chlorine = ase.Atoms("HCl", positions=[[0, 0, 0], [0, 0, 1.3]])
    for call in (fitted.predict, fitted.evaluate):
        with pytest.raises(DataError, match=r"structure 0: atom 1 is Cl, .*it knows H, C, O"):
            call(chlorine)
    columns = mixed.columns()
    z = columns["z"].copy()
    z[4] = 17
    foreign = MolecularDataset(**{**columns, "z": z})
    with pytest.raises(DataError, match="training set, structure 1: atom 1 is Cl"):
        estimator().fit(train_set).partial_fit(foreign)
    with pytest.raises(DataError, match="validation set, structure 1: atom 1 is Cl"):
        estimator().fit(mixed, foreign)


# ------------------------------------------------------------------------------------------------------------ bad input


def broken(train_set, **changes) -> MolecularDataset:
    columns = {name: value for name, value in train_set.columns().items() if name not in ("extras",)}
    return MolecularDataset(**{**columns, **changes})


def changed(array: np.ndarray, index, value) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def bad_inputs(data) -> dict[str, tuple[MolecularDataset, str]]:
    """Data that must not be trained on, and what the error says: structure 4 is the one with the fault."""
    pos, targets, z = data.pos, data.targets, data.z
    rows = 9 * 4
    return {
        "nan position": (
            broken(data, pos=changed(pos, (rows + 2, 1), np.nan)),
            "structure 4: position of atom 2 .*nan",
        ),
        "inf position": (broken(data, pos=changed(pos, (rows, 0), np.inf)), "structure 4: position of atom 0 .*inf"),
        "no atoms": (broken(data, ptr=np.r_[data.ptr[:4], data.ptr[5], data.ptr[5:]]), "structure 4: it has no atoms"),
        "overlap": (broken(data, pos=changed(pos, rows + 1, pos[rows] + 0.01)), r"structure 4: .*0\.1 Å"),
        "unknown element": (
            broken(data, z=changed(z, rows + 3, 101)),
            "structure 4: atom 3 has atomic number 101; .* 100",
        ),
        "dummy atom": (broken(data, z=changed(z, rows, 0)), "structure 4: atom 0 has atomic number 0"),
        "no forces": (broken(data, targets={"energy": targets["energy"]}), "forces is needed"),
        "no labels": (broken(data, targets={}), "energy is needed.*no labels"),
        "nan energy": (
            broken(data, targets={**targets, "energy": changed(targets["energy"], 4, np.nan)}),
            "structure 4: energy is nan",
        ),
        "nan force": (
            broken(data, targets={**targets, "forces": changed(targets["forces"], (rows + 5, 2), np.nan)}),
            "structure 4: forces of atom 5 is .*nan",
        ),
        "wrong unit": (broken(data, targets={**targets, "forces": targets["forces"] * 1e4}), r"mean \|F\| is .*eV/Å"),
        "empty": (data[:0], "empty: it must hold at least one structure"),
    }


CASES = """nan position,inf position,no atoms,overlap,unknown element,dummy atom,no forces,no labels,nan energy,nan force,
wrong unit,empty""".replace("\n", "").split(",")


@pytest.mark.parametrize("role", ["training", "validation"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_anything_is_written(train_set, tmp_path, case, role):
    bad, message = bad_inputs(train_set)[case]
    data = (bad, train_set) if role == "training" else (train_set, bad)
    model = estimator().fit(train_set)
    before = model.potential_
    with pytest.raises(DataError, match=f"{role} set, .*{message}"):
        model.fit(*data, checkpoint_dir=tmp_path / "run", checkpoint_every=1)
    assert not list(tmp_path.iterdir())
    assert model.potential_ is before, "an earlier fit is not lost"


def test_every_case_is_tested(train_set):
    assert set(CASES) == set(bad_inputs(train_set))


def test_lists_name_the_structure_too(train_set, tmp_path):
    frames = [train_set.atoms(i) for i in range(6)]
    frames[3].positions[2, 0] = np.nan
    with pytest.raises(DataError, match="training set, structure 3"):
        estimator().fit(frames, checkpoint_dir=tmp_path / "run")
    frames[3] = ase.Atoms()
    with pytest.raises(DataError, match="validation set, structure 3"):
        estimator().fit(train_set, frames, checkpoint_dir=tmp_path / "run")
    unlabeled = [train_set.atoms(i) for i in range(6)]
    unlabeled[5].calc = None
    with pytest.raises(DataError, match="training set, structure 5 has no energy"):
        estimator().fit(unlabeled, checkpoint_dir=tmp_path / "run")
    for empty in ([], np.array([], dtype=object)):
        with pytest.raises(DataError, match="validation set, there are no structures"):
            estimator().fit(train_set, empty, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_things_are_refused(train_set):
    for thing in ("file.xyz", 3, {"a": 1}, [train_set.atoms(0), "x"], np.zeros((3, 3))):
        with pytest.raises(TypeError, match="allowed are"):
            estimator().fit(thing)


def test_suspicious_units_are_a_warning_that_names_kcal(train_set):
    forces = train_set.targets["forces"]
    factor = 20.0 / np.linalg.norm(forces, axis=1).mean()
    kcal = broken(train_set, targets={**train_set.targets, "forces": forces * factor})
    with pytest.warns(UnitsWarning, match="kcal/mol"):
        estimator(max_steps=1).fit(kcal)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnitsWarning)
        estimator(max_steps=1).fit(train_set)


def test_a_label_of_the_objective_is_required_too(train_set):
    """The force label as target: needed even where no force term is trained."""
    energies = broken(train_set, targets={"energy": train_set.targets["energy"]})
    options = {"objective_options": {"grad_main": "label"}, "force_weight": 0.0}
    with pytest.raises(DataError, match="training set, forces is needed"):
        estimator(**options).fit(energies)
    assert NDeMOptions().grad_main == "stop"
    estimator(force_weight=0.0).fit(energies)


def test_a_model_from_before_there_were_targets(fitted, test_set, tmp_path):
    """Format 1 had energies only, and no shift."""
    fitted.save(tmp_path / "model")

    def older(config: dict) -> None:
        config["format"] = 1
        del config["sha256"]
        del config["resolved"]["supervised"]["target"], config["resolved"]["reference_energies"]
        del config["params"]["target"], config["params"]["warmup_factor"]

    edit(tmp_path / "model" / "config.json", older)
    weights = tmp_path / "model" / "weights.safetensors"
    tensors = files.load_tensors(weights)
    assert float(tensors.pop("potential.shift")) == 0.0
    files.save_tensors(weights, tensors)
    loaded = NDeMTorchMDNet.load(tmp_path / "model")
    assert_same_predictions(loaded.predict(test_set), fitted.predict(test_set))


def test_unknown_elements_on_request(fitted, train_set, tmp_path):
    strange = MolecularDataset(**{**train_set[:2].columns(), "z": np.where(train_set[:2].z == 8, 16, train_set[:2].z)})
    with pytest.raises(DataError, match=r"structure 0: atom \d is S, which the model has not been trained on"):
        fitted.predict(strange)
    lenient = estimator(unknown_elements="warn").fit(train_set)
    with pytest.warns(DataWarning, match="is S, which the model has not been trained on; it knows H, C, O"):
        energy = lenient.predict(strange)["energy"]
    assert np.isfinite(energy).all()
    beyond = MolecularDataset(**{**strange.columns(), "z": np.where(strange.z == 16, 100, strange.z)})
    with (
        pytest.raises(DataError, match="atomic number 100; this backbone knows those below 100"),
        pytest.warns(DataWarning),
    ):
        lenient.predict(beyond)
    with pytest.raises(ConfigError, match="unknown_elements='ignore'; allowed are 'error' and 'warn'"):
        estimator(unknown_elements="ignore").fit(train_set)


def test_elements_are_found_block_by_block(monkeypatch):
    z = np.random.default_rng(0).integers(1, 119, 100).astype(np.uint8)
    monkeypatch.setattr("ndem_zoo.models.estimator.ATOMS_AT_ONCE", 7)
    for part in (z, z[:14], z[:1], z[:0]):
        assert elements_of(part).tolist() == np.unique(part).tolist()
