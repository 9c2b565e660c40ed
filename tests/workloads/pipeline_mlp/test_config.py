"""What can be set, how layers are dealt out, and one clear line for what cannot work."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.base import MeshSpec, Shape, WorkloadError
from workloads.pipeline_mlp.config import Config, memory_bytes, mesh, stages, validate, widths
from workloads.pipeline_mlp.partition import layer_costs, partition
from workloads.pipeline_mlp.schedule import SCHEDULES


def config(**given: Any) -> Config:
    return Config.model_validate(given)


@pytest.mark.parametrize(
    ("given", "shape", "sizes", "number"),
    [
        ({}, (1, 2), (2, 1), 2),
        ({}, (1, 1), (1, 1), 1),
        ({}, (2, 2), (4, 1), 4),
        ({"dp": 2}, (2, 2), (2, 2), 2),  # a stage a host, its copies within the host
        ({"dp": 2}, (1, 4), (2, 2), 2),
        ({"dp": 4, "microbatches": 4}, (1, 4), (1, 4), 1),
        ({"schedule": "interleaved"}, (1, 4), (4, 1), 8),
        ({"schedule": "interleaved", "stages": 12, "layers": 12}, (1, 4), (4, 1), 12),
        ({"engine": "torch", "schedule": "zero_bubble"}, (1, 4), (4, 1), 4),
        ({"data": {"path": "a.csv", "target": "y", "heldout": 0.5}}, (1, 2), (2, 1), 2),
    ],
)
def test_the_mesh(given: dict[str, Any], shape: tuple[int, int], sizes: tuple[int, int], number: int) -> None:
    one = config(**given)
    assert mesh(one, Shape(*shape)) == MeshSpec(("pp", "dp"), sizes)
    validate(one, Shape(*shape))
    assert stages(one, sizes[0]) == number


@pytest.mark.parametrize(
    ("given", "shape", "line"),
    [
        ({"dp": 3}, (2, 2), r"dp=3 does not divide the 4 ranks \(2 x 2\): .*; use dp=2"),
        ({"dp": 8}, (2, 2), r"dp=8 does not divide the 4 ranks \(2 x 2\): .*; use dp=4"),
        (
            {"layers": 3},
            (1, 4),
            r"layers=3 for 4 stages on 4 pipeline ranks: .*; use layers=4 or more, or fewer ranks",
        ),
        ({"layers": 7, "schedule": "interleaved"}, (1, 4), r"layers=7 for 8 stages on 4 pipeline ranks: .*layers=8"),
        (
            {"global_batch_size": 100},
            (1, 2),
            r"global_batch_size=100 is not divisible by dp x microbatches, 1 x 8: .*; use global_batch_size=104",
        ),
        ({"global_batch_size": 8, "dp": 2}, (1, 4), r"not divisible by dp x microbatches, 2 x 8: .*_size=16"),
        ({"schedule": "interleaved"}, (1, 1), r"schedule=interleaved on 1 pipeline rank: .* use more ranks"),
        ({"schedule": "interleaved", "dp": 2}, (1, 2), r"schedule=interleaved on 1 pipeline rank"),
        ({"schedule": "interleaved", "stages": 6}, (1, 4), r"stages=6 with .* use stages=8"),
        ({"stages": 4}, (1, 2), r"stages=4 with schedule=1f1b on 2 pipeline ranks: .* or use schedule=interleaved"),
        (
            {"stages": 2},
            (1, 4),
            r"stages=2 with schedule=1f1b on 4 .*: each rank has one stage; leave stages out$",
        ),
        ({"engine": "torch", "schedule": "naive"}, (1, 2), r"engine=torch with schedule=naive: .* no such schedule"),
        (
            {"engine": "torch", "microbatches": 2},
            (1, 4),
            r"engine=torch with schedule=1f1b, microbatches=2 on 4 pipeline ranks: .*; use microbatches=4",
        ),
        ({"data": {"target": "y"}}, (1, 2), r"data.target=y without data.path: is for a table; give data.path"),
        ({"data": {"heldout": 0.1}}, (1, 2), r"data.heldout=0.1 without data.path"),
        ({"data": {"path": "a.csv"}}, (1, 2), r"data.path=a.csv without data.target: name the column to predict"),
        (
            {"data": {"path": "a.csv", "target": "y", "source": "digits"}},
            (1, 2),
            r"data.path=a.csv with data.source=digits: either a table or images",
        ),
        ({"data": {"path": "a.xls", "target": "y"}}, (1, 2), r"data.path=a.xls: is neither .csv nor .npz"),
    ],
)
def test_one_line_for_what_cannot_work(given: dict[str, Any], shape: tuple[int, int], line: str) -> None:
    one = config(**given)
    with pytest.raises(WorkloadError) as error:
        validate(one, Shape(*shape))
    assert re.search(line, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_a_runs_settings_run_it_again() -> None:
    """settings.yaml has every setting, given or not."""
    for one in (config(), config(data={"path": "a.csv", "target": "y"})):
        validate(config(**one.model_dump()), Shape(1, 2))


def test_the_settings_list_is_the_codes() -> None:
    assert get_args(Config.model_fields["schedule"].annotation) == SCHEDULES


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_no_cut_is_better(costs: list[int], data: st.DataObject) -> None:
    """Against all cuts there are."""
    parts = data.draw(st.integers(1, len(costs)))
    found = partition(costs, parts)
    assert [layer for part in found for layer in part] == list(range(len(costs)))
    assert all(len(part) for part in found)

    def worth(cut: tuple[int, ...]) -> tuple[int, int]:
        ends = [0, *cut, len(costs)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
        return max(sums), sum(s * s for s in sums)

    best = min(worth(cut) for cut in itertools.combinations(range(1, len(costs)), parts - 1))
    assert worth(tuple(part.start for part in found[1:])) == best


def test_uneven_layers_are_balanced_by_cost() -> None:
    assert partition([100, 1, 1, 1, 1], 2) == [range(0, 1), range(1, 5)]
    assert partition([1, 1, 1, 1], 4) == [range(i, i + 1) for i in range(4)]
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 parts"):
        partition([1, 1, 1], 4)
    # The network as it is by default: the first layer is large, the last small.
    costs = layer_costs(widths(Config()))
    assert len(costs) == 9
    for number in (2, 4):
        shares = [sum(costs[layer] for layer in part) for part in partition(costs, number)]
        assert max(shares) < 1.02 * sum(costs) / number


def test_memory_grows_with_what_gpipe_holds() -> None:
    one, other = (memory_bytes(config(schedule=s, microbatches=64), Shape(1, 2)) for s in ("gpipe", "1f1b"))
    assert one > other > 400 * 10**6


def test_memory_counts_the_data(tmp_path: Path) -> None:
    """What it really takes: `test_data.py`."""
    sizes = {
        (source, precision): memory_bytes(config(data={"source": source}, precision=precision), Shape(1, 2))
        for source in ("auto", "mnist", "digits")
        for precision in ("fp32", "fp64")
    }
    assert sizes["auto", "fp32"] == sizes["mnist", "fp32"]
    assert sizes["mnist", "fp32"] - sizes["digits", "fp32"] > 70_000 * 784 * 4
    assert sizes["mnist", "fp64"] - sizes["digits", "fp64"] > 70_000 * 784 * 8
    table = {"path": str(tmp_path / "a.npz"), "target": "y"}
    unknown = memory_bytes(config(data=table), Shape(1, 2))
    (tmp_path / "a.npz").write_bytes(bytes(10**6))
    assert memory_bytes(config(data=table), Shape(1, 2)) == unknown + 5 * 10**6


def test_settings_come_without_torch_and_without_numpy() -> None:
    code = (
        "import sys; import workloads.pipeline_mlp, workloads.pipeline_mlp.config; "
        "print([m for m in ('torch', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
