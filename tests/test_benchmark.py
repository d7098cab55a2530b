"""`benchmark` and ``ndem-zoo bench``: with a clock of the test's own, so that every figure is known beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ndem_zoo import NDeMTorchMDNet, benchmark, inference, training
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.models.potential import Potential
from ndem_zoo.sampling import Collator
from ndem_zoo.training import Run

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}


def fitted(frames, **options) -> NDeMTorchMDNet:
    defaults = {"backbone_options": TINY, "batch_size": 4, "eval_batch_size": 5, "device": "cpu", "progress": False}
    return NDeMTorchMDNet(**defaults | options).fit(frames[:8], max_steps=1)


@pytest.fixture(scope="module")
def model(ethanol):
    return fitted(ethanol)


class Clock:
    """Stands all but still, except for what the test says that something takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-9
        return self.now

    def slow(self, patch, owner, name: str, seconds) -> None:
        """Let a method take so many seconds; a function of the number of the call."""
        method, calls = getattr(owner, name), [0]

        def slowed(*arguments, **options):
            self.now += seconds(calls[0]) if callable(seconds) else seconds
            calls[0] += 1
            return method(*arguments, **options)

        patch.setattr(owner, name, slowed)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    return clock


def test_a_training_with_a_prior_is_measured_as_fit_does_it(ethanol, monkeypatch):
    """On labels less the prior's, and without the prior in a step."""
    seen = []
    forward = training.TrainStep.forward

    def watched(self, inputs):
        seen.append((self.potential.prior, float(inputs.batch.targets["forces"].abs().max())))
        return forward(self, inputs)

    monkeypatch.setattr(training.TrainStep, "forward", watched)
    learner = fitted(ethanol.select(np.arange(0, 400, 10)), prior="valence", objective="supervised")
    record = benchmark.benchmark(learner, ethanol[:40], steps=2, rounds=1)
    assert record["training"]["steps_per_s"] > 0
    assert len(seen) == 1 + 4
    assert all(prior is None for prior, _ in seen)
    assert max(size for _, size in seen) < 0.5 * np.abs(ethanol[:40].targets["forces"]).max()
    assert learner.potential_.prior is not None


def test_stages_of_a_training_step(model, ethanol, clock, monkeypatch):
    clock.slow(monkeypatch, Collator, "__call__", 1.0)
    clock.slow(monkeypatch, training.TrainStep, "forward", 2.0)
    clock.slow(monkeypatch, Run, "backward", 3.0)
    clock.slow(monkeypatch, Run, "update", 4.0)
    found = benchmark.benchmark(model, ethanol[:40], steps=3, rounds=2)["training"]
    assert found["steps_per_s"] == pytest.approx(1 / 10)
    assert found["structures_per_s"] == pytest.approx(4 / 10)
    assert found["share"] == pytest.approx(
        {"data": 0.1, "forward": 0.2, "backward": 0.3, "optimizer": 0.4, "rest": 0.0}, abs=1e-6
    )


def test_what_belongs_to_no_stage_is_the_rest(model, ethanol, clock, monkeypatch):
    clock.slow(monkeypatch, Run, "update", 3.0)
    one_step = Run.one_step

    def with_bookkeeping(self, batch):
        one_step(self, batch)
        clock.now += 1.0

    monkeypatch.setattr(Run, "one_step", with_bookkeeping)
    found = benchmark.benchmark(model, ethanol[:40], steps=3, rounds=2)["training"]
    assert found["share"]["rest"] == pytest.approx(0.25)
    assert found["share"]["optimizer"] == pytest.approx(0.75)


def test_stages_of_a_prediction(model, ethanol, clock, monkeypatch):
    clock.slow(monkeypatch, Collator, "__call__", 1.0)
    clock.slow(monkeypatch, Potential, "forward", 3.0)
    frames = MolecularDataset(**ethanol[:40].columns() | {"targets": {}})
    found = benchmark.benchmark(model, frames, steps=3, rounds=2)["inference"]
    assert found["steps_per_s"] == pytest.approx(1 / 4)
    assert found["structures_per_s"] == pytest.approx(5 / 4)
    expected = {"data": 0.25, "forward": 0.75, "backward": 0, "optimizer": 0, "rest": 0}
    assert found["share"] == pytest.approx(expected, abs=1e-6)


def test_medians_of_rounds_after_a_warm_up(model, ethanol, clock, monkeypatch):
    """Rounds of 2 steps, the first of which does not count: 8 s, 1 s, 9 s and 3 s a step."""
    times = [100.0] * 2 + [8.0] * 2 + [1.0] * 2 + [9.0] * 2
    clock.slow(monkeypatch, Run, "update", lambda call: times[call])
    found = benchmark.benchmark(model, ethanol[:40], steps=2, rounds=3)["training"]
    assert found["steps_per_s"] == pytest.approx(1 / 8)
    rates = np.array([1 / 8, 1, 1 / 9])
    assert found["steps_per_s_quartiles"] == pytest.approx(np.percentile(rates, [25, 75]))


