"""Processes that may die: functions run in forked children, and what they said before their end comes back.

Torch is imported once, in the parent, which computes nothing itself: a child is there in milliseconds. Also here: the
small training and the fingerprint of results that several harnesses share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning_fabric  # noqa: F401 (a training imports these on its first call: once, not in every child)
import numpy as np
import torch
import torch._dynamo

from ndem_zoo import NDeMTorchMDNet

#: Longest time that a child may take before it counts as hanging, in seconds.
PATIENCE = 300.0

SMALL = {
    "backbone_options": {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4},
    "batch_size": 5,
    "lr": 0.01,
    "warmup_steps": 2,
    "validate_every": 2,
    "ema_decay": 0.9,
    "plan": "eager",  # what is tested here is files, and compiling kernels is none of it
    "device": "cpu",
    "progress": False,
}


@dataclasses.dataclass(frozen=True)
class End:
    """How a child ended.

    Attributes
    ----------
    said
        What it handed to `say`, in order.
    status
        Exit code; -n if signal n ended it.
    hung
        Whether it was killed because it took too long.
    """

    said: list[Any]
    status: int
    hung: bool


def run(
    function: Callable[[Callable[[Any], None]], None],
    *,
    seconds: float = PATIENCE,
    kill_after: float | None = None,
) -> End:
    """Run ``function(say)`` in a child; `say` sends a value that JSON can hold to the parent.

    Parameters
    ----------
    function
        What the child does. An error ends it with code 1, after it has said ``{"error": ...}``.
    seconds
        A child that takes longer is killed, and counts as hanging.
    kill_after
        Send SIGKILL so many seconds after its start, if it still runs.
    """
    read, write = os.pipe()
    number = os.fork()
    if not number:
        os.close(read)
        _be_the_child(function, write)
    os.close(write)
    end = time.monotonic() + (seconds if kill_after is None else kill_after)
    text, killed = bytearray(), False
    with os.fdopen(read, "rb", buffering=0) as stream:
        while True:
            waiting = None if killed else max(0.0, end - time.monotonic())
            if not select.select([stream], [], [], waiting)[0]:
                os.kill(number, signal.SIGKILL)
                killed = True
                continue
            chunk = stream.read(1 << 16)
            if not chunk:
                break
            text += chunk
    status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    lines = text.decode().split("\n")[:-1]  # what was cut off by the end was not said
    return End([json.loads(line) for line in lines], status, killed and kill_after is None)


def _be_the_child(function: Callable[[Callable[[Any], None]], None], handle: int) -> None:
    """Never returns: whatever happens, the child must not go on with its parent's work."""
    status = 1
    stream = os.fdopen(handle, "w", encoding="utf-8")

    def say(value: Any) -> None:
        stream.write(json.dumps(value) + "\n")
        stream.flush()

    torch.set_num_threads(1)  # threads that wait for each other on a busy machine take ten times as long
    try:
        function(say)
        status = 0
    except BaseException as error:
        say({"error": type(error).__name__, "message": str(error)})
    finally:
        os._exit(status)


def small_model(**options: Any) -> NDeMTorchMDNet:
    """A network that trains in milliseconds a step."""
    return NDeMTorchMDNet(**{**SMALL, **options})


def fingerprint(value: Any) -> str:
    """Hash of arrays, tensors, datasets and plain values, however they are nested: equal for equal bits."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a hash."""
    if hasattr(value, "columns") and hasattr(value, "ids"):  # a MolecularDataset
        value = {**value.columns(), "ids": value.ids}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"<{key}>".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        digest.update(f"({array.dtype.str} {array.shape})".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    else:
        digest.update(repr(value).encode())


def model_fingerprint(model: Any) -> str:
    """Hash of everything that a saved model holds, but for the seconds that its training took."""
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in model.history_]
    return fingerprint(
        [
            model.potential_.state_dict(),
            model.objective_.state_dict(),
            model.get_params(deep=False),
            model.resolved_,
            model.reference_,
            history,
        ]
    )


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
