"""The commands of ``ndem-zoo`` and their options; each calls one function of `runs.py` and prints what came out.

Results go to stdout, progress and warnings to stderr. Everything heavy is imported inside the commands, so that
``ndem-zoo --help`` is quick. Errors become exit codes in `cli.py`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ndem_zoo import registry
from ndem_zoo._version import __version__
from ndem_zoo.errors import ConfigError

_EPILOG = (
    "Exit codes: 0 done, 1 unexpected error, 2 wrong usage or setting, 3 bad data, 130 interrupted. "
    "With --debug anywhere, errors show their traceback."
)

app = typer.Typer(
    name="ndem-zoo",
    help="Train, judge and use force fields with denoising objectives.",
    epilog=_EPILOG,
    add_completion=False,
    rich_markup_mode=None,  # plain text: importing rich would take half the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: Seconds in each unit of time.
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _number(text: str) -> int | float:
    """A count, or a fraction with a decimal point."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a count nor a fraction") from None


def _duration(text: str) -> float:
    """Seconds from ``90``, ``90s``, ``15m``, ``2h`` or ``1d``."""
    unit = text[-1:].lower()
    value = text[:-1] if unit in _SECONDS else text
    try:
        return float(value) * _SECONDS.get(unit, 1.0)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no duration; write seconds, or 15m, 2h, 1d") from None


def _devices(text: str | int) -> int | str:
    """A count, or ``auto``; typer also asks for the default."""
    if text == "auto" or str(text).isdigit():
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"{text!r} is no number of devices; write a count, or auto")


_SOURCES = (
    f"FILE.extxyz, folder of a store, md17:ethanol, rmd17:aspirin, sample:ethanol ({', '.join(registry.DATASETS)})"
)

