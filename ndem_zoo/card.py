"""The model card: what a saved model is, in words and numbers, for whoever finds the folder.

Made of ``config.json`` and the history alone, so that it can be written again from a saved model. It says what is not
known instead of leaving it out; where the facts come from is `provenance.py`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ndem_zoo import registry
from ndem_zoo.metrics import unit_of
from ndem_zoo.properties import property_of
from ndem_zoo.provenance import PERIODIC_RADIUS

UNKNOWN = "not recorded"


def model_card(config: dict[str, Any], n_parameters: int, history: list[dict[str, float]], shift: float = 0.0) -> str:
    """Markdown text for ``card.md``.

    Parameters
    ----------
    config
        Content of ``config.json``. Entries that an older version did not write are said to be absent.
    n_parameters
        Weights of the potential.
    history
        Rows of the training history.
    shift
        Of the potential.
    """
    head = (
        f"Written by ndem_zoo {config['ndem_zoo']}. Load it with `ndem_zoo.{config['model']}.load(folder)`. "
        "Energies are in eV, forces in eV/Å, positions in Å."
    )
    sections = {
        "Model": _model(config, n_parameters, shift),
        "Data": _data(config["training_data"], bool(config["resolved"].get("pretraining"))),
        "Errors": _errors(config, history),
        "Limits": _limits(config["training_data"]),
        "Training": _training(config, history),
        "To do it again": _again(config),
        "Settings": [_block(json.dumps(config["resolved"], indent=1, ensure_ascii=False), "json")],
        "To cite": _citation(config),
    }
    parts = [f"# {config['model']}", head]
    if config["resolved"].get("pretraining"):
        parts.append(
            "**Pre-trained without labels: it predicts no energies. Fine-tune it: `fit(..., init_from=folder)`.**"
        )
    for title, lines in sections.items():
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


# -------------------------------------------------------------------------------------------------------------- sections


def _model(config: Mapping[str, Any], n_parameters: int, shift: float) -> list[str]:
    resolved = config["resolved"]
    target = resolved["supervised"]["target"]
    unit = property_of(target).unit
    references = ", ".join(f"{symbol} {value:.6f}" for symbol, value in config["reference"].items())
    return [
        f"- Backbone: {resolved['backbone']['name']}, {n_parameters:,} parameters",
        f"- Objective: {resolved['objective']['name']}, weight {resolved['objective']['weight']}",
        f"- Target: {target}{f' ({unit})' if unit else ''}; forces: {resolved['forces']}",
        *([f"- Prior, to which the difference was learned: {resolved['prior']}"] if resolved.get("prior") else []),
        f"- Reference energies{' beyond the prior' * bool(resolved.get('prior'))} ({unit or 'unit of the target'}): {references or 'none'}",
        *([f"- Added once for each structure: {shift:.6f} {unit}".rstrip()] if shift else []),
    ]


def _data(data: Mapping[str, Any], is_pretrained: bool) -> list[str]:
    """What was learned from."""
    verb = "Pre-trained" if is_pretrained else "Trained"
    source = data.get("source") or {}
    units = ", ".join(f"{name} {unit}" for name, unit in source.get("units", {}).items())
    lines = [
        f"- {verb} on: {data['name'] or 'unnamed data'}, {data['n_train']} structures, {data['n_valid']} for validation",
        f"- Source: {source.get('name') or 'not recorded: the dataset has no card'}"
        + (f", {source['homepage']}" if source.get("homepage") else ""),
        f"- Level of theory: {source.get('theory') or UNKNOWN}",
        f"- Units of the source: {units or UNKNOWN}; here eV, Å and eV/Å",
        f"- Licence of the data: {source.get('licence') or UNKNOWN}",
        f"- Hash of the training structures: {data['split_hash']}",
        f"- Hash of the validation structures: {data.get('valid_split_hash') or _no_validation(data)}",
    ]
    for other in data.get("earlier", ()):
        lines.append(
            f"- Trained before on: {other['name'] or 'unnamed data'}, {other['n_train']} structures, hash {other['split_hash']}"
        )
    return lines


def _no_validation(data: Mapping[str, Any]) -> str:
    return UNKNOWN if data["n_valid"] else "there were none"


def _errors(config: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> list[str]:
    """A table of errors of the kept weights on the validation data, and of what `evaluate` was last asked."""
    data, best = config["training_data"], _best(history)
    columns: list[tuple[str, Mapping[str, float]]] = []
    lines = []
    if best is None:
        lines.append("Validation: none; the last weights were kept.")
    else:
        found = {name.removeprefix("valid_"): value for name, value in best.items() if name.startswith("valid_")}
        columns.append((f"validation ({data['n_valid']} structures)", found))
        lines.append(
            f"Validation: step {int(best['step'])} of {int(history[-1]['step'])} was the best (valid_loss {best['valid_loss']:.6g}), and "
            "its weights were kept."
        )
    evaluation = config.get("provenance", {}).get("evaluation")
    if evaluation is None:
        lines.append("Other data: not evaluated when this was written.")
    else:
        what = f"{evaluation['part']} data " if evaluation["part"] else ""
        lines.append(
            f"Last evaluation: {what}{evaluation['name'] or 'unnamed data'}, {evaluation['n_structures']} structures, hash "
            f"{evaluation['split_hash']}."
        )
        columns.append((f"last evaluation ({evaluation['n_structures']} structures)", evaluation["metrics"]))
    rows = _error_rows(columns, config["resolved"]["supervised"]["target"])
    return [*lines, "", *rows] if rows else lines


def _best(history: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The row whose weights were kept: `partial_fit` begins to count its steps anew, and keeps the best ones since then."""
    begin = max((i for i in range(1, len(history)) if history[i]["step"] <= history[i - 1]["step"]), default=0)
    judged = [row for row in history[begin:] if "valid_loss" in row]
    return min(judged, key=lambda row: row["valid_loss"]) if judged else None


