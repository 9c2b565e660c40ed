"""A run's history across its attempts, and the page that shows it, in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from jobs.cli.main import main
from jobs.run_dir import RunDirectory, write_json
from jobs.runs import history, page
from workloads.pipeline_mlp import timeline
from workloads.pipeline_mlp.events import Event

EVIL = "<script>alert(1)</script> & 'quoted'"
JOB = {
    "workload": "tp_fsdp",
    "settings": {"steps": 9, "lr": 0.5, "model": {"dim": 64}},
    "resources": {"nodes": 2, "gpus_per_node": 2},
}


def rows(first: int, last: int, loss: float) -> list[dict[str, Any]]:
    return [
        {"step": n, "loss": loss / n, "tokens_per_second": 100.0, "step_seconds": 0.5, "peak_memory_bytes": 2e9}
        for n in range(first, last + 1)
    ]


def a_run(path: Path) -> RunDirectory:
    """Attempt 0 failed after step 6; attempt 1 went on after step 4, and logged an evaluation; then it is done."""
    run = RunDirectory(path)
    first = rows(1, 6, 1.0)
    second = [*first[:4], *rows(5, 9, 1.1), {"step": 9, "heldout_loss": 0.25, "evaluation_seconds": 2.0}]
    write_json(run.attempt(0).make().path.parent / "job.json", JOB)
    for number, lines in enumerate((first, second)):
        run.attempt(number).make().metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    failed = {"status": "failed", "attempt": 0, "error": f"rank 3 on node1: {EVIL}", "next_attempt": 1}
    write_json(run.attempt(0).result, {**failed, "decision": "restarted as attempt 1"})
    done = {"status": "done", "attempt": 1, "seconds": 9.0, "mesh": {"dp": 2, "tp": 2}, "result": {"note": EVIL}}
    write_json(run.attempt(1).result, done)
    write_json(run.attempt(1).memory, {"peak_bytes": [2_000_000_000, 1_900_000_000, None, 2_000_000_000]})
    run.show_newest()
    boxes = [Event(rank, kind, rank, 0, 0.1 * n, 0.1 * n + 0.05) for n, (rank, kind) in enumerate(BOXES)]
    timeline.write(boxes, run.path / "timeline.json")
    return run


BOXES = [(0, "forward"), (1, "forward"), (1, "backward"), (0, "backward")]


def test_one_curve_across_restarts_with_what_was_trained_again(tmp_path: Path) -> None:
    of = history.read(a_run(tmp_path / "run"))
    assert of.series("loss")[0] == list(range(1, 10))
    assert of.series("loss")[1][5] == pytest.approx(1.1 / 6)
    assert of.series("heldout_loss") == ([9], [0.25])
    assert [(r.attempt, r.step, r.lost_steps) for r in of.restarts] == [(1, 4, 2)]
    assert of.restarts[0].why == f"rank 3 on node1: {EVIL}; restarted as attempt 1"
    assert of.where_time_goes() == {"steps": 4.5, "evaluation": 2.0}
    assert of.settings == {"steps": 9, "lr": 0.5, "model.dim": 64}
    assert of.status == "done"
    assert of.peak_bytes == [2_000_000_000, 1_900_000_000, None, 2_000_000_000]


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert history.read(run).rows == ()
    run.attempt(0).make().metrics.write_text(
        '{"step": 1, "loss": 2}\nnot JSON\n[1]\n{"loss": 3}\n{"step": 2, "loss": null}'
    )
    run.job.write_text("{")
    of = history.read(run)
    assert of.series("loss") == ([1], [2])
    assert (of.status, of.settings, of.result) == ("has not ended", {}, {})
    assert "Loss" in page.report(of, None, None)


def test_the_page_has_every_figure_and_needs_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path / 'report.html'}\n"
    text = (run.path / "report.html").read_text()
    own = text.replace(get_plotlyjs(), "")
    assert re.findall(r"<h2>(.*?)</h2>", own) == [
        *("Loss", "Throughput", "Seconds per step, and what was timed beside it", "Where the time went"),
        *("Memory per rank", "The pipeline&#x27;s timeline", "Restarts", "Settings that differ from the defaults"),
        "Result",
    ]
    assert EVIL not in own
    assert "&lt;script&gt;alert(1)" in own
    assert "http" not in own
    assert main(["report", str(run.path), "--json", "-o", str(tmp_path / "elsewhere.html")]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / "elsewhere.html")


def test_runs_are_compared_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other")
    write_json(other.job, {**JOB, "settings": {**JOB["settings"], "lr": 0.25, "seed": 7}})  # type: ignore[dict-item]
    assert main(["compare", str(one.path), str(other.path), "-o", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"      one  other\nlr    0.5  0.25\nseed       7\n{tmp_path / 'both.html'}\n"
    assert "one loss" in (tmp_path / "both.html").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None and "CI" not in os.environ, reason="no chromium")
@pytest.mark.parametrize("width", [600, 1300])
def test_a_browser_draws_each_figure_without_an_error(width: int, tmp_path: Path) -> None:
    of = history.read(a_run(tmp_path / "run"))
    probe = "<script>addEventListener('load', () => setTimeout(() => { document.title = `probe ${" + (
        "document.querySelectorAll('.plot-container').length} ${document.documentElement.scrollWidth - innerWidth}`;"
        "}, 500))</script>"
    )
    (tmp_path / "page.html").write_text(page.report(of, {"lr": (0.5, 0.25)}, 4 * 10**9) + probe)
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    line = ["chromium", "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet)]
    line += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--virtual-time-budget=20000"]
    line += ["--enable-logging=stderr", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>probe (\d+) (-?\d+)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    assert int(title[1]) == 6  # the figures
    assert int(title[2]) <= 0  # nothing is wider than the window
    assert "CONSOLE" not in done.stderr
