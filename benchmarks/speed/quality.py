"""Perplexity of a trained packed model by the native engine: int8 activations against float32 ones, on the same windows.

Windows and standard errors are those of :mod:`mixbits.lm.perplexity`: every window of the model's context scores its last half. The change
is paired by token; its standard error is over sentences.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.engine import Engine, unsupported
from mixbits.lm.corpus import TokenStream, encode, read_sentences
from mixbits.lm.perplexity import Perplexity, from_nll, paired_difference
from mixbits.lm.tokenizer import load_tokenizer

_WINDOWS_AT_ONCE = 64


class _Windows:
    def __init__(self, rows: list[np.ndarray]) -> None:
        self.tokens = np.concatenate(rows).astype(np.int64)
        self.parents = np.arange(len(self.tokens)) - 1
        self.parents[np.cumsum([0, *map(len, rows)])[:-1]] = -1


def engine_perplexity(engine: Engine, stream: TokenStream) -> Perplexity:
    """As :func:`mixbits.lm.perplexity.perplexity` with its defaults."""
    context = min(engine.context, stream.num_tokens)
    stride = max(1, context // 2)
    nll = np.empty(stream.num_tokens, np.float32)
    starts = [0, *range(stride, stream.num_tokens - context + 1, stride)]
    if starts[-1] + context < stream.num_tokens:
        starts.append(stream.num_tokens - context)
    done = 0
    for first in range(0, len(starts), _WINDOWS_AT_ONCE):
        group = starts[first : first + _WINDOWS_AT_ONCE]
        rows = [stream.ids[s : s + context + 1] for s in group]
        scores = engine.score_forest(_Windows(rows)).reshape(len(group), context + 1)[:, 1:]
        for start, values in zip(group, scores, strict=True):
            nll[done : start + context] = -values[done - start :]
            done = start + context
    return from_nll(nll, stream, context=context, stride=stride)


def int8_change(directory: Path | None, text: Path | None) -> dict[str, Any] | str:
    """Perplexities in both modes and the change in percent; a reason in words where it cannot be measured."""
    if directory is None:
        return "no trained packed model was given (--quality-model DIRECTORY)"
    if text is None:
        data = os.environ.get("MIXBITS_DATA")
        if not data:
            return "no text: MIXBITS_DATA is not set and --quality-text is not given"
        text = Path(data) / "ptb" / "ptb.test.txt"
    if not text.is_file():
        return f"no text: {text.name} is not there"
    if (reason := unsupported(directory)) is not None:
        return f"the native engine cannot run the model: {reason}"
    stream = encode(load_tokenizer(directory), read_sentences(text))
    exact = engine_perplexity(Engine(directory, activations="float32"), stream)
    int8 = engine_perplexity(Engine(directory), stream)
    difference, stderr = paired_difference(int8, exact, stream)
    return {
        "text": text.name, "sha256": stream.sha256, "num_tokens": stream.num_tokens,
        "ppl_float32_activations": exact.ppl, "ppl_int8_activations": int8.ppl,
        "change_percent": 100 * float(np.expm1(difference)), "change_percent_stderr": 100 * stderr,
    }  # fmt: skip
