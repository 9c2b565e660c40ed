"""The figure that papers on pipelines draw, from a step that was measured: ranks as rows, microbatches as boxes.

An SVG, written by hand, so that a run needs no library to draw. Torch-free.
"""

from __future__ import annotations

import colorsys
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from workloads.pipeline_mlp.events import BUSY, Event
from workloads.whole_files import written_beside

HUES = {"forward": 212, "backward": 140, "backward_input": 174, "backward_weight": 32}
"""Degrees. The halves' colours are as far from each other as from the whole's: they must be told apart in one row."""
NAMES = {
    "forward": "forward",
    "backward": "backward",
    "backward_input": "backward, input",
    "backward_weight": "backward, weights",
    "send": "send",
    "wait": "wait",
}
PLAIN = {"send": "#444444", "wait": "#e4e4e4"}
LEFT, RIGHT, TOP, GAP = 64.0, 20.0, 82.0, 6.0
"""Pixels: margins, and what lies between two rows."""
ROWS, ROW = 320.0, (30.0, 64.0)
"""Pixels that all rows share, and of one, at least and at most."""
BOX = 24.0
"""Pixels of the median forward, where the page is wide enough: room for a number of two digits."""
WIDTHS = (640.0, 1400.0 - LEFT - RIGHT)
"""Pixels of the whole time axis, at least and at most: the picture fits a page."""
MANY, KEPT, CELLS = 2600, 1200, 6000
"""From so many boxes on, the thin ones are merged; how many are then left at most, and how many columns, in all rows.

A box with its number and what it says takes up to 400 bytes, a column up to 100: together less than 1 MB.
"""


def write(
    events: Sequence[Event],
    path: Path,
    *,
    schedule: str = "",
    ranks: int | None = None,
    microbatches: int | None = None,
    measured: float | None = None,
    theoretical: float | None = None,
) -> None:
    """Draws one step. Each box lies where its time says, to the hundredth of a pixel, and says more when pointed at.

    Forwards, backwards and their halves have a colour each, the darker the later the microbatch; of several stages on
    a rank, the later ones are the darker ones. What is empty or grey is the bubble. Of very many boxes, those thinner
    than a pixel (or more, to leave 1200) are merged into columns that show how much of the time each kind took.

    Args:
        events: of one step, all ranks of one pipeline, in any order.
        path: of the SVG; it is replaced as a whole, or not at all.
        schedule: for the title.
        ranks: rows, from 0. None: as many as have events.
        microbatches: for the title. None: as many as the events have.
        measured: bubble fraction, for the title.
        theoretical: bubble fraction, for the title.

    Raises:
        ValueError: there is nothing to draw, or an event is of a rank that has no row.
    """
    if not events:
        raise ValueError("no events: there is no step to draw")
    rows = max(event.rank for event in events) + 1
    if ranks is not None and rows > ranks:
        raise ValueError(f"an event of rank {rows - 1} in a pipeline of {ranks}; give those of one pipeline only")
    words = [schedule] if schedule else []
    words.append(_count(ranks or rows, "rank"))
    words.append(_count(microbatches or max(event.microbatch for event in events) + 1, "microbatch", "es"))
    if measured is not None:
        words.append(f"bubble {100 * measured:.1f}% measured")
    if theoretical is not None:
        words.append(f"{'' if measured is not None else 'bubble '}{100 * theoretical:.1f}% in theory")
    with written_beside(path) as beside:
        beside.write_text("\n".join(_svg(events, ranks or rows, ", ".join(words))) + "\n", encoding="utf-8")


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else plural}"


