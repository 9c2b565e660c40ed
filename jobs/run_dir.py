"""The run directory: the one file that knows the names on disk. Torch-free.

runs/20261122-081530-tp_fsdp-3f9c/
    job.json            the job as resolved: workload, every setting, shape, environment; without secrets
    secrets.json        while the job may run: what looks like a password, token or key; readable by the user alone
    settings.yaml       the workload's settings alone; `--config` takes it
    manifest.json       what was submitted, and where each setting came from; uncommitted.patch beside it
    code/               the run's own copy of the code; see jobs/code_copy.py
    submission.json     which job of the scheduler's, or process of this machine, it became
    metrics.jsonl       a link to the newest attempt's
    result.json         the same
    data/ export/       what was prepared for the ranks; the final weights
    checkpoints/        of the run, not of an attempt: the next one goes on from them
    lease.json          which start of the job has the directory, and where; see jobs/agent/lease.py
    excluded.json       hosts that were the root cause twice; see jobs/excluded.py
    slurm.log           Slurm's own words, and what the site's set-up printed
    doctor/             of `submit.py doctor`: what each host has answered, and what the ranks have measured
    submitit/           submitit's pickles and the rendered submission
    tensorboard/        event files, with tensorboard=true
    track/              with tensorboard=true, wandb=true, mlflow=true: how much of the metrics each has, and its log
    attempt-0/          what one incarnation alone wrote
        rendezvous.json     where rank 0's store listens
        rank-3.log          everything a rank printed and logged
        failure.json        of a failed attempt: the root cause, where it was, what was decided; from the leader
        failures/3.json     what ended a rank
        done/3              a rank that finished its work
        profile/rank-0.json.gz  with --profile: a rank's trace; rank-0.txt its operators; rank-0-memory.pickle
        agent-0.log         each host's agent's own words
        srun.log            srun's own words; a link, in an attempt that was restarted in place
        memory.json         of a job that has ended well: the most memory that each rank has held
        stacks.txt          of a job that hung: the stacks of all ranks
        collectives-3       of a job that hung on GPUs: what NCCL's flight recorder of a rank holds
        metrics.jsonl       one line per step, from rank 0
        status.json         where the ranks were a moment ago, from the leader
        result.json         how it ended

A sweep's folder has run directories in it:

runs/20261122-081530-tp_fsdp-sweep-3f9c/
    sweep.json          its points; see jobs/runs/sweep.py
    0/ 1/ 2/            a run directory for each, whose `code` is a link to the next one
    3.1/                a point that was submitted again, alone
    code/ submitit/     of all points: the copy of the code, the array's batch script
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jobs import secret_values
from jobs.errors import RunDirectoryError
from jobs.secret_values import name_of, without_secrets
from jobs.settings import dump_yaml
from jobs.spec import JobSpec
from workloads.base import RunPaths, to_json
from workloads.errors import first_few, reason
from workloads.whole_files import beside, is_there, make_folder, write_durably, written_beside
from workloads.whole_files import write_text as write_text

SWEEP = "sweep.json"


def default_run_dir(workload: str) -> Path:
    """runs/<utc time>-<workload>-<short id>, below the current directory."""
    name = re.sub(r"[^\w.-]", "-", workload.partition(":")[0])
    return Path.cwd() / "runs" / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{name}-{secrets.token_hex(2)}"


def keep_others_from_writing() -> None:
    """Takes a umask that lets everybody write for a mistake, here and in what this process starts.

    A pickle that others could change would be run as the user. Slurm hands the mask on to a job.
    """
    mask = os.umask(0o077)
    os.umask(mask if mask & 0o002 else mask | 0o022)


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames, without secrets; see workloads.base.to_json for what may be in `value`."""
    write_text(path, _as_text(_without_secrets(to_json(value))))


def _as_text(plain: Any) -> str:
    return json.dumps(plain, indent=2, allow_nan=False) + "\n"


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        is_path = value.startswith("/") and len(value.split()) == 1  # it must lead somewhere
        return value if is_path else without_secrets(value)
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


