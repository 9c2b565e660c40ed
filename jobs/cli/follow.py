"""Starts a local job and follows it: rank 0's progress on the way, then the result, or who failed and why."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from jobs import blame, executor, processes
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cluster import ClusterConfig
from jobs.errors import Interrupted, JobFailed
from jobs.records import RunDirectory, read_json, write_json
from jobs.spec import JobSpec

POLL_S = 0.1
END_S = 10.0
"""Seconds that an interrupted job gets to end its ranks, before its supervisor is killed (and they with it)."""
PLAIN_LINE_EVERY_S = 5.0


def run(spec: JobSpec, cluster: ClusterConfig, console: Console, *, wait: bool, total_steps: int | None) -> int:
    """Submits a local job and, if it is to be waited for, sees it to its end.

    Returns:
        The exit code.

    Raises:
        Interrupted: the wait was interrupted; the job has been ended.
    """
    run_dir = RunDirectory(spec.run_dir)
    if not wait:
        job = executor.submit(spec, cluster, owned=False)
        pid = job._process.pid
        console.say(f"started as process {pid}; it goes on without this terminal")
        console.say(f"  progress: tail -f {run_dir.metrics}\n  end it:   kill {pid}")
        console.finish({"status": "submitted", "exit_code": 0, "run_dir": str(spec.run_dir), "job_id": job.job_id})
        return 0
    began = time.monotonic()
    # Should the supervisor be killed, what its ranks had started comes to this process, and is ended here.
    processes.adopt_orphans()
    display = _Display(run_dir, console, total_steps)
    before = processes.children()
    process: Any = None
    try:
        with interrupts.held():
            process = executor.submit(spec, cluster, owned=True)._process
            console.job_started = True
        while process.poll() is None:
            display.update()
            time.sleep(POLL_S)
        display.update(ended=True)
        display.close()
    except (Interrupted, BrokenPipeError) as interruption:
        interrupts.ignore()
        if process is not None:
            _end(process)
            processes.kill_children(but=before)
        with contextlib.suppress(OSError):
            display.close()
            console.error(f"{interruption}; the job was ended, no process of it is left")
            console.finish({"status": "interrupted", "exit_code": 130, "run_dir": str(spec.run_dir)})
        return Interrupted.exit_code
    processes.kill_children(but=before)
    record = read_json(run_dir.result)
    if record is not None and record["status"] == "done" and process.returncode == 0:
        report(spec, record, console, time.monotonic() - began)
        return 0
    return _report_failure(spec, run_dir, record, process.returncode, console)


def report(spec: JobSpec, record: dict[str, Any], console: Console, seconds: float) -> None:
    """What a job that is done came to, `seconds` after it was submitted."""
    console.say(f"done in {seconds:.1f} s")
    result = record.get("result")
    if isinstance(result, dict):
        for key, value in result.items():
            shown = f"{value:.6g}" if isinstance(value, float) else _printable(str(value))
            console.say(f"  {key}: {shown}" if "\n" not in shown else f"  {key}:\n" + _indent(shown))
    console.finish({**record, "exit_code": 0, "run_dir": str(spec.run_dir)})


def _printable(text: str) -> str:
    """Generated text may hold what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _report_failure(
    spec: JobSpec, run_dir: RunDirectory, record: dict[str, Any] | None, code: int, console: Console
) -> int:
    attempt = run_dir.last_attempt()
    if record is None or record["status"] == "done":
        log = attempt.supervisor_log
        record = {
            "status": "failed",
            "workload": spec.workload,
            "error": f"the supervisor ended with code {code} and left no result (log: {log})",
            "traceback": _tail(log),
        }
        if not run_dir.result.exists():
            with contextlib.suppress(OSError):
                write_json(run_dir.result, record)
    error = JobFailed(record["error"], record.get("traceback", ""))
    if error.traceback:
        print(error.traceback.rstrip(), file=sys.stderr)
    elif (record.get("failure") or {}).get("log"):
        tail = _tail(Path(record["failure"]["log"]))
        if tail:
            print(f"the end of its log:\n{tail}", file=sys.stderr)
    console.error(f"the job failed: {error}")
    console.finish({**record, "exit_code": 1, "run_dir": str(spec.run_dir)})
    return error.exit_code


