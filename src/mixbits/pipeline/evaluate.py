"""Perplexity of a model directory, alone or paired with a reference model on the same tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mixbits.errors import DataError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import encode_file
from mixbits.lm.perplexity import default_context, paired_difference, perplexity
from mixbits.packing.archive import unarchived
from mixbits.packing.modules import set_weight_cache
from mixbits.pipeline.checks import check_text
from mixbits.runs import versions


def load_scorer(path: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) for repeated scoring: a packed model, archived or not, keeps its unpacked weights, 4 bytes a weight."""
    with unarchived(path) as directory:
        model, tokenizer = load_model(directory)
    set_weight_cache(model)
    return model, tokenizer


def evaluate_models(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | Path | None = None,
    context: int | None = None,
    stride: int | None = None,
) -> dict[str, Any]:
    """Figures as plain data: those of :class:`mixbits.lm.perplexity.Perplexity`, and with ``reference`` the paired difference.

    Both models are read with the same windows: by default as long as the shorter context of the two allows. Raises DataError
    when they do not share a tokenizer.
    """
    lm, tokenizer = load_scorer(model)
    other = None
    if reference is not None:
        other, other_tokenizer = load_scorer(reference)
        if other_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise DataError(
                f"{model} and {reference} have different vocabularies; a paired difference needs the same one"
            )
    stream = encode_file(tokenizer, text)
    check_text(stream, 1, text)
    if context is None:
        context = min(default_context(m) for m in (lm, other) if m is not None)
    result = perplexity(lm, stream, context=context, stride=stride)
    found: dict[str, Any] = {**result.to_json(), "model_sha256": model_hash(model), "text_sha256": stream.sha256}
    if other is not None:
        base = perplexity(other, stream, context=result.context, stride=result.stride)
        delta, stderr = paired_difference(result, base, stream)
        found |= {
            "reference": base.to_json(),
            "delta_nats": delta,
            "delta_nats_stderr": stderr,
            "delta_ppl_relative": math.expm1(delta),
        }
    return found | {"versions": versions()}
