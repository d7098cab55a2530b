"""scikit-learn's tools around the estimators, on genuine data: pipelines, searches, cross-validation, parallel workers.

What scikit-learn's checks ask of the estimator alone is in test_estimator.py.
"""

from __future__ import annotations

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    RandomizedSearchCV,
    ShuffleSplit,
    cross_val_score,
    cross_validate,
    learning_curve,
)
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from ndem_zoo import NDeMTorchMDNet, RadiusGraph, load_md17, load_qm9
from ndem_zoo.errors import ConfigError

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}

pytestmark = pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")  # the shared files are subsets


def estimator(**options) -> NDeMTorchMDNet:
    defaults = {"backbone_options": TINY, "batch_size": 4, "max_steps": 6, "warmup_steps": 0}
    defaults |= {"lr": 1e-2, "min_lr": 0.0, "device": "cpu", "progress": False}
    return NDeMTorchMDNet(**{**defaults, **options})


@pytest.fixture(scope="module")
def frames(shared_data):
    """24 frames of MD17 ethanol."""
    _, (train, _, _), _ = load_md17("ethanol", n_train=24, n_valid=0, n_test=0, data_dir=shared_data / "md17")
    return train


@pytest.fixture(scope="module")
def molecules(shared_data):
    """60 molecules of QM9 with their gaps in eV, of four elements."""
    options = {"data_dir": shared_data / "mini", "uncharacterized": "keep", "n_train": 500, "n_valid": 0}
    _, (train, _, _), _ = load_qm9("gap", **options)
    rows = [i for i in range(len(train)) if set(train.z[train.ptr[i] : train.ptr[i + 1]]) <= {1, 6, 8}]
    return train[rows[:60]]


def graphs_of(atoms) -> np.ndarray:
    return RadiusGraph(5.0).featurize(atoms)


def pipeline(**options) -> Pipeline:
    return Pipeline([("graphs", FunctionTransformer(graphs_of)), ("model", estimator(**options))])


def force_errors(model, test_set, y=None) -> dict[str, float]:
    """Scores for `cross_validate`: both errors, negative."""
    found = model.evaluate(test_set, metrics=["energy_mae", "forces_mae"])
    return {name: -value for name, value in found.items()}


# --------------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.dgl
def test_a_pipeline_from_atoms_is_the_estimator_on_the_dataset(frames, dgl):
    atoms = [frames.atoms(i) for i in range(len(frames))]
    fitted = pipeline().fit(atoms[:16])
    plain = estimator().fit(frames[:16])
    found, expected = fitted.predict(atoms[16:]), plain.predict(frames[16:])
    np.testing.assert_array_equal(found["energy"], expected["energy"])
    np.testing.assert_array_equal(found["forces"], expected["forces"])
    assert fitted.score(atoms[16:]) == plain.score(frames[16:]) < 0


@pytest.mark.dgl
def test_a_pipeline_is_cloned_and_searched(frames, dgl):
    atoms = [frames.atoms(i) for i in range(24)]
    options = {"objective": "supervised", "max_steps": 30}
    rates = {"model__lr": [1e-9, 1e-2]}
    search = GridSearchCV(pipeline(**options), rates, cv=KFold(2), error_score="raise").fit(atoms)
    assert search.best_params_ == {"model__lr": 1e-2}
    expected = [
        estimator(**options).fit(frames[a]).score(frames[b])
        for a, b in ((range(12, 24), range(12)), (range(12), range(12, 24)))
    ]
    scores = [search.cv_results_[f"split{k}_test_score"][1] for k in range(2)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    copy = clone(search.best_estimator_)
    assert copy.get_params()["model__lr"] == 1e-2
    assert not hasattr(copy["model"], "potential_")
    assert search.best_estimator_["model"].potential_ is not None
    with pytest.raises(ValueError, match="lrr"):
        copy.set_params(model__lrr=1.0)


@pytest.mark.dgl
def test_a_cached_pipeline_featurizes_once(frames, dgl, tmp_path):
    atoms = [frames.atoms(i) for i in range(8)]
    log = tmp_path / "calls.txt"
    steps = [("graphs", FunctionTransformer(_logged, kw_args={"log": str(log)})), ("model", estimator())]
    cached = Pipeline(steps, memory=str(tmp_path / "cache"))
    first = cached.fit(atoms).predict(atoms)["energy"]
    again = clone(cached).set_params(model__seed=1).fit(atoms)
    assert log.read_text() == "fit 8\n" * 2, "one featurization for both fits, one for predict"
    assert not np.array_equal(again.predict(atoms)["energy"], first)


def _logged(atoms, log: str) -> np.ndarray:
    with open(log, "a") as file:
        file.write(f"fit {len(atoms)}\n")
    return graphs_of(atoms)


# ----------------------------------------------------------------------------------------------- searches and validation


def test_a_search_over_objectives_and_networks(frames):
    """Options of the network as a whole, objectives, and several metrics; refitted on the one that matters."""
    wide = TINY | {"hidden_channels": 16}
    grid = {"objective": ["supervised", "ndem", "noisy_nodes"], "backbone_options": [TINY, wide]}
    search = GridSearchCV(
        estimator(max_steps=3), grid, cv=2, scoring=force_errors, refit="forces_mae", error_score="raise"
    ).fit(frames[:8])
    forces, energies = (search.cv_results_[f"mean_test_{name}_mae"] for name in ("forces", "energy"))
    assert forces.shape == energies.shape == (6,)
    assert len(set(forces)) == 6, "every choice makes a difference"
    assert search.best_index_ == forces.argmax()
    best = search.best_estimator_
    assert best.resolved_["objective"]["name"] == search.best_params_["objective"]
    channels = best.resolved_["backbone"]["options"]["hidden_channels"]
    assert channels == search.best_params_["backbone_options"]["hidden_channels"]


def test_a_parameter_that_cannot_be_is_an_error(frames):
    search = GridSearchCV(estimator(), {"loss": ["huber"]}, cv=2, error_score="raise")
    with pytest.raises(ConfigError, match="huber"):
        search.fit(frames[:8])


def test_random_search_draws_numbers_of_numpy(frames, tmp_path):
    options = {"lr": np.logspace(-4, -2, 5), "batch_size": np.arange(2, 5), "weight": np.array([0.1, 1.0])}
    search = RandomizedSearchCV(estimator(max_steps=2), options, n_iter=3, cv=2, random_state=0, error_score="raise")
    search.fit(frames[:8])
    best = search.best_estimator_
    best.save(tmp_path / "model")  # as JSON, which knows no numbers of numpy
    loaded = NDeMTorchMDNet.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(frames)["energy"], best.predict(frames)["energy"])
    assert loaded.lr == search.best_params_["lr"]


