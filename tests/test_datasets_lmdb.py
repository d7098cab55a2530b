"""LMDB files: genuine ones, and more than 40 that were made to execute, crash, or fill the memory."""

from __future__ import annotations

import builtins
import collections
import contextlib
import decimal
import io
import multiprocessing
import os
import pickle
import struct
import subprocess
import time
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from oc20_files import ase_record, fake_pyg, pyg_fields, pyg_pickle, write_lmdb, write_pyg_lmdb

from ndem_zoo.datasets.lmdb_files import MAX_JSON, LmdbRecords
from ndem_zoo.datasets.lmdb_pages import PagedFile
from ndem_zoo.datasets.pickles import ALLOWED, read_pickle, read_plain, read_record
from ndem_zoo.errors import FileFormatError

pytest.importorskip("lmdb")


# -------------------------------------------------------------------------------------------------------- honest files


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("is_old", [False, True])
def test_records_come_back(tmp_path, generation, is_old):
    records = [pyg_fields(n, n, is_old=is_old) for n in (3, 5, 4)]
    found = LmdbRecords(write_pyg_lmdb(tmp_path / "data.lmdb", records, generation))
    assert len(found) == 3
    for record, expected in zip(found.records(), records, strict=True):
        assert set(record) == set(expected)
        for name, value in expected.items():
            plain = value.numpy() if isinstance(value, torch.Tensor) else value
            np.testing.assert_array_equal(record[name], plain, err_msg=name)
            assert not isinstance(plain, np.ndarray) or record[name].dtype == plain.dtype


