"""The SVG, read back: what it draws lies where the events' times say, and what it writes can be read."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from workloads.pipeline_mlp import picture
from workloads.pipeline_mlp.events import BUSY, KINDS, Event

SVG = "{http://www.w3.org/2000/svg}"


def step(ranks: int, microbatches: int, *, forward: float = 0.04, halves: bool = False) -> list[Event]:
    """gpipe on paper, with every wait, in seconds; with halves, as if the weights' came right after the input's."""
    events = []
    middle = (ranks + microbatches - 1) * forward
    for rank in range(ranks):
        at = 5.0 + rank * forward
        if rank:
            events.append(Event(rank, "wait", rank, 0, 5.0, at))
        for number in range(microbatches):
            events.append(Event(rank, "forward", rank, number, at, at + forward))
            at += forward
        begin = 5.0 + middle + (ranks - 1 - rank) * 2 * forward
        if begin > at:
            events.append(Event(rank, "wait", rank, 0, at, begin))
        for number in range(microbatches):
            if halves:
                events.append(Event(rank, "backward_input", rank, number, begin, begin + forward))
                events.append(Event(rank, "backward_weight", rank, number, begin + forward, begin + 2 * forward))
            else:
                events.append(Event(rank, "backward", rank, number, begin, begin + 2 * forward))
            begin += 2 * forward
    return events


def drawn(events: list[Event], folder: Path, **words: object) -> ET.Element:
    picture.write(events, folder / "timeline.svg", **words)  # type: ignore[arg-type]
    assert [path.name for path in folder.iterdir()] == ["timeline.svg"]
    return ET.parse(folder / "timeline.svg").getroot()


def boxes(svg: ET.Element, *kinds: str) -> list[ET.Element]:
    return [box for box in svg.iter(f"{SVG}rect") if box.get("class") in (kinds or KINDS)]


def place(box: ET.Element) -> tuple[float, float, float]:
    x, y, width = (float(box.get(name, "nan")) for name in ("x", "y", "width"))
    return y, x, width


@pytest.mark.parametrize(("ranks", "microbatches", "halves"), [(2, 1, False), (4, 8, True), (8, 32, False)])
def test_each_box_lies_where_its_time_says(ranks: int, microbatches: int, halves: bool, tmp_path: Path) -> None:
    events = step(ranks, microbatches, halves=halves)
    svg = drawn(events, tmp_path)
    assert len(boxes(svg)) == len(events)
    rows = [float(row.get("y", "nan")) for row in svg.iter(f"{SVG}rect") if row.get("class") == "row"]
    assert len(rows) == ranks
    assert rows == sorted(rows)

    # The axis' own ticks say how many pixels a millisecond is.
    ticks = {float(tick.text.removesuffix(" ms")): float(tick.get("x", "nan")) for tick in texts(svg, "tick")}  # type: ignore[union-attr]
    last = max(ticks)
    scale = (ticks[last] - ticks[0]) / last
    wanted = sorted(
        (rows[event.rank], ticks[0] + 1000 * (event.start_s - 5.0) * scale, 1000 * event.seconds * scale)
        for event in events
    )
    for found, right in zip(sorted(map(place, boxes(svg))), wanted, strict=True):
        assert found == pytest.approx(right, abs=0.02)


def texts(svg: ET.Element, kind: str) -> list[ET.Element]:
    return [text for text in svg.iter(f"{SVG}text") if text.get("class") == kind]


def test_boxes_of_a_row_do_not_overlap_and_stay_on_the_paper(tmp_path: Path) -> None:
    svg = drawn(step(8, 32), tmp_path)
    width, height = float(svg.get("width", "nan")), float(svg.get("height", "nan"))
    by_row: dict[float, list[tuple[float, float]]] = {}
    for y, x, wide in map(place, boxes(svg)):
        by_row.setdefault(y, []).append((x, wide))
        assert x > 0
        assert x + wide < width
        assert 0 < y < height
    assert len(by_row) == 8
    for row in by_row.values():
        row.sort()
        for (x, wide), (following, _) in itertools.pairwise(row):
            assert x + wide <= following + 0.02


def test_every_microbatch_can_be_read_in_its_box(tmp_path: Path) -> None:
    svg = drawn(step(8, 32), tmp_path)
    numbers = texts(svg, "number")
    assert len(numbers) == 2 * 8 * 32
    assert {text.text for text in numbers} == {str(number) for number in range(32)}
    assert float(svg.get("width", "nan")) <= 1400
    assert min(float(text.get("font-size", "nan")) for text in numbers) >= 7
    assert len(boxes(svg, "forward")) == len(boxes(svg, "backward")) == 8 * 32


def test_what_is_too_narrow_for_a_number_has_none(tmp_path: Path) -> None:
    # One forward takes a thousand times the others: they become slivers, and their numbers would lie on each other.
    slivers = [Event(0, "forward", 0, number, number * 1e-4, (number + 1) * 1e-4) for number in range(10)]
    svg = drawn([*slivers[:1], Event(0, "backward", 0, 0, 1.0, 6.0), *slivers[1:]], tmp_path)
    assert float(svg.get("width", "nan")) <= 1400
    assert [text.text for text in texts(svg, "number")] == ["0"]


@pytest.mark.parametrize(("ranks", "microbatches", "halves"), [(4, 2048, False), (32, 100, True), (2, 649, False)])
def test_very_many_boxes_are_merged_and_said_to_be(ranks: int, microbatches: int, halves: bool, tmp_path: Path) -> None:
    events = step(ranks, microbatches, halves=halves)
    svg = drawn(events, tmp_path, schedule="gpipe")
    assert (tmp_path / "timeline.svg").stat().st_size < 1e6
    assert float(svg.get("width", "nan")) <= 1400
    captions = texts(svg, "caption")
    merged = [path for path in svg.iter(f"{SVG}path") if path.get("class") == "merged"]
    if len(events) <= picture.MANY:
        assert not captions
        assert not merged
        return
    (caption,) = captions
    assert (caption.text or "").startswith(f"{len(events) - len(boxes(svg))} of {len(events)} boxes, no wider than ")
    # Area is time: with the boxes that are left, the columns have all that was done.
    (row, *_) = (box for box in svg.iter(f"{SVG}rect") if box.get("class") == "row")
    drawn_pixels = sum(float(box.get("width", "nan")) for box in boxes(svg)) * float(row.get("height", "nan"))
    for path in merged:
        heights = [float(line.split("v")[1]) for line in (path.get("d") or "").split("M")[1:]]
        drawn_pixels += sum(heights) * float(path.get("stroke-width", "nan"))
    whole = float(row.get("width", "nan")) * float(row.get("height", "nan"))
    window = max(event.end_s for event in events) - min(event.start_s for event in events)
    assert drawn_pixels / whole == pytest.approx(sum(event.seconds for event in events) / window, rel=0.02)


def test_numbers_are_turned_where_only_that_fits(tmp_path: Path) -> None:
    svg = drawn(step(4, 64), tmp_path)
    numbers = texts(svg, "number")
    assert {text.text for text in numbers} == {str(number) for number in range(64)}
    assert any("rotate" in text.get("transform", "") for text in numbers)


def test_colours_tell_the_kinds_the_microbatches_and_the_stages_apart(tmp_path: Path) -> None:
    halves = drawn(step(2, 4, halves=True), tmp_path)
    fills = {kind: {box.get("fill") for box in boxes(halves, kind)} for kind in KINDS}
    busy = [kind for kind in BUSY if fills[kind]]
    assert busy == ["forward", "backward_input", "backward_weight"]
    assert all(len(fills[kind]) == 4 for kind in busy)  # one a microbatch
    assert len(set.union(*(fills[kind] for kind in busy))) == 12
    two = [Event(0, "forward", number // 2, number % 2, number / 2, (number + 1) / 2) for number in range(4)]
    shades = [picture._luminance(box.get("fill", "")) for box in boxes(drawn(two, tmp_path))]
    assert shades == sorted(set(shades), reverse=True)  # stage 0's two, then stage 1's


def test_title_legend_and_what_a_box_says(tmp_path: Path) -> None:
    svg = drawn(step(2, 4), tmp_path, schedule="gpipe <&>", measured=0.2123, theoretical=0.2)
    (title,) = texts(svg, "title")
    assert title.text == "gpipe <&>, 2 ranks, 4 microbatches, bubble 21.2% measured, 20.0% in theory"
    assert [text.text for text in texts(svg, "legend")] == ["forward", "backward", "wait", "idle"]
    assert [text.text for text in texts(svg, "shade")] == ["The higher a microbatch's number, the darker its box."]
    assert [text.text for text in texts(svg, "rank")] == ["rank 0", "rank 1"]
    assert texts(svg, "tick")[0].text == "0 ms"
    said = boxes(svg, "backward")[-1].findtext(f"{SVG}title")
    assert said == "rank 1: backward, microbatch 3, stage 1; 80.00 ms from 440.00 ms"
    one = drawn([Event(0, "forward", 0, 0, 0.0, 1.0)], tmp_path, theoretical=0.05)
    assert texts(one, "title")[0].text == "1 rank, 1 microbatch, bubble 5.0% in theory"


@pytest.mark.parametrize(
    ("events", "ranks", "line"),
    [([], None, "no events"), ([Event(3, "forward", 3, 0, 0.0, 1.0)], 2, "an event of rank 3 in a pipeline of 2")],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    events: list[Event], ranks: int | None, line: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=line):
        picture.write(events, tmp_path / "timeline.svg", ranks=ranks)
    assert not list(tmp_path.iterdir())
