"""`NDeMCalculator` against `predict`, finite differences and fresh edges; `run_md` against analytic dynamics."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.io import read

from ndem_zoo import NDeMCalculator, NDeMTorchMDNet
from ndem_zoo.dynamics import EnergyRecord, run_md
from ndem_zoo.errors import ConfigError, DataError, NotFittedError

# Models of eight frames meet structures unlike these all the time; what is warned about is in test_validity.py.
pytestmark = pytest.mark.filterwarnings("ignore::ndem_zoo.errors.RangeWarning")

TINY = {"hidden_channels": 8, "num_layers": 2, "num_heads": 2, "num_rbf": 8, "cutoff": 4.0}


def fit_tiny(ethanol, **options):
    """A model whose weights are as drawn, but for one step: what it predicts is rough, and smooth."""
    options = {"precision": "64-true", "progress": False, "device": "cpu", "backbone_options": TINY, **options}
    return NDeMTorchMDNet(preset="md17_fast", **options).fit(ethanol[:8], max_steps=1)


@pytest.fixture(scope="module")
def model(ethanol):
    """float64, so that agreement can be asked for to the last digits."""
    return fit_tiny(ethanol)


@pytest.fixture
def molecule(ethanol):
    atoms = ethanol.atoms(100)
    atoms.calc = None
    return atoms


@pytest.fixture
def crystal(ethanol):
    """Two ethanols in a skew periodic cell, nearer to their images than the cutoff: 18 atoms, edges of a few Å."""
    first, second = ethanol.atoms(100), ethanol.atoms(900)
    second.translate([0.4, 4.2, 0.3])
    both = Atoms(first.numbers, first.positions) + Atoms(second.numbers, second.positions)
    both.set_cell([[7.0, 0.0, 0.0], [1.0, 8.5, 0.0], [0.5, 0.7, 6.5]])
    both.pbc = True
    return both


def fresh(model, atoms, **options):
    """Energy and forces by a calculator that has seen nothing else, without a skin."""
    copy = atoms.copy()
    copy.calc = NDeMCalculator(model, skin=0.0, **options)
    return copy.get_potential_energy(), copy.get_forces()


def assert_same(atoms, expected, tolerance=1e-9):
    energy, forces = expected
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=tolerance)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_equals_predict_to_the_last_bit_for_a_molecule(ethanol, precision):
    model = fit_tiny(ethanol, precision=precision)
    calculator = NDeMCalculator(model)
    for i in (200, 500, 900):  # the second and third reuse the edges of the first
        atoms, predicted = ethanol.atoms(i), model.predict(ethanol[i : i + 1])
        atoms.calc = calculator
        assert atoms.get_potential_energy() == predicted["energy"][0]
        np.testing.assert_array_equal(atoms.get_forces(), predicted["forces"][0])
    assert calculator.neighbor_searches == 1


@pytest.mark.parametrize("skin", [0.0, 0.5, 2.0])
def test_equals_predict_for_a_periodic_structure(model, crystal, skin):
    predicted = model.predict([crystal])
    crystal.calc = NDeMCalculator(model, skin=skin)
    assert_same(crystal, (predicted["energy"][0], predicted["forces"][0]), tolerance=1e-10)
    alone = crystal.copy()
    alone.pbc = False
    # Otherwise the images would not matter, and nothing would have been tested.
    assert abs(fresh(model, alone)[0] - predicted["energy"][0]) > 1e-4


@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_forces_are_minus_the_slope_of_the_energy(model, name, request):
    atoms = request.getfixturevalue(name)
    atoms.calc = NDeMCalculator(model)
    forces, step = atoms.get_forces(), 1e-4
    assert np.abs(forces).max() > 1e-2
    for atom, axis in ((0, 0), (3, 1), (8, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.calc = atoms.calc
            moved.positions[atom, axis] += sign * step
            energies.append(moved.get_potential_energy())
        assert forces[atom, axis] == pytest.approx((energies[1] - energies[0]) / (2 * step), abs=1e-6)


def test_wrapping_and_lattice_translations_change_nothing(model, crystal):
    crystal.calc = NDeMCalculator(model)
    before = crystal.get_potential_energy(), crystal.get_forces()
    crystal.positions[2] += crystal.cell[0]
    crystal.positions[11] -= 2 * crystal.cell[1] + crystal.cell[2]
    assert_same(crystal, before)
    crystal.wrap()
    assert_same(crystal, before)
    assert_same(crystal, fresh(model, crystal))


def test_precision_of_the_calculator_may_differ_from_the_models(ethanol, molecule):
    model = fit_tiny(ethanol, precision="32-true")
    single, double = NDeMCalculator(model), NDeMCalculator(model, precision="64-true")
    forces = [calculator.get_forces(molecule) for calculator in (single, double)]
    assert 0 < np.abs(forces[0] - forces[1]).max() < 1e-4
    assert next(model.potential_.parameters()).dtype == torch.float32, "the model stays as it was"


# ------------------------------------------------------------------------------------------------------------ skin cache


def test_edges_are_reused_and_stay_complete_during_dynamics(model, crystal):
    calculator = NDeMCalculator(model, skin=0.5)
    rng = np.random.default_rng(0)
    crystal.calc = calculator
    for _ in range(40):
        crystal.positions += rng.normal(scale=0.02, size=(len(crystal), 3)) + [0.01, 0.0, 0.0]
        assert_same(crystal, fresh(model, crystal))
    assert 1 < calculator.neighbor_searches < 20


def test_edges_are_made_again_once_an_atom_has_moved_half_the_skin(model, crystal):
    calculator = NDeMCalculator(model, skin=0.5)
    start = crystal.positions.copy()
    for moved, searches in ((0.0, 1), (0.24, 1), (0.26, 2), (0.02, 2), (0.0, 3)):
        crystal.positions = start
        crystal.positions[4, 2] += moved
        calculator.get_forces(crystal)
        assert calculator.neighbor_searches == searches


def test_without_skin_every_move_makes_edges_again(model, crystal):
    calculator = NDeMCalculator(model, skin=0.0)
    for searches in (1, 2, 3):
        crystal.rattle(0.001, seed=searches)
        calculator.get_forces(crystal)
        assert calculator.neighbor_searches == searches


def test_small_molecules_never_search_again(model, molecule):
    calculator = NDeMCalculator(model, skin=0.1)
    molecule.calc = calculator
    for factor in (1.0, 1.3, 3.0):
        molecule.set_positions(factor * molecule.positions)
        assert_same(molecule, fresh(model, molecule))
    assert calculator.neighbor_searches == 1


def _other_element(atoms):
    atoms.numbers[0] = 8


def _other_cell(atoms):
    atoms.set_cell(atoms.cell.array * 1.01)


def _other_pbc(atoms):
    atoms.pbc = (True, False, True)


def _fewer_atoms(atoms):
    del atoms[9:]


@pytest.mark.parametrize("change", [_other_element, _other_cell, _other_pbc, _fewer_atoms])
def test_every_other_change_makes_edges_again(model, crystal, change):
    crystal.calc = NDeMCalculator(model)
    before = crystal.get_potential_energy()
    change(crystal)
    assert_same(crystal, fresh(model, crystal))
    assert abs(crystal.get_potential_energy() - before) > 1e-5
    assert crystal.calc.neighbor_searches == 2


def test_one_calculator_serves_structures_in_turn(model, molecule, crystal):
    calculator = NDeMCalculator(model)
    for atoms in (molecule, crystal, molecule, crystal):
        energy, forces = fresh(model, atoms)
        assert calculator.get_potential_energy(atoms) == pytest.approx(energy, abs=1e-9)
        np.testing.assert_allclose(calculator.get_forces(atoms), forces, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- ase's contract


def test_results_are_what_ase_expects(model, molecule):
    molecule.calc = NDeMCalculator(model)
    energy, forces = molecule.get_potential_energy(), molecule.get_forces()
    assert type(energy) is float
    assert forces.shape == (9, 3)
    assert forces.dtype == np.float64
    assert molecule.get_potential_energy(force_consistent=True) == energy
    assert set(molecule.calc.results) == {"energy", "free_energy", "forces"}  # `energies` would mean one per atom
    with pytest.raises(PropertyNotImplementedError):
        molecule.get_stress()
    forces[:] = 0.0  # the caller's copy
    assert np.abs(molecule.get_forces()).max() > 0


def test_model_without_forces_has_energies_only(ethanol, molecule):
    model = fit_tiny(ethanol, forces="none", force_weight=0.0)
    molecule.calc = NDeMCalculator(model)
    assert molecule.get_potential_energy() == model.predict([molecule])["energy"][0]
    with pytest.raises(PropertyNotImplementedError):
        molecule.get_forces()
    assert NDeMCalculator.implemented_properties == ["energy", "free_energy", "forces"]


def test_saved_model_gives_the_same(model, molecule, tmp_path):
    model.save(tmp_path / "model")
    for path in (tmp_path / "model", str(tmp_path / "model")):
        assert NDeMCalculator(path).get_potential_energy(molecule) == NDeMCalculator(model).get_potential_energy(
            molecule
        )


def test_training_on_does_not_change_the_calculator(ethanol, molecule):
    model = fit_tiny(ethanol, warmup_steps=1, ema_decay=None)
    trainable = [parameter.requires_grad for parameter in model.potential_.parameters()]
    calculator = NDeMCalculator(model)
    before = calculator.get_potential_energy(molecule)
    model.partial_fit(ethanol[:8], max_steps=3)
    calculator.reset()
    assert calculator.get_potential_energy(molecule) == before
    assert model.predict([molecule])["energy"][0] != before
    assert [parameter.requires_grad for parameter in model.potential_.parameters()] == trainable


def test_steps_along_the_forces_go_downhill_by_their_work(model, molecule):
    """What every relaxation relies on, without the luck of a search on a barely trained surface: dE = -F dx, each step."""
    molecule.calc = NDeMCalculator(model)
    for _ in range(20):
        energy, forces = molecule.get_potential_energy(), molecule.get_forces()
        step = 0.002 * forces / np.linalg.norm(forces, axis=1).max()  # Å
        molecule.set_positions(molecule.get_positions() + step)
        work = (0.5 * (forces + molecule.get_forces()) * step).sum()
        assert molecule.get_potential_energy() < energy
        assert molecule.get_potential_energy() - energy == pytest.approx(-work, rel=0.01)


def test_thousand_calls_do_not_fill_the_memory(ethanol, molecule, crystal):
    psutil = pytest.importorskip("psutil")
    model = fit_tiny(ethanol, backbone_options=TINY | {"num_layers": 1})
    process = psutil.Process(os.getpid())
    calculator = NDeMCalculator(model)
    rng = np.random.default_rng(0)

    def call(times: int) -> int:
        for number in range(times):
            atoms = crystal if number % 4 == 0 else molecule  # in turn, so that edges are made all the time
            calculator.get_forces(atoms)
            atoms.positions += rng.normal(scale=0.002, size=(len(atoms), 3))
        return process.memory_info().rss

    before = call(200)  # allocators have what they need by then
    after = call(800)
    assert calculator.neighbor_searches > 400
    # What the graph of one call holds is about 1 MB: kept from each call, it would be most of a GB.
    assert after - before < 30e6


# ------------------------------------------------------------------------------------------------------------- bad input


def test_positions_that_are_not_finite(model, molecule):
    molecule.calc = NDeMCalculator(model)
    molecule.get_forces()
    molecule.positions[3, 1] = np.nan
    with pytest.raises(DataError, match="position of atom 3"):
        molecule.get_forces()
    with pytest.raises(DataError, match="position of atom 3"):  # not the result of before
        molecule.get_potential_energy()


def test_element_that_was_not_in_the_training_data(model, molecule):
    molecule.numbers[5] = 17
    with pytest.raises(DataError, match=r"atom 5 is Cl.*knows H, C, O"):
        NDeMCalculator(model).get_potential_energy(molecule)


@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_overlapping_atoms(model, name, request):
    atoms = request.getfixturevalue(name)
    atoms.positions[4] = atoms.positions[1] + [0.0, 0.05, 0.0]
    calculator = NDeMCalculator(model)
    for _ in range(2):
        with pytest.raises(DataError, match=r"atoms (1 and 4|4 and 1) are 0.05 Å apart"):
            calculator.get_forces(atoms)


def test_no_atoms_and_singular_cell(model, crystal):
    with pytest.raises(DataError, match="no atoms"):
        NDeMCalculator(model).get_potential_energy(Atoms())
    crystal.cell[2] = crystal.cell[1]
    with pytest.raises(DataError, match="singular"):
        NDeMCalculator(model).get_potential_energy(crystal)


def test_bad_arguments(model, tmp_path):
    with pytest.raises(NotFittedError):
        NDeMCalculator(NDeMTorchMDNet())
    with pytest.raises(FileNotFoundError):
        NDeMCalculator(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="skin=-1"):
        NDeMCalculator(model, skin=-1)
    with pytest.raises(ConfigError, match="precision='16'"):
        NDeMCalculator(model, precision="16")
    with pytest.raises(ConfigError, match="device='abacus'"):
        NDeMCalculator(model, device="abacus")


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu(ethanol, crystal):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = fit_tiny(ethanol)
    crystal.calc = NDeMCalculator(model, device="cuda")
    assert_same(crystal, fresh(model, crystal, device="cpu"), tolerance=1e-8)


# -------------------------------------------------------------------------------------------------------------- dynamics


class Springs(Calculator):
    """Each atom on a spring of its own: 1/2 k (x - x0)²."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's way)

    def __init__(self, start: Atoms, k: float = 5.0, error: float = 0.0, explode_after: int | None = None) -> None:
        super().__init__()
        self.origin, self.k, self.error = start.positions.copy(), k, error
        self.calls, self.explode_after = 0, explode_after

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        if self.explode_after is not None and self.calls > self.explode_after:
            raise DataError("position of atom 0 is [nan nan nan]")
        away = self.atoms.positions - self.origin
        self.results = {"energy": 0.5 * self.k * float((away**2).sum()), "forces": -self.k * away * (1 + self.error)}


