"""What a secret looks like, by the name of a value and by its shape; and text without secrets. The one file that knows.

A name tells by its words (`HF_TOKEN`, `clientSecret`, `--api-key`), not by its letters (`TOKENIZERS_PARALLELISM`,
`max_tokens`, `key_dim`, `KEYBOARD`). Shapes are those that providers publish so that leaked keys can be found.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache

MASK = "***"
"""What stands in a secret's place."""
SHORTEST = 6
"""Characters of a known secret that is also looked for inside other text; shorter ones would be found by chance."""

# --- names ------------------------------------------------------------------------------------------------------------

_ALWAYS = {"password", "passwd", "passphrase", "secret", "secrets", "apikey", "credential", "credentials", "authtoken"}
_AT_THE_END = (
    *("password", "passwd", "passphrase", "secret", "apikey", "accesskey", "secretkey", "privatekey", "dbpwd"),
    *("authtoken", "accesstoken", "hftoken", "ghtoken", "bearertoken"),
)
"""Ends of words that are written without a break, such as MYPASSWORD."""
_PAIRS = {
    *(("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("encryption", "key")),
    *(("signing", "key"), ("account", "key"), ("storage", "key"), ("master", "key"), ("deploy", "key")),
    *(("api", "keys"), ("access", "keys"), ("api", "tokens"), ("access", "tokens"), ("auth", "tokens")),
}
_OF_TEXT = {
    *("pad", "bos", "eos", "unk", "sep", "cls", "mask", "sot", "eot", "eod", "special", "image", "audio", "video"),
    *("stop", "start", "end", "begin", "per", "next", "new", "prefix", "suffix", "first", "last", "each", "decoder"),
    *("class", "register", "think", "tool", "sink", "num", "n", "max", "min", "sub", "word", "text", "byte", "no"),
}
"""Words before `token` that mean a piece of text."""
_ABOUT = {
    *("file", "files", "path", "dir", "directory", "name", "url", "uri", "host", "id", "ids", "type", "types", "kind"),
    *("length", "len", "size", "count", "counts", "dim", "dims", "limit", "budget", "ratio", "rate", "weight", "min"),
    *("max", "index", "indices", "embedding", "embeddings", "dropout", "loss", "mask", "format", "method", "mode"),
    *("timeout", "ttl", "enabled", "required", "policy", "version", "parallelism", "cache", "classes", "level"),
    *("manager", "backend", "provider", "scheme", "class", "helper", "store", "drop", "shift", "mixer", "mixing"),
}
"""Last words of names of what is only about a secret, or about a piece of text."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PLAIN = re.compile(r"(?i)true|false|yes|no|on|off|none|null|auto|default|required|optional|\d{1,6}(?:\.\d*)?|")
_PLACEHOLDER = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\$\{?\w+\}?|\$\(.*\)|\{+[\w.]*\}+")


@cache
def _how_secret(name: str) -> str:
    """`any`: whatever the value; `random`: if the value looks random; `no`."""
    words = [word.lower() for word in _WORD.findall(name)]
    while words and words[-1].isdigit():
        words.pop()
    if not words or name in ("PWD", "OLDPWD") or words[-1] in _ABOUT - {"id", "mask"}:
        return "no"
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if (before, last) in (("key", "id"), ("client", "id")):
        return "random"  # the half of a pair that may be shown, though few do so
    if last in ("id", "mask"):
        return "no"
    pairs = set(itertools.pairwise(words))
    if (
        _ALWAYS & set(words)
        or _PAIRS & pairs
        or last.endswith(_AT_THE_END)
        or last in ("pass", "pw", "pwd", "passcode")
    ):
        return "any"
    for place, word in enumerate(words):
        if word == "token" and words[place + 1 :] in ([], ["value"], ["secret"], ["read"], ["write"], ["key"]):
            return "no" if place and words[place - 1] in _OF_TEXT else "any"
    if last in ("auth", "authorization", "bearer", "cookie", "key", "keys", "dsn", "webhook", "token"):
        return "random"
    return "no"


def _is_random(value: str) -> bool:
    """Whether a value is no word, number, path or list of words."""
    if re.search(r"\s", value.strip()) and ":" not in value and not re.match(r"(?i)(bearer|basic|token) ", value):
        return False
    if re.match(r"[/~.]{1,2}/|/|~|\w+(\.\w+)+$", value) and not re.search(r"[+=]", value):
        return False
    kinds = sum(bool(re.search(kind, value)) for kind in (r"[a-z]", r"[A-Z]", r"\d", r"[^\w\s-]"))
    return (
        len(value) >= 12 and bool(re.search(r"\d", value)) and kinds >= 2 and not re.fullmatch(r"[\d.,:eE+-]+", value)
    )


def _is_secret_by_name(name: str, value: str) -> bool:
    how = _how_secret(name)
    if how == "no" or _PLAIN.fullmatch(value) or _PLACEHOLDER.fullmatch(value) or value == MASK:
        # Digits alone are a password, or the number of a token.
        return how == "any" and value.isdecimal() and bool(re.search(r"(?i)pass|pwd|secret", name)) and len(value) > 3
    if how == "any" and re.search(r"(?i)credential", name) and re.match(r"[/~.]|\w:\\", value):
        return False  # the path of a file
    return how == "any" or _is_random(value)


# --- shapes -----------------------------------------------------------------------------------------------------------

_SHAPES = (
    r"hf_(?=[A-Za-z]*[A-Z0-9])[A-Za-z0-9]{16,}|hf_[a-z]{30,}",
    r"api_org_[A-Za-z]{30,}",
    r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}",
    r"(?:gl(?:pat|dt|rt|ptt|cbt|soat|ft)-)[\w-]{16,}",
    r"sk-(?=[\w-]*\d)[\w-]{16,}|[sr]k_(?:live|test)_\w{16,}|gsk_\w{20,}|nvapi-[\w-]{20,}|r8_\w{30,}",
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",
    r"xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}",
    r"AIza[\w-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}",
    r"npm_[A-Za-z0-9]{30,}|pypi-AgE[\w-]{20,}|dckr_(?:pat|oat)_[\w-]{16,}|dop_v1_[0-9a-f]{32,}",
    r"SG\.[\w-]{16,}\.[\w-]{16,}|hvs\.[\w-]{20,}|key-[0-9a-f]{32}|AGE-SECRET-KEY-1[A-Z0-9]{20,}",
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",
)
_SHAPE = (
    r"(?<![\w-])(?:" + "|".join(_SHAPES) + r")(?![\w])"
    r"|-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
    r"|(?P<slack>hooks\.slack\.com/services/)[\w/]{16,}|(?P<discord>discord(?:app)?\.com/api/webhooks/)[\w/-]{16,}"
    r"|(?P<azure>(?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[A-Za-z0-9+/%=]{20,}"
    r"|(?P<query>[?&](?:sig|X-Amz-Signature|X-Amz-Security-Token)=)[A-Za-z0-9+/%=]{16,}"
    r"|(?P<scheme>\b[Bb]earer |\b[Bb]asic )(?=[A-Za-z+/_.=-]*\d)[A-Za-z0-9+/_.=-]{16,}"
)
_IN_AN_ADDRESS = r"://(?:(?P<user>[^\s/@:\"'<>]*):(?P<password>[^\s/@\"'<>{}]+)|[0-9a-f]{32})@"
_HINTS = (
    *("hf_", "api_org_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "gldt-", "glrt-", "glptt-"),
    *("glcbt-", "glsoat-", "glft-", "sk-", "k_live_", "k_test_", "gsk_", "nvapi-", "r8_", "AKIA", "ASIA", "ABIA"),
    *("ACCA", "xox", "xapp-", "AIza", "ya29.", "GOCSPX-", "npm_", "pypi-", "dckr_", "dop_v1_", "SG.", "hvs.", "key-"),
    *("AGE-SECRET", "eyJ", "PRIVATE KEY", "Key=", "Signature=", "sig=", "Token=", "earer ", "asic ", "hooks"),
)
"""One of them is in any text that has a shape; much quicker to look for."""
_PREFIXES = ("slack", "discord", "azure", "query", "scheme")


def _masked_shape(match: re.Match[str]) -> str:
    return next((match[name] for name in _PREFIXES if match[name]), "") + MASK


def _masked_address(match: re.Match[str]) -> str:
    if match["password"] is None:
        return f"://{MASK}@"
    return match[0] if match["password"] in (MASK, "password", "PASSWORD") else f"://{match['user']}:{MASK}@"


def _without_shapes(text: str) -> str:
    if "://" in text:
        text = _address().sub(_masked_address, text)
    return _shape().sub(_masked_shape, text) if any(hint in text for hint in _HINTS) else text


@cache
def _shape() -> re.Pattern[str]:
    return re.compile(_SHAPE, re.DOTALL)


@cache
def _address() -> re.Pattern[str]:
    return re.compile(_IN_AN_ADDRESS)


@cache
def _assignment() -> re.Pattern[str]:
    """`NAME=value`, `name: "value"`, `--name value`, in one line of a text."""
    return re.compile(
        r"(?P<name>(?<![\w.-])(?:-{0,2}[A-Za-z_][\w.-]*(?=[\"']?[ \t]*[=:])|--[A-Za-z_][\w.-]*(?=[ \t])))"
        r"(?P<to>[\"']?[ \t]*[=:][ \t]*|[ \t]+)"
        r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s\"'(){}\[\],;]+(?![(\[.]))"
    )


def _masked_assignment(match: re.Match[str]) -> str:
    name, to, value = match["name"], match["to"], match["value"]
    if _how_secret(name) == "no":
        return match[0]
    quote = value[0] if value[:1] in ("'", '"') else ""
    inner = value.strip(quote) if quote else value
    # A word without quotes may be a type or a variable: `token: str`, `password=password`.
    if not _is_secret_by_name(name, inner) or (not quote and not _may_be_a_value(name, to, inner)):
        return match[0]
    return f"{name}{to}{quote}{MASK}{quote}"


def _may_be_a_value(name: str, to: str, value: str) -> bool:
    return len(value) >= SHORTEST and (bool(re.search(r"\d", value)) or (name.isupper() and to == "="))


# --- known values -----------------------------------------------------------------------------------------------------

_known: dict[str, None] = {}
"""The secrets of this process, in every spelling in which a text may have them."""


def know(values: Iterable[str]) -> None:
    """Texts of this process are from now on freed of these values, too, whatever their shape is."""
    for value in values:
        lines = [line for line in value.splitlines() if len(line) >= 20] if "\n" in value else []
        for text in (value, *lines):
            if len(text.strip()) >= SHORTEST and text != MASK:
                for spelling in (text, json.dumps(text)[1:-1], repr(text)[1:-1]):
                    _known[spelling] = None
    _pattern.cache_clear()


def know_environment(env: Mapping[str, str]) -> None:
    know(value for name, value in env.items() if _how_secret(name) != "no" and _is_secret_by_name(name, value))


@cache
def _pattern() -> re.Pattern[str] | None:
    if not _known:
        return None
    longest_first = sorted(_known, key=len, reverse=True)
    return re.compile(r"(?<![A-Za-z0-9])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![A-Za-z0-9])")


def forget() -> None:
    """Forgets all known values; for tests."""
    _known.clear()
    _pattern.cache_clear()


# --- what others call -------------------------------------------------------------------------------------------------


def without_secrets(text: str) -> str:
    """A text without known secrets, and without what has a secret's shape; for what is printed or logged."""
    if (known := _pattern()) is not None:
        text = known.sub(MASK, text)
    return _without_shapes(text)


def has_secrets(text: str, also_weak: bool = True) -> bool:
    """Whether there is something in a text that `without_secrets` leaves out.

    Args:
        text: of any length.
        also_weak: whether known secrets count that may be there by chance, such as `postgres`.
    """
    if also_weak:
        return without_secrets(text) != text
    return any(value in text for value in _known if _is_random(value)) or _without_shapes(text) != text


def masked(name: str, value: str) -> str:
    """The value, without what must not be seen: all of it if the name is that of a secret, else the secrets in it.

    Args:
        name: of a variable, a flag or a setting (dotted); "" for a text without a name.
        value: its value, or a text such as a file's, in which `NAME=value` counts, too.
    """
    if _is_secret_by_name(name, value):
        return MASK
    value = without_secrets(value)
    finds: Callable[[re.Match[str]], str] = _masked_assignment
    return _assignment().sub(finds, value) if "=" in value or ":" in value or "--" in value else value


def is_secret(name: str, value: str) -> bool:
    """Whether there is something in a value that must not be seen."""
    return masked(name, value) != value


def is_masked(name: str, value: str) -> bool:
    """Whether a value is what `masked` has left of a secret."""
    return (value == MASK and _how_secret(name) != "no") or f":{MASK}@" in value or value.endswith(f"={MASK}")
