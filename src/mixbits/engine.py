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
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mixbits.engine_model import build_model, read_model, unsupported
from mixbits.errors import DataError, SpecError
from mixbits.kernels import cpu
from mixbits.kernels.cpu import Activations

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_MAX_ROWS, _MAX_STREAMS = 512, 1 << 20


class Forest(Protocol):
    """What is read of a token forest (:class:`mixbits.asr.trie.TokenForest`)."""

    @property
    def tokens(self) -> IntArray: ...
    @property
    def parents(self) -> IntArray: ...


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
        self.max_rows = min(max_rows, 1 << 40)
        self._library = library
        self._model, self._build = build_model(read_model(self.directory), self.directory)
        self._state: int | None = None
        self.num_streams = 0
        self._lock = threading.Lock()

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
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
        tokens, parents = _whole(forest.tokens, "tokens"), _whole(forest.parents, "parents")
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
        tokens = _whole([i for ids in sequences for i in ids], "the sequences' ids")
        parents = np.arange(len(tokens)) - 1
        parents[offsets[:-1][np.array(lengths, dtype=bool)]] = -1
        nodes = self.score_forest(_Arrays(tokens, parents))
        return np.array([nodes[start:stop].sum() for start, stop in pairwise(offsets)])

    def open_streams(self, num_streams: int) -> None:
        """Make key-value caches for that many streams, all empty; replaces those there are.

        Raises SpecError, or MemoryError if they do not fit; then there are no streams.
        """
        if not 1 <= num_streams <= _MAX_STREAMS:
            raise SpecError(f"num_streams is {num_streams}; expected 1 to {_MAX_STREAMS}")
        with self._lock:
            self._close()
            state = self._library.mb_state_new(ctypes.byref(self._model), self._activations, num_streams)
            if not state:
                raise MemoryError(f"{num_streams} streams of {self.context} positions do not fit memory; open fewer")
            self._state, self.num_streams = state, num_streams

    def reset(self, stream: int | None = None) -> None:
        """Forget what a stream (None: every stream) has read."""
        with self._lock:
            if stream is not None and not 0 <= stream < self.num_streams:
                raise SpecError(f"no stream {stream}; there are {self.num_streams}")
            if self._state is not None:
                self._library.mb_state_reset(self._state, -1 if stream is None else stream)

    def step(self, tokens: Iterable[int] | IntArray, streams: Iterable[int] | IntArray | None = None, *, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:  # fmt: skip
        """Read one token in each stream; returns the next token's logits, (len(tokens), vocabulary_size) float32.

        streams: a different stream for each token (default: 0, 1, ...); without :meth:`open_streams` there are as many as
        the first call has tokens. out: array to write to, so that nothing is allocated. Raises DataError for ids outside the
        vocabulary and streams that are full, SpecError for streams there are none of.
        """
        ids = _whole(tokens if isinstance(tokens, np.ndarray) else list(tokens), "tokens")
        if ids.ndim != 1:
            raise DataError(f"tokens have shape {ids.shape}; expected one id for each stream")
        if self._state is None:
            self.open_streams(max(1, len(ids)))
        where = np.arange(len(ids)) if streams is None else streams
        where = _whole(where if isinstance(where, np.ndarray) else list(where), "streams")
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
        elif out.shape != shape or out.dtype != np.float32 or not (out.flags.c_contiguous and out.flags.writeable):
            raise SpecError(f"out is {out.dtype} {out.shape}; expected contiguous writable float32 {shape}")
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
        elif error == cpu.TOO_LONG:
            text += f" of {self.context} positions"
        if error == cpu.NO_MEMORY:
            raise MemoryError(text)
        raise DataError(f"{self.directory}: {text}")

    def _close(self) -> None:
        if self._state is not None:
            self._library.mb_state_free(self._state)
            self._state, self.num_streams = None, 0

    def __del__(self) -> None:
        if getattr(self, "_state", None) is not None:
            self._close()


def _whole(values: Any, what: str) -> IntArray:
    """As contiguous int64. Raises DataError for numbers that are not whole."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise DataError(f"{what} are {array.dtype}; expected whole numbers")
    return np.ascontiguousarray(array, dtype=np.int64)


@dataclass(frozen=True)
class _Arrays:
    tokens: IntArray
    parents: IntArray
