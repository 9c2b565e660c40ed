"""Corpora from real files, and the order in which their samples come."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workloads.base import Shape, WorkloadError
from workloads.tp_fsdp_llama2 import data, files, layout
from workloads.tp_fsdp_llama2 import tokenized as tokenized_module
from workloads.tp_fsdp_llama2.checks import validate
from workloads.tp_fsdp_llama2.config import Config, DataConfig
from workloads.tp_fsdp_llama2.corpus import OPEN_FILES, Corpus, Part, Split
from workloads.tp_fsdp_llama2.data import open_corpus, vocab_size
from workloads.tp_fsdp_llama2.files import python_docs, resolve
from workloads.tp_fsdp_llama2.samples import SampleOrder, TrainingSamples
from workloads.tp_fsdp_llama2.tokenized import _next_piece, _Piece, check_prepared, load_tokenizer, prepare, prepare_key

NOWHERE = Path("nowhere")


def make(**settings: Any) -> Config:
    return Config.model_validate(settings)


def contents(corpus: Corpus) -> np.ndarray:
    return corpus.window(0, len(corpus))


# ---- corpora


def test_the_default_is_the_documentation_of_python() -> None:
    corpus = open_corpus(make(), NOWHERE)
    text = contents(corpus).astype(np.uint8).tobytes().decode()
    assert "The execution of a simple if statement" in text or '"if" statement' in text
    assert len(corpus) > 300_000
    assert corpus.unit == "byte"


def test_text_is_its_bytes(tmp_path: Path) -> None:
    text = "Ångström\n\x00binary too" * 10
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    corpus = open_corpus(make(data={"path": str(tmp_path / "a.txt")}), NOWHERE)
    window = corpus.window(0, len(corpus))
    assert window.dtype == np.int64
    assert bytes(window.tolist()) == text.encode() + b"\xff"
    assert corpus.decode(window[:10].tolist()) == "Ångström"


def test_globs_and_lists_are_joined_in_sorted_order_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "e.txt").mkdir()
    for path in (f"{tmp_path}/*.txt", [f"{tmp_path}/d.txt", f"{tmp_path}/[ab].txt", f"{tmp_path}/a.txt"]):
        corpus = open_corpus(make(data={"path": path}), NOWHERE)
        assert bytes(contents(corpus).tolist()) == b"a.txtb.txtd.txt"
    # A window may begin and end within files.
    assert bytes(corpus.window(3, 9).tolist()) == b"xtb.txtd."
    assert corpus.where(7) == f"offset 2 of {tmp_path}/b.txt"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_token_files_of_every_type(tmp_path: Path, dtype: Any) -> None:
    ids = np.arange(200).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    ids.tofile(tmp_path / "ids.bin")
    (tmp_path / "more.bin").write_bytes(ids[:10].tobytes())
    npy = open_corpus(make(data={"path": str(tmp_path / "ids.npy")}, model={"vocab_size": 200}), NOWHERE)
    raw = open_corpus(make(data={"path": f"{tmp_path}/*.bin", "dtype": dtype}, model={"vocab_size": 200}), NOWHERE)
    assert contents(npy).tolist() == list(range(200))
    assert contents(raw).tolist() == [*range(200), *range(10)]
    assert npy.unit == raw.unit == "token"
    assert npy.heldout_bytes_per_token is None


def test_an_id_out_of_range_is_refused_naming_sample_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.zeros(10_000, dtype=np.uint16)
    ids[4321] = 300
    np.save(tmp_path / "ids.npy", ids)
    config = make(data={"path": str(tmp_path / "ids.npy")}, model={"vocab_size": 300}, global_batch_size=4)
    with pytest.raises(WorkloadError, match="token id 300 at offset 4321"):
        data.validate(config.data, config.seq_len, config.global_batch_size, 300)
    # One too large to be read in full beforehand is caught when the sample comes up.
    monkeypatch.setattr(data, "_SCAN_AT_MOST", 100)
    data.validate(config.data, config.seq_len, config.global_batch_size, 300)
    corpus = open_corpus(config, NOWHERE)
    cut = Split.of(len(corpus), 0.05, 128)
    samples = TrainingSamples(corpus, cut, seed=0, global_batch_size=4)
    epoch = (batch for step in range(1, 30) for batch in samples.microbatches(step))
    with pytest.raises(WorkloadError, match=r"sample \d+: token id 300 at offset 4321 of .*ids.npy") as caught:
        list(epoch)
    number = int(str(caught.value).split()[1].rstrip(":"))
    assert SampleOrder(cut.train_windows, 0)(number) == 4321 // 128


def test_unigram_entropy() -> None:
    corpus = Corpus(
        [Part("here", np.array([0, 1, 1, 1, 2, 3], dtype=np.uint8))],
        vocab_size=4,
        unit="token",
        decode=str,
        heldout_bytes_per_token=None,
    )
    # Of the targets: a window's first token is none.
    assert corpus.unigram_entropy_nats([0], 3) == 0
    assert corpus.unigram_entropy_nats([0, 3], 1) == pytest.approx(np.log(2))
    assert corpus.unigram_entropy_nats([1], 4) == pytest.approx(1.5 * np.log(2))


# ---- the files of a run that began


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run on two files of text."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(name.encode() * 2000)
    config = make(data={"path": "*.txt"})
    data.make_ready(config, tmp_path / "data")
    return config


def test_a_run_reads_what_was_there_when_it_began(begun: Config, tmp_path: Path) -> None:
    assert data.is_ready(begun, tmp_path / "data")
    assert not data.is_ready(begun, tmp_path)
    before = contents(open_corpus(begun, tmp_path / "data"))
    with (tmp_path / "a.txt").open("ab") as file:
        file.write(b"more")
    (tmp_path / "ab.txt").write_text("another file that the glob matches")
    assert np.array_equal(contents(open_corpus(begun, tmp_path / "data")), before)
    assert len(open_corpus(begun, tmp_path)) == len(before) + 4 + 34


def test_a_run_from_anothers_checkpoint_reads_what_that_one_did(
    begun: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "data").rename(tmp_path / "first" / "data")
    with (tmp_path / "b.txt").open("ab") as file:
        file.write(b"more")
    monkeypatch.setattr(Config, "check_resume", lambda self: tmp_path / "first" / "checkpoints" / "step-00000001")
    data.make_ready(begun, tmp_path / "second" / "data")
    assert len(open_corpus(begun, tmp_path / "second" / "data")) == 20_000


def test_token_files_are_agreed_on_likewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.arange(9000, dtype=np.uint16).tofile("ids.bin")
    np.save("ids.NPY", np.arange(9000))
    Path("ids.NPY.npy").rename("ids.NPY")
    for settings in ({"path": "ids.bin", "dtype": "uint16"}, {"path": "ids.NPY"}):
        config = make(data=settings, model={"vocab_size": 9000})
        data.make_ready(config, tmp_path / str(settings["path"])[-3:])
        with Path(str(settings["path"])).open("ab") as file:
            file.write(b"x")
        assert contents(open_corpus(config, tmp_path / str(settings["path"])[-3:])).tolist() == list(range(9000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "b.txt has become shorter: it had 10,000 bytes"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "b.txt is another file than the one that this"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x."), "b.txt is another file than the one that this"),
        (Path.unlink, "b.txt does not exist .*put the file back that this run began with"),
    ],
)
def test_a_file_that_is_not_what_the_run_began_with_is_refused(
    begun: Config, tmp_path: Path, change: Any, message: str
) -> None:
    change(tmp_path / "b.txt")
    with pytest.raises(WorkloadError, match=f"^data.path={message}"):
        open_corpus(begun, tmp_path / "data")


def test_each_file_is_looked_into_once_before_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus may have thousands of them, on a file system that many share."""
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_bytes(b"some text\n" * 1000)
    looked, head = [], files.head
    monkeypatch.setattr(files, "head", lambda path, *words: looked.append(path.name) or head(path, *words))
    config = make(data={"path": str(tmp_path / "*.txt")})
    shape = Shape(2, 4)
    layout.mesh(config, shape)
    layout.memory_bytes(config, shape)
    assert looked == []
    validate(config, shape)
    assert looked == ["a.txt", "b.txt", "c.txt"]


