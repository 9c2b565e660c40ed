"""The local executor, through the command line: ranks start, finish, fail and are interrupted, and none is left."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.spec import JobSpec, ResourceSpec
from jobs.status import status
from tests.jobs.submitting import ROOT, Line, assert_ended_like_a_script, wait_until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(150)]

Submit = Callable[..., Line]
TWO = ("--gpus-per-node", "2")
FOUR = ("--nodes", "2", "--gpus-per-node", "2")
ENDLESS = ("steps=100000", "pause_seconds=0.05")


# --- success ----------------------------------------------------------------------------------------------------------


def test_two_hosts_of_two(typed: Submit, tmp_path: Path) -> None:
    names = "names=[OMP_NUM_THREADS,MESHRUN_NODENAME,MESHRUN_DEVICE,SUBMITIT_EXECUTOR]"
    line = typed("mine:ENTRY", *FOUR, "--env", "MESHRUN_DEVICE=cpu", names, umask=0)
    code, out, err = line.finish()
    assert (code, err) == (0, ""), out
    record = line.result()
    assert (record["status"], record["nodes"], record["gpus_per_node"]) == ("done", 2, 2)
    assert record["mesh"] == {"dp": 4}
    assert record["result"] == {
        "total": 30.0,
        "hosts": ["host0", "host0", "host1", "host1"],
        "threads": 1,
        "cwd": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "MESHRUN_NODENAME": "host0",
        "MESHRUN_DEVICE": "cpu",
        "SUBMITIT_EXECUTOR": None,
    }
    assert [(row["step"], row["loss"]) for row in line.metrics()] == [(1, 1.5), (2, 1.5), (3, 1.5)]
    on_cpu = ("this machine's CPU over gloo (MESHRUN_DEVICE=cpu)", "ranks on CPU over gloo: MESHRUN_DEVICE=cpu")
    for words in ("executor local", *on_cpu, "host1  2: dp2", "step 1/3", "step 3/3"):
        assert words in out
    assert "total: 30" in out
    assert "\r" not in out
    assert json.loads((line.run_dir / "job.json").read_text())["settings"]["steps"] == 3
    assert "steps: 3" in (line.run_dir / "settings.yaml").read_text()
    assert line.writable_by_others() == []
    line.assert_nothing_left()


def test_with_json_stdout_is_one_object(typed: Submit) -> None:
    code, out, err = typed("mine:ENTRY", *TWO, "--json").finish()
    record = json.loads(out)
    assert (code, record["status"], record["exit_code"], record["result"]["total"]) == (0, "done", 0, 9.0)
    assert "step 3/3" in err


def test_a_workload_may_end_as_scripts_do(typed: Submit, tmp_path: Path) -> None:
    code, out, err = typed("mine:ENTRY", *TWO, "at_end=a script").finish()
    assert (code, err) == (0, ""), out
    assert_ended_like_a_script(tmp_path)


@pytest.mark.parametrize("steps", [9, 3])
def test_a_run_that_a_signal_stops_before_its_last_step_is_not_done(typed: Submit, steps: int) -> None:
    line = typed("mine:ENTRY", *TWO, "does=SIGUSR1", f"steps={steps}", "--json")
    code, out, err = line.finish()
    record = json.loads(out)
    assert line.result().items() <= record.items()
    if steps == 3:  # what is known of step 2 as step 3 ends, is known too late to stop anything
        assert (code, record["exit_code"], record["status"], record["result"]["total"]) == (0, 0, "done", 9.0)
        return
    assert (code, record["exit_code"], record["status"]) == (1, 1, "stopped")
    assert err.splitlines()[-1] == "meshrun: error: the job was stopped: by request, after step 3 of 9"
    assert len(line.metrics()) == 3


def test_a_rank_that_dies_when_its_work_is_done_is_a_warning(typed: Submit) -> None:
    line = typed("mine:ENTRY", *TWO, "at_end=a crash", "rank_0_longer=1")
    code, out, err = line.finish()
    assert (code, err) == (0, ""), out
    warning = "rank 1 on host0: killed by SIGSEGV after its work was done (mine.py:"
    log = f"(log: {line.run_dir}/attempt-0/rank-1.log)"
    record = line.result()
    assert (record["status"], record["result"]["total"]) == ("done", 9.0)
    (said,) = record["warnings"]
    assert said.startswith(warning)
    assert said.endswith(log)
    assert f"warning: {said}\n" in out


AWKWARD = '  it\'s "x" $HOME\n* `id` \\n = ü'


def test_the_environment_reaches_the_ranks_exactly(typed: Submit) -> None:
    words = ("--env", f"AWKWARD={AWKWARD}", "--env", "EMPTY=", "--threads-per-rank", "2")
    line = typed("mine:ENTRY", *words, "names=[AWKWARD,EMPTY,OMP_NUM_THREADS,MKL_NUM_THREADS,NOT_SET]")
    assert line.finish()[0] == 0
    result = line.result()["result"]
    assert (result["AWKWARD"], result["EMPTY"], result["NOT_SET"]) == (AWKWARD, "", None)
    assert (result["OMP_NUM_THREADS"], result["MKL_NUM_THREADS"], result["threads"]) == ("2", "2", 2)


def test_a_directory_with_packages_of_the_same_names(typed: Submit, tmp_path: Path) -> None:
    for package in ("jobs", "workloads", "cluster_configs", "torch_helpers"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise RuntimeError('the wrong {package}')\n")
    for module in ("submit.py", "settings.py", "errors.py"):
        (tmp_path / module).write_text("raise RuntimeError('the wrong module')\n")
    code, out, err = typed("mine:ENTRY", *TWO).finish()
    assert (code, err) == (0, ""), out


# --- failure ----------------------------------------------------------------------------------------------------------


def test_the_rank_that_failed_is_named_and_its_siblings_echo_is_not(typed: Submit) -> None:
    line = typed("mine:ENTRY", *FOUR, "does=echo first", "on_rank=2")
    code, _, err = line.finish()
    assert code == 1
    last = err.splitlines()[-1]
    says = "ValueError: the third layer is missing"
    assert last.startswith(f"meshrun: error: the job failed: rank 2 on host1: {says}")
    assert last.endswith(f"(log: {line.run_dir}/attempt-0/rank-2.log)")
    assert "mine.py" in err
    assert "in act" in err
    assert "onnection closed" not in err
    record = line.result()
    # The sooner of the two that is written down; the job has ended since.
    assert time.time() - record["failure"]["when"] < 20
    assert record["status"] == "failed"
    assert (record["failure"]["rank"], record["failure"]["host"]) == (2, "host1")
    assert says in record["error"]
    line.assert_nothing_left()


def test_a_failure_that_cannot_be_written_down_is_told_all_the_same(typed: Submit) -> None:
    line = typed("mine:ENTRY", "does=raise unrecorded", "on_rank=0")
    code, _, err = line.finish()
    assert code == 1
    assert "rank 0 on host0: ValueError: the third layer is missing (mine.py:" in err.splitlines()[-1]


def test_a_loss_that_is_not_finite_is_that_ranks_whose_it_is(typed: Submit) -> None:
    line = typed("mine:ENTRY", *FOUR, "does=nan", "on_rank=2")
    code, _, err = line.finish()
    assert code == 1
    last = err.splitlines()[-1]
    assert "the job failed: rank 2 on host1: NonFiniteError: step 2: loss is nan on rank 2 on host1; " in last
    assert last.endswith(f"(log: {line.run_dir}/attempt-0/rank-2.log)")
    assert [path.name for path in (line.run_dir / "attempt-0" / "failures").iterdir()] == ["2.json"]


def test_a_failure_with_json_is_one_object(typed: Submit) -> None:
    code, out, err = typed("mine:ENTRY", *TWO, "does=raise", "--json").finish()
    record = json.loads(out)
    assert (code, record["status"], record["exit_code"]) == (1, "failed", 1)
    assert "rank 1 on host0: ValueError" in record["error"]
    assert "meshrun: error: the job failed: rank 1 on host0" in err


def test_of_an_enormous_message_both_ends_are_kept_and_the_log_has_the_whole(typed: Submit) -> None:
    line = typed("mine:ENTRY", *TWO, "does=raise much", "--json")
    code, out, err = line.finish()
    assert code == 1
    assert len(out) < 50_000
    assert len(err) < 30_000
    log = line.run_dir / "attempt-0" / "rank-1.log"
    shown = json.loads(out)["traceback"]
    assert f" characters left out; all of it is in {log}) ... " in shown
    for text in (err, shown):
        assert "in act" in text
        assert "ValueError: FIRST word" in text
        assert "word LAST" in text
    assert log.read_text().count("word ") >= 400_000
    assert (line.run_dir / "result.json").stat().st_size < 50_000


def test_rank_0_may_fail_too(typed: Submit) -> None:
    code, out, err = typed("mine:ENTRY", *TWO, "does=raise", "on_rank=0").finish()
    assert code == 1
    assert "rank 0 on host0: ValueError: the third layer is missing" in err
    assert (out + err).count("Traceback") == 1


def test_a_host_whose_clock_is_behind_did_not_fail_first(typed: Submit) -> None:
    line = typed("mine:ENTRY", *FOUR, "does=raise after rank 0", "on_rank=2", "--env", "CLOCK_IS_BEHIND_ON=host1")
    code, _, err = line.finish()
    assert code == 1
    assert "rank 0 on host0: ValueError: the failure of 0" in err.splitlines()[-1]
    second = json.loads((line.run_dir / "attempt-0" / "failures" / "2.json").read_text())
    assert 0 < second["when"] - line.result()["failure"]["when"] < 20


def test_a_rank_that_hangs_before_it_comes_is_named(typed: Submit, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("executor: local\nrendezvous_timeout_s: 4\n")
    line = typed("mine:ENTRY", "--cluster", "quick.yaml", *FOUR, "--env", "HANG_AT_IMPORT_ON=3")
    code, _, err = line.finish()
    assert code == 1
    assert "3 of 4 ranks came within 4 s; missing: rank 3 on host1" in err.splitlines()[-1]
    assert line.result()["status"] == "failed"
    line.assert_nothing_left()


def test_a_rank_that_hangs_in_a_step_fails_the_job_at_the_collectives_deadline(typed: Submit, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("executor: local\ncollective_timeout_s: 3\nwatchdog_timeout_s: 0\n")
    line = typed("mine:ENTRY", "--cluster", "quick.yaml", *TWO, "does=hang")
    code, _, err = line.finish()
    assert code == 1
    # It did not fail; but it is not the one that gave up on it who is to blame.
    last = err.splitlines()[-1]
    assert "the job failed: rank 1 on host0: did not fail, but was still running (last in step 1 (training), " in last
    # Of two there is no majority, so both are told, each with its step and phase.
    assert re.search(
        r" when rank 0 on host0 \(last in step 1 \(training\), \d+ s ago\) at mine.py:\d+ in run gave up waiting: ",
        last,
    )
    assert last.endswith("rank-1.log)")
    line.assert_nothing_left()


def test_a_rank_that_leaves_out_a_collective_is_named(typed: Submit, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("executor: local\ncollective_timeout_s: 3\nwatchdog_timeout_s: 0\n")
    line = typed("mine:ENTRY", "--cluster", "quick.yaml", *FOUR, "does=skip", "on_rank=2")
    code, _, err = line.finish()
    assert code == 1
    last = err.splitlines()[-1]
    # It waits in end_step, and its file there in a place of its own; the others in the collective.
    assert re.search(
        r"rank 2 on host1: waited at mine.py:\d+ in run \(last in step 1 \(end_step\), .* and 3 others at mine.py:",
        last,
    )
    assert last.endswith("rank-2.log)")


def test_a_rank_that_returns_before_the_others_is_named(typed: Submit) -> None:
    line = typed("mine:ENTRY", *TWO, "does=return")
    code, _, err = line.finish()
    assert code == 1
    last = err.splitlines()[-1]
    assert "the job failed: rank 1 on host0: returned from its work (last in step 1 (ended), " in last
    assert re.search(r" while rank 0 was still working at mine.py:\d+ in \w+ and lost its peer: ", last)
    line.assert_nothing_left()


def test_rank_0_that_hangs_before_it_comes_is_named(typed: Submit, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("executor: local\nrendezvous_timeout_s: 3\n")
    line = typed("mine:ENTRY", "--cluster", "quick.yaml", *FOUR, "--env", "HANG_AT_IMPORT_ON=0")
    code, _, err = line.finish()
    assert code == 1
    assert "RendezvousError: missing: rank 0 on host0, which has not come within 3 s" in err.splitlines()[-1]
    assert "rank 0 on host0: did not fail, but was still running" in err.splitlines()[-1]
    line.assert_nothing_left()


def test_ranks_that_name_other_metrics_are_told(typed: Submit) -> None:
    code, _, err = typed("mine:ENTRY", *TWO, "does=other metrics").finish()
    assert code == 1
    assert "end_step: ranks [1] name other metrics than rank 0" in err
    assert "the job failed: rank 1 on host0: " in err
    assert "SIGABRT" not in err


def test_a_result_that_json_does_not_know_does_not_fail_the_run(typed: Submit) -> None:
    line = typed("mine:ENTRY", "returns=[tensor,array,path,set,object,itself]", "--json")
    code, out, err = line.finish()
    assert code == 0, err
    *known, text, ring = line.result()["result"]["extra"]
    assert known == [[1.0, 1.0], 1.5, "a/b", [1, 2]]
    assert text.startswith("<class")
    assert ring == [1, "<left out: contains itself>"]
    assert json.loads(out)["result"]["extra"] == [*known, text, ring]
    assert "WARNING: result.extra[4] is a ModelMetaclass, which JSON does not know; it is written as text" in err
    assert "WARNING: result.extra[5][1] contains itself; the rest of it is left out" in err
    assert err.count("WARNING") == 2


def test_a_terminal_that_knows_no_unicode_does_not_end_the_job(typed: Submit) -> None:
    line = typed("mine:ENTRY", "does=shout", "on_rank=0", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    code, out, err = line.finish()
    assert code == 0, err
    assert "\\xfcber" in out
    assert "the last words, without a newline" in out


@pytest.mark.parametrize(
    "does", ["grandchild", "grandchild in its own session", "grandchild in its own session and raise"]
)
def test_what_a_rank_started_does_not_survive_it(typed: Submit, does: str) -> None:
    line = typed("mine:ENTRY", *TWO, f"does={does}")
    assert line.finish()[0] == (1 if "raise" in does else 0)
    line.assert_nothing_left()


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_an_interrupted_line_ends_its_job(typed: Submit, signum: signal.Signals) -> None:
    line = typed("mine:ENTRY", *FOUR, *ENDLESS, "does=grandchild in its own session")
    line.wait_for_step(3)
    assert len(line.left()) >= 6
    line.process.send_signal(signum)
    code, _, err = line.finish(20)
    assert code == 130
    assert err.splitlines()[-1].startswith(f"meshrun: error: interrupted by {signum.name}; the job was ended")
    assert line.left() == {}
    assert line.result()["status"] == "interrupted"


def test_ctrl_c_while_the_job_is_starting(typed: Submit) -> None:
    line = typed("mine:ENTRY", *FOUR, *ENDLESS)
    wait_until(lambda: (line.run_dir / "submitit").exists(), "a run directory")
    time.sleep(0.3)
    line.process.send_signal(signal.SIGINT)
    assert line.finish(20)[0] == 130
    line.assert_nothing_left()
    assert (line.result()["status"], line.result()["error"]) == ("interrupted", "interrupted by SIGINT")


def test_ctrl_c_while_the_data_is_prepared_leaves_nothing(typed: Submit, tmp_path: Path) -> None:
    text = (ROOT / "tests" / "jobs" / "sample_workload.py").read_text()
    slow = "def slow(config, directory):\n    Path('preparing').touch()\n    try:\n        time.sleep(600)\n"
    slow += "    except Exception:\n        pass\n"
    (tmp_path / "mine.py").write_text(
        text.replace("ENTRY =", slow + "\n\nENTRY =").replace("run=run", "run=run, prepare=slow")
    )
    line = typed("mine:ENTRY")
    wait_until(lambda: (tmp_path / "preparing").exists(), "the preparation")
    line.process.send_signal(signal.SIGTERM)
    code, _, err = line.finish(20)
    assert (code, err) == (130, "meshrun: error: interrupted\n")
    assert not line.run_dir.exists()


def catches_sigterm(pid: int) -> bool:
    """As the command line does from its first moment, and Python by itself does not."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize("milliseconds", [0, 30, 60, 100, 150, 200, 300, 400])
