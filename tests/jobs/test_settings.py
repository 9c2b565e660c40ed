"""YAML and key=value words become one typed configuration, or one line that says what was wrong and where."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from jobs.errors import ClusterConfigError, SettingsError
from jobs.settings import (
    as_key_values,
    build,
    describe,
    dump_yaml,
    load_yaml,
    parse_overrides,
    read_yaml,
    sweep,
    type_name,
)
from workloads.base import WorkloadConfig


class Model(WorkloadConfig):
    preset: Literal["small", "7b"] = "small"
    """A size."""
    dim: int = Field(default=64, gt=0)
    """Width."""
    depth: int | None = None


class Data(WorkloadConfig):
    path: str | tuple[str, ...] | None = None
    """Files."""
    tag: str = "none"
    folder: Path = Path()


class Config(WorkloadConfig):
    model: Model = Model()
    data: Data = Data()
    steps: int = Field(default=10, gt=0)
    """Optimizer
    steps."""
    lr: float = Field(default=1e-3, gt=0, le=1)
    """The optimizer's learning rate."""
    betas: tuple[float, ...] = (0.9, 0.95)
    extra: dict[str, Any] = Field(default_factory=dict)
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_clip: float | None = 1.0
    needed: int = Field(default=1)


def from_yaml(text: str, *words: str) -> tuple[Config, list[str]]:
    return build(Config, load_yaml(text, "exp.yaml"), parse_overrides(words))


def from_words(*words: str) -> Config:
    return build(Config, None, parse_overrides(words))[0]


def refusal(text: str | None, *words: str) -> str:
    document = None if text is None else text
    with pytest.raises(SettingsError) as caught:
        build(
            Config,
            None if document is None else load_yaml(document, "exp.yaml"),
            parse_overrides(words),
            help_line="see list",
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- YAML scalars -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5e+3", -2500.0),
        ("3", 3),
        ("+3", 3),
        ("-3", -3),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("12:30:00", "12:30:00"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("2026-01-01 10:00:00", "2026-01-01 10:00:00"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("'1e-3'", "1e-3"),
        ('"5"', "5"),
    ],
)
def test_yaml_scalars_are_what_people_mean(text: str, value: Any) -> None:
    read = load_yaml(f"key: {text}", "f.yaml").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_merge_keys_and_anchors_work() -> None:
    assert load_yaml("a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n", "f").data["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 1\nlr: 2\nsteps: 3\n", ["exp.yaml:3", "'steps' is given twice", "first on line 1"]),
        ("model:\n  dim: 1\n  dim: 2\n", ["exp.yaml:3", "'dim' is given twice", "line 2"]),
        ("model: [{a: 1,\n a: 2}]\n", ["exp.yaml:2", "'a' is given twice"]),
        ("model:\n\tdim: 1\n", ["exp.yaml:2", "not valid YAML"]),
        ("steps: [1, 2\n", ["exp.yaml:", "not valid YAML"]),
        ("- steps\n- lr\n", ["exp.yaml", "list", "mapping"]),
        ("just words\n", ["exp.yaml", "str", "mapping"]),
        ("1: x\n", ["exp.yaml:1", "a key must be a name"]),
        ("a: 1\nnull: x\n", ["exp.yaml:2", "a key must be a name"]),
        ("true: x\n", ["exp.yaml:1", "a key must be a name"]),
        ("? [a, b]\n: 1\n", ["exp.yaml:1", "a key must be a name"]),
        ("a: !!python/object:os.system x\n", ["exp.yaml:1", "YAML tags (!name) are not supported"]),
        ("a: 1\nb: !!timestamp x\n", ["exp.yaml:2", "YAML tags (!name) are not supported"]),
        ("a: !!float ''\n", ["exp.yaml:1", "YAML tags (!name) are not supported"]),
        ("a: !!bool x\n", ["exp.yaml:1", "YAML tags (!name) are not supported"]),
        ("a: !!int 3\n", ["exp.yaml:1", "YAML tags (!name) are not supported"]),
        ("a: ! x\n", ["exp.yaml:1", "YAML tags (!name) are not supported"]),
        ("!!map {a: 1}\n", ["exp.yaml:1", "YAML tags (!name) are not supported"]),
        ("a: " + "[" * 3000, ["exp.yaml:1", "more than 50 levels deep"]),
        ("a:\n  " + "- " * 3000 + "x", ["exp.yaml:2", "more than 50 levels deep"]),
        ("".join(f"a{i}: &a{i} [*a{i - 1}]\n" if i else "a0: &a0 []\n" for i in range(60)), ["50 levels deep"]),
        (
            "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]\n" if i else "a0: &a0 1\n" for i in range(10)),
            ["more than 100,000 values after aliases are expanded"],
        ),
        ("a: 1\n---\nb: 2\n", ["exp.yaml", "not valid YAML"]),
        ("a: *nowhere\n", ["exp.yaml:1", "found undefined alias (*name)", "quote its text"]),
        ("a: \x07\n", ["exp.yaml", "not valid YAML"]),
        ("a: &a\n  b: *a\n", ["exp.yaml:1", "contain itself"]),
        ("a: &a [*a]\n", ["exp.yaml:1", "itself"]),
        ("a: " + "9" * 5000, ["exp.yaml", "not valid YAML"]),
    ],
    ids=lambda value: repr(value)[:25] if isinstance(value, str) else "",
)
def test_bad_yaml_is_one_line_with_its_place(text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_yaml(text, "exp.yaml")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_no_settings() -> None:
    assert load_yaml("# nothing\n", "f").data == {}


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterConfigError, match=r"gone\.yaml does not exist: give a YAML file"):
        read_yaml(tmp_path / "gone.yaml", ClusterConfigError)
    with pytest.raises(SettingsError, match="is a directory: give a YAML file"):
        read_yaml(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero"), Path("/proc/cpuinfo")):
        with pytest.raises(SettingsError, match=rf"{path} is not a regular file"):
            read_yaml(path)
    (tmp_path / "long.yaml").write_text("a: 1\n" * 2**18)
    with pytest.raises(SettingsError, match="is longer than 1,048,576 bytes"):
        read_yaml(tmp_path / "long.yaml")
    (tmp_path / "utf16.yaml").write_bytes("steps: 1".encode("utf-16"))
    with pytest.raises(SettingsError, match="is not UTF-8"):
        read_yaml(tmp_path / "utf16.yaml")


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Co", "Cn")), max_size=20),
)
_KEYS = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)


