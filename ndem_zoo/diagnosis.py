"""Where a training step breaks: the step made again operation by operation, and each of its structures alone.

`safety` hands over what a run or a dump holds. Nothing here changes weights; what is found is a `Replay`, to be printed.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ndem_zoo.errors import ConfigError, FileFormatError
from ndem_zoo.graph import Batch
from ndem_zoo.models.potential import Potential
from ndem_zoo.objectives.base import Objective

if TYPE_CHECKING:
    from ndem_zoo.safety import Dump

_DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-mixed": torch.float32}

#: Operations that make infinities on purpose, or numbers that nobody has set.
_EXCUSED = ("empty", "new_empty", "full", "new_full", "masked_fill", "fill", "where", "scalar_tensor")


@dataclass(frozen=True)
class Repeated:
    """What a step gave when it was made again.

    Attributes
    ----------
    terms
        Value of each term, weighted.
    parameters
        Names of the weights whose gradient is not finite.
    """

    terms: dict[str, float]
    parameters: list[str]

    @property
    def loss(self) -> float:
        """Sum of the terms."""
        return sum(self.terms.values())

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are."""
        return math.isfinite(self.loss) and not self.parameters

    @property
    def worst(self) -> str:
        """What is not finite, in a few words."""
        for name, value in self.terms.items():
            if not math.isfinite(value):
                return f"the loss ({name}) is {value}"
        return "the gradient is nan" if self.parameters else "what is finite when repeated is nan"


@dataclass
class Replay:
    """What `safety.replay` found.

    Attributes
    ----------
    path
        Of the dump.
    step
        Of the training, from 1.
    precision
        In which the step was made again.
    recorded
        Terms that the training saw.
    found
        Terms and gradients of the replay.
    inputs
        Weights, positions and labels that were not finite to begin with.
    operation
        The first operation whose arguments are finite and whose result is not, and where it is; None if there is none.
    structures
        For each structure: ``row`` in the training set, ``id``, ``atoms``, ``loss``, ``energy`` (predicted, eV), ``largest_force``
        (predicted) and ``largest_label`` in eV/Å, ``shortest`` distance in Å; those without a number are left out.
    in_float64
        The step in float64, where the replay was in less and not finite.
    anomaly
        What torch's anomaly mode said, or None.
    """

    path: Path
    step: int
    precision: str
    recorded: dict[str, float]
    found: Repeated
    inputs: list[str] = field(default_factory=list)
    operation: str | None = None
    structures: list[dict[str, Any]] = field(default_factory=list)
    in_float64: Repeated | None = None
    anomaly: str | None = None

    @property
    def is_repeated(self) -> bool:
        """Whether the replay is not finite either."""
        return not self.found.is_finite

    def __str__(self) -> str:
        lines = [f"{self.path}: step {self.step}, replayed in {self.precision}"]
        for name, value in self.found.terms.items():
            lines.append(f"  {name:12} {value:.6g} (in the training {self.recorded.get(name, math.nan):.6g})")
        if not self.is_repeated:
            lines.append(
                "loss and gradient are finite here: it is the precision, the plan or the device of the training"
            )
        lines += [f"not finite from the beginning: {name}" for name in self.inputs]
        if self.operation is not None:
            lines.append(f"first result that is not finite: {self.operation}")
        if self.found.parameters:
            names = self.found.parameters
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"gradients that are not finite: {', '.join(names[:5])}{more}")
        lines += ["structures, the worst first:"]
        lines += [f"  {describe_structure(one)}" for one in self.structures[:8]]
        if self.in_float64 is not None:
            loss = f"(loss {self.in_float64.loss:.4g})"
            ending = (
                f"finite {loss}: numbers of 32 bits do not suffice"
                if self.in_float64.is_finite
                else "not finite either"
            )
            lines.append(f"in float64 the step is {ending}")
        if self.anomaly is not None:
            lines.append(f"anomaly mode: {self.anomaly}")
        return "\n".join(lines)


def describe_structure(one: dict[str, Any]) -> str:
    """A line about a structure of `Replay.structures`."""
    parts = [f"{one['row']} (id {one['id']}, {one['atoms']} atoms): loss {one['loss']:.4g}"]
    labels = {
        "energy": "predicted energy {:.6g} eV",
        "largest_force": "largest predicted force {:.4g} eV/Å",
        "largest_label": "largest force label {:.4g} eV/Å",
        "shortest": "shortest distance {:.3f} Å",
    }
    return ", ".join(parts + [text.format(one[name]) for name, text in labels.items() if name in one])


