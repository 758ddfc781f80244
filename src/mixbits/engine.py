"""The native engine: whole OPT and Llama models at mixed bits, in one call of the CPU library.

``Engine(directory)`` reads a packed model's files, repacks every matrix into the run-time layout (once, in parallel) and
forgets the file's bytes; full-precision weights never exist. ``score_forest`` gives every node of a token forest its
log-probability after its ancestors, each distinct prefix once; ``step`` decodes one token a stream with key-value caches.

Activations are int8 with one scale per token and matrix (``float32``: exact, the reference mode). Norms, attention and softmax
are float32 in both. Results do not depend on the number of threads or the instruction set, to the bit.

Oracle: the Hugging Face model of the same directory (tests). Limits: `OPTForCausalLM` without an embedding projection,
`LlamaForCausalLM`; inference on a CPU; no product units. Other models run in PyTorch: :func:`unsupported` says why.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mixbits.errors import DataError, FormatError, KernelUnavailable, SpecError
from mixbits.kernels import cpu
from mixbits.kernels.cpu import Activations, LayerStruct, MatrixStruct, ModelStruct, PackedMatrix
from mixbits.packing.verify import read_quantization_config, read_units, verify_packed
from mixbits.scales import compact_scale, join_scale
from mixbits.spec import QuantSpec

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_ACTIVATION_NUMBERS = {
    "relu": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_fast": 2,
    "silu": 3,
    "swish": 3,
}
_FAMILIES = {"opt": "OPTForCausalLM", "llama": "LlamaForCausalLM"}
_MAX_ROWS = 512
_OPT_OFFSET = 2
_NAMES = {
    "opt": {
        "embedding": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions",
        "final": "model.decoder.final_layer_norm", "layers": "model.decoder.layers",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
        "up": "fc1", "down": "fc2", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm",
    },
    "llama": {
        "embedding": "model.embed_tokens", "final": "model.norm", "layers": "model.layers",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    },
}  # fmt: skip


class Forest(Protocol):
    """What is read of a token forest (:class:`mixbits.asr.trie.TokenForest`)."""

    @property
    def tokens(self) -> IntArray: ...
    @property
    def parents(self) -> IntArray: ...


def unsupported(directory: str | Path) -> str | None:
    """Why the engine cannot run the packed model in ``directory``, in words; None if it can. Reads config.json only.

    Raises DataError, FormatError for a directory that is no packed model.
    """
    if not cpu.is_available():
        return cpu.why_unavailable()
    quantization, where = read_quantization_config(directory)
    packed = read_units(quantization, where=where)
    for unit in packed.units:
        if packed.specs[unit.name].is_product:
            return f"unit {unit.name} is product-quantized ({packed.specs[unit.name]})"
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return _unsupported_config(config)


def _unsupported_config(config: Mapping[str, Any]) -> str | None:
    kind = config.get("model_type")
    names = config.get("architectures") or []
    if kind not in _FAMILIES or list(names) != [_FAMILIES[kind]]:
        return f"it is a {', '.join(map(str, names)) or kind}; the engine has {' and '.join(_FAMILIES.values())}"
    act = config.get("activation_function", "relu") if kind == "opt" else config.get("hidden_act", "silu")
    if act not in _ACTIVATION_NUMBERS:
        return f"its activation function {act!r} is not among {', '.join(_ACTIVATION_NUMBERS)}"
    if kind == "opt":
        if config.get("word_embed_proj_dim", config.get("hidden_size")) != config.get("hidden_size"):
            return "its embeddings are projected to another width"
        if not config.get("layer_norm_elementwise_affine", True):
            return "its norms have no weights"
    elif "dynamic" in json.dumps(config.get("rope_parameters") or config.get("rope_scaling") or {}):
        return "its rotary positions depend on the length of the input"
    return None


@dataclass(frozen=True)
class _Loaded:
    config: Any
    specs: Mapping[str, QuantSpec]
    shapes: Mapping[str, tuple[int, int]]
    ties: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]


def _read(directory: Path) -> _Loaded:
    from transformers import AutoConfig

    weight_file, packed = verify_packed(directory)
    with weight_file.open() as reader:
        tensors = {stored.name: reader.tensor(stored) for stored in weight_file.tensors}
    ties = {other: unit.name for unit in packed.units for other in unit.tied}
    shapes = {unit.name: (unit.rows, unit.cols) for unit in packed.units}
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    return _Loaded(config, packed.specs, shapes, ties, tensors)


class _Builder:
    """Fills the library's structures from the tensors and keeps what they point to."""

    def __init__(self, loaded: _Loaded, where: Path) -> None:
        self.loaded, self.where = loaded, where
        self.kept: list[Any] = []
        self.num_bytes = 0
        self._done: dict[str, PackedMatrix] = {}

    def has(self, name: str) -> bool:
        return name in self.loaded.ties or name in self.loaded.shapes or f"{name}.weight" in self.loaded.tensors

    def matrix(self, name: str) -> MatrixStruct:
        name = self.loaded.ties.get(name, name)
        if name not in self._done:
            matrix = self._repack(name)
            self._done[name] = matrix
            self.num_bytes += matrix.num_bytes
            self.kept.append(matrix)
        return self._done[name].struct()

    def _repack(self, name: str) -> PackedMatrix:
        tensors = self.loaded.tensors
        codes = tensors.get(f"{name}.weight")
        if codes is None:
            raise FormatError(
                f"{self.where}: tensor {name + '.weight'!r} is missing; the model's architecture needs it"
            )
        if name not in self.loaded.shapes or not self.loaded.specs[name].is_quantized:
            if codes.dim() != 2:
                raise FormatError(
                    f"{self.where}: tensor {name + '.weight'!r} has shape {tuple(codes.shape)}; expected a matrix"
                )
            return cpu.repack(codes.to(torch.float16), None, QuantSpec(16), *codes.shape)
        (rows, cols), spec = self.loaded.shapes[name], self.loaded.specs[name]
        stored = tensors[f"{name}.scales"]
        if spec.scale_bits == 8:
            scale = join_scale(stored.view(-1, 1), compact_scale(tensors[f"{name}.scale_codes"], spec, cols))
        else:
            scale = compact_scale(stored.float(), spec, cols)
        return cpu.repack(codes, scale, spec, rows, cols)

    def vector(self, name: str, size: int) -> int | None:
        """Address of a vector in float32, or None where the model has none."""
        found = self.loaded.tensors.get(name)
        if found is None:
            return None
        if tuple(found.shape) != (size,):
            raise FormatError(f"{self.where}: tensor {name!r} has shape {tuple(found.shape)}; expected ({size},)")
        return self.keep(found.float())

    def keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        self.num_bytes += 4 * tensor.numel()
        return tensor.data_ptr()