@given(st.dictionaries(_KEYS, st.recursive(_SCALARS, lambda v: st.lists(v, max_size=3), max_leaves=6), max_size=5))
def test_json_reads_back_as_it_was(data: dict[str, Any]) -> None:
    """JSON is YAML: numbers, text and nothing come back as they are, also what YAML 1.1 would turn into something."""
    text = json.dumps(data, ensure_ascii=False).replace("Infinity", ".inf")
    if '"' in text and ".inf" in text:
        return  # the replacement may have hit text
    assert load_yaml(text, "f").data == data


@given(st.dictionaries(_KEYS, _SCALARS, max_size=5))
@example({"a": "1e3", "b": "0E0", "c": "12:30:00", "d": "0o7", "e": "yes", "f": 1e20, "g": "~"})
def test_what_a_run_directory_keeps_can_be_given_again(data: dict[str, Any]) -> None:
    """Its settings.yaml, that is."""
    assert load_yaml(dump_yaml(data), "f").data == data


# --- key=value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("steps=20", 20),
        ("lr=1e-3", 0.001),
        ("lr= 0.5 ", 0.5),
        ("compile=true", True),
        ("compile=True", True),
        ("compile=False", False),
        ("precision=bf16", "bf16"),
        ("grad_clip=null", None),
        ("grad_clip=None", None),
        ("grad_clip=2", 2.0),
        ("betas=[0.8,0.9]", (0.8, 0.9)),
        ("extra={a: 1, b: [2, 3]}", {"a": 1, "b": [2, 3]}),
        ("model.dim=128", 128),
        ("model.depth=null", None),
        ("data.path=*.txt", "*.txt"),
        ("data.path=007", "007"),
        ("data.path=1e3", "1e3"),
        ("data.path=true", "true"),
        ("data.path=null", None),
        ("data.path=~", "~"),  # the home directory, and not YAML's null
        ("model.depth=~", None),
        ("data.path=[a.txt,b.txt]", ("a.txt", "b.txt")),
        ("data.path='a,b.txt'", "a,b.txt"),
        ('data.path="it is: # fine"', "it is: # fine"),
        ("data.tag=a: b", "a: b"),
        ("data.tag=x # y", "x # y"),
        ("data.tag=", ""),
        ("data.tag=null", "null"),
        ("data.tag=12:30:00", "12:30:00"),
        ("data.tag=k=v", "k=v"),
        ("data.tag=&x", "&x"),
        ("data.tag={x", "{x"),
        ("data.folder=007", Path("007")),
    ],
)
def test_words_get_the_type_of_their_setting(word: str, value: Any) -> None:
    given_value: Any = from_words(word)
    for part in word.partition("=")[0].split("."):
        given_value = getattr(given_value, part)
    assert given_value == value
    assert type(given_value) is type(value)


