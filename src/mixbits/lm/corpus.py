"""Plain text, one sentence a line, to token streams and blocks.

A stream is every sentence's tokens followed by the boundary token (the tokenizer's eos), so that a model learns where
sentences end; the first token of a stream is a boundary too. Blank lines are skipped. ``.gz`` and ``.xz`` are read as they are.
Unknown words are whatever the tokenizer makes of them (``<unk>`` for word-level vocabularies) and are counted. Text is data: a
``</s>`` or ``<|endoftext|>`` written in it is split like any other text and never becomes a boundary (:func:`encode_lines`).
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from mixbits.errors import DataError

_MAX_LINE_CHARACTERS = 1_000_000
_ENCODE_BATCH = 4096


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return open(path, "rb")


def read_sentences(path: str | Path) -> Iterator[str]:
    """Yield the non-blank lines of a text file, stripped.

    Raises DataError for a missing, empty, truncated or non-UTF-8 file, naming file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such text file; expected plain text, one sentence a line (.gz and .xz are read directly)"
        )
    number, found = 0, False
    try:
        with _open(path) as handle:
            while raw := handle.readline(_MAX_LINE_CHARACTERS + 1):
                number += 1
                if len(raw) > _MAX_LINE_CHARACTERS:
                    raise DataError(
                        f"{path}: line {number} is longer than {_MAX_LINE_CHARACTERS:,} bytes; expected one sentence a line"
                    )
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if "\0" in line:
                    raise DataError(
                        f"{path}: line {number} has a NUL byte; expected UTF-8 text (is it UTF-16 or binary?)"
                    )
                if line:
                    found = True
                    yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file, e.g. with iconv -t UTF-8"
        ) from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be decompressed after line {number} ({error}); is it cut short?") from None
    if not found:
        raise DataError(f"{path}: holds no text; expected one sentence a line")


@dataclass(frozen=True)
class TokenStream:
    """A tokenized text: ``ids`` (num_tokens + 1,) int32 beginning with the boundary token, and counts.

    ``sentence`` (num_tokens,) int32 is the sentence each *predicted* token ids[1:] belongs to; ``num_words`` counts
    white-space words plus one end of sentence each; ``sha256`` is over the text lines.
    """

    ids: np.ndarray
    sentence: np.ndarray
    num_words: int
    num_unknown: int
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Predicted tokens, ends of sentence included."""
        return len(self.ids) - 1


def boundary_id(tokenizer: Any) -> int:
    """The token that starts and ends sentences (eos). Raises DataError when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no eos token; mixbits needs one as sentence boundary: set tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def encode_lines(tokenizer: Any, lines: list[str]) -> list[list[int]]:
    """Token ids of each line as plain text: special tokens written in it are not special.

    Where a vocabulary holds them as words all the same (word-level), they become the unknown token. Raises DataError when there is
    none and a line would hold a sentence boundary.
    """
    rows = tokenizer(
        lines, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    unknown, boundary = tokenizer.unk_token_id, boundary_id(tokenizer)
    if unknown == boundary:
        unknown = None
    reserved = {boundary, tokenizer.bos_token_id, tokenizer.pad_token_id} - {None, unknown}
    for index, row in enumerate(rows):
        if reserved.isdisjoint(row):
            continue
        if unknown is None:
            raise DataError(
                f"text {lines[index][:60]!r} holds what the tokenizer reads as a special token (sentence boundary: "
                f"{tokenizer.convert_ids_to_tokens(boundary)!r}); remove it, or give the tokenizer an unk token of its own"
            )
        rows[index] = [unknown if token in reserved else token for token in row]
    return rows


def encode(tokenizer: Any, sentences: Iterable[str]) -> TokenStream:
    """Tokenize sentences into one stream. Raises DataError when there are none."""
    boundary = boundary_id(tokenizer)
    ids: list[np.ndarray] = [np.array([boundary], np.int32)]
    lengths: list[int] = []
    digest, num_words, unknown_id = hashlib.sha256(), 0, tokenizer.unk_token_id
    unknown_words = 0

    def add(batch: list[str]) -> None:
        nonlocal num_words, unknown_words
        for line, row in zip(batch, encode_lines(tokenizer, batch), strict=True):
            digest.update(line.encode() + b"\n")
            num_words += len(line.split()) + 1
            ids.append(np.array([*row, boundary], np.int32))
            lengths.append(len(row) + 1)
            if unknown_id is not None and unknown_id != boundary:
                unknown_words += sum(1 for token in row if token == unknown_id)

    batch: list[str] = []
    for line in sentences:
        batch.append(line)
        if len(batch) == _ENCODE_BATCH:
            add(batch)
            batch = []
    if batch:
        add(batch)
    if not lengths:
        raise DataError("no sentences to encode; expected at least one non-blank line")
    sentence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return TokenStream(np.concatenate(ids), sentence, num_words, unknown_words, digest.hexdigest())


def encode_file(tokenizer: Any, path: str | Path, *, max_words: int | None = None) -> TokenStream:
    """:func:`encode` for a file; ``max_words`` stops after the sentence that reaches it."""
    return encode(tokenizer, limit_words(read_sentences(path), max_words))


def limit_words(sentences: Iterable[str], max_words: int | None) -> Iterator[str]:
    """Pass sentences on until ``max_words`` words have gone by (None: all)."""
    total = 0
    for line in sentences:
        if max_words is not None and total >= max_words:
            return
        total += len(line.split())
        yield line


class BlockDataset(Dataset):
    """Consecutive blocks of ``context + 1`` tokens, each overlapping the next by one token.

    Item: {"input_ids": int64 (context + 1,)}; a model reads the first ``context`` and predicts the last ``context``. What is
    left over at the end is dropped. Raises DataError when the text is shorter than one block.
    """

    def __init__(self, stream: TokenStream, context: int) -> None:
        self.num_blocks = stream.num_tokens // context
        if self.num_blocks == 0:
            raise DataError(
                f"text has {stream.num_tokens} tokens, less than one block of {context}; add text or lower context"
            )
        self._ids, self._context = torch.from_numpy(stream.ids.astype(np.int64)), context

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self._context
        return {"input_ids": self._ids[start : start + self._context + 1]}


def token_batches(
    stream: TokenStream, *, context: int, num_blocks: int, micro_batch: int, seed: int
) -> list[torch.Tensor]:
    """``num_blocks`` blocks drawn without replacement, as micro-batches (micro_batch, context + 1) of int64.

    Fewer blocks than asked for are returned whole. Deterministic for a seed.
    """
    blocks = BlockDataset(stream, context)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(blocks), generator=generator)[:num_blocks].tolist()
    rows = torch.stack([blocks[i]["input_ids"] for i in chosen])
    return list(rows.split(micro_batch))
