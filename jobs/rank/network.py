"""The address, the port and the network interface by which a rank is reached."""

from __future__ import annotations

import array
import errno
import logging
import socket
import struct
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import RendezvousError, TopologyError
from jobs.rank.identity import RankInfo

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Interface:
    """A network interface of this host (netdevice(7))."""

    name: str
    addresses: tuple[str, ...]
    """IPv4, the primary one first."""
    is_up: bool
    """Switched on."""
    is_running: bool
    """And has a link."""
    has_ipv6: bool
    """Has a non-link-local IPv6 address."""

    @property
    def is_usable(self) -> bool:
        return self.is_up and self.is_running and bool(self.addresses)

    def __str__(self) -> str:
        state = "" if self.is_up and self.is_running else " without a link" if self.is_up else " down"
        return f"{self.name}{state}{' ' + self.addresses[0] if self.addresses else ''}"


def own_address(info: RankInfo, interface: str | None, peer: str | None) -> str:
    """The IPv4 address that the other ranks reach this host by; never a name, which may mean 127.0.1.1 on the host.

    Args:
        info: this rank.
        interface: the configured one; None = as follows: loopback for emulated hosts; else the address that the kernel
            would send from to reach `peer`; else that of the first interface that is up, bridges of virtual machines
            and containers last.
        peer: an address of the network that all hosts are on, where one is known.

    Raises:
        TopologyError: the configured interface is not there, is down or has no IPv4 address; or no interface has one
            that other hosts could reach.
    """
    if interface is None and info.launcher == "local":
        return LOOPBACK
    here = interfaces()
    is_alone = info.local_world_size == info.world_size or info.launcher == "local"
    if interface is not None:
        return _address_of(interface, here, info, is_alone)
    source = _source_towards(peer) if peer else None
    if source is not None and (is_alone or not _is_loopback(source)):
        holder = _holder(source, here)
        if holder is None or holder.is_usable:
            return source
    usable = [known for known in here if known.is_usable and not _is_loopback(known.addresses[0])]
    if usable:
        return min(usable, key=_is_far_fetched).addresses[0]
    if is_alone:
        return LOOPBACK
    raise TopologyError(
        f"no network interface of {info.host} is up and has an IPv4 address that the other hosts could reach "
        f"(it has: {', '.join(map(str, here))})" + _ipv6_note(here)
    )


def _address_of(interface: str, here: list[Interface], info: RankInfo, is_alone: bool) -> str:
    found = next((known for known in here if known.name == interface), None)
    fault = _fault_of(found, is_alone)
    if found is not None and found.addresses and fault is None:
        return found.addresses[0]
    fault = fault or "has no IPv4 address, only IPv6, and ranks meet over IPv4"
    raise TopologyError(
        f"interface '{interface}' of the cluster config {fault} on {info.host} (it has: {', '.join(map(str, here))})"
    )


def _fault_of(found: Interface | None, is_alone: bool) -> str | None:
    """Why the ranks of other hosts cannot be talked to through an interface; None where they can."""
    if found is None:
        return "does not exist"
    if not found.is_up:
        return "is down"
    if not found.is_running:
        return "has no link"
    if not found.addresses:
        return None if found.has_ipv6 else "has no IPv4 address"
    if _is_loopback(found.addresses[0]) and not is_alone:
        return f"has the address {found.addresses[0]}, by which no other host can reach it"
    return None


def listen(info: RankInfo, address: str, ports: tuple[int, int] | None) -> socket.socket:
    """A socket that listens on `address`: on a port of the range, or without one on a port of the kernel's choice.

    The range is walked from a place that depends on the job, so that jobs that start together do not all try the same
    ports.

    Raises:
        RendezvousError: every port of the range is taken, or the system allows none.
    """
    first, last = ports or (0, 0)
    count = last - first + 1
    offset = zlib.crc32(info.identity.encode()) % count
    for port in (first + (offset + step) % count for step in range(count)):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if ports is not None:
            # An earlier store's connections in TIME_WAIT do not keep the port; one that still listens does.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(4096)  # of two that could bind with SO_REUSEADDR, one can listen: only this makes it ours
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or ports is None:
                raise RendezvousError(
                    f"{info.noun} 0 on {info.host} cannot listen on {address}:{port}: {error.strerror}"
                    + (f"; rendezvous_ports of the cluster config is {first}-{last}" if ports else "")
                ) from error
    raise RendezvousError(
        f"{info.noun} 0 on {info.host} cannot listen: every port of rendezvous_ports {first}-{last} is taken on "
        f"{address}; widen the range in the cluster config, or leave it out where no firewall needs one"
    )


