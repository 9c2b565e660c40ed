"""The index of a checkpoint, of ranks that have copies of plain tensors; sharded ones are in test_checkpoint.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from workloads.training import checkpoint_index
from workloads.training.checkpoint_index import (
    Copies,
    Index,
    Part,
    find_copies,
    load,
    load_whole,
    read_index,
    write,
    write_index,
)

RANKS = 4


def tensors(rank: int) -> dict[str, Tensor]:
    model = {f"model.{n}": torch.arange(6.0).reshape(2, 3) + n for n in range(8)}
    return {**model, "optimizer.0.step": torch.tensor(7.0), f"random.{rank}.torch": torch.full((rank + 1,), rank)}


def parts(folder: Path) -> list[Part]:
    """As each rank writes its part."""
    digest = find_copies(tensors(0), 0, None).digest
    return [write(folder, rank, tensors(rank), Copies(digest, RANKS, rank)) for rank in range(RANKS)]


def loaded(folder: Path, rank: int, version: int = 2) -> dict[str, Tensor] | str:
    """All tensors as a rank loads them, or what is wrong."""
    index = read_index(folder, version, rank)
    targets = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.tensors.items()}
    return load(folder, index.find(targets), targets) or targets


def is_same(found: dict[str, Tensor] | str, expected: dict[str, Tensor]) -> bool:
    assert isinstance(found, dict), found
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_are_written_once_and_every_rank_loads_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_index, "RANKS_PER_FOLDER", 2)
    written = parts(tmp_path)
    write_index(tmp_path, written)
    files = {str(path.relative_to(tmp_path)): path.stat().st_size for path in tmp_path.rglob("*.distcp")}
    assert sorted(files) == [f"ranks-{folder}/__{rank}_0.distcp" for folder, rank in ((0, 0), (0, 1), (2, 2), (2, 3))]
    assert [bool(part.tensors) for part in written] == [True, False, False, False]
    write(tmp_path / "alone", 0, tensors(0), Copies(0, 1, 0))
    alone = (tmp_path / "alone" / "ranks-0" / "__0_0.distcp").stat().st_size
    assert max(files.values()) < 0.6 * alone
    for rank in range(RANKS):
        assert is_same(loaded(tmp_path, rank), tensors(rank))
    # A rank that the checkpoint does not know has no random states there.
    shared = {name: tensor for name, tensor in tensors(0).items() if not name.startswith("random.")}
    assert is_same(loaded(tmp_path, RANKS), shared)
    assert is_same(load_whole(tmp_path), shared)


def test_what_no_rank_has_written_is_named(tmp_path: Path) -> None:
    written = parts(tmp_path)
    none = write(tmp_path / "none", 1, tensors(1), Copies(written[0].digest, 2**40, 2**40))
    lacking = [written[0], replace(none, random=written[1].random), *written[2:]]
    with pytest.raises(ValueError, match="no rank has written all of model"):
        write_index(tmp_path, lacking)


def test_a_gap_is_found_at_load(tmp_path: Path) -> None:
    write_index(tmp_path, parts(tmp_path))
    targets = tensors(0)
    metadata = Index(tmp_path, 0).find(targets)
    metadata.state_dict_metadata["model.3"].chunks.clear()
    assert load(tmp_path, metadata, targets) == "does not hold every part of model.3 exactly once"


def test_tensors_of_one_name_that_are_no_copies_are_refused(tmp_path: Path) -> None:
    other = {**tensors(1), "model.3": torch.zeros(4)}
    written = [
        write(tmp_path, rank, state, find_copies(state, 0, None)) for rank, state in enumerate((tensors(0), other))
    ]
    with pytest.raises(ValueError, match="3 has not the same size and type on all ranks"):
        write_index(tmp_path, written)


def test_ranks_with_other_tensors_are_no_copies_but_may_share_some(tmp_path: Path) -> None:
    """As stages of a pipeline do, whose schedule's state is the same."""
    stages = [
        {"model.0": torch.zeros(3), "schedule.x": torch.ones(2)},
        {"model.1": torch.ones(4), "schedule.x": torch.ones(2)},
    ]
    write_index(tmp_path, [write(tmp_path, r, state, find_copies(state, 0, None)) for r, state in enumerate(stages)])
    assert is_same(loaded(tmp_path, 0), stages[0] | stages[1])


def test_a_checkpoint_of_format_1_is_still_read(tmp_path: Path) -> None:
    dcp.save(tensors(0), checkpoint_id=tmp_path, no_dist=True)
    assert is_same(loaded(tmp_path, 0, version=1), tensors(0))