# ---------------------------------------------------------------------------------------------------------------- the step


def repeat(
    potential: Potential,
    objective: Objective,
    batch: Batch,
    seed: int,
    progress: float,
    bf16: bool = False,
    watch: contextlib.AbstractContextManager[Any] | None = None,
) -> Repeated:
    """Forward and backward pass of a step; weights and their gradients stay as they are.

    Parameters
    ----------
    potential, objective
        In the mode of training, with the weights before the step.
    batch
        Structures, on the device and in the dtype of the weights.
    seed
        Of the step; see `sampling.step_seed`.
    progress
        Fraction of the training that was done.
    bf16
        Whether products of matrices are in bfloat16.
    watch
        A context in which both passes are made.
    """
    from ndem_zoo.training import StepInputs, TrainStep  # which imports this module's callers

    step = TrainStep(potential, objective, bf16)
    names, weights = zip(*((n, p) for n, p in step.named_parameters() if p.requires_grad), strict=True)
    rng = torch.Generator(device=batch.pos.device).manual_seed(seed)
    before = objective.progress
    objective.progress, potential.backbone.rng = progress, rng
    try:
        with torch.enable_grad(), watch or contextlib.nullcontext():
            terms = step(StepInputs(batch, rng))
            loss = sum(terms.values())
            gradients = (
                torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else [None] * len(weights)
            )
    finally:
        objective.progress, potential.backbone.rng = before, None
    bad = [
        name for name, g in zip(names, gradients, strict=True) if g is not None and not bool(torch.isfinite(g).all())
    ]
    return Repeated({name: float(term.detach()) for name, term in terms.items()}, bad)


class FirstBad(TorchDispatchMode):
    """Finds the first operation that makes a number that is not finite out of finite ones, in passes forward and backward.

    Parameters
    ----------
    modules
        Whose submodules are named as the place of an operation.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.found: str | None = None
        self._modules, self._place, self._handles = modules, [], []

    def __enter__(self) -> FirstBad:
        for owner in self._modules:
            for name, module in owner.named_modules():
                place = f"{type(owner).__name__}.{name}".rstrip(".")
                self._handles.append(
                    module.register_forward_pre_hook(lambda *_, place=place: self._place.append(place))
                )
                self._handles.append(module.register_forward_hook(lambda *_: self._place.pop() and None))
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and look at what comes out."""
        result = operation(*args, **(kwargs or {}))
        name = operation.name().removeprefix("aten::")
        if self.found is not None or name.startswith(_EXCUSED):
            return result
        if _some_bad(result) and not _some_bad((args, kwargs)):
            where = self._place[-1] if self._place else "outside of the modules (forces, loss or backward pass)"
            self.found = f"{name} in {where}"
        return result