def _svg(events: Sequence[Event], ranks: int, title: str) -> Iterator[str]:
    began = min(event.start_s for event in events)
    seconds = max(event.end_s for event in events) - began or 1e-3
    forwards = [event.seconds for event in events if event.kind == "forward" and event.seconds > 0]
    wanted = BOX * seconds / statistics.median(forwards) if forwards else 0.0
    axis = min(max(wanted, WIDTHS[0]), WIDTHS[1])
    scale = axis / seconds
    row = min(max(ROWS / ranks, ROW[0]), ROW[1])
    bottom = TOP + ranks * (row + GAP)
    kept, merged, thin = _thinned(events, scale)
    # A bold letter of the title takes 0.6 of its size at most, whatever the font is.
    size = min(15.0, WIDTHS[1] / (0.6 * len(title)))
    width = LEFT + min(max(axis, 0.6 * size * len(title)), WIDTHS[1]) + RIGHT
    height = bottom + (58 if merged else 40)

    yield '<?xml version="1.0" encoding="UTF-8"?>'
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="12">'
    )
    yield f"<title>{escape(title)}</title>"
    yield f'<rect class="paper" width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    yield f'<text class="title" x="{LEFT:.0f}" y="22" font-size="{size:.1f}" font-weight="bold">{escape(title)}</text>'
    yield from _legend(events)
    for rank in range(ranks):
        y = TOP + rank * (row + GAP)
        yield f'<text class="rank" x="{LEFT - 8:.0f}" y="{y + row / 2 + 4:.1f}" text-anchor="end">rank {rank}</text>'
        yield (
            f'<rect class="row" x="{LEFT:.2f}" y="{y:.1f}" width="{axis:.2f}" height="{row:.1f}" fill="#f8f8f8" '
            'stroke="#c8c8c8" stroke-width="0.5"/>'
        )
    yield from _axis(seconds, scale, bottom)
    if merged:
        yield from _columns(merged, began, scale, axis, row)
        yield (
            f'<text class="caption" x="{LEFT:.0f}" y="{bottom + 40:.0f}">{len(merged)} of {len(events)} boxes, no '
            f"wider than {thin:.2g} px, are merged: columns show how much of the time each kind took.</text>"
        )
    shade = _shades(events)
    digits = len(str(max(event.microbatch for event in events)))  # all numbers of one size
    # Waits first: where a clock's grain makes neighbours touch, work is drawn over them.
    for event in sorted(kept, key=lambda event: (event.kind != "wait", event.rank, event.start_s)):
        x, wide = LEFT + (event.start_s - began) * scale, event.seconds * scale
        yield from _box(event, x, wide, row, digits, began, *shade(event))
    yield "</svg>"


def _thinned(events: Sequence[Event], scale: float) -> tuple[list[Event], list[Event], float]:
    """What is drawn as a box, what is merged, and how many pixels wide a box has to be."""
    if len(events) <= MANY:
        return list(events), [], 0.0
    thin = max(1.0, sorted((event.seconds * scale for event in events), reverse=True)[KEPT])
    kept = [event for event in events if event.seconds * scale > thin]
    return kept, [event for event in events if event.seconds * scale <= thin], thin