def test_cross_validation_with_several_metrics(frames):
    folds = ShuffleSplit(2, test_size=0.25, random_state=3)
    found = cross_validate(estimator(), frames, cv=folds, scoring=force_errors, return_estimator=True)
    for k, (_, rows) in enumerate(folds.split(np.zeros(len(frames)))):
        predicted = found["estimator"][k].predict(frames[rows])
        error = np.concatenate(predicted["forces"]) - frames[rows].targets["forces"]
        assert found["test_forces_mae"][k] == pytest.approx(-np.abs(error).mean(), rel=1e-9)
        error = predicted["energy"] - frames[rows].targets["energy"]
        assert found["test_energy_mae"][k] == pytest.approx(-np.abs(error).mean(), rel=1e-9)
    assert found["estimator"][0] is not found["estimator"][1]


def test_a_property_of_qm9_is_cross_validated(molecules):
    """Better than the mean of the training labels, which it starts from, in every fold."""
    model = estimator(target="gap", objective="supervised", max_steps=200, batch_size=8, unknown_elements="warn")
    folds = KFold(2, shuffle=True, random_state=0)
    scores = cross_val_score(model, molecules, cv=folds, error_score="raise")
    gap = molecules.targets["gap"]
    for score, (train, test) in zip(scores, folds.split(gap), strict=True):
        baseline = np.abs(gap[test] - gap[train].mean()).mean()
        assert -score < 0.9 * baseline


def test_learning_curve(frames):
    sizes, train_scores, test_scores = learning_curve(
        estimator(max_steps=40), frames, None, cv=KFold(3), train_sizes=[2, 16], error_score="raise"
    )
    assert sizes.tolist() == [2, 16]
    gap = (train_scores - test_scores).mean(axis=1)
    assert gap[0] > gap[1], "two frames are learned by heart"
    rows = np.arange(8, 10)
    assert test_scores[0, 0] == pytest.approx(estimator(max_steps=40).fit(frames[rows]).score(frames[:8]), rel=1e-6)


# ----------------------------------------------------------------------------------------------------- clones and workers


def test_a_clone_shares_nothing(frames):
    options = {"ratio": 0.5}
    model = estimator(objective_options=options, backbone_options=dict(TINY)).fit(frames[:8])
    before = model.predict(frames[8:12])["energy"]
    copy = clone(model)
    copy.objective_options["ratio"] = 1.0
    copy.backbone_options["hidden_channels"] = 16
    copy.fit(frames[12:20])
    assert model.objective_options == {"ratio": 0.5}
    assert model.backbone_options == TINY
    np.testing.assert_array_equal(model.predict(frames[8:12])["energy"], before)


@pytest.mark.slow
def test_parallel_workers_give_the_serial_scores(frames):
    """Estimators and data go to other processes, and fitted estimators come back."""
    grid = {"weight": [0.1, 10.0]}
    options = {"cv": 2, "error_score": "raise"}
    serial = GridSearchCV(estimator(max_steps=3), grid, **options).fit(frames[:8])
    with joblib.parallel_backend("loky", n_jobs=2):
        parallel = GridSearchCV(estimator(max_steps=3), grid, n_jobs=2, **options).fit(frames[:8])
        found = cross_validate(
            estimator(max_steps=3, weight=10.0), frames[:8], cv=2, n_jobs=2, return_estimator=True, error_score="raise"
        )
    for name in ("split0_test_score", "split1_test_score"):
        np.testing.assert_allclose(parallel.cv_results_[name], serial.cv_results_[name], rtol=1e-6)
    assert parallel.best_params_ == serial.best_params_
    fitted = estimator(max_steps=3, weight=10.0).fit(frames[4:8])
    np.testing.assert_allclose(
        found["estimator"][0].predict(frames)["energy"], fitted.predict(frames)["energy"], rtol=1e-6
    )


def test_compressed_files_of_joblib(frames, tmp_path):
    fitted = pipeline().set_params(graphs=None).fit(frames[:8])
    joblib.dump(fitted, tmp_path / "pipeline.joblib", compress=3)
    copy = joblib.load(tmp_path / "pipeline.joblib")
    np.testing.assert_array_equal(copy.predict(frames)["forces"], fitted.predict(frames)["forces"])
    copy["model"].partial_fit(frames[:8], max_steps=1)
    assert not np.array_equal(copy.predict(frames)["energy"], fitted.predict(frames)["energy"])
