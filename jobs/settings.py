"""YAML files and key=value arguments -> one typed, validated configuration; and its description for `list`.

Torch-free. Workload settings, cluster configs and flags are read with it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jobs.errors import SettingsError, UserError
from workloads.errors import did_you_mean
from workloads.input_files import head
from workloads.key_values import key_values
from workloads.meanings import meanings
from workloads.secret_values import masked

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str, ...]
"""A setting's path: ("model", "dim")."""


# --- YAML as people mean it -------------------------------------------------------------------------------------------


MOST_BYTES = 2**20
"""Size limit of a file: PyYAML takes seconds to read this much. A command line argument is never longer."""
MOST_LEVELS = 50
MOST_VALUES = 100_000
"""Counted after aliases are expanded: nine lines of aliases can expand to a billion values."""
TOO_DEEP = f"it is nested more than {MOST_LEVELS} levels deep"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of scalars: `1e-3` is a number; `12:30:00`, `2026-01-01`, `yes` and `1_000` are text.

    PyYAML follows YAML 1.1, where the first is text, the second 45000, the third a date, the others True and 1000.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 (the base class's own, emptied)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "YAML tags (!name) are not supported", event.start_mark)
        self._depth += 1
        if self._depth > MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, TOO_DEEP, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the text that YAML 1.1 or the loader above would read as something else."""


for _tag, _regexp, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("merge", r"^<<$", "<"),
):
    _first_characters: list[str | None] = [None if c == "\0" else c for c in _first]
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_regexp), _first_characters)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True)
class Document:
    """A YAML mapping and the line of each of its keys."""

    data: dict[str, Any]
    source: str
    lines: dict[Key, int] = field(default_factory=dict)

    def where(self, path: Key) -> str:
        """`file:line` of a key, or of its nearest parent."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.source}:{self.lines[path]}" if path else self.source


def load_yaml(text: str, source: str, error: type[UserError] = SettingsError) -> Document:
    """Reads a YAML mapping.

    Raises:
        error: the text is not YAML, not a mapping, too large or deep, or has a tag, a key that is not a string or a
            repeated key; the message names file and line.
    """
    lines: dict[Key, int] = {}
    ancestors: list[yaml.Node] = []
    values = itertools.count(1)

    def check_node(node: yaml.Node, path: Key) -> None:
        line = node.start_mark.line + 1
        if any(node is outer for outer in ancestors):
            raise error(f"{source}:{line}: an alias (*name) makes a value contain itself; write the value out")
        if len(ancestors) >= MOST_LEVELS:
            raise error(f"{source}:{line}: {TOO_DEEP}; fix that line")
        if next(values) > MOST_VALUES:
            raise error(f"{source}:{line}: more than {MOST_VALUES:,} values after aliases are expanded; give fewer")
        ancestors.append(node)
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                check_node(item, path)
        elif isinstance(node, yaml.MappingNode):
            check_keys(node, path)
        ancestors.pop()

    def check_keys(node: yaml.MappingNode, path: Key) -> None:
        first_lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag in (
                "tag:yaml.org,2002:int",
                "tag:yaml.org,2002:float",
                "tag:yaml.org,2002:null",
                "tag:yaml.org,2002:bool",
            ):
                raise error(f"{source}:{line}: a key must be a name; quote the key if it is text")
            key = key_node.value
            if key in first_lines:
                raise error(f"{source}:{line}: '{key}' is given twice (first on line {first_lines[key]}); keep one")
            first_lines[key] = line
            inner = (*path, *key.split("."))
            lines.setdefault(inner, line)
            check_node(value_node, inner)

    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document({}, source)
        check_node(node, ())
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as mistake:
        mark = mistake.problem_mark or mistake.context_mark
        line = mark.line + 1 if mark else 1
        # Must not show the alias's name: an unquoted password that begins with * is an alias in YAML.
        problem = re.sub(" alias '.*", " alias (*name)", str(mistake.problem or mistake.context))
        raise error(f"{source}:{line}: not valid YAML: {problem}; fix that line, or quote its text") from None
    except (yaml.YAMLError, ValueError) as mistake:
        raise error(f"{source}: not valid YAML: {' '.join(str(mistake).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(data, dict):
        raise error(f"{source}: contains a {type(data).__name__}; write a mapping, one `key: value` per line")
    return Document(data, source, lines)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML that `load_yaml` reads back as the same data."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path, error: type[UserError] = SettingsError) -> Document:
    """Reads a YAML file; raises `error` if it cannot be read."""
    head(path, str(path), "give a YAML file", error)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode()
    except UnicodeDecodeError:
        raise error(f"{path}: is not UTF-8 text; give a YAML file") from None
    if len(data) > MOST_BYTES:
        raise error(f"{path}: is longer than {MOST_BYTES:,} bytes; give a YAML file of settings")
    return load_yaml(text, str(path), error)


# --- key=value --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Override:
    """One `key=value` argument of the command line."""

    path: Key
    text: str

    @property
    def key(self) -> str:
        return ".".join(self.path)


_RANGE = re.compile(r"([-+]?\d{1,18})\.\.([-+]?\d{1,18})")
MOST_POINTS = 1_000
"""Of a sweep; Slurm's own limit of an array is as many unless a site has raised it."""


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """`["steps=20", "model.dim=64"]` -> overrides. Refuses an argument without `=`, an empty key and a repeated key."""
    overrides: list[Override] = []
    for key, text in key_values(words, error=SettingsError).items():
        if choices(key, text) is not None:
            raise SettingsError(
                f"{key}={text}: lists (a,b) and ranges (1..4) make a sweep of new runs, and here one value is needed "
                "(text with a comma: key='\"a,b\"'; a list: key=[a,b])"
            )
        overrides.append(Override(tuple(key.split(".")), text))
    return overrides


def sweep(words: Sequence[str]) -> list[dict[str, str]] | None:
    """The points of a sweep: `lr=1e-3,3e-4 seed=1..4` -> eight pairs of lr and seed, of which seed changes first.

    Args:
        words: key=value arguments, also of settings that have one value.

    Returns:
        Of each point, the texts of the settings that have several; None if none has.

    Raises:
        SettingsError: an argument is none, or its values are not such a list.
    """
    found = {key: choices(key, text) for key, text in key_values(words, error=SettingsError).items()}
    several = {key: values for key, values in found.items() if values is not None}
    if not several:
        return None
    if (count := math.prod(map(len, several.values()))) > MOST_POINTS:
        sizes = " x ".join(f"{len(values):,} ({key})" for key, values in several.items())
        raise SettingsError(f"a sweep has at most {MOST_POINTS:,} points, and {sizes} is {count:,}; give fewer values")
    return [dict(zip(several, values, strict=True)) for values in itertools.product(*several.values())]


def choices(key: str, text: str) -> list[str] | None:
    """The values of `a,b`, `1..4` or `1..4,8`; None if it is one value, such as `[1,2]` or `"a,b"`.

    Raises:
        SettingsError: one of them is empty or there twice, or a range is too long or goes down.
    """
    parts = _at_commas(text)
    ranges = [_RANGE.fullmatch(part) for part in parts]
    if len(parts) == 1 and ranges[0] is None:
        return None
    values: list[str] = []
    for part, match in zip(parts, ranges, strict=True):
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not part:
            raise SettingsError(f"{key}={text}: has an empty value; leave the comma out, or quote it: {key}='\"...\"'")
        if first > last:
            raise SettingsError(f"{key}={text}: a range goes up; write {last}..{first}")
        if last - first >= MOST_POINTS:
            raise SettingsError(f"{key}={text}: a sweep has at most {MOST_POINTS:,} points; give a shorter range")
        values += map(str, range(first, last + 1)) if match else [part]
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise SettingsError(f"{key}={text}: has {twice} twice; give each value once")
    return values


def _at_commas(text: str) -> list[str]:
    """The parts between commas that are in no quotes and brackets, as Hydra reads them."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and depth <= 0 and not quote:
            parts.append("")
            continue
        parts[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
    return [part.strip() for part in parts]


# --- typed and validated ----------------------------------------------------------------------------------------------


def build(
    cls: type[Model],
    document: Document | None,
    overrides: Sequence[Override] = (),
    *,
    error: type[UserError] = SettingsError,
    what: str = "setting",
    help_line: str = "",
) -> tuple[Model, list[str]]:
    """Builds a configuration from a file and key=value arguments, which win over the file; defaults fill the rest.

    A group with a field `preset` may be given as one value: `model=7b` means `model.preset=7b`. On the command line
    that replaces the whole group from the file.

    Args:
        cls: the pydantic model to fill; unknown keys are refused with a suggestion.
        document: the YAML file, if any; nested mappings and dotted keys mean the same.
        overrides: the key=value arguments.
        error: the exception to raise.
        what: the word for a key in messages.
        help_line: where all keys are listed; appended to messages about unknown keys.

    Returns:
        The configuration, and a notice for each group of the file that a preset on the command line replaced.
    """
    tree, source, notices = _merged(cls, document, overrides, error, what, help_line)
    return validate(cls, tree, source, error=error, help_line=help_line), notices


def origins(cls: type[BaseModel], document: Document | None, overrides: Sequence[Override]) -> dict[str, str]:
    """Where the values came from that are no defaults: "command line", or `file:line`.

    Args:
        cls: what `build` has made of the other two.
    """
    _, source, _ = _merged(cls, document, overrides, SettingsError, "setting", "")
    return {".".join(path): where.removesuffix(": ") or "command line" for path, where in source.items()}


def _merged(
    cls: type[BaseModel],
    document: Document | None,
    overrides: Sequence[Override],
    error: type[UserError],
    what: str,
    help_line: str,
) -> tuple[dict[str, Any], dict[Key, str], list[str]]:
    """The values that are given, where each comes from ("file:3: "; empty: the command line), and notices."""
    tree: dict[str, Any] = {}
    source: dict[Key, str] = {}
    notices: list[str] = []
    if document is not None:
        for path, value in _flatten(cls, document.data, (), document):
            _check_path(cls, path, document.where(path) + ": ", error, what, help_line)
            if path in source:
                raise error(f"{document.where(path)}: '{'.'.join(path)}' is given twice; keep one")
            _put(tree, path, value)
            source[path] = document.where(path) + ": "
    for override in overrides:
        _check_path(cls, override.path, "", error, what, help_line)
    for override in sorted(_whole_groups(overrides), key=lambda o: len(o.path)):
        annotation = _field(cls, override.path).annotation
        group = _group(annotation)
        if override in overrides:
            value = _parse_value(override, annotation)
        else:  # the argument was GROUP.preset=...
            value = {"preset": _parse_value(override, _field(cls, (*override.path, "preset")).annotation)}
        if group is not None and not (value is None and type(None) in _options(annotation)):
            dropped = [path for path in source if path[: len(override.path)] == override.path and source[path]]
            if dropped:
                named = ", ".join(".".join(path) for path in dropped)
                notices.append(f"{override.key}={override.text} replaces {named} of {document.source}")  # type: ignore[union-attr]
                for path in dropped:
                    del source[path]
                _put(tree, override.path, {})
            for path, leaf in _flatten(group, _as_group(group, value, override.key, error), override.path, None):
                _check_path(cls, path, "", error, what, help_line)
                _put(tree, path, leaf)
                source[path] = ""
        else:
            _put(tree, override.path, value)
            source[override.path] = ""
    return tree, source, notices


def _whole_groups(overrides: Sequence[Override]) -> list[Override]:
    """The overrides with `model.preset=7b` written as `model=7b`, which means the same."""
    whole = [replace(o, path=o.path[:-1]) if o.path[1:] and o.path[-1] == "preset" else o for o in overrides]
    keys = [override.key for override in whole]
    for key in keys:
        if keys.count(key) > 1:
            raise SettingsError(f"{key} and {key}.preset are both given on the command line; keep one")
    return whole


def validate(
    cls: type[Model],
    tree: Mapping[str, Any],
    source: Mapping[Key, str] | None = None,
    *,
    error: type[UserError] = SettingsError,
    help_line: str = "",
    spell: Mapping[str, str] | None = None,
) -> Model:
    """Validates `tree` as a `cls`; the error names on one line which values broke which rules.

    Args:
        source: the origin of each value by path ("file:3: "), which precedes the message about it.
        spell: the user's spelling of a key ("--nodes ").
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as mistakes:
        messages = []
        for mistake in mistakes.errors(include_url=False):
            path = tuple(str(part) for part in mistake["loc"] if isinstance(part, str))
            path = _known_part(cls, path)
            key = ".".join(path)
            message = mistake["msg"].removeprefix("Value error, ")
            message = re.sub(r", unable to (parse|interpret) .*", "", message.replace("Input should be", "must be"))
            value = ""
            if path:
                value = "..." if _is_secret(cls, path) else masked(key, _show(_get(tree, path)))
            expected = mistake.get("ctx", {}).get("expected", "")
            hint = did_you_mean(value, re.findall(r"'([^']+)'", str(expected)))
            origin = (source or {}).get(path, "")
            if path and type(None) in _options(_field(cls, path).annotation) and message.startswith("must be"):
                message += ", or null"
            prefix = f"{origin}{(spell or {}).get(key, key + '=')}{value}: " if path else origin
            if mistake["type"] == "missing":
                messages.append(f"{origin}{key}: has no default and must be given; add {key}=...")
                continue
            messages.append(
                f"{prefix}{message if message[1:2].isupper() or not path else message[:1].lower() + message[1:]}{hint}"
            )
        messages = list(dict.fromkeys(messages))  # each branch of a union complains of the same value
        more = f" (and {len(messages) - 3} more)" if len(messages) > 3 else ""
        raise error("; ".join(messages[:3]) + more + (f"; {help_line}" if help_line else "")) from None


def _is_secret(cls: type[BaseModel], path: Key) -> bool:
    """Whether a setting may hold a secret, which messages must not show: Field(repr=False)."""
    return not _field(cls, path).repr


def _known_part(cls: type[BaseModel], path: Key) -> Key:
    """The keys in a pydantic location, without the branch names that unions add."""
    known: list[str] = []
    group: type[BaseModel] | None = cls
    for part in path:
        if group is None or part not in group.model_fields:
            break
        known.append(part)
        group = _group(group.model_fields[part].annotation)
    return tuple(known)


def _flatten(
    cls: type[BaseModel] | None, data: Mapping[Any, Any], at: Key, document: Document | None
) -> list[tuple[Key, Any]]:
    """The leaves with their paths. A value is a leaf if the class has no group of settings at its path."""
    leaves: list[tuple[Key, Any]] = []
    for key, value in data.items():
        parts = tuple(str(key).split("."))
        path = (*at, *parts)
        group = cls
        for part in parts:
            known = group.model_fields.get(part) if group else None
            group = _group(known.annotation) if known else None
        if group is not None and not (value is None and known and type(None) in _options(known.annotation)):
            value = _as_group(group, value, ".".join(path), SettingsError, document.where(path) if document else "")
            leaves += _flatten(group, value, path, document)
        else:
            leaves.append((path, value))
    return leaves


def _as_group(
    group: type[BaseModel], value: Any, key: str, error: type[UserError], where: str = ""
) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if "preset" in group.model_fields and isinstance(value, (str, int)):
        return {"preset": str(value)}
    example = next(iter(group.model_fields))
    start = f"{where}: " if where else ""
    raise error(f"{start}{key}={_show(value)}: {key} is a group of settings; give its parts ({key}.{example}=...)")


def _check_path(cls: type[BaseModel], path: Key, where: str, error: type[UserError], what: str, help_line: str) -> None:
    group: type[BaseModel] | None = cls
    for depth, part in enumerate(path):
        if group is None:
            parent = ".".join(path[:depth])
            raise error(
                f"{where}unknown {what} '{'.'.join(path)}': {parent} is not a group of settings{_dot(help_line)}"
            )
        if part not in group.model_fields:
            every = _all_paths(cls)
            close = did_you_mean(".".join(path), every) or did_you_mean(path[-1], every)
            elsewhere = [other for other in every if other.endswith("." + path[-1])]
            if not close and not elsewhere and "_" in path[-1]:  # learning_rate: the setting that means it
                meant = re.compile(rf"\b{path[-1].replace('_', ' ')}\b", re.IGNORECASE)
                elsewhere = [row.key for row in describe(cls) if meant.search(row.meaning)]
            close = close or (f" (did you mean '{elsewhere[0]}'?)" if elsewhere else "")
            raise error(f"{where}unknown {what} '{'.'.join(path)}'{close}{_dot(help_line)}")
        group = _group(group.model_fields[part].annotation)


def _dot(help_line: str) -> str:
    return f"; {help_line}" if help_line else ""


def _all_paths(cls: type[BaseModel], at: str = "") -> list[str]:
    paths = []
    for name, info in cls.model_fields.items():
        paths.append(at + name)
        group = _group(info.annotation)
        if group is not None:
            paths += _all_paths(group, f"{at}{name}.")
    return paths


def _field(cls: type[BaseModel], path: Key) -> FieldInfo:
    group: type[BaseModel] = cls
    for part in path[:-1]:
        group = _group(group.model_fields[part].annotation)  # type: ignore[assignment]
    return group.model_fields[path[-1]]


def _options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; for a plain type, the type itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _group(annotation: Any) -> type[BaseModel] | None:
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _takes(annotation: Any, kinds: tuple[type, ...]) -> bool:
    for option in _options(annotation):
        if typing.get_origin(option) is typing.Annotated:
            option = typing.get_args(option)[0]
        origin = typing.get_origin(option) or option
        if origin is Literal:
            if any(isinstance(value, kinds) for value in typing.get_args(option)):
                return True
        elif isinstance(origin, type) and issubclass(origin, kinds):
            return True
    return False


def _parse_value(override: Override, annotation: Any) -> Any:
    """An override's text parsed as YAML, unless the setting is a string: then the text itself."""
    text = override.text
    stripped = text.strip()
    is_text = _takes(annotation, (str, Path)) and not _takes(annotation, (int, float))
    if not stripped and not is_text:
        may_be_null = type(None) in _options(annotation)
        raise SettingsError(f"{override.key}=: has no value; give one{', or null' if may_be_null else ''}")
    # Where text is taken, ~ is the home directory to whoever types it, and null would be something else without a word.
    if stripped in ("null", "None", *(() if is_text else "~")) and type(None) in _options(annotation):
        return None
    quoted = len(stripped) >= 2 and stripped[0] == stripped[-1] and stripped[0] in "\"'"
    structured = stripped[:1] in ("[", "{") and _takes(annotation, (list, tuple, dict, Mapping))
    if is_text and not quoted and not structured:
        return text
    if annotation is bool and stripped in ("True", "False"):
        return stripped == "True"
    if "\n" in stripped and not quoted and not structured:
        return text  # must not go into the YAML below, otherwise the second line would be lost as another key
    try:
        return load_yaml(f"value: {text}", override.key).data["value"]
    except SettingsError as mistake:
        if structured or stripped[:1] in ("[", "{", "'", '"'):
            raise SettingsError(f"{override.key}={text}: {str(mistake).partition(': ')[2]}") from None
        return text


def as_key_values(settings: Mapping[str, Any], at: str = "") -> list[str]:
    """Settings as key=value arguments for the command line, quoted for the shell."""
    arguments: list[str] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            arguments += as_key_values(value, f"{at}{name}.")
            continue
        plain = isinstance(value, str) and re.fullmatch(r"(?!null$|None$)[A-Za-z_/][\w./:@+-]*", value) is not None
        arguments.append(shlex.quote(f"{at}{name}={value if plain else json.dumps(value, ensure_ascii=False)}"))
    return arguments


def _put(tree: dict[str, Any], path: Key, value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[path[-1]] = value


def _get(tree: Mapping[str, Any], path: Key) -> Any:
    value: Any = tree
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value) if value in (None, True, False) else str(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 120 else text[:117] + "..."


# --- described for `list` ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One row of `submit.py list WORKLOAD`."""

    key: str
    type: str
    default: str
    meaning: str


def describe(cls: type[BaseModel]) -> list[Setting]:
    """Every setting of a configuration in the order of the class, with groups flattened to dotted keys.

    The defaults come from an instance, so a default that is computed from another setting is shown too.
    """
    try:
        defaults: BaseModel | None = cls()
    except ValidationError:
        defaults = None  # some setting is required
    return _describe(cls, defaults, "")


def _describe(cls: type[BaseModel], instance: BaseModel | None, at: str) -> list[Setting]:
    rows: list[Setting] = []
    meaning = meanings(cls)
    for name, info in cls.model_fields.items():
        value = getattr(instance, name) if instance else info.get_default(call_default_factory=True)
        group = _group(info.annotation)
        if group is not None:
            rows += _describe(group, value if isinstance(value, BaseModel) else None, f"{at}{name}.")
            continue
        shown = "(required)" if value is PydanticUndefined else _show(value)
        rows.append(Setting(at + name, type_name(info.annotation, info.metadata), shown, meaning[name]))
    return rows


def type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as `list` shows it: `int > 0`, `fp32|bf16|fp64`, `float or null`."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return type_name(inner, [*metadata, *more])
    options = _options(annotation)
    if len(options) > 1:
        names = [type_name(option, metadata if option is not type(None) else ()) for option in options]
        return " or ".join(names)
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (list, tuple):
        return f"list of {type_name(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    if annotation in (str, Path):
        return "text" if annotation is str else "path"
    bounds = []
    for constraint in metadata:
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            limit = getattr(constraint, attribute, None)
            if limit is not None:
                bounds.append(f"{sign} {limit}")
    return " ".join([getattr(annotation, "__name__", str(annotation)), *bounds])
