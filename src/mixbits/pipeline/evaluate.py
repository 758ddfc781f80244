"""Perplexity of a model directory, alone, paired with a reference model on the same tokens, or interpolated with an n-gram model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixbits.asr.kenlm_model import NgramEngine, load_ngram
from mixbits.errors import DataError, SpecError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import encode_file
from mixbits.lm.perplexity import default_context, paired_difference, perplexity
from mixbits.packing.archive import unarchived
from mixbits.packing.modules import set_weight_cache
from mixbits.pipeline.checks import check_text
from mixbits.pipeline.ngram_perplexity import (
    interpolated_figures,
    paired_interpolated,
    read_ngram_text,
    tuned_weight,
)
from mixbits.runs import hash_file, versions


@dataclass(frozen=True)
class NgramSettings:
    """An n-gram model to interpolate with. ``weight``: the neural model's, unless it is tuned on the text ``tune``."""

    path: str | Path
    weight: float = 0.5
    tune: str | Path | None = None
    engine: NgramEngine = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise SpecError(
                f"the n-gram interpolation gives the model a weight of {self.weight}; expected above 0, at most 1"
            )


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
    ngram: NgramSettings | None = None,
) -> dict[str, Any]:
    """Figures as plain data: those of :class:`mixbits.lm.perplexity.Perplexity`, with ``reference`` the paired difference, and with ``ngram``
    those of :func:`mixbits.pipeline.ngram_perplexity.interpolated_figures` (for the reference too; each its own tuned weight).

    Both models are read with the same windows: by default as long as the shorter context of the two allows. Raises DataError
    when they do not share a tokenizer, or when the weight would be tuned on the text itself.
    """
    counts = None if ngram is None else load_ngram(ngram.path, engine=ngram.engine)
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
    if ngram is not None and counts is not None:
        seen = read_ngram_text(text, tokenizer, counts, stream)
        models = [(lm, result), *([] if other is None else [(other, base)])]
        weights = [ngram.weight] * len(models)
        if ngram.tune is not None:
            held_out = encode_file(tokenizer, ngram.tune)
            check_text(held_out, 1, ngram.tune)
            if held_out.sha256 == stream.sha256:
                raise DataError(f"{ngram.tune}: is the text that is evaluated; tune the n-gram's weight on another one")
            tuned_on = read_ngram_text(ngram.tune, tokenizer, counts, held_out)
            window = {"context": result.context, "stride": result.stride}
            weights = [tuned_weight(tuned_on, perplexity(m, held_out, **window)) for m, _ in models]
        found["ngram"] = {
            "file_sha256": hash_file(ngram.path),
            "order": counts.order,
            "engine": "kenlm" if type(counts).__name__ == "KenlmModel" else "numpy",
            "tuned_on_sha256": None if ngram.tune is None else held_out.sha256,
            **interpolated_figures(seen, result, weights[0]),
        }
        if other is not None:
            found["reference"]["ngram"] = interpolated_figures(seen, base, weights[1])
            delta, stderr = paired_interpolated(seen, result, weights[0], base, weights[1])
            found["ngram"] |= {"delta_nats_to_reference": delta, "delta_nats_to_reference_stderr": stderr}
    return found | {"versions": versions()}
