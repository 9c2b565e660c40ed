"""Secrets of two dozen kinds that tests hide in a job, and a workload that gets them and tells them when it fails."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import yaml

_RANDOM = "9fK2mQ7xV4bN8cR1tY6w"
PEM = "-----BEGIN " + f"PRIVATE KEY-----\nMIIEvQ{_RANDOM}IBADANBg\nkqhkiG9w0{_RANDOM}==\n-----END PRIVATE KEY-----"
ENV = {  # by --env
    "HF_TOKEN": f"hf_{_RANDOM}env",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "DB_PASSWORD": "correct-horse battery$taple",
    "AWS_SECRET_ACCESS_KEY": f"wJalr/{_RANDOM}+bPx",
    "AWS_ACCESS_KEY_ID": "AKIA" + "Q7XV4BN8CR1TY6WZ",
    "MY_SETUP": f"ghp_{_RANDOM}setup",
    "SSH_PRIVATE_KEY": PEM,
    "WITH_QUOTES_SECRET": 'it\'s "quoted" \\n and $HOME `id`',
}
CLUSTER_ENV = {
    "CLUSTER_TOKEN": f"of-the-cluster-{_RANDOM}",
    "PROXY": f"http://me:pw{_RANDOM}@proxy.site:3128",
    "SLACK": f"xoxb-{_RANDOM}-1",
    "GITLAB": f"glpat-{_RANDOM}",
}
SETTINGS = {  # key=value
    "hub_token": f"plain-{_RANDOM}",
    "db_url": f"postgresql://me:url{_RANDOM}@db.site/x",
    "service.api_key": f"sk-{_RANDOM}set",
    "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJ{_RANDOM}.{_RANDOM}",
}
YAML = {
    "service": {"password": "yaml-hunter2-yaml", "hook": f"https://hooks.slack.com/services/T0/B0/{_RANDOM}"},
    "more": {"stripe": f"sk_live_{_RANDOM}", "google": f"AIza{_RANDOM}{_RANDOM[:15]}", "clientSecret": f"cs:{_RANDOM}"},
    "words": ["--api-key", f"word-{_RANDOM}", "--password=short1!", f"npm_{_RANDOM}{_RANDOM}"],
}
HARMLESS = {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "4096", "KEYBOARD": "us"}
CORES = [
    *(value for value in ENV.values() if value != PEM),
    *PEM.splitlines()[1:3],
    *CLUSTER_ENV.values(),
    *(f"pw{_RANDOM}", f"url{_RANDOM}", "short1!", f"word-{_RANDOM}", "yaml-hunter2-yaml"),
    *(value for key, value in SETTINGS.items() if key != "db_url"),
    *(f"T0/B0/{_RANDOM}", f"sk_live_{_RANDOM}", f"AIza{_RANDOM}", f"cs:{_RANDOM}", f"npm_{_RANDOM}"),
]
"""What must be nowhere."""

WORKLOAD = """
import hashlib, logging, os, time
from pathlib import Path
from workloads.base import StrictModel, WorkloadConfig, WorkloadEntry


class Service(StrictModel):
    api_key: str = ""
    password: str = ""
    hook: str = ""


class Config(WorkloadConfig):
    steps: int = 1
    hub_token: str = ""
    db_url: str = ""
    jwt: str = ""
    service: Service = Service()
    more: dict[str, str] = {}
    words: list[str] = []
    fails: bool = True
    waits: bool = False
    max_tokens: int = 4096


def run(config, ctx):
    seen = [config.hub_token, config.db_url, config.jwt, *config.service.model_dump().values()]
    seen += [*config.more.values(), *config.words]
    seen += [value for name, value in sorted(os.environ.items()) if name in os.environ["WANTED"].split(",")]
    digests = [hashlib.sha256(value.encode()).hexdigest() for value in seen if value]
    Path(f"got-{ctx.rank}").write_text(" ".join(digests))
    logging.getLogger("telling").warning("logs in with %s", seen)
    while config.waits and not Path("go").exists():
        time.sleep(0.05)
    if config.fails:
        raise PermissionError(f"cannot log in with {seen}")
    return {"said": str(seen)}


ENTRY = WorkloadEntry(name="telling", config=Config, run=run, summary="tells secrets")
"""


def prepare(directory: Path, **cluster: object) -> list[str]:
    """Writes the workload and its YAML files; returns the words of the line that gives all secrets away."""
    (directory / "telling.py").write_text(WORKLOAD)
    (directory / "settings.in.yaml").write_text(yaml.safe_dump(YAML))
    wanted = ",".join([*ENV, *CLUSTER_ENV])
    env = {**CLUSTER_ENV, **HARMLESS, "WANTED": wanted}
    (directory / "cluster.yaml").write_text(yaml.safe_dump({**cluster, "env": env}))
    words = ["telling:ENTRY", "--cluster", "./cluster.yaml", "--config", "settings.in.yaml"]
    words += [word for name, value in ENV.items() for word in ("--env", f"{name}={value}")]
    return [*words, *(f"{name}={value}" for name, value in SETTINGS.items())]


def digests() -> set[str]:
    """Of all values that a rank must have got."""
    words = [*YAML["more"].values(), *YAML["words"]]  # type: ignore[attr-defined]
    values = [*ENV.values(), *CLUSTER_ENV.values(), *SETTINGS.values(), *YAML["service"].values(), *words]  # type: ignore[attr-defined]
    return {hashlib.sha256(str(value).encode()).hexdigest() for value in values}


def found_in(places: Iterable[Path], cores: Iterable[str] = CORES) -> list[str]:
    """Where a secret is, of files and folders."""
    found = []
    for place in places:
        for folder, _, names in os.walk(place) if place.is_dir() else [(place.parent, [], [place.name])]:
            for path in (Path(folder, name) for name in names):
                if path.is_file() and not path.is_symlink():
                    data = path.read_bytes()
                    found += [f"{core} in {path}" for core in cores if core.encode() in data]
    return found
