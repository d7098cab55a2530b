# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # Why denoising fails off equilibrium
#
# Denoising displaces a structure by $\epsilon$ and lets a network guess the way back, $-\epsilon$. At a minimum of the energy
# that is nearly the direction of the force, so a denoiser learns something about forces without labels. This page looks
# at what becomes of the argument away from a minimum, on a surface that one can draw and on molecular dynamics of ethanol;
# checks the relation that NDeM puts in its place against true Hessians; and says where the criticism of denoising does
# *not* hold. The derivations stand in [NDeM](../theory/ndem.md) and are not repeated.
#
# ## A surface that one can draw
#
# A double well in x, a parabola in y, in units of $kT$ and without dimensions. Energy, force and Hessian are known exactly.

# %%
# %matplotlib inline
import numpy as np
from matplotlib.figure import Figure

from ndem_zoo.plots import COLORS

BARRIER, STIFFNESS = 5.0, 80.0  # kT; kT per unit of length squared


def energy(x):
    """Energy of the points x (..., 2) in kT."""
    return BARRIER * (x[..., 0] ** 2 - 1) ** 2 + 0.5 * STIFFNESS * x[..., 1] ** 2


def force(x):
    """-dE/dx, shape (..., 2)."""
    return np.stack([-4 * BARRIER * x[..., 0] * (x[..., 0] ** 2 - 1), -STIFFNESS * x[..., 1]], axis=-1)


def cosine(a, b):
    """Cosine of the angle between vectors, over the last axis."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


minimum, slope = np.array([1.0, 0.0]), np.array([1.25, 0.2])
for name, point in (("minimum", minimum), ("slope", slope)):
    curvature = (float(4 * BARRIER * (3 * point[0] ** 2 - 1)), STIFFNESS)
    print(f"{name}: {energy(point):.1f} kT, |force| {np.linalg.norm(force(point)):.1f}, curvatures {curvature}")

# %% [markdown]
# Now points at a distance of 0.03 around each of the two; the slope is no exotic place, thermal motion visits it. Blue
# arrows point back to the center, which is what a denoiser has to say. Beside them: the force where one is, and that force
# *minus the force at the center*. Arrows show directions only.

# %%
angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
ring = 0.03 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
plane = np.stack(np.meshgrid(np.linspace(-1.6, 1.6, 240), np.linspace(-0.45, 0.45, 120)), axis=-1)


def arrows(axis, at, vectors, color, label, unit, **style):
    """Arrows from the points `at`; a vector of length `unit` is a tenth of the axis wide."""
    axis.quiver(*at.T, *vectors.T, color=color, label=label, angles="xy", scale=10 * unit, scale_units="width", **style)


def direction(vectors):
    """Unit vectors."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def contours(axis):
    """The surface up to 12 kT."""
    axis.contour(*np.moveaxis(plane, -1, 0), energy(plane), levels=range(1, 13), colors="0.75", linewidths=0.8)
    axis.set(xlabel="x", ylabel="y")


figure = Figure(figsize=(10.5, 7.2), layout="constrained")
axes = figure.subplot_mosaic([["all", "all"], ["minimum", "slope"]], height_ratios=[1, 1.6])
contours(axes["all"])
for name, point in (("minimum", minimum), ("slope", slope)):
    axes["all"].plot(*point, "ko", markersize=5)
    axes["all"].annotate(name, point, xytext=(6, 5), textcoords="offset points")
    axis, moved = axes[name], point + ring
    change = force(moved) - force(point)
    arrows(axis, moved, direction(-ring), COLORS[0], "−ε: what a denoiser has to say", 0.7, width=0.024, alpha=0.35)
    arrows(axis, moved, direction(force(moved)), COLORS[1], "F(X+ε)", 0.6, width=0.009)
    arrows(axis, moved, direction(change), COLORS[2], "F(X+ε) − F(X)", 0.9, width=0.007)
    axis.plot(*point, "ko", markersize=4)
    axis.set(title=f"around the {name}", aspect="equal", xlabel="x", ylabel="y")
    axis.set(xlim=point[0] + [-0.045, 0.045], ylim=point[1] + [-0.045, 0.045])