def test_ctrl_c_at_any_moment_is_one_line_at_most(typed: Submit, milliseconds: int) -> None:
    line = typed("mine:ENTRY", *TWO, *ENDLESS)
    wait_until(lambda: catches_sigterm(line.process.pid), "Python itself is up, which says what it likes before")
    time.sleep(milliseconds / 1000)
    line.process.send_signal(signal.SIGINT)
    code, _, err = line.finish(20)
    assert code == 130, err
    assert err.count("\n") <= 1, err
    assert "Traceback" not in err
    line.assert_nothing_left()


def test_a_signal_that_an_import_makes_another_exception_of_is_an_interruption(typed: Submit, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException as error:\n    raise SyntaxError('source code cannot be read') from error\n"
    )
    code, _, err = typed("mine:ENTRY").finish()
    assert (code, err) == (130, "meshrun: error: interrupted\n")


def test_a_signal_that_an_import_swallows_is_an_interruption(typed: Submit, tmp_path: Path) -> None:
    text = (ROOT / "tests" / "jobs" / "sample_workload.py").read_text()
    swallow = "import signal as s\ntry:\n    os.kill(os.getpid(), s.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "mine.py").write_text(text.replace("ENTRY =", f"import os\n{swallow}ENTRY ="))
    line = typed("mine:ENTRY", *TWO, *ENDLESS)
    code, _, err = line.finish(30)
    assert code == 130
    assert "interrupted" in err
    line.assert_nothing_left()


