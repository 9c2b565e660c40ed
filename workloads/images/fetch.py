"""Downloads a dataset, so that it never hangs: every wait here has a deadline.

The mirrors are asked first, all at the same time and for a few seconds; those that answer are then tried in order.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import queue
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workloads.images import idx
from workloads.images.sources import FILES, Source

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0
"""How long a mirror may take to send its first bytes."""
READ_TIMEOUT_S = 10.0
"""How long a mirror may be silent in the middle of a download."""


class FetchError(Exception):
    """Why a dataset cannot be downloaded: one line that names each mirror and its failure."""


def fetch(source: Source, into: Path, timeout_s: float) -> None:
    """Downloads, unpacks and checks a dataset's files.

    Args:
        source: one that is downloaded.
        into: an empty directory, which then has the files.
        timeout_s: for all of it.

    Raises:
        FetchError: no mirror has it, or not in time.
        OSError: the disk is full, or cannot be written.
    """
    started = time.monotonic()
    failures = {}
    answering = []
    for mirror, failure in _probe(source.mirrors, f"{FILES[0]}.gz", min(PROBE_TIMEOUT_S, timeout_s)).items():
        if failure is None:
            answering.append(mirror)
        else:
            failures[mirror] = failure
    if answering and failures:
        log.info("mirrors of %s left out: %s", source.title, _listed(failures))
    for number, mirror in enumerate(answering):
        share = (timeout_s - (time.monotonic() - started)) / (len(answering) - number)
        if share <= 0:
            failures[mirror] = "no time was left for it (data.download_timeout_s)"
            continue
        log.info("downloading %s from %s, for at most %.0f s", source.title, mirror, share)
        try:
            size = _download(source, mirror, into, share)
        except _MirrorError as error:
            failures[mirror] = str(error)
            continue
        log.info("downloaded %s: %.2f MiB in %.1f s", source.title, size / 2**20, time.monotonic() - started)
        return
    raise FetchError(_listed(failures))


class _MirrorError(Exception):
    """What is wrong with a mirror."""


def _download(source: Source, mirror: str, into: Path, timeout_s: float) -> int:
    """Those files that an earlier mirror has not given; returns how many bytes came."""
    deadline, size = time.monotonic() + timeout_s, 0
    for name in FILES:
        if (into / name).exists():
            continue
        packed = _get(f"{mirror}{name}.gz", deadline, timeout_s)
        try:
            content = idx.gunzip(packed)
        except idx.IdxError as error:
            raise _MirrorError(f"{name}.gz {error}") from None
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != source.md5[name]:
            raise _MirrorError(f"{name}.gz is not {source.title}'s: its content has another md5")
        (into / name).write_bytes(content)
        size += len(packed)
    return size


def _get(url: str, deadline: float, timeout_s: float) -> bytes:
    patience_s = max(0.1, min(READ_TIMEOUT_S, deadline - time.monotonic()))
    content = b""
    try:
        with _opened(url, patience_s) as response:
            while piece := response.read1(2**20):  # what has come so far, unlike read, which waits for all of it
                content += piece
                if time.monotonic() > deadline:
                    break
            else:
                return content
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() < deadline:
            raise _MirrorError(_words(error, patience_s)) from None
    raise _MirrorError(f"not done after {timeout_s:.0f} s (data.download_timeout_s is how long all may take)")


def _opened(url: str, timeout_s: float) -> Any:
    """The answer, through the proxies of the environment."""
    return urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "meshrun"}), timeout=timeout_s)


def _probe(mirrors: Sequence[str], name: str, timeout_s: float) -> dict[str, str | None]:
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
        with _opened(url, timeout_s) as response:
            begin = response.read(2)
    except Exception as error:
        return f"{_words(error, timeout_s)}{_proxy(url)} after {time.monotonic() - started:.1f} s"
    return None if begin == b"\x1f\x8b" else "answers with something that is no gzip file"


def _proxy(url: str) -> str:
    """A word on the proxy that an address is asked through; its own address, which may hold a password, is left out."""
    parts = urllib.parse.urlsplit(url)
    through = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or "")
    return f" through the proxy of {parts.scheme}_proxy" if through else ""


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
