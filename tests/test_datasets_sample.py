"""The embedded data: contents, splits, and that tblite reproduces them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ndem_zoo.datasets import check_structures, load_sample, read_md17
from ndem_zoo.datasets.sample import SAMPLE, SAMPLES, sample_file
from ndem_zoo.errors import ConfigError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_sample_data.py"


def test_splits():
    tasks, (train, valid, test), transformers = load_sample("ethanol")
    assert (tasks, transformers) == (["energy", "forces"], [])
    assert [len(part) for part in (train, valid, test)] == [950, 50, 1000]
    assert train.card is SAMPLE
    assert [len(part) for part in load_sample("aspirin")[1]] == [200, 50, 50]
    assert [len(part) for part in load_sample("ethanol", 100, n_test=7)[1]] == [100, 50, 7]
    assert load_sample("ethanol", seed=2)[1][0].split_hash != train.split_hash
    with pytest.raises(ConfigError, match="there are ethanol, aspirin"):
        load_sample("water")


def test_files_are_small_and_as_they_were_made():
    total = 0
    for name, (file, *_) in SAMPLES.items():
        content = sample_file(name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == SAMPLE.files[file].sha256
        total += len(content)
    assert total < 2_000_000


@pytest.mark.parametrize(("name", "frames", "rms"), [("ethanol", 2000, 22.66), ("aspirin", 300, 28.62)])
def test_contents(name, frames, rms, request):
    dataset = request.getfixturevalue(name)
    assert len(dataset) == frames
    check_structures(dataset)
    kcal = 4184 / (6.02214076e23 * 1.602176634e-19)
    assert np.sqrt(np.square(dataset.targets["forces"]).mean()) / kcal == pytest.approx(rms, abs=0.01)


def run_script(*arguments: str) -> str:
    # A process of its own: tblite must be imported before torch.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


needs_tblite = pytest.mark.skipif(importlib.util.find_spec("tblite") is None, reason="needs tblite (ndem_zoo[xtb])")


@needs_tblite
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_tblite_reproduces_energies_and_forces(name):
    energy, forces = (float(x) for x in re.findall(r"\d\.\d+e[+-]\d+", run_script(name, "--check")))
    assert energy < 1e-6
    assert forces < 2e-3  # tblite's own convergence; the forces have an rms of 1 eV/Å


@needs_tblite
def test_the_script_makes_frames_of_the_same_kind(tmp_path, ethanol):
    path = tmp_path / "new.npz"
    run_script("ethanol", "--frames", "20", "--every", "5", "--equilibrate", "100", "--out", str(path))
    new = read_md17(path)
    assert len(new) == 20
    check_structures(new)
    assert new.z[:9].tolist() == ethanol.z[:9].tolist()
    # Energies of a hot molecule lie above the minimum and within the range of the committed frames, widened by 1 eV.
    energy = ethanol.targets["energy"]
    assert ((new.targets["energy"] > -310.06) & (new.targets["energy"] < energy.max() + 1.0)).all()
    assert 0.3 < np.sqrt(np.square(new.targets["forces"]).mean()) < 3.0
