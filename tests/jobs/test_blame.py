"""Of all the failures that one event makes, the one that made it is named."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable

import pytest

from jobs.blame import Failure, Kind, blame, failure_of, failure_of_exit, kind_of
from jobs.errors import RendezvousError, UnreachableError


def failure(rank: int, when: float, kind: Kind) -> Failure:
    return Failure(rank, f"host{rank // 2}", when, kind, f"{kind} on {rank}")


def everywhere(failures: list[Failure]) -> set[int]:
    """Whom blame names, over every order in which the failures may be listed."""
    return {blame(order).rank for order in itertools.permutations(failures)}


def test_the_earliest_of_ones_own_is_to_blame() -> None:
    assert everywhere([failure(0, 3, "error"), failure(1, 2, "error"), failure(2, 4, "exit")]) == {1}


@pytest.mark.parametrize("kind", ["error", "exit", "killed"])
def test_an_own_failure_beats_the_loss_of_a_peer_however_late(kind: Kind) -> None:
    assert everywhere([failure(0, 1, "lost_peer"), failure(1, 9, kind), failure(2, 2, "lost_peer")]) == {1}


def test_where_all_lost_a_peer_the_earliest_is_named() -> None:
    assert everywhere([failure(2, 1.5, "lost_peer"), failure(1, 1, "lost_peer")]) == {1}


def test_who_could_not_reach_rank_0_knows_more_than_who_waited() -> None:
    assert everywhere([failure(0, 1, "lost_peer"), failure(1, 2, "unreachable"), failure(2, 1.5, "lost_peer")]) == {1}
    assert everywhere([failure(0, 3, "killed"), failure(1, 2, "unreachable")]) == {0}


def test_the_same_moment_goes_by_rank() -> None:
    assert everywhere([failure(3, 1, "error"), failure(1, 1, "error")]) == {1}


class DistBackendError(RuntimeError):
    """As torch names it; this file imports no torch."""


class DistNetworkError(RuntimeError):
    pass


def caught(raise_it: Callable[[], None]) -> BaseException:
    try:
        raise_it()
    except BaseException as error:
        return error
    raise AssertionError


def chained(inner: BaseException, outer: BaseException, how: str) -> BaseException:
    def raise_it() -> None:
        try:
            raise inner
        except BaseException as error:
            if how == "from":
                raise outer from error
            if how == "from None":
                raise outer from None
            raise outer  # noqa: B904

    return caught(raise_it)


LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:3402"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), "error"),
        (RuntimeError("shape mismatch"), "error"),
        (RuntimeError(LOST), "lost_peer"),
        (RuntimeError("Timed out waiting 2000ms for recv operation to complete"), "lost_peer"),
        (DistBackendError("NCCL communicator was aborted on rank 1"), "lost_peer"),
        (DistBackendError("invalid usage"), "error"),
        (DistNetworkError("anything"), "lost_peer"),
        (RuntimeError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error ... out of memory"), "error"),
        (RuntimeError("[c10d] NCCL error: remote process exited or there was a network error"), "lost_peer"),
        (RuntimeError("watchdog: loss diverged"), "error"),
        (ConnectionResetError("Connection reset by peer"), "error"),  # some server's, not a rank's
        (ValueError("Connection closed by peer"), "error"),
        (SystemExit(3), "exit"),
        (KeyboardInterrupt(), "error"),
        (MemoryError(), "error"),
        (RendezvousError("3 of 4 ranks came"), "lost_peer"),
        (UnreachableError("rank 0 announced itself, and it cannot be reached from here"), "unreachable"),
        (chained(RuntimeError(LOST), ValueError("cannot save"), "from"), "lost_peer"),
        (chained(RuntimeError(LOST), ValueError("cannot save"), "context"), "lost_peer"),
        (chained(RuntimeError(LOST), ValueError("cannot save"), "from None"), "error"),
        (chained(ValueError("x"), RuntimeError(LOST), "context"), "lost_peer"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:40],
)
def test_kinds(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert kind_of(first) == "error"


def test_the_record_of_an_exception() -> None:
    def raise_it() -> None:
        raise ValueError("two\nlines")

    record = failure_of(caught(raise_it), 3, "host1", 12.5, "/log")
    assert (record.rank, record.host, record.when, record.kind) == (3, "host1", 12.5, "error")
    assert record.message == "ValueError: two lines"
    assert "in raise_it" in record.traceback
    assert record.headline() == "rank 3 on host1: ValueError: two lines (log: /log)"
    assert Failure(**json.loads(json.dumps(record.to_json()))) == record


def test_messages_are_bounded_and_never_empty() -> None:
    assert failure_of(MemoryError(), 0, "h", 0, "").message == "MemoryError"
    assert len(failure_of(ValueError("x" * 10_000), 0, "h", 0, "").message) == 2000
    assert failure_of(SystemExit("bye"), 0, "h", 0, "").message == "called sys.exit('bye') before its work was done"


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (0, "exit", "exited with code 0 before its work was done"),
        (3, "exit", "exited with code 3"),
        (-signal.SIGKILL, "killed", "killed by SIGKILL (out of memory"),
        (-signal.SIGSEGV, "killed", "killed by SIGSEGV"),
        (-77, "killed", "killed by signal 77"),
    ],
)
def test_the_record_of_a_rank_that_left_none(code: int, kind: str, words: str) -> None:
    record = failure_of_exit(code, 1, "host0", 5, "/log")
    assert record.kind == kind
    assert words in record.message
