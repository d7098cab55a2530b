# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # NDeM in SchNetPack, by configuration only
#
# SchNetPack is configured with Hydra: what is trained, on what and how, is a tree of YAML files. Once this package is installed,
# three more experiments are found in that tree, and `spktrain experiment=ndem_md17` trains SchNetPack's PaiNN with NDeM, without
# a line of code and without a changed file. This page opens the configuration, shows what differs from the stock
# one, trains both for a few seconds, and takes the parts of NDeM out again. It needs the extra `schnetpack`.
#
# ## What differs
#
# `compose` does what `spktrain` does on start: it puts the tree together. Here for SchNetPack's own experiment and for ours.

# %%
import difflib
import logging
import warnings

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

# SchNetPack, Hydra and Lightning report every step, which is good in a terminal.
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def composed(*arguments: str):
    """What spktrain makes of its arguments."""
    with initialize_config_module("schnetpack.configs", version_base="1.2"):
        return compose("train", [*arguments, "data.molecule=ethanol", "run.work_dir=."])


stock, ours = composed("experiment=md17"), composed("experiment=ndem_md17")
lines = [OmegaConf.to_yaml(config, resolve=False).splitlines() for config in (stock, ours)]
changes = [line for line in difflib.unified_diff(*lines, lineterm="", n=0) if not line.startswith(("---", "+++", "@@"))]
print(f"{len(lines[0])} lines in the stock configuration, {len(changes)} lines of changes:\n")
print("\n".join(changes))

# %% [markdown]
# Read from top to bottom, this is all of NDeM:
#
# - `AddNDeMNoise`, a transform, gives each structure noisy positions beside its own. In training they are new every time (without
#   `seed`); in validation always the same, so that validation errors can be compared.
# - `NDeMDoubleBatch`, an input module, appends the noisy structures to the batch, so that the network passes once over both.
# - `NDeMNoisyForceHead`, the first output module, reads the noisy half and takes it away again: the stock modules
#   after it see what they always saw.
# - `NDeMForceDifference`, the last one, makes the difference of the two forces, and one more output of the task trains it to
#   be the noise, with weight `ndem_weight`.
# - The neighbor list is longer by 8 σ, so that an atom that moved into the cutoff has its edge. Beyond the cutoff edges count 0.
# - Learning rate, early stopping and best model go by the force error, not by the sum with the auxiliary term.
#
# Lists are replaced and not merged by Hydra, therefore `train_transforms` repeats the stock transforms.
#
# ## Data
#
# SchNetPack reads ASE databases. Any dataset of this package becomes one, with units in it; MD17's are kcal/mol.

# %%
from pathlib import Path

from ndem_zoo.datasets import read_sample
from ndem_zoo.schnetpack import write_ase_db

frames = read_sample("ethanol")[::10]
database = Path("ethanol.db").absolute()
database.unlink(missing_ok=True)
write_ase_db(frames, database, units={"energy": "kcal/mol", "forces": "kcal/mol/Ang"}, metadata={"molecule": "ethanol"})
print(len(frames), "frames in", database.name)

# %% [markdown]
# ## Train
#
# On the command line:
#
# ```sh
# spktrain experiment=ndem_md17 data.molecule=ethanol data.datapath=$PWD/ethanol.db data.num_train=100 data.num_val=20 +seed=1
# ```
#
# From Python, `schnetpack.cli.train` is the function behind that command, and takes a composed configuration. The settings below make
# the network small and the training short; the experiment is the only difference between the two runs.

# %%
import contextlib
import io
import os

from schnetpack.cli import train

short = [
    *(f"data.num_{part}={n}" for part, n in (("train", 100), ("val", 20), ("test", 50), ("workers", 0))),
    *("data.batch_size=10", f"data.datapath={database}", "run.data_dir=data", "logger=csv", "+seed=1"),
    *("model.representation.n_atom_basis=32", "model.representation.n_interactions=2", "trainer.max_epochs=10"),
    *("globals.lr=2e-3", "callbacks.ema.decay=0.9", "print_config=false", "+trainer.enable_progress_bar=false"),
]


def run(experiment: str) -> Path:
    """Train in a folder named after the experiment; returns the folder."""
    config, home = composed(f"experiment={experiment}", *short), Path.cwd()
    folder = home / f"run-{experiment}"
    folder.mkdir(exist_ok=True)
    for file in ("config.yaml", "split.npz"):  # Pitfall: SchNetPack would go on with a split that it finds
        (folder / file).unlink(missing_ok=True)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(config)
    finally:
        os.chdir(home)
    return folder


folders = {name: run(name) for name in ("md17", "ndem_md17")}

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import pandas as pd

curves = {name: pd.read_csv(max(folder.glob("csv/*/metrics.csv"))) for name, folder in folders.items()}
valid = {name: table.dropna(subset="val_forces_mae") for name, table in curves.items()}

figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
for name, color in {"md17": "0.35", "ndem_md17": "#0072B2"}.items():
    left.plot(valid[name]["epoch"], valid[name]["val_forces_mae"], ".-", color=color, label=name)
    if "val_ndem_difference_mse" in valid[name]:
        right.plot(valid[name]["epoch"], valid[name]["val_ndem_difference_mse"], ".-", color=color, label=name)
left.set(xlabel="epoch", ylabel="force MAE, validation (kcal/mol/Å)", yscale="log")
right.set(xlabel="epoch", ylabel="NDeM's term, validation")
for axis in (left, right):
    axis.legend(frameon=False)
    axis.grid(True, which="both", color="0.92")

# %% [markdown]
# Both learn. Ten epochs of a small network on 100 frames say nothing about which one ends lower, and one seed would not anyway.
#
# The right panel surprises: the auxiliary error *rises* first. It is that of the main forces (over 20 kcal/mol/Å) minus the noisy
# forces, against the noise. In the first epoch both forces are nearly 0, and what remains is the noise: a quarter of the atoms
# is moved, and their components have variance 1. Then the main branch learns forces, and the noisy head must say the same for a
# structure that it sees displaced, before it can be better than nothing on the displacement. If it stayed at zero, the error
# would go to the value printed here.

# %%
import numpy as np

size = np.square(frames.targets["forces"]).mean() / (20.0 * 0.0433641) ** 2 + 0.25
print(
    f"noisy forces of zero beside perfect main forces: {size:.2f}; reached: {valid['ndem_md17'].iloc[-1]['val_ndem_difference_mse']:.2f}"
)

# %% [markdown]
# ## Deploy
#
# `best_model` runs in SchNetPack's tools as it is, as long as this package is installed. `strip_ndem` takes the parts of NDeM out,
# and what is left is a stock `NeuralNetworkPotential`, for `spkdeploy`, LAMMPS, or somebody else.

# %%
import torch
from schnetpack.utils import load_model

from ndem_zoo.schnetpack import strip_ndem

trained = load_model(str(folders["ndem_md17"] / "best_model"))
plain = strip_ndem(trained)
torch.save(plain, "plain_model")
for name, model in {"trained": trained, "stripped": plain}.items():
    print(f"{name:9s}", *(type(m).__name__ for m in [*model.input_modules, *model.output_modules]))

# %% [markdown]
# A `best_model` is a pickle, as all models of SchNetPack are: load those whose source you trust.
#
# ## Predict with SpkCalculator

# %%
import schnetpack as spk


def calculator(file: str):
    """SchNetPack's own ASE calculator."""
    neighbors = spk.transform.MatScipyNeighborList(cutoff=5.0)
    return spk.interfaces.SpkCalculator(file, neighbors, energy_unit="kcal/mol")


unseen = [read_sample("ethanol").atoms(i) for i in range(5, 2000, 50)]
labels = np.array([atoms.get_forces() for atoms in unseen])
with contextlib.redirect_stdout(io.StringIO()):
    calculators = [calculator(str(folders["ndem_md17"] / "best_model")), calculator("plain_model")]
predicted = []
for calc in calculators:
    for atoms in unseen:
        atoms.calc = calc
    predicted.append(np.array([atoms.get_forces() for atoms in unseen]))
error = np.abs(predicted[1] - labels).mean()
print(f"force MAE {error:.3f} eV/Å; always zero: {np.abs(labels).mean():.3f} eV/Å")

# %% [markdown]
# More options (SO3net and SchNet as networks, noise of several sizes, QM9) are on the [page about SchNetPack](../how-to/schnetpack.md).
# There is also the other way round: SchNetPack's networks in this package's training, `NDeMPaiNN`.

# %% tags=["hide-input"]
assert np.array_equal(predicted[0], predicted[1]), "without the parts of NDeM the model predicts the same bits"
assert not any("NDeM" in type(m).__name__ for m in [*plain.input_modules, *plain.output_modules])
kept = [line for line in lines[0] if line not in lines[1]]
assert len(changes) < 0.5 * len(lines[0]), "most of the configuration is SchNetPack's own"
assert all("val_loss" in line or "property: energy" in line or "experiment:" in line for line in kept), kept
errors = {name: table["val_forces_mae"].to_numpy() for name, table in valid.items()}
assert all(values[-1] < 0.7 * values[0] for values in errors.values()), "both learn forces"
term = valid["ndem_md17"]["val_ndem_difference_mse"].to_numpy()
assert 0.2 < term[0] < 0.5, "it starts near the variance of the noise, 1/4"
assert term[0] < term[-1] < term.max() < size, "it follows the main forces, and is learned"
assert error < 0.7 * np.abs(labels).mean()