def test_a_corpus_may_have_more_files_than_are_open(tmp_path: Path) -> None:
    for number in range(2 * OPEN_FILES):
        (tmp_path / f"{number:03}.txt").write_bytes(bytes([97 + number % 26]) * 10)
    corpus = open_corpus(make(data={"path": str(tmp_path / "*.txt")}), NOWHERE)
    before = len(list(Path("/proc/self/fd").iterdir()))
    every = contents(corpus)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + OPEN_FILES
    assert bytes(every.astype(np.uint8)) == b"".join(path.read_bytes() for path in sorted(tmp_path.glob("*.txt")))


def test_a_file_that_is_cut_short_while_it_is_read_is_named(begun: Config, tmp_path: Path) -> None:
    corpus = open_corpus(begun, tmp_path / "data")
    corpus.window(9_990, 20)
    os.truncate(tmp_path / "b.txt", 4096)
    corpus.window(14_000, 96)
    with pytest.raises(WorkloadError, match=r"b.txt was cut short while it was read: it has 4,096 of the 10,000 bytes"):
        corpus.window(14_000, 97)


# ---- the split


@pytest.mark.parametrize("tokens", [1000, 1001, 4567])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_training_and_heldout_windows_share_no_token(tokens: int, fraction: float) -> None:
    cut = Split.of(tokens, fraction, 16)
    # The last training sample's last target lies before the first held-out token.
    assert cut.train_windows * 16 + 1 <= cut.heldout_start
    assert (cut.train_windows + 1) * 16 + 1 > cut.heldout_start
    assert cut.heldout_start + cut.heldout_windows * 16 + 1 <= tokens
    assert tokens - cut.heldout_start == int(tokens * fraction)


