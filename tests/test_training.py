"""The training loop: it learns, it repeats itself, and a run that was stopped anywhere ends as if it had not been."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ndem_zoo import checkpoint as files
from ndem_zoo import training
from ndem_zoo.errors import ConfigError, DataWarning, FileFormatError, TrainingError
from ndem_zoo.history import from_columns, read_history, to_columns, write_history
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet
from ndem_zoo.registry import BACKBONES
from ndem_zoo.training import Run, TrainSettings, decay_groups

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}

#: A learning rate that changes no prediction: what is left is the bookkeeping.
FROZEN = 1e-30


def estimator(**options) -> NDeMTorchMDNet:
    """A tiny model whose 10 structures make epochs of 4 steps, the last with a single structure."""
    defaults = {"backbone_options": TINY, "batch_size": 3, "schedule": "constant", "warmup_steps": 0}
    defaults |= {"lr": 1e-2, "min_lr": 0.0, "device": "cpu", "progress": False}
    return NDeMTorchMDNet(**{**defaults, **options})


@pytest.fixture(scope="module")
def train_set(ethanol):
    return ethanol[:10]


@pytest.fixture(scope="module")
def valid_set(ethanol):
    """Seven structures: validated in batches of 3, 3 and 1."""
    return ethanol[1000:1007]


def weights(model) -> dict[str, torch.Tensor]:
    state = {f"potential.{k}": v.clone() for k, v in model.potential_.state_dict().items()}
    return state | {f"objective.{k}": v.clone() for k, v in model.objective_.state_dict().items()}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name, value in a.items() if not torch.equal(value, b[name])]
    assert not different


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_eight_frames_are_learned_by_heart(ethanol):
    """Below 1 meV/Å: impossible with a wrong gradient, lost precision, or labels that do not belong to the structures."""
    model = estimator(
        objective="supervised",
        backbone_options={"hidden_channels": 64, "num_layers": 1, "num_heads": 8, "num_rbf": 64},
        batch_size=8,
        lr=1e-2,
        warmup_steps=20,
        schedule="cosine",
        clip_norm=10.0,
        force_weight=100.0,
        validate_every=500,
    )
    frames = ethanol[:8]
    before = float(np.abs(frames.targets["forces"]).mean())
    model.fit(frames, max_steps=1000)
    assert before > 0.5
    assert model.evaluate(frames)["forces_mae"] < 1e-3


def test_the_seed_decides_everything(train_set, valid_set):
    runs = [estimator(seed=seed, ema_decay=0.9).fit(train_set, valid_set, max_steps=6) for seed in (0, 0, 1)]
    first, second, other = (weights(model) for model in runs)
    assert_same_weights(first, second)
    assert without_seconds(runs[0].history_) == without_seconds(runs[1].history_)
    moving = [name for name, p in runs[0].potential_.named_parameters() if p.requires_grad and p.dim() > 1]
    assert all(not torch.equal(first[f"potential.{name}"], other[f"potential.{name}"]) for name in moving)


def test_each_part_of_a_run_is_drawn_from_the_seed(train_set):
    """Noise and order as well as weights: one structure and one network leave the noise alone to make a difference."""
    options = {"objective_options": {"reuse_main_head": True}, "lr": FROZEN, "validate_every": 1}
    start = estimator(**options).fit(train_set, max_steps=1)
    rows = [
        estimator(**options, seed=seed).fit(train_set[:1], max_steps=3, init_from=start).history_ for seed in (0, 0, 1)
    ]
    first, again, other = ([row["train_ndem"] for row in each] for each in rows)
    assert len(set(first)) == 3, "every step has its own noise"
    assert first == again
    assert not set(first) & set(other)
    assert len({row["train_forces"] for each in rows for row in each}) == 1, "labels are learned without noise"
    orders = [
        np.concatenate(training.Order(np.full(10, 9), 3, seed).batches(epoch)).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_global_randomness_is_neither_used_nor_touched(train_set, valid_set):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the global generator is what this is about)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
        results.append(weights(estimator(precision="64-true").fit(train_set, valid_set, max_steps=4)))
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert np.array_equal(before[1], after[1])
        assert before[2] == after[2]
        assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
        assert torch.is_grad_enabled()
    assert_same_weights(*results)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_reference_energies_and_precision(train_set, precision):
    given = {"H": -13.6056931229942, "C": -1029.4979167983104, "O": -2043.9341871012347}
    terms = []

    class Recorder(training.TrainStep):
        def forward(self, inputs):
            assert torch.get_default_dtype() == torch.float32, "the default dtype belongs to the user"
            terms.append(super().forward(inputs))
            return terms[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TrainStep", Recorder)
        model = estimator(precision=precision, reference_energies=given, ema_decay=0.9).fit(train_set, max_steps=5)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert {p.dtype for p in model.potential_.parameters()} == {dtype}
    assert {p.dtype for p in model.objective_.parameters()} == {dtype}
    assert {term.dtype for step in terms for term in step.values()} == {dtype}
    assert model.potential_.reference.dtype == torch.float64
    assert {s: model.potential_.reference[z].item() for s, z in (("H", 1), ("C", 6), ("O", 8))} == given
    if precision == "64-true":  # computed in double precision all the way, not rounded in between
        value = model.history_[-1]["train_loss"]
        assert value != float(np.float32(value))


def test_total_energies_are_not_rounded(train_set):
    """The float32 spacing at -1e6 eV is 0.06 eV: labels and predictions there must be those of small energies, shifted."""
    shift = -1.0e6
    columns = train_set.columns()
    columns["targets"] = {**train_set.targets, "energy": train_set.targets["energy"] + shift}
    shifted = type(train_set)(**columns)
    near, far = (estimator(objective="supervised").fit(data, max_steps=8) for data in (train_set, shifted))
    difference = far.predict(train_set)["energy"] - near.predict(train_set)["energy"] - shift
    assert np.abs(difference).max() < 1e-3
    assert far.history_[-1]["train_energy"] == pytest.approx(near.history_[-1]["train_energy"], rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "schedule='linear'; allowed are plateau, cosine, constant"),
        ({"precision": "16"}, "precision='16'; allowed are 32-true, 64-true"),
        ({"batch_size": 0}, "batch_size=0; it must be a whole number, 1 or more"),
        ({"batch_size": 2.5}, r"batch_size=2\.5; it must be a whole number"),
        ({"batch_size": None}, "batch_size=None"),
        ({"max_atoms": 0}, "max_atoms=0; it must be a whole number, 1 or more"),
        ({"max_atoms": 9, "batch_size": 0}, "batch_size=0"),
        ({"bucket": 1}, "bucket=1; allowed are True and False"),
        ({"prefetch": "yes"}, "prefetch='yes'; allowed are True and False"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_time": 0.0}, r"max_time=0\.0; it must be a positive number"),
        ({"max_time": "1h"}, "max_time='1h'; it must be a positive number"),
        ({"nb_epoch": True}, "nb_epoch=True"),
        ({"validate_every": 0}, "validate_every=0"),
        ({"early_stopping": 0}, "early_stopping=0"),
        ({"seed": -1}, "seed=-1; it must be a whole number, 0 or more"),
        ({"seed": None}, "seed=None"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"plateau_factor": 1.0}, "plateau_factor=1.0; it must lie between 0 and 1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0; it must lie between 0"),
        ({"max_steps": None}, "nothing ends the training"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**{"max_steps": 5, **options})


def test_settings_from_arrays_become_plain_numbers():
    """What a search over an array hands out must fit into a checkpoint."""
    settings = TrainSettings(
        max_steps=np.int64(3), lr=np.float32(0.5), batch_size=np.int64(2), weight_decay=np.int64(0)
    )
    json.dumps(dataclasses.asdict(settings))
    assert settings == TrainSettings(max_steps=3, lr=0.5, batch_size=2, weight_decay=0)


@pytest.mark.parametrize(("options", "steps"), [({"nb_epoch": 2}, 8), ({"nb_epoch": 2, "max_steps": 5}, 5)])
def test_the_first_limit_ends_the_training(train_set, options, steps):
    model = estimator().fit(train_set, **options)
    assert model.history_[-1]["step"] == steps
    assert model.history_[-1]["epoch"] == steps / 4


class Clock:
    """A clock on which every look takes a second."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_max_time_ends_the_training_and_drives_the_schedule(train_set, monkeypatch):
    monkeypatch.setattr(training, "time", Clock())
    rates = record_learning_rates(monkeypatch)
    model = estimator(schedule="cosine", lr=1.0, validate_every=100).fit(train_set, max_time=5.5)
    assert model.history_[-1]["step"] == 6
    assert model.history_[-1]["seconds"] == 6.0
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 5.5)) for s in range(6)])


