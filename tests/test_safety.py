"""Numerical safety: what is not finite stops a training and can be repeated, spikes are noted, float64 is float64."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ndem_zoo import Ensemble, NDeMCalculator, registry, safety
from ndem_zoo.checkpoint import load_tensors
from ndem_zoo.diagnosis import structure_of
from ndem_zoo.errors import ConfigError, FileFormatError, TrainingError
from ndem_zoo.graph import make_batch
from ndem_zoo.models.estimator import NDeMModel
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet
from ndem_zoo.objectives.ndem import NDeM
from ndem_zoo.safety import Guard, read_dump, replay

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}
FROZEN = 1e-30

#: A scale in eV with which errors of 5 eV/Å have a square in float32, and those of 500 have none.
TOO_SMALL = 1e-17


def estimator(**options) -> NDeMTorchMDNet:
    """Batches of 3 of 10 structures: epochs of 4 steps."""
    defaults = {"objective": "supervised", "backbone_options": TINY, "batch_size": 3, "warmup_steps": 0, "lr": 1e-3}
    defaults |= {"schedule": "constant", "scale": 1.0, "device": "cpu", "progress": False}
    return NDeMTorchMDNet(**defaults | options)


def step_of(row: int, seed: int = 0, n: int = 10, size: int = 3) -> tuple[int, list[int]]:
    """The first step, from 1, that sees a structure, and all that it sees: from the documented order alone."""
    order = np.random.default_rng([seed, 0]).permutation(n).tolist()
    step = order.index(row) // size
    return step + 1, order[step * size : (step + 1) * size]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train_set(ethanol):
    return ethanol[:10]


@pytest.fixture
def poisoned(train_set):
    """Structure 4 has a label whose square, in units of `TOO_SMALL`, is beyond float32, but not beyond float64."""
    forces = train_set.targets["forces"].copy()
    forces[4 * 9 + 2] = 500.0
    data = train_set.with_targets(["energy"])
    data.targets["forces"] = forces
    return data


class Broken(NDeM):
    """From half of the training on a term that is 0, and whose derivative is 0 times infinity; knows what it has given."""

    given: ClassVar[list[float]] = []

    def forward(self, potential, batch, rng):
        terms = super().forward(potential, batch, rng)
        self.given.append(float(terms["ndem"].detach()))
        if self.progress >= 0.5:
            weight = potential.energy_head.output_network[0].vec1_proj.weight
            terms["odd"] = (weight * 0).sum().sqrt()
        return terms


def diverge(model, data, **options) -> str:
    with pytest.raises(TrainingError) as caught:
        model.fit(data, **options)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- a fault


@pytest.mark.filterwarnings("ignore")  # that the label looks like another unit
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights(poisoned, tmp_path, clip_norm):
    step, rows = step_of(4, seed=2)
    assert step > 1, "else there is nothing before it"
    message = diverge(
        estimator(seed=2, clip_norm=clip_norm, scale=TOO_SMALL), poisoned, max_steps=8, checkpoint_dir=tmp_path / "run"
    )
    assert f"the loss (forces) is inf at step {step}: the training has diverged" in message
    assert f"structures {', '.join(map(str, rows))} of the training set" in message
    folder = tmp_path / "run" / f"dump-step-{step:010d}"
    assert f"ndem-zoo replay {folder}" in message
    # What a run that ends before this step leaves behind.
    before = estimator(seed=2, clip_norm=clip_norm, scale=TOO_SMALL).fit(poisoned, max_steps=step - 1)
    tensors = load_tensors(folder / "dump.safetensors")
    for name, value in before.potential_.state_dict().items():
        assert torch.equal(tensors[f"potential.{name}"], value), name
    dump = read_dump(folder)
    assert dump.record["structures"] == rows
    assert dump.record["ids"] == poisoned.ids[rows].tolist()
    assert torch.equal(dump.batch.targets["energy"], torch.from_numpy(poisoned.targets["energy"][rows]))
    assert any(name.startswith("optimizer.") for name in tensors)


@pytest.mark.filterwarnings("ignore")
def test_a_replay_finds_structure_operation_and_remedy(poisoned, tmp_path, capsys):
    step, _ = step_of(4)
    diverge(estimator(scale=TOO_SMALL), poisoned, max_steps=8)
    folder = tmp_path / "ndem_zoo-dumps" / f"dump-step-{step:010d}"
    assert folder.is_dir(), "without a folder of its own, in the present one"
    found = replay(folder)
    assert found.is_repeated
    assert np.isinf(found.found.terms["forces"])
    assert found.found.terms["energy"] == pytest.approx(found.recorded["energy"], rel=1e-5)
    assert found.structures[0]["row"] == 4
    assert found.structures[0]["largest_label"] == pytest.approx(500.0 * 3**0.5)
    assert all(np.isfinite(one["loss"]) for one in found.structures[1:])
    atoms = poisoned.atoms(4)
    assert found.structures[0]["shortest"] == pytest.approx(
        atoms.get_all_distances()[np.triu_indices(9, 1)].min(), abs=1e-5
    )
    assert "mse_loss" in found.operation or "pow" in found.operation
    assert found.in_float64.is_finite
    assert found.inputs == []
    assert not replay(folder, precision="64-true").is_repeated
    with pytest.raises(ConfigError, match="precision='16'; allowed are 32-true, 64-true, bf16-mixed"):
        replay(folder, precision="16")
    pytest.importorskip("typer")
    from ndem_zoo.cli import run

    assert run(["replay", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "forces       inf (in the training inf)" in said
    assert "4 (id" in said.split("structures, the worst first:")[1].splitlines()[1]
    assert "in float64 the step is finite" in said


def test_a_gradient_that_is_not_finite_is_named(train_set):
    """The loss alone would not tell; the weights are those before the step."""
    registry.register(registry.OBJECTIVES, "broken", Broken)
    Broken.given.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = diverge(estimator(objective="broken"), train_set, max_steps=8)
    assert "the gradient is nan at step 5" in message  # progress is 4/8 before the fifth
    name = "potential.energy_head.output_network.0.vec1_proj.weight"
    assert f"gradients that are not finite: {name};" in message
    found = replay("ndem_zoo-dumps/dump-step-0000000005", anomaly=True)
    assert found.found.parameters == [name]
    assert found.found.loss == pytest.approx(sum(found.recorded.values()), rel=1e-5)
    assert found.recorded["ndem"] == pytest.approx(Broken.given[4], rel=1e-5), "with the noise of this step"
    assert len({round(value, 6) for value in Broken.given[:5]}) == 5
    assert "div.Tensor in outside of the modules" in found.operation
    assert "MulBackward0" in found.anomaly
    assert 'terms["odd"]' in found.anomaly, "the line of the operation whose derivative it is"
    assert not found.in_float64.is_finite


@pytest.mark.filterwarnings("ignore")
def test_on_a_gpu_the_flag_is_read_later_and_the_weights_wait(poisoned, tmp_path, monkeypatch):
    """The same on a CPU, with the optimizer that a GPU has: nothing may happen to the weights in between."""
    step, _ = step_of(4, seed=2)
    expected = diverge(estimator(seed=2, scale=TOO_SMALL), poisoned, max_steps=40, checkpoint_dir=tmp_path / "soon")
    prepare, steps = Guard.__init__, []

    def late(self, run):
        prepare(self, run)
        self.watch_late()

    look = Guard.look
    monkeypatch.setattr(Guard, "__init__", late)
    monkeypatch.setattr(Guard, "look", lambda self, norm: (steps.append(0), look(self, norm))[1])
    monkeypatch.setattr(safety, "WINDOW", 7)
    message = diverge(
        estimator(seed=2, validate_every=30, scale=TOO_SMALL), poisoned, max_steps=40, checkpoint_dir=tmp_path / "late"
    )
    assert message.replace("/late/", "/soon/") == expected
    assert len(steps) == 8, "read once in WINDOW steps"
    one, other = (
        load_tensors(tmp_path / name / f"dump-step-{step:010d}" / "dump.safetensors") for name in ("soon", "late")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), "optimizer included"
    soon, late = (read_dump(tmp_path / name / f"dump-step-{step:010d}").record for name in ("soon", "late"))
    assert soon["progress"] == late["progress"] == (step - 1) / 40


def test_a_finite_run_is_the_same_with_the_flag(train_set, monkeypatch):
    plain = estimator(clip_norm=1.0).fit(train_set, max_steps=6)
    prepare = Guard.__init__
    monkeypatch.setattr(Guard, "__init__", lambda self, run: (prepare(self, run), self.watch_late())[0])
    flagged = estimator(clip_norm=1.0).fit(train_set, max_steps=6)
    for name, value in plain.potential_.state_dict().items():
        assert torch.equal(value, flagged.potential_.state_dict()[name]), name


def test_gradients_whose_norm_overflows_are_finite():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), 3e38)
    assert torch.isfinite(safety.gradient_size([weight]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight.grad[1] = bad
        assert not torch.isfinite(safety.gradient_size([weight]))
        clipped = torch.nn.Parameter(torch.zeros(3))
        clipped.grad = weight.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([clipped], 1.0)
        assert not torch.isfinite(safety.gradient_size([clipped], norm))
    weight.grad = torch.full((3,), 3e38)
    norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
    assert torch.isinf(norm), "else this shows nothing"
    assert torch.isfinite(safety.gradient_size([weight], norm))
    assert float(safety.gradient_size([])) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_dump_that_cannot_be_written_does_not_hide_the_fault(poisoned, tmp_path):
    (tmp_path / "ndem_zoo-dumps").write_text("a file, where a folder should be")
    message = diverge(estimator(scale=TOO_SMALL), poisoned, max_steps=8)
    assert "the loss (forces) is inf at step" in message
    assert "the step could not be written to ndem_zoo-dumps" in message


@pytest.mark.filterwarnings("ignore")
def test_damaged_dumps_are_errors(poisoned, tmp_path):
    diverge(estimator(scale=TOO_SMALL), poisoned, max_steps=8, checkpoint_dir=tmp_path / "run")
    (folder,) = (tmp_path / "run").glob("dump-*")
    text, weights = (folder / "dump.json").read_text(), (folder / "dump.safetensors").read_bytes()
    record = json.loads(text)
    for broken in (
        text[: len(text) // 2],
        "[]",
        json.dumps(record | {"format": 99}),
        json.dumps(record | {"structures": [1]}),
        json.dumps({name: value for name, value in record.items() if name != "cutoff"}),
        json.dumps(record | {"recipe": None}),
        json.dumps(record | {"recipe": {"model": "os.system", "resolved": {}}}),
    ):
        (folder / "dump.json").write_text(broken)
        with pytest.raises(FileFormatError):
            replay(folder)
    (folder / "dump.json").write_text(text)
    (folder / "dump.safetensors").write_bytes(weights[:-100])
    with pytest.raises(FileFormatError):
        replay(folder)
    with pytest.raises(FileNotFoundError):
        replay(tmp_path / "nothing")


def test_a_structure_of_a_batch_is_the_batch_of_the_structure(ethanol):
    """Two sizes, periodic, with labels per atom and per structure."""
    rng, counts = np.random.default_rng(0), np.array([3, 5, 2])
    cell, pbc = np.stack([np.diag(rng.uniform(4, 6, 3)) for _ in counts]), np.ones((3, 3), dtype=bool)
    z, pos = rng.integers(1, 9, 10), rng.uniform(0, 4, (10, 3))
    targets = {"energy": rng.normal(size=3), "forces": rng.normal(size=(10, 3))}
    whole = make_batch(z, pos, counts, 4.0, cell=cell, pbc=pbc, targets=targets)
    atoms = slice(3, 8)
    alone = {"energy": targets["energy"][1:2], "forces": targets["forces"][atoms]}
    expected = make_batch(z[atoms], pos[atoms], counts[1:2], 4.0, cell=cell[1:2], pbc=pbc[1:2], targets=alone)
    for one, other in zip(structure_of(whole, 1).tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------------------ spikes


def test_spikes_are_noted_with_their_structures_also_after_a_resume(train_set, tmp_path, monkeypatch):
    """One structure with a wild label, alone in its batch, and a network that does not learn: a spike in each epoch."""
    monkeypatch.setattr(safety, "WINDOW", 6)
    energy = train_set.targets["energy"].copy()
    energy[7] += 40.0
    data = train_set.with_targets(["forces"])
    data.targets["energy"] = energy
    options = {
        "batch_size": 1,
        "lr": FROZEN,
        "validate_every": 4,
        "reference_energies": "fit",
        "loss": "l1",
        "force_weight": 0.1,
    }

    def run(folder, *parts):
        for steps in parts:
            model = estimator(**options).fit(
                data, max_steps=steps, checkpoint_dir=tmp_path / folder, checkpoint_every=3, resume=steps != parts[0]
            )
        return model

    model = run("straight", 40)
    orders = np.concatenate([np.random.default_rng([0, epoch]).permutation(10) for epoch in range(4)])
    expected = [step + 1 for step in np.flatnonzero(orders == 7) if step >= 6]
    assert [spike["step"] for spike in model.spikes_] == expected
    assert all(spike["structures"] == [7] and spike["ratio"] > 5 for spike in model.spikes_)
    rows = {int(row["step"]): row for row in model.history_}
    assert [row["spike_step"] for row in rows.values() if "spikes" in row] == expected
    assert rows[-(-expected[0] // 4) * 4]["spikes"] == 1
    header = (tmp_path / "straight" / "history.csv").read_text().splitlines()[0]
    assert header.endswith("spikes,spike_step,spike_ratio")
    assert json.loads((tmp_path / "straight" / "spikes.json").read_text()) == model.spikes_
    resumed = run("resumed", expected[0], expected[1] + 1, 40)
    assert resumed.spikes_ == model.spikes_
    assert (tmp_path / "resumed" / "spikes.json").read_text() == (tmp_path / "straight" / "spikes.json").read_text()


def test_the_losses_that_are_kept_do_not_grow(train_set, monkeypatch):
    monkeypatch.setattr(safety, "WINDOW", 5)
    kept, settle = [], Guard.settle

    def spy(self):
        settle(self)
        kept.append(len(self.losses))

    monkeypatch.setattr(Guard, "settle", spy)
    model = estimator(validate_every=1000).fit(train_set, max_steps=30)
    assert model.spikes_ == []
    assert len(kept) >= 5
    assert max(kept) == 5


# ------------------------------------------------------------------------------------------------------------- determinism


def test_deterministic_algorithms_only_while_training(train_set, tmp_path):
    seen = []
    runs = [
        estimator(deterministic=True).fit(
            train_set, max_steps=4, callback=lambda row: seen.append(torch.are_deterministic_algorithms_enabled())
        )
        for _ in range(2)
    ]
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    first, second = (model.potential_.state_dict() for model in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    runs[0].save(tmp_path / "model")
    assert "- Deterministic algorithms only: yes" in (tmp_path / "model" / "card.md").read_text()
    assert NDeMModel.load(tmp_path / "model").resolved_["settings"]["deterministic"] is True
    with pytest.raises(ConfigError, match="deterministic=1; allowed are True and False"):
        estimator(deterministic=1).fit(train_set, max_steps=1)


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_torchs_switch_is_left_as_it_was(train_set, before):
    def stop(row):
        raise KeyError("somebody's callback")

    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        for wanted in (True, False):
            with pytest.raises(KeyError):
                estimator(deterministic=wanted).fit(train_set, max_steps=1, callback=stop)
            now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
            assert now == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_cuda_has_to_be_told_before_it_starts(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1:1")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG, which is ':1:1'; allowed are :4096:8 and :16:8"):
        safety.check_workspace(torch.device("cuda"))
    safety.check_workspace(torch.device("cpu"))
    for value in (":4096:8", ":16:8"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        safety.check_workspace(torch.device("cuda"))


# ----------------------------------------------------------------------------------------------------------------- float64


class Narrow(TorchDispatchMode):
    """Counts operations, backward passes included, that make numbers of less than 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.total = Counter(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        floats = [t.dtype for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.total += len(floats)
        if operation.name() not in ("aten::clone", "aten::detach"):  # into a checkpoint: nothing new
            self.found[operation.name()] += sum(dtype != torch.float64 for dtype in floats)
        return result

    def assert_none(self, at_least: int, but: int = 0) -> None:
        assert self.total > at_least
        narrow = {name: n for name, n in self.found.items() if n}
        assert set(narrow) <= ({"aten::zeros"} if but else set()), narrow
        assert sum(narrow.values()) == but


@pytest.mark.parametrize("plan", ["eager", "fused"])
@pytest.mark.parametrize("objective", ["ndem", "supervised", "dens", "geossl"])
def test_no_number_of_less_than_64_bits_is_made(ethanol, tmp_path, monkeypatch, plan, objective):
    """From the first step to the prediction of a loaded model; but for AdamW's counter of steps, one for each tensor."""
    from ndem_zoo.models import estimator as module

    watch, train = Narrow(), module.train

    def watched(*args, **options):
        import lightning_fabric  # noqa: F401 (its import makes a tensor)

        with watch:
            return train(*args, **options)

    monkeypatch.setattr(module, "train", watched)
    options = {"objective": objective, "plan": plan, "precision": "64-true", "ema_decay": 0.9, "clip_norm": 1.0}
    model = estimator(**options).fit(ethanol[:6], ethanol[10:14], max_steps=3, checkpoint_dir=tmp_path / "run")
    weights = [*model.potential_.parameters(), *model.objective_.parameters()]
    watch.assert_none(500, but=1 if plan == "fused" else sum(p.requires_grad for p in weights))  # fused: all in one
    assert {w.dtype for w in weights} == {torch.float64}
    stored = load_tensors(tmp_path / "run" / "step-0000000003" / "trainer.safetensors")
    narrow = {n.rpartition(".")[2] for n, t in stored.items() if t.is_floating_point() and t.dtype != torch.float64}
    assert narrow == {"step"}
    model.save(tmp_path / "model")
    again = NDeMModel.load(tmp_path / "model")
    atoms, watch = ethanol.atoms(20), Narrow()
    crystal = ethanol.atoms(21)
    crystal.set_cell([7.0, 7.1, 7.2])
    crystal.pbc = True
    atoms.calc = NDeMCalculator(again)
    with watch:
        predicted = again.predict(ethanol[20:23])
        forces = atoms.get_forces()
        again.predict([crystal])
        Ensemble([model, again]).predict(ethanol[20:23])
    watch.assert_none(100)
    assert np.abs(forces - predicted["forces"][0]).max() < 1e-12
    assert np.array_equal(predicted["forces"], model.predict(ethanol[20:23])["forces"])


@pytest.mark.parametrize("periodic", [False, True])
def test_forces_are_the_derivative_of_the_energy_to_1e_8(ethanol, periodic):
    """By central differences of fourth order, through the calculator: in float32 they agree to 1e-3 at best."""
    model = estimator(precision="64-true", lr=0.05).fit(ethanol[:6], max_steps=10)
    atoms = ethanol.atoms(30)
    if periodic:
        atoms.set_cell([5.0, 5.5, 6.0])
        atoms.pbc = True
    atoms.calc = NDeMCalculator(model)
    forces, place, step = atoms.get_forces(), atoms.positions.copy(), 1e-3

    def energy(atom, axis, by):
        atoms.positions = place
        atoms.positions[atom, axis] += by
        return atoms.get_potential_energy()

    reference = sum(model.reference_[symbol] for symbol in atoms.symbols)
    assert abs(reference) > 100, "which costs 4 digits of the differences"
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        near = energy(atom, axis, step) - energy(atom, axis, -step)
        far = energy(atom, axis, 2 * step) - energy(atom, axis, -2 * step)
        numeric = -(8 * near - far) / (12 * step)
        assert abs(numeric - forces[atom, axis]) < 1e-8 * max(1.0, abs(forces[atom, axis]))
    assert np.abs(forces).max() > 0.05
