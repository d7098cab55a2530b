# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # A force field in DeepChem
#
# Whoever works in DeepChem has habits: a featurizer, a dataset, a splitter, a model with `fit`, a `ValidationCallback`, a
# hyper-parameter search, `evaluate`. DeepChem itself has no training on forces; `ndem_zoo.deepchem` adds it, in classes that are
# DeepChem's own. This page follows the usual workflow from end to end. It needs the extra `deepchem` (Python 3.10 or 3.11).

# %%
import logging

logging.disable(logging.WARNING)  # DeepChem lists, on import, every optional package that is not there

import deepchem as dc

from ndem_zoo.datasets import read_sample
from ndem_zoo.deepchem import RadiusGraphFeaturizer, TorchMDNetModel, forces_metric

logging.disable(logging.NOTSET)

# %% [markdown]
# ## Featurize
#
# What is known about ethanol: 300 frames with energies and forces, as `ase.Atoms` here; from any file that ASE reads elsewhere.
# The featurizer makes DGLGraphs of them. Energies are `y`. Forces have no place in a DeepChem dataset, since every structure
# has another number of them; they stay in the graphs.

# %%
sample = read_sample("ethanol")[::6]
frames = [sample.atoms(i) for i in range(300)]
featurizer = RadiusGraphFeaturizer(cutoff=5.0)
graphs = featurizer.featurize(frames)
print(graphs[0])

# %%
import numpy as np

energies = np.array([[atoms.get_potential_energy()] for atoms in frames])
dataset = dc.data.DiskDataset.from_numpy(graphs, energies, tasks=["energy"], data_dir="ethanol")
print(dataset.X.shape, dataset.y.shape, "on disk:", dataset.data_dir)

# %% [markdown]
# A loader does all of this in one line, in the style of MoleculeNet: `ndem_zoo.deepchem.load_md17("ethanol", featurizer, splitter)`
# downloads, featurizes, splits and keeps the result. And any dataset of this package has `.to_deepchem()`.
#
# ## Split
#
# DeepChem's splitters work, since the graphs are entries like all others. Think before taking `RandomSplitter`: frames of one
# trajectory resemble their neighbors, and a random split is flattering. Every sixth frame (30 fs) was taken here for that reason,
# and this page compares models with each other only. A `MaxMinSplitter` or `ScaffoldSplitter` needs molecules that differ.

# %%
train, valid, test = dc.splits.RandomSplitter().train_valid_test_split(
    dataset, frac_train=0.7, frac_valid=0.1, frac_test=0.2, seed=1
)
print(len(train), len(valid), len(test))

# %% [markdown]
# No transformer comes next, for once: `NormalizationTransformer` would scale `y` and not the forces in the graphs, and then
# forces would not be the derivative of the energy any more. The model refuses it. It has reference energies and a scale inside.
#
# ## Fit, with a validation callback
#
# `TorchMDNetModel` is a `deepchem.models.Model`, and has the keywords of `NDeMTorchMDNet`. `fit` returns the loss, and goes on
# where it was when it is called again. DeepChem selects by metrics that see energies only; `forces_metric()` stands for the
# force error wherever a metric is asked for.


# %%
def build(**params) -> TorchMDNetModel:
    """A small network."""
    fixed = {
        "backbone_options": {"hidden_channels": 32, "num_layers": 2},
        "batch_size": 8,
        "warmup_steps": 20,
        "ema_decay": 0.9,
    }
    return TorchMDNetModel(**fixed, progress=False, **params)


metrics = [forces_metric(), dc.metrics.Metric(dc.metrics.mae_score)]
callback = dc.models.ValidationCallback(valid, interval=54, metrics=metrics, save_dir="best")
model = build(objective="ndem", lr=3e-3)
loss = model.fit(train, nb_epoch=10, callbacks=callback)
print(f"{model.get_global_step()} steps; loss {loss:.3f}; best force error {callback.get_best_score():.3f} eV/Å")

# %% [markdown]
# A second call continues, with the same optimizer. The callback keeps the weights of its best validation in `save_dir`, and
# `restore` brings them back.

