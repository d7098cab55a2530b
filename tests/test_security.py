"""What SECURITY.md promises: no code that runs what it reads, and archives that neither leave their place nor burst."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import lzma
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ndem_zoo import registry
from ndem_zoo.datasets import files, read_extxyz, read_oc20, read_pcqm4mv2, read_qm9
from ndem_zoo.datasets.files import Decompressed, RemoteFile, allowed_size, archived_files, fetch, read_npz
from ndem_zoo.errors import ConfigError, DataError, FileFormatError

ROOT = Path(__file__).resolve().parents[1]
SCANNED = ("ndem_zoo", "benchmarks", "scripts", "hydra_plugins", "docs", "setup.py")

# ------------------------------------------------------------------------------------------------------------- the scan

#: Modules whose readers execute what they read.
MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "jsonpickle")

#: Calls that execute text, run a shell, trust whatever comes, or can be overtaken; by full name.
CALLS = (
    "eval", "exec", "compile", "__import__", "joblib.load", "pandas.read_pickle", "torch.hub.load", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all", "ssl._create_unverified_context",
    "urllib.request.urlopen", "urllib.request.urlretrieve", "shutil.unpack_archive", "numpy.loads", "code.interact", "schnetpack.utils.load_model",
)  # fmt: skip

#: Calls that are safe with one of these keywords alone: name, keyword, values that make it safe.
CALLS_WITH = {"torch.load": ("weights_only", (True,)), "tarfile.extractall": ("filter", ("data",))}

#: Keywords that no call may have with these values.
KEYWORDS = {"allow_pickle": (True,), "shell": (True,), "verify": (False,), "check_hostname": (False,)}

#: What is there all the same: (file, name of the finding) and the reason.
ALLOWED: dict[tuple[str, str], str] = {
    (file, "schnetpack.utils.load_model"): "SchNetPack's models are pickles; this one was trained a few lines before"
    for file in (
        "benchmarks/accuracy/bench_rmd17_schnetpack.py",
        "docs/how-to/schnetpack.md",
        "docs/tutorials/schnetpack_configuration.py",
    )
} | {
    ("benchmarks/reliability/specimens.py", "pickle"): "writes a specimen for the readers to refuse or read; loads none"
}


class Scan(ast.NodeVisitor):
    """Collects what a source does that reading data must not: ``(line, name)``."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []
        self.names: dict[str, str] = {}  # local name to full name

    def add(self, node: ast.AST, name: str) -> None:
        self.found.append((node.lineno, name))

    def module(self, node: ast.AST, name: str) -> None:
        if name.split(".")[0] in MODULES:
            self.add(node, name.split(".")[0])

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.module(node, alias.name)
            self.names[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            self.module(node, node.module)
            self.names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def visit_Assign(self, node: ast.Assign) -> None:
        full = self.full(node.value)
        if (full and full != ast.unparse(node.value)) or full in CALLS or full in CALLS_WITH:
            self.names |= {target.id: full for target in node.targets if isinstance(target, ast.Name)}
        self.generic_visit(node)

    def full(self, node: ast.AST) -> str:
        """Full name of what an expression refers to, as far as the source tells; "" for others."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.full(node.value)
            return f"{owner}.{node.attr}" if owner else f"?.{node.attr}"
        if isinstance(node, ast.Call):
            called, texts = self.full(node.func), [a.value for a in node.args if isinstance(a, ast.Constant)]
            if called == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                return f"{self.full(node.args[0])}.{node.args[1].value}"
            if called in ("__import__", "importlib.import_module") and texts and isinstance(texts[0], str):
                return texts[0]
        return ""

    def visit_Call(self, node: ast.Call) -> None:
        name = self.full(node.func).removeprefix("builtins.").removeprefix("__builtins__.")
        name = {"np": "numpy"}.get(name.split(".")[0], name.split(".")[0]) + name[len(name.split(".")[0]) :]
        keywords = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
        if name in CALLS or (name.startswith("?.") and name[2:] in ("unsafe_load", "read_pickle")):
            self.add(node, name.removeprefix("?."))
        last = name.rsplit(".", 1)[-1]
        for called, (keyword, values) in CALLS_WITH.items():
            is_method = last == "extractall" and called.endswith("extractall")
            if (name == called or is_method) and keywords.get(keyword) not in values:
                self.add(node, last if is_method else called)
        if last in ("import_module", "__import__", "require"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    self.module(node, argument.value)
        for keyword, values in KEYWORDS.items():
            if keyword in keywords and any(keywords[keyword] is value for value in values):
                self.add(node, f"{keyword}={keywords[keyword]}")
        addresses = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        if last in ("get", "urlopen", "urlretrieve", "retrieve", "Request") and any(
            isinstance(a, str) and a.startswith("http:") for a in addresses
        ):
            self.add(node, "http:")
        self.generic_visit(node)


def scan(source: str) -> list[tuple[int, str]]:
    """Findings in the source of a module, sorted."""
    visitor = Scan()
    visitor.visit(ast.parse(source))
    return sorted(set(visitor.found))


def sources() -> Iterator[tuple[str, str]]:
    """Name and code of everything that is scanned; of pages, their Python blocks."""
    for place in SCANNED:
        root = ROOT / place
        for path in [root] if root.is_file() else sorted([*root.rglob("*.py"), *root.rglob("*.md")]):
            name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            if path.suffix == ".py":
                yield name, text
            else:
                yield from ((name, block) for block in re.findall(r"(?ms)^```python\n(.*?)^```$", text))


def test_nothing_executes_what_it_reads():
    found = [(name, *finding) for name, text in sources() for finding in scan(text)]
    unexpected = [f"{name}:{line}: {what}" for name, line, what in found if (name, what) not in ALLOWED]
    assert not unexpected, "\n".join(unexpected)


def test_the_scan_sees_the_whole_package():
    names = {name for name, _ in sources()}
    assert {"ndem_zoo/datasets/pickles.py", "ndem_zoo/checkpoint.py", "setup.py", "docs/conventions.md"} <= names
    assert len(names) > 170


def test_what_is_allowed_is_still_there():
    found = {(name, what) for name, text in sources() for _, what in scan(text)}
    assert set(ALLOWED) <= found, "take it off the list"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("import pickle as p", "pickle"),
        ("from pickle import load as x", "pickle"),
        ("import _pickle", "pickle"),
        ("__import__('pickle').loads(b'')", "pickle"),
        ("import importlib\nimportlib.import_module('dill')", "dill"),
        ("import importlib as i\ni.import_module('shelve')", "shelve"),
        ("from ndem_zoo.optional import require\nrequire('cloudpickle', extra='x')", "cloudpickle"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch as t\nt.load('x', weights_only=False)", "torch.load"),
        ("from torch import load as read\nread('x')", "torch.load"),
        ("import torch\nread = torch.load\nread('x')", "torch.load"),
        ("import torch\ngetattr(torch, 'load')('x')", "torch.load"),
        ("import yaml\nyaml.load(x, Loader=yaml.Loader)", "yaml.load"),
        ("import yaml\nyaml.unsafe_load(x)", "yaml.unsafe_load"),
        ("from yaml import full_load\nfull_load(x)", "yaml.full_load"),
        ("eval('1')", "eval"),
        ("import builtins\nbuiltins.eval('1')", "eval"),
        ("e = eval\ne('1')", "eval"),
        ("exec('1')", "exec"),
        ("compile('1', 'x', 'eval')", "compile"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle=True"),
        ("import pandas as pd\npd.read_pickle('x')", "pandas.read_pickle"),
        ("import joblib\njoblib.load('x')", "joblib.load"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("from subprocess import Popen as P\nP('ls', shell=True)", "shell=True"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import popen\npopen('ls')", "os.popen"),
        ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
        ("import requests\nrequests.get('https://x', verify=False)", "verify=False"),
        ("import requests\nrequests.get('http://x')", "http:"),
        ("import urllib.request\nurllib.request.urlopen('https://x')", "urllib.request.urlopen"),
        ("from urllib.request import urlretrieve as r\nr(x)", "urllib.request.urlretrieve"),
        ("import ssl\nssl._create_unverified_context()", "ssl._create_unverified_context"),
        ("import tarfile\ntarfile.open('x').extractall('y')", "extractall"),
        ("import zipfile\nzipfile.ZipFile('x').extractall('y')", "extractall"),
        ("import shutil\nshutil.unpack_archive('x')", "shutil.unpack_archive"),
        ("def f():\n    import marshal\n    return marshal.loads(x)", "marshal"),
    ],
)
def test_the_scan_finds(source, what):
    assert any(what.removeprefix("_") in name for _, name in scan(source)), scan(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x', weights_only=True)",
        "import re\nre.compile('x')",
        "model.eval()",
        "potential.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import json\njson.load(x)",
        "import yaml\nyaml.safe_load(x)",
        "import tarfile\ntarfile.open('x').extractall('y', filter='data')",
        "from ndem_zoo.datasets.pickles import read_pickle",
        "import subprocess\nsubprocess.run(['ls'], check=True)",
        "homepage = 'http://example.org'",
        "settings.get('verify')",
    ],
)
def test_the_scan_leaves_alone(source):
    assert scan(source) == []


# ------------------------------------------------------------------------------------------------------------- archives


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def packed(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


WATER = """3
gdb 1 1 1 1 0 1 -0.25 0.05 0.3 1 0.02 -76.4 -76.4 -76.4 -76.4 6
O 0 0 0 0
H 0.96 0 0 0
H 0 0.96 0 0
1 2 3
O O
InChI=1S/H2O/h1H2 InChI=1S/H2O/h1H2
"""
LINKS = {
    "a symbolic link out of the folder": {"type": tarfile.SYMTYPE, "linkname": "../../secret"},
    "a hard link to another file": {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"},
    "a device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
    "a pipe": {"type": tarfile.FIFOTYPE},
}


@pytest.fixture
def alone(tmp_path):
    """A folder in a folder: what is written beside it is seen afterwards."""
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    yield folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outer", "secret"]
    assert [p.name for p in (tmp_path / "outer").iterdir()] == ["inner"]


@pytest.mark.parametrize("name", ["../escaped.xyz", "/escaped.xyz", "a/../../escaped.xyz", "escaped.xyz"])
def test_members_of_any_name_are_read_and_never_written(alone, name):
    path = alone / "qm9.tar.bz2"
    path.write_bytes(bz2.compress(packed(member(name, WATER.encode()))))
    assert read_qm9(path).z.tolist() == [8, 1, 1]
    assert [p.name for p in alone.iterdir()] == ["qm9.tar.bz2"]
    assert not Path("/escaped.xyz").exists()


@pytest.mark.parametrize("kind", sorted(LINKS))
def test_links_and_devices_in_archives_are_refused(alone, kind):
    path = alone / "qm9.tar.bz2"
    path.write_bytes(bz2.compress(packed(member("1.xyz", WATER.encode()), member("2.xyz", **LINKS[kind]))))
    with pytest.raises(FileFormatError, match=r"2\.xyz is (a link|no plain file)"):
        read_qm9(path)
    sdf = alone / "pcqm4m-v2-train.sdf.tar.gz"
    sdf.write_bytes(gzip.compress(packed(member("x.sdf", **LINKS[kind]))))
    with pytest.raises(FileFormatError, match=r"x\.sdf is (a link|no plain file)"):
        list(read_pcqm4mv2(sdf))


@pytest.mark.parametrize("kind", sorted(LINKS))
def test_links_in_the_archive_of_rmd17_are_refused(alone, kind):
    (alone / "a.tar").write_bytes(packed(member("x.bin", **LINKS[kind])))
    remote = RemoteFile(urls=(), md5="0" * 32, archive="a.tar", member="x.bin")
    card = files.DatasetCard("Test", "", "", {}, "", (), files={"x.bin": remote, "a.tar": RemoteFile(urls=())})
    with pytest.raises(DataError, match=r"x\.bin is (a link|no plain file)"):
        fetch(card, "x.bin", alone)
    assert [p.name for p in alone.iterdir()] == ["a.tar"]


def sparse_member(real: int) -> bytes:
    """An archive with a file of zeros that takes no room (GNU's sparse format)."""
    info = tarfile.TarInfo("1.xyz")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:410] = b"%011o\0%011o\0" % (real, 0)  # one hole up to the end
    header[483:495] = b"%011o\0" % real
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def test_sparse_files_are_refused(tmp_path):
    path = tmp_path / "qm9.tar.bz2"
    path.write_bytes(bz2.compress(sparse_member(1 << 32)))
    with pytest.raises(FileFormatError, match="sparse"):
        read_qm9(path)


def test_a_header_that_announces_gigabytes_gets_no_memory(tmp_path):
    """tarfile reads an extended header as a whole, of whatever size it says it is."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, (8 << 30) - 512
    path = tmp_path / "qm9.tar.bz2"
    path.write_bytes(bz2.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(4096)))
    with pytest.raises(FileFormatError):
        read_qm9(path)


def test_a_large_member_among_small_files_is_refused(tmp_path):
    path = tmp_path / "qm9.tar.bz2"
    path.write_bytes(bz2.compress(packed(member("1.xyz", bytes((1 << 20) + 1)))))
    with pytest.raises(FileFormatError, match=r"1\.xyz has 1,048,577 bytes; allowed are 1,048,576"):
        read_qm9(path)


@pytest.fixture
def small_limit(monkeypatch):
    """Bombs of kilobytes: all files may hold 100 times their size, small ones too."""
    monkeypatch.setattr(files, "ALWAYS_ALLOWED", 1 << 12)


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_bombs_are_not_decompressed_to_their_end(tmp_path, small_limit, suffix, module, monkeypatch):
    path = tmp_path / f"a.xyz{suffix}"
    path.write_bytes(module.compress(bytes(3 << 20)))
    allowed = allowed_size(path)
    assert allowed < 3 << 20
    stream, read = Decompressed(path), []
    with pytest.raises(FileFormatError, match=r"decompresses to more than .*NDEM_ZOO_MAX_RATIO"):
        read.extend(iter(lambda: stream.read(1 << 16), b""))
    assert sum(map(len, read)) <= allowed
    with pytest.raises(FileFormatError, match="NDEM_ZOO_MAX_RATIO"):
        read_extxyz(path)
    monkeypatch.setenv("NDEM_ZOO_MAX_RATIO", "inf")
    assert Decompressed(path).read() == bytes(3 << 20)


def test_a_bomb_in_an_archive(tmp_path, small_limit):
    sdf = tmp_path / "pcqm4m-v2-train.sdf.tar.gz"
    sdf.write_bytes(gzip.compress(packed(member("x.sdf", b"\n" * (8 << 20)))))
    with pytest.raises(FileFormatError, match=r"decompresses to more than|has more than 100,000 lines"):
        list(read_pcqm4mv2(sdf))


def test_a_line_without_end_and_an_entry_without_end(tmp_path):
    sdf = tmp_path / "pcqm4m-v2-train.sdf.tar.gz"
    sdf.write_bytes(gzip.compress(packed(member("x.sdf", b"x" * (1 << 17)))))
    with pytest.raises(FileFormatError, match="line of more than 65,536 bytes"):
        list(read_pcqm4mv2(sdf))
    sdf.write_bytes(gzip.compress(packed(member("x.sdf", b"\n" * 200_000))))
    with pytest.raises(FileFormatError, match="more than 100,000 lines"):
        list(read_pcqm4mv2(sdf))


def test_a_bomb_in_oc20s_text(tmp_path, small_limit):
    path = tmp_path / "0.extxyz.xz"
    path.write_bytes(lzma.compress(b"\n" * (3 << 20)))
    with pytest.raises(FileFormatError, match="NDEM_ZOO_MAX_RATIO"):
        read_oc20(path)


@pytest.mark.parametrize("text", ["0", "0.5", "-1", "nan", "much"])
def test_the_limit_is_a_number(tmp_path, monkeypatch, text):
    monkeypatch.setenv("NDEM_ZOO_MAX_RATIO", text)
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"allowed is a number of 1 or more"):
        allowed_size(tmp_path / "f")


def test_the_limit_grows_with_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv("NDEM_ZOO_MAX_RATIO", raising=False)
    path = tmp_path / "f"
    with path.open("wb") as stream:
        stream.truncate(10 << 20)
    assert allowed_size(path) == 100 * (10 << 20)
    path.write_bytes(b"")
    assert allowed_size(path) == 256 << 20


# ------------------------------------------------------------------------------------------------------------------ npz


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape!r}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_an_array_that_says_it_is_huge_gets_no_memory(tmp_path):
    path = tmp_path / "a.npz"
    for shape, what in (((1 << 60,), "must agree"), ((1 << 40, 1 << 40), "must agree"), ((-1,), "must agree|damaged")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("R.npy", npy_header(shape) + bytes(80))
        with pytest.raises(FileFormatError, match=what):
            read_npz(path, ("R",))


def test_an_npz_bomb(tmp_path, small_limit, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, R=np.zeros(1 << 20))
    with pytest.raises(FileFormatError, match=r"decompresses to 8,388,736 bytes.*NDEM_ZOO_MAX_RATIO"):
        read_npz(path, ("R",))
    monkeypatch.setenv("NDEM_ZOO_MAX_RATIO", "1e6")
    assert read_npz(path, ("R",))["R"].shape == (1 << 20,)


def test_a_directory_that_understates_the_size_of_an_array(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, R=np.zeros(1 << 12))
    content = path.read_bytes()
    true, false = struct.pack("<I", (1 << 15) + 128), struct.pack("<I", 128 + 80)
    before, _, after = content.rpartition(true)  # in the directory, which comes last
    path.write_bytes(before + false + after)
    with pytest.raises(FileFormatError, match=r"must agree|Bad CRC"):
        read_npz(path, ("R",))


# ------------------------------------------------------------------------------------------------------------ downloads


def cards() -> list[files.DatasetCard]:
    from ndem_zoo.datasets import md17, oc20, pcqm4mv2, qm9, sample

    found = [md17.MD17, md17.RMD17, qm9.QM9, pcqm4mv2.PCQM4MV2, oc20.OC20, sample.SAMPLE]
    assert len(registry.DATASETS) == 7, "a new dataset: its card belongs here"  # extxyz and store have none
    return found


def test_every_file_that_can_be_downloaded_has_tls_and_a_checksum(tmp_path, monkeypatch):
    """All others say where they can be had, before anything is sent."""
    import pooch

    asked = []

    def retrieve(url, known_hash, **_):
        asked.append(url)
        assert url.startswith("https://")
        assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", known_hash)
        raise OSError("no network here")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    refused = []
    for card in cards():
        for name, remote in card.files.items():
            asked.clear()
            with pytest.raises(DataError, match=r"put it into .* data_dir="):
                fetch(card, name, tmp_path)
            if remote.urls and not asked:
                refused.append(card.name)
    assert set(refused) == {"MD17", "PCQM4Mv2"}


def test_archived_files_are_streamed(tmp_path):
    content = packed(member("folder/", type=tarfile.DIRTYPE), member("folder/a", b"one"), member("b", b"two"))
    found = [(name, stream.read()) for name, stream in archived_files(io.BytesIO(content), tmp_path / "a.tar")]
    assert found == [("folder/a", b"one"), ("b", b"two")]
