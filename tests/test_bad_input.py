"""Every public entry gets structures that are sound and structures that are spoilt; what the oracle says is itself tested.

The cases and the oracle are those of benchmarks/reliability/bad_input.py, of which 10,000 make the report. A name that is
new in the package and not in the table below fails a test.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list as ase_neighbor_list

import ndem_zoo
from benchmarks.reliability import bad_input as bad
from ndem_zoo import datasets, registry
from ndem_zoo import schnetpack as schnetpack_parts
from ndem_zoo.models.estimator import NDeMModel
from ndem_zoo.testing.structures import FLAWS, FORMS, RawStructure

pytest.importorskip("hypothesis")

#: Cases in all; see `run_cases` for how they are shared out.
CASES = 1_500

NO_STRUCTURES = "takes no structures"
A_BACKBONE = "sees a Batch, which the entries of its estimator make"
ITS_FILE = "finds and splits the file, which the entry of its reader fuzzes"

#: Where each public name meets structures: entries of the harness, or why there are none.
PUBLIC: dict[str, tuple[str, ...] | str] = {
    "ndem_zoo.ConformerGraph": ("ConformerGraph, text", "ConformerGraph, geometries"),
    "ndem_zoo.Ensemble": ("Ensemble.predict",),
    "ndem_zoo.EquiformerV2": A_BACKBONE,
    "ndem_zoo.MolecularDataset": (
        "MolecularDataset, check_structures",
        "MolecularDataset[i], X",
        "MolecularDataset.from_atoms",
        "MolecularDataset.iterbatches",
        "MolecularDataset.save, open_store",
        "MolecularDataset.select",
        "MolecularDataset.summary",
    ),
    "ndem_zoo.NDeMCalculator": ("NDeMCalculator", "NDeMCalculator, float64, moved", "run_md"),
    "ndem_zoo.NDeMEquiformerV2": ("NDeMEquiformerV2.predict",),
    "ndem_zoo.NDeMModel": "its methods are below",
    "ndem_zoo.NDeMPaiNN": ("NDeMPaiNN.predict",),
    "ndem_zoo.NDeMTorchMDNet": ("NDeMModel.predict, Atoms",),
    "ndem_zoo.RadiusGraph": (
        "RadiusGraph, arrays",
        "RadiusGraph.featurize",
        "RadiusGraph, Atoms",
        "RadiusGraph(max_neighbors=4)",
    ),
    "ndem_zoo.SchNetPackBackbone": A_BACKBONE,
    "ndem_zoo.TorchMDNet": A_BACKBONE,
    "ndem_zoo.load_extxyz": ("load_extxyz",),
    "ndem_zoo.load_md17": ITS_FILE,
    "ndem_zoo.load_oc20": ITS_FILE,
    "ndem_zoo.load_pcqm4mv2": ITS_FILE,
    "ndem_zoo.load_qm9": ITS_FILE,
    "ndem_zoo.load_sample": NO_STRUCTURES,
    "ndem_zoo.open_store": ("MolecularDataset.save, open_store",),
    "NDeMModel.export": NO_STRUCTURES,
    "NDeMModel.evaluate": ("NDeMModel.evaluate, score",),
    "NDeMModel.fit": ("NDeMModel.fit, valid=",),
    "NDeMModel.load": NO_STRUCTURES,
    "NDeMModel.note_evaluation": NO_STRUCTURES,
    "NDeMModel.partial_fit": ("NDeMModel.partial_fit",),
    "NDeMModel.predict": (
        "NDeMModel.predict, Atoms",
        "NDeMModel.predict, DGLGraph",
        "NDeMModel.predict, dataset",
        "NDeMModel.predict, eager",
        "NDeMModel.predict, float64",
    ),
    "NDeMModel.pretrain": ("NDeMModel.pretrain",),
    "NDeMModel.save": NO_STRUCTURES,
    "NDeMModel.score": ("NDeMModel.evaluate, score",),
    **{
        f"objective {name}": (f"NDeMModel.fit, {name}",)
        for name in ("dens", "frad", "geossl", "ndem", "ndem_curvature", "noisy_nodes", "slide", "supervised")
    },
    **{f"force field {name}": (f"force field {name}",) for name in ("gfn2-xtb", "mmff94", "pairs", "valence")},
    "ndem-zoo bench": ("ndem-zoo bench",),
    "ndem-zoo convert": ("ndem-zoo convert",),
    "ndem-zoo evaluate": ("ndem-zoo evaluate",),
    "ndem-zoo export": NO_STRUCTURES,
    "ndem-zoo info": NO_STRUCTURES,
    "ndem-zoo md": ("ndem-zoo md",),
    "ndem-zoo predict": ("ndem-zoo predict",),
    "ndem-zoo replay": NO_STRUCTURES,
    "ndem-zoo report": NO_STRUCTURES,
    "ndem-zoo train": ("ndem-zoo train",),
    **dict.fromkeys(("datasets.DatasetCard", "datasets.RemoteFile", "datasets.Summary"), NO_STRUCTURES),
    "datasets.MolecularDataset": ("MolecularDataset.from_atoms",),
    "datasets.StoreWriter": ("MolecularDataset.save, open_store",),
    "datasets.as_dataset": ("as_dataset, no structures",),
    "datasets.check_structures": ("MolecularDataset, check_structures",),
    "datasets.check_targets": ("NDeMModel.evaluate, score",),
    "datasets.convert_oc20": ("read_oc20",),
    **dict.fromkeys(
        (
            "datasets.fetch",
            "datasets.is_store",
            "datasets.linear_reference",
            "datasets.load_sample",
            "datasets.read_sample",
        ),
        NO_STRUCTURES,
    ),
    "datasets.load_extxyz": ("load_extxyz",),
    **dict.fromkeys(
        ("datasets.load_md17", "datasets.load_oc20", "datasets.load_pcqm4mv2", "datasets.load_qm9"), ITS_FILE
    ),
    "datasets.load_store": ("MolecularDataset.save, open_store",),
    "datasets.open_store": ("MolecularDataset.save, open_store",),
    "datasets.read_extxyz": ("load_extxyz",),
    "datasets.read_md17": ("read_md17",),
    "datasets.read_oc20": ("read_oc20",),
    "datasets.read_pcqm4mv2": ("read_pcqm4mv2",),
    "datasets.read_qm9": ("read_qm9",),
    **dict.fromkeys(
        ("datasets.split_by_system", "datasets.split_indices", "datasets.virial_temperature"), NO_STRUCTURES
    ),
    "datasets.write_extxyz": ("write_extxyz",),
    "datasets.write_submission": NO_STRUCTURES,
    **dict.fromkeys(
        (
            "schnetpack.AddNDeMNoise",
            "schnetpack.MeanSquare",
            "schnetpack.NDeMDoubleBatch",
            "schnetpack.NDeMForceDifference",
            "schnetpack.NDeMNoisyForceHead",
            "schnetpack.strip_ndem",
        ),
        "a part of SchNetPack's own pipeline, which reads the structures",
    ),
    "schnetpack.from_schnetpack": ("to_schnetpack, from_schnetpack",),
    "schnetpack.read_ase_db": ("write_ase_db, read_ase_db",),
    "schnetpack.to_schnetpack": ("to_schnetpack, from_schnetpack",),
    "schnetpack.write_ase_db": ("write_ase_db, read_ase_db",),
    "deepchem.ConformerGraphFeaturizer": "hands on to ConformerGraph",
    "deepchem.CountSplitter": NO_STRUCTURES,
    **dict.fromkeys(
        ("deepchem.EquiformerV2Model", "deepchem.EstimatorModel", "deepchem.PaiNNModel", "deepchem.TorchMDNetModel"),
        ("deepchem.TorchMDNetModel",),
    ),
    "deepchem.RadiusGraphFeaturizer": ("deepchem.RadiusGraphFeaturizer",),
    "deepchem.forces_metric": NO_STRUCTURES,
    "deepchem.from_deepchem": ("deepchem.from_deepchem",),
    "deepchem.load_md17": ITS_FILE,
    "deepchem.load_qm9": ITS_FILE,
    "deepchem.to_disk": ("deepchem.to_disk",),
}

#: Entries beyond those of a public name: modules that are documented, but not handed on by the package.
FURTHER = {"curvature.Springs", "topology.perceive, add_terms"}


def public_names() -> set[str]:
    """Names that the package offers: its own, an estimator's methods, the registries, the commands, the subpackages."""
    own = {f"ndem_zoo.{name}" for name in ndem_zoo.__all__ if name != "__version__"}
    methods = {name for name, _ in inspect.getmembers(NDeMModel, inspect.isfunction) if name in vars(NDeMModel)} | {
        "load"
    }
    own |= {f"NDeMModel.{name}" for name in methods if not name.startswith(("_", "set_"))}
    own |= {f"objective {name}" for name in registry.OBJECTIVES}
    own |= {f"force field {name}" for name in registry.FORCE_FIELDS}
    own |= {f"datasets.{name}" for name in datasets.__all__}
    own |= {f"schnetpack.{name}" for name in schnetpack_parts.__all__}
    if importlib.util.find_spec("typer") is not None:
        from ndem_zoo.commands import app

        own |= {f"ndem-zoo {command.name or command.callback.__name__}" for command in app.registered_commands}
    if importlib.util.find_spec("deepchem") is not None:
        from ndem_zoo import deepchem

        own |= {f"deepchem.{name}" for name in deepchem.__all__}
    return own