@pytest.mark.parametrize(
    ("words", "points"),
    [
        (["lr=1e-3", "text=[a,b]", "tag='a,b'", 'note="1..4"', "map={a: 1, b: 2}", "name=f(1,2)"], None),
        (["lr=1e-3,3e-4"], [{"lr": "1e-3"}, {"lr": "3e-4"}]),
        (["seed=1..3", "steps=5"], [{"seed": "1"}, {"seed": "2"}, {"seed": "3"}]),
        (["seed=-1..0,7"], [{"seed": "-1"}, {"seed": "0"}, {"seed": "7"}]),
        (["a=x, y", "b=1..2"], [{"a": a, "b": b} for a in "xy" for b in "12"]),
        (["sizes=[1,2],[3]"], [{"sizes": "[1,2]"}, {"sizes": "[3]"}]),
        (['tag="a,b",c'], [{"tag": '"a,b"'}, {"tag": "c"}]),
        (["seed=1..1"], [{"seed": "1"}]),
        (["seed=1...4"], None),
        (["seed=1.0..4"], None),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_the_points_of_a_sweep(words: list[str], points: list[dict[str, str]] | None) -> None:
    assert sweep(words) == points


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lr=1,", "lr=1,: has an empty value"),
        ("lr=,", "has an empty value"),
        ("seed=4..1", "seed=4..1: a range goes up; write 1..4"),
        ("seed=1,2,1", "seed=1,2,1: has 1 twice; give each value once"),
        ("seed=1..2,2", "has 2 twice"),
        ("seed=1..1001", "a sweep has at most 1,000 points; give a shorter range"),
        ("seed=0..99 lr=0..99", "a sweep has at most 1,000 points, and 100 (seed) x 100 (lr) is 10,000"),
        ("seed=1..2 seed=3", "seed is given twice"),
        ("seed", "'seed': expected key=value"),
    ],
)
def test_what_is_no_sweep_is_refused(words: str, expected: str) -> None:
    with pytest.raises(SettingsError) as refused:
        sweep(words.split())
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lr=1e-3,3e-4"], ["lr=1e-3,3e-4", "make a sweep of new runs"]),
        (["steps=1..4"], ["steps=1..4", "make a sweep of new runs"]),
        (["steps=-1..4"], ["make a sweep of new runs"]),
        (["data.path=a.txt,b.txt"], ["make a sweep of new runs", "key=[a,b]"]),
        (["steps=1", "steps=2"], ["steps is given twice"]),
        (["model.dim=1", "model.dim=1"], ["model.dim is given twice"]),
        (["steps"], ["'steps'", "expected key=value"]),
        (["=5"], ["'=...'", "not a setting's name"]),
        (["model..dim=5"], ["model..dim", "not a setting's name"]),
        (["9a=5"], ["'9a' is not a setting's name"]),
        (["stepss=5"], ["unknown setting 'stepss'", "did you mean 'steps'?", "see list"]),
        (["dim=5"], ["unknown setting 'dim'", "did you mean 'model.dim'?"]),
        (["model.dimm=5"], ["did you mean 'model.dim'?"]),
        (["steps.x=5"], ["unknown setting 'steps.x'", "steps is not a group of settings"]),
        (["steps=0"], ["steps=0", "greater than 0"]),
        (["steps=abc"], ["steps=abc", "integer"]),
        (["steps=1.5"], ["steps=1.5", "integer"]),
        (["steps=true"], ["steps=", "true and false"]),
        (["steps="], ["steps=: has no value; give one"]),
        (["data.path=[a,null]"], ["data.path=['a', None]: must be a valid string, or null"]),
        (["grad_clip="], ["grad_clip=: has no value; give one, or null"]),
        (["grad_clip=none"], ["grad_clip=none: must be a valid number, or null"]),
        (["grad_clip=off"], ["grad_clip=off: must be a valid number, or null"]),
        (["LR=1"], ["unknown setting 'LR' (did you mean 'lr'?)"]),
        (["learning_rate=1"], ["unknown setting 'learning_rate' (did you mean 'lr'?)"]),
        (["model=7B"], ["model.preset=7B: must be", "did you mean '7b'?"]),
        (["steps=null"], ["steps=null", "integer"]),
        (["lr=-1"], ["lr=-1", "greater than 0"]),
        (["lr=.nan"], ["lr=nan", "finite"]),
        (["precision=bf17"], ["precision=bf17", "did you mean 'bf16'?"]),
        (["compile=maybe"], ["compile=maybe"]),
        (["betas=[0.9"], ["betas=[0.9", "not valid YAML"]),
        (["steps=" + "[" * 3000], ["steps=[[[", "more than 50 levels deep"]),
        (["extra={a: !!float ''}"], ["extra={a:", "YAML tags (!name) are not supported"]),
        (["data=x"], ["data=x", "group of settings", "data.path=..."]),
        (["model=null"], ["model=null", "group of settings"]),
        (["model=9b"], ["model.preset=9b", "small"]),
        (["steps=\x01"], ["steps=\x01"]),
        (["steps=2\nlr: 3"], ["steps=2 lr: 3"]),
        (["steps=0", "lr=0", "compile=x", "precision=x"], ["(and 1 more)"]),
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_bad_words_are_refused_in_one_line(words: list[str], expected: list[str]) -> None:
    message = refusal(None, *words)
    for part in expected:
        assert part in message


