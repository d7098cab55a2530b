"""Pre-training without labels and what becomes of it: what is learned, kept, saved, and handed to the next training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write

from ndem_zoo import registry
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.ensemble import Ensemble
from ndem_zoo.errors import ConfigError, NotFittedError
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet
from ndem_zoo.testing import batch_of, fill_weights
from ndem_zoo.testing.common import example_molecules
from ndem_zoo.training import TrainStep, denoising_metrics

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}


def estimator(objective="ndem", **options) -> NDeMTorchMDNet:
    defaults = {"backbone_options": TINY, "batch_size": 3, "max_steps": 6, "warmup_steps": 0, "validate_every": 2}
    defaults |= {"lr": 1e-2, "min_lr": 0.0, "device": "cpu", "progress": False, "objective": objective}
    return NDeMTorchMDNet(**{**defaults, **options})


@pytest.fixture(scope="module")
def bare(ethanol):
    """Structures without labels: ten to learn from, four to judge by."""
    return [ethanol.atoms(i) for i in range(10)], [ethanol.atoms(i) for i in range(500, 504)]


@pytest.fixture(scope="module")
def pretrained(bare):
    return {name: estimator(name).pretrain(*bare) for name in ("ndem", "noisy_nodes")}


def state(model) -> dict[str, torch.Tensor]:
    return {**model.potential_.state_dict(), **{f"objective.{k}": v for k, v in model.objective_.state_dict().items()}}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert not [name for name, value in a.items() if not torch.equal(value, b[name])]


# ------------------------------------------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("objective", ["ndem", "noisy_nodes"])
def test_labels_are_not_looked_at(ethanol, bare, pretrained, objective):
    wrong = {"energy": np.full(10, 7.0), "forces": np.random.default_rng(0).normal(size=(90, 3))}
    labeled = MolecularDataset(**(ethanol[:10].columns() | {"targets": wrong}))
    model = estimator(objective, energy_weight=5.0, force_weight=9.0, weight=3.0, weight_schedule="decay")
    model.pretrain(labeled, ethanol[500:504])
    assert_same(state(model), state(pretrained[objective]))


@pytest.mark.parametrize("objective", ["ndem", "noisy_nodes"])
def test_the_noise_of_a_rigid_molecule_is_learned(objective):
    """Of a molecule that has one shape, the noise can be told; a head that says nothing has a loss of 1 per component."""
    water = [molecule("H2O") for _ in range(8)]
    for number, atoms in enumerate(water):
        atoms.rotate(37.0 * number, (1, 2, 3))
    options = {"sigma": 0.05, "ratio": 1.0} | ({"reduction": "element_mean"} if objective == "ndem" else {})
    model = estimator(objective, objective_options=options, batch_size=8, max_steps=150, validate_every=150)
    model.pretrain(water, water[:4])
    # Of the 9 components of a noise without net displacement, 3 vanish, and 3 are rotations, which cannot be seen.
    assert model.history_[-1]["valid_loss"] < 0.55
    assert (
        estimator(objective, objective_options=options, lr=0.0).pretrain(water, water[:4]).history_[-1]["valid_loss"]
        > 0.6
    )


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_best_weights_are_kept_with_their_head(bare, ema_decay):
    """With a learning rate that destroys: the best validation is not the last one."""
    model = estimator("noisy_nodes", max_steps=12, lr=0.3, ema_decay=ema_decay).pretrain(*bare)
    losses = [row["valid_loss"] for row in model.history_]
    assert min(losses) < losses[-1]
    valid = MolecularDataset.from_atoms(bare[1])
    found = denoising_metrics(TrainStep(model.potential_, model.objective_), valid, 64)
    assert found["valid_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert found["valid_loss"] == found["valid_denoising"]


def test_validation_is_the_mean_over_all_atoms_whatever_the_batches(bare):
    model = estimator("noisy_nodes", objective_options={"sigma": 1e-9}, max_steps=2).pretrain(*bare)
    mixed = MolecularDataset.from_atoms(example_molecules())
    step = TrainStep(model.potential_, model.objective_)
    with torch.no_grad():
        step.objective.noise_head.output_network[1].vec2_proj.weight.zero_()  # leaves mean (epsilon / sigma)²
    one = denoising_metrics(step, mixed, 1)["valid_loss"]
    total = 0.0
    for number, atoms in enumerate(sorted(example_molecules(), key=len, reverse=True)):
        batch = batch_of([atoms], 5.0, dtype=torch.float32)
        _, noise = step.objective.options.displace(batch, torch.Generator().manual_seed(number), 5.0)
        total += float((noise.epsilon / noise.sigma).square().mean()) * len(atoms)
    assert one == pytest.approx(total / len(mixed.z), rel=1e-5)


def test_interrupted_and_resumed_is_the_same(bare, tmp_path):
    whole = estimator("ndem", max_steps=8, ema_decay=0.9).pretrain(
        *bare, checkpoint_dir=tmp_path / "a", checkpoint_every=4
    )
    estimator("ndem", ema_decay=0.9).pretrain(*bare, max_steps=4, checkpoint_dir=tmp_path / "b")
    again = estimator("ndem", ema_decay=0.9)
    again.pretrain(*bare, max_steps=8, checkpoint_dir=tmp_path / "b", resume=True)
    assert_same(state(again), state(whole))
    assert [row["step"] for row in again.history_] == [2, 4, 6, 8]
    with pytest.raises(ConfigError, match="made with"):
        estimator("ndem", ema_decay=0.9).fit(_labeled(bare[0]), max_steps=8, checkpoint_dir=tmp_path / "b", resume=True)


def _labeled(frames: list[Atoms]) -> MolecularDataset:
    data = MolecularDataset.from_atoms(frames)
    targets = {"energy": np.zeros(len(data)), "forces": np.zeros((len(data.z), 3))}
    return MolecularDataset(**(data.columns() | {"targets": targets}))


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("supervised", {}, "no auxiliary term"),
        ("dens", {}, "needs forces"),
        ("ndem", {"grad_main": "label"}, "grad_main='label'.* needs forces"),
        ("ndem", {"target": "boltzmann"}, "needs forces"),
        ("ndem", {"reuse_main_head": True}, "reuse_main_head"),
    ],
)
def test_objectives_that_need_labels_are_refused(bare, tmp_path, objective, options, message):
    model = estimator(objective, objective_options=options)
    with pytest.raises(ConfigError, match=message):
        model.pretrain(*bare, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not hasattr(model, "potential_")


# -------------------------------------------------------------------------------------------------- what becomes of it


def test_saved_and_loaded(pretrained, tmp_path):
    for name, model in pretrained.items():
        model.save(tmp_path / name)
        loaded = NDeMTorchMDNet.load(tmp_path / name)
        assert_same(state(loaded), state(model))
        assert loaded.history_ == model.history_
        card = (tmp_path / name / "card.md").read_text(encoding="utf-8")
        assert "Pre-trained without labels" in card
        assert "10 structures, 4 for validation" in card
        assert "valid_loss" in card


def test_a_pretrained_model_predicts_nothing(pretrained, ethanol):
    model = pretrained["ndem"]
    for call in (model.predict, model.evaluate, model.score):
        with pytest.raises(NotFittedError, match="only pre-trained"):
            call(ethanol[:2])
    with pytest.raises(NotFittedError, match="only pre-trained"):
        Ensemble([model, model])
    with pytest.raises(ConfigError, match="only pre-trained"):
        model.partial_fit(ethanol[:4])
    assert not model.__sklearn_is_fitted__()


@pytest.mark.parametrize("source", ["ndem", "noisy_nodes"])
@pytest.mark.parametrize("objective", ["ndem", "noisy_nodes"])
@pytest.mark.parametrize("form", ["model", "folder"])
def test_fine_tuning_begins_with_backbone_and_denoising_head(ethanol, pretrained, tmp_path, source, objective, form):
    start = pretrained[source]
    start.save(tmp_path / "start")
    model = estimator(objective, lr=0.0).fit(ethanol[:6], init_from=start if form == "model" else tmp_path / "start")
    fresh = estimator(objective, lr=0.0).fit(ethanol[:6])
    theirs, ours, drawn = state(start), state(model), state(fresh)
    head = {"ndem": "objective.noisy_force_head.", "noisy_nodes": "objective.noise_head."}
    for name, value in ours.items():
        if name.startswith("backbone."):
            assert torch.equal(value, theirs[name])
        elif name.startswith(head[objective]):
            inner = name.removeprefix(head[objective])
            sign = -1 if source != objective and inner == "output_network.1.vec2_proj.weight" else 1
            assert torch.equal(value, sign * theirs[head[source] + inner]), name
        else:
            assert torch.equal(value, drawn[name]), f"{name} is not as it is without a start"
    report = model.init_report_
    assert len(report.loaded) == sum(n.startswith(("backbone.", "objective.")) for n in ours)
    assert all(name.startswith("energy_head.") for name in report.fresh)
    assert fresh.init_report_ is None


def test_from_itself(ethanol, bare):
    model = estimator("ndem").pretrain(*bare)
    weights = {k: v.clone() for k, v in model.potential_.backbone.state_dict().items()}
    model.set_params(lr=0.0)
    model.fit(ethanol[:6], init_from=model)
    assert_same(model.potential_.backbone.state_dict(), weights)
    assert "energy" in model.predict(ethanol[:2])


def test_objectives_without_that_head(ethanol, pretrained):
    model = estimator("supervised", lr=0.0).fit(ethanol[:6], init_from=pretrained["ndem"])
    assert "no denoising head" in str(model.init_report_)
    assert len(model.init_report_.skipped) == 12
    small = estimator("ndem", objective_options={"head_width": 3}, lr=0.0).fit(
        ethanol[:6], init_from=pretrained["ndem"]
    )
    assert "other shapes" in str(small.init_report_)
    dens = estimator("dens", lr=0.0).fit(ethanol[:6], init_from=pretrained["ndem"])
    assert "backbone.vector_embedding" in dens.init_report_.fresh
    assert "negated" in str(dens.init_report_)


def test_pretraining_goes_on_from_weights(bare, pretrained):
    model = estimator("noisy_nodes", lr=0.0).pretrain(*bare, init_from=pretrained["noisy_nodes"])
    assert_same(state(model), state(pretrained["noisy_nodes"]))


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"num_heads": 4}, {"cutoff": 4.0}, {"vector_cutoff": False}])
def test_other_networks(ethanol, pretrained, change):
    """Some of these have weights of the same shapes, and would silently be another function."""
    model = estimator("ndem", backbone_options={**TINY, **change}, lr=0.0)
    with pytest.raises(ConfigError, match=f"init_from has another architecture.*{next(iter(change))}"):
        model.fit(ethanol[:6], init_from=pretrained["ndem"])
    model.fit(ethanol[:6], init_from=pretrained["ndem"], init_partial=True)
    theirs = pretrained["ndem"].potential_.backbone.state_dict()
    ours = model.potential_.backbone.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert next(iter(change)) in str(model.init_report_)


@pytest.mark.parametrize("name", list(registry.BACKBONES))
def test_heads_change_sign(name):
    """What `transfer` negates when a head tells minus the noise: the output, exactly, and nothing but its sign."""
    if registry.missing_for(name):
        pytest.skip(f"needs {registry.missing_for(name)}")
    cls = registry.lookup(registry.BACKBONES, name, "backbone")
    backbone = fill_weights(cls(**cls.tiny)).double().eval()
    head = fill_weights(backbone.vector_head()).double().eval()
    batch = batch_of(example_molecules(), backbone.cutoff)
    before = head(backbone(batch), batch).detach()
    assert len(head.sign_weights) > 0
    with torch.no_grad():
        for weight in head.sign_weights:
            head.get_parameter(weight).neg_()
    assert float(before.abs().max()) > 1e-6
    torch.testing.assert_close(head(backbone(batch), batch).detach(), -before, rtol=0, atol=0)


def test_on_the_command_line(bare, ethanol, tmp_path, capsys):
    pytest.importorskip("typer")
    from ndem_zoo.cli import run

    write(tmp_path / "bare.extxyz", [Atoms(a.numbers, a.positions) for a in bare[0]])
    small = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    common = [*small, "--max-steps", "4", "--set", "batch_size=3", "--quiet", "--device", "cpu"]
    words = ["train", "--pretrain", "--data", str(tmp_path / "bare.extxyz"), "--n-train", "7", "--n-valid", "3"]
    assert run([*words, "--out", str(tmp_path / "pre"), *common]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "pre" / "metrics.json").read_text(encoding="utf-8"))
    assert record["pretraining"] is True
    assert "valid" not in record
    words = ["train", "--data", "sample:ethanol", "--n-train", "8", "--n-valid", "4", "--n-test", "4"]
    words += ["--init-from", str(tmp_path / "pre"), "--out", str(tmp_path / "fine"), *common]
    assert run(words) == 0, capsys.readouterr().err
    assert "weights loaded" in capsys.readouterr().out
    record = json.loads((tmp_path / "fine" / "metrics.json").read_text(encoding="utf-8"))
    assert record["test"]["n_structures"] == 4
    assert "weights loaded" in record["init_from"]
    assert (
        run(["predict", "--model", str(tmp_path / "pre"), "--data", "sample:ethanol", "--out", str(tmp_path / "p.xyz")])
        == 1
    )
    assert "only pre-trained" in capsys.readouterr().err


def test_a_checkpoint_on_the_command_line(tmp_path, capsys):
    pytest.importorskip("typer")
    from ndem_zoo.cli import run

    network = TorchMDNet(**TINY, vector_cutoff=False)
    torch.save({f"representation_model.{k}": v for k, v in network.state_dict().items()}, tmp_path / "theirs.pt")
    words = [
        "train",
        "--data",
        "sample:ethanol",
        "--n-train",
        "8",
        "--n-valid",
        "4",
        "--n-test",
        "4",
        "--max-steps",
        "2",
    ]
    words += ["--init-from", str(tmp_path / "theirs.pt"), "--quiet", "--device", "cpu", "--out", str(tmp_path / "run")]
    small = [part for key, value in TINY.items() if key != "num_heads" for part in ("--set", f"{key}={value}")]
    assert run([*words, *small]) == 2
    assert "vector_cutoff" in capsys.readouterr().err
    assert run([*words, *small, "--set", "vector_cutoff=false"]) == 0, capsys.readouterr().err
    assert "theirs.pt" in capsys.readouterr().out