def test_a_killed_line_takes_its_job_along(typed: Submit) -> None:
    line = typed("mine:ENTRY", *TWO, *ENDLESS)
    line.wait_for_step(1)
    line.process.kill()
    line.process.wait()
    line.assert_nothing_left()


def test_a_killed_agent_takes_its_ranks_along(typed: Submit) -> None:
    line = typed("mine:ENTRY", *TWO, *ENDLESS, "does=grandchild in its own session")
    line.wait_for_step(3)
    ranks = line.left()
    agent = next(pid for pid in ranks if int(Path(f"/proc/{pid}/stat").read_text().split()[3]) == line.process.pid)
    os.kill(agent, signal.SIGUSR2)  # a scheduler's signal means nothing here, and harms nothing
    line.wait_for_step(5)
    os.kill(agent, signal.SIGKILL)
    code, _, err = line.finish(20)
    assert code == 1
    assert "the leader on host0: killed by SIGKILL" in err.splitlines()[-1]
    assert line.left() == {}
    assert line.result()["status"] == "failed"


def test_an_ignored_hangup_stays_ignored(typed: Submit) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    line = typed("mine:ENTRY", *TWO, "steps=40", "pause_seconds=0.05", preexec_fn=ignore)
    line.wait_for_step(1)
    line.process.send_signal(signal.SIGHUP)
    assert line.finish()[0] == 0
    assert line.result()["status"] == "done"


