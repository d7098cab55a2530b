"""``ndem-zoo`` as scripts use it: exit codes, one line on stderr, files that it leaves, resuming, interrupting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase.io import read, write

pytest.importorskip("typer")

from ndem_zoo import NDeMTorchMDNet, cli, plots, runs
from ndem_zoo.datasets import write_extxyz
from ndem_zoo.errors import ConfigError, DataWarning
from ndem_zoo.history import read_history

TINY = "--preset md17_fast --set hidden_channels=8 --set num_layers=1 --set num_heads=2 --set num_rbf=8".split()
SHORT = [*TINY, *"--n-train 24 --n-valid 8 --n-test 10 --set validate_every=4 --device cpu --quiet".split()]


def call(*words: str | Path) -> int:
    """Exit code of a command in this process."""
    return cli.run([str(word) for word in words])


def fails(capsys, code: int, *words: str | Path) -> str:
    """The single line that a failing command says."""
    assert call(*words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith(("data:", "ndem-zoo: warning"))]
    assert len(lines) == 1
    assert lines[0].startswith("ndem-zoo: ")
    return lines[0]


def spawn(*words: str | Path, **options) -> subprocess.Popen:
    """A command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "ndem_zoo.cli", *map(str, words)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished training of eight steps."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert call("train", "--data", "sample:ethanol", "--out", out, "--max-steps", 8, *SHORT) == 0
    return out


@pytest.fixture(scope="module")
def frames(ethanol, tmp_path_factory):
    """Twelve labeled frames as extended XYZ."""
    path = tmp_path_factory.mktemp("data") / "frames.extxyz"
    write_extxyz(path, ethanol[100:112])
    return path


# ----------------------------------------------------------------------------------------------------------------- train


