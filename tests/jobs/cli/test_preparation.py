"""A workload's prepare, in a process of its own: what it says is heard, and however it ends, nothing of it is left."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import processes
from jobs.cli import preparation
from jobs.run_dir import RunDirectory
from jobs.spec import JobSpec, ResourceSpec
from tests.jobs.submitting import ROOT, Line, wait_until
from workloads import registry
from workloads.base import WorkloadConfig, WorkloadEntry, WorkloadError

Type = Callable[..., Line]

MINE = """
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from workloads.base import WorkloadConfig, WorkloadEntry, WorkloadError


class Config(WorkloadConfig):
    text: str = ""
    made: bool = True


def run(config, ctx):
    return {"pid": os.getpid(), "made": (ctx.paths.data_dir / "made").read_text() if config.made else ""}


def in_another_session(*words):
    subprocess.Popen(words, start_new_session=True)


def prepare(config, directory):
BODY


ENTRY = WorkloadEntry(name="mine", config=Config, run=run, prepare=prepareMORE)
"""


def write(directory: Path, body: str, more: str = "") -> None:
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    (directory / "mine.py").write_text(MINE.replace("BODY", body).replace("MORE", more))


@pytest.fixture
def prepared(typed: Type, tmp_path: Path) -> Type:
    """`prepared("the body of prepare", "--json", more=", plan=...")`; its processes are found by their environment."""

    def type_line(body: str, *words: str, more: str = "", executor: str = "local", **popen: Any) -> Line:
        write(tmp_path, body, more)
        mark = f"mark-{uuid.uuid4().hex}"
        env = {**os.environ, "TEST_MARK": mark}
        line = typed("mine:ENTRY", "--executor", executor, *words, mark_by_flag=False, env=env, **popen)
        line.mark = mark
        return line

    return type_line


def check_refused(line: Line, *says: str) -> str:
    """One line after what was printed, exit 2, and nothing left: no process, no run directory."""
    code, out, err = line.finish()
    assert (code, out) == (2, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("meshrun: error: ")
    assert "Traceback" not in err
    for words in says:
        assert words in last
    assert not line.run_dir.exists()
    assert line.left() == {}
    return err


# --- what becomes of it -----------------------------------------------------------------------------------------------


def test_it_runs_apart_and_its_line_is_announced(prepared: Type) -> None:
    body = """
        print("on stdout")
        print("{}")
        os.write(1, b"and \\xff raw")
        in_another_session("sleep", "600")  # holds both streams
        directory.mkdir()
        (directory / "made").write_text(str(os.getpid()))
        return "made one\\nfile"
    """
    line = prepared(body, "--gpus-per-node", "2", "--json")  # of ranks that never meet, and end no step
    code, out, err = line.finish()
    assert code == 0, err
    record = json.loads(out)
    assert record["prepared"] == "made one file"
    assert int(record["result"]["made"]) not in (record["result"]["pid"], line.process.pid)
    assert err.startswith("on stdout\n{}\nand \N{REPLACEMENT CHARACTER} raw\n")
    assert "\nprepared: made one file\nrun directory: " in err
    assert line.left() == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise WorkloadError('no such\\ncorpus; give another')", ["error: no such corpus; give another"]),
        ("1 / 0", ["workload mine: prepare failed at ", "mine.py:27: ZeroDivisionError: division by zero"]),
        ("sys.exit(0)", ["workload mine: prepare failed at ", "mine.py:27: SystemExit: 0"]),
        ("open('gone.txt')", ["gone.txt: No such file or directory; give another path"]),
        ("input()", ["mine.py:27: EOFError"]),
        ("os._exit(0)", ["workload mine: prepare exited with code 0 before its work was done"]),
        ("print('at half'); os._exit(7)", ["prepare exited with code 7 before", "(its last output: at half)"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["prepare was killed by SIGKILL (out of memory, or"]),
        ("import ctypes; ctypes.string_at(0)", ["prepare was killed by SIGSEGV"]),
        ("return 5", ["workload mine: prepare returned a int; return None, or one line"]),
        ("import no_such_module", ["mine.py:27: ModuleNotFoundError: No module named 'no_such_module'"]),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(prepared: Type, body: str, says: list[str]) -> None:
    err = check_refused(prepared(body), *says)
    assert err.count("\n") == 1 + ("print" in body)


def test_with_json_a_refusal_is_also_one_object(prepared: Type) -> None:
    code, out, err = prepared("print('noise')\nraise WorkloadError('no such corpus')", "--json").finish()
    assert code == 2
    assert json.loads(out) == {"status": "refused", "exit_code": 2, "error": "no such corpus"}
    assert err == "noise\nmeshrun: error: no such corpus\n"


def test_torch_that_it_imports_stays_out_of_who_submits(tmp_path: Path) -> None:
    write(tmp_path, "import torch\nraise WorkloadError(f'torch {torch.__version__}, {torch.get_num_threads()} thread')")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ['mine:ENTRY', '--executor', 'local']\n"
        "import submit; submit.main(); print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n"
    assert done.stderr.startswith("meshrun: error: torch 2.")
    assert done.stderr.endswith(", 1 thread\n")


def test_what_it_prints_is_shown_as_it_comes(prepared: Type, tmp_path: Path) -> None:
    body = """
        print("50%", end="\\r")
        while not Path("go").exists():
            time.sleep(0.02)
        print("100%")
        raise WorkloadError("enough")
    """
    line = prepared(body)
    assert line.process.stderr is not None
    shown = b""
    while b"50%\r" not in shown:
        assert select.select([line.process.stderr], [], [], 30)[0], shown
        shown += os.read(line.process.stderr.fileno(), 1000)
    (tmp_path / "go").touch()
    assert line.finish()[2] == "100%\nmeshrun: error: enough\n"


def test_settings_of_any_length_reach_it(prepared: Type, tmp_path: Path) -> None:
    text = "a 'quoted' $text\n" * 30_000
    (tmp_path / "long.yaml").write_text(json.dumps({"text": text}))
    body = "raise WorkloadError(f'{len(config.text)} {config.text.count(chr(10))}')"
    check_refused(prepared(body, "--config", "long.yaml"), f"error: {len(text)} 30000")


def test_a_directory_with_such_packages_of_its_own_does_not_matter(prepared: Type, tmp_path: Path) -> None:
    """Not to the process, and not to those that multiprocessing spawns from it."""
    for package in ("jobs", "workloads", "submitit"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('the wrong one')\n")
    body = """
        import multiprocessing
        import workloads
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            theirs = pool.apply(eval, ("config.__class__.__mro__[1].__module__", {"config": config}))
            theirs += " " + pool.apply(eval, ("__import__('workloads').__file__",))
        raise WorkloadError(f"{workloads.__file__} {theirs}")
    """
    ours = str(tmp_path / "run" / "code" / "meshrun" / "workloads" / "__init__.py")
    check_refused(prepared(body), f"error: {ours} workloads.base {ours}")


def test_a_child_that_forgets_to_leave_answers_for_nobody(prepared: Type) -> None:
    body = """
        if os.fork() == 0:
            return "the child's"
        os.wait()
        raise WorkloadError("the parent's")
    """
    check_refused(prepared(body), "error: the parent's")


# --- its deadline -----------------------------------------------------------------------------------------------------


def test_what_does_not_end_is_ended_and_said(prepared: Type) -> None:
    body = """
        in_another_session("sleep", "600")
        print("file 3 of 9")
        time.sleep(600)
    """
    began = time.monotonic()
    line = prepared(body, more=", prepare_timeout_s=3, plan=lambda config: 'fetches nine files'")
    check_refused(
        line,
        "workload mine: prepare (fetches nine files) did not end within 3 s (it was at ",
        "mine.py:29) and was killed (its last output: file 3 of 9); if it needs longer, raise prepare_timeout_s",
    )
    assert time.monotonic() - began < 15


def test_what_ignores_ctrl_c_is_ended_too(prepared: Type) -> None:
    body = """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        subprocess.Popen(["sh", "-c", "trap '' INT TERM; sleep 600"])
        time.sleep(600)
    """
    check_refused(prepared(body, more=", prepare_timeout_s=1"), "prepare did not end within 1 s and was killed;")


SLOW_TO_START = """)
BEGAN = time.monotonic()
if Path(getattr(sys.modules["__main__"], "__file__", "")).name == "entry.py":
    print("slow", flush=True)
    (time.sleep({})"""


def test_its_time_begins_when_it_is_called(prepared: Type, tmp_path: Path) -> None:
    """Not with the interpreter, which may have torch to import, and a loaded machine to do it on."""
    body = "Path('when').write_text(str(time.monotonic() - BEGAN))"
    code, _, err = prepared(body, "made=false", more=", prepare_timeout_s=1.5" + SLOW_TO_START.format(2)).finish()
    assert code == 0, err
    assert float((tmp_path / "when").read_text()) > 2


def test_a_process_that_never_comes_to_it_is_ended_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "return", SLOW_TO_START.format(600))
    monkeypatch.setattr(preparation, "START_S", 3.0)
    with pytest.raises(
        WorkloadError, match=r"did not call it within 3 s and was killed.*; this machine, or the file system"
    ):
        outcome(tmp_path, monkeypatch, "sleeps")


def test_a_thread_that_goes_on_is_waited_for_and_said(prepared: Type) -> None:
    body = "threading.Thread(target=time.sleep, args=(600,)).start()"
    check_refused(prepared(body, more=", prepare_timeout_s=1"), "prepare returned, but", "a thread or a process")


def entry(**given: Any) -> WorkloadEntry:
    return WorkloadEntry(name="mine", config=WorkloadConfig, run="mine:run", **given)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), "60", True, None])
def test_a_deadline_is_a_number_of_seconds(timeout_s: Any) -> None:
    with pytest.raises(WorkloadError, match=r"prepare_timeout_s=.*: must be a number of seconds above 0"):
        preparation.plan(entry(prepare="mine:prepare", prepare_timeout_s=timeout_s), WorkloadConfig())


def test_a_long_silence_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "time.sleep(1)\nreturn 'done'", ", plan=lambda config: 'sleeps'")
    monkeypatch.setattr(preparation, "SAY_AFTER_S", 0.1)
    answer, shown = outcome(tmp_path, monkeypatch, "sleeps")
    assert answer == "done"
    assert shown == ["meshrun: waiting for workload mine: prepare (sleeps), at most 3600 s\n"]


def outcome(directory: Path, monkeypatch: pytest.MonkeyPatch, plan: str) -> tuple[str | None, list[str]]:
    """What came of the workload that was written there, and what was shown; nothing may be left."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = RunDirectory.create(directory / "run")
    spec = JobSpec(
        workload="mine:ENTRY",
        settings={},
        resources=ResourceSpec(),
        executor="local",
        cluster="none",
        run_dir=run.path,
        import_path=(str(directory),),
    )
    run.describe(spec)
    sys.modules.pop("mine", None)
    shown: list[str] = []
    before = processes.children()
    started = preparation.Preparation(registry.load("mine:ENTRY", spec.import_path), spec, plan, shown.append)
    try:
        answer = started.outcome()
    finally:
        started.end()
        del sys.modules["mine"]
        assert processes.children() == before
    return answer, shown


# --- who submits is interrupted ---------------------------------------------------------------------------------------

ENDLESS = """
    in_another_session("sleep", "600")
    subprocess.Popen(["sleep", "600"])
    try:
        Path("preparing").touch()
        time.sleep(600)
    except Exception:
        pass
    finally:
        Path("cleaned up").touch()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_an_interruption_ends_it(prepared: Type, tmp_path: Path, signum: signal.Signals) -> None:
    line = prepared(ENDLESS, "--json")
    wait_until((tmp_path / "preparing").exists, "the preparation")
    line.process.send_signal(signum)
    code, out, err = line.finish(20)
    assert (code, err) == (130, "meshrun: error: interrupted\n")
    assert json.loads(out) == {"status": "interrupted", "exit_code": 130}
    assert not line.run_dir.exists()
    assert (tmp_path / "cleaned up").exists()
    assert line.left() == {}


def test_a_second_ctrl_c_leaves_nothing_either(prepared: Type, tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('begun', end='')\n" + textwrap.dedent(ENDLESS)
    line = prepared(body)
    wait_until((tmp_path / "preparing").exists, "the preparation")
    for _ in range(3):
        line.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    code, _, err = line.finish(20)
    assert (code, err) == (130, "begun\nmeshrun: error: interrupted\n")
    assert not line.run_dir.exists()
    assert line.left() == {}


def test_it_does_not_outlive_a_killed_line(prepared: Type, tmp_path: Path) -> None:
    """Nor does what it has started in its own session; the kernel ends what else there is with nobody."""
    line = prepared(ENDLESS.replace('in_another_session("sleep", "600")', "pass"))
    wait_until((tmp_path / "preparing").exists, "the preparation")
    assert len(line.left()) >= 4  # the line, the preparation, who watches over it, its sleep
    line.process.kill()
    line.process.wait()
    line.assert_nothing_left()


def test_a_reader_that_leaves_ends_it(prepared: Type, tmp_path: Path) -> None:
    body = "while True:\n    print('more')\n    Path('preparing').touch()"
    line = prepared(body)
    wait_until((tmp_path / "preparing").exists, "the preparation")
    assert line.process.stderr is not None
    line.process.stderr.close()
    assert line.process.wait(20) == 130
    assert not line.run_dir.exists()
    line.assert_nothing_left()


# --- its plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "plan"),
    [
        (", plan=lambda config: 'fetches\\nnine files'", "fetches nine files"),
        ("", "would run; the workload has no `plan` to describe it"),
        (", plan=lambda config: None", None),
    ],
    ids=["line", "no plan", "nothing"],
)
def test_a_dry_run_says_what_it_would_do(prepared: Type, more: str, plan: str | None) -> None:
    code, out, err = prepared("1 / 0", "--dry-run", "--json", more=more).finish()
    assert code == 0, err
    assert json.loads(out)["prepare"] == plan
    assert (f"\nprepare: {plan}\n" in err) == (plan is not None)
    assert ("prepare" in err) == (plan is not None)


def test_where_there_is_nothing_to_prepare_nothing_is_started(prepared: Type) -> None:
    line = prepared("1 / 0", "--json", "made=false", more=", plan=lambda config: None", executor="debug")
    code, out, err = line.finish()
    assert code == 0, err
    assert "prepared" not in json.loads(out)


def test_a_plan_that_is_none_is_refused_by_a_dry_run_too(prepared: Type) -> None:
    check_refused(prepared("1 / 0", "--dry-run", more=", plan=lambda config: 5"), "plan returned a int; return one")
    for bad, says in ((lambda config: 1 / 0, "plan failed at "), ("json:plam", "plan='json:plam' cannot be found")):
        with pytest.raises(WorkloadError, match=f"workload mine: {says}"):
            preparation.plan(entry(prepare="mine:prepare", plan=bad), WorkloadConfig())


def test_without_prepare_there_is_no_plan() -> None:
    assert preparation.plan(entry(plan="mine:plan"), WorkloadConfig()) is None


def test_the_language_model_prepares_only_where_there_is_a_tokenizer() -> None:
    tp_fsdp = registry.load("tp_fsdp")
    config = tp_fsdp.config()
    assert preparation.plan(tp_fsdp, config) is None
    text = {"path": ("a.txt", "b.txt"), "tokenizer": "t.json"}
    config = tp_fsdp.config.model_validate({"data": text})
    assert preparation.plan(tp_fsdp, config) == "tokenizes a.txt, b.txt with t.json"
