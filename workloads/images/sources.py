"""The datasets, by the name that data.source gives them: where their files lie, and how digits and fake are made.

All have torchvision's layout, `ROOT/CLASS/raw/` with four IDX files, and `torchvision.datasets.MNIST(ROOT)` reads them.
torchvision itself is not needed: its wheels on PyPI are built for CUDA, and fail beside a CPU build of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.base import WorkloadError
from workloads.images import idx

if TYPE_CHECKING:
    import numpy as np

TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
FILES = TRAIN + TEST


@dataclass(frozen=True)
class Source:
    """One dataset.

    Attributes:
        name: what data.source calls it.
        folder: its folder in data.root, which torchvision names after its class.
        title: what announcements call it.
        words: what its images are.
        train: images to train on.
        test: images held out.
        mirrors: addresses of folders that have its files, gzipped; none: it is made here.
        md5: of each file, unpacked: as published, or as it is made here.
    """

    name: str
    folder: str
    title: str
    words: str
    train: int
    test: int
    mirrors: tuple[str, ...]
    md5: Mapping[str, str]

    @property
    def downloaded(self) -> bool:
        """Whether it comes from the network."""
        return bool(self.mirrors)

    def raw(self, root: Path) -> Path:
        """The directory of its files."""
        return root / self.folder / "raw"


# The mirrors are torchvision's. The sums are of the unpacked files; several public projects that are independent of
# each other list these same ones.
SOURCES = {
    source.name: source
    for source in (
        Source(
            "mnist",
            "MNIST",
            "MNIST",
            "handwritten digits",
            60_000,
            10_000,
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
            {
                "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
                "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
                "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
                "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
            },
        ),
        Source(
            "fashion_mnist",
            "FashionMNIST",
            "Fashion-MNIST",
            "pieces of clothing",
            60_000,
            10_000,
            ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            {
                "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
                "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
                "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
            },
        ),
        Source(
            "digits",
            "Digits",
            "digits",
            "handwritten digits from scikit-learn",
            1500,
            297,
            (),
            {
                "train-images-idx3-ubyte": "4ce5abed09c8be1a25d3305a71d08191",
                "train-labels-idx1-ubyte": "453d1ac5e77eac09cc896f1801b596aa",
                "t10k-images-idx3-ubyte": "5a7f6d7a5c4819cf48463c1b67e8e287",
                "t10k-labels-idx1-ubyte": "c394a13817bddf5774c1464b9108639e",
            },
        ),
        Source(
            "fake",
            "Fake",
            "fake",
            "images of noise",
            2048,
            512,
            (),
            {
                "train-images-idx3-ubyte": "f69368faf87f0132fb2c2ed58bc8bf00",
                "train-labels-idx1-ubyte": "1bf8a4f2225a8e53d610c943dedc9c12",
                "t10k-images-idx3-ubyte": "5e29450e2e9eab683869ebcdd7a85aff",
                "t10k-labels-idx1-ubyte": "c7b5bbf009ed25124530aef41e9de712",
            },
        ),
    )
}

MEAN_AND_STD = {
    "mnist": (0.1307, 0.3081),
    "fashion_mnist": (0.2860, 0.3530),
    "digits": (0.1307, 0.3081),
    "fake": (0.1307, 0.3081),
}
"""Of the training pixels, in units of the full scale; MNIST's also for what stands in its place."""


def make(source: Source) -> dict[str, bytes]:
    """The four files of a dataset that is made here, always the same to the byte.

    Raises:
        WorkloadError: scikit-learn is needed and missing.
    """
    return {"digits": digits, "fake": fake}[source.name]()


def digits() -> dict[str, bytes]:
    """scikit-learn's 1,797 digits: 297 of them, evenly spread over its order, are held out, and 1,500 to train on.

    The 13 people who wrote them follow one another there: so everybody is in both parts, and accuracy is that on new
    digits of known hands. (On the last 297, of hands never seen, a small network's is 4 to 5 points lower.)

    Each is 8 x 8 with values 0 to 16; it is enlarged to 20 x 20 and framed with 4 pixels of 0, as MNIST's digits are
    (20 x 20 within 28 x 28).

    Raises:
        WorkloadError: scikit-learn is missing.
    """
    import numpy as np

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise WorkloadError(
            f"data.source=digits needs scikit-learn, which cannot be imported ({error}): pip install scikit-learn"
        ) from None
    bunch = load_digits()
    images = np.zeros((len(bunch.images), idx.SIDE, idx.SIDE), np.uint8)
    images[:, 4:24, 4:24] = _enlarge(bunch.images.astype(np.int64))
    test = SOURCES["digits"].test
    held_out = np.arange(test) * len(images) // test
    order = np.concatenate([np.setdiff1d(np.arange(len(images)), held_out), held_out])
    return _files(images[order], bunch.target[order].astype(np.uint8), len(images) - test)


def _enlarge(images: np.ndarray) -> np.ndarray:
    """Bilinear, [N, 8, 8] of 0 to 16 to [N, 20, 20] of 0 to 255; in integers, so that every machine agrees."""
    import numpy as np

    # Pixel i of 20 has its centre at (4 i - 3) / 10 of the 8 pixels' centres; weights are in tenths.
    place = np.clip(4 * np.arange(20) - 3, 0, 70)
    low = np.minimum(place // 10, 6)
    weights = np.zeros((20, 8), np.int64)
    weights[np.arange(20), low] = 10 - (place - 10 * low)
    weights[np.arange(20), low + 1] = place - 10 * low
    hundredths = weights @ images @ weights.T
    return ((hundredths * 255 + 800) // 1600).astype(np.uint8)


def fake() -> dict[str, bytes]:
    """Noise from a fixed seed; labels have nothing to do with it, so nothing can be learned."""
    import numpy as np

    # The raw generator's stream is fixed for good, unlike numpy's distributions (NEP 19).
    count = SOURCES["fake"].train + SOURCES["fake"].test
    noise = np.random.PCG64(0).random_raw(count * idx.SIDE**2 // 8).astype("<u8").tobytes()
    images = np.frombuffer(noise, np.uint8).reshape(count, idx.SIDE, idx.SIDE)
    labels = (np.random.PCG64(1).random_raw(count) % idx.CLASSES).astype(np.uint8)
    return _files(images, labels, SOURCES["fake"].train)


def _files(images: np.ndarray, labels: np.ndarray, train: int) -> dict[str, bytes]:
    return {
        TRAIN[0]: idx.images_bytes(images[:train]),
        TRAIN[1]: idx.labels_bytes(labels[:train]),
        TEST[0]: idx.images_bytes(images[train:]),
        TEST[1]: idx.labels_bytes(labels[train:]),
    }
