"""Secrets in what is written down or shown: the one function that masks them."""

from __future__ import annotations

import re

MASK = "***"
_NAMES = "TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL"
_NAME = re.compile(_NAMES, re.IGNORECASE)
_NOT = re.compile(r"TOKENIZ|TOKENS|_TOKEN_", re.IGNORECASE)
"""A workload's words: data.tokenizer, tokens_per_second."""
_ASSIGNED = re.compile(rf"(\b[\w.]*(?:{_NAMES})\w*[\"']?\s*[=:]\s*)([\"'][^\"'\n]*[\"']|[^\s\"']+)", re.IGNORECASE)


def masked(name: str, value: str) -> str:
    """The value, without what must not be seen: all of it if the name is that of a secret, else what it assigns to one.

    Args:
        name: of a variable, flag or setting.
        value: its value, or a text such as a file's.
    """
    if value and _NAME.search(name) and not _NOT.search(name):
        return MASK
    return _ASSIGNED.sub(lambda match: match[0] if _NOT.search(match[1]) else match[1] + MASK, value)
