"""What of a tree is copied, what is a link in the copy, and that it is said."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs import snapshot
from jobs.code_copy import OWN
from workloads import secret_values


def make(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


def kinds(copy: Path) -> tuple[set[str], set[str]]:
    """The files and the links of a copy."""
    there = {str(path.relative_to(copy)): path for path in copy.rglob("*")}
    links = {name for name, path in there.items() if path.is_symlink()}
    return {name for name, path in there.items() if path.is_file()} - links, links


def taken_of(root: Path, target: Path, *folders: Path) -> tuple[snapshot.Taken, Path]:
    taken = snapshot.take({str(root): "mine"}, folders or (root,), target)
    return taken, target / "mine"


JUNK = ("env/pyvenv.cfg", "env/lib/a.py", "runs/one/job.json", "runs/one/settings.yaml", "runs/one/metrics.jsonl")
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


@needs_git
def test_of_a_git_work_tree_what_git_does_not_ignore_is_copied_and_the_rest_is_linked(tmp_path: Path) -> None:
    root = tmp_path / "project"
    make(root, "train.py", "lib/model.py", "lib/weights.bin", ".gitignore", "notes", ".env", "inner/b.py", "inner/c.py")
    make(root, "data/x.bin", "lib/built.so", "run/code.py", "__pycache__/train.pyc", *JUNK)
    (root / "link.py").symlink_to("train.py")
    (root / "away").symlink_to(tmp_path)
    (root / ".gitignore").write_text("data/\n*.so\n__pycache__\n/inner/c.py\n")
    git(root / "inner", "init", "--quiet")
    git(root, "init", "--quiet")
    git(root, "add", "train.py", "lib", "link.py", "away")
    (root / "gone.py").touch()
    git(root, "add", "gone.py")
    (root / "gone.py").unlink()
    taken, copy = taken_of(root, root / "run" / "code")
    files, links = kinds(copy)
    code = {"train.py", "lib/model.py", "lib/weights.bin", ".gitignore", "notes", "inner/b.py", "inner/c.py"}
    assert files == code | ({"link.py"} - links)
    # The link to a file of the tree leads to its copy; the run's own folder and other junk are neither.
    assert links == {"link.py", "away", "data", "lib/built.so", ".env"}
    assert (copy / "link.py").resolve() == copy / "train.py"
    assert (copy / "data" / "x.bin").read_text() == "# data/x.bin\n"
    assert not (copy / "train.py").stat().st_mode & 0o222
    assert (copy / "train.py").stat().st_mtime_ns == (root / "train.py").stat().st_mtime_ns
    assert str(taken) == (
        "code: the run has its own copy (9 files); not in it, but used from where they are: data, built.so"
    )


def test_of_another_folder_python_and_text_files_are_copied(tmp_path: Path) -> None:
    root = tmp_path / "project"
    make(root, "train.py", "conf/base.yaml", "lib/__init__.py", "model.bin", "images/1.png", ".hidden/a.py", *JUNK)
    taken, copy = taken_of(root, tmp_path / "code")
    assert kinds(copy) == (
        {"train.py", "conf/base.yaml", "lib/__init__.py"},
        {"model.bin", "images", ".hidden"},
    )
    assert str(taken).endswith("(3 files); not in it, but used from where they are: images, model.bin")


def test_the_run_directory_is_not_copied_into_itself(tmp_path: Path) -> None:
    root = tmp_path / "project"
    make(root, "train.py", "sweep/0/a.py", "sweep/code/meshrun/jobs/b.py")
    shutil.rmtree(root / "sweep" / "code")
    _, copy = taken_of(root, root / "sweep" / "code")
    assert kinds(copy) == ({"train.py"}, set())


def test_a_file_with_a_secret_is_not_copied(tmp_path: Path) -> None:
    root, token = tmp_path / "project", "hf_" + "QmZxKcPlWsDvBnTyRhJuGeAoIfLbNqXsKd"
    make(root, "train.py", "site.yaml", "hub.py")
    (root / "site.yaml").write_text("hub: the-key-of-this-job-1\n")
    (root / "hub.py").write_text(f"login({token!r})\n")
    (root / "train.py").write_text("user = 'postgres'\n")  # may be there by chance
    secret_values.know(["the-key-of-this-job-1", "postgres"])
    taken, copy = taken_of(root, tmp_path / "code")
    secret_values.forget()
    assert kinds(copy) == ({"train.py"}, {"site.yaml", "hub.py"})
    assert "used from where they are: hub.py (there is a secret in it), site.yaml (there is a secret in it)" in str(
        taken
    )


@needs_git
def test_a_script_in_a_folder_that_git_ignores_is_copied(tmp_path: Path) -> None:
    root = tmp_path / "project"
    make(root, "lib.py", "exp/train.py", "exp/helper.py", "exp/weights.bin")
    (root / ".gitignore").write_text("exp/\n")
    git(root, "init", "--quiet")
    _, copy = taken_of(root, tmp_path / "code", root / "exp")
    assert kinds(copy) == ({"lib.py", ".gitignore", "exp/train.py", "exp/helper.py"}, {"exp/weights.bin"})


def test_what_a_run_has_made_in_its_copy_is_carried_over(tmp_path: Path) -> None:
    root = tmp_path / "project"
    make(root, "train.py", "log.txt", "old.py")
    _, before = taken_of(root, tmp_path / "before")
    since = (root / "old.py").stat().st_mtime + 1
    make(before, "checkpoints/1.pt", "__pycache__/x.pyc")
    for path in (before / "checkpoints" / "1.pt", before / "log.txt", before / "__pycache__" / "x.pyc"):
        os.utime(path, (since + 1, since + 1))
    (root / "old.py").unlink()
    _, copy = taken_of(root, tmp_path / "code")
    assert snapshot.carry_over(before.parent, copy.parent, since) == ["checkpoints/1.pt"]
    assert kinds(copy)[0] == {"train.py", "log.txt", "checkpoints/1.pt"}
    assert (before / "checkpoints" / "1.pt").exists()


def test_nothing_is_said_where_everything_is_copied(tmp_path: Path) -> None:
    make(tmp_path / "project", "train.py", ".hidden")
    assert str(taken_of(tmp_path / "project", tmp_path / "code")[0]) == ""


def test_too_large_too_many_and_too_full_folders_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    make(root, "a.txt", "b.py", "own/c.py", "d.py", "many/1.py", "many/2.py", "many/3.py", "many/4.py", "many/5.py")
    (root / "own" / "table.json").write_bytes(b"0" * 9_000_000)
    monkeypatch.setattr(snapshot, "MOST_FILES", 2)
    monkeypatch.setattr(snapshot, "MOST_IN_A_FOLDER", 4)
    taken, copy = taken_of(root, tmp_path / "code", root / "own")
    assert kinds(copy)[0] == {"own/c.py", "b.py"}  # below the folder that is imported from, then Python
    assert kinds(copy)[1] == {"a.txt", "d.py", "many", "own/table.json"}
    assert set(taken.left_out.values()) == {"more than 4 files", "more than 2 files"}
    assert "many (more than 4 files)" in str(taken)
    monkeypatch.setattr(snapshot, "MOST_FILES", 20)
    assert "table.json (9 MB)" in str(taken_of(root, tmp_path / "again")[0])
    monkeypatch.setattr(snapshot, "MOST_BYTES", 20)
    assert "(more than 50 MB in all)" in str(taken_of(root, tmp_path / "small")[0])


def test_the_folders_that_are_copied_are_work_trees_and_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("home/.git", "home/a b/.git", "home/a b/scripts", "home/loose", "other/a b", "meshrun"):
        (tmp_path / name).mkdir(parents=True)
    home = tmp_path / "home"
    found = snapshot.roots([home / "a b" / "scripts", home / "loose", tmp_path / "other/a b", tmp_path / "meshrun"])
    assert found.pop(str(snapshot.ROOT), OWN) == OWN
    assert found == {
        str(home / "a b"): "a-b",
        str(home / "loose"): "loose",
        str(tmp_path / "other/a b"): "a-b-1",
        str(tmp_path / "meshrun"): "meshrun-1",
    }


def test_of_a_home_directory_only_what_python_would_import_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make(tmp_path / "home", "train.py", "lib/__init__.py", "lib/a.py", "project/b.py")
    _, copy = taken_of(tmp_path / "home", tmp_path / "code")
    assert kinds(copy) == ({"train.py", "lib/__init__.py", "lib/a.py"}, {"project"})
