"""What a rank opens is what was prepared, or one line says what it is instead."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.workloads.images.test_prepare import ENV, cut, flip, images
from workloads.base import WorkloadError
from workloads.images import sources
from workloads.images.datasets import images_labels
from workloads.images.prepare import Prepared, make_ready
from workloads.images.sources import SOURCES, TEST, TRAIN


@pytest.fixture
def fake(tmp_path: Path) -> Prepared:
    return make_ready(images("fake", tmp_path / "data"))


@pytest.mark.parametrize("source", ["digits", "fake"])
def test_both_parts_are_as_they_were_made(source: str, tmp_path: Path) -> None:
    prepared = make_ready(images(source, tmp_path))
    made = sources.make(SOURCES[source])
    for train, (of_images, of_labels) in ((True, TRAIN), (False, TEST)):
        pixels, labels = images_labels(prepared, train)
        assert pixels.shape == ((prepared.train if train else prepared.test), 28, 28)
        assert pixels.dtype == labels.dtype == np.uint8
        assert (pixels.tobytes(), labels.tobytes()) == (made[of_images][16:], made[of_labels][8:])


@pytest.mark.parametrize("source", ["digits", "mnist", "fashion_mnist"])
def test_torchvision_reads_them_where_it_is_installed(source: str, tmp_path: Path) -> None:
    """Files of the one in the place of the other: only the place and the format matter here."""
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed beside this torch")
    prepared = make_ready(images("fake", tmp_path))
    folder = SOURCES[source].folder
    shutil.copytree(tmp_path / "Fake", tmp_path / folder, dirs_exist_ok=True)
    theirs = getattr(datasets, folder, type("Digits", (datasets.MNIST,), {}))(tmp_path, train=False)
    pixels, labels = images_labels(prepared, False)
    assert np.array_equal(theirs.data.numpy(), pixels)
    assert np.array_equal(theirs.targets.numpy(), labels)


def line(prepared: Prepared, train: bool = True) -> str:
    with pytest.raises(WorkloadError) as info:
        images_labels(prepared, train)
    assert len(str(info.value).splitlines()) == 1
    return str(info.value)


def test_what_changed_since_is_named(fake: Prepared, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "Fake" / "raw"
    again, host = "submitting again repairs it", socket.gethostname()
    flip(raw / TRAIN[0])
    assert line(fake) == (
        f"{raw / TRAIN[0]} is corrupt on {host}: its sha256 is not what it was when the job was prepared: {again}"
    )
    images_labels(fake, False)
    cut(raw / TEST[1])
    assert line(fake, False) == (
        f"{raw / TEST[1]} is truncated on {host}: 519 bytes, and 520 when the job was prepared: {again}"
    )
    (raw / TEST[1]).write_bytes(bytes(521))
    assert f"{raw / TEST[1]} is too long on {host}: 521 bytes" in line(fake, False)
    (raw / TEST[1]).unlink()
    assert f"{raw / TEST[1]} is missing on {host}, and was there when the job was prepared: {again}" in line(
        fake, False
    )
    make_ready(images("fake", tmp_path / "data"))
    assert len(images_labels(fake, True)[0]) == 2048
    assert len(images_labels(fake, False)[0]) == 512


def test_a_root_that_this_host_does_not_see(fake: Prepared, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert f"data.root={tmp_path / 'data'} is not there on {socket.gethostname()}: every host must see it" in line(fake)


def test_arrays_need_no_torch(fake: Prepared) -> None:
    code = (
        "import pickle, sys\n"
        "from workloads.images.datasets import images_labels\n"
        "images_labels(pickle.load(sys.stdin.buffer), True)\n"
        "print(*sorted({'torch', 'torchvision', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(fake), env=ENV, capture_output=True, timeout=240, check=True
    )
    assert done.stdout == b"\n"
