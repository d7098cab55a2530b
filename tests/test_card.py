"""The model card against known data: distances made by hand, errors computed by hand, and what it says is not known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read
from scipy.spatial.distance import pdist

from ndem_zoo import MolecularDataset, NDeMTorchMDNet, load_md17, runs
from ndem_zoo.card import model_card
from ndem_zoo.errors import DataWarning
from ndem_zoo.physics import KCAL_PER_MOL
from ndem_zoo.provenance import MOST_STRUCTURES, describe_data, limits_of, processor

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}


def estimator(**options) -> NDeMTorchMDNet:
    defaults = {"backbone_options": TINY, "batch_size": 4, "device": "cpu", "progress": False, "preset": "md17_fast"}
    return NDeMTorchMDNet(**defaults | options)


def card_of(model: NDeMTorchMDNet, folder) -> str:
    model.save(folder)
    return (folder / "card.md").read_text(encoding="utf-8")


def line(card: str, start: str) -> str:
    """What a line says after its beginning."""
    (found,) = [text for text in card.splitlines() if text.startswith(start)]
    return found.removeprefix(start).strip()


def cells(card: str, label: str) -> list[float]:
    """The numbers of a row of the table of errors."""
    (row,) = [text for text in card.splitlines() if text.startswith(f"| {label} |")]
    return [float(cell) for cell in row.strip("|").split("|")[1:]]


def water(length: float) -> Atoms:
    """A right angle at the oxygen."""
    return Atoms("OHH", [[0, 0, 0], [length, 0, 0], [0, length, 0]])


# --------------------------------------------------------------------------------------------------------------- limits


def test_limits_of_molecules_of_known_size():
    chain = Atoms("C4", [[1.5 * i, 0, 0] for i in range(4)])
    limits = limits_of(MolecularDataset.from_atoms([water(1.0), water(0.9), chain, Atoms("He")]))
    assert limits["elements"] == {"H": 4, "He": 1, "C": 4, "O": 2}
    assert limits["atoms"] == [1, 4]
    assert limits["shortest"] == pytest.approx({"H-H": 0.9 * np.sqrt(2), "H-O": 0.9, "C-C": 1.5})
    assert limits["longest"] == pytest.approx(4.5)
    assert (limits["n_periodic"], limits["n_structures"], limits["n_looked_at"]) == (0, 4, 4)


def test_limits_of_crystals_include_images():
    salt = bulk("NaCl", "rocksalt", a=5.64)
    limits = limits_of(MolecularDataset.from_atoms([salt, water(1.0)]))
    assert limits["shortest"]["Na-Cl"] == pytest.approx(2.82)
    assert "Na-Na" not in limits["shortest"], "beyond the radius: 3.99 Å"
    assert limits["n_periodic"] == 1
    assert limits["longest"] == pytest.approx(np.sqrt(2))
    assert limits_of(MolecularDataset.from_atoms([salt]))["longest"] is None
    dense = limits_of(MolecularDataset.from_atoms([bulk("Cu", "fcc", a=3.6)]))
    assert dense["shortest"] == pytest.approx({"Cu-Cu": 3.6 / np.sqrt(2)})


def test_limits_of_one_atom():
    limits = limits_of(MolecularDataset.from_atoms([Atoms("He")]))
    assert (limits["shortest"], limits["longest"]) == ({}, None)


def test_limits_of_many_are_those_of_evenly_spaced_ones(monkeypatch):
    lengths = np.linspace(1.0, 2.0, 2 * MOST_STRUCTURES + 1)
    lengths[1] = 0.5  # is not looked at
    frames = MolecularDataset.from_atoms([water(length) for length in lengths])
    limits = limits_of(frames)
    assert limits["n_looked_at"] == MOST_STRUCTURES
    assert limits["shortest"]["H-O"] == pytest.approx(1.0)
    assert limits["longest"] == pytest.approx(2.0 * np.sqrt(2))
    monkeypatch.setattr("ndem_zoo.provenance._AT_ONCE", 50)  # in many pieces
    assert limits_of(frames) == limits


def test_limits_of_a_real_molecule_agree_with_scipy(aspirin):
    frames = aspirin[:25]
    limits = limits_of(frames)
    distances = np.array([pdist(pos) for pos in frames.pos.reshape(25, 21, 3)])
    assert limits["longest"] == pytest.approx(distances.max())
    assert min(limits["shortest"].values()) == pytest.approx(distances.min())
    pairs = np.array([sorted((a, b)) for i, a in enumerate(frames.z[:21]) for b in frames.z[i + 1 : 21]])
    assert limits["shortest"]["C-O"] == pytest.approx(distances[:, (pairs == [6, 8]).all(axis=1)].min())


def test_further_data_widen_the_limits(ethanol, aspirin):
    first = describe_data(ethanol[:3], None)
    second = describe_data(aspirin[:2], ethanol[5:6], first)
    assert second["limits"]["atoms"] == [9, 21]
    assert second["limits"]["longest"] == limits_of(aspirin[:2])["longest"]
    for pair, distance in first["limits"]["shortest"].items():
        assert second["limits"]["shortest"][pair] <= distance
    assert second["earlier"] == [
        {"name": ethanol.name, "n_train": 3, "split_hash": ethanol[:3].split_hash},
    ]
    assert describe_data(ethanol[:3], None, first)["earlier"] == [], "the same data again"
    assert first["valid_split_hash"] is None
    assert second["valid_split_hash"] == ethanol[5:6].split_hash


# ----------------------------------------------------------------------------------------------------------------- card


@pytest.fixture(scope="module")
def parts(ethanol):
    return ethanol[:12], ethanol[500:508], ethanol[600:620]


@pytest.fixture(scope="module")
def fitted(parts):
    return estimator().fit(parts[0], parts[1], max_steps=3)


def test_errors_are_those_of_the_predictions(fitted, parts, tmp_path):
    """Both columns in all units, against plain numpy."""
    fitted.evaluate(parts[2])
    card = card_of(fitted, tmp_path / "m")
    for label, factor in (("eV", 1.0), ("meV", 1e3), ("kcal/mol", 1.0 / KCAL_PER_MOL)):
        for name, what, unit in (("forces", "force MAE, per component", f"{label}/Å"), ("energy", "energy MAE", label)):
            expected = []
            for part in parts[1:]:
                predicted = np.asarray(fitted.predict(part)[name]).reshape(part.targets[name].shape)
                expected.append(factor * np.abs(predicted - part.targets[name]).mean())
            assert cells(card, f"{what} ({unit})") == pytest.approx(expected, rel=2e-4)
    assert parts[2].split_hash in line(card, "Last evaluation:")
    assert "20 structures" in line(card, "Last evaluation:")


def test_what_is_known_of_the_data_and_the_machine(fitted, parts, tmp_path):
    card = card_of(fitted, tmp_path / "m")
    assert line(card, "- Level of theory:") == "GFN2-xTB (tblite)"
    assert line(card, "- Hash of the training structures:") == parts[0].split_hash
    assert line(card, "- Hash of the validation structures:") == parts[1].split_hash
    assert "energy kcal/mol" in line(card, "- Units of the source:")
    assert line(card, "- Elements:") == "H (72 atoms), C (24 atoms), O (12 atoms)"
    assert line(card, "- Periodic boundaries:") == "none"
    assert processor() in line(card, "- Device:")
    import torch

    assert f"torch {torch.__version__}" in line(card, "- Versions:")
    assert "Bannwarth" in line(card, "- Data:")
    assert line(card, "- Limits given to `fit`:") == "max_steps=3"


def test_code_of_the_card_makes_the_same_model(fitted, parts, tmp_path):
    card = card_of(fitted, tmp_path / "m")
    (code,) = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    names = {"train": parts[0], "valid": parts[1]}
    exec(code, names)
    assert np.array_equal(names["model"].predict(parts[2])["forces"], fitted.predict(parts[2])["forces"])


def test_settings_are_those_of_the_model(fitted, tmp_path):
    card = card_of(fitted, tmp_path / "m")
    (block,) = [text.split("```")[0] for text in card.split("```json\n")[1:]]
    assert json.loads(block)["backbone"]["options"]["hidden_channels"] == 8
    assert json.loads(block)["settings"]["lr"] == fitted.resolved_["settings"]["lr"]


def test_absent_things_are_said_to_be_absent(parts, tmp_path):
    """Bare structures, without validation, never evaluated."""
    frames = [parts[0].atoms(i) for i in range(4)]
    card = card_of(estimator().fit(frames, max_steps=1), tmp_path / "m")
    assert line(card, "- Source:") == "not recorded: the dataset has no card"
    for name in ("Level of theory", "Licence of the data"):
        assert line(card, f"- {name}:") == "not recorded"
    assert line(card, "- Hash of the validation structures:") == "there were none"
    assert line(card, "Validation:").startswith("none")
    assert line(card, "Other data:") == "not evaluated when this was written."
    assert line(card, "- Data:") == "not recorded"
    assert "| MAE" not in card


def test_card_of_a_model_of_an_older_version(fitted, tmp_path):
    """Its config.json has neither provenance nor limits; loaded and saved, it invents none."""
    fitted.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["provenance"], config["checksum"]
    config["training_data"] = {k: config["training_data"][k] for k in ("name", "n_train", "n_valid", "split_hash")}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    model = NDeMTorchMDNet.load(tmp_path / "m")
    card = card_of(model, tmp_path / "again")
    for name in ("Device", "System", "Versions", "First weights", "Limits given to `fit`", "Level of theory"):
        assert line(card, f"- {name}:") == "not recorded", name
    assert line(card, "- Hash of the validation structures:") == "not recorded"
    assert "How far the training data reach: not recorded" in card
    assert model_card(config, 10, []).count("not recorded") >= 8


def test_where_the_weights_began(fitted, parts, ethanol, tmp_path):
    model = estimator(objective="supervised").fit(ethanol[30:34], max_steps=1, init_from=fitted)
    card = card_of(model, tmp_path / "m")
    assert parts[0].split_hash in line(card, "- First weights:")
    assert "not part of this code" in card
    model.evaluate(parts[2])
    model.partial_fit(ethanol[40:45], max_steps=1)
    card = card_of(model, tmp_path / "m")
    assert parts[0].split_hash in line(card, "- First weights:")
    assert ethanol[30:34].split_hash in line(card, "- Trained before on:")
    assert line(card, "Other data:") == "not evaluated when this was written.", "the weights are other ones now"


def test_a_run_has_its_test_errors_and_its_command(tmp_path, parts):
    splits = runs.Splits("here", *parts, seed=1)
    record = runs.train_run(estimator(), splits, tmp_path / "run", max_steps=2, command="ndem-zoo train --data 'a b'")
    card = (tmp_path / "run" / "model" / "card.md").read_text(encoding="utf-8")
    expected = [record[part]["forces_mae"] for part in ("valid", "test")]
    assert cells(card, "force MAE, per component (eV/Å)") == pytest.approx(expected, rel=1e-4)
    assert "```sh\nndem-zoo train --data 'a b'\n```" in card
    assert line(card, "Last evaluation:").startswith("test data")


def test_another_target_has_its_own_unit(tmp_path, ethanol):
    frames = MolecularDataset(**ethanol[:8].columns() | {"targets": {"mu": np.linspace(1.0, 2.0, 8)}})
    model = estimator(target="mu", objective="supervised").fit(frames[:6], frames[6:], max_steps=1)
    card = card_of(model, tmp_path / "m")
    assert cells(card, "mu MAE (D)") == pytest.approx([model.evaluate(frames[6:])["mu_mae"]], rel=1e-4)
    assert "- Target: mu (D); forces: none" in card
    assert "kcal" not in card.split("## Errors")[1].split("##")[0]


def test_genuine_data(shared_data, tmp_path):
    """Citation, licence and level of theory of rMD17, and its shortest distance read with ASE."""
    with pytest.warns(DataWarning):
        _, (train, valid, _), _ = load_md17("ethanol", revised=True, split=1, data_dir=shared_data / "rmd17")
    card = card_of(estimator().fit(train[:40], valid[:5], max_steps=1), tmp_path / "m")
    assert line(card, "- Level of theory:") == "PBE/def2-SVP"
    assert line(card, "- Licence of the data:") == "CC0 1.0"
    assert "Christensen" in line(card, "- Data:")
    from ase.io import write

    write(tmp_path / "frames.extxyz", [train.atoms(i) for i in range(40)])
    bonds = [atoms.get_all_distances() for atoms in read(tmp_path / "frames.extxyz", ":")]
    numbers = train.atoms(0).numbers
    shortest = min(d[np.ix_(numbers == 8, numbers == 1)].min() for d in bonds)
    assert f"H-O {shortest:.3f}" in line(card, "- Shortest distances (all structures), Å:")