def test_a_reader_that_goes_away_ends_the_job(typed: Submit) -> None:
    line = typed("mine:ENTRY", *TWO, *ENDLESS)
    assert line.process.stdout is not None
    line.wait_for_step(1)
    line.process.stdout.close()
    assert line.process.wait(30) == 130
    line.assert_nothing_left()


def test_no_wait_goes_on_without_its_starter(typed: Submit) -> None:
    line = typed("mine:ENTRY", *TWO, "steps=60", "pause_seconds=0.05", "--no-wait", start_new_session=True)
    code, out, _ = line.finish()
    assert code == 0
    assert "it keeps running without this terminal" in out
    line.wait_for_step(1)
    for pid in line.left():
        os.kill(pid, 0)
    agent = int(out.partition("started as process ")[2].partition(";")[0])
    os.kill(agent, signal.SIGHUP)
    wait_until(lambda: (line.run_dir / "result.json").exists(), "a result")
    assert line.result()["status"] == "done"
    line.assert_nothing_left()


def test_no_wait_can_be_ended_as_it_says(typed: Submit) -> None:
    line = typed("mine:ENTRY", *TWO, *ENDLESS, "--no-wait", "--json")
    record = json.loads(line.finish()[1])
    assert record["status"] == "submitted"
    line.wait_for_step(1)
    os.kill(int(record["job_id"]), signal.SIGTERM)
    line.assert_nothing_left()
    assert line.result()["status"] == "interrupted"


