"""What `--dry-run` prints: the resolved job, the mesh, the exact submission."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import yaml

from jobs import executor, secret_values
from jobs.cli.console import Console
from jobs.cli.resolve import Resolved
from jobs.rank.numbering import mesh_table
from jobs.runs.sweep import words_of
from jobs.secret_values import hidden
from jobs.settings import as_key_values
from jobs.spec import JobSpec


class OfSweep(NamedTuple):
    """The sweep whose first point is shown."""

    points: Sequence[Mapping[str, str]]
    spec: JobSpec
    """What is submitted for all points; its run directory is the sweep's folder."""
    array: str


def show(resolved: Resolved, plan: str | None, console: Console, sweep: OfSweep | None = None) -> None:
    """Prints what would happen.

    Args:
        resolved: the job.
        plan: what its workload's `prepare` would do, if anything.
        console: where it is printed.
        sweep: of which it is the first point; None: it is no sweep.
    """
    spec, shown = resolved.spec, secret_values.public(resolved.spec)
    submission = executor.render(spec, resolved.cluster)
    if sweep is not None and sweep.array:
        submission = executor.render(sweep.spec, resolved.cluster, sweep.array)
    hosts = [f"host{node}" for node in range(spec.resources.nodes)]
    console.say("dry run: nothing is started or written\n")
    for line in resolved.announcements:
        console.say(line)
    if plan is not None:
        console.say(f"prepare: {plan}")
    of_first = ""
    if sweep is not None:
        of_first = " of point 0"
        console.say(f"sweep of {len(sweep.points)} points: {sweep.spec.run_dir}")
        console.say(_indent("\n".join(f"{n}: {words_of(hidden(dict(p)))}" for n, p in enumerate(sweep.points))) + "\n")
    else:
        console.say(f"run directory: {spec.run_dir}\n")
    console.say(f"settings{of_first}:")
    settings = " ".join(as_key_values(shown.settings))
    console.say(_indent(textwrap.fill(settings, 110, break_long_words=False, break_on_hyphens=False)) + "\n")
    console.say(f"mesh: {resolved.mesh}, on {spec.resources.shape} ranks")
    console.say(_indent(mesh_table(resolved.mesh, hosts)) + "\n")
    if spec.max_restarts:
        spares = f"; spare hosts: {spec.resources.spares}" if spec.resources.spares else ""
        console.say(f"restarts in place after a failure: at most {spec.max_restarts}{spares}\n")
    step = "adapts to the measured steps" if spec.watchdog_timeout_s is None else f"{spec.watchdog_timeout_s:g} s"
    limits = f"rendezvous {spec.rendezvous_timeout_s:g} s, a collective {spec.collective_timeout_s:g} s, a step: {step}"
    console.say(f"time-outs: {limits}\n")
    if spec.executor != "slurm":  # otherwise both are in the script
        console.say("environment variables of every rank:")
        console.say(_indent("\n".join(f"{name}={value}" for name, value in sorted(shown.rank_env.items()))) + "\n")
        console.say("submission parameters:")
        console.say(_indent(yaml.safe_dump(submission.parameters or "none", sort_keys=False)) + "\n")
    console.say(f"submission{of_first if sweep is None or not sweep.array else ' of all points'}:")
    console.say(_indent(submission.text))
    if not console.as_json:
        return
    console.finish(
        {
            "status": "dry-run",
            "exit_code": 0,
            "job": shown.model_dump(mode="json"),
            **({} if sweep is None else {"sweep": sweep.spec.run_dir, "points": hidden([*map(dict, sweep.points)])}),
            "prepare": plan,
            "mesh": {
                "names": resolved.mesh.names,
                "sizes": resolved.mesh.sizes,
                "ranks": [
                    {
                        "rank": rank,
                        "host": hosts[rank // spec.resources.gpus_per_node],
                        "coordinate": resolved.mesh.coordinate(rank),
                    }
                    for rank in range(resolved.mesh.world_size)
                ],
            },
            "submission": {
                "parameters": submission.parameters,
                "text": submission.text,
                "env": shown.rank_env,
            },
        }
    )


def _indent(text: str) -> str:
    return "\n".join("  " + line if line else line for line in text.splitlines())
