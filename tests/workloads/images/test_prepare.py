"""Datasets that are made ready: whole, checked, once, and repaired; whoever else is at it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workloads.images.conftest import Small
from workloads.base import WorkloadError
from workloads.images import idx, sources
from workloads.images.config import ImageDataConfig
from workloads.images.prepare import CHECKSUMS_FILE, Prepared, UnavailableError, look, make_ready, plan, prepare
from workloads.images.sources import FILES, SOURCES, TEST, TRAIN

ROOT = Path(__file__).resolve().parents[3]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def images(source: str, root: Path | str, **settings: Any) -> ImageDataConfig:
    return ImageDataConfig.model_validate({"source": source, "root": str(root), **settings})


def refused(data: ImageDataConfig, **how: Any) -> str:
    with pytest.raises(WorkloadError) as info:
        make_ready(data, **how)
    assert len(str(info.value).splitlines()) == 1
    return str(info.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is made here


def test_digits_are_the_same_everywhere(tmp_path: Path) -> None:
    prepared = prepare(images("digits", tmp_path), tmp_path / "job")
    assert (prepared.source, prepared.train, prepared.test) == ("digits", 1500, 297)
    assert {name: prepared.files[name].sha256[:16] for name in FILES} == {
        "train-images-idx3-ubyte": "47204f1c4eab6ec1",
        "train-labels-idx1-ubyte": "b027d893f73a4dd3",
        "t10k-images-idx3-ubyte": "32644bdb031174a9",
        "t10k-labels-idx1-ubyte": "07bddb2cea817cc2",
    }


def test_digits_are_scikit_learns_enlarged(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits
    from torch import from_numpy
    from torch.nn.functional import interpolate

    make_ready(images("digits", tmp_path))
    raw = tmp_path / "Digits" / "raw"
    bunch = load_digits()
    enlarged = interpolate(from_numpy(bunch.images)[:, None], size=20, mode="bilinear", align_corners=False)[:, 0]
    held_out = np.floor(np.linspace(0, 1797, 297, endpoint=False) + 1e-9).astype(int)
    rest = [number for number in range(1797) if number not in held_out]
    for part, (image_file, label_file) in ((rest, TRAIN), (held_out, TEST)):
        pixels = idx.array((raw / image_file).read_bytes(), image_file)
        np.testing.assert_array_equal(idx.array((raw / label_file).read_bytes(), label_file), bunch.target[part])
        assert np.abs(pixels[:, 4:24, 4:24] - enlarged[part].numpy() * 255 / 16).max() < 0.5 + 1e-6
        frame = np.ones((28, 28), bool)
        frame[4:24, 4:24] = False
        assert not pixels[:, frame].any()


def test_fake_is_the_same_everywhere(tmp_path: Path) -> None:
    prepared = make_ready(images("fake", tmp_path))
    assert (prepared.train, prepared.test) == (2048, 512)
    digests = [prepared.files[name].sha256[:16] for name in FILES]
    assert digests == ["9cb0471a6b297fc3", "830f3e52859c00ec", "18c5c92db3e22f6d", "10d09fa54917ecf4"]
    labels = idx.array((tmp_path / "Fake" / "raw" / TRAIN[1]).read_bytes(), TRAIN[1])
    assert set(labels.tolist()) == set(range(10))


def test_what_an_earlier_version_made_and_vouched_for_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    today = make_ready(images("fake", tmp_path))
    raw = tmp_path / "Fake" / "raw"
    flip(raw / TRAIN[0])
    record = json.loads((raw / CHECKSUMS_FILE).read_text())
    record["files"][TRAIN[0]]["sha256"] = hashlib.sha256((raw / TRAIN[0]).read_bytes()).hexdigest()
    (raw / CHECKSUMS_FILE).write_text(json.dumps(record))
    assert "not the one that is made here; preparing makes it" in plan(images("fake", tmp_path))
    assert make_ready(images("fake", tmp_path)) == today
    assert len(caplog.messages) == 1


def test_auto_takes_digits_that_are_there_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake error in a read-only file system's place: root, who runs these tests in CI, may write anywhere."""
    make_ready(images("digits", tmp_path))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".preparing"))

    monkeypatch.setattr("workloads.images.prepare._folder_beside", refuse)
    prepared = make_ready(images("auto", tmp_path))
    assert prepared.source == "digits"
    assert f"as MNIST could not be had: {tmp_path}/.preparing: Permission denied" in prepared.why
    with pytest.raises(WorkloadError, match=r"give a data\.root that can be written to"):
        make_ready(images("auto", tmp_path / "empty"))


