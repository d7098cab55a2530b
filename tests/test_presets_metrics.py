"""Numbers that are compared with publications: presets against the paper's tables, metrics against plain loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.metrics import error_metrics, mean_over_splits, oc20_metrics, unit_of
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet
from ndem_zoo.presets import PRESETS, Sourced, preset_values
from ndem_zoo.training import TrainSettings

#: 1 kcal/mol in eV: thermochemical calorie, Avogadro's number and elementary charge of CODATA 2014 (ASE's) and of the SI.
KCAL_IN_EV = 4184.0 / 6.02214076e23 / 1.602176634e-19


# -------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 8),
        ("warmup_steps", 1000),
        ("lr", 0.001),
        ("schedule", "plateau"),
        ("plateau_factor", 0.8),
        ("plateau_patience", 30),
        ("min_lr", 1e-7),
        ("force_weight", 30),
        ("energy_weight", 1),
        ("weight", 1),
    ],
)
def test_md17_paper_is_table_7(name, value):
    assert PRESETS["md17_paper"][name].value == value
    assert "Table 7" in PRESETS["md17_paper"][name].source


def test_md17_paper_has_the_network_and_noise_of_table_7():
    backbone = PRESETS["md17_paper"]["backbone"]
    expected = {"num_heads": 8, "num_layers": 6, "num_rbf": 32, "hidden_channels": 128}
    assert expected.items() <= backbone.value["torchmd_net"].items()
    assert "Table 7" in backbone.source
    assert PRESETS["md17_paper"]["objectives"].value["ndem"]["sigma"] == 0.05


def test_the_conflict_between_text_and_table_is_a_preset_of_its_own():
    table, text = preset_values("md17_paper"), preset_values("md17_paper_1_100")
    assert {name for name in table if table[name] != text[name]} == {"force_weight"}
    assert text["force_weight"] == 100
    assert "1:100" in PRESETS["md17_paper"]["force_weight"].source


def test_recipes_of_the_rivals():
    """Spot checks against their code; errors in kcal/mol, and the ratios that the authors state in another form."""
    frad, slide, dens, geossl = (preset_values(f"md17_{name}") for name in ("frad", "slide", "dens", "geossl"))
    assert frad["scale"] == geossl["scale"] == pytest.approx(KCAL_IN_EV, rel=1e-6)
    assert frad["force_weight"] / frad["energy_weight"] == pytest.approx(0.8 / (0.2 * 0.05))
    assert {name for name in frad if frad[name] != slide[name]} == {"lr"}
    assert frad["objectives"]["frad"]["sigma"] == 0.005
    assert frad["objectives"]["frad"]["rotor_sigma"] == 20
    assert dens["warmup_steps"] == 10 * math.ceil(950 / dens["batch_size"])
    assert dens["warmup_factor"] * dens["lr"] == pytest.approx(1e-6)
    assert (dens["force_weight"], dens["weight"], dens["weight_schedule"]) == (80, 5, "decay")
    assert (geossl["energy_weight"], geossl["force_weight"], geossl["loss"]) == (0.05, 0.95, "l1")
    assert preset_values("qm9_noisy_nodes")["objectives"]["noisy_nodes"]["sigma"] == 0.02


def test_every_number_has_a_source():
    for preset in PRESETS.values():
        for name, entry in preset.items():
            assert isinstance(entry, Sourced), name
            assert len(entry.source) > 5, name


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_every_setting_and_nothing_unknown(preset):
    """A forgotten entry would take the default of `TrainSettings` without a word."""
    no_recipe = {"max_time", "precision", "seed", "prefetch", "accumulate", "deterministic"}
    settings = {field.name for field in dataclasses.fields(TrainSettings)} - no_recipe
    assert settings <= set(PRESETS[preset])
    known = set(NDeMTorchMDNet().get_params(deep=False)) | {"backbone", "objectives"}
    assert set(PRESETS[preset]) <= known


def test_an_unknown_preset_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"'md18'.*md17_paper.*md17_fast"):
        preset_values("md18")


# -------------------------------------------------------------------------------------------------------------- metrics


@pytest.fixture(scope="module")
def labeled():
    """Predictions and labels of five structures of three elements, one with a single atom."""
    rng = np.random.default_rng(3)
    counts = np.array([3, 1, 4, 2, 5])
    ptr = np.concatenate([[0], np.cumsum(counts)])
    z = rng.choice([1, 6, 8], counts.sum())
    z[:3] = 1, 6, 8
    make = lambda: {"energy": rng.normal(size=5) - 4000.0, "forces": rng.normal(size=(counts.sum(), 3))}
    return make(), make(), z, ptr


def test_metrics_equal_plain_loops(labeled):
    predicted, target, z, ptr = labeled
    found = error_metrics(predicted, target, z, ptr)
    energy = [p - t for p, t in zip(predicted["energy"], target["energy"], strict=True)]
    forces = [
        p - t for a, b in zip(predicted["forces"], target["forces"], strict=True) for p, t in zip(a, b, strict=True)
    ]
    expected = {
        "energy_mae": sum(abs(e) for e in energy) / 5,
        "energy_rmse": math.sqrt(sum(e * e for e in energy) / 5),
        "energy_mae_per_atom": sum(abs(e) / (ptr[i + 1] - ptr[i]) for i, e in enumerate(energy)) / 5,
        "forces_mae": sum(abs(f) for f in forces) / 45,
        "forces_rmse": math.sqrt(sum(f * f for f in forces) / 45),
    }
    for symbol, number in (("H", 1), ("C", 6), ("O", 8)):
        rows = [i for i in range(15) if z[i] == number]
        errors = [abs(predicted["forces"][i][k] - target["forces"][i][k]) for i in rows for k in range(3)]
        expected[f"forces_mae_{symbol}"] = sum(errors) / len(errors)
    cosines = []
    for a, b in zip(predicted["forces"], target["forces"], strict=True):
        cosines.append(sum(x * y for x, y in zip(a, b, strict=True)) / math.dist(a, [0] * 3) / math.dist(b, [0] * 3))
    expected["forces_cosine"] = sum(cosines) / 15
    assert {name for name in found if not name.endswith("_kcal")} == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


def test_kcal_twins(labeled):
    found = error_metrics(*labeled)
    twins = {name for name in found if name.endswith("_kcal")}
    assert twins == {"energy_mae_kcal", "energy_rmse_kcal", "forces_mae_kcal", "forces_rmse_kcal"}
    for name in twins:
        assert found[name] == pytest.approx(found[name.removesuffix("_kcal")] / KCAL_IN_EV, rel=1e-6)
        assert found[name] > 20 * found[name.removesuffix("_kcal")], "1 eV is 23.06 kcal/mol"


def test_the_errors_of_one_large_structure_count_by_their_number(labeled):
    """An average of averages over structures would give 0.5."""
    forces = np.zeros((10, 3))
    forces[:1] = 1.0
    predicted = {"forces": forces}
    found = error_metrics(predicted, {"forces": np.zeros((10, 3))}, np.ones(10, int), np.array([0, 1, 10]))
    assert found["forces_mae"] == pytest.approx(0.1)
    assert found["forces_rmse"] == pytest.approx(math.sqrt(0.1))
    assert found["forces_cosine"] == 0.0, "a zero force has no direction"


def test_what_is_not_there_is_left_out(labeled):
    predicted, target, z, ptr = labeled
    energy_only = error_metrics({"energy": predicted["energy"]}, target, z, ptr)
    assert not [name for name in energy_only if name.startswith("forces")]
    forces_only = error_metrics(predicted, {"forces": target["forces"]}, z, ptr)
    assert not [name for name in forces_only if name.startswith("energy")]
    assert error_metrics(predicted, {}, z, ptr) == {}


def test_perfect_predictions(labeled):
    _, target, z, ptr = labeled
    found = error_metrics(target, target, z, ptr)
    assert found.pop("forces_cosine") == pytest.approx(1.0)
    assert set(found.values()) == {0.0}


def test_units_of_metrics(labeled):
    units = {name: unit_of(name) for name in error_metrics(*labeled)}
    assert units["energy_mae"] == "eV"
    assert units["energy_mae_per_atom"] == "eV/atom"
    assert units["forces_mae_kcal"] == "kcal/mol/Å"
    assert units["forces_mae_H"] == "eV/Å"
    assert units["forces_cosine"] == ""


def test_fixed_atoms_do_not_count(labeled):
    predicted, target, z, ptr = labeled
    fixed = np.zeros(len(z), dtype=bool)
    fixed[[0, 3, 7, 12]] = True
    found = error_metrics(predicted, target, z, ptr, fixed)
    assert found["energy_mae"] == error_metrics(predicted, target, z, ptr)["energy_mae"]
    free = [i for i in range(len(z)) if not fixed[i]]
    error = np.abs(predicted["forces"] - target["forces"])
    assert found["forces_mae"] == pytest.approx(
        sum(error[i, k] for i in free for k in range(3)) / 3 / len(free), rel=1e-12
    )
    carbon = [i for i in free if z[i] == 6]
    assert found["forces_mae_C"] == pytest.approx(np.mean([error[i] for i in carbon]), rel=1e-12)
    worse = {**predicted, "forces": np.where(fixed[:, None], 1e6, predicted["forces"])}
    assert error_metrics(worse, target, z, ptr, fixed) == found
    assert "forces_mae" not in error_metrics(predicted, target, z, ptr, np.ones(len(z), dtype=bool))


# ----------------------------------------------------------------------------------------------------------- OC20's own


def test_oc20_metrics_by_hand():
    """Three systems, each with a fixed atom whose prediction is absurd."""
    ptr = np.array([0, 3, 5, 7])
    fixed = np.array([True, False, False, True, False, True, False])
    label = np.zeros((7, 3))
    label[[1, 2, 4, 6]] = [[3.0, 0.0, 4.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]
    forces = label.copy()
    forces[fixed] = 99.0
    forces[1] += [0.02, 0.0, 0.0]
    forces[2] = [0.029, 1.0, -0.029]
    forces[4] += [0.0, 0.03001, 0.0]
    forces[6] = [-1.0, 0.0, 0.0]
    predicted = {"energy": np.array([1.019, 2.0, 2.98]), "forces": forces}
    target = {"energy": np.array([1.0, 2.0, 3.001]), "forces": label}
    found = oc20_metrics(predicted, target, ptr, fixed)
    sums = {"x": 0.02 + 0.029 + 2.0, "y": 0.03001, "z": 0.029}
    cosines = [
        (3.02 * 3 + 16) / 5 / math.hypot(3.02, 4),
        1 / math.hypot(0.029, 1, 0.029),
        2 / math.hypot(0.03001, 2),
        -1,
    ]
    lengths = [math.hypot(3.02, 4) - 5, math.hypot(0.029, 1, 0.029) - 1, math.hypot(0.03001, 2) - 2, 0.0]
    expected = {
        "energy_mae": (0.019 + 0.021) / 3,
        "ewt": 2 / 3,
        "efwt": 1 / 3,  # the second is off by its force, the third by its energy
        "forces_mae": sum(sums.values()) / 12,
        **{f"forces_{axis}_mae": value / 4 for axis, value in sums.items()},
        "forces_cosine": sum(cosines) / 4,
        "forces_magnitude_mae": sum(map(abs, lengths)) / 4,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name


def test_oc20_metrics_against_torch():
    """The definitions of section 7 of OC20's paper and evaluator, in torch, structure by structure."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 200)
    ptr = np.concatenate([[0], np.cumsum(counts)])
    label = 0.1 * rng.normal(size=(ptr[-1], 3))
    forces = label + 0.012 * rng.normal(size=label.shape)
    energy = rng.normal(size=200)
    predicted = {"energy": energy + 0.02 * rng.normal(size=200), "forces": forces}
    fixed = rng.random(ptr[-1]) < 0.3
    found = oc20_metrics(predicted, {"energy": energy, "forces": label}, ptr, fixed)
    a, b = torch.from_numpy(forces[~fixed]), torch.from_numpy(label[~fixed])
    assert found["forces_cosine"] == pytest.approx(float(torch.cosine_similarity(a, b).mean()), rel=1e-9)
    assert found["forces_magnitude_mae"] == pytest.approx(float((a.norm(dim=1) - b.norm(dim=1)).abs().mean()), rel=1e-9)
    within = 0
    for i in range(200):
        rows = np.flatnonzero(~fixed[ptr[i] : ptr[i + 1]]) + ptr[i]
        largest = np.abs(forces[rows] - label[rows]).max() if len(rows) else 0.0
        within += abs(predicted["energy"][i] - energy[i]) < 0.02 and largest < 0.03
    assert 0.1 < within / 200 < 0.9
    assert found["efwt"] == within / 200