def test_record_finds_drift_and_fluctuation_of_known_energies():
    time = np.linspace(0.0, 2.0, 2001)
    total = -4213.0 + 6e-3 * time + 0.01 * np.sin(2 * np.pi * 50 * time)
    kinetic = np.full_like(time, 1.0)
    record = EnergyRecord(time, total - kinetic, kinetic, n_atoms=4, n_dof=6, ensemble="nve")
    assert record.drift == pytest.approx(1.5, abs=0.05)  # 6 meV/ps over 4 atoms
    assert record.fluctuation == pytest.approx(1e3 * 0.01 / np.sqrt(2) / 4, rel=0.01)
    assert record.temperature[0] == pytest.approx(2.0 / (6 * units.kB))
    assert record.summary()["steps"] == 2000


def test_nve_conserves_energy_to_second_order_in_the_time_step(model, molecule):
    deviations = []
    for timestep in (1.0, 0.5):
        steps = int(40 / timestep)
        record = run_md(molecule, NDeMCalculator(model), steps=steps, timestep=timestep, temperature=300, seed=3)
        assert record.time[-1] == pytest.approx(0.04)
        deviations.append(np.ptp(record.total))
    assert np.ptp(record.potential) > 100 * deviations[1]  # energy did flow
    assert 3.0 < deviations[0] / deviations[1] < 5.0


