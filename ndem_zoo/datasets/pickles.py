"""Pickled PyG records and torch's files, read as data: a pickle machine of our own that can call nothing.

Legacy OC20 files are pickles of `torch_geometric` objects, whose tensors are pickles inside of pickles. Python's `pickle`
and `torch.load` execute what such files say; this machine knows the names of `ALLOWED` only, gives them its own inert
meaning, calls nothing of torch, numpy or PyG, and checks each size against the bytes that are there. Files are opened in
`lmdb_files.py`; what the fields mean is known to `oc20.py`.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ndem_zoo.errors import FileFormatError

#: Classes of PyG 1 and 2 that may appear; they become a `Record` without behavior.
_RECORDS = (
    *(("torch_geometric.data.data", name) for name in ("Data", "DataEdgeAttr", "DataTensorAttr")),
    *(("torch_geometric.data.storage", name) for name in ("GlobalStorage", "BaseStorage")),
)

#: Storages of torch by the dtype of their numbers; bfloat16 has no dtype in numpy and is widened.
_STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": "<f8",
        "Float": "<f4",
        "Half": "<f2",
        "BFloat16": "bf16",
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "|i1",
        "Byte": "|u1",
        "Bool": "|b1",
    }.items()
}

#: Dtypes of numpy that may appear, without byte order.
_DTYPES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())

#: How a file of torch's old format begins: magic number, version of the protocol.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

#: Choice: no array here has more dimensions, and no number more bytes or digits.
_MAX_DIMENSIONS, _MAX_INTEGER = 8, 64

#: Choice: bytes that all calls together may work on, in units of the pickle's size; honest pickles use theirs once.
_BUDGET = 4

#: What keys of a dict may be. Pitfall: hashing nested tuples recurses in C, and deep ones would crash the process.
_KEYS = (str, int, float, bytes, type(None))


class Record:
    """An object of PyG, of which only the fields are left."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[str, Any] = {}


class DictRecord(Record):
    """An object of a class that may be a dict, of which only items and fields are left; what it was made of is not kept."""

    __slots__ = ("entries",)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.entries: dict[Any, Any] = {}


class _Name:
    """A name in a pickle that is allowed: what it makes of its arguments, if it can be called."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable[..., Any] | None) -> None:
        self.name, self.call = name, call


class _Dtype:
    """A dtype of numpy, whose byte order is set afterwards."""

    __slots__ = ("order", "text")

    def __init__(self, text: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(text, str) or text not in _DTYPES:
            raise FileFormatError(f"has a numpy.dtype that is not one of {', '.join(sorted(_DTYPES))}")
        self.text, self.order = text, "|"

    def set_state(self, state: Any) -> None:
        """Byte order, from ``(version, order, None, ...)``; nothing else can be set."""
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", ">", "|", "=")):
            raise FileFormatError("has a numpy.dtype with a state that plain numbers do not have")
        if any(part is not None for part in state[2:5]):
            raise FileFormatError("has a structured numpy.dtype; allowed are plain numbers")
        self.order = state[1]

    @property
    def value(self) -> np.dtype:
        return np.dtype(self.order + self.text)


class _Array:
    """An array of numpy, whose content is set afterwards."""

    __slots__ = ("value",)

    def __init__(self, *arguments: Any) -> None:
        self.value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """Content from ``(version, shape, dtype, is_fortran, bytes)``."""
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype)):
            raise FileFormatError("has a numpy array with a state that arrays of numbers do not have")
        _, shape, dtype, is_fortran, raw = state
        count = _product(shape)
        if not isinstance(raw, bytes) or len(raw) != count * dtype.value.itemsize:
            raise FileFormatError(f"has a numpy array of {count} numbers whose bytes do not fit")
        flat = np.frombuffer(raw, dtype.value)
        self.value = flat.reshape(shape, order="F" if is_fortran else "C")


def _scalar(dtype: Any, raw: Any) -> Any:
    """A number of numpy's as one of Python's."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or len(raw) != dtype.value.itemsize:
        raise FileFormatError("has a numpy scalar whose bytes do not fit its dtype")
    return np.frombuffer(raw, dtype.value)[0].item()