def _error_rows(columns: Sequence[tuple[str, Mapping[str, float]]], target: str) -> list[str]:
    """Mean absolute errors in our unit, in its thousandth, and in that of papers."""
    rows = [("force MAE, per component", "forces_mae", *known) for known in _scales("forces_mae")]
    rows += [(f"{target} MAE", f"{target}_mae", *known) for known in _scales(f"{target}_mae", target)]
    rows = [row for row in rows if any(row[1] in found for _, found in columns)]
    if not rows:
        return []
    lines = [_row(["", *(title for title, _ in columns)]), "|---|" + "---:|" * len(columns)]
    for label, name, factor, unit in rows:
        cells = [f"{factor * found[name]:.5g}" if name in found else "–" for _, found in columns]
        lines.append(_row([f"{label}{f' ({unit})' if unit else ''}", *cells]))
    return lines


def _scales(name: str, target: str = "energy") -> list[tuple[float, str]]:
    """Factors and units in which an error is given."""
    known, unit = property_of(target), unit_of(name)
    scales = [(1.0, unit)]
    if unit.startswith("eV"):
        scales.append((1e3, "m" + unit))
    if known.report and known.report not in (unit, "meV"):
        scales.append((known.factor, known.report + unit.removeprefix("eV")))
    return scales


def _limits(data: Mapping[str, Any]) -> list[str]:
    """How far the training data reach."""
    limits = data.get("limits")
    if not limits:
        return [f"How far the training data reach: {UNKNOWN} (a model of an older version)."]
    elements = ", ".join(f"{symbol} ({n:,} atoms)" for symbol, n in limits["elements"].items())
    looked = limits["n_looked_at"]
    of = (
        "all structures" if looked == limits["n_structures"] else f"{looked:,} of {limits['n_structures']:,} structures"
    )
    shortest = ", ".join(f"{pair} {distance:.3f}" for pair, distance in limits["shortest"].items())
    longest = "no structure without periodic boundaries" if limits["longest"] is None else f"{limits['longest']:.3f} Å"
    return [
        "Outside of what the training data hold, nothing is known about the errors:",
        "",
        f"- Elements: {elements}",
        f"- Atoms in a structure: {limits['atoms'][0]} to {limits['atoms'][1]}",
        f"- Periodic boundaries: {_periodic(limits)}",
        f"- Shortest distances ({of}), Å: {shortest or 'none: single atoms'}",
        *_seen(limits),
        f"- Longest distance within a structure: {longest}",
        "- Charges, spin states and external fields: the network has no input for them",
    ]