def write_new(path: Path, text: str) -> None:
    """Writes a file that is not there yet, whole or not at all.

    Raises:
        FileExistsError: it is there; nothing is overwritten, whoever wrote it a moment ago.
    """
    with beside(path) as own:
        write_durably(own, text, path)
        try:
            os.link(own, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with path.open("x", encoding="utf-8") as file:
                file.write(text)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read, and does not wait where it is a pipe.

    Raises:
        OSError: FileNotFoundError if it is not a regular file, for then there is no file of ours.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's object, or None where it is not there (yet), not whole, or holds something else."""
    try:
        with open_regular(path) as file:
            value = json.loads(file.read().decode("utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        return None
    return value if isinstance(value, dict) else None


BY_ITSELF = ("done", "stopped")
"""How a run ended whose ranks have all returned from their work; it stands, whatever becomes of them afterwards."""


TIME_LIMIT, PREEMPTION = "time limit", "preemption"
"""Why a run was stopped, in its result's `stopped_by`; until the batch script has asked Slurm, a signal's name."""
UNDECIDED = ("SIGUSR2", "SIGTERM")
"""Signals that stop a run, which may go on then: by what Slurm says of it, the batch script decides."""


def is_undecided(record: dict[str, Any]) -> bool:
    """Whether a Slurm job's run was stopped, and its batch script has not yet decided what becomes of it.

    Where nobody says by what it was stopped, Slurm has ended its leader at once.
    """
    by = record.get("stopped_by", UNDECIDED[0])
    return record["status"] == "stopped" and by in UNDECIDED and "decision" not in record


def _weight(record: dict[str, Any] | None) -> tuple[bool, ...]:
    """What orders records of how an attempt ended; see RunDirectory.publish."""
    if record is None:
        return ()
    return record["status"] in BY_ITSELF, bool(record.get("failure")), bool(record.get("slurm_state"))


@dataclass(frozen=True)
class Submitted:
    """What a run directory became when it was started: how to find it again."""

    executor: str
    job_id: str
    """The scheduler's number, of an element of an array 12_3; of a local job, its agent's process id."""
    submitted: str
    """When, in UTC: 2026-11-22T08:15:30Z; empty where the job itself has written this."""
    host: str
    """Where it was submitted from; a local job runs there."""
    process_argument: str = ""
    """Of a local job: what its agent alone was started with, and no later process with the same id."""

    @staticmethod
    def now(executor: str, job_id: str, process_argument: str = "") -> Submitted:
        """What was submitted just now, from this host."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Submitted(executor, job_id, when, socket.gethostname(), process_argument)


_OF_A_RESULT: dict[str, Any] = {
    "attempt": int,
    "seconds": float,
    "error": str,
    "traceback": str,
    "failure": (dict, type(None)),
    "warnings": list,
    "decision": str,
    "stopped_by": str,
    "next_attempt": int,
}
"""The types of what is looked into."""


@dataclass(frozen=True)
class RunDirectory:
    """One job's directory; `path` is absolute."""

    path: Path

    @staticmethod
    def check(path: Path) -> None:
        """Refuses what `create` would refuse, writing nothing.

        Raises:
            RunDirectoryError: it exists and is not an empty directory, or cannot be made there.
        """
        if path.exists():
            if not path.is_dir():
                raise RunDirectoryError(f"--run-dir {path}: is a file; give a directory that is new or empty")
            if any(path.iterdir()):
                raise RunDirectoryError(
                    f"--run-dir {path}: is not empty, and a run directory is never reused; give a new one"
                )
        parent = path
        while not parent.exists():
            if parent.is_symlink():
                raise RunDirectoryError(
                    f"--run-dir {path}: {parent} is a symbolic link to nothing; give a directory that is new or empty"
                )
            parent = parent.parent
        if not parent.is_dir():
            raise RunDirectoryError(f"--run-dir {path}: {parent} is a file; give a directory that is new or empty")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunDirectoryError(f"--run-dir {path}: {parent} cannot be written to; give another directory")

    @staticmethod
    def create(path: Path) -> RunDirectory:
        """Makes the directory, readable by the user alone: the pickle inside is run as them.

        Raises:
            RunDirectoryError: as `check`; also when another job took the name in the meantime.
        """
        RunDirectory.check(path)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            run = RunDirectory(path)
            # The first to make this folder owns the directory: two jobs that race for one name cannot both have it.
            run.submitit.mkdir(mode=0o700)
        except FileExistsError:
            raise RunDirectoryError(f"--run-dir {path}: another job has just taken it; give a new one") from None
        except OSError as mistake:
            raise RunDirectoryError(
                f"--run-dir {path}: cannot be made: {reason(mistake)}; give another directory"
            ) from None
        return run

    @property
    def sweep(self) -> Path | None:
        """The sweep.json of the sweep that this run is a point of; None if it is none."""
        path = self.path.parent / SWEEP
        return path if re.fullmatch(r"\d+(\.\d+)?", self.path.name) and path.is_file() else None

    @property
    def name(self) -> str:
        """What the run is called: its folder's name; of a sweep's point, `SWEEP/3`."""
        return self.path.name if self.sweep is None else f"{self.path.parent.name}/{self.path.name}"

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets.json"

    @property
    def settings(self) -> Path:
        return self.path / "settings.yaml"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def patch(self) -> Path:
        return self.path / "uncommitted.patch"

    @property
    def submission(self) -> Path:
        return self.path / "submission.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def has_checkpoints(self) -> bool:
        """Whether anything was saved that a later attempt can go on from."""
        return any(not name.startswith(".") for name in _names(self.checkpoints))  # others are being written

    @property
    def lease(self) -> Path:
        return self.path / "lease.json"

    @property
    def excluded(self) -> Path:
        return self.path / "excluded.json"

    @property
    def slurm_log(self) -> Path:
        return self.path / "slurm.log"

    @property
    def doctor(self) -> Path:
        return self.path / "doctor"

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def track(self) -> Path:
        return self.path / "track"

    @property
    def script(self) -> str:
        """The name of the batch script, which no other job has; empty where there is none."""
        return "" if (path := self.script_file) is None else path.name

    @property
    def script_file(self) -> Path | None:
        """The batch script: the run's own, or the one that all points of a sweep are started by."""
        folders = [self.submitit]
        if self.path.name.isdecimal() and self.sweep is not None:
            folders.append(self.path.parent / self.submitit.name)
        return next((path for folder in folders for path in folder.glob(".submission_file_*.sh")), None)

    def describe(self, spec: JobSpec, known: Mapping[str, Any] | None = None) -> None:
        """Writes down what the job is, before it starts; its secrets stand in a file of their own.

        Args:
            spec: the job.
            known: a description that the code of the job's ranks has written: they know no other keys.
        """
        job, found = secret_values.take_out(spec.model_dump(mode="json"))
        self.forget_secrets()
        if found and spec.executor != "torchrun":  # there each rank has its own command line
            with written_beside(self.secrets) as own:
                descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(_as_text([[[*path], value] for path, value in found.items()]))
        # Not by write_json: a path or a name in it must stay, even if a secret happens to be in there.
        job = {name: job[name] for name in job if known is None or name in known}
        write_text(self.job, _as_text(to_json({**job, "secrets": [[*path] for path in found]})))
        write_text(self.settings, dump_yaml(job["settings"]))

    def described(self) -> JobSpec:
        """The job, with its secrets.

        Raises:
            OSError: the directory has no job.json.
            RunDirectoryError: its secrets have been removed.
        """
        job = json.loads(self.job.read_bytes())
        found = self.kept_secrets()
        spec = JobSpec.model_validate(secret_values.put_in(job, found))
        if gone := [path for path in spec.secrets if path not in found]:
            names = first_few([*map(name_of, gone)])
            raise RunDirectoryError(
                f"{self.path}: the job had ended, so its secrets are no longer kept; go on with it by submit.py "
                f"resume, and give them again: {names}"
            )
        return spec

    def kept_secrets(self) -> dict[tuple[str, ...], str]:
        """The job's secrets by their places; none once it has ended."""
        try:
            with open_regular(self.secrets) as file:
                return {tuple(path): value for path, value in json.loads(file.read())}
        except (OSError, ValueError, TypeError):
            return {}

    def forget_secrets(self) -> None:
        """Removes them: for whoever sees the job's end."""
        with contextlib.suppress(OSError):
            self.secrets.unlink()

    def put_away(self, submitted: Submitted | None, keeps_code: bool = False) -> PutAway:
        """Makes room for the description and the submission of an attempt that is to follow the newest one.

        That one's result then says so, and no longer counts as the end of the run.

        Args:
            submitted: what the run was submitted as when it was found to have ended.
            keeps_code: whether the attempt that is to follow runs the code that this one has run.

        Raises:
            RunDirectoryError: another command goes on with the run at the same time.
        """
        attempt = self.last_attempt().make()
        if submitted is not None:
            own = self.submission.with_name(f".{self.submission.name}.{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):
                self.submission.rename(own)  # of several commands, one alone can do so
            if (read_json(own) or {}).get("job_id") != submitted.job_id:
                with contextlib.suppress(FileNotFoundError):
                    own.rename(self.submission)
                raise RunDirectoryError(f"{self.path}: another command goes on with it just now; wait for it")
            own.rename(attempt.path / self.submission.name)
        before = self.recorded(attempt.number)
        ended = before or {"status": "failed", "attempt": attempt.number, "error": "left no result"}
        self.amend(attempt.number, {**ended, "next_attempt": attempt.number + 1})
        for path in (self.job, self.settings):  # these are replaced, and must be there at any moment
            shutil.copy2(path, attempt.path)
        script = self.script_file
        scripts = [script] if script is not None and script.parent == self.submitit else []
        moved = [self.submission, *scripts, self.manifest, self.patch, *([] if keeps_code else [self.code])]
        for path in moved:
            if path.exists():
                path.rename(attempt.path / path.name)
        return PutAway(attempt, before, (self.job, self.settings, *moved))

    def put_back(self, away: PutAway) -> None:
        """Undoes `put_away`: no attempt follows."""
        for path in away.files:
            if path.is_dir():  # the copy of the code
                shutil.rmtree(path)
            with contextlib.suppress(FileNotFoundError):
                (away.attempt.path / path.name).replace(path)
        self.forget_secrets()
        if away.result is not None:
            self.amend(away.attempt.number, away.result)
        else:
            away.attempt.result.unlink()
            self.show_newest()

    def record_submission(self, submitted: Submitted) -> None:
        """Writes down what the job became, so that `submit.py wait` finds it again."""
        write_json(self.submission, asdict(submitted))

    def submitted(self) -> Submitted | None:
        """What the job became; None where it was not submitted, or not by a version that wrote it down."""
        record = read_json(self.submission) or {}
        texts = {name: record[name] for name in Submitted.__dataclass_fields__ if isinstance(record.get(name), str)}
        try:
            submitted = Submitted(**texts)
        except TypeError:
            return None
        form = {"slurm": "[0-9]{1,18}(_[0-9]{1,9})?", "local": "[0-9]{1,18}"}.get(submitted.executor)
        is_ours = form is not None and re.fullmatch(form, submitted.job_id)
        return submitted if is_ours else None

    def recorded(self, attempt: int | None = None) -> dict[str, Any] | None:
        """How an attempt ended, the newest one by default, but for what is not as we write it; None: not known."""
        there = self.last_attempt() if attempt is None else self.attempt(attempt)
        if (record := _recorded(there.result)) is not None:
            return record
        at_top = _recorded(self.result)  # an earlier version has left it only there
        return at_top if at_top is not None and at_top.get("attempt", there.number) == there.number else None

    def publish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Leaves the record of how its attempt ended, unless one is there that counts more.

        One of work that is done counts more, then one that names a rank, then one with Slurm's word, then the one that
        was there first. What another attempt has left is never touched.

        Returns:
            The record that counts.
        """
        path = self.attempt(record["attempt"]).make().result
        while True:
            there = _recorded(path) if is_there(path) else None
            if _weight(there) >= _weight(record):
                assert there is not None
                record = there
                break
            with contextlib.suppress(FileExistsError):
                write_new(path, _as_text(_without_secrets(to_json(record))))
                break
            # Taken away before it is replaced: what somebody has left since it was read is then found here.
            taken = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.taken")
            with contextlib.suppress(FileNotFoundError):
                path.rename(taken)
                record = max(record, _recorded(taken) or record, key=_weight)
                taken.unlink()
        self.show_newest()
        return record

    def amend(self, number: int, record: dict[str, Any]) -> None:
        """Replaces the record of how an attempt ended: for whoever decides what becomes of it, after its end."""
        write_json(self.attempt(number).result, record)
        self.show_newest()

    def begin_attempt(self) -> Attempt:
        """Makes the next attempt's folder, which nobody else can have made, and shows it at the top.

        For whoever starts an attempt; a batch script does the same in shell.
        """
        number = max(self._attempts(), default=-1) + 1
        while True:
            with contextlib.suppress(FileExistsError):
                self.attempt(number).path.mkdir(mode=0o700)
                break
            number += 1
        attempt = self.attempt(number).make()
        self.show_newest()
        return attempt

    def succeed(self, attempt: Attempt) -> Attempt:
        """Makes the folder of the attempt that follows this one in place, within the same start of the job.

        Where there is an srun.log, it has a link to it: by that, the batch script finds its newest attempt.

        Raises:
            FileExistsError: the scheduler has started the job again, and it has made that folder.
        """
        successor = self.attempt(attempt.number + 1)
        successor.path.mkdir(mode=0o700)
        with contextlib.suppress(OSError):  # a file system without symbolic links
            if os.path.lexists(attempt.srun_log):
                successor.srun_log.symlink_to(Path("..", attempt.path.name, attempt.srun_log.name))
        successor.make()
        self.show_newest()
        return successor

    def show_newest(self) -> None:
        """Makes metrics.jsonl and result.json at the top links to the newest attempt's, whoever calls this, and when.

        Of an attempt that has ended without any metrics, those of the one before are shown.

        A file system without symbolic links gets a copy of the result, and no metrics there.
        """
        newest = None
        while newest != (newest := self.last_attempt()):  # it may have got a successor in the meantime
            metrics = newest.metrics
            if newest.result.exists() and not is_there(metrics):  # it ended before it had loaded a checkpoint
                before = (self.attempt(number).metrics for number in range(newest.number - 1, -1, -1))
                metrics = next((path for path in before if path.exists()), metrics)
            self._link(self.metrics, metrics)
            if not self._link(self.result, newest.result):
                with contextlib.suppress(OSError, ValueError):
                    if (record := read_json(newest.result)) is not None:
                        write_json(self.result, record)
                    else:
                        self.result.unlink()

    def _link(self, link: Path, file: Path) -> bool:
        """Whether there is such a link now."""
        # Relative, so that it leads to the same file where the run directory is copied or moved to.
        target = file.relative_to(self.path)
        try:
            if not link.is_symlink() or link.readlink() != target:
                with written_beside(link) as own:
                    own.symlink_to(target)
        except OSError:
            return False
        return True

    def attempt(self, number: int) -> Attempt:
        return Attempt(self.path / f"attempt-{number}", number)

    def last_attempt(self) -> Attempt:
        """The newest incarnation; the first one where none has begun."""
        return self.attempt(max(self._attempts(), default=0))

    def has_begun(self, number: int) -> bool:
        """Whether an attempt has begun, whatever a cache of a shared file system still holds of that."""
        return is_there(self.attempt(number).path)

    def restarts(self) -> int:
        """How often failed ranks were started again in place, in whatever start of the job; `resume` counts anew."""
        count = 0
        for number in range(self.last_attempt().number, -1, -1):
            if (self.attempt(number).path / self.job.name).exists():  # it was put away
                break
            count += (self.recorded(number) or {}).get("decision", "").startswith("restarted as attempt")
        return count

    def _attempts(self) -> list[int]:
        return [int(match[1]) for name in _names(self.path) if (match := re.fullmatch(r"attempt-(\d+)", name))]

    def fault(self) -> str:
        """Why no file can be written there just now, such as a full disk; nothing where one can."""
        probe = self.path / f".probe-{os.getpid()}"
        try:
            write_text(probe, " " * 2**16)  # about what a submission takes
            probe.unlink()
        except OSError as error:
            return f"{self.path} cannot be written to: {reason(error)}"
        return ""

    def paths(self, attempt: int) -> RunPaths:
        """What a workload is told of the names on disk."""
        return RunPaths(
            run_dir=self.path,
            metrics=self.attempt(attempt).metrics,
            data_dir=self.data,
            export_dir=self.path / "export",
            checkpoint_dir=self.checkpoints,
            attempt_dir=self.attempt(attempt).path,
            next_attempt=self.attempt(attempt + 1).path,
        )


@dataclass(frozen=True)
class Attempt:
    """What one incarnation alone writes."""

    path: Path
    number: int

    def make(self) -> Attempt:
        """Makes the folders that are not there yet: for its agents, and for who leaves something without one."""
        for folder in (self.path.parent, self.path, self.path / "failures"):
            make_folder(folder, 0o700)
        return self

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def failure_record(self) -> Path:
        return self.path / "failure.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def memory(self) -> Path:
        return self.path / "memory.json"

    @property
    def rendezvous(self) -> Path:
        return self.path / "rendezvous.json"

    def agent_log(self, number: int = 0) -> Path:
        return self.path / f"agent-{number}.log"

    def agent_logs(self) -> dict[int, str]:
        """The log of each host's agent that has one, by the host's number."""
        numbers = ((name, re.fullmatch(r"agent-(\d+)\.log", name)) for name in _names(self.path))
        return {int(match[1]): str(self.path / name) for name, match in numbers if match}

    @property
    def srun_log(self) -> Path:
        return self.path / "srun.log"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks.txt"

    @property
    def collectives(self) -> Path:
        """What torch adds a rank's number to."""
        return self.path / "collectives-"

    def collectives_pipe(self, rank: int) -> Path:
        """Made by torch: what is written there makes NCCL write down what it has recorded."""
        return self.path / f"collectives-{rank}.pipe"

    def log(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.log"

    def profile(self, rank: int, ending: str) -> Path:
        return self.path / "profile" / f"rank-{rank}{ending}"

    def failure(self, rank: int) -> Path:
        return self.path / "failures" / f"{rank}.json"

    def torch_error(self, rank: int) -> Path:
        """What torch's own @record leaves of a script's failure, and nobody here reads."""
        return self.path / "failures" / f"{rank}-torch.json"

    def done(self, rank: int) -> Path:
        return self.path / "done" / str(rank)

    def failed(self) -> set[int]:
        """The ranks of which there is a record of failure; on a shared file system one may come later."""
        return {
            int(match[1]) for name in _names(self.path / "failures") if (match := re.fullmatch(r"(\d+)\.json", name))
        }


@dataclass(frozen=True)
class PutAway:
    """What `RunDirectory.put_away` has changed."""

    attempt: Attempt
    """Where the files are now."""
    result: dict[str, Any] | None
    """The attempt's, before."""
    files: tuple[Path, ...]
    """Where they were."""


def _recorded(path: Path) -> dict[str, Any] | None:
    record = read_json(path) or {}
    if not isinstance(record.get("status"), str):
        return None
    return {name: value for name, value in record.items() if isinstance(value, _OF_A_RESULT.get(name, object))}


def end_of(path: Path, size: int) -> str:
    """The last `size` bytes of a log; empty where it cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    """What is in a folder: a question to the file system, where one for each of thousands of names would be as many."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []
