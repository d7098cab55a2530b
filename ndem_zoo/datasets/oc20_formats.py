"""The three formats that OC20 comes in, read as `Frame`: text (extxyz and its log), pickled PyG records, ASE's records.

A frame holds what the file says, in eV and Å, and nothing else; whether its energy is a total or an adsorption energy is
settled in `frames_dataset`, which puts frames into columns. Files are found and converted in `oc20.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError, FileFormatError
from ndem_zoo.physics import MAX_Z

#: What energies can be.
ENERGIES = ("adsorption", "total")

#: What the energies in files of each format are (section 6 of the dataset's documentation): text and .aselmdb hold raw
#: DFT totals, pickled PyG records hold adsorption energies.
STORED = {"text": "total", "pyg": "adsorption", "ase": "total"}

#: key=value and key="values" in the second line of an extxyz frame.
_PAIR = re.compile(r'([A-Za-z_][\w\-]*)=(?:"([^"]*)"|(\S+))')

_LOG = re.compile(r"random(\d{1,18}),frame(\d{1,9})(?:,([-+0-9.eE]+))?")

_TRUE, _FALSE = ("T", "True", "true", "1"), ("F", "False", "false", "0")


@dataclass(slots=True)
class Frame:
    """One structure as its file has it.

    Attributes
    ----------
    z, pos, cell, pbc : (n,), (n, 3), (3, 3), (3,)
        Atomic numbers, positions in Å, cell vectors as rows in Å, periodic directions.
    energy
        In eV, total or adsorption; None if the file has none (test data).
    forces : (n, 3) or None
        eV/Å.
    fixed, tags : (n,) or None
        Atoms that do not move; 0 below the surface, 1 surface, 2 adsorbate.
    sid, fid
        System and frame; None if the file does not say.
    reference
        Energy of slab and gas in eV: adsorption energy = total energy - reference.
    initial_energy, relaxed_pos
        IS2RE: energy before, and positions after the relaxation.
    """

    z: np.ndarray
    pos: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    energy: float | None = None
    forces: np.ndarray | None = None
    fixed: np.ndarray | None = None
    tags: np.ndarray | None = None
    sid: int | None = None
    fid: int | None = None
    reference: float | None = None
    initial_energy: float | None = None
    relaxed_pos: np.ndarray | None = None


# ---------------------------------------------------------------------------------------------------------------- text


def frames_of_text(text: str, log: str | None, where: str) -> list[Frame]:
    """The frames of an extxyz file, and what its log says about them.

    Parameters
    ----------
    text
        Content of ``N.extxyz``.
    log
        Content of ``N.txt``: a line ``random<sid>,frame<fid>,<reference energy>`` for each frame; None if there is none.
    where
        Name of the file, for messages.

    Raises
    ------
    FileFormatError
        If a frame is damaged or cut off, or the log has another number of lines; names the frame.
    """
    lines = text.split("\n")
    frames: list[Frame] = []
    start = 0
    while start < len(lines) and lines[start].strip():
        try:
            n = int(lines[start])
            if n < 1 or start + 2 + n > len(lines):
                raise ValueError(f"{n} atoms are announced, {len(lines) - start - 2} lines are left")
            frames.append(_frame_of_lines(lines[start + 1], lines[start + 2 : start + 2 + n]))
        except (KeyError, ValueError, OverflowError) as error:
            raise FileFormatError(
                f"{where}: structure {len(frames)} cannot be read as extended XYZ ({error})"
            ) from error
        start += 2 + n
    if any(line.strip() for line in lines[start:]):
        raise FileFormatError(f"{where}: after structure {len(frames)} comes line {start + 1}, which begins none")
    if not frames:
        raise FileFormatError(f"{where} holds no structures")
    if log is not None:
        _add_log(frames, log, where)
    return frames


def _frame_of_lines(comment: str, lines: list[str]) -> Frame:
    """A frame from its second line and the lines of its atoms."""
    pairs = {key: quoted or plain for key, quoted, plain in _PAIR.findall(comment)}
    columns, width = _layout(pairs.get("Properties", ""))
    n, words = len(lines), " ".join(lines).split()
    if len(words) != n * width:
        raise ValueError(f"{n} atoms have {len(words)} columns, {width} each are announced")

    def numbers(name: str) -> np.ndarray:
        first, size = columns[name]
        out = np.empty((n, size))
        for k in range(size):
            out[:, k] = list(map(float, words[first + k :: width]))
        return out

    if "Lattice" not in pairs:
        raise ValueError("there is no Lattice")
    lattice, pbc = pairs["Lattice"].split(), _flags(pairs.get("pbc", "T T T").split())
    if len(pbc) != 3:
        raise ValueError(f"pbc has {len(pbc)} flags; needed are 3")
    is_free = _flags(words[columns["move_mask"][0] :: width]) if "move_mask" in columns else None
    return Frame(
        z=np.array([atomic_numbers[symbol] for symbol in words[columns["species"][0] :: width]], dtype=np.uint8),
        pos=numbers("pos"),
        cell=np.array(lattice, dtype=np.float64).reshape(3, 3),
        pbc=pbc,
        energy=float(pairs["energy"]) if "energy" in pairs else None,
        forces=numbers("forces") if "forces" in columns else None,
        # Pitfall: ASE's mask says which atoms may move; ours says which may not.
        fixed=None if is_free is None else ~is_free,
        tags=np.array(words[columns["tags"][0] :: width], dtype=np.int64) if "tags" in columns else None,
    )


@functools.lru_cache(maxsize=16)
def _layout(properties: str) -> tuple[dict[str, tuple[int, int]], int]:
    """First column and number of columns of each property, and the number of all columns."""
    parts = properties.split(":")
    if len(parts) < 3 or len(parts) % 3:
        raise ValueError(f"Properties={properties!r} are no triples of name, kind and number")
    columns, width = {}, 0
    for name, _, size in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        columns[name] = (width, int(size))
        width += int(size)
    needed = {"species": 1, "pos": 3, "move_mask": 1, "tags": 1, "forces": 3}
    for name, size in needed.items():
        if name in columns and columns[name][1] != size:
            raise ValueError(f"{name} has {columns[name][1]} columns; needed are {size}")
    for name in ("species", "pos"):
        if name not in columns:
            raise ValueError(f"Properties={properties!r} lack {name}")
    return columns, width


def _flags(words: Sequence[str]) -> np.ndarray:
    """True and False from the words for them."""
    for word in words:
        if word not in _TRUE and word not in _FALSE:
            raise ValueError(f"{word!r} is neither T nor F")
    return np.array([word in _TRUE for word in words], dtype=bool)


def _add_log(frames: list[Frame], log: str, where: str) -> None:
    """Systems, frame numbers and reference energies from the lines of the log."""
    lines = log.split()
    if len(lines) != len(frames):
        raise FileFormatError(f"{where} has {len(frames)} structures, its log has {len(lines)} lines; they must agree")
    for number, (frame, line) in enumerate(zip(frames, lines, strict=True)):
        match = _LOG.fullmatch(line)
        if match is None:
            raise FileFormatError(
                f"{where}: line {number + 1} of the log is {line[:80]!r}; needed is random1,frame2,-3.0"
            )
        frame.sid, frame.fid = int(match[1]), int(match[2])
        frame.reference = None if match[3] is None else float(match[3])


# ------------------------------------------------------------------------------------------------------------- records


def frame_of_pyg(fields: Mapping[str, Any], task: str, where: str) -> Frame:
    """A frame from the fields of a PyG object, under their old or new names.

    Parameters
    ----------
    fields
        See `pickles.read_record`.
    task
        ``"s2ef"`` or ``"is2re"``, whose energy is that of the relaxed structure.
    where
        File and key, for messages.

    Raises
    ------
    FileFormatError
        If a field is missing or has another shape; names it.
    """
    get = _Fields(fields, where)
    z = get.elements("atomic_numbers")
    n = len(z)
    energy = get.number("y_relaxed") if task == "is2re" else get.number("energy", "y")
    tags, fixed = get.array("tags", shape=(n,)), get.array("fixed", shape=(n,))
    return Frame(
        z=z,
        pos=get.needed("pos", (n, 3)),
        cell=get.needed("cell", (3, 3)),
        pbc=np.ones(3, dtype=bool),
        energy=energy,
        forces=get.array("forces", "force", shape=(n, 3)),
        fixed=None if fixed is None else fixed != 0,
        tags=None if tags is None else tags.astype(np.int64),
        sid=get.system("sid"),
        fid=get.whole("fid"),
        initial_energy=get.number("y_init") if task == "is2re" else None,
        relaxed_pos=get.array("pos_relaxed", shape=(n, 3)) if task == "is2re" else None,
    )


def frame_of_ase(fields: Mapping[str, Any], where: str) -> Frame:
    """A frame from the fields of an ``.aselmdb`` record; parameters and errors as in `frame_of_pyg`."""
    get = _Fields(fields, where)
    data = fields.get("data")
    extra = _Fields(data if isinstance(data, dict) else {}, where)
    z = get.elements("numbers")
    n = len(z)
    tags, pbc = get.array("tags", shape=(n,)), get.array("pbc", shape=(3,))
    return Frame(
        z=z,
        pos=get.needed("positions", (n, 3)),
        cell=get.needed("cell", (3, 3)),
        pbc=np.ones(3, dtype=bool) if pbc is None else pbc.astype(bool),
        energy=get.number("energy"),
        forces=get.array("forces", shape=(n, 3)),
        fixed=_fixed_of_constraints(fields.get("constraints"), n, where),
        tags=None if tags is None else tags.astype(np.int64),
        sid=extra.system("sid"),
        fid=extra.whole("fid"),
        reference=extra.number("ref_energy"),
    )


def _fixed_of_constraints(constraints: Any, n: int, where: str) -> np.ndarray:
    """Which atoms ASE's constraints fix."""
    fixed = np.zeros(n, dtype=bool)
    for item in constraints if isinstance(constraints, list) else []:
        kind = item.get("name") if isinstance(item, dict) else item
        if kind != "FixAtoms":
            raise FileFormatError(f"{where} has the constraint {str(kind)[:40]!r}; known is FixAtoms")
        kwargs = item.get("kwargs")
        indices = kwargs.get("indices") if isinstance(kwargs, dict) else None
        if not isinstance(indices, list) or not all(type(i) is int and -n <= i < n for i in indices):
            raise FileFormatError(f"{where} has a FixAtoms whose indices are no atoms of {n}")
        fixed[indices] = True
    return fixed


