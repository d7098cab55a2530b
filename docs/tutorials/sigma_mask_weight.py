# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # Choosing sigma, mask and weight
#
# NDeM has three settings that one has to choose: how far atoms are displaced (`sigma`), how many of them (`ratio`), and how
# much the auxiliary term counts (`weight`). For `sigma` there is a closed form, and there are floors that say what a loss
# can reach at all; both need nothing but the training forces. Then ten very short trainings show what the settings do, and
# how to read `history_`. The theory stands in [NDeM](../theory/ndem.md).
#
# ## Sigma: the closed form
#
# The target $\epsilon/\sigma$ asserts the curvature $S/\sigma$, with $S$ the root mean square of the forces. In a thermal
# sample the mean curvature is $S^2/kT$. Both agree for $\sigma^\ast=kT/S$.

# %%
# %matplotlib inline
import numpy as np
from matplotlib.figure import Figure

from ndem_zoo import NDeMTorchMDNet, load_sample
from ndem_zoo.physics import BOLTZMANN
from ndem_zoo.plots import COLORS

tasks, (train, valid, test), transformers = load_sample("ethanol")
kT = BOLTZMANN * 500.0  # eV; the temperature of the simulation
force_rms = np.sqrt(np.square(train.targets["forces"]).mean())
sigma_star = kT / force_rms
print(f"force rms {force_rms:.3f} eV/Å, kT {kT:.4f} eV: sigma* = {sigma_star:.3f} Å; the paper takes 0.05")

# %% [markdown]
# ## Sigma: what can be learned at all
#
# A head that sees $X+\epsilon$ cannot know $\epsilon$ exactly: where thermal motion along a mode is wide compared with
# $\sigma$, nobody can tell displacement from motion. In the harmonic approximation the best possible mean square error
# follows from the curvatures $k$ of the modes, and those from the forces alone: frames are turned onto each other, and
# $\langle FF^{\mathsf T}\rangle/kT$ is the mean Hessian.
#
# With $r=s^2/(s^2+\sigma^2)$ and $s^2=kT/k$, the floor is the mean of $r$ for Noisy Nodes, and of
# $(k/S-1/\sigma)^2\,r\,\sigma^2$ for NDeM. The three translations are left out: they are taken out of the noise when all
# atoms are moved.

# %%
frames, forces = (a.reshape(len(train), 9, 3) for a in (train.pos, train.targets["forces"]))


def turned(x, vectors):
    """`vectors` in the frame in which the geometries x fit best onto the first one (Kabsch's rotation)."""
    centered = x - x.mean(axis=1, keepdims=True)
    u, _, vt = np.linalg.svd(np.einsum("sia,ib->sab", centered, centered[0]))
    u[..., -1] *= np.sign(np.linalg.det(u @ vt))[:, None]  # no mirror images
    return vectors @ (u @ vt)


flat = turned(frames, forces).reshape(len(frames), 27)
curvatures = np.linalg.eigvalsh(flat.T @ flat / len(flat) / kT)[3:].clip(min=0)  # eV/Å²; without the translations


def floors(sigma):
    """Smallest mean square per component of Noisy Nodes and NDeM with all atoms moved, for sigma in Å."""
    r = kT / (kT + curvatures * sigma**2)
    return r.sum() / 27, ((curvatures / force_rms - 1 / sigma) ** 2 * r * sigma**2).sum() / 27


for sigma in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
    print("sigma {:5.3f} Å: Noisy Nodes {:.2f}, NDeM {:.2f}".format(sigma, *floors(sigma)))

# %% [markdown]
# A Noisy Nodes loss of 0.88 at 0.005 Å is no bug, it is all that there is: a head that knows nothing has 0.89 (24 of 27
# components are noise). And a training loss *below* the floor would mean that the head remembers the frames.
#
# ## Ten short trainings
#
# The same seed, network and steps throughout; three seeds of plain supervised training show how much of a difference is
# chance. The network is tiny and 150 steps are far too few for a good model: what follows shows *mechanisms*, and no ranking.

# %%
STEPS, SIGMA = 150, 0.05


