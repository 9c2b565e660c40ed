"""Which hosts talk when."""

from __future__ import annotations

import itertools

import pytest

from workloads.doctor.rounds import rounds


@pytest.mark.parametrize("hosts", range(2, 9))
def test_all_pairs_of_few_hosts_meet_once(hosts: int) -> None:
    met = [pair for pairs in rounds(hosts, 8) for pair in pairs]
    assert sorted(met) == list(itertools.combinations(range(hosts), 2))


@pytest.mark.parametrize("hosts", [1, 2, 5, 16, 33, 256])
def test_a_host_is_in_one_pair_at_a_time_and_meets_several(hosts: int) -> None:
    found = rounds(hosts, 8)
    assert len(found) <= 8
    for pairs in found:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs) == hosts - hosts % 2
    met = {frozenset(pair) for pairs in found for pair in pairs}
    for host in range(hosts):
        assert sum(host in pair for pair in met) >= min(7, hosts - 1)
