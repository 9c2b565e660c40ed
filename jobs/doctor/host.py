"""What `submit.py doctor` finds out on each host before any rank starts: one process a host, standard library only.

A host without torch, or without any package, answers too. The answer is one JSON object on stdout, which Slurm carries
to the first host, so that also a host that does not see the run directory is heard. Hosts meet through small files in
the run directory, each with its host's address (a "card"), and then talk over TCP. Every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jobs.errors import MeshrunError
from jobs.processes import look_again_in_s
from jobs.rank.identity import RankInfo
from jobs.rank.network import interfaces, listen, own_address

COME_S, ANSWER_S, DISK_S, STAY_S = 30.0, 5.0, 30.0, 45.0
"""Seconds for: all cards to be there; an answer of a name server or a host; the file system; the others to be ready."""
WITHIN_S = int(COME_S + 2 * ANSWER_S + DISK_S + STAY_S) + 20
"""Seconds after which Slurm ends the processes on all hosts."""
NEIGHBORS = 8
"""A host talks to as many before it, and after it, in a ring; so do the others to it. Small clusters: all to all."""
PACKAGES = {"torch": "torch", "pydantic": "pydantic", "yaml": "pyyaml", "numpy": "numpy"}
"""What agents and ranks import at once: the module, and its name for pip."""
CHUNK, CHUNKS, TIMES = 1 << 20, 8, 2


def main(folder: Path) -> NoReturn:
    """Prints this host's answer, and ends this process, whatever a name server or a disk is still busy with."""
    answer = about_this_host()
    try:
        plan = json.loads((folder / "plan.json").read_text())
        # Not asyncio.run, which would wait for the thread of a name server or a disk that does not answer.
        asyncio.new_event_loop().run_until_complete(_examine(folder, plan, answer))
    except OSError as error:
        answer["run_dir"] = f"{error.filename or folder}: {error.strerror or error}"
    except (ValueError, MeshrunError) as error:
        answer["network"] = str(error)
    print(json.dumps(answer), flush=True)
    os._exit(0)


