"""Numerical safety of a training: what is not finite stops it and can be repeated, spikes are noted, bits can be fixed.

`training.Run` shows every step to its `Guard`. A loss or gradient that is not finite ends the run before it reaches the
weights, and leaves a *dump*: a folder with the batch, the weights before the step and its seed, in safetensors and JSON.
`replay` makes that step again and says where it breaks (`ndem_zoo.diagnosis`). Reading a dump executes no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ndem_zoo import checkpoint as files
from ndem_zoo import provenance
from ndem_zoo.errors import ConfigError, FileFormatError, TrainingError
from ndem_zoo.graph import Batch, Nearest
from ndem_zoo.sampling import step_seed

if TYPE_CHECKING:
    from ndem_zoo.diagnosis import Replay
    from ndem_zoo.training import Run

#: Choice: a step is a spike if its loss exceeds the median of so many steps before it by this factor.
WINDOW, SPIKE = 100, 5.0

#: Choice: the newest spikes that are kept in a checkpoint with their structures; all are counted in the history.
KEPT_SPIKES = 1000

#: Choice: an optimizer's state goes into a dump up to this size, in bytes. A replay does not need it.
SMALL = 1 << 26

#: Where dumps go, under the present folder, when a training has no folder of its own.
FOLDER = "ndem_zoo-dumps"

FORMAT = 1

_GEOMETRY = ("z", "pos", "src", "dst", "shift", "system", "cell", "fixed")


class Guard:
    """Looks at the loss and the gradient of every step of a run, without making a GPU wait.

    On a CPU a step that is not finite is found before it reaches the weights. On a GPU a flag is raised there, which
    makes the optimizer leave the weights as they are from that step on, and it is read every `WINDOW` steps, at every
    validation and before every checkpoint. In both cases the weights are then those before the step, which depends on
    them and on (seed, step) alone: it can be made again.

    Parameters
    ----------
    run
        The run; its optimizer, order of the data and settings.

    Attributes
    ----------
    is_late : bool
        Whether the numbers of a step are looked at later.
    losses : list of scalars
        Of the newest steps, for the median that a spike is measured by; at most `WINDOW`, and those since the last look.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._loss = run, None
        self.directory: Path | None = None
        self.recipe: dict[str, Any] | None = None
        self.losses: list[Tensor] = []
        self._judged, self._last = 0, -1  # losses that have been compared with their median; the newest step
        self.is_late = False
        if run.fabric.device.type == "cuda":
            self.watch_late()

    def watch_late(self) -> None:
        """From now on keep a flag beside the weights, which stops the optimizer, and look at it later."""
        device = self._run.fabric.device
        self.is_late = True
        self._first = torch.full((), -1, dtype=torch.long, device=device)
        self._bad = torch.zeros((), dtype=torch.float32, device=device)
        # Fused AdamW makes no step, and does not count it, while this is 1: what scalers of half precision use.
        self._run.optimizer.optimizer.found_inf = self._bad

    def add(self, loss: Tensor) -> None:
        """Take a part of the step's loss, a scalar."""
        loss = loss.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss

    def look(self, gradient: Tensor) -> None:
        """Judge a step by its loss and `gradient_size`, scalars, before its update.

        Raises
        ------
        TrainingError
            If one of them is not finite; at once or, on a GPU, at most `WINDOW` steps later.
        """
        step, loss, self._loss = self._run.state.step, self._loss, None
        if loss is None:  # a process without a share of this step
            loss = torch.zeros((), dtype=torch.float64, device=gradient.device)
        self.losses.append(loss)
        self._last = step
        is_bad = ~(torch.isfinite(gradient) & torch.isfinite(loss))
        if self.is_late:
            self._first.copy_(torch.where(is_bad & (self._bad == 0), step, self._first))
            self._bad.logical_or_(is_bad)
        elif bool(is_bad):
            self.fail(step)
        if len(self.losses) - self._judged > WINDOW:
            self.settle()

    def settle(self) -> None:
        """Read what is still on the device: whether a step was not finite, and the losses.

        Raises
        ------
        TrainingError
            If one was not finite.
        """
        if self.is_late and (step := int(self._first)) >= 0:
            self.fail(step)
        if self._judged == len(self.losses):
            return
        values = torch.stack(self.losses)
        if self._run.fabric.world_size > 1:
            values[self._judged :] = self._run.fabric.all_reduce(values[self._judged :], reduce_op="sum")
        self.losses = list(values.cpu())
        # The step in progress is not counted yet while its loss is here already.
        losses, first = values.cpu().numpy(), self._last - len(self.losses) + 1
        for place in range(max(self._judged, WINDOW), len(losses)):
            median = float(np.median(losses[place - WINDOW : place]))
            if 0 < SPIKE * median < losses[place]:
                self._note(first + place, float(losses[place]), median)
        self.losses = self.losses[-WINDOW:]
        self._judged = len(self.losses)

    def _note(self, step: int, loss: float, median: float) -> None:
        """Remember a spike."""
        rows = rows_of(self._run, step).tolist()
        self._run.state.spikes.append({"step": step + 1, "loss": loss, "ratio": loss / median, "structures": rows})

    def row(self) -> dict[str, float]:
        """Columns of a row of the history: how many spikes there were since the last one, and the largest; none if none.

        Raises
        ------
        TrainingError
            If a step was not finite.
        """
        self.settle()
        state = self._run.state
        last = state.history[-1]["step"] if state.history else 0
        found = [spike for spike in state.spikes if spike["step"] > last]
        state.spikes = state.spikes[-KEPT_SPIKES:]
        if found and self.directory is not None and self._run.fabric.global_rank == 0:
            files.save_json(self.directory / "spikes.json", state.spikes)
        if not found:
            return {}
        worst = max(found, key=lambda spike: spike["ratio"])
        return {"spikes": len(found), "spike_step": worst["step"], "spike_ratio": worst["ratio"]}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold beside the spikes, after `settle`: the newest losses (L,)."""
        return {"losses": torch.stack(self.losses)} if self.losses else {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        self.losses = list(tensors["losses"].cpu()) if "losses" in tensors else []
        self._judged = len(self.losses)

    def fail(self, step: int) -> NoReturn:
        """Write down a step that is not finite, and raise TrainingError."""
        from ndem_zoo.diagnosis import repeat

        run = self._run
        rows, state, at = rows_of(run, step), run.state, run.state.step
        state.step = step
        try:
            progress, batch = run.progress, run.collate(rows)
        finally:
            state.step = at
        parts = {"potential": run.potential, "objective": run.objective}
        seed = step_seed(run.settings.seed, step)
        found = repeat(**parts, batch=batch, seed=seed, progress=progress, bf16=run.settings.precision == "bf16-mixed")
        message = [f"{found.worst} at step {step + 1}: the training has diverged; try a smaller lr"]
        message[0] += f" (it is {run.settings.lr}), clip_norm, or longer warmup_steps"
        message.append(f"terms: {', '.join(f'{name} {value:.4g}' for name, value in found.terms.items())}")
        message.append(f"structures {_some(rows.tolist())} of the training set")
        if found.parameters:
            message.append(f"gradients that are not finite: {_some(found.parameters)}")
        if run.fabric.global_rank == 0:
            message.append(self._dumped(step, rows, batch, progress, found.terms))
        raise TrainingError("; ".join(message))

    def _dumped(self, step: int, rows: np.ndarray, batch: Batch, progress: float, terms: dict[str, float]) -> str:
        """Write the dump; says where it is, or why it is not there."""
        path = (self.directory or Path(FOLDER)) / f"dump-step-{step + 1:010d}"
        try:
            write_dump(path, self._run, self.recipe, step, rows, batch, progress, terms)
        except OSError as error:
            return f"the step could not be written to {path}: {error}"
        return f"`ndem-zoo replay {path}` makes the step again and says where it breaks"


def gradient_size(parameters: list[Tensor], norm: Tensor | None = None) -> Tensor:
    """A size of all gradients together, a scalar, that is finite if and only if all of them are; 0 if there are none.

    Parameters
    ----------
    parameters
        Weights, of any shape.
    norm
        A scalar, if the gradients were clipped: their norm before. A number that is not finite is then still one.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    # Pitfall: the norm of finite gradients may be infinite, since their squares overflow. Their largest component tells, but
    # takes a CPU longer.
    if gradients[0].device.type == "cpu":
        norm = torch.stack(torch._foreach_norm(gradients)).amax() if norm is None else norm
        if bool(torch.isfinite(norm)):
            return norm
    return torch.stack(torch._foreach_norm(gradients, math.inf)).amax()