def _ordered_dict(*arguments: Any) -> dict:
    """The hooks of a tensor: there are none."""
    if arguments and arguments != ([],):
        raise FileFormatError("has a collections.OrderedDict with content; tensors have empty ones")
    return {}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> np.ndarray:
    """A tensor as a view of its storage, if every number of it is in its storage."""
    if not isinstance(storage, np.ndarray):
        raise FileFormatError("has a tensor without a storage")
    count = _product(size)
    if not isinstance(stride, tuple) or len(stride) != len(size) or not all(map(_is_count, (offset, *stride))):
        raise FileFormatError("has a tensor with strides or an offset that are no whole numbers from 0 on")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    if count and (last >= len(storage) or count > len(storage)):
        raise FileFormatError(f"has a tensor of {count} numbers up to number {last} of a storage of {len(storage)}")
    if not count:
        return np.zeros(size, dtype=storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    # Not copied: a pickle that makes the same tensor a million times must not fill the memory.
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _product(shape: Any) -> int:
    """How many numbers an array of this shape has."""
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise FileFormatError("has an array whose shape is no tuple of at most 8 whole numbers from 0 on")
    count = 1
    for n in shape:
        count *= n
    return count


def _storage(raw: Any) -> np.ndarray:
    """The numbers in a file of torch's old format: four pickles, a list of keys, and bytes."""
    if not isinstance(raw, bytes):
        raise FileFormatError("has a tensor whose storage is not bytes")
    magic, position = _Machine(raw, {}).run(0)
    version, position = _Machine(raw, {}).run(position)
    system, position = _Machine(raw, {}).run(position)
    if (
        magic != _MAGIC
        or version != _PROTOCOL
        or not isinstance(system, dict)
        or system.get("little_endian") is not True
    ):
        raise FileFormatError("has a tensor whose storage is not in torch's old format")
    machine = _Machine(raw, _STORAGE_NAMES, persistent=True)
    found, position = machine.run(position)
    keys, position = _Machine(raw, {}).run(position)
    if not isinstance(found, tuple) or len(found) != 6 or found[0] != "storage" or not isinstance(found[1], _Name):
        raise FileFormatError("has a tensor whose storage is something else")
    _, kind, key, _, count, view = found
    if view is not None or keys != [key] or not _is_count(count):
        raise FileFormatError("has a tensor whose storage is a part of another one")
    return _numbers(raw, position, count, _STORAGES["torch", kind.name.rpartition(".")[2]])


def _numbers(raw: bytes, position: int, count: int, dtype: str) -> np.ndarray:
    """`count` numbers, which must be all that is left, after their count."""
    size = 2 if dtype == "bf16" else np.dtype(dtype).itemsize
    if len(raw) - position != 8 + count * size or int.from_bytes(raw[position : position + 8], "little") != count:
        raise FileFormatError(
            f"has a storage that claims {count} numbers of {size} bytes; it has {len(raw) - position - 8}"
        )
    if dtype != "bf16":
        return np.frombuffer(raw, dtype, offset=position + 8)
    return (np.frombuffer(raw, "<u2", offset=position + 8).astype("<u4") << 16).view("<f4")


def _record_maker(name: str) -> Callable[[], Record]:
    return lambda: Record(name)


#: Every name that a pickle may mention, and what it means here. Nothing is looked up anywhere else.
ALLOWED: dict[tuple[str, str], _Name] = {
    (module, name): _Name(f"{module}.{name}", call)
    for (module, name), call in {
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("collections", "OrderedDict"): _ordered_dict,
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): None,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        **{key: _record_maker(key[1]) for key in _RECORDS},
    }.items()
}

_STORAGE_NAMES = {key: _Name(f"{key[0]}.{key[1]}", None) for key in _STORAGES}

#: What damaged pickles make Python raise in here.
_BROKEN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)

