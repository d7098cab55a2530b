"""NDeM inside SchNetPack changes nothing that it should not, and SchNetPack's networks work as backbones here."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import ase.db
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from ndem_zoo import MolecularDataset
from ndem_zoo.datasets.files import DatasetCard
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.schnetpack import NDeMPaiNN, SchNetPackBackbone
from ndem_zoo.testing import check_backbone
from ndem_zoo.testing.common import batch_of, example_crystal, example_molecules, fill_weights, with_labels

pytestmark = [pytest.mark.schnetpack]
spk = pytest.importorskip("schnetpack")

import pytorch_lightning  # noqa: E402
import schnetpack.properties as P  # noqa: E402
from schnetpack.data.loader import _atoms_collate_fn as collate  # noqa: E402
from schnetpack.task import AtomisticTask, ModelOutput, UnsupervisedModelOutput  # noqa: E402

from ndem_zoo.schnetpack import (  # noqa: E402
    AddNDeMNoise,
    MeanSquare,
    NDeMDoubleBatch,
    NDeMForceDifference,
    NDeMNoisyForceHead,
    from_schnetpack,
    read_ase_db,
    strip_ndem,
    to_schnetpack,
    write_ase_db,
)

ROOT = Path(__file__).resolve().parents[1]
CUTOFF, WIDTH = 3.0, 16  # short, so that edges do cross the cutoff
#: By definition of the units: 4184 J/kcal over the Faraday constant 96485.33212 C/mol; ASE's older one differs by 7e-9.
EV_PER_KCAL_PER_MOL = 0.0433641042


def item(atoms: Atoms, index: int = 0, reach: float = CUTOFF, noise: AddNDeMNoise | None = None, double=False):
    """One structure as SchNetPack's datasets give it, with its neighbor list, and with noise if wanted."""
    inputs = {
        P.idx: torch.tensor([index]),
        P.n_atoms: torch.tensor([len(atoms)]),
        P.Z: torch.tensor(atoms.numbers, dtype=torch.long),
        P.R: torch.tensor(atoms.positions),
        P.cell: torch.tensor(atoms.cell.array)[None],
        P.pbc: torch.tensor(atoms.pbc),
    }
    cast = spk.transform.CastTo64() if double else spk.transform.CastTo32()
    for transform in (spk.transform.MatScipyNeighborList(reach), noise, cast):
        inputs = inputs if transform is None else transform(inputs)
    return inputs


def batch(reach: float = CUTOFF, noise: AddNDeMNoise | None = None, double: bool = False) -> dict[str, torch.Tensor]:
    """Three molecules of different size."""
    return collate([item(atoms, i, reach, noise, double) for i, atoms in enumerate(example_molecules())])


def representation(name: str = "PaiNN", **options) -> torch.nn.Module:
    """A small representation."""
    basis = {"radial_basis": spk.nn.GaussianRBF(8, CUTOFF), "cutoff_fn": spk.nn.CosineCutoff(CUTOFF)}
    return getattr(spk.representation, name)(n_atom_basis=WIDTH, n_interactions=2, **basis, **options)


def model(ndem: bool, name: str = "PaiNN", mode: str = "vector", options: dict | None = None, **difference):
    """A stock potential, with or without the parts of NDeM, from the same seed."""
    torch.manual_seed(7)
    inputs, network = [spk.atomistic.PairwiseDistances()], representation(name, **(options or {}))
    head = [NDeMNoisyForceHead(WIDTH, mode=mode)] if ndem else []
    outputs = [spk.atomistic.Atomwise(n_in=WIDTH, output_key="energy"), spk.atomistic.Forces()]
    if ndem:
        inputs, outputs = [NDeMDoubleBatch(), *inputs], [*head, *outputs, NDeMForceDifference(**difference)]
    return spk.model.NeuralNetworkPotential(network, inputs, outputs)


# --------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_what_the_entries_say():
    inputs = item(molecule("C6H6"), noise=AddNDeMNoise(sigma=0.05, seed=1), double=True)
    moved = inputs["ndem_positions"] - inputs[P.R]
    assert torch.allclose(moved, 0.05 * inputs["ndem_noise"], atol=1e-14)
    where = (inputs["ndem_noise"] != 0).any(-1)
    assert 0 < int(where.sum()) < 12


