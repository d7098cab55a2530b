"""Exported models: read back where this package cannot be imported, they give the numbers of our calculator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from ndem_zoo import NDeMCalculator, NDeMPaiNN
from ndem_zoo.datasets import MolecularDataset
from ndem_zoo.datasets.base import as_dataset
from ndem_zoo.errors import ConfigError, NotFittedError
from ndem_zoo.export import METADATA, AtomicEnergies, StructureModel, check_exported, example, range_of
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "export.md"
TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}
TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

#: Runs the reader of the page where nothing but torch and numpy is to be had, and prints what it says as JSON.
ALONE = """
import importlib.abc, json, sys
class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("ndem_zoo", "ase", "vesin", "dgl", "jaxtyping"):
            raise ModuleNotFoundError("no " + name)
sys.meta_path.insert(0, Nothing())
{reader}
found = []
for path, structures in json.load(open("jobs.json")):
    exported = Exported(path)
    for one in structures:
        energy, forces = exported(one["numbers"], one["positions"], one["cell"], one["pbc"])
        found.append([energy, forces.tolist()])
assert "ndem_zoo" not in sys.modules
print(json.dumps(found))
"""


def fitted(frames, **options) -> NDeMTorchMDNet:
    defaults = {"objective": "supervised", "backbone_options": TINY, "device": "cpu", "progress": False, "lr": 0.05}
    return NDeMTorchMDNet(**defaults | {"batch_size": 4, "warmup_steps": 0} | options).fit(frames[:8], max_steps=3)


@pytest.fixture(scope="module")
def single(ethanol):
    return fitted(ethanol)


@pytest.fixture(scope="module")
def double(ethanol):
    return fitted(ethanol, precision="64-true")


def structures(ethanol) -> list[Atoms]:
    """Sizes that no program was made with, free and periodic in three and two directions, without and with few pairs."""
    molecule = ethanol.atoms(500)
    crystal, slab = molecule.copy(), molecule.copy()
    crystal.set_cell([[6.0, 0.3, 0.0], [0.0, 6.5, 0.2], [0.4, 0.0, 7.0]])
    crystal.pbc = True
    crystal.positions += [11.0, -8.0, 3.0]  # outside of its cell
    slab.set_cell([4.5, 6.5, 20.0])
    slab.pbc = [True, True, False]
    # Pitfall: not symmetric, or vectors that cancel have a norm without derivative, and rounding decides on forces.
    water = Atoms("H2O", [[0.9, 0.1, 0.2], [-0.3, 0.8, 0.0], [0.0, 0.0, 0.0]])
    return [molecule, crystal, slab, water, Atoms("CO", [[0, 0, 0], [0, 0, 1.2]]), Atoms("H"), bulk("C", "sc", a=2.4)]


def assert_as_calculator(model, structures, found, tolerance):
    largest = 0.0
    for atoms, (energy, forces) in zip(structures, found, strict=True):
        atoms = atoms.copy()
        atoms.calc = NDeMCalculator(model)
        assert abs(atoms.get_potential_energy() - energy) < tolerance * max(1.0, abs(energy) / 1e4)
        assert np.abs(atoms.get_forces() - forces).max() < tolerance
        largest = max(largest, np.abs(atoms.get_forces()).max())
    assert largest > 0.01, "forces of 0 would agree with everything"


def read_alone(folder: Path, jobs: list[tuple[str, list[Atoms]]]) -> list:
    """What the page's reader says in a process of its own, in another folder and without this package."""
    (code,) = re.findall(r"```python\n(# reader.*?)\n```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    reader = code.partition("\nexported =")[0]
    plain = [
        (
            str(path),
            [
                {"numbers": a.numbers.tolist(), "positions": a.positions.tolist(), "cell": a.cell.tolist(), "pbc": a.pbc.tolist()}
                for a in some
            ],
        )
        for path, some in jobs
    ]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(plain))
    (folder / "alone.py").write_text(ALONE.replace("{reader}", reader))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "alone.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_process_without_this_package_gives_the_calculators_numbers(ethanol, single, double, tmp_path):
    """In float64; with a torch that cannot compile in float32, which is otherwise left to the test below."""
    some = structures(ethanol)
    model, tolerance = (single, 1e-5) if TORCH < (2, 6) else (double, 1e-10)
    assert model.export(tmp_path / "model.pt2") == tmp_path / "model.pt2"
    assert_as_calculator(model, some, read_alone(tmp_path, [("model.pt2", some)]), tolerance)


