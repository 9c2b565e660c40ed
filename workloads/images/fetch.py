"""Downloads a dataset through torchvision, so that it never hangs: every wait here has a deadline.

torchvision opens addresses without a time-out and takes its mirrors one after the other. So each mirror is asked first,
all at the same time and for a few seconds, and only those that answer are left to torchvision.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import queue
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workloads.images.sources import Source
from workloads.images.vision import torchvision

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0
"""How long a mirror may take to send its first bytes."""
READ_TIMEOUT_S = 10.0
"""How long a mirror may be silent in the middle of a download."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class FetchError(Exception):
    """Why a dataset cannot be downloaded: one line that names each mirror and its failure."""


def fetch(source: Source, into: Path, timeout_s: float) -> Path:
    """Downloads, checks and unpacks a dataset's files with torchvision's own code.

    Args:
        source: one that is downloaded.
        into: an empty directory.
        timeout_s: for all of it.

    Returns:
        The directory, in `into`, of the unpacked files.

    Raises:
        FetchError: no mirror has it, or not in time.
        OSError: the disk is full, or cannot be written.
        WorkloadError: torchvision cannot be imported.
    """
    base = getattr(torchvision().datasets, source.folder)
    started = time.monotonic()  # importing is no download
    failures = {}
    answering = []
    for mirror, failure in _probe(base.mirrors, base.resources[0][0], min(PROBE_TIMEOUT_S, timeout_s)).items():
        if failure is None:
            answering.append(mirror)
        else:
            failures[mirror] = failure
    if answering and failures:
        log.info("mirrors of %s left out: %s", source.title, _listed(failures))
    for attempt in range(len(answering)):
        # torchvision goes on to its next mirror when one refuses or sends the wrong bytes, and not when one falls
        # silent or is slow: then the mirrors after the first get their share of the time.
        mirrors = answering[attempt:]
        share = (timeout_s - (time.monotonic() - started)) / len(mirrors)
        if share <= 0:
            failures |= dict.fromkeys(mirrors, "no time was left for it (data.download_timeout_s)")
            break
        log.info("downloading %s from %s, for at most %.0f s", source.title, " or ".join(mirrors), share)
        place = into / str(attempt)
        place.mkdir()
        try:
            _download(base, mirrors, place, share)
        except _AllTriedError as error:
            failures[" and ".join(mirrors)] = str(error)
            break
        except _StuckError as error:
            failures[" then ".join(mirrors)] = str(error)
            continue
        size = sum(path.stat().st_size for path in place.rglob("*.gz"))
        log.info("downloaded %s: %.2f MiB in %.1f s", source.title, size / 2**20, time.monotonic() - started)
        return source.raw(place)
    raise FetchError(_listed(failures))


class _AllTriedError(Exception):
    """torchvision has tried every mirror in its list."""


class _StuckError(Exception):
    """It has not: one of them fell silent, or took too long."""


def _probe(mirrors: list[str], name: str, timeout_s: float) -> dict[str, str | None]:
    """What is wrong with each mirror, in order; None where one has begun to send a gzip file within the time."""
    answers: queue.Queue[tuple[str, str | None]] = queue.Queue()
    started = time.monotonic()
    for mirror in mirrors:
        # Daemons, as nothing can end a look-up of a name that hangs.
        threading.Thread(
            target=lambda mirror=mirror: answers.put((mirror, _ask(mirror + name, timeout_s))), daemon=True
        ).start()
    result: dict[str, str | None] = dict.fromkeys(mirrors, f"no answer within {timeout_s:g} s")
    with contextlib.suppress(queue.Empty):
        for _ in mirrors:
            mirror, failure = answers.get(timeout=max(0.0, started + timeout_s + 0.2 - time.monotonic()))
            result[mirror] = failure
    return result


def _ask(url: str, timeout_s: float) -> str | None:
    started = time.monotonic()
    try:
        # Opened as torchvision does, proxies of the environment included.
        request = urllib.request.Request(url, headers={"User-Agent": "pytorch/vision"})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            begin = response.read(2)
    except Exception as error:
        return f"{_words(error, timeout_s)}{_proxy(url)} after {time.monotonic() - started:.1f} s"
    return None if begin == b"\x1f\x8b" else "answers with something that is no gzip file"


def _proxy(url: str) -> str:
    """A word on the proxy that an address is asked through; its own address, which may hold a password, is left out."""
    parts = urllib.parse.urlsplit(url)
    through = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or "")
    return f" through the proxy of {parts.scheme}_proxy" if through else ""


def _download(base: Any, mirrors: list[str], place: Path, timeout_s: float) -> None:
    """torchvision's download into `place`.

    Raises:
        _AllTriedError, _StuckError: what went wrong with the mirrors.
        OSError: what went wrong with the disk.
    """
    allowed = list(mirrors)
    # Of the same name, as that names the folder.
    dataset = type(base.__name__, (base,), {"mirrors": allowed})
    raised: list[BaseException] = []

    def work() -> None:
        try:
            dataset(place, download=True)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True, name=f"download of {base.__name__}")
    with _default_timeout(min(READ_TIMEOUT_S, timeout_s)), _quiet():
        thread.start()
        thread.join(timeout_s)
    if thread.is_alive():
        allowed.clear()  # what it does now fails, and there is no other mirror for it to go on with
        raise _StuckError(f"not done after {timeout_s:.0f} s (data.download_timeout_s is how long all may take)")
    if not raised:
        return
    error = raised[0]
    if isinstance(error, OSError) and error.errno in _DISK and not isinstance(error, urllib.error.URLError):
        raise error
    words = _words(error, READ_TIMEOUT_S)
    raise _AllTriedError(words) if isinstance(error, RuntimeError) else _StuckError(words)


@contextlib.contextmanager
def _default_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torchvision's progress bars, which it cannot be told to leave out."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _listed(failures: dict[str, str]) -> str:
    return "; ".join(f"{mirror}: {failure}" for mirror, failure in failures.items())


def _words(error: BaseException, timeout_s: float) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}".strip()
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _words(error.reason, timeout_s)
    if isinstance(error, socket.gaierror):
        return f"its name cannot be looked up ({error.strerror})"
    if isinstance(error, TimeoutError):
        return f"silent for {timeout_s:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return " ".join(str(error).split()) or type(error).__name__