def test_noise_has_the_right_size():
    """Of 400 x 12 x 3 components, a quarter is moved, with variance 1: five standard errors are 0.13 and 0.03."""
    noise = AddNDeMNoise(sigma=(0.01, 0.1), ratio=0.25)
    found = [noise(item(molecule("C6H6"))) for _ in range(400)]
    epsilon = torch.cat([x["ndem_noise"] for x in found])
    moved = (epsilon != 0).any(-1)
    assert float(epsilon[moved].square().mean()) == pytest.approx(1.0, abs=0.13)
    assert float(moved.double().mean()) == pytest.approx(0.25, abs=0.035)
    sigmas = torch.stack([(x["ndem_positions"] - x[P.R]).norm() / x["ndem_noise"].norm() for x in found])
    assert 0.0099 < float(sigmas.min()) < 0.012
    assert 0.08 < float(sigmas.max()) < 0.101


def test_seeded_noise_belongs_to_the_structure():
    noise = AddNDeMNoise(seed=4)
    first, again, other = (noise(item(molecule("CH4"), i))["ndem_noise"] for i in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, AddNDeMNoise(seed=5)(item(molecule("CH4"), 5))["ndem_noise"])


def test_noise_leaves_torch_alone_and_follows_its_seed():
    noise = AddNDeMNoise()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (noise(item(molecule("CH4")))["ndem_noise"] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    other = noise(item(molecule("CH4")))["ndem_noise"]
    torch.manual_seed(3)
    assert torch.equal(noise(item(molecule("CH4")))["ndem_noise"], first)
    assert not torch.equal(other, first)


class Molecules(torch.utils.data.Dataset):
    """The same molecule again and again, with new noise."""

    def __init__(self) -> None:
        self.noise = AddNDeMNoise(ratio=1.0)
        self.noise(item(molecule("CH4")))  # a generator exists before the processes are started

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return item(molecule("CH4"), index, noise=self.noise)


def test_noise_is_new_in_every_process_and_epoch():
    loader = torch.utils.data.DataLoader(Molecules(), batch_size=1, num_workers=2, collate_fn=collate)
    found = [tuple(x["ndem_noise"].flatten().tolist()) for _ in range(2) for x in loader]
    assert len(set(found)) == 8


def test_atoms_that_are_not_considered_stay():
    inputs = item(molecule("C6H6"))
    inputs["considered_atoms"] = torch.arange(12) % 3 == 0
    noise = AddNDeMNoise(ratio=1.0)(inputs)["ndem_noise"]
    assert torch.equal((noise != 0).any(-1), inputs["considered_atoms"])


def test_noise_of_a_batch_in_training_mode_only():
    noise = AddNDeMNoise(sigma=(0.01, 0.1), ratio=1.0, per="batch")
    inputs = noise(batch(double=True))
    sigma = (inputs["ndem_positions"] - inputs[P.R]).norm(dim=-1) / inputs["ndem_noise"].norm(dim=-1)
    assert torch.allclose(sigma, sigma[0].expand_as(sigma))
    assert "ndem_noise" not in noise.eval()(batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -0.1}, "sigma=-0.1; allowed are a positive number"),
        ({"sigma": [0.2, 0.1]}, r"sigma=\(0.2, 0.1\)"),
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"sample": "normal"}, "sample='normal'; allowed are loguniform, uniform"),
        ({"seed": -1}, "seed=-1"),
        ({"sigma": 0.1, "cutoff": 5.0, "neighbor_cutoff": 5.4}, "at least 5.800 Å"),
    ],
)
def test_noise_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        AddNDeMNoise(**options)


