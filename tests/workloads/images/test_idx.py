"""MNIST's file format: what is written is read, and whatever else is there is named."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from workloads.images import idx
from workloads.images.sources import TRAIN

IMAGES, LABELS = TRAIN
IMAGE_ARRAYS = arrays.arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(28), st.just(28)))
LABEL_ARRAYS = arrays.arrays(np.uint8, st.integers(1, 50), elements=st.integers(0, 9))


@given(IMAGE_ARRAYS, LABEL_ARRAYS)
def test_what_is_written_is_read(images: np.ndarray, labels: np.ndarray) -> None:
    np.testing.assert_array_equal(idx.array(idx.images_bytes(images), IMAGES), images)
    np.testing.assert_array_equal(idx.array(idx.labels_bytes(labels), LABELS), labels)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or None where it says on one line what is wrong; anything else fails the test."""
    try:
        return function(*arguments)
    except idx.IdxError as error:
        line = str(error)
    assert line
    assert len(line.splitlines()) == 1
    return None


@given(LABEL_ARRAYS, st.data())
def test_no_part_of_a_file_passes_for_it(labels: np.ndarray, data: st.DataObject) -> None:
    content = idx.labels_bytes(labels)
    cut = data.draw(st.integers(0, len(content) - 1))
    assert outcome(idx.array, content[:cut], LABELS) is None
    assert outcome(idx.array, content + b"\0" * (cut + 1), LABELS) is None


@given(IMAGE_ARRAYS, LABEL_ARRAYS, st.data())
def test_a_flipped_bit_is_told_or_is_in_one_item(images: np.ndarray, labels: np.ndarray, data: st.DataObject) -> None:
    """In the header it is always told; a pixel may be any number, which is why there are checksums as well."""
    for name, header, content, before in (
        (IMAGES, 16, idx.images_bytes(images), images),
        (LABELS, 8, idx.labels_bytes(labels), labels),
    ):
        place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        after = outcome(idx.array, bytes(flipped), name)
        if place < header:
            assert after is None
        elif after is not None:
            assert int((after != before).sum()) == 1


@given(st.binary(max_size=200), st.sampled_from(TRAIN))
def test_anything_else_is_refused_in_one_line(content: bytes, name: str) -> None:
    outcome(idx.array, content, name)
    outcome(idx.gunzip, content)


@given(LABEL_ARRAYS, st.data())
def test_a_damaged_gzip_file_is_told(labels: np.ndarray, data: st.DataObject) -> None:
    content = idx.labels_bytes(labels)
    packed = bytearray(gzip.compress(content, mtime=0))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    # Some bits of its header say nothing about the content.
    assert outcome(idx.gunzip, bytes(packed)) in (None, content)
    with pytest.raises(idx.IdxError):
        idx.gunzip(gzip.compress(content, mtime=0)[: data.draw(st.integers(0, 20))])


def images(count: int, rows: int = 28, columns: int = 28, magic: int = 2051, extra: int = 0) -> bytes:
    return struct.pack(">4I", magic, count, rows, columns) + bytes(count * rows * columns + extra)


@pytest.mark.parametrize(
    ("content", "name", "line"),
    [
        (b"", IMAGES, "is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", IMAGES, "is an HTML or XML page, not IDX"),
        (b"\n <?xml version='1.0'?><Error><Code>AccessDenied", LABELS, "is an HTML or XML page, not IDX"),
        (gzip.compress(images(1), mtime=0), IMAGES, "is still gzipped; its name must end in .gz"),
        (b"PK\x03\x04", IMAGES, "is not an IDX file of bytes: it begins with 50 4b 03 04, not 00 00 08 0x"),
        (images(1, magic=0xD03), IMAGES, "is not an IDX file of bytes: it begins with 00 00 0d 03, not 00 00 08 0x"),
        (images(1, magic=2049), IMAGES, "has the magic number 2049, that of labels; a file of images has 2051"),
        (images(1), LABELS, "has the magic number 2051, that of images; a file of labels has 2049"),
        (images(1, magic=2050), IMAGES, "has the magic number 2050; a file of images has 2051"),
        (images(1)[:11], IMAGES, "is truncated: 11 of the header's 16 bytes"),
        (images(2)[:-5], IMAGES, "is truncated: 1,579 of 1,584 bytes"),
        (images(2, extra=3), IMAGES, "has 3 bytes after its 2 images, which end at 1,584"),
        (images(1)[:4] + b"\xff" * 4 + images(1)[8:], IMAGES, "is truncated: 800 of 3,367,254,359,296 bytes"),
        (images(0), IMAGES, "holds no images"),
        (images(1, 32, 32), IMAGES, "holds images of 32 x 32, not 28 x 28"),
        (struct.pack(">2I", 2049, 4) + bytes([1, 2, 77, 3]), LABELS, "has label 77 at place 2; labels are 0 to 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # bytes of a file are no name
)  # fmt: skip
def test_says_what_is_wrong(content: bytes, name: str, line: str) -> None:
    with pytest.raises(idx.IdxError) as info:
        idx.count(content, name)
    assert str(info.value) == line


def test_says_what_is_wrong_with_a_gzip_file() -> None:
    packed = gzip.compress(images(3), mtime=0)
    for content, line in (
        (packed[:30], "is a gzip file that was cut off after 30 bytes"),
        (images(3), "is no sound gzip file (Not a gzipped file"),
        (packed[:-8] + bytes(8), "is no sound gzip file (CRC check failed"),
        (b"<html>", "is an HTML or XML page, not gzip"),
        (b"", "is empty"),
    ):
        with pytest.raises(idx.IdxError) as info:
            idx.gunzip(content)
        assert str(info.value).startswith(line)


def test_counts_must_agree() -> None:
    idx.check_pair(3, 3)
    with pytest.raises(idx.IdxError, match="holds 1,500 images, and its labels' file 1,499 labels"):
        idx.check_pair(1500, 1499)


def test_checking_needs_no_numpy() -> None:
    code = "import sys; from workloads.images import config, idx; idx.gunzip; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0