figure.legend(*axes["slope"].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
figure

# %% [markdown]
# Around the minimum the three agree, up to the different stiffness of x and y. On the slope the force hardly cares where on
# the circle one stands: it points down the slope, and half of the blue arrows point up. The *difference* of forces does not
# know that there is a slope at all. That is NDeM's observation: $F(X)-F(X+\epsilon)=H\epsilon$ wherever $X$ lies.
#
# ## But a denoiser sees many frames
#
# A network is not asked for one $\epsilon$; what it can learn is the *average* of $-\epsilon$ over all frames that could have
# been displaced to where it is. So here is the ideal denoiser, without any network: a table. Many samples are displaced by
# $\sigma=0.1$, and in each cell the mean of $-\epsilon$ is taken.
#
# The samples come from three sources: thermal ones, as molecular dynamics makes them; thermal ones of *another* surface,
# whose valley lies 0.15 higher (as in data whose labels were computed anew with another method); and points spread evenly,
# as somebody might choose them.

# %%
rng = np.random.default_rng(0)
N, NOISE, CELL = 400_000, 0.1, 0.1
line = np.linspace(-1.8, 1.8, 2001)
weight = np.exp(-BARRIER * (line**2 - 1) ** 2)
thermal = np.stack([rng.choice(line, N, p=weight / weight.sum()), rng.normal(scale=STIFFNESS**-0.5, size=N)], axis=-1)
samples = {
    "thermal samples": thermal,
    "thermal samples of another surface": thermal + [0.0, 0.15],
    "points spread evenly": rng.uniform([-2.1, -0.95], [2.1, 0.95], size=(N, 2)),
}


def ideal_denoiser(x):
    """Mean of -epsilon in each cell that has enough samples: (cells, 2) centers and (cells, 2) means."""
    epsilon = NOISE * rng.normal(size=x.shape)
    cell = np.floor((x + epsilon) / CELL).astype(int)
    cells, index, counts = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
    index = index.reshape(-1)
    mean = np.stack([np.bincount(index, -epsilon[:, k]) / counts for k in range(2)], axis=-1)
    centers = (cells + 0.5) * CELL
    inside = (counts > 200) & (np.abs(centers) < [1.5, 0.4]).all(axis=1)
    return centers[inside], mean[inside]


figure = Figure(figsize=(9.5, 9.0), layout="constrained")
agreement = {}
for axis, (name, x) in zip(figure.subplots(3, 1, sharex=True), samples.items(), strict=True):
    at, mean = ideal_denoiser(x)
    agreement[name] = cosine(mean, force(at)).mean()
    contours(axis)
    arrows(axis, at, force(at), COLORS[1], "force", 60, width=0.0034)
    arrows(axis, at, mean / NOISE**2, COLORS[0], "ideal denoiser, times kT/σ²", 60, width=0.0019)
    axis.set_title(f"{name}: mean cosine to the force {agreement[name]:.2f}", fontsize=11)
figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
figure

# %% [markdown]
# With thermal samples the ideal denoiser points along the force everywhere, although hardly any sample lies in a minimum:
# denoising is score matching to the density of the samples, and the Boltzmann density knows the force. (It is shorter,
# because the noise smooths the density.) So "denoising fails off equilibrium" is true of single frames and wrong of a
# thermal ensemble. What breaks it is where the frames come from. From another surface it learns the forces of that other
# surface; from evenly spread points it learns nothing.
#
# NDeM's head does not escape from averages either: it, too, sees only $X+\epsilon$. But the labels $F(X)$ take part in its
# average, and they do not depend on how frames were chosen ([the key identity](../theory/ndem.md#the-key-identity)).
#
# ## Ethanol
#
# The same questions for a molecule at 500 K. Where genuine MD17 frames lie at hand they are taken, else those that come with
# the package (GFN2-xTB). Forces and Hessians at displaced geometries come from MMFF94, which follows the labels well enough
# for questions of geometry, and of which thousands take a second.

# %%
import os
import warnings
from pathlib import Path

from ase.data import covalent_radii
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers as mmff

from ndem_zoo import load_md17, load_sample
from ndem_zoo.physics import BOLTZMANN, KCAL_PER_MOL

genuine = Path(os.environ.get("NDEM_ZOO_SHARED_DATA", ".")) / "md17"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that this is a part of the official file, which does no harm here
    tasks, (train, valid, test), transformers = (
        load_md17("ethanol", data_dir=genuine) if (genuine / "md17_ethanol.npz").is_file() else load_sample("ethanol")
    )
z, frames, labels = (a.reshape(len(train), 9, -1) for a in (train.z, train.pos, train.targets["forces"]))
z, frames, labels = z[0, :, 0], frames[:60], labels[:60]
pairs = [(i, j) for i in range(9) for j in range(i)]
reach = {(i, j): 1.25 * (covalent_radii[z[i]] + covalent_radii[z[j]]) for i, j in pairs}
bonds = [(i, j) for i, j in pairs if np.linalg.norm(frames[:, i] - frames[:, j], axis=-1).mean() < reach[i, j]]

molecule = Chem.RWMol()
for number in z.tolist():
    molecule.AddAtom(Chem.Atom(number))
for i, j in bonds:
    molecule.AddBond(i, j, Chem.BondType.SINGLE)
Chem.SanitizeMol(molecule)
molecule.AddConformer(Chem.Conformer(9))
field = mmff.MMFFGetMoleculeForceField(molecule, mmff.MMFFGetMoleculeProperties(molecule))


def mmff_forces(x):
    """MMFF94 forces in eV/Å of geometries x (..., 9, 3) in Å."""
    found = []
    for flat in x.reshape(-1, 27).tolist():
        field.CalcEnergy(flat)  # Pitfall: without it CalcGrad takes distances of an earlier geometry
        found.append(field.CalcGrad(flat))
    return -KCAL_PER_MOL * np.array(found).reshape(x.shape)


def mmff_hessians(x, h=1e-3):
    """Hessians (..., 27, 27) in eV/Å² by central differences of the forces; symmetric to rounding."""
    steps = h * np.eye(27).reshape(27, 9, 3)
    columns = (mmff_forces(x[..., None, :, :] - steps) - mmff_forces(x[..., None, :, :] + steps)) / (2 * h)
    return columns.reshape(*x.shape[:-2], 27, 27)


hessians = mmff_hessians(frames)
asymmetry = np.abs(hessians - hessians.swapaxes(-1, -2)).max() / np.abs(hessians).max()
correlation = np.corrcoef(mmff_forces(frames).ravel(), labels.ravel())[0, 1]
print(f"{train.name}: {len(frames)} frames, correlation of MMFF94's forces with the labels {correlation:.3f}")
print(f"{(np.linalg.eigvalsh(hessians) < -0.1).mean():.1%} of the Hessians' eigenvalues are negative: not minima")

# %% [markdown]
# ### Angles
#
# Between 27-dimensional vectors now: chance gives 90° ± 11°. Each frame is displaced 20 times with Gaussian noise on all
# atoms, at two strengths, and so is the nearest minimum of MMFF94.

# %%
start = frames[0].ravel().tolist()
for i, position in enumerate(frames[0].tolist()):
    molecule.GetConformer().SetAtomPosition(i, position)
field = mmff.MMFFGetMoleculeForceField(molecule, mmff.MMFFGetMoleculeProperties(molecule))
field.Minimize(maxIts=2000, forceTol=1e-6)
places = {"minimum": molecule.GetConformer().GetPositions()[None], "frames at 500 K": frames}


def displaced(x, sigma, draws):
    """Displacements (draws, S, 9, 3) without net translation, and the forces there."""
    epsilon = sigma * rng.normal(size=(draws, *x.shape))
    epsilon -= epsilon.mean(axis=-2, keepdims=True)
    return epsilon, mmff_forces(x + epsilon)


def angles_to_noise(x, sigma, draws):
    """Angles in degrees between -epsilon and the force there, and between -epsilon and the change of the force."""
    epsilon, there = displaced(x, sigma, draws)
    flat = -epsilon.reshape(-1, 27)
    vectors = {"F(X+ε)": there, "F(X+ε) − F(X)": there - mmff_forces(x)}
    return {name: np.degrees(np.arccos(cosine(flat, v.reshape(-1, 27)))) for name, v in vectors.items()}


figure = Figure(figsize=(10.5, 5.6), layout="constrained")
median = {}
for row, sigma in zip(figure.subplots(2, 2, sharex=True, sharey=True), (0.005, 0.05), strict=True):
    for axis, (name, x) in zip(row, places.items(), strict=True):
        for color, (what, found) in zip(COLORS[1:], angles_to_noise(x, sigma, 1200 // len(x)).items(), strict=False):
            median[name, sigma, what] = np.median(found)
            axis.hist(found, bins=np.arange(0, 181, 4), color=color, alpha=0.6, density=True, label=f"−ε and {what}")
        axis.axvline(90, color="0.35", linewidth=0.8)
        axis.set_title(f"{name}, σ = {sigma} Å", fontsize=11)
        axis.set(xlabel="angle (degrees)" if sigma == 0.05 else "", xticks=range(0, 181, 30), yticks=[])
figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
figure

# %% [markdown]
# At the minimum the two histograms coincide; it is the same vector. Off equilibrium, with little noise, the force is all but
# perpendicular to the noise: the direction that a denoiser has to give says nothing about the force of *this* frame, while
# the change of the force keeps its angle. With the paper's $\sigma=0.05$ Å the difference shrinks, because such noise
# changes the forces by more than their thermal size, so that most of $F(X+\epsilon)$ is noise too.
#
# The angle is far from 0 even at the minimum. It would be 0 if the Hessian were isotropic; it is about 50°, and its squared
# cosine, 0.4, is the share of the force change along the noise. What that means follows.
#
# ### The relation against true Hessians
#
# Four models of the curvature: the frame's own Hessian; one stiffness for each kind of bond, along the bond; one number for
# each element; one number. Their constants are fitted once, to the Hessians; the noise plays no part in it. Then we ask
# how much of $F(X)-F(X+\epsilon)$ each explains (1 minus the squared error over the square). The shares of the force change
# are a little larger than those of $\lVert H\rVert^2$, because the noise leaves out translations, along which nothing happens.

# %%
kinds = sorted({(int(z[j]), int(z[i])) for i, j in bonds})
elements = sorted(set(z.tolist()))


def spring_models(x):
    """For each kind of bond the Hessian (27, 27) of springs of stiffness 1 along those bonds."""
    found = np.zeros((len(kinds), 9, 3, 9, 3))
    for i, j in bonds:
        u = (x[i] - x[j]) / np.linalg.norm(x[i] - x[j])
        k, block = kinds.index((int(z[j]), int(z[i]))), np.outer(u, u)
        for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            found[k, a, :, b, :] += sign * block
    return found.reshape(len(kinds), 27, 27)


def fitted(parts):
    """The combination of the parts (S, K, 27, 27) that is nearest to the Hessians, and its constants in eV/Å²."""
    design = parts.transpose(0, 2, 3, 1).reshape(-1, parts.shape[1])
    constants = np.linalg.lstsq(design, hessians.ravel(), rcond=None)[0]
    return np.einsum("k,skab->sab", constants, parts), constants


def repeated(parts):
    """The same parts (K, 27, 27) for every frame."""
    return np.broadcast_to(parts, (len(frames), *parts.shape))


of_element = np.stack([np.diag(np.repeat(z == e, 3).astype(float)) for e in elements])
springs, _ = fitted(np.stack([spring_models(x) for x in frames]))
by_element, c_elements = fitted(repeated(of_element))
isotropic, (c,) = fitted(repeated(np.eye(27)[None]))
models = {
    "true Hessian": hessians,
    "springs along bonds": springs,
    "one number per element": by_element,
    "one number, cε": isotropic,
}
share = {name: 1 - np.square(model - hessians).sum() / np.square(hessians).sum() for name, model in models.items()}
print({name: f"{value:.1%} of |H|²" for name, value in share.items()})
print(f"c = {c / KCAL_PER_MOL:.0f} kcal/mol/Å²; from the labels alone, <F²>/kT:", end=" ")
print(f"{np.square(train.targets['forces']).mean() / (BOLTZMANN * 500) / KCAL_PER_MOL:.0f}")

# %%
sigmas = np.array([0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2])
explained = {name: [] for name in models}
relative, toward = [], {name: [] for name in places}
for sigma in sigmas:
    epsilon, there = displaced(frames, sigma, 10)
    change = (mmff_forces(frames) - there).reshape(10, -1, 27)
    for name, model in models.items():
        error = change - np.einsum("sab,dsb->dsa", model, epsilon.reshape(10, -1, 27))
        explained[name].append(1 - np.square(error).sum() / np.square(change).sum())
    relative.append(np.sqrt(np.square(change).mean() / np.square(labels).mean()))
    for name, x in places.items():
        toward[name].append(np.cos(np.radians(angles_to_noise(x, sigma, 300 // len(x))["F(X+ε)"])).mean())

figure = Figure(figsize=(11.5, 4.4), layout="constrained")
left, right = figure.subplots(1, 2)
for color, (name, values) in zip(COLORS, explained.items(), strict=False):
    left.plot(sigmas, values, "o-", color=color, label=name, markersize=4)
left.set(title="explained share of F(X) − F(X+ε)", ylim=(0, 1.03))
for color, (name, values) in zip(COLORS[4:], toward.items(), strict=False):
    right.plot(sigmas, values, "o-", color=color, label=name, markersize=4)
right.plot(sigmas, relative, "k--", linewidth=1, label="rms change of the forces / rms force")
right.set(title="mean cosine of −ε and F(X+ε)", ylim=(0, 1.5))
for axis in (left, right):
    axis.set(xscale="log", xlabel="σ of the displacement (Å)", xticks=[0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.axvline(0.05, color="0.75", linewidth=0.8, zorder=0)
    axis.legend(frameon=False, fontsize=9, loc="lower left" if axis is left else "upper left")
figure

# %%
ends = sigmas[np.array(explained["true Hessian"]) < 0.95][0]
print(f"the linear relation with the true Hessian explains less than 95 % from σ = {ends:g} Å on")
print(f"at σ = 0.05 Å forces change by {relative[4]:.1f} times their thermal size")

# %% [markdown]
# Reading the left panel from the right: with displacements of 0.2 Å no Hessian helps, bonds are not springs there. Below
# some 0.02 Å the relation holds, with the true Hessian. With **one number** it explains about a third at any $\sigma$, and
# not because of the linearization: stiff bonds have a direction, and a number has none. Springs along bonds, four constants,
# recover most of it.
#
# The right panel is the criticism of denoising in one curve: the cosine at the minimum does not depend on $\sigma$; for
# thermal frames it goes to 0 with $\sigma$, and catches up where the noise has drowned the force.
#
# What to take away:
#
# - For a *single* frame off equilibrium, the denoising direction says nothing about the force; the difference of forces
#   obeys $H\epsilon$ there as everywhere.
# - For an *ensemble* that was sampled with the potential that made the labels, denoising still learns forces. That includes
#   MD17. Whether NDeM helps there is a question for [measurements](../reproducing.md), not for this page.
# - NDeM's one number is about a third of the curvature, and holds for small $\sigma$ only.
#   [Choosing sigma, mask and weight](sigma_mask_weight.py) goes on from here.

# %% tags=["hide-input"]
assert np.abs(cosine(-ring, force(slope + ring))).min() < 0.2, "on a slope some displacements are perpendicular"
assert cosine(-ring, force(slope + ring)).min() < -0.8, "and some denoise uphill"
assert cosine(-ring, force(slope + ring) - force(slope)).min() > 0.98, "the difference does not know the slope"
assert agreement["thermal samples"] > 0.95, "averaged over thermal samples, denoising gives forces"
assert agreement["thermal samples of another surface"] < 0.8 > abs(agreement["points spread evenly"]) + 0.5
assert asymmetry < 1e-5 and correlation > 0.93, "the Hessians are Hessians, and MMFF94 is near the labels"
assert abs(median["minimum", 0.005, "F(X+ε)"] - median["minimum", 0.005, "F(X+ε) − F(X)"]) < 1
assert median["frames at 500 K", 0.005, "F(X+ε)"] > 80 > 60 > median["frames at 500 K", 0.005, "F(X+ε) − F(X)"]
assert median["frames at 500 K", 0.05, "F(X+ε)"] < 65, "strong noise drowns the force"
assert explained["true Hessian"][0] > 0.995 and 0.01 < ends <= 0.05, "F(X) - F(X+eps) = H eps, for small eps"
assert explained["true Hessian"][-1] < 0.7, "and not for large ones"
assert 0.25 < share["one number, cε"] < 0.45 and share["springs along bonds"] > 0.8, "direction is what is missing"
assert np.isclose(share["one number, cε"], explained["one number, cε"][0], atol=0.06), (
    "as for the Hessian, so for the noise"
)
