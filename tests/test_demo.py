"""The demo, shortened to seconds: what it prints is what it measured, and what it promises is in its folder."""

from __future__ import annotations

import json

import pytest
from ase.io import read

pytest.importorskip("matplotlib")

from ndem_zoo import NDeMTorchMDNet, demo
from ndem_zoo.history import read_history


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Results of a run of seconds, its folder, and what it printed."""
    import contextlib
    import io

    import torch

    out, stream, threads = tmp_path_factory.mktemp("demo") / "out", io.StringIO(), torch.get_num_threads()
    options = demo.DemoOptions(out=out, seconds=1.0, threads=threads, md_steps=20, n_test=20, progress=False)
    with contextlib.redirect_stdout(stream):
        results = demo.run_demo(options)
    return results, out, stream.getvalue()


def test_folder_holds_what_is_promised(result):
    _, out, text = result
    promised = "report.html report.md parity.png learning_curve.png history.csv model baseline md.extxyz".split()
    assert all((out / name).exists() for name in promised)
    assert all(name in text for name in promised)
    assert NDeMTorchMDNet.load(out / "model").objective == "ndem"
    assert NDeMTorchMDNet.load(out / "baseline").objective == "supervised"
    assert len(read_history(out / "history.csv")) >= 1
    assert len(read(out / "md.extxyz", index=":")) == 3


def test_printed_errors_are_those_of_the_saved_models(result, ethanol):
    results, out, text = result
    _, _, test = ethanol.split(demo.N_TRAIN, demo.N_VALID, seed=1, n_test=20)
    for name, folder in (("ndem", "model"), ("supervised", "baseline")):
        metrics = NDeMTorchMDNet.load(out / folder).evaluate(test)
        assert results[name]["forces_mae"] == pytest.approx(metrics["forces_mae"], rel=1e-5)
        for key, digits in (("energy_mae", 5), ("forces_mae", 5), ("energy_mae_kcal", 4), ("forces_mae_kcal", 4)):
            assert f"{results[name][key]:.{digits}f}" in text
    sentences = [line for line in text.splitlines() if line.startswith("The force error of NDeM")]
    better = results["ndem"]["forces_mae"] < results["supervised"]["forces_mae"]
    assert all(("smaller" if better else "larger") in sentence for sentence in sentences)


def test_both_trainings_have_the_same_time_and_data(result):
    _, out, _ = result
    record = json.loads((out / "metrics.json").read_text())
    for name in ("ndem", "supervised"):
        assert 1.0 <= record[name]["training"]["seconds"] < 6.0
        assert record[name]["data"] == record["ndem"]["data"]
        assert record[name]["n_parameters"] == record["ndem"]["n_parameters"]


def test_drift_is_printed_and_reported(result):
    results, out, text = result
    drift = results["md"]["drift_meV_per_atom_per_ps"]
    assert f"{drift:+.4f} meV/atom/ps" in text
    assert f"| {drift:+.4f} |" in (out / "report.md").read_text(encoding="utf-8")


def test_wrong_options_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        demo.main(["--out", str(tmp_path / "d"), "--seconds", "-1"])
    assert error.value.code == 2
    assert "max_time=-1.0" in capsys.readouterr().err.splitlines()[-1]