# -------------------------------------------------------------------------------------------------------- learning rate


def record_learning_rates(monkeypatch) -> list[float]:
    """The learning rates with which AdamW really steps."""
    rates = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure=None):
            rates.extend({group["lr"] for group in self.param_groups})
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    return rates


def test_warm_up_and_constant(train_set, monkeypatch):
    rates = record_learning_rates(monkeypatch)
    model = estimator(lr=0.01, warmup_steps=4, validate_every=1).fit(train_set, max_steps=6)
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert [row["lr"] for row in model.history_] == pytest.approx([0.005, 0.0075, 0.01, 0.01, 0.01, 0.01])


def test_cosine(train_set, monkeypatch):
    rates = record_learning_rates(monkeypatch)
    estimator(lr=0.01, min_lr=0.002, schedule="cosine").fit(train_set, nb_epoch=2)
    expected = [0.002 + 0.004 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx(expected)
    assert rates[0] == 0.01
    assert rates[4] == pytest.approx(0.006)


def test_cosine_with_warm_up(train_set, monkeypatch):
    rates = record_learning_rates(monkeypatch)
    estimator(lr=0.01, schedule="cosine", warmup_steps=2).fit(train_set, nb_epoch=1)
    assert rates == pytest.approx([0.005, *(0.005 * (1 + math.cos(math.pi * step / 4)) for step in (1, 2, 3))])


def test_plateau_counts(train_set, valid_set, monkeypatch):
    """The loss never falls after the first look: patience 2 lowers the rate after the looks 4, 7, 10; not below min_lr."""
    rates = record_learning_rates(monkeypatch)
    model = estimator(
        lr=FROZEN, schedule="plateau", plateau_patience=2, plateau_factor=0.5, min_lr=0.2 * FROZEN, validate_every=1
    ).fit(train_set, valid_set, max_steps=12)
    assert len({row["valid_loss"] for row in model.history_}) == 1
    assert [rate / FROZEN for rate in rates] == pytest.approx([1.0] * 4 + [0.5] * 3 + [0.25] * 3 + [0.2] * 2)


@pytest.mark.parametrize("has_validation", [True, False])
def test_plateau_is_that_of_torch(train_set, valid_set, monkeypatch, has_validation):
    rates = record_learning_rates(monkeypatch)
    model = estimator(lr=0.1, schedule="plateau", plateau_patience=1, plateau_factor=0.7, min_lr=1e-3, validate_every=2)
    model.fit(train_set, valid_set if has_validation else None, max_steps=40)
    losses = [row["valid_loss" if has_validation else "train_loss"] for row in model.history_]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.7, patience=1, threshold=0.0, min_lr=1e-3, eps=0.0
    )
    expected = []
    for loss in losses:
        expected += [optimizer.param_groups[0]["lr"]] * 2
        scheduler.step(loss)
    assert rates == pytest.approx(expected, rel=1e-12)
    assert len(set(rates)) > 3, "the test must see reductions"
    assert any(late < early for early, late in itertools.pairwise(losses)), "and improvements"


def test_early_stopping_counts(train_set, valid_set):
    options = {"lr": FROZEN, "validate_every": 2, "early_stopping": 3}
    model = estimator(**options).fit(train_set, valid_set, max_steps=100)
    assert [row["step"] for row in model.history_] == [2, 4, 6, 8]


