"""What is refused before a job exists, and in which words."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from workloads.base import Shape, WorkloadError
from workloads.meanings import meanings
from workloads.tp_fsdp_llama2 import ENTRY
from workloads.tp_fsdp_llama2.checks import validate
from workloads.tp_fsdp_llama2.config import PRESETS, Config, ModelConfig, parameter_count, precision
from workloads.tp_fsdp_llama2.data import vocab_size
from workloads.tp_fsdp_llama2.layout import choices, memory_bytes, mesh, reduces_last_pass_only
from workloads.tp_fsdp_llama2.model import Transformer

TWO_BY_FOUR = Shape(2, 4)
GB = 10**9


def make(**settings: Any) -> Config:
    return Config.model_validate(settings)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of good and bad corpora, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_bytes(rng.integers(0, 256, 200_000, dtype=np.uint8).tobytes())
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "directory").mkdir()
    np.save(tmp_path / "ids.npy", rng.integers(0, 1000, 100_000).astype(np.uint16))
    np.save(tmp_path / "floats.npy", np.zeros(100_000))
    np.save(tmp_path / "square.npy", np.zeros((300, 300), dtype=np.int32))
    np.save(tmp_path / "none.npy", np.zeros(0, dtype=np.int32))
    negative = rng.integers(0, 1000, 100_000)
    negative[77_777] = -5
    np.save(tmp_path / "negative.npy", negative)
    (tmp_path / "not.npy").write_text("no header at all, but long enough to be one")
    with (tmp_path / "cut.npy").open("wb") as file:
        file.write((tmp_path / "ids.npy").read_bytes()[:1000])
    with gzip.open(tmp_path / "text.txt.gz", "w") as packed:
        packed.write(rng.bytes(100_000))
    np.savez(tmp_path / "ids.npz", ids=rng.integers(0, 1000, 100_000))
    (tmp_path / "npz.npy").write_bytes((tmp_path / "ids.npz").read_bytes())
    (tmp_path / "ids.NPY").write_bytes((tmp_path / "ids.npy").read_bytes())
    (tmp_path / "npy.txt").write_bytes((tmp_path / "ids.npy").read_bytes())
    (tmp_path / "npy.bin").write_bytes((tmp_path / "ids.npy").read_bytes())
    os.mkfifo(tmp_path / "pipe")
    rng.integers(0, 1000, 100_000).astype("<u2").tofile(tmp_path / "ids.bin")
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "tokenizer.json").write_text('{"no": "tokenizer"}')
    return tmp_path


IDS = {"data": {"path": "ids.npy"}, "model": {"vocab_size": 1000}}
FLOAT8 = {"float8": True, "compile": True}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # settings, what the message must say was given, what it must say to do
    ({"tp": 3}, "tp=3 does not divide gpus_per_node=4", "use tp=2"),
    ({"tp": 8}, "tp=8 does not divide gpus_per_node=4", "use tp=4"),
    ({"model": {"n_heads": 6, "n_kv_heads": 6, "dim": 96}, "tp": 4}, "model.n_heads=6 is not divisible by tp", "tp=2"),
    ({"model": {"n_kv_heads": 2}, "tp": 4}, "model.n_kv_heads=2 is not divisible by tp", "model.n_kv_heads=4 or tp=2"),
    ({"model": {"ffn_dim": 130}, "tp": 4}, "model.ffn_dim=130 is not divisible by tp", "model.ffn_dim=132 or tp=2"),
    ({"seq_len": 90, "tp": 4}, "seq_len=90 is not divisible by tp=4", "seq_len=92 or tp=2"),
    ({"model": {"dim": 100}}, "model.dim=100 is not divisible by model.n_heads=8", "model.dim=104"),
    ({"model": {"dim": 72}}, "heads of odd width 9", "model.dim=80"),
    ({"model": {"n_kv_heads": 3}}, "model.n_heads=8 is not divisible by model.n_kv_heads=3", "use a divisor"),
    ({"global_batch_size": 5, "tp": 4}, "global_batch_size=5 is not divisible by dp=2", "global_batch_size=6"),
    ({"global_batch_size": 12, "microbatch_size": 4, "tp": 4}, "dp x microbatch_size = 2 x 4", "microbatch_size=3"),
    ({"steps": 5, "warmup_steps": 6}, "warmup_steps=6 is more than steps=5", "use warmup_steps=0"),
    ({"dp_replicate": 3}, "dp_replicate=3 does not divide dp=8 (8 ranks / tp=1)", "use dp_replicate=2"),
    ({"async_tp": True, "tp": 2}, "async_tp=true with tp=2 and compile=false", "use compile=true"),
    ({"async_tp": True, "tp": 1, "compile": True}, "async_tp=true with tp=1", "tp of 2 or more"),
    ({**FLOAT8, "precision": "fp32"}, "float8=true with precision=fp32", "use precision=bf16"),
    ({**FLOAT8, "compile": False}, "float8=true with compile=false", "use compile=true"),
    ({**FLOAT8, "model": {"dim": 96}, "tp": 4}, "float8=true with model.dim=96: a rank's part of it (24", "use 128"),
    ({**FLOAT8, "model": {"n_heads": 16, "n_kv_heads": 1}}, "model.n_kv_heads x their width=8:", "use 16"),
    ({**FLOAT8, "model": {"ffn_dim": 392}}, "float8=true with model.ffn_dim=392", "use 400"),
    ({**FLOAT8, "seq_len": 20, "global_batch_size": 8}, "seq_len=20 and 1 samples per pass", "use seq_len=32"),
    ({"model": {"vocab_size": 100}}, "model.vocab_size=100 is too small", "use 256 or more"),
    ({"data": {"path": "nothing.txt"}}, "data.path=nothing.txt matches no file", "glob"),
    ({"data": {"path": "*.nothing"}}, "data.path=*.nothing matches no file", "glob"),
    ({"data": {"path": ["text.txt", "nothing.txt"]}}, "data.path=nothing.txt matches no file", "existing file"),
    ({"data": {"path": "directory"}}, "data.path=directory is a directory", "directory/*.txt"),
    ({"data": {"path": "/dev/zero"}}, "data.path=/dev/zero is not a regular file", "give a file of text or token ids"),
    ({"data": {"path": "pipe"}}, "data.path=pipe is not a regular file", "give a file"),
    (
        {"data": {"path": "/proc/cpuinfo"}},
        "data.path=/proc/cpuinfo is not a regular file (its size is 0",
        "give a file",
    ),
    ({"data": {"path": "~nobody-of-this-name/x"}}, "data.path=~nobody-of-this-name/x matches no file", "existing file"),
    ({"data": {"path": []}}, "data.path=[] names no file", "give one"),
    ({"data": {"path": ""}}, "data.path= names no file", "give one"),
    ({"data": {"path": "text.txt.gz"}}, "data.path=text.txt.gz is gzip-compressed", "decompress it"),
    ({"data": {"path": "ids.npz"}}, "data.path=ids.npz is a zip archive (.zip, .npz), and not text", "numpy.save"),
    ({"data": {"path": "npz.npy"}}, "data.path=npz.npy is a zip archive (.zip, .npz)", "numpy.save"),
    ({"data": {"path": "npy.txt"}}, "data.path=npy.txt is an .npy array, and not text", "ends in .npy"),
    ({"data": {"path": "npy.bin", "dtype": "uint16"}}, "npy.bin is an .npy array, and not bare ids", "ends in .npy"),
    ({"data": {"path": "ids.NPY"}}, "data.path=ids.NPY holds token ids", "give model.vocab_size"),
    ({**IDS, "data": {"path": "cut.npy"}}, "data.path=cut.npy is not an .npy array (mmap length", "numpy.save"),
    ({"data": {"path": "empty.txt"}}, "empty.txt is empty", "leave it out"),
    ({"data": {"path": "short.txt"}}, "9 bytes", "give more data"),
    ({"data": {"path": "text.txt"}, "global_batch_size": 2000}, "global_batch_size=2000", "lower one of them"),
    ({"data": {"path": "text.txt", "holdout_fraction": 0.0001}}, "holdout_fraction=0.0001", "raise it to 0.0007"),
    ({"data": {"path": "text.txt", "dtype": "uint16"}}, "data.dtype=uint16 with text", "leave it out"),
    ({"data": {"path": "ids.bin"}, "model": {"vocab_size": 1000}}, "no header", "give data.dtype"),
    ({"data": {"path": "ids.npy"}}, "data.path=ids.npy holds token ids", "give model.vocab_size"),
    ({**IDS, "data": {"path": "ids.npy", "dtype": "uint16"}}, "an .npy file's header has its type", "leave data.dtype"),
    ({**IDS, "data": {"path": ["ids.npy", "text.txt"]}}, "mixes .npy and text", "of one kind"),
    ({**IDS, "data": {"path": "floats.npy"}}, "float64 of shape (100000,)", "integers in one dimension"),
    ({**IDS, "data": {"path": "square.npy"}}, "int32 of shape (300, 300)", ".ravel()"),
    ({**IDS, "data": {"path": "none.npy"}}, "holds no tokens", "write it again"),
    ({"data": {"path": "not.npy"}}, "not.npy is not an .npy array", "numpy.save, or give a file of text another name"),
    ({**IDS, "data": {"path": "negative.npy"}}, "token id -5 at offset 77777", "data.dtype"),
    ({**IDS, "data": {"path": "odd.bin", "dtype": "uint16"}}, "3 bytes, not a multiple of 2", "data.dtype"),
    ({"data": {"path": "ids.npy"}, "model": {"vocab_size": 900}}, "not in 0 .. 899", "raise model.vocab_size"),
    ({"data": {"tokenizer": "none.json"}}, "data.tokenizer=none.json does not exist", "tokenizer.json"),
    ({"data": {"tokenizer": "pipe"}}, "data.tokenizer=pipe is not a regular file", "tokenizer.json"),
    ({"data": {"tokenizer": "directory"}}, "data.tokenizer=directory is a directory", "tokenizer.json"),
    ({"data": {"tokenizer": "~nobody-of-this-name"}}, "data.tokenizer=~nobody-of-this-name does not exist", "give"),
    ({"init_from": "pipe"}, "init_from=pipe is not a regular file", "give the directory of a Llama"),
    ({"init_from": "~nobody-of-this-name"}, "init_from=~nobody-of-this-name does not exist", "give the directory"),
    (
        {"data": {"path": "ids.npy"}, "model": {"vocab_size": 5}, "tp": 4},
        "tp=4 with a vocabulary of 5: a tensor-parallel group cuts it into parts of 2, which leaves a rank without any",
        "use tp=2 or model.vocab_size=7",
    ),
    ({"data": {"path": "text.txt", "tokenizer": "tokenizer.json"}}, "is not a tokenizer", "tokenizer.json"),
]


@pytest.mark.parametrize(("settings", "given", "advice"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_work_is_refused_in_one_line(
    files: Path, settings: dict[str, Any], given: str, advice: str
) -> None:
    with pytest.raises(WorkloadError) as caught:
        validate(make(**settings), TWO_BY_FOUR)
    message = str(caught.value)
    assert given in message
    assert advice in message
    assert "\n" not in message


def test_no_tp_is_chosen_that_leaves_a_rank_without_a_row_of_the_vocabulary() -> None:
    def chosen(vocabulary: int) -> int:
        large = {"dim": 2**16, "n_heads": 512, "n_kv_heads": 512, "vocab_size": vocabulary}  # fits on no GPU
        return mesh(make(model=large), Shape(1, 8)).sizes[-1]

    assert [chosen(vocabulary) for vocabulary in (1, 2, 3, 5, 7, 8, 9, 15, 57)] == [1, 2, 2, 2, 4, 8, 2, 8, 8]


def test_following_the_advice_on_the_holdout_helps(files: Path) -> None:
    validate(make(data={"path": "text.txt", "holdout_fraction": 0.0007}), TWO_BY_FOUR)


@pytest.mark.skipif(
    not hasattr(__import__("os"), "geteuid") or __import__("os").geteuid() == 0, reason="root reads all"
)
def test_an_unreadable_file_is_refused(files: Path) -> None:
    (files / "text.txt").chmod(0)
    with pytest.raises(WorkloadError, match="cannot be read"):
        validate(make(data={"path": "text.txt"}), TWO_BY_FOUR)


def test_a_tokenizer_without_its_package_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(WorkloadError, match=r"needs the package `tokenizers`.*pip install"):
        validate(make(data={"path": "text.txt", "tokenizer": "tokenizer.json"}), TWO_BY_FOUR)


def test_float8_shards_matrices_evenly() -> None:
    with pytest.raises(WorkloadError, match=r"model\.dim=128: .* and by the 3 ranks that it is sharded over; use 144"):
        validate(make(**FLOAT8, global_batch_size=3), Shape(3, 1))
    validate(make(**FLOAT8, global_batch_size=3, model={"dim": 96, "n_heads": 4, "n_kv_heads": 2}), Shape(3, 1))


def test_float8_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(WorkloadError, match=r"needs the package `torchao`.*pip install"):
        validate(make(**FLOAT8), TWO_BY_FOUR)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": True},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"global_batch_size": 0},
        {"precision": "fp8"},
        {"activation_checkpointing": "some"},
        {"model": "3b"},
        {"model": {"preset": "3b"}},
        {"model": {"dims": 64}},
        {"model": {"n_layers": 0}},
        {"data": {"holdout_fraction": 1.0}},
        {"data": {"dtype": "float32"}},
        {"seed": -1},
        {"nodes": 2},
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        make(**settings)
    assert len(caught.value.errors()) == 1
    assert caught.value.errors()[0]["loc"][0] == next(iter(settings))


def test_the_default_fits_the_shapes_people_have() -> None:
    for shape in (Shape(1, 1), Shape(1, 2), Shape(2, 1), Shape(2, 2), Shape(2, 4), Shape(4, 8)):
        validate(make(), shape)


def test_the_mesh_is_dp_by_tp_and_with_copies_dp_replicate_by_dp_shard_by_tp() -> None:
    assert str(ENTRY.mesh_spec(make(), TWO_BY_FOUR)) == "dp 8 x tp 1"
    assert str(ENTRY.mesh_spec(make(tp=2), TWO_BY_FOUR)) == "dp 4 x tp 2"
    assert str(mesh(make(tp=1), Shape(1, 1))) == "dp 1 x tp 1"
    assert str(ENTRY.mesh_spec(make(tp=2, dp_replicate=2), TWO_BY_FOUR)) == "dp_replicate 2 x dp_shard 2 x tp 2"


SEVEN = {"model": "7b", "seq_len": 4096, "microbatch_size": 1, "activation_checkpointing": "selective"}


@pytest.mark.parametrize(
    ("settings", "shape", "expected"),
    [
        # 16 bytes of states for each of 6.7e9 parameters, over 8 ranks, are 13.5 GB each.
        ({**SEVEN, "global_batch_size": 8}, Shape(1, 8), "dp 8 x tp 1"),
        # 27 GB over four, and 22 GB at tp=1 of what is no state: too much for 48 GB.
        ({**SEVEN, "global_batch_size": 8}, Shape(1, 4, gpu_memory_gb=48), "dp 2 x tp 2"),
        # Only 2 samples for 8 GPUs: they must share them, whatever fits.
        ({"model": "160m", "global_batch_size": 2}, Shape(1, 8), "dp 2 x tp 4"),
        # 70b does not fit 8 GPUs at all; tp is what it can be at most.
        ({**SEVEN, "model": "70b", "global_batch_size": 8}, Shape(1, 8), "dp 1 x tp 8"),
        # 512 ranks would hold 790 KB each of a 7b block, 256 hold 1.6 MB.
        ({**SEVEN, "global_batch_size": 512}, Shape(64, 8), "dp_replicate 2 x dp_shard 256 x tp 1"),
        ({**SEVEN, "global_batch_size": 512, "dp_replicate": 1}, Shape(64, 8), "dp 512 x tp 1"),
        # However small the model, up to 64 ranks share it.
        ({"global_batch_size": 64}, Shape(8, 8), "dp 64 x tp 1"),
    ],
    ids=str,
)
def test_tp_and_the_copies_are_chosen_by_memory(settings: dict[str, Any], shape: Shape, expected: str) -> None:
    assert str(mesh(make(**settings), shape)) == expected


def test_what_was_chosen_is_said_and_what_was_given_is_not() -> None:
    config = make(**SEVEN, global_batch_size=1024)
    tp, copies, gradients = choices(config, Shape(64, 8))
    assert tp.startswith("tp=1: the fewest ranks that fit in gpu_memory_gb=80, with an estimated ")
    assert copies == "dp_replicate=2: sharded over all 512 ranks, each would hold less than 1 MiB of a block"
    assert gradients == "gradients are reduced after the last pass only"
    given = make(**SEVEN, global_batch_size=1024, tp=1, dp_replicate=2, reduce_gradients="each_pass")
    assert choices(given, Shape(64, 8)) == []
    # 27 GB of whole fp32 gradients do not fit beside the rest.
    assert not reduces_last_pass_only(
        make(**SEVEN, global_batch_size=16, dp_replicate=1, tp=1), Shape(1, 8, gpu_memory_gb=40)
    )


def test_what_is_computed_in_follows_the_device() -> None:
    assert [precision(make(), device) for device in ("cuda", "cpu")] == ["bf16", "fp32"]
    assert precision(make(precision="fp32"), "cuda") == "fp32"


def test_a_preset_supplies_what_is_not_given() -> None:
    model = make(model={"preset": "7b", "n_layers": 2}).model
    assert (model.dim, model.n_layers, model.ffn_dim, model.vocab_size) == (4096, 2, 11008, 32000)
    assert make(model="7b").model == make(model={"preset": "7b"}).model
    # What was dumped (to a file, say) reads back as itself.
    config = make(model="1b", data={"path": ["a", "b"]})
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_the_vocabulary_follows_from_the_corpus() -> None:
    assert vocab_size(make()) == 256
    assert vocab_size(make(model={"vocab_size": 257})) == 257
    assert vocab_size(make(model="7b")) == 32000


LLAMA_2 = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parameter_count_is_that_of_the_built_model(preset: str) -> None:
    model = ModelConfig.model_validate(preset)
    with torch.device("meta"):
        built = Transformer(model, model.vocab_size or 256, seq_len=8)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert parameter_count(model) == count == LLAMA_2.get(preset, count)


def test_memory_is_estimated_from_the_states_up() -> None:
    seven = memory_bytes(make(model="7b", tp=8, seq_len=128, global_batch_size=8), Shape(1, 8))
    assert 7e9 * 16 / 8 * 0.95 < seven < 40 * GB
    # 70b does not fit one host's eight 80 GB devices, and fits 16 hosts.
    assert memory_bytes(make(model="70b", seq_len=4096, global_batch_size=16), Shape(1, 8)) > 80 * GB
    large = make(model="70b", precision="bf16", seq_len=4096, global_batch_size=16, activation_checkpointing="full")
    assert memory_bytes(large, Shape(16, 8)) < 80 * GB
    none, selective, full = (
        memory_bytes(make(model="7b", seq_len=4096, activation_checkpointing=mode), TWO_BY_FOUR)
        for mode in ("none", "selective", "full")
    )
    assert full < selective < none
    assert memory_bytes(make(), TWO_BY_FOUR) < GB


@pytest.mark.parametrize(
    "module", ["workloads.base", "workloads.tp_fsdp_llama2.checks", "workloads.tp_fsdp_llama2.tokenized"]
)
def test_settings_and_data_import_without_torch(module: str) -> None:
    heavy = ("torch", "numpy", "safetensors", "tokenizers")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_validation_and_preparation_run_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from workloads.base import Shape\n"
        "from workloads.tp_fsdp_llama2 import ENTRY\n"
        "config = ENTRY.config()\n"
        "shape = Shape(2, 4)\n"
        "ENTRY.hook('validate')(config, shape)\n"
        f"ENTRY.hook('prepare')(config, Path({str(tmp_path)!r}))\n"
        "print(ENTRY.mesh_spec(config, shape), ENTRY.hook('memory_bytes')(config, shape) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "dp 8 x tp 1 True", done.stderr


def test_every_field_says_what_it_is() -> None:
    for model in (
        Config,
        *(f.annotation for f in Config.model_fields.values() if hasattr(f.annotation, "model_fields")),
    ):
        for name, meaning in meanings(model).items():
            assert meaning, name