# --- debugging, terminals ---------------------------------------------------------------------------------------------


def test_a_breakpoint_stops_in_the_debug_executor(typed: Submit) -> None:
    line = typed("mine:ENTRY", "--executor", "debug", "does=breakpoint", "on_rank=0", stdin=subprocess.PIPE)
    out, err = line.process.communicate("p 'step is', config\nc\n", timeout=60)
    assert line.process.returncode == 0, err
    assert "(Pdb)" in out
    assert line.result()["status"] == "done"


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [("raise", 1, ": ValueError"), ("sys.exit", 1, ": called sys.exit(3)"), ("SIGINT", 130, "interrupted")],
)
def test_failures_in_the_debug_executor(typed: Submit, does: str, code: int, says: str) -> None:
    line = typed("mine:ENTRY", "--executor", "debug", f"does={does}", "on_rank=0", "--json")
    got, out, err = line.finish()
    record = json.loads(out)
    assert (got, record["exit_code"], record["run_dir"]) == (code, code, str(line.run_dir))
    assert record["status"] == ("interrupted" if code == 130 else "failed")
    assert says in err.splitlines()[-1]
    assert code == 130 or "the job failed: rank 0" in err.splitlines()[-1]


def test_on_a_terminal_there_is_a_bar(typed: Submit) -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    line = typed("mine:ENTRY", *TWO, "steps=5", stdout=follower, env={**os.environ, "TERM": "xterm"})
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert line.process.wait(30) == 0
    assert b"\r" in shown
    assert b"5/5" in shown
    assert b"loss 0.5" in shown
    assert b"total: 15" in shown


