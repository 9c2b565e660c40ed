"""Downloads from real servers that behave well and badly."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.workloads.images.conftest import Small, Web
from workloads.base import WorkloadError
from workloads.images import fetch
from workloads.images.config import ImageDataConfig
from workloads.images.prepare import Prepared, look, make_ready, prepare
from workloads.images.sources import FILES, SOURCES


def mnist(root: Path, **settings: Any) -> ImageDataConfig:
    return ImageDataConfig.model_validate({"source": "mnist", "root": str(root), "download_timeout_s": 20, **settings})


def assert_good(root: Path, small: Small) -> None:
    folder = root / "MNIST" / "raw"
    assert {path.name for path in folder.iterdir()} == {*FILES, "checksums.json"}
    assert {name: (folder / name).read_bytes() for name in FILES} == small.raw
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    assert look(SOURCES["mnist"], root).recorded


def refused(data: ImageDataConfig, root: Path) -> str:
    with pytest.raises(WorkloadError) as info:
        make_ready(data)
    line = str(info.value)
    assert "\n" not in line
    assert not [path for path in root.rglob("*") if path.is_file()]
    assert not list(root.iterdir())
    return line


def test_downloads_once(web: Web, small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    web.mirrors("good")
    prepared = prepare(mnist(tmp_path / "data"), tmp_path / "job")
    assert prepared.announcement == (
        f"data: MNIST (1,500 handwritten digits to train on, 297 held out) in {tmp_path}/data/MNIST/raw"
    )
    assert Prepared.read(tmp_path / "job") == prepared
    assert_good(tmp_path / "data", small)
    assert re.search(r"downloaded MNIST: 0\.\d\d MiB in \d+\.\d s", caplog.text)
    asked = len(web.asked)
    assert make_ready(mnist(tmp_path / "data")) == prepared
    assert len(web.asked) == asked


def test_prints_nothing(web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    web.mirrors("good")
    make_ready(mnist(tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "bad", ["404", "html", "hang", "second-404", "second-html", "late-corrupt", "late-truncated", "late-half"]
)
def test_the_second_mirror_has_it(bad: str, web: Web, small: Small, tmp_path: Path) -> None:
    web.mirrors(bad, "good")
    make_ready(mnist(tmp_path))
    assert_good(tmp_path, small)


@pytest.mark.parametrize("bad", ["second-hang", "late-hang", "late-stall", "second-drip"])
def test_a_mirror_that_stops_half_way_does_not_keep_from_the_next(
    bad: str, web: Web, small: Small, tmp_path: Path
) -> None:
    web.mirrors(bad, "good")
    web.patience(1.5)
    began = time.monotonic()
    make_ready(mnist(tmp_path, download_timeout_s=5))
    assert time.monotonic() - began < 8
    assert_good(tmp_path, small)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("404", r"/404/: HTTP 404 Not Found after \d"),
        ("html", r"/html/: answers with something that is no gzip file"),
        ("hang", r"/hang/: (silent for|no answer within) 0\.7 s"),
        ("corrupt", r"/corrupt/: train-images-idx3-ubyte\.gz is (no sound gzip file|not MNIST's)"),
        ("truncated", r"/truncated/: train-images-idx3-ubyte\.gz is a gzip file that was cut off after"),
        ("half", r"/half/: train-images-idx3-ubyte\.gz is a gzip file that was cut off after"),
        ("stall", r"/stall/: silent for 0\.7 s"),
        ("drip", r"/drip/: not done after [12] s \(data\.download_timeout_s"),
    ],
)
def test_one_line_says_what_was_tried_and_what_to_do(bad: str, words: str, web: Web, tmp_path: Path) -> None:
    web.mirrors(bad)
    if bad in ("hang", "stall"):
        web.patience(0.7)
    began = time.monotonic()
    line = refused(mnist(tmp_path, download_timeout_s=2 if bad == "drip" else 20), tmp_path)
    assert time.monotonic() - began < 8
    assert re.search(words, line)
    assert f"{web.address}/{bad}/" in line
    assert f"python -m workloads.images.prepare data.source=mnist data.root={tmp_path}" in line
    assert "data.source=digits" in line
    # and then, with the network repaired,
    web.mirrors("good")
    web.patience(3.0)
    make_ready(mnist(tmp_path))


def test_every_mirror_is_named_with_its_failure(web: Web, tmp_path: Path) -> None:
    web.mirrors("404", "html", "hang")
    web.patience(0.7)
    line = refused(mnist(tmp_path), tmp_path)
    assert [f"/{bad}/: " in line for bad in ("404", "html", "hang")] == [True] * 3


def test_mirrors_are_asked_side_by_side(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No one is answered before all four are asked."""
    monkeypatch.setattr(fetch, "PROBE_TIMEOUT_S", 20.0)
    web.mirrors("meet", "x/meet", "y/meet", "z/meet")
    assert refused(mnist(tmp_path), tmp_path).count("HTTP 404 Not Found") == 4