def test_the_real_prediction_is_what_is_timed(model, ethanol, clock, monkeypatch):
    """Whatever `predict_columns` does besides the stages counts."""
    clock.slow(monkeypatch, benchmark, "predict_columns", 7.0)
    found = benchmark.benchmark(model, ethanol[:40], steps=2, rounds=1)["inference"]
    assert found["steps_per_s"] == pytest.approx(2 / 7)
    assert benchmark.predict_columns is not inference.predict_columns


def test_the_model_is_left_as_it_was(ethanol):
    model = fitted(ethanol)
    before = {name: value.clone() for name, value in model.potential_.state_dict().items()}
    prediction = model.predict(ethanol[:3])["energy"]
    record = benchmark.benchmark(model, ethanol[:40], steps=2, rounds=1)
    assert all(torch.equal(value, before[name]) for name, value in model.potential_.state_dict().items())
    assert np.array_equal(model.predict(ethanol[:3])["energy"], prediction)
    assert model.potential_.training is False
    assert len(model.history_) == 1
    json.dumps(record)
    for found in (record["training"], record["inference"]):
        assert found["steps_per_s"] > 0
        assert sum(found["share"].values()) == pytest.approx(1.0)
        assert 50 < found["peak_memory_MB"] < 100_000, "of a process that has torch in it"


def test_a_new_model_is_fitted_first(ethanol):
    model = NDeMTorchMDNet(backbone_options=TINY, max_atoms=40, device="cpu", progress=False)
    record = benchmark.benchmark(model, ethanol[:40], steps=2, rounds=1)
    found = record["training"]
    assert found["batch_size"] is None
    assert found["structures_per_s"] == pytest.approx(4 * found["steps_per_s"])
    assert record["data"] == {"name": "sample ethanol", "n_structures": 40, "mean_atoms": 9.0}
    assert record["model"]["plan"] is getattr(model.potential_.backbone, "plan", None)


def test_batch_size_of_both(model, ethanol):
    record = benchmark.benchmark(model, ethanol[:40], batch_size=2, steps=2, rounds=1)
    for name in ("training", "inference"):
        assert record[name]["batch_size"] == 2
        assert record[name]["structures_per_s"] == pytest.approx(2 * record[name]["steps_per_s"])


def test_data_without_labels(model, ethanol):
    bare = MolecularDataset(**ethanol[:10].columns() | {"targets": {}})
    record = benchmark.benchmark(model, bare, steps=1, rounds=1)
    assert record["training"] is None
    assert record["inference"]["steps_per_s"] > 0
    with pytest.raises(DataError, match="energy"):
        benchmark.benchmark(NDeMTorchMDNet(backbone_options=TINY, progress=False), bare, steps=1, rounds=1)


@pytest.mark.parametrize("name", ["steps", "rounds"])
def test_numbers_that_are_refused(model, ethanol, name):
    with pytest.raises(ConfigError, match=f"{name}=0; it must be a whole number, 1 or more"):
        benchmark.benchmark(model, ethanol[:10], **{name: 0})


def test_on_the_command_line(model, tmp_path, capsys):
    pytest.importorskip("typer")
    from ndem_zoo import cli

    model.save(tmp_path / "model")
    words = ["--steps", "2", "--rounds", "1", "--device", "cpu"]
    options = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    assert cli.run(["bench", *words, *options, "--objective", "supervised", "--json", str(tmp_path / "b.json")]) == 0
    shown, record = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "sample ethanol: 2000 structures, on average 9.0 atoms" in shown
    assert record["model"]["objective"] == "supervised"
    for name, stages in (("training", 5), ("inference", 3)):
        (line,) = [line for line in shown.splitlines() if line.startswith(name)]
        assert f"{record[name]['steps_per_s']:.4g} steps/s" in line
        assert f"peak memory {record[name]['peak_memory_MB']:.0f} MB" in line
        following = shown.splitlines()[shown.splitlines().index(line) + 1]
        assert following.count("%") == stages
    assert cli.run(["bench", "sample:aspirin", "--model", str(tmp_path / "model"), *words]) == 0
    assert "sample aspirin: 300 structures, on average 21.0 atoms" in capsys.readouterr().out
    for given in (["--preset", "md17_fast"], ["--set", "lr=1"]):
        assert cli.run(["bench", "--model", str(tmp_path / "model"), *given]) == 2
        assert f"--model and {given[0]} exclude each other" in capsys.readouterr().err


def test_the_plan_in_use_is_shown(ethanol, capsys):
    pytest.importorskip("typer")
    from ndem_zoo.commands import _print_benchmark

    model = fitted(ethanol)
    if not hasattr(model.potential_.backbone, "plan"):
        model.potential_.backbone.plan = "eager"
    record = benchmark.benchmark(model, ethanol[:8], steps=1, rounds=1)
    assert record["model"]["plan"] == model.potential_.backbone.plan
    _print_benchmark(record)
    assert f"plan {model.potential_.backbone.plan}" in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(ethanol):
    record = benchmark.benchmark(fitted(ethanol, device="cuda"), ethanol[:64], steps=5, rounds=2)
    for found in (record["training"], record["inference"]):
        assert sum(found["share"].values()) == pytest.approx(1.0)
        assert 0 < found["peak_memory_MB"] < 1000
    assert record["training"]["share"]["forward"] > 0.1