def _some_bad(values: Any) -> bool:
    """Whether a tensor in nested containers holds a number that is not finite."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point())
    return any(not bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.numel())


# ----------------------------------------------------------------------------------------------------------------- a dump


def examine(dump: Dump, path: str | os.PathLike, precision: str | None, anomaly: bool) -> Replay:
    """What `safety.replay` does with a dump that was read."""
    recorded = dump.record["settings"]["precision"] if precision is None else precision
    if recorded not in _DTYPES:
        raise ConfigError(f"precision={recorded!r}; allowed are {', '.join(_DTYPES)}")
    parts = {"seed": dump.record["seed"], "progress": dump.record["progress"], "bf16": recorded == "bf16-mixed"}
    potential, objective = rebuild(dump, path, _DTYPES[recorded])
    batch = dump.batch.to(dtype=_DTYPES[recorded])
    watch = FirstBad(potential, objective)
    found = repeat(potential, objective, batch, watch=watch, **parts)
    result = Replay(
        path=Path(path),
        step=dump.record["step"] + 1,
        precision=recorded,
        recorded={name: float(value) for name, value in dump.record["terms"].items()},
        found=found,
        inputs=[name for name, value in dump.tensors.items() if not name.startswith("optimizer.") and _some_bad(value)],
        operation=watch.found if not found.is_finite else None,
        structures=_each(dump, potential, objective, batch, parts),
    )
    if not found.is_finite and _DTYPES[recorded] != torch.float64:
        result.in_float64 = repeat(
            *rebuild(dump, path, torch.float64), dump.batch.to(dtype=torch.float64), **parts | {"bf16": False}
        )
    if anomaly:
        result.anomaly = _anomaly(lambda: repeat(potential, objective, batch, **parts))
    return result


def rebuild(dump: Dump, path: str | os.PathLike, dtype: torch.dtype) -> tuple[Potential, Objective]:
    """Potential and objective of a dump, with the weights before its step, the plain plan, and in the mode of training.

    Raises
    ------
    FileFormatError
        If the dump does not say what they are made of, or its weights do not fit.
    """
    from ndem_zoo import registry

    recipe = dump.record["recipe"]
    if not recipe:
        raise FileFormatError(f"{path} was left by a training that no model ran, and does not say what its network is")
    try:
        model = registry.lookup(registry.MODELS, recipe["model"], "model")()
        precision = "64-true" if dtype == torch.float64 else "32-true"
        resolved = recipe["resolved"] | {"prior": None}  # the labels are less the prior's
        resolved["settings"] = resolved["settings"] | {"precision": precision}
        model._restore(resolved, dump.tensors)
    except (KeyError, TypeError, ConfigError) as error:
        raise FileFormatError(f"{path} does not describe a model of ours: {error!r}") from error
    potential, objective = model.potential_.train(), model.objective_.train()
    potential.backbone.plan = "eager"
    return potential, objective


def _each(
    dump: Dump, potential: Potential, objective: Objective, batch: Batch, parts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each structure alone; those with numbers that are not finite first, then by loss."""
    found = []
    for index, (row, name) in enumerate(zip(dump.record["structures"], dump.record["ids"], strict=True)):
        one = structure_of(batch, index)
        repeated = repeat(potential, objective, one, **parts)
        potential.eval()
        prediction = potential(one)
        potential.train()
        about = {"row": row, "id": name, "atoms": len(one.z), "loss": repeated.loss}
        about["energy"] = float(prediction.value)
        if prediction.forces is not None and len(one.z):
            about["largest_force"] = _longest(prediction.forces)
        if "forces" in one.targets and len(one.z):
            about["largest_label"] = _longest(one.targets["forces"])
        if len(one.src):
            about["shortest"] = float(one.vectors().norm(dim=-1).min())
        found.append(about | {"is_finite": repeated.is_finite})
    return sorted(
        found, key=lambda one: (one.pop("is_finite"), -one["loss"] if math.isfinite(one["loss"]) else -math.inf)
    )


def _longest(vectors: Tensor) -> float:
    """Largest length of the rows (N, 3)."""
    return float(vectors.detach().norm(dim=-1).max())


def structure_of(batch: Batch, index: int) -> Batch:
    """One structure of a batch as a batch, with its edges and labels."""
    atoms = (batch.system == index).nonzero().flatten()
    edges = (batch.system.index_select(0, batch.dst) == index).nonzero().flatten()
    first = int(atoms[0]) if len(atoms) else 0

    def rows(values: Tensor) -> Tensor:
        """Of columns with a row per atom, or else per structure."""
        return values.index_select(0, atoms) if len(values) == len(batch.z) else values[index : index + 1]

    return batch.replace(
        z=batch.z.index_select(0, atoms),
        pos=batch.pos.index_select(0, atoms),
        fixed=batch.fixed.index_select(0, atoms),
        system=torch.zeros_like(atoms),
        n_systems=1,
        src=batch.src.index_select(0, edges) - first,
        dst=batch.dst.index_select(0, edges) - first,
        shift=batch.shift.index_select(0, edges),
        cell=batch.cell[index : index + 1],
        targets={name: rows(value) for name, value in batch.targets.items()},
        extras={name: rows(value) for name, value in batch.extras.items()},
    )


def _anomaly(step: Callable[[], Repeated]) -> str:
    """What torch says when it looks at every derivative."""
    with warnings.catch_warnings(record=True) as said, _anomaly_mode():
        warnings.simplefilter("always")
        try:
            step()
        except RuntimeError as error:
            traces = [str(one.message) for one in said if "Error detected" in str(one.message)]
            return "\n".join([str(error), *traces])
    return "no derivative that is not finite"


@contextlib.contextmanager
def _anomaly_mode() -> Iterator[None]:
    """Torch's anomaly mode, and afterwards as it was before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        mode = torch.autograd.detect_anomaly(check_nan=True)
    with mode:
        yield