class _Fields:
    """Fields of a record, each checked when it is taken."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def _find(self, names: Sequence[str]) -> tuple[str, Any]:
        for name in names:
            if self.fields.get(name) is not None:
                return name, self.fields[name]
        return names[0], None

    def array(self, *names: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Numbers in this shape, float64; None if there are none. A leading dimension of 1 does not matter."""
        name, value = self._find(names)
        if value is None:
            return None
        if not isinstance(value, (np.ndarray, list)):
            raise FileFormatError(
                f"{self.where} has a field {name!r} of type {type(value).__name__}; needed are numbers"
            )
        found = np.asarray(value)
        if found.dtype.kind not in "biuf" or found.shape not in (shape, (1, *shape), (*shape, 1)):
            raise FileFormatError(
                f"{self.where} has a field {name!r} of shape {found.shape} and dtype {found.dtype}; needed are numbers {shape}"
            )
        return found.reshape(shape).astype(np.float64)

    def needed(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """As `array`, of a field that must be there."""
        found = self.array(name, shape=shape)
        if found is None:
            raise FileFormatError(
                f"{self.where} has no field {name!r}; it has {', '.join(map(str, self.fields))[:200]}"
            )
        return found

    def number(self, *names: str) -> float | None:
        """One number; None if there is none."""
        name, value = self._find(names)
        if value is None:
            return None
        found = np.asarray(value) if isinstance(value, (int, float, np.ndarray)) else np.zeros(0)
        if found.size != 1 or found.dtype.kind not in "biuf":
            raise FileFormatError(f"{self.where} has a field {name!r} that is no number")
        return float(found.reshape(()))

    def whole(self, *names: str) -> int | None:
        """One whole number; None if there is none."""
        found = self.number(*names)
        if found is not None and (not found.is_integer() or abs(found) > 2**53):
            raise FileFormatError(f"{self.where} has a field {names[0]!r} of {found}; needed is a whole number")
        return None if found is None else int(found)

    def system(self, name: str) -> int | None:
        """Number of a system, given as a number or as ``random<number>``."""
        value = self.fields.get(name)
        if isinstance(value, str):
            digits = value.removeprefix("random")
            if not re.fullmatch(r"[0-9]{1,18}", digits):
                raise FileFormatError(f"{self.where} has a field {name!r} of {value[:40]!r}; needed is random<number>")
            return int(digits)
        return self.whole(name)

    def elements(self, name: str) -> np.ndarray:
        """Atomic numbers, which older files have as floats."""
        value = self.fields.get(name)
        n = len(value) if isinstance(value, np.ndarray) and value.ndim else 0
        found = self.needed(name, (n,))
        bad = np.flatnonzero((found != np.rint(found)) | (found < 1) | (found > MAX_Z))
        if len(bad) or not n:
            what = f"atom {bad[0]} has {found[bad[0]]}" if len(bad) else "there are none"
            raise FileFormatError(f"{self.where}, field {name!r}: {what}; allowed are 1 to {MAX_Z}")
        return found.astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- columns


class ReferenceEnergies:
    """Energies of slab and gas in eV by system: 964,277 of them take 15 MB.

    Parameters
    ----------
    values : mapping
        From ``"random<sid>"``, or the number, to the energy.
    """

    def __init__(self, values: Mapping[Any, Any]) -> None:
        sids = np.empty(len(values), dtype=np.int64)
        energies = np.empty(len(values))
        for row, (key, value) in enumerate(values.items()):
            digits = str(key).removeprefix("random")
            if not digits.isdecimal() or isinstance(value, bool) or not isinstance(value, (int, float)):
                raise DataError(
                    f"reference energy {str(key)[:40]!r}: {str(value)[:40]!r}; needed is random<sid>: number"
                )
            sids[row], energies[row] = int(digits), value
        order = np.argsort(sids)
        self.sids, self.energies = sids[order], energies[order]

    def __len__(self) -> int:
        return len(self.sids)

    def get(self, sid: int | None) -> float | None:
        """Reference energy of a system; None if it has none."""
        row = int(np.searchsorted(self.sids, sid)) if sid is not None and len(self.sids) else len(self.sids)
        return float(self.energies[row]) if row < len(self.sids) and self.sids[row] == sid else None


def frames_dataset(
    frames: Sequence[Frame],
    *,
    energy: str,
    stored: str,
    reference: ReferenceEnergies | None = None,
    where: str = "",
    **options: Any,
) -> MolecularDataset:
    """Frames as a dataset, with the kind of energy that is wanted.

    Parameters
    ----------
    frames
        One or more.
    energy
        ``"adsorption"`` or ``"total"``: what is wanted.
    stored
        What the frames have.
    reference
        Reference energies of systems whose file does not have them.
    where
        Name of the file: for messages, and for ids where systems have no numbers.
    **options
        `name` and `card` of the dataset.

    Raises
    ------
    DataError
        If a frame has no reference energy, but needs one; or some frames have a label and others do not.
    """
    for name, value in (("energy", energy), ("stored", stored)):
        if value not in ENERGIES:
            raise ConfigError(f"{name}={value!r}; allowed are {', '.join(ENERGIES)}")
    if not frames:
        raise DataError(f"{where} holds no structures; needed is one or more")
    has = {name: _present(frames, name, where) for name in Frame.__dataclass_fields__}
    shifts = np.zeros(len(frames))
    if energy != stored and (has["energy"] or has["initial_energy"]):
        references = np.array([_reference_of(frame, reference, k, where) for k, frame in enumerate(frames)])
        shifts = -references if energy == "adsorption" else references
    counts = [len(frame.z) for frame in frames]
    targets, extras = {}, {}
    if has["energy"]:
        targets["energy"] = np.array([frame.energy for frame in frames]) + shifts
    if has["forces"]:
        targets["forces"] = np.concatenate([frame.forces for frame in frames])
    if has["tags"]:
        extras["tags"] = np.concatenate([frame.tags for frame in frames]).astype(np.int8)
    for name in ("sid", "fid"):
        if has[name]:
            extras[name] = np.array([getattr(frame, name) for frame in frames], dtype=np.int64)
    if has["initial_energy"]:
        extras["y_init"] = np.array([frame.initial_energy for frame in frames]) + shifts
    if has["relaxed_pos"]:
        extras["pos_relaxed"] = np.concatenate([frame.relaxed_pos for frame in frames])
    per_atom = {name: name in ("forces", "tags", "pos_relaxed") for name in (*targets, *extras)}
    return MolecularDataset(
        np.concatenate([frame.z for frame in frames]),
        np.concatenate([frame.pos for frame in frames]),
        np.concatenate([[0], np.cumsum(counts)]),
        targets=targets,
        extras=extras,
        cell=np.stack([frame.cell for frame in frames]),
        pbc=np.stack([frame.pbc for frame in frames]),
        fixed=np.concatenate([frame.fixed for frame in frames]) if has["fixed"] else None,
        ids=[_id_of(frame, k, where) for k, frame in enumerate(frames)],
        per_atom=per_atom,
        **options,
    )


def _present(frames: Sequence[Frame], name: str, where: str) -> bool:
    """Whether frames have this; all or none. Reference energies may be missing here and there."""
    has = [getattr(frame, name) is not None for frame in frames]
    if any(has) and not all(has) and name != "reference":
        raise DataError(f"{where}: structure {has.index(False)} has no {name}, but others have; all must have it")
    return all(has)


def _reference_of(frame: Frame, table: ReferenceEnergies | None, number: int, where: str) -> float:
    """Reference energy of a frame's system: its file's, or else the table's."""
    found = frame.reference
    if found is None and table is not None:
        found = table.get(frame.sid)
    if found is None:
        system = "unknown" if frame.sid is None else f"random{frame.sid}"
        raise DataError(
            f"{where}: structure {number} (system {system}) has no reference energy, so that its total energy and its "
            "adsorption energy cannot be converted into each other: give reference= (such as oc20_ref.pkl), or take the "
            "energies as they are (energy='total' for raw totals, or stored= if the file holds the other kind)"
        )
    return found


def _id_of(frame: Frame, number: int, where: str) -> str:
    """``<sid>_<fid>`` as in submissions; ``<sid>`` for IS2RE; else file and number."""
    if frame.sid is None:
        return f"{where.rpartition('/')[2]}:{number}"
    return f"{frame.sid}" if frame.fid is None else f"{frame.sid}_{frame.fid}"