# --- the agent itself -------------------------------------------------------------------------------------------------

_AGENT = """
import sys, threading, time
sys.path.insert(0, {root!r})
from jobs.agent import agent, signals
from jobs.run_dir import RunDirectory, write_json
from jobs.spec import JobSpec

spec = JobSpec.model_validate_json(open({spec!r}).read())
write_json(RunDirectory.create(spec.run_dir).job, spec.model_dump(mode="json"))
{before}
agent.main(spec.run_dir, 0, signals.Signals())
"""


def agent_of(directory: Path, before: str, **settings: object) -> tuple[str, str, dict[str, Any]]:
    """Runs an agent with `before` done in its process first; its stdout, stderr and the job's result."""
    (directory / "mine.py").write_text((ROOT / "tests" / "jobs" / "sample_workload.py").read_text())
    spec = JobSpec(
        workload="mine:ENTRY",
        settings=settings,
        resources=ResourceSpec(nodes=1, gpus_per_node=2, time_min=1),
        executor="local",
        cluster="none",
        run_dir=directory / "run",
        import_path=(str(directory),),
    )
    (directory / "spec.json").write_text(spec.model_dump_json())
    code = _AGENT.format(root=str(ROOT), spec=str(directory / "spec.json"), before=before)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, **spec.rank_env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout, done.stderr, json.loads((directory / "run" / "result.json").read_text())


FAST = "clock = time.monotonic; time.monotonic = lambda: clock() * 20  # a minute passes in three seconds"


def test_a_job_is_stopped_before_its_time_limit(tmp_path: Path) -> None:
    _, err, record = agent_of(tmp_path, FAST, steps=100000, pause_seconds=0.05)
    assert (record["status"], record["stopped_by"]) == ("stopped", "time limit"), err
    assert re.match(r"before its time limit of 1 min, after step \d+ of 100000", record["error"])


def test_the_time_limit_ends_a_job(tmp_path: Path) -> None:
    """Whose ranks do not stop when they are asked to."""
    _, err, record = agent_of(tmp_path, FAST, steps=100000, pause_seconds=0.05, does="hang")
    assert "JobFailed: the time limit of 1 min was reached; ask for more with --time" in err
    assert record["status"] == "failed"
    assert "time limit" in record["error"]


def test_a_stop_that_is_asked_for_before_there_are_ranks_is_not_lost(tmp_path: Path) -> None:
    at_once = "import os, signal; make = signals.Signals\n"
    at_once += "signals.Signals = lambda: [make(), os.kill(os.getpid(), signal.SIGUSR1)][0]"
    _, err, record = agent_of(tmp_path, at_once, steps=100000, pause_seconds=0.05)
    assert record["status"] == "stopped", err
    assert re.match(r"by request, after step \d of 100000", record["error"])


def test_where_forking_is_not_safe_ranks_are_interpreters_of_their_own(tmp_path: Path) -> None:
    thread = "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    # The agent forks nothing at all, not even for its meeting; a program is started by other means.
    out, err, record = agent_of(tmp_path, f"import os; os.fork = None; {thread}", at_end="a script")
    assert (out, record["status"], record["result"]["total"]) == ("", "done", 9.0), err
    assert_ended_like_a_script(tmp_path)
    assert "threads after its imports" in err
    # The thread has written it; which ranks had ended by the last time is chance.
    assert json.loads((tmp_path / "run" / "attempt-0" / "status.json").read_text()).keys() == status([], 0.0).keys()