# ---- the order


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_each_epoch_visits_every_window_once(windows: int) -> None:
    order = SampleOrder(windows, seed=1)
    for epoch in range(3):
        visited = [order(epoch * windows + i) for i in range(windows)]
        assert sorted(visited) == list(range(windows))


def test_the_order_is_another_for_each_epoch_and_seed_and_looks_random() -> None:
    windows = 1000
    order, other = SampleOrder(windows, 1), SampleOrder(windows, 2)
    first = [order(i) for i in range(windows)]
    assert first != [order(windows + i) for i in range(windows)]
    assert first != [other(i) for i in range(windows)]
    assert first == [SampleOrder(windows, 1)(i) for i in range(windows)]
    # Neighbours fall apart, and every tenth of the epoch draws on the whole corpus.
    assert np.corrcoef(first[:-1], first[1:])[0, 1] == pytest.approx(0, abs=0.1)
    assert all(min(first[i : i + 100]) < 100 and max(first[i : i + 100]) > 900 for i in range(0, windows, 100))


def test_the_order_of_a_billion_windows_takes_no_memory() -> None:
    order = SampleOrder(10**9, 0)
    assert len({order(i) for i in range(1000)}) == 1000


@pytest.mark.parametrize(("dp", "micro"), [(1, None), (1, 3), (2, None), (2, 2), (4, 1), (6, 2), (12, None)])
def test_the_samples_of_a_step_are_the_same_on_every_mesh(dp: int, micro: int | None) -> None:
    config = make()
    corpus = open_corpus(config, NOWHERE)
    cut = Split.of(len(corpus), 0.99, 16)
    batch = 12
    whole = TrainingSamples(corpus, cut, seed=5, global_batch_size=batch)
    parts = [
        TrainingSamples(corpus, cut, seed=5, global_batch_size=batch, dp=dp, dp_rank=d, microbatch_size=micro)
        for d in range(dp)
    ]
    # 290 windows: steps 24 and 25 lie across an epoch's end.
    for step in (1, 2, 24, 25, 26):
        expected = np.concatenate(list(whole.microbatches(step)))
        assert expected.shape == (batch, 17)
        got = [microbatch for part in parts for microbatch in part.microbatches(step)]
        assert all(len(m) == (micro or batch // dp) for m in got)
        assert np.array_equal(np.concatenate(got), expected)
        numbers = [n for part in parts for n in part.sample_numbers(step)]
        assert numbers == list(range((step - 1) * batch, step * batch))


def test_an_epoch_of_steps_trains_on_every_window_once() -> None:
    corpus = open_corpus(make(), NOWHERE)
    cut = Split(len(corpus), 16 * 40 + 1, 16)
    assert cut.train_windows == 40
    samples = TrainingSamples(corpus, cut, seed=0, global_batch_size=8)
    seen = Counter(row.tobytes() for step in range(1, 6) for batch in samples.microbatches(step) for row in batch)
    assert seen == Counter(corpus.window(w * 16, 17).tobytes() for w in range(40))


# ---- text through a tokenizer


@pytest.fixture
def tokenized(tmp_path: Path) -> Config:
    tokenizers = pytest.importorskip("tokenizers")
    text = python_docs().decode()[:120_000]
    (tmp_path / "a.txt").write_text(text[:50_000] + "é→😀\n")
    (tmp_path / "b.txt").write_text(text[50_000:])
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train([str(tmp_path / "a.txt")], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return make(
        data={"path": f"{tmp_path}/*.txt", "tokenizer": str(tmp_path / "tokenizer.json")},
        global_batch_size=4,
        seq_len=64,
    )


def test_text_is_tokenized_once_and_decodes_to_itself(tokenized: Config, tmp_path: Path) -> None:
    directory = tmp_path / "prepared"
    prepare(tokenized, directory)
    assert sorted(p.name for p in directory.iterdir()) == ["tokens.json", "tokens.npy"]
    assert vocab_size(tokenized) == 500
    corpus = open_corpus(tokenized, directory)
    text = (tmp_path / "a.txt").read_text() + (tmp_path / "b.txt").read_text()
    assert corpus.decode(contents(corpus).tolist()) == text
    assert np.load(directory / "tokens.npy").dtype == np.uint16

    cut = Split.of(len(corpus), tokenized.data.holdout_fraction, 64)
    heldout = corpus.window(cut.heldout_start, len(corpus) - cut.heldout_start).tolist()
    assert corpus.heldout_bytes_per_token == pytest.approx(len(corpus.decode(heldout).encode()) / len(heldout))

    assert check_prepared(tokenized, directory) == f"{len(text.encode()):,} bytes in {len(corpus):,} tokens"
    with pytest.raises(WorkloadError, match="too few for a batch of global_batch_size=4000 samples"):
        check_prepared(tokenized.model_copy(update={"global_batch_size": 4000}), directory)
    assert prepare_key(make()) is None

    before = (directory / "tokens.npy").stat().st_mtime_ns
    prepare(tokenized, directory)
    assert (directory / "tokens.npy").stat().st_mtime_ns == before


def test_text_in_many_pieces_counts_the_same_bytes(
    tokenized: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Path.open

    def by_line(config: Any) -> Any:
        for path in resolve(config):
            with lines(path, "rb") as file:
                text = [line.decode() for line in file]
            for number, line in enumerate(text, start=1):
                yield _Piece(line, number == 1, number == len(text))

    monkeypatch.setattr(tokenized_module, "_pieces", by_line)
    prepare(tokenized, tmp_path / "prepared")
    # Many go through the tokenizer together, and come out as they do one by one.
    tokenizer = load_tokenizer(str(tokenized.data.tokenizer))
    encodings = (tokenizer.encode(line.text, add_special_tokens=False) for line in by_line(tokenized.data))
    one_by_one = [i for encoding in encodings for i in encoding.ids]
    assert np.load(tmp_path / "prepared" / "tokens.npy").tolist() == one_by_one
    corpus = open_corpus(tokenized, tmp_path / "prepared")
    cut = Split.of(len(corpus), tokenized.data.holdout_fraction, 64)
    heldout = corpus.window(cut.heldout_start, len(corpus) - cut.heldout_start).tolist()
    assert corpus.heldout_bytes_per_token == pytest.approx(len(corpus.decode(heldout).encode()) / len(heldout))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a line\n" * 30, "a line\n" * 3),
        ("word " * 40, "word word word word"),
        ("äöü€" * 30, "äöü€äöü€"),  # 9 bytes a time: 16 are within a character
        ("äöü€" * 2, "äöü€äöü€"),
        (" \n" * 40, " \n" * 8),
        ("", None),
    ],
)
def test_a_piece_of_text_is_bounded_however_long_a_line_is(
    text: str, first: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenized_module, "_PIECE_BYTES", 16)
    (tmp_path / "text.txt").write_text(text)
    with (tmp_path / "text.txt").open("rb") as file:
        piece, rest = _next_piece(file, b"")
        pieces = []
        while piece:
            pieces.append(piece.decode())
            piece, rest = _next_piece(file, rest)
    assert "".join(pieces) == text
    assert next(iter(pieces), None) == first
    assert all(16 <= len(one.encode()) <= 32 for one in pieces[:-1])


@pytest.mark.parametrize(
    "tokens", [{"eos_token": "</s>"}, {"bos_token": "<s>"}, {"bos_token": "<s>", "eos_token": "</s>"}]
)
def test_a_token_separates_documents_which_are_files(
    tokenized: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: dict[str, str]
) -> None:
    from tokenizers import Tokenizer

    assert tokenized.data.tokenizer is not None
    tokenizer = Tokenizer.from_file(tokenized.data.tokenizer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(tokenized.data.tokenizer)
    # Each file is some pieces long, and the corpus is split at every place around the second one's beginning.
    monkeypatch.setattr(tokenized_module, "_PIECE_BYTES", 1000)
    (tmp_path / "a.txt").write_text("another line\n" * 200)
    (tmp_path / "b.txt").write_text("a line of text\n" * 200)
    prepare(tokenized, tmp_path / "prepared")
    files = [(tmp_path / name).read_text() for name in ("a.txt", "b.txt")]
    around = [tokens.get("bos_token", ""), tokens.get("eos_token", "")]
    data_settings = {**tokenized.data.model_dump(), **tokens}
    config = Config.model_validate({**tokenized.model_dump(), "data": data_settings})
    data.validate(config.data, config.seq_len, config.global_batch_size, 502)
    # What was prepared without them is not taken for it.
    prepare(config, tmp_path / "prepared")
    corpus = open_corpus(config, tmp_path / "prepared")
    assert corpus.decode(contents(corpus).tolist()) == "".join(around[0] + text + around[1] for text in files)

    first = len(tokenizer.encode(files[0]).ids) + len(tokens)
    for heldout_start in range(first - 3, first + 4):
        fraction = (len(corpus) - heldout_start + 0.5) / len(corpus)
        config = Config.model_validate({**config.model_dump(), "data": {**data_settings, "holdout_fraction": fraction}})
        prepare(config, tmp_path / "prepared")
        corpus = open_corpus(config, tmp_path / "prepared")
        assert corpus.heldout_bytes_per_token is not None
        heldout = contents(corpus)[heldout_start:].tolist()
        text = corpus.decode([i for i in heldout if i < 500])
        assert corpus.heldout_bytes_per_token == pytest.approx(len(text.encode()) / len(heldout))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": "<end>"}, r"data.eos_token=<end> is not a token of .*: its special tokens are </s>; use one"),
        ({"bos_token": "<s>", "tokenizer": None}, "data.bos_token=<s> without a tokenizer to take it from"),
    ],
)
def test_a_document_token_that_the_tokenizer_does_not_have_is_refused(
    tokenized: Config, changes: dict[str, Any], message: str
) -> None:
    from tokenizers import Tokenizer

    assert tokenized.data.tokenizer is not None
    tokenizer = Tokenizer.from_file(tokenized.data.tokenizer)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(tokenized.data.tokenizer)
    with pytest.raises(WorkloadError, match=message):
        data.validate(tokenized.data.model_copy(update=changes), 64, 4, 501)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"document_mask": True}, "document_mask=true without a token .*give data.tokenizer and data.eos_token"),
        ({"document_mask": True, "path": "ids.npy"}, "document_mask=true without a token .*give data.eos_id"),
        ({"document_mask": True, "path": "ids.npy", "eos_id": 300}, r"data.eos_id=300 is not in 0 .. 299"),
        ({"eos_id": 3, "path": "ids.npy"}, "data.eos_id=3 without data.document_mask=true: leave data.eos_id out"),
        ({"eos_id": 3, "document_mask": True}, "data.eos_id=3 with text, whose documents end with data.eos_token"),
    ],
)
def test_documents_whose_ends_cannot_be_known_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.zeros(10_000, dtype=np.uint16))
    with pytest.raises(WorkloadError, match=message):
        data.validate(make(data=settings).data, 64, 4, 300)