def test_forces_that_do_not_fit_the_energy_show_as_lost_conservation(molecule):
    good = run_md(molecule, Springs(molecule), steps=200, timestep=0.2)
    bad = run_md(molecule, Springs(molecule, error=0.05), steps=200, timestep=0.2)
    assert bad.fluctuation > 10 * good.fluctuation


def test_temperature_counts_internal_motion_only(molecule):
    at_start = [
        run_md(molecule, Springs(molecule), steps=1, timestep=1e-3, temperature=400, seed=seed).temperature[0]
        for seed in range(200)
    ]
    # 21 of 27 degrees of freedom are left: the mean of 200 draws has a standard error of 400 sqrt(2/21/200) = 9 K.
    assert np.mean(at_start) == pytest.approx(400, abs=30)


def test_langevin_holds_the_temperature(molecule):
    record = run_md(
        molecule,
        Springs(molecule),
        steps=3000,
        timestep=1.0,
        temperature=250,
        ensemble="langevin",
        friction=0.05,
        seed=1,
    )
    assert record.temperature[500:].mean() == pytest.approx(250, rel=0.15)


def test_trajectory_file(model, molecule, tmp_path):
    start, path = molecule.positions.copy(), tmp_path / "md.extxyz"
    record = run_md(molecule, NDeMCalculator(model), steps=20, out=path, every=5)
    frames = read(path, index=":")
    assert len(frames) == 5
    assert [f.get_potential_energy() for f in frames] == pytest.approx(record.potential[::5])
    np.testing.assert_allclose(frames[-1].get_forces(), model.predict([frames[-1]])["forces"][0], atol=1e-5)
    assert frames[-1].get_kinetic_energy() == pytest.approx(record.kinetic[-1], rel=1e-5)
    np.testing.assert_array_equal(molecule.positions, start)
    assert molecule.calc is None
    assert [p.name for p in tmp_path.iterdir()] == ["md.extxyz"]


