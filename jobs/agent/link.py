"""One connection between an agent and its leader: lines of JSON over TCP, never waited for."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Iterable
from typing import Any

MOST_BYTES = 64 * 1024 * 1024
"""A peer that sends a longer line is not an agent of ours."""


class Link:
    """Sends and receives messages without waiting.

    Args:
        connection: a TCP socket that is connected, or is just being; the link owns it.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._out = b""
        self._in = b""
        self.is_open = True
        self.error: OSError | None = None
        """What ended the connection, where the peer did not."""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message as soon as the connection takes it; one that is closed takes nothing."""
        if self.is_open:
            self._out += (json.dumps(message) + "\n").encode()
            self.flush()

    def flush(self) -> None:
        while self._out:
            try:
                self._out = self._out[self._socket.send(self._out) :]
            except BlockingIOError:
                return
            except OSError as error:
                self._out, self.error = b"", self.error or error
                return  # what the peer has still sent can be read

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come; `is_open` turns False at the connection's end."""
        self.flush()
        while self.is_open:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                data, self.error = b"", self.error or error
            if not data or len(self._in) > MOST_BYTES:
                self.close()
            self._in += data
        *lines, self._in = self._in.split(b"\n")
        try:
            return [message for line in lines if isinstance(message := json.loads(line), dict)]
        except ValueError:
            self.close()
            return []

    @property
    def is_connected(self) -> bool:
        """Whether the peer's host has answered."""
        with contextlib.suppress(OSError):
            return bool(self._socket.getpeername())
        return False

    @property
    def has_unsent(self) -> bool:
        return bool(self._out)

    def close(self) -> None:
        self.is_open = False
        self._socket.close()


def wait_for(links: Iterable[Link], descriptors: Iterable[int], seconds: float) -> None:
    """Waits until one of them can go on, and no longer than that."""
    poll = select.poll()
    for link in (link for link in links if link.is_open):
        poll.register(link.fileno(), select.POLLIN | (select.POLLOUT if link.has_unsent else 0))
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll(1000 * seconds)