def check_socket_variables(info: RankInfo, device: str, env: Mapping[str, str]) -> None:
    """Refuses what a profile or the job's environment says of interfaces, where it cannot work on this host.

    gloo and NCCL would fail in words of their own, which name neither the variable nor the host.

    Args:
        info: this rank.
        device: "cpu" or "cuda"; NCCL's variable counts on the latter alone.
        env: the rank's environment. gloo takes names separated by commas, NCCL beginnings of names, after `=` whole
            names, after `^` those that it leaves out.

    Raises:
        TopologyError: names the variable, this host and its interfaces.
    """
    if not (env.get("GLOO_SOCKET_IFNAME") or env.get("NCCL_SOCKET_IFNAME")):
        return
    here = interfaces()
    is_alone = info.local_world_size == info.world_size or info.launcher == "local"
    name, problem = "GLOO_SOCKET_IFNAME", None
    if here and env.get(name):
        for wanted in env[name].split(","):
            found = next((known for known in here if known.name == wanted), None)
            wrong = _fault_of(found, is_alone)
            problem = problem or (f"interface '{wanted}' {wrong}" if wrong else None)
    if problem is None and here and env.get("NCCL_SOCKET_IFNAME") and device == "cuda":
        name = "NCCL_SOCKET_IFNAME"
        if not any(_fault_of(known, is_alone) is None for known in _of_nccl(env[name], here)):
            problem = "it leaves no interface that leads to other hosts"
    if problem is not None:
        raise TopologyError(
            f"{name}={env[name]} in the environment: {problem} on {info.host} (it has: {', '.join(map(str, here))}); "
            f"unset it, or give another: --env {name}=..."
        )


def _of_nccl(value: str, here: list[Interface]) -> list[Interface]:
    """The interfaces that NCCL_SOCKET_IFNAME leaves (NCCL's ncclFindInterfaces)."""
    leaves_out, whole = value.startswith("^"), value.lstrip("^").startswith("=")
    names = value.lstrip("^=").split(",")

    def is_named(known: Interface) -> bool:
        return any(known.name == name if whole else known.name.startswith(name) for name in names)

    return [known for known in here if is_named(known) != leaves_out]


def _ipv6_note(here: list[Interface]) -> str:
    return ", only IPv6, and ranks meet over IPv4" if any(known.has_ipv6 for known in here) else ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def _is_far_fetched(known: Interface) -> bool:
    """Whether other hosts are hardly behind it: bridges of virtual machines and containers, self-given addresses."""
    bridges = ("docker", "virbr", "br-", "cni", "podman", "lxc", "lxd", "veth", "vnet")
    return known.name.startswith(bridges) or known.addresses[0].startswith("169.254.")


def _source_towards(peer: str) -> str | None:
    """The IPv4 address that the kernel would send from to reach `peer`; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _holder(address: str, here: list[Interface]) -> Interface | None:
    return next((known for known in here if address in known.addresses), None)


def interfaces() -> list[Interface]:
    """This host's network interfaces in the kernel's order; none where it is not Linux."""
    if sys.platform != "linux":
        return []
    import fcntl

    siocgifconf, siocgifflags, iff_up, iff_running, entry = 0x8912, 0x8913, 0x1, 0x40, 40
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # All addresses, the further ones of an interface too, which may be the ones that the kernel sends from.
        room = array.array("B", bytes(1024 * entry))
        answer = fcntl.ioctl(probe.fileno(), siocgifconf, struct.pack("iP", len(room), room.buffer_info()[0]))
        listed = room.tobytes()[: struct.unpack("iP", answer)[0]]
        addresses: dict[str, list[str]] = {}
        for at in range(0, len(listed), entry):
            label = listed[at : at + 16].split(b"\0")[0].decode()
            name = label.partition(":")[0]
            addresses.setdefault(name, []).append(socket.inet_ntoa(listed[at + 20 : at + 24]))
        with_ipv6 = _with_ipv6()
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), siocgifflags, struct.pack("16s24x", name.encode()))
            except OSError:
                continue  # it has gone since
            (flags,) = struct.unpack_from("H", answer, 16)
            found.append(
                Interface(
                    name,
                    tuple(addresses.get(name, ())),
                    is_up=bool(flags & iff_up),
                    is_running=bool(flags & iff_running),
                    has_ipv6=name in with_ipv6,
                )
            )
    return found


def _with_ipv6() -> set[str]:
    """The interfaces with an IPv6 address that is neither loopback nor link-local (/proc/net/if_inet6)."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[5] for line in lines if line.split()[3] not in ("10", "20")}


def socket_variables(info: RankInfo, address: str, interface: str | None, env: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep gloo and NCCL to the network that the ranks met on.

    gloo would otherwise resolve the host's name, often to a loopback address. NCCL finds its own way, InfiniBand
    included, and is told only where an interface is configured. What the job's environment says already stands.

    Args:
        info: this rank.
        address: this host's own (`Rendezvous.address`).
        interface: the configured one.
        env: the rank's environment.

    Returns:
        What is to be added to the environment.
    """
    holder = _holder(address, interfaces())
    gloo = interface or (holder.name if holder is not None else "")
    if not gloo and info.launcher == "local" and sys.platform == "darwin":
        gloo = "lo0"
    wanted = {"GLOO_SOCKET_IFNAME": gloo} if gloo else {}
    if interface is not None:
        wanted["NCCL_SOCKET_IFNAME"] = f"={interface}"  # without the =, eth1 would stand for eth10, too
    for name in [name for name in wanted if env.get(name)]:
        if env[name] != wanted[name] and interface is not None and info.local_rank == 0:
            log.info("%s=%s of the environment wins over interface %s", name, env[name], interface)
        del wanted[name]
    return wanted
