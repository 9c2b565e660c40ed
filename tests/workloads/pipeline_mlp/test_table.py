"""A user's table: what is read, and one line for each thing that can be wrong with it."""

from __future__ import annotations

import gzip
import os
import re
import zipfile
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
        ("a,y\n", "has a header and no rows; add a row for each sample"),
        ("a,y\n1,2\n3\n", "line 3: 1 value for 2 columns; give each row one value a column"),
        ("a,y\n1,2\n3,4,5\n", "line 3: 3 values for 2 columns"),
        ("a,y\n1,2\n3,x\n", "line 3, column y: 'x' is no finite number; mend or drop the row"),
        ("a,y\n1,2\n,4\n", "line 3, column a: is empty; mend or drop the row"),
        ("a,y\n1,nan\n", "line 2, column y: 'nan' is no finite number"),
        ("a,y\n1,-inf\n", "line 2, column y: '-inf' is no finite number"),
        ("a,y\n1_000,2\n", "line 2, column a: '1_000' is no finite number"),
        ("a,a,y\n1,2,3\n", "two columns are called a; name them differently"),
        ("a,,y\n1,2,3\n", "column 2 has no name in the first line"),
        ("1,2\n3,4\n", "the first line has only numbers; it has to name the columns"),
        ("a;y\n1;2\n", "the first line 'a;y' has no commas"),
        ("y\n1\n2\n", "has only the column y, and nothing to predict it from"),
        ("a,Y\n1,2\n3,4\n", r"data.target=y: .* has no such column \(did you mean 'Y'\?\); it has a, Y"),
        ("a,yy\n1,2\n", r"has no such column \(did you mean 'yy'\?\); it has a, yy"),
        ("a,y\n1,2\n2,2\n", "data.target=y in .* is 2 in every row: there is nothing to learn"),
        (b"a,y\n\xff\xfe,2\n", "is no CSV file in UTF-8"),
        (b"a,y\n1,\x002\n", "line 2, column y|is no CSV file"),
        ('a,y\n"1,2\n3,4\n', r"line 3: is no CSV: unexpected end of data; is there a quote that is not closed\?"),
        ("\n \n\n", "is empty; the first line"),
        ("a,y\n1,٣\n", "column y: '٣' is no finite number"),
        ('a,y\n1,"2\n3"\n', r"column y: '2\\n3' is no finite number"),
        (f"a,y\n1,{'x' * 50}\n", f"column y: '{'x' * 40}...' is no finite number"),
        (f'a,y\n1,"{"x" * 200_000}', "is no CSV: field larger than field limit"),
        ("a,y\n1e300,1\n2,2\n", "column a: its mean or deviation is beyond fp64; rescale it"),
        ("a,y\n1,1e308\n2,1e308\n", "column y: its mean or deviation is beyond fp64; rescale it"),
        ("a,y\n1e308,1\n-1e308,2\n", "column a: its mean or deviation is beyond fp64; rescale it"),
        ("a,y\n0,1\n1e-200,2\n", "column a: its mean or deviation is beyond fp64; rescale it"),
    ],
)
def test_what_is_wrong_with_a_csv(text: str | bytes, line: str, tmp_path: Path) -> None:
    one_line(csv(tmp_path, text), "y", line)


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({}, r"holds no array; write it with np.savez\(file, x=..., y=...\)"),
        ({"x": [1.0, 2]}, "data.target=y: .* has no such column; it has x"),
        ({"x": [1.0, 2], "y": [1.0, 2, 3]}, "arrays have unequally many rows: x 2, y 3"),
        ({"x": [1.0, np.nan], "y": [1.0, 2]}, r"x\[1\] is nan, no finite number"),
        ({"x": [[1.0, 2], [3, np.inf]], "y": [1.0, 2]}, r"x\[1, 1\] is inf, no finite number"),
        ({"x": ["a", "b"], "y": [1.0, 2]}, "array x is of <U1, not of real numbers"),
        ({"x": [1j, 2], "y": [1.0, 2]}, "array x is of complex128, not of real numbers"),
        (
            {"x": np.array([{}, {}]), "y": [1.0, 2]},
            "cannot be read as an npz file of plain numbers: array x is of Python objects; ",
        ),
        ({"x": np.ones((2, 2, 2)), "y": [1.0, 2]}, "array x has 3 dimensions; give rows, or rows x features"),
        ({"x": 1.0, "y": [1.0, 2]}, "array x is a single number and has no rows"),
        ({"x": np.ones((2, 0)), "y": [1.0, 2]}, "has no feature beside y"),
        ({"x": [1.0, 2], "y": 1.0}, "array y is a single number and has no rows"),
        ({"x": [1.0, 2], "y": np.ones((2, 2))}, r"data.target=y in .* is of shape \[2, 2\]; one number a row"),
        ({"x": [np.longdouble("1e400"), np.longdouble(2)], "y": [1.0, 2]}, r"x\[0\] is 1e\+400, beyond fp64"),
        ({"x": [], "y": []}, "its arrays have no rows"),
    ],
)
def test_what_is_wrong_with_an_npz(arrays: dict[str, Any], line: str, tmp_path: Path) -> None:
    one_line(npz(tmp_path, **arrays), "y", line)