# ----------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("PaiNN", "vector", {}),
        ("SchNet", "gradient", {}),
        ("SO3net", "vector", {"lmax": 2, "return_vector_representation": True}),
    ],
)
def test_main_branch_is_the_stock_model(name, mode, options):
    """Energies and forces have the same bits, in training mode, in evaluation mode, and without noise."""
    stock, ours = (model(ndem, name, mode, options) for ndem in (False, True))
    own = {k: v for k, v in ours.state_dict().items() if k.startswith("representation")}
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in own.items()), (
        "the parts of NDeM shift the random weights"
    )
    noise = AddNDeMNoise(ratio=1.0)
    for train in (True, False):
        stock.train(train), ours.train(train)
        expected, found, plain = stock(batch(3.4)), ours(batch(3.4, noise)), ours(batch(3.4))
        for key in ("energy", "forces"):
            assert torch.equal(found[key], expected[key]), key
            assert torch.equal(plain[key], expected[key]), key
        assert float(found["ndem_difference"].detach().abs().max()) > 1e-3
        assert float(plain["ndem_difference"].abs().max()) == 0
    assert float(expected["forces"].abs().max()) > 1e-3


def noisy_forces(reach: float, sigma: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """What the noisy head says in the doubled batch, and for a batch of the noisy structures with lists of their own."""
    ours = fill_weights(model(True)).double()
    inputs = batch(reach, AddNDeMNoise(sigma, ratio=1.0, seed=2), double=True)
    moved = inputs["ndem_positions"].split(inputs[P.n_atoms].tolist())
    ours(inputs)
    fresh = []
    for atoms, positions in zip(example_molecules(), moved, strict=True):
        atoms.positions = positions.numpy()
        fresh.append(item(atoms, reach=CUTOFF, double=True))
    direct = ours.representation(spk.atomistic.PairwiseDistances()(collate(fresh)))
    head = ours.output_modules[0].net
    return inputs["_ndem_forces"], head((direct["scalar_representation"], direct["vector_representation"]))[1][:, :, 0]


def test_noisy_branch_is_that_of_a_fresh_neighbor_list():
    found, expected = noisy_forces(CUTOFF + 8 * 0.05)
    assert float(expected.detach().abs().max()) > 1e-2
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    without_skin, expected = noisy_forces(CUTOFF)
    assert float((without_skin - expected).detach().abs().max()) > 1e-8, (
        "no edge crosses the cutoff: nothing was tested"
    )


@pytest.mark.parametrize("grad_main", ["stop", "flow"])
def test_auxiliary_gradient_reaches_what_it_should(grad_main):
    ours = model(True, grad_main=grad_main)
    inputs = batch(3.4, AddNDeMNoise())
    target = inputs["ndem_noise"]
    (ours(inputs)["ndem_difference"] - target).square().mean().backward()
    head, energy = (list(ours.output_modules[i].parameters()) for i in (0, 1))
    assert all(p.grad is not None for p in head)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in ours.representation.parameters())
    reached = any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in energy)
    assert reached == (grad_main == "flow")


def test_difference_by_hand():
    """(2, 0, 0)/4 - (1, 1, 0) and, as a residual, minus the noise."""
    entries = {
        "forces": torch.tensor([[2.0, 0.0, 0.0]]),
        "_ndem_forces": torch.tensor([[1.0, 1.0, 0.0]]),
        "ndem_noise": torch.tensor([[0.0, 0.0, 3.0]]),
    }
    for options, expected in (
        ({}, [-0.5, -1.0, 0.0]),
        ({"subtract_noise": True}, [-0.5, -1.0, -3.0]),
        ({"force_key": None}, [-1.0, -1.0, 0.0]),
    ):
        found = NDeMForceDifference(force_scale=4.0, **options)(dict(entries))["ndem_difference"]
        assert found.tolist() == [expected]
    with pytest.raises(ConfigError, match="force_scale=0"):
        NDeMForceDifference(force_scale=0)
    with pytest.raises(ConfigError, match="grad_main='label'; allowed are stop, flow"):
        NDeMForceDifference(grad_main="label")


