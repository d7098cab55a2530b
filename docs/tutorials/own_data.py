# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # Fine-tune on your own frames
#
# The usual situation: many frames at a cheap level of theory, from somebody else or from yesterday, and few at the level that
# is wanted. Here both are extended XYZ files, a network learns the cheap level first, and is then fine-tuned on 30 frames of
# the other. The comparison that counts is with a network that starts from scratch on the same 30 frames.
#
# ## Two files
#
# Take yours, and skip this section. So that the page runs anywhere, the files are made here: geometries of ethanol at 500 K
# that come with the package, with labels of two semi-empirical methods by tblite (extra `xtb`). GFN1-xTB plays the cheap
# level, GFN2-xTB the expensive one. What is written is what a script around any other program would write.

# %%
# Pitfall: tblite must be imported before torch; some builds of torch bring an older OpenMP library than it needs.
from tblite.ase import TBLite

from pathlib import Path

import numpy as np
from ase.io import write

from ndem_zoo.datasets import read_sample


def labeled(frames, method: str) -> list:
    """The structures with `dft_energy` (eV) and `dft_forces` (eV/Å), as somebody's script may have called them."""
    calculator, result = TBLite(method=method, verbosity=0), []
    for atoms in frames:
        atoms = atoms.copy()
        atoms.calc = calculator
        atoms.info["dft_energy"] = atoms.get_potential_energy()
        atoms.arrays["dft_forces"] = atoms.get_forces()
        atoms.calc = None
        result.append(atoms)
    return result


whole = read_sample("ethanol")
order = np.random.default_rng(0).permutation(len(whole))
pick = [whole.atoms(int(i)) for i in order[:950]]
write("cheap.extxyz", labeled(pick[:600], "GFN1-xTB"))
write("wanted.extxyz", labeled(pick[600:], "GFN2-xTB"))
print(Path("wanted.extxyz").read_text()[:330])

# %% [markdown]
# ## Look at the files first
#
# Names of labels are not guessed: `energy_key` and `forces_key` say them. Energies and forces must be in eV and eV/Å.

# %%
from ndem_zoo import load_extxyz

names = {"energy_key": "dft_energy", "forces_key": "dft_forces"}
tasks, (cheap, cheap_valid, _), transformers = load_extxyz("cheap.extxyz", n_train=550, n_valid=50, **names)
tasks, (few, few_valid, test), transformers = load_extxyz("wanted.extxyz", n_train=30, n_valid=20, **names)
print(few.summary())

# %% [markdown]
# How far are the two levels apart? Total energies differ by a constant of some eV, which says nothing; what is
# left after it and the forces do.

# %%
same = labeled([test.atoms(i) for i in range(50)], "GFN1-xTB")
shift = np.array([atoms.info["dft_energy"] for atoms in same]) - test.targets["energy"][:50]
gap = np.abs(np.concatenate([atoms.arrays["dft_forces"] for atoms in same]) - test[:50].targets["forces"]).mean()
print(f"energies differ by {shift.mean():.2f} eV on average, and by {1e3 * shift.std():.0f} meV around that")
print(
    f"forces differ by {gap:.3f} eV/Å on average; their mean size is {np.abs(test.targets['forces']).mean():.3f} eV/Å"
)

# %% [markdown]
# ## Pre-train, fine-tune, and from scratch
#
# `fit(init_from=...)` takes backbone and heads from a model, fitted or saved. Reference energies are fitted anew, to the new
# labels, so that the constant between the levels does no harm; this is the question that users of other packages ask most.
# Fine-tuning has a smaller learning rate (here a fifth), and 200 steps, as training from scratch has, at its own rate.

# %%
from ndem_zoo import NDeMTorchMDNet


def network(**options) -> NDeMTorchMDNet:
    """A small one, so that the page is over in a minute."""
    return NDeMTorchMDNet(
        preset="md17_fast",
        objective="ndem",
        backbone_options={"hidden_channels": 32, "num_layers": 2},
        batch_size=8,
        warmup_steps=50,
        ema_decay=0.99,
        validate_every=25,
        progress=False,
        **options,
    )


pretrained = network(lr=3e-3).fit(cheap, cheap_valid, max_steps=500)
pretrained.save("pretrained")

steps = {"max_steps": 200}
tuned = {seed: network(lr=6e-4, seed=seed).fit(few, few_valid, init_from="pretrained", **steps) for seed in (0, 1)}
scratch = {seed: network(lr=3e-3, seed=seed).fit(few, few_valid, **steps) for seed in (0, 1)}

# %%
errors = {"not tuned at all": [pretrained.evaluate(test)]}
for name, models in {"from scratch": scratch, "fine-tuned": tuned}.items():
    errors[name] = [model.evaluate(test) for model in models.values()]
forces = {name: np.array([e["forces_mae"] for e in found]) for name, found in errors.items()}
energies = {name: np.array([e["energy_mae"] for e in found]) for name, found in errors.items()}
for name in errors:
    print(f"{name:17s} forces {forces[name].round(3)} eV/Å   energy {(1e3 * energies[name]).round(0)} meV")

# %% [markdown]
# "Not tuned at all" is the first model, asked for forces of the other level: it cannot be better than the distance between
# the levels. (Its energies are off by their constant.)

# %%
# %matplotlib inline
from ndem_zoo.plots import learning_curve_figure

histories = {
    f"{name}, seed {seed}": model.history_
    for name, models in (("scratch", scratch), ("tuned", tuned))
    for seed, model in models.items()
}
figure = learning_curve_figure(histories, against="step")
figure

# %% [markdown]
# What this shows, and what it does not:
#
# - **It saves time; it need not make the model better in the end.** With 1,500 steps in place of 200 (too long for this page; seed
#   0) the network from scratch came to 0.076 eV/Å, and the tuned one to 0.077. Below the distance between the levels everything
#   must come from the 30 frames. A larger network and more cheap frames may change that; look at the ends of both curves.
# - Energies gained little or nothing: their errors are those of a few dozen meV either way, since 30 energies say less than
#   810 force components.
# - The 500 steps before are not counted in "equal steps". They are paid once, and used for every fine-tuning.
# - Whatever your data are, train from scratch once as well: it is one line.
# - The backbone's options must be those of the first model; all others may differ, the objective too.
#   An element that the first model has not seen has an embedding without training.
#
# The tuned model is one like any other: `save`, `predict`, [the calculator](molecular_dynamics.py).

# %% tags=["hide-input"]
assert forces["fine-tuned"].mean() < 0.8 * forces["from scratch"].mean(), "pre-training pays here"
assert forces["fine-tuned"].max() < forces["from scratch"].min(), "with both seeds"
assert forces["not tuned at all"][0] > 0.8 * gap, "no model is better than the labels it learned"
assert energies["not tuned at all"][0] > 1.0, "the levels differ by a constant of many eV ..."
assert energies["fine-tuned"].max() < 0.1, "... which the reference energies take up"
