"""One GPU: tp_fsdp's `1b` at 4,096 tokens, and what each of the levers behind its utilization is worth.

    python -m tests.benchmarks.gpu [--steps 10] [--only NAME ...] [--out DIRECTORY]

Needs a CUDA device of 80 GB. Every row is a process of its own that runs the workload for some steps on one GPU and
takes the median of its step times. `before` is the workload without any lever; each lever is then switched on alone,
and switched off alone. float8, which needs torchao, is a row of its own, and its MFU is of bf16's peak, too. Tensor
parallelism, HSDP and asynchronous TP cannot be seen on one card. It prints a table, writes it as JSON with the top
operators of `before` and `all`, and exits with 1 where `all` misses the goal: 55% of the data sheet's peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

GOAL = 0.55
BASE: dict[str, Any] = {
    "model": "1b",
    "seq_len": 4096,
    "sample_tokens": 0,
    "eval_windows": 1,
    "warmup_steps": 2,
    "lr": 3e-4,
}
LEVERS = ("compile", "attention", "loss", "gathered", "batch")
"""compile: blocks by torch.compile. attention: cuDNN's kernel with keys and values as they are, instead of flash's with
them repeated. loss: in chunks. gathered: weights stay gathered between forward and backward pass. batch: 8 samples per
step instead of 4."""
DEADLINE_S = 180


def rows_to_run() -> dict[str, dict[str, Any]]:
    """What is run, by the row's name: the levers that are on, and other settings."""
    rows: dict[str, dict[str, Any]] = {"all": {"on": LEVERS}, "before": {"on": ()}}
    rows |= {f"{lever} alone": {"on": (lever,)} for lever in LEVERS}
    rows |= {f"all but {lever}": {"on": tuple(other for other in LEVERS if other != lever)} for lever in LEVERS}
    rows["before, in fp32"] = {"on": (), "settings": {"precision": "fp32", "global_batch_size": 2}}
    rows["all, heads of width 64"] = {"on": LEVERS, "settings": {"model": {"preset": "1b", "n_heads": 32}}}
    rows["all, and float8"] = {"on": LEVERS, "settings": {"float8": True}}
    rows["all, 4 passes a step"] = {"on": LEVERS, "settings": {"global_batch_size": 32, "microbatch_size": 8}}
    rows["all, selective checkpointing"] = {"on": LEVERS, "settings": {"activation_checkpointing": "selective"}}
    return rows


def settings_of(on: tuple[str, ...], steps: int, **other: Any) -> dict[str, Any]:
    return {
        **BASE,
        "steps": steps,
        "precision": "bf16",
        "compile": "compile" in on,
        "reshard_after_forward": "gathered" not in on,
        "global_batch_size": 8 if "batch" in on else 4,
        **other,
    }


def without_attention() -> None:
    """Flash's kernel, and each key and value head written out for every query head that it serves."""
    import torch.nn.functional as F
    from torch import Tensor
    from torch.nn.attention import SDPBackend

    from workloads.tp_fsdp_llama2 import model

    genuine = F.scaled_dot_product_attention

    def repeated(q: Tensor, k: Tensor, v: Tensor, attn_mask: None, is_causal: bool, enable_gqa: bool) -> Tensor:
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        return genuine(q, k, v, is_causal=is_causal)

    F.scaled_dot_product_attention = repeated  # type: ignore[assignment]
    model.ATTENTION[:] = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def without_loss() -> None:
    """All logits at once."""
    import torch.nn.functional as F
    from torch import Tensor

    from workloads.tp_fsdp_llama2.model import Output

    def forward(self: Output, x_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        logits_BSV = F.linear(x_BSD, self.weight)
        if labels_BS is None:
            return logits_BSV
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="sum")

    Output.forward = forward  # type: ignore[method-assign]


WITHOUT: dict[str, Callable[[], None]] = {"attention": without_attention, "loss": without_loss}