def _build(loaded: _Loaded, where: Path) -> tuple[ModelStruct, _Builder]:
    config, kind = loaded.config, loaded.config.model_type
    names, build = _NAMES[kind], _Builder(loaded, where)
    opt = kind == "opt"
    model = ModelStruct()
    model.family = 0 if opt else 1
    model.num_layers, model.hidden, model.heads = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
    )
    model.kv_heads = model.heads if opt else config.num_key_value_heads
    model.head_dim = (
        model.hidden // model.heads if opt else (getattr(config, "head_dim", None) or model.hidden // model.heads)
    )
    model.feed_forward = config.ffn_dim if opt else config.intermediate_size
    model.context = config.max_position_embeddings
    model.activation = _ACTIVATION_NUMBERS[config.activation_function if opt else config.hidden_act]
    model.norm_first = int(config.do_layer_norm_before) if opt else 1
    model.position_offset = _OPT_OFFSET if opt else 0
    model.eps = 1e-5 if opt else config.rms_norm_eps
    model.attention_scale = model.head_dim**-0.5
    model.embedding = build.matrix(names["embedding"])
    head = "lm_head" if build.has("lm_head") else names["embedding"]
    model.head = build.matrix(head)
    model.head_bias = build.vector(f"{head}.bias", model.embedding.rows)
    if opt:
        model.positions = build.matrix(names["positions"])
    else:
        cosine, sine = _rotary(config)
        model.rope_cos, model.rope_sin = build.keep(cosine), build.keep(sine)
    model.final_gain = build.vector(f"{names['final']}.weight", model.hidden)
    model.final_bias = build.vector(f"{names['final']}.bias", model.hidden)
    layers = (LayerStruct * model.num_layers)()
    for i, layer in enumerate(layers):
        prefix = f"{names['layers']}.{i}."
        for short in ("q", "k", "v", "o", "gate", "up", "down"):
            if short in names:
                matrix = build.matrix(prefix + names[short])
                setattr(layer, short, matrix)
                setattr(layer, f"{short}_bias", build.vector(f"{prefix}{names[short]}.bias", matrix.rows))
        for short in ("norm1", "norm2"):
            for ours, theirs in (("gain", "weight"), ("bias", "bias")):
                setattr(layer, f"{short}_{ours}", build.vector(f"{prefix}{names[short]}.{theirs}", model.hidden))
    build.kept.append(layers)
    model.layers = ctypes.cast(layers, ctypes.POINTER(LayerStruct))
    cpu.check(cpu.library().mb_check_model(ctypes.byref(model)), f"{where}: its tensors do not make up a model")
    return model, build


