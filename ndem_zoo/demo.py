"""From data to dynamics in a few minutes: ``python -m ndem_zoo.demo --out runs/demo``.

Trains NDeM and the supervised baseline for equally long on the embedded ethanol frames, compares them on frames that
neither has seen, writes model, pictures and a report, loads the model back and runs molecular dynamics with it. Needs
no download. Everything it does is a call of the public interface; the numbers are whatever comes out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndem_zoo.models.estimator import NDeMModel
    from ndem_zoo.report import RunSummary
    from ndem_zoo.runs import Splits

#: Choice: what a few minutes on two cores train best; see `settings`.
N_TRAIN, N_VALID, N_TEST = 450, 50, 1000

#: Choice: the default time of each of the two trainings, so that everything ends in less than 8 minutes on two cores.
SECONDS = 170.0

NAMES = {"ndem": "NDeM", "supervised": "supervised"}


@dataclass(frozen=True)
class DemoOptions:
    """What the demo can be told.

    Attributes
    ----------
    out
        Folder for the results.
    seconds
        Time of each training.
    threads
        Of torch. Choice: 1; threads that wait for each other on a busy machine can be far slower than one. A single test of
        15 s, at load 4 on two cores: supervised 45 steps with two threads and 335 with one, NDeM 313 and 256.
    md_steps
        Steps of 0.5 fs.
    n_test
        Frames to judge by.
    seed
        Of split, weights, noise and velocities.
    progress
        Whether trainings show progress.
    """

    out: Path
    seconds: float = SECONDS
    threads: int = 1
    md_steps: int = 2000
    n_test: int = N_TEST
    seed: int = 1
    progress: bool = True


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo from the command line."""
    from ndem_zoo.cli import guarded

    given = _parse(arguments)
    debug = given.pop("debug")
    sys.exit(guarded(lambda: run_demo(DemoOptions(**given)), "ndem_zoo.demo", debug=debug))


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Train, compare, report, and run dynamics.

    Returns
    -------
    results : dict
        ``"ndem"`` and ``"supervised"``: errors on the held-out frames; ``"md"``: summary of the dynamics.
    """
    import torch

    from ndem_zoo import runs

    torch.set_num_threads(options.threads)
    splits = runs.open_splits(
        "sample:ethanol", n_train=N_TRAIN, n_valid=N_VALID, n_test=options.n_test, seed=options.seed
    )
    _introduce(options, splits)
    models = {}
    for number, objective in enumerate(NAMES, start=1):
        _headline(number, f"training with objective {objective!r} for {options.seconds:.0f} s")
        models[objective] = train_one(objective, splits, options)
    _headline(3, f"errors on {len(splits.test)} frames that neither model has seen")
    summaries = judge(models, splits, options)
    _print_comparison(list(summaries.values()))
    _headline(4, f"molecular dynamics (NVE) with the saved model, {options.md_steps * 0.5e-3:g} ps")
    md = run_dynamics(splits, options)
    write_summary(summaries, md, options)
    _say_farewell(options)
    return {name: dict(summary.metrics) for name, summary in summaries.items()} | {"md": md}


def settings() -> dict[str, Any]:
    """Keywords of both models: the preset ``md17_fast``, changed for a training of minutes."""
    # Choice: lr. The supervised baseline after 6,000 steps, one seed: 0.474 kcal/mol/Å with the preset's 1e-3, 0.396 with
    # 2e-3. At about equal cost, 32 channels (9,200 steps, 0.495) and batches of 8 (3,900 steps, 0.536) were worse.
    # Choice: validation every 250 steps, so that what the bar shows moves.
    return {"preset": "md17_fast", "lr": 2e-3, "validate_every": 250}


def train_one(objective: str, splits: Splits, options: DemoOptions) -> NDeMModel:
    """Train with one objective and save the model; both start from the same weights and see the same batches."""
    from ndem_zoo import NDeMTorchMDNet

    model = NDeMTorchMDNet(objective=objective, seed=options.seed, progress=options.progress, **settings())
    model.fit(splits.train, splits.valid, max_time=options.seconds)
    if model.interrupted_:
        raise KeyboardInterrupt
    folder = _folder(objective, options)
    model.save(folder)
    steps = int(model.history_[-1]["step"])
    print(f"{steps} steps with {model.potential_.n_parameters:,} weights; saved in {folder}")
    return model


def _folder(objective: str, options: DemoOptions) -> Path:
    return options.out / ("model" if objective == "ndem" else "baseline")


def judge(models: dict[str, NDeMModel], splits: Splits, options: DemoOptions) -> dict[str, RunSummary]:
    """Errors on the held-out frames, the parity plot, and NDeM's history."""
    from ndem_zoo import plots, runs
    from ndem_zoo.history import write_history
    from ndem_zoo.metrics import dataset_metrics
    from ndem_zoo.predictions import Predictions
    from ndem_zoo.report import RunSummary

    test = splits.test
    predictions, summaries = {}, {}
    for objective, model in models.items():
        predictions[NAMES[objective]] = predicted = runs.predict_columns_of(model, test)
        record = runs.run_record(model, splits, _command(options))
        record["test"] = {"n_structures": len(test)} | dataset_metrics(predicted, test)
        model.note_evaluation(test, dataset_metrics(predicted, test), "test")
        model.save(_folder(objective, options))  # again: now its card has the errors
        kept = Predictions.of("test", test, predicted)
        summaries[objective] = RunSummary(NAMES[objective], record, model.history_, predictions=kept)
    write_history(options.out / "history.csv", models["ndem"].history_)
    if plots.has_matplotlib():
        plots.save_figure(plots.parity_figure(predictions, test.targets, test.ptr), options.out / "parity.png")
    return summaries