def _columns(events: Sequence[Event], began: float, scale: float, axis: float, row: float) -> Iterator[str]:
    """The kinds above one another, of a height that goes with their time in a column's; what is left is idle."""
    ranks = max(event.rank for event in events) + 1
    number = min(int(axis), max(1, CELLS // ranks))
    column = axis / number
    shares: dict[tuple[int, int], Counter[str]] = {}
    for event in events:
        left, right = (event.start_s - began) * scale / column, (event.end_s - began) * scale / column
        for at in range(int(left), min(int(right), number - 1) + 1):
            part = max(0.0, min(right, at + 1) - max(left, at))
            shares.setdefault((event.rank, at), Counter())[event.kind] += part  # type: ignore[assignment]
    lines: dict[str, list[str]] = {}
    for (rank, at), by_kind in sorted(shares.items()):
        y = TOP + rank * (row + GAP)
        for kind in NAMES:
            if (high := row * by_kind[kind]) >= 0.05:
                lines.setdefault(kind, []).append(f"M{LEFT + (at + 0.5) * column:.1f} {y:.1f}v{high:.1f}")
                y += high
    for kind, parts in lines.items():
        fill = PLAIN.get(kind) or _hex(HUES[kind], 0.66)
        yield f'<path class="merged" d="{"".join(parts)}" stroke="{fill}" stroke-width="{column:.2f}"/>'


def _box(
    event: Event, x: float, width: float, row: float, digits: int, began: float, fill: str, ink: str
) -> Iterator[str]:
    y = TOP + event.rank * (row + GAP)
    said = (
        f"rank {event.rank}: {NAMES[event.kind]}, microbatch {event.microbatch}, stage {event.stage}; "
        f"{1000 * event.seconds:.2f} ms from {1000 * (event.start_s - began):.2f} ms"
    )
    edge = ' stroke="#ffffff" stroke-width="0.6"' if event.kind in BUSY else ""
    yield (
        f'<rect class={quoteattr(event.kind)} x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{row:.1f}" '
        f'fill="{fill}"{edge}><title>{escape(said)}</title></rect>'
    )
    number = str(event.microbatch)
    # 0.62 of its size is what a digit of these fonts takes in width, and 0.72 in height.
    size, turn = min(12.0, (width - 2) / (0.62 * digits)), ""
    middle = y + row / 2
    if size < 7:
        size = min(12.0, (width - 1) / 0.72, (row - 2) / (0.62 * digits))
        turn = f' transform="rotate(-90 {x + width / 2:.2f} {middle:.1f})"'
    if event.kind in BUSY and size >= 6:
        yield (
            f'<text class="number" x="{x + width / 2:.2f}" y="{middle + 0.36 * size:.1f}" font-size="{size:.1f}" '
            f'fill="{ink}" text-anchor="middle" pointer-events="none"{turn}>{number}</text>'
        )


def _stages(events: Sequence[Event]) -> dict[int, list[int]]:
    """Those that each rank has, by rank, in order."""
    held: dict[int, set[int]] = {}
    for event in events:
        held.setdefault(event.rank, set()).add(event.stage)
    return {rank: sorted(stages) for rank, stages in held.items()}


def _shades(events: Sequence[Event]) -> Callable[[Event], tuple[str, str]]:
    """From an event to its colour and that of the number in it."""
    stages = _stages(events)
    most = max(map(len, stages.values()))
    last = max(event.microbatch for event in events) or 1

    def shade(event: Event) -> tuple[str, str]:
        if event.kind in PLAIN:
            return PLAIN[event.kind], "#000000"
        # A band of lightness for each stage of a rank, from light to dark; within it, a step for each microbatch.
        band = (0.84 - 0.42) / most
        lightness = 0.84 - band * (stages[event.rank].index(event.stage) + 0.8 * event.microbatch / last)
        fill = _hex(HUES[event.kind], lightness)
        return fill, "#000000" if _luminance(fill) > 0.18 else "#ffffff"

    return shade


def _hex(hue: float, lightness: float) -> str:
    """Not every viewer of SVG knows hsl()."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue / 360, lightness, 0.55))


def _luminance(fill: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2.1): above 0.18, black on it is easier to read than white."""
    parts = [int(fill[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _legend(events: Sequence[Event]) -> Iterator[str]:
    x = LEFT
    for kind, name in NAMES.items():
        if not any(event.kind == kind for event in events):
            continue
        yield (
            f'<rect class="legend" x="{x:.0f}" y="34" width="16" height="14" '
            f'fill="{PLAIN.get(kind) or _hex(HUES[kind], 0.66)}"/>'
        )
        yield f'<text class="legend" x="{x + 21:.0f}" y="45">{name}</text>'
        x += 21 + 6.4 * len(name) + 22
    yield f'<rect class="legend" x="{x:.0f}" y="34" width="16" height="14" fill="#f8f8f8" stroke="#c8c8c8"/>'
    most = max(map(len, _stages(events).values()))
    yield f'<text class="legend" x="{x + 21:.0f}" y="45">idle</text>'
    said = "The higher a microbatch's number, the darker its box"
    if most > 1:
        said += f"; of a rank's {most} stages, the later is the darker"
    yield f'<text class="shade" x="{LEFT:.0f}" y="66">{said}.</text>'


def _axis(seconds: float, scale: float, y: float) -> Iterator[str]:
    """Ticks at 1, 2 or 5 times a power of ten milliseconds, some hundred pixels apart."""
    least = 1000 * 90 / scale
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    yield (
        f'<line class="axis" x1="{LEFT:.2f}" y1="{y:.1f}" x2="{LEFT + seconds * scale:.2f}" y2="{y:.1f}" '
        'stroke="#444444"/>'
    )
    for tick in range(int(1000 * seconds / step) + 1):
        x = LEFT + tick * step / 1000 * scale
        yield f'<line class="tick" x1="{x:.2f}" y1="{y:.1f}" x2="{x:.2f}" y2="{y + 5:.1f}" stroke="#444444"/>'
        unit = " ms" if tick == 0 else ""
        yield f'<text class="tick" x="{x:.2f}" y="{y + 18:.1f}" text-anchor="middle">{tick * step:g}{unit}</text>'