def test_early_stopping_starts_again_after_an_improvement(train_set, valid_set):
    model = estimator(lr=0.1, validate_every=1, early_stopping=3).fit(train_set, valid_set, max_steps=60)
    losses = [row["valid_loss"] for row in model.history_]
    best, waited, expected = math.inf, 0, None
    for number, loss in enumerate(losses, start=1):
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        if waited == 3 and expected is None:
            expected = number
    assert len(losses) == expected
    assert 4 < len(losses) < 60, "it must wait, improve and stop"


def test_the_best_weights_are_kept(train_set, valid_set):
    model = estimator(lr=0.1, validate_every=1).fit(train_set, valid_set, max_steps=20)
    losses = {row["valid_forces_mae"]: row["valid_loss"] for row in model.history_}
    kept = model.evaluate(valid_set)["forces_mae"]
    best = min(losses, key=losses.get)
    assert kept == pytest.approx(best, rel=1e-6)
    assert model.history_[-1]["valid_loss"] > min(losses.values()), "the last must not be the best"


def test_without_validation_the_last_weights_are_kept(train_set):
    seen = []
    model = estimator(lr=0.1, validate_every=1)
    model.fit(train_set, max_steps=12, callback=lambda row: seen.append((row["train_loss"], weights(model))))
    assert seen[-1][0] > min(loss for loss, _ in seen), "the last must not be the best"
    assert_same_weights(weights(model), seen[-1][1])


# ------------------------------------------------------------------------------------------------- terms and validation


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
def test_validation_is_exact_over_uneven_batches(train_set, valid_set, loss):
    """Against plain sums over single structures: an average of batch averages weighs the last, smaller batch too much."""
    model = estimator(lr=FROZEN, loss=loss, energy_weight=2.0, force_weight=7.0, eval_batch_size=3, precision="64-true")
    row = model.fit(train_set, valid_set, max_steps=1).history_[-1]
    scale = float(model.potential_.scale)
    function = {"mse": np.square, "l1": np.abs, "smooth_l1": lambda x: np.where(abs(x) < 1, x * x / 2, abs(x) - 0.5)}[
        loss
    ]
    energy, forces = [], []
    for i in range(7):
        predicted = model.predict(valid_set.atoms(i))
        energy.append(predicted["energy"][0] - valid_set.targets["energy"][i])
        forces.append(predicted["forces"][0] - valid_set.targets["forces"][9 * i : 9 * i + 9])
    expected = 2.0 * np.mean(function(np.array(energy) / scale)) + 7.0 * np.mean(function(np.array(forces) / scale))
    assert row["valid_loss"] == pytest.approx(expected, rel=1e-9)
    assert row["valid_energy_mae"] == pytest.approx(np.mean(np.abs(energy)), rel=1e-9)
    assert row["valid_forces_mae"] == pytest.approx(np.mean(np.abs(forces)), rel=1e-9)
    assert row["valid_forces_rmse"] == pytest.approx(math.sqrt(np.mean(np.square(forces))), rel=1e-9)


def test_training_terms_are_averaged_over_their_own_steps(train_set):
    every = estimator(validate_every=1).fit(train_set, max_steps=6).history_
    some = estimator(validate_every=3).fit(train_set, max_steps=6).history_
    for name in ("train_loss", "train_energy", "train_forces", "train_ndem"):
        expected = [sum(row[name] for row in every[i : i + 3]) / 3 for i in (0, 3)]
        assert [row[name] for row in some] == pytest.approx(expected, rel=1e-12)
    for row in every:
        assert row["train_loss"] == pytest.approx(
            row["train_energy"] + row["train_forces"] + row["train_ndem"], rel=1e-5
        )


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("decay", [1 - k / 8 for k in range(8)]),
        ("warmup", [min(1.0, 10 * k / 8) for k in range(8)]),
    ],
)
def test_weight_schedules(train_set, schedule, factors):
    """Noise and weights are the same in every run, so that the term shows its weight."""
    options = {"lr": FROZEN, "validate_every": 1, "weight": 0.5}
    constant, changing = (
        estimator(**options, weight_schedule=name).fit(train_set, max_steps=8).history_
        for name in ("constant", schedule)
    )
    found = [b.get("train_ndem", 0.0) / a["train_ndem"] for a, b in zip(constant, changing, strict=True)]
    assert found == pytest.approx(factors, rel=1e-5)


def test_clipping(train_set):
    """AdamW forgets the size of a gradient, but not its ratio to that of the step before."""
    free, loose, tight = (weights(estimator(clip_norm=norm).fit(train_set, max_steps=3)) for norm in (None, 1e9, 1e-3))
    assert_same_weights(free, loose)
    assert any(not torch.equal(free[name], tight[name]) for name in free)


def test_no_average_for_decay_zero(train_set):
    assert_same_weights(*(weights(estimator(ema_decay=d).fit(train_set, max_steps=3)) for d in (None, 0.0)))


def test_a_diverged_training_is_an_error_that_names_the_step(train_set, valid_set, tmp_path):
    model = estimator(lr=1e15)
    with pytest.raises(
        TrainingError, match=r"is (nan|inf|-inf) at step \d+: the training has diverged; try a smaller lr"
    ):
        model.fit(train_set, valid_set, max_steps=50, checkpoint_dir=tmp_path / "run", checkpoint_every=1)
    for path in files.checkpoints(tmp_path / "run"):  # from what is kept, a training could go on
        tensors = files.load_tensors(path / "trainer.safetensors")
        assert all(torch.isfinite(value).all() for value in tensors.values())


def test_broken_weights_are_noticed_without_a_broken_loss(train_set, monkeypatch):
    """The last update can break the weights after the last loss was still finite."""
    one_step = Run.one_step

    def breaking(self, indices):
        one_step(self, indices)
        if self.state.step == 4:
            with torch.no_grad():
                next(self.potential.parameters())[0] = math.nan

    monkeypatch.setattr(Run, "one_step", breaking)
    with pytest.raises(TrainingError, match="weights is nan at step 4"):
        estimator().fit(train_set, max_steps=4)


# -------------------------------------------------------------------------------------------------------------- history


