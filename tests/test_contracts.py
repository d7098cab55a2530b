"""Everything in the registries keeps its contract: one test for each probe and entry (see `ndem_zoo.testing`).

A new entry is tested without writing a test here; only a dataset needs a small raw file, in DATASET_CASES, and a
backbone its golden numbers (scripts/make_golden_backbones.py).
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ndem_zoo import testing
from ndem_zoo.datasets.extxyz import load_extxyz
from ndem_zoo.datasets.md17 import load_md17
from ndem_zoo.datasets.oc20 import load_oc20
from ndem_zoo.datasets.pcqm4mv2 import load_pcqm4mv2
from ndem_zoo.datasets.qm9 import load_qm9
from ndem_zoo.datasets.sample import load_sample, sample_file
from ndem_zoo.datasets.store import load_store
from ndem_zoo.errors import ConfigError
from ndem_zoo.models.torchmd_net import EquivariantAttention, TorchMDNet
from ndem_zoo.objectives.ndem import NDeM
from ndem_zoo.registry import BACKBONES, DATASETS, MODELS, NEEDS, OBJECTIVES, lookup, missing_for

GOLDEN = json.loads((Path(__file__).parent / "data" / "backbones_golden.json").read_text(encoding="utf-8"))

#: Where the contracts are checked.
DEVICES = ["cpu", *[pytest.param("cuda", marks=pytest.mark.cuda)] * torch.cuda.is_available()]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


def objective_pairs() -> list:
    """Names and probes of all objectives."""
    return [
        pytest.param(name, probe, marks=marks_of(name))
        for name in OBJECTIVES
        for probe in testing.objective_probes(lookup(OBJECTIVES, name, "objective"))
    ]


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Marks of an entry that needs an optional module: the module's name, and a reason to skip where it is missing."""
    if name not in NEEDS:
        return []
    missing = missing_for(name)
    return [getattr(pytest.mark, NEEDS[name]), pytest.mark.skipif(missing is not None, reason=f"needs {missing}")]


#: Backbones with each of their plans.
PLANS = [
    pytest.param(name, plan, marks=marks_of(name))
    for name in BACKBONES
    for plan in lookup(BACKBONES, name, "backbone").plans
]


@pytest.mark.parametrize("probe", testing.BACKBONE_PROBES, ids=name_of)
@pytest.mark.parametrize(("name", "plan"), PLANS)
@pytest.mark.parametrize("device", DEVICES)
def test_backbone(device, name, plan, probe):
    probe(testing.BackboneCase.of(name, device=device, golden=GOLDEN.get(name), plan=plan))


def test_needs_are_those_of_entries():
    assert set(NEEDS) <= set(BACKBONES) | set(MODELS) | set(OBJECTIVES)
    assert missing_for("torchmd_net") is None


def test_every_backbone_has_golden_numbers():
    assert set(GOLDEN) == set(BACKBONES), "run scripts/make_golden_backbones.py"


@pytest.mark.parametrize(("name", "probe"), objective_pairs(), ids=name_of)
@pytest.mark.parametrize("plan", lookup(BACKBONES, "torchmd_net", "backbone").plans)
@pytest.mark.parametrize("device", DEVICES)
def test_objective(device, plan, name, probe):
    probe(testing.ObjectiveCase.of(name, device=device, plan=plan))


# ------------------------------------------------------------------------------------------------------------- datasets

#: By definition of the units: 4184 J/kcal over the Faraday constant 96485.33212 C/mol.
EV_PER_KCAL_PER_MOL = 0.0433641042


def md17_case(folder: Path, revised: bool) -> testing.DatasetCase:
    """Twelve frames of three atoms in the layout of (r)MD17, in kcal/mol."""
    rng = np.random.default_rng(5)
    pos = np.array([[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]]) + 0.1 * rng.normal(size=(12, 3, 3))
    energy, forces = -47_000 + rng.normal(size=12), 20 * rng.normal(size=(12, 3, 3))
    names = ("nuclear_charges", "coords", "energies", "forces") if revised else ("z", "R", "E", "F")
    columns = (np.array([8, 1, 1], dtype=np.uint8), pos, energy if revised else energy[:, None], forces)
    file = "rmd17_ethanol.npz" if revised else "md17_ethanol.npz"
    np.savez(folder / file, **dict(zip(names, columns, strict=True)))
    return testing.DatasetCase(
        name="rMD17" if revised else "MD17",
        load=lambda seed: load_md17("ethanol", revised, 6, 2, seed, data_dir=folder, download=False),
        row=11,
        positions=pos[11],
        energy=float(energy[11]) * EV_PER_KCAL_PER_MOL,
        forces=forces[11] * EV_PER_KCAL_PER_MOL,
        train_rows=[8, 11, 4, 7, 5, 0],
    )


