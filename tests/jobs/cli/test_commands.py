"""The table of verbs: a verb is one row and one file."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from jobs.cli import commands
from jobs.cli.main import main


@pytest.mark.parametrize("verb", [commands.LAUNCH, *commands.VERBS], ids=lambda verb: verb.name)
def test_every_verb_has_its_file(verb: commands.Verb) -> None:
    assert callable(importlib.import_module(verb.module).run)


def test_a_row_and_a_file_are_a_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = types.ModuleType("greet")
    module.run = lambda given, console: console.say(f"hello {given.words[1]}, {given.nodes}") or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "greet", module)
    nodes = commands.LAUNCH.flags[0]
    greet = commands.Verb("greet", "greet", "WHOM", "greets somebody", (nodes, commands.JSON), least=1, most=1)
    monkeypatch.setattr(commands, "VERBS", (*commands.VERBS, greet))
    assert main(["--nodes=x", "greet", "you"]) == 7
    assert capsys.readouterr().out == "hello you, x\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "submit.py greet WHOM\n" in shown
    assert shown.count("--nodes N ") == 1
    for line, refusal in (
        (
            "greet you --qos a",
            "--qos: is a flag of submit.py WORKLOAD, resume, resubmit and doctor, not of submit.py greet; leave it out",
        ),
        (
            "list --nodes 2",
            "--nodes: is a flag of submit.py WORKLOAD, resume, resubmit, doctor and greet, not of submit.py list",
        ),
        ("greet", "greet takes one argument and got none; write submit.py greet WHOM"),
        ("greeet you", "'greeet': no such workload or verb (did you mean 'greet'?)"),
    ):
        assert main(line.split()) == 2
        assert capsys.readouterr().err.startswith(f"meshrun: error: {refusal}")


def test_help_shows_every_verb_and_each_verbs_own_help_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for words in (*(verb.meaning for verb in commands.VERBS), *(flag.name for flag in commands.LAUNCH.flags)):
        assert words in shown
    for verb in commands.VERBS:
        assert main([verb.name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(spelling in shown for flag in verb.flags for spelling in flag.spellings)


def test_each_verb_has_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wait", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: submit.py wait [RUN]\n")
    assert "--json" in shown
    assert "--nodes" not in shown


def test_a_flag_means_the_same_kind_for_every_verb() -> None:
    kinds: dict[str, bool] = {}
    for flag in commands.flags():
        for spelling in flag.spellings:
            assert kinds.setdefault(spelling, flag.takes_value) == flag.takes_value