def test_the_end_of_a_document_is_the_tokenizers_eos_or_the_files(tokenized: Config) -> None:
    text = tokenized.data.model_copy(update={"eos_token": "a"})
    tokenizer = load_tokenizer(str(text.tokenizer))
    assert data.document_end(text) is None
    assert data.document_end(text.model_copy(update={"document_mask": True})) == tokenizer.token_to_id("a") is not None
    ids = DataConfig(path="ids.npy", eos_id=0, document_mask=True)
    assert data.document_end(ids) == 0


def test_what_a_tokenizer_sets_for_other_uses_is_switched_off_and_said_once(
    tokenized: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(tokenized, tmp_path / "whole")
    assert not caplog.records
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenized.data.tokenizer)
    tokenizer.enable_truncation(max_length=512, strategy="only_first", direction="left")
    tokenizer.enable_padding(length=2**16, direction="left")
    tokenizer.model.dropout = 0.5
    tokenizer.save(tokenized.data.tokenizer)
    prepare(tokenized, tmp_path / "prepared")
    names = ("tokens.npy", "tokens.json")
    whole, prepared = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in ("whole", "prepared"))
    assert prepared[0] == whole[0]
    assert {**json.loads(prepared[1]), "made_from": 0} == {**json.loads(whole[1]), "made_from": 0}
    assert [record.getMessage().split("sets ")[1].split(";")[0] for record in caplog.records] == [
        *("truncation", "padding", "dropout"),
    ]