def run_one(request: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: one run on this process's GPU; its result and its steps' times."""
    import logging

    import torch

    from tests.workloads.worlds import make_context
    from workloads.tp_fsdp_llama2.config import Config
    from workloads.tp_fsdp_llama2.train import run

    logging.basicConfig(level=logging.WARNING)
    for lever, switch_off in WITHOUT.items():
        if lever not in request["on"]:
            switch_off()
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        # Closed, it has written every step's line.
        with closing(make_context(0, (1, 1), ("dp", "tp"), store, Path(folder), request.get("device", "cuda"))) as ctx:
            if request.get("profile"):
                profile_last_step(ctx, request["settings"]["steps"], Path(request["profile"]))
            result = run(Config.model_validate(request["settings"]), ctx)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {
        **result,
        "seconds": [line.get("step_seconds") for line in lines],
        "losses": [line["loss"] for line in lines],
        "peak_memory_bytes": lines[-1]["peak_memory_bytes"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }


def profile_last_step(ctx: Any, last: int, path: Path) -> None:
    """Writes the last step's top operators to `path`; the step itself is slower and left out of the median, nearly."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def step_ended(step: int) -> None:
        if step == last - 1:
            profiler.start()
        elif step == last:
            profiler.stop()
            table = profiler.key_averages().table(
                sort_by="self_device_time_total", row_limit=25, max_name_column_width=70
            )
            path.write_text(table)

    ctx.step_hooks.append(step_ended)


def run_row(name: str, row: dict[str, Any], steps: int, out: Path) -> dict[str, Any]:
    """Runs a row in a new process; a run that fails or takes too long becomes a row that says so."""
    request = {"on": row["on"], "settings": settings_of(row["on"], steps, **row.get("settings", {}))}
    if name in ("all", "before"):
        request["profile"] = str(out / f"profile-{name}.txt")
    began = time.monotonic()
    line = [sys.executable, "-m", "tests.benchmarks.gpu", "--request", json.dumps(request)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"not done after {DEADLINE_S} s"}
    (out / f"{name.replace(' ', '-').replace(',', '')}.log").write_text(done.stderr)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"name": name, "error": last[:200]}
    return {"name": name, "took": time.monotonic() - began, **json.loads(done.stdout.splitlines()[-1])}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| levers | ms a step | tokens/s | MFU | of measured matmul | peak GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | | |")
            continue
        figures = [
            f"{row['step_seconds'] * 1e3:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['mfu']:.1%}" if row.get("mfu") else "",
            f"{row['mfu_of_measured']:.1%}" if row.get("mfu_of_measured") else "",
            f"{row['peak_memory_bytes'] / 2**30:.1f}",
        ]
        lines.append(f"| {row['name']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10, help="steps per row; default: 10")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"rows to run, of {' | '.join(rows_to_run())}; default: all"
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the table, logs and profiles")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.request:
        print(json.dumps(run_one(json.loads(arguments.request)), default=str))
        return 0
    possible = rows_to_run()
    unknown = [name for name in arguments.only or () if name not in possible]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are: {', '.join(possible)}")
    import torch

    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.only or possible:
        rows.append(run_row(name, possible[name], arguments.steps, arguments.out))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        (arguments.out / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")
    known = next((row for row in rows if "error" not in row), None)
    if known is not None:
        peak, measured = known.get("peak_flops_data_sheet"), known.get("peak_flops_measured")
        print(
            f"\n{known['device']}, torch {known['torch']}, {known['parameters']:,} parameters, {known.get('flop_rule')}"
        )
        print(f"peak {(peak or 0) / 1e12:.0f} TFLOP/s by the data sheet, {(measured or 0) / 1e12:.0f} measured\n")
    print(table(rows))
    best = next((row.get("mfu") or 0.0 for row in rows if row["name"] == "all"), None)
    if best is not None:
        print(f"goal: MFU of {GOAL:.0%} with all levers: {'reached' if best >= GOAL else 'MISSED'} ({best:.1%})")
    return 0 if best is None or best >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