def test_history_csv_is_the_history(train_set, valid_set, tmp_path):
    model = estimator(validate_every=3).fit(train_set, valid_set, max_steps=8, checkpoint_dir=tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "history.csv").open()))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == model.history_
    assert [row["step"] for row in model.history_] == [3, 6, 8]
    assert read_history(tmp_path / "run" / "history.csv") == model.history_


def test_a_column_that_begins_later(train_set, tmp_path):
    """During warm-up the first row lacks the auxiliary term; the table must not shift."""
    model = estimator(validate_every=1, weight_schedule="warmup", weight=1.0)
    model.fit(train_set, max_steps=4, checkpoint_dir=tmp_path / "run")
    assert "train_ndem" not in model.history_[0]
    assert "train_ndem" in model.history_[1]
    assert read_history(tmp_path / "run" / "history.csv") == model.history_
    model.save(tmp_path / "model")
    assert NDeMTorchMDNet.load(tmp_path / "model").history_ == model.history_


def test_histories_on_disk(tmp_path):
    rows = [{"a": 0.1, "b": 1}, {"b": 1e-300, "c": 1 / 3}]
    write_history(tmp_path / "h.csv", rows)
    assert read_history(tmp_path / "h.csv") == rows
    write_history(tmp_path / "h.csv", [])
    assert read_history(tmp_path / "h.csv") == []
    for content in ("a,b\n1,x\n", "a,b\n1\n", "a,b\n1,2,3\n", "a,b\n1,2\n3,4"):
        (tmp_path / "h.csv").write_text(content)
        with pytest.raises(FileFormatError, match=r"h\.csv is damaged"):
            read_history(tmp_path / "h.csv")


def test_the_callback_gets_every_row(train_set, valid_set):
    rows = []
    model = estimator(validate_every=2).fit(train_set, valid_set, max_steps=5, callback=rows.append)
    assert rows == model.history_
    assert [row["step"] for row in rows] == [2, 4, 5]


def test_tensorboard_files_hold_the_history(train_set, valid_set, tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = estimator(validate_every=2)
    model.fit(train_set, valid_set, max_steps=4, checkpoint_dir=tmp_path / "run", tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(model.history_[0])
    for name in ("train_loss", "valid_forces_mae", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in model.history_]


def test_nothing_is_written_outside_the_folder(train_set, valid_set, tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(home))
    monkeypatch.chdir(work)
    model = estimator(validate_every=2)
    model.fit(train_set, valid_set, max_steps=4)
    assert not [*home.rglob("*"), *work.rglob("*")], "without a checkpoint_dir nothing is written"
    model.fit(train_set, valid_set, max_steps=4, checkpoint_dir="run", checkpoint_every=2)
    assert {path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()} == {
        "run/history.csv",
        *(f"run/step-000000000{step}/trainer.{kind}" for step in (2, 4) for kind in ("json", "safetensors")),
    }
    assert not list(home.rglob("*"))


def test_no_file_is_a_pickle(train_set, tmp_path):
    import pickletools

    model = estimator().fit(train_set, max_steps=2, checkpoint_dir=tmp_path / "run")
    model.save(tmp_path / "model")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 7
    for path in written:
        content = path.read_bytes()
        assert not content.startswith(b"PK"), "a zip archive, as torch.save writes"
        with pytest.raises(ValueError):  # noqa: PT011 (whatever it says: it is no pickle)
            list(pickletools.genops(content))


# --------------------------------------------------------------------------------------------------- stop and continue

#: All that has a state: momentum, plateau with reductions, average, clipping, best weights.
STATEFUL = {
    "lr": 0.1,
    "warmup_steps": 2,
    "schedule": "plateau",
    "plateau_patience": 1,
    "plateau_factor": 0.5,
    "validate_every": 3,
    "clip_norm": 5.0,
    "ema_decay": 0.9,
    "weight_decay": 0.01,
}
STEPS = 22


class Crash(Exception):
    """Ends a training without its knowledge, as a power cut would."""


def crash_after(monkeypatch, step: int) -> None:
    one_step = Run.one_step

    def crashing(self, indices):
        if self.state.step == step:
            raise Crash
        one_step(self, indices)

    monkeypatch.setattr(Run, "one_step", crashing)


def final(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Everything in the newest checkpoint but the time it took."""
    path = files.checkpoints(folder)[0]
    state = files.load_json(path / "trainer.json")["state"]
    state.pop("seconds")
    state["history"].sort()  # names
    tensors = files.load_tensors(path / "trainer.safetensors")
    tensors.pop("history.seconds", None)
    return tensors, state


def assert_same_end(a: Path, b: Path) -> None:
    (tensors_a, state_a), (tensors_b, state_b) = final(a), final(b)
    assert state_a == state_b
    assert_same_weights(tensors_a, tensors_b)
    assert without_seconds(read_history(a / "history.csv")) == without_seconds(read_history(b / "history.csv"))


@pytest.fixture(scope="module")
def straight(train_set, valid_set, tmp_path_factory):
    """Folder and model of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    model = estimator(**STATEFUL).fit(train_set, valid_set, max_steps=STEPS, checkpoint_dir=folder)
    return folder, model


def test_a_history_comes_back_from_its_columns():
    """Bit for bit: whole numbers stay whole, and what a row lacks stays away."""
    rows = [{"step": 1, "lr": 0.1 + 0.2}, {"step": 2**40 + 1, "lr": 5e-324, "spikes": 1}]
    names, columns = to_columns(rows)
    assert names == ["step", "lr", "spikes"]
    assert {name: column.dtype for name, column in columns.items()} == {"step": int, "lr": float, "spikes": float}
    assert from_columns(columns) == rows
    assert isinstance(from_columns(columns)[0]["step"], int)
    assert from_columns(to_columns([])[1]) == []


def test_the_run_that_is_compared_with_has_a_past(straight):
    """Else the tests below would prove nothing."""
    tensors, state = final(straight[0])
    assert state["plateau_scale"] < 1.0
    assert 0 < state["best_step"] < STEPS
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"module", "optimizer", "ema", "best", "guard", "history"}, "the sums have gone into the last row"
    assert any(
        not torch.equal(tensors[f"best.{name}"], tensors[f"ema.module.{name}"])
        for name in straight[1].potential_.state_dict()
    )


@pytest.mark.parametrize(
    ("every", "crash"),
    [
        (1, 1),  # in the first epoch, before any validation
        (1, 6),  # right after a validation, which is in the checkpoint
        (1, 11),  # in the middle of an epoch and of a validation interval
        (3, 14),  # checkpoints at validations; steps 13 and 14 are made again
        (5, 13),  # checkpoints between validations: a sum of two steps is restored
        (7, 21),  # right at a checkpoint and a validation
        (100, 9),  # no checkpoint was written yet
    ],
)
def test_resumed_is_uninterrupted(train_set, valid_set, tmp_path, straight, every, crash):
    options = {"max_steps": STEPS, "checkpoint_dir": tmp_path / "run", "checkpoint_every": every}
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, crash)
        with pytest.raises(Crash):
            estimator(**STATEFUL).fit(train_set, valid_set, **options)
    saved = [int(path.name[5:]) for path in files.checkpoints(tmp_path / "run")]
    assert saved == [s for s in range(crash, 0, -1) if s % every == 0][:2]
    model = estimator(**STATEFUL).fit(train_set, valid_set, **options, resume=True)
    assert_same_end(tmp_path / "run", straight[0])
    assert_same_weights(weights(model), weights(straight[1]))
    assert without_seconds(model.history_) == without_seconds(straight[1].history_)


def test_stopped_at_every_step(train_set, valid_set, tmp_path, straight):
    """One process per step, so to say."""
    options = {"max_steps": STEPS, "checkpoint_dir": tmp_path / "run", "checkpoint_every": 1, "resume": True}
    for step in range(1, STEPS, 2):
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, step)
            with pytest.raises(Crash):
                estimator(**STATEFUL).fit(train_set, valid_set, **options)
    estimator(**STATEFUL).fit(train_set, valid_set, **options)
    assert_same_end(tmp_path / "run", straight[0])


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine", "precision": "64-true", "weight_schedule": "decay"},
        {"objective": "noisy_nodes", "objective_options": {"sigma": (0.01, 0.1)}, "weight_schedule": "warmup"},
        {"objective_options": {"target": "boltzmann", "grad_main": "flow"}, "early_stopping": 2, "lr": 0.3},
        {"objective": "supervised", "forces": "direct", "validate_every": None},
    ],
    ids=["cosine-64", "noisy_nodes", "boltzmann-early-stopping", "direct"],
)
def test_other_runs_resume_as_exactly(train_set, valid_set, tmp_path, options):
    options = {**STATEFUL, **options}
    end = {"max_steps": 14, "checkpoint_every": 4}
    once = estimator(**options).fit(train_set, valid_set, **end, checkpoint_dir=tmp_path / "once")
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 6)
        with pytest.raises(Crash):
            estimator(**options).fit(train_set, valid_set, **end, checkpoint_dir=tmp_path / "twice")
    twice = estimator(**options).fit(train_set, valid_set, **end, checkpoint_dir=tmp_path / "twice", resume=True)
    assert_same_end(tmp_path / "twice", tmp_path / "once")
    assert_same_weights(weights(once), weights(twice))