#: Opcodes that are refused, by what they would do.
_REFUSED = {
    ord("P"): "PERSID",
    ord("Q"): "BINPERSID",
    ord("i"): "INST",
    ord("o"): "OBJ",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x92: "NEWOBJ_EX",
    0x96: "BYTEARRAY8",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}


def read_pickle(data: bytes) -> Any:
    """The object in a pickle of numbers, strings, tensors, arrays and PyG records.

    Parameters
    ----------
    data
        The pickle.

    Returns
    -------
    value
        Tensors and arrays as numpy arrays, PyG's objects as `Record`, the rest as Python's own.

    Raises
    ------
    FileFormatError
        If the pickle mentions a name that is not in `ALLOWED`, uses an instruction that data do not need, claims sizes
        that are not there, or is truncated. The message goes on after the name of a file or key.
    """
    value, end = _Machine(data, ALLOWED).run(0)
    if end != len(data):
        raise FileFormatError(f"has {len(data) - end} bytes behind the end of its pickle")
    return value.value if isinstance(value, _Array) else value


def read_record(data: bytes) -> dict[str, Any]:
    """The fields of a pickled `torch_geometric.data.Data`, of PyG 1 or 2; parameters and errors as in `read_pickle`."""
    value = read_pickle(data)
    if not isinstance(value, Record) or value.name != "Data":
        raise FileFormatError(f"holds {type(value).__name__}; needed is a torch_geometric.data.Data")
    fields = value.fields
    store = fields.get("_store")
    if isinstance(store, Record):
        fields = store.fields.get("_mapping")
        if not isinstance(fields, dict):
            raise FileFormatError("holds a torch_geometric.data.Data whose storage has no fields")
    plain = {name: field.value if isinstance(field, _Array) else field for name, field in fields.items()}
    return {
        name: field
        for name, field in plain.items()
        if isinstance(name, str)
        and field is not None
        and name != "__num_nodes__"
        and not isinstance(field, (Record, _Name))
    }


def read_plain(data: bytes) -> Any:
    """The numbers, strings, lists and dicts in a pickle that may mention no name at all; see `read_pickle`."""
    value, end = _Machine(data, {}).run(0)
    if end != len(data):
        raise FileFormatError(f"has {len(data) - end} bytes behind the end of its pickle")
    return value


#: Libraries whose classes appear in checkpoints of trainings: they become a `DictRecord`, whatever they are.
_TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric", "torchmdnet", "torchmetrics", "omegaconf", "pathlib")

