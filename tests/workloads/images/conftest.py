"""A small stand-in for MNIST, and real servers that serve it well and badly."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from workloads.images import fetch
from workloads.images.sources import FILES, SOURCES, digits


@dataclass(frozen=True)
class Small:
    """scikit-learn's digits, packed as MNIST is."""

    raw: Mapping[str, bytes]
    gz: Mapping[str, bytes]

    def put(self, root: Path, *, packed: bool = False) -> Path:
        """Lays the files out as torchvision does; returns their directory."""
        folder = root / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for name in FILES:
            if packed:
                (folder / f"{name}.gz").write_bytes(self.gz[name])
            else:
                (folder / name).write_bytes(self.raw[name])
        return folder


@pytest.fixture(scope="session")
def small_files() -> Small:
    raw = digits()
    return Small(raw, {name: gzip.compress(content, mtime=0) for name, content in raw.items()})


@pytest.fixture
def small(small_files: Small, monkeypatch: pytest.MonkeyPatch) -> Small:
    """Makes `mnist` mean these files, with other sums and other addresses."""
    md5 = {name: hashlib.md5(small_files.raw[name]).hexdigest() for name in FILES}
    # Nothing listens there; tests that want a server set their own.
    theirs = dataclasses.replace(SOURCES["mnist"], md5=md5, mirrors=("http://127.0.0.1:9/",))
    monkeypatch.setitem(SOURCES, "mnist", theirs)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # urllib reads the environment's proxies once a process.
    monkeypatch.setattr(urllib.request, "_opener", None)
    return small_files


@dataclass(frozen=True)
class Web:
    """One server; the first part of a path says how it behaves: `good`, `404`, `html`, `hang`, `drip`, `half`, ..."""

    address: str
    asked: list[str]
    monkeypatch: pytest.MonkeyPatch

    def mirrors(self, *behaviours: str) -> None:
        """What MNIST is downloaded from."""
        self.at(*(f"{self.address}/{behaviour}/" for behaviour in behaviours))

    def at(self, *addresses: str) -> None:
        """The same, at other addresses."""
        self.monkeypatch.setitem(SOURCES, "mnist", dataclasses.replace(SOURCES["mnist"], mirrors=addresses))

    def patience(self, seconds: float) -> None:
        """How long a mirror may be silent; a good one, too, may take its time on a loaded machine."""
        self.monkeypatch.setattr(fetch, "PROBE_TIMEOUT_S", seconds)
        self.monkeypatch.setattr(fetch, "READ_TIMEOUT_S", seconds)


@pytest.fixture
def web(small: Small, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    over = threading.Event()
    asked: list[str] = []
    meeting = threading.Barrier(4)
    hits: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            behaviour, _, name = self.path.rpartition("/")
            behaviour = behaviour.rpartition("/")[2]
            body = small.gz[name.removesuffix(".gz")]
            labels_only, _, kind = behaviour.rpartition("-")
            if labels_only == "late" and name.startswith("train-images"):
                kind = "good"  # it fails at a later file, after the first was had
            if labels_only == "second":
                # It answers when it is asked at first, and fails when the file is wanted.
                hits[behaviour] = hits.get(behaviour, 0) + 1
                kind = "good" if hits[behaviour] == 1 else kind
            if kind == "meet":
                meeting.wait(60)  # until four are here: whoever asks one after the other waits for ever
            if kind in ("404", "meet"):
                self.send_error(404)
                return
            if kind == "hang":
                over.wait(60)
                return
            if kind == "html":
                body = b"<!DOCTYPE html><html><body>Sign in to the guest network</body></html>"
            if kind == "corrupt":
                body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
            length = len(body)
            if kind == "truncated":
                length = len(body) // 2  # says so itself
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            try:
                if kind == "drip":
                    for place in range(len(body)):
                        self.wfile.write(body[place : place + 1])
                        if place > 20 and over.wait(0.05):
                            return
                elif kind == "sluggish":
                    for place in range(0, 250, 50):
                        self.wfile.write(body[place : place + 50])
                        self.wfile.flush()
                        over.wait(1)
                    self.connection.close()
                elif kind == "half":
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    self.connection.close()
                elif kind == "stall":
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    over.wait(60)
                else:
                    self.wfile.write(body[:length])
            except OSError:
                pass  # the other side has gone

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    web = Web(f"http://127.0.0.1:{server.server_port}", asked, monkeypatch)
    web.patience(3.0)
    yield web
    over.set()
    meeting.abort()
    server.shutdown()
    server.server_close()
