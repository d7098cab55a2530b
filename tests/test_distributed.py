"""Two processes that train together do what one does; one that is killed takes the other along, and leaves a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import distributed_driver as driver
import pytest
import torch

from ndem_zoo import NDeMTorchMDNet, cli, distributed
from ndem_zoo import checkpoint as files
from ndem_zoo.errors import ConfigError, TrainingError
from ndem_zoo.history import read_history

REPOSITORY = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environment(**variables: object) -> dict[str, str]:
    shared = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return os.environ | shared | {name: str(value) for name, value in variables.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Where two processes have trained, after one has begun; see `distributed_driver.main`."""
    root = tmp_path_factory.mktemp("together")
    (root / "seen").mkdir()
    driver.pieces().save(root / "store")
    driver.train("supervised", root, steps=driver.CUT, checkpoint_dir=root / "one-to-two", checkpoint_every=3)
    shutil.rmtree(files.checkpoints(root / "one-to-two")[0])  # what is left is from between two validations
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "distributed_driver.py"), str(root)],
            env=environment(RANK=rank, LOCAL_RANK=rank, **place),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, -signal.SIGKILL], "\n".join(errors)
    return root


@pytest.fixture(scope="module")
def seen(root) -> list[dict]:
    return [json.loads((root / "seen" / f"{rank}.json").read_text()) for rank in range(2)]


def same(rows: list[dict], others: list[dict]) -> None:
    """Equal histories, all losses, errors and learning rates, but for the time they took and for rounding."""
    for row, other in zip(rows, others, strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-9)


@pytest.fixture(scope="module")
def alone(root) -> dict[str, NDeMTorchMDNet]:
    """The same trainings by one process, with everything in one share."""
    models = {}
    for name in driver.CASES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(driver.CASES[name][0], "accumulate", 1)
            models[name] = driver.train(name, root, checkpoint_dir=root / "alone" / name)
    return models


@pytest.mark.parametrize("name", driver.CASES)
def test_two_processes_train_as_one(root, seen, alone, name):
    assert len(alone[name].history_) >= 4
    for process in seen:
        same(process["history"][name], alone[name].history_)
    saved = files.load_tensors(root / "runs" / f"{name}-model" / "weights.safetensors")
    for key, value in alone[name].potential_.state_dict().items():
        torch.testing.assert_close(saved[f"potential.{key}"], value, rtol=1e-6, atol=1e-9)


def test_uneven_batches_were_among_them(root):
    """Else equality would prove little: a step with fewer structures than processes, and steps of different sizes."""
    sizes = [len(driver.data("ethanol", root)[0]) % 6, len(set(driver.data("mixed", root)[0].counts))]
    assert sizes[0] == 1
    assert sizes[1] > 3


def test_only_the_first_process_writes(root, seen):
    assert [bool(process["writes"]) for process in seen] == [True, False]
    assert seen[0]["callbacks"] == sum(len(rows) for rows in seen[0]["history"].values())
    assert seen[1]["callbacks"] == 0
    same(read_history(root / "runs" / "ndem" / "history.csv"), seen[0]["history"]["ndem"])


def test_two_continue_what_one_began(seen, alone):
    for process in seen:
        same(process["resumed"], alone["supervised"].history_)


def resumed(root: Path, folder: Path) -> NDeMTorchMDNet:
    return driver.train("supervised", root, checkpoint_dir=folder, resume=True)


def test_one_continues_what_two_began(root, alone):
    model = resumed(root, root / "runs" / "two-to-one")
    same(model.history_, alone["supervised"].history_)


def test_one_process_that_is_asked_to_end_ends_all(root, seen, alone):
    assert [process["asked"] for process in seen] == [[True, 4]] * 2
    same(resumed(root, root / "runs" / "asked").history_, alone["supervised"].history_)


def test_one_process_that_is_killed_ends_the_others(root, seen, alone):
    """With an error that says so, and a checkpoint from which one process goes on."""
    folder = root / "runs" / "killed"
    assert seen[0]["lost"].startswith("process 0 of 2 has lost another one")
    assert seen[0]["lost"].endswith(f"resume=True continues from {folder / 'step-0000000003'}")
    assert [path.name for path in files.checkpoints(folder)] == ["step-0000000003"], "from between two validations"
    same(resumed(root, folder).history_, alone["supervised"].history_)


# --------------------------------------------------------------------------------------------------- the command line

