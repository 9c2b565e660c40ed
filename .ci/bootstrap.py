"""Makes the virtual environment of `make`: says what it will download and how large, then installs pinned versions.

usage: python3 .ci/bootstrap.py VENV [EXTRA] [--torch cpu|cuda]

Standard library only. The build of torch is the one that --torch names; without it, a machine with a GPU gets CUDA's,
and another one the CPU build if pip finds it, be it through pip's own configuration or on PyTorch's index: it is a
tenth of the CUDA build with its libraries.

An environment that somebody else has made (conda's, say) keeps its torch and all its versions: it gets what is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OTHERS_MIB = {"": 75, "dev": 155}
"""Measured size of everything but torch, as wheels; nearly half of it is scipy, which scikit-learn needs."""
CUDA_LIBRARIES_MIB = 2500
"""Roughly what a Linux CUDA build of torch asks for beside itself."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("venv", type=Path)
    parser.add_argument("extra", nargs="?", default="")
    parser.add_argument("--torch", default="")
    given = parser.parse_args()
    venv, extra = given.venv, given.extra
    if sys.version_info < (3, 10):  # noqa: UP036 (this is where the minimum is enforced)
        return fail(f"Python {sys.version.split()[0]} is too old; 3.10 or newer is needed: make PYTHON=python3.12")
    if given.torch not in ("", "cpu", "cuda"):
        return fail(f"TORCH={given.torch}: must be cpu or cuda; for another build, install it first ({PAGE})")
    python = venv / "bin" / "python"
    is_ours = venv.absolute() == ROOT / ".venv"
    if not works(python):
        if (venv / "pyvenv.cfg").is_file():
            shutil.rmtree(venv)  # its making was interrupted
        elif venv.exists() and any(venv.iterdir()):
            return fail(f"{venv} is not empty and is no virtual environment; name another: make VENV=...")
        is_ours = True
        print(f"setup: making a virtual environment in {venv} with {sys.executable}", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if made.returncode:
            return fail(
                f"`{sys.executable} -m venv` failed: {' '.join((made.stdout + made.stderr).split())} "
                "(on Debian and Ubuntu: apt install python3-venv; or another Python: make PYTHON=...)"
            )
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    have = installed(python, "torch")
    if have is not None and not is_ours:
        if mistake := kept_torch_mistake(have, given.torch):
            return fail(f"{venv} has torch {have}, which setup does not replace there, and {mistake} ({PAGE})")
        print(f"setup: {venv} was not made here: its torch {have} and all its versions stay", flush=True)
        versions = [f"torch=={have}"]
        torch_arguments: list[str] = []
    else:
        versions = ["--constraint", str(CONSTRAINTS)]
        torch_arguments, line = choose_torch(pip, have, given.torch)
        print(f"setup: {line}, and about {OTHERS_MIB[extra]} MiB of other packages", flush=True)
    if torch_arguments:
        run([*pip, "install", "--quiet", *versions, *torch_arguments])
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    run([*pip, "install", "--quiet", *versions, "--editable", target])
    print(f"setup: done; {venv}/bin/meshrun is ready", flush=True)
    return 0


PAGE = "docs/CLUSTER.md, The environment"


def works(python: Path) -> bool:
    """Whether there is an environment whose making was not interrupted."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def choose_torch(pip: list[str], have: str | None, wish: str) -> tuple[list[str], str]:
    """pip's arguments for the build of torch that is wanted, and a line that says what it is and why.

    Args:
        have: the version that is installed, as in 2.13.0+cpu.
        wish: cpu, cuda, or "" for what fits this machine.
    """
    version = pinned("torch")
    if have is not None and have.partition("+")[0] == version and wish in ("", kind_of(have)):
        return [], f"torch {have} is installed already"
    kind = wish or ("cuda" if has_gpu() else "cpu")
    why = f"TORCH={wish}" if wish else "this machine has a GPU" if kind == "cuda" else "no GPU here"
    if kind == "cuda":
        # `===` matches the plain version only, not a "+cpu" build that pip would otherwise prefer.
        arguments = [f"torch==={version}"]
        return arguments, describe(ask(pip, arguments), version, why)
    arguments, found = [f"torch=={version}"], ask(pip, [f"torch=={version}"])
    if found and kind_of(found["version"]) == "cpu":
        arguments = [f"torch=={found['version']}"]  # by its whole name, so that it replaces another build
    elif sys.platform == "linux":
        index = ["--index-url", CPU_INDEX, "--retries", "0", "--timeout", "5"]
        cpu = ask(pip, [*index, f"torch=={version}"], deadline_s=30)
        if cpu:
            # It alone comes from there; what it needs is found as usual.
            arguments = ["--extra-index-url", CPU_INDEX, f"torch=={cpu['version']}"]
            return arguments, describe(cpu, version, why)
    return arguments, describe(found, version, why)


def kind_of(version: str) -> str:
    """cpu or cuda, by the name of a torch's version: the plain one is CUDA's, but for macOS."""
    return "cpu" if "+cpu" in version or sys.platform == "darwin" else "cuda"


def kept_torch_mistake(have: str, wish: str) -> str | None:
    """Why an environment that was not made here cannot be used with its torch; None if it can."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', text)
    assert match
    least, below = int(match[1]), int(match[2])
    minor = re.match(r"2\.(\d+)", have)
    if not minor or not least <= int(minor[1]) < below:
        return f"meshrun needs 2.{least} to 2.{below - 1}: install that one, or leave VENV out"
    if wish and kind_of(have) != wish:
        return f"TORCH={wish} asks for another build: install that one, or leave TORCH out"
    return None


def has_gpu() -> bool:
    return any(re.fullmatch(r"nvidia\d+", p.name) for p in Path("/dev").glob("nvidia*")) or Path("/dev/kfd").exists()


def ask(pip: list[str], arguments: list[str], deadline_s: float = 120) -> dict[str, str] | None:
    """What pip would install for torch itself: version and url; None where it finds nothing."""
    command = [*pip, "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s)
        report = json.loads(answer.stdout)["install"][0]
    except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError, KeyError):
        return None
    return {"version": report["metadata"]["version"], "url": report["download_info"]["url"]}


def describe(found: dict[str, str] | None, version: str, why: str) -> str:
    if found is None:
        return f"will download torch {version} ({why}; its size is unknown)"
    size = size_mib(found["url"])
    shown = f"{size:.0f} MiB" if size else "size unknown"
    is_cpu = kind_of(found["version"]) == "cpu"
    kind = "CPU build" if is_cpu else f"CUDA build, with about {CUDA_LIBRARIES_MIB} MiB of CUDA libraries"
    return f"will download torch {found['version']} ({why}: {kind}, {shown})"


def size_mib(url: str) -> float | None:
    parts = urllib.parse.urlparse(url)
    try:
        if parts.scheme == "file":
            return Path(urllib.request.url2pathname(parts.path)).stat().st_size / 2**20
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5) as answer:
            return int(answer.headers["Content-Length"]) / 2**20
    except (OSError, TypeError, ValueError):
        return None


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==([^\s;]+)", CONSTRAINTS.read_text(), re.MULTILINE)
    assert match
    return match[1]


def installed(python: Path, package: str) -> str | None:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def run(command: list[str]) -> None:
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(fail(f"`{' '.join(command)}` failed with code {done.returncode}; its words are above"))


def fail(line: str) -> int:
    print(f"setup: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
