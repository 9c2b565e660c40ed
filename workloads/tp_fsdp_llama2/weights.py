"""Weights on disk that a run starts from (`init_from`): checked against the settings, then read shard by shard.

Checking reads only the files' headers. A safetensors file starts with 8 bytes, the header's length (little-endian);
the header is JSON and gives each tensor's type, shape and offsets; the tensors' bytes follow
(https://huggingface.co/docs/safetensors). Only `Weights.read` needs torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.errors import WorkloadError, first_few
from workloads.input_files import expanded, head
from workloads.tp_fsdp_llama2 import huggingface
from workloads.tp_fsdp_llama2.config import Config, ModelConfig
from workloads.tp_fsdp_llama2.data import vocab_size

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_TYPES = ("BF16", "F16", "F32", "F64")
_LARGEST_HEADER = 10**8
"""safetensors' own limit."""
_DERIVED = ("rotary_emb.inv_freq", "rope.freqs")
"""Rotary tables that older checkpoints contain; they follow from rope_theta and are not parameters."""


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]


class Weights:
    """The weights at `init_from`, after checking that they fit the settings.

    Raises:
        WorkloadError: the files are missing or damaged, or do not fit the settings.
    """

    def __init__(self, config: Config) -> None:
        assert config.init_from is not None
        self._given = f"init_from={config.init_from}"
        self._model = config.model
        self._vocab_size = vocab_size(config)
        self._opened: dict[Path, Any] = {}
        directory, self._entries = self._open(expanded(config.init_from))
        self._is_hf = self._find_layout()
        self._description = self._read_description(directory)
        self._is_tied = self._is_hf and self._description is not None and huggingface.is_tied(self._description)
        self._check_settings()
        self._check_parameters()

    def __str__(self) -> str:
        types = " and ".join(sorted({entry.dtype for entry in self._entries.values()}))
        layout = "Hugging Face's" if self._is_hf else "Meta's"
        line = f"{self._given}: {len(self._entries)} tensors ({types}), {layout} layout"
        if self._is_tied:
            line += (
                "; tie_word_embeddings: the output layer starts as a copy of the embedding and is trained separately"
            )
        if self._description is None:
            line += f"; there is no {self._description_name}, so model.n_heads, norm_eps and rope_theta are not checked"
        return line

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """A part of a parameter, by our name, on the CPU, in its type on disk.

        It is a view of the memory-mapped file (for Hugging Face's wq and wk, a reordered part of whole heads): only the
        pages that hold it are read, and only when it is copied.

        Args:
            rows: in our order.
            columns: ignored for vectors.
        """
        if self._is_tied and name == "output.weight":
            name = "tok_embeddings.weight"
        stored = self._stored_name(name)
        entry = self._entries[stored]
        tensor = self._file(entry.file).get_slice(stored)
        if len(entry.shape) == 1:
            return tensor[rows]
        if not (self._is_hf and huggingface.is_rotated(name)):
            return tensor[rows, columns]
        head_dim = self._model.dim // self._model.n_heads
        first, last = rows.start // head_dim * head_dim, -(-rows.stop // head_dim) * head_dim
        heads = huggingface.to_pairs(tensor[first:last, columns], head_dim)
        return heads[rows.start - first : rows.stop - first]

    def _stored_name(self, name: str) -> str:
        return huggingface.parameter_name(name) if self._is_hf else name

    def _file(self, path: Path) -> Any:
        if path not in self._opened:
            from safetensors import safe_open

            self._opened[path] = safe_open(path, framework="pt")
        return self._opened[path]

    # ---- the files

    def _open(self, path: Path) -> tuple[Path, dict[str, _Entry]]:
        """The directory, and every tensor by its name there."""
        advice = "give the directory of a Llama saved by save_pretrained or by export=true, or a .safetensors file"
        if path.is_dir():
            found = [path / name for name in (SINGLE_FILE, INDEX_FILE) if (path / name).is_file()]
            if len(found) == 2:
                raise WorkloadError(
                    f"{self._given} holds both {SINGLE_FILE} and {INDEX_FILE}: name the file to use, "
                    f"such as init_from={found[0]}"
                )
            if not found:
                if (path / "export").is_dir():
                    advice = f"use init_from={path / 'export'}"
                raise WorkloadError(f"{self._given} holds neither {SINGLE_FILE} nor {INDEX_FILE}: {advice}")
            path = found[0]
        head(path, self._given, advice)
        if path.suffix != ".json":
            return path.parent, self._header(path)
        weight_map = self._json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise WorkloadError(f"{self._given}: {path.name} has no weight_map: give a {INDEX_FILE}")
        entries: dict[str, _Entry] = {}
        for file in sorted(set(weight_map.values())):
            if not (path.parent / file).is_file():
                raise WorkloadError(
                    f"{self._given}: {path.name} lists {file}, which does not exist: copy that file as well"
                )
            entries |= self._header(path.parent / file)
        if astray := sorted(
            name
            for name in weight_map.keys() | entries.keys()
            if name not in entries or entries[name].file.name != Path(weight_map.get(name, "")).name
        ):
            raise WorkloadError(
                f"{self._given}: {path.name} and the files that it lists disagree about {first_few(astray, 3)}: they "
                "are not from one export; copy all of them again"
            )
        return path.parent, entries

    def _header(self, path: Path) -> dict[str, _Entry]:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if len(start) == 8 and length <= min(size, _LARGEST_HEADER) else b""
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            entries = {name: _Entry(path, said["dtype"], tuple(said["shape"])) for name, said in header.items()}
            end = 8 + length + max((said["data_offsets"][1] for said in header.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            hint = "fetch it with `git lfs pull`" if start == b"version " else "give one, or copy it again"
            raise WorkloadError(f"{self._given}: {path.name} is not a safetensors file: {hint}") from None
        if end != size:
            raise WorkloadError(
                f"{self._given}: {path.name} has {size} bytes, but its header describes {end}: copy it again"
            )
        return entries

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise WorkloadError(f"{self._given}: {path.name} is not a JSON object: copy it again")
        return content

    # ---- what they hold

    def _find_layout(self) -> bool:
        """Whether names are Hugging Face's, and not Meta's."""
        for name, is_hf in (("model.embed_tokens.weight", True), ("tok_embeddings.weight", False)):
            if name in self._entries:
                return is_hf
        raise WorkloadError(
            f"{self._given} holds neither model.embed_tokens.weight (Hugging Face's Llama) nor tok_embeddings.weight "
            f"(Meta's); it holds {first_few(sorted(self._entries), 3)}: give the weights of a Llama"
        )

    @property
    def _description_name(self) -> str:
        return "config.json" if self._is_hf else "params.json"

    def _read_description(self, directory: Path) -> dict[str, Any] | None:
        path = directory / self._description_name
        return self._json(path) if path.is_file() else None

    def _check_settings(self) -> None:
        if self._description is None:
            described, source = self._sizes(), "its tensors have"
        elif self._is_hf:
            if reason := huggingface.unsupported(self._description):
                raise WorkloadError(f"{self._given}: config.json has {reason}; give another model")
            described, source = huggingface.model_settings(self._description), "config.json has"
        else:
            if self._description.get("use_scaled_rope"):
                raise WorkloadError(
                    f"{self._given}: params.json has use_scaled_rope=true: rope scaling (Llama 3.1) is not "
                    "supported; give another model"
                )
            described, source = _meta_settings(self._description), "params.json has"
        settings = {**self._model.model_dump(), "vocab_size": self._vocab_size}
        differing = {field: said for field, said in described.items() if said[1] != settings[field]}
        if differing:
            both = ", ".join(
                f"{key}={value} where model.{field}={settings[field]}" for field, (key, value) in differing.items()
            )
            use = " ".join(f"model.{field}={value}" for field, (_, value) in differing.items())
            raise WorkloadError(f"{self._given}: {source} {both}: the settings must match the saved model; use {use}")

    def _sizes(self) -> dict[str, tuple[str, Any]]:
        """The sizes that follow from the tensors' shapes alone."""
        embedding = self._entries[self._stored_name("tok_embeddings.weight")].shape
        layers = {found[1] for name in self._entries if (found := re.match(r"(?:model\.)?layers\.(\d+)\.", name))}
        sizes = {"vocab_size": embedding[0], "dim": embedding[-1], "n_layers": len(layers)}
        w1 = self._entries.get(self._stored_name("layers.0.feed_forward.w1.weight"))
        if w1 is not None:
            sizes["ffn_dim"] = w1.shape[0]
        return {field: (field, size) for field, size in sizes.items()}

    def _check_parameters(self) -> None:
        expected = {
            self._stored_name(name): shape for name, shape in parameter_shapes(self._model, self._vocab_size).items()
        }
        if self._is_tied:
            del expected[self._stored_name("output.weight")]
        stored = {name: entry for name, entry in self._entries.items() if not name.endswith(_DERIVED)}
        if self._is_tied:
            stored.pop(self._stored_name("output.weight"), None)
        if missing := [name for name in expected if name not in stored]:
            hint = (
                "; if the model ties its output to its embedding, put its config.json next to them"
                if missing == ["lm_head.weight"] and self._description is None
                else "; copy the whole checkpoint"
            )
            raise WorkloadError(f"{self._given} lacks {first_few(missing, 3)}: every parameter must be there{hint}")
        if left := [name for name in stored if name not in expected]:
            raise WorkloadError(
                f"{self._given} holds {first_few(left, 3)}, which this model does not have: ignoring them would change "
                "what it computes; give the weights of a plain Llama"
            )
        for name, shape in expected.items():
            entry = stored[name]
            if entry.shape != shape:
                raise WorkloadError(
                    f"{self._given}: {name} is {_times(entry.shape)}, but the settings make it {_times(shape)}: set "
                    "model.dim, n_heads, n_kv_heads, ffn_dim and vocab_size to those of the saved model"
                )
            if entry.dtype not in _TYPES:
                raise WorkloadError(
                    f"{self._given}: {name} is of type {entry.dtype}: {', '.join(_TYPES)} are supported; convert it "
                    "to one of them"
                )


def parameter_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by our names."""
    dim, kv_dim, ffn_dim = model.dim, model.n_kv_heads * (model.dim // model.n_heads), model.ffn_dim
    block = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (ffn_dim, dim),
        "feed_forward.w2": (dim, ffn_dim),
        "feed_forward.w3": (ffn_dim, dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab_size, dim)}
    for number in range(model.n_layers):
        shapes |= {f"layers.{number}.{name}.weight": shape for name, shape in block.items()}
    return {**shapes, "norm.weight": (dim,), "output.weight": (vocab_size, dim)}


def meta_params(config: Config) -> dict[str, Any]:
    """The params.json of an export in Meta's layout: Meta's keys, and what else is needed to build the model."""
    return {
        **config.model.model_dump(exclude={"preset"}),
        "vocab_size": vocab_size(config),
        "seq_len": config.seq_len,
        "rotary_pairs": "neighbouring components",
    }


def _meta_settings(params: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Maps fields of ModelConfig to params.json's key and value; Meta's own files omit some, or set vocab_size=-1."""
    said = {field: params[field] for field in ModelConfig.model_fields if params.get(field) is not None}
    if said.get("vocab_size") == -1:
        del said["vocab_size"]
    if "n_heads" in said:
        said.setdefault("n_kv_heads", said["n_heads"])
    return {field: (field, value) for field, value in said.items()}


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