def extxyz_case(folder: Path) -> testing.DatasetCase:
    """Eight frames as text, in eV, with numbers that can be read off."""
    frames = []
    for i in range(8):
        comment = f'Properties=species:S:1:pos:R:3:forces:R:3 energy={-14.25 - i} pbc="F F F"'
        atoms = [f"O 0.0 0.0 0.{i + 1} 0.5 -0.25 0.{i}", f"H 0.0 0.75 -0.5 -0.5 0.25 -0.{i}"]
        frames += ["2", comment, *atoms]
    (folder / "frames.xyz").write_text("\n".join(frames) + "\n", encoding="utf-8")
    return testing.DatasetCase(
        name="extxyz",
        load=lambda seed: load_extxyz(folder / "frames.xyz", 4, 2, seed),
        row=5,
        positions=np.array([[0.0, 0.0, 0.6], [0.0, 0.75, -0.5]]),
        energy=-19.25,
        forces=np.array([[0.5, -0.25, 0.5], [-0.5, 0.25, -0.5]]),
        train_rows=[5, 0, 1, 4],
    )


def sample_case(folder: Path) -> testing.DatasetCase:
    """The embedded aspirin frames, read with numpy alone."""
    with np.load(sample_file("aspirin")) as raw:
        positions, energy, forces = raw["R"][9], raw["E"][9].item(), raw["F"][9]
    train = [167, 184, 23, 9, 121, 286, 18, 87, 10, 6, 105, 51]
    return testing.DatasetCase(
        name="sample",
        load=lambda seed: load_sample("aspirin", len(train), 5, seed),
        row=9,
        positions=positions,
        energy=energy * EV_PER_KCAL_PER_MOL,
        forces=forces * EV_PER_KCAL_PER_MOL,
        train_rows=train,
    )


#: One Hartree in eV, and the energies of the free atoms H and C in Hartree.
EV_PER_HARTREE, ATOMS = 27.211386246, {"H": -0.5, "C": -37.85}


def qm9_case(folder: Path) -> testing.DatasetCase:
    """Fifteen molecules C and H in the official format, one of them uncharacterized, and a number of Mathematica's."""
    with tarfile.open(folder / "dsgdb9nsd.xyz.tar.bz2", "w:bz2") as tar:
        for i in range(1, 16):
            total = ATOMS["C"] + ATOMS["H"] - 0.25 - 0.01 * i
            properties = [5.5, 6.5, 7.5, 0.1 * i, 9.25, -0.25, 0.0625, 0.3125, 35.5, 0.015, *[total] * 4, 6.25]
            lines = [
                "2",
                f"gdb {i}\t" + "\t".join(map(str, properties)) + "\t",
                f"C\t 0.\t 7.5*^-6\t 0.0{i:02d}\t-0.1",
                "H\t 0.\t 0.\t 1.125\t 0.1",
                "3100.",
                "[CH]\t[CH]\t",
                "InChI=1S/CH/h1H\tInChI=1S/CH/h1H",
            ]
            data = ("\n".join(lines) + "\n").encode()
            member = tarfile.TarInfo(f"dsgdb9nsd_{i:06d}.xyz")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (folder / "uncharacterized.txt").write_text(
        "List of molecules\n=====\n#   Index   SMILES\n=====\n   3   C   C   1.0\n=====\n"
    )
    total = (ATOMS["C"] + ATOMS["H"] - 0.25 - 0.12) * EV_PER_HARTREE
    return testing.DatasetCase(
        name="QM9",
        load=lambda seed: load_qm9(n_train=6, n_valid=2, seed=seed, data_dir=folder, cache_dir=folder, download=False),
        row=10,  # without molecule 3, it holds number 12
        positions=np.array([[0.0, 7.5e-6, 0.012], [0.0, 0.0, 1.125]]),
        energy=None,
        forces=None,
        train_rows=[1, 10, 7, 9, 13, 4],
        targets={"mu": 1.2, "r2": 35.5, "Cv": 6.25, "gap": 0.3125 * EV_PER_HARTREE, "U0": total, "G": total},
    )


