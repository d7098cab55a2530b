# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # Quickstart
#
# From frames to a force field that drives molecular dynamics, in less than a minute. This page is a script:
# `python docs/quickstart.py` runs it, and so do the tests. Nothing is downloaded.
#
# ## Ten lines
#
# Load, train, predict, measure. The network is small and the steps are few, so that it is over in seconds.

# %%
from ndem_zoo import NDeMTorchMDNet, load_sample

tasks, (train, valid, test), transformers = load_sample("ethanol")
small = {"hidden_channels": 32, "num_layers": 2}
model = NDeMTorchMDNet(
    preset="md17_fast", backbone_options=small, lr=3e-3, warmup_steps=30, max_steps=100, progress=False
)
model.fit(train, valid)
prediction = model.predict(test)
print(prediction["energy"].shape, prediction["forces"].shape, "energies in eV, forces in eV/Å")
print(model.evaluate(test, metrics=["energy_mae", "forces_mae", "forces_mae_kcal"]))

# %% [markdown]
# The rest of the page goes through the same, step by step, with somewhat more training.
#
# ## Data
#
# `load_sample` gives frames of ethanol that come with the package: molecular dynamics at 500 K with the semi-empirical
# GFN2-xTB method, in the file layout of MD17. `load_md17("ethanol")` would give the genuine DFT frames in the same form.
# All loaders return the tasks, three datasets, and an empty list of transformers, as MoleculeNet's do.

# %%
tasks, (train, valid, test), transformers = load_sample("ethanol", n_train=950, n_valid=50)
tasks, train, test

# %% [markdown]
# Inside the package everything is in eV and Å, whatever the file says. `summary()` looks at what often goes wrong: units,
# duplicates, net forces, and the virial temperature, which should be that of the simulation.

# %%
print(train.summary())

# %% [markdown]
# An item is a `DGLGraph` or an `ase.Atoms`; the columns behind them are plain arrays.

# %%
graph, atoms = train.graph(0), train.atoms(0)
print(graph.ndata["Z"].tolist(), atoms.get_chemical_formula())
print(train.targets["forces"].shape, "forces in eV/Å, all atoms one after the other")

# %% [markdown]
# ## Training
#
# A small network and few steps, so that it is quick: 32 channels, 2 layers, 200 steps of 8 frames. What is not given is
# taken from the preset; [the presets](reproducing.md) say where each value comes from. The objective is NDeM; with
# `objective="supervised"` it would be plain training.

# %%
model = NDeMTorchMDNet(
    preset="md17_fast",
    objective="ndem",
    objective_options={"sigma": 0.05, "ratio": 0.25},
    backbone_options={"hidden_channels": 32, "num_layers": 2},
    batch_size=8,
    lr=3e-3,
    warmup_steps=50,
    ema_decay=0.99,
    validate_every=25,
    max_steps=200,
    progress=False,
    seed=0,
)
model.fit(train, valid)
print(f"{model.potential_.n_parameters:,} parameters")
print("reference energies in eV:", {symbol: round(value, 4) for symbol, value in model.reference_.items()})

# %% [markdown]
# `history_` has one row for each validation. Training losses are in units of the network's scale (here the root mean
# square of the training forces), errors in eV and eV/Å.

# %%
# %matplotlib inline
from ndem_zoo.plots import learning_curve_figure, parity_figure

learning_curve_figure({"NDeM": model.history_}, against="step")

# %%
prediction = model.predict(test)
columns = {"energy": prediction["energy"], "forces": prediction["forces"].reshape(-1, 3)}
parity_figure({"NDeM": columns}, test.targets, test.ptr)

# %% [markdown]
# ## How good is it?
#
# Errors are over all values at once, in eV and in the units of the MD17 literature. Compare with something trivial: a
# force field that always says zero.

# %%
errors = model.evaluate(test)
always_zero = abs(test.targets["forces"]).mean()
print(f"force MAE  {errors['forces_mae']:.3f} eV/Å = {errors['forces_mae_kcal']:.2f} kcal/mol/Å")
print(f"always zero: {always_zero:.3f} eV/Å")
print(f"energy MAE {1e3 * errors['energy_mae']:.1f} meV = {errors['energy_mae_kcal']:.2f} kcal/mol")

# %% [markdown]
# This is far from converged; it is the work of seconds. And it says nothing about MD17: GFN2-xTB is another potential, and
# consecutive frames of one trajectory are easier to predict than independent ones ([pitfalls](pitfalls.md)).
#
# ## Keep it and use it
#
# A saved model is a folder of JSON, CSV and safetensors. Nothing in it is executed when it is loaded.

# %%
from pathlib import Path

model.save("ethanol-model")
again = NDeMTorchMDNet.load("ethanol-model")
print(sorted(path.name for path in Path("ethanol-model").iterdir()))

# %% [markdown]
# As an [ASE](https://ase-lib.org) calculator the model runs dynamics, relaxations and whatever else ASE can do. Forces are
# the exact gradient of the energy, so the total energy of an NVE run is conserved, however wrong the forces may be.

# %%
from ndem_zoo import NDeMCalculator
from ndem_zoo.dynamics import run_md

calculator = NDeMCalculator(again)
record = run_md(test.atoms(0), calculator, steps=200, timestep=0.5, temperature=300, ensemble="nve")
print(f"{record.time[-1]:.1f} ps of NVE: total energy {record.total[0]:.4f} to {record.total[-1]:.4f} eV")
print(f"it fluctuates by {record.fluctuation:.2f} meV/atom (rms) around a straight line")

# %% [markdown]
# What this page taught, as checks; they run whenever the page is built.

# %% tags=["hide-input"]
import numpy as np
from ase import units

KCAL_PER_MOL = units.kcal / units.mol
assert errors["forces_mae"] < 0.5 * always_zero, "training does better than always saying zero"
assert np.isclose(errors["forces_mae_kcal"] * KCAL_PER_MOL, errors["forces_mae"]), (
    "both units are printed from one number"
)
saved = again.predict(test)
assert np.array_equal(saved["energy"], prediction["energy"]), "a loaded model predicts the same bits"
assert saved["forces"].shape == (1000, 9, 3)

# Forces are -dE/dx: compare with a finite difference of the energy along a random direction, in float64.
atoms = test.atoms(0)
atoms.calc = NDeMCalculator(again, precision="64-true")
direction = np.random.default_rng(1).normal(size=(9, 3))
forces, start, energies = atoms.get_forces(), atoms.positions.copy(), []
for step in (-1e-4, 1e-4):
    atoms.positions = start + step * direction
    energies.append(atoms.get_potential_energy())
assert np.isclose((energies[0] - energies[1]) / 2e-4, (forces * direction).sum(), rtol=1e-4), "forces are -dE/dx"
assert record.fluctuation < 1.0 and len(record.total) == 201, "NVE conserves the energy: 1 meV/atom is generous"
