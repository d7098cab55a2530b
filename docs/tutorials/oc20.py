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
tasks, (train, held_out, _), _ = load_oc20("s2ef", "all", sample / "s2ef_train", n_train=3000, n_valid=25, n_test=0)
tasks, (others, _, _), _ = load_oc20("s2ef", "all", sample / "s2ef_val")
train, held_out, others

# %% [markdown]
# The warning is worth a thought: a random split puts frames of one relaxation on both sides. `held_out` is such a split, and
# `others` are whole relaxations that no training frame belongs to. Below, errors on both are compared.
#
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
    preset="oc20_tiny", objective="ndem", lr=4e-3, warmup_steps=10, unknown_elements="warn", progress=False, seed=0
)
model.fit(train, max_steps=100)
print(f"{model.potential_.n_parameters:,} parameters, last losses:")
print({name: round(value, 2) for name, value in model.history_[-1].items() if name.startswith("train_")})

# %% [markdown]
# ## Errors
#
# Over free atoms, and beside the errors of knowing nothing: the mean energy, and no forces. In a sample this small the other
# relaxations contain elements that no training frame has; that would be an error without `unknown_elements="warn"`.


# %%
def report(name, frames):
    errors, free = model.evaluate(frames), ~frames.fixed
    guess = np.abs(frames.targets["energy"] - energy.mean()).mean()
    zeros = np.abs(frames.targets["forces"][free]).mean()
    print(
        f"{name}: energy {errors['energy_mae']:.2f} eV (mean: {guess:.2f}), "
        f"forces {errors['forces_mae']:.4f} eV/Å (zeros: {zeros:.4f}), cosine {errors['forces_cosine']:.2f}"
    )
    return errors["energy_mae"] / guess


same = report("held out, same relaxations", held_out)
new = report("other relaxations         ", others[::40])

# %% [markdown]
# A minute of training knows the energies of relaxations that it has seen, says little about new ones, and has hardly begun
# with the forces. This is why OC20's validation sets are split by system, adsorbate and catalyst, why one million frames
# of few relaxations are less than they seem, and why a random split of trajectories flatters.
#
# What NDeM, DeNS and supervised training reach on this sample with equal time stands in
# [the benchmarks](../reproducing.md).

# %%
assert same < 0.6
assert same < new
