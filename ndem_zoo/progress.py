"""Progress of a training, for people: a bar on a terminal, lines elsewhere. Never costs a step more than a comparison."""

from __future__ import annotations

import sys
import time
from typing import Any

from ndem_zoo.metrics import unit_of

#: Seconds between two refreshes of the bar, and between two lines.
_BAR_INTERVAL, _LINE_INTERVAL = 0.2, 10.0


class Progress:
    """Shows how far a training is.

    Parameters
    ----------
    enabled
        False shows nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._next, self._errors, self._bar, self._task = 0.0, "", None, None

    def __enter__(self) -> Progress:
        if self._enabled and sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=1.0, rate="", errors="")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def validated(self, row: dict[str, float]) -> None:
        """Take note of a row of the history."""
        shown = {"valid_energy_mae": ("E", 1e3, "meV"), "valid_forces_mae": ("F", 1e3, "meV/Å")}
        errors = [
            f"{label} {row[name] * factor:.1f} {unit}" for name, (label, factor, unit) in shown.items() if name in row
        ]
        for name in (name for name in row if name.startswith("valid_") and name.endswith("_mae") and name not in shown):
            metric = name.removeprefix("valid_")
            errors.append(f"{metric.removesuffix('_mae')} {row[name]:.4g} {unit_of(metric)}".rstrip())
        self._errors = "valid MAE " + ", ".join(errors) if errors else f"train loss {row['train_loss']:.4g}"

    def advance(self, step: int, seconds: float, done: float) -> None:
        """A step is done, and the fraction `done` of all; shown when the last refresh is long enough ago."""
        now = time.monotonic()
        if not self._enabled or now < self._next:
            return
        first, self._next = self._next == 0.0, now + (_BAR_INTERVAL if self._bar is not None else _LINE_INTERVAL)
        if first and self._bar is None:
            return
        rate = f"step {step}, {step / max(seconds, 1e-9):.1f} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=rate, errors=self._errors)
        else:
            print(f"{100 * done:5.1f} %  {rate}  {self._errors}", file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    """A bar that refreshes itself, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[errors]}"),
    )
    return Bar(*columns, console=Console(stderr=True), refresh_per_second=5)
