"""Reading structures from SD files (V2000), one molecule at a time and without RDKit.

Titles, elements and coordinates in the order of the file, for datasets whose geometries come as SD files (QM9,
PCQM4Mv2). Bonds and properties are skipped: nothing here interprets chemistry, so nothing can fail to be sanitized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ndem_zoo.errors import FileFormatError

_END = "$$$$"

#: Choice: lines of an entry; the format itself counts up to 999 atoms and 999 bonds.
MAX_LINES = 100_000


class Entry(NamedTuple):
    """One molecule of an SD file.

    Attributes
    ----------
    title : str
        First line of the entry.
    symbols : list of str
        Chemical symbols.
    pos : list of float
        x, y, z of the first atom, of the second, ... in Å: three times as many numbers as symbols.
    """

    title: str
    symbols: list[str]
    pos: list[float]


def iter_sdf(lines: Iterable[str], name: str) -> Iterator[Entry]:
    """Molecules of an SD file.

    Parameters
    ----------
    lines
        Of the file, such as an open text file.
    name
        Of the file, for errors.

    Raises
    ------
    FileFormatError
        If an entry is not in V2000 format, damaged or cut off; names its number and what is wrong.
    """
    entry: list[str] = []
    number = 0
    for line in lines:
        if line.rstrip() == _END:
            yield _read_entry(entry, f"{name}: entry {number}")
            entry, number = [], number + 1
            continue
        entry.append(line)
        if len(entry) > MAX_LINES:
            raise FileFormatError(f"{name}: entry {number} has more than {MAX_LINES:,} lines and no {_END}")
    if any(line.strip() for line in entry):
        raise FileFormatError(f"{name}: entry {number} is cut off: it has no {_END} at its end")


def _read_entry(lines: list[str], where: str) -> Entry:
    """An entry from its lines; columns are those of the format, since wide numbers leave no blanks between them."""
    if len(lines) < 4:
        raise FileFormatError(f"{where} has {len(lines)} lines; needed are three of header, the counts and the atoms")
    counts = lines[3]
    if "V3000" in counts:
        raise FileFormatError(f"{where} is in V3000 format; only V2000 can be read")
    try:
        n = int(counts[:3])
    except ValueError:
        raise FileFormatError(f"{where} has the counts {counts.rstrip()!r}; they must begin with a number") from None
    rows = lines[4 : 4 + n]
    if len(rows) != n:
        raise FileFormatError(f"{where} has {len(rows)} lines of atoms; its counts say {n}")
    try:
        pos = [float(row[start : start + 10]) for row in rows for start in (0, 10, 20)]
    except ValueError as error:
        raise FileFormatError(f"{where} has a line of atoms that cannot be read ({error})") from error
    return Entry(lines[0].strip(), [row[31:34].strip() for row in rows], pos)
