"""Makes the virtual environment of `make`: says what it will download and how large, then installs pinned versions.

usage: python3 .ci/bootstrap.py VENV [EXTRA]

Standard library only. A CPU build of torch is taken where there is no GPU and pip finds one, be it through pip's own
configuration or on PyTorch's index: it is a tenth of the CUDA build with its libraries.
"""

from __future__ import annotations

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
OTHERS_MIB = {"": 90, "dev": 145}
"""Measured size of everything but torch, as wheels; a third of it is scipy, which scikit-learn needs."""
CUDA_LIBRARIES_MIB = 2500
"""Roughly what a Linux CUDA build of torch asks for beside itself."""


def main() -> int:
    venv, extra = Path(sys.argv[1]), (sys.argv[2] if len(sys.argv) > 2 else "")
    if sys.version_info < (3, 10):  # noqa: UP036 (this is where the minimum is enforced)
        return fail(f"Python {sys.version.split()[0]} is too old; 3.10 or newer is needed: make PYTHON=python3.12")
    python = venv / "bin" / "python"
    if not works(python):
        if (venv / "pyvenv.cfg").is_file():
            shutil.rmtree(venv)  # its making was interrupted
        elif venv.exists() and any(venv.iterdir()):
            return fail(f"{venv} is not empty and is no virtual environment; name another: make VENV=...")
        print(f"setup: making a virtual environment in {venv} with {sys.executable}", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if made.returncode:
            return fail(
                f"`{sys.executable} -m venv` failed: {' '.join((made.stdout + made.stderr).split())} "
                "(on Debian and Ubuntu: apt install python3-venv; or another Python: make PYTHON=...)"
            )
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    wanted = pinned("torch")
    have = installed(python, "torch")
    torch_arguments: list[str] = []
    if have is not None and have.partition("+")[0] == wanted:
        # A torchvision that is missing comes as the plain wheel below, which leaves this torch alone: it asks for its
        # version, not for its build.
        print(f"setup: torch {have} is installed already; up to {OTHERS_MIB[extra]} MiB of other packages", flush=True)
    else:
        torch_arguments, line = choose_torch(pip, wanted)
        print(f"setup: will download {line}, and about {OTHERS_MIB[extra]} MiB of other packages", flush=True)
    if torch_arguments:
        run([*pip, "install", "--quiet", "--constraint", str(CONSTRAINTS), *torch_arguments])
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    run([*pip, "install", "--quiet", "--constraint", str(CONSTRAINTS), "--editable", target])
    if line := make_torchvision_importable(python):
        print(f"setup: {line}", flush=True)
    print(f"setup: done; {venv}/bin/meshrun is ready", flush=True)
    return 0


def works(python: Path) -> bool:
    """Whether there is an environment whose making was not interrupted."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def choose_torch(pip: list[str], version: str) -> tuple[list[str], str]:
    """pip's arguments for the build of torch that fits this machine, and a line that says what it is.

    torchvision is taken with it where its build would otherwise be another: each index has one to go with its torch.
    """
    vision = pinned("torchvision")
    if has_gpu():
        # `===` matches the plain version only, not a "+cpu" build that pip would otherwise prefer.
        arguments = [f"torch==={version}"]
        found = ask(pip, arguments)
        return [*arguments, f"torchvision==={vision}"], describe(found, version, "this machine has a GPU")
    arguments = [f"torch=={version}"]
    found = ask(pip, arguments)
    if sys.platform == "linux" and not (found and "+cpu" in found["version"]):
        index = ["--index-url", CPU_INDEX, "--retries", "0", "--timeout", "5"]
        cpu = ask(pip, [*index, f"torch=={version}"], deadline_s=30)
        if cpu:
            # Only these two come from there; what they need is found as usual.
            both = [f"torch=={cpu['version']}"]
            cpu_vision = ask(pip, [*index, f"torchvision=={vision}"], deadline_s=30)
            if cpu_vision:
                both.append(f"torchvision=={cpu_vision['version']}")
            return ["--extra-index-url", CPU_INDEX, *both], describe(cpu, version, "no GPU here")
    return arguments, describe(found, version, "no GPU here")


DECLARATION = """

# Added by meshrun's .ci/bootstrap.py. This torchvision is built for CUDA and torch is not, so its compiled operators do
# not load. Importing torchvision needs them to be declared, and most of it works without them.
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def make_torchvision_importable(python: Path) -> str | None:
    """Declares torchvision's operators where its build is not torch's and no fitting one was found.

    Otherwise `import torchvision` fails, and so does every package that tries it, such as transformers.

    Returns:
        What was done, in one line; None if nothing had to be done.
    """
    imported = subprocess.run([str(python), "-c", "import torchvision"], capture_output=True, text=True)
    if "operator torchvision::nms does not exist" not in imported.stderr:
        return None
    code = "from importlib.util import find_spec; print(find_spec('torchvision').submodule_search_locations[0])"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    extension = Path(found.stdout.strip()) / "extension.py"
    # Renamed into place, because an installer may have hard-linked the file from its cache.
    changed = extension.with_name("extension.py.new")
    changed.write_text(extension.read_text(encoding="utf-8") + DECLARATION, encoding="utf-8")
    changed.replace(extension)
    return (
        "the only torchvision that pip finds is built for CUDA, and torch is not: its datasets, transforms and models "
        "work, its compiled operators do not"
    )


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
        return f"torch {version} ({why}; its size is unknown)"
    size = size_mib(found["url"])
    shown = f"{size:.0f} MiB" if size else "size unknown"
    is_cpu = "+cpu" in found["version"] or sys.platform == "darwin"
    kind = "CPU build" if is_cpu else f"CUDA build, with about {CUDA_LIBRARIES_MIB} MiB of CUDA libraries"
    return f"torch {found['version']} ({why}: {kind}, {shown})"


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