def test_a_damaged_file_whose_packed_one_is_right_is_unpacked_anew(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As torchvision leaves them: both, and no record."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        (raw / name).write_bytes(small.raw[name])
        (raw / f"{name}.gz").write_bytes(gzip.compress(small.raw[name]))
    flip(raw / TEST[0])
    assert make_ready(images("mnist", tmp_path), download=False).source == "mnist"
    assert (raw / TEST[0]).read_bytes() == small.raw[TEST[0]]
    assert len(caplog.messages) == 1
    assert f"{raw / TEST[0]} is a sound file of 297, but its md5 is not MNIST's; it is made good" in caplog.messages[0]


def test_what_is_there_is_used_as_it_is(tmp_path: Path) -> None:
    make_ready(images("fake", tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "Fake" / "raw").iterdir()}
    assert {path.name for path in before} == {*FILES, CHECKSUMS_FILE}
    make_ready(images("fake", tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "Fake" / "raw").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["Fake"]


def test_others_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        make_ready(images("fake", tmp_path / "new"))
    finally:
        os.umask(before)
    for path in (tmp_path / "new").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, r"is truncated: 2,055 of 2,056 bytes"),
    "flipped": (flip, r"is corrupt: its sha256 is not the one in checksums\.json"),
    "empty": (lambda path: path.write_bytes(b""), r"is empty"),
    "page": (lambda path: path.write_bytes(b"<html>"), r"is an HTML or XML page, not IDX"),
    "gone": (Path.unlink, r"is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_repaired(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_ready(images("fake", tmp_path))
    raw = tmp_path / "Fake" / "raw"
    good = contents(raw)
    break_it, words = DAMAGES[damage]
    break_it(raw / TRAIN[1])
    assert re.search(rf"{TRAIN[1]} {words}; preparing makes it$", plan(images("fake", tmp_path)))
    make_ready(images("fake", tmp_path))
    assert [
        re.search(rf"^{raw / TRAIN[1]} {words}; it is made anew$", line) is not None for line in caplog.messages
    ] == [True]
    assert contents(raw) == good
    caplog.clear()
    make_ready(images("fake", tmp_path))
    assert not caplog.messages


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"files": {"a": 1}}', b'{"files": 3}', b"\xff\xfe"])
def test_a_record_that_is_none_is_made_anew(record: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_ready(images("fake", tmp_path))
    path = tmp_path / "Fake" / "raw" / CHECKSUMS_FILE
    good = path.read_bytes()
    path.write_bytes(record)
    make_ready(images("fake", tmp_path))
    assert "is no record of checksums" in caplog.text
    assert path.read_bytes() == good


def test_files_without_a_record_that_are_others_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_ready(images("fake", tmp_path))
    raw = tmp_path / "Fake" / "raw"
    (raw / CHECKSUMS_FILE).unlink()
    make_ready(images("fake", tmp_path))
    assert not caplog.messages  # they are what would be made
    (raw / CHECKSUMS_FILE).unlink()
    flip(raw / TEST[1])
    make_ready(images("fake", tmp_path))
    assert caplog.messages == [f"{raw / TEST[1]} is a sound file, but not the one that is made here; it is made anew"]


def test_folders_that_a_killed_process_left_do_no_harm_and_go_after_a_day(tmp_path: Path) -> None:
    for name, hours in (("half", 1), ("old", 30)):
        folder = tmp_path / f".preparing-Fake-{name}"
        folder.mkdir()
        (folder / TRAIN[0]).write_bytes(b"half")
        os.utime(folder, times=(time.time() - hours * 3600,) * 2)
    make_ready(images("fake", tmp_path))
    assert look(SOURCES["fake"], tmp_path).recorded
    assert {path.name for path in tmp_path.iterdir()} == {"Fake", ".preparing-Fake-half"}


def test_what_is_made_otherwise_than_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a scikit-learn whose digits are others."""
    files = sources.fake()
    files[TEST[0]] = files[TEST[0]][:-1] + bytes([files[TEST[0]][-1] ^ 1])
    monkeypatch.setattr(sources, "make", lambda source: files)
    line = refused(images("fake", tmp_path))
    md5 = hashlib.md5(files[TEST[0]]).hexdigest()
    assert re.search(rf"{TEST[0]}, as it was just made, is not .*: its md5 is {md5}, and not 5e29450e", line)
    assert not list(tmp_path.iterdir())


# ---- what the user put there


@pytest.mark.parametrize("packed", [False, True])
def test_files_put_there_by_hand_are_adopted(packed: bool, small: Small, tmp_path: Path) -> None:
    raw = small.put(tmp_path, packed=packed)
    assert plan(images("auto", tmp_path)).startswith("MNIST (1,500 handwritten digits to train on, 297 held out)")
    prepared = make_ready(images("auto", tmp_path), download=False)
    assert prepared.source == "mnist"
    record = json.loads((raw / CHECKSUMS_FILE).read_text())
    assert record["files"][TRAIN[0]] == {
        "bytes": len(small.raw[TRAIN[0]]),
        "sha256": hashlib.sha256(small.raw[TRAIN[0]]).hexdigest(),
    }
    assert {name: (raw / name).read_bytes() for name in FILES} == small.raw
    assert look(SOURCES["mnist"], tmp_path).recorded


def test_a_damaged_file_is_made_good_from_the_packed_one_beside_it(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = small.put(tmp_path)
    cut(raw / TRAIN[0])
    (raw / f"{TRAIN[0]}.gz").write_bytes(small.gz[TRAIN[0]])
    make_ready(images("mnist", tmp_path), download=False)
    assert f"{raw / TRAIN[0]} is truncated: 1,176,015 of 1,176,016 bytes; it is made good from what is" in caplog.text
    assert (raw / TRAIN[0]).read_bytes() == small.raw[TRAIN[0]]


def test_another_packing_of_the_same_files_is_the_same(small: Small, tmp_path: Path) -> None:
    raw = small.put(tmp_path, packed=True)
    (raw / f"{TRAIN[0]}.gz").write_bytes(gzip.compress(small.raw[TRAIN[0]], compresslevel=1))
    make_ready(images("mnist", tmp_path), download=False)


def test_files_that_are_something_else_stay_as_they_are(small: Small, tmp_path: Path) -> None:
    raw = small.put(tmp_path)
    flip(raw / TEST[0])
    before = contents(raw)
    line = refused(images("mnist", tmp_path))
    assert f"{raw / TEST[0]} is a sound file of 297, but its md5 is not MNIST's; move it away" in line
    assert make_ready(images("auto", tmp_path)).why.endswith(
        f"as MNIST could not be had: {raw / TEST[0]} is a sound file of 297, but its md5 is not MNIST's"
    )
    assert contents(raw) == before
    assert plan(images("auto", tmp_path)).endswith("preparing uses digits")
    assert plan(images("mnist", tmp_path)).endswith("preparing refuses it")
    labels = np.zeros(296, np.uint8)
    (raw / TEST[1]).write_bytes(idx.labels_bytes(labels))
    assert f"{raw / TEST[0]} holds 297 images, and its labels' file 296 labels" in refused(images("mnist", tmp_path))


def test_a_damaged_file_without_network_is_named(small: Small, tmp_path: Path) -> None:
    raw = small.put(tmp_path)
    cut(raw / TRAIN[0])
    line = refused(images("mnist", tmp_path))
    assert f"{raw / TRAIN[0]} is truncated: 1,176,015 of 1,176,016 bytes; no download: http://127.0.0.1:9/: " in line
    line = refused(images("mnist", tmp_path), download=False)
    assert "1,176,015 of 1,176,016 bytes; nothing may be downloaded from here" in line
    assert "is truncated" in make_ready(images("auto", tmp_path)).announcement


def test_a_dataset_where_nothing_can_be_written_is_good_as_it_is(small: Small, tmp_path: Path) -> None:
    """One that an administrator keeps for all: it is checked each time. No file may have a byte here."""
    raw = small.put(tmp_path)
    code = (
        "import dataclasses, json, resource, sys\n"
        "from workloads.images import prepare, sources\n"
        "mnist = dataclasses.replace(sources.SOURCES['mnist'], md5=json.loads(sys.argv[2]))\n"
        "sources.SOURCES['mnist'] = mnist\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "sys.exit(prepare.main(['data.source=mnist', f'data.root={sys.argv[1]}']))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(dict(SOURCES["mnist"].md5))]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"{raw} cannot be written (File too large): its files are checked anew each time" in done.stderr
    assert done.stdout.startswith("data: MNIST (1,500 handwritten digits")
    assert {path.name for path in raw.iterdir()} == set(FILES)


def test_without_a_download_the_network_is_not_touched(small: Small, tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "def never(*a, **k): raise SystemExit('the network was touched')\n"
        "socket.socket.connect = socket.getaddrinfo = never\n"
        "from pathlib import Path\n"
        "from workloads.images.config import ImageDataConfig\n"
        "from workloads.images.prepare import prepare\n"
        "prepare(ImageDataConfig(root=sys.argv[1]), Path(sys.argv[1], 'job'), download=False)\n"
        "sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=ENV, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    prepared = Prepared.read(tmp_path / "job")
    assert prepared is not None
    assert prepared.announcement.endswith(
        f"as MNIST could not be had: it is not in {tmp_path}/MNIST/raw; nothing may be downloaded from here"
    )


# ---- several at once

AT_ONCE = """
import logging, sys
from pathlib import Path
from workloads.images.config import ImageDataConfig
from workloads.images.prepare import prepare
logging.disable()
for line in sys.stdin:
    source, root = line.split()
    prepared = prepare(ImageDataConfig(source=source, root=root), Path(root, "job"))
    print(prepared.files["train-images-idx3-ubyte"].sha256, flush=True)
"""


def test_processes_that_prepare_at_once_do_no_harm_to_each_other(tmp_path: Path) -> None:
    good = {}
    for source in ("fake", "digits"):
        make_ready(images(source, tmp_path / source))
        good[source] = contents(SOURCES[source].raw(tmp_path / source))
    workers = [
        subprocess.Popen([sys.executable, "-c", AT_ONCE], env=ENV, text=True, stdin=-1, stdout=-1) for _ in range(3)
    ]
    try:
        for number, source in enumerate(("fake", "digits", "digits") * 6):
            root = tmp_path / f"round-{number}"
            raw = SOURCES[source].raw(root)
            if number % 2:
                shutil.copytree(tmp_path / source, root)
                for name, damage in zip(FILES, (cut, flip, Path.unlink, lambda path: None), strict=True):
                    damage(raw / FILES[(FILES.index(name) + number) % 4])
            for worker in workers:
                assert worker.stdin
                worker.stdin.write(f"{source} {root}\n")
                worker.stdin.flush()
            answers = {worker.stdout.readline() for worker in workers if worker.stdout}
            assert answers == {hashlib.sha256(good[source][TRAIN[0]]).hexdigest() + "\n"}
            assert contents(raw) == good[source]
            assert {path.name for path in root.iterdir()} == {SOURCES[source].folder, "job"}
            assert [path.name for path in (root / "job").iterdir()] == ["images.json"]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_who_looks_meanwhile_sees_whole_files(tmp_path: Path) -> None:
    make_ready(images("fake", tmp_path))
    raw = tmp_path / "Fake" / "raw"
    good = contents(raw)[TRAIN[0]]
    seen: set[bytes] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.add((raw / TRAIN[0]).read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):
        other = tmp_path / "other"
        other.write_bytes(good[:-1] + b"\0")
        other.replace(raw / TRAIN[0])  # whole, and wrong
        make_ready(images("fake", tmp_path))
    over.set()
    watcher.join()
    assert seen <= {good, good[:-1] + b"\0"}


# ---- where it cannot be written


def test_a_root_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "taken" / "Fake").mkdir(parents=True)
    (tmp_path / "taken" / "Fake" / "raw").write_text("")
    for root, words in (
        (tmp_path / "file", r"File exists|Not a directory"),
        (tmp_path / "file" / "below", r"Not a directory"),
        (tmp_path / "loop", r"Too many levels of symbolic links|File exists"),
        (tmp_path / "taken", r"File exists|Not a directory"),
        ("/proc/nowhere", r"No such file or directory|Permission denied"),
        ("/sys/nowhere", r"Operation not permitted|Read-only file system|Permission denied"),
    ):
        for source in ("fake", "auto"):
            line = refused(images("fake", root), download=source == "auto")
            assert re.search(rf"^data\.root={root}: .*({words}); (give a|.* another) data\.root", line), line
            assert ("is in the way: move it" in line) == bool(re.search("exists|Not a directory", line)), line
            assert "\n" not in plan(images(source, root))
    assert "there is no such home directory" in refused(images("fake", "~nobody-of-this-name/data"))


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path: Path) -> None:
    for number, name in enumerate((TRAIN[0], f"{TEST[1]}.gz", CHECKSUMS_FILE)):
        raw = tmp_path / str(number) / "Fake" / "raw"
        raw.mkdir(parents=True)
        os.mkfifo(raw / name)
        line = refused(images("fake", tmp_path / str(number)))
        assert line.endswith(f"{raw / name} is not a regular file; move it, or give another data.root")


def test_a_root_of_another_user(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o555)
    try:
        assert "Permission denied; give a data.root that can be written to" in refused(images("fake", tmp_path))
    finally:
        tmp_path.chmod(0o755)


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    """Files may not grow beyond a limit here; a disk that is full refuses at the same place."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from workloads.images.prepare import main\n"
        "sys.exit(main(['data.source=fake', f'data.root={sys.argv[1]}']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=ENV, capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: data\.root={tmp_path}: .*: File too large; give a data\.root that can be written to and has room\n",
        done.stderr,
    )
    assert not list(tmp_path.iterdir())


def test_a_job_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("")
    with pytest.raises(WorkloadError, match=rf"^{tmp_path}/job/images.json cannot be written: "):
        prepare(images("fake", tmp_path / "data"), tmp_path / "job")


# ---- the word that is left for the ranks


def test_nothing_was_prepared(tmp_path: Path) -> None:
    assert Prepared.read(tmp_path) is None
    assert Prepared.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"source": "x", "files": {}}', "null"])
