"""Histories of runs -> one HTML page that needs no network: figures by plotly, light and dark, also on paper. Pure.

Colors of text and lines are gray enough for both backgrounds, so the figures themselves need no switch.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from jobs.run_dir import read_json
from jobs.runs.history import History

GRAY, GRID = "#808890", "rgba(128,136,144,0.25)"
COLORS = ("#2a78c8", "#e07b28", "#2f9e62", "#c2427a", "#8457c9", "#9a7b1f", "#1f9a9a", "#b0443c")
MOST_POINTS = 2000
"""A curve has at most about as many points; of longer ones, every n-th step is drawn."""
MOST_SETTINGS = 400


def report(history: History, differing: Mapping[str, tuple[Any, Any]] | None, ideal_bytes: int | None) -> str:
    """The page about one run.

    Args:
        history: the run.
        differing: of each setting that is not at its default, its value and the default; None: the defaults are not
            known.
        ideal_bytes: what a rank was estimated to need at its peak; None: there is no estimate.
    """
    figures = [
        _loss([history]),
        _curve([history], "Throughput", _throughputs([history])),
        _curve([history], "Model FLOPs utilization", ["mfu"]),
        _steps(history),
        _where(history),
        _memory(history, ideal_bytes),
        _pipeline(history),
    ]
    settings = [(name, _text(value), _text(default)) for name, (value, default) in (differing or {}).items()]
    if differing is None:
        all_open, changed = "open", "<p>The workload cannot be imported here, so its defaults are not known.</p>"
    else:
        all_open = ""
        changed = _table(("setting", "value", "default"), settings) if settings else "<p>All are at their defaults.</p>"
    restarts = _table(
        ("attempt", "goes on after step", "steps trained again", "because"),
        [(r.attempt, r.step, r.lost_steps, r.why or "the attempt before left no record") for r in history.restarts],
    )
    parts = [
        _facts(history),
        *figures,
        f"<section><h2>Restarts</h2>{restarts}</section>" if history.restarts else "",
        f"<section><h2>Settings that differ from the defaults</h2>{changed}<details {all_open}><summary>All settings"
        f"</summary>{_table(('setting', 'value'), _pairs(history.settings))}</details></section>",
        f"<section><h2>Result</h2>{_table(('', ''), _pairs(history.result))}</section>" if history.result else "",
    ]
    return _page(history.name, parts)


def comparison(histories: Sequence[History], rows: Sequence[tuple[str, ...]]) -> str:
    """The page about several runs.

    Args:
        histories: the runs.
        rows: of each setting or result that differs, its name and each run's value.
    """
    names = ("", *(history.name for history in histories))
    parts = [
        _loss(histories),
        _curve(histories, "Throughput", _throughputs(histories)),
        _curve(histories, "Model FLOPs utilization", ["mfu"]),
        _curve(histories, "Seconds per step", ["step_seconds"]),
        f"<section><h2>What differs</h2>{_table(names, rows)}</section>",
    ]
    return _page(f"{len(histories)} runs", parts)


# --- figures ----------------------------------------------------------------------------------------------------------


def _loss(histories: Sequence[History]) -> str:
    return _curve(histories, "Loss", ["loss", "train_loss", "heldout_loss", "test_loss"])


def _throughputs(histories: Sequence[History]) -> list[str]:
    names = dict.fromkeys(name for history in histories for name in history.metrics if name.endswith("_per_second"))
    return list(names)[:2]


def _curve(histories: Sequence[History], title: str, metrics: Sequence[str]) -> str:
    """A figure of some metrics over the steps; nothing if no run has any. Restarts are dotted lines."""
    figure, color = go.Figure(), 0
    for history in histories:
        for metric in metrics:
            steps, values = _thinned(*history.series(metric))
            if not steps:
                continue
            label = metric if len(histories) == 1 else history.name if len(metrics) == 1 else f"{history.name} {metric}"
            mode = "lines+markers" if len(steps) < 60 else "lines"
            line = {"color": COLORS[color % len(COLORS)], "width": 2}
            figure.add_scatter(x=steps, y=values, name=label, mode=mode, line=line, marker={"size": 5})
            color += 1
    if not figure.data:
        return ""
    if len(histories) == 1:
        _mark_restarts(figure, histories[0])
    unit = metrics[0].replace("_", " ") if len(metrics) == 1 else ""
    return _figure(figure, title, "step", unit)


def _mark_restarts(figure: go.Figure, history: History) -> None:
    for restart in history.restarts:
        label = f"attempt {restart.attempt}"
        figure.add_vline(restart.step, line={"dash": "dot", "color": GRAY}, annotation_text=label)
        # A line has no text of its own to show on hover.
        text = f"{label} goes on after step {restart.step}"
        text += f"<br>{html.escape(_wrapped(restart.why))}" if restart.why else ""
        figure.add_scatter(
            x=[restart.step],
            y=[0],
            yaxis="y2",
            mode="markers",
            marker={"symbol": "triangle-up", "color": GRAY},
            hovertext=[text.replace("\n", "<br>")],
            hoverinfo="text",
            showlegend=False,
        )
    if history.restarts:
        figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True})


def _steps(history: History) -> str:
    """How long each step took, and what was timed beside it."""
    names = [name for name in history.metrics if name.endswith("_seconds")]
    figure = go.Figure()
    for place, name in enumerate(names):
        steps, values = _thinned(*history.series(name))
        figure.add_bar(x=steps, y=values, name=name.removesuffix("_seconds"), marker_color=COLORS[place % len(COLORS)])
    if not figure.data:
        return ""
    figure.update_layout(barmode="stack", bargap=0)
    return _figure(figure, "Seconds per step, and what was timed beside it", "step", "seconds")


def _where(history: History) -> str:
    times = {name: seconds for name, seconds in history.where_time_goes().items() if seconds > 0}
    total = history.record.get("seconds")
    if isinstance(total, (int, float)) and not history.restarts and total > sum(times.values()):
        times["start and end"] = total - sum(times.values())
    if not times:
        return ""
    names = sorted(times, key=lambda name: times[name])
    text = [f"{times[name]:.3g} s" for name in names]
    figure = go.Figure(
        go.Bar(x=[times[name] for name in names], y=names, orientation="h", text=text, marker_color=COLORS[0])
    )
    return _figure(figure, "Where the time went", "seconds", "", height=90 + 40 * len(names))


def _memory(history: History, ideal_bytes: int | None) -> str:
    steps, values = _thinned(*history.series("peak_memory_bytes"))
    by_rank = history.peak_bytes
    if not steps and not by_rank:
        return ""
    figure = go.Figure()
    if by_rank:
        known = {rank: value / 1e9 for rank, value in enumerate(by_rank) if value is not None}
        figure.add_bar(x=[*known], y=[*known.values()], name="peak", marker_color=COLORS[0])
        figure.update_xaxes(tickformat="d", nticks=min(16, len(by_rank) + 1))
    else:  # it has not ended
        figure.add_scatter(x=steps, y=[v / 1e9 for v in values], name="peak of any rank", line={"color": COLORS[0]})
    if ideal_bytes is not None:
        figure.add_hline(
            ideal_bytes / 1e9, line={"dash": "dash", "color": COLORS[1]}, annotation_text="estimated before the start"
        )
        figure.update_yaxes(rangemode="tozero")
    return _figure(figure, "Memory per rank", "rank" if by_rank else "step", "GB")


def _pipeline(history: History) -> str:
    """The boxes of a measured step of a pipeline, a row a rank, from its timeline.json."""
    trace = (read_json(history.run.path / "timeline.json") or {}).get("traceEvents")
    events = [event for event in trace if isinstance(event, dict)] if isinstance(trace, list) else []
    boxes = [event for event in events if event.get("ph") == "X"]
    rank = {event.get("tid"): event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    figure = go.Figure()
    for place, kind in enumerate(dict.fromkeys(str(box.get("cat")) for box in boxes)):
        own = [box for box in boxes if box.get("cat") == kind]
        figure.add_bar(
            base=[box["ts"] / 1000 for box in own],
            x=[box["dur"] / 1000 for box in own],
            y=[rank[box["tid"]] for box in own],
            text=[box["name"] for box in own],
            name=kind,
            orientation="h",
            marker_color=COLORS[place % len(COLORS)],
            hovertemplate="%{text}: %{x:.3f} ms<extra>%{y}</extra>",
        )
    if not figure.data:
        return ""
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(autorange="reversed")
    rows = len({box["tid"] for box in boxes})
    measured, theory = history.result.get("bubble_measured"), history.result.get("bubble_theory")
    bubble = ""
    if isinstance(measured, float) and isinstance(theory, float):
        bubble = f": bubble {100 * measured:.1f}% measured, {100 * theory:.1f}% in theory"
    return _figure(figure, f"The pipeline's timeline{bubble}", "milliseconds", "", height=130 + 46 * rows)


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    every = -(-len(steps) // MOST_POINTS) or 1
    return list(steps[::every]), list(values[::every])


def _figure(figure: go.Figure, title: str, x: str, y: str, height: int = 340) -> str:
    figure.update_layout(
        height=height,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GRAY, "family": "system-ui, sans-serif"},
        margin={"l": 70, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GRID, "activecolor": GRAY},
    )
    figure.update_xaxes(title=x, gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(title=y, gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    body = figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False})
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


# --- text -------------------------------------------------------------------------------------------------------------


def _facts(history: History) -> str:
    job, record = history.job, history.record
    resources = job.get("resources") if isinstance(job.get("resources"), Mapping) else {}
    steps = history.rows[-1] if history.rows else {}
    of = job.get("settings", {}).get("steps") if isinstance(job.get("settings"), Mapping) else None
    facts = {
        "workload": job.get("workload"),
        "state": history.status,
        "hosts x ranks": f"{resources.get('nodes')} x {resources.get('gpus_per_node')}" if resources else None,
        "mesh": _mesh(record.get("mesh")),
        "device": record.get("device"),
        "torch": record.get("torch"),
        "seconds": record.get("seconds"),
        "step": f"{steps['step']}{f' of {of}' if of else ''}" if steps else None,
        "restarts": len(history.restarts) or None,
        "run directory": str(history.run.path),
    }
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_text(value))}</dd></div>"
        for name, value in facts.items()
        if value is not None
    )
    error = record.get("error")
    why = f'<p class="error">{html.escape(str(error))}</p>' if error else ""
    return f"<section><dl>{rows}</dl>{why}</section>"


def _mesh(sizes: Any) -> str | None:
    """`dp 2, tp 4`, as the log has it."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) if isinstance(sizes, Mapping) else None


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in list(values.items())[:MOST_SETTINGS]]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _wrapped(text: str, width: int = 80) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:8])


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _page(title: str, parts: Sequence[str]) -> str:
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), plotly=get_plotlyjs(), body="\n".join(filter(None, parts)))
