"""What `make test` does about a missing Slurm: quietly installs it or says what would, and never stops."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "slurm_packages.py"
INSTALLS = """#!/bin/sh
echo "$*" >>{here}/asked
[ ! -e {here}/policy ] || cp {here}/policy {here}/policy-then
case "$*" in *install*) touch {here}/installed;; esac
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a machine without slurmctld, where an apt-get of ours brings it to root."""
    specification = importlib.util.spec_from_file_location("slurm_packages", SCRIPT)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    write_apt(tmp_path, INSTALLS)

    def missing(accounting: bool = False) -> dict[str, str]:
        return {} if (tmp_path / "installed").exists() else {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm"}

    monkeypatch.setattr(module, "missing_programs", missing)
    monkeypatch.setattr(module, "others", lambda: 0)  # this machine's
    monkeypatch.setattr(module, "POLICY", tmp_path / "policy")
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


def write_apt(here: Path, text: str) -> None:
    apt = here / "bin" / "apt-get"
    apt.write_text(text.format(here=here))
    apt.chmod(0o755)


def test_what_is_missing_is_installed_and_no_daemon_may_start(
    packages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert packages.main() == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("no daemon is started: apt-get install --no-install-recommends slurm-wlm")
    assert last.startswith("setup: Slurm is installed")
    assert "exit 101" in (tmp_path / "policy-then").read_text()
    assert not (tmp_path / "policy").exists()
    assert packages.main() == 0
    assert capsys.readouterr().out == "", "nothing is left to do"


def test_without_root_a_line_says_what_would_help(
    packages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    assert packages.main() == 0
    assert "`apt-get install --no-install-recommends slurm-wlm` as root would enable them" in capsys.readouterr().out
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("apt", ["#!/bin/sh\necho 'Could not resolve'; exit 100\n", "#!/bin/sh\nexec sleep 60\n"])
def test_a_failure_is_a_line_and_make_goes_on(
    packages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, apt: str
) -> None:
    monkeypatch.setattr(packages, "DEADLINE_S", 1)
    write_apt(tmp_path, apt)
    assert packages.main() == 0
    said = capsys.readouterr().err
    assert "setup: error: no slurmctld, slurmd, so not all tests" in said
    assert ("Could not resolve" in said) == ("100" in apt)
    assert not (tmp_path / "policy").exists()


def test_a_policy_of_the_machine_is_kept_and_asked(
    packages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy"
    policy.write_text("#!/bin/sh\nexit 0\n")
    policy.chmod(0o755)
    assert packages.main() == 0
    assert "lets packages start daemons" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()
    policy.write_text("#!/bin/sh\nexit 101\n")
    assert packages.main() == 0
    assert (tmp_path / "installed").exists()
    assert policy.read_text() == "#!/bin/sh\nexit 101\n"
