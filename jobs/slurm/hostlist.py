"""Expands Slurm's notations `rack[1-2]-n[01-08],gpu7` and `4(x2),1`. Pure."""

from __future__ import annotations

import re

from jobs.errors import TopologyError

MOST_HOSTS = 100_000


def expand_counts(text: str) -> list[int]:
    """SLURM_TASKS_PER_NODE: `4(x2),1` -> [4, 4, 1].

    Raises:
        TopologyError: the text has another form, or more than MOST_HOSTS counts.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:\(x([0-9]{1,7})\))?", part)
        repeat = int(match[2] or 1) if match else 0
        if not match or repeat < 1 or len(counts) + repeat > MOST_HOSTS:
            raise TopologyError(f"SLURM_STEP_TASKS_PER_NODE='{shown(text)}': expected counts such as 4(x2),1")
        counts += [int(match[1])] * repeat
    return counts


def expand_hosts(text: str) -> list[str]:
    """SLURM_NODELIST: `rack[1-2]-n[01-02],gpu7` -> every host, in order; the last bracket varies fastest.

    Raises:
        TopologyError: the text has another form, or more than MOST_HOSTS hosts.
    """
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+|[\[\]]", text):
        names = [""]
        pieces = re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part)
        for plain, ranges in pieces if len(pieces) < 20 else ():
            choices = [plain] if plain else _expand_ranges(ranges)
            if len(hosts) + len(names) * len(choices) > MOST_HOSTS or len(names[0]) > 255:
                choices = []
            names = [name + choice for name in names for choice in choices]
            if not names:
                break
        if names in ([], [""]):
            raise TopologyError(f"node list '{shown(text)}': cannot be read")
        hosts += names
    return hosts


def _expand_ranges(text: str) -> list[str]:
    """The inside of a bracket: `01-03,7` -> 01, 02, 03, 7. Empty if it has another form or is too long."""
    names: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        if not match:
            return []
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < MOST_HOSTS - len(names):
            return []
        names += [f"{number:0{len(match[1])}}" for number in range(first, last + 1)]
    return names


def shown(text: str) -> str:
    """A variable's value, shortened and escaped for a message."""
    return text[:40].encode("unicode_escape").decode() + ("..." if len(text) > 40 else "")
