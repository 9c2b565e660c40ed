"""What a script's line is taken for, and what is refused before a job exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workloads.base import Shape
from workloads.errors import WorkloadError
from workloads.script.config import ScriptConfig, of_line, validate


def test_everything_after_the_path_is_the_scripts() -> None:
    words = ["train.py", "--lr", "3", "a.b=c", "--json", "-m", "--", "", "--nodes=2"]
    config = of_line(words, Path("/here"))
    assert (config.path, config.module, list(config.args), config.directory) == ("train.py", None, words[1:], "/here")
    assert config.name == "train"
    config = of_line(["-m", "pkg.train", "-m", "x"], Path("/here"))
    assert (config.path, config.module, list(config.args)) == (None, "pkg.train", ["-m", "x"])
    assert config.name == "train"


BAD = {
    "no.py": ("No such file or directory in {here}; give", None),
    "trian.py": ("No such file or directory in {here} (did you mean 'train.py'?); give", None),
    "folder": ("is a directory; give its script, or a package as -m folder", None),
    "syntax.py": ("syntax.py:2: is not Python that ", b"x = 1\nx ==== 2\n"),
    "pipe.py": ("is not a regular file", None),
    "zeros.py": ("zeros.py", b"\0\0\0"),
    "bytes.py": ("bytes.py", b"x = '\xff'\n"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_rank_could_run_is_refused(name: str, tmp_path: Path) -> None:
    message, content = BAD[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "train.py").touch()
    os.mkfifo(tmp_path / "pipe.py")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkloadError) as refusal:
        validate(of_line([name], tmp_path), Shape(1, 1))
    assert str(refusal.value).startswith(f"script {name}")
    assert message.format(here=tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_module_is_looked_for_without_importing_it(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "pkg/train.py").touch()
    (tmp_path / "train.py").touch()
    (tmp_path / "adds").mkdir()
    (tmp_path / "adds/__init__.py").write_text("__path__.append('elsewhere')")
    validate(of_line(["-m", "adds.train"], tmp_path), Shape(1, 1))  # only an import would tell
    validate(of_line(["-m", "json.tool"], tmp_path), Shape(1, 1))
    validate(of_line(["-m", "pkg.train"], tmp_path), Shape(1, 1))
    for line, message in (
        (["-m", "nothing.train"], f"there is no module 'nothing' in {tmp_path} or installed for "),
        (["-m", "pkg.train.nothing"], f"there is no module 'pkg.train.nothing' in {tmp_path}"),
        (["-m", "pkg.none.train"], f"there is no module 'pkg.none' in {tmp_path}"),
        (["-m", "train.py"], "leave -m out: script train.py"),
        (["-m", "a b"], "is not a module's name"),
    ):
        with pytest.raises(WorkloadError, match="script -m") as refusal:
            validate(of_line(line, tmp_path), Shape(1, 1))
        assert message in str(refusal.value)
    for words in ([], ["-m"]):
        with pytest.raises(WorkloadError, match="is given; write"):
            of_line(words, tmp_path)
    with pytest.raises(WorkloadError, match="no script is given"):
        validate(ScriptConfig(), Shape(1, 1))
    with pytest.raises(WorkloadError, match="not UTF-8"):
        of_line(["train.py", "\udcff"], tmp_path)