def pcqm4mv2_case(folder: Path) -> testing.DatasetCase:
    """Twelve molecules as OGB has them: an SD file in an archive, and a table of gaps in eV."""
    entries = []
    for i in range(12):
        atoms = [f"{0.1 * i:10.4f}    0.0000    0.2500 C   0  0", "    0.0000    1.1250    0.0000 H   0  0"]
        entries += [
            "",
            "     RDKit          3D",
            "",
            "  2  1  0  0  0  0  0  0  0  0999 V2000",
            *atoms,
            "  1  2  1  0",
            "M  END",
            "$$$$",
        ]
    data = ("\n".join(entries) + "\n").encode()
    with tarfile.open(folder / "pcqm4m-v2-train.sdf.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("pcqm4m-v2-train.sdf")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    rows = "".join(f"{i},[CH],{4.5 + i}\n" for i in range(12)) + "12,CO,\n"
    (folder / "data.csv").write_text("idx,smiles,homolumogap\n" + rows)
    return testing.DatasetCase(
        name="PCQM4Mv2",
        load=lambda seed: load_pcqm4mv2(
            "gap", n_train=6, n_valid=2, n_test=4, seed=seed, data_dir=folder, cache_dir=folder, download=False
        ),
        row=11,
        positions=np.array([[1.1, 0.0, 0.25], [0.0, 1.125, 0.0]]),
        energy=None,
        forces=None,
        train_rows=[8, 11, 4, 7, 5, 0],
        targets={"gap": 15.5},
    )


def oc20_case(folder: Path, as_store: bool) -> testing.DatasetCase:
    """Nine frames of a slab in OC20's text layout, whose energies are totals, 98 eV below adsorption energies."""
    frames = []
    for i in range(9):
        properties = "species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3"
        comment = f'Lattice="9 0 0 0 9 0 0 0 20" Properties={properties} energy={-100.25 - i} pbc="T T T"'
        frames += ["2", comment, f"Cu 0.0 0.0 0.{i} F 0 0.5 -0.25 0.{i}", f"O 0.0 0.75 1.5 T 2 -0.5 0.25 -0.{i}"]
    (folder / "raw").mkdir()
    (folder / "raw" / "0.extxyz").write_text("\n".join(frames) + "\n", encoding="utf-8")
    (folder / "raw" / "0.txt").write_text("".join(f"random{5 + i},frame0,-98.0\n" for i in range(9)), encoding="utf-8")

    def load(seed: int) -> testing.datasets.Loaded:
        if not as_store:
            return load_oc20("s2ef", "all", folder / "raw", n_train=5, n_valid=2, seed=seed)
        if not (folder / "store").exists():
            load_oc20("s2ef", "all", folder / "raw", store=folder / "store")
        return load_store(folder / "store", 5, 2, seed)

    return testing.DatasetCase(
        name="store" if as_store else "OC20",
        load=load,
        row=4,
        positions=np.array([[0.0, 0.0, 0.4], [0.0, 0.75, 1.5]]),
        energy=-6.25,
        forces=np.array([[0.5, -0.25, 0.4], [-0.5, 0.25, -0.4]]),
        train_rows=np.random.default_rng(1).permutation(9)[:5].tolist(),
    )


DATASET_CASES: dict[str, Callable[[Path], testing.DatasetCase]] = {
    "md17": lambda folder: md17_case(folder, revised=False),
    "md17 revised": lambda folder: md17_case(folder, revised=True),
    "qm9": qm9_case,
    "pcqm4mv2": pcqm4mv2_case,
    "extxyz": extxyz_case,
    "sample": sample_case,
    "oc20": lambda folder: oc20_case(folder, as_store=False),
    "store": lambda folder: oc20_case(folder, as_store=True),
}


@pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")
@pytest.mark.parametrize("probe", testing.DATASET_PROBES, ids=name_of)
@pytest.mark.parametrize("name", DATASET_CASES)
def test_dataset(name, probe, tmp_path):
    probe(DATASET_CASES[name](tmp_path))


def test_every_dataset_has_a_case():
    assert {name.split()[0] for name in DATASET_CASES} == set(DATASETS)


# --------------------------------------------------------------------------- the checks themselves: broken things do fail


class SumsOfPositions(TorchMDNet):
    """A backbone with a bug: scalars see absolute positions."""

    def forward(self, batch, node_vectors=None):
        features = super().forward(batch, node_vectors)
        return features._replace(scalars=features.scalars + 0.01 * batch.pos.sum(-1, keepdim=True))


class MisspelledDetach(NDeM):
    """An objective with a bug: F(X) is never detached."""

    def reference_forces(self, potential, clean, batch, like):
        return (clean.forces / potential.scale).to(like.dtype)


def test_check_backbone_lists_all_failures():
    with pytest.raises(AssertionError) as info:
        testing.check_backbone(SumsOfPositions)
    message = str(info.value)
    assert message.startswith("SumsOfPositions fails ")
    for probe in ("rotation", "reflection", "translation"):
        assert f"\n{probe}: AssertionError: " in message
    assert "\nbatching:" not in message


def test_check_backbone_passes_and_skips():
    case = {"vector_cutoff": False}
    testing.check_backbone("torchmd_net", case, skip=["smooth_cutoff"])
    with pytest.raises(AssertionError, match=r"1 of \d+ probes:\nsmooth_cutoff: .*jumps by"):
        testing.check_backbone("torchmd_net", case)
    with pytest.raises(ConfigError, match="skip='smoth_cutoff' is no probe; there are constructor, shapes"):
        testing.check_backbone("torchmd_net", skip=["smoth_cutoff"])


def test_check_objective_catches_a_missing_detach():
    with pytest.raises(AssertionError, match=r"main_head_gradient: .*'stop'"):
        testing.check_objective(MisspelledDetach)


class UntoldRows(NDeM):
    """A mean over the moved atoms alone, which `rows` does not tell."""

    def rows(self, batch, rng):
        return {}


def test_check_objective_catches_means_over_rows_that_are_not_told():
    with pytest.raises(AssertionError, match=r"shares_add_up: .*term (energy|ndem), added up over two shares"):
        testing.check_objective(UntoldRows, {"loss_on": "masked"})


def test_check_dataset_catches_a_missing_conversion(tmp_path):
    case = extxyz_case(tmp_path)
    known = {name: getattr(case, name) for name in ("row", "positions", "train_rows", "energy", "forces")}
    testing.check_dataset(case.load, **known)
    with pytest.raises(AssertionError, match=r"fails 1 of 9 probes:\nunits: .*energy -19.25 eV"):
        testing.check_dataset(case.load, **{**known, "energy": -19.25 * EV_PER_KCAL_PER_MOL})

    def leaking(seed):
        tasks, (train, _, test), transformers = case.load(seed)
        return tasks, (train, train[:2], test), transformers

    with pytest.raises(AssertionError, match=r"disjoint_splits: AssertionError: 2 structures are in two parts"):
        testing.check_dataset(leaking, **known)


def test_filled_weights_do_not_depend_on_the_random_state():
    layers = [testing.fill_weights(EquivariantAttention(8, 2, 4, 5.0, True)) for _ in range(2)]
    for (name, one), two in zip(layers[0].state_dict().items(), layers[1].state_dict().values(), strict=True):
        assert one.equal(two), name
    # Two entries by hand: sin(0.7 k² + k + m) sqrt(2 / columns), m the checksum of "k_proj.weight" modulo 1000.
    weight = layers[0].k_proj.weight
    expected = [np.sin(0.7 * k * k + k + 329) * np.sqrt(2 / 8) for k in (0, 9)]
    assert weight[0, 0].item() == pytest.approx(expected[0], rel=1e-6)
    assert weight[1, 1].item() == pytest.approx(expected[1], rel=1e-6)
