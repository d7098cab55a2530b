"""Files: there whole or not at all, exact, free of pickle, and refused with a clear error when they are damaged."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import os
import pickle
import resource
import stat
import struct

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from ndem_zoo import checkpoint as files
from ndem_zoo.errors import FileFormatError, StorageError
from ndem_zoo.history import HistoryLog, read_history


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_appears_when_its_block_has_ended(tmp_path):
    with files.atomic_folder(tmp_path / "deep" / "model") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "model").exists()
        assert folder.parent == tmp_path / "deep", "a rename across file systems is not atomic"
    assert (tmp_path / "deep" / "model" / "a").read_text() == "1"
    assert names(tmp_path / "deep") == {"model"}


def write_and_fail(path) -> None:
    with files.atomic_folder(path) as folder:
        (folder / "a").write_text("new")
        raise KeyError


def test_a_failing_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "model")
    assert names(tmp_path) == set()


def test_a_failing_block_leaves_the_old_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert names(tmp_path) == {"model"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with files.atomic_folder(tmp_path / "model") as folder:
            (folder / content).write_text(content)
    assert names(tmp_path / "model") == {"new"}
    assert names(tmp_path) == {"model"}


def test_other_folders_beside_it_are_left_alone(tmp_path):
    for name in ("model.old", ".model.1234.tmp", ".model.1234.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    for _ in range(2):
        with files.atomic_folder(tmp_path / "model") as folder:
            (folder / "a").write_text("1")
    assert names(tmp_path) == {"model", "model.old", ".model.1234.tmp", ".model.1234.old"}
    assert (tmp_path / "model.old" / "mine").read_text() == "precious"


def test_a_folder_never_replaces_a_file(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"), files.atomic_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize("call", [1, 2])
def test_a_failing_rename_leaves_one_whole_folder(tmp_path, monkeypatch, call):
    """The old content stays where it was, whichever rename fails."""
    with files.atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == call:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"), files.atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert names(tmp_path) == {"model"}


def test_a_folder_that_is_not_flushed_under_its_name_gives_it_back(tmp_path, monkeypatch):
    with files.atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    sync = files.sync

    def failing(path):
        if path == tmp_path:
            raise OSError(errno.EIO, "input/output error")
        sync(path)

    monkeypatch.setattr(files, "sync", failing)
    with pytest.raises(StorageError, match="model"), files.atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert names(tmp_path) == {"model"}
    with pytest.raises(StorageError, match="other"), files.atomic_folder(tmp_path / "other"):
        pass
    assert names(tmp_path) == {"model"}


def test_the_place_of_what_was_being_replaced_is_named(tmp_path):
    """A process that dies between the two renames."""
    (tmp_path / ".model.12ab.old").mkdir()
    for name, hint in (
        ("model", r"there is no file .*config\.json; a process died .* whole in .*\.model\.12ab\.old"),
        ("x", "$"),
    ):
        with pytest.raises(FileNotFoundError, match=hint):
            files.load_record(tmp_path / name / "config.json")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch, number):
    files.save_json(tmp_path / "j.json", {"a": 1})

    def failing(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match=r"j\.json") as caught:
        files.save_json(tmp_path / "j.json", {"a": 2})
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / "j.json")
    assert "make room" in str(caught.value)
    assert files.load_json(tmp_path / "j.json") == {"a": 1}
    assert names(tmp_path) == {"j.json"}


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (PermissionError(errno.EACCES, "no"), SafetensorError("nonsense"), OSError("no number")):
        with pytest.raises(type(error)) as caught, files.writing(tmp_path / "a"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    "text", ['IoError(Os { code: 28, kind: StorageFull, message: "x" })', "I/O error: x (os error 28)"]
)
def test_a_full_disk_under_safetensors(tmp_path, text):
    with pytest.raises(StorageError, match=r"t\.safetensors"), files.writing(tmp_path / "t.safetensors"):
        raise SafetensorError(f"Error while serializing: {text}")


def test_no_half_rows_on_a_full_disk(tmp_path, monkeypatch):
    rows = [{"step": 1, "loss": 0.5}]
    log = HistoryLog(tmp_path, False, rows)
    line = "ndem_zoo.history._line"
    monkeypatch.setattr(line, lambda row, header: "2,0.2\n" * 2000)
    with files_up_to(1000), pytest.raises(StorageError, match=r"history\.csv"):
        log.add({"step": 2, "loss": 0.25})
    assert read_history(tmp_path / "history.csv") == rows


@contextlib.contextmanager
def files_up_to(size: int):
    """No file gets longer; Python ignores the signal that the kernel sends besides."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    """After a loss of power a folder under its final name is whole: files, then the folder, then the rename."""
    events = []
    fsync, replace = os.fsync, os.replace

    def recording(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    with files.atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
    assert [os.path.basename(event) for event in events[:1]] == ["a"]
    assert events[1:] == [str(folder), "rename", str(tmp_path)]


def test_permissions_are_those_of_ordinary_files(tmp_path):
    """A saved model on a shared disk can be read by those whom the umask lets read."""
    before = os.umask(0o027)
    try:
        with files.atomic_folder(tmp_path / "model") as folder:
            files.save_tensors(folder / "t.safetensors", {"a": torch.ones(1)})
            files.save_json(folder / "j.json", {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {"t.safetensors": 0o640, "j.json": 0o640}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in (".step-0000000004.ab12.tmp", ".step-0000000004.ab12.old", "step-0000000003", "step-mine.tmp", "x.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".history.csv.ab12.tmp").write_text("half")
    (tmp_path / "history.csv").write_text("whole")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == {"step-0000000003", "step-mine.tmp", "x.tmp", "history.csv"}


def test_checkpoints_are_sorted_by_step_and_old_ones_removed(tmp_path):
    for step in (7, 12, 9, 1000000):
        files.checkpoint_path(tmp_path, step).mkdir()
    for name in (".step-0000000099.x.tmp", "step-12", "model"):
        (tmp_path / name).mkdir()
    found = files.checkpoints(tmp_path)
    assert found == [files.checkpoint_path(tmp_path, step) for step in (1000000, 12, 9, 7)]
    files.remove_old_checkpoints(tmp_path, 2)
    assert files.checkpoints(tmp_path) == found[:2]
    assert {".step-0000000099.x.tmp", "step-12", "model"} <= names(tmp_path)
    assert files.checkpoints(tmp_path / "absent") == []


def test_an_old_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """A process that dies while it deletes one leaves no half of it among the checkpoints."""
    for step in (2, 4):
        files.checkpoint_path(tmp_path, step).mkdir()
        (files.checkpoint_path(tmp_path, step) / "trainer.json").write_text("{}")
    monkeypatch.setattr("shutil.rmtree", lambda path, **options: (path / "trainer.json").unlink())  # and no further
    files.remove_old_checkpoints(tmp_path, 1)
    assert files.checkpoints(tmp_path) == [files.checkpoint_path(tmp_path, 4)]
    monkeypatch.undo()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == {"step-0000000004"}


# ---------------------------------------------------------------------------------------------------------------- files


def test_floats_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**63, 2000, dtype=np.int64).view(np.float64)
    values = [float(v) for v in bits if math.isfinite(v)]
    values += [-0.0, 5e-324, 1.7976931348623157e308, 0.1, 1 / 3, 1e22, 2.0**53 + 2]
    files.save_json(tmp_path / "v.json", values)
    back = files.load_json(tmp_path / "v.json")
    assert [struct.pack("d", v) for v in back] == [struct.pack("d", v) for v in values]


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_text(tmp_path / "t.csv", "old Å\n")

    def failing(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(tmp_path / "t.csv", "new\n")
    assert (tmp_path / "t.csv").read_bytes() == "old Å\n".encode()
    assert names(tmp_path) == {"t.csv"}


def test_tensors_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(4, 5)
    tensors = {
        "double": torch.randn(3, dtype=torch.float64),
        "transposed": base.T,
        "shared": base,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "long": torch.tensor([2**62 + 1]),
        "needs_grad": torch.randn(2, requires_grad=True),
        "odd": torch.tensor([float("inf"), -0.0, 1e-45]),
    }
    files.save_tensors(tmp_path / "t.safetensors", tensors)
    back = files.load_tensors(tmp_path / "t.safetensors")
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert torch.equal(back[name], value.detach())


def test_writing_tensors_of_ever_other_sizes_leaves_nothing_behind(tmp_path):
    """The history in a checkpoint grows: what is kept for each size in bytes (types of ctypes are) is kept for good."""

    def kinds():
        return sum(type(thing).__name__ == "PyCArrayType" for thing in gc.get_objects())

    files.save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)})
    before = kinds()
    for size in range(1001, 1011):
        files.save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(size)})
    assert kinds() == before


def test_an_optimizer_state_comes_back(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    flat = files.flatten_optimizer(optimizer.state_dict())
    files.save_tensors(tmp_path / "o.safetensors", flat)
    other = torch.optim.AdamW(layer.parameters(), lr=0.1)
    other.load_state_dict(files.unflatten_optimizer(files.load_tensors(tmp_path / "o.safetensors"), other.state_dict()))
    expected, found = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert expected.keys() == found.keys() == {0, 1}
    for number, values in expected.items():
        assert values.keys() == found[number].keys()
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), found[number][name])


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_truncated_tensors_are_refused(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    files.save_tensors(path, {"a": torch.ones(64)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"t\.safetensors is damaged"):
        files.load_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 400, b"not tensors at all, but a text", pickle.dumps({"a": 1})])
def test_other_files_are_no_tensors(tmp_path, content):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(FileFormatError):
        files.load_tensors(tmp_path / "t.safetensors")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"{'a': 1}", pickle.dumps({"a": 1})])
def test_garbled_json_is_refused(tmp_path, content):
    (tmp_path / "j.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"j\.json is damaged"):
        files.load_json(tmp_path / "j.json")


def test_missing_files_are_named(tmp_path):
    for read in (files.load_json, files.load_tensors):
        with pytest.raises(FileNotFoundError, match="absent"):
            read(tmp_path / "absent")


def test_json_takes_no_objects(tmp_path):
    with pytest.raises(TypeError):
        files.save_json(tmp_path / "j.json", {"a": object()})
    assert not (tmp_path / "j.json").exists()


def test_json_is_readable_by_others(tmp_path):
    files.save_json(tmp_path / "j.json", {"a": [1, 2.5, None, "Å"]})
    assert json.loads((tmp_path / "j.json").read_text("utf-8")) == {"a": [1, 2.5, None, "Å"]}


# -------------------------------------------------------------------------------------------------------------- records


def test_records_come_back_and_are_json(tmp_path):
    record = {"a": [1, 2.5, None, "Å"], "b": {"c": (1, 2)}, 3: True}
    files.save_record(tmp_path / "r.json", record)
    assert files.load_record(tmp_path / "r.json") == {"a": [1, 2.5, None, "Å"], "b": {"c": [1, 2]}, "3": True}
    assert set(json.loads((tmp_path / "r.json").read_text())) == {"a", "b", "3", files.CHECKSUM}


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path):
    """Or it changes nothing: an indentation that is another blank."""
    path = tmp_path / "r.json"
    record = {"step": 12, "loss": 0.125, "name": "x"}
    files.save_record(path, record)
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert files.load_record(path) == record, bit
        except FileFormatError:
            refused += 1
    assert refused > 0.95 * 8 * len(whole)


def test_records_of_older_versions_and_by_hand(tmp_path):
    """They have no checksum; digests of something else are no checksums."""
    record = {"data": "ab" * 32, "step": 1}
    files.save_json(tmp_path / "r.json", record)
    assert files.load_record(tmp_path / "r.json") == record
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(FileFormatError, match=r"r\.json is damaged: it holds a list"):
        files.load_record(tmp_path / "r.json")


def test_tensors_with_another_checksum_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    files.save_tensors(path, {"a": torch.ones(64)})
    digest = files.file_digest(path)
    assert torch.equal(files.load_tensors(path, digest)["a"], torch.ones(64))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not torch.equal(files.load_tensors(path)["a"], torch.ones(64))
    with pytest.raises(FileFormatError, match="checksum"):
        files.load_tensors(path, digest)
