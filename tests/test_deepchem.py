"""DeepChem's classes around ours: its manners, its tools, its three bugs, and the same numbers as without it."""

from __future__ import annotations

import gc
import io
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ndem_zoo import NDeMEquiformerV2, NDeMPaiNN, NDeMTorchMDNet, RadiusGraph
from ndem_zoo import load_md17 as our_load_md17
from ndem_zoo import load_qm9 as our_load_qm9
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError, DataWarning, TrainingError

pytestmark = [pytest.mark.deepchem, pytest.mark.dgl]

TINY = {
    "torchmd_net": {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4},
    "equiformer_v2": {"preset": "tiny", "num_layers": 1, "num_distance_basis": 16},
    "painn": {"n_atom_basis": 8, "n_interactions": 1, "n_rbf": 8},
}
ESTIMATORS = {"torchmd_net": NDeMTorchMDNet, "equiformer_v2": NDeMEquiformerV2, "painn": NDeMPaiNN}
each_backbone = pytest.mark.parametrize(
    "backbone", [pytest.param(name, marks=[pytest.mark.schnetpack] * (name == "painn")) for name in TINY]
)
OPTIONS = {"batch_size": 3, "warmup_steps": 0, "lr": 1e-2, "min_lr": 0.0, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def dc():
    return pytest.importorskip("deepchem")


@pytest.fixture(scope="module")
def zoo(dc):
    import ndem_zoo.deepchem

    return ndem_zoo.deepchem


@pytest.fixture(scope="module")
def make(zoo):
    """Makes small models."""

    def build(backbone: str = "torchmd_net", **options):
        if backbone == "painn":
            pytest.importorskip("schnetpack")
        models = {
            "torchmd_net": zoo.TorchMDNetModel,
            "equiformer_v2": zoo.EquiformerV2Model,
            "painn": zoo.PaiNNModel,
        }
        return models[backbone](**{**OPTIONS, "backbone_options": TINY[backbone], **options})

    return build


@pytest.fixture(scope="module")
def train_set(ethanol):
    return ethanol[:12]


@pytest.fixture(scope="module")
def train(train_set):
    pytest.importorskip("deepchem")
    return train_set.to_deepchem()


@pytest.fixture(scope="module")
def test_set(ethanol):
    return ethanol[500:506]


@pytest.fixture(scope="module")
def test(test_set):
    pytest.importorskip("deepchem")
    return test_set.to_deepchem()


def forces_of(model, data) -> np.ndarray:
    return np.concatenate(model.predict_forces(data))


def assert_same(a, b, data) -> None:
    """Two models predict the same bits."""
    np.testing.assert_array_equal(a.predict(data), b.predict(data))
    np.testing.assert_array_equal(forces_of(a, data), forces_of(b, data))


# ------------------------------------------------------------------------------------------------------------- its manners


@each_backbone
def test_a_model_trains_and_predicts_as_its_estimator_does(dc, make, train, train_set, test, test_set, backbone):
    model = make(backbone)
    assert isinstance(model, dc.models.Model)
    assert not isinstance(model, dc.models.torch_models.TorchModel)
    loss = model.fit(train, nb_epoch=2)
    plain = ESTIMATORS[backbone](**OPTIONS, backbone_options=TINY[backbone]).fit(train_set, nb_epoch=2)
    assert type(loss) is float
    assert loss == plain.history_[-1]["train_loss"]
    expected = plain.predict(test_set)
    predicted = model.predict(test)
    assert predicted.shape == (6, 1)
    np.testing.assert_array_equal(predicted[:, 0], expected["energy"])
    np.testing.assert_array_equal(forces_of(model, test), np.concatenate(expected["forces"]))
    np.testing.assert_allclose(model.predict_on_batch(test.X[2:4]), predicted[2:4], rtol=1e-9)
    assert (model.get_task_type(), model.get_num_tasks()) == ("regression", 1)


def test_a_prior_is_learned_beyond(dc, zoo, make, train, train_set, test, test_set, tmp_path):
    """The same numbers as the estimator's own, after the training and in its callbacks; and a checkpoint holds the prior."""
    options = {"prior": "valence", "objective": "supervised", "scale": "force_rms"}
    model = make(model_dir=str(tmp_path), **options)
    seen = []
    model.fit(train, nb_epoch=1, callbacks=lambda m, step: seen.append(m.predict(test)))
    alone = NDeMTorchMDNet(backbone_options=TINY["torchmd_net"], **OPTIONS, **options).fit(train_set, nb_epoch=1)
    np.testing.assert_allclose(model.predict(test)[:, 0], alone.predict(test_set)["energy"], atol=1e-9)
    np.testing.assert_allclose(seen[-1], model.predict(test), atol=1e-9)
    model.save_checkpoint()
    again = make(model_dir=str(tmp_path), **options)
    again.restore()
    np.testing.assert_array_equal(again.predict(test), model.predict(test))
    with pytest.raises(ConfigError, match="has prior='valence', this model has None"):
        make(model_dir=str(tmp_path), **{**options, "prior": None}).restore()


def test_a_few_frames_are_learned_by_heart(make, ethanol):
    """DeepChem asks every model for such a test."""
    few = ethanol[:3].to_deepchem()
    network = {"hidden_channels": 32, "num_layers": 1, "num_heads": 4, "num_rbf": 16}
    model = make(objective="supervised", backbone_options=network, lr=5e-3)
    model.fit(few, nb_epoch=1)
    before = model.evaluate(few)
    model.fit(few, nb_epoch=300, checkpoint_interval=0)
    after = model.evaluate(few)
    assert after["mae_forces"] < 0.1 * before["mae_forces"]
    assert after["mae_energy"] < 0.1 * before["mae_energy"]


def test_fit_continues(make, train, test):
    twice, once = make(), make()
    losses: list[float] = []
    twice.fit(train, nb_epoch=2, all_losses=losses)
    assert twice.get_global_step() == 8
    last = twice.fit(train, nb_epoch=3, all_losses=losses)
    assert twice.get_global_step() == 20
    assert once.fit(train, nb_epoch=5) == last == losses[-1]
    assert losses == [row["train_loss"] for row in once.model.history_]
    assert twice.model.history_[-1]["step"] == 20
    assert len(twice.model.history_) == 5
    assert_same(twice, once, test)
    assert make().fit(train, nb_epoch=2) != last


def test_other_data_go_on_from_the_weights(make, train, train_set, test, ethanol):
    model = make()
    model.fit(train, nb_epoch=2)
    plain = NDeMTorchMDNet(**OPTIONS, backbone_options=TINY["torchmd_net"]).fit(train_set, nb_epoch=2)
    other = ethanol[100:106]
    model.fit(other.to_deepchem(), nb_epoch=1)
    plain.partial_fit(other, nb_epoch=1)
    np.testing.assert_array_equal(model.predict(test)[:, 0], plain.predict(ethanol[500:506])["energy"])
    assert model.get_global_step() == 8 + 2
    assert [row["step"] for row in model.model.history_] == [4, 8, 2]
    assert len(list(Path(model.model_dir).glob("training-*"))) == 1, "what cannot be continued is cleared away"
    model.fit(other.to_deepchem(), nb_epoch=1)
    assert [row["step"] for row in model.model.history_] == [4, 8, 2, 4]


@pytest.mark.parametrize("form", ["model", "estimator", "folder"])
def test_beginning_with_another_models_weights(make, train, train_set, test, test_set, tmp_path, form):
    source = make(objective="supervised")
    source.fit(train, nb_epoch=2)
    source.model.save(tmp_path / "saved")
    model = make()
    model.load_from_pretrained({"model": source, "estimator": source.model, "folder": tmp_path / "saved"}[form])
    model.fit(train, nb_epoch=1)
    plain = NDeMTorchMDNet(**OPTIONS, backbone_options=TINY["torchmd_net"])
    plain.fit(train_set, nb_epoch=1, init_from=source.model)
    np.testing.assert_array_equal(model.predict(test)[:, 0], plain.predict(test_set)["energy"])
    with pytest.raises(ConfigError, match="before the first fit"):
        model.load_from_pretrained(source)


def test_options_that_are_refused(zoo, make, train):
    with pytest.raises(TypeError, match="batchsize"):
        zoo.TorchMDNetModel(batchsize=3)
    with pytest.raises(ConfigError, match="not both"):
        zoo.TorchMDNetModel(NDeMTorchMDNet(), lr=1e-3)
    with pytest.raises(ConfigError, match="needed is NDeMTorchMDNet"):
        zoo.TorchMDNetModel(NDeMEquiformerV2())
    with pytest.raises(ConfigError, match="needed is NDeMPaiNN"):
        zoo.PaiNNModel(NDeMTorchMDNet())
    for options in ({"nb_epoch": 0}, {"checkpoint_interval": -1}, {"max_checkpoints_to_keep": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make().fit(train, **options)
    with pytest.raises(NotImplementedError, match="use fit"):
        make().fit_on_batch(train.X, train.y, train.w)


# ------------------------------------------------------------------------------------------ validation; DeepChem's bugs


@each_backbone
def test_validation_during_training_changes_nothing(dc, zoo, make, train, test, test_set, backbone):
    """DeepChem's first bug: its callback leaves the network in evaluation mode.

    A callback that runs the network in training mode, where EquiformerV2 draws what to drop, changes nothing either.
    """
    steps: list[int] = []
    modes: list[bool] = []

    def watch(model, step):
        potential = model.model.potential_
        steps.append(step)
        modes.append(potential.training)
        with torch.no_grad():
            potential(test_set.to_batch(potential.backbone.cutoff))

    validation = dc.models.ValidationCallback(test, 2, [zoo.forces_metric()], output_file=io.StringIO())
    drop = {"drop_path_rate": 0.5} if backbone == "equiformer_v2" else {}
    watched, plain = (make(backbone, backbone_options=TINY[backbone] | drop) for _ in range(2))
    assert watched.fit(train, nb_epoch=2, callbacks=[validation, watch]) == plain.fit(train, nb_epoch=2)
    assert steps == list(range(1, 9))
    assert all(modes[:-1]), "after the last step the training is over"
    assert_same(watched, plain, test)


def test_validation_callback_keeps_the_best(dc, zoo, make, train, test, test_set, tmp_path):
    pytest.importorskip("tensorboard")
    output = io.StringIO()
    metrics = [dc.metrics.Metric(dc.metrics.mae_score), zoo.forces_metric()]
    callback = dc.models.ValidationCallback(test, 2, metrics, output, str(tmp_path / "best"), save_metric=1)
    scores = {}

    def record(model, step):
        scores[step] = model.model.evaluate(test_set)["forces_mae"]

    model = make(lr=0.1, model_dir=str(tmp_path / "run"), tensorboard=True)
    model.fit(train, nb_epoch=3, callbacks=[callback, record])
    seen = {step: score for step, score in scores.items() if step % 2 == 0}
    best = min(seen, key=seen.get)
    assert callback.get_best_score() == pytest.approx(seen[best], rel=1e-12)
    assert len(set(seen.values())) == len(seen)
    assert "Step 2 validation: mae_score=" in output.getvalue()
    model.restore(model_dir=str(tmp_path / "best"))
    assert model.get_global_step() == best
    assert model.model.evaluate(test_set)["forces_mae"] == pytest.approx(seen[best], rel=1e-6)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_no_graph_of_a_step_outlives_it(make, train):
    """DeepChem's second bug: the sum of losses keeps the graphs of all steps."""

    def n_with_graph() -> int:
        gc.collect()
        tensors = (item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
        return sum(tensor.grad_fn is not None for tensor in tensors)

    counts = []
    before = n_with_graph()
    make().fit(train, nb_epoch=2, callbacks=lambda model, step: step in (1, 6) and counts.append(n_with_graph()))
    assert counts == [before, before]


def test_plateau_schedule(make, train):
    """DeepChem's third bug: a schedule that looks at the loss is impossible."""
    options = {"schedule": "plateau", "plateau_patience": 0, "plateau_factor": 0.5, "lr": 0.25}
    model = make(objective="supervised", **options)
    model.fit(train, nb_epoch=2, valid=train)
    model.fit(train, nb_epoch=4, valid=train)
    rates = [row["lr"] for row in model.model.history_]
    losses = [row["valid_loss"] for row in model.model.history_]
    expected, rate = [], 0.25
    for k, loss in enumerate(losses):
        expected.append(rate)
        rate *= 1.0 if loss < min(losses[:k], default=math.inf) else 0.5
    assert rates == expected
    assert rates[-1] < rates[0]


# ------------------------------------------------------------------------------------------------------------- evaluation


def test_evaluate(dc, zoo, make, train, train_set, test, test_set):
    model = make()
    model.fit(train, nb_epoch=1)
    metrics = [dc.metrics.Metric(dc.metrics.mae_score), dc.metrics.Metric(dc.metrics.pearson_r2_score)]
    scores = model.evaluate(test, metrics)
    plain = model.model.predict(test_set)
    energy, forces = plain["energy"], np.concatenate(plain["forces"])
    mae = np.abs(energy - test_set.targets["energy"]).mean()
    assert scores["mae_score"] == pytest.approx(mae, rel=1e-12)
    assert scores["mae_energy"] == pytest.approx(mae, rel=1e-12)
    assert scores["mae_forces"] == pytest.approx(np.abs(forces - test_set.targets["forces"]).mean(), rel=1e-12)
    r = np.corrcoef(energy, test_set.targets["energy"])[0, 1]
    assert scores["pearson_r2_score"] == pytest.approx(r**2, rel=1e-9)
    assert model.evaluate(test_set, metrics) == scores
    overall, per_task = model.evaluate(test, metrics, per_task_metrics=True)
    assert overall["mae_energy"] == scores["mae_energy"]
    assert set(per_task) == {"mae_score", "pearson_r2_score"}
    bare = MolecularDataset(**{**test_set.columns(), "targets": {"energy": test_set.targets["energy"]}})
    assert "mae_forces" not in model.evaluate(bare.to_deepchem())
    with pytest.raises(DataError, match="no forces"):
        model.evaluate(bare.to_deepchem(), [zoo.forces_metric()])
    assert np.isnan(zoo.forces_metric().compute_metric(test.y, test.y))


def test_weights_of_zero_leave_structures_out(dc, zoo, make, train, train_set, test, ethanol):
    padded = dc.data.NumpyDataset(
        np.concatenate([train.X, train.X[:2]]),
        np.concatenate([train.y, train.y[:2] + 100.0]),  # labels that would be seen
        np.concatenate([train.w, np.zeros((2, 1))]),
        np.concatenate([train.ids, train.ids[:2]]),
    )
    a, b = make(), make()
    assert a.fit(padded, nb_epoch=1) == b.fit(train, nb_epoch=1)
    for name, value in b.evaluate(train).items():  # other batches, and so other roundings
        assert a.evaluate(padded)[name] == pytest.approx(value, rel=1e-5)
    doubled = dc.data.NumpyDataset(train.X, train.y, 2 * train.w, train.ids)
    assert make().fit(doubled, nb_epoch=1) == make().fit(train, nb_epoch=1)
    odd = train.w.copy()
    odd[3] = 0.5
    with pytest.raises(DataError, match="structure 3 has the weight"):
        make().fit(dc.data.NumpyDataset(train.X, train.y, odd, train.ids))
    unlabeled = dc.data.NumpyDataset(train.X)
    np.testing.assert_array_equal(zoo.from_deepchem(unlabeled).targets["energy"], train_set.targets["energy"])


def test_normalized_energies_are_refused_where_there_are_forces(dc, make, train, test):
    model = make()
    transformer = dc.trans.NormalizationTransformer(transform_y=True, dataset=train)
    with pytest.raises(DataError, match=r"structure 0: y is .* A transformer changed y"):
        model.fit(transformer.transform(train))
    model.fit(train, nb_epoch=1)
    for call in (model.predict, lambda data, transformers: model.evaluate(data, [], transformers)):
        with pytest.raises(ConfigError, match="NormalizationTransformer transforms y"):
            call(test, [transformer])


# ------------------------------------------------------------------------------------------------------------ checkpoints


@each_backbone
def test_restored_and_continued_is_uninterrupted(make, train, test, tmp_path, backbone):
    folder = str(tmp_path / "run")
    # EquiformerV2's preset has "cosine", which depends on the length, and rows of the history every 5,000 steps.
    options = {"ema_decay": 0.9, "schedule": "plateau", "validate_every": 4}
    first = make(backbone, model_dir=folder, **options)
    first.fit(train, nb_epoch=2)
    del first
    second, whole = make(backbone, model_dir=folder, **options), make(backbone, **options)
    assert second.fit(train, nb_epoch=1, restore=True) == whole.fit(train, nb_epoch=3)
    assert second.get_global_step() == 12
    assert len(second.model.history_) == 3
    assert_same(second, whole, test)


def test_a_crash_loses_nothing_before_the_last_checkpoint(make, train, test, tmp_path):
    def crash(model, step):
        if step == 7:
            raise KeyboardInterrupt

    folder = str(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make(model_dir=folder).fit(train, nb_epoch=4, checkpoint_interval=3, callbacks=crash)
    model, whole = make(model_dir=folder), make()
    model.restore()
    assert model.get_global_step() == 6
    model.fit(train, nb_epoch=3)  # the second epoch, in which it is, counts
    whole.fit(train, nb_epoch=4)
    assert model.get_global_step() == 16
    assert_same(model, whole, test)


def test_reload_gives_the_same_predictions(make, train, test, tmp_path):
    model = make(model_dir=str(tmp_path))
    model.fit(train, nb_epoch=1)
    model.save()
    copy = make(model_dir=str(tmp_path))
    copy.reload()
    assert_same(copy, model, test)
    kept = model.get_checkpoints()
    predicted = model.predict(test)
    model.fit(train, nb_epoch=2)
    assert not np.array_equal(model.predict(test), predicted)
    model.restore(kept[0])
    np.testing.assert_array_equal(model.predict(test), predicted)
    assert model.get_global_step() == 4


def test_an_older_checkpoint_goes_on_with_a_new_optimizer(make, train, train_set, test, test_set, tmp_path):
    model = make(model_dir=str(tmp_path))
    model.fit(train, nb_epoch=1)
    old = model.get_checkpoints()[0]
    model.fit(train, nb_epoch=2)
    model.restore(old)
    model.fit(train, nb_epoch=1)
    plain = NDeMTorchMDNet(**OPTIONS, backbone_options=TINY["torchmd_net"]).fit(train_set, nb_epoch=1)
    plain.partial_fit(train_set, nb_epoch=1)
    np.testing.assert_array_equal(model.predict(test)[:, 0], plain.predict(test_set)["energy"])
    assert model.get_global_step() == 8
    assert [row["step"] for row in model.model.history_] == [4, 4]


def test_checkpoints_are_counted_and_rotated(make, train, tmp_path):
    model = make(model_dir=str(tmp_path))
    model.fit(train, nb_epoch=3, checkpoint_interval=5, max_checkpoints_to_keep=2)
    names = [Path(path).name for path in model.get_checkpoints()]
    assert names == ["checkpoint-000003", "checkpoint-000002"]
    model.restore(model.get_checkpoints()[1])
    assert model.get_global_step() == 10
    none = make(model_dir=str(tmp_path / "none"))
    none.fit(train, nb_epoch=1, checkpoint_interval=0)
    assert none.get_checkpoints() == []
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl")), "nothing is pickled"


def test_what_cannot_be_restored(make, train, tmp_path):
    model = make(model_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        model.restore()
    model.fit(train, nb_epoch=1)
    other = make(model_dir=str(tmp_path), backbone_options=TINY["torchmd_net"] | {"hidden_channels": 16})
    with pytest.raises(ConfigError, match="backbone"):
        other.restore()


def test_a_temporary_folder_goes_with_the_model(make, train):
    model = make()
    folder = Path(model.model_dir)
    model.fit(train, nb_epoch=1)
    assert folder.is_dir()
    del model
    gc.collect()
    assert not folder.exists()


# --------------------------------------------------------------------------------------------------------------- searches


def test_grid_search(dc, zoo, train, test, tmp_path):
    def build(**params):
        return zoo.TorchMDNetModel(**OPTIONS | {"backbone_options": TINY["torchmd_net"]} | params)

    search = dc.hyper.GridHyperparamOpt(build)
    grid = {"lr": [1e-2, 1e-9], "objective": ["supervised"]}
    metric = zoo.forces_metric()
    best, chosen, scores = search.hyperparam_search(
        grid, train, test, metric, nb_epoch=4, use_max=False, logdir=str(tmp_path)
    )
    assert chosen == {"lr": 1e-2, "objective": "supervised"}
    assert len(set(scores.values())) == 2
    assert best.evaluate(test)["mae_forces"] == min(scores.values())
    assert best.get_global_step() == 16
    assert best.get_checkpoints()


def test_random_search_builds_from_the_class(dc, zoo, train, test):
    options = {name: [value] for name, value in OPTIONS.items()} | {"backbone_options": [TINY["torchmd_net"]]}
    search = dc.hyper.RandomHyperparamOpt(zoo.TorchMDNetModel, max_iter=2)
    found = search.hyperparam_search(
        options | {"batch_size": [2, 3, 4]}, train, test, zoo.forces_metric(), nb_epoch=1, use_max=False
    )
    best, chosen, scores = found
    assert best.evaluate(test)["mae_forces"] == min(scores.values())
    assert best.get_global_step() == 12 // chosen["batch_size"]


def test_no_type_error_leaves_fit(make, train, monkeypatch):
    """DeepChem's search would take it for a missing `nb_epoch`, and train again without it."""
    with pytest.raises(TrainingError, match="allowed are a MolecularDataset"):
        make().fit("data.npz")
    model = make()
    monkeypatch.setattr(model.model, "_train", lambda *_, **__: len(5))
    with pytest.raises(TrainingError, match="no len"):
        model.fit(train)


# ------------------------------------------------------------------------------------------------ featurizers, datasets


def test_radius_featurizer(dc, zoo, test_set):
    featurizer = zoo.RadiusGraphFeaturizer(cutoff=2.0)
    assert isinstance(featurizer, dc.feat.Featurizer)
    atoms = [test_set.atoms(i) for i in range(3)]
    graphs = featurizer(atoms)
    for graph, item in zip(graphs, atoms, strict=True):
        expected = RadiusGraph(cutoff=2.0)(item)
        assert graph.num_edges() == expected.num_edges() > 0
        for name in ("Z", "R", "F"):
            assert torch.equal(graph.ndata[name], expected.ndata[name])
    assert repr(featurizer) == "RadiusGraphFeaturizer[cutoff=2.0, max_neighbors=None, skin=0.0, strict=True]"
    assert str(featurizer) == "RadiusGraphFeaturizer_cutoff_2.0"
    atoms[1].positions[3] = atoms[1].positions[2]
    with pytest.raises(DataError, match="structure 1: atoms"):
        featurizer(atoms)


@pytest.mark.rdkit
def test_conformer_featurizer_in_a_loader(dc, zoo, tmp_path):
    """DeepChem's own loaders; its featurizers would renumber atoms of SMILES."""
    pytest.importorskip("rdkit")
    (tmp_path / "molecules.csv").write_text("smiles,gap\nOCCF,1.5\nnonsense,2.5\nCC,3.5\n")
    featurizer = zoo.ConformerGraphFeaturizer(on_failure="drop")
    loader = dc.data.CSVLoader(["gap"], feature_field="smiles", id_field="smiles", featurizer=featurizer)
    with pytest.warns(DataWarning):
        dataset = loader.create_dataset(str(tmp_path / "molecules.csv"))
    assert len(featurizer.report_.failures) == 1
    columns = zoo.from_deepchem(dataset)
    assert columns.ids.tolist() == ["OCCF", "CC"]
    assert columns.z[:4].tolist() == [8, 6, 6, 9]
    assert columns.targets["gap"].tolist() == [1.5, 3.5]
    with pytest.raises(DataError, match="nonsense"):
        zoo.ConformerGraphFeaturizer().featurize(["CC", "nonsense"])


def test_data_on_disk_train_in_the_same_bits(dc, zoo, make, train, train_set, test, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "SHARD_SIZE", 5)
    disk = zoo.to_disk(train_set, tmp_path / "ethanol")
    assert isinstance(disk, dc.data.DiskDataset)
    assert disk.get_number_shards() == 3
    again = dc.data.DiskDataset(str(tmp_path / "ethanol"))
    back = zoo.from_deepchem(again)
    for name in ("energy", "forces"):
        np.testing.assert_array_equal(back.targets[name], train_set.targets[name])
    np.testing.assert_array_equal(back.pos, train_set.pos)
    assert back.ids.tolist() == train_set.ids.tolist()
    a, b = make(), make()
    assert a.fit(again, nb_epoch=1) == b.fit(train, nb_epoch=1)
    assert_same(a, b, test)


def test_datasets_that_are_refused(dc, zoo, make, train):
    wide = dc.data.NumpyDataset(train.X, np.repeat(train.y, 2, axis=1))
    with pytest.raises(DataError, match=r"must be \(12, 1\)"):
        make().fit(wide)
    named = zoo.from_deepchem(wide, tasks=["gap", "zpve"])
    np.testing.assert_array_equal(named.targets["zpve"], train.y[:, 0])
    holes = np.ones((12, 2))
    holes[4, 1] = 0.0
    with pytest.raises(DataError, match="structure 4 lacks some of its labels"):
        zoo.from_deepchem(dc.data.NumpyDataset(train.X, wide.y, holes), tasks=["gap", "zpve"])
    broken = train.X.copy()
    broken[2] = np.array([])
    with pytest.raises(DataError, match="structure 2 is an empty array"):
        make().fit(dc.data.NumpyDataset(broken, train.y))

    class Silent(dc.feat.Featurizer):
        def _featurize(self, datapoint, **_):
            raise RuntimeError("something")

    with pytest.raises(DataError, match="structure 0: Silent"):
        zoo.to_disk(zoo.from_deepchem(train), featurizer=Silent())


# ---------------------------------------------------------------------------------------------------------------- loaders


@pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")
def test_load_md17_has_our_split(dc, zoo, shared_data, tmp_path, monkeypatch):
    options = {"data_dir": shared_data / "mini", "save_dir": tmp_path, "splitter": zoo.CountSplitter(20, 5, 10)}
    tasks, parts, transformers = zoo.load_md17("ethanol", **options)
    _, ours, _ = our_load_md17("ethanol", n_train=20, n_valid=5, n_test=10, data_dir=shared_data / "mini")
    assert (tasks, transformers) == (["energy"], [])
    for part, expected in zip(parts, ours, strict=True):
        assert isinstance(part, dc.data.DiskDataset)
        assert part.ids.tolist() == expected.ids.tolist()
        np.testing.assert_array_equal(part.y[:, 0], expected.targets["energy"])
        np.testing.assert_array_equal(zoo.from_deepchem(part).targets["forces"], expected.targets["forces"])

    def fail(*_, **__):
        raise AssertionError("the file was read again")

    monkeypatch.setattr(zoo, "read_md17", fail)
    _, again, _ = zoo.load_md17("ethanol", **options)
    np.testing.assert_array_equal(again[0].y, parts[0].y)
    others = [
        {"splitter": zoo.CountSplitter(20, 5, 10, seed=2)},
        {"splitter": zoo.CountSplitter(21, 5, 10)},
        {"featurizer": zoo.RadiusGraphFeaturizer(4.0)},
        {"splitter": None},
        {"reload": False},
    ]
    for other in others:
        with pytest.raises(AssertionError, match="read again"):
            zoo.load_md17("ethanol", **options | other)


@pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")
def test_loaders_with_deepchems_splitters_and_transformers(dc, zoo, shared_data, tmp_path):
    options = {"data_dir": shared_data / "mini", "save_dir": tmp_path}
    _, (whole,), _ = zoo.load_md17("ethanol", splitter=None, reload=False, **options)
    assert isinstance(whole, dc.data.NumpyDataset)
    _, parts, _ = zoo.load_md17("ethanol", splitter="index", reload=False, **options)
    assert np.concatenate([part.ids for part in parts]).tolist() == whole.ids.tolist()
    assert len(parts[0]) == int(0.8 * len(whole))
    with pytest.raises(ConfigError, match="change y"):
        zoo.load_md17("ethanol", splitter="index", transformers=["normalization"], reload=False, **options)
    with pytest.raises(ConfigError, match="no splitter 'randon'"):
        zoo.load_md17("ethanol", splitter="randon", **options)


@pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")
def test_a_property_of_qm9_with_a_transformer(dc, zoo, make, shared_data, tmp_path):
    """Normalized labels: predictions and errors come back in eV."""
    options = {"data_dir": shared_data / "mini", "save_dir": tmp_path, "uncharacterized": "keep"}
    splitter = zoo.CountSplitter(30, 5, 20)
    tasks, (train, _, test), transformers = zoo.load_qm9("gap", None, splitter, ["normalization"], **options)
    sizes = {"n_train": 30, "n_valid": 5, "n_test": 20}
    plain = {name: value for name, value in options.items() if name != "save_dir"}
    _, (our_train, _, our_test), _ = our_load_qm9("gap", **plain, **sizes)
    assert tasks == ["gap"]
    assert train.ids.tolist() == our_train.ids.tolist()
    labels = our_train.targets["gap"]
    np.testing.assert_allclose(train.y[:, 0], (labels - labels.mean()) / labels.std(), atol=1e-9)
    model = make(target="gap", objective="supervised", unknown_elements="warn")
    model.fit(train, nb_epoch=2)
    predicted = model.predict(test, transformers)
    assert labels.min() - 1 < predicted.mean() < labels.max() + 1, "eV, not standard deviations"
    assert abs(model.predict(test).mean()) < 2
    scores = model.evaluate(test, [dc.metrics.Metric(dc.metrics.mae_score)], transformers)
    expected = np.abs(predicted[:, 0] - our_test.targets["gap"]).mean()
    assert scores["mae_score"] == pytest.approx(expected, rel=1e-9)
    assert scores["mae_gap"] == pytest.approx(expected, rel=1e-9)
    assert "mae_forces" not in scores
    with pytest.raises(ConfigError, match="without forces"):
        model.predict_forces(test)
    _, (again, _, _), kept = zoo.load_qm9("gap", None, splitter, ["normalization"], **options)
    np.testing.assert_array_equal(again.y, train.y)
    np.testing.assert_allclose(kept[0].untransform(again.y)[:, 0], labels, rtol=1e-12)


@pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")
def test_columns_are_chosen_by_name(zoo, make, shared_data, tmp_path):
    options = {"data_dir": shared_data / "mini", "uncharacterized": "keep", "n_train": 30, "n_valid": 0, "n_test": 0}
    _, (columns, _, _), _ = our_load_qm9(["homo", "gap"], **options)
    disk = zoo.to_disk(columns, tmp_path / "both")
    settings = {"objective": "supervised", "target": "gap"}
    a, b = make(**settings), make(**settings)
    a.fit(disk, nb_epoch=1)
    b.fit(columns.with_targets(["gap"]).to_deepchem(), nb_epoch=1)
    np.testing.assert_array_equal(a.predict(disk), b.predict(disk))
    expected = np.abs(a.predict(disk)[:, 0] - columns.targets["gap"]).mean()
    assert a.evaluate(disk)["mae_gap"] == pytest.approx(expected, rel=1e-12)
    homo = zoo.to_disk(columns.with_targets(["homo"]), tmp_path / "homo")
    for call in (a.fit, a.evaluate):
        with pytest.raises(DataError, match="y is 'homo', but the model predicts 'gap'"):
            call(homo)


@pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")
def test_half_a_folder_is_not_taken(zoo, shared_data, tmp_path):
    """A process that was killed while it wrote leaves no data set that looks whole."""
    options = {"data_dir": shared_data / "mini", "save_dir": tmp_path, "splitter": zoo.CountSplitter(6, 2, 2)}
    zoo.load_md17("ethanol", **options)
    (folder,) = tmp_path.iterdir()
    (folder / "transformers.pkl").unlink()
    shutil.rmtree(folder / "test_dir")
    _, parts, _ = zoo.load_md17("ethanol", **options)
    assert [len(part) for part in parts] == [6, 2, 2]


@pytest.mark.parametrize("form", ["duck", "ours", "atoms"])
def test_what_the_estimator_takes_is_taken(make, train, train_set, test, form):
    duck = SimpleNamespace(X=train.X, y=train.y, w=train.w, ids=train.ids)
    atoms = [train_set.atoms(i) for i in range(len(train_set))]
    data = {"duck": duck, "ours": train_set, "atoms": atoms}[form]
    a, b = make(), make()
    assert a.fit(data, nb_epoch=1) == b.fit(train, nb_epoch=1)
    assert_same(a, b, test)
    np.testing.assert_allclose(a.predict(data), b.predict(train), rtol=1e-12)
    assert a.evaluate(data) == pytest.approx(b.evaluate(train), rel=1e-9)
