"""Downloads from a local server: mirrors, checksums, archives; and damaged npz files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import ssl
import tarfile
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from ndem_zoo.checkpoint import file_digest
from ndem_zoo.datasets.files import DatasetCard, RemoteFile, data_folder, fetch, read_npz
from ndem_zoo.errors import DataError, DataWarning, FileFormatError

CONTENT = b"official content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


def card(**files: RemoteFile) -> DatasetCard:
    files = {name.replace("_", "."): file for name, file in files.items()}
    return DatasetCard("Test", "a test", "none", {}, "none", ("nobody",), files=files)


#: Certificate of 127.0.0.1, signed by nobody else, and its key; for these tests alone.
CERTIFICATE = Path(__file__).parent / "data" / "localhost.pem"


class Handler(BaseHTTPRequestHandler):
    """Gives contents, or redirections where there is an address instead; `length` promises another size than comes."""

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if isinstance(content, str):
            self.send_response(302)
            self.send_header("Location", content)
        else:
            self.send_response(404 if content is None else 200)
            if self.server.length is not None:
                self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else b"")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(tls: bool):
    instance = HTTPServer(("127.0.0.1", 0), Handler)
    instance.files, instance.asked, instance.length = {}, [], None
    instance.url = f"{'https' if tls else 'http'}://127.0.0.1:{instance.server_port}"
    instance.handle_error = lambda *_: None  # a client that does not trust the certificate
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        instance.socket = context.wrap_socket(instance.socket, server_side=True)
    threading.Thread(target=instance.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield instance
    finally:
        instance.shutdown()
        instance.server_close()


@pytest.fixture
def server(monkeypatch):
    """A server with TLS on this machine; `server.files` maps paths to contents, `server.asked` lists what was asked for."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    with serving(tls=True) as instance:
        yield instance


@pytest.fixture
def plain_server():
    """The same without TLS."""
    with serving(tls=False) as instance:
        yield instance


