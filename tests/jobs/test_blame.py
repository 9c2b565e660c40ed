"""Of all the failures that one event makes, the one that made it is named."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable

import pytest

from jobs.blame import Failure, Kind, LastSeen, blame, error_at_end, failure_of, failure_of_exit, kind_of, root_cause
from jobs.errors import LONGEST, RendezvousError, UnreachableError


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


# --- of all that gave up ----------------------------------------------------------------------------------------------

TORCH = "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
REDUCE, END_STEP = (("/me/mine.py", 53),), (("/me/mine.py", 56), ("/meshrun/workloads/base.py", 300))


def waits(rank: int, *places: tuple[str, int], kind: Kind = "lost_peer") -> Failure:
    """A rank that gave up there; inside end_step each is in a place of its own."""
    frames = [*places, (TORCH, 3252 + rank)] if len(places) < 2 else [*places, ("/meshrun/x.py", rank)]
    text = "".join(f'  File "{file}", line {line}, in run\n    call()\n' for file, line in frames)
    where = f"host{rank // 2}"
    return Failure(rank, where, 5 - rank / 10, kind, "Timed out", f"Traceback\n{text}", f"/run/rank-{rank}.log")


@pytest.mark.parametrize(
    ("lost", "running", "done", "steps", "named", "says"),
    [
        # Who had not given up, however many had: of those the one that is behind, wherever it is listed.
        (
            {0: REDUCE, 1: REDUCE, 3: REDUCE},
            {2},
            {},
            {},
            2,
            "did not fail, but was still running (last in step 7, 3 s ago) when",
        ),
        ({1: REDUCE, 3: REDUCE}, {0, 2}, {}, {2: "6"}, 2, "did not fail, but was still running (last in step 6"),
        (
            {1: REDUCE, 3: REDUCE},
            {0, 2},
            {},
            {2: ""},
            2,
            "did not fail, but was still running (has not finished a step)",
        ),
        (
            {3: REDUCE},
            {0, 1, 2},
            {},
            {2: "6", 0: "10"},
            2,
            "also still running: rank 0 on host0 (last in step 10, 3 s ago), rank 1 on",
        ),
        # Where all have given up: the one that is a step behind, or waits elsewhere.
        ({0: REDUCE, 1: REDUCE, 2: REDUCE, 3: REDUCE}, {}, {}, {2: "6"}, 2, "waited at mine.py:53 in run (last in st"),
        (
            {0: REDUCE, 1: REDUCE, 2: END_STEP, 3: REDUCE},
            {},
            {},
            {},
            2,
            "mine.py:56 in run (last in step 7, 3 s ago), a",
        ),
        (
            {0: END_STEP, 1: END_STEP, 2: REDUCE, 3: END_STEP},
            {},
            {},
            {},
            2,
            "3 others at mine.py:56 in run (last in st",
        ),
        (
            {0: REDUCE, 1: REDUCE, 2: REDUCE, 3: REDUCE},
            {},
            {},
            {2: "8"},
            2,
            "3 others at mine.py:53 in run (last in st",
        ),
        (
            {0: REDUCE, 1: END_STEP},
            {},
            {},
            {},
            1,
            "waited at mine.py:56 in run (last in step 7, 3 s ago), and rank 0 at",
        ),
        ({0: REDUCE, 1: REDUCE}, {}, {}, {0: "6"}, 0, "(last in step 6, 3 s ago), and rank 1 at mine.py:53 in run (l"),
        # Where nothing tells them apart: the first. An abort leaves no traceback; that is no other place.
        ({0: REDUCE, 1: REDUCE, 2: REDUCE}, {}, {}, {}, 2, "Timed out"),
        ({0: REDUCE, 1: REDUCE, 2: ()}, {}, {}, {}, 2, "Timed out"),
        ({0: REDUCE, 1: END_STEP, 2: (("/me/mine.py", 60),)}, {}, {}, {}, 2, "Timed out"),
        # Some have returned: few of them left too early; if they are most, the others are late.
        ({0: REDUCE, 1: REDUCE, 3: REDUCE}, {}, {2}, {}, 2, "returned from its work (last in step 7, 3 s ago) while r"),
        ({2: REDUCE}, {}, {0, 1, 3}, {}, 2, "was still working at mine.py:53 in run (last in step 7, 3 s ago) when"),
        ({0: REDUCE}, {2}, {0, 1, 3}, {}, 2, "did not fail, but was still running"),
    ],
)
def test_of_all_that_gave_up_the_one_that_they_waited_for_is_named(
    lost: dict[int, tuple[tuple[str, int], ...]],
    running: set[int],
    done: set[int],
    steps: dict[int, str],
    named: int,
    says: str,
) -> None:
    seen = {rank: LastSeen(rank, f"host{rank // 2}", steps.get(rank, "7"), 3.0) for rank in range(4)}
    failures = [waits(rank, *places) for rank, places in lost.items()]
    for order in itertools.permutations(failures):
        cause = root_cause(order, seen, running, done)
        assert (cause.rank, cause.host, cause.log) == (named, f"host{named // 2}", f"/run/rank-{named}.log")
        assert says in cause.message


def test_who_could_not_reach_rank_0_is_named_before_who_still_ran() -> None:
    seen = {rank: LastSeen(rank, "host0") for rank in range(3)}
    assert root_cause([waits(0), waits(1, kind="unreachable")], seen, {2}).rank == 1


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
        (RuntimeError("Distributed package doesn't have NCCL built in"), "error"),
        (RuntimeError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!"), "error"),
        (
            RuntimeError("[enforce fail at /gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address"),
            "error",
        ),
        (RuntimeError("Timed out waiting 2000ms for recv operation to complete"), "lost_peer"),
        (DistBackendError("NCCL communicator was aborted on rank 1"), "lost_peer"),
        (DistBackendError("invalid usage"), "error"),
        (DistNetworkError("anything"), "lost_peer"),
        (RuntimeError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error ... out of memory"), "error"),
        (
            DistBackendError("NCCL error ... unhandled system error ... /dev/shm/nccl-1: No space left on device"),
            "error",
        ),
        (DistBackendError("NCCL error ... Error while creating shared memory segment /dev/shm/nccl-1"), "error"),
        (DistBackendError("NCCL error ... unhandled system error ... Connection refused"), "lost_peer"),
        (RuntimeError("gloo/transport/tcp/pair.cc:75] socket: Too many open files"), "error"),
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


def test_an_exception_whose_message_fails_keeps_its_type() -> None:
    class Mine(Exception):
        def __str__(self) -> str:
            raise KeyError("no such text")

    record = failure_of(Mine(), 3, "host1", 12.5, "/log")
    assert record.message == "Mine: its message cannot be shown, because its __str__ raised KeyError"
    assert (record.kind, "Mine" in record.traceback) == ("error", True)


def test_the_record_of_an_exception() -> None:
    def raise_it() -> None:
        raise ValueError("two\nlines")

    record = failure_of(caught(raise_it), 3, "host1", 12.5, "/log")
    assert (record.rank, record.host, record.when, record.kind) == (3, "host1", 12.5, "error")
    assert record.message == "ValueError: two lines"
    assert "in raise_it" in record.traceback
    assert record.headline() == f"rank 3 on host1: ValueError: two lines ({record.place}) (log: /log)"
    assert record.place.startswith("test_blame.py:")
    assert record.place.endswith(", raise_it")
    assert Failure(**json.loads(json.dumps(record.to_json()))) == record


def test_a_traceback_within_a_message_is_not_in_the_headline() -> None:
    from torch._utils import ExceptionWrapper
    from torch.multiprocessing import ProcessRaisedException

    def of_a_worker(error: Exception) -> BaseException:
        """As a DataLoader raises what its worker raised."""
        try:
            raise error
        except type(error):
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        return caught(wrapped.reraise)

    def words(error: BaseException) -> str:
        return failure_of(error, 0, "h", 0, "").message

    worker = "Caught {0} in DataLoader worker process 0: {0}: {1}"
    assert words(of_a_worker(ValueError("bad\nsample"))) == "ValueError: " + worker.format("ValueError", "bad sample")
    assert words(of_a_worker(KeyError("image"))) == "KeyError: " + worker.format("KeyError", "'image'")
    spawned = (
        '-- Process 0 terminated with the following error:\nTraceback (most recent call last):\n  File "x", line 1'
    )
    raised = ProcessRaisedException(f"{spawned}, in f\n    1 / 0\n    ~~^~~\nZeroDivisionError: by zero\n", 0, 7)
    says = "-- Process 0 terminated with the following error: ZeroDivisionError: by zero"
    assert words(raised) == f"ProcessRaisedException: {says}"
    frames = "Exception raised from f at x.cpp:3 (most recent call first):\nframe #0: c10::Error"
    assert words(RuntimeError(f"shape '[3]' is invalid\n{frames}")) == "RuntimeError: shape '[3]' is invalid"
    odd = "Traceback (most recent call last): nothing"
    assert words(ValueError(odd)) == f"ValueError: {odd}"


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("Traceback\n  File x\nValueError: mine\n", "ValueError: mine"),
        ("[rank3]: Traceback\n[rank3]: ValueError: mine\n\n", "ValueError: mine"),
        ("torch.cuda.OutOfMemoryError: CUDA out of memory\n", "torch.cuda.OutOfMemoryError: CUDA out of memory"),
        ("step 3, error 0.5\n", ""),
        ("", ""),
    ],
)
def test_the_error_that_a_log_ends_with(log: str, line: str) -> None:
    assert error_at_end(log) == line


def test_messages_are_bounded_and_never_empty() -> None:
    assert failure_of(MemoryError(), 0, "h", 0, "").message == "MemoryError"
    assert len(failure_of(ValueError("x" * 10_000), 0, "h", 0, "").message) <= LONGEST
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


def test_a_call_of_os_exit_has_its_place() -> None:
    call = 'Stack of its call (most recent call last):\n  File "/u/mine.py", line 8, in act\n    os._exit(0)\n'
    record = failure_of_exit(0, 1, "host0", 5, "", call=call)
    assert record.headline() == "rank 1 on host0: called os._exit(0) before its work was done (mine.py:8, act)"
    assert record.traceback == call


def test_a_rank_that_died_by_itself_has_its_place() -> None:
    log = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x7f (most recent call first):\n"
    log += '  File "/u/mine.py", line 8 in act\n  File "/u/mine.py", line 20 in run\n\nExtension modules: a\n'
    record = failure_of_exit(-signal.SIGSEGV, 1, "host0", 5, "", log)
    assert record.headline() == "rank 1 on host0: killed by SIGSEGV (mine.py:8, act)"
    assert "line 20, in run" in record.traceback
    assert failure_of_exit(-signal.SIGTERM, 1, "host0", 5, "", log).place == ""  # somebody else's doing


def test_who_left_by_a_call_is_named_with_its_place() -> None:
    seen = {rank: LastSeen(rank, "host0", "7", 3.0, left_at="mine.py:8, act" if rank else "") for rank in range(2)}
    cause = root_cause([waits(0, *REDUCE)], seen, done={1})
    assert cause.message.startswith("left its work at mine.py:8, act (last in step 7, 3 s ago) while rank 0 was still")
    assert (cause.rank, cause.place) == (1, "mine.py:8, act")


WATCHDOG = """[rank7]:[E ProcessGroupNCCL.cpp:523] [Rank 7] Watchdog caught collective operation timeout: WorkNCCL(\
SeqNum=4, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600259 milliseconds before timing out.
[rank7]:[E ProcessGroupNCCL.cpp:537] To avoid data inconsistency, we are taking the entire process down.
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [Rank 7] NCCL watchdog thread terminated with exception: {}

frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x57 (0x7f in libc10.so)
Fatal Python error: Aborted
"""


@pytest.mark.parametrize(
    ("end_of_log", "kind", "words"),
    [
        (
            WATCHDOG.format(
                "[Rank 7] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE)"
            ),
            "lost_peer",
            "aborted by NCCL: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE)",
        ),
        (WATCHDOG.format("NCCL error: remote process exited or there was a network error"), "lost_peer", "aborted by"),
        (
            WATCHDOG.format(
                "NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"
                "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
                "Last error:\nError while creating shared memory segment /dev/shm/nccl-1: No space left on device"
            ),
            "killed",
            "killed by SIGABRT",
        ),
        (WATCHDOG.format("CUDA error: an illegal memory access was encountered"), "killed", "killed by SIGABRT"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "killed", "killed by SIGABRT"),
        (
            "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n"
            "  what():  [enforce fail at /gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs.\n",
            "killed",
            "killed by SIGABRT: [enforce fail at /gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes",
        ),
        ("", "killed", "killed by SIGABRT"),
    ],
)
def test_a_rank_that_nccls_watchdog_aborts_has_lost_a_peer(end_of_log: str, kind: str, words: str) -> None:
    record = failure_of_exit(-signal.SIGABRT, 7, "host0", 5, "/log", end_of_log)
    assert (record.kind, record.own) == (kind, kind == "killed")
    assert record.message.startswith(words)
    assert failure_of_exit(-signal.SIGSEGV, 7, "host0", 5, "/log", end_of_log).own


def test_a_hang_of_unknown_cause_names_no_rank() -> None:
    message = "no rank has ended a step for 96 s: 4 ranks are in training (train.py:66, run)"
    assert Failure(0, "host0", 1.0, "hang", message, log="/run/rank-0.log").headline() == message
