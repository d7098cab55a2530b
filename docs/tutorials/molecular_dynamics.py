# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # Dynamics, relaxation, vibrations
#
# A trained model is an ASE calculator, so everything that ASE can do with energies and forces it does with the model. This
# page runs dynamics, finds a minimum and computes vibrational frequencies of ethanol, and each time asks what a
# practitioner would ask: how far from the truth is that?
#
# The truth here is GFN2-xTB, which made the training frames, because it is at hand: it answers in milliseconds. (So nobody
# needs this model. With DFT labels the model is what answers in milliseconds, and the truth takes minutes.) It comes with
# the extra `xtb`.

# %%
import numpy as np

# Pitfall: tblite must be imported before torch; some builds of torch bring an older OpenMP library than it needs.
from tblite.ase import TBLite

from ndem_zoo import NDeMCalculator, NDeMTorchMDNet, load_sample

tasks, (train, valid, test), transformers = load_sample("ethanol")

# %% [markdown]
# ## Training
#
# 950 frames from dynamics at 500 K, and a small network for some seconds: enough to see what works and what does not.

# %%
model = NDeMTorchMDNet(
    preset="md17_fast",
    objective="ndem",
    backbone_options={"hidden_channels": 64, "num_layers": 3},
    batch_size=8,
    lr=3e-3,
    warmup_steps=50,
    ema_decay=0.99,
    validate_every=200,
    max_steps=800,
    progress=False,
)
model.fit(train, valid)
errors = model.evaluate(test[:500])
print(f"force MAE {errors['forces_mae']:.3f} eV/Å = {errors['forces_mae_kcal']:.2f} kcal/mol/Å")

# %% [markdown]
# ## Dynamics: is energy conserved?
#
# Forces are the exact gradient of the model's energy. So in an NVE run, which knows no thermostat, the total energy must
# stay where it is, up to the error of the integrator, and that has a signature: velocity Verlet is of second order, half
# the time step means a quarter of the fluctuation. `precision="64-true"` keeps rounding out of the picture.

# %%
from ndem_zoo.dynamics import run_md

calculator = NDeMCalculator(model, precision="64-true")
start = test.atoms(0)
records = {
    timestep: run_md(
        start, calculator, steps=int(750 / timestep), timestep=timestep, temperature=300, out=f"nve-{timestep}fs.xyz"
    )
    for timestep in (1.0, 0.5)
}
for timestep, record in records.items():
    print(f"{timestep} fs: fluctuation {record.fluctuation:.3f} meV/atom, drift {record.drift:+.2f} meV/atom/ps")

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for (timestep, record), color in zip(records.items(), ("#D55E00", "#0072B2"), strict=True):
    change = 1e3 * (record.total - record.total.mean()) / record.n_atoms
    axis.plot(record.time, change, color=color, linewidth=0.9, label=f"time step {timestep} fs")
axis.set(xlabel="time (ps)", ylabel="total energy − mean (meV/atom)", title="NVE dynamics with the model")
axis.legend(frameon=False, ncols=2)
axis.grid(True, color="0.92")
# %% [markdown]
# The drift is the slope of a straight line, and over less than a picosecond it is mostly the fluctuation's leftover.
#
# ## ... and is it the right dynamics?
#
# That energy is conserved says that forces belong to the energy, not that either is right: a conserved energy of a wrong
# surface. The question needs the truth along the model's *own* trajectory, where it may go to places that no training frame
# has shown.

# %%
from ase.io import read

truth = TBLite(method="GFN2-xTB", accuracy=0.01, verbosity=0)


def force_error(frames) -> np.ndarray:
    """Mean absolute error of the model's forces (eV/Å) for each frame, against GFN2-xTB on the same geometry."""
    found = []
    for atoms in frames:
        predicted, atoms.calc = atoms.get_forces(), truth
        found.append(np.abs(predicted - atoms.get_forces()).mean())
    return np.array(found)


trajectory = read("nve-0.5fs.xyz", index="::5")
along_the_way = force_error(trajectory)
print(f"error along the trajectory: {along_the_way.mean():.3f} eV/Å, at worst {along_the_way.max():.3f}")
print(f"error on test frames:       {errors['forces_mae']:.3f} eV/Å")