def test_keys_are_in_the_order_of_their_numbers(tmp_path):
    records = [pyg_fields(3, k, fid=k) for k in range(23)]
    found = LmdbRecords(write_pyg_lmdb(tmp_path / "data.lmdb", records, length=False))
    assert [record["fid"] for record in found.records()] == list(range(23))
    assert [record["fid"] for record in found.records(9, 12)] == [9, 10, 11]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12).reshape(3, 4)[1:, ::2],
        torch.arange(6.0)[4:],
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.ones(2, 3, dtype=torch.bfloat16) * 1.25,
        torch.ones(3, dtype=torch.float16),
        torch.tensor([True, False]),
        torch.tensor([-5, 7], dtype=torch.int8),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_tensors_of_every_kind(tensor):
    found = read_record(pyg_pickle({"x": tensor}))["x"]
    np.testing.assert_array_equal(found, tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_numpy_arrays_and_scalars(protocol):
    values = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.float32(1.5),
        np.int64(-3),
    ]
    for value in values:
        if protocol == 5 and isinstance(value, np.ndarray):
            continue  # protocol 5 needs a name of numpy's that no file of PyG has
        found = read_pickle(pickle.dumps(value, protocol=protocol))
        np.testing.assert_array_equal(found, value)
    assert read_pickle(pickle.dumps(np.arange(3, dtype=">i4"), protocol=4)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(protocol):
    value = {
        "a": [1, -2, 3**30, 2.5, None, True, False, "é\n", (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}],
        "b": 70000,
    }
    value["again"] = value["a"]
    found = read_plain(pickle.dumps(value, protocol=protocol))
    assert found == value
    assert found["again"] is found["a"]


def test_only_these_names_are_known():
    """Whoever adds one must think about it here too."""
    names = {f"{module}.{name}" for module, name in ALLOWED}
    assert names == {
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes",
        "collections.OrderedDict",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "torch_geometric.data.data.Data",
        "torch_geometric.data.data.DataEdgeAttr",
        "torch_geometric.data.data.DataTensorAttr",
        "torch_geometric.data.storage.GlobalStorage",
        "torch_geometric.data.storage.BaseStorage",
    }
    for value in ALLOWED.values():
        assert value.call is None or value.call.__module__ == "ndem_zoo.datasets.pickles"


def read_in_child(records: LmdbRecords, queue: multiprocessing.Queue) -> None:
    queue.put(records[1]["fid"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_the_same_file(tmp_path, method):
    records = LmdbRecords(write_pyg_lmdb(tmp_path / "data.lmdb", [pyg_fields(3, k, fid=k) for k in range(3)]))
    assert records[0]["fid"] == 0  # open in this process
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=read_in_child, args=(records, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [1, 1]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert records[2]["fid"] == 2


def test_a_file_may_be_open_twice(tmp_path):
    path = write_pyg_lmdb(tmp_path / "data.lmdb", [pyg_fields(3, k, fid=k) for k in range(3)])
    first, second = LmdbRecords(path), LmdbRecords(path)
    assert first[1]["fid"] == second[1]["fid"] == 1
    first.close()
    assert second[2]["fid"] == 2
    assert first[0]["fid"] == 0


# ------------------------------------------------------------------------------------------------------- hostile pickles


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage_bytes(values: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(
        torch.storage.TypedStorage(wrap_storage=values.untyped_storage(), dtype=values.dtype, _internal=True),
        file,
        _use_new_zipfile_serialization=False,
    )
    return file.getvalue()


def tensor(offset: bytes, size: bytes, stride: bytes, storage: bytes | None = None) -> bytes:
    """A tensor of a storage of 12 float32."""
    storage = storage_bytes(torch.arange(12.0)) if storage is None else storage
    load = name("torch.storage", "_load_from_bytes") + raw(storage) + b"\x85R"
    hooks = name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + load + offset + size + stride + b"\x89" + hooks + b"tR"


def record(value: bytes) -> bytes:
    """A `Data` of PyG 1 with one field."""
    return b"\x80\x05" + name("torch_geometric.data.data", "Data") + b")\x81}" + text("pos") + value + b"sb."


def dtype(code: str) -> bytes:
    return name("numpy", "dtype") + text(code) + b"\x85R"


def executing(canary: str) -> dict[str, bytes]:
    """Pickles that Python's own machine would execute: each makes the file `canary`."""
    source = f"open({canary!r}, 'w').close()"
    dump = lambda value: pickle.dumps(value, protocol=4)
    nested = dump(Call(os.system, f"touch {canary}"))
    zipped = io.BytesIO()
    torch.save(Call(os.system, f"touch {canary}"), zipped)
    with fake_pyg() as pyg:
        inside = pickle.dumps(pyg.data.Data(pos=Call(os.system, f"touch {canary}")), protocol=4)
        state = pickle.dumps(pyg.data.Data(_store=Call(eval, source)), protocol=4)
    load = name("torch.storage", "_load_from_bytes")
    return {
        "os.system": dump(Call(os.system, f"touch {canary}")),
        "eval": dump(Call(eval, source)),
        "exec": dump(Call(exec, source)),
        "exec through getattr": dump(Call(getattr, builtins, "exec")).replace(b".", b"")
        if False
        else dump_getattr(source),
        "subprocess": dump(Call(subprocess.call, ["touch", canary])),
        "os.system as a field": inside,
        "eval as the state": state,
        "nested in a storage": record(load + raw(nested) + b"\x85R"),
        "nested behind the magic number": record(load + raw(storage_bytes(torch.zeros(1))[:100] + nested) + b"\x85R"),
        "nested zip": record(load + raw(zipped.getvalue()) + b"\x85R"),
        "nested instead of the storage": record(load + raw(hijacked_storage(nested)) + b"\x85R"),
        "INST": b"(" + text(f"touch {canary}") + b"ios\nsystem\n.",
        "OBJ": b"(" + b"cos\nsystem\n" + text(f"touch {canary}") + b"o.",
        "NEWOBJ_EX": b"\x80\x04"
        + name("subprocess", "Popen")
        + b"(]"
        + text("touch")
        + b"a"
        + text(canary)
        + b"at}\x92.",
        "second pickle": pyg_pickle({"x": 1}) + nested,
    }


def dump_getattr(source: str) -> bytes:
    """``getattr(__import__("builtins"), "exec")(source)``."""
    module = name("builtins", "__import__") + text("builtins") + b"\x85R"
    function = name("builtins", "getattr") + module + text("exec") + b"\x86R"
    return b"\x80\x04" + function + text(source) + b"\x85R."


def hijacked_storage(payload: bytes) -> bytes:
    """A storage file whose third pickle is the payload."""
    plain = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001)]
    return b"".join(plain) + payload


EXECUTING = sorted(executing("x"))


@pytest.mark.parametrize("attack", EXECUTING)
def test_nothing_is_executed(tmp_path, attack):
    canary = tmp_path / "canary"
    payload = executing(str(canary))[attack]
    records = LmdbRecords(write_lmdb(tmp_path / "data.lmdb", {b"0": pyg_pickle({"x": 1}), b"1": payload}))
    assert records[0] == {"x": 1}
    with pytest.raises(FileFormatError, match=r"data\.lmdb: key '1' ") as caught:
        records[1]
    assert not canary.exists()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("attack", ["os.system", "eval", "exec", "exec through getattr", "subprocess", "INST", "OBJ"])
def test_the_attacks_are_real(tmp_path, attack):
    """Else the test above would prove nothing."""
    canary = tmp_path / "canary"
    pickle.loads(executing(str(canary))[attack])
    for _ in range(100):  # Popen does not wait
        if canary.exists():
            return
        time.sleep(0.02)
    raise AssertionError("the payload did nothing")


#: Pickles that crash, fill the memory or read foreign memory if they are believed; and what the error must name.
DAMAGING = {
    "unknown class": (pickle.dumps(decimal.Decimal(1)), "decimal.Decimal"),
    "sibling in torch": (b"\x80\x04" + name("torch._utils", "_import_dotted_name") + b".", "_import_dotted_name"),
    "sibling in numpy": (b"\x80\x04" + name("numpy.core.multiarray", "fromfile") + b".", "fromfile"),
    "sibling in torch.storage": (b"\x80\x04" + name("torch.storage", "os") + b".", "torch.storage.os"),
    "dotted name": (b"\x80\x04" + name("collections", "OrderedDict.__init__.__globals__") + b".", "__globals__"),
    "dotted module": (b"\x80\x04" + name("collections.OrderedDict", "__init__") + b".", "__init__"),
    "name that is no text": (b"\x80\x04" + integer(1) + text("x") + b"\x93.", "no text"),
    "extension code": (b"\x80\x02\x82\x01.", "EXT1"),
    "extension code of 4 bytes": (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
    "persistent id": (b"Psomething\n.", "PERSID"),
    "binary persistent id": (b"\x80\x02" + text("x") + b"Q.", "BINPERSID"),
    "state of a dict": (b"\x80\x04" + name("collections", "OrderedDict") + b")R}b.", "dict"),
    "state of a function": (b"\x80\x04" + name("torch._utils", "_rebuild_tensor_v2") + b"}b.", "state"),
    "state of a record that is no dict": (
        b"\x80\x04" + name("torch_geometric.data.data", "Data") + b")\x81Nb.",
        "state",
    ),
    "state of a class": (b"\x80\x04" + name("torch_geometric.data.data", "Data") + b"}b.", "state"),
    "ordered dict with content": (
        b"\x80\x04" + name("collections", "OrderedDict") + b"]K\x01K\x02\x86a\x85R.",
        "OrderedDict",
    ),
    "array made by hand": (b"\x80\x04" + name("numpy", "ndarray") + numbers(2**30, 2**30) + b"\x85R.", "ndarray"),
    "numpy dtype of objects": (b"\x80\x04" + dtype("O") + b".", "numpy.dtype"),
    "numpy dtype of fields": (
        b"\x80\x04" + dtype("f8") + b"(K\x03" + text("<") + b"NN}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        "structured",
    ),
    "numpy scalar of too few bytes": (
        b"\x80\x04" + name("numpy.core.multiarray", "scalar") + dtype("f8") + raw(b"abc") + b"\x86R.",
        "scalar",
    ),
    "numpy array of too few bytes": (
        b"\x80\x04"
        + name("numpy.core.multiarray", "_reconstruct")
        + b")R(K\x01"
        + numbers(1000, 1000)
        + dtype("f8")
        + b"\x89"
        + raw(b"abc")
        + b"tb.",
        "bytes do not fit",
    ),
    "tensor behind its storage": (record(tensor(integer(0), numbers(4, 4), numbers(4, 1))), "16 numbers"),
    "offset behind the storage": (record(tensor(integer(10), numbers(3), numbers(1))), "up to number 12"),
    "strides behind the storage": (record(tensor(integer(0), numbers(2, 2), numbers(1000000, 1))), "1000001"),
    "negative strides": (record(tensor(integer(0), numbers(3), numbers(-4))), "strides"),
    "negative offset": (record(tensor(integer(-8), numbers(3), numbers(1))), "strides or an offset"),
    "tensor without end": (record(tensor(integer(0), numbers(2**30, 2**30), numbers(0, 0))), "numbers"),
    "negative size": (record(tensor(integer(0), numbers(-1, 4), numbers(4, 1))), "shape"),
    "nine dimensions": (record(tensor(integer(0), numbers(*[1] * 9), numbers(*[1] * 9))), "shape"),
    "storage that claims more": (
        record(tensor(integer(0), numbers(3), numbers(1), storage_bytes(torch.arange(12.0))[:-4])),
        "claims 12",
    ),
    "storage of another count": (
        record(
            tensor(integer(0), numbers(3), numbers(1), storage_bytes(torch.arange(12.0))[:-56] + b"\xff" * 7 + b"\x0f")
        ),
        "claims 12",
    ),
    "tensor without storage": (
        record(name("torch._utils", "_rebuild_tensor") + b"(N" + integer(0) + b"))tR"),
        "storage",
    ),
    "the same storage over and over": (
        record(
            raw(storage_bytes(torch.zeros(3000)))
            + b"\x94("
            + (name("torch.storage", "_load_from_bytes") + b"h\x00\x85R") * 1000
            + b"l\x86"
        ),
        "over and over",
    ),
    "bytes that are not there": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".", "claims"),
    "text that is not there": (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".", "claims"),
    "bytearray that is not there": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "BYTEARRAY8"),
    "integer of a megabyte": (b"\x80\x02\x8b" + struct.pack("<I", 2**20) + b"\x01" * 2**20 + b".", "integer of"),
    "integer of many digits": (b"L" + b"9" * 250 + b"L\n.", "digits"),
    "memo of 34 GB": (b"\x80\x02Nr\xff\xff\xff\x7f0j\x00\x00\x00\x40.", "damaged"),
    "missing memo": (b"\x80\x02h\x07.", "damaged"),
    "pop of nothing": (b"\x80\x020.", "damaged"),
    "pop below a mark": (b"\x80\x02N(0.", "damaged"),
    "no mark": (b"\x80\x02t.", "damaged"),
    "list of itself as a key": (b"\x80\x02}]q\x00h\x00as.", "damaged|keys|sets"),
    "deep tuple as a key": (b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns.", "keys"),
    "deep list": (b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", "Data"),
    "no instruction": (b"\x80\x02\xfe.", "0xfe"),
    "unknown protocol": (b"\x80\x09N.", "protocol 9"),
    "truncated": (pyg_pickle(pyg_fields())[:-40], "truncated"),
    "empty": (b"", "truncated"),
    "something else than a structure": (pickle.dumps([1, 2], protocol=4), "holds list"),
    "fields that are no dict": (
        b"\x80\x04"
        + name("torch_geometric.data.data", "Data")
        + b")\x81}"
        + text("_store")
        + name("torch_geometric.data.storage", "GlobalStorage")
        + b")\x81}"
        + text("_mapping")
        + b"Nsbsb.",
        "no fields",
    ),
}


@pytest.mark.parametrize("attack", sorted(DAMAGING))
def test_nothing_is_believed(tmp_path, attack):
    payload, named = DAMAGING[attack]
    value = payload if payload else b"\x00"[:0]
    records = LmdbRecords(write_lmdb(tmp_path / "data.lmdb", {b"0": value or b"\x80"}))
    with pytest.raises(FileFormatError, match=rf"data\.lmdb: key '0' .*({named})"):
        records[0]


def test_every_truncation_is_noticed():
    whole = pyg_pickle(pyg_fields())
    for size in range(len(whole)):
        with pytest.raises(FileFormatError):
            read_record(whole[:size])


def test_random_damage_never_escapes():
    """Each changed byte gives a record or our own error, never another one."""
    whole = pyg_pickle(pyg_fields(2))
    rng = np.random.default_rng(0)
    for _ in range(3000):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        with contextlib.suppress(FileFormatError):
            read_record(bytes(broken))


def test_a_large_memo_costs_nothing():
    assert read_plain(b"\x80\x02Nr\xff\xff\xff\x7fj\xff\xff\xff\x7f\x86.") == (None, None)


def test_ordered_dicts_of_hooks_are_empty():
    assert read_pickle(pickle.dumps(OrderedDict(), protocol=4)) == {}


# ---------------------------------------------------------------------------------------------------------- hostile JSON


def bomb() -> bytes:
    deflate = zlib.compressobj(9)
    block = b" " * 2**20
    return b"".join(deflate.compress(block) for _ in range(MAX_JSON // 2**20 + 1)) + deflate.flush()


def field(value: object) -> bytes:
    return ase_record({"positions": {"__ndarray__": value}})


HOSTILE_JSON = {
    "decompression bomb": (bomb(), "more than"),
    "not compressed": (b'{"numbers": 1}', "damaged"),
    "truncated": (ase_record({"numbers": np.arange(50)})[:-20], "truncated|damaged"),
    "deep nesting": (zlib.compress(b"[" * 200_000 + b"]" * 200_000), "damaged|holds"),
    "long integer": (zlib.compress(b'{"energy": ' + b"9" * 5000 + b"}"), "digits"),
    "a list": (zlib.compress(b"[1]"), "holds list"),
    "wrong shape": (field([[2, 3], "float64", [1.0, 2.0]]), "shape"),
    "huge shape": (field([[2**40, 2**40], "float64", []]), "shape"),
    "negative shape": (field([[-1, -2], "float64", [1.0, 2.0]]), "shape"),
    "object dtype": (field([[1], "object", [1]]), "dtype"),
    "unhashable dtype": (field([[1], ["f8"], [1]]), "dtype"),
    "nested numbers": (field([[1], "float64", [[1.0]]]), "no numbers"),
    "text as numbers": (field([[1], "float64", ["1"]]), "no numbers"),
    "too few parts": (field([[1], "float64"]), "shape, dtype"),
    "does not fit": (field([[1], "uint8", [300]]), "fit"),
    "latin text": (zlib.compress(b'{"a": "\xff"}'), "damaged"),
}


@pytest.mark.parametrize("attack", sorted(HOSTILE_JSON))
def test_json_is_not_believed(tmp_path, attack):
    payload, named = HOSTILE_JSON[attack]
    records = LmdbRecords(write_lmdb(tmp_path / "data.aselmdb", {b"1": payload}))
    with pytest.raises(FileFormatError, match=rf"data\.aselmdb: key '1' .*({named})"):
        records[0]


def test_deleted_records_are_left_out(tmp_path):
    values = {str(k).encode(): ase_record({"energy": float(k)}) for k in (1, 2, 3)}
    values |= {b"nextid": zlib.compress(b"4"), b"deleted_ids": zlib.compress(b"[2]"), b"metadata": zlib.compress(b"{}")}
    records = LmdbRecords(write_lmdb(tmp_path / "data.aselmdb", values))
    assert [record["energy"] for record in records.records()] == [1.0, 3.0]


# ----------------------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize("key", [b"zero", b"-1", b"1_0", b"01", b"0x1", b"\xff\xfe", "１".encode()])
def test_keys_must_be_numbers(tmp_path, key):
    path = write_lmdb(tmp_path / "data.lmdb", {b"0": pyg_pickle({"x": 1}), key: pyg_pickle({"x": 1})})
    with pytest.raises(FileFormatError, match=r"data\.lmdb: key .* is no number"):
        LmdbRecords(path)


@pytest.mark.parametrize(
    "length", [pickle.dumps(3), pickle.dumps("2"), b"\x80\x04" + name("os", "system") + b".", b"2"]
)
def test_a_wrong_length(tmp_path, length):
    values = {b"0": pyg_pickle({"x": 1}), b"1": pyg_pickle({"x": 1}), b"length": length}
    with pytest.raises(FileFormatError, match=r"says that it has|key length"):
        LmdbRecords(write_lmdb(tmp_path / "data.lmdb", values))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*data\.lmdb"):
        LmdbRecords(tmp_path / "data.lmdb")
    (tmp_path / "text.lmdb").write_text("this is no database\n" * 1000)
    with pytest.raises(FileFormatError, match=r"text\.lmdb is damaged"):
        LmdbRecords(tmp_path / "text.lmdb")
    path = write_pyg_lmdb(tmp_path / "whole.lmdb", [pyg_fields(30, k) for k in range(40)])
    content = path.read_bytes()
    for size in (8192, len(content) // 2, len(content) - 4096):
        (tmp_path / "cut.lmdb").write_bytes(content[:size])
        with pytest.raises(FileFormatError, match=r"cut\.lmdb is (truncated|damaged)"):
            LmdbRecords(tmp_path / "cut.lmdb")
    with pytest.raises(FileFormatError, match="holds no records"):
        LmdbRecords(write_lmdb(tmp_path / "empty.lmdb", {}))


# ------------------------------------------------------------------------------------------------------------- genuine


def test_genuine_files(shared_data):
    folder = shared_data / "oc20" / "fmt"
    sizes = {
        "s2ef_pyg_new.lmdb": 20,
        "s2ef_pyg_old.lmdb": 20,
        "s2ef_pyg1.lmdb": 5,
        "is2re_pyg.lmdb": 27,
        "s2ef.aselmdb": 20,
    }
    for file, size in sizes.items():
        records = LmdbRecords(folder / file)
        assert len(records) == size
        first = records[0]
        assert first.get("sid", first.get("data", {}).get("sid")) in (1000100, "random1000100")


# --------------------------------------------------------------------------------------------------------------- pages


def pages_of(path) -> dict[bytes, bytes]:
    handle = os.open(path, os.O_RDONLY)
    try:
        file = PagedFile(handle)
        return {key: file.read(place) for key, place in file.places()}
    finally:
        os.close(handle)


def test_pages_are_those_of_the_library(tmp_path):
    """Several levels of branches, short, long and empty values, and pages that were freed and used again."""
    import lmdb

    rng = np.random.default_rng(0)
    environment = lmdb.open(str(tmp_path / "data.lmdb"), map_size=2**28, subdir=False, lock=False)
    for _ in range(3):
        with environment.begin(write=True) as transaction:
            for number in rng.integers(0, 30_000, 6_000).tolist():
                size = int(rng.choice([0, 1, 50, 2000, 2050, 4080, 9000], p=[0.1, 0.3, 0.5, 0.03, 0.03, 0.02, 0.02]))
                transaction.put(str(number).encode(), rng.bytes(size))
            for number in rng.integers(0, 30_000, 2_000).tolist():
                transaction.delete(str(number).encode())
    with environment.begin() as transaction:
        expected = {bytes(key): bytes(value) for key, value in transaction.cursor()}
        depth = transaction.stat()["depth"]
    environment.close()
    assert depth >= 3
    found = pages_of(tmp_path / "data.lmdb")
    assert list(found) == list(expected)
    assert found == expected


def test_flipped_bits_in_pages_never_end_the_process(tmp_path):
    """The library dies of SIGBUS with some of these; half of the bits are in headers."""
    path = write_lmdb(tmp_path / "data.lmdb", {str(k).encode(): bytes(40 * k) for k in range(150)})
    whole, rng, found = path.read_bytes(), np.random.default_rng(0), collections.Counter()
    intact = pages_of(path)
    for case in range(400):
        content = bytearray(whole)
        start = 4096 * int(rng.integers(len(whole) // 4096))
        content[start + int(rng.integers(24 if case % 2 else 4096))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            seen = pages_of(path)
            bits = sum(int.from_bytes(b, "big").bit_count() for b in seen.values())
            # Intact values are zeros. Neither values nor keys have checksums: one wrong bit, or one wrong key, may come through.
            is_one_bit = bits == 1 and {k: len(b) for k, b in seen.items()} == {k: len(b) for k, b in intact.items()}
            is_one_key = bits == 0 and len(seen) == len(intact) and len(seen.keys() - intact.keys()) == 1
            found["same" if seen == intact else "bit" if is_one_bit else "key" if is_one_key else "other"] += 1
        except FileFormatError:
            found["refused"] += 1
    assert found["refused"] > 50
    assert not found["other"]