# %%
loss = model.fit(train, nb_epoch=5, callbacks=callback)
model.restore(model_dir="best")
print(f"{model.get_global_step()} steps; loss {loss:.3f}; best force error {callback.get_best_score():.3f} eV/Å")

# %% [markdown]
# ## Evaluate and predict
#
# `evaluate` gives the metrics that are passed, and always `mae_energy` (eV) and `mae_forces` (eV/Å). `predict` has the shape that
# DeepChem expects; forces come from a method of their own, one array for each structure.

# %%
scores = model.evaluate(test, [dc.metrics.Metric(dc.metrics.pearson_r2_score), dc.metrics.Metric(dc.metrics.mae_score)])
print({name: round(float(value), 4) for name, value in scores.items()})
predicted, forces = model.predict(test), model.predict_forces(test)
print(predicted.shape, len(forces), forces[0].shape)

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

labels = np.concatenate([graph.ndata["F"].numpy() for graph in test.X])
figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
left.plot(test.y - test.y.mean(), predicted - test.y.mean(), "o", color="#0072B2", markersize=4)
left.set(xlabel="reference energy − mean (eV)", ylabel="predicted energy − mean (eV)")
right.plot(labels.ravel(), np.concatenate(forces).ravel(), "o", color="#0072B2", markersize=2)
right.set(xlabel="reference force component (eV/Å)", ylabel="predicted (eV/Å)")
for axis in (left, right):
    axis.axline((0, 0), slope=1, color="0.35", linewidth=0.8)
    axis.set_aspect("equal", "datalim")
    axis.grid(True, color="0.92")

# %% [markdown]
# Energies lie beside the diagonal, all by about the same: weights were chosen by the force error, which does not know of a
# constant in the energy.
#
# ## Search
#
# `GridHyperparamOpt` builds a model for every point, trains it, and compares them on the validation set. With the force error
# as metric smaller is better: `use_max=False`.

# %%
search = dc.hyper.GridHyperparamOpt(build)
grid = {"lr": [3e-3, 3e-5], "objective": ["supervised", "ndem"]}
best, chosen, found = search.hyperparam_search(
    grid, train, valid, forces_metric(), nb_epoch=3, use_max=False, logdir="search"
)
for point, score in sorted(found.items(), key=lambda item: item[1]):
    print(f"{score:.3f} eV/Å  {point}")
print("chosen:", chosen)

# %% [markdown]
# Three epochs tell a usable learning rate from a useless one. They cannot tell which objective is better: that difference is
# small, one seed is none, and it is the end of a training that counts.
#
# ## Out of DeepChem
#
# The estimator inside is the one of all other pages.

# %%
from ndem_zoo import NDeMCalculator

model.model.save("ethanol-model")
atoms = frames[0].copy()
atoms.calc = NDeMCalculator("ethanol-model")
print(f"{atoms.get_potential_energy():.3f} eV; labeled {energies[0, 0]:.3f} eV")

# %% tags=["hide-input"]
assert isinstance(model, dc.models.Model)
assert isinstance(dataset, dc.data.DiskDataset)
assert abs(model.evaluate(valid)["mae_forces"] - callback.get_best_score()) < 1e-6, (
    "restore brought back the best weights"
)
assert np.isclose(scores["mae_energy"], np.abs(predicted - test.y).mean()), "mae_energy is what it says"
assert np.isclose(scores["mae_forces"], np.abs(np.concatenate(forces) - labels).mean()), "and mae_forces"
assert scores["mae_forces"] < 0.4 * np.abs(labels).mean(), "the model has learned something"
assert chosen["lr"] == 3e-3, "the search finds the usable learning rate"
assert len(found) == 4
try:
    model.fit(dc.trans.NormalizationTransformer(transform_y=True, dataset=train).transform(train), nb_epoch=1)
except ValueError as error:
    assert "transformer" in str(error).lower(), "a normalized y is refused"
else:
    raise AssertionError("a normalized y must be refused")