def test_oc20_metrics_of_energies_alone_and_of_nothing():
    ptr, energy = np.array([0, 1, 2]), np.array([0.0, 1.0])
    assert oc20_metrics({"energy": energy + 0.02}, {"energy": energy}, ptr) == {
        "energy_mae": pytest.approx(0.02),
        "ewt": 0.0,
    }
    with pytest.raises(DataError, match="no structures"):
        oc20_metrics({"energy": energy[:0]}, {"energy": energy[:0]}, ptr[:1])
    both = {"energy": energy, "forces": np.zeros((2, 3))}
    with pytest.raises(DataError, match="all atoms are fixed"):
        oc20_metrics(both, both, ptr, np.array([True, True]))


def test_mean_over_splits_is_plain():
    splits = {
        "val_id": {"ewt": 0.1},
        "val_ood_ads": {"ewt": 0.3},
        "val_ood_cat": {"ewt": 0.2},
        "val_ood_both": {"ewt": 0.6},
    }
    assert mean_over_splits(splits) == {"ewt": pytest.approx(0.3)}
    with pytest.raises(DataError, match="'val_ood_ads' has the metrics"):
        mean_over_splits(splits | {"val_ood_ads": {"efwt": 0.1}})
    with pytest.raises(DataError, match="no splits"):
        mean_over_splits({})


def test_units_of_oc20_metrics():
    assert [unit_of(name) for name in ("ewt", "efwt", "forces_x_mae", "forces_magnitude_mae")] == [
        "",
        "",
        "eV/Å",
        "eV/Å",
    ]


def test_sources_are_of_the_right_dataset():
    for name, values in PRESETS.items():
        for key, (_, source) in values.items():
            if name.startswith(("oc20", "qm9")):
                assert "Table 7" not in source, (name, key)
                assert "MD17" not in source, (name, key)
