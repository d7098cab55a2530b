"""NDeM inside SchNetPack changes nothing that it should not, and SchNetPack's networks work as backbones here."""

from __future__ import annotations

import copy
import os
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
#: By definition of the units: 4184 J/kcal over the Faraday constant 96485.33212 C/mol.
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
    [("PaiNN", "vector", {}), ("SchNet", "gradient", {}), ("SO3net", "vector", {"lmax": 2, "return_vector_representation": True})],
)
def test_main_branch_is_the_stock_model(name, mode, options):
    """Energies and forces have the same bits, in training mode, in evaluation mode, and without noise."""
    stock, ours = (model(ndem, name, mode, options) for ndem in (False, True))
    own = {k: v for k, v in ours.state_dict().items() if k.startswith("representation")}
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in own.items()), "the parts of NDeM shift the random weights"
    noise = AddNDeMNoise(ratio=1.0)
    for train in (True, False):
        stock.train(train), ours.train(train)
        expected, found, plain = stock(batch(3.4)), ours(batch(3.4, noise)), ours(batch(3.4))
        for key in ("energy", "forces"):
            assert torch.equal(found[key], expected[key]), key
            assert torch.equal(plain[key], expected[key]), key
        assert float(found["ndem_difference"].abs().max()) > 1e-3
        assert float(plain["ndem_difference"].abs().max()) == 0
    assert float(expected["forces"].abs().max()) > 1e-3


def noisy_forces(reach: float, sigma: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """What the noisy head says in the doubled batch, and for a batch of the noisy structures with lists of their own."""
    ours = fill_weights(model(True)).double()
    ours.representation.cutoff_fn.double()
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
    assert float((without_skin - expected).detach().abs().max()) > 1e-8, "no edge crosses the cutoff: nothing was tested"


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

    def energy(step: float) -> tuple[float, torch.Tensor]:
        inputs = batch(3.4, AddNDeMNoise(0.05, ratio=1.0, seed=2), double=True)
        inputs["ndem_positions"][4, 1] += step
        inputs[P.R] = inputs["ndem_positions"].clone()
        plain = ours.representation(spk.atomistic.PairwiseDistances()({k: v for k, v in inputs.items() if k != "x"}))
        value = ours.output_modules[0].net(plain["scalar_representation"]).sum()
        return float(value.detach()), inputs

    h = 1e-4
    slope = (energy(h)[0] - energy(-h)[0]) / (2 * h)
    inputs = batch(3.4, AddNDeMNoise(0.05, ratio=1.0, seed=2), double=True)
    ours(inputs)
    assert abs(slope) > 1e-3
    assert float(inputs["_ndem_forces"][4, 1].detach()) == pytest.approx(-slope, rel=1e-6)
    with pytest.raises(ConfigError, match="gives no vectors; use NDeMNoisyForceHead"):
        model(True, "SchNet", "vector")(batch(3.4, AddNDeMNoise()))


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


def train(ndem: bool, db: Path, folder: Path, weight: float = 0.0, noise_in_model: bool = False, epochs: int = 3):
    """Train a small PaiNN for some epochs with Lightning; the weights at the end."""
    network = model(ndem, subtract_noise=noise_in_model) if ndem else model(False)
    if noise_in_model:
        network.input_modules.insert(0, AddNDeMNoise(per="batch"))
    steps = [
        spk.transform.SubtractCenterOfMass(),
        spk.transform.RemoveOffsets("energy", remove_mean=True),
        spk.transform.MatScipyNeighborList(3.4),
        *([AddNDeMNoise()] if ndem and not noise_in_model else []),
        spk.transform.CastTo32(),
    ]
    data = spk.data.AtomsDataModule(
        str(db), batch_size=5, num_train=20, num_val=10, num_test=10, transforms=steps, num_workers=0,
        split_file=None,
    )  # fmt: skip
    mse = torch.nn.MSELoss()
    outputs = [ModelOutput(k, mse, w, {}) for k, w in (("energy", 0.01), ("forces", 0.99))]
    if noise_in_model:
        outputs.append(UnsupervisedModelOutput("ndem_difference", MeanSquare(), weight, {}))
    elif ndem:
        outputs.append(ModelOutput("ndem_difference", mse, weight, {}, target_property="ndem_noise"))
    task = AtomisticTask(network, outputs, torch.optim.AdamW, {"lr": 1e-2})
    trainer = pytorch_lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder), inference_mode=False,
    )  # fmt: skip
    trainer.fit(task, data)
    return {k: v for k, v in strip_ndem(network).state_dict().items()} if ndem else network.state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_weight_zero_reproduces_a_stock_run(ethanol_db, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stock = train(False, ethanol_db, tmp_path)
    zero = train(True, ethanol_db, tmp_path, weight=0.0)
    one = train(True, ethanol_db, tmp_path, weight=10.0)
    in_model = train(True, ethanol_db, tmp_path, weight=10.0, noise_in_model=True)
    start = model(False).state_dict()
    assert stock.keys() == zero.keys()
    biggest = {name: 0.0 for name in ("zero", "one", "in_model", "start")}
    for key, value in stock.items():
        for name, other in (("zero", zero), ("one", one), ("in_model", in_model), ("start", start)):
            biggest[name] = max(biggest[name], float((other[key] - value).abs().max()))
    print(biggest)
    assert biggest["start"] > 0.05
    assert biggest["zero"] < 1e-5
    assert min(biggest["one"], biggest["in_model"]) > 1e-3
