# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # OC20: adsorbates on surfaces
#
# The Open Catalyst 2020 dataset holds relaxations of molecules on metal slabs, and its task S2EF asks for the energy and the
# forces of every structure on the way: far from equilibrium, which is what NDeM is made for. Here a tiny EquiformerV2 is
# trained on frames of some relaxations and tested on others, on a laptop's CPU, in minutes.
#
# The frames are a genuine sample of 24 relaxations in the official text layout, `N.extxyz.xz` beside `N.txt.xz`
# (OC20, CC BY 4.0; Chanussot et al., ACS Catal. 11, 6059, 2021). The same call reads the official downloads
# (`load_oc20("s2ef", "200k")`), LMDB files of either generation, and `.aselmdb`. Of 2 million frames one would make a store
# first, once: `ndem-zoo convert`.

# %%
import os
from pathlib import Path

import numpy as np

from ndem_zoo import NDeMEquiformerV2, load_oc20

sample = Path(os.environ["NDEM_ZOO_SHARED_DATA"]) / "oc20"
tasks, (train, _, _), _ = load_oc20("s2ef", split="all", data_dir=sample / "s2ef_train")
tasks, (valid, _, _), _ = load_oc20("s2ef", split="all", data_dir=sample / "s2ef_val")
train, valid

# %% [markdown]
# ## What is in a frame
#
# The files hold total energies of DFT, which no model is trained on: the loader subtracts the reference energy of slab and
# molecule that stands beside each frame, and what is left is the adsorption energy. Atoms below the surface are fixed.
# Their forces are there, and not 0; they count neither in training nor in errors, and noise never moves them.

# %%
energy, forces = train.targets["energy"], train.targets["forces"]
atoms = train.atoms(0)
print(
    atoms.get_chemical_formula(),
    f"adsorption energy {energy[0]:.2f} eV,",
    f"{train.fixed.mean():.0%} of all atoms are fixed",
)
print(
    f"energies: {energy.mean():.2f} ± {energy.std():.2f} eV; free atoms' forces: {np.abs(forces[~train.fixed]).mean():.3f} eV/Å"
)

# %% [markdown]
# ## Training
#
# EquiformerV2 sees the 20 nearest atoms within 12 Å, periodic images included, and has a head for forces: they are not the
# gradient of the energy (`forces="direct"`), which halves the cost. The preset `oc20_tiny` is the published recipe (loss,
# weights, normalization, learning rates) with a network that a CPU can train; `oc20_31M`, `oc20_83M` and `oc20_153M` are
# the published sizes.
#
# NDeM's head sees the same frames with atoms displaced by 0.1 Å, and learns by how much the forces change.

# %%
model = NDeMEquiformerV2(
    preset="oc20_tiny", objective="ndem", lr=2e-3, warmup_steps=10, unknown_elements="warn", progress=False, seed=0
)
model.fit(train, max_steps=40)
print(f"{model.potential_.n_parameters:,} parameters, last losses:")
print({name: round(value, 2) for name, value in model.history_[-1].items() if name.startswith("train_")})

# %% [markdown]
# ## Errors
#
# On relaxations that were not trained on, over free atoms, and beside the errors of knowing nothing. In a sample this small
# they contain elements that no training frame has; that would be an error without `unknown_elements="warn"`.

# %%
some = valid[::40]
errors = model.evaluate(some)
free = ~some.fixed
nothing = np.abs(some.targets["forces"][free]).mean()
guess = np.abs(some.targets["energy"] - energy.mean()).mean()
print(f"forces: {errors['forces_mae']:.4f} eV/Å (zeros: {nothing:.4f}), cosine {errors['forces_cosine']:.2f}")
print(f"energy: {errors['energy_mae']:.2f} eV (the mean: {guess:.2f})")

# %% [markdown]
# A minute teaches directions, not magnitudes, and four relaxations say nothing about OC20 as a whole: good models need some
# million frames. What NDeM, DeNS and supervised training reach with equal time is in
# [the benchmarks](../reproducing.md).

# %%
assert errors["forces_cosine"] > 0.05