def test_a_finished_run_is_returned_as_it_ended(train_set, valid_set, tmp_path, straight):
    shutil.copytree(straight[0], tmp_path / "run")
    model = estimator(**STATEFUL)
    model.fit(train_set, valid_set, max_steps=STEPS, checkpoint_dir=tmp_path / "run", resume=True)
    assert_same_weights(weights(model), weights(straight[1]))
    assert model.history_ == straight[1].history_


def test_limits_may_be_moved(train_set, valid_set, tmp_path, straight):
    shutil.copytree(straight[0], tmp_path / "run")
    model = estimator(**STATEFUL, early_stopping=100)
    model.fit(train_set, valid_set, max_steps=STEPS + 5, checkpoint_dir=tmp_path / "run", resume=True)
    assert model.history_[-1]["step"] == STEPS + 5
    assert model.history_[: len(straight[1].history_)] == straight[1].history_


def crashed_run(folder: Path, train_set, valid_set) -> Path:
    """A run of STATEFUL that was cut at step 12, with the checkpoints 8 and 12."""
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 12)
        with pytest.raises(Crash):
            estimator(**STATEFUL).fit(train_set, valid_set, max_steps=STEPS, checkpoint_dir=folder, checkpoint_every=4)
    assert [path.name[-2:] for path in files.checkpoints(folder)] == ["12", "08"]
    return folder