# %% [markdown]
# Below the test error, since 300 K is milder than the 500 K of the training frames. It would not be so at 1,000 K, or for
# a bond that breaks. Where no truth is at hand, the spread of an [ensemble](../how-to/own-data.md#ask-several-models) along the
# trajectory is what can be looked at.
#
# ## Relaxation
#
# From the same frame, BFGS goes to a minimum of the model, and to one of GFN2-xTB. No training frame is near a minimum.

# %%
from ase.build import minimize_rotation_and_translation
from ase.optimize import BFGS


def relaxed(calculator):
    """The nearest minimum."""
    atoms = start.copy()
    atoms.calc = calculator
    converged = BFGS(atoms, logfile=None).run(fmax=0.005, steps=300)
    assert converged
    return atoms


ours, reference = relaxed(calculator), relaxed(truth)
minimize_rotation_and_translation(reference, ours)
distance = np.sqrt(np.square(ours.positions - reference.positions).sum(axis=1).mean())
hydroxyl = min(range(3, 9), key=lambda i: reference.get_distance(2, i))
bonds = {"C-C": (0, 1), "C-O": (1, 2), "O-H": (2, hydroxyl)}
for name, pair in bonds.items():
    print(
        f"{name}: {ours.get_distance(*pair):.3f} Å with the model, {reference.get_distance(*pair):.3f} Å with GFN2-xTB"
    )
print(f"root mean square distance of the atoms: {distance:.3f} Å")

# %% [markdown]
# ## Vibrations
#
# Frequencies are second derivatives, which nobody trained. ASE makes them from forces at displaced atoms (two for each of
# 27 coordinates), here for both at *one* geometry, the minimum of GFN2-xTB, so that only the curvatures differ.

# %%
from ase.vibrations import Vibrations


def frequencies(calculator, name: str) -> np.ndarray:
    """Wave numbers of the 21 vibrations in 1/cm; imaginary ones count negative."""
    atoms = reference.copy()
    atoms.calc = calculator
    vibrations = Vibrations(atoms, name=name, delta=0.005)
    vibrations.clean()  # Pitfall: ASE reads displacements that an earlier run has left in the folder.
    vibrations.run()
    complex_ones = vibrations.get_frequencies()
    # Translations and rotations are the six that are closest to 0 only where curvatures are right; drop by size.
    real = np.sort(complex_ones.real - complex_ones.imag)
    return np.sort(np.delete(real, np.argsort(np.abs(real))[:6]))


found, expected = frequencies(calculator, "vib-model"), frequencies(truth, "vib-xtb")
difference = np.abs(found - expected)
print(
    f"mean difference {difference.mean():.0f} 1/cm, at most {difference.max():.0f} 1/cm at {expected[difference.argmax()]:.0f}"
)
zero_point = [0.5 * values[values > 0].sum() * 1.23984e-4 for values in (found, expected)]
print(f"zero-point energy: {zero_point[0]:.3f} eV with the model, {zero_point[1]:.3f} eV with GFN2-xTB")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", width_ratios=(1.6, 1))
left.vlines(expected, 0, 1, color="0.35", label="GFN2-xTB")
left.vlines(found, -1, 0, color="#0072B2", label="model")
left.axhline(0, color="black", linewidth=0.8)
left.set(xlabel="wave number (1/cm)", yticks=[], ylim=(-1.1, 1.5))
left.legend(frameon=False, ncols=2, loc="upper center")
right.plot(expected, found - expected, "o", color="#0072B2", markersize=5)
right.axhline(0, color="0.35", linewidth=0.8)
right.set(xlabel="GFN2-xTB (1/cm)", ylabel="model − GFN2-xTB (1/cm)")
right.grid(True, color="0.92")

# %% [markdown]
# Stretches and bends are close, since thermal motion shows them to the network at every frame. The soft torsions suffer most
# in relative terms. For thermochemistry or infrared spectra, train longer, and add frames near the minimum.

# %% tags=["hide-input"]
ratio = records[1.0].fluctuation / records[0.5].fluctuation
assert 3.0 < ratio < 5.5, (
    f"velocity Verlet is of second order: half the step, a quarter of the fluctuation (found 1/{ratio:.2f})"
)
assert records[0.5].fluctuation < 0.5
assert along_the_way.max() < 3 * errors["forces_mae"], "the trajectory stays where the model is good"
assert distance < 0.1
assert difference.mean() < 60
assert abs(zero_point[0] - zero_point[1]) < 0.05