def run(objective, seed=0, weight=1.0, **options):
    """A tiny model after a few steps."""
    model = NDeMTorchMDNet(
        preset="md17_fast",
        objective=objective,
        objective_options=options,
        weight=weight,
        backbone_options={"hidden_channels": 32, "num_layers": 1},
        batch_size=4,
        lr=4e-3,
        warmup_steps=30,
        ema_decay=0.98,
        validate_every=25,
        max_steps=STEPS,
        seed=seed,
        progress=False,
    )
    return model.fit(train, valid[:25])


models = {f"supervised, seed {seed}": run("supervised", seed) for seed in (0, 1, 2)}
for sigma in (0.01, SIGMA, 0.2):
    models[f"ndem, sigma {sigma}, all atoms"] = run("ndem", sigma=sigma, ratio=1.0)
models["ndem, sigma 0.05, a quarter of the atoms"] = run("ndem", sigma=SIGMA, ratio=0.25)
models["the same, weight 30"] = run("ndem", weight=30.0, sigma=SIGMA, ratio=0.25)
models["the same, weight 30, grad_main='flow'"] = run("ndem", weight=30.0, sigma=SIGMA, ratio=0.25, grad_main="flow")
models["noisy nodes, sigma 0.05, all atoms"] = run("noisy_nodes", sigma=SIGMA, ratio=1.0)
error = {name: 1e3 * model.evaluate(test[:250], ["forces_mae"])["forces_mae"] for name, model in models.items()}
for name, value in error.items():
    print(f"{name:42s} force MAE {value:5.0f} meV/Å")

# %%
seeds = [value for name, value in error.items() if name.startswith("supervised")]
figure = Figure(figsize=(9.0, 3.6), layout="constrained")
axis = figure.subplots()
names = [name for name in error if not name.startswith("supervised")]
axis.axvspan(min(seeds), max(seeds), color="0.85", label="supervised: range of three seeds", zorder=0)
axis.axvline(error["supervised, seed 0"], color="0.4", linewidth=1, label="supervised, same seed as the others")
axis.plot([error[name] for name in names], range(len(names)), "o", color=COLORS[0], markersize=7)
axis.set_yticks(range(len(names)), names)
axis.invert_yaxis()
axis.set(xlabel="force MAE on test frames (meV/Å)", xlim=(0, None))
axis.grid(axis="y", color="0.92")
axis.legend(frameon=False, loc="upper right", fontsize=9)
figure

# %% [markdown]
# What these runs show:
#
# - `sigma` and `ratio`: with weight 1 all runs stay near the supervised ones; when this was written, all of them within the
#   range of the three seeds. NDeM neither helps nor harms here, and no choice can be made from runs like these; a longer
#   comparison with paired seeds stands in [the benchmarks](../reproducing.md).
# - `weight`: at 30, as much as the forces have, the auxiliary task takes the network away from the main one, and the error
#   grows. With the default `grad_main="stop"` theory says that only time is lost, since the clean forces get no gradient from
#   the term; with `"flow"` the forces themselves are pulled toward the curvature $1/\sigma$, and the error is larger still
#   ([why](../theory/ndem.md#gradient-through-the-clean-forces)).
#
# ## Reading the history
#
# Each row of `history_` has the terms as they enter the sum, weights included, averaged since the row before. To compare a
# term with a floor, undo two factors: the `weight`, and 3 for NDeM's sum over x, y, z (`reduction="atom_sum_xyz"`); the
# term of Noisy Nodes is a mean over components.

# %%
print({name: round(value, 4) for name, value in models["ndem, sigma 0.05, all atoms"].history_[-1].items()})


def per_component(model):
    """Steps, and the auxiliary term per component without its weight."""
    name, factor = ("train_ndem", 3.0) if model.objective == "ndem" else ("train_denoising", 1.0)
    rows = model.history_
    return np.array([(row["step"], row[name] / (factor * model.objective_.weight)) for row in rows]).T


figure = Figure(figsize=(11.0, 4.2), layout="constrained")
left, right = figure.subplots(1, 2)
grid = np.geomspace(0.004, 0.25, 80)
noisy_nodes, ndem = np.array([floors(sigma) for sigma in grid]).T
left.plot(grid, ndem, color=COLORS[0], label="floor, NDeM")
left.plot(grid, noisy_nodes, color=COLORS[1], label="floor, Noisy Nodes")
for name, model in models.items():
    if name.endswith("all atoms"):
        color = COLORS[0] if model.objective == "ndem" else COLORS[1]
        title = "NDeM" if model.objective == "ndem" else "Noisy Nodes"
        label = f"{title}, reached in {STEPS} steps" if f"sigma {SIGMA}" in name else None
        left.plot(model.objective_options["sigma"], per_component(model)[1][-1], "o", color=color, label=label)