@given(st.text(max_size=30))
def test_any_word_is_a_setting_or_one_refusal(text: str) -> None:
    for key in ("steps", "lr", "data.path", "data.tag", "betas", "extra", "model", "compile"):
        with contextlib.suppress(SettingsError):
            from_words(f"{key}={text}")


@given(st.text(st.characters(exclude_characters=",'\"[]{}()", exclude_categories=("Cs",)), max_size=20))
def test_text_settings_take_text_as_it_stands(text: str) -> None:
    if ".." not in text:
        assert from_words(f"data.tag={text}").data.tag == text


# --- which wins -------------------------------------------------------------------------------------------------------


def test_defaults_then_file_then_line() -> None:
    config, notices = from_yaml("steps: 20\nlr: 0.5\nmodel:\n  dim: 32\n", "steps=30", "model.depth=2")
    assert (config.steps, config.lr, config.model.dim, config.model.depth) == (30, 0.5, 32, 2)
    assert config.precision == "fp32"
    assert notices == []


def test_dotted_and_nested_keys_are_the_same() -> None:
    assert from_yaml("model.dim: 32\n")[0] == from_yaml("model:\n  dim: 32\n")[0] == from_words("model.dim=32")


def test_dotted_and_nested_given_both_is_twice() -> None:
    assert "exp.yaml:1: 'model.dim' is given twice" in refusal("model.dim: 32\nmodel:\n  dim: 16\n")


def test_a_group_in_one_word_replaces_the_files_and_says_so() -> None:
    config, notices = from_yaml("model:\n  dim: 32\n  depth: 3\n", "model=7b")
    assert config.model == Model(preset="7b")
    assert notices == ["model=7b replaces model.dim, model.depth of exp.yaml"]


def test_a_group_in_one_word_keeps_the_lines_own_parts() -> None:
    for words in (("model=7b", "model.dim=8"), ("model.dim=8", "model=7b")):
        config, notices = from_yaml("model:\n  depth: 3\n", *words)
        assert (config.model.preset, config.model.dim, config.model.depth) == ("7b", 8, None)
        assert len(notices) == 1


