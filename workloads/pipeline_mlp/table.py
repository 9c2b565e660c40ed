"""A user's table, CSV or npz, checked strictly: whatever is wrong with it is one line, with the place. Torch-free."""

from __future__ import annotations

import csv
import difflib
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workloads.base import WorkloadError

HELD_OUT_SEED = 0
"""Which rows are held out does not change with the run's seed: results of different seeds can be compared."""


@dataclass(frozen=True)
class Table:
    """A regression: fp64, in units as they were given.

    Attributes:
        features: [rows, features].
        target: [rows].
        names: of the features.
        predicted: the target's name.
    """

    features: np.ndarray
    target: np.ndarray
    names: tuple[str, ...]
    predicted: str

    def __len__(self) -> int:
        return len(self.target)

    def split(self, held_out: float) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers to train on, and held out; at least one of each."""
        order = np.random.default_rng(HELD_OUT_SEED).permutation(len(self))
        number = min(max(1, round(held_out * len(self))), len(self) - 1)
        return np.sort(order[number:]), np.sort(order[:number])

    def write(self, path: Path) -> None:
        np.savez(path, features=self.features, target=self.target, names=self.names, predicted=self.predicted)

    @staticmethod
    def load(path: Path) -> Table:
        """What `write` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            names = tuple(str(name) for name in arrays["names"])
            return Table(arrays["features"], arrays["target"], names, str(arrays["predicted"]))


def read(path: Path, target: str) -> Table:
    """A table from a file.

    Args:
        target: the column (CSV) or array (npz) to predict.

    Raises:
        WorkloadError: it is not there, is no such file, has no such column, or a value that is no finite number.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "there is no such file"
        raise WorkloadError(f"data.path={path}: {what}; give a .csv or .npz file")
    try:
        columns = _csv(path) if path.suffix.lower() == ".csv" else _npz(path)
    except OSError as error:
        raise WorkloadError(f"data.path={path} cannot be read: {error.strerror or error}") from None
    if target not in columns:
        close = difflib.get_close_matches(target, columns, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        shown = ", ".join(list(columns)[:20]) + (", ..." if len(columns) > 20 else "")
        raise WorkloadError(f"data.target={target}: {path} has no such column{hint}; it has {shown}")
    y = columns.pop(target)
    if not columns:
        raise WorkloadError(f"{path} has only the column {target}, and nothing to predict it from")
    if y.ndim != 1:
        raise WorkloadError(
            f"data.target={target} in {path} is of shape {list(y.shape)}; one number a row is predicted"
        )
    if len(y) < 2:
        raise WorkloadError(f"{path} has 1 row: one to train on and one to hold out is the least there is")
    if np.ptp(y) == 0:
        raise WorkloadError(f"data.target={target} in {path} is {y[0]:g} in every row: there is nothing to learn")
    names = [
        name if column.ndim == 1 else f"{name}[{index}]"
        for name, column in columns.items()
        for index in range(1 if column.ndim == 1 else column.shape[1])
    ]
    features = np.column_stack([column.reshape(len(y), -1) for column in columns.values()])
    if not names:
        raise WorkloadError(f"{path} has no feature beside {target}")
    return Table(features, y, tuple(names), target)


def _csv(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            rows = [_numbers(path, header, row, reader.line_num) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path} is no CSV file in UTF-8: {error}") from None
    if not rows:
        raise WorkloadError(f"{path} has a header and no rows")
    values = np.array(rows, dtype=np.float64)
    return {name: values[:, index] for index, name in enumerate(header)}


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not header:
        raise WorkloadError(f"{path} is empty; the first line of a CSV file names its columns")
    for number, name in enumerate(header, start=1):
        if not name:
            raise WorkloadError(f"{path}: column {number} has no name in the first line; give it one")
        if header.index(name) != number - 1:
            raise WorkloadError(f"{path}: two columns are called {name}; name them differently")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        raise WorkloadError(f"{path}: the first line '{header[0]}' has no commas; columns are separated by commas")
    if all(_number(name) is not None for name in header):
        raise WorkloadError(f"{path}: the first line has only numbers; it has to name the columns")


def _numbers(path: Path, header: Sequence[str], row: Sequence[str], line: int) -> list[float]:
    if len(row) != len(header):
        raise WorkloadError(f"{path}, line {line}: {len(row)} values for {len(header)} columns")
    numbers = []
    for name, text in zip(header, row, strict=True):
        number = _number(text)
        if number is None or not math.isfinite(number):
            said = f"'{text}'" if text.strip() else "nothing"
            raise WorkloadError(f"{path}, line {line}, column {name}: {said} is no finite number; mend or drop the row")
        numbers.append(number)
    return numbers


def _number(text: str) -> float | None:
    if "_" in text:  # Python's own; 1_000 in a table is a slip
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _npz(path: Path) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise WorkloadError(f"{path} holds a single array, as np.save writes; write it with np.savez(x=..., y=...)")
        with arrays:
            for name in arrays.files:
                columns[name] = arrays[name]
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        words = " ".join(str(error).split())
        raise WorkloadError(f"{path} is no npz file of plain numbers: {words}") from None
    if not columns:
        raise WorkloadError(f"{path} holds no array")
    rows = {name: column.shape[0] if column.ndim else None for name, column in columns.items()}
    for name, column in columns.items():
        if column.dtype.kind not in "iufb":
            raise WorkloadError(f"{path}: array {name} is of {column.dtype}, not of real numbers; convert or drop it")
        if column.ndim not in (1, 2):
            raise WorkloadError(f"{path}: array {name} has {column.ndim} dimensions; give rows, or rows x features")
        if len(set(rows.values())) > 1:
            raise WorkloadError(
                f"{path}: arrays have unequally many rows: {', '.join(f'{n} {r}' for n, r in rows.items())}"
            )
        bad = np.argwhere(~np.isfinite(column))
        if len(bad):
            place = ", ".join(map(str, bad[0]))
            raise WorkloadError(
                f"{path}: {name}[{place}] is {column[tuple(bad[0])]}, no finite number; mend or drop it"
            )
    if set(rows.values()) == {0}:
        raise WorkloadError(f"{path}: its arrays have no rows")
    return {name: column.astype(np.float64) for name, column in columns.items()}