def test_mirrors_are_tried_in_order_and_the_file_is_kept(server, tmp_path):
    server.files["/b"] = CONTENT
    remote = RemoteFile(urls=(f"{server.url}/a", f"{server.url}/b"), sha256=SHA256)
    path = fetch(card(x_bin=remote), "x.bin", tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.parent == tmp_path
    assert server.asked == ["/a", "/b"]
    assert fetch(card(x_bin=remote), "x.bin", tmp_path) == path
    assert server.asked == ["/a", "/b"]  # not asked again


@pytest.mark.parametrize("checksum", [{"sha256": SHA256}, {"md5": MD5}])
def test_a_download_with_a_wrong_checksum_is_refused_and_deleted(server, tmp_path, checksum):
    server.files["/a"] = CONTENT + b"!"
    remote = RemoteFile(urls=(f"{server.url}/a",), **checksum)
    with pytest.raises(DataError, match=r"cannot download x\.bin of Test .*put it into"):
        fetch(card(x_bin=remote), "x.bin", tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.files["/a"] = CONTENT
    assert fetch(card(x_bin=remote), "x.bin", tmp_path).read_bytes() == CONTENT


def test_nothing_is_downloaded_without_a_known_checksum(server, tmp_path):
    server.files["/a"] = CONTENT
    with pytest.raises(
        DataError, match=r"no checksum of it is known; download='unverified'.*get x\.bin from https://.*data_dir="
    ):
        fetch(card(x_bin=RemoteFile(urls=(f"{server.url}/a",))), "x.bin", tmp_path)
    assert (server.asked, list(tmp_path.iterdir())) == ([], [])


def test_nothing_is_downloaded_without_tls(plain_server, tmp_path):
    plain_server.files["/a"] = CONTENT
    with pytest.raises(DataError, match=r"is no https address.*put it into"):
        fetch(card(x_bin=RemoteFile(urls=(f"{plain_server.url}/a",), sha256=SHA256)), "x.bin", tmp_path)
    assert (plain_server.asked, list(tmp_path.iterdir())) == ([], [])


def test_redirections_are_followed_to_tls_only(server, plain_server, tmp_path):
    server.files |= {"/a": "/b", "/b": CONTENT, "/c": f"{plain_server.url}/d"}
    plain_server.files["/d"] = CONTENT
    remote = RemoteFile(urls=(f"{server.url}/c",), sha256=SHA256)
    with pytest.raises(DataError, match=r"http://.*/d is no https address"):
        fetch(card(x_bin=remote), "x.bin", tmp_path)
    assert (plain_server.asked, list(tmp_path.iterdir())) == ([], [])
    remote = RemoteFile(urls=(f"{server.url}/a",), sha256=SHA256)
    assert fetch(card(x_bin=remote), "x.bin", tmp_path).read_bytes() == CONTENT


def test_a_server_that_nobody_vouches_for_is_not_trusted(server, tmp_path, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    server.files["/a"] = CONTENT
    with pytest.raises(DataError, match=r"CERTIFICATE_VERIFY_FAILED|certificate"):
        fetch(card(x_bin=RemoteFile(urls=(f"{server.url}/a",), sha256=SHA256)), "x.bin", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_more_is_downloaded_than_the_official_file_has(server, tmp_path):
    server.files["/a"] = CONTENT * 100_000
    remote = RemoteFile(urls=(f"{server.url}/a",), sha256=SHA256, size=len(CONTENT))
    with pytest.raises(DataError, match=r"x\.bin is larger than the official file"):
        fetch(card(x_bin=remote), "x.bin", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_ends_early_is_not_used(server, tmp_path):
    server.files["/a"], server.length = CONTENT[:5], len(CONTENT)
    with pytest.raises(DataError, match="cannot download"):
        fetch(card(x_bin=RemoteFile(urls=(f"{server.url}/a",), sha256=SHA256)), "x.bin", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    remote = RemoteFile(urls=("https://127.0.0.1:9/x",), sha256=SHA256)
    with pytest.raises(DataError, match=r"get x\.bin from https://127.0.0.1:9/x and put it into") as caught:
        fetch(card(x_bin=remote), "x.bin", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="download=False"):
        fetch(card(x_bin=remote), "x.bin", tmp_path, download=False)


def test_a_file_at_hand_is_used_with_a_warning_if_it_is_another(tmp_path):
    remote = RemoteFile(urls=(), sha256=SHA256, aliases=("old.bin",))
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "old.bin").write_bytes(CONTENT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fetch(card(x_bin=remote), "x.bin", tmp_path, subfolders=("sub",)) == folder / "old.bin"
    (tmp_path / "x.bin").write_bytes(b"other")
    with pytest.warns(DataWarning, match="is not the official x.bin of Test: its checksum differs"):
        assert fetch(card(x_bin=remote), "x.bin", tmp_path, subfolders=("sub",)) == tmp_path / "x.bin"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch(card(x_bin=remote), "x.bin", tmp_path, warn=False)


def test_the_archive_is_the_last_resort(server, tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:bz2") as tar:
        info = tarfile.TarInfo("folder/x.bin")
        info.size = len(CONTENT)
        tar.addfile(info, io.BytesIO(CONTENT))
    server.files["/archive"] = packed.getvalue()
    archive = RemoteFile(urls=(f"{server.url}/archive",), sha256=hashlib.sha256(packed.getvalue()).hexdigest())
    remote = RemoteFile(urls=(f"{server.url}/gone",), md5=MD5, archive="a.tar", member="folder/x.bin")
    path = fetch(card(x_bin=remote, a_tar=archive), "x.bin", tmp_path)
    assert path == tmp_path / "x.bin"
    assert path.read_bytes() == CONTENT
    wrong = RemoteFile(urls=(), md5="0" * 32, archive="a.tar", member="folder/x.bin")
    with pytest.raises(DataError, match="does not have the checksum"):
        fetch(card(y_bin=wrong, a_tar=archive), "y.bin", tmp_path)
    absent = RemoteFile(urls=(), md5=MD5, archive="a.tar", member="folder/z.bin")
    with pytest.raises(DataError, match=r"z\.bin"):
        fetch(card(z_bin=absent, a_tar=archive), "z.bin", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "x.bin"]


def test_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("NDEM_ZOO_DATA", raising=False)
    assert "ndem_zoo" in str(data_folder())
    monkeypatch.setenv("NDEM_ZOO_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    assert data_folder(tmp_path / "x") == tmp_path / "x"


# ------------------------------------------------------------------------------------------------------------ read_npz


def test_read_npz(tmp_path):
    np.savez(tmp_path / "a.npz", R=np.arange(3), E=np.arange(2), extra=np.ones(1))
    assert sorted(read_npz(tmp_path / "a.npz", ("R",), ("extra", "absent"))) == ["R", "extra"]
    with pytest.raises(FileFormatError, match="has no F, z; it has R, E, extra"):
        read_npz(tmp_path / "a.npz", ("R", "F", "z"))


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_npz(tmp_path, keep, save):
    path = tmp_path / "a.npz"
    save(path, R=np.random.default_rng(0).normal(size=1000))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(FileFormatError, match="damaged, truncated"):
        read_npz(path, ("R",))


def test_a_bit_that_flipped(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, R=np.arange(1000.0))
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="CRC"):
        read_npz(path, ("R",))


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    np.savez(tmp_path / "a.npz", R=np.array([Bomb()], dtype=object))
    with pytest.raises(FileFormatError, match="never loaded"):
        read_npz(tmp_path / "a.npz", ("R",))
    assert not (tmp_path / "exploded").exists()


def test_other_files_are_not_npz(tmp_path):
    (tmp_path / "a.npz").write_text("hello")
    np.save(tmp_path / "b.npy", np.arange(3))
    for name in ("a.npz", "b.npy"):
        with pytest.raises(FileFormatError):
            read_npz(tmp_path / name, ("R",))
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "none.npz", ("R",))


def test_the_checksum_is_that_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")  # the example of FIPS 180
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