def test_every_public_name_is_in_the_table():
    optional = tuple(
        prefix for prefix, module in (("ndem-zoo ", "typer"), ("deepchem.", "deepchem"))
        if importlib.util.find_spec(module) is None
    )  # fmt: skip
    listed = {name for name in PUBLIC if not (optional and name.startswith(optional))}
    assert public_names() - listed == set(), "not fuzzed: add an entry to benchmarks/reliability/bad_input.py"
    assert listed - public_names() == set(), "gone from the package"
    used = {entry for entries in PUBLIC.values() if not isinstance(entries, str) for entry in entries} | FURTHER
    assert used == set(bad.ENTRIES)


# -------------------------------------------------------------------------------------------------------------- oracle


def edges(raw: RawStructure, cutoff: float) -> np.ndarray:
    batch = bad.reference_batch(raw, cutoff)
    return np.sort(np.round(np.column_stack([batch.dst, batch.src, batch.vectors()]), 6), axis=0)


@pytest.mark.parametrize("flags", [(1, 1, 1), (1, 0, 1), (0, 0, 1)])
def test_the_search_by_hand_finds_what_ase_finds(flags):
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.positions += 0.3 * np.sin(np.arange(6.0)).reshape(2, 3) + 20.0
    atoms.pbc = flags
    raw = RawStructure(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    i, j, vectors = ase_neighbor_list("ijD", atoms, 6.0)
    assert len(i) > 4
    assert np.allclose(edges(raw, 6.0), np.sort(np.round(np.column_stack([i, j, vectors]), 6), axis=0), atol=2e-6)


@pytest.mark.parametrize("flaw", sorted(FLAWS))
def test_the_oracle_sees_every_flaw(flaw):
    good = RawStructure(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]]))
    assert bad.flaw_of(good) is None
    for seed in range(5):
        spoilt = FLAWS[flaw](good, np.random.default_rng(seed))
        assert bad.flaw_of(spoilt) is not None


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_oracle_takes_every_form(form):
    z, pos = FORMS[form](np.array([8, 1, 1]), np.array([[0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]]))
    cell, flags = np.diag([4.0, 5.0, 0.0]), [True, True, False]
    assert bad.flaw_of(RawStructure(z, pos)) is None
    assert bad.flaw_of(RawStructure(z, pos, cell, flags)) is None
    assert bad.flaw_of(RawStructure(z, pos, cell, [True] * 3)) is not None


