"""How fast a model trains and predicts on the user's own data and machine, and where the time goes.

It runs the training loop's own steps and `predict_columns`, after a warm-up, in rounds whose medians are given: what
``ndem-zoo bench`` prints. Comparisons with other packages are not made here.
"""

from __future__ import annotations

import contextlib
import copy
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ndem_zoo.datasets.base import as_dataset
from ndem_zoo.datasets.checks import check_structures, check_targets
from ndem_zoo.inference import predict_columns
from ndem_zoo.models.estimator import check_known_elements, torch_device
from ndem_zoo.runs import environment
from ndem_zoo.sampling import Collator, load, size_batches
from ndem_zoo.shares import Share
from ndem_zoo.training import Run, TrainSettings, check_whole

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset
    from ndem_zoo.models.estimator import NDeMModel
    from ndem_zoo.models.potential import Potential

#: What the time is spent on, in the order of a step. ``"forward"`` includes the forces and all terms of the objective,
#: ``"rest"`` the bookkeeping of a training, or the way of predictions to the CPU.
STAGES = ("data", "forward", "backward", "optimizer", "rest")


class Watch:
    """Takes the time of stages that follow each other.

    On a GPU a mark is an event in its queue: nothing waits until the times are asked for, and the time between two marks
    is that of the GPU, idle or not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forget everything; the first stage begins now."""
        self._wait()
        self._marks = []
        self.mark("")

    def mark(self, stage: str) -> None:
        """A stage ends here, and the next begins."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage since the start."""
        self._wait()
        total = dict.fromkeys(STAGES, 0.0)
        for (_, begin), (stage, end) in zip(self._marks, self._marks[1:], strict=False):
            total[stage] += 1e-3 * begin.elapsed_time(end) if self.device.type == "cuda" else end - begin
        return total

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class TimedRun(Run):
    """A training that marks the end of each stage of its steps."""

    watch: Watch

    def forward(self, share: Share) -> dict[str, Tensor]:
        """See `Run.forward`."""
        terms = super().forward(share)
        self.watch.mark("forward")
        return terms

    def backward(self, loss: Tensor) -> None:
        """See `Run.backward`."""
        super().backward(loss)
        self.watch.mark("backward")

    def update(self) -> None:
        """See `Run.update`."""
        super().update()
        self.watch.mark("optimizer")


def benchmark(
    model: NDeMModel, dataset: Any, *, batch_size: int | None = None, steps: int = 20, rounds: int = 9
) -> dict[str, Any]:
    """Speed and memory of training and prediction.

    Parameters
    ----------
    model
        Fitted; it is not changed. One that is not fitted is fitted to the data for one step.
    dataset
        Structures in any form that `NDeMModel.fit` takes. Without the labels that the model's objective needs, only
        prediction is measured; this takes a fitted model.
    batch_size
        Structures per step and per batch of predictions; default: the model's `batch_size` and `eval_batch_size`.
    steps
        Training steps of a round, and batches of predictions in one (as far as the data go).
    rounds
        How often; one more comes before, as a warm-up.

    Returns
    -------
    record : dict
        ``"training"`` (None if it was not measured) and ``"inference"``, each with ``"steps_per_s"`` and
        ``"structures_per_s"`` (medians over the rounds), ``"steps_per_s_quartiles"``, ``"share"`` of the time of each
        of `STAGES`, ``"batch_size"`` and ``"peak_memory_MB"``; ``"model"``, ``"data"`` and ``"environment"``.

    Raises
    ------
    ConfigError
        If a number is not allowed.
    DataError
        If the data cannot be used.

    Notes
    -----
    Peak memory is that of tensors on a GPU; on a CPU, of the whole process, libraries included (on Linux since the
    measurement began, elsewhere since the process did).
    """
    check_whole("steps", steps, 1)
    check_whole("rounds", rounds, 1)
    columns = as_dataset(dataset)
    check_structures(columns)
    if not hasattr(model, "potential_"):
        model.fit(columns, max_steps=1)
    check_known_elements(columns.z, columns.ptr, model.reference_)
    own = model.resolved_["settings"] | {"nb_epoch": None, "max_steps": sys.maxsize, "max_time": None}
    given = {} if batch_size is None else {"batch_size": batch_size, "eval_batch_size": batch_size}
    settings = TrainSettings(**own | given)
    device = torch_device(model.device)
    potential, objective = copy.deepcopy((model.potential_, model.objective_))
    potential.to(device).backbone.use_plan(model.plan, device)
    inference = _inference(potential, columns, settings.eval_batch_size, device, steps, rounds)
    training = None
    if objective.requires <= set(columns.targets):
        check_targets(columns, objective.requires)
        rest = columns if potential.prior is None else potential.prior.subtract(columns)
        with potential.without_prior():  # as `fit` trains
            run = TimedRun(potential.train(), objective, rest, None, settings, device)
            training = _training(run, steps, rounds)
    return {
        "model": {
            "name": type(model).__name__,
            "n_parameters": model.potential_.n_parameters,
            "objective": model.resolved_["objective"]["name"],
            "plan": potential.backbone.plan,
            "precision": settings.precision,
        },
        "data": {"name": columns.name, "n_structures": len(columns), "mean_atoms": float(columns.counts.mean())},
        "steps": steps,
        "rounds": rounds,
        "training": training,
        "inference": inference,
        "environment": environment(model),
    }