def test_train_leaves_everything_in_the_folder(run):
    assert {"history.csv", "metrics.json", "split.json", "model"} <= {p.name for p in run.iterdir()}
    record = json.loads((run / "metrics.json").read_text())
    assert record["training"]["steps"] == 8
    assert record["data"] == {
        "source": "sample:ethanol", "name": "sample ethanol", "seed": 1, "n_train": 24, "n_valid": 8, "n_test": 10
    }  # fmt: skip
    assert record["command"].startswith("ndem-zoo train" if "train" in sys.argv else "ndem-zoo")
    for unit, names in {
        "eV": ["energy_mae"], "kcal/mol": ["energy_mae_kcal"], "eV/atom": ["energy_mae_per_atom"],
        "eV/Å": ["forces_mae", "forces_mae_H"], "kcal/mol/Å": ["forces_mae_kcal"], "": ["forces_cosine"],
    }.items():  # fmt: skip
        assert all(record["units"][name] == unit for name in names)
    assert [row["step"] for row in read_history(run / "history.csv")] == [4, 8]
    if plots.has_matplotlib():
        assert (run / "parity.png").read_bytes()[:4] == (run / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_prior_from_the_command_line(run, tmp_path):
    """24 frames of ethanol: the force field that is fitted to them leaves a tenth of the error of eight steps."""
    out = tmp_path / "run"
    assert call("train", "--data", "sample:ethanol", "--out", out, "--max-steps", 8, "--prior", "valence", *SHORT) == 0
    found, plain = (json.loads((folder / "metrics.json").read_text())["test"]["forces_mae"] for folder in (out, run))
    assert found < 0.2 * plain
    assert json.loads((out / "model" / "config.json").read_text())["resolved"]["prior"] == "valence"


def test_metrics_are_those_of_the_saved_model_on_the_frames_of_the_split(run, ethanol):
    record, split = (json.loads((run / name).read_text()) for name in ("metrics.json", "split.json"))
    order = np.random.default_rng(1).permutation(2000)  # TorchMD-NET's split
    assert split["train"] == [str(i) for i in order[:24]]
    assert split["valid"] == [str(i) for i in order[24:32]]
    assert split["test"] == [str(i) for i in order[32:42]]
    model = NDeMTorchMDNet.load(run / "model")
    predicted, test = model.predict(ethanol[order[32:42]]), ethanol[order[32:42]]
    error = np.abs(predicted["energy"] - test.targets["energy"])
    assert record["test"]["energy_mae"] == pytest.approx(error.mean())
    assert record["test"]["energy_mae_kcal"] == pytest.approx(error.mean() * 23.060548, rel=1e-6)
    force_error = np.abs(predicted["forces"].reshape(-1, 3) - test.targets["forces"])
    assert record["test"]["forces_mae"] == pytest.approx(force_error.mean())


def test_flags_and_settings_reach_model_objective_and_backbone(tmp_path):
    words = "--objective noisy_nodes --weight 0.3 --seed 5 --set sigma=0.02 --set lr=0.002 --set separate_branch=False"
    assert (
        call("train", "--data", "sample:ethanol", "--out", tmp_path / "r", "--max-steps", 1, *SHORT, *words.split())
        == 0
    )
    model = NDeMTorchMDNet.load(tmp_path / "r" / "model")
    assert (model.objective, model.weight, model.seed, model.lr) == ("noisy_nodes", 0.3, 5, 0.002)
    assert model.objective_.options.sigma == 0.02
    assert model.objective_.options.separate_branch is False
    assert model.backbone_options == {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 8}


def test_resumed_training_ends_like_one_that_was_never_stopped(run, tmp_path):
    out = tmp_path / "r"
    words = ["train", "--data", "sample:ethanol", "--out", out, *SHORT, "--set", "schedule=constant"]
    whole = [*words[:4], tmp_path / "whole", *words[5:]]
    assert call(*whole, "--max-steps", 8) == 0
    assert call(*words, "--max-steps", 4) == 0
    assert call(*words, "--max-steps", 8, "--resume") == 0
    weights = [(folder / "model" / "weights.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]
    assert [row["step"] for row in read_history(out / "history.csv")] == [4, 8]


def test_folder_of_a_run_is_not_overwritten(run, capsys):
    before = (run / "metrics.json").read_bytes()
    line = fails(capsys, 2, "train", "--data", "sample:ethanol", "--out", run, "--max-steps", 8, *SHORT)
    assert "holds a training already" in line
    assert (run / "metrics.json").read_bytes() == before


def test_resuming_with_other_data_is_refused(run, capsys):
    line = fails(
        capsys, 2, "train", "--data", "sample:ethanol", "--out", run, "--max-steps", 12, *SHORT, "--seed", 2, "--resume"
    )
    assert "seed=1, not 2" in line


def test_validation_data_from_another_file_and_no_matplotlib(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    out = tmp_path / "r"
    words = [word for word in SHORT if word not in ("--n-valid", "8", "--n-test", "10")]
    assert call("train", "--data", "sample:ethanol", "--valid", frames, "--out", out, "--max-steps", 1, *words) == 0
    record, split = (json.loads((out / name).read_text()) for name in ("metrics.json", "split.json"))
    assert record["valid"]["n_structures"] == 12
    assert record["data"]["n_train"] == 24
    assert split["valid_data"] == str(frames)
    assert not list(out.glob("*.png"))


# ------------------------------------------------------------------------------------------------------ wrong use, bad data


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--set", "foo=1"], 2, "no setting 'foo'"),
        (["--set", "sigma"], 2, "key=value"),
        (["--set", "sigma=0"], 2, "sigma=0"),
        (["--set", "lr=1", "--set", "lr=2"], 2, "'lr' is given twice"),
        (["--set", "weight=1", "--weight", "2"], 2, "'weight' is given twice"),
        (["--set", "objective.hidden_channels=8"], 2, "no setting 'objective.hidden_channels'"),
        (
            ["--objective", "magic"],
            2,
            "no objective 'magic'; there are dens, frad, geossl, ndem, ndem_curvature, noisy_nodes, ",
        ),
        (["--preset", "magic"], 2, "no preset 'magic'"),
        (["--model", "magic"], 2, "no model 'magic'"),
        (["--device", "abacus"], 2, "device='abacus'"),
        (["--precision", "8"], 2, "precision='8'"),
        (["--n-train", "many"], 2, "neither a count nor a fraction"),
        (["--n-train", "5000"], 3, "only 2,000 structures"),
        (["--max-time", "soon"], 2, "no duration"),
        (["--split", "1"], 2, "no option 'split'"),
        (["--data", "sample:water"], 2, "no sample 'water'; there are ethanol, aspirin"),
        (["--data", "md18:ethanol"], 2, "no kind of data 'md18'"),
        (["--data", "md17:water", "--no-download"], 2, "no molecule 'water'"),
        (["--data", "no/such.extxyz"], 3, "no file no/such.extxyz"),
        (["--init-from", "no/such"], 3, "no saved model"),
        (["--unknown"], 2, "No such option"),
    ],
)
def test_mistakes_are_one_line_and_a_code(words, code, says, tmp_path, capsys):
    data = [] if "--data" in words else ["--data", "sample:ethanol"]
    line = fails(capsys, code, "train", *data, "--out", tmp_path / "r", "--max-steps", 1, *TINY, "--quiet", *words)
    assert says in line
    assert not list(tmp_path.iterdir())


def test_unknown_setting_lists_what_there_is(tmp_path, capsys):
    line = fails(capsys, 2, "train", "--data", "sample:ethanol", "--out", tmp_path / "r", "--set", "sgima=1")
    assert all(name in line for name in ("weight_decay", "grad_main", "num_rbf"))


def test_data_that_is_missing_is_not_downloaded_when_forbidden(tmp_path, capsys):
    words = ["--data", "md17:ethanol", "--data-dir", tmp_path, "--no-download", "--out", tmp_path / "r"]
    assert "download=False" in fails(capsys, 3, "train", *words)


def test_broken_structures_are_named(frames, tmp_path, capsys):
    images = read(frames, index=":")
    images[5].positions[2, 0] = np.nan
    write(tmp_path / "bad.extxyz", images)
    words = ["--n-train", "8", "--n-valid", "2", "--out", tmp_path / "r", "--max-steps", "1", *TINY, "--quiet"]
    line = fails(capsys, 3, "train", "--data", tmp_path / "bad.extxyz", *words)
    assert "bad.extxyz: structure 5: position of atom 2 is" in line  # its number in the file, not in the split
    (tmp_path / "cut.extxyz").write_text(frames.read_text()[:-150])
    assert "structure 11 cannot be read" in fails(capsys, 3, "train", "--data", tmp_path / "cut.extxyz", *words)
    assert not (tmp_path / "r").exists()


def test_wrong_units_are_an_error_and_suspicious_ones_a_warning(ethanol, tmp_path, capsys):
    words = ["--n-train", "8", "--n-valid", "2", "--max-steps", "1", *TINY, "--quiet"]
    for factor, name in ((23.06, "kcal"), (3000.0, "absurd")):
        images = [ethanol.atoms(i) for i in range(12)]
        for atoms in images:
            atoms.calc.results["forces"] *= factor
        write(tmp_path / f"{name}.extxyz", images)
    line = fails(capsys, 3, "train", "--data", tmp_path / "absurd.extxyz", "--out", tmp_path / "a", *words)
    assert "allowed is up to 1000" in line
    assert call("train", "--data", tmp_path / "kcal.extxyz", "--out", tmp_path / "k", *words) == 0
    assert "ndem-zoo: warning: the mean |F|" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- evaluate, predict


def test_evaluate_takes_the_test_part_of_the_run(run, tmp_path, capsys):
    assert call("evaluate", "--model", run, "--data", "sample:ethanol", "--json", tmp_path / "e.json") == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["data"] == {"source": "sample:ethanol", "part": "test", "n_structures": 10}
    assert result["metrics"]["forces_mae"] == json.loads((run / "metrics.json").read_text())["test"]["forces_mae"]
    assert result["units"]["forces_mae"] == "eV/Å"
    shown = capsys.readouterr().out
    assert f"{result['metrics']['forces_mae']:.5f} eV/Å" in shown
    assert f"{result['metrics']['energy_mae_kcal']:.4f} kcal/mol" in shown


def test_evaluate_on_all_structures_warns_about_those_trained_on(run, tmp_path, capsys):
    assert call("evaluate", "--model", run, "--data", "sample:ethanol", "--part", "all") == 0
    output = capsys.readouterr()
    assert "2000 structures (all)" in output.out
    assert "24 of these structures were trained on" in output.err


def test_parts_are_only_for_the_data_of_the_run(run, frames, capsys):
    # The ids of this file are numbers as well; they must not be taken for those of the split.
    assert "no split.json" in fails(capsys, 2, "evaluate", "--model", run, "--data", frames, "--part", "valid")
    assert call("evaluate", "--model", run, "--data", frames) == 0
    assert "12 structures (all)" in capsys.readouterr().out


def test_predictions_beside_untouched_references(run, ethanol, frames, tmp_path):
    images = read(frames, index=":")
    for number, atoms in enumerate(images):
        atoms.info["note"] = f"frame-{number}"
    images[3].calc = None  # no labels
    write(tmp_path / "in.extxyz", images)
    assert call("predict", "--model", run, "--data", tmp_path / "in.extxyz", "--out", tmp_path / "out.extxyz") == 0
    predicted = NDeMTorchMDNet.load(run / "model").predict(ethanol[100:112])
    after = read(tmp_path / "out.extxyz", index=":")
    assert len(after) == 12
    for number, atoms in enumerate(after):
        assert atoms.get_potential_energy() == pytest.approx(predicted["energy"][number], abs=1e-4)
        np.testing.assert_allclose(atoms.get_forces(), predicted["forces"][number], atol=1e-4)
        np.testing.assert_allclose(atoms.positions, ethanol.atoms(100 + number).positions, atol=1e-7)
        assert atoms.info["note"] == f"frame-{number}"
        if number != 3:
            assert atoms.info["REF_energy"] == pytest.approx(ethanol.targets["energy"][100 + number])
            np.testing.assert_allclose(atoms.arrays["REF_forces"], ethanol.atoms(100 + number).get_forces(), atol=1e-7)
    # Predicting once more, on the output: the references are still the references.
    assert call("predict", "--model", run, "--data", tmp_path / "out.extxyz", "--out", tmp_path / "again.extxyz") == 0
    again = read(tmp_path / "again.extxyz", index=":")
    assert [a.info["REF_energy"] for a in again] == [a.info["REF_energy"] for a in after]


def test_prediction_of_unknown_elements_is_refused(run, frames, tmp_path, capsys):
    images = read(frames, index=":")
    images[7].numbers[4] = 9
    write(tmp_path / "in.extxyz", images)
    line = fails(
        capsys, 3, "predict", "--model", run, "--data", tmp_path / "in.extxyz", "--out", tmp_path / "out.extxyz"
    )
    assert "structure 7: atom 4 is F" in line
    assert not (tmp_path / "out.extxyz").exists()


@pytest.mark.parametrize("command", ["evaluate", "predict", "md"])
def test_missing_and_damaged_models(command, run, frames, tmp_path, capsys):
    source = {
        "evaluate": ["--data", frames],
        "predict": ["--data", frames, "--out", tmp_path / "o"],
        "md": ["--start", frames],
    }
    assert "no saved model" in fails(capsys, 3, command, "--model", tmp_path, *source[command])
    (tmp_path / "config.json").write_text("{")
    assert "damaged" in fails(capsys, 3, command, "--model", tmp_path, *source[command])


# ---------------------------------------------------------------------------------------------------------- md, info, report


def test_md_says_how_well_energy_is_conserved(run, tmp_path, capsys):
    words = ["--steps", "10", "--every", "5", "--out", tmp_path / "t.extxyz", "--json", tmp_path / "md.json"]
    assert call("md", "--model", run, "--start", "sample:ethanol", *words) == 0
    summary = json.loads((tmp_path / "md.json").read_text())
    assert summary["duration_ps"] == pytest.approx(0.005)
    assert f"energy drift {summary['drift_meV_per_atom_per_ps']:+.3g} meV/atom/ps" in capsys.readouterr().out
    assert len(read(tmp_path / "t.extxyz", index=":")) == 3


def test_md_from_a_frame_of_a_file(run, frames, tmp_path, capsys):
    for start, number in ((f"{frames}@4", 4), (f"{frames}@-1", 11), (str(frames), 0)):
        words = ["--steps", "1", "--timestep-fs", "1e-6", "--ensemble", "langevin", "--out", tmp_path / "t.extxyz"]
        assert call("md", "--model", run, "--start", start, *words) == 0
        first = read(tmp_path / "t.extxyz", index=0)
        np.testing.assert_allclose(first.positions, read(frames, index=number).positions, atol=1e-6)
    assert "cannot read structure 12" in fails(capsys, 3, "md", "--model", run, "--start", f"{frames}@12")
    assert "ensemble='npt'" in fails(capsys, 2, "md", "--model", run, "--start", frames, "--ensemble", "npt")


def test_info_shows_versions_and_cards(run, capsys):
    assert call("info") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("torch", "ndem_zoo", "noisy_nodes", "md17_fast", "NDeMTorchMDNet", "sample"))
    assert call("info", run) == 0
    assert capsys.readouterr().out == (run / "model" / "card.md").read_text(encoding="utf-8")


def test_report_of_runs(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert call("report", run, "--out", tmp_path / "report.md") == 0
    assert "force MAE (kcal/mol/Å)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "no finished run" in fails(capsys, 3, "report", run, tmp_path, "--out", tmp_path / "report.md")


def test_usage(capsys):
    assert call() == 2
    assert "Usage: ndem-zoo" in capsys.readouterr().out
    assert call("--help") == 0
    assert call("--version") == 0
    assert "trian" in fails(capsys, 2, "trian")


# -------------------------------------------------------------------------------------------------------------- exit codes


def test_unexpected_errors_are_one_line_too_unless_debug(capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(runs, "environment", broken)
    assert fails(capsys, 1, "info") == "ndem-zoo: unexpected RuntimeError: two lines (--debug shows where)"
    assert call("info", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_real_process_has_the_exit_code_and_no_traceback(tmp_path):
    process = spawn("train", "--data", tmp_path / "no.extxyz", "--out", tmp_path / "r")
    output, error = process.communicate(timeout=120)
    assert process.returncode == 3
    assert error.strip().splitlines() == [f"ndem-zoo: there is no file {tmp_path / 'no.extxyz'}"]
    assert output == ""


def test_ctrl_c_saves_the_best_model_and_says_so(tmp_path):
    out = tmp_path / "r"
    process = spawn("train", "--data", "sample:ethanol", "--out", out, "--max-time", "10m", *SHORT)
    deadline = time.monotonic() + 120
    while not ((out / "history.csv").is_file() and (out / "history.csv").stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume continues" in error
    assert "Traceback" not in error
    assert json.loads((out / "metrics.json").read_text())["training"]["interrupted"] is True
    NDeMTorchMDNet.load(out / "model")


# -------------------------------------------------------------------------------------------------------- make_model, sources


def test_settings_are_sorted_by_their_owner():
    model = runs.make_model(
        "NDeMTorchMDNet", {"weight": 2.0, "preset": None}, ["sigma=[0.01, 0.1]", "backbone.cutoff=4", "schedule=cosine"]
    )
    assert model.objective_options == {"sigma": [0.01, 0.1]}
    assert model.backbone_options == {"cutoff": 4}
    assert (model.schedule, model.weight, model.preset) == ("cosine", 2.0, None)
    merged = runs.make_model("NDeMTorchMDNet", {}, ['backbone_options={"num_layers": 2}', "cutoff=3.5"])
    assert merged.backbone_options == {"num_layers": 2, "cutoff": 3.5}


def test_whole_source_keeps_the_order_of_the_file(frames, ethanol):
    np.testing.assert_array_equal(runs.open_whole("sample:ethanol").pos, ethanol.pos)
    np.testing.assert_allclose(runs.open_whole(str(frames)).pos, ethanol[100:112].pos, atol=1e-8)


def test_options_that_exclude_each_other(frames):
    with pytest.raises(ConfigError, match="exclude each other"):
        runs.open_splits("sample:ethanol", str(frames), n_valid=5)


@pytest.mark.filterwarnings("ignore:.*not the official:UserWarning")
def test_rmd17_prefix_and_official_split(shared_data):
    reading = runs.Reading(data_dir=shared_data / "rmd17")
    splits = runs.open_splits("rmd17:aspirin", None, reading, n_train=20, n_valid=5, split=1)
    assert splits.train.name == "rMD17 aspirin"
    rows = np.loadtxt(shared_data / "rmd17" / "splits" / "index_train_01.csv", dtype=int)
    whole = runs.open_whole("rmd17:aspirin", reading)
    assert set(splits.train.ids) <= set(whole.ids[rows])
    raw = np.load(shared_data / "rmd17" / "npz_data" / "rmd17_aspirin.npz")
    np.testing.assert_array_equal(whole.pos, raw["coords"].reshape(-1, 3))  # in the order of the file
    assert len(splits.test) == runs.MAX_TEST


# ------------------------------------------------------------------------------------------------------------- stores


def test_convert_train_evaluate(tmp_path, capsys):
    """A store is a source of data like any other."""
    assert call("convert", "sample:ethanol", tmp_path / "store") == 0
    assert "2,000 structures, 18,000 atoms, targets energy, forces" in capsys.readouterr().out
    words = ["--out", tmp_path / "run", "--max-steps", 2, *SHORT]
    assert call("train", "--data", tmp_path / "store", *words) == 0
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert [len(split[part]) for part in ("train", "valid", "test")] == [24, 8, 10]
    results = []
    for source in (tmp_path / "store", "sample:ethanol"):
        found = tmp_path / "found.json"
        assert call("evaluate", "--model", tmp_path / "run", "--data", source, "--part", "all", "--json", found) == 0
        results.append(json.loads(found.read_text())["metrics"])
    assert results[0] == results[1]


def test_convert_oc20_files(tmp_path, capsys):
    pytest.importorskip("lmdb")
    from oc20_files import write_text

    for number in range(2):
        write_text(tmp_path / "raw", number, 3, sid=number)
    assert call("convert", tmp_path / "raw", tmp_path / "store") == 0
    said = capsys.readouterr()
    assert "6 structures, 24 atoms, targets energy, forces" in said.out
    assert said.err.splitlines() == ["1 of 2 sources, 3 structures", "2 of 2 sources, 6 structures"]
    assert "finished store" in fails(capsys, 2, "convert", tmp_path / "raw", tmp_path / "store", "--quiet")
    assert "no reference" in fails(capsys, 3, "convert", bare_text(tmp_path), tmp_path / "other", "--quiet")
    assert "unfinished store" in fails(capsys, 3, "train", "--data", tmp_path / "other", "--out", tmp_path / "run")
    assert "holds no store" in fails(capsys, 3, "train", "--data", tmp_path / "raw", "--out", tmp_path / "run")
    word = ["convert", "sample:ethanol", tmp_path / "third", "--task", "s2ef"]
    assert "not in one of OC20's formats" in fails(capsys, 2, *word)


def bare_text(folder: Path) -> Path:
    """A folder with text that has no log."""
    from oc20_files import text_frames

    (folder / "bare").mkdir()
    (folder / "bare" / "0.extxyz").write_text(text_frames(2)[0])
    return folder / "bare"


def test_oc20_by_name(tmp_path):
    pytest.importorskip("lmdb")
    from oc20_files import write_text

    for number in range(4):
        write_text(tmp_path / "s2ef_val_id", number, 5, sid=number, seed=number)
    with pytest.warns(DataWarning, match="one relaxation"):
        splits = runs.open_splits("oc20:s2ef/val_id", reading=runs.Reading(data_dir=tmp_path), n_train=12, n_valid=4)
    assert [len(part) for part in splits.parts().values()] == [12, 4, 4]
    whole = runs.open_whole("oc20:s2ef/val_id", runs.Reading(data_dir=tmp_path))
    assert whole.extras["sid"].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
