"""Which pairs of hosts talk in which round, so that each host is in one pair at a time. Pure, without torch."""

from __future__ import annotations


def rounds(hosts: int, at_most: int) -> list[list[tuple[int, int]]]:
    """A tournament's rounds (the circle method); in each, every host is in one pair, but for one of an odd number.

    Args:
        hosts: their number.
        at_most: how many rounds. Of more hosts than that, not all pairs meet, but each host meets about so many others,
            by which a host that is slow is told from a link that is.
    """
    places = hosts + hosts % 2
    if hosts < 2:
        return []
    circle = list(range(1, places))
    count = places - 1
    chosen = range(count) if count <= at_most else [k * count // at_most for k in range(at_most)]
    found = []
    for turn in chosen:
        row = [0, *circle[turn:], *circle[:turn]]
        pairs = [(row[i], row[-1 - i]) for i in range(places // 2)]
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < hosts])
    return found
