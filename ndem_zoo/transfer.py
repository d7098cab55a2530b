"""Weights to begin with: from a fitted or pre-trained model, a saved one, or somebody else's checkpoint.

`start_from` finds them, `begin` copies them into a new potential and its objective, and a `Report` says what became of each
one. Files of others are read in `foreign.py`; when a training begins with weights is decided in `models/estimator.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ndem_zoo.errors import ConfigError
from ndem_zoo.models.potential import Potential
from ndem_zoo.objectives.base import Objective

if TYPE_CHECKING:
    from ndem_zoo.foreign import Imported
    from ndem_zoo.models.estimator import NDeMModel

Kind = Literal["fitted", "pretrained", "imported", "complete"]

#: What of a potential is taken from each kind of source; units and reference energies are never weights.
_PARTS: dict[Kind, tuple[str, ...]] = {
    "fitted": ("backbone", "energy_head", "force_head"),
    "pretrained": ("backbone",),
    "imported": ("backbone",),
    "complete": ("backbone", "energy_head"),
}
_UNITS = ("reference", "shift", "scale")


@dataclass
class Report:
    """What became of the weights of a source, one by one.

    Attributes
    ----------
    source
        Where they came from.
    loaded
        Names of weights that were taken.
    skipped
        Weights of the source that were not, and why.
    mismatched
        Weights whose shapes differ: (theirs, ours).
    fresh
        Weights of ours that stay as they were drawn, and why.
    notes
        What else to know.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Counts, and every weight that was not simply taken."""
        lines = [f"{self.source}: {len(self.loaded)} weights loaded {_by_part(self.loaded)}"]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [
            f"  shape: {name} has {theirs} there, {ours} here" for name, (theirs, ours) in self.mismatched.items()
        ]
        for title, reasons in (("not taken", self.skipped), ("freshly drawn", self.fresh)):
            for reason in dict.fromkeys(reasons.values()):
                lines.append(
                    f"  {title}: {_by_part([name for name, why in reasons.items() if why == reason])}: {reason}"
                )
        return "\n".join(lines)


def _by_part(names: list[str]) -> str:
    """Names of weights; how many where a part of the network has more than three, such as ``(backbone: 40)``."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition(".")[0], []).append(name)
    return "(" + "; ".join(f"{p}: {len(n)}" if len(n) > 3 else ", ".join(n) for p, n in parts.items()) + ")"


@dataclass(frozen=True)
class Start:
    """Weights to begin with.

    Attributes
    ----------
    kind
        How far they were trained, and by whom; ``"complete"``: somebody else's, energies included.
    backbone, options
        Name in the registry and options of the network that they were made for.
    tensors
        By name: ``backbone....``, ``energy_head....``, ``force_head....``, ``noise_head....``, ``scale``.
    noise_sign
        Of the denoising head; see `Objective.denoises_with`.
    report
        What is known already.
    origin
        For the record of the model that begins with them: ``model``, ``name`` and ``split_hash`` of its training data.
    """

    kind: Kind
    backbone: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    noise_sign: int
    report: Report
    origin: Mapping[str, Any] = field(default_factory=dict)


def start_from(source: str | os.PathLike | NDeMModel | Imported, partial: bool = False) -> Start:
    """Weights from whatever `NDeMModel.fit` takes as `init_from`.

    Parameters
    ----------
    source
        A fitted or pre-trained model, the folder of a saved one, the file of a checkpoint (see `foreign`), or what
        `foreign.import_checkpoint` returned.
    partial
        Whether a checkpoint that our network cannot represent may be read for what it shares with it.

    Raises
    ------
    FileNotFoundError
        If there is nothing of that name.
    NotFittedError
        If the model has no weights.
    """
    from ndem_zoo.foreign import Imported, import_checkpoint
    from ndem_zoo.models.estimator import NDeMModel

    if isinstance(source, Imported):
        return source.start()
    if isinstance(source, NDeMModel):
        return _of_model(source, f"this {type(source).__name__}")
    path = Path(source)
    if path.is_file():
        return import_checkpoint(path, partial=partial).start()
    return _of_model(NDeMModel.load(path), str(path))


def _of_model(model: NDeMModel, name: str) -> Start:
    """Weights of one of our own models."""
    potential, resolved = model._weights(), model.resolved_
    kind: Kind = "pretrained" if resolved.get("pretraining") else "fitted"
    own = (*_PARTS[kind], *_UNITS)
    tensors = {name: value for name, value in potential.state_dict().items() if name.partition(".")[0] in own}
    found = model.objective_.denoising_head() if kind == "pretrained" else None
    if found is not None:
        tensors |= {f"noise_head.{key}": value for key, value in found[0].state_dict().items()}
    report = Report(f"{name} ({kind} with {resolved['objective']['name']})")
    backbone = resolved["backbone"]
    data = model.training_data_
    origin = {
        "model": type(model).__name__,
        "prior": resolved.get("prior"),
        **{key: data.get(key) for key in ("name", "n_train", "split_hash")},
    }
    return Start(kind, backbone["name"], backbone["options"], tensors, found[1] if found else 0, report, origin)


