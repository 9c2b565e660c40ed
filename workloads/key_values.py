"""`key=value` words, as a command line has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from workloads.errors import WorkloadError, did_you_mean


def key_values(
    words: Sequence[str], known: Collection[str] = (), error: type[Exception] = WorkloadError
) -> dict[str, str]:
    """`["steps=20", "model.dim=64"]` -> the text of each key.

    Args:
        words: the words.
        known: the keys that there are; empty = whoever calls looks at them.
        error: what to raise.

    Raises:
        error: a word has no `=`, its key is not a setting's name, or unknown, or given twice.
    """
    values: dict[str, str] = {}
    example = f"{next(iter(known))}=..." if known else "steps=20, model.dim=64"
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals:
            raise error(f"'{word}': expected key=value ({example})")
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
            raise error(f"'{key}=...': '{key}' is not a setting's name; write key=value ({example})")
        if known and key not in known:
            raise error(f"'{key}': no such setting{did_you_mean(key, known)}; known: {', '.join(known)}")
        if key in values:
            raise error(f"{key} is given twice on the command line; keep one")
        values[key] = text
    return values
