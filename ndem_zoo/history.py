"""The history of a training: what it is in memory, as ``history.csv``, and on TensorBoard. Rows come from `training`."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ndem_zoo.checkpoint import write_text, writing
from ndem_zoo.errors import FileFormatError
from ndem_zoo.optional import require


class History(list):
    """Rows of a training, one dict for each validation, and how it ended.

    Attributes
    ----------
    interrupted : bool
        Whether Ctrl-C ended it before its limits.
    spikes : list of dict
        Steps whose loss was far above its median before: ``step``, ``loss``, ``ratio`` to the median, ``structures`` (rows of
        the training set); see `safety.Guard`.
    """

    interrupted: bool = False
    spikes: Sequence[dict[str, Any]] = ()


class HistoryLog:
    """Writes the history as it grows: ``history.csv``, and TensorBoard when asked."""

    def __init__(self, directory: Path | None, tensorboard: bool, rows: list[dict[str, float]]) -> None:
        self._path = None if directory is None else directory / "history.csv"
        self._rows, self._header = list(rows), _header(rows)
        self._board = None
        if tensorboard:
            board = require("torch.utils.tensorboard", extra="tensorboard")
            # Rows after the checkpoint that is continued from come again.
            last = int(rows[-1]["step"]) if rows else 0
            self._board = board.SummaryWriter(str(directory / "tensorboard"), purge_step=last + 1)
        if self._path is not None:
            write_history(self._path, rows)

    def add(self, row: dict[str, float]) -> None:
        """Append a row; the file is written anew when a column is new (a term may begin later than others)."""
        self._rows.append(row)
        if self._path is not None and not set(row) <= set(self._header):
            self._header = _header(self._rows)
            write_history(self._path, self._rows)
        elif self._path is not None:
            size = self._path.stat().st_size
            try:
                with writing(self._path), self._path.open("a", newline="", encoding="utf-8") as file:
                    file.write(_line(row, self._header))
            except OSError:
                os.truncate(self._path, size)  # no half rows
                raise
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush."""
        if self._board is not None:
            self._board.close()


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """Write a history as CSV, with an empty cell for what a row lacks; an empty history as an empty file."""
    header = _header(rows)
    lines = [",".join(header) + "\n"] if rows else []
    write_text(path, "".join(lines + [_line(row, header) for row in rows]))


def to_columns(rows: list[dict[str, float]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of all columns, and each column (R,): whole numbers as int64, others as float64 with NaN for what a row lacks."""
    header = _header(rows)
    values = {name: [row.get(name, math.nan) for row in rows] for name in header}
    kinds = {
        name: np.int64 if all(isinstance(v, int) for v in column) else np.float64 for name, column in values.items()
    }
    return header, {name: np.array(column, dtype=kinds[name]) for name, column in values.items()}


def from_columns(columns: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    """The rows of `to_columns`, bit for bit; whole numbers of a column that some rows lack come back as floats."""
    names, rows = [sys.intern(name) for name in columns], zip(*(c.tolist() for c in columns.values()), strict=True)
    return [{name: v for name, v in zip(names, row, strict=True) if v == v} for row in rows]  # NaN is not itself


def _header(rows: list[dict[str, float]]) -> list[str]:
    """Names of all columns, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _line(row: dict[str, float], header: list[str]) -> str:
    return ",".join(repr(row[name]) if name in row else "" for name in header) + "\n"


def read_history(path: Path) -> list[dict[str, float]]:
    """Read what `write_history` wrote.

    Raises
    ------
    FileFormatError
        If a cell is not a number, or the last line is cut off.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            raise FileFormatError(f"{path} is damaged: its last line is cut off")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [{name: _number(value) for name, value in row.items() if value != ""} for row in rows]
    except (AttributeError, TypeError, ValueError, csv.Error) as error:  # too many cells, too few, other text
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} is damaged: {error}") from error


def _number(text: str) -> float:
    """A cell: whole numbers, such as steps, stay whole."""
    return int(text) if text.isdigit() else float(text)