@pytest.mark.parametrize(
    ("prior", "options"),
    [
        ("valence", {}),
        ("mmff94+pairs", {"precision": "64-true"}),
        ("pairs", {"forces": "direct"}),
        ("valence", {"forces": "none"}),
    ],
)
def test_a_prior_is_part_of_the_program(ethanol, aspirin, prior, options, tmp_path):
    """Two molecules in one model: the program takes both, and no other structure."""
    frames = MolecularDataset.concatenate([ethanol[:6], aspirin[:6]])
    model = fitted(frames[[0, 1, 2, 3, 6, 7, 8, 9]], prior=prior, **options)
    extra = {METADATA: ""}
    model.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    of_molecules = prior != "pairs"
    assert [len(z) for z in json.loads(extra[METADATA])["molecules"]] == [9, 21] * of_molecules
    limit = 1e-10 if "precision" in options else 1e-5

    def run(atoms):
        src, dst = torch.tensor([(i, j) for i in range(len(atoms)) for j in range(len(atoms)) if i != j]).T.contiguous()
        shift = torch.zeros(len(src), 3, dtype=torch.float64)
        return program(
            torch.from_numpy(atoms.numbers.astype(np.int64)), torch.from_numpy(atoms.positions), src, dst, shift
        )

    for atoms in (ethanol.atoms(700), aspirin.atoms(200)):
        found, expected = run(atoms), model.predict([atoms])
        assert abs(float(found[0]) - expected["energy"][0]) < 1e-8 * abs(expected["energy"][0])
        if options.get("forces") != "none":
            largest = np.abs(expected["forces"][0]).max()
            assert np.abs(found[1].numpy() - expected["forces"][0]).max() < limit * max(1.0, largest)
            assert np.abs(model.potential_.prior.columns(as_dataset([atoms]))["forces"]).max() > 0.1
    if of_molecules:
        assert np.isnan(float(run(Atoms("H2O", [[0.9, 0.1, 0.2], [-0.3, 0.8, 0.0], [0.0, 0.0, 0.0]]))[0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own
@pytest.mark.skipif(TORCH < (2, 6), reason="AOTInductor writes one file from torch 2.6 on")
def test_a_compiled_program_gives_the_calculators_numbers(ethanol, single, tmp_path):
    some = structures(ethanol)
    single.export(tmp_path / "model.pt2", format="aotinductor")
    assert_as_calculator(single, some, read_alone(tmp_path, [("model.pt2", some)]), 1e-5)


@pytest.mark.skipif(TORCH >= (2, 6), reason="this torch can compile")
def test_an_old_torch_says_that_it_cannot_compile(single, tmp_path):
    with pytest.raises(ConfigError, match=r"needs torch 2\.6 or later"):
        single.export(tmp_path / "model.pt2", format="aotinductor")
    assert not list(tmp_path.iterdir())


def test_the_file_says_what_it_is(ethanol, tmp_path):
    """Direct forces, an energy for each structure, float64 of float32, and everything that a reader has to know."""
    model = fitted(ethanol, forces="direct", reference_energies="mean")
    model.export(tmp_path / "model.pt2", precision="64-true")
    extra = {METADATA: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    about = json.loads(extra[METADATA])
    assert about["cutoff"] == 5.0
    assert about["atomic_numbers"] == [1, 6, 8]
    assert (about["forces"], about["computes_in"], about["device"]) == ("direct", "float64", "cpu")
    assert about["units"] == {"length": "angstrom", "energy": "eV", "forces": "eV/angstrom"}
    assert about["torch"] == torch.__version__
    assert about["split_hash"] == ethanol[:8].split_hash
    atoms = ethanol.atoms(700)
    inputs = example(AtomicEnergies(model.potential_), [1, 1], 0)._replace(
        z=torch.from_numpy(atoms.numbers.astype(np.int64)), pos=torch.from_numpy(atoms.positions)
    )
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    src, dst = torch.tensor(pairs).T.contiguous()
    energy, forces = program(inputs.z, inputs.pos, src, dst, torch.zeros(len(src), 3, dtype=torch.float64))
    atoms.calc = NDeMCalculator(model, precision="64-true")
    assert abs(float(energy) - atoms.get_potential_energy()) < 1e-10
    assert np.abs(forces.numpy() - atoms.get_forces()).max() < 1e-10
    assert np.abs(forces.numpy()).max() > 1e-3


@pytest.mark.parametrize("layers", [1, 3])
def test_range_is_as_far_as_messages_go(layers):
    """Elements of the neighbors first, then a cutoff for every layer."""
    energies = AtomicEnergies(Potential(TorchMDNet(**TINY | {"num_layers": layers, "cutoff": 3.0})).eval())
    assert range_of(energies, [6]) == 3.0 * (layers + 1)


@pytest.mark.parametrize("wrong", ["sign", "energy", "nan", "size"])
def test_a_program_that_differs_is_not_written(wrong):
    energies = AtomicEnergies(Potential(TorchMDNet(**TINY), scale=10.0).requires_grad_(False).double().eval())
    truth = StructureModel(energies)

    def run(*inputs):
        energy, forces = truth(*inputs)
        if wrong == "size" and len(forces) == 3:  # good for one number of atoms only
            forces = forces.roll(1, dims=0)
        factor = {"sign": -1.0, "nan": float("nan")}.get(wrong, 1.0)
        return energy * (1.001 if wrong == "energy" else 1.0), forces * factor

    check_exported(truth, energies, [1, 8])
    with pytest.raises(ConfigError, match=r"gives another (energy|forces) than the model"):
        check_exported(run, energies, [1, 8])


def test_what_cannot_be_exported_is_refused(ethanol, single, tmp_path):
    path = tmp_path / "model.pt2"
    with pytest.raises(ConfigError, match="format='onnx'; allowed are torch_export, aotinductor, metatomic"):
        single.export(path, format="onnx")
    with pytest.raises(ConfigError, match="precision='16'; allowed are 32-true, 64-true"):
        single.export(path, precision="16")
    with pytest.raises(NotFittedError):
        NDeMTorchMDNet().export(path)
    with pytest.raises(ConfigError, match=r"prior='pairs' has one of the structure"):
        fitted(ethanol, prior="pairs").export(path, format="metatomic")
    with pytest.raises(ConfigError, match="prior='gfn2-xtb' calls another program"):
        fitted(ethanol, prior="gfn2-xtb").export(path)
    gaps = ethanol[:8].with_targets([])
    gaps.targets["gap"] = np.arange(8.0)
    with pytest.raises(ConfigError, match="predicts 'gap'"):
        fitted(gaps, target="gap").export(path)
    assert not list(tmp_path.iterdir())


def test_a_backbone_that_cannot_be_traced_is_refused(ethanol, tmp_path, monkeypatch):
    """One that decides by numbers that a trace does not have."""
    model = fitted(ethanol, forces="none")
    forward = TorchMDNet.forward

    def odd(self, batch, node_vectors=None):
        assert float(batch.pos.sum()) < 1e9
        return forward(self, batch, node_vectors)

    monkeypatch.setattr(TorchMDNet, "forward", odd)
    with pytest.raises(ConfigError, match="TorchMDNet cannot be traced by torch"):
        model.export(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- metatomic


@pytest.fixture(scope="module")
def metatomic():
    """metatomic's ASE calculator; skips where it is not installed (extra ``metatomic``)."""
    pytest.importorskip("metatomic.torch", reason="needs metatomic-torch (extra metatomic)")
    return pytest.importorskip("metatomic_ase", reason="needs metatomic-ase (extra metatomic)")


def test_metatomic_gives_the_calculators_numbers(ethanol, single, double, tmp_path, metatomic):
    some = structures(ethanol)
    for model, tolerance in ((single, 1e-5), (double, 1e-10)):
        model.export(tmp_path / "model.pt", format="metatomic")
        calculator, found = metatomic.MetatomicCalculator(tmp_path / "model.pt", check_consistency=True), []
        for atoms in some:
            atoms.calc = calculator
            found.append((atoms.get_potential_energy(), atoms.get_forces()))
        assert_as_calculator(model, some, found, tolerance)


def test_stress_of_metatomic_is_the_derivative_of_our_energy(ethanol, double, tmp_path, metatomic):
    crystal = structures(ethanol)[1]
    double.export(tmp_path / "model.pt", format="metatomic")
    crystal.calc = metatomic.MetatomicCalculator(tmp_path / "model.pt")
    stress = crystal.get_stress(voigt=False)

    def energy(strain):
        moved = crystal.copy()
        moved.set_cell(crystal.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        moved.calc = NDeMCalculator(double)
        return moved.get_potential_energy()

    step = np.zeros((3, 3))
    step[0, 1] = step[1, 0] = 0.5e-4
    step[2, 2] = 1e-4
    expected = (energy(step) - energy(-step)) / 2 / crystal.get_volume()
    assert abs((stress * step).sum() - expected) < 1e-6 * abs(expected) + 1e-14
    assert abs(expected) > 1e-9


def test_metatomic_gives_energies_of_chosen_atoms_and_direct_forces(ethanol, tmp_path, metatomic):
    from metatensor.torch import Labels
    from metatomic.torch import ModelOutput

    model = fitted(ethanol, forces="direct", precision="64-true")
    model.export(tmp_path / "model.pt", format="metatomic")
    calculator = metatomic.MetatomicCalculator(tmp_path / "model.pt", check_consistency=True)
    pair = [ethanol.atoms(3), ethanol.atoms(4)]
    wanted = {"energy": ModelOutput(unit="eV", sample_kind="atom")}
    wanted["non_conservative_force"] = ModelOutput(unit="eV/A", sample_kind="atom")
    found = calculator.run_model(pair, wanted)
    expected = model.predict(pair)
    forces = found["non_conservative_force"].block().values.detach().numpy().reshape(2, 9, 3)
    assert np.abs(forces - expected["forces"]).max() < 1e-10
    per_atom = found["energy"].block().values.detach().numpy().reshape(2, 9)
    assert np.abs(per_atom.sum(axis=1) - expected["energy"]).max() < 1e-9
    chosen = Labels(["system", "atom"], torch.tensor([[1, 7], [0, 2]]))
    some = calculator.run_model(pair, {"energy": ModelOutput(unit="eV", sample_kind="system")}, chosen)
    assert np.allclose(some["energy"].block().values.detach().numpy()[:, 0], [per_atom[0, 2], per_atom[1, 7]])


def test_metatomic_refuses_what_was_traced_for_one_size(ethanol, tmp_path, metatomic):
    """SchNetPack's sums are TorchScript functions, whose size a trace remembers."""
    pytest.importorskip("schnetpack")
    options = {"n_atom_basis": 8, "n_interactions": 1, "n_rbf": 4}
    model = NDeMPaiNN(objective="supervised", backbone_options=options, device="cpu", progress=False).fit(
        ethanol[:4], max_steps=1
    )
    with pytest.raises(ConfigError, match="SchNetPackBackbone cannot be traced"):
        model.export(tmp_path / "model.pt", format="metatomic")
    assert not list(tmp_path.iterdir())


def test_metatomic_refuses_what_cannot_be_split(ethanol, tmp_path, metatomic):
    model = fitted(ethanol, reference_energies="mean")
    with pytest.raises(ConfigError, match="once for each structure"):
        model.export(tmp_path / "model.pt", format="metatomic")


def test_without_metatomic_the_extra_is_named(single, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "metatomic", None)
    monkeypatch.setitem(sys.modules, "metatomic.torch", None)
    with pytest.raises(ImportError, match=r"ndem_zoo\[metatomic\]"):
        single.export(tmp_path / "model.pt", format="metatomic")