def rows_of(run: Run, step: int) -> np.ndarray:
    """Structures of the training set that a step sees, (B,); steps count from 0."""
    epoch, position = run.order.locate(step)
    return np.asarray(run.order.batches(epoch)[position])


def _some(names: list[Any], most: int = 8) -> str:
    """The first of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest} more" if rest > 0 else "")


# ------------------------------------------------------------------------------------------------------------------- dumps


def write_dump(
    path: Path,
    run: Run,
    recipe: dict[str, Any] | None,
    step: int,
    rows: np.ndarray,
    batch: Batch,
    progress: float,
    terms: dict[str, float],
) -> None:
    """Write all that a step of a run depends on into a folder, whole or not at all.

    Parameters
    ----------
    path
        The folder.
    run
        With the weights before the step.
    recipe
        What potential and objective are built from: ``"model"`` and ``"resolved"`` of a saved model's configuration. Without
        it the dump cannot be replayed.
    step
        The step, from 0.
    rows, batch
        Structures of the step: their numbers (B,) in the training set, and the batch.
    progress
        Fraction of the training that was done.
    terms
        What the step gave.
    """
    fields = {name: getattr(batch, name) for name in _GEOMETRY}
    tensors = {f"batch.{name}": value for name, value in fields.items()}
    tensors |= {f"targets.{name}": value for name, value in batch.targets.items()}
    tensors |= {f"extras.{name}": value for name, value in batch.extras.items()}
    for part, module in (("potential", run.potential), ("objective", run.objective)):
        tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    optimizer = run.weights.optimizer_state(run.optimizer.optimizer)
    if sum(value.numel() * value.element_size() for value in optimizer.values()) <= SMALL:
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    record = {
        "format": FORMAT,
        "step": step,
        "seed": step_seed(run.settings.seed, step),
        "progress": progress,
        "terms": {name: repr(value) for name, value in terms.items()},  # JSON has no NaN
        "structures": rows.tolist(),
        "ids": [str(name) for name in run.train_set.ids[rows]],
        "n_systems": batch.n_systems,
        "cutoff": repr(batch.cutoff),
        "nearest": None if batch.nearest is None else list(batch.nearest),
        "plan": run.potential.backbone.plan,
        "device": run.fabric.device.type,
        "settings": dataclasses.asdict(run.settings),
        "recipe": recipe,
        "machine": provenance.machine(run.fabric.device),
    }
    with files.atomic_folder(path) as folder:
        files.save_tensors(folder / "dump.safetensors", tensors)
        files.save_record(folder / "dump.json", record | {"sha256": files.file_digest(folder / "dump.safetensors")})


@dataclasses.dataclass(frozen=True)
class Dump:
    """A step as `write_dump` left it.

    Attributes
    ----------
    record
        Content of ``dump.json``.
    batch
        Structures with labels, less those of a prior if there is one.
    tensors
        All of ``dump.safetensors``.
    """

    record: dict[str, Any]
    batch: Batch
    tensors: dict[str, Tensor]


def read_dump(path: str | os.PathLike) -> Dump:
    """Read what `write_dump` wrote.

    Raises
    ------
    FileNotFoundError
        If there is none.
    FileFormatError
        If it is damaged, or of a newer version.
    """
    path = Path(path)
    record = files.load_record(path / "dump.json")
    tensors = files.load_tensors(path / "dump.safetensors", record.get("sha256"))

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name + ".")}

    try:
        if record["format"] > FORMAT:
            raise FileFormatError(f"{path} has format {record['format']}; this version reads up to {FORMAT}")
        batch = Batch(
            **{name: tensors[f"batch.{name}"] for name in _GEOMETRY},
            n_systems=int(record["n_systems"]),
            cutoff=float(record["cutoff"]),
            targets=part("targets"),
            extras=part("extras"),
            nearest=None if record["nearest"] is None else Nearest(*record["nearest"]),
        )
        if not len(record["structures"]) == len(record["ids"]) == batch.n_systems:
            raise FileFormatError(
                f"{path}: {len(record['structures'])} structures in the list, {batch.n_systems} in the batch"
            )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} is not a dump of a training step: {error!r}") from error
    return Dump(record, batch, tensors)


def replay(path: str | os.PathLike, *, precision: str | None = None, anomaly: bool = False) -> Replay:
    """Make the step of a dump again, operation by operation on the CPU, and find out where it breaks.

    Parameters
    ----------
    path
        Folder that a training named when it ended.
    precision
        ``"32-true"``, ``"64-true"`` or ``"bf16-mixed"``; default: that of the training. Objectives draw their noise in it: in
        another precision the noise is another one.
    anomaly
        Whether torch also looks for the operation whose derivative is not finite (`torch.autograd.detect_anomaly`); slow.

    Returns
    -------
    replay : ndem_zoo.diagnosis.Replay
        Print it.

    Raises
    ------
    FileNotFoundError, FileFormatError
        If there is no dump, or it is damaged or cannot be replayed.
    ConfigError
        If the precision is unknown.
    """
    from ndem_zoo.diagnosis import examine

    return examine(read_dump(path), path, precision, anomaly)


# ------------------------------------------------------------------------------------------------------------- determinism


@contextlib.contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """With torch's deterministic algorithms only, if `wanted`; torch's own switch is afterwards as it was before.

    Raises
    ------
    ConfigError
        On CUDA, if the environment does not fix the workspace of cuBLAS, which is read when CUDA starts.
    """
    if not wanted:
        yield
        return
    check_workspace(device)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_workspace(device: torch.device) -> None:
    """Raise ConfigError if products of matrices on this device may differ from run to run."""
    allowed, name = (":4096:8", ":16:8"), "CUBLAS_WORKSPACE_CONFIG"
    if device.type == "cuda" and os.environ.get(name) not in allowed:
        raise ConfigError(
            f"deterministic=True on CUDA needs the environment variable {name}, which is {os.environ.get(name)!r}; allowed are "
            f"{' and '.join(allowed)}, set before Python starts"
        )