left.axvline(sigma_star, color="0.6", linewidth=0.9, linestyle="--", label="σ* = kT / force rms")
left.set(xscale="log", xlabel="σ (Å)", ylabel="mean square per component", ylim=(0, None))
left.set_xticks([0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
left.xaxis.set_major_formatter("{x:g}")
left.xaxis.set_minor_formatter("")
left.set_title("all atoms displaced")

for color, (ratio, name) in zip(
    COLORS[2:], ((1.0, "ndem, sigma 0.05, all atoms"), (0.25, "ndem, sigma 0.05, a quarter of the atoms")), strict=False
):
    right.plot(*per_component(models[name]), ".-", color=color, label=f"ratio {ratio:g}")
    noise = ratio if ratio < 1 else 24 / 27  # what the noise adds to the mean square
    for level, style in ((1 + noise, ":"), (noise, "--")):
        right.axhline(level, color=color, linestyle=style, linewidth=0.9)
right.plot([], [], ":", color="0.3", linewidth=0.9, label="knows nothing")
right.plot([], [], "--", color="0.3", linewidth=0.9, label="knows F(X), not the noise")
right.set(xlabel="training steps", ylim=(0, 2.9), title="NDeM's term in the course of training, σ = 0.05 Å")
for axis in (left, right):
    axis.legend(frameon=False, fontsize=8.5)
figure

# %% [markdown]
# Landmarks for NDeM's term, per component: a head that always says 0 has 1 + `ratio` (the forces' own variance is 1 in these
# units, the noise adds its share); one that knows the clean force and nothing of the noise has `ratio`; the floor lies
# below. (With all atoms the share of the noise is 24/27, because of the translations.) In the first steps the term is small,
# because the network's own forces $f(X)$, which stand in for $F(X)$, are still small. A term that stays high is not broken:
# telling noise from motion is the slow part, and 150 steps do not get there. At $\sigma=0.2$ Å the term is furthest from its
# floor, and the floor itself is a guess: with such displacements the molecule is not harmonic.
#
# And it need not get there: what counts is the error on validation data (`valid_forces_mae`), and `valid_loss` has the
# supervised terms alone, so the auxiliary term plays no part in choosing the best weights.
#
# In short:
#
# 1. Compute $\sigma^\ast$ from your training forces and stay within a factor of two. Far below there is nothing to learn; far
#    above the linear relation ends ([off equilibrium](off_equilibrium.py)).
# 2. Leave `weight` near 1, and raise it only if `valid_forces_mae` says so.
# 3. `ratio=0.25` leaves most of each structure as it is, and keeps the mean force change small; the paper names no value.
# 4. Compare with `objective="supervised"` and `"noisy_nodes"`, and with more than one seed.

# %% tags=["hide-input"]
last = {name: per_component(model)[1][-1] for name, model in models.items() if not name.startswith("supervised")}
zero = np.abs(test[:250].targets["forces"]).mean() * 1e3
assert 0.04 < sigma_star < 0.05, "the closed form, for this sample"
assert np.all(np.diff([floors(sigma)[0] for sigma in grid]) < 0), "less noise is harder to see"
assert 0.01 < grid[np.argmin(ndem)] < 0.05, "NDeM's floor has its minimum near sigma*, not at 0"
assert abs(floors(0.005)[0] - 24 / 27) < 0.02, "at small sigma nobody can tell noise from motion"
assert max(error.values()) < 0.9 * zero and max(seeds) < 0.4 * zero, "all runs learn something"
assert all(value < 1.3 * max(seeds) for name, value in error.items() if "weight" not in name), "weight 1 does no harm"
stop, flow = (error[name] for name in names if "weight 30" in name)
assert flow > stop > 1.2 * max(seeds), "a large weight does, and more so with flowing gradient"
assert last["noisy nodes, sigma 0.05, all atoms"] > 0.9 * floors(SIGMA)[0], "no loss below its floor"
assert all(last[f"ndem, sigma {sigma}, all atoms"] > 0.9 * floors(sigma)[1] for sigma in (0.01, SIGMA, 0.2))