Data = Annotated[str, typer.Option("--data", help=f"Data: {_SOURCES}.", metavar="SOURCE")]
ModelFolder = Annotated[Path, typer.Option("--model", help="Folder of a run, or of a saved model.", metavar="DIR")]
Device = Annotated[str | None, typer.Option(help="auto (CUDA, else CPU), cpu, cuda, cuda:0, ...")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with (or for) the files of md17, rmd17, qm9, pcqm4mv2, oc20.", metavar="DIR")
]
NoDownload = Annotated[bool, typer.Option("--no-download", help="Never touch the network.")]
EnergyKey = Annotated[str | None, typer.Option(help="Name of the energies in an extxyz file.", metavar="NAME")]
ForcesKey = Annotated[str | None, typer.Option(help="Name of the forces in an extxyz file.", metavar="NAME")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.", metavar="FILE")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"ndem-zoo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the results.", metavar="DIR")],
    valid: Annotated[str | None, typer.Option(help="Validation data from another source.", metavar="SOURCE")] = None,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(registry.MODELS)}.")] = "NDeMTorchMDNet",
    objective: Annotated[str, typer.Option(help=f"One of {', '.join(registry.OBJECTIVES)}.")] = "ndem",
    target: Annotated[str | None, typer.Option(help="What is predicted: energy (with forces), gap, mu, ...")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Recipe: md17_fast, qm9_paper, oc20_31M, ...; default: the model's.")
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Weight of the objective's auxiliary term.")] = None,
    prior: Annotated[
        str | None,
        typer.Option(help=f"Learn the difference to a force field: {', '.join(registry.FORCE_FIELDS)}, or a sum a+b."),
    ] = None,
    n_train: Annotated[
        Any, typer.Option(parser=_number, metavar="N", help="Training structures: count or fraction.")
    ] = None,
    n_valid: Annotated[
        Any, typer.Option(parser=_number, metavar="N", help="Validation structures: count or fraction.")
    ] = None,
    n_test: Annotated[
        Any, typer.Option(parser=_number, metavar="N", help="Test structures; default: the rest, at most 1000 of them.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of split, weights, order of the data, noise.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    max_time: Annotated[
        Any, typer.Option(parser=_duration, metavar="TIME", help="End after this time: 90s, 15m, 2h.")
    ] = None,
    nb_epoch: Annotated[int | None, typer.Option(help="End after so many passes over the data.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting of model, objective or backbone; may be repeated.", metavar="KEY=VALUE"
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the weights of a saved model, or of a checkpoint of TorchMD-NET, Zaidi et al., Frad, SliDe.",
            metavar="DIR|FILE",
        ),
    ] = None,
    init_partial: Annotated[
        bool, typer.Option("--init-partial", help="Take what fits from --init-from, and draw the rest.")
    ] = False,
    pretrain: Annotated[
        bool, typer.Option("--pretrain", help="Learn the objective's denoising alone, on structures without labels.")
    ] = False,
    device: Device = None,
    devices: Annotated[
        Any,
        typer.Option(
            parser=_devices, metavar="N", help="Devices of each machine that train together, or auto: all GPUs."
        ),
    ] = 1,
    nodes: Annotated[int, typer.Option(help="Machines; torchrun or srun has to start the command on each.")] = 1,
    precision: Annotated[str | None, typer.Option(help="32-true, 64-true or bf16-mixed.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Deterministic algorithms only: the same bits again.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the training in --out, if there is one.")] = False,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = False,
    split: Annotated[int | None, typer.Option(help="Official split 1 to 5 (rmd17 only).")] = None,
    data_dir: DataDir = None,
    no_download: NoDownload = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a model into a folder.

    The folder gets the model, its history, its errors on validation and test data, the split, and plots. With --devices, one
    process is started for each device; batch_size is that of all of them together.
    """
    from ndem_zoo import distributed, runs

    keywords = {
        "preset": preset,
        "target": target,
        "objective": objective,
        "weight": weight,
        "prior": prior,
        "seed": seed,
        "device": device,
    }
    keywords |= {"precision": precision, "progress": not quiet, "deterministic": deterministic or None}
    estimator = runs.make_model(model, keywords, settings or ())
    sizes = {"n_train": n_train, "n_valid": n_valid, "n_test": n_test, "split": split, "seed": seed}
    reading = runs.Reading(data_dir, not no_download, energy_key, forces_key)
    splits = runs.open_splits(data, valid, reading, **sizes)
    to_start = distributed.to_start(devices, nodes, device)
    if to_start:  # only now: what is wrong with settings or data is said once, and what has to be downloaded is there
        raise typer.Exit(distributed.launch(to_start, sys.argv[1:]))
    parts = ", ".join(f"{len(part)} for {name}" for name, part in splits.parts().items())
    if distributed.is_first_of(devices, nodes):
        print(f"data: {splits.train.name}, {parts}", file=sys.stderr)
    record = runs.train_run(
        estimator,
        splits,
        out,
        nb_epoch=nb_epoch,
        max_steps=max_steps,
        max_time=max_time,
        checkpoint_every=checkpoint_every,
        resume=resume,
        tensorboard=tensorboard,
        init_from=init_from if init_from is None or init_from.is_file() else runs.model_folder(init_from),
        init_partial=init_partial,
        pretrain=pretrain,
        devices=devices,
        nodes=nodes,
        command=shlex.join(["ndem-zoo", *sys.argv[1:]]),
    )
    if not distributed.is_first():
        return
    if estimator.init_report_ is not None:
        print(estimator.init_report_)
    training = record["training"]
    print(f"{training['steps']} steps in {training['seconds']:.0f} s; everything is in {out}")
    for name in ("valid", "test"):
        if name in record:
            _print_metrics(f"{name} ({record[name]['n_structures']} structures)", record[name])
    if training["interrupted"]:
        print(f"ndem-zoo: interrupted; {out} holds the best model so far, --resume continues", file=sys.stderr)
        raise typer.Exit(130)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help=f"OC20 files (folder, .tar, .lmdb, .aselmdb), or {_SOURCES}.")],
    out: Annotated[Path, typer.Argument(help="Folder for the store: new, or of an interrupted conversion.")],
    workers: Annotated[int, typer.Option(help="Processes that read (OC20 files only).")] = 1,
    task: Annotated[str | None, typer.Option(help="s2ef (default) or is2re, of OC20 files.")] = None,
    energy: Annotated[str, typer.Option(help="adsorption or total, of OC20 files.")] = "adsorption",
    stored: Annotated[
        str | None, typer.Option(help="What OC20 files hold, if not what is usual: adsorption or total.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Reference energies for OC20 files that lack them.", metavar="oc20_ref.pkl")
    ] = None,
    data_dir: DataDir = None,
    no_download: NoDownload = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Convert data into a store: a folder that opens at once, however large, and that --data takes.

    A conversion that was interrupted goes on where it was when the command is repeated.
    """
    from ndem_zoo import runs

    def report(done: int, total: int, structures: int) -> None:
        print(f"{done} of {total} sources, {structures:,} structures", file=sys.stderr, flush=True)

    store = runs.convert_run(
        source,
        out,
        runs.Reading(data_dir, not no_download, energy_key, forces_key),
        task=task,
        energy=energy,
        stored=stored,
        reference=reference,
        workers=workers,
        report=None if quiet else report,
    )
    print(f"{len(store):,} structures, {len(store.z):,} atoms, targets {', '.join(store.tasks)}, in {out}")


@app.command()
def evaluate(
    model: ModelFolder,
    data: Data,
    part: Annotated[
        str,
        typer.Option(help="all, train, valid or test (as in the run's split.json); auto: test if it names these data."),
    ] = "auto",
    json: Json = None,
    device: Device = None,
    data_dir: DataDir = None,
    no_download: NoDownload = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
) -> None:
    """Compare a model with labeled data."""
    from ndem_zoo import runs
    from ndem_zoo.checkpoint import save_json

    reading = runs.Reading(data_dir, not no_download, energy_key, forces_key)
    record = runs.evaluate_run(model, data, reading, part=part, device=device)
    used = record["data"]
    _print_metrics(f"{used['n_structures']} structures ({used['part']}) of {data}", record["metrics"])
    if json is not None:
        save_json(json, record)


@app.command()
def predict(
    model: Annotated[
        list[Path],
        typer.Option(help="Folder of a run, a saved model or an ensemble; several models make one.", metavar="DIR"),
    ],
    data: Annotated[
        list[str],
        typer.Option(help=f"Data; may be repeated: {_SOURCES}; also .npz, .lmdb, .aselmdb.", metavar="SOURCE"),
    ],
    out: Annotated[Path, typer.Option(help="Extended XYZ file, or folder of a store.", metavar="FILE|DIR")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier call was interrupted.")] = False,
    on_error: Annotated[
        str, typer.Option(help="What to do about a structure that cannot be predicted: stop, or record it.")
    ] = "stop",
    shard: Annotated[int, typer.Option(help="Structures after which the output is made to last.")] = 10_000,
    device: Device = None,
    data_dir: DataDir = None,
    no_download: NoDownload = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Predict energies and forces of any number of structures, in constant memory.

    Writes the structures with predicted energy and forces. In an extended XYZ file, labels that they had become REF_energy
    and REF_forces. With several models, also standard deviations.
    """
    from ndem_zoo import runs

    def report(done: Any) -> None:
        print(f"{done.structures + done.rejected:,} structures", file=sys.stderr, flush=True)

    options = {"resume": resume, "on_error": on_error, "shard": shard, "report": None if quiet else report}
    done = runs.predict_run(model, data, out, runs.Reading(data_dir, not no_download), device=device, **options)
    print(f"{done.structures} structures with energies (eV) and forces (eV/Å) in {out}")
    if done.rejected:
        print(
            f"ndem-zoo: warning: {done.rejected} structures were rejected; the reasons are in rejected.jsonl",
            file=sys.stderr,
        )


@app.command()
def md(
    model: ModelFolder,
    start: Annotated[
        str, typer.Option(help="Structure file that ASE reads (FILE@N: frame N), or SOURCE.", metavar="FILE")
    ],
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 2000,
    timestep_fs: Annotated[float, typer.Option(help="Time step in fs.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="K, of the first velocities and of the thermostat.")] = 300.0,
    ensemble: Annotated[str, typer.Option(help="nve or langevin.")] = "nve",
    friction: Annotated[float, typer.Option(help="Of the Langevin thermostat, in 1/fs.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of velocities and thermostat.")] = 0,
    relax: Annotated[bool, typer.Option("--relax", help="Relax the structure first.")] = False,
    out: Annotated[Path | None, typer.Option(help="Extended XYZ file for the trajectory.", metavar="FILE")] = None,
    every: Annotated[int, typer.Option(help="Steps between frames of the trajectory.")] = 10,
    json: Json = None,
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="32-true or 64-true; default: as trained.")] = None,
    data_dir: DataDir = None,
    no_download: NoDownload = False,
) -> None:
    """Run molecular dynamics with a model.

    Says how well energy is conserved.
    """
    from ndem_zoo import runs
    from ndem_zoo.calculator import NDeMCalculator
    from ndem_zoo.checkpoint import save_json
    from ndem_zoo.dynamics import run_md

    atoms = runs.read_start(start, runs.Reading(data_dir, not no_download))
    calculator = NDeMCalculator(runs.load_model(model), device=device, precision=precision)
    record = run_md(
        atoms,
        calculator,
        steps=steps,
        timestep=timestep_fs,
        temperature=temperature,
        ensemble=ensemble,
        friction=friction,
        seed=seed,
        relax=relax,
        out=out,
        every=every,
    )
    summary = record.summary()
    print(f"{summary['duration_ps']:g} ps, mean temperature {summary['mean_temperature_K']:.0f} K")
    if ensemble == "nve":
        print(
            f"energy drift {summary['drift_meV_per_atom_per_ps']:+.3g} meV/atom/ps, "
            f"fluctuation {summary['fluctuation_meV_per_atom']:.3g} meV/atom (rms)"
        )
    if json is not None:
        save_json(json, summary)


@app.command()
def replay(
    dump: Annotated[Path, typer.Argument(help="Folder that a training named when it ended.", metavar="DUMP")],
    precision: Annotated[str | None, typer.Option(help="32-true, 64-true or bf16-mixed; default: as trained.")] = None,
    anomaly: Annotated[bool, typer.Option("--anomaly", help="Also look at every derivative; slow.")] = False,
) -> None:
    """Make a training step that was not finite again, and say where it breaks."""
    from ndem_zoo import safety

    print(safety.replay(dump, precision=precision, anomaly=anomaly))


@app.command()
def export(
    model: ModelFolder,
    out: Annotated[Path, typer.Option(help="File to write: .pt2, or .pt for metatomic.", metavar="FILE")],
    format: Annotated[str, typer.Option(help="torch_export, aotinductor or metatomic.")] = "torch_export",
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="32-true or 64-true; default: as trained.")] = None,
) -> None:
    """Write a model as one file that runs without this package."""
    from ndem_zoo import runs

    path = runs.load_model(model).export(out, format, device=device, precision=precision)
    print(f"energy (eV) and forces (eV/Å) as {format} in {path}")


@app.command()
def bench(
    data: Annotated[str, typer.Argument(help=f"Data: {_SOURCES}.", metavar="[SOURCE]")] = "sample:ethanol",
    model: Annotated[
        Path | None, typer.Option(help="Folder of a run, or of a saved model; default: a new one.", metavar="DIR")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Recipe of a new model.")] = None,
    objective: Annotated[str | None, typer.Option(help="Of a new model.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of a new model; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Structures per step and per batch of predictions; default: the model's.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of a round.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the medians are shown.")] = 9,
    json: Json = None,
    device: Device = None,
    data_dir: DataDir = None,
    no_download: NoDownload = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
) -> None:
    """Measure the speed of training and prediction on your data and machine.

    With the share of time of each stage, and the peak memory.
    """
    from ndem_zoo import runs
    from ndem_zoo.benchmark import benchmark
    from ndem_zoo.checkpoint import save_json

    keywords = {"preset": preset, "objective": objective}
    if model is None:
        estimator = runs.make_model("NDeMTorchMDNet", keywords | {"device": device, "progress": False}, settings or ())
    else:
        given = [f"--{name}" for name, value in keywords.items() if value is not None] + ["--set"] * bool(settings)
        if given:
            raise ConfigError(f"--model and {given[0]} exclude each other: a saved model has its settings")
        estimator = runs.load_model(model, device)
    dataset = runs.open_whole(data, runs.Reading(data_dir, not no_download, energy_key, forces_key))
    record = benchmark(estimator, dataset, batch_size=batch_size, steps=steps, rounds=rounds)
    _print_benchmark(record)
    if json is not None:
        save_json(json, record)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs to compare.", metavar="DIR...")],
    out: Annotated[
        Path,
        typer.Option(help="Page to write: .html (one file that holds all) or .md (figures beside it).", metavar="FILE"),
    ] = Path("report.html"),
) -> None:
    """Compare runs on one page.

    With tables of errors, learning curves, predicted against reference values, errors by element and by size of the
    force, versions and commands. The page needs no network and runs no scripts.
    """
    from ndem_zoo.report import read_run, write_report

    write_report(out, [read_run(folder) for folder in folders])
    print(f"report of {len(folders)} runs in {out}")


@app.command()
def info(
    folder: Annotated[Path | None, typer.Argument(help="A run or a saved model.", metavar="[DIR]")] = None,
) -> None:
    """Show versions and devices, or a model's card."""
    from ndem_zoo import runs

    if folder is not None:
        print((runs.model_folder(folder) / "card.md").read_text(encoding="utf-8"), end="")
        return
    for name, value in runs.environment().items():
        print(f"{name:12} {value}")
    from ndem_zoo.presets import PRESETS

    tables = {"models": registry.MODELS, "objectives": registry.OBJECTIVES, "backbones": registry.BACKBONES}
    for name, table in {**tables, "data": registry.DATASETS, "presets": PRESETS}.items():
        print(f"{name:12} {', '.join(table)}")


def _print_benchmark(record: Mapping[str, Any]) -> None:
    """What was measured, and how fast it was."""
    model, data, machine = record["model"], record["data"], record["environment"]
    plan = f", plan {model['plan']}"
    print(
        f"{model['name']} ({model['n_parameters']:,} parameters, objective {model['objective']}, "
        f"{model['precision']}{plan}) on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    )
    print(f"{data['name'] or 'data'}: {data['n_structures']} structures, on average {data['mean_atoms']:.1f} atoms")
    for name in ("training", "inference"):
        found = record[name]
        if found is None:
            print(f"{name}: not measured, the data lack the labels for it")
            continue
        low, high = found["steps_per_s_quartiles"]
        size = "" if found["batch_size"] is None else f", batch size {found['batch_size']}"
        print(
            f"{name}{size}: {found['steps_per_s']:.4g} steps/s (quartiles {low:.4g} to {high:.4g}), "
            f"{found['structures_per_s']:.4g} structures/s, peak memory {found['peak_memory_MB']:.0f} MB"
        )
        titles = {"forward": "forward and forces"}
        shares = [f"{titles.get(k, k)} {100 * share:.1f} %" for k, share in found["share"].items() if share]
        print(f"  {', '.join(shares)}")


def _print_metrics(title: str, metrics: Mapping[str, float]) -> None:
    """Errors in the units of ASE and of the literature."""
    from ndem_zoo.properties import PROPERTIES  # here, because it imports torch

    print(f"{title}:")
    if "energy_mae" in metrics:
        print(
            f"  energy MAE {metrics['energy_mae']:.5f} eV = {metrics['energy_mae_kcal']:.4f} kcal/mol "
            f"({1e3 * metrics['energy_mae_per_atom']:.3f} meV/atom)"
        )
    if "forces_mae" in metrics:
        print(f"  force MAE  {metrics['forces_mae']:.5f} eV/Å = {metrics['forces_mae_kcal']:.4f} kcal/mol/Å")
    for target in (name for name in PROPERTIES if name != "energy" and f"{name}_mae" in metrics):
        print(f"  {target} MAE {metrics[f'{target}_mae']:.5g} {PROPERTIES[target].unit}")
