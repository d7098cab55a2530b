"""The one training loop: every estimator, the command line and every adapter run through `train`.

Batches come from `sampling`, terms from an objective, devices and precision from Lightning Fabric. What is random in a
step depends on (seed, step) alone, and everything else that a step depends on is in a checkpoint: an interrupted and
resumed run ends in the same bits as one that was not interrupted (on a CPU).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ndem_zoo import checkpoint as files
from ndem_zoo.distributed import Peers, check_devices, make_fabric, watched
from ndem_zoo.errors import ConfigError, DataWarning, FileFormatError, TrainingError
from ndem_zoo.flat import FlatWeights, Weights
from ndem_zoo.graph import Batch
from ndem_zoo.history import History, HistoryLog, from_columns, to_columns
from ndem_zoo.inference import predict_columns
from ndem_zoo.metrics import dataset_metrics
from ndem_zoo.models.potential import Potential
from ndem_zoo.objectives.base import Objective, check_choice, check_not_negative, check_whole
from ndem_zoo.progress import Progress
from ndem_zoo.safety import Guard, check_workspace, deterministic, gradient_size
from ndem_zoo.sampling import Collator, Order, load, size_batches, step_seed
from ndem_zoo.shares import Cutter, Share, ShareRng, Shares, shares_for

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset

Schedule = Literal["plateau", "cosine", "constant"]
Precision = Literal["32-true", "64-true", "bf16-mixed"]

#: Choice: so many of the newest checkpoints are kept; the one before the newest is there in case a disk fails.
KEEP_CHECKPOINTS = 2

#: Choice: a checkpoint remembers its data by a hash over at most about so many rows of each column.
HASHED_ROWS = 100_000

_DRAWING = threading.RLock()  # several threads at once must not draw in turns


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes
    ----------
    batch_size
        Structures per step, **on all devices together**; with `max_atoms` the largest number of them, or None.
    eval_batch_size
        Largest number of structures in a batch of validation and prediction; see `inference.predict_columns`.
    max_atoms
        Largest number of atoms per step, on all devices together, for structures of many sizes: a step takes as many
        structures as fit. None for no limit.
    accumulate
        Shares into which a device cuts its part of a step, one after the other: the memory of one share, and the same step
        but for rounding. Devices and shares have about equally many atoms each; see `ndem_zoo.shares`. None: on a CPU, shares
        of about 400 atoms, which take no longer than the whole and often less; but 1 on a GPU, and where the objective
        draws noise or takes means that belong to the whole batch.
    bucket
        Whether the structures of a step are of similar size: they are shuffled within buckets of size, and so are the
        batches. The order of the data is then less random.
    prefetch
        Whether a thread makes the next batch during a step; None: on a GPU only. The results are the same.
    lr
        Learning rate after warm-up.
    weight_decay
        Of AdamW.
    warmup_steps
        Steps over which the learning rate rises linearly, from `warmup_factor` times its value.
    warmup_factor
        See `warmup_steps`; 0 begins at the first step's share.
    schedule
        ``"plateau"``: multiplied by `plateau_factor` when the validation loss (without validation data: the training
        loss) has not fallen for `plateau_patience` validations; ``"cosine"`` to `min_lr` over the training;
        ``"constant"``.
    min_lr
        Lower bound of the learning rate after warm-up.
    clip_norm
        Largest norm of the gradient; None for no clipping.
    ema_decay
        Decay of the exponential average of the weights, which is then validated, kept and used; None or 0 for none.
    nb_epoch, max_steps, max_time
        Training ends with whichever comes first: passes over the data, steps, seconds. None for no limit. With
        `max_time`, the cosine schedule and weight schedules follow the clock where it is ahead of the steps: such a run
        cannot be repeated bit for bit.
    early_stopping
        Validations without a better validation loss after which training ends; None for never.
    validate_every
        Steps between validations; None for every epoch.
    precision
        ``"32-true"``, ``"64-true"``, or ``"bf16-mixed"``: weights and sums in float32, products of matrices in
        bfloat16 (training only; validation and prediction are in float32).
    seed
        Of the weights, the order of the data and the noise.
    deterministic
        Whether only deterministic algorithms of torch are used during the training; where there is none for an operation, it
        is an error. On CUDA ``CUBLAS_WORKSPACE_CONFIG`` has to be set. Two runs then end in the same bits on one machine; on
        a CPU they do so anyway.

    Raises
    ------
    ConfigError
        For a value that is not allowed, or if nothing ends the training.
    """

    batch_size: int | None = 8
    eval_batch_size: int = 64
    max_atoms: int | None = None
    accumulate: int | None = None
    bucket: bool = False
    prefetch: bool | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    warmup_factor: float = 0.0
    schedule: Schedule = "plateau"
    plateau_factor: float = 0.8
    plateau_patience: int = 30
    min_lr: float = 0.0
    clip_norm: float | None = None
    ema_decay: float | None = None
    nb_epoch: int | None = None
    max_steps: int | None = None
    max_time: float | None = None
    early_stopping: int | None = None
    validate_every: int | None = None
    precision: Precision = "32-true"
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, np.generic):  # from a search over an array, say; JSON has Python's numbers only
                object.__setattr__(self, name, value.item())
        check_choice("schedule", self.schedule, Schedule)
        check_choice("precision", self.precision, Precision)
        for name in ("weight_decay", "min_lr", "lr"):
            check_not_negative(name, getattr(self, name))
        check_not_negative("warmup_factor", self.warmup_factor)
        check_whole("eval_batch_size", self.eval_batch_size, 1)
        if self.batch_size is not None or self.max_atoms is None:
            check_whole("batch_size", self.batch_size, 1)
        check_switch("bucket", self.bucket)
        check_switch("deterministic", self.deterministic)
        if self.prefetch is not None:
            check_switch("prefetch", self.prefetch)
        for name in ("warmup_steps", "plateau_patience", "seed"):
            check_whole(name, getattr(self, name), 0)
        for name in ("nb_epoch", "max_steps", "early_stopping", "validate_every", "max_atoms", "accumulate"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        for name in ("max_time", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and value > 0):
                raise ConfigError(f"{name}={value!r}; it must be a positive number, or None")
        if not (isinstance(self.plateau_factor, Real) and 0 < self.plateau_factor < 1):
            raise ConfigError(f"plateau_factor={self.plateau_factor!r}; it must lie between 0 and 1")
        if self.ema_decay is not None and not (isinstance(self.ema_decay, Real) and 0 <= self.ema_decay < 1):
            raise ConfigError(f"ema_decay={self.ema_decay!r}; it must lie between 0 (no average) and 1")
        if self.nb_epoch is None and self.max_steps is None and self.max_time is None:
            raise ConfigError("nothing ends the training: give nb_epoch, max_steps or max_time")


#: What a setting was in a checkpoint from before it existed.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainSettings)}


class TrainStep(nn.Module):
    """Potential and objective as one module: what Fabric wraps, so that all gradients are seen by it."""

    def __init__(self, potential: Potential, objective: Objective, bf16: bool = False) -> None:
        super().__init__()
        self.potential, self.objective, self.bf16 = potential, objective, bf16

    def forward(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Named, weighted terms of one batch."""
        # Pitfall: Fabric's own mixed precision casts the positions too; bfloat16 numbers near 20 are 0.125 apart.
        with torch.autocast(inputs.batch.pos.device.type, torch.bfloat16, enabled=self.bf16):
            return self.objective(self.potential, inputs.batch, inputs.rng)


class StepInputs:
    """Arguments of a step.

    Pitfall: Fabric casts every floating-point tensor that it finds in arguments, and refuses frozen dataclasses. It
    does not look into an object of a plain class, and labels stay float64.
    """

    __slots__ = ("batch", "rng")

    def __init__(self, batch: Batch, rng: torch.Generator) -> None:
        self.batch, self.rng = batch, rng


@dataclass
class State:
    """Where a run stands, apart from weights and optimizer: everything here goes into a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    plateau_scale: float = 1.0
    plateau_best: float = math.inf
    plateau_waited: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    waited: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    spikes: list[dict[str, Any]] = field(default_factory=list)  # see `safety.Guard`
    summed_steps: int = 0  # steps since the last row of the history, whose terms `Run.sums` holds


class Run:
    """A training in progress: its parts, and how they are saved and restored."""

    def __init__(
        self,
        potential: Potential,
        objective: Objective,
        train_set: MolecularDataset,
        valid_set: MolecularDataset | None,
        settings: TrainSettings,
        device: torch.device,
        devices: int = 1,
        nodes: int = 1,
    ) -> None:
        self.potential, self.objective, self.settings = potential, objective, settings
        self.train_set, self.valid_set = train_set, valid_set
        # Pitfall: Fabric's own "64-true" changes torch's default dtype and rounds the terms to float32 on their way out.
        self.fabric = make_fabric(device, devices, nodes)
        self.peers = Peers(self.fabric)
        self.dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        module = TrainStep(potential, objective, settings.precision == "bf16-mixed").to(device, self.dtype)
        # Several processes average the gradients that autograd shows them.
        kind = FlatWeights if potential.backbone.plan == "fused" and self.peers.size == 1 else Weights
        self.weights = kind(decay_groups(module, settings.weight_decay))
        optimizer = torch.optim.AdamW(self.weights.groups, lr=settings.lr, **_fused(device))
        self.module, self.optimizer = self.fabric.setup(module, optimizer)
        # Without labels the denoising head is what was learned, too: it is averaged and kept with the backbone.
        self.kept = potential if objective.supervised.has_terms else module
        self.ema = WeightAverage(self.kept, settings.ema_decay) if settings.ema_decay else None
        self.rng = torch.Generator(device=device)
        self.state, self.sums, self.best = State(), {}, None
        self.order = Order(
            train_set.counts, settings.batch_size, settings.seed, max_atoms=settings.max_atoms, bucket=settings.bucket
        )
        self.epoch, self.position = 0, 0  # of the step to come: passes that are done, and steps of the present one
        self.collate = Collator(
            train_set, potential.backbone.cutoff, self.dtype, nearest=potential.backbone.nearest, device=device
        )
        n_shares = self.peers.size * self._accumulate(device)
        if n_shares > 1 and objective.needs_whole_batch:
            raise ConfigError(
                f"{type(objective).__name__} with these options looks at a step's batch as a whole: devices, nodes and "
                f"accumulate must be 1, not {n_shares} shares together (for ndem_curvature, choose another confidence)"
            )
        self.shares = Cutter(self.collate, n_shares, range(self.peers.rank, n_shares, self.peers.size))
        self.guard = Guard(self)

    def _accumulate(self, device: torch.device) -> int:
        """How many shares a process computes of a step, one after the other."""
        settings = self.settings
        if settings.accumulate is not None:
            return settings.accumulate
        if self.objective.needs_whole_batch or not self.objective.shares_noise:
            return 1
        limits = (
            settings.batch_size and settings.batch_size * float(np.mean(self.train_set.counts)),
            settings.max_atoms,
        )
        return shares_for(min(limit for limit in limits if limit is not None) / self.peers.size, device)

    @property
    def evaluated(self) -> nn.Module:
        """What is validated and kept, averaged if there is an average: the potential; in pre-training a `TrainStep`."""
        return self.kept if self.ema is None else self.ema.module

    @property
    def epochs(self) -> float:
        """Passes over the data, the present one in part."""
        return self.epoch + self.position / self.order.length(self.epoch)

    @property
    def progress(self) -> float:
        """Fraction of the training that is done."""
        settings, state = self.settings, self.state
        limits = (
            (state.seconds, settings.max_time),
            (state.step, settings.max_steps),
            (self.epochs, settings.nb_epoch),
        )
        return min(1.0, max(done / limit for done, limit in limits if limit is not None))

    def learning_rate(self) -> float:
        """Of the step to come."""
        settings, state = self.settings, self.state
        lr = settings.lr
        if settings.schedule == "cosine":
            lr = settings.min_lr + 0.5 * (lr - settings.min_lr) * (1.0 + math.cos(math.pi * self.progress))
        elif settings.schedule == "plateau":
            lr = max(settings.min_lr, lr * state.plateau_scale)
        if state.step + 1 < settings.warmup_steps:
            done = (state.step + 1) / settings.warmup_steps
            lr *= settings.warmup_factor + (1.0 - settings.warmup_factor) * done
        return lr

    def batches(self) -> Iterator[Shares]:
        """The batches of the steps to come, as far as they are computed here, without end; to be closed."""
        return load(self.shares, self.order.after(self.state.step), self.settings.prefetch)

    def one_step(self, shares: Shares) -> None:
        """Forward and backward of each share, update; nothing here waits for a GPU."""
        self.weights.zero_grad()
        for number, share in enumerate(shares, start=1):
            with self.fabric.no_backward_sync(self.module, enabled=number < len(shares)):
                terms = self.forward(share)
                loss = sum(terms.values())
                self.backward(loss)
            self.guard.add(loss)
            for name, term in {"loss": loss, **terms}.items():
                # float64: the sum of an epoch must not depend on where a resumed run began to add
                self.sums[name] = self.sums.get(name, 0.0) + term.detach().double()
        self.update()
        self.state.step += 1
        self.state.summed_steps += 1
        self.position += 1
        if self.position == self.order.length(self.epoch):
            self.epoch, self.position = self.epoch + 1, 0

    def forward(self, share: Share) -> dict[str, Tensor]:
        """The terms of a share, as it counts in the step, with the randomness of this step."""
        seed, step, cut = self.settings.seed, self.state.step, share.cut
        rng = self.rng.manual_seed(step_seed(seed, step)) if cut is None else ShareRng(cut, seed, step)
        self.objective.progress = self.progress
        self.potential.backbone.rng = rng
        try:
            with self.weights.forward():
                terms = self.module(StepInputs(share.batch, rng))
        finally:
            self.potential.backbone.rng = None
        if cut is None:
            return terms
        return self.objective.counted(terms, cut, self.rng.manual_seed(step_seed(seed, step)))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share's loss, a scalar, to that of the step."""
        if self.peers.size > 1:
            loss = loss * self.peers.size  # DDP averages over processes; shares are to be added up
        # Positions have a gradient too, which nobody wants: a tenth of an eager step's launches.
        self.fabric.backward(loss, inputs=self.weights.inputs)

    def update(self) -> None:
        """New weights, and their average, if loss and gradient are finite."""
        norm = None
        if self.settings.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.weights.tensors, self.settings.clip_norm)
        self.guard.look(gradient_size(self.weights.tensors, norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.kept)

    def validate(self) -> dict[str, float]:
        """Finish a row of the history: average the training terms, look at the validation data, keep the best.

        Raises
        ------
        TrainingError
            If a term, a weight or an error on the validation data is not finite.
        """
        state = self.state
        row = {"epoch": self.epochs, "step": state.step, "seconds": state.seconds}
        row["lr"] = self.learning_rate()
        row |= {f"train_{name}": total / state.summed_steps for name, total in self.totals().items()}
        row |= self.guard.row()
        self.check_finite(row)
        self.sums, state.summed_steps = {}, 0
        if self.valid_set is not None:
            row |= self.validation()
            self.check_finite(row)
        self._judge(row.get("valid_loss", row["train_loss"]), has_validation=self.valid_set is not None)
        row = {sys.intern(name): value for name, value in row.items()}  # names once, not in every row
        state.history.append(row)
        return row

    def totals(self) -> dict[str, float]:
        """Sum of each term over the steps since the last row of the history, of all processes."""
        return self.peers.sums({name: float(total) for name, total in self.sums.items()})

    def validation(self) -> dict[str, float]:
        """Loss and errors on the validation data, named ``valid_...``."""
        batch_size = self.settings.eval_batch_size
        if self.objective.supervised.has_terms:
            return validation_metrics(self.evaluated, self.objective, self.valid_set, batch_size, self.peers)
        return denoising_metrics(self.evaluated, self.valid_set, batch_size, self.peers)

    def check_finite(self, values: dict[str, float]) -> None:
        """Raise TrainingError unless these values and all weights are finite."""
        weights = sum(parameter.detach().double().sum() for parameter in self.module.parameters())
        for name, value in {**values, "the sum of the weights": float(weights)}.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {self.state.step}: the training has diverged; "
                    f"try a smaller lr (it is {self.settings.lr}), clip_norm, or longer warmup_steps"
                )

    def _judge(self, loss: float, has_validation: bool) -> None:
        """Lower the learning rate on a plateau; remember the best weights, or without validation data the last."""
        state, settings = self.state, self.settings
        if loss < state.plateau_best:
            state.plateau_best, state.plateau_waited = loss, 0
        else:
            state.plateau_waited += 1
        if state.plateau_waited > settings.plateau_patience:
            state.plateau_scale *= settings.plateau_factor
            state.plateau_waited = 0
        if loss < state.best_loss or not has_validation:
            state.best_step, state.waited = state.step, 0 if loss < state.best_loss else state.waited + 1
            state.best_loss = min(loss, state.best_loss)
            self.best = {name: tensor.detach().clone() for name, tensor in self.evaluated.state_dict().items()}
        else:
            state.waited += 1

    def is_over(self) -> bool:
        """Whether one of the limits is reached."""
        settings, state = self.settings, self.state
        return (
            (settings.nb_epoch is not None and self.epoch >= settings.nb_epoch)
            or (settings.max_steps is not None and state.step >= settings.max_steps)
            or (settings.max_time is not None and state.seconds >= settings.max_time)
            or (settings.early_stopping is not None and state.waited >= settings.early_stopping)
        )

    def is_validation_due(self) -> bool:
        """Whether the step just made ends a validation interval."""
        every = self.settings.validate_every
        return self.position == 0 if every is None else self.state.step % every == 0

    def finish(self) -> None:
        """Leave the best weights in the potential; where nothing was validated, the last."""
        best = self.evaluated.state_dict() if self.best is None else self.best
        self.kept.load_state_dict(best)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, directory: Path, fingerprint: dict[str, Any]) -> None:
        """Write a checkpoint of this moment, whole or not at all, and delete old ones; all processes call, the first writes.

        Raises
        ------
        TrainingError
            If the training has diverged: a checkpoint from which it can go on is not replaced by one from which it cannot.
        StorageError
            If the disk is full; the checkpoints before are still there.
        """
        self.guard.settle()
        totals = self.totals()
        self.check_finite({f"the sum of train_{name}": total for name, total in totals.items()})
        if not self.peers.is_first:
            return
        tensors = {f"optimizer.{k}": v for k, v in self.weights.optimizer_state(self.optimizer.optimizer).items()}
        tensors |= {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"sums.{k}": torch.tensor(v, dtype=torch.float64) for k, v in totals.items()}
        tensors |= {f"guard.{k}": v for k, v in self.guard.tensors().items()}
        if self.ema is not None:
            tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        if self.best is not None:
            tensors |= {f"best.{k}": v for k, v in self.best.items()}
        state = {f.name: getattr(self.state, f.name) for f in dataclasses.fields(self.state)}
        # As columns: as text, all rows so far would be written out for every checkpoint.
        names, columns = to_columns(state["history"])
        state["history"] = names
        tensors |= {f"history.{name}": torch.from_numpy(column) for name, column in columns.items()}
        with files.atomic_folder(files.checkpoint_path(directory, self.state.step)) as folder:
            files.save_tensors(folder / "trainer.safetensors", tensors)
            record = {
                "fingerprint": fingerprint,
                "sha256": files.file_digest(folder / "trainer.safetensors"),
                "state": _encode(state),
            }
            files.save_record(folder / "trainer.json", record)
        files.remove_old_checkpoints(directory, KEEP_CHECKPOINTS)

    def restore(self, directory: Path, fingerprint: dict[str, Any]) -> bool:
        """Continue from the newest checkpoint that is intact, if there is one.

        Warns
        -----
        DataWarning
            If a newer one is damaged; names it.

        Raises
        ------
        ConfigError
            If the checkpoint belongs to other settings or other data.
        FileFormatError
            If there are checkpoints, but none can be read.
        """
        found = files.checkpoints(directory)
        problems = []
        for path in found:
            try:
                stored, state, tensors = _read_checkpoint(path)
            except (FileFormatError, FileNotFoundError) as error:
                problems.append(str(error))
                continue
            _compare(_DEFAULTS | stored, fingerprint, path)
            for problem in problems:
                warnings.warn(f"{problem}; the training continues from {path}", DataWarning, stacklevel=2)
            self._load(state, tensors)
            return True
        if problems:
            raise FileFormatError(f"none of the {len(found)} checkpoints in {directory} can be read: {problems[0]}")
        return False

    def _load(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Take over what a checkpoint holds."""

        def part(name: str) -> dict[str, Tensor]:
            prefix = name + "."
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        device = self.fabric.device
        self.state = state
        self.epoch, self.position = self.order.locate(state.step)
        self.module.load_state_dict(part("module"))
        self.weights.load_optimizer_state(self.optimizer.optimizer, part("optimizer"))
        # They are of all processes, and will be added up over all of them.
        self.sums = {name: value.to(device) * self.peers.is_first for name, value in part("sums").items()}
        self.guard.load(part("guard"))
        if self.ema is not None:
            self.ema.load_state_dict(part("ema"))
        self.best = {name: value.to(device) for name, value in part("best").items()} or None


def train(
    potential: Potential,
    objective: Objective,
    train_set: MolecularDataset,
    valid_set: MolecularDataset | None,
    settings: TrainSettings,
    *,
    device: torch.device,
    devices: int | str = 1,
    nodes: int = 1,
    directory: Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    callback: Callable[[dict[str, float]], None] | None = None,
    identity: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> History:
    """Train a potential in place; it ends with the best weights seen.

    Parameters
    ----------
    potential, objective
        What is trained, and on what; both are built already.
    train_set, valid_set
        Data with the labels that the objective requires; checked by the caller.
    settings
        See `TrainSettings`.
    device
        Where to compute.
    devices, nodes
        How many devices of how many machines train together, one process on each; see `distributed.check_devices`. All
        processes make the same call, and get the same weights and history.
    directory
        Folder for ``history.csv`` and checkpoints, which the first process writes and all of them can read; None writes
        nothing.
    checkpoint_every
        Steps between checkpoints; None writes one at the end only.
    resume
        Continue from `directory` if it holds a checkpoint.
    tensorboard
        Whether the rows of the history also go to TensorBoard files in `directory`.
    progress
        Whether to show progress, in the first process.
    callback
        Called with every row of the history, in the first process.
    identity
        What the run depends on besides settings, objective and data, such as the options of the backbone; anything that
        JSON can hold. A checkpoint of a run with another one is not continued.
    recipe
        What potential and objective are made of, so that a step that is not finite can be replayed; see `safety.write_dump`.

    Returns
    -------
    history : History
        One row for each validation; see `Run.validate`.

    Raises
    ------
    ConfigError
        If `directory` holds a run that is not to be resumed, or one with other settings or data; if something is to be
        written, but there is no `directory`.
    FileFormatError
        If there are checkpoints to resume from, but none can be read.
    TrainingError
        If the training diverges. The step is then in a folder ``dump-step-...`` in `directory`, or else in
        ``ndem_zoo-dumps`` in the present folder, for `safety.replay`. Or if one of several processes has ended or does not
        answer.

    Notes
    -----
    Ctrl-C ends the training after the step in progress, as if a limit were reached; a second one aborts it. Where several
    processes train together, it is enough that one of them gets it, or SIGTERM.
    """
    if checkpoint_every is not None:
        check_whole("checkpoint_every", checkpoint_every, 1)
    for name, wanted in (("resume", resume), ("checkpoint_every", checkpoint_every), ("tensorboard", tensorboard)):
        if wanted and directory is None:
            raise ConfigError(f"{name}={wanted!r} needs a checkpoint_dir")
    devices, nodes = check_devices(devices, nodes, device)
    if settings.deterministic:
        check_workspace(device)
    with watched(lambda: _how_to_go_on(directory)):
        run = Run(potential, objective, train_set, valid_set, settings, device, devices, nodes)
        try:
            run.guard.directory, run.guard.recipe = directory, recipe
            fingerprint = _fingerprint(settings, objective, train_set, valid_set, identity or {}) if directory else {}
            if directory is not None:
                _prepare(directory, resume, run.peers)
                if resume:
                    run.restore(directory, fingerprint)
                    run.peers.agree("a checkpoint of step", run.state.step)
            interrupted = _loop(run, directory, fingerprint, checkpoint_every, tensorboard, progress, callback)
        finally:
            run.weights.release()
    history = History(run.state.history)
    history.interrupted = interrupted and not run.is_over()
    history.spikes = run.state.spikes
    run.finish()
    potential.eval()
    return history


def _loop(
    run: Run,
    directory: Path | None,
    fingerprint: dict[str, Any],
    checkpoint_every: int | None,
    tensorboard: bool,
    progress: bool,
    callback: Callable[[dict[str, float]], None] | None,
) -> bool:
    """All steps, with what happens between them; returns whether Ctrl-C ended it. See `train`."""
    saved_step = run.state.step or None
    is_first = run.peers.is_first

    def save() -> None:
        """Write a checkpoint, unless there is nowhere to write or it is written already."""
        nonlocal saved_step
        if directory is not None and saved_step != run.state.step:
            run.save(directory, fingerprint)
            saved_step = run.state.step

    # The steps since a checkpoint are made again; their seconds are not counted twice.
    begin = time.monotonic() - run.state.seconds
    interrupted = False
    log = HistoryLog(directory if is_first else None, tensorboard and is_first, run.state.history)
    with (
        deterministic(run.settings.deterministic, run.fabric.device),
        contextlib.closing(log),
        Progress(enabled=progress and is_first) as bar,
        _interruptible(run.peers.size) as is_interrupted,
        contextlib.closing(run.batches()) as batches,
    ):
        run.potential.train()
        while not (run.is_over() or interrupted):
            run.one_step(next(batches))
            seconds, flag = run.peers.largest(time.monotonic() - begin, is_interrupted())
            run.state.seconds, interrupted = seconds, bool(flag)
            is_due = run.is_validation_due() or run.is_over()
            if interrupted and not is_due:
                save()  # before a validation that the uninterrupted run would not have made
            if interrupted or is_due:
                row = run.validate()
                log.add(row)
                bar.validated(row)
                if callback is not None and is_first:
                    callback(row)
            if checkpoint_every and run.state.step % checkpoint_every == 0:
                save()
            bar.advance(run.state.step, run.state.seconds, run.progress)
        save()
    return interrupted


def _how_to_go_on(directory: Path | None) -> str:
    """What can be done after a process was lost."""
    newest = files.checkpoints(directory)[:1] if directory is not None else []
    return f"the run ends; resume=True continues from {newest[0]}" if newest else "the run ends, without a checkpoint"


def validation_metrics(
    potential: Potential, objective: Objective, dataset: MolecularDataset, batch_size: int, peers: Peers | None = None
) -> dict[str, float]:
    """Supervised loss and errors on validation data, named ``valid_...``; of all values at once, whoever predicts them."""
    predicted = predict_columns(potential, dataset, batch_size, need_forces="forces" in dataset.targets, peers=peers)
    scale = float(potential.scale)
    errors = {
        name: torch.as_tensor(predicted[name] - dataset.targets[name]) / scale
        for name in sorted(objective.supervised.requires)
    }
    fixed = np.zeros(len(dataset.z), dtype=bool) if dataset.fixed is None else np.array(dataset.fixed)
    terms = objective.supervised.terms_of_errors(errors, torch.from_numpy(~fixed))
    metrics = dataset_metrics(predicted, dataset)
    kept = (f"{potential.target}_mae", "forces_mae", "forces_rmse")
    return {"valid_loss": float(sum(terms.values()))} | {f"valid_{k}": metrics[k] for k in kept if k in metrics}


def denoising_metrics(
    step: TrainStep, dataset: MolecularDataset, batch_size: int, peers: Peers | None = None
) -> dict[str, float]:
    """Terms of an objective that needs no labels, on validation data, named ``valid_...``; always with the same noise."""
    potential, parameter = step.potential, next(step.parameters())
    place = {"nearest": potential.backbone.nearest}
    order = size_batches(dataset, batch_size, potential.backbone.cutoff, **place)
    place |= {"device": parameter.device}
    collate = Collator(dataset, potential.backbone.cutoff, parameter.dtype, with_targets=False, **place)
    rng = torch.Generator(device=parameter.device)
    own = range(len(order)) if peers is None else peers.part(len(order))
    was_training, sums = step.training, {}
    step.eval()
    try:
        # Without a batch of its own, a process looks at the first: it has to know the names of the terms.
        numbers = own or range(1)
        with torch.no_grad(), contextlib.closing(load(collate, [order[number] for number in numbers])) as batches:
            for number, batch in zip(numbers, batches, strict=True):
                rng.manual_seed(number)  # whoever computes the batch
                count = len(batch.z) if own else 0  # terms are means over atoms
                for name, term in step.objective(potential, batch, rng).items():
                    sums[name] = sums.get(name, 0.0) + term.double() * count
    finally:
        step.train(was_training)
    totals = {name: float(total) for name, total in sums.items()}
    totals = totals if peers is None else peers.sums(totals)
    means = {name: total / len(dataset.z) for name, total in totals.items()}
    return {"valid_loss": sum(means.values())} | {f"valid_{name}": mean for name, mean in means.items()}


@contextlib.contextmanager
def _interruptible(processes: int = 1) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag; a second one acts as usual. Outside the main thread nothing is changed.

    With several processes also SIGTERM, by which whoever started them asks all of them to end.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    numbers = (signal.SIGINT,) if processes == 1 else (signal.SIGINT, signal.SIGTERM)
    # None: a handler that is not Python's
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def handle(number: int, frame: Any) -> None:
        flag.set()
        signal.signal(number, previous[number])

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield flag.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _prepare(directory: Path, resume: bool, peers: Peers) -> None:
    """Make the folder; refuse to write over a run that is not to be resumed, or over a saved model's history."""
    if not resume and (files.checkpoints(directory) or (directory / "history.csv").exists()):
        raise ConfigError(f"{directory} holds a training already: pass resume=True to continue it, or another folder")
    peers.wait()  # until all have looked
    if peers.is_first:
        directory.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(directory)
    peers.wait()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's global generator with a seed of one's own, and leave it as it was: new layers know no other."""
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # Pitfall: torch.manual_seed would seed the GPUs' generators for good
        yield


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimizer: biases and weights of norms are not decayed (EquiformerV2's recipe).

    Norms are known by the name of their class; without decay there is one group.
    """
    decayed, others = [], []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_exempt = weight_decay and ("bias" in name or "Norm" in type(owner).__name__)
                (others if is_exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _fused(device: torch.device) -> dict[str, bool]:
    """AdamW in one kernel where torch has it: on CUDA always, on CPUs from 2.4 on."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return {"fused": True} if device.type == "cuda" or version >= (2, 4) else {}


class WeightAverage(AveragedModel):
    """Exponential average of a network's weights.

    The decay rises as min(decay, (1 + t) / (10 + t)) (Godwin et al., ICLR 2022), so that short trainings do not end in
    an average that still remembers the first draw.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        self._weights = list(self.module.parameters()), list(model.parameters())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of a step, of the same module as at first.

        Pitfall: `AveragedModel.update_parameters` sends its counter to the weights' device and reads it back; on a GPU
        that would wait for the step to end. Here the counter stays on the CPU.
        """
        count = int(self.n_averaged)
        decay = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        torch._foreach_lerp_(*self._weights, 1.0 - decay)
        for averaged, current in zip(self.module.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)
        self.n_averaged += 1


def _fingerprint(
    settings: TrainSettings,
    objective: Objective,
    train_set: MolecularDataset,
    valid_set: MolecularDataset | None,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Everything that the bits of a run depend on, in the form that it has after a way through JSON."""
    options = {name: getattr(objective, name) for name in ("weight", "weight_schedule")}
    options |= {"name": type(objective).__name__, "options": dataclasses.asdict(objective.options)}
    content = {
        **dataclasses.asdict(settings),
        **identity,
        "objective": options,
        "supervised": dataclasses.asdict(objective.supervised),
        "training data": _content_hash(train_set),
        "validation data": None if valid_set is None else _content_hash(valid_set),
    }
    return json.loads(json.dumps(content, default=_plain_number))


def _plain_number(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} has no JSON form")


def _content_hash(dataset: MolecularDataset) -> str:
    """Hash of ids, structures and labels; of long columns, of evenly spaced rows."""
    digest = hashlib.sha256(dataset.split_hash.encode())
    for name, shape, rows in dataset.spaced_rows(HASHED_ROWS):
        digest.update(f"{name} {shape}".encode())
        digest.update(np.ascontiguousarray(rows, dtype=np.float64))
    return digest.hexdigest()


def _compare(stored: dict[str, Any], current: dict[str, Any], path: Path, owner: str = "") -> None:
    """Refuse to continue another training than the one that was begun; its limits may be moved."""
    movable = {"nb_epoch", "max_steps", "max_time", "eval_batch_size", "early_stopping", "prefetch", "accumulate"}
    for name in [*current, *(name for name in stored if name not in current)]:
        old, new = stored.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _compare(old, new, path, f"{owner}{name}.")
        elif old != new and name.endswith(" data"):
            raise ConfigError(f"{path} was made with other {name}; give another checkpoint_dir")
        elif old != new and name not in movable:
            raise ConfigError(f"{path} was made with {owner}{name}={old!r}, not {new!r}; give another checkpoint_dir")


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], State, dict[str, Tensor]]:
    """Fingerprint, state and tensors of a checkpoint.

    Raises
    ------
    FileNotFoundError, FileFormatError
        If it is not whole.
    """
    record = files.load_record(path / "trainer.json")
    try:
        stored, digest, state = record["fingerprint"], record["sha256"], State(**_decode(record["state"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise FileFormatError(f"{path / 'trainer.json'} is not the record of a checkpoint: {error!r}") from error
    tensors = files.load_tensors(path / "trainer.safetensors", digest)
    if all(isinstance(name, str) for name in state.history):  # older ones hold the rows themselves
        columns = {name: tensors.pop(f"history.{name}", None) for name in state.history}
        if any(column is None for column in columns.values()):
            raise FileFormatError(f"{path} lacks columns of the history {state.history}")
        state.history = from_columns({name: column.numpy() for name, column in columns.items()})
    return stored, state, tensors


def check_switch(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}; allowed are True and False")


def _encode(state: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {name: "inf" if value == math.inf else value for name, value in state.items()}


def _decode(state: dict[str, Any]) -> dict[str, Any]:
    return {name: math.inf if value == "inf" else value for name, value in state.items()}