TRAIN = (
    "train --data sample:ethanol --objective supervised --preset md17_fast --set hidden_channels=8 --set num_layers=1 "
)
TRAIN += "--set num_heads=2 --set num_rbf=8 --n-train 20 --n-valid 7 --n-test 5 --set validate_every=2 --max-steps 5 "
TRAIN += "--set batch_size=7 --precision 64-true --device cpu --quiet"


def test_the_command_starts_its_processes(tmp_path):
    pytest.importorskip("typer")
    assert cli.run([*TRAIN.split(), "--out", str(tmp_path / "one")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "ndem_zoo.cli", *TRAIN.split(), "--devices", "2", "--out", str(tmp_path / "two")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 steps in") == 1, "one process speaks"
    assert done.stderr.splitlines() == ["data: sample ethanol, 20 for train, 7 for valid, 5 for test"]
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["test"] == pytest.approx(one["test"], rel=1e-6)
    same(read_history(tmp_path / "two" / "history.csv"), read_history(tmp_path / "one" / "history.csv"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--devices two", "'two' is no number of devices; write a count, or auto"),
        ("--devices 0", "devices=0; it must be a whole number, 1 or more"),
        ("--devices 2 --nodes 0", "nodes=0; it must be a whole number, 1 or more"),
        ("--devices 2 --nodes 3", "torchrun --nnodes 3 --nproc-per-node 2"),
    ],
)
def test_commands_that_are_refused(tmp_path, capsys, words, message):
    pytest.importorskip("typer")
    assert cli.run([*TRAIN.split(), "--out", str(tmp_path / "out"), *words.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ who was started how

TORCHRUN = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}


@pytest.fixture
def started(monkeypatch):
    """Pretends that this process was started with some variables."""
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)

    def start(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (TORCHRUN, (8, 5, 1, "torchrun")),
        (SLURM, (8, 6, 2, "slurm")),
        (TORCHRUN | SLURM, (8, 5, 1, "torchrun")),  # torchrun inside a SLURM job
        (SLURM | {"SLURM_NTASKS": "1"}, None),  # an interactive shell
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, None),  # the script of a batch job
    ],
)
def test_what_the_environment_says(started, variables, expected):
    started(variables)
    assert distributed.place() == expected


def test_an_environment_of_nonsense_is_refused(started):
    started(TORCHRUN | {"RANK": "first"})
    with pytest.raises(ConfigError, match=r"'RANK': 'first'.*whole numbers"):
        distributed.place()


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "expected"),
    [
        ({}, 1, 1, (1, 1)),
        ({}, "auto", 1, (1, 1)),
        (TORCHRUN, 4, 2, (4, 2)),
        (TORCHRUN, "auto", 2, (4, 2)),
        (SLURM, 8, 1, (8, 1)),
        (SLURM, 1, 1, (1, 1)),  # eight trainings that have nothing to do with each other
        ({}, 2, 1, r"devices=2, nodes=1, but there is one process: .*torchrun --nnodes 1 --nproc-per-node 2 SCRIPT"),
        (TORCHRUN, 2, 2, "devices=2 times nodes=2 is 4, but torchrun started 8 processes"),
        (TORCHRUN, 1, 1, "devices=1 times nodes=1 is 1, but torchrun started 8 processes"),
        (SLURM, 2, 1, "is 2, but slurm started 8 processes"),
        ({}, "all", 1, "devices='all'; it must be a whole number"),
        ({}, 0, 1, "devices=0; it must be a whole number"),
        ({}, 1, 0, "nodes=0; it must be a whole number"),
        ({}, True, 1, "devices=True; it must be a whole number"),
    ],
)
def test_devices_must_be_those_that_were_started(started, variables, devices, nodes, expected):
    started(variables)
    if isinstance(expected, tuple):
        assert distributed.check_devices(devices, nodes, CPU) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            distributed.check_devices(devices, nodes, CPU)


def test_fit_alone_says_how_to_start_two(started, ethanol, tmp_path):
    started({})
    model = NDeMTorchMDNet(**driver.COMMON)
    with pytest.raises(ConfigError, match="torchrun"):
        model.fit(ethanol[:4], max_steps=1, devices=2, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_errors_are_not_taken_for_a_lost_process(started):
    started(TORCHRUN)
    with pytest.raises(RuntimeError, match="shape") as caught, distributed.watched(lambda: "nothing"):
        raise RuntimeError("shape mismatch")
    assert not isinstance(caught.value, TrainingError)
    lost = pytest.raises(TrainingError, match=r"process 5 of 8 has lost another one.*; look there")
    with lost, distributed.watched(lambda: "look there"):
        raise RuntimeError("[transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