def test_dynamics_that_fails_names_the_step_and_keeps_what_it_has(molecule, tmp_path):
    path = tmp_path / "md.extxyz"
    with pytest.raises(DataError, match=r"after step 7 of 50: position of atom 0"):
        run_md(molecule, Springs(molecule, explode_after=8), steps=50, out=path, every=2)
    assert len(read(path, index=":")) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["md.extxyz"]


@pytest.mark.parametrize(
    "option",
    [{"steps": 0}, {"timestep": 0.0}, {"temperature": -1.0}, {"ensemble": "npt"}, {"friction": 0.0}, {"every": 0}],
)
def test_options_of_dynamics_out_of_range(molecule, option, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(option))):
        run_md(molecule, Springs(molecule), **({"steps": 1, "out": tmp_path / "x.extxyz"} | option))
    assert not list(tmp_path.iterdir())


def test_a_model_trained_in_half_precision_is_used_in_single_precision(ethanol, molecule):
    half = fit_tiny(ethanol, precision="bf16-mixed")
    molecule.calc = NDeMCalculator(half)
    expected = half.predict(molecule)
    assert molecule.get_potential_energy() == pytest.approx(expected["energy"][0], abs=1e-3)
    np.testing.assert_allclose(molecule.get_forces(), expected["forces"][0], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- far from home


@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_forces_far_away_are_those_at_home(ethanol, name, request):
    """In float32, whose numbers are 0.008 Å apart there; while the edges are kept, and when they are made."""
    model = fit_tiny(ethanol, precision="32-true")
    atoms = request.getfixturevalue(name)
    expected = fresh(model, atoms)
    far = atoms.copy()
    far.positions += [90_000.0, -70_000.0, 30_000.0]
    far.calc = NDeMCalculator(model, skin=0.5)
    assert_same(far, expected, 2e-5)
    moved = atoms.copy()
    for structure in (moved, far):
        structure.positions[0] += 0.05
    searches = far.calc.neighbor_searches
    assert_same(far, fresh(model, moved), 2e-5)
    assert far.calc.neighbor_searches == searches


def test_dynamics_of_elements_that_do_not_exist(model):
    with pytest.raises(DataError, match="atom 1 has atomic number 119"):
        run_md(Atoms([1, 119], positions=[[0, 0, 0], [0, 0, 2.0]]), NDeMCalculator(model), steps=1)