def about_this_host() -> dict[str, Any]:
    """Its names, and the versions of Python and of packages, none of which is imported."""
    env = os.environ
    return {
        "number": int(env.get("SLURM_PROCID", "0")),
        "host": env.get("SLURMD_NODENAME", socket.gethostname()),
        "hostname": socket.gethostname(),
        "nodes": env.get("SLURM_STEP_NODELIST", ""),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Python's and each package's; empty for one that is not installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for module, package in PACKAGES.items():
        try:
            found[module] = importlib.metadata.version(package) or ""
        except (importlib.metadata.PackageNotFoundError, KeyError):  # KeyError: what is left of a package
            spec = importlib.util.find_spec(module)
            found[module] = "unknown" if spec is not None and spec.origin is not None else ""
    return found


def lacking(found: dict[str, str]) -> list[str]:
    """The packages without which ranks cannot start."""
    return [package for module, package in PACKAGES.items() if not found[module]]


async def _examine(folder: Path, plan: dict[str, Any], answer: dict[str, Any]) -> None:
    number, on_slurm = answer["number"], plan["executor"] == "slurm"
    info = RankInfo("local", 0, 1, 0, 1, answer["host"], str(os.getpid()))
    if on_slurm:
        info = RankInfo.from_env(os.environ)
    card = {"number": number, "host": answer["host"]}
    card["addresses"] = [address for known in interfaces() for address in known.addresses]
    server = None
    try:
        card["address"] = answer["address"] = own_address(info, plan["interface"], info.network_peer)
        listener = listen(info, card["address"], tuple(plan["ports"]) if plan["ports"] else None)
        card["port"] = listener.getsockname()[1]
        server = await asyncio.start_server(_reply(number), sock=listener)
    except MeshrunError as error:
        answer["network"] = str(error)
    _write(folder / f"card-{number}", {**card, "now": time.time()})
    login = asyncio.create_task(_login(folder)) if number == 0 and on_slurm else None
    come = await _wait_for(folder, "card", plan["hosts"], COME_S)
    answer["unseen"] = sorted(set(range(plan["hosts"])) - come)
    near = [other for other in neighbors(number, plan["hosts"]) if other in come]
    peers = [json.loads((folder / f"card-{other}").read_text()) for other in near]
    listening = [peer for peer in peers if "port" in peer]  # others say themselves what is wrong
    asked = await asyncio.gather(*(_ask(peer) for peer in listening))
    answer["peers"] = {peer["host"]: found for peer, found in zip(listening, asked, strict=True)}
    names = await asyncio.gather(*(_resolve(peer) for peer in peers))
    answer["names"] = {peer["host"]: found for peer, found in zip(peers, names, strict=True)}
    answer["login"] = await login if login is not None else None
    if not (server is None or answer["unseen"] or any("error" in one for one in asked) or lacking(answer["versions"])):
        _write(folder / f"ready-{number}", {})
    _write(folder / f"talked-{number}", {})
    await _wait_for(folder, "talked", len(come), STAY_S)
    if server is not None:
        server.close()
    try:  # last, since it would disturb what is timed before; and all at once, as when ranks save
        answer["disk"] = await asyncio.wait_for(asyncio.to_thread(disk, folder / f"data-{number}"), DISK_S)
    except asyncio.TimeoutError:
        answer["disk"] = {"error": f"{CHUNK * CHUNKS >> 20} MB were not written and read within {DISK_S:g} s"}


def neighbors(number: int, hosts: int) -> list[int]:
    """The hosts that one talks to: the first one, by whose clock all are compared, and some before and after it."""
    steps = range(-NEIGHBORS, NEIGHBORS + 1)
    return sorted({0, *((number + step) % hosts for step in steps)} - {number})


def _write(path: Path, value: dict[str, Any]) -> None:
    own = path.with_name(f".{path.name}")
    own.write_text(json.dumps(value))
    own.rename(path)


async def _wait_for(folder: Path, kind: str, count: int, within_s: float) -> set[int]:
    """The numbers of the hosts that have written a file of a kind, once there are so many, or at the deadline."""
    began = time.monotonic()
    while True:
        os.close(os.open(folder, os.O_RDONLY))  # makes an NFS client look again instead of answering from its cache
        found = {int(path.name.rpartition("-")[2]) for path in folder.glob(f"{kind}-*")}
        passed = time.monotonic() - began
        if len(found) >= count or passed > within_s:
            return found
        await asyncio.sleep(look_again_in_s(passed))


def _reply(number: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(f"{number} {time.time()!r}\n".encode())
            await writer.drain()
        writer.close()

    return reply


async def _ask(peer: dict[str, Any]) -> dict[str, Any]:
    """Connects to a host and asks for its time, as NTP does: the quickest of some answers tells it best."""
    where, best = f"{peer['address']}:{peer['port']}", {"rtt_s": float("inf")}

    async def talk() -> None:
        nonlocal best
        reader, writer = await asyncio.open_connection(peer["address"], peer["port"])
        for _ in range(10):
            asked, began = time.time(), time.perf_counter()
            writer.write(b"?\n")
            number, there = (await reader.readline()).split()
            took = time.perf_counter() - began
            if int(number) != peer["number"]:
                raise ValueError
            if took < best["rtt_s"]:
                best = {"rtt_s": took, "ahead_s": float(there) - (asked + took / 2)}
        writer.close()

    try:
        await asyncio.wait_for(talk(), ANSWER_S)
    except asyncio.TimeoutError:
        return {"error": f"{where} does not answer within {ANSWER_S:g} s"}
    except OSError as error:
        return {"error": f"{where}: {os.strerror(error.errno) if error.errno else error}"}
    except ValueError:
        return {"error": f"{where}: something else answers there"}
    return best


async def _resolve(peer: dict[str, Any]) -> dict[str, Any]:
    """What a host's name means here, and the addresses that it really has."""
    loop, real = asyncio.get_running_loop(), peer["addresses"]
    try:
        lookup = loop.getaddrinfo(peer["host"], None, family=socket.AF_INET, type=socket.SOCK_STREAM)
        rows = await asyncio.wait_for(lookup, ANSWER_S)
    except asyncio.TimeoutError:
        return {"error": f"no answer within {ANSWER_S:g} s", "real": real}
    except OSError as error:
        return {"error": error.strerror or str(error), "real": real}
    return {"addresses": sorted({str(row[4][0]) for row in rows}), "real": real}


async def _login(folder: Path) -> dict[str, float] | None:
    """By how much this host's clock is ahead of the login machine's, which answers this host's card with a file."""
    end = time.monotonic() + 2 * ANSWER_S
    while time.monotonic() < end:
        os.close(os.open(folder, os.O_RDONLY))
        if (folder / "login").exists():
            back = time.time()
            letter = json.loads((folder / "login").read_text())
            return {"ahead_s": (letter["seen"] + back) / 2 - letter["now"], "within_s": (back - letter["seen"]) / 2}
        await asyncio.sleep(0.05)
    return None


def disk(path: Path) -> dict[str, Any]:
    """The best rates in MB/s of some tries: written and on the disk, and read again, from there where that can be."""
    data, wrote, read = os.urandom(CHUNK), [], []
    try:
        for _ in range(TIMES):
            began = time.perf_counter()
            with path.open("wb") as file:
                for _ in range(CHUNKS):
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            wrote.append(time.perf_counter() - began)
            with path.open("rb") as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                began = time.perf_counter()
                while file.read(CHUNK):
                    pass
                read.append(time.perf_counter() - began)
        path.unlink()
    except OSError as error:
        return {"error": error.strerror or str(error)}
    size = CHUNK * CHUNKS / 1e6
    return {"write_mb_s": size / min(wrote), "read_mb_s": size / min(read)}