@pytest.fixture(scope="module")
def cut_run(train_set, valid_set, tmp_path_factory):
    return crashed_run(tmp_path_factory.mktemp("cut") / "run", train_set, valid_set)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer.safetensors", truncate),
        ("trainer.safetensors", flip_bits),
        ("trainer.safetensors", Path.unlink),
        ("trainer.json", truncate),
        ("trainer.json", Path.unlink),
        ("trainer.json", lambda path: path.write_text("[]")),
        ("trainer.json", lambda path: path.write_text("{}")),
    ],
    ids=["truncated", "flipped", "missing", "json-truncated", "json-missing", "json-list", "json-empty"],
)
def test_a_damaged_checkpoint_is_passed_over(train_set, valid_set, tmp_path, straight, cut_run, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(cut_run, folder)
    damage(folder / "step-0000000012" / name)
    steps = []
    limits = {"max_steps": STEPS, "checkpoint_dir": folder, "checkpoint_every": 4}
    with pytest.MonkeyPatch.context() as patch:
        one_step = Run.one_step
        patch.setattr(Run, "one_step", lambda self, i: (steps.append(self.state.step), one_step(self, i)))
        with pytest.warns(DataWarning, match=f"step-0000000012.{name}.*continues from .*step-0000000008"):
            estimator(**STATEFUL).fit(train_set, valid_set, **limits, resume=True)
    assert steps[0] == 8
    assert_same_end(folder, straight[0])


def test_only_damaged_checkpoints_are_an_error(train_set, valid_set, tmp_path, cut_run):
    folder = tmp_path / "run"
    shutil.copytree(cut_run, folder)
    for path in files.checkpoints(folder):
        truncate(path / "trainer.safetensors")
    with pytest.raises(FileFormatError, match="none of the 2 checkpoints"):
        estimator(**STATEFUL).fit(train_set, valid_set, max_steps=STEPS, checkpoint_dir=folder, resume=True)
    assert len(files.checkpoints(folder)) == 2, "they may be of use to somebody"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.2}, r"lr=0\.1, not 0\.2"),
        ({"batch_size": 4}, "batch_size=3, not 4"),
        ({"ema_decay": None}, r"ema_decay=0\.9, not None"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"precision": "64-true"}, "precision='32-true', not '64-true'"),
        ({"backbone_options": {**TINY, "cutoff": 4.0}}, r"backbone\.options\.cutoff=5\.0, not 4\.0"),
        ({"backbone_options": {**TINY, "num_heads": 1}}, r"backbone\.options\.num_heads=2, not 1"),
        ({"backbone_options": {**TINY, "num_layers": 2}}, r"backbone\.options\.num_layers=1, not 2"),
        ({"weight": 0.5}, r"objective\.weight=1\.0, not 0\.5"),
        ({"weight_schedule": "decay"}, "objective.weight_schedule='constant', not 'decay'"),
        ({"objective_options": {"sigma": 0.1}}, r"objective\.options\.sigma=0\.05, not 0\.1"),
        ({"objective": "supervised"}, "objective.name='NDeM', not 'Supervised'"),
        ({"force_weight": 31.0}, r"supervised\.force_weight=30\.0, not 31\.0"),
        ({"loss": "l1"}, "supervised.loss='mse', not 'l1'"),
        ({"scale": 1.0}, r"scale='force_rms', not 1\.0"),
        ({"forces": "direct"}, "forces='gradient', not 'direct'"),
        ({"reference_energies": {"H": 0.0, "C": 0.0, "O": 0.0}}, "reference_energies=None, not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_training_is_not_continued(train_set, valid_set, cut_run, options, message):
    before = sorted((path.as_posix(), path.stat().st_mtime_ns) for path in cut_run.rglob("*"))
    with pytest.raises(ConfigError, match=f"step-0000000012 was made with .*{message}"):
        estimator(**{**STATEFUL, **options}).fit(
            train_set, valid_set, max_steps=STEPS, checkpoint_dir=cut_run, resume=True
        )
    assert sorted((path.as_posix(), path.stat().st_mtime_ns) for path in cut_run.rglob("*")) == before


@pytest.mark.parametrize("change", ["other structures", "other order", "other labels", "other validation", "none"])
def test_other_data_are_not_accepted(ethanol, train_set, valid_set, cut_run, change):
    """Lists of structures all have the ids 0, 1, ...: only their content tells them apart."""

    def anew(dataset, **targets):
        columns = dataset.columns()
        return type(dataset)(
            **{**columns, "targets": {**dataset.targets, **targets}}, ids=train_set.ids[: len(dataset)]
        )

    train, valid = train_set, valid_set
    if change == "other structures":
        train = anew(ethanol[20:30])
    elif change == "other order":
        train = anew(train_set.select([1, 0, *range(2, 10)]))
    elif change == "other labels":
        train = anew(train_set, forces=train_set.targets["forces"] * (1 + 1e-9))
    else:
        valid = None if change == "none" else ethanol[1001:1008]
    with pytest.raises(ConfigError, match=f"other {'training' if valid is valid_set else 'validation'} data"):
        estimator(**STATEFUL).fit(train, valid, max_steps=STEPS, checkpoint_dir=cut_run, resume=True)


def test_a_used_folder_is_not_written_over(train_set, valid_set, cut_run, tmp_path):
    with pytest.raises(ConfigError, match="holds a training already: pass resume=True"):
        estimator(**STATEFUL).fit(train_set, valid_set, max_steps=STEPS, checkpoint_dir=cut_run)
    estimator().fit(train_set, max_steps=1).save(tmp_path / "model")
    history = (tmp_path / "model" / "history.csv").read_bytes()
    with pytest.raises(ConfigError, match="holds a training already"):
        estimator().fit(train_set, max_steps=2, checkpoint_dir=tmp_path / "model")
    assert (tmp_path / "model" / "history.csv").read_bytes() == history


@pytest.mark.parametrize("option", [{"resume": True}, {"checkpoint_every": 5}, {"tensorboard": True}])
def test_what_writes_needs_a_folder(train_set, option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.* needs a checkpoint_dir"):
        estimator().fit(train_set, max_steps=1, **option)


@pytest.mark.parametrize("every", [0, -3, 1.5])
def test_checkpoint_every_must_be_a_number_of_steps(train_set, tmp_path, every):
    with pytest.raises(ConfigError, match=f"checkpoint_every={every}; it must be a whole number, 1 or more"):
        estimator().fit(train_set, max_steps=1, checkpoint_dir=tmp_path / "run", checkpoint_every=every)
    assert not (tmp_path / "run").exists()


def test_resume_starts_where_there_is_nothing(train_set, valid_set, tmp_path, straight):
    folder = tmp_path / "deep" / "run"
    estimator(**STATEFUL).fit(train_set, valid_set, max_steps=STEPS, checkpoint_dir=folder, resume=True)
    assert_same_end(folder, straight[0])


def test_seconds_go_on_from_the_checkpoint(train_set, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "time", Clock())
    options = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 2}
    crash_after(monkeypatch, 5)
    with pytest.raises(Crash):
        estimator(validate_every=1).fit(train_set, max_steps=8, **options)
    monkeypatch.undo()
    monkeypatch.setattr(training, "time", Clock())
    model = estimator(validate_every=1).fit(train_set, max_steps=8, **options, resume=True)
    assert [row["seconds"] for row in model.history_] == [1, 2, 3, 4, 5, 6, 7, 8]


# ------------------------------------------------------------------------------------------------------ kill and Ctrl-C


@pytest.fixture
def keyboard():
    """Ctrl-C raises KeyboardInterrupt, as in a program of its own; afterwards as it was."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [4, 9, 22], ids=["between validations", "at a validation", "in the last step"])
def test_ctrl_c_ends_a_training_that_can_be_resumed(train_set, valid_set, tmp_path, straight, keyboard, step):
    one_step = Run.one_step
    model = estimator(**STATEFUL)
    options = {"max_steps": STEPS, "checkpoint_dir": tmp_path / "run"}

    def pressing(self, indices):
        one_step(self, indices)
        if self.state.step == step:
            press(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "one_step", pressing)
        model.fit(train_set, valid_set, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert model.history_[-1]["step"] == step
    assert model.interrupted_ == (step < STEPS)
    best = min(model.history_, key=lambda row: row["valid_loss"])
    assert model.evaluate(valid_set)["forces_mae"] == pytest.approx(best["valid_forces_mae"], rel=1e-5)
    resumed = estimator(**STATEFUL).fit(train_set, valid_set, **options, resume=True)
    assert not resumed.interrupted_
    assert_same_end(tmp_path / "run", straight[0])
    assert_same_weights(weights(resumed), weights(straight[1]))


def test_ctrl_c_during_a_callback(train_set, valid_set, keyboard):
    rows = []
    model = estimator(validate_every=2)
    model.fit(train_set, valid_set, max_steps=50, callback=lambda row: (rows.append(row), press(len(rows) == 1)))
    assert model.interrupted_
    assert [row["step"] for row in model.history_] == [2, 3]


def test_a_second_ctrl_c_aborts(train_set, tmp_path, keyboard):
    with pytest.raises(KeyboardInterrupt):
        estimator(validate_every=2).fit(
            train_set, max_steps=50, checkpoint_dir=tmp_path / "run", callback=lambda row: press(2)
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"history.csv"}


def test_outside_the_main_thread(train_set, valid_set, straight, tmp_path):
    """Signals belong to the main thread; a training in another one works without them, to the same bits."""
    found = []

    def work():
        model = estimator(**STATEFUL)
        found.append(model.fit(train_set, valid_set, max_steps=STEPS, checkpoint_dir=tmp_path / "run"))

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_weights(weights(found[0]), weights(straight[1]))


@pytest.mark.slow
def test_kill_dash_nine_and_ctrl_c_of_a_process(tmp_path):
    """Real signals, also while a checkpoint is being written: the end is that of the process that was left alone."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "training_driver.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["straight"] == 0
    *killed, last = record["killed"]
    assert [entry["code"] for entry in killed] == [-signal.SIGKILL] * 4
    assert any(entry["half_written"] for entry in killed), "a kill must hit a checkpoint that is being written"
    assert last == {"code": 0, "half_written": []}
    assert_same_end(tmp_path / "killed", tmp_path / "straight")
    first, second = record["interrupted"]
    assert first["code"] == second["code"] == 0
    assert first["interrupted"]
    assert not second["interrupted"]
    assert 6 <= int(first["newest"][5:]) < 24
    assert_same_end(tmp_path / "interrupted", tmp_path / "straight")
    saved = [files.load_tensors(tmp_path / f"{name}-model" / "weights.safetensors") for name in ("killed", "straight")]
    assert_same_weights(*saved)


# ------------------------------------------------------------------------------------------------- sizes and batches


@pytest.fixture(scope="module")
def mixed(ethanol):
    """Structures of 3 to 9 atoms, cut out of ethanol, with labels of their own."""
    rng = np.random.default_rng(0)
    counts = rng.integers(3, 10, 24)
    rows = np.concatenate([9 * i + np.arange(n) for i, n in enumerate(counts)])
    return type(ethanol)(
        ethanol.z[rows],
        ethanol.pos[rows],
        np.concatenate([[0], np.cumsum(counts)]),
        targets={"energy": rng.normal(size=24), "forces": rng.normal(size=(len(rows), 3))},
    )


def seen_by(patch) -> list[tuple[int, int]]:
    """Structures and atoms of each step of a training."""
    seen, one_step = [], Run.one_step

    def looking(run, shares):
        seen.extend((share.batch.n_systems, len(share.batch.z)) for share in shares)
        one_step(run, shares)

    patch.setattr(Run, "one_step", looking)
    return seen


def test_steps_are_limited_by_atoms(mixed, monkeypatch):
    seen = seen_by(monkeypatch)
    model = estimator(batch_size=None, max_atoms=70).fit(mixed, nb_epoch=2)
    assert max(atoms for _, atoms in seen) <= 70
    assert max(structures for structures, _ in seen) > 8, "the preset's batch_size does not count then"
    assert sum(structures for structures, _ in seen) == 48
    ends = np.flatnonzero(np.cumsum([structures for structures, _ in seen]) % 24 == 0) + 1
    assert [row["step"] for row in model.history_] == ends.tolist() == [ends[0], len(seen)]
    assert [row["epoch"] for row in model.history_] == [1, 2]


def test_schedules_follow_epochs_of_different_length(mixed, monkeypatch):
    rates = record_learning_rates(monkeypatch)
    model = estimator(batch_size=None, max_atoms=20, seed=19, schedule="cosine", lr=1e-3).fit(mixed, nb_epoch=3)
    steps = np.diff([0] + [int(row["step"]) for row in model.history_])
    done = np.concatenate([(epoch + np.arange(n) / n) / 3 for epoch, n in enumerate(steps)])
    assert len(set(steps)) > 1, "the test must see epochs of different length"
    assert rates == pytest.approx(list(0.5e-3 * (1 + np.cos(np.pi * done))))


def test_a_structure_beyond_max_atoms_is_refused_before_anything_is_written(mixed, tmp_path):
    largest = int(np.flatnonzero(mixed.counts == 9)[0])
    with pytest.raises(ConfigError, match=f"structure {largest} has 9 atoms, more than max_atoms=8"):
        estimator(max_atoms=8).fit(mixed, max_steps=1, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [3, 9])
@pytest.mark.parametrize("prefetch", [None, True])
def test_resuming_with_buckets_and_atoms_and_a_thread(mixed, tmp_path, step, prefetch):
    options = {"batch_size": 6, "max_atoms": 30, "bucket": True}
    straight = estimator(**options).fit(mixed, max_steps=13, checkpoint_dir=tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, step)
        with pytest.raises(Crash):
            estimator(**options, prefetch=prefetch).fit(
                mixed, max_steps=13, checkpoint_dir=tmp_path / "run", checkpoint_every=1
            )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ndem_zoo-batches")]
    resumed = estimator(**options, prefetch=prefetch).fit(
        mixed, max_steps=13, checkpoint_dir=tmp_path / "run", resume=True
    )
    assert_same_weights(weights(resumed), weights(straight))
    assert without_seconds(resumed.history_) == without_seconds(straight.history_)
    with pytest.raises(ConfigError, match="bucket=True, not False"):
        estimator(**options | {"bucket": False}).fit(mixed, max_steps=14, checkpoint_dir=tmp_path / "run", resume=True)


def test_a_checkpoint_from_before_a_setting_existed(train_set, tmp_path):
    estimator().fit(train_set, max_steps=2, checkpoint_dir=tmp_path / "run")
    path = files.checkpoints(tmp_path / "run")[0] / "trainer.json"
    record = files.load_record(path)
    for name in ("max_atoms", "bucket", "prefetch"):
        del record["fingerprint"][name]
    files.save_record(path, record)
    model = estimator().fit(train_set, max_steps=3, checkpoint_dir=tmp_path / "run", resume=True)
    assert model.history_[-1]["step"] == 3


def test_ctrl_c_ends_the_thread(train_set, keyboard):
    def prefetching(row):
        assert [t for t in threading.enumerate() if t.name.startswith("ndem_zoo-batches")]
        press(2)

    # The error is kept, and with it the frames of the training: they must not keep the thread.
    with pytest.raises(KeyboardInterrupt) as error:
        estimator(prefetch=True, validate_every=2).fit(train_set, max_steps=50, callback=prefetching)
    assert error.tb is not None
    assert not [t for t in threading.enumerate() if t.name.startswith("ndem_zoo-batches")]


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", ["supervised", "noisy_nodes", "ndem"])
def test_a_step_never_waits_for_the_gpu(train_set, objective):
    one_step = Run.one_step

    def guarded(self, indices):
        warm = self.state.step > 0
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            one_step(self, indices)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "one_step", guarded)
        estimator(device="cuda", objective=objective, ema_decay=0.9, clip_norm=1.0, lr=1e-3).fit(train_set, max_steps=6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_building_a_model_leaves_the_generators_of_gpus_alone(train_set):
    torch.cuda.manual_seed_all(5)
    before = torch.cuda.get_rng_state()
    estimator(device="cuda").fit(train_set, max_steps=1)
    assert torch.equal(before, torch.cuda.get_rng_state())


# ------------------------------------------------------------------------------------ warm-up, decay, dropout, bfloat16


def test_the_warm_up_begins_at_its_factor(train_set):
    model = estimator(lr=0.01, warmup_steps=4, warmup_factor=0.2, validate_every=1).fit(train_set, max_steps=6)
    expected = [0.01 * (0.2 + 0.8 * k / 4) for k in (1, 2, 3, 4)] + [0.01] * 2
    # a row of the history tells the rate of the step to come
    assert [row["lr"] for row in model.history_] == pytest.approx(expected[1:] + expected[-1:])


def test_biases_and_norms_do_not_decay():
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 3), "norm": torch.nn.LayerNorm(3), "e": torch.nn.Embedding(4, 2)}
    )
    model["e"].weight.requires_grad_(False)
    decayed, others = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in decayed["params"]] == [(3, 2)]
    assert [p.shape for p in others["params"]] == [(3,), (3,), (3,)]
    (alone,) = decay_groups(model, 0.0)
    assert [id(p) for p in alone["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


class Dropping(TorchMDNet):
    """Forgets half of its scalars while training."""

    def forward(self, batch, node_vectors=None):
        features = super().forward(batch, node_vectors)
        if not self.training:
            return features
        kept = torch.rand(features.scalars.shape, generator=self.rng) < 0.5
        return features._replace(scalars=2.0 * kept * features.scalars)


def test_dropout_is_part_of_what_the_seed_decides(train_set, monkeypatch, tmp_path):
    monkeypatch.setitem(BACKBONES, "torchmd_net", f"{__name__}:Dropping")
    settings = {"plan": "eager", "validate_every": 2}
    whole = estimator(**settings).fit(train_set, max_steps=6, checkpoint_dir=tmp_path / "whole")
    estimator(**settings).fit(train_set, max_steps=3, checkpoint_dir=tmp_path / "parts")
    torch.rand(7)  # somebody else draws in the meantime
    state = torch.get_rng_state()
    resumed = estimator(**settings).fit(train_set, max_steps=6, checkpoint_dir=tmp_path / "parts", resume=True)
    assert torch.equal(torch.get_rng_state(), state), "and sees nothing of our draws"
    assert_same_weights(whole.potential_.state_dict(), resumed.potential_.state_dict())


@pytest.mark.parametrize("forces", ["gradient", "direct"])
def test_bfloat16_is_single_precision_but_for_products(train_set, valid_set, forces):
    settings = {"plan": "eager", "validate_every": 10, "lr": 1e-3, "forces": forces}
    single = estimator(**settings).fit(train_set, valid_set, max_steps=40)
    half = estimator(precision="bf16-mixed", **settings).fit(train_set, valid_set, max_steps=40)
    assert {p.dtype for p in half.potential_.parameters()} == {torch.float32}
    ones, others = ([row["valid_loss"] for row in model.history_] for model in (single, half))
    assert ones != others
    np.testing.assert_allclose(others, ones, rtol=0.1)
    with pytest.raises(ConfigError, match="plan='fused' computes in float32 or float64"):
        estimator(precision="bf16-mixed", plan="fused").fit(train_set, max_steps=1)