#: The same for single names, by module.
_INERT: dict[str, tuple[str, ...]] = {
    "argparse": ("Namespace",),
    "collections": ("OrderedDict", "defaultdict", "Counter", "deque"),
    "torch": ("Size", "device", *(f"{kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64))),
    **dict.fromkeys(
        ("builtins", "__builtin__"), ("dict", "list", "tuple", "set", "frozenset", "int", "float", "bool", "str")
    ),
}


class _ArchiveNames(dict):
    """What a file of torch may mention: tensors, numpy's numbers, and classes of trainers, which become records."""

    def get(self, key: tuple[str, str], default: Any = None) -> Any:
        """The meaning of a name; None if it is not allowed."""
        found = super().get(key)
        module, name = key
        is_inert = module.partition(".")[0] in _TRAINERS or module.startswith("torch.optim.")
        if found is None and (is_inert or name in _INERT.get(module, ())):
            title = f"{module}.{name}"
            found = self[key] = _Name(title, lambda *arguments: DictRecord(title))
        return found


def read_torch_file(path: str | os.PathLike) -> Any:
    """The object in a file that `torch.save` wrote, without torch and without executing anything that is in it.

    Parameters
    ----------
    path
        A file of torch's zip format (torch 1.6 and later).

    Returns
    -------
    value
        Tensors as read-only numpy arrays (bfloat16 widened to float32), ordered dicts and objects of trainers as `DictRecord`,
        the rest as Python's own.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If it is no such file, is truncated, claims sizes that are not there, or mentions a name that data do not need.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, path.stat().st_size).read()
    except FileFormatError as error:
        raise FileFormatError(f"{path} {error}") from error
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise FileFormatError(
            f"{path} is damaged, or no zip file as torch 1.6 and later write it ({error}); what an older torch wrote has to be "
            "loaded and saved again there"
        ) from error


class _Archive:
    """An open file of torch: one pickle, and the numbers of its tensors in parts of their own."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        members = archive.infolist()
        # Without compression and overlap nothing is larger in memory than on the disk.
        is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not is_stored or sum(member.file_size for member in members) > size:
            raise FileFormatError("has compressed or overlapping parts, which torch does not write")
        roots = [m.filename.removesuffix("data.pkl") for m in members if m.filename.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise FileFormatError(f"has {len(roots)} parts named data.pkl; a file of torch has one")
        self.archive, self.root, self.parts = archive, roots[0], frozenset(archive.namelist())
        order = f"{self.root}byteorder"
        if order in self.parts and archive.read(order) != b"little":
            raise FileFormatError("has numbers that are not little-endian")
        self.storages: dict[str, np.ndarray] = {}

    def read(self) -> Any:
        """The object."""
        pickled = self.archive.read(f"{self.root}data.pkl")
        value, end = _Machine(pickled, self.names(), persistent=True).run(0)
        if end != len(pickled):
            raise FileFormatError(f"has {len(pickled) - end} bytes behind the end of its pickle")
        return value

    def names(self) -> _ArchiveNames:
        """What the pickle may mention."""
        known = _ArchiveNames(
            {key: name for key, name in ALLOWED.items() if key[0].startswith("numpy")} | _STORAGE_NAMES
        )
        makers = {"_rebuild_tensor": self.tensor, "_rebuild_tensor_v2": self.tensor, "_rebuild_parameter": _first}
        known |= {("torch._utils", name): _Name(f"torch._utils.{name}", call) for name, call in makers.items()}
        known["_codecs", "encode"] = _Name("_codecs.encode", _bytes)
        return known

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> np.ndarray:
        """A view of a storage."""
        return _tensor(self.storage(storage), offset, size, stride)

    def storage(self, found: Any) -> np.ndarray:
        """The numbers that a persistent id names."""
        if not isinstance(found, tuple) or len(found) != 5 or found[0] != "storage" or not isinstance(found[1], _Name):
            raise FileFormatError("has a tensor without a storage")
        _, kind, key, _, count = found
        dtype = _STORAGES.get(tuple(kind.name.rsplit(".", 1)))
        if dtype is None or not isinstance(key, str) or not _is_count(count):
            raise FileFormatError(f"has a tensor whose storage is a {kind.name[:100]}")
        if key not in self.storages:
            part = f"{self.root}data/{key}"
            if part not in self.parts:
                raise FileFormatError(f"lacks its part {part[:200]!r}, the numbers of a tensor")
            raw = self.archive.read(part)
            self.storages[key] = _numbers(count.to_bytes(8, "little") + raw, 0, count, dtype)
        if len(self.storages[key]) != count:
            raise FileFormatError("has a storage of two sizes")
        return self.storages[key]


def _bytes(text: Any, encoding: Any) -> bytes:
    """Bytes, which protocol 2 of pickle writes as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise FileFormatError("has bytes that are not written as text in latin1")
    return text.encode("latin1")


def _first(value: Any, *others: Any) -> Any:
    """A parameter is its tensor."""
    return value


class _Machine:
    """Executes pickle's instructions, as far as they make data.

    Parameters
    ----------
    data
        Bytes that hold a pickle, and perhaps more.
    names
        Names that may be mentioned.
    persistent
        Whether ``BINPERSID`` is allowed; it leaves its tuple as it is.
    """

    def __init__(self, data: bytes, names: dict[tuple[str, str], _Name], persistent: bool = False) -> None:
        self.data, self.names, self.persistent = data, names, persistent

    def run(self, start: int) -> tuple[Any, int]:
        """The object of the pickle that begins at `start`, and where it ends."""
        self.position = start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = _BUDGET * len(self.data)
        try:
            while True:
                code = self.data[self.position]
                self.position += 1
                if code == 0x2E:  # STOP
                    if self.marks or len(self.stack) != 1:
                        raise FileFormatError("is a damaged pickle: something is left over at its end")
                    return self.stack.pop(), self.position
                action = _ACTIONS.get(code)
                if action is not None:
                    action(self)
                elif code == 0x51 and self.persistent:  # BINPERSID
                    if not isinstance(self.stack[-1], tuple):
                        raise FileFormatError("has a persistent id that is no tuple")
                else:
                    name = _REFUSED.get(code, f"0x{code:02x}")
                    raise FileFormatError(
                        f"uses the pickle instruction {name}, which data do not need; it is not executed"
                    )
        except _BROKEN as error:
            if isinstance(error, FileFormatError):
                raise
            reason = f"{type(error).__name__} at byte {self.position}"
            raise FileFormatError(f"is a damaged or truncated pickle ({reason})") from error

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self.position + size
        if end > len(self.data):
            raise FileFormatError(
                f"is truncated: an instruction claims {size} bytes, {len(self.data) - self.position} are left"
            )
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def number(self, size: int, signed: bool = False) -> int:
        """The next `size` bytes as an integer."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self, encoding: str = "utf-8") -> str:
        """Text up to the end of the line."""
        end = self.data.index(b"\n", self.position)
        text = self.data[self.position : end].decode(encoding)
        self.position = end + 1
        return text

    def since_mark(self) -> list[Any]:
        """What was put on the stack since the last mark, taken off."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def pop(self) -> Any:
        """What is on top of the stack, taken off; nothing below the last mark."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise FileFormatError("is a damaged pickle: it takes from below a mark")
        return self.stack.pop()

    def find(self, module: Any, name: Any) -> None:
        """Put a name on the stack, if it is allowed."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise FileFormatError("mentions a name that is no text")
        found = self.names.get((module, name))
        if found is None:
            where = " inside of a tensor" if self.names is _STORAGE_NAMES else ""
            raise FileFormatError(
                f"mentions {f'{module}.{name}'[:200]!r}{where}, which data do not need: the file may be an attack. Nothing of "
                "it was executed"
            )
        self.stack.append(found)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.find(module, name)

    def reduce(self) -> None:
        """Call one of our own functions, or make a record."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or function.call is None or not isinstance(arguments, tuple):
            what = function.name if isinstance(function, _Name) else type(function).__name__
            raise FileFormatError(f"calls {what}, which cannot be called")
        self.budget -= sum(len(item) for item in arguments if isinstance(item, (bytes, str)))
        if self.budget < 0:
            raise FileFormatError("makes the same tensors over and over")
        self.stack.append(function.call(*arguments))

    def build(self) -> None:
        """Set the state of one of our own objects."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Record):
            if not isinstance(state, dict) and not isinstance(target, DictRecord):
                raise FileFormatError(f"has a {target.name} whose state is no dict")
            target.fields.update(state if isinstance(state, dict) else {})
        elif isinstance(target, (_Dtype, _Array)):
            target.set_state(state)
        else:
            raise FileFormatError(f"sets the state of a {type(target).__name__}, which has none")

    def set_items(self, target: Any, items: list[Any]) -> None:
        target = target.entries if isinstance(target, DictRecord) else target
        if type(target) is not dict or len(items) % 2:
            raise FileFormatError(f"sets items of a {type(target).__name__}")
        if not all(isinstance(key, (*_KEYS, _Name)) for key in items[::2]):
            raise FileFormatError("has a dict with keys that are neither text nor numbers")
        target.update(zip(items[::2], items[1::2], strict=True))

    def append_all(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, DictRecord):
            return
        if type(target) is not list:
            raise FileFormatError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def protocol(self) -> None:
        version = self.number(1)
        if version > 5:
            raise FileFormatError(f"is a pickle of protocol {version}; known are 0 to 5")

    def long_text(self) -> int:
        """An integer in digits."""
        text = self.line()
        if len(text) > _MAX_INTEGER:
            raise FileFormatError(f"has an integer of {len(text)} digits")
        return int(text.rstrip("L"))

    def text_int(self) -> Any:
        """An integer in digits; ``00`` and ``01`` are False and True."""
        text = self.line()
        if text in ("00", "01"):
            return text == "01"
        if len(text) > _MAX_INTEGER:
            raise FileFormatError(f"has an integer of {len(text)} digits")
        return int(text)

    def long_bytes(self, size: int) -> int:
        """An integer in bytes."""
        if size > _MAX_INTEGER:
            raise FileFormatError(f"has an integer of {size} bytes")
        return self.number(size, signed=True)

    def text(self, size: int) -> str:
        return self.take(size).decode("utf-8", "surrogatepass")


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    """An instruction that puts something on the stack."""

    def action(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return action


def _tuple(size: int) -> Callable[[_Machine], None]:
    """An instruction that makes a tuple of the `size` uppermost objects."""

    def action(machine: _Machine) -> None:
        items = [machine.pop() for _ in range(size)]
        machine.stack.append(tuple(reversed(items)))

    return action


def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))


def _dict(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    machine.set_items(machine.stack[-1], items)


def _append(machine: _Machine) -> None:
    item = machine.pop()
    machine.append_all(machine.stack[-1], [item])


def _appends(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.append_all(machine.stack[-1], items)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _set_items(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.set_items(machine.stack[-1], items)


def _put(number: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    """An instruction that remembers what is on top of the stack; a dict, so that large numbers cost nothing."""

    def action(machine: _Machine) -> None:
        machine.memo[number(machine)] = machine.stack[-1]

    return action


#: Pickle's instructions by their codes: the ones that make data, and those that call what is allowed.
_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: lambda m: m.take(8) and None,  # FRAME: a length that only buffered readers need
    ord("("): _mark,
    ord("0"): lambda m: m.pop() and None,
    ord("1"): lambda m: m.since_mark() and None,
    ord("2"): _push(lambda m: m.stack[-1]),
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("I"): _push(_Machine.text_int),
    ord("L"): _push(_Machine.long_text),
    ord("J"): _push(lambda m: m.number(4, signed=True)),
    ord("K"): _push(lambda m: m.number(1)),
    ord("M"): _push(lambda m: m.number(2)),
    0x8A: _push(lambda m: m.long_bytes(m.number(1))),
    0x8B: _push(lambda m: m.long_bytes(m.number(4))),
    ord("F"): _push(lambda m: float(m.line())),
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    ord("U"): _push(lambda m: m.take(m.number(1)).decode("latin1")),
    ord("T"): _push(lambda m: m.take(m.number(4)).decode("latin1")),
    ord("V"): _push(lambda m: m.line("raw-unicode-escape")),
    ord("X"): _push(lambda m: m.text(m.number(4))),
    0x8C: _push(lambda m: m.text(m.number(1))),
    0x8D: _push(lambda m: m.text(m.number(8))),
    ord("B"): _push(lambda m: m.take(m.number(4))),
    ord("C"): _push(lambda m: m.take(m.number(1))),
    0x8E: _push(lambda m: m.take(m.number(8))),
    ord(")"): _push(lambda m: ()),
    ord("t"): _push(lambda m: tuple(m.since_mark())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("]"): _push(lambda m: []),
    ord("l"): _push(_Machine.since_mark),
    ord("a"): _append,
    ord("e"): _appends,
    ord("}"): _push(lambda m: {}),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): _set_items,
    ord("c"): lambda m: m.find(m.line(), m.line()),
    0x93: _Machine.stack_global,
    ord("R"): _Machine.reduce,
    0x81: _Machine.reduce,  # NEWOBJ: our classes are made by calling them
    ord("b"): _Machine.build,
    ord("p"): _put(_Machine.text_int),
    ord("q"): _put(lambda m: m.number(1)),
    ord("r"): _put(lambda m: m.number(4)),
    0x94: _put(lambda m: len(m.memo)),
    ord("g"): _push(lambda m: m.memo[m.text_int()]),
    ord("h"): _push(lambda m: m.memo[m.number(1)]),
    ord("j"): _push(lambda m: m.memo[m.number(4)]),
}
