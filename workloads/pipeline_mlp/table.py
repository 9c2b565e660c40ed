"""A user's table, CSV or npz, checked strictly: whatever is wrong with it is one line, with the place. Torch-free."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workloads.base import WorkloadError
from workloads.errors import did_you_mean
from workloads.pipeline_mlp.config import check_file
from workloads.whole_files import written_beside

SHOWN = 40
"""Characters of a value or name that a message quotes."""

WRITE_NPZ = "write it with np.savez(file, x=..., y=...)"

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
        """Whole or not at all: whoever finds the file can read it."""
        with written_beside(path) as beside, beside.open("wb") as file:
            np.savez(file, features=self.features, target=self.target, names=self.names, predicted=self.predicted)

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
    try:
        check_file(path)
        columns = _csv(path) if path.suffix.lower() == ".csv" else _npz(path)
    except OSError as error:
        raise WorkloadError(f"data.path={path} cannot be read: {error.strerror or error}") from None
    if target not in columns:
        hint = did_you_mean(_plain(target), map(_plain, columns))
        shown = ", ".join(map(_plain, list(columns)[:20])) + (", ..." if len(columns) > 20 else "")
        raise WorkloadError(f"data.target={_plain(target)}: {path} has no such column{hint}; it has {shown}")
    y = columns.pop(target)
    target_word = _plain(target)
    if not columns:
        raise WorkloadError(f"{path} has only the column {target_word}, and nothing to predict it from; add another")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise WorkloadError(
            f"data.target={target_word} in {path} is of shape {list(y.shape)}; one number a row is predicted"
        )
    if len(y) < 2:
        raise WorkloadError(f"{path} has 1 row: one to train on and one to hold out is the least there is; add rows")
    names = [
        name if column.ndim == 1 else f"{name}[{index}]"
        for name, column in columns.items()
        for index in range(1 if column.ndim == 1 else column.shape[1])
    ]
    if not names:
        raise WorkloadError(f"{path} has no feature beside {target_word}; add a column")
    features = np.column_stack([column.reshape(len(y), -1) for column in columns.values()])
    _check_scale(path, names, features)
    _check_scale(path, [target], y[:, None])
    if np.ptp(y) == 0:
        raise WorkloadError(f"data.target={target_word} in {path} is {y[0]:g} in every row: there is nothing to learn")
    return Table(features, y, tuple(names), target)


def _check_scale(path: Path, names: Sequence[str], values: np.ndarray) -> None:
    """Whether each column can be shifted and scaled: the squares in a deviation are the first to leave fp64's range."""
    with np.errstate(all="ignore"):
        mean, deviation, spread = values.mean(axis=0), values.std(axis=0), np.ptp(values, axis=0)
    wrong = ~np.isfinite(mean) | ~np.isfinite(deviation) | ((deviation == 0) & (spread > 0))
    if wrong.any():
        name = _plain(names[int(np.argmax(wrong))])
        raise WorkloadError(f"{path}: column {name}: its mean or deviation is beyond fp64; rescale it")


def _plain(text: str) -> str:
    """Text out of a file on one line, and not more of it than helps to find it."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")[1:-1]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _csv(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            lines = (row for row in reader if len(row) > 1 or any(text.strip() for text in row))
            header = [name.strip() for name in next(lines, [])]
            _check_header(path, header)
            rows = [_numbers(path, header, row, reader.line_num) for row in lines]
        except UnicodeDecodeError as error:
            raise WorkloadError(f"{path} is no CSV file in UTF-8: {error}; save it as UTF-8") from None
        except csv.Error as error:
            raise WorkloadError(
                f"{path}, line {reader.line_num}: is no CSV: {error}; is there a quote that is not closed?"
            ) from None
    if not rows:
        raise WorkloadError(f"{path} has a header and no rows; add a row for each sample")
    values = np.array(rows, dtype=np.float64)
    return {name: values[:, index] for index, name in enumerate(header)}


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not header:
        raise WorkloadError(f"{path} is empty; the first line of a CSV file names its columns")
    for number, name in enumerate(header, start=1):
        if not name:
            raise WorkloadError(f"{path}: column {number} has no name in the first line; give it one")
        if header.index(name) != number - 1:
            raise WorkloadError(f"{path}: two columns are called {_plain(name)}; name them differently")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        raise WorkloadError(
            f"{path}: the first line '{_plain(header[0])}' has no commas; columns are separated by commas"
        )
    if all(_number(name) is not None for name in header):
        raise WorkloadError(f"{path}: the first line has only numbers; it has to name the columns")


def _numbers(path: Path, header: Sequence[str], row: Sequence[str], line: int) -> list[float]:
    if len(row) != len(header):
        raise WorkloadError(
            f"{path}, line {line}: {_count(len(row), 'value')} for {_count(len(header), 'column')}; give each row one "
            "value a column"
        )
    numbers = []
    for name, text in zip(header, row, strict=True):
        number = _number(text)
        if number is None or not math.isfinite(number):
            said = f"'{_plain(text)}' is no finite number" if text.strip() else "is empty"
            raise WorkloadError(f"{path}, line {line}, column {_plain(name)}: {said}; mend or drop the row")
        numbers.append(number)
    return numbers


def _number(text: str) -> float | None:
    # Python would take 1_000, and digits of any script; in a table they are slips.
    if "_" in text or not text.isascii():
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise WorkloadError(f"{path} is no npz file; {WRITE_NPZ}")
    given = _arrays(path)
    if not given:
        raise WorkloadError(f"{path} holds no array; {WRITE_NPZ}")
    for name, column in given.items():
        word = f"{path}: array {_plain(name)}"
        if column.dtype.kind not in "iufb":
            raise WorkloadError(f"{word} is of {column.dtype}, not of real numbers; convert or drop it")
        if column.ndim == 0:
            raise WorkloadError(f"{word} is a single number and has no rows; give one value a row, or drop it")
        if column.ndim > 2:
            raise WorkloadError(f"{word} has {column.ndim} dimensions; give rows, or rows x features")
    if len({len(column) for column in given.values()}) > 1:
        rows = ", ".join(f"{_plain(name)} {len(column)}" for name, column in given.items())
        raise WorkloadError(f"{path}: arrays have unequally many rows: {rows}; give all of them the same rows")
    if not len(next(iter(given.values()))):
        raise WorkloadError(f"{path}: its arrays have no rows; add a row for each sample")
    columns = {}
    for name, column in given.items():
        with np.errstate(over="ignore"):  # a longdouble can be beyond fp64
            columns[name] = column.astype(np.float64)
        bad = np.argwhere(~np.isfinite(columns[name]))
        if len(bad):
            place = ", ".join(map(str, bad[0]))
            value = column[tuple(bad[0])]
            what = "beyond fp64" if np.isfinite(value) else "no finite number"
            raise WorkloadError(f"{path}: {_plain(name)}[{place}] is {value!s}, {what}; mend or drop it")
    return columns


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """By name, as they are in a file that is a zip archive, whatever it is of."""
    arrays: dict[str, np.ndarray] = {}
    name = ""
    try:
        with np.load(path, allow_pickle=False) as members:
            for name in members.files:
                arrays[name] = members[name]
    except OSError:
        raise
    except Exception as error:  # a damaged archive makes zipfile, its decoders and numpy raise nearly anything
        words = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in words:
            words = f"array {_plain(name)} is of Python objects"
        raise WorkloadError(f"{path} cannot be read as an npz file of plain numbers: {words}; {WRITE_NPZ}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise WorkloadError(f"{path}: {_plain(name)} is no array; {WRITE_NPZ}")
    return arrays
