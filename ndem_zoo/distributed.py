"""Several processes that train one model: who they are, how they agree, and what happens when one of them is gone.

Processes are started by ``torchrun``, by SLURM's ``srun``, or by ``ndem-zoo train --devices N`` (`launch`); gradients are
summed by Lightning Fabric's DDP. All else that they tell each other goes through `Peers`: a few numbers on the CPU, never
pickled objects. What is computed is known to `training`.
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ndem_zoo.errors import ConfigError, TrainingError
from ndem_zoo.objectives.base import check_whole

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Choice: a process that has not answered for so long is taken for dead. Nothing between two steps may take longer on one of
#: them alone: no callback, and no writing of a checkpoint.
PATIENCE = timedelta(minutes=10)

#: Words in what gloo, NCCL and torch's store say when a process does not answer.
_LOST = ("gloo", "nccl", "closed by peer", "reset by peer", "broken pipe", "refused", "timed out", "timeout", "socket")


class Place(NamedTuple):
    """Where this process stands among those that were started together.

    Attributes
    ----------
    size : int
        Number of processes.
    rank, local_rank : int
        Number of this one, from 0; and among those of its machine.
    starter : str
        ``"torchrun"``, or anything that sets the same variables; ``"slurm"``.
    """

    size: int
    rank: int
    local_rank: int
    starter: Literal["torchrun", "slurm"]


def place() -> Place | None:
    """What the environment says about this process; None if it was started alone.

    Raises
    ------
    ConfigError
        If one of torchrun's variables is not a number.
    """
    found = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    starter: Literal["torchrun", "slurm"] = "torchrun"
    # Pitfall: the script of a batch job has SLURM_NTASKS as well; only what srun starts has a step.
    if None in found.values() and "SLURM_STEP_ID" in os.environ:
        found = {name: os.environ.get(name) for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")}
        starter = "slurm"
    if None in found.values():
        return None
    try:
        numbers = [int(value) for value in found.values()]
    except ValueError:
        raise ConfigError(f"the environment has {found}; these must be whole numbers") from None
    return Place(*numbers, starter) if numbers[0] > 1 else None


def is_first() -> bool:
    """Whether this process writes files: False for all but the first of those that train together."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
        torch.distributed.get_rank() == 0
    )


def is_first_of(devices: int | str, nodes: int) -> bool:
    """Whether this process will be the first of a training that has not begun yet; see `check_devices`."""
    here = place()
    return here is None or here.rank == 0 or (devices == 1 and nodes == 1)


def check_devices(devices: int | str, nodes: int, device: torch.device) -> tuple[int, int]:
    """How many devices of how many machines train together, after a look at what was started.

    Parameters
    ----------
    devices
        Of each machine; ``"auto"``: as many as there are processes.
    nodes
        Machines.
    device
        What this process would compute on.

    Returns
    -------
    devices, nodes : int

    Raises
    ------
    ConfigError
        If these are no such numbers, or not that many processes were started, or there are not enough GPUs.
    """
    check_whole("nodes", nodes, 1)
    here = place()
    if devices == "auto":
        devices = 1 if here is None else here.size // nodes
    check_whole("devices", devices, 1)
    wanted, started = devices * nodes, 1 if here is None else here.size
    if wanted > 1 and here is None:
        raise ConfigError(
            f"devices={devices}, nodes={nodes}, but there is one process: start the script with 'torchrun --nnodes {nodes} "
            f"--nproc-per-node {devices} SCRIPT' or with SLURM's srun; 'ndem-zoo train --devices {devices}' does so itself"
        )
    # srun also starts many trainings that have nothing to do with each other.
    if wanted != started and not (wanted == 1 and here.starter == "slurm"):
        raise ConfigError(
            f"devices={devices} times nodes={nodes} is {wanted}, but {here.starter} started {started} processes; both must "
            f"be equal (devices='auto' takes all of them)"
        )
    if wanted > 1 and device.type == "cuda" and torch.cuda.device_count() < devices:
        raise ConfigError(
            f"devices={devices}, but this process sees {torch.cuda.device_count()} GPUs; each process must see all GPUs of "
            "its machine"
        )
    return devices, nodes


