"""What was measured -> a verdict for each part of a cluster, and the hosts to leave out. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jobs.doctor.host import PACKAGES, lacking
from jobs.spec import parse_minutes
from workloads.errors import first_few

Answers = Sequence[Mapping[str, Any]]
Level = Literal["ok", "warn", "FAIL"]
Pair = tuple[str, str]

SLOW = {"GPU": (0.9, 0.75), "CPU": (0.5, 0.1), "links": (0.5, 0.25), "disk": (0.25, 0.1)}
"""Below these parts of what the others have: a warning, a failure. All else varies more than GPUs do."""
SLOW_NETWORK = 100e6
"""Bytes per second; less, about what 1 Gb/s delivers, is too slow to train across hosts."""
SKEW_S = (0.5, 60.0)
"""A clock that is off by so much: a warning, since logs and file times mislead; a failure."""
LOGIN = "this machine"


@dataclass(frozen=True)
class Verdict:
    """One line of the report."""

    level: Level
    what: str
    text: str
    advice: str = ""
    """What to change; empty if there is nothing."""
    hosts: tuple[str, ...] = ()
    """Hosts that a job does better without."""


def bad_hosts(verdicts: Iterable[Verdict], hosts: int) -> list[str]:
    """The hosts to leave out: those that something failed on that most of all `hosts` have passed."""
    of_a_check: dict[str, set[str]] = {}
    for verdict in verdicts:
        if verdict.level == "FAIL":
            of_a_check.setdefault(verdict.what, set()).update(verdict.hosts)
    return sorted({host for bad in of_a_check.values() if 2 * len(bad) <= hosts for host in bad})


# --- the login machine ------------------------------------------------------------------------------------------------


def of_slurm(slurm: Mapping[str, Any], nodes: int, cluster: Mapping[str, Any]) -> list[Verdict]:
    """Its programs, and whether the partition allows what the cluster config says.

    Args:
        slurm: as jobs.doctor.login has it.
        nodes: the hosts that are asked for.
        cluster: `time`, `max_time` and `max_nodes` of the cluster config.
    """
    if needed := [name for name in slurm["missing"] if name != "sacct"]:
        advice = "run this on a login node, or load Slurm's module"
        return [Verdict("FAIL", "Slurm", f"not on PATH: {', '.join(needed)}", advice)]
    if "error" in slurm:
        return [
            Verdict(
                "FAIL", "Slurm", f"does not answer: {slurm['error']}", "try later, ask your site, or --executor local"
            )
        ]
    without = "; no sacct, so Slurm forgets within minutes how a job ended" if slurm["missing"] else ""
    verdicts = [Verdict("ok", "Slurm", slurm["version"] + without)]
    name, limits = slurm["partition"], slurm.get("limits")
    if limits is None:
        text = f"there is no partition {name}" if name else "there is no default partition"
        return [*verdicts, Verdict("FAIL", "partition", text, f"partition: one of {first_few(slurm['known'])}")]
    if problems := _beyond_limits(limits, nodes, cluster):
        return [*verdicts, *problems]
    longest = "no time limit" if limits["MaxTime"] == "UNLIMITED" else f"at most {limits['MaxTime']}"
    text = f"{name}: {slurm['up']} of {limits.get('TotalNodes', '?')} hosts are up; {longest}"
    if slurm["up"] < nodes:
        text = f"{text}; {nodes} are asked for"
        return [*verdicts, Verdict("warn", "partition", text, "the job will wait; see sinfo")]
    return [*verdicts, Verdict("ok", "partition", text)]


def _beyond_limits(limits: Mapping[str, str], nodes: int, cluster: Mapping[str, Any]) -> list[Verdict]:
    found: list[Verdict] = []

    def add(level: Level, text: str, advice: str) -> None:
        found.append(Verdict(level, "partition", f"{limits['PartitionName']} {text}", advice))

    if limits.get("State", "UP") != "UP":
        add("FAIL", f"is {limits['State']}", "partition: another one")
    counts = [limits.get(key, "") for key in ("TotalNodes", "MaxNodes")]
    most = min((int(count) for count in counts if count.isdigit()), default=nodes)
    if nodes > most:
        add("FAIL", f"allows {most} hosts, and {nodes} are asked for", f"max_nodes: {most}")
    elif (cluster["max_nodes"] or 0) > most:
        add("warn", f"allows {most} hosts, and max_nodes is {cluster['max_nodes']}", f"max_nodes: {most}")
    if limits["MaxTime"] != "UNLIMITED":
        for level, key in (("FAIL", "time"), ("warn", "max_time")):
            if cluster[key] is not None and parse_minutes(cluster[key]) > parse_minutes(limits["MaxTime"]):
                text = f"allows {limits['MaxTime']}, and {key} is {cluster[key]}"
                add(level, text, f"{key}: {limits['MaxTime']}")  # type: ignore[arg-type]
    return found


def of_run_directory_here(about: Mapping[str, Any], on_slurm: bool) -> Verdict:
    if "error" in about:
        return Verdict("FAIL", "run directory", f"{about['path']}: {about['error']}", "give another --run-dir")
    note = f"; on {about['own']}, which is often a machine's own" if on_slurm and about["own"] else ""
    return Verdict("ok", "run directory", f"can be written here, {_si(about['write_mb_s'] * 1e6)}{note}")


# --- the hosts, without torch -----------------------------------------------------------------------------------------


def of_hosts(
    answers: Answers, expected: Sequence[str], why: Mapping[str, str], here: Mapping[str, str] | None
) -> list[Verdict]:
    """Verdicts about hosts from what each of them has answered.

    Args:
        answers: those of jobs.doctor.host.
        expected: the job's hosts, by Slurm's names.
        why: what Slurm has said of a host that has not answered.
        here: the versions on the login machine; None if hosts run another Python on purpose.
    """
    came = [answer["host"] for answer in answers]
    verdicts = []
    for host in expected:
        if host not in came:
            text = f"{host} has not answered: {why.get(host, 'nothing is known of it')}"
            advice = f"does it see this Python? try srun --nodelist={host} hostname"
            verdicts.append(Verdict("FAIL", "hosts", text, advice, (host,)))
    if not answers:
        return verdicts
    verdicts = verdicts or [Verdict("ok", "hosts", f"{_count(len(came), 'host')} answered: {first_few(came)}")]
    verdicts += [*_software(answers, here), *_shared(answers), *_connections(answers), *_names(answers)]
    return [*verdicts, *_clocks(answers), *_disks(answers)]


def _software(answers: Answers, here: Mapping[str, str] | None) -> list[Verdict]:
    versions = {answer["host"]: answer["versions"] for answer in answers}
    usual = {name: Counter(of[name] for of in versions.values()).most_common(1)[0][0] for name in ("python", *PACKAGES)}
    verdicts = []
    for host, of in versions.items():
        if missing := lacking(of):
            advice = "the environment must be on a file system that all hosts share, or python: another"
            verdicts.append(Verdict("FAIL", "software", f"no {', '.join(missing)} on {host}", advice, (host,)))
        if others := [f"{name} {of[name]}" for name in usual if of[name] and usual[name] not in ("", of[name])]:
            text = f"{host} has {', '.join(others)}, and others {', '.join(usual[o.split()[0]] for o in others)}"
            advice = "all hosts must use one environment: a shared file system, or one image"
            verdicts.append(Verdict("FAIL", "software", text, advice, (host,)))
    text = f"Python {usual['python']}, torch {usual['torch']}"
    if differs := [f"{n} {here[n]}" for n in ("python", "torch") if here and here[n] and here[n] != usual[n]]:
        differs_here = f"{text}; here {', '.join(differs)}"
        return [*verdicts, Verdict("warn", "software", differs_here, "submit with the environment that hosts have")]
    return verdicts or [Verdict("ok", "software", text + (", as here" if here and here["torch"] else ""))]


def _shared(answers: Answers) -> list[Verdict]:
    seeing = {answer["number"]: answer["host"] for answer in answers if "run_dir" not in answer}
    verdicts = []
    for answer in answers:
        unseen = [seeing[number] for number in answer.get("unseen", ()) if number in seeing]
        if "run_dir" in answer or unseen:
            text = answer.get("run_dir", f"does not see what {first_few(unseen)} wrote")
            advice = "use --run-dir on a file system that all hosts share"
            verdicts.append(Verdict("FAIL", "run directory", f"{answer['host']}: {text}", advice, (answer["host"],)))
    text = "each host sees what the others write" if len(answers) > 1 else "the host sees it"
    return verdicts or [Verdict("ok", "run directory", text)]


def _connections(answers: Answers) -> list[Verdict]:
    verdicts = []
    for answer in answers:
        if "network" in answer:
            advice = "interface: one that each host has; rendezvous_ports: a wider range"
            verdicts.append(Verdict("FAIL", "network", answer["network"], advice, (answer["host"],)))
    asked = _pairs(answers, "peers")
    bad = {pair: found["error"] for pair, found in asked.items() if "error" in found}
    hosts, pairs = culprits(bad, asked)
    advice = "a firewall, or the wrong network: rendezvous_ports: or interface:"
    for host in hosts:
        others = sorted({other for pair in bad if host in pair for other in pair} - {host})
        error = next(error for pair, error in bad.items() if host in pair)
        text = f"{host} and {first_few(others)} cannot connect: {error}"
        verdicts.append(Verdict("FAIL", "network", text, advice, (host,)))
    for a, b in pairs:
        verdicts.append(Verdict("FAIL", "network", f"{a} cannot connect to {b}: {bad[a, b]}", advice))
    if verdicts or not asked:
        return verdicts
    slowest = max(found["rtt_s"] for found in asked.values())
    return [Verdict("ok", "network", f"each host reaches the others, there and back within {_seconds(slowest)}")]


def _names(answers: Answers) -> list[Verdict]:
    on: dict[str, list[str]] = {}
    asked = _pairs(answers, "names")
    for (host, name), found in asked.items():
        if "error" in found:
            on.setdefault(f"{name} is not known ({found['error']})", []).append(host)
        elif found["real"] and not set(found["addresses"]) & set(found["real"]):
            real = first_few([address for address in found["real"] if not address.startswith("127.")])
            on.setdefault(f"{name} means {first_few(found['addresses'])}, but it has {real}", []).append(host)
    advice = "correct DNS or /etc/hosts; meshrun itself uses addresses, your tools may not"
    verdicts = [Verdict("warn", "names", f"on {first_few(hosts)}, {text}", advice) for text, hosts in on.items()]
    return verdicts or ([Verdict("ok", "names", "each host finds the others by name")] if asked else [])


def _clocks(answers: Answers) -> list[Verdict]:
    first: Mapping[str, Any] = next((answer for answer in answers if answer["number"] == 0), {"host": ""})
    ahead = {
        host: (-found["ahead_s"], found["rtt_s"] / 2)
        for (host, peer), found in _pairs(answers, "peers").items()
        if peer == first["host"] and "ahead_s" in found
    }
    if not ahead:
        return []
    ahead[first["host"]] = (0.0, 0.0)
    voices = list(ahead)
    if login := first.get("login"):
        ahead[LOGIN] = (-login["ahead_s"], login["within_s"])
        voices += [] if len(voices) > 2 else [LOGIN]  # it is known less exactly, but decides between two
    middle = statistics.median_low(ahead[voice][0] for voice in voices)
    off = {host: (value - middle, within) for host, (value, within) in sorted(ahead.items())}
    verdicts = []
    for host, (value, within) in off.items():
        if (sure := abs(value) - within) > SKEW_S[0]:
            way = "ahead of" if value > 0 else "behind"
            text = f"{host} is {abs(value):.3g} s {way} the others (to {_seconds(within)})"
            level: Level = "FAIL" if sure > SKEW_S[1] else "warn"
            hosts = () if host == LOGIN else (host,)
            verdicts.append(Verdict(level, "clocks", text, "NTP must set its clock (chronyc tracking)", hosts))
    here = off.pop(LOGIN, None)
    note = f", and with this machine within {_seconds(abs(here[0]) + here[1])}" if here else ""
    text = f"hosts agree within {_seconds(max(abs(value) + within for value, within in off.values()))}"
    return verdicts or [Verdict("ok", "clocks", text + note)]


def _disks(answers: Answers) -> list[Verdict]:
    found = {answer["host"]: answer["disk"] for answer in answers if "disk" in answer}
    verdicts = []
    for host in [host for host, disk in found.items() if "error" in disk]:
        text = f"{host}: {found.pop(host)['error']}"
        verdicts.append(Verdict("FAIL", "disk", text, "use --run-dir on another file system", (host,)))
    rates = {kind: {host: disk[f"{kind}_mb_s"] * 1e6 for host, disk in found.items()} for kind in ("write", "read")}
    for kind, of in rates.items():
        verdicts += _slow("disk", f"{kind}s the run directory at", of)
    if verdicts or not found:
        return verdicts
    text = f"run directory: write {_span(rates['write'].values())}, read {_span(rates['read'].values())}"
    return [Verdict("ok", "disk", text + (", all at once" if len(found) > 1 else ""))]


# --- the job, with torch ----------------------------------------------------------------------------------------------


def of_job(measured: Mapping[str, Any], error: str, emulated: bool) -> list[Verdict]:
    """Verdicts about devices and links from what the ranks have measured before the job ended.

    Args:
        measured: as workloads.doctor has it; may be empty.
        error: why the job has failed; empty if it has not.
        emulated: whether all hosts are this machine.
    """
    verdicts = [Verdict("FAIL", "job", error, "see submit.py explain")] if error else []
    ranks = measured.get("ranks") or []
    for kind in sorted({rank["device"] for rank in ranks}):
        group = "CPU" if kind == "CPU" else "GPU"
        own = [rank for rank in ranks if rank["device"] == kind]
        rates = {f"{rank['host']} {group} {rank['local_rank']}": rank["tflops"] * 1e12 for rank in own}
        text = f"{_count(len(own), 'rank')} on {kind}: {_span(rates.values(), 'FLOP/s')} in a matrix product"
        slow = [] if emulated and group == "CPU" else _slow(group, "multiplies matrices at", rates, "FLOP/s")
        verdicts += slow or [Verdict("ok", group, text)]
    if links := measured.get("links"):
        verdicts += _links([(*one["hosts"], min(one["mb_s"]) * 1e6) for one in links], emulated)
    elif ranks:
        verdicts.append(Verdict("ok", "links", "none between hosts, since there is one host; --nodes N measures them"))
    if found := measured.get("all_reduce"):
        size, rate = found["bytes"], 2 * (len(ranks) - 1) / len(ranks) * found["bytes"] / found["seconds"]
        text = f"{size / 1e6:.3g} MB over {len(ranks)} ranks in {_seconds(found['seconds'])}: {_si(rate)} per rank"
        verdicts.append(Verdict("ok", "all-reduce", text))
    return verdicts


def _links(links: Sequence[tuple[str, str, float]], emulated: bool) -> list[Verdict]:
    """A host whose links are slow is named; otherwise each slow pair."""
    rates: dict[Pair, float] = {}
    for a, b, rate in links:  # what looked slow was measured again, alone
        rates[a, b] = max(rate, rates.get((a, b), 0.0))
    hosts = {host for pair in rates for host in pair}
    # By each host's best link: of three hosts with a bad one, two of three links are slow.
    usual = statistics.median_high(max(rate for pair, rate in rates.items() if host in pair) for host in hosts)
    verdicts: list[Verdict] = []
    left = rates if len(hosts) > 2 and not emulated else {}
    for level, least in zip(("FAIL", "warn"), sorted(SLOW["links"]), strict=True):
        bad = {pair: rate for pair, rate in left.items() if rate < least * usual}
        slow, pairs = culprits(bad, left)
        found = [(host, (host,), [rate for pair, rate in bad.items() if host in pair]) for host in slow]
        for name, alone, own in [*found, *((f"{a} - {b}", (), [bad[a, b]]) for a, b in pairs)]:
            to = f" with {_count(len(own), 'host')}" if alone else ""
            advice = "its cable, its switch port, or interface:" if alone else "leave out one of them; tell your site"
            text = f"{name}: {_span(own)}{to}; others have {_si(usual)}"
            verdicts.append(Verdict(level, "links", text, advice, alone))  # type: ignore[arg-type]
        left = {pair: rate for pair, rate in left.items() if pair not in bad and not set(pair) & set(slow)}
    if usual < SLOW_NETWORK and not emulated:
        text = f"{_si(usual)} between hosts, too slow to train across them"
        verdicts.append(Verdict("warn", "links", text, "interface: the fast network's (ip -brief address)"))
    where = ", all on this machine" if emulated else ""
    text = f"{_count(len(rates), 'pair')} of {len(hosts)} hosts{where}: {_span(rates.values())} each way"
    return verdicts or [Verdict("ok", "links", text)]


# --- shared -----------------------------------------------------------------------------------------------------------


def culprits(bad: Iterable[Pair], asked: Iterable[Pair]) -> tuple[list[str], list[Pair]]:
    """The hosts that explain bad pairs, several of their own and most of them; and the pairs that are left.

    Args:
        bad: the pairs that are bad, in either order.
        asked: all pairs that were looked at, those included.
    """
    left, all_pairs = sorted(bad), {frozenset(pair) for pair in asked}
    hosts: list[str] = []
    while left:
        count = Counter(host for pair in {frozenset(pair) for pair in left} for host in pair)
        (worst, most), *rest = count.most_common(2)
        of_all = sum(worst in pair and not pair & set(hosts) for pair in all_pairs)
        if most < 2 or 2 * most <= of_all or (rest and rest[0][1] == most):
            break
        hosts.append(worst)
        left = [pair for pair in left if worst not in pair]
    return hosts, left


_WHY_SLOW = {
    "GPU": "another process, heat or a power limit: nvidia-smi -q -d PERFORMANCE",
    "CPU": "another process, or fewer CPUs: --sbatch exclusive, cpus_per_gpu:",
    "disk": "its network, or its mount of this file system",
}


def _slow(kind: str, does: str, rates: Mapping[str, float], unit: str = "B/s") -> list[Verdict]:
    """Verdicts on what is slower than the others; the host comes first in its name."""
    verdicts: list[Verdict] = []
    usual = statistics.median_high(rates.values()) if rates else 0.0
    for name, rate in rates.items():
        warn, fail = SLOW[kind]
        if rate < warn * usual:
            level: Level = "FAIL" if rate < fail * usual else "warn"
            text = f"{name} {does} {_si(rate, unit)}, the median is {_si(usual, unit)}"
            verdicts.append(Verdict(level, kind, text, _WHY_SLOW[kind], (name.partition(" ")[0],)))
    return verdicts


def _pairs(answers: Answers, kind: str) -> dict[Pair, Mapping[str, Any]]:
    return {(answer["host"], other): found for answer in answers for other, found in answer.get(kind, {}).items()}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _si(value: float, unit: str = "B/s") -> str:
    factor, prefix = next(((f, p) for f, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= f), (1e3, "k"))
    return f"{value / factor:.3g} {prefix}{unit}"


def _span(values: Iterable[float], unit: str = "B/s") -> str:
    low, high = (_si(pick(values), unit) for pick in (min, max))
    if low == high:
        return low
    return f"{low.split()[0] if low.split()[1] == high.split()[1] else low} to {high}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value >= 0.1 else f"{value * 1e3:.2g} ms"