def _rotary(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(context, head_dim) cosines and sines, by transformers' own module, whatever the scaling."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.arange(config.max_position_embeddings)[None]
    cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    return cosine[0].float(), sine[0].float()


class Engine:
    """A packed OPT or Llama model, ready to score and decode on the CPU.

    Args:
        activations: ``int8`` (default) or ``float32``.
        threads: of the library, for the whole process; None leaves it (MIXBITS_THREADS, OMP_NUM_THREADS or all cores).
        max_rows: model positions held at once while scoring; a tree that is larger takes what it needs.

    Raises:
        SpecError: a model the engine does not have (:func:`unsupported`). KernelUnavailable: no compiled library.
        DataError, FormatError: files missing or damaged.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        activations: Activations = "int8",
        threads: int | None = None,
        max_rows: int = _MAX_ROWS,
    ) -> None:
        self.directory = Path(directory)
        self._activations = cpu.activation_number(activations)
        self.activations: Activations = activations
        library = cpu.library()
        if not self.directory.is_dir():
            raise DataError(f"{self.directory}: no such directory; expected one written by mixbits")
        if (reason := unsupported(self.directory)) is not None:
            raise SpecError(f"{self.directory}: the native engine cannot run this model: {reason}; mixbits.load can")
        if max_rows < 1:
            raise SpecError(f"max_rows is {max_rows}; expected at least 1")
        if threads is not None:
            cpu.set_num_threads(threads)
        self.max_rows = max_rows
        self._library = library
        self._model, self._build = _build(_read(self.directory), self.directory)
        self._build.loaded = None  # type: ignore[assignment]  # the file's bytes are not needed any more
        self._state: int | None = None
        self.num_streams = 0
        self._lock = threading.Lock()

    @property
    def vocabulary_size(self) -> int:
        return int(self._model.embedding.rows)

    @property
    def context(self) -> int:
        """Most positions the model can read."""
        return int(self._model.context)

    @property
    def max_length(self) -> int:
        """Most ids of a scored sequence: the last one is predicted but never read."""
        return self.context + 1

    @property
    def num_bytes(self) -> int:
        """Bytes of weights, scales, biases and norms at rest."""
        return self._build.num_bytes

    def score_forest(self, forest: Forest) -> FloatArray:
        """(num_nodes,): log p(token | ancestors) in nats of each node, 0 at roots. Releases the GIL while it works.

        Parents stand before their children, trees are contiguous. Raises DataError for token ids outside the vocabulary,
        trees that are none, sequences longer than :attr:`max_length`.
        """
        tokens = np.ascontiguousarray(forest.tokens, dtype=np.int64)
        parents = np.ascontiguousarray(forest.parents, dtype=np.int64)
        if tokens.ndim != 1 or tokens.shape != parents.shape:
            raise DataError(
                f"a forest has tokens of shape {tokens.shape} and parents of shape {parents.shape}; expected (n,)"
            )
        out = np.empty(len(tokens), dtype=np.float32)
        error = self._library.mb_score_forest(
            ctypes.byref(self._model), self._activations, tokens.ctypes.data, parents.ctypes.data, len(tokens), self.max_rows,
            out.ctypes.data,
        )  # fmt: skip
        self._check(error, tokens)
        return out.astype(np.float64)

    __call__ = score_forest

    def score(self, sequences: Sequence[Sequence[int]]) -> FloatArray:
        """(num_sequences,): summed log-probability in nats of each sequence's ids after its first one."""
        lengths = [len(ids) for ids in sequences]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.fromiter((i for ids in sequences for i in ids), dtype=np.int64, count=int(offsets[-1]))
        parents = np.arange(len(tokens)) - 1
        parents[offsets[:-1][np.array(lengths, dtype=bool)]] = -1
        nodes = self.score_forest(_Arrays(tokens, parents))
        return np.array([nodes[start:stop].sum() for start, stop in pairwise(offsets)])

    def open_streams(self, num_streams: int) -> None:
        """Make key-value caches for that many streams, all empty; replaces those there are."""
        with self._lock:
            self._close()
            state = self._library.mb_state_new(ctypes.byref(self._model), self._activations, num_streams)
            if not state:
                raise SpecError(
                    f"cannot hold {num_streams} streams of {self.context} positions; expected a number from 1 that fits memory"
                )
            self._state, self.num_streams = state, num_streams

    def reset(self, stream: int | None = None) -> None:
        """Forget what a stream (None: every stream) has read."""
        with self._lock:
            if self._state is not None and self._library.mb_state_reset(self._state, -1 if stream is None else stream):
                raise SpecError(f"no stream {stream}; there are {self.num_streams}")

    def step(self, tokens: Iterable[int] | IntArray, streams: Iterable[int] | IntArray | None = None, *, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:  # fmt: skip
        """Read one token in each stream; returns the next token's logits, (len(tokens), vocabulary_size) float32.

        streams: a different stream for each token (default: 0, 1, ...); without :meth:`open_streams` there are as many as
        the first call has tokens. out: array to write to, so that nothing is allocated. Raises DataError for ids outside the
        vocabulary and streams that are full, SpecError for streams there are none of.
        """
        ids = np.ascontiguousarray(tokens if isinstance(tokens, np.ndarray) else list(tokens), dtype=np.int64)
        if ids.ndim != 1:
            raise DataError(f"tokens have shape {ids.shape}; expected one id for each stream")
        if self._state is None:
            self.open_streams(max(1, len(ids)))
        where = np.arange(len(ids)) if streams is None else streams
        where = np.ascontiguousarray(where if isinstance(where, np.ndarray) else list(where), dtype=np.int64)
        if (
            where.shape != ids.shape
            or len(np.unique(where)) != len(where)
            or ((where < 0) | (where >= self.num_streams)).any()
        ):
            raise SpecError(
                f"streams are {where.tolist()[:8]}; expected {len(ids)} different ones from 0 to {self.num_streams - 1}"
            )
        shape = (len(ids), self.vocabulary_size)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise SpecError(f"out is {out.dtype} {out.shape}; expected contiguous float32 {shape}")
        with self._lock:
            error = self._library.mb_step(self._state, where.ctypes.data, ids.ctypes.data, len(ids), out.ctypes.data)
        self._check(error, ids)
        return out

    def _check(self, error: int, tokens: IntArray) -> None:
        if not error:
            return
        text = self._library.mb_error_text(error).decode()
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocabulary_size:
            text += f": ids from {tokens.min()} to {tokens.max()}, vocabulary of {self.vocabulary_size}; use the model's own tokenizer"
        elif "context" in text:
            text += f" of {self.context} positions"
        if "out of memory" in text:
            raise MemoryError(text)
        raise DataError(f"{self.directory}: {text}")

    def _close(self) -> None:
        if self._state is not None:
            self._library.mb_state_free(self._state)
            self._state = None

    def __del__(self) -> None:
        if getattr(self, "_state", None) is not None:
            self._close()


@dataclass(frozen=True)
class _Arrays:
    tokens: IntArray
    parents: IntArray


__all__ = ["Engine", "KernelUnavailable", "unsupported"]