def test_what_is_no_npz_at_all(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    one_line(path, "y", "table.npz does not exist: give a .csv or .npz file")
    path.write_bytes(b"hello")
    one_line(path, "y", r"table.npz is no npz file; write it with np.savez\(file, x=..., y=...\)$")
    path.write_bytes(npz(tmp_path, x=[1.0, 2], y=[1.0, 2]).read_bytes()[:-30])
    one_line(path, "y", "table.npz is no npz file; ")
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    one_line(path, "y", r"table.npz is an .npy array, and not .npz: write it with np.savez\(file")
    path.unlink()
    path.mkdir()
    one_line(path, "y", "is a directory")


def test_a_target_of_one_column_is_a_target(tmp_path: Path) -> None:
    assert read(npz(tmp_path, x=[1.0, 2], y=[[1.0], [2]]), "y").target.tolist() == [1, 2]


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    table = read(csv(tmp_path, "\n  \na,y\n1,2\n   \n3,4\n\n"), "y")
    assert table.features.tolist() == [[1], [3]]


def damaged(path: Path, wrong: str) -> None:
    header = b"\x93NUMPY\x01\x00"
    if wrong == "giant":
        words = b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }\n" % 10**16
    else:
        words = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }\n"
    npy = header + len(words).to_bytes(2, "little") + words + bytes(8)
    packing = zipfile.ZIP_DEFLATED if wrong == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("notes.txt" if wrong == "text" else "y.npy", b"words" if wrong == "text" else npy)
        start, directory = archive.infolist()[0].header_offset, archive.fp.tell()  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    if wrong == "deflated":
        content[start + 30 + len("y.npy")] = 0xFF
    if wrong == "encrypted":
        content[start + 6] |= 1
        content[directory + 8] |= 1
    if wrong == "method":
        content[start + 8] = content[directory + 10] = 99
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("text", "table.npz: notes.txt is no array; write it with"),
        ("giant", "cannot be read as an npz file of plain numbers: "),
        ("deflated", "cannot be read as an npz file of plain numbers: Error -3 while decompressing"),
        ("encrypted", "cannot be read as an npz file of plain numbers: .*encrypted"),
        ("method", "cannot be read as an npz file of plain numbers: That compression method is not supported"),
    ],
)
def test_a_zip_that_is_no_npz(wrong: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    damaged(path, wrong)
    one_line(path, "y", line)


def test_what_is_no_file_to_read(tmp_path: Path) -> None:
    one_line(tmp_path / ("x" * 300 + ".csv"), "y", r"cannot be read \(File name too long\)")
    os.mkfifo(tmp_path / "table.csv")
    one_line(tmp_path / "table.csv", "y", "is not a regular file: give a .csv or .npz file")
    with pytest.raises(WorkloadError, match=r"x\.csv does not exist: give a .csv or .npz file"):
        data.prepare(config(Path("~nosuchuser/x.csv")), tmp_path / "data")


def test_a_packed_table_is_not_read_as_one(tmp_path: Path) -> None:
    packed = gzip.compress(b"x,y\n1,2\n")
    for name, line in (
        ("gz.csv", "gz.csv is gzip-compressed, and not .csv: decompress it"),
        ("gz.npz", r"gz.npz is gzip-compressed, and not .npz: write it with np.savez"),
    ):
        (tmp_path / name).write_bytes(packed)
        one_line(tmp_path / name, "y", line)
    path = npz(tmp_path, x=[1.0, 2], y=[1.0, 2])
    one_line(
        path.rename(tmp_path / "npz.csv"), "y", r"npz.csv is a zip archive \(.zip, .npz\), and not .csv: unpack it"
    )


def test_a_dry_run_sees_that_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"none\.csv does not exist: give a .csv or .npz file"):
        plan(config(tmp_path / "none.csv"))


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(np.ones((2, 1)), np.arange(2.0), ("x",), "y")

    def fail(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", fail)
        with pytest.raises(OSError, match="disk full"):
            table.write(tmp_path / "table.npz")
    assert not list(tmp_path.iterdir())
    table.write(tmp_path / "table.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["table.npz"]


def test_a_column_constant_over_the_training_rows_becomes_0() -> None:
    """The deviation of equal floats comes out above 0: divided by it, a held-out row would be 1e15."""
    values = np.full((50, 2), 0.1)
    table = Table(values, np.arange(50.0), ("a", "b"), "y")
    train, rest = table.split(0.2)
    assert (values[train].std(axis=0) > 0).all()
    values[rest] = 5
    samples = data.of_table(table, 0.2, torch.float64, "")
    assert not samples.train_x.any()
    assert not samples.heldout_x.any()


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
    assert plan(one) == f"y of {tmp_path / 'table.npz'}: preparing checks it and copies it for the ranks"
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
        drawn = {dp: [next(part)[:2] for part in parts[dp]] for dp in parts}
        wholes = {dp: [torch.cat(each) for each in zip(*drawn[dp], strict=True)] for dp in parts}
        for x, y in wholes.values():
            assert torch.equal(x, wholes[1][0])
            assert torch.equal(y, wholes[1][1])
        seen += wholes[1][1].flatten().tolist()
    assert sorted(seen[:40]) == sorted(seen[40:]) == sorted(samples.train_y.flatten().tolist())
    assert seen[:40] != seen[40:]