def _training(run: TimedRun, steps: int, rounds: int) -> dict[str, Any]:
    """Figures of the training loop's own steps."""
    device = run.fabric.device
    run.watch = watch = Watch(device)
    found = []
    _forget_peak(device)
    with contextlib.closing(run.batches()) as batches:
        for _ in range(rounds + 1):
            structures = 0
            watch.start()
            begin = time.perf_counter()
            for _ in range(steps):
                shares = next(batches)
                watch.mark("data")
                run.one_step(shares)
                watch.mark("rest")
                structures += sum(share.batch.n_systems for share in shares)
            stages = watch.seconds()
            found.append((time.perf_counter() - begin, steps, structures, stages))
    return _figures(found[1:]) | {"batch_size": run.settings.batch_size, "peak_memory_MB": _peak(device)}


def _inference(
    potential: Potential, dataset: MolecularDataset, batch_size: int, device: torch.device, steps: int, rounds: int
) -> dict[str, Any]:
    """Figures of `predict_columns`; the shares are those of its stages, made one by one."""
    count = min(len(dataset), steps * batch_size)
    part = dataset.select(np.linspace(0, len(dataset) - 1, count).astype(int))  # of all parts of a trajectory
    found = []
    _forget_peak(device)
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        predict_columns(potential, part, batch_size)  # ends with numbers on the CPU: nothing is left to wait for
        seconds = time.perf_counter() - begin
        stages, batches = _prediction_stages(potential, part, batch_size, device)
        found.append((seconds, batches, count, stages))
    return _figures(found[1:]) | {"batch_size": batch_size, "peak_memory_MB": _peak(device)}


def _prediction_stages(
    potential: Potential, part: MolecularDataset, batch_size: int, device: torch.device
) -> tuple[dict[str, float], int]:
    """Seconds of each stage of a prediction, and its number of batches."""
    watch, cutoff = Watch(device), potential.backbone.cutoff
    order = size_batches(part, batch_size, cutoff, nearest=potential.backbone.nearest)
    place = {"nearest": potential.backbone.nearest, "device": device}
    collate = Collator(part, cutoff, next(potential.parameters()).dtype, with_targets=False, **place)
    potential.eval()
    watch.start()
    with torch.no_grad(), contextlib.closing(load(collate, order)) as batches:
        for batch in batches:
            watch.mark("data")
            prediction = potential(batch)
            watch.mark("forward")
            for value in (prediction.value, prediction.forces):
                if value is not None:
                    value.double().cpu()
            watch.mark("rest")
    return watch.seconds(), len(order)


def _figures(rounds: list[tuple[float, int, int, dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds of (seconds, steps, structures, seconds of each stage)."""
    rates = [steps / seconds for seconds, steps, _, _ in rounds]
    stages = {name: float(np.median([stage[name] for *_, stage in rounds])) for name in STAGES}
    return {
        "steps_per_s": float(np.median(rates)),
        "steps_per_s_quartiles": [float(value) for value in np.percentile(rates, [25, 75])],
        "structures_per_s": float(np.median([structures / seconds for seconds, _, structures, _ in rounds])),
        "share": {name: value / sum(stages.values()) for name, value in stages.items()},
    }


def _forget_peak(device: torch.device) -> None:
    """Let the peak begin at what is used now, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: then it is the peak of the process so far
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: torch.device) -> float:
    """Peak memory in MB; see `benchmark`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