def test_a_group_in_one_word_also_in_the_file() -> None:
    assert from_yaml("model: 7b\n")[0].model.preset == "7b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 1\nstepss: 2\n", ["exp.yaml:2", "unknown setting 'stepss'", "did you mean 'steps'?", "see list"]),
        ("model:\n  dim: 2\n  dimm: 2\n", ["exp.yaml:3", "'model.dimm'", "did you mean 'model.dim'?"]),
        ("lr: 0.5\nsteps: 0\n", ["exp.yaml:2", "steps=0", "greater than 0"]),
        ("model:\n\n  dim: wide\n", ["exp.yaml:3", "model.dim=wide", "integer"]),
        ("data: x\n", ["exp.yaml:1", "data=x", "group of settings"]),
        ("lr: '1e-3'\nsteps: 1e3\nprecision: fp31\n", ["exp.yaml:3", "did you mean 'fp32'?"]),
    ],
)
def test_refusals_of_a_files_values_name_file_and_line(text: str, expected: list[str]) -> None:
    message = refusal(text)
    for part in expected:
        assert part in message


def test_a_value_of_the_line_is_not_blamed_on_the_file() -> None:
    assert "exp.yaml" not in refusal("steps: 5\n", "steps=0")


# --- described --------------------------------------------------------------------------------------------------------


def test_describe_lists_every_setting_flat_and_in_order() -> None:
    rows = {row.key: row for row in describe(Config)}
    assert list(rows)[:7] == [
        *("model.preset", "model.dim", "model.depth"),
        *("data.path", "data.tag", "data.folder", "steps"),
    ]
    assert (rows["model.dim"].type, rows["model.dim"].default, rows["model.dim"].meaning) == ("int > 0", "64", "Width.")
    assert rows["steps"].meaning == "Optimizer steps."
    assert rows["lr"].type == "float > 0 <= 1"
    assert rows["grad_clip"].type == "float or null"
    assert rows["data.path"].default == "null"


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int, "int"),
        (int | None, "int or null"),
        (Literal["a", "b"], "a|b"),
        (tuple[float, ...], "list of float"),
        (list[str], "list of text"),
        (dict[str, int], "mapping"),
        (Path, "path"),
        (str | tuple[str, ...] | None, "text or list of text or null"),
    ],
)
def test_type_names_are_a_users_words(annotation: Any, name: str) -> None:
    assert type_name(annotation) == name


class Optional(WorkloadConfig):
    model: Model | None = None
    """A group that may be left out."""


def test_a_group_that_may_be_left_out() -> None:
    def config(text: str, *words: str) -> Optional:
        return build(Optional, load_yaml(text, "exp.yaml"), parse_overrides(words))[0]

    assert config("model: null\n") == Optional(model=None)
    assert config("model: {dim: 3}\n", "model=null") == Optional(model=None)
    assert config("model: null\n", "model.dim=3") == Optional(model=Model(dim=3))
    assert config("", "model=7b") == Optional(model=Model(preset="7b"))


def test_a_preset_by_its_own_name_replaces_the_files_group_as_the_groups_name_does() -> None:
    document = load_yaml("model: {preset: small, dim: 8}\n", "exp.yaml")
    config, notices = build(Config, document, parse_overrides(["model.preset=7b"]))
    assert config.model == Model(preset="7b")
    assert len(notices) == 1
    assert "model.dim" in notices[0]
    with pytest.raises(SettingsError, match="both given"):
        build(Config, document, parse_overrides(["model.preset=7b", "model=small"]))


def test_settings_as_key_values_can_be_typed_again() -> None:
    class Data(WorkloadConfig):
        path: str | tuple[str, ...] | None = None
        note: str | None = None

    class Config(WorkloadConfig):
        data: Data = Data()
        lr: float = 1e-5
        steps: int | None = None
        on: bool = False
        text: str = ""

    for typed in (
        {},
        {"data": {"path": "a/b c.txt", "note": "null"}, "lr": 1e20, "steps": 3, "on": True, "text": 'it\'s, "quoted"'},
        {"data": {"path": ("x,y", "1..4"), "note": "1..4"}, "text": "a\nb"},
        {"data": {"path": "*.bin", "note": "12"}, "text": "true", "lr": 0.1},
    ):
        config = Config.model_validate(typed)
        words = shlex.split(" ".join(as_key_values(config.model_dump(mode="json"))))
        assert build(Config, None, parse_overrides(words))[0] == config