def run_dynamics(splits: Splits, options: DemoOptions) -> dict[str, Any]:
    """Load the model from its folder, run NVE dynamics from a held-out frame, and say how well energy is conserved."""
    from ndem_zoo import NDeMCalculator
    from ndem_zoo.dynamics import run_md

    calculator = NDeMCalculator(options.out / "model")
    begin = time.perf_counter()
    record = run_md(
        splits.test.atoms(0),
        calculator,
        steps=options.md_steps,
        timestep=0.5,
        temperature=300.0,
        seed=options.seed,
        out=options.out / "md.extxyz",
    )
    seconds = time.perf_counter() - begin
    summary = record.summary()
    print(f"{options.md_steps} steps of 0.5 fs in {seconds:.0f} s ({1e3 * seconds / options.md_steps:.1f} ms per step)")
    print(f"mean temperature  {summary['mean_temperature_K']:.0f} K")
    print(f"energy drift      {summary['drift_meV_per_atom_per_ps']:+.4f} meV/atom/ps (linear fit)")
    print(f"fluctuation       {summary['fluctuation_meV_per_atom']:.4f} meV/atom (rms about that line)")
    return summary


def write_summary(summaries: dict[str, RunSummary], md: dict[str, Any], options: DemoOptions) -> None:
    """``report.html``, the same as ``report.md``, and the numbers as ``metrics.json``."""
    import dataclasses

    from ndem_zoo import runs
    from ndem_zoo.checkpoint import save_record
    from ndem_zoo.report import write_report

    summaries = summaries | {"ndem": dataclasses.replace(summaries["ndem"], md=md)}
    results = {name: dict(summary.record) for name, summary in summaries.items()}
    units = runs.units_of(*(summary.metrics for summary in summaries.values()))
    save_record(options.out / "metrics.json", results | {"md": md, "units": units})
    title = "ndem_zoo demo: ethanol, NDeM and the supervised baseline for the same time"
    for name in ("report.html", "report.md"):
        write_report(options.out / name, list(summaries.values()), title=title)


# -------------------------------------------------------------------------------------------------------------- printing


def _headline(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)


def _introduce(options: DemoOptions, splits: Splits) -> None:
    from ndem_zoo import runs

    place = runs.environment()
    print(f"ndem_zoo {place['ndem_zoo']}, torch {place['torch']}, {place['device']}, {options.threads} threads")
    print(
        f"data: ethanol at 500 K, energies and forces of GFN2-xTB (in the package, nothing is downloaded): "
        f"{len(splits.train)} frames to train on, {len(splits.valid)} to choose the best weights, {len(splits.test)} to judge."
    )


def _print_comparison(summaries: Sequence[RunSummary]) -> None:
    """A table, and what it says in words."""
    from ndem_zoo.report import compare

    rows = [
        ("energy MAE", "eV", "energy_mae", 5),
        ("", "kcal/mol", "energy_mae_kcal", 4),
        ("force MAE", "eV/Å", "forces_mae", 5),
        ("", "kcal/mol/Å", "forces_mae_kcal", 4),
    ]
    print(f"{'':24}" + "".join(f"{summary.name:>14}" for summary in summaries))
    for label, unit, key, digits in rows:
        print(f"{label:12}{unit:12}" + "".join(f"{summary.metrics[key]:14.{digits}f}" for summary in summaries))
    steps = "".join(f"{summary.record['training']['steps']:>14,}" for summary in summaries)
    print(f"{'steps':24}{steps}")
    print("\n".join(compare(*summaries)))
    print("One seed, minutes of training: to compare methods takes several seeds and longer runs (see benchmarks/).")


def _say_farewell(options: DemoOptions) -> None:
    out = shlex.quote(str(options.out))
    print(
        f"""
Everything is in {options.out}: report.html, report.md, parity.png, learning_curve.png, history.csv, model/, baseline/, md.extxyz.

Next:
  ndem-zoo info {out}/model
  ndem-zoo predict --model {out}/model --data sample:ethanol --out predictions.extxyz
  ndem-zoo md --model {out}/model --start sample:ethanol --ensemble langevin --temperature 300 --out md.extxyz
  ndem-zoo train --data YOUR.extxyz --preset md17_fast --max-time 15m --out runs/mine"""
    )


def _command(options: DemoOptions) -> str:
    words = ["python", "-m", "ndem_zoo.demo", "--out", str(options.out), "--seconds", f"{options.seconds:g}"]
    return shlex.join([*words, "--threads", str(options.threads), "--seed", str(options.seed)])


def _parse(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Options from the command line."""
    parser = argparse.ArgumentParser(prog="python -m ndem_zoo.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time of each of the two trainings (%(default)g)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads (%(default)s)")
    parser.add_argument("--md-steps", type=int, default=2000, help="steps of 0.5 fs (%(default)s)")
    parser.add_argument("--n-test", type=int, default=N_TEST, help="frames to judge by (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of split, weights, noise and velocities (%(default)s)")
    parser.add_argument("--quiet", action="store_false", dest="progress", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return vars(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
