"""Where the code of a run is, and that its processes, and those that they start, import from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import code_copy, processes
from jobs.run_dir import RunDirectory
from jobs.spec import JobSpec, ResourceSpec


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job whose copy has mine.py and lib/, of a tree that also has data.bin, and a part of meshrun."""
    for folder in ("project", "run/code/project"):
        (tmp_path / folder / "lib").mkdir(parents=True)
        (tmp_path / folder / "mine.py").write_text("import helper\n")
    (tmp_path / "project" / "data.bin").touch()
    (tmp_path / "run/code/meshrun/jobs").mkdir(parents=True)
    (tmp_path / "mesh/other").mkdir(parents=True)
    code = {str(tmp_path / "project"): "project", str(tmp_path / "mesh"): "meshrun"}
    job = JobSpec(
        workload="mine:ENTRY",
        settings={},
        resources=ResourceSpec(),
        executor="local",
        cluster="x.yaml",
        run_dir=tmp_path / "run",
        import_path=(str(tmp_path / "project"),),
        code=code,
    )
    RunDirectory(job.run_dir).describe(job)
    return job


def test_what_is_copied_is_used_from_the_copy(spec: JobSpec, tmp_path: Path) -> None:
    project, copy = tmp_path / "project", tmp_path / "run" / "code" / "project"
    for inner in ("", "mine.py", "lib", "lib/../mine.py"):
        assert code_copy.copy_of(spec, str(project / inner)) == os.path.normpath(copy / inner)
    for other in (project / "data.bin", tmp_path / "project2", tmp_path, tmp_path / "mesh" / "other"):
        assert code_copy.copy_of(spec, str(other)) == str(other)
    assert code_copy.imported_from(spec) == [str(copy)]
    assert code_copy.entry(spec) == tmp_path / "run/code/meshrun/jobs/entry.py"
    assert code_copy.entry(spec.model_copy(update={"code": {}})) == processes.ENTRY


def test_every_path_of_python_leads_to_the_copy(spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH and .pth files are on the path; an editable install may have a finder of its own."""
    project, copy = str(tmp_path / "project"), str(tmp_path / "run" / "code" / "project")

    class Finder:
        __module__ = "editable_finder_of_a_test"

    module = type(sys)("editable_finder_of_a_test")
    module.MAPPING = {"lib": f"{project}/lib", "renamed": "/elsewhere/src"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "editable_finder_of_a_test", module)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    monkeypatch.setattr(sys, "path", ["", f"{project}/lib", str(tmp_path / "mesh")])
    env = {"PYTHONPATH": f"{project}/lib{os.pathsep}relative"}
    code_copy.import_from_it(spec, env)
    # Not everything of meshrun's own folder is in its copy.
    assert sys.path[:4] == ["", f"{copy}/lib", str(tmp_path / "run/code/meshrun"), str(tmp_path / "mesh")]
    assert copy in sys.path[4:]
    assert not [entry for entry in sys.path if entry.startswith(project)]
    assert env == {"PYTHONPATH": f"{copy}/lib{os.pathsep}relative"}


def test_a_traceback_shows_the_tree_as_long_as_the_file_is_the_same(spec: JobSpec, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "code" / "project"
    text = f'  File "{copy}/mine.py", line 1\n  File "/usr/lib/x.py", line 2\n  File "{copy}/mine.py", line 3\n'
    run_dir = RunDirectory(spec.run_dir)
    assert code_copy.original_of(run_dir, text) == text.replace(str(copy), str(tmp_path / "project"))
    (tmp_path / "project" / "mine.py").write_text("import changed\n")
    assert code_copy.original_of(run_dir, text) == text
    run_dir.job.write_text("{")
    assert code_copy.original_of(run_dir, text) == text


def test_the_copy_of_our_own_code_imports_itself(tmp_path: Path) -> None:
    """And is compiled already: ranks must not do it anew."""
    from jobs import snapshot

    code = snapshot.roots([])
    if not code:
        pytest.skip("meshrun is an installed package here, which is not copied")
    snapshot.take(code, [], tmp_path / "code")
    own = tmp_path / "code" / "meshrun"
    line = "import jobs.agent.agent, workloads.script.main, meshrun; print(jobs.__file__, workloads.__file__)"
    env = {**os.environ, "PYTHONPATH": str(own), "PYTHONDONTWRITEBYTECODE": "1"}
    shown = subprocess.run([sys.executable, "-c", line], env=env, capture_output=True, text=True, cwd="/")
    assert shown.stdout.split() == [str(own / "jobs/__init__.py"), str(own / "workloads/__init__.py")], shown.stderr
    assert not (own / "tests").exists()
