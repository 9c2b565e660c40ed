"""`submit.py report [RUN]`: writes one HTML page about a run."""

from __future__ import annotations

from typing import Any

from jobs.cli import fit
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.run_dir import write_text
from jobs.runs import history
from jobs.runs.find import find
from jobs.spec import ResourceSpec
from workloads import registry
from workloads.input_files import expanded


def run(given: Options, console: Console) -> int:
    """Writes the page.

    Returns:
        The exit code, 0.

    Raises:
        CommandLineError: there is no such run.
        OSError: the page cannot be written there.
    """
    run_dir = find(given.run)
    from jobs.runs import page  # late: plotly, which may not be installed

    of = history.read(run_dir)
    differing, ideal_bytes = _defaults(of)
    file = expanded(given.output) if given.output else run_dir.path / "report.html"
    write_text(file, page.report(of, differing, ideal_bytes))
    console.say(str(file))
    console.finish({"report": str(file.absolute()), "run_dir": str(run_dir.path), "exit_code": 0})
    return 0


def _defaults(of: history.History) -> tuple[dict[str, tuple[Any, Any]] | None, int | None]:
    """The settings that are not at their defaults, and the estimate of a rank's memory, if the workload tells."""
    try:
        workload = of.job["workload"]
        entry = registry.load(workload, of.job.get("import_path", ()))
        config = entry.config.model_validate(of.job["settings"])
        defaults = history.flat(entry.config.model_construct().model_dump(mode="json"))
        differing = {
            name: (value, defaults.get(name)) for name, value in of.settings.items() if value != defaults.get(name)
        }
        device = "cpu" if "CPU" in str(of.record.get("device")) else "cuda"
        resources = ResourceSpec.model_validate(of.job["resources"])
        return differing, fit.rank_bytes(workload, entry, config, resources, device)
    except Exception:  # a user's module that is not there any more, or not importable here
        return None, None