def test_gradient_head_is_a_derivative():
    """Minus the change of the second energy when one coordinate of the noisy copy moves, by central differences."""
    ours = fill_weights(model(True, "SchNet", "gradient")).double()

    def energy(step: float) -> float:
        inputs = batch(3.4, AddNDeMNoise(0.05, ratio=1.0, seed=2), double=True)
        inputs["ndem_positions"][4, 1] += step
        inputs[P.R] = inputs["ndem_positions"].clone()
        plain = ours.representation(spk.atomistic.PairwiseDistances()(inputs))
        value = ours.output_modules[0].net(plain["scalar_representation"]).sum()
        return float(value.detach())

    h = 1e-4
    slope = (energy(h) - energy(-h)) / (2 * h)
    inputs = batch(3.4, AddNDeMNoise(0.05, ratio=1.0, seed=2), double=True)
    ours(inputs)
    assert abs(slope) > 1e-3
    assert float(inputs["_ndem_forces"][4, 1].detach()) == pytest.approx(-slope, rel=1e-6)
    with pytest.raises(ConfigError, match="gives no vectors; use NDeMNoisyForceHead"):
        model(True, "SchNet", "vector")(batch(3.4, AddNDeMNoise()))


def test_gradient_head_with_noise_made_in_the_model():
    ours = model(True, "SchNet", "gradient", subtract_noise=True)
    ours.input_modules.insert(0, AddNDeMNoise(per="batch"))
    ours(batch(3.4))["ndem_difference"].square().mean().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in ours.output_modules[0].parameters())
    assert "ndem_noise" not in ours.eval()(batch(3.4))


def test_edges_must_not_be_taken_away_in_between():
    ours = model(True)
    ours.input_modules.append(spk.atomistic.FilterShortRange(2.0))
    with pytest.raises(ConfigError, match="edges were taken away after NDeMDoubleBatch"):
        ours(batch(3.4, AddNDeMNoise()))


def test_stripped_model_is_the_stock_one():
    ours, stock = model(True), model(False)
    plain = strip_ndem(ours)
    stock.load_state_dict(plain.state_dict(), strict=True)
    assert sorted(plain.model_outputs) == ["energy", "forces"]
    assert len(ours.output_modules) == 4, "the model itself was changed"
    expected, found = stock(batch()), torch.jit.script(plain)(batch())
    for key in ("energy", "forces"):
        assert torch.allclose(found[key], expected[key], atol=1e-6)
    with pytest.raises(ConfigError, match="no parts of NDeM"):
        strip_ndem(plain)
    with pytest.raises(ConfigError, match="Linear is no schnetpack"):
        strip_ndem(torch.nn.Linear(1, 1))


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def ethanol_db(tmp_path_factory, ethanol) -> Path:
    """Forty frames of the embedded ethanol in kcal/mol, as SchNetPack's MD17 has them."""
    path = tmp_path_factory.mktemp("data") / "ethanol.db"
    units = {"energy": "kcal/mol", "forces": "kcal/mol/Ang"}
    return write_ase_db(ethanol[::50], path, units=units, metadata={"molecule": "ethanol"})


def train(ndem: bool, db: Path, weight: float = 0.0, noise_in_model: bool = False) -> dict[str, torch.Tensor]:
    """Weights after training a small PaiNN for three epochs with Lightning, in double precision."""
    network = model(ndem, **({"subtract_noise": noise_in_model} if ndem else {})).double()
    if noise_in_model:
        network.input_modules.insert(0, AddNDeMNoise(per="batch"))
    steps = [
        spk.transform.SubtractCenterOfMass(),
        spk.transform.RemoveOffsets("energy", remove_mean=True),
        spk.transform.MatScipyNeighborList(3.4),
        *([AddNDeMNoise()] if ndem and not noise_in_model else []),
        spk.transform.CastTo64(),
    ]
    sizes = {"batch_size": 5, "num_train": 20, "num_val": 10, "num_test": 10, "num_workers": 0}
    data = spk.data.AtomsDataModule(str(db), transforms=steps, split_file=None, **sizes)
    mse = torch.nn.MSELoss()
    outputs = [ModelOutput(k, mse, w, {}) for k, w in (("energy", 0.01), ("forces", 0.99))]
    if noise_in_model:
        outputs.append(UnsupervisedModelOutput("ndem_difference", MeanSquare(), weight, {}))
    elif ndem:
        outputs.append(ModelOutput("ndem_difference", mse, weight, {}, target_property="ndem_noise"))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pytorch_lightning.Trainer(max_epochs=3, accelerator="cpu", inference_mode=False, **quiet)
    trainer.fit(AtomisticTask(network, outputs, torch.optim.AdamW, {"lr": 1e-2}), data)
    return (strip_ndem(network) if ndem else network).state_dict()


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((other[key] - value).abs().max()) for key, value in one.items())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_weight_zero_reproduces_a_stock_run(ethanol_db, tmp_path, monkeypatch):
    """To the rounding of sums, into which the noisy half brings zeros: same weights, order of the data, and steps."""
    monkeypatch.chdir(tmp_path)
    stock = train(False, ethanol_db)
    assert largest_difference(stock, model(False).double().state_dict()) > 0.05
    assert largest_difference(stock, train(True, ethanol_db)) < 1e-11
    for noise_in_model in (False, True):
        assert largest_difference(stock, train(True, ethanol_db, 10.0, noise_in_model)) > 1e-3


SIZES = [f"data.num_{part}={n}" for part, n in (("train", 20), ("val", 10), ("test", 10), ("workers", 0))]
SMALL = ["model.representation.n_atom_basis=16", "model.representation.n_interactions=1", "trainer.max_epochs=2"]


def script(name: str, *arguments: str, folder: Path) -> str:
    """Run one of SchNetPack's scripts in a folder; returns what it prints."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this Python")
    search = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = os.environ | {"PYTHONPATH": search, "PWD": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_spktrain_to_deployment(ethanol_db, tmp_path):
    """``spktrain experiment=ndem_md17``, then spkdeploy and SpkCalculator with the stripped model: all say the same."""
    data = ["data.molecule=ethanol", "data.batch_size=5", f"data.datapath={ethanol_db}", f"run.data_dir={tmp_path}"]
    run = ["run.id=run", "run.path=.", "+seed=1"]
    script("spktrain", "experiment=ndem_md17", *data, *SIZES, *SMALL, *run, folder=tmp_path)
    trained = tmp_path / "run" / "best_model"
    plain = strip_ndem(spk.utils.load_model(str(trained)))
    torch.save(plain, tmp_path / "plain")
    script("spkdeploy", "plain", "deployed", folder=tmp_path)

    atoms = example_molecules()[0]
    neighbors = spk.transform.MatScipyNeighborList(5.0)
    found = []
    for file in (trained, tmp_path / "plain"):
        atoms.calc = spk.interfaces.SpkCalculator(str(file), neighbors, energy_unit="kcal/mol")
        found.append((atoms.get_potential_energy(), atoms.get_forces()))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])
    assert np.abs(found[0][1]).max() > 1e-4
    deployed = torch.jit.load(str(tmp_path / "deployed"))(collate([item(atoms, reach=5.0)]))
    assert float(deployed["energy"]) * EV_PER_KCAL_PER_MOL == pytest.approx(found[1][0], rel=1e-5)
    assert np.allclose(deployed["forces"].detach().numpy() * EV_PER_KCAL_PER_MOL, found[1][1], atol=1e-5)


EXPERIMENTS = [("ndem_md17", "md17"), ("ndem_rmd17", "rmd17"), ("ndem_qm9", "qm9_atomwise")]


@pytest.mark.filterwarnings("ignore:provider=hydra.searchpath")
@pytest.mark.parametrize(("ours", "stock"), EXPERIMENTS)
def test_experiments_differ_from_the_stock_ones_by_ndem_only(ours, stock):
    """Composed as spktrain does: what is left without our parts is SchNetPack's experiment; every part can be built."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    with initialize_config_module("schnetpack.configs", version_base="1.2"):
        found, expected = (
            compose("train", [f"experiment={name}", "run.data_dir=data", "run.work_dir=."]) for name in (ours, stock)
        )
        noisy = compose(
            "train", [f"experiment={ours}", "ndem=multiscale", "globals.neighbor_cutoff=5.8", "run.work_dir=."]
        )
    assert instantiate(noisy.data.train_transforms[3]).sigma == (0.005, 0.05)
    network, seeded = instantiate(found.model), instantiate(found.data.transforms[3])
    training = [instantiate(t) for t in found.data.train_transforms]
    assert (seeded.seed, training[3].seed, seeded.sigma) == (0, None, training[3].sigma)
    for output in found.task.outputs:
        instantiate(output)
    plain, wanted = strip_ndem(network), instantiate(expected.model)
    assert [str(m) for m in plain.output_modules] == [str(m) for m in wanted.output_modules]
    assert [str(m) for m in plain.input_modules] == [str(m) for m in wanted.input_modules]
    kept = [t for t in found.data.transforms if "ndem_zoo" not in t["_target_"]]
    kept[2].cutoff = found.globals.cutoff
    for one, other in ((kept, expected.data.transforms), (found.task.outputs[:-1], expected.task.outputs)):
        to_plain = [OmegaConf.to_container(x, resolve=False) for x in one], OmegaConf.to_container(other, resolve=False)
        one, other = ([OmegaConf.to_container(OmegaConf.create(x)) for x in part] for part in to_plain)
        assert str(resolved(one, found)) == str(resolved(other, expected))
    for key in ("optimizer_args", "scheduler_args", "warmup_steps", "optimizer_cls"):
        assert found.task.get(key) == expected.task.get(key)


def documented_runs() -> list[list[str]]:
    """Arguments of every call of spktrain on the page about SchNetPack."""
    page = (ROOT / "docs" / "how-to" / "schnetpack.md").read_text(encoding="utf-8")
    lines = [line.split("  #")[0] for line in page.splitlines() if line.startswith("spktrain ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.filterwarnings("ignore:provider=hydra.searchpath")
@pytest.mark.parametrize("arguments", documented_runs(), ids=" ".join)
def test_documented_calls_of_spktrain_make_a_model_that_learns(arguments):
    """They compose, and the parts work together: a training step's loss has a gradient for the noisy head."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    small = ["model.representation.n_atom_basis=8", "model.representation.n_interactions=1", "run.work_dir=."]
    with initialize_config_module("schnetpack.configs", version_base="1.2"):
        config = compose("train", [*arguments, *small])
    network, noise = instantiate(config.model).train(), instantiate(config.data.train_transforms[3])
    found = network(batch(config.globals.neighbor_cutoff, noise))
    found["ndem_difference"].square().mean().backward()
    assert all(p.grad is not None for p in network.output_modules[0].net.parameters())


def test_there_are_documented_calls():
    assert len(documented_runs()) >= 9


def resolved(value: object, config: object) -> object:
    """A container with the ``${...}`` in it replaced by what they stand for in a configuration."""
    from omegaconf import OmegaConf

    if isinstance(value, dict):
        return {key: resolved(item, config) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item, config) for item in value]
    if isinstance(value, str) and value.startswith("${"):
        return OmegaConf.select(config, value[2:-1])
    return value


# ---------------------------------------------------------------------------------------------------------- converters


def test_database_holds_what_the_dataset_does(ethanol, ethanol_db):
    """Read with ASE alone: positions, and labels in kcal/mol; and back, in eV."""
    frames = ethanol[::50]
    with ase.db.connect(ethanol_db) as file:
        row = file.get(4)
        assert file.metadata["_property_unit_dict"] == {"energy": "kcal/mol", "forces": "kcal/mol/Ang"}
        assert file.metadata["molecule"] == "ethanol"
    assert np.array_equal(row.positions, frames.atoms(3).positions)
    assert row.data["energy"] == pytest.approx([frames.targets["energy"][3] / EV_PER_KCAL_PER_MOL], rel=2e-8)
    assert row.data["forces"] == pytest.approx(frames.targets["forces"][27:36] / EV_PER_KCAL_PER_MOL, rel=2e-8)
    back = read_ase_db(ethanol_db)
    for name in ("z", "pos", "ptr"):
        assert np.array_equal(getattr(back, name), getattr(frames, name))
    assert back.tasks == ["energy", "forces"]
    for name in back.tasks:
        assert np.allclose(back.targets[name], frames.targets[name], rtol=1e-14, atol=1e-13)


def test_database_of_crystals_with_fixed_atoms_and_references(tmp_path):
    crystal = example_crystal()
    slab = bulk("Cu", cubic=True)
    slab.pbc = (True, True, False)
    z, pos = (np.concatenate([getattr(a, name) for a in (crystal, slab)]) for name in ("numbers", "positions"))
    charges, fixed = np.arange(6.0), np.arange(6) % 2 == 0
    dataset = MolecularDataset(
        z, pos, [0, 2, 6],
        targets={"U0": np.array([-3.5, -14.0]), "mu": np.array([1.5, 2.5]), "q": charges},
        cell=np.stack([crystal.cell.array, slab.cell.array]), pbc=np.stack([crystal.pbc, slab.pbc]), fixed=fixed,
        card=DatasetCard(
            name="x", description="x", theory="x", units={}, licence="x", citation=("x",), files={},
            atom_references={"U0": {"Na": -1.0, "Cl": -2.0, "Cu": -3.0}},
        ),
    )  # fmt: skip
    path = write_ase_db(dataset, tmp_path / "a" / "b.db", names={"U0": "energy_U0"}, units={"U0": "Ha", "mu": "Debye"})
    file = spk.data.ASEAtomsData(str(path))
    assert float(file[1]["energy_U0"]) == pytest.approx(-14.0 / 27.211386246)
    assert float(file.atomrefs["energy_U0"][29]) == pytest.approx(-3.0 / 27.211386246)
    assert file[0]["considered_atoms"].tolist() == [False, True]
    back = read_ase_db(path, names={"energy_U0": "U0"})
    assert np.allclose(back.targets["U0"], [-3.5, -14.0])
    assert back.targets["mu"].tolist() == [1.5, 2.5]
    assert back.per_atom == {"q"}
    assert np.array_equal(back.targets["q"], charges)
    for name in ("z", "pos", "cell", "pbc", "fixed"):
        assert np.array_equal(getattr(back, name), getattr(dataset, name)), name


def test_databases_that_cannot_be(tmp_path, ethanol, ethanol_db):
    with pytest.raises(DataError, match=r"does not end in \.db"):
        write_ase_db(ethanol[:1], tmp_path / "frames.sqlite")
    with pytest.raises(DataError, match="exists already"):
        write_ase_db(ethanol[:1], ethanol_db)
    with pytest.raises(DataError, match="there is no target 'U0' to write; the dataset has energy, forces"):
        write_ase_db(ethanol[:1], tmp_path / "x.db", names={"U0": "energy_U0"})
    with pytest.raises(DataError, match="energy: 'eV' cannot be converted to 'kcal/moll'"):
        write_ase_db(ethanol[:1], tmp_path / "x.db", units={"energy": "kcal/moll"})
    assert list(tmp_path.iterdir()) == [], "something unfinished was left behind"
    with pytest.raises(DataError, match="there is no such file"):
        read_ase_db(tmp_path / "none.db")
    spk.data.ASEAtomsData.create(str(tmp_path / "bare.db"), "Ang", {"energy": None})
    with pytest.raises(DataError, match="energy has no unit; it is needed to convert it to eV"):
        read_ase_db(tmp_path / "bare.db")


def structures() -> list[Atoms]:
    return [*example_molecules(), example_crystal()]


def test_batch_is_the_dictionary_that_schnetpack_makes():
    """A stock model says the same about our batch and about SchNetPack's own conversion of the same structures."""
    network = fill_weights(model(False)).double()
    own = network(collate([item(atoms, i, CUTOFF, double=True) for i, atoms in enumerate(structures())]))
    ours = batch_of(structures(), CUTOFF + 1)
    for inputs in (to_schnetpack(ours), to_schnetpack(ours, CUTOFF)):
        found = network(inputs)
        for key in ("energy", "forces"):
            assert torch.allclose(found[key], own[key], rtol=0, atol=1e-11), key
    assert not ours.pos.requires_grad
    assert len(to_schnetpack(ours, CUTOFF)[P.idx_i]) < len(ours.dst), "nothing was left out"


def test_batch_there_and_back():
    batch = with_labels(batch_of(structures(), CUTOFF, radius=CUTOFF))
    batch = batch.replace(fixed=batch.z == 8)
    back = from_schnetpack(to_schnetpack(batch), CUTOFF)
    for name in ("z", "pos", "src", "dst", "shift", "system", "n_systems", "cutoff", "cell", "fixed"):
        one, other = getattr(back, name), getattr(batch, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
    assert all(torch.equal(back.targets[name], batch.targets[name]) for name in ("energy", "forces"))
    theirs = from_schnetpack(collate([item(a, i, CUTOFF, double=True) for i, a in enumerate(structures())]), CUTOFF)
    potential = fill_weights(Potential(SchNetPackBackbone(**SchNetPackBackbone.tiny, cutoff=CUTOFF))).double()
    assert torch.allclose(potential(theirs).energy, potential(batch).energy, atol=1e-11)
    with pytest.raises(DataError, match="the dictionary has no _idx_i, _idx_j, _offsets"):
        from_schnetpack({P.Z: batch.z, P.R: batch.pos, P.n_atoms: batch.n_atoms}, CUTOFF)


# ------------------------------------------------------------------------------------------------------------ backbones


class SO3net(SchNetPackBackbone):
    """SO3net; its constants are of single precision."""

    symmetry = 1e-6


@pytest.mark.parametrize(("cls", "name"), [(SchNetPackBackbone, "schnet"), (SO3net, "so3net")])
def test_other_representations_keep_the_contract(cls, name):
    check_backbone(cls, {"representation": name})  # painn: tests/test_contracts.py


@pytest.mark.parametrize("radial_basis", ["gaussian", "bessel"])
def test_backbone_is_the_stock_model(radial_basis):
    """With the weights of a stock potential: the same energies and forces."""
    options = {"n_atom_basis": WIDTH, "n_interactions": 2, "n_rbf": 8, "cutoff": CUTOFF, "radial_basis": radial_basis}
    potential = fill_weights(Potential(SchNetPackBackbone(**options))).double()
    stock = model(False)
    if radial_basis == "bessel":
        stock.representation.radial_basis = spk.nn.BesselRBF(8, CUTOFF)
    stock.double().representation.load_state_dict(potential.backbone.representation.state_dict(), strict=True)
    stock.output_modules[0].outnet.load_state_dict(potential.energy_head.net.state_dict(), strict=True)
    found = potential(batch_of(structures(), CUTOFF))
    expected = stock(collate([item(atoms, i, CUTOFF, double=True) for i, atoms in enumerate(structures())]))
    for key in ("energy", "forces"):
        assert torch.allclose(getattr(found, key), expected[key], rtol=0, atol=1e-11), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"representation": "mace"}, "representation='mace'; allowed are painn, schnet, so3net"),
        ({"n_atom_basis": 1}, "n_atom_basis=1"),
        ({"cutoff": 0.0}, "cutoff=0.0 Å"),
        ({"radial_basis": "sine"}, "radial_basis='sine'"),
    ],
)
def test_backbone_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        SchNetPackBackbone(**options)


def test_estimator_learns_and_is_saved(tmp_path, ethanol):
    frames = ethanol[::100]
    options = {"n_atom_basis": 16, "n_interactions": 1}
    settings = {"backbone_options": options, "lr": 5e-3, "warmup_steps": 5, "batch_size": 5, "progress": False}
    estimator = NDeMPaiNN(preset="md17_fast", objective="ndem", **settings)
    estimator.fit(frames[:15], frames[15:], max_steps=5)
    before = -estimator.score(frames)
    estimator.fit(frames[:15], frames[15:], max_steps=150)
    assert -estimator.score(frames) < 0.8 * before
    estimator.save(tmp_path / "model")
    loaded = NDeMPaiNN.load(tmp_path / "model")
    assert np.array_equal(loaded.predict(frames)["forces"], estimator.predict(frames)["forces"])


def test_a_database_is_not_written_with_impossible_structures(tmp_path):
    with pytest.raises(DataError, match="structure 1: atom 0 has atomic number -1"):
        write_ase_db(MolecularDataset([1, -1], np.zeros((2, 3)), [0, 1, 2]), tmp_path / "a.db")
    assert not list(tmp_path.iterdir())