def judged(call, **options) -> bad.Tally:
    """What the harness says about an entry that is made up."""
    bad.ENTRIES["made up"] = bad.Entry(call, form="arrays", **options)
    try:
        return bad.run_entry("made up", bad.World(None), 60, 0)
    finally:
        del bad.ENTRIES["made up"]


def refuse(world, raws):
    for k, raw in enumerate(raws):
        if bad.flaw_of(raw) is not None:
            raise ndem_zoo.errors.DataError(f"structure {k}: no")


def test_the_harness_counts_what_it_should():
    tally = judged(refuse)
    assert (tally.losses, tally.cases) == ([], 60)
    assert min(tally.valid, tally.clear_errors) > 10


def accept_all(world, raws):
    return None


def refuse_all(world, raws):
    raise ndem_zoo.errors.DataError("structure 0, structure 1, structure 2")


def crash(world, raws):
    raise IndexError("a foreign error")


def no_index(world, raws):
    try:
        refuse(world, raws)
    except ValueError:
        raise ndem_zoo.errors.DataError("something is wrong somewhere") from None


def change(world, raws):
    refuse(world, raws)
    if isinstance(raws[0].pos, np.ndarray) and raws[0].pos.flags.writeable:
        raws[0].pos[0] += 1e-9


@pytest.mark.parametrize("call", [accept_all, refuse_all, crash, no_index, change])
def test_the_harness_sees_what_must_not_happen(call):
    assert judged(call).losses