def make_fabric(device: torch.device, devices: int, nodes: int) -> Fabric:
    """Lightning Fabric on one device, or on all of those that train together; the processes then know each other."""
    from lightning_fabric import Fabric  # here, because it takes seconds that only a training should cost
    from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

    accelerator = "cuda" if device.type == "cuda" else "cpu"
    if devices * nodes == 1:
        # Pitfall: Fabric itself would look for SLURM, and refuse one device where srun has started many processes.
        single = [device.index or 0] if device.type == "cuda" else 1
        return Fabric(accelerator=accelerator, devices=single, plugins=LightningEnvironment())
    environment = SLURMEnvironment() if place().starter == "slurm" else TorchElasticEnvironment()
    # Nothing in a step changes buffers; the option has another name from torch 2.13 on.
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    keep = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # A head has no gradient while its term has the weight 0.
    strategy = DDPStrategy(timeout=PATIENCE, find_unused_parameters=True, **{keep: False})
    options = {"devices": devices, "num_nodes": nodes, "strategy": strategy, "plugins": environment}
    log = logging.getLogger("lightning_fabric")  # which greets every process
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        fabric = Fabric(accelerator=accelerator, **options)
        fabric.launch()
    finally:
        log.setLevel(before)
    # Pitfall: gloo's threads, if they are still there when Python ends, abort the process now and then.
    atexit.unregister(_leave)
    atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Close the connections to the other processes."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Peers:
    """The processes that train together, and what they tell each other; alone, nothing is told.

    Parameters
    ----------
    fabric
        Launched.

    Attributes
    ----------
    size, rank : int
        How many processes there are; the number of this one, from 0.

    Notes
    -----
    Numbers go over the CPU, also beside GPUs, in a group of their own: a dead process is noticed within a step as a closed
    connection, and nothing waits for a GPU.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.size, self.rank = fabric.world_size, fabric.global_rank
        self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def part(self, number: int) -> range:
        """Which of `number` things are for this process: every `size`-th."""
        return range(self.rank, number, self.size)

    def add_up(self, values: Float[np.ndarray, "..."]) -> None:
        """Replace an array, float64 and contiguous, by the sum of those of all processes."""
        self._reduce(torch.from_numpy(values), "SUM")

    def _reduce(self, values: Tensor, how: str) -> None:
        """Sum (``"SUM"``) or largest (``"MAX"``) of each number over the processes, in place."""
        if self._group is not None:
            torch.distributed.all_reduce(values, op=getattr(torch.distributed.ReduceOp, how), group=self._group)

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """The sum of each number over all processes, which must have the same names, in float64."""
        numbers = torch.tensor(list(values.values()), dtype=torch.float64)
        self._reduce(numbers, "SUM")
        return dict(zip(values, numbers.tolist(), strict=True))

    def largest(self, *values: float) -> list[float]:
        """The largest of each number over all processes."""
        numbers = torch.tensor(values, dtype=torch.float64)
        self._reduce(numbers, "MAX")
        return numbers.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0.0)

    def agree(self, name: str, value: int) -> None:
        """Raise TrainingError unless a number is the same everywhere."""
        largest, negative = self.largest(value, -value)
        if largest != -negative:
            raise TrainingError(
                f"process {self.rank} of {self.size} has {name} {value}, others have from {-negative:.0f} to {largest:.0f}: "
                "all of them must see the same files"
            )


@contextlib.contextmanager
def watched(advice: Callable[[], str]) -> Iterator[None]:
    """Turn what libraries say when another process is gone into a TrainingError.

    Parameters
    ----------
    advice
        What to do about it, for the end of the message.

    Raises
    ------
    TrainingError
        In the place of a RuntimeError of gloo, NCCL or torch's store.
    """
    try:
        yield
    except TrainingError:
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if place() is None or not any(sign in text.lower() for sign in _LOST):
            raise
        here = place()
        raise TrainingError(
            f"process {here.rank} of {here.size} has lost another one, which has ended or not answered for "
            f"{PATIENCE.total_seconds():.0f} s ({text[:200]}); {advice()}"
        ) from error


# --------------------------------------------------------------------------------------------------------------- starting


def launch(devices: int, arguments: Sequence[str]) -> int:
    """Run ``ndem-zoo`` with these arguments in `devices` processes on this machine, as torchrun does, and wait for them.

    Parameters
    ----------
    devices
        Number of processes.
    arguments
        Words of the command line.

    Returns
    -------
    code : int
        Exit code of the first process that failed; 0 if none did; 130 after Ctrl-C, which all processes get.

    Raises
    ------
    TrainingError
        If a process was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        start_method="spawn",
    )
    # Processes that share the cores of a machine, and each take all of them, wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or DDP warns that all parameters are in use
    # What is wrong, the processes say themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "ndem_zoo.cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise TrainingError(f"process {rank} of {devices} was ended by signal {-failure.exitcode}") from None
        return failure.exitcode
    except SignalException:
        return 130
    return 0


def to_start(devices: int | str, nodes: int, device: str | None) -> int:
    """How many processes ``ndem-zoo train`` has to start: 0 if one is enough, or if this is one of several.

    Parameters
    ----------
    devices
        Of each machine; ``"auto"``: all GPUs.
    nodes
        Machines.
    device
        Name of the kind of device.

    Raises
    ------
    ConfigError
        If there are several machines, whose processes only torchrun or SLURM can start.
    """
    check_whole("nodes", nodes, 1)
    if place() is not None:
        return 0
    if nodes > 1:
        raise ConfigError(
            f"nodes={nodes}, but there is one process: start the command on every machine with 'torchrun --nnodes {nodes} "
            f"--nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m ndem_zoo.cli train ...', or with "
            "SLURM's srun"
        )
    if devices == "auto":
        devices = torch.cuda.device_count() if device in (None, "auto", "cuda") else 1
    else:
        check_whole("devices", devices, 1)
    return int(devices) if devices > 1 else 0


def own_gpu() -> torch.device:
    """The GPU of this process where any would do: the one with its number on its machine, if it sees several."""
    here = place()
    return torch.device("cuda") if here is None else torch.device("cuda", here.local_rank % torch.cuda.device_count())