def saved(tokenizer: Any, path: Path, text: str, **settings: Any) -> Config:
    (path / "t.txt").write_text(text)
    tokenizer.save(str(path / "t.json"))
    data_settings = {"path": str(path / "t.txt"), "tokenizer": str(path / "t.json")}
    return make(data=data_settings, global_batch_size=2, seq_len=8, **settings)


def test_the_size_of_a_vocabulary_with_holes_is_one_more_than_its_largest_id(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 3, "b": 70_000}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = saved(tokenizer, tmp_path, "a b c\n" * 500)
    assert vocab_size(config) == 70_001
    prepare(config, tmp_path / "prepared")
    assert contents(open_corpus(config, tmp_path / "prepared"))[:4].tolist() == [0, 70_000, 3, 0]


def test_text_that_a_tokenizer_would_leave_out_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    models = tokenizers.models
    words = {"a": 0, "b": 1}
    for model in (models.BPE(words, []), models.WordLevel(words), models.Unigram([("a", -1.0), ("b", -2.0)])):
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # leaves the spaces out on purpose
        prepare(saved(tokenizer, tmp_path, "a b\n" * 500), tmp_path / type(model).__name__)
        with pytest.raises(WorkloadError, match=r"t.json (has no token for 'é' \(U\+00E9\)|cannot tokenize the text)"):
            prepare(saved(tokenizer, tmp_path, "a é b\n" * 500), tmp_path / "refused")
    with pytest.raises(WorkloadError, match="has no tokens"):
        vocab_size(saved(tokenizers.Tokenizer(models.BPE()), tmp_path, "a"))


