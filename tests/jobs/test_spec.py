"""Job and resource specs: frozen, validated, plain data; and time limits as Slurm writes them."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.spec import JobSpec, ResourceSpec, parse_minutes


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        (" 90 ", 90),
        ("1:30", 2),
        ("0:30", 1),
        ("0:60", 1),
        ("12:30:00", 750),
        ("0:0:1", 1),
        ("2-12", 3600),
        ("1-0", 1440),
        ("0-0:5", 5),
        ("2-12:30", 3630),
        ("2-12:30:01", 3631),
        ("3660-0", 5270400),
    ],
)
def test_time_limits(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize(
    "text",
    [
        "3660-0:1",
        "9" * 400,
        "9" * 5000,
        "",
        "abc",
        "-5",
        "1h",
        "12h30",
        "1.5",
        "1-2-3",
        "1:2:3:4",
        "2-",
        ":30",
        "0",
        "0:0",
    ],
)
def test_bad_time_limits(text: str) -> None:
    with pytest.raises(ValueError, match="a time limit"):
        parse_minutes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_time_limit_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_minutes(text) >= 1


@given(st.integers(0, 50), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_a_limit_is_never_rounded_down(days: int, hours: int, minutes: int, seconds: int) -> None:
    total_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total_s:
        assert parse_minutes(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == -(-total_s // 60)


def make_spec(**changes: object) -> JobSpec:
    fields: dict[str, object] = {
        "workload": "tp_fsdp",
        "settings": {"steps": 2},
        "resources": ResourceSpec(nodes=2, gpus_per_node=4),
        "executor": "local",
        "cluster": "none",
        "run_dir": Path("/runs/one"),
    }
    return JobSpec.model_validate(fields | changes)


def test_a_spec_survives_json_and_pickle() -> None:
    spec = make_spec(env={"A": "x\ny"}, interface="ib0", import_path=("/here",))
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_spec_is_frozen_and_closed() -> None:
    spec = make_spec()
    with pytest.raises(ValidationError):
        spec.executor = "slurm"  # type: ignore[misc]
    for change in ({"noodles": 2}, {"threads_per_rank": 0}, {"rendezvous_timeout_s": 0}, {"executor": "cloud"}):
        with pytest.raises(ValidationError):
            make_spec(**change)
    for change in ({"nodes": 0}, {"gpus_per_node": 0}, {"time_min": 0}, {"mem_gb_per_gpu": 0}):
        with pytest.raises(ValidationError):
            ResourceSpec.model_validate(change)


@pytest.mark.parametrize(
    ("workload", "name"), [("tp_fsdp", "tp_fsdp"), ("my_package.mine:ENTRY", "mine"), ("mine:ENTRY", "mine")]
)
def test_the_name_in_the_queue(workload: str, name: str) -> None:
    assert make_spec(workload=workload).name == name
