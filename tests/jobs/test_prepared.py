"""Prepared data that runs share: made once, whole or not at all, and never stale."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import prepared
from jobs.run_dir import read_json
from workloads.base import WorkloadConfig, WorkloadEntry, WorkloadError, file_stamp


class Config(WorkloadConfig):
    text: Path
    tokens: int = 3


made: list[Path] = []


def prepare(config: Config, directory: Path) -> str:
    made.append(directory)
    (directory / "parts").mkdir(parents=True)
    (directory / "parts" / "0.bin").write_bytes(config.text.read_bytes() * config.tokens)
    return "made it"


def prepare_key(config: Config) -> Any:
    return {"text": file_stamp(config.text), "tokens": (config.tokens,)}


ENTRY = WorkloadEntry(name="mine/own", config=Config, run=print, prepare=prepare, prepare_key=prepare_key)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv(prepared.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    made.clear()
    (tmp_path / "text").write_text("abc")
    return Config(text=tmp_path / "text")


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def test_a_second_run_of_the_same_key_uses_what_the_first_made(config: Config, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert prepared.prepare(ENTRY, config, first) == "made it"
    (place,) = cached(tmp_path)
    assert prepared.prepare(ENTRY, config, second) == f"from {place}, which an earlier run has made"
    assert made == [first]
    assert place.name.startswith("mine-own-")
    assert first.resolve() == second.resolve() == place / "data"
    assert (second / "parts" / "0.bin").read_text() == "abcabcabc"
    record = read_json(place / "key.json") or {}
    assert record["key"]["of"] == {"text": file_stamp(config.text), "tokens": [3]}
    # Another setting, and a source that has changed, are other data.
    prepared.prepare(ENTRY, config.model_copy(update={"tokens": 1}), third)
    assert (third / "parts" / "0.bin").read_text() == "abc"
    config.text.write_text("abd")
    os.utime(config.text, ns=(0, 0))
    prepared.prepare(ENTRY, config, tmp_path / "fourth")
    assert (tmp_path / "fourth" / "parts" / "0.bin").read_text() == "abdabdabd"
    assert len(cached(tmp_path)) == 3


def test_what_does_not_suit_this_run_is_refused_also_where_an_earlier_one_prepared_it(
    config: Config, tmp_path: Path
) -> None:
    def check(config: Config, directory: Path) -> str:
        if "d" not in (directory / "parts" / "0.bin").read_text():
            raise WorkloadError("too short")
        return "9 letters"

    entry = replace(ENTRY, check_prepared=check)
    assert prepared.prepare(entry, config, tmp_path / "first") == "made it"
    with pytest.raises(WorkloadError, match="too short"):
        prepared.prepare(entry, config, tmp_path / "second")
    assert not os.path.lexists(tmp_path / "second")
    config.text.write_text("abcd")
    assert prepared.prepare(entry, config, tmp_path / "third") == "made it"
    line = prepared.prepare(entry, config, tmp_path / "fourth")
    assert line == f"9 letters, from {(tmp_path / 'fourth').resolve().parent}, which an earlier run has made"


def test_without_a_key_each_run_has_its_own(config: Config, tmp_path: Path) -> None:
    for name, key in (("first", None), ("second", lambda config: None)):
        entry = WorkloadEntry(name="mine", config=Config, run=print, prepare=prepare, prepare_key=key)
        prepared.prepare(entry, config, tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert len(made) == 2
    assert not (tmp_path / "cache").exists()


def test_another_prepare_is_another_key_and_below_the_current_directory_by_default(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(prepared.VARIABLE)

    def otherwise(config: Config, directory: Path) -> None:
        directory.mkdir()

    entry = WorkloadEntry(name="mine/own", config=Config, run=print, prepare=otherwise, prepare_key=prepare_key)
    prepared.prepare(ENTRY, config, tmp_path / "first")
    assert prepared.prepare(entry, config, tmp_path / "second") is None
    assert len(list((tmp_path / "data" / "prepared").iterdir())) == 2


def _cut(place: Path) -> None:
    os.truncate(place / "data/parts/0.bin", 2)


def _edit(place: Path) -> None:
    (place / "data/parts/0.bin").write_text("ABCABCABC")
    os.utime(place / "data/parts/0.bin", ns=(0, 0))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_cut, "data/parts/0.bin has changed since it was made; it is made anew"),
        (_edit, "data/parts/0.bin has changed since it was made; it is made anew"),
        (lambda place: (place / "data/parts/0.bin").unlink(), "data/parts/0.bin: No such file or directory; it is"),
        (lambda place: (place / "key.json").write_text("{"), "its key.json is missing or of something else; it is"),
    ],
    ids=["cut", "edited", "missing", "no key"],
)
def test_what_is_damaged_is_made_anew_and_said(
    spoil: Callable[[Path], None], says: str, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared.prepare(ENTRY, config, tmp_path / "first")
    (place,) = cached(tmp_path)
    spoil(place)
    assert prepared.prepare(ENTRY, config, tmp_path / "second") == "made it"
    assert f"{place}: {says}" in caplog.text
    assert (tmp_path / "first" / "parts" / "0.bin").read_text() == "abcabcabc"
    assert cached(tmp_path) == [place]
    assert prepared.prepare(ENTRY, config, tmp_path / "third") != "made it"


def test_of_several_at_once_one_is_kept_and_all_use_it(config: Config, tmp_path: Path) -> None:
    runs = 8
    together = threading.Barrier(runs)

    def slowly(config: Config, directory: Path) -> None:
        prepare(config, directory)
        together.wait(60)  # none has shared its own yet

    entry = WorkloadEntry(name="mine", config=Config, run=print, prepare=slowly, prepare_key=prepare_key)
    threads = [
        threading.Thread(target=prepared.prepare, args=(entry, config, tmp_path / f"run-{n}")) for n in range(runs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (place,) = cached(tmp_path)
    assert len(made) == runs
    assert {(tmp_path / f"run-{n}").resolve() for n in range(runs)} == {place / "data"}
    assert prepared._fault(place, (read_json(place / "key.json") or {})["key"]) == ""


def test_what_another_run_has_made_meanwhile_stays_where_it_is(config: Config, tmp_path: Path) -> None:
    inodes: list[int] = []

    def overtaken(config: Config, directory: Path) -> None:
        prepare(config, directory)
        if directory.name == "first":
            prepared.prepare(entry, config, tmp_path / "second")
            inodes.append((tmp_path / "second").stat().st_ino)

    entry = replace(ENTRY, prepare=overtaken)
    prepared.prepare(entry, config, tmp_path / "first")
    assert inodes == [(tmp_path / "first").stat().st_ino]


def test_what_cannot_be_shared_is_the_runs_own(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert prepared.prepare(ENTRY, config, tmp_path / "first") == "made it"
    assert "the prepared data is this run's alone" in caplog.text
    assert (tmp_path / "first" / "parts" / "0.bin").read_text() == "abcabcabc"

    def while_it_changes(config: Config, directory: Path) -> None:
        prepare(config, directory)
        config.text.write_text("something else")

    (tmp_path / "cache").unlink()
    entry = WorkloadEntry(name="mine", config=Config, run=print, prepare=while_it_changes, prepare_key=prepare_key)
    prepared.prepare(entry, config, tmp_path / "second")
    assert "has changed meanwhile" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_what_killed_processes_left_goes_and_a_failure_leaves_nothing(config: Config, tmp_path: Path) -> None:
    left, recent = (tmp_path / "cache" / f".mine-0123.{name}" for name in ("12.ab", "13.ab"))
    for folder in (left, recent):
        folder.mkdir(parents=True)
    os.utime(left, (0, 0))

    def fail(config: Config, directory: Path) -> None:
        directory.mkdir()
        raise WorkloadError("no such corpus")

    entry = WorkloadEntry(name="mine", config=Config, run=print, prepare=fail, prepare_key=prepare_key)
    with pytest.raises(WorkloadError, match="no such corpus"):
        prepared.prepare(entry, config, tmp_path / "first")
    assert cached(tmp_path) == [left, recent]
    prepared.prepare(ENTRY, config, tmp_path / "second")
    assert left not in cached(tmp_path)
    assert recent in cached(tmp_path)


def test_a_key_that_json_does_not_know_is_refused(config: Config, tmp_path: Path) -> None:
    entry = WorkloadEntry(name="mine", config=Config, run=print, prepare=prepare, prepare_key=lambda config: {1, 2})
    with pytest.raises(WorkloadError, match="prepare_key returned what JSON does not know"):
        prepared.prepare(entry, config, tmp_path / "first")
