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
import torch

from tests.workloads.images.test_prepare import ENV, cut, flip, images
from workloads.base import WorkloadError
from workloads.images.datasets import images_labels, open_split
from workloads.images.prepare import Prepared, make_ready
from workloads.images.sources import TEST, TRAIN
from workloads.images.vision import torchvision


@pytest.fixture
def fake(tmp_path: Path) -> Prepared:
    return make_ready(images("fake", tmp_path / "data"))


@pytest.mark.parametrize("source", ["digits", "fake"])
def test_torchvision_reads_what_was_written(source: str, tmp_path: Path) -> None:
    prepared = make_ready(images(source, tmp_path))
    for train in (True, False):
        dataset = open_split(prepared, train, torchvision().transforms.ToTensor())
        assert isinstance(dataset, torchvision().datasets.MNIST)
        pixels, labels = images_labels(prepared, train)
        assert len(dataset) == len(pixels) == len(labels) == (prepared.train if train else prepared.test)
        assert pixels.dtype == labels.dtype == np.uint8
        for number in (0, len(dataset) - 1):
            image, label = dataset[number]
            assert label == labels[number]
            torch.testing.assert_close(image, torch.from_numpy(pixels[number].copy()).float()[None] / 255)


@pytest.mark.parametrize("folder", ["MNIST", "FashionMNIST"])
def test_the_classes_are_where_torchvision_looks(folder: str, tmp_path: Path) -> None:
    """Files of the one in the place of the other: only the place matters here."""
    prepared = make_ready(images("fake", tmp_path))
    shutil.copytree(tmp_path / "Fake", tmp_path / folder)
    source = {"MNIST": "mnist", "FashionMNIST": "fashion_mnist"}[folder]
    moved = Prepared(source, prepared.root, "", prepared.train, prepared.test, prepared.files)
    theirs = getattr(torchvision().datasets, folder)
    dataset = open_split(moved, False)
    assert isinstance(dataset, theirs)
    assert torch.equal(dataset.data, theirs(tmp_path, train=False).data)
    assert dataset.classes == theirs.classes


def test_files_of_an_old_torchvision_are_not_preferred(tmp_path: Path) -> None:
    prepared = make_ready(images("fake", tmp_path))
    processed = tmp_path / "Fake" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), processed / name)
    assert len(open_split(prepared, True)) == 2048


def test_a_worker_process_may_unpickle_it(fake: Prepared) -> None:
    code = "import pickle, sys; print(len(pickle.load(sys.stdin.buffer)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(open_split(fake, False)),
        env=ENV,
        capture_output=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, b"512\n"), done.stderr


def line(prepared: Prepared, train: bool = True) -> str:
    lines = set()
    for opener in (open_split, images_labels):
        with pytest.raises(WorkloadError) as info:
            opener(prepared, train)
        lines.add(str(info.value))
    (only,) = lines
    assert len(only.splitlines()) == 1
    return only


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
    assert len(open_split(fake, True)) == 2048
    assert len(open_split(fake, False)) == 512


def test_a_root_that_this_host_does_not_see(fake: Prepared, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert f"data.root={tmp_path / 'data'} is not there on {socket.gethostname()}: every host must see it" in line(fake)


def test_arrays_need_no_torchvision(fake: Prepared, tmp_path: Path) -> None:
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
