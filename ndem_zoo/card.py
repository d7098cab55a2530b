"""The model card: what a saved model is, in words and numbers, for whoever finds the folder."""

from __future__ import annotations

from typing import Any

from ndem_zoo.metrics import unit_of
from ndem_zoo.properties import property_of


def model_card(config: dict[str, Any], n_parameters: int, history: list[dict[str, float]], shift: float = 0.0) -> str:
    """Markdown text for ``card.md``.

    Parameters
    ----------
    config
        Content of ``config.json``.
    n_parameters
        Weights of the potential.
    history
        Rows of the training history.
    shift
        Of the potential.
    """
    data, resolved = config["training_data"], config["resolved"]
    target = resolved["supervised"]["target"]
    unit = property_of(target).unit
    is_pretrained = bool(resolved.get("pretraining"))
    lines = [
        f"# {config['model']}",
        "",
        f"Written by ndem_zoo {config['ndem_zoo']}. Load it with `ndem_zoo.{config['model']}.load(folder)`.",
        *(
            ["", "**Pre-trained without labels: it predicts no energies. Fine-tune it: `fit(..., init_from=folder)`.**"]
            * is_pretrained
        ),
        "",
        f"- Backbone: {resolved['backbone']['name']}, {n_parameters:,} parameters",
        f"- Objective: {resolved['objective']['name']}, weight {resolved['objective']['weight']}",
        f"- Target: {target}{f' ({unit})' if unit else ''}; forces: {resolved['forces']}; energies in eV, forces in eV/Å, positions in Å",
        f"- {'Pre-trained' if is_pretrained else 'Trained'} on: {data['name'] or 'unnamed data'}, {data['n_train']} structures, {data['n_valid']} for validation",
        f"- Hash of the training structures: {data['split_hash']}",
        f"- Elements: {', '.join(config['reference'])}",
        "",
        f"Reference energies ({unit}): " + ", ".join(f"{k} {v:.6f}" for k, v in config["reference"].items()),
        *([f"Added once for each structure: {shift:.6f} {unit}".rstrip()] if shift else []),
    ]
    # `partial_fit` begins to count its steps anew; the weights are the best ones since then.
    begin = max((i for i in range(1, len(history)) if history[i]["step"] <= history[i - 1]["step"]), default=0)
    judged = [row for row in history[begin:] if "valid_loss" in row]
    if judged:
        best = min(judged, key=lambda row: row["valid_loss"])
        names = [name for name in best if name.startswith("valid_") and name.endswith("_mae")]
        errors = ", ".join(f"{name} {best[name]:.6g} {unit_of(name.removeprefix('valid_'))}".rstrip() for name in names)
        errors = errors or f"valid_loss {best['valid_loss']:.6g}"
        lines += ["", f"Best validation (step {int(best['step'])} of {int(history[-1]['step'])}): {errors}"]
    return "\n".join(lines) + "\n"