def test_a_mirror_that_no_time_is_left_for_is_named(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer took what time there was."""
    web.mirrors("good")

    def late(mirrors: list[str], name: str, timeout_s: float) -> dict[str, str | None]:
        time.sleep(timeout_s)
        return dict.fromkeys(mirrors)

    monkeypatch.setattr(fetch, "_probe", late)
    line = refused(mnist(tmp_path, download_timeout_s=0.1), tmp_path)
    assert f"no download: {web.address}/good/: no time was left for it (data.download_timeout_s); " in line


def test_a_download_is_said_to_be_waited_for(web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where only warnings are shown, as in a submission's preparation."""
    assert logging.getLogger().getEffectiveLevel() == logging.WARNING
    web.mirrors("good")
    prepare(mnist(tmp_path / "data"), tmp_path / "job")
    assert re.match(rf"downloading MNIST from {web.address}/good/, for at most \d+ s", caplog.messages[0])


@contextmanager
def full_backlog() -> Iterator[int]:
    """A port where connecting is never answered: its queue of connections is full, and nobody takes any."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(server.getsockname())
            waiting.append(client)
        yield server.getsockname()[1]
        for client in waiting:
            client.close()


def test_nobody_answers_at_all(web: Web, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with full_backlog() as port:
            addresses = [refusing, f"http://127.0.0.1:{port}/", "http://no-such-host.invalid/"]
            web.at(*addresses)
            began = time.monotonic()
            line = refused(mnist(tmp_path), tmp_path)
            assert time.monotonic() - began < 8
    assert re.search(re.escape(refusing) + r": connection refused after \d\.\d s", line)
    assert re.search(rf":{port}/: (silent for|no answer within) 3 s", line)
    assert re.search(r"no-such-host\.invalid/: (its name cannot be looked up|no answer within)", line)


def test_a_look_up_of_a_name_that_hangs_holds_nobody(
    web: Web, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the resolver is not real here: a silent name server would take the box's own settings."""
    over = threading.Event()
    real = socket.getaddrinfo

    def hanging(host: str, *args: Any, **kwargs: Any) -> Any:
        if host == "slow.invalid":
            over.wait(60)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    web.at("http://slow.invalid/", f"{web.address}/good/")
    began = time.monotonic()
    make_ready(mnist(tmp_path))
    assert time.monotonic() - began < 8
    over.set()
    assert_good(tmp_path, small)


def test_the_environments_proxy_is_asked_and_named(
    web: Web, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server plays the proxy: it is sent the whole address, of a host that nobody can look up.
    monkeypatch.setenv("http_proxy", web.address)
    monkeypatch.setenv("no_proxy", "")
    web.at("http://far.invalid/good/")
    make_ready(mnist(tmp_path))
    assert_good(tmp_path, small)
    assert web.asked[0].startswith("http://far.invalid/good/")
    monkeypatch.setenv("http_proxy", "http://me:" + "secret@127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)
    (tmp_path / "other").mkdir()
    line = refused(mnist(tmp_path / "other"), tmp_path / "other")
    assert "far.invalid/good/: connection refused through the proxy of http_proxy after" in line
    assert "secret" not in line


def test_an_old_download_that_is_damaged_is_made_good(
    web: Web, small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    web.mirrors("good")
    make_ready(mnist(tmp_path))
    target = tmp_path / "MNIST" / "raw" / FILES[0]
    target.write_bytes(target.read_bytes()[:5000])
    make_ready(mnist(tmp_path))
    assert_good(tmp_path, small)
    assert f"{target} is truncated: 5,000 of 1,176,016 bytes; it is downloaded again" in caplog.text


def test_a_half_of_torchvisions_own_is_not_taken(web: Web, small: Small, tmp_path: Path) -> None:
    folder = small.put(tmp_path)
    (folder / FILES[0]).write_bytes(small.raw[FILES[0]][:1000])
    (folder / FILES[1]).unlink()
    (folder / f"{FILES[1]}.gz").write_bytes(small.gz[FILES[1]][:50])
    web.mirrors("good")
    make_ready(mnist(tmp_path))
    (folder / f"{FILES[1]}.gz").unlink()
    assert_good(tmp_path, small)


def test_auto_says_which_and_why(web: Web, small: Small, tmp_path: Path) -> None:
    web.mirrors("404", "html")
    line = make_ready(mnist(tmp_path, source="auto")).announcement
    assert re.fullmatch(
        r"data: digits \(1,500 handwritten digits from scikit-learn to train on, 297 held out\) in "
        rf"{tmp_path}/Digits/raw, as MNIST could not be had: no download: "
        rf"{web.address}/404/: HTTP 404 Not Found after \d\.\d s; "
        rf"{web.address}/html/: answers with something that is no gzip file",
        line,
    )
    web.mirrors("good")
    line = make_ready(mnist(tmp_path, source="auto")).announcement
    assert line.startswith("data: MNIST (1,500 handwritten digits to train on, 297 held out) in ")


def test_without_network_it_is_over_in_seconds(tmp_path: Path) -> None:
    """With the real addresses; where there is a network after all, they are MNIST's."""
    began = time.monotonic()
    assert make_ready(mnist(tmp_path, source="auto", download_timeout_s=1)).source in ("digits", "mnist")
    assert time.monotonic() - began < fetch.PROBE_TIMEOUT_S + 7