def _seen(limits: Mapping[str, Any]) -> list[str]:
    """Between which lengths the distances of each pair of elements are."""
    seen = {
        pair: " and ".join(f"{start:.2f} to {stop:.2f}" for start, stop in ranges)
        for pair, ranges in limits.get("seen", {}).items()
    }
    listed = ", ".join(f"{pair} {ranges}" for pair, ranges in seen.items())
    return [f"- Distances that there were, up to {PERIODIC_RADIUS} Å: {listed}"] if seen else []


def _periodic(limits: Mapping[str, Any]) -> str:
    n, total = limits["n_periodic"], limits["n_structures"]
    return "none" if n == 0 else "all structures" if n == total else f"{n:,} of {total:,} structures"


def _training(config: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> list[str]:
    """How long, and on what."""
    past = config.get("provenance", {})
    here = past.get("machine", {})
    last = history[-1] if history else {}
    length = f"{int(last['step']):,} steps, {last['epoch']:.4g} epochs, {last['seconds']:.0f} s" if last else UNKNOWN
    versions = {name: here[name] for name in ("ndem_zoo", "python", "torch", "numpy", "ase") if name in here}
    versions |= here.get("packages", {})
    start = past.get("init_from")
    begun = "drawn from the seed"
    if start:
        begun = f"those of a {start['model']} trained on {start['name'] or 'unnamed data'}, hash {start['split_hash'] or UNKNOWN}"
    device = (
        f"{here['device']}; {here['processor']}, {here['cores']} cores, torch threads: {here['threads']}"
        if here
        else UNKNOWN
    )
    limits = ", ".join(f"{name}={limit}" for name, limit in past.get("fit", {}).items())
    return [
        f"- Length: {length}",
        f"- Limits given to `fit`: {(limits or 'none; those of the settings') if 'fit' in past else UNKNOWN}",
        f"- First weights: {begun if past else UNKNOWN}",
        f"- Deterministic algorithms only: {'yes' if config['resolved']['settings'].get('deterministic') else 'no'}",
        f"- Device: {device}",
        f"- System: {here.get('platform', UNKNOWN)}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items()) or UNKNOWN}",
    ]


def _again(config: Mapping[str, Any]) -> list[str]:
    """The command that was given, or else the code that does the same."""
    past = config.get("provenance", {})
    if past.get("command"):
        return [_block(past["command"], "sh")]
    data, name = config["training_data"], config["model"]
    keywords = ", ".join(f"{key}={value!r}" for key, value in _changed(config).items())
    limits = "".join(f", {key}={value!r}" for key, value in past.get("fit", {}).items())
    valid = ", valid" if data["n_valid"] else ""
    code = [
        f"from ndem_zoo import {name}",
        "",
        f"# train{valid}: the structures whose hashes are above",
        f"model = {name}({keywords})",
        f"model.fit(train{valid}{limits})",
    ]
    if data.get("earlier") or past.get("init_from"):
        code.insert(2, "# The training before this one is not part of this code.")
    return [_block("\n".join(code), "python")]


def _changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that are not at their defaults."""
    model = registry.lookup(registry.MODELS, config["model"], "model")
    defaults = {name: known.default for name, known in inspect.signature(model).parameters.items()}
    return {name: value for name, value in config["params"].items() if value != defaults.get(name)}


def _citation(config: Mapping[str, Any]) -> list[str]:
    source = config["training_data"].get("source") or {}
    of_data = [f"- Data: {text}" for text in source.get("citation", ())] or [f"- Data: {UNKNOWN}"]
    return [*of_data, "- Method and backbone: what `CITATION.cff` of ndem_zoo lists"]


def _block(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
