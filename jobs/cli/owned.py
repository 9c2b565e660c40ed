"""A local job that belongs to this command line: starts it, shows its progress, and ends it on an interruption."""

from __future__ import annotations

import contextlib
import signal
import time

from jobs import processes
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.progress import Display
from jobs.cli.report import report_end
from jobs.cli.start import end, start_local
from jobs.cluster import ClusterConfig
from jobs.errors import Interrupted, OutputLost
from jobs.run_dir import BY_ITSELF, RunDirectory
from jobs.runs.find import come_back
from jobs.runs.local_job import POLL_S, without_result
from jobs.runs.result import Result, why_it_lingers
from jobs.spec import JobSpec


def run(spec: JobSpec, cluster: ClusterConfig, console: Console) -> int:
    """Starts a local job and follows it until it ends; an interruption ends the job.

    Returns:
        The exit code.
    """
    run_dir = RunDirectory(spec.run_dir)
    began = time.monotonic()
    # If the agent is killed, this process inherits the processes that its ranks started, and ends them.
    processes.adopt_orphans()
    display, result = Display(run_dir, console), Result(run_dir)
    before: set[int] = set()
    process = None
    try:
        interrupts.check()
        with interrupts.held():
            process, _ = start_local(spec, cluster, console, owned=True)
            before = processes.children() - {process.pid}
        while process.poll() is None:
            interrupts.check()
            display.update()
            if result.lingers():
                display.say(why_it_lingers(process.pid, run_dir))
            time.sleep(POLL_S)
        display.update(ended=True)
        display.close()
    except Interrupted as interruption:
        interrupts.ignore()
        ended = {
            "status": "interrupted",
            "workload": spec.workload,
            "attempt": run_dir.last_attempt().number,
            "seconds": round(time.monotonic() - began, 3),
            "error": str(interruption),
        }
        # Must come before the agent's own result, which knows only its signal; a result that is done is kept.
        with contextlib.suppress(OSError):
            run_dir.publish(ended)
        if process is not None:
            is_ctrl_c = not isinstance(interruption, OutputLost) and interruption.signum == signal.SIGINT
            end(process, signal.SIGINT if is_ctrl_c else signal.SIGTERM)
            processes.kill_children(but=before)
        run_dir.forget_secrets()
        display.close()
        if (run_dir.recorded() or {}).get("status") in BY_ITSELF:  # the interruption came after the last step
            outcome = f"the job had already ended; see its result with: {come_back(run_dir)}"
        else:
            outcome = "the job was ended, and all of its processes are gone"
            if run_dir.has_checkpoints():
                outcome += f"; go on from the newest checkpoint: {come_back(run_dir, 'resume')}"
        console.error(f"{interruption}; {outcome}")
        with contextlib.suppress(OutputLost):
            console.finish({"status": "interrupted", "exit_code": Interrupted.exit_code})
        return Interrupted.exit_code
    processes.kill_children(but=before)
    run_dir.forget_secrets()  # if its agent could not
    record = run_dir.recorded()
    if record is None:
        record = without_result(run_dir, process.returncode)
    elif record["status"] in BY_ITSELF and process.returncode != 0:
        record["warnings"] = [
            *record.get("warnings", ()),
            f"the agent exited with code {process.returncode} after the work was done",
        ]
    return report_end(record, console, time.monotonic() - began, run_dir)
