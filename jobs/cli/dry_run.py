"""What `--dry-run` prints: the resolved job, the mesh, the exact submission."""

from __future__ import annotations

import textwrap

import yaml

from jobs import executor, secret_values
from jobs.cli.console import Console
from jobs.cli.resolve import Resolved
from jobs.rank.numbering import mesh_table
from jobs.settings import as_key_values


def show(resolved: Resolved, plan: str | None, console: Console) -> None:
    """Prints what would happen.

    Args:
        resolved: the job.
        plan: what its workload's `prepare` would do, if anything.
        console: where it is printed.
    """
    spec, shown = resolved.spec, secret_values.public(resolved.spec)
    submission = executor.render(spec, resolved.cluster)
    hosts = [f"host{node}" for node in range(spec.resources.nodes)]
    console.say("dry run: nothing is started or written\n")
    for line in resolved.announcements:
        console.say(line)
    if plan is not None:
        console.say(f"prepare: {plan}")
    console.say(f"run directory: {spec.run_dir}\n")
    console.say("settings:")
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
    console.say("submission:")
    console.say(_indent(submission.text))
    if not console.as_json:
        return
    console.finish(
        {
            "status": "dry-run",
            "exit_code": 0,
            "job": shown.model_dump(mode="json"),
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
