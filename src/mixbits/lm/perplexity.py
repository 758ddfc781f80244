"""Perplexity of any causal LM by sliding window, with standard errors, alone or paired with a reference model.

Each window of ``context`` tokens scores its last ``stride`` predictions (the first window all of them), so that every token but
the first few sees at least ``context - stride`` tokens before it. Standard errors treat sentences as the independent draws
(ratio estimator), because tokens within a sentence are correlated. Unknown words are predicted as one ``<unk>`` each, which makes
perplexities comparable only between models with the same vocabulary; their number is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixbits.errors import DataError, SpecError
from mixbits.lm.corpus import TokenStream
from mixbits.lm.loss import evaluation_mode, token_nll


def _exp(nats: float) -> float:
    """exp that is infinite where a float ends (a broken model can have thousands of nats)."""
    return math.exp(nats) if nats < 700 else math.inf


@dataclass(frozen=True)
class Perplexity:
    """Result of an evaluation. ``nll`` (num_tokens,) float32 holds each token's negative log-probability in nats."""

    nats_per_token: float
    nats_stderr: float
    num_tokens: int
    num_words: int
    num_unknown: int
    context: int
    stride: int
    nll: np.ndarray

    @property
    def ppl(self) -> float:
        """Perplexity per token."""
        return _exp(self.nats_per_token)

    @property
    def ppl_stderr(self) -> float:
        """Standard error of the perplexity (first order)."""
        return self.ppl * self.nats_stderr

    @property
    def word_ppl(self) -> float:
        """Perplexity per white-space word, the end of a sentence counted as one."""
        return _exp(self.nats_per_token * self.num_tokens / self.num_words)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the per-token values."""
        return {
            "ppl": self.ppl,
            "ppl_stderr": self.ppl_stderr,
            "word_ppl": self.word_ppl,
            "nats": self.nats_per_token,
            "nats_stderr": self.nats_stderr,
            "num_tokens": self.num_tokens,
            "num_words": self.num_words,
            "num_unknown": self.num_unknown,
            "unknown_words": "predicted as one <unk> each",
            "context": self.context,
            "stride": self.stride,
        }


def mean_and_stderr(values: np.ndarray, sentence: np.ndarray) -> tuple[float, float]:
    """Mean over tokens and its standard error with sentences as clusters; infinite for a single sentence."""
    sums = np.bincount(sentence, weights=values.astype(np.float64))
    lengths = np.bincount(sentence)
    mean = sums.sum() / lengths.sum()
    if len(sums) < 2:
        return float(mean), math.inf
    residual = sums - mean * lengths
    variance = (residual**2).sum() * len(sums) / (len(sums) - 1)
    return float(mean), float(math.sqrt(variance) / lengths.sum())


def default_context(model: Any) -> int:
    """Window length of an evaluation unless one is asked for: the model's context, 1024 at most."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(limit or 1024, 1024)


@torch.no_grad()
def perplexity(
    model: Any, stream: TokenStream, *, context: int | None = None, stride: int | None = None, batch_size: int = 32
) -> Perplexity:
    """Evaluate ``model`` on a token stream.

    ``context``: window length, at most (and by default) the model's ``max_position_embeddings``, 1024 at most by default;
    ``stride``: new predictions a window (default half of context). Raises SpecError for impossible windows, DataError when the stream has
    token ids outside the vocabulary or the model gives NaN.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = default_context(model) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context or (limit is not None and context > limit):
        raise SpecError(f"window of {context} with stride {stride} does not fit; the model's context is {limit}")
    size = model.config.get_text_config().vocab_size
    if int(stream.ids.max()) >= size:
        raise DataError(
            f"text has token id {int(stream.ids.max())}, the model's vocabulary {size}; use the model's own tokenizer"
        )
    with evaluation_mode(model):
        nll = _window_nll(model, stream, context, stride, batch_size)
    if not np.isfinite(nll).all():
        raise DataError(
            f"the model gives {int((~np.isfinite(nll)).sum())} non-finite log-probabilities; its weights are broken"
        )
    return from_nll(nll, stream, context=context, stride=stride)


def _window_nll(model: Any, stream: TokenStream, context: int, stride: int, batch_size: int) -> np.ndarray:
    """Negative log-probabilities (num_tokens,) in nats: first window, the regular ones in batches, what is left at the end."""
    ids = torch.from_numpy(stream.ids.astype(np.int64)).to(next(model.parameters()).device)
    nll = np.empty(stream.num_tokens, np.float32)
    head = min(context, stream.num_tokens)
    nll[:head] = token_nll(model, ids[None, : head + 1])[0].cpu().numpy()
    starts = range(stride, stream.num_tokens - context + 1, stride)
    for first in range(0, len(starts), batch_size):
        group = starts[first : first + batch_size]
        rows = torch.stack([ids[s : s + context + 1] for s in group])
        scored = token_nll(model, rows, first=context - stride).cpu().numpy()
        for start, values in zip(group, scored, strict=True):
            nll[start + context - stride : start + context] = values
    done = starts[-1] + context if starts else head
    if done < stream.num_tokens:
        window = ids[stream.num_tokens - context :]
        rest = stream.num_tokens - done
        nll[done:] = token_nll(model, window[None], first=context - rest)[0].cpu().numpy()
    return nll


def from_nll(nll: np.ndarray, stream: TokenStream, *, context: int, stride: int) -> Perplexity:
    """Sum up per-token values (num_tokens,) that were computed with the given window."""
    mean, stderr = mean_and_stderr(nll, stream.sentence)
    return Perplexity(mean, stderr, stream.num_tokens, stream.num_words, stream.num_unknown, context, stride, nll)


def paired_difference(result: Perplexity, reference: Perplexity, stream: TokenStream) -> tuple[float, float]:
    """Mean difference in nats per token (positive: ``result`` is worse) and its standard error over sentences.

    Raises DataError when the two were not computed on the same tokens.
    """
    if len(result.nll) != len(reference.nll) or len(result.nll) != stream.num_tokens:
        raise DataError(
            "the two models were evaluated on different tokens; a paired difference needs the same tokenizer and text"
        )
    return mean_and_stderr(result.nll.astype(np.float64) - reference.nll, stream.sentence)