def test_a_word_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text(text)
    with pytest.raises(WorkloadError, match=r"images\.json is not what preparing a dataset writes .*: submit again$"):
        Prepared.read(tmp_path)


def test_a_relative_root_is_of_the_directory_where_the_line_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare(images("fake", "data"), tmp_path / "job").root == tmp_path / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_ready(images("fake", "~/data")).root == tmp_path / "data"


# ---- looking, and by hand


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    lines = {source: plan(images(source, root)) for source in ("auto", "mnist", "fashion_mnist", "digits", "fake")}
    assert lines == {
        "auto": f"MNIST: not in {root}/MNIST/raw yet; preparing downloads it or, where it cannot be had, uses digits",
        "mnist": f"MNIST: not in {root}/MNIST/raw yet; preparing downloads it",
        "fashion_mnist": f"Fashion-MNIST: not in {root}/FashionMNIST/raw yet; preparing downloads it",
        "digits": f"digits: not in {root}/Digits/raw yet; preparing makes it",
        "fake": f"fake: not in {root}/Fake/raw yet; preparing makes it",
    }
    assert not list(tmp_path.iterdir())
    prepared = make_ready(images("fake", root))
    assert plan(images("fake", root)) == prepared.why


def test_importing_and_planning_stay_light() -> None:
    code = (
        "import sys\n"
        "from workloads.images.prepare import plan\n"
        "from workloads.images.config import ImageDataConfig\n"
        "plan(ImageDataConfig())\n"
        "print(*sorted({'torch', 'torchvision', 'sklearn', 'numpy', 'jobs'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout == "\n"


def by_hand(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workloads.images.prepare", *words]
    return subprocess.run(command, env=ENV, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_by_hand(tmp_path: Path) -> None:
    done = by_hand("data.source=fake", "data.root=here", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"data: fake (2,048 images of noise to train on, 512 held out) in {tmp_path}/here/Fake/raw\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.sorce=mnist"], r"'data\.sorce': no such setting \(did you mean 'data\.source'\?\); known: "),
        (["source=mnist"], r"'source': no such setting \(did you mean 'data\.source'\?\); known: data\.source, data\."),
        (["mnist"], r"'mnist': expected key=value \(data\.source=\.\.\.\)"),
        (["data.source=cifar"], r"data\.source=cifar: Input should be 'auto', 'mnist', "),
        (["data.root="], r"data\.root=: String should have at least 1 character"),
        (["data.download_timeout_s=3600"], r"data\.download_timeout_s=3600: Input should be less than or equal"),
        (["data.download_timeout_s=0"], r"data\.download_timeout_s=0: Input should be greater than 0"),
        (["data.source=fake", "data.source=fake"], r"data\.source is given twice on the command line; keep one"),
    ],
)  # fmt: skip
def test_a_mistake_by_hand_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    from workloads.images.prepare import main

    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(f"error: {line}", err)
    assert len(err.splitlines()) == 1


def test_unavailable_is_an_error_of_the_users() -> None:
    assert issubclass(UnavailableError, WorkloadError)