def test_a_run_keeps_its_tokens_and_a_new_one_takes_the_changed_text(
    tokenized: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "prepared"
    prepare(tokenized, directory)
    key, tokens = prepare_key(tokenized), len(open_corpus(tokenized, directory))
    with (tmp_path / "b.txt").open("a") as file:
        file.write("and more words\n" * 100)
    prepare(tokenized, directory)
    assert len(open_corpus(tokenized, directory)) == tokens
    assert prepare_key(tokenized) != key
    prepare(tokenized, tmp_path / "another" / "data")
    assert len(open_corpus(tokenized, tmp_path / "another" / "data")) > tokens

    (tmp_path / "first").mkdir()
    directory = directory.rename(tmp_path / "first" / "data")
    with monkeypatch.context() as patched:
        patched.setattr(Config, "check_resume", lambda self: tmp_path / "first" / "checkpoints" / "step-00000001")
        for look in (prepare, check_prepared):
            with pytest.raises(WorkloadError, match=r"data.path had [\d,]+ bytes .* then and has [\d,]+ \("):
                look(tokenized, tmp_path / ("second" if look is prepare else "another") / "data")

    tokenizer = load_tokenizer(str(tokenized.data.tokenizer))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(tokenized.data.tokenizer)
    with pytest.raises(WorkloadError, match="is not the file that this run's text was tokenized with: put that one"):
        open_corpus(tokenized, directory)


def test_text_that_is_not_utf8_is_refused_with_the_place(tokenized: Config, tmp_path: Path) -> None:
    content = (tmp_path / "b.txt").read_bytes()
    (tmp_path / "b.txt").write_bytes(content + b"fine\n\xff\xfe\n")
    with pytest.raises(WorkloadError, match=f"b.txt is not UTF-8 at byte {len(content) + 5}"):
        prepare(tokenized, tmp_path / "prepared")
    assert not list((tmp_path / "prepared").iterdir())


def test_text_of_too_few_tokens_is_refused(tokenized: Config, tmp_path: Path) -> None:
    config = tokenized.model_copy(update={"global_batch_size": 1500})
    with pytest.raises(WorkloadError, match="tokens, of which"):
        prepare(config, tmp_path / "prepared")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tokenized: Config) -> None:
    config = Config.model_validate({**tokenized.model_dump(), "model": {"vocab_size": 400}})
    with pytest.raises(WorkloadError, match=r"model.vocab_size=400 is too small.*use 500 or more"):
        vocab_size(config)