def test_the_harness_sees_wrong_results():
    def compare(world, raws, found):
        bad.same(1.0, 1.0 + 1e-3 * len(raws[0].z), 1e-3, "a number")

    assert any("off by" in loss for loss in judged(refuse, compare=compare).losses)
    with pytest.raises(bad.Wrong):
        bad.same(np.nan, 0.0, 1.0, "NaN")


def test_forces_of_the_reference_are_the_derivative_of_its_energy(tmp_path):
    world = bad.World(tmp_path)
    raw = dataclasses.replace(bad.molecule_of("CH3CN"), cell=np.diag([5.0, 6.0, 7.0]), pbc=[True, False, True])
    _, forces = world.truth(world.model(), raw)
    step = 1e-4
    for atom, axis in ((0, 0), (3, 2)):
        energies = []
        for sign in (1, -1):
            pos = raw.pos.copy()
            pos[atom, axis] += sign * step
            energies.append(world.truth(world.model(), dataclasses.replace(raw, pos=pos))[0])
        assert np.isclose(-(energies[0] - energies[1]) / (2 * step), forces[atom, axis], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- cases


def test_bad_input_at_every_entry(tmp_path):
    found = bad.run_cases(tmp_path, CASES, seed=20)
    assert not found["examples_of_losses"], "\n".join(found["examples_of_losses"])
    assert found["losses"] == 0
    assert found["valid"] + found["clear_errors"] == found["cases"] > 0.9 * CASES
    assert found["clear_errors"] > 0.25 * CASES
    for name, counts in found["entries"].items():
        assert counts["cases"], name


def test_atoms_of_ase_do_not_change(tmp_path):
    """The harness compares arrays; here are the objects that ASE made of them."""
    world = bad.World(tmp_path)
    atoms = Atoms("OH", [[0.0, 0, 0], [0.0, 0, 5000.0 - 4999.0]], cell=[5, 6, 7], pbc=True)
    atoms.positions += 12345.0
    before = atoms.copy()
    world.model().predict([atoms])
    assert atoms == before