def _tail(path: Path, lines: int = 15) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


# --- interruption -----------------------------------------------------------------------------------------------------


def _end(process: Any) -> None:
    """Asks the supervisor to end its ranks and itself; kills it if it does not (the ranks die with it)."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    deadline = time.monotonic() + END_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


# --- progress ---------------------------------------------------------------------------------------------------------


class _Tail:
    """The whole lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.rest = b""

    def lines(self, ended: bool = False) -> list[str]:
        """Args: ended: nothing will be added; what has no newline is a line too."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                new = file.read()
        except OSError:
            return []
        self.position += len(new)
        *whole, self.rest = (self.rest + new).split(b"\n")
        if ended and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        return [line.decode("utf-8", errors="replace") for line in whole]


class _Display:
    """Rank 0's log and metrics: a bar on a terminal, plain lines otherwise."""

    def __init__(self, run_dir: RunDirectory, console: Console, total_steps: int | None) -> None:
        self.log = _Tail(run_dir.attempt(0).log(0))
        self.supervisor = _Tail(run_dir.attempt(0).supervisor_log)
        self.metrics = _Tail(run_dir.metrics)
        self.console = console
        self.total_steps = total_steps
        self.bar: Any = None
        self.last_line = 0.0
        self.rank_0_ended = False
        # A terminal of no width (a bare pty) shows no bar.
        self.on_terminal = (
            console.stream.isatty()
            and os.environ.get("TERM") != "dumb"
            and os.get_terminal_size(console.stream.fileno()).columns > 0
        )
        if self.on_terminal:
            from tqdm import tqdm

            tqdm.get_lock()  # may start a process of its own, which is none of the job's

    def update(self, ended: bool = False) -> None:
        for line in self.supervisor.lines():
            if "[supervisor] WARNING: " in line:
                self._say(line)
        for line in self.log.lines(ended):
            # Which rank failed, and its traceback, is said once, at the end; rank 0's own end may be only an echo.
            self.rank_0_ended = self.rank_0_ended or blame.ENDS in line
            if not self.rank_0_ended:
                self._say(line)
        steps = []
        for line in self.metrics.lines():
            with contextlib.suppress(json.JSONDecodeError):
                steps.append(json.loads(line))
        for metrics in steps:
            self._step(metrics, last=metrics is steps[-1])

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.console.stream)
        else:
            self.console.say(line)

    def _step(self, metrics: dict[str, Any], last: bool) -> None:
        step = metrics.get("step")
        if not isinstance(step, int):
            return
        if self.on_terminal:
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(
                    total=self.total_steps, unit="step", file=self.console.stream, dynamic_ncols=True, leave=True
                )
            self.bar.n = step
            if last:
                self.bar.set_postfix_str(_words(metrics), refresh=False)
                self.bar.refresh()
            return
        now = time.monotonic()
        if step == 1 or step == self.total_steps or now - self.last_line >= PLAIN_LINE_EVERY_S:
            self.last_line = now
            of = f"/{self.total_steps}" if self.total_steps else ""
            self.console.say(f"step {step}{of}  {_words(metrics)}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


_SHOWN = ("loss", "grad_norm", "lr", "tokens_per_second", "samples_per_second", "accuracy", "heldout_loss")


def _words(metrics: dict[str, Any]) -> str:
    """The metrics that people watch, briefly."""
    shown = [key for key in _SHOWN if isinstance(metrics.get(key), (int, float))]
    shown = shown or [key for key, value in metrics.items() if key != "step" and isinstance(value, (int, float))][:5]
    return "  ".join(f"{key} {metrics[key]:.4g}" for key in shown)
