"""A user's table: what is read, and one line for each thing that can be wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workloads.base import WorkloadError
from workloads.pipeline_mlp import data
from workloads.pipeline_mlp.config import Config, plan
from workloads.pipeline_mlp.table import Table, read


def csv(folder: Path, text: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "table.npz"
    np.savez(path, **arrays)
    return path


def test_a_csv(tmp_path: Path) -> None:
    table = read(csv(tmp_path, "\ufeffa, b ,y\r\n1,2.5,3\r\n\r\n-1e3, 4 ,5\r\n"), "b")
    assert table.names == ("a", "y")
    assert table.features.tolist() == [[1, 3], [-1000, 5]]
    assert table.target.tolist() == [2.5, 4]


def test_an_npz(tmp_path: Path) -> None:
    table = read(npz(tmp_path, x=np.arange(6, dtype=np.int8).reshape(3, 2), z=[True, False, True], y=[1.0, 2, 4]), "y")
    assert table.names == ("x[0]", "x[1]", "z")
    assert table.features.tolist() == [[0, 1, 1], [2, 3, 0], [4, 5, 1]]
    assert table.target.tolist() == [1, 2, 4]
    table.write(tmp_path / "again.npz")
    again = Table.load(tmp_path / "again.npz")
    assert (again.names, again.predicted) == (table.names, "y")
    assert np.array_equal(again.features, table.features)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is empty; the first line of a CSV file names its columns"),
        ("a,y\n", "has a header and no rows"),
        ("a,y\n1,2\n3\n", "line 3: 1 values for 2 columns"),
        ("a,y\n1,2\n3,4,5\n", "line 3: 3 values for 2 columns"),
        ("a,y\n1,2\n3,x\n", "line 3, column y: 'x' is no finite number; mend or drop the row"),
        ("a,y\n1,2\n,4\n", "line 3, column a: nothing is no finite number"),
        ("a,y\n1,nan\n", "line 2, column y: 'nan' is no finite number"),
        ("a,y\n1,-inf\n", "line 2, column y: '-inf' is no finite number"),
        ("a,y\n1_000,2\n", "line 2, column a: '1_000' is no finite number"),
        ("a,a,y\n1,2,3\n", "two columns are called a; name them differently"),
        ("a,,y\n1,2,3\n", "column 2 has no name in the first line"),
        ("1,2\n3,4\n", "the first line has only numbers; it has to name the columns"),
        ("a;y\n1;2\n", "the first line 'a;y' has no commas"),
        ("y\n1\n2\n", "has only the column y, and nothing to predict it from"),
        ("a,Y\n1,2\n3,4\n", r"data.target=y: .* has no such column; it has a, Y"),
        ("a,yy\n1,2\n", r"has no such column \(did you mean 'yy'\?\); it has a, yy"),
        ("a,y\n1,2\n2,2\n", "data.target=y in .* is 2 in every row: there is nothing to learn"),
        (b"a,y\n\xff\xfe,2\n", "is no CSV file in UTF-8"),
        (b"a,y\n1,\x002\n", "line 2, column y|is no CSV file"),
        ('a,y\n"1,2\n3,4\n', r"line \d: 1 values for 2 columns"),
    ],
)
def test_what_is_wrong_with_a_csv(text: str | bytes, line: str, tmp_path: Path) -> None:
    one_line(csv(tmp_path, text), "y", line)


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({}, "holds no array"),
        ({"x": [1.0, 2]}, "data.target=y: .* has no such column; it has x"),
        ({"x": [1.0, 2], "y": [1.0, 2, 3]}, "arrays have unequally many rows: x 2, y 3"),
        ({"x": [1.0, np.nan], "y": [1.0, 2]}, r"x\[1\] is nan, no finite number"),
        ({"x": [[1.0, 2], [3, np.inf]], "y": [1.0, 2]}, r"x\[1, 1\] is inf, no finite number"),
        ({"x": ["a", "b"], "y": [1.0, 2]}, "array x is of <U1, not of real numbers"),
        ({"x": [1j, 2], "y": [1.0, 2]}, "array x is of complex128, not of real numbers"),
        ({"x": np.array([{}, {}]), "y": [1.0, 2]}, "is no npz file of plain numbers: Object arrays"),
        ({"x": np.ones((2, 2, 2)), "y": [1.0, 2]}, "array x has 3 dimensions; give rows, or rows x features"),
        ({"x": 1.0, "y": [1.0, 2]}, "array x has 0 dimensions"),
        ({"x": np.ones((2, 0)), "y": [1.0, 2]}, "has no feature beside y"),
        ({"x": [1.0, 2], "y": [[1.0], [2]]}, r"data.target=y in .* is of shape \[2, 1\]; one number a row"),
        ({"x": [], "y": []}, "its arrays have no rows"),
    ],
)
def test_what_is_wrong_with_an_npz(arrays: dict[str, Any], line: str, tmp_path: Path) -> None:
    one_line(npz(tmp_path, **arrays), "y", line)


def test_what_is_no_npz_at_all(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    one_line(path, "y", "there is no such file; give a .csv or .npz file")
    path.write_bytes(b"hello")
    one_line(path, "y", "is no npz file of plain numbers")
    path.write_bytes(npz(tmp_path, x=[1.0, 2], y=[1.0, 2]).read_bytes()[:-30])
    one_line(path, "y", "is no npz file of plain numbers")
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    one_line(path, "y", "holds a single array, as np.save writes")
    path.unlink()
    path.mkdir()
    one_line(path, "y", "is a directory")


def one_line(path: Path, target: str, line: str) -> None:
    with pytest.raises(WorkloadError) as error:
        read(path, target)
    assert re.search(line, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def config(path: Path, **given: Any) -> Config:
    table = {"path": str(path), "target": "y", **given.pop("data", {})}
    return Config.model_validate({"data": table, "global_batch_size": 8, **given})


def many(folder: Path, rows: int) -> Path:
    draw = np.random.default_rng(0)
    x = draw.normal(5, 3, (rows, 2))
    return npz(folder, x=x, constant=np.full(rows, 7.0), y=x @ [1.0, -2] + 100)


def test_prepared_and_scaled(tmp_path: Path) -> None:
    one = config(many(tmp_path, 50))
    line = data.prepare(one, tmp_path / "data")
    assert line == f"y from 3 columns of {tmp_path / 'table.npz'} (40 rows to train on, 10 held out)"
    assert plan(one) == f"y of {tmp_path / 'table.npz'}: preparing checks it and copies it into the run directory"
    table = Table.load(tmp_path / "data" / "table.npz")
    samples = data.of_table(table, 0.2, torch.float64, line)
    assert samples.regression
    assert samples.train_x.shape == (40, 3)
    assert samples.heldout_y.shape == (10, 1)
    torch.testing.assert_close(samples.train_x.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(samples.train_x.std(0, correction=0), torch.tensor([1.0, 1, 0], dtype=torch.float64))
    train, rest = table.split(0.2)
    assert sorted([*train, *rest]) == list(range(50))
    # By the training rows' mean and deviation, nothing leaks from those held out.
    y = table.target
    expected = (y[rest] - y[train].mean()) / y[train].std()
    torch.testing.assert_close(samples.heldout_y[:, 0], torch.from_numpy(expected))


def test_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="global_batch_size=8 is more than the 7 samples to train on"):
        data.prepare(config(many(tmp_path, 9)), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with pytest.raises(WorkloadError, match="has 1 row: one to train on and one to hold out"):
        data.prepare(config(csv(tmp_path, "a,y\n1,2\n"), global_batch_size=1), tmp_path / "data")


@pytest.mark.parametrize(("rows", "part", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.25, 2), (1000, 0.5, 500)])
def test_at_least_one_row_on_either_side(rows: int, part: float, held_out: int) -> None:
    table = Table(np.zeros((rows, 1)), np.arange(rows, dtype=float), ("x",), "y")
    assert len(table.split(part)[1]) == held_out


def test_replicas_share_a_batch(tmp_path: Path) -> None:
    """The same samples in the same order, on any number of replicas; each once a pass."""
    data.prepare(config(many(tmp_path, 50)), tmp_path)
    samples = data.of_table(Table.load(tmp_path / "table.npz"), 0.2, torch.float64, "")
    parts = {
        dp: [
            data.batches(config(tmp_path / "table.npz", dp=dp), samples, replica, torch.device("cpu"))
            for replica in range(dp)
        ]
        for dp in (1, 2, 4)
    }
    seen = []
    for _ in range(10):  # two passes
        wholes = {dp: [torch.cat(each) for each in zip(*map(next, parts[dp]), strict=True)] for dp in parts}
        for x, y in wholes.values():
            assert torch.equal(x, wholes[1][0])
            assert torch.equal(y, wholes[1][1])
        seen += wholes[1][1].flatten().tolist()
    assert sorted(seen[:40]) == sorted(seen[40:]) == sorted(samples.train_y.flatten().tolist())
    assert seen[:40] != seen[40:]