def begin(
    start: Start,
    potential: Potential,
    objective: Objective,
    backbone: Mapping[str, Any],
    *,
    partial: bool = False,
    keep_scale: bool = False,
) -> Report:
    """Copy weights into a potential and the denoising head of its objective, in place.

    Reference energies stay those of the new data. A fitted model also gives its energy and force heads and the scale that
    they were trained in; a pre-trained one and a checkpoint give their denoising head, if the objective has one of the
    same shape, negated where it tells minus the noise.

    Parameters
    ----------
    start
        The weights.
    potential, objective
        What gets them.
    backbone
        Name and options of the potential's backbone.
    partial
        False: every weight of the backbone must be there, in the right shape, for a network with the same options.
    keep_scale
        Whether the potential's own scale stays, which was asked for.

    Raises
    ------
    ConfigError
        If the networks differ, and `partial` is not asked for. Nothing is copied then.
    """
    report = dataclasses.replace(
        start.report,
        loaded=[],
        skipped=dict(start.report.skipped),
        mismatched=dict(start.report.mismatched),
        fresh={},
        notes=list(start.report.notes),
    )
    different = _different_options(start, potential, backbone)
    if different and not partial:
        raise ConfigError(f"init_from has another architecture: {different}")
    if different:
        report.notes.append(different)
    parts = _PARTS[start.kind]
    ours = {name: value for name, value in potential.state_dict().items() if name not in _UNITS}
    wanted = {name: value for name, value in ours.items() if name.partition(".")[0] in parts}
    report.fresh |= dict.fromkeys((name for name in ours if name not in wanted), "energies and forces are learned anew")
    taken = _match(start.tensors, wanted, report)
    if not partial:
        _require_all(start, wanted, report, parts)
    head, flip = _noise_head(start, objective, report)
    taken |= head
    with torch.no_grad():
        for name, (own, value) in taken.items():
            own.copy_(-value if name in flip else value)
        if start.kind == "fitted" and not keep_scale:
            potential.scale.copy_(start.tensors["scale"])
    report.loaded += taken
    known = {*taken, *report.skipped, *report.mismatched, *_UNITS}
    unused = (name for name in start.tensors if name not in known)
    report.skipped |= {n: "learned anew here" if n in ours else "there is no such weight here" for n in unused}
    return report


def _different_options(start: Start, potential: Potential, backbone: Mapping[str, Any]) -> str:
    """In which options the networks differ, beyond those that may; empty if in none."""
    if start.backbone != backbone["name"]:
        raise ConfigError(f"init_from has another architecture: it is a {start.backbone}, this is a {backbone['name']}")
    free = type(potential.backbone).free_options
    own = backbone["options"]
    names = [name for name in start.options if name in own and name not in free and start.options[name] != own[name]]
    if not names:
        return ""
    theirs = ", ".join(f"{name!r}: {start.options[name]!r}" for name in names)
    here = ", ".join(f"{name}={own[name]!r}" for name in names)
    return f"{start.report.source} has backbone_options={{{theirs}}}, here is {here}"


def _match(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], report: Report
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights that both sides have in the same shape, by name: (ours, theirs)."""
    found = {}
    for name, own in wanted.items():
        value = tensors.get(name)
        if value is None:
            report.fresh[name] = "the source has no such weight"
        elif value.shape != own.shape:
            report.mismatched[name] = (tuple(value.shape), tuple(own.shape))
            report.fresh[name] = "the shapes differ"
        else:
            found[name] = (own, value)
    return found


def _require_all(start: Start, wanted: Mapping[str, Tensor], report: Report, parts: tuple[str, ...]) -> None:
    """Raise ConfigError unless both sides have the same weights, but for an encoding of vectors that one may lack."""
    encoding = "backbone.vector_embedding"
    missing = [name for name in wanted if name not in start.tensors and not name.startswith(encoding)]
    unexpected = [
        name
        for name in start.tensors
        if name.partition(".")[0] in parts and name not in wanted and not name.startswith(encoding)
    ]
    shapes = [name for name in report.mismatched if name in wanted]
    if missing or unexpected or shapes:
        raise ConfigError(
            f"init_from has another architecture: missing {missing}, unexpected {unexpected}, other shapes {shapes}; "
            "init_partial=True takes what fits"
        )


def _noise_head(
    start: Start, objective: Objective, report: Report
) -> tuple[dict[str, tuple[Tensor, Tensor]], frozenset[str]]:
    """Weights for the objective's denoising head, all or none, and the names of those to negate."""
    prefix = "noise_head."
    theirs = {name: value for name, value in start.tensors.items() if name.startswith(prefix)}
    found = objective.denoising_head()
    if not theirs or found is None:
        reason = "this objective has no denoising head" if theirs else "the source gives no denoising head"
        report.skipped |= dict.fromkeys(theirs, reason)
        if found is not None:
            report.fresh |= {prefix + name: reason for name in found[0].state_dict()}
        return {}, frozenset()
    head, sign = found
    wanted = {prefix + name: value for name, value in head.state_dict().items()}
    taken = _match(theirs, wanted, report)
    is_whole = len(taken) == len(wanted) == len(theirs)
    flip = frozenset() if sign == start.noise_sign else frozenset(prefix + name for name in head.sign_weights)
    reason = (
        "denoising heads of other shapes" if not is_whole else "its sign differs, and is not known to be reversible"
    )
    if not is_whole or (sign != start.noise_sign and not flip):
        report.skipped |= dict.fromkeys(theirs, reason)
        report.fresh |= dict.fromkeys(wanted, reason)
        return {}, frozenset()
    if flip:
        report.notes.append(f"the denoising head was negated: {', '.join(sorted(flip))} times -1")
    return taken, flip
